"""Two sets of hidden states compared as sets: did the cloud of points move, turn, shrink or lose its shape?

    cka(x, y)        # x, y: the frozen and the steered states of the same n tokens, n x d

Similarities are at most 1: `cka`, `biased_cka`, `rsa`. Distances are at least 0: `procrustes`, `mmd` (about 0, and
unbiased), `frechet`, `sliced_w2`. Equal sets give exactly 1 or 0. `tokenpaths.drift.subspaces` has the measures of the
directions that sets use.

Frozen and steered states share a basis, so a measure that is blind to rotation (`svcca`, `pwcca`, `procrustes`) can
miss a real change: read it beside the displacement of each token. Few tokens of many dimensions raise a similarity:
each docstring says what independent sets give. Leave massive activations out, or one token may decide the result.
States that hold NaN or infinity are refused.

Everything is computed in float64. With 1024 tokens, one thread needs up to 0.5 s a measure for 576 dimensions and 2 s
for 2048; `svcca`, `pwcca` and `principal_angle`, which need two SVDs, take 0.6 and 4 s.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def cka(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> float:
    r"""Debiased linear CKA of the states standardised by the frozen mean and deviation of each dimension.

        CKA = HSIC_1(K, L) / sqrt(HSIC_1(K, K) HSIC_1(L, L)),    K = X X^T,  L = Y Y^T
        HSIC_1(K, L) = [tr K~L~ + 1'K~1 1'L~1 / ((n-1)(n-2)) - 2/(n-2) 1'K~L~1] / (n(n-3)),  K~ = K with zero diagonal

    From -1 to 1; about 0 for independent sets, also where n < d. Blind to a shift and to an isotropic scaling of the
    steered set. A dimension that is constant in the frozen set is left out.

    Raises:
        ValueError: fewer than 4 tokens, or a set that does not vary.

    Song et al. 2012 (HSIC_1, eq. 5); Kornblith et al. 2019 (CKA); Murphy et al. 2024 (the bias).
    """
    x, y = checked(x, y, at_least=4)
    if torch.equal(x, y):
        return 1.0
    x, y = _standardised(x, y)
    return _cosine(_unbiased_hsic(x, y), _unbiased_hsic(x, x), _unbiased_hsic(y, y))


def biased_cka(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> float:
    """Linear CKA as first published: biased upward, and near 1 for *independent* sets where n < d.

        ||X^T Y||_F^2 / (||X^T X||_F ||Y^T Y||_F),    X, Y standardised as in `cka`

    From 0 to 1. Independent sets of 576 dimensions give .95, .82 and .36 at 32, 128 and 1024 tokens: to compare with
    published figures, never to conclude; use `cka`.

    Raises:
        ValueError: fewer than 2 tokens, or a set that does not vary.

    Kornblith et al. 2019.
    """
    x, y = checked(x, y)
    if torch.equal(x, y):
        return 1.0
    x, y = _standardised(x, y)
    return _cosine(inner(x, y), inner(x, x), inner(y, y))


def procrustes(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> float:
    """The angle, in radians, that is left between the sets after the best rotation of one onto the other.

        min_Q arccos <X, Y Q> = arccos ||X^T Y||_*,    X, Y centred and of Frobenius norm 1

    From 0 to pi/2. Blind to rotation, shift and isotropic scaling of either set. Independent sets come nearer to 0 the
    fewer the tokens are: with n <= d they can be turned far onto each other.

    Raises:
        ValueError: fewer than 2 tokens, or a set that does not vary.

    Williams et al. 2021 (the angular shape metric); Schoenemann 1966 (the rotation).
    """
    x, y = checked(x, y)
    if torch.equal(x, y):
        return 0.0
    x, y = varying(x), varying(y)
    chord = _gap_after_turning((x / x.norm()).T, (y / y.norm()).T)
    return 2 * math.asin(min(1.0, chord.item() / 2))


def rsa(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> float:
    """Representational similarity: are the tokens that were alike still alike?

        Spearman correlation of 1 - Pearson(x_s, x_t) with 1 - Pearson(y_s, y_t), over the pairs of tokens s < t

    From -1 to 1; about 0 for independent sets, whatever n and d. Blind to a shift of all dimensions of a state by one
    number and to its positive scaling, not to rotation. Dissimilarities within 1e-12 count as tied.

    Raises:
        ValueError: fewer than 3 tokens, a state whose dimensions are all equal, or a set of equal dissimilarities.

    Kriegeskorte et al. 2008.
    """
    x, y = checked(x, y, at_least=3)
    if torch.equal(x, y):
        return 1.0
    a, b = (centred(_ranks(_dissimilarities(states))) for states in (x, y))
    return _cosine(a @ b, a @ a, b @ b)


def mmd(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> float:
    """Unbiased squared maximum mean discrepancy: do the two sets come from one distribution?

        MMD^2 = mean over s != t of k(x_s, x_t) + k(y_s, y_t) - 2 k(x_s, y_t)
        k(a, b) = mean over w in (1/2, 1, 2) of exp(-||a - b||^2 / (2 (w m)^2)),    m = median ||x_s - x_t||, s < t

    From about 0, and below it by chance, to 2. No unit: the bandwidth is the frozen set's own. Blind to a rotation,
    shift or scaling of both sets. The two states of one token are not compared (s != t): they are not independent, and
    a small move would read as a negative distance. Independent sets of one distribution give 0 on average.

    Raises:
        ValueError: fewer than 2 tokens, or half of the frozen pairs or more are at distance 0.

    Gretton et al. 2012, eq. 4.
    """
    x, y = checked(x, y)
    if torch.equal(x, y):
        return 0.0
    x, y = x - x.mean(0), y - x.mean(0)  # nothing but rounding changes
    between_x, between_y, across = torch.pdist(x), torch.pdist(y), torch.cdist(x, y)
    median = between_x.median()
    if median == 0:
        raise ValueError(
            "half of the pairs of frozen states are equal, so mmd has no bandwidth; give more varied tokens"
        )

    def kernel(distances: Tensor) -> Tensor:
        exponent = (distances / median) ** 2 / 2
        return ((-4 * exponent).exp() + (-exponent).exp() + (-exponent / 4).exp()) / 3

    n, crossed = len(x), kernel(across)
    mean_crossed = (crossed.sum() - crossed.trace()) / (n * (n - 1))
    return (kernel(between_x).mean() + kernel(between_y).mean() - 2 * mean_crossed).item()


def frechet(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> float:
    """Frechet distance: Wasserstein-2 between Gaussians of the sets' means and covariances (not squared, unlike FID).

        W^2 = ||m_x - m_y||^2 + tr C_x + tr C_y - 2 tr (C_x^1/2 C_y C_x^1/2)^1/2

    In the unit of the states. Blind to which token is which, and to a rotation or shift of both sets. The last trace is
    ||A B^T||_* with C_x = A^T A and C_y = B^T B, so no root of a d x d matrix is taken and n < d does no harm.
    Independent sets of one distribution give more than 0, and much more where n < d: compare at equal n only.

    Raises:
        ValueError: fewer than 2 tokens.

    Dowson & Landau 1982.
    """
    x, y = checked(x, y)
    if torch.equal(x, y):
        return 0.0
    root = math.sqrt(len(x) - 1)
    spread = _gap_after_turning(centred(x) / root, centred(y) / root)
    return math.hypot((x.mean(0) - y.mean(0)).norm().item(), spread.item())


def sliced_w2(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"], *, directions: int = 256, seed: int = 0) -> float:
    """Sliced Wasserstein-2: the sets' distance seen along random directions, in each of which it is a sort.

        W^2 = mean over u of mean_t (sort(X u)_t - sort(Y u)_t)^2,    u: `directions` unit vectors drawn with `seed`

    In the unit of the states. Blind to which token is which, and to a shift of both sets. A move of all states by v
    reads as about ||v|| / sqrt(d). Independent sets of one distribution give more than 0, by n and not by d: about
    2.4 / sqrt(n) deviations of a dimension.

    Raises:
        ValueError: fewer than 2 tokens.

    Bonneel et al. 2015.
    """
    x, y = checked(x, y)
    if torch.equal(x, y):
        return 0.0
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(x.shape[1], directions, generator=generator, dtype=torch.float64).to(x.device)
    u = u / u.norm(dim=0)
    return ((x @ u).sort(0).values - (y @ u).sort(0).values).square().mean().sqrt().item()


def checked(x: Tensor, y: Tensor, at_least: int = 2) -> tuple[Tensor, Tensor]:
    """Both sets, in float64. Raises `ValueError` for sets of other shapes, and as `sound`."""
    if x.shape != y.shape:
        raise ValueError(
            f"the frozen states are {tuple(x.shape)} and the steered ones {tuple(y.shape)}; "
            "give the states of the same tokens at one layer, tokens x dimensions"
        )
    return sound(x, "frozen ", at_least), sound(y, "steered ", at_least)


def sound(x: Float[Tensor, "n d"], name: str = "", at_least: int = 2) -> Float[Tensor, "n d"]:
    """The set, in float64. Raises `ValueError` for fewer than `at_least` tokens, and for NaN or infinity."""
    if len(x) < at_least:
        raise ValueError(f"{len(x)} tokens are too few, this measure needs {at_least} or more; read more text")
    finite = x.isfinite().all(1)
    if not finite.all():
        raise ValueError(
            f"{int((~finite).sum())} of {len(x)} {name}states hold NaN or infinity, and no measure of them would mean "
            "anything; leave these tokens out, or find the layer where they arise"
        )
    return x.detach().double()


def centred(x: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
    """The set without its mean."""
    return x - x.mean(0)


def varying(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """The centred set. Raises `ValueError` for a set whose states are all equal."""
    if torch.equal(x.amin(0), x.amax(0)):
        raise ValueError(
            f"all {len(x)} states of a set are equal, so it has no shape to compare; give more varied tokens, "
            "or read the displacement, which is defined"
        )
    return centred(x)


def _standardised(
    x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]
) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n k"]]:
    """Both sets centred, in units of the frozen deviation, without dimensions in which the frozen set is constant."""
    varies = x.amin(0) < x.amax(0)
    deviation = varying(x)[:, varies].std(0)
    return centred(x)[:, varies] / deviation, varying(y[:, varies]) / deviation


def inner(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> Tensor:
    """The product tr X X^T Y Y^T = ||X^T Y||_F^2, by the smaller of the two forms."""
    n, d = x.shape
    return (x.T @ y).square().sum() if d < n else ((x @ x.T) * (y @ y.T)).sum()


def _unbiased_hsic(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> Tensor:
    """HSIC_1 of the linear kernels, which are never formed where d < n."""
    n = len(x)
    diagonal_x, diagonal_y = x.square().sum(1), y.square().sum(1)
    rows_x, rows_y = x @ x.sum(0) - diagonal_x, y @ y.sum(0) - diagonal_y  # K~1, L~1
    trace = inner(x, y) - diagonal_x @ diagonal_y  # tr K~L~
    total = rows_x.sum() * rows_y.sum() / ((n - 1) * (n - 2))
    return (trace + total - 2 / (n - 2) * rows_x @ rows_y) / (n * (n - 3))


def _cosine(xy: Tensor, xx: Tensor, yy: Tensor) -> float:
    if xx <= 0 or yy <= 0:
        raise ValueError("in one of the sets all tokens are equally alike, so a correlation with it is undefined")
    return (xy / (xx * yy).sqrt()).clamp(-1, 1).item()


def _gap_after_turning(a: Float[Tensor, "m k"], b: Float[Tensor, "m k"]) -> Tensor:
    """The least ||A - Q B||_F over orthogonal Q.

    Its square is ||A||^2 + ||B||^2 - 2 ||A B^T||_*, in which the rounding would hide a small gap.
    """
    rows, columns = a.shape
    if rows > columns:  # the triangles differ from A and B by a rotation only
        a, b = torch.linalg.qr(a).R, torch.linalg.qr(b).R
    u, _, vh = torch.linalg.svd(a @ b.T)
    return (a - u @ (vh @ b)).norm()


def _dissimilarities(x: Float[Tensor, "n d"]) -> Float[Tensor, " pairs"]:
    """1 - the Pearson correlation of each two states."""
    flat = int((x.amin(1) == x.amax(1)).sum())
    if flat:
        raise ValueError(
            f"{flat} of {len(x)} states have equal dimensions, so they correlate with none; leave them out"
        )
    unit = torch.nn.functional.normalize(x - x.mean(1, keepdim=True))
    pairs = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device).triu(1)
    return (1 - unit @ unit.T)[pairs]


def _ranks(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """From 1 up; ties within 1e-12 share the mean of their ranks."""
    ordered, order = values.round(decimals=12).sort()
    _, group, counts = ordered.unique_consecutive(return_inverse=True, return_counts=True)
    rank = counts.cumsum(0) - (counts - 1) / 2
    return torch.empty_like(values).scatter(0, order, rank[group].to(values.dtype))
