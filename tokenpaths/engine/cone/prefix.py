"""Running rows behind the keys and values of their unmoved prefix, as a model runs while it generates.

A row is cut before its first token that a trail moves or whose logits are asked for. Of the tokens before, only keys
and values matter, and no trail changes them: they are computed once by the frozen model and kept. Rows are shifted so
that all cuts stand in one column:

    [padding | prefix, kept] [what is run | padding]        position ids and masks say what stands where

Tokens that all examples of a goal begin with (a system prompt, examples in the context, a template) are kept once.

Not every family gives back with a cache what it gives without one. So the first batch is run both ways, and where the
hidden states differ by more than rounding rows are run whole from then on, which is said once.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tokenpaths.attachment import caches
from tokenpaths.attachment.handle import Attachment
from tokenpaths.attachment.hooks import Hook
from tokenpaths.attachment.moment import Moment
from tokenpaths.data.examples import Batch, Example
from tokenpaths.engine.cone.cone import ActiveCone, active_cone
from tokenpaths.engine.cone.room import token_bytes
from tokenpaths.engine.states import recording
from tokenpaths.site import Place
from tokenpaths.tokens import Context
from tokenpaths.undo import Undo

WORTHWHILE = 0.75  # of the tokens of a row, the most to run; above, cutting costs about what it saves
KEYS = ("keys", "values")
_FEWEST_SHARED = 8  # tokens
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3}  # of the norm of the states; 5e-2 in half precision


def inputs_of(batch: Batch) -> dict[str, Any]:
    """The arguments of a forward over a batch."""
    return dict(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        prompt_mask=batch.prompt_mask,
        spans=batch.spans,
        use_cache=False,
    )


@contextmanager
def narrowed(
    model: nn.Module, batch: Batch, needed: Bool[Tensor, "batch seq"]
) -> Generator[tuple[dict[str, Any], Bool[Tensor, "batch run"]]]:
    """The arguments of a forward in which the `needed` hidden states come out, and where they are among its tokens.

    Inside a cone, and where trails leave the start of rows as it was, it runs fewer tokens than the batch has.
    """
    worker = active_cone(model)
    cut = None if worker is None else _cut(worker, model, batch, needed)
    if worker is None or cut is None:
        yield inputs_of(batch), needed
        return
    with Undo() as undo:
        undo.set(worker, "given", cut.entering)
        yield cut.inputs, cut.needed


def common_prefix(examples: Sequence[Example]) -> tuple[int, ...]:
    """The tokens that the prompts of all examples begin with; none where there is one example only."""
    if len(examples) < 2:
        return ()
    prompts = [example.ids[: example.prompt_length] for example in examples]
    return tuple(os.path.commonprefix([min(prompts), max(prompts)]))  # of any sequences, not of paths alone


def starts(attached: Sequence[Attachment], batch: Batch, needed: Bool[Tensor, "batch seq"]) -> list[int]:
    """For each row, the number of its tokens before the first that is moved or needed, but not all of them."""
    real = batch.attention_mask.bool()
    context = Context(real, batch.prompt_mask, batch.input_ids, batch.spans)
    moment = Moment(context, 0, real.shape[1])
    run = needed & real
    for attachment in attached:
        for mask in attachment.masks(moment):
            run = run | mask
    lengths = real.sum(1)
    before = (real & (run.cumsum(1) == 0)).sum(1)
    return torch.minimum(before, lengths - 1).tolist()


@dataclass(frozen=True, eq=False)
class _Cut:
    inputs: dict[str, Any]
    needed: Bool[Tensor, "batch run"]
    entering: Mapping[int, Tensor]


@dataclass(frozen=True, eq=False)
class _Made:
    """What the frozen model made of one row: each layer's keys and values, and the states that enter the blocks run."""

    layers: Sequence[Mapping[str, Tensor]]
    entering: Float[Tensor, "one run dim"]


def _cut(worker: ActiveCone, model: nn.Module, batch: Batch, needed: Bool[Tensor, "batch seq"]) -> _Cut | None:
    attached = worker.attached()
    if not attached or worker.rests or worker.narrows is False or worker.whole_rows() is not None:
        return None
    if not worker.cone.budget or not worker.steady(batch.input_ids.shape[1]):
        return None
    before = _kept_starts(worker, batch, starts(attached, batch, needed))
    lengths = batch.attention_mask.sum(1).tolist()
    if max(n - p for n, p in zip(lengths, before, strict=True)) > WORTHWHILE * max(lengths):
        return None
    worker.learn()
    if not _all_fit(worker, batch, before):
        return None
    if worker.narrows or worker.how in worker.cone.narrows:
        worker.narrows = True
        return _behind_prefixes(worker, model, batch, needed, before)
    return _tried(worker, model, batch, needed, before)


def _kept_starts(worker: ActiveCone, batch: Batch, before: Sequence[int]) -> Sequence[int]:
    """Where rows are cut: where there is no room for what is their own, behind the front that they share.

    Or nowhere, if more is saved by leaving out the blocks below for whole rows.
    """
    if worker.room.prefixes:
        return before
    rows = zip(batch.input_ids, batch.attention_mask.bool(), before, strict=True)
    fronts = [_shared_length(worker, ids[mask], count) for ids, mask, count in rows]
    saved = sum(fronts) * len(worker.layers), int(batch.attention_mask.sum()) * worker.below()
    return fronts if saved[0] > saved[1] else [0] * len(fronts)


def _all_fit(worker: ActiveCone, batch: Batch, before: Sequence[int]) -> bool:
    """Whether the prefix of every row is kept, or has room: one that is run each time would cost more than it saves."""
    state, pair = token_bytes(worker.host)
    below, size, fronts = worker.below(), 0, set[int]()
    for ids, mask, count in zip(batch.input_ids, batch.attention_mask.bool(), before, strict=True):
        row = ids[mask]
        shared = _shared_length(worker, row, count)
        if shared and worker.cone.kept.get(_name(worker, f"front of {shared}", row[:shared])) is None:
            fronts.add(shared)
        own = below or count > shared
        if own and worker.cone.kept.get(_name(worker, _what(shared, count, below), row)) is None:
            size += (count - shared) * (pair or 0) * (len(worker.layers) - below)
            size += (len(row) - count) * state * bool(below)
    size += sum(fronts) * (pair or 0) * len(worker.layers)
    return not size or worker.cone.kept.fits(size, 3 * len(before))


def _tried(
    worker: ActiveCone, model: nn.Module, batch: Batch, needed: Bool[Tensor, "batch seq"], before: Sequence[int]
) -> _Cut | None:
    """A first batch, run both ways: whether the model gives behind a cache what it gives without one."""
    try:
        cut = _behind_prefixes(worker, model, batch, needed, before)
        whole = _enters_head(worker, inputs_of(batch))[needed]
        worker.given = cut.entering
        behind = _enters_head(worker, cut.inputs)[cut.needed]
        # the trial has written to the cache
        cut = _behind_prefixes(worker, model, batch, needed, before)
    except Exception as error:  # a family that knows no such cache may refuse in any way
        worker.narrows = False
        worker.run_in_full(
            f"a cache of keys and values cannot be put before its rows ({type(error).__name__}: {error})"
        )
        return None
    finally:
        worker.given = None
    apart = float((behind - whole).norm() / whole.norm().clamp_min(1e-30))
    worker.narrows = apart <= _ROUNDING.get(whole.dtype, 5e-2)
    if not worker.narrows:
        worker.run_in_full(f"behind a cache of keys and values its hidden states differ by {apart:.1g} of their norm")
        return None
    worker.cone.narrows.add(worker.how)
    return cut


def _behind_prefixes(
    worker: ActiveCone, model: nn.Module, batch: Batch, needed: Bool[Tensor, "batch seq"], before: Sequence[int]
) -> _Cut:
    real, device = batch.attention_mask.bool(), batch.input_ids.device
    rows = _rows(worker, batch, before)
    past, run = max(before), max(n - p for n, p in zip(real.sum(1).tolist(), before, strict=True))
    begins = past - torch.tensor(before, device=device)
    column = torch.arange(past + run, device=device)
    shifted = (column >= begins[:, None]) & (column < (begins + real.sum(1))[:, None])

    def shift(values: Tensor) -> Tensor:
        moved = values.new_zeros(shifted.shape)
        moved[shifted] = values[real]
        return moved

    ids, prompt = shift(batch.input_ids), shift(batch.prompt_mask)
    cache = _cache(worker, rows, past, device)
    known = Context(shifted[:, :past], prompt[:, :past], ids[:, :past], {})
    caches.remember(cache, Moment(known, 0, past, movers=None))
    inputs = dict(
        input_ids=ids[:, past:],
        attention_mask=shifted.long(),
        past_key_values=cache,
        use_cache=True,
        prompt_mask=prompt,
        spans={name: shift(mask) for name, mask in batch.spans.items()},
        **_positions(worker, shifted, past),
    )
    below = worker.below()
    entering: dict[int, Tensor] = {}
    if below:
        first = rows[0]["entering"]
        states = first.new_zeros(len(rows), run, first.shape[-1])
        states[shifted[:, past:].cpu()] = torch.cat([row["entering"] for row in rows])
        entering[below] = states
    return _Cut(inputs, shift(needed)[:, past:], entering)


def _cache(worker: ActiveCone, rows: Sequence[Mapping[str, Tensor]], past: int, device: torch.device) -> Any:
    """A cache that holds the prefixes, each ending in the last column."""
    below = worker.below()
    stand_in = torch.zeros(len(rows), 1, past, 1)  # these layers are not run, but the length is read off the first
    layers = [(stand_in, stand_in)] * below
    keys, values = (
        _stacked([[row[part] for part in (f"front {name}", name) if part in row] for row in rows], past)
        for name in ("keys", "values")
    )
    return _filled([*layers, *zip(keys, values, strict=True)], device)


def _stacked(rows: Sequence[Sequence[Tensor]], past: int) -> Float[Tensor, "layers batch heads past size"]:
    """Rows of parts [layers, heads, tokens, size], one behind the other, all ending in the last column."""
    like = next(parts[0] for parts in rows if parts)  # a row may have no prefix
    layers, heads, _, size = like.shape
    together = like.new_zeros(layers, len(rows), heads, past, size)
    for i, parts in enumerate(rows):
        end = past
        for part in reversed(parts):
            together[:, i, :, end - part.shape[2] : end] = part
            end -= part.shape[2]
    return together


def _filled(layers: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys.to(device), values.to(device), number)
    return cache


def _rows(worker: ActiveCone, batch: Batch, before: Sequence[int]) -> list[dict[str, Tensor]]:
    """For each row the keys and values of its prefix, and what enters the blocks run: kept, or computed now.

    The front that it shares with others stands apart, and is held once.
    """
    below, found = worker.below(), list[dict[str, Tensor]]()
    for ids, mask, count in zip(batch.input_ids, batch.attention_mask.bool(), before, strict=True):
        row = ids[mask]
        shared = _shared_length(worker, row, count)
        front = _kept(worker, f"front of {shared}", row[:shared], None, shared) if shared else None
        own = _kept(worker, _what(shared, count, below), row, front, count) if below or count > shared else {}
        if front is not None:
            own = {**own, "front keys": front["keys"][below:], "front values": front["values"][below:]}
        found.append(own)
    return found


def _what(shared: int, count: int, below: int) -> str:
    return f"behind {shared} of {count} over {below}"


def _name(worker: ActiveCone, what: str, ids: Int[Tensor, " n"]) -> str:
    """The key of what is kept of a row."""
    return f"{worker.keys(ids[None], torch.ones_like(ids[None], dtype=torch.bool))[0]}.{what}"


def _kept(
    worker: ActiveCone, what: str, ids: Int[Tensor, " n"], front: Mapping[str, Tensor] | None, count: int
) -> dict[str, Tensor]:
    """The frozen model's keys and values of the first `count` tokens behind the front; a front has all layers'."""
    row, name = ids[None], _name(worker, what, ids)
    if (known := worker.cone.kept.get(name)) is not None:
        return dict(known)
    start = 0 if front is None else front["keys"].shape[2]
    is_front = what.startswith("front")
    below = 0 if is_front else worker.below()
    made = _frozen(worker, row, front, start)
    own = {part: torch.stack([layer[part][0, :, start:count] for layer in made.layers[below:]]) for part in KEYS}
    if below:
        own["entering"] = made.entering[0, count - start :]
    own = {part: tensor.cpu() for part, tensor in own.items()}
    worker.cone.kept.put(name, own)
    return own


def _frozen(worker: ActiveCone, row: Tensor, front: Mapping[str, Tensor] | None, start: int) -> _Made:
    """One row as the frozen model runs it, by itself: what is kept of it does not depend on its company."""
    known = [] if front is None else zip(front["keys"][:, None], front["values"][:, None], strict=True)
    cache = _filled(known, row.device)
    given = torch.ones_like(row[:, :start], dtype=torch.bool)
    caches.remember(cache, Moment(Context(given, given, row[:, :start], {}), 0, start, movers=None))
    below = worker.below()
    places = {below: Place(worker.layers[below - 1], "output")} if below else {}
    with worker.frozen(), recording(places, entering=True) as entered:
        worker.watcher.reader(
            input_ids=row[:, start:], attention_mask=torch.ones_like(row), past_key_values=cache, use_cache=True
        )
    layers = [{"keys": layer.keys, "values": layer.values} for layer in cache.layers]
    sizes = {tuple(layer["keys"].shape[:3:2]) for layer in layers}
    if len(layers) != len(worker.layers) or sizes != {(1, row.shape[1])}:
        raise ValueError(f"it filled {len(layers)} layers of a cache with {sizes}, in {len(worker.layers)} blocks")
    return _Made(layers, entered[below] if below else torch.zeros(1, 0, 0))


def _shared_length(worker: ActiveCone, ids: Int[Tensor, " n"], before: int) -> int:
    row = tuple(ids.tolist())
    fitting = (len(s) for s in worker.shared if _FEWEST_SHARED <= len(s) <= before and row[: len(s)] == s)
    return max(fitting, default=0)


def _positions(worker: ActiveCone, real: Bool[Tensor, "batch total"], past: int) -> dict[str, Tensor]:
    """Position ids, for models that take them; others count real tokens by the mask."""
    return {"position_ids": (real.cumsum(1) - 1).clamp_min(0)[:, past:]} if worker.watcher.takes("position_ids") else {}


@torch.no_grad()
def _enters_head(worker: ActiveCone, inputs: dict[str, Any]) -> Tensor:
    """What enters the output embedding, which is given one token a row: nobody reads its logits."""
    seen: list[Tensor] = []

    def first(module: nn.Module, args: tuple[Any, ...]) -> Any:
        seen.append(args[0])
        return (args[0][:, :1].contiguous(), *args[1:])  # a strided slice takes 100 times as long in bfloat16 on a CPU

    if worker.host.head is None:
        raise ValueError("it has no output embedding")
    with Undo() as undo:
        undo.hook(worker.host.head.register_forward_pre_hook, Hook(first))
        worker.model(**inputs)
    return seen[0]
