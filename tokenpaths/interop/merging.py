"""Trails written into the weights of a model: no hook, no cost, and any server takes the result.

merged = merge(model, trails)      # the model does what it did with the trails attached
model.save_pretrained("steered")   # and so does what is loaded from there
merged.undo()                      # to the bit as before; or `with merge(model, trails): ...`
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from tokenpaths.attachment.handle import attach
from tokenpaths.attachment.hooks import Hook
from tokenpaths.attachment.runs import evaluating
from tokenpaths.interop.projections import Projection, Table, projections
from tokenpaths.site import Host
from tokenpaths.site.host import output_embedding, text_config, vocabulary
from tokenpaths.trailmap.trailmap import TrailMap
from tokenpaths.undo import Undo, tidy

FLAGS = ("attention_bias", "mlp_bias", "use_bias", "bias")
"""What configurations call it that linear maps have biases."""


class Merged(AbstractContextManager["Merged"]):
    """A model whose weights hold trails. `undo` gives it its own again, to the bit."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []
        self.changed: list[str] = []
        """The names of the parameters that were replaced or added."""

    def undo(self) -> None:
        """Put the model's own weights back. Twice does no harm."""
        while self._before:
            setattr(*self._before[-1])
            self._before.pop()

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"<merged into {', '.join(self.changed)}>" if self._before else "<merged, and undone>"

    def set(self, thing: Any, name: str, value: Any) -> None:
        """Set an attribute, and remember what it was."""
        self._before.append((thing, name, getattr(thing, name)))
        setattr(thing, name, value)

    def replace(self, module: nn.Module, name: str, value: Tensor, told: str) -> None:
        """Give a module new numbers in a new parameter: the old one stays as it is, for who else has it."""
        before = getattr(module, name)
        learns = before is not None and before.requires_grad
        self.set(module, name, nn.Parameter(value.contiguous(), requires_grad=learns))
        self.changed.append(f"{told}.{name}")


@tidy
@torch.no_grad()
def merge(model: nn.Module, trails: TrailMap, *, strength: float = 1.0, savable: bool = True) -> Merged:
    """Write trails into the weights of a model, in place.

    At streams attention and mlp, y = A x + c becomes (A + f B M A) x + c + f B (M c + k) for a displacement
    B (M y + k) (`tokenpaths.interop.affine`), at one head the same of its columns. A constant at a block goes into the
    bias of its last projection. At the embedding any trail t goes into the table, E[i] + f t(E[i]), row by row, and a
    head that shares the table gets its own. Afterwards the model is run with the weights and compared with the trails
    attached: where a norm stands in between, this tells.

    Numbers are computed in float64, and kept in the dtype of the model: in bfloat16 they are as coarse as that.

    Args:
        model: a Hugging Face model with one stack, its weights not quantised.
        trails: affine ones at `All()` (see above), or any at the embedding, also at `Tokens(...)`. Nothing else is the
            same for all tokens.
        strength: f.
        savable: whether what `save_pretrained` writes must load as the same model. Where a bias is needed that its
            architecture does not have, `ValueError` is raised; with False, the bias is added all the same, and is lost
            when the model is saved.

    Returns:
        What can be undone.

    Raises:
        TypeError: `trails` is no `TrailMap`.
        ValueError: what no weights of this model carry, with the site and the reason. Nothing is changed then.
    """
    host = Host.of(model, getattr(trails, "blocks", None))
    linear, table = projections(host, trails, strength)
    merged = Merged()
    with Undo() as undo:
        undo.add(merged.undo)
        expected, moved = _logits(host, trails, strength)
        if table is not None:
            _write_table(merged, host, table, strength)
        for projection in linear:
            _write(merged, projection)
        added = {f"{one.name}.bias" for one in linear if not one.had_bias and bool(one.more.any())}
        if added and savable:
            _let_biases_be_saved(merged, host, added)
        found, _ = _logits(host)
        error = float((found - expected).abs().max())
        if not error <= max(0.1 * moved, 1e-3 * float(expected.abs().max())):
            raise ValueError(
                f"the weights do not do what the trails do: logits differ by {error:.2g}, where the trails move them "
                f"by {moved:.2g}. In {type(host.inner).__name__} something stands between a projection and the "
                "residual stream, or its dtype is too coarse: keep the trails attached"
            )
        undo.forget()
    return merged


def _logits(host: Host, trails: TrailMap | None = None, strength: float = 1.0) -> tuple[Tensor, float]:
    """The output for some tokens, with trails attached, and how far they move it."""
    words = vocabulary(host.inner) or 1
    ids = torch.arange(12, device=host.device).mul(max(1, words // 12)).remainder(words).view(2, 6)

    def output() -> Tensor:
        out: Any = host.model(input_ids=ids)
        return (out.logits if hasattr(out, "logits") else out[0]).float()

    with evaluating(host.model):
        plain = output()
        if trails is None:
            return plain, 0.0
        with attach(host.model, trails, strength=strength):
            steered = output()
    return steered, float((steered - plain).abs().max())


def _write(merged: Merged, projection: Projection) -> None:
    dtype = projection.weight.dtype
    if projection.up:
        new = (projection.A + projection.delta).to(dtype)
        merged.replace(projection.module, "weight", new.mT if projection.transposed else new, projection.name)
    if bool(projection.more.any()):
        merged.replace(projection.module, "bias", (projection.c + projection.more).to(dtype), projection.name)


def _write_table(merged: Merged, host: Host, table: Table, strength: float) -> None:
    """E'[i] = E[i] + f t(s E[i]) / s, where s E[i] is the state that enters the first block."""
    inner: Any = host.inner
    module = inner.get_input_embeddings()
    weight: Tensor = module.weight
    scale = scale_of_table(host, weight)
    states = scale * weight.float()
    moved = torch.zeros_like(states)
    for trail, ids in table.trails:
        rows = slice(None) if ids is None else torch.tensor([i for i in ids if i < len(states)], device=states.device)
        moved[rows] += trail(states[rows].to(next(trail.parameters()).dtype)).float()
    names = {found: name for name, found in host.model.named_modules()}
    head: Any = output_embedding(inner)
    if head is not None and head.weight is weight:
        merged.replace(head, "weight", weight.detach().clone(), names[head])
        for config in {id(c): c for c in (inner.config, text_config(inner))}.values():
            merged.set(config, "tie_word_embeddings", False)
    merged.replace(module, "weight", (weight.float() + strength * moved / scale).to(weight.dtype), names[module])


def scale_of_table(host: Host, weight: Tensor) -> float:
    """What a row of the table is multiplied by before the first block reads it.

    Raises `ValueError` where the state is not the row alone.
    """
    ids = torch.arange(1, min(9, len(weight)), device=host.device)[None]
    seen: list[Tensor] = []
    hook = Hook(lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]))
    with Undo() as undo, evaluating(host.model):
        undo.hook(host.blocks[0].register_forward_pre_hook, hook, with_kwargs=True)
        host.model(input_ids=ids)
    rows, states = weight[ids[0]].float(), seen[0][0].float()
    scale = float((rows * states).sum() / rows.square().sum())
    if not float((states - scale * rows).abs().max()) <= 1e-2 * float(states.abs().max()):
        raise ValueError(
            f"stream 'embedding': what enters the first block of {type(host.inner).__name__} is not the row of the "
            "table alone (positions or a norm are added), so the table cannot carry a trail: keep it attached"
        )
    return scale


def _let_biases_be_saved(merged: Merged, host: Host, wanted: set[str]) -> None:
    """Set what the configuration calls biases, and give zeros to those that come along.

    Raises `ValueError` for an architecture that has none at these places.
    """
    inner: Any = host.inner
    flags = [flag for flag in FLAGS if getattr(text_config(inner), flag, None) is False]
    for chosen in (*([flag] for flag in flags), *([flags] if len(flags) > 1 else [])):
        wider: Any = copy.deepcopy(inner.config)
        for flag in chosen:
            setattr(wider if hasattr(wider, flag) else wider.get_text_config(), flag, True)
        with torch.device("meta"):
            biases = {name for name in type(inner)(wider).state_dict() if name.endswith(".bias")}
        if wanted <= biases:
            for flag in chosen:
                merged.set(text_config(inner), flag, True)
            for name in sorted(biases - set(inner.state_dict())):
                module = inner.get_submodule(name.removesuffix(".bias"))
                merged.replace(module, "bias", module.weight.new_zeros(len(module.weight)), name.removesuffix(".bias"))
            return
    raise ValueError(
        f"{type(inner).__name__} has no bias at {min(wanted)}, where the trails need one, for their b is not 0: what "
        "is saved would lack it. Keep them attached, or merge(..., savable=False) for this process alone"
    )
