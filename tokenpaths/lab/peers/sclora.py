"""SC-LoRA, Luo et al. 2025 (arXiv 2505.23724): LoRA that begins in a subspace of the task and away from what to keep.

    config = ScLoraConfig(r=8, target_modules="all-linear")
    peft_model, found = sc_lora(model, config, task=examples, keep=encode_texts(texts, tokenizer), beta=0.8)
    print(min(subspace.positive for subspace in found.values()))
    adapter = PeftAdapter(peft_model)

For each target W0, with y+ = W0 x over the tokens of the task and y- = W0 x over those of what is to be kept:

    D = (1 - beta) E[y+ y+^T] - beta E[y- y-^T]        Q_r: eigenvectors of its r largest eigenvalues
    B0 = Q_r,  A0 = Q_r^T W0 / s                       s = alpha / r
    y = W0 x + s (B A - B0 A0) x,  A and B trained from A0 and B0

Of all subspaces of r dimensions, that of Q_r has the largest (1 - beta) E||Q Q^T y+||^2 - beta E||Q Q^T y-||^2, which
is the sum of those eigenvalues (Ky Fan). A negative eigenvalue is a direction with more to lose than to gain.

The paper writes W0 - s B0 A0 over the weight. Here W0 is left as it is and the first factors are kept beside it, which
is the same map: a fresh adapter changes nothing, to the bit and in any dtype, and the model with the adapter disabled
is the frozen model. It is a start only: B is trained, and may leave the subspace.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from peft import PeftModel, get_peft_model
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from tokenpaths.attachment.runs import evaluating
from tokenpaths.data.examples import Example, collate
from tokenpaths.engine.batches import by_length
from tokenpaths.engine.forwards import forward_states
from tokenpaths.engine.states import observing
from tokenpaths.lab.peers.layer import AddedConfig, AddedLinear, AddedModel, register
from tokenpaths.site import Place
from tokenpaths.undo import tidy


@dataclass
class ScLoraConfig(AddedConfig):
    """The shape of an SC-LoRA adapter; `sc_lora` gives it its first factors.

    Where `get_peft_model` alone lays it into a model its factors are NaN, so that it is not trained from nothing.

    Args:
        alpha: the change is scaled by alpha / r; by default alpha is r, so the scale is 1, as in the paper.
        dropout: the dropout of what enters A and A0, in training. (Before A alone, as where W0 - s B0 A0 is written
            over the weight, it would throw the model far off before anything is learned.)

    The other arguments are those of `AddedConfig`.

    Raises:
        ValueError: a number is out of range.
    """

    method: ClassVar[str] = "SCLORA"
    alpha: int | float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"ScLoraConfig: alpha={self.alpha} must be a finite number above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"ScLoraConfig: dropout={self.dropout} must be at least 0 and below 1")

    @property
    def scaling(self) -> float:
        """The scale s = alpha / r."""
        return 1.0 if self.alpha is None else self.alpha / self.r


class ScLoraLinear(AddedLinear):
    """A linear map with SC-LoRA changes: A, B are parameters, the first factors A0, B0 are buffers."""

    adapter_layer_names: tuple[str, ...] = ("sclora_A", "sclora_B")
    other_param_names: tuple[str, ...] = ("sclora_A0", "sclora_B0", "sclora_dropout", "sclora_scaling")

    def begin(self) -> None:
        self.sclora_A: Any = nn.ParameterDict()  # torch and PEFT do not say what these dicts hold
        self.sclora_B: Any = nn.ParameterDict()
        self.sclora_A0: Any = BufferDict(persistent=True)
        self.sclora_B0: Any = BufferDict(persistent=True)
        self.sclora_dropout = nn.ModuleDict()
        self.sclora_scaling: dict[str, float] = {}

    def lay(self, adapter: str, config: ScLoraConfig, key: str) -> None:
        w = self.base()
        self.sclora_A0[adapter] = w.new_full((config.r, w.shape[1]), math.nan)
        self.sclora_B0[adapter] = w.new_full((w.shape[0], config.r), math.nan)
        self.sclora_A[adapter] = nn.Parameter(self.sclora_A0[adapter].clone())
        self.sclora_B[adapter] = nn.Parameter(self.sclora_B0[adapter].clone())
        self.sclora_dropout[adapter] = nn.Dropout(config.dropout)
        self.sclora_scaling[adapter] = config.scaling

    @torch.no_grad()
    def start(self, adapter: str, q: Float[Tensor, "out r"]) -> None:
        """Give the adapter its first factors, from the subspace that the orthonormal columns of Q span."""
        projected = (q.mT @ self.base().to(q.dtype)) / self.sclora_scaling[adapter]
        for kept in (self.sclora_A, self.sclora_A0):
            kept[adapter].copy_(projected)
        for kept in (self.sclora_B, self.sclora_B0):
            kept[adapter].copy_(q)

    def change(self, adapter: str, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        a, b, a0, b0 = self._factors(adapter)
        x = self.sclora_dropout[adapter](self._cast_input_dtype(x, a.dtype))
        return self.sclora_scaling[adapter] * (x @ a.mT @ b.mT - x @ a0.mT @ b0.mT)

    def delta(self, adapter: str) -> Float[Tensor, "out in"]:
        a, b, a0, b0 = self._factors(adapter)
        return self.sclora_scaling[adapter] * (b @ a - b0 @ a0)

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        a, b = self.sclora_A[adapter], self.sclora_B[adapter]
        return a, b, self.sclora_A0[adapter].to(a.dtype), self.sclora_B0[adapter].to(b.dtype)


class ScLoraModel(AddedModel):
    """The tuner of SC-LoRA: `sc_lora` makes it."""

    prefix: str = "sclora_"
    tuner_layer_cls = ScLoraLinear


register(ScLoraConfig, ScLoraModel)


@dataclass(frozen=True, eq=False)
class Subspace:
    """The subspace that an adapter begins in, at one target.

    Args:
        basis: Q_r.
        eigenvalues: those of D, the largest first.
        positive: how many of them are above 0.
    """

    basis: Float[Tensor, "out r"] = field(repr=False)
    eigenvalues: Float[Tensor, " out"] = field(repr=False)
    positive: int


@tidy
def sc_lora(
    model: nn.Module,
    config: ScLoraConfig,
    task: Sequence[Example],
    keep: Sequence[Example],
    *,
    beta: float = 0.8,
    batch_size: int = 8,
) -> tuple[PeftModel, dict[str, Subspace]]:
    """Lay an SC-LoRA adapter into a model, begun in the subspace of its data.

    The second moments are summed batch by batch, in float32 at least, for all targets in one pass over the data. They
    take out x out numbers for each target, and no activations are kept. Every real token counts once, however the data
    are batched.

    Args:
        model: a causal language model. Its layers are wrapped in place and frozen, as by any `get_peft_model`.
        config: rank and targets.
        task: some hundreds of examples of what the adapter is to learn.
        keep: examples of what the model is to keep knowing.
        beta: the weight of keeping, in [0, 1]; the paper takes 0.5 to 0.9.
        batch_size: examples in one forward.

    Returns:
        The PEFT model, and the subspace that was found at each target, by name.

    Warns where fewer than r eigenvalues are positive: the adapter then begins in directions that are to be kept.

    Raises:
        ValueError: beta out of range, no examples, or outputs that are not finite.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"sc_lora: beta={beta} must be between 0 and 1")
    if batch_size < 1:
        raise ValueError(f"sc_lora: batch_size={batch_size} must be at least 1")
    for name, examples in (("task", task), ("keep", keep)):
        if not examples:
            raise ValueError(f"sc_lora: {name} has no examples")
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    peft_model: Any = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    targets = {name: module for name, module in peft_model.named_modules() if isinstance(module, ScLoraLinear)}
    try:
        moments = _contrast(peft_model, targets, task, keep, beta, batch_size)
        found = {name: subspace(moments.pop(name), config.r, name) for name in targets}  # each freed as it is used
    except BaseException:
        peft_model.unload()
        for parameter, learned in flags:
            parameter.requires_grad_(learned)
        raise
    for name, layer in targets.items():
        layer.start("default", found[name].basis)
    if short := {name: sub for name, sub in found.items() if sub.positive < config.r}:
        name, least = min(short.items(), key=lambda pair: pair[1].positive)
        warnings.warn(
            f"{len(short)} of {len(found)} targets have fewer positive eigenvalues than r={config.r}, the fewest "
            f"{name} with {least.positive}: lower r or beta, or it begins in directions that are to be kept",
            stacklevel=2,
        )
    return peft_model, found


def subspace(contrast: Float[Tensor, "out out"], r: int, what: str = "the target") -> Subspace:
    """The r eigenvectors of the largest eigenvalues (not the largest magnitudes) of a symmetric matrix D.

    Raises:
        ValueError: D is not finite. The error names `what`.
    """
    if not bool(contrast.isfinite().all()):
        raise ValueError(f"{what} gave outputs that are not finite, so it has no second moments")
    values, vectors = torch.linalg.eigh(contrast)
    rounding = len(values) * torch.finfo(values.dtype).eps * float(values.abs().max())
    return Subspace(vectors[:, -r:].flip(1).contiguous(), values.flip(0), int((values > rounding).sum()))


def _contrast(
    peft_model: PeftModel,
    targets: Mapping[str, ScLoraLinear],
    task: Sequence[Example],
    keep: Sequence[Example],
    beta: float,
    batch_size: int,
) -> dict[str, Tensor]:
    """D of each target. The number of tokens is known beforehand, so one matrix is enough for each target."""
    sums: dict[str, Tensor] = {}
    for name, layer in targets.items():
        w = layer.base()
        dtype = torch.promote_types(w.dtype, torch.float32)
        sums[name] = torch.zeros(len(w), len(w), dtype=dtype, device=w.device)
    device = next(peft_model.parameters()).device
    with torch.no_grad(), evaluating(peft_model), peft_model.disable_adapter():
        for examples, share in ((task, 1 - beta), (keep, -beta)):
            lengths = list(map(len, examples))
            for rows in by_length(lengths, batch_size):
                batch = collate([examples[i] for i in rows]).to(device)
                with _summing(targets, sums, batch.attention_mask.bool(), share / sum(lengths)):
                    forward_states(peft_model, batch)
    return sums


@contextmanager
def _summing(
    targets: Mapping[str, ScLoraLinear], sums: Mapping[str, Tensor], real: Bool[Tensor, "batch seq"], share: float
) -> Generator[None]:
    """Inside, share * y y^T of each real token is added to the sum of its target, y without the bias."""
    bases = {name: layer.get_base_layer() for name, layer in targets.items()}

    def add(name: str, output: Tensor) -> None:
        bias = getattr(bases[name], "bias", None)
        y = output[real.to(output.device)].to(sums[name].dtype)
        y = y if bias is None else y - bias.to(y.dtype)
        sums[name].addmm_(y.mT, y, alpha=share)

    with observing({name: Place(base, "output") for name, base in bases.items()}, add):
        yield
