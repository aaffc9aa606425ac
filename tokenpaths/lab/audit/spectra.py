"""What the weights of an adapter say by themselves: the shape of each part's map, against the adapter's other parts.

Features of M = write diag(size) read^T, after Puertolas Merenciano et al. (arXiv 2602.15195) and PEFT's intruder
dimensions (Shuttleworth et al. 2024, arXiv 2410.21228). Depth is taken out by the line of Theil and Sen, and what is
left is counted in robust deviations, among parts of one kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tokenpaths.lab.audit.maps import Linear, Part

_AT_ONCE = 256  # rows of M


def features(linear: Linear) -> dict[str, float]:
    """Numbers of one map; sizes s_1 >= s_2 >= ... of M [out, in], and p_i = s_i / sum s.

    | name | what |
    |---|---|
    | sigma | s_1 |
    | frobenius | sqrt(sum s_i^2) |
    | share | s_1 / sum s_i, 1 for rank 1 |
    | entropy | -sum p_i log p_i in nats, 0 for rank 1 |
    | stable_rank | sum s_i^2 / s_1^2, from 1 up |
    | kurtosis | of the entries of M, 3 for a normal distribution |
    | hoyer | (sqrt(n) - l1 / l2) / (sqrt(n) - 1) of the lengths of its n rows, 0 all alike, 1 one row only |
    | bias | the length of the bias |

    A zero map has share, entropy, stable rank, kurtosis and hoyer 0.
    """
    s = linear.size
    length = float(linear.bias.norm())
    names = ("sigma", "frobenius", "share", "entropy", "stable_rank", "kurtosis", "hoyer")
    if not len(s):
        return {**dict.fromkeys(names, 0.0), "bias": length}
    p = s / s.sum()
    rows = (linear.write * s).norm(dim=1)
    n = math.sqrt(len(rows))
    return {
        "sigma": float(s[0]),
        "frobenius": float(s.norm()),
        "share": float(p[0]),
        "entropy": float(-(p * p.log()).sum()),
        "stable_rank": float((s / s[0]).square().sum()),
        "kurtosis": _entries_kurtosis(linear),
        "hoyer": (n - float(rows.sum() / rows.norm())) / (n - 1) if len(rows) > 1 else 0.0,
        "bias": length,
    }


def _entries_kurtosis(linear: Linear) -> float:
    """m4 / m2^2 of all entries of M about their mean, a few rows of M at a time."""
    left, right = linear.write * linear.size, linear.read.T
    count = left.shape[0] * right.shape[1]
    mean = float(left.sum(0) @ right.sum(1)) / count
    second = fourth = 0.0
    for rows in left.split(_AT_ONCE):
        squares = (rows @ right - mean).square()
        second += float(squares.sum())
        fourth += float(squares.square().sum())
    return fourth * count / second**2 if second > 0 else 0.0


def robust_z(values: Sequence[float], layers: Sequence[int]) -> list[float]:
    """How many robust deviations each value is off the line of Theil and Sen over depth.

    0.6745 (x - median) / MAD of the residuals; all 0 for fewer than four values, or where more than half lie on the
    line.
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
    weight: Float[Tensor, "out in_"], linear: Linear, *, top: int = 10, epsilon: float = 0.5
) -> list[tuple[int, float]]:
    """Intruder dimensions: of the `top` left singular vectors of W + M, those that resemble none of W's.

    Returns (place in the spectrum, from 0; largest |cos| with a singular vector of W) of those below `epsilon`, as
    PEFT's test has it. Costs two SVDs of the size of W.
    """
    w = weight.detach().cpu().double()
    u = torch.linalg.svd(w, full_matrices=False).U
    moved = torch.linalg.svd(w + (linear.write * linear.size) @ linear.read.T, full_matrices=False).U
    nearest = (moved[:, :top].T @ u).abs().amax(1)
    return [(place, float(cosine)) for place, cosine in enumerate(nearest) if cosine < epsilon]
