"""CURLoRA, Fawi 2024 (arXiv 2408.14572), as a method of PEFT: r x r numbers are trained for each weight.

    peft_model = peft.get_peft_model(model, CurLoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj"]))
    curlora = PeftAdapter(peft_model)

It forgets little because its capacity is small: a few hundred numbers for each weight, in directions that the weight
uses least.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Int
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from tokenpaths.lab.peers.layer import AddedConfig, AddedLinear, AddedModel, register

Sampling = Literal["paper", "published-code"]


@dataclass
class CurLoraConfig(AddedConfig):
    """y = x (W + alpha C U R), for W as in x W, [in, out].

    C holds r columns of W and R r of its rows, drawn once and frozen. U, r x r, is trained and begins at 0. So a fresh
    adapter changes nothing, the change has rank r at most, and ||C U R|| <= ||C|| ||U|| ||R|| in the Frobenius norm.

    Columns and rows are drawn by inverted importance. With p_j the share of column j in the squared norm of W,

        paper            P_j ~ 1 / p_j, r different ones; a column of zeros, which has no 1 / p_j, is never drawn
        published-code   P_j ~ 1 / (p_j + 0.001), with replacement, as the authors' code does

    In a wide layer p_j is far below 0.001, so the code draws almost uniformly. It may draw a column twice: then the
    rank is less than r. The published figures are of the code.

    C and R are saved with U: a file needs no seed and no drawing to be read.

    Args:
        alpha: a factor of the change.
        sampling: as above.
        seed: the seed of the drawing, together with the name of each module.

    The other arguments are those of `AddedConfig`; r is the number of columns and of rows. The paper targets the
    projections of queries, keys and values.

    Raises:
        ValueError: an r below 1, an alpha that is not finite, or another sampling; and when it is laid into a model, an
            r that a target cannot give.
    """

    method: ClassVar[str] = "CURLORA"
    alpha: float = 1.0
    sampling: Sampling = "paper"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.alpha):
            raise ValueError(f"CurLoraConfig: alpha={self.alpha} must be a finite number")
        if self.sampling not in get_args(Sampling):
            raise ValueError(f"CurLoraConfig: sampling={self.sampling!r} must be 'paper' or 'published-code'")


class CurLoraLinear(AddedLinear):
    """A linear map with CURLoRA changes: U is a parameter, C and R are buffers."""

    adapter_layer_names: tuple[str, ...] = ("curlora_U",)
    other_param_names: tuple[str, ...] = ("curlora_C", "curlora_R", "curlora_alpha")

    def begin(self) -> None:
        self.curlora_U: Any = nn.ParameterDict()  # torch and PEFT do not say what these dicts hold
        self.curlora_C: Any = BufferDict(persistent=True)
        self.curlora_R: Any = BufferDict(persistent=True)
        self.curlora_alpha: dict[str, float] = {}

    def lay(self, adapter: str, config: CurLoraConfig, key: str) -> None:
        w = self.base().T
        generator = torch.Generator().manual_seed(_seed(config.seed, key))
        columns = draw(w, config.r, config.sampling, generator, key)
        rows = draw(w.T, config.r, config.sampling, generator, key)
        self.curlora_C[adapter] = w[:, columns.to(w.device)].contiguous()
        self.curlora_R[adapter] = w[rows.to(w.device)].contiguous()
        self.curlora_U[adapter] = nn.Parameter(torch.zeros(config.r, config.r, dtype=w.dtype, device=w.device))
        self.curlora_alpha[adapter] = config.alpha

    def change(self, adapter: str, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        c, u, r = self._factors(adapter)
        return self.curlora_alpha[adapter] * (self._cast_input_dtype(x, u.dtype) @ c @ u @ r)

    def delta(self, adapter: str) -> Float[Tensor, "out in"]:
        c, u, r = self._factors(adapter)
        return self.curlora_alpha[adapter] * (c @ u @ r).T

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor, Tensor]:
        u: Tensor = self.curlora_U[adapter]
        return self.curlora_C[adapter].to(u.dtype), u, self.curlora_R[adapter].to(u.dtype)


class CurLoraModel(AddedModel):
    """The tuner of CURLoRA: `peft.get_peft_model` makes it."""

    prefix: str = "curlora_"
    tuner_layer_cls = CurLoraLinear


register(CurLoraConfig, CurLoraModel)


def column_odds(w: Float[Tensor, "m n"], sampling: Sampling = "paper") -> Float[Tensor, " n"]:
    """The probability with which each column is drawn first, in float64: see `CurLoraConfig`."""
    squares = w.double().square().sum(0)
    shares = squares / squares.sum()
    inverse = 1 / (shares + 0.001) if sampling == "published-code" else torch.where(shares > 0, 1 / shares, 0.0)
    return inverse / inverse.sum()


def draw(
    w: Float[Tensor, "m n"], r: int, sampling: Sampling, generator: torch.Generator, what: str = "the weight"
) -> Int[Tensor, " r"]:
    """The numbers of r columns, drawn one after another; with replacement if `sampling` is "published-code".

    Args:
        w: the weight.
        r: how many to draw.
        sampling: as in `CurLoraConfig`.
        generator: the source of randomness, on the CPU.
        what: the name of the weight, for errors.

    Raises:
        ValueError: the weight is not finite, or has fewer than r columns other than zero.
    """
    if not bool(w.isfinite().all()):
        raise ValueError(f"{what} holds NaN or infinity: nothing can be drawn of it")
    odds = column_odds(w, sampling).cpu()
    if int((odds > 0).sum()) < r:
        raise ValueError(
            f"{what} has {int((odds > 0).sum())} rows or columns other than zero, and r={r} are to be drawn"
        )
    return torch.multinomial(odds, r, replacement=sampling == "published-code", generator=generator)


def _seed(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:7], "big")
