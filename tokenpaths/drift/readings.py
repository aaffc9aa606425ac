"""What a run of a model shows of a text, and reading two runs side by side.

    for before, after in read(*runs(model, trails), batch):  # one pair for each text of the batch
        before.states["block 3"], after.logits

Two runs are two models, or one model inside two contexts. Where they differ by a `TrailMap`, what lies below its first
site is the same in both, and is computed once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tokenpaths.adapter import Adapter
from tokenpaths.attach import working
from tokenpaths.cone import blocks_below
from tokenpaths.cone.conditions import plain_values
from tokenpaths.data import IGNORED, Batch
from tokenpaths.sites import find_blocks, unwrapped
from tokenpaths.watcher import Observer, Watcher


@dataclass(frozen=True, eq=False)
class Run:
    """A model, and what it is to be read inside of: `Run(model, trails.off)`, `Run(lora, lora.disable_adapter)`.

    `blocks` names the block list of a model that has several. `shares` is the number of blocks, from the first, whose
    `forward` gives what it gave in the run that this one is compared with; `runs` finds it.
    """

    model: nn.Module
    inside: Callable[[], AbstractContextManager[object]] = nullcontext
    blocks: str | None = None
    shares: int = 0


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


def runs(model: nn.Module, trails: Adapter, *, tokenizer: Any = None) -> tuple[Run, Run]:
    """The frozen run of a model and the one with trails: attached for each reading, if they are not attached already.

    `tokenizer` is for the rule `Match`.
    """

    @contextmanager
    def steered() -> Generator[None]:
        with working(model, trails, tokenizer), evaluating(trails):
            yield

    return Run(model, trails.off, trails.blocks), Run(model, steered, trails.blocks, blocks_below(model, trails))


def read(before: Run, after: Run, batch: Batch) -> list[tuple[Reading, Reading]]:
    """Run two runs over a batch, in evaluation mode and without gradients: a pair of readings a row, padding cut off.

    The readings of a pair lie on one device, that of `before`; unpadded states are views of what the models returned.

    Raises `ValueError` for an empty batch, a text of fewer than two tokens, padding inside a text, states or logits
    that are not finite (naming layer and run), and two models that differ in layers, widths or vocabulary.
    """
    texts = _stretches(batch)
    kept: _Kept | None = _Kept() if after.shares and before.model is after.model else None
    with torch.no_grad():
        first = _run(before, batch, None if kept is None else functools.partial(kept.record, count=after.shares))
        second = _run(after, batch, None if kept is None else kept.replay)
    _check_alike(first, second)
    pairs: list[tuple[Reading, Reading]] = []
    for row, text in enumerate(texts):
        x, y = (_row(output, batch, row, text, first.logits.device) for output in (first, second))
        for name, reading in (("before", x), ("after", y)):
            _check_finite(reading, name, row)
        pairs.append((x, y))
    return pairs


def look(run: Run, batch: Batch) -> list[Reading]:
    """One run over a batch, as `read` reads it: a reading a row."""
    texts = _stretches(batch)
    with torch.no_grad():
        output = _run(run, batch, None)
    readings = [_row(output, batch, row, text, output.logits.device) for row, text in enumerate(texts)]
    for row, reading in enumerate(readings):
        _check_finite(reading, "looked at", row)
    return readings


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Evaluation mode while it lasts; afterwards each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True, eq=False)
class _Output:
    """What a run made of a whole batch."""

    logits: Float[Tensor, "batch seq vocab"]
    states: dict[str, Float[Tensor, "batch seq _"]]


@dataclass(frozen=True, eq=False)
class _Call:
    """What a block was given, and what its `forward` made of it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


class _Kept:
    """The calls of the lowest blocks in one run, given back in another when a block is given the same again."""

    def __init__(self) -> None:
        self.calls: dict[nn.Module, _Call] = {}

    @contextmanager
    def record(self, layers: nn.ModuleList, *, count: int) -> Generator[None]:
        def call(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result = forward(*args, **kwargs)
            # a cache, say, may be written to, which a kept result would not do
            if plain_values([args, *kwargs.values()]):
                self.calls[layer] = _Call(args, kwargs, result)
            return result

        with _forwards([layers[i] for i in range(count)], call):
            yield

    @contextmanager
    def replay(self, layers: nn.ModuleList) -> Generator[None]:
        def call(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            kept = self.calls.get(layer)
            if kept is not None and _same((args, kwargs), (kept.args, kept.kwargs)):
                return kept.result
            return forward(*args, **kwargs)

        with _forwards(list(self.calls), call):
            yield


@contextmanager
def _forwards(layers: list[nn.Module], call: Callable[..., Any]) -> Generator[None]:
    """Inside, `layer.forward(...)` is `call(layer, forward, ...)`. Hooks run as ever: they are around `forward`."""
    own = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = functools.partial(call, layer, layer.forward)
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            vars(layer).pop("forward", None)
            if forward is not None:
                layer.forward = forward


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments are equal to the bit; a state that no trail has moved is the same object."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)


def _run(run: Run, batch: Batch, around: Callable[[nn.ModuleList], AbstractContextManager[None]] | None) -> _Output:
    model, layers = run.model, find_blocks(run.model, run.blocks)
    if getattr(getattr(unwrapped(model), "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} has an encoder and a decoder: drift is read of models with one stack")
    batch = batch.to(next(model.parameters()).device)
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    with ExitStack() as stack:
        stack.enter_context(run.inside())
        stack.enter_context(evaluating(model))
        if around is not None:
            stack.enter_context(around(layers))
        if Watcher.known(model):  # these are read by attached trails, and a model without them does not know them
            inputs |= {"prompt_mask": batch.prompt_mask, "spans": batch.spans}
        states = stack.enter_context(_states(model, layers))
        if _compiled(model):  # a compiled graph does not see that hooks come and go
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        output = model(**inputs)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:2] != batch.input_ids.shape:
        raise ValueError(f"{type(model).__name__} gives no logits for each token: drift is read of a language model")
    return _Output(logits, states)


@contextmanager
def _states(model: nn.Module, layers: nn.ModuleList) -> Generator[dict[str, Tensor]]:
    """The hidden states of the forward inside, by layer. Hooked after the trails, so they are the moved ones."""
    states: dict[str, Tensor] = {}

    def enters(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states[name] = args[0] if args else kwargs["hidden_states"]

    def leaves(name: str, module: nn.Module, args: Any, output: Any) -> None:
        states[name] = output[0] if isinstance(output, tuple) else output

    handles = [layers[0].register_forward_pre_hook(Observer(functools.partial(enters, "embedding")), with_kwargs=True)]
    for i, layer in enumerate(layers):
        handles.append(layer.register_forward_hook(Observer(functools.partial(leaves, f"block {i}"))))
    head = getattr(unwrapped(model), "get_output_embeddings", lambda: None)()
    if head is not None:
        handles.append(head.register_forward_pre_hook(Observer(functools.partial(enters, "norm")), with_kwargs=True))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _compiled(model: nn.Module) -> bool:
    return any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in model.modules())


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
