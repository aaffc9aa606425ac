"""Steering trails: vectors, scales and gated directions, from outside the ReFT paper."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tokenpaths.trails.base import Trail
from tokenpaths.trails.reft import Init


class Additive(Trail):
    """A steering vector: v, whatever the state.  d parameters; identity at start: v = 0."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.v = nn.Parameter(torch.zeros(dim))

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        return self.v.expand_as(h)


class RED(Trail):
    """Representation editing: (s - 1) * h + b, so that h becomes s * h + b.  Wu et al. 2024, arXiv 2402.15179.

    2 d parameters; s = 1 and b = 0 at start, which is also the paper's initialisation. The paper edits the output of
    the feed-forward layer: stream "mlp".
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.s = nn.Parameter(torch.ones(dim))
        self.b = nn.Parameter(torch.zeros(dim))

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        return (self.s - 1) * h + self.b


class ReFTr1(Trail):
    """Rank-1 gated steering: a ReLU(v.h + b) v with ||v|| = 1.  After ReFT-r1, AxBench, arXiv 2501.17148.

    One unit direction both detects and steers; d + 2 parameters. Identity at start: a = 0; `init="paper"` sets a = 1.
    The published training averages the top-k detections of the whole sequence into one magnitude for all tokens, which
    would let a token be moved by later ones and cannot be decoded with a cache: here each token has its own.
    v is kept at unit norm by normalising it where it is used.
    """

    def __init__(self, dim: int, *, init: Init = "identity") -> None:
        super().__init__()
        self.dim = dim
        self.init: Init = _checked(init, self)
        self.starts_at_identity = init == "identity"
        self.v = nn.Parameter(F.normalize(torch.randn(dim), dim=0))
        self.b = nn.Parameter(torch.zeros(()))
        self.a = nn.Parameter(torch.zeros(()) if init == "identity" else torch.ones(()))

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        v = F.normalize(self.v, dim=0)
        return (self.a * F.relu(h @ v + self.b)).unsqueeze(-1) * v


class PSR(Trail):
    """Gated rank-1 steering with its own reader: ReLU(w.h + b) z.  Steer-like-the-LLM (PSR), arXiv 2605.03907.

    The paper's coefficient alpha is `strength` at `attach`. 2 d + 1 parameters. Identity at start: z = 0;
    `init="paper"` draws z as it draws w. b starts at 1, so that the gate is open and z learns from the first step.
    """

    def __init__(self, dim: int, *, init: Init = "identity") -> None:
        super().__init__()
        self.dim = dim
        self.init: Init = _checked(init, self)
        self.starts_at_identity = init == "identity"
        self.w = nn.Parameter(torch.randn(dim) * dim**-1.0)
        self.b = nn.Parameter(torch.ones(()))
        self.z = nn.Parameter(torch.zeros(dim) if init == "identity" else torch.randn(dim) * dim**-1.0)

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        return F.relu(h @ self.w + self.b).unsqueeze(-1) * self.z


def _checked(init: Init, trail: Trail) -> Init:
    if init not in ("identity", "paper"):
        raise ValueError(f"{type(trail).__name__}: init must be 'identity' or 'paper', not {init!r}")
    return init
