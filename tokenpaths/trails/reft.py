"""The ReFT family: low-rank displacements of a hidden state (Wu et al. 2024, arXiv 2404.03592).

Symbols as in the paper: `h` in R^d is a hidden state, `r <= d` the rank, `R` an `r x d` matrix with orthonormal rows.
Each class returns the displacement `Phi(h) - h`. Beware of one name trap: pyreft's `DireftIntervention` is not the
paper's DiReFT.

| class          | displacement            | in the paper        | in pyreft 0.1.0          |
|----------------|-------------------------|---------------------|--------------------------|
| `LoReFT`       | R^T (W h + b - R h)     | LoReFT (eq. 2)      | `LoreftIntervention`     |
| `NoReFT`       | P^T (W h + b - P h)     | NoReFT (App. E)     | `NoreftIntervention`     |
| `DiReFT`       | W2^T (W1 h + b)         | **DiReFT** (eq. 3)  | `NodireftIntervention`   |
| `DirectReFT`   | R^T (W h + b)           | App. E, no name     | **`DireftIntervention`** |
| `ConstantReFT` | R^T (b - R h)           | App. E, no name     | `ConsreftIntervention`   |
| `BiasReFT`     | R^T b                   | App. E, no name     | `LobireftIntervention`   |

A fresh trail is the identity (`init="identity"`). The published initialisation (`init="paper"`) is not: a fresh LoReFT
then moves each hidden state by about sqrt(r / d) of its norm. `dropout` acts on the low-rank code; the published code
applies it to the whole edited state, and so zeroes parts of the residual stream itself.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tokenpaths.trails.base import Trail
from tokenpaths.trails.stiefel import OrthonormalRows

Init: TypeAlias = Literal["identity", "paper"]


class LowRank(Trail):
    """What the family shares: its arguments, their checks, and the dropout of the code."""

    def __init__(self, dim: int, rank: int, *, init: Init = "identity", dropout: float = 0.0) -> None:
        super().__init__()
        if not 1 <= rank <= dim:
            raise ValueError(f"{type(self).__name__}: rank {rank} must be from 1 to dim {dim}")
        if init not in ("identity", "paper"):
            raise ValueError(f"{type(self).__name__}: init must be 'identity' or 'paper', not {init!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"{type(self).__name__}: dropout {dropout} must be at least 0 and below 1")
        self.dim = dim
        self.rank = rank
        self.init: Init = init
        self.dropout = dropout
        if init == "paper":
            self.starts_at_identity = False

    def drop(self, code: Float[Tensor, "*tokens rank"]) -> Float[Tensor, "*tokens rank"]:
        return F.dropout(code, self.dropout, self.training)


class Rotated(LowRank):
    """Those of the family whose rows are orthonormal."""

    def __init__(self, dim: int, rank: int, *, init: Init = "identity", dropout: float = 0.0) -> None:
        super().__init__(dim, rank, init=init, dropout=dropout)
        self.rotation = OrthonormalRows(rank, dim)

    @property
    def R(self) -> Float[Tensor, "rank dim"]:
        """R R^T = I, to the rounding of the trail's dtype."""
        return self.rotation().to(self.rotation.weight.dtype)


class LoReFT(Rotated):
    """Low-rank linear-subspace ReFT: R^T (W h + b - R h), with R R^T = I.  Paper eq. 2; 2 d r + r parameters.

    Identity at start: W = R, b = 0. Exactly so where it was made; a cast to another dtype, or other hardware, makes R
    anew and leaves W - R at rounding (a fresh trail moves h by at most 1e-7 of it in float64, by 1e-3 in bfloat16).
    """

    def __init__(self, dim: int, rank: int, *, init: Init = "identity", dropout: float = 0.0) -> None:
        super().__init__(dim, rank, init=init, dropout=dropout)
        self.W = _linear_weight(rank, dim)
        self.b = _linear_bias(rank, dim)
        if init == "identity":
            _set(self.W, self.R)
            _set(self.b, 0.0)

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        rows = self.R
        # (W - R) h rather than W h - R h: one projection, and exactly zero while W = R
        return self.drop(F.linear(h, self.W - rows, self.b)) @ rows


class NoReFT(LowRank):
    """LoReFT without orthogonality: P^T (W h + b - P h).  Paper App. E; 2 d r + r parameters.

    Identity at start: W = P, b = 0.
    """

    def __init__(self, dim: int, rank: int, *, init: Init = "identity", dropout: float = 0.0) -> None:
        super().__init__(dim, rank, init=init, dropout=dropout)
        self.P = _linear_weight(rank, dim)
        self.W = _linear_weight(rank, dim)
        self.b = _linear_bias(rank, dim)
        if init == "identity":
            _set(self.W, self.P)
            _set(self.b, 0.0)

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        return self.drop(F.linear(h, self.W - self.P, self.b)) @ self.P


class DiReFT(LowRank):
    """The paper's DiReFT: W2^T (W1 h + b), no orthogonality and no subtraction.  Paper eq. 3; 2 d r + r parameters.

    This is pyreft's `NodireftIntervention`; pyreft's `DireftIntervention` is `DirectReFT`. Identity at start: W2 = 0.
    """

    def __init__(self, dim: int, rank: int, *, init: Init = "identity", dropout: float = 0.0) -> None:
        super().__init__(dim, rank, init=init, dropout=dropout)
        self.W1 = _linear_weight(rank, dim)
        self.W2 = _linear_weight(rank, dim)
        self.b = _linear_bias(rank, dim)
        if init == "identity":
            _set(self.W2, 0.0)
            _set(self.b, 0.0)

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        return self.drop(F.linear(h, self.W1, self.b)) @ self.W2


class DirectReFT(Rotated):
    """R^T (W h + b), with R R^T = I: LoReFT without the subtraction.  Paper App. E; 2 d r + r parameters.

    This is pyreft's `DireftIntervention`, and not the paper's DiReFT. Identity at start: W = 0, b = 0.
    """

    def __init__(self, dim: int, rank: int, *, init: Init = "identity", dropout: float = 0.0) -> None:
        super().__init__(dim, rank, init=init, dropout=dropout)
        self.W = _linear_weight(rank, dim)
        self.b = _linear_bias(rank, dim)
        if init == "identity":
            _set(self.W, 0.0)
            _set(self.b, 0.0)

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        return self.drop(F.linear(h, self.W, self.b)) @ self.R


class ConstantReFT(Rotated):
    """R^T (b - R h), with R R^T = I: the subspace is set to a constant.  Paper App. E; d r + r parameters.

    **Never the identity**: it erases R h whatever b is, so it is exempt from promise 3 of the contract and takes no
    `init`. b is drawn from U[0, 1), as in pyreft's `ConsreftIntervention`.
    """

    starts_at_identity = False

    def __init__(self, dim: int, rank: int, *, dropout: float = 0.0) -> None:
        super().__init__(dim, rank, dropout=dropout)
        self.b = nn.Parameter(torch.rand(rank))

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        rows = self.R
        return self.drop(self.b - F.linear(h, rows)) @ rows


class BiasReFT(Rotated):
    """R^T b, with R R^T = I: the same displacement for every state.  Paper App. E; d r + r parameters.

    Identity at start: b = 0. `init="paper"` draws b from U[0, 1), as pyreft's `LobireftIntervention` does.
    """

    def __init__(self, dim: int, rank: int, *, init: Init = "identity", dropout: float = 0.0) -> None:
        super().__init__(dim, rank, init=init, dropout=dropout)
        self.b = nn.Parameter(torch.zeros(rank) if init == "identity" else torch.rand(rank))

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        return self.drop(self.b.expand(*h.shape[:-1], -1)) @ self.R


def _linear_weight(rank: int, dim: int) -> nn.Parameter:
    """As `nn.Linear` initialises it, which is what the published code does: U(-1/sqrt(dim), 1/sqrt(dim))."""
    return nn.Parameter(torch.empty(rank, dim).uniform_(-1 / math.sqrt(dim), 1 / math.sqrt(dim)))


def _linear_bias(rank: int, dim: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(rank).uniform_(-1 / math.sqrt(dim), 1 / math.sqrt(dim)))


@torch.no_grad()
def _set(parameter: nn.Parameter, value: Tensor | float) -> None:
    parameter.copy_(torch.as_tensor(value))
