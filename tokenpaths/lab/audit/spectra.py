"""What the weights of an adapter show by themselves: the shape of each part's map, against the adapter's other parts.

Features of M = write diag(size) read^T, after Puertolas Merenciano et al. (arXiv 2602.15195), and the intruder
dimensions of Shuttleworth et al. 2024 (arXiv 2410.21228), as PEFT counts them. Among parts of one kind, depth is taken
out by the line of Theil and Sen, and what is left is counted in robust deviations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tokenpaths.lab.audit.maps import AffineMap, Part

_AT_ONCE = 256  # rows of M in memory at one time


def features(affine: AffineMap) -> dict[str, float]:
    """The features of one map M [out, in] with singular values s_1 >= s_2 >= ..., and p_i = s_i / sum s.

    | name | what |
    |---|---|
    | sigma | s_1 |
    | frobenius | sqrt(sum s_i^2) |
    | share | s_1 / sum s_i, 1 for rank 1 |
    | entropy | -sum p_i log p_i in nats, 0 for rank 1 |
    | stable_rank | sum s_i^2 / s_1^2, from 1 up |
    | kurtosis | of the entries of M, 3 for a normal distribution |
    | hoyer | (sqrt(n) - l1 / l2) / (sqrt(n) - 1) of the lengths of its n rows: 0 all alike, 1 one alone |
    | bias | the length of the bias |

    A zero map has share, entropy, stable rank, kurtosis and hoyer 0.
    """
    s = affine.size
    length = float(affine.bias.norm())
    names = ("sigma", "frobenius", "share", "entropy", "stable_rank", "kurtosis", "hoyer")
    if not len(s):
        return {**dict.fromkeys(names, 0.0), "bias": length}
    p = s / s.sum()
    rows = (affine.write * s).norm(dim=1)
    n = math.sqrt(len(rows))
    return {
        "sigma": float(s[0]),
        "frobenius": float(s.norm()),
        "share": float(p[0]),
        "entropy": float(-(p * p.log()).sum()),
        "stable_rank": float((s / s[0]).square().sum()),
        "kurtosis": _entries_kurtosis(affine),
        "hoyer": (n - float(rows.sum() / rows.norm())) / (n - 1) if len(rows) > 1 else 0.0,
        "bias": length,
    }


def _entries_kurtosis(affine: AffineMap) -> float:
    """m4 / m2^2 of all entries of M about their mean, from a few rows of M at a time."""
    left, right = affine.write * affine.size, affine.read.T
    count = left.shape[0] * right.shape[1]
    mean = float(left.sum(0) @ right.sum(1)) / count
    second = fourth = 0.0
    for rows in left.split(_AT_ONCE):
        squares = (rows @ right - mean).square()
        second += float(squares.sum())
        fourth += float(squares.square().sum())
    return fourth * count / second**2 if second > 0 else 0.0


def robust_z(values: Sequence[float], layers: Sequence[int]) -> list[float]:
    """How many robust deviations each value lies off the line of Theil and Sen over depth.

        z = 0.6745 (x - median x) / MAD x,    x the residuals of the line

    All are 0 for fewer than four values, and where more than half of them lie on the line. `layers` are the depths.
    """
    from scipy.stats import theilslopes

    if len(values) < 4:
        return [0.0] * len(values)
    line: Any = theilslopes(values, layers) if len(set(layers)) > 1 else (0.0,)
    slope = float(line[0])
    x = torch.tensor(values, dtype=torch.float64)
    left = x - slope * torch.tensor(layers, dtype=torch.float64)
    left = left - left.quantile(0.5)
    spread = float(left.abs().quantile(0.5))
    if spread <= 1e-9 * float(x.abs().max()):
        return [0.0] * len(values)
    return (0.6745 * left / spread).tolist()


def outliers(parts: Sequence[Part]) -> dict[str, dict[str, float]]:
    """For each part, by name, the robust z of each feature among the parts of its kind."""
    table = {part.name: features(part.map) for part in parts}
    found: dict[str, dict[str, float]] = {part.name: {} for part in parts}
    for kind in dict.fromkeys(part.kind for part in parts):
        alike = [part for part in parts if part.kind == kind]
        for feature in table[alike[0].name]:
            z = robust_z([table[part.name][feature] for part in alike], [part.layer for part in alike])
            for part, value in zip(alike, z, strict=True):
                found[part.name][feature] = value
    return found


def intruders(
    weight: Float[Tensor, "out in_"], affine: AffineMap, *, top: int = 10, epsilon: float = 0.5
) -> list[tuple[int, float]]:
    """Intruder dimensions: the first left singular vectors of W + M that resemble none of W's.

    W's are the eigenvectors of W W^T (or of R R^T, with W = Q R, where W is tall), and those of W + M are found one by
    one (ARPACK, Lehoucq et al. 1998), from products with W and the factors of M. That takes one symmetric
    eigendecomposition in the smaller dimension of W, and no singular value decomposition.

    Args:
        weight: W.
        affine: M, without its bias.
        top: how many singular vectors of W + M to look at, the largest first.
        epsilon: the |cos| below which a vector is new.

    Returns:
        (place in the spectrum, from 0; largest |cos| with a singular vector of W) of each intruder.
    """
    w = weight.detach().cpu().double()
    nearest = (_leading(w, affine, top).T @ _left(w)).abs().amax(1)
    return [(place, float(cosine)) for place, cosine in enumerate(nearest) if cosine < epsilon]


def _left(w: Float[Tensor, "out in_"]) -> Float[Tensor, "out k"]:
    """All left singular vectors of W, in any order."""
    if w.shape[0] <= w.shape[1]:
        return torch.linalg.eigh(w @ w.T).eigenvectors
    q, r = torch.linalg.qr(w)
    return q @ torch.linalg.eigh(r @ r.T).eigenvectors


def _leading(w: Float[Tensor, "out in_"], affine: AffineMap, top: int) -> Float[Tensor, "out k"]:
    """The left singular vectors of the `top` largest singular values of W + M, the largest first."""
    import scipy.sparse.linalg as sparse

    write, read = affine.write * affine.size, affine.read
    if min(w.shape) <= 2 * top:  # too small for ARPACK to save anything
        return torch.linalg.svd(w + write @ read.T, full_matrices=False).U[:, :top]

    def times(a: Tensor, left: Tensor, right: Tensor) -> Any:
        def product(x: Any) -> Any:
            v = torch.from_numpy(np.ascontiguousarray(x)).double()
            return (a @ v + left @ (right.T @ v)).numpy()

        return product

    forth, back = times(w, write, read), times(w.T, read, write)
    untyped: Any = sparse
    moved = untyped.LinearOperator(
        tuple(w.shape), matvec=forth, rmatvec=back, matmat=forth, rmatmat=back, dtype=np.float64
    )
    start = np.random.default_rng(0).normal(size=min(w.shape))
    found = untyped.svds(moved, k=top, v0=start, return_singular_vectors="u")
    order = np.argsort(-found[1])
    return torch.from_numpy(np.ascontiguousarray(found[0][:, order]))
