"""The directions that sets of hidden states use: how many there are, and whether two sets share them.

`svcca` and `pwcca` are similarities of two sets, `principal_angle` is a distance, `effective_rank` and
`participation_ratio` are quantities of one set. What `tokenpaths.drift.sets` says of all set measures holds here too.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tokenpaths.drift.sets import centred, checked, inner, sound, varying


def svcca(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"], *, keep: float = 0.99) -> float:
    """The mean canonical correlation of the principal subspaces that hold `keep` of each set's variance.

        rho = singular values of U_x^T U_y,    SVCCA = mean rho,    X - mean = U_x S_x V_x^T cut at `keep`

    From 0 to 1. Blind to rotation, shift and isotropic scaling of either set. Independent sets of k kept directions
    still give about .85 sqrt(k / n), which is .27 at the ten tokens a direction that are asked for.

    Raises:
        ValueError: fewer than 10 k tokens, or a set that does not vary.

    Raghu et al. 2017.
    """
    x, y = checked(x, y)
    if torch.equal(x, y):
        return 1.0
    left, right = _kept_scores(x, y, keep)
    return torch.linalg.svdvals(left.T @ right).mean().clamp(max=1).item()


def pwcca(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"], *, keep: float = 0.99) -> float:
    """Canonical correlations weighted by how much of the frozen set each canonical variate h_i explains.

        PWCCA = sum_i a_i rho_i / sum_i a_i,    a_i = sum_j |<h_i, x_j>|,    x_j: dimension j of the frozen set

    rho is that of `svcca`. From 0 to 1; not symmetric. Blind to shift and isotropic scaling of either set, and to
    rotation of the steered set. Independent sets give about what they give in `svcca`.

    Raises:
        ValueError: as `svcca`.

    Morcos et al. 2018.
    """
    x, y = checked(x, y)
    if torch.equal(x, y):
        return 1.0
    left, right = _kept_scores(x, y, keep)
    turn, rho, _ = torch.linalg.svd(left.T @ right, full_matrices=False)
    weight = ((left @ turn).T @ centred(x)).abs().sum(1)
    return (weight @ rho / weight.sum()).clamp(max=1).item()


def principal_angle(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"], *, keep: float = 0.99) -> float:
    """The largest angle, in radians, between the principal subspaces that hold `keep` of each set's variance.

        sin a = ||V - W W^T V||_2,    cos a = s_min(W^T V),    V, W: orthonormal bases, V of the smaller subspace

    From 0 to pi/2; near pi/2 for independent sets of k < d/2 kept directions. Blind to shift and scaling of either set.
    It is the worst of k angles: where the last variances are close, their directions turn far at a small change.

    Raises:
        ValueError: fewer than 2 tokens, or a set that does not vary.

    Bjoerck & Golub 1973; Knyazev & Argentati 2002 (the sine, for small angles).
    """
    x, y = checked(x, y)
    if torch.equal(x, y):
        return 0.0
    smaller, larger = sorted((_principal(x, keep)[1], _principal(y, keep)[1]), key=lambda basis: basis.shape[1])
    within = larger.T @ smaller
    sine = torch.linalg.matrix_norm(smaller - larger @ within, 2)
    return torch.atan2(sine, torch.linalg.svdvals(within).min()).item()


def effective_rank(x: Float[Tensor, "n d"]) -> float:
    """How many directions the set uses: exp of the entropy of its normalised singular values.

        exp(-sum_i p_i log p_i),    p_i = s_i / sum_j s_j,    s: singular values of the centred states

    From 1 to min(n - 1, d). Blind to rotation, shift and scaling. Grows with n until n >> d: compare at equal n only.

    Raises:
        ValueError: fewer than 2 tokens, or a set that does not vary.

    Roy & Vetterli 2007.
    """
    s = torch.linalg.svdvals(varying(sound(x)))
    return torch.special.entr(s / s.sum()).sum().exp().item()


def participation_ratio(x: Float[Tensor, "n d"]) -> float:
    """How many directions the set's variance lies in; small directions count for less than in `effective_rank`.

        (sum_i l_i)^2 / sum_i l_i^2 = (tr C)^2 / ||C||_F^2,    l: eigenvalues of the covariance C

    From 1 to min(n - 1, d). Blind to rotation, shift and scaling. White noise gives about n d / (n + d): compare at
    equal n only.

    Raises:
        ValueError: fewer than 2 tokens, or a set that does not vary.

    Gao et al. 2017.
    """
    x = varying(sound(x))
    return (x.square().sum() ** 2 / inner(x, x)).item()


def _principal(x: Float[Tensor, "n d"], keep: float) -> tuple[Float[Tensor, "n k"], Float[Tensor, "d k"]]:
    """U and V of the fewest singular directions of the centred set that hold `keep` of its variance."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}, but it is a share of the variance: above 0, at most 1")
    u, s, vh = torch.linalg.svd(varying(x), full_matrices=False)
    s = s[s > s[0] * 1e-12]  # directions of rounding hold no variance
    held = s.square().cumsum(0) / s.square().sum()
    k = min(int((held < keep).sum()) + 1, len(s))
    return u[:, :k], vh[:k].T


def _kept_scores(
    x: Float[Tensor, "n d"], y: Float[Tensor, "n d"], keep: float
) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n l"]]:
    """U of both sets, as `_principal` keeps it, if there are tokens enough to correlate them."""
    left, right = _principal(x, keep)[0], _principal(y, keep)[0]
    n, kept = len(left), max(left.shape[1], right.shape[1])
    if n < 10 * kept:
        raise ValueError(
            f"{n} tokens are too few for {kept} kept directions: canonical correlations would be high by chance; read "
            f"{10 * kept} tokens or more, or lower keep"
        )
    return left, right
