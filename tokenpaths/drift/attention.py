"""Drift of attention: the maps of two runs, layer by layer, and measures of them.

A map says, for each head and token, how that token spreads its attention over the tokens of the text: [heads, n, n],
with rows that sum to 1. A measure is a function of the frozen and the steered map p and q of one layer and text, a
quantity is a function of one map. Both return one number a head and token, [heads, n]::

    def see(layer: str, row: int, p: Tensor, q: Tensor) -> None:
        print(layer, "text", row, attention_js(p, q).mean(-1))

    read_attention(*runs(model, trails), batch, see)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenpaths.attachment.hooks import Observer
from tokenpaths.attachment.runs import evaluating
from tokenpaths.data.examples import Batch
from tokenpaths.engine.divergence import at_least_float32, jensen_shannon
from tokenpaths.engine.readings import Reading, Run, read
from tokenpaths.engine.states import attention_map
from tokenpaths.site.host import attentions
from tokenpaths.undo import Undo

See: TypeAlias = Callable[[str, int, Tensor, Tensor], None]


def attention_js(p: Float[Tensor, "heads n n"], q: Float[Tensor, "heads n n"]) -> Float[Tensor, "heads n"]:
    """Jensen-Shannon divergence of each token's attention, frozen and steered, in nats; 0 to ln 2 (Lin 1991)."""
    return jensen_shannon(_distribution(p), _distribution(q))


def attention_entropy(p: Float[Tensor, "heads n n"]) -> Float[Tensor, "heads n"]:
    """The entropy of each token's attention, -sum_k p_k log p_k, in nats; 0 (on one token) to ln n (on all alike)."""
    return torch.special.entr(_distribution(p)).sum(-1)


def sink_mass(p: Float[Tensor, "heads n n"]) -> Float[Tensor, "heads n"]:
    """The attention of each token to the first, the attention sink of most models (Xiao et al. 2023); 0 to 1."""
    return at_least_float32(p[..., 0])


def read_attention(before: Run, after: Run, batch: Batch, see: See) -> list[tuple[Reading, Reading]]:
    """Read two runs over a batch, as `read` does, and show their attention maps.

    Two maps of the batch are in memory at a time, those of one layer: the forwards keep only what enters each attention
    module, from which the maps are made again afterwards, inside the run's own context. Where both runs share a block
    (see `Run.shares`), one map is shown twice. Blocks without attention are left out.

    Args:
        before: the frozen run.
        after: the steered run.
        batch: the texts.
        see: called as `see("block 3", row, p, q)` for each layer and text, with the self-attention maps [heads, n, n]
            of the two runs, without padding. It must not keep them.

    Returns:
        The pairs of readings, a pair a text.

    Raises:
        ValueError: attention gives no maps (they exist under eager attention only), the models have other numbers of
            layers or heads, and as `read`.
    """
    modules = _modules(before), _modules(after)
    with evaluating(before.model), evaluating(after.model), torch.no_grad():
        with _calls({module for found in modules for module in found if module is not None}) as calls:
            readings = read(before, after, batch)
        for layer, (x, y) in enumerate(zip(*modules, strict=True)):
            if x in calls and y in calls:
                first, second = calls[x][0], calls[y][-1]  # one and the same for a block that the runs share
                p = _maps(before, first, layer)
                q = p if second is first else _maps(after, second, layer).to(p.device)
                _show(f"block {layer}", p, q, batch, see)
                del p, q  # before those of the next layer are made
    return readings


@dataclass(frozen=True, eq=False)
class _Call:
    """What an attention module was given. It is small beside the map: hidden states, positions and masks."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _modules(run: Run) -> list[nn.Module | None]:
    """The self-attention of each block, None in a block that has none."""
    found = [next(iter(attentions(block)), None) for block in run.host.blocks]
    if all(module is None for module in found):
        raise ValueError(f"found no attention in the blocks of {type(run.model).__name__}: leave out its measures")
    return found


@contextmanager
def _calls(modules: Iterable[nn.Module]) -> Generator[dict[nn.Module | None, list[_Call]]]:
    """The calls of modules inside, in order."""
    calls: dict[nn.Module | None, list[_Call]] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(module, []).append(_Call(module, args, kwargs))

    with Undo() as undo:
        for module in modules:
            undo.hook(module.register_forward_pre_hook, Observer(keep), with_kwargs=True)
        yield calls


def _maps(run: Run, call: _Call, layer: int) -> Float[Tensor, "batch heads seq seq"]:
    """The maps of a call, made again by `forward`, since the arguments that were kept have gone through the hooks."""
    bound = inspect.signature(call.module.forward).bind(*call.args, **call.kwargs)
    kind = getattr(getattr(call.module, "config", None), "_attn_implementation", None)
    if kind == "eager" and "output_attentions" in bound.signature.parameters:
        bound.arguments["output_attentions"] = True  # or OPT of transformers 4 throws them away
    with run.inside():
        output = call.module.forward(*bound.args, **bound.kwargs)
    return attention_map(output, call.module, layer)


def _show(layer: str, p: Tensor, q: Tensor, batch: Batch, see: See) -> None:
    if p.shape != q.shape:
        raise ValueError(f"the attention of {layer} has {p.shape[1]} heads before and {q.shape[1]} after")
    for row, real in enumerate(batch.attention_mask):
        start = int(real.argmax())  # `read` has refused padding between tokens
        text = slice(start, start + int(real.sum()))
        see(layer, row, p[row, :, text, text], q[row, :, text, text])


def _distribution(p: Tensor) -> Float[Tensor, "heads n m"]:
    """Rows that sum to 1. What a learned sink takes (gpt-oss) is one more column; a rounding error is none."""
    rows = at_least_float32(p)
    rest = 1 - rows.sum(-1, keepdim=True)
    rows = torch.cat([rows, rest.where(rest > 8 * torch.finfo(p.dtype).eps, 0)], -1)
    return rows / rows.sum(-1, keepdim=True)
