"""The ReFT family: low-rank displacements of a hidden state (Wu et al. 2024, arXiv 2404.03592).

Symbols as in the paper: `h` in R^d is a hidden state, `r <= d` the rank, `R` an `r x d` matrix with orthonormal rows.
`W`, `P`, `W1` and `W2` are free `r x d` matrices, and `b` is in R^r. Each class returns the displacement `Phi(h) - h`.
One name misleads: pyreft's `DireftIntervention` is not the paper's DiReFT.

| class          | displacement            | in the paper        | in pyreft 0.1.0          |
|----------------|-------------------------|---------------------|--------------------------|
| `LoReFT`       | R^T (W h + b - R h)     | LoReFT (eq. 2)      | `LoreftIntervention`     |
| `NoReFT`       | P^T (W h + b - P h)     | NoReFT (App. E)     | `NoreftIntervention`     |
| `DiReFT`       | W2^T (W1 h + b)         | **DiReFT** (eq. 3)  | `NodireftIntervention`   |
| `DirectReFT`   | R^T (W h + b)           | App. E, no name     | **`DireftIntervention`** |
| `ConstantReFT` | R^T (b - R h)           | App. E, no name     | `ConsreftIntervention`   |
| `BiasReFT`     | R^T b                   | App. E, no name     | `LobireftIntervention`   |

A fresh trail is the identity (`init="identity"`). The published initialisation (`init="paper"`) is not: with it a fresh
LoReFT moves each hidden state by about sqrt(r / d) of its norm. `dropout` zeroes entries of the low-rank code. The
published code applies it to the whole edited state, and so zeroes parts of the residual stream itself.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tokenpaths.checking import as_number, as_whole
from tokenpaths.trails.base import Trail, width_of
from tokenpaths.trails.stiefel import OrthonormalRows

Init: TypeAlias = Literal["identity", "paper"]


class LowRank(Trail):
    """What the family shares: its arguments, their checks, and the dropout of the low-rank code.

    Args:
        dim: the width d of the states.
        rank: the rank r, from 1 to dim.
        init: "identity", or "paper" for the published initialisation.
        dropout: how likely an entry of the low-rank code is zeroed in training, from 0 to below 1.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, dim: int, rank: int, *, init: Init = "identity", dropout: float = 0.0) -> None:
        super().__init__()
        name = type(self).__name__
        dim, rank = width_of(name, dim), as_whole(f"{name}: rank", rank, None)
        if not 1 <= rank <= dim:
            raise ValueError(f"{name}: rank {rank} must be from 1 to dim {dim}")
        check_init(self, init)
        if not 0 <= as_number(f"{name}: dropout", dropout) < 1:
            raise ValueError(f"{name}: dropout {dropout} must be at least 0 and below 1")
        self.dim = dim
        self.rank = rank
        self.init: Init = init
        self.dropout = dropout
        if init == "paper":
            self.starts_at_identity = False

    def drop(self, code: Float[Tensor, "*tokens rank"]) -> Float[Tensor, "*tokens rank"]:
        """The low-rank code, with dropout in training."""
        return F.dropout(code, self.dropout, self.training)


class Rotated(LowRank):
    """A trail of the family whose rows R are orthonormal. Arguments and errors as for `LowRank`."""

    def __init__(self, dim: int, rank: int, *, init: Init = "identity", dropout: float = 0.0) -> None:
        super().__init__(dim, rank, init=init, dropout=dropout)
        self.rotation = OrthonormalRows(self.rank, self.dim)

    @property
    def R(self) -> Float[Tensor, "rank dim"]:
        """R R^T = I, to the rounding of the trail's dtype."""
        return self.rotation().to(self.rotation.weight.dtype)


class LoReFT(Rotated):
    """Low-rank linear-subspace ReFT: R^T (W h + b - R h), with R R^T = I.  Paper eq. 2; 2 d r + r parameters.

    R and W are r x d, b is in R^r. Identity at start: W = R, b = 0. A fresh trail moves nothing where it was made. A
    cast to another dtype, or other hardware, computes R anew; then W - R is not zero but a rounding error, and a fresh
    trail moves h by at most 1e-7 of its norm in float64, and by 1e-3 in bfloat16.

    Args:
        dim: the width d of the states.
        rank: the rank r, from 1 to dim.
        init: "identity", or "paper": R random orthonormal, W and b as `nn.Linear` initialises them.
        dropout: how likely an entry of the low-rank code is zeroed in training, from 0 to below 1.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, dim: int, rank: int, *, init: Init = "identity", dropout: float = 0.0) -> None:
        super().__init__(dim, rank, init=init, dropout=dropout)
        self.W = _uniform(self.dim, self.rank, self.dim)
        self.b = _uniform(self.dim, self.rank)
        if init == "identity":
            _set(self.W, self.R)
            _set(self.b, 0.0)

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        rows = self.R
        # (W - R) h rather than W h - R h: one projection, and exactly zero while W = R
        return self.drop(F.linear(h, self.W - rows, self.b)) @ rows


class NoReFT(LowRank):
    """LoReFT without orthogonality: P^T (W h + b - P h).  Paper App. E; 2 d r + r parameters.

    P and W are r x d, b is in R^r. Identity at start: W = P, b = 0. Arguments and errors as for `LoReFT`.
    """

    def __init__(self, dim: int, rank: int, *, init: Init = "identity", dropout: float = 0.0) -> None:
        super().__init__(dim, rank, init=init, dropout=dropout)
        self.P = _uniform(self.dim, self.rank, self.dim)
        self.W = _uniform(self.dim, self.rank, self.dim)
        self.b = _uniform(self.dim, self.rank)
        if init == "identity":
            _set(self.W, self.P)
            _set(self.b, 0.0)

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        return self.drop(F.linear(h, self.W - self.P, self.b)) @ self.P


class DiReFT(LowRank):
    """The paper's DiReFT: W2^T (W1 h + b), no orthogonality and no subtraction.  Paper eq. 3; 2 d r + r parameters.

    W1 and W2 are r x d, b is in R^r. Identity at start: W2 = 0, b = 0. Arguments and errors as for `LoReFT`. This is
    pyreft's `NodireftIntervention`; pyreft's `DireftIntervention` is `DirectReFT`.
    """

    def __init__(self, dim: int, rank: int, *, init: Init = "identity", dropout: float = 0.0) -> None:
        super().__init__(dim, rank, init=init, dropout=dropout)
        self.W1 = _uniform(self.dim, self.rank, self.dim)
        self.W2 = _uniform(self.dim, self.rank, self.dim)
        self.b = _uniform(self.dim, self.rank)
        if init == "identity":
            _set(self.W2, 0.0)
            _set(self.b, 0.0)

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        return self.drop(F.linear(h, self.W1, self.b)) @ self.W2


class DirectReFT(Rotated):
    """R^T (W h + b), with R R^T = I: LoReFT without the subtraction.  Paper App. E; 2 d r + r parameters.

    R and W are r x d, b is in R^r. Identity at start: W = 0, b = 0. Arguments and errors as for `LoReFT`. This is
    pyreft's `DireftIntervention`, and not the paper's DiReFT.
    """

    def __init__(self, dim: int, rank: int, *, init: Init = "identity", dropout: float = 0.0) -> None:
        super().__init__(dim, rank, init=init, dropout=dropout)
        self.W = _uniform(self.dim, self.rank, self.dim)
        self.b = _uniform(self.dim, self.rank)
        if init == "identity":
            _set(self.W, 0.0)
            _set(self.b, 0.0)

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        return self.drop(F.linear(h, self.W, self.b)) @ self.R


class ConstantReFT(Rotated):
    """R^T (b - R h), with R R^T = I: the subspace is set to a constant.  Paper App. E; d r + r parameters.

    R is r x d, b is in R^r. **Never the identity**: it erases R h, whatever b is. So it is exempt from promise 3 of
    `Trail` and takes no `init`. b is drawn from U[0, 1), as in pyreft's `ConsreftIntervention`. Other arguments and
    errors as for `LoReFT`.
    """

    starts_at_identity = False

    def __init__(self, dim: int, rank: int, *, dropout: float = 0.0) -> None:
        super().__init__(dim, rank, dropout=dropout)
        self.b = nn.Parameter(torch.rand(self.rank))

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        rows = self.R
        return self.drop(self.b - F.linear(h, rows)) @ rows


class BiasReFT(Rotated):
    """R^T b, with R R^T = I: the same displacement for every state.  Paper App. E; d r + r parameters.

    R is r x d, b is in R^r. Identity at start: b = 0. `init="paper"` draws b from U[0, 1), as pyreft's
    `LobireftIntervention` does. Arguments and errors as for `LoReFT`.
    """

    def __init__(self, dim: int, rank: int, *, init: Init = "identity", dropout: float = 0.0) -> None:
        super().__init__(dim, rank, init=init, dropout=dropout)
        self.b = nn.Parameter(torch.zeros(self.rank) if init == "identity" else torch.rand(self.rank))

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        return self.drop(self.b.expand(*h.shape[:-1], -1)) @ self.R


def check_init(trail: Trail, init: str) -> None:
    """Raise `ValueError` unless `init` is "identity" or "paper"."""
    if init not in get_args(Init):
        raise ValueError(f"{type(trail).__name__}: init must be 'identity' or 'paper', not {init!r}")


def _uniform(dim: int, *shape: int) -> nn.Parameter:
    """U(-1/sqrt(dim), 1/sqrt(dim)): how `nn.Linear`, and so the published code, initialises weights and biases."""
    return nn.Parameter(torch.empty(shape).uniform_(-1 / math.sqrt(dim), 1 / math.sqrt(dim)))


@torch.no_grad()
def _set(parameter: nn.Parameter, value: Tensor | float) -> None:
    parameter.copy_(torch.as_tensor(value))
