"""Steering trails from outside the ReFT paper: vectors, scales and gated directions.

`h` in R^d is a hidden state, `dim` is d everywhere, and vectors are in R^d if nothing else is said.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tokenpaths.trails.base import Trail, width_of
from tokenpaths.trails.reft import Init, check_init


class Additive(Trail):
    """A steering vector: v, the same for every state.  d parameters; identity at start: v = 0.

    Args:
        dim: the width d of the states.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim = width_of(type(self).__name__, dim)
        self.v = nn.Parameter(torch.zeros(dim))

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        return self.v.expand_as(h)


class RED(Trail):
    """Representation editing: (s - 1) * h + b, so that h becomes s * h + b.  Wu et al. 2024, arXiv 2402.15179.

    `*` is entry by entry; 2 d parameters. Identity at start, as in the paper: s = 1, b = 0. The paper edits the output
    of the feed-forward layer: stream "mlp".

    Args:
        dim: the width d of the states.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim = width_of(type(self).__name__, dim)
        self.s = nn.Parameter(torch.ones(dim))
        self.b = nn.Parameter(torch.zeros(dim))

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        return (self.s - 1) * h + self.b


class ReFTr1(Trail):
    """Rank-1 gated steering: a ReLU(v.h + b) v with ||v|| = 1.  After ReFT-r1, AxBench, arXiv 2501.17148.

    One unit direction both detects and steers; a and b are numbers; d + 2 parameters. Identity at start: a = 0. The
    published training averages the top-k detections of a whole sequence into one magnitude for all its tokens. Then
    later tokens would move earlier ones, which a cache cannot decode. Here each token has its own magnitude. v is
    divided by its norm where it is used.

    Args:
        dim: the width d of the states.
        init: "identity", or "paper" for a = 1.

    Raises:
        ValueError: `init` is neither.
    """

    def __init__(self, dim: int, *, init: Init = "identity") -> None:
        super().__init__()
        self.dim = dim = width_of(type(self).__name__, dim)
        check_init(self, init)
        self.init: Init = init
        self.starts_at_identity = init == "identity"
        self.v = nn.Parameter(F.normalize(torch.randn(dim), dim=0))
        self.b = nn.Parameter(torch.zeros(()))
        self.a = nn.Parameter(torch.zeros(()) if init == "identity" else torch.ones(()))

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        v = F.normalize(self.v, dim=0)
        return (self.a * F.relu(h @ v + self.b)).unsqueeze(-1) * v


class PSR(Trail):
    """Gated rank-1 steering with its own reader: ReLU(w.h + b) z.  Steer-like-the-LLM (PSR), arXiv 2605.03907.

    w and z are vectors, b is a number; 2 d + 1 parameters. Identity at start: z = 0. b starts at 1, so that the gate is
    open and z learns from the first step. The paper's coefficient alpha is `strength` at `attach`.

    Args:
        dim: the width d of the states.
        init: "identity", or "paper": z is drawn as w is.

    Raises:
        ValueError: `init` is neither.
    """

    def __init__(self, dim: int, *, init: Init = "identity") -> None:
        super().__init__()
        self.dim = dim = width_of(type(self).__name__, dim)
        check_init(self, init)
        self.init: Init = init
        self.starts_at_identity = init == "identity"
        self.w = nn.Parameter(torch.randn(dim) * dim**-1.0)
        self.b = nn.Parameter(torch.ones(()))
        self.z = nn.Parameter(torch.zeros(dim) if init == "identity" else torch.randn(dim) * dim**-1.0)

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        return F.relu(h @ self.w + self.b).unsqueeze(-1) * self.z
