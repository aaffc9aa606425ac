"""What a run of a model shows of a text, and reading two runs side by side.

    for before, after in read(*runs(model, trails), batch):  # one pair for each text of the batch
        before.states["block 3"], after.logits

Two runs are two models, or one model inside two contexts. Where they differ by a `TrailMap`, what lies below its first
site is the same in both, and is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tokenpaths.attachment.handle import attachments, is_attached, working
from tokenpaths.attachment.runs import evaluating
from tokenpaths.attachment.watcher import Watcher
from tokenpaths.data.examples import IGNORED, Batch
from tokenpaths.engine.cone.repeated import Repeated
from tokenpaths.engine.states import block_places, recording
from tokenpaths.scope import Scoped
from tokenpaths.site import Host, Place
from tokenpaths.site.host import check_model, forward_arguments, two_sided
from tokenpaths.trailmap.adapter import Adapter, check_adapter
from tokenpaths.trailmap.trailmap import TrailMap
from tokenpaths.undo import Undo, tidy


@dataclass(frozen=True, eq=False)
class Run:
    """A model, and what it is to be read inside of: `Run(model, trails.off)`, `Run(lora, lora.disable_adapter)`.

    The model is looked at once: make a new run after it was compiled, or a part of it was replaced.

    Args:
        model: the model.
        inside: makes a context, inside of which the model is the one to be read.
        blocks: the name of the block list, in a model that has several.
        shares: the number of blocks, from the first, whose `forward` gives what it gave in the run that this one is
            compared with; `runs` finds it.
        ready: makes a context that spares `inside` its work at each batch: it lays trails in once, and leaves them off.
    """

    model: nn.Module
    inside: Callable[[], AbstractContextManager[object]] = nullcontext
    blocks: str | None = None
    shares: int = 0
    ready: Callable[[], AbstractContextManager[object]] = nullcontext

    @cached_property
    def host(self) -> Host:
        """The model, looked at once."""
        return Host.of(self.model, self.blocks)

    @contextmanager
    def reading(self) -> Generator[nn.Module]:
        """Inside, the model is the one to be read, in evaluation mode."""
        with self.inside(), evaluating(self.model):
            yield self.model


@dataclass(frozen=True, eq=False)
class Reading:
    """One run of a model over one text of n tokens.

    `states` are the hidden states by layer, in order of depth: "embedding" (what enters the first block), "block 0" ...
    (the residual stream after each block), and "norm" (after the final norm, what the output embedding reads; absent in
    a model that has no output embedding). `logits` at a token predict the next one.
    """

    ids: Int[Tensor, " n"]
    prompt: Bool[Tensor, " n"]
    answer: Bool[Tensor, " n"]
    logits: Float[Tensor, "n vocab"]
    states: dict[str, Float[Tensor, "n _"]]

    @cached_property
    def log_probs(self) -> Float[Tensor, "n vocab"]:
        """Log-probabilities of the next token, in float32 at least."""
        return F.log_softmax(self.logits.to(torch.promote_types(self.logits.dtype, torch.float32)), -1)

    @cached_property
    def norms(self) -> Float[Tensor, "layers n"]:
        """The length of each state, in float32 at least."""
        return torch.stack([_norm(state) for state in self.states.values()])


@dataclass(eq=False)
class _Resting:
    """A map that `Run.ready` has attached and switched off, and whether it was on before."""

    trails: TrailMap
    on: bool


_RESTING: Scoped[_Resting] = Scoped("tokenpaths: trails that rest between readings")


def runs(model: nn.Module, trails: Adapter, *, tokenizer: Any = None) -> tuple[Run, Run]:
    """The frozen run of a model and the one with trails, which are attached if they are not attached already.

    `tokenizer` is for the rule `Match`.
    """

    @contextmanager
    def ready() -> Generator[None]:
        if not isinstance(trails, TrailMap) or is_attached(model, trails):
            yield
            return
        resting = _Resting(trails, trails.enabled)
        with working(model, trails, tokenizer), Undo() as undo:
            undo.add(_RESTING.discard, resting)
            _RESTING.add(resting)
            with trails.switched(False):
                yield

    @contextmanager
    def steered() -> Generator[None]:
        with ExitStack() as stack:
            stack.enter_context(working(model, trails, tokenizer))
            if isinstance(trails, TrailMap) and (
                resting := [each for each in _RESTING.entries() if each.trails is trails]
            ):
                stack.enter_context(trails.switched(resting[-1].on))
            stack.enter_context(evaluating(trails))
            yield

    check_model(model)
    check_adapter(trails)
    before = Run(model, trails.off, trails.blocks)
    gated = trails.gate is not None or any(each.gate is not None for each in attachments(model))
    below = before.host.blocks_below(trails.sites) if trails.sites and not gated else 0  # a gate runs them for itself
    return before, Run(model, steered, trails.blocks, below, ready)


@contextmanager
def frozen(model: nn.Module, trails: Adapter | None = None) -> Generator[None]:
    """Inside, all trails that are attached to the model are off, and so is the adapter `trails` if one is given."""
    with ExitStack() as stack:
        if trails is not None:
            stack.enter_context(trails.off())
        for attachment in attachments(model):
            if attachment.acts():
                stack.enter_context(attachment.trails.switched(False))
        yield


@tidy
def read(before: Run, after: Run, batch: Batch) -> list[tuple[Reading, Reading]]:
    """Run two runs over a batch, in evaluation mode and without gradients: a pair of readings a row, padding cut off.

    The readings of a pair lie on one device, that of `before`; unpadded states are views of what the models returned.

    Raises `ValueError` for an empty batch, a text of fewer than two tokens, padding inside a text, states or logits
    that are not finite (naming layer and run), and two models that differ in layers, widths or vocabulary.
    """
    texts = _stretches(batch)
    shared = Repeated(after.host.blocks[: after.shares] if before.model is after.model else [])
    with torch.no_grad():
        first = _run(before, batch, shared.record)
        second = _run(after, batch, shared.replay)
    _check_alike(first, second)
    pairs: list[tuple[Reading, Reading]] = []
    for row, text in enumerate(texts):
        x, y = (_row(output, batch, row, text, first.logits.device) for output in (first, second))
        for name, reading in (("before", x), ("after", y)):
            _check_finite(reading, name, row)
        pairs.append((x, y))
    return pairs


@tidy
def read_one(run: Run, batch: Batch) -> list[Reading]:
    """One run over a batch, as `read` reads it: a reading a row."""
    texts = _stretches(batch)
    with torch.no_grad():
        output = _run(run, batch)
    readings = [_row(output, batch, row, text, output.logits.device) for row, text in enumerate(texts)]
    for row, reading in enumerate(readings):
        _check_finite(reading, "looked at", row)
    return readings


@dataclass(frozen=True, eq=False)
class _Output:
    """What a run made of a whole batch."""

    logits: Float[Tensor, "batch seq vocab"]
    states: dict[str, Float[Tensor, "batch seq _"]]


def _run(run: Run, batch: Batch, around: Callable[[], AbstractContextManager[None]] = nullcontext) -> _Output:
    model, host = run.model, run.host
    if two_sided(model):
        raise ValueError(f"{type(model).__name__} has an encoder and a decoder: drift is read of models with one stack")
    places = block_places(host)
    if host.head is not None:
        places["norm"] = Place(host.head, "input")
    batch = batch.to(host.device)
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    known = forward_arguments(model)
    if "use_cache" in known or any(p.kind is p.VAR_KEYWORD for p in known.values()):  # not BERT's of transformers 4
        inputs["use_cache"] = False
    with ExitStack() as stack:
        stack.enter_context(run.reading())
        stack.enter_context(around())
        if Watcher.known(model):  # these are read by attached trails, and a model without them does not know them
            inputs |= {"prompt_mask": batch.prompt_mask, "spans": batch.spans}
        states = stack.enter_context(recording(places))
        if host.compiled:  # a compiled graph does not see that hooks come and go
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        output = model(**inputs)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:2] != batch.input_ids.shape:
        raise ValueError(f"{type(model).__name__} gives no logits for each token: drift is read of a language model")
    return _Output(logits, states)


def _stretches(batch: Batch) -> list[slice]:
    """Where the real tokens of each row are."""
    if not len(batch):
        raise ValueError("the batch is empty: drift is read of at least one text")
    found: list[slice] = []
    for row, mask in enumerate(batch.attention_mask.bool().tolist()):
        count = sum(mask)
        if count < 2:
            raise ValueError(f"text {row} of the batch has {count} tokens; drift needs at least two")
        start = mask.index(True)
        if not all(mask[start : start + count]):
            raise ValueError(
                f"text {row} of the batch has padding between its tokens: pad on one side, as collate does"
            )
        found.append(slice(start, start + count))
    return found


def _row(output: _Output, batch: Batch, row: int, text: slice, device: torch.device) -> Reading:
    return Reading(
        ids=batch.input_ids[row, text].to(device),
        prompt=batch.prompt_mask[row, text].to(device),
        answer=(batch.labels[row, text] != IGNORED).to(device),
        logits=output.logits[row, text].to(device),
        states={name: state[row, text].to(device) for name, state in output.states.items()},
    )


def _norm(state: Float[Tensor, "n dim"]) -> Float[Tensor, " n"]:
    return torch.linalg.vector_norm(state, dim=-1, dtype=torch.promote_types(state.dtype, torch.float32))


def _check_alike(x: _Output, y: _Output) -> None:
    for what, a, b in _sizes(x, y):
        if a != b:
            raise ValueError(f"the two runs cannot be compared token by token: {what} {a} before and {b} after")


def _sizes(x: _Output, y: _Output) -> Iterator[tuple[str, int, int]]:
    yield "the number of layers is", len(x.states), len(y.states)
    for name in x.states:
        yield f"the width of {name!r} is", x.states[name].shape[-1], y.states[name].shape[-1]
    yield "the vocabulary has size", x.logits.shape[-1], y.logits.shape[-1]


def _check_finite(reading: Reading, run: str, row: int) -> None:
    """No NaN may pass: it would be left out as undefined."""
    finite = reading.norms.isfinite().all(1).tolist()
    wrong = [name for name, good in zip(reading.states, finite, strict=True) if not good]
    total = reading.logits.sum(dtype=torch.promote_types(reading.logits.dtype, torch.float32))  # one pass, no copy
    if not wrong and not bool(total.isfinite()):
        wrong = ["logits"]
    if wrong:
        raise ValueError(
            f"text {row} of the batch, the run {run}: NaN or infinity at {wrong[0]!r}, the first of {len(wrong)} such "
            "layers: drift from or to it means nothing. Try a wider dtype, or weaker trails"
        )
