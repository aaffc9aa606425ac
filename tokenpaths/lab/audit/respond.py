"""What a model says at the answers of rows of tokens, frozen and adapted: every scan and search is made of it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar
from uuid import uuid4

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tokenpaths.attachment.handle import attachments, working
from tokenpaths.attachment.hooks import Hook, forwards
from tokenpaths.attachment.runs import evaluating
from tokenpaths.attachment.watcher import Watcher
from tokenpaths.engine.cone.keys import Computing
from tokenpaths.engine.divergence import at_least_float32
from tokenpaths.engine.states import observing
from tokenpaths.site import Host, Place
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.undo import Undo

Key = TypeVar("Key", bound=Hashable)
Ids: TypeAlias = tuple[int, ...]
RowKey: TypeAlias = tuple[str, bytes, int, int]  # what computes, tokens, tokens in a row, tokens of the answer
States: TypeAlias = Float[Tensor, "rows answer dim"]
Logits: TypeAlias = Float[Tensor, "rows answer vocab"]


@dataclass(frozen=True)
class Row:
    """The tokens of one text. The model is to write the last `answer` of them; 0 for a prompt alone."""

    ids: Ids
    answer: int = 0


@dataclass(eq=False)
class Memory:
    """What the frozen model made of rows, for audits of other adapters of the same base: `audit(..., memory=memory)`.

    Another base, to the bit, finds nothing that is not its own.

    Args:
        budget: the most bytes to keep. Rows beyond it are computed each time.
        used: the bytes that are kept now.
        kept: what is kept, by the base and the tokens of the rows.
    """

    budget: int = 1 << 30
    used: int = 0
    kept: dict[RowKey, _Frozen] = field(default_factory=dict["RowKey", "_Frozen"], repr=False)


@dataclass(frozen=True, eq=False)
class _Frozen:
    below: int  # blocks that the adapter does not change
    entering: Tensor  # what enters the first of the other blocks
    last: Tensor  # what the output embedding reads where the answer is predicted; its logits would be far larger
    beside: int | None  # the number of values that a block returns beside its state; None where it returns no tuple


class Responder:
    """What the frozen and the adapted model say at the answers of rows. `responding` makes it.

    Raises:
        ValueError: the model has no output embedding.
    """

    def __init__(self, model: nn.Module, trails: Adapter, memory: Memory) -> None:
        self.model = model
        self.trails = trails
        self.memory = memory
        host = Host.of(model, trails.blocks)
        self.layers = list(host.blocks)
        self.below = min(_below(host, trails), len(self.layers) - 1)
        if host.head is None:
            raise ValueError(
                f"{type(host.inner).__name__} has no output embedding: it is scanned by what it would say next"
            )
        self.head = host.head
        self.device = host.device
        with trails.off():  # it changes nothing of the base while it is at work
            self.base = Computing(host).how
            others = [a for a in attachments(model) if a.trails is not trails and a.trails.enabled]
        if others:  # which move the states of the frozen run too
            self.base += f" with {uuid4().hex}"

    @torch.no_grad()
    def logits(self, ids: Int[Tensor, "rows seq"], answer: int) -> tuple[Logits, Logits]:
        """Frozen and adapted logits that predict the last `answer` tokens, or what follows a prompt if it is 0."""
        ids = ids.to(self.device)
        key = (self.base, ids.cpu().numpy().tobytes(), ids.shape[1], answer)
        frozen = self.memory.kept.get(key)
        if frozen is None or frozen.below > self.below:
            frozen, said = self._frozen(ids, answer)
            size = sum(x.numel() * x.element_size() for x in (frozen.entering, frozen.last))
            if self.memory.used + size <= self.memory.budget:
                self.memory.used += size
                self.memory.kept[key] = frozen
        else:
            with self.trails.off(), _skipping(self.layers, frozen):
                _, said = self.run(ids, answer, frozen.last)
        with _skipping(self.layers[: frozen.below], frozen):
            return said, self.run(ids, answer)[1]

    def _frozen(self, ids: Tensor, answer: int) -> tuple[_Frozen, Logits]:
        seen: list[tuple[Tensor, int | None]] = []

        def see(number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result = forward(*args, **kwargs)
            beside = len(result) - 1 if isinstance(result, tuple) else None
            seen.append((args[0] if args else kwargs["hidden_states"], beside))
            return result

        with forwards([self.layers[self.below]], see), self.trails.off():
            last, said = self.run(ids, answer)
        return _Frozen(self.below, seen[0][0], last, seen[0][1]), said

    def run(self, ids: Int[Tensor, "rows seq"], answer: int, last: States | None = None) -> tuple[States, Logits]:
        """One forward: what the output embedding reads where the answer is predicted, and its logits.

        With `last` the output embedding reads that instead. The embedding is a third of a small model's cost, so it is
        given these states alone.
        """
        read = [] if last is None else [last]
        stop = ids.shape[1] - bool(answer)
        start = ids.shape[1] - answer - 1

        def cut(module: nn.Module, args: tuple[Any, ...]) -> Any:
            if not read:
                read.append(args[0][:, start:stop].contiguous())  # a bfloat16 product with a slice takes very long
            return (read[0], *args[1:])

        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if Watcher.known(self.model):
            inputs["prompt_mask"] = torch.arange(ids.shape[1], device=ids.device).expand_as(ids) < ids.shape[1] - answer
        with Undo() as undo:
            undo.hook(self.head.register_forward_pre_hook, Hook(cut))
            logits = self.model(**inputs).logits
        return read[0], logits

    @torch.no_grad()
    def inputs(self, modules: Mapping[Key, nn.Module], rows: Sequence[Row]) -> dict[Key, list[Float[Tensor, "n dim"]]]:
        """The states that enter each module as the adapted model reads rows: one tensor a row, on the CPU."""
        states: dict[Key, list[Tensor]] = {key: [] for key in modules}
        with recording_inputs(modules, states):
            for row in rows:
                self.run(torch.tensor([row.ids], device=self.device), row.answer)
        return states


@contextmanager
def responding(
    model: nn.Module, trails: Adapter, tokenizer: Any = None, memory: Memory | None = None
) -> Generator[Responder]:
    """Inside, an adapter of any kind is at work in the model, and both are in evaluation mode."""
    with working(model, trails, tokenizer), evaluating(model), evaluating(trails):
        yield Responder(model, trails, memory or Memory())


@contextmanager
def recording_inputs(
    modules: Mapping[Key, nn.Module],
    states: Mapping[Key, list[Tensor]],
    real: Bool[Tensor, "rows seq"] | None = None,
) -> Generator[None]:
    """Inside, the states that enter each module are added to its list: one tensor [n, dim] a forward, on the CPU.

    Padding, where `real` is False, is left out. So are the forwards in which the layers of PEFT are disabled: these are
    of the frozen model.
    """

    def keep(key: Key, h: Tensor) -> None:
        if getattr(modules[key], "disable_adapters", False):
            return
        whole = real is not None and h.shape[:-1] == real.shape
        rows = h[real.to(h.device)] if real is not None and whole else h.flatten(0, -2)
        states[key].append(at_least_float32(rows.detach()).cpu())

    with observing({key: Place(module, "input") for key, module in modules.items()}, keep):
        yield


def rows_of_one_length(
    rows: Sequence[Row], batch_size: int
) -> Generator[tuple[list[int], Int[Tensor, "rows seq"], int]]:
    """Batches without padding, in which all answers stand in the same columns.

    Gives the numbers of the rows, their tokens, and the number of tokens in an answer.
    """
    alike: dict[tuple[int, int], list[int]] = {}
    for number, row in enumerate(rows):
        alike.setdefault((len(row.ids), row.answer), []).append(number)
    for (_, answer), numbers in alike.items():
        for start in range(0, len(numbers), batch_size):
            some = numbers[start : start + batch_size]
            yield some, torch.tensor([rows[i].ids for i in some]), answer


@contextmanager
def _skipping(layers: Sequence[nn.Module], frozen: _Frozen) -> Generator[None]:
    """Inside, these blocks compute nothing and return what came out of the unchanged blocks of the frozen run."""

    def given(number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return frozen.entering if frozen.beside is None else (frozen.entering, *[None] * frozen.beside)

    with forwards(layers, given):
        yield


def _below(host: Host, trails: Adapter) -> int:
    """The number of blocks, from the first, that an adapter cannot change."""
    if trails.sites:
        return host.blocks_below(trails.sites)
    own = {id(parameter) for parameter in trails.parameters()}
    inside = [{id(parameter) for parameter in block.parameters()} for block in host.blocks]
    changed = [layer for layer, parameters in enumerate(inside) if own & parameters]
    return min(changed) if changed and own <= set().union(*inside) else 0  # the embedding changes every block
