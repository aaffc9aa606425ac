"""How a model answers rows of tokens, frozen and with its adapter: what every scan and search is made of."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenpaths.attachment.handle import working
from tokenpaths.attachment.hooks import Hook, forwards
from tokenpaths.attachment.watcher import Watcher
from tokenpaths.engine.readings import evaluating
from tokenpaths.site import Host
from tokenpaths.trailmap.adapter import Adapter

Ids: TypeAlias = tuple[int, ...]
Key: TypeAlias = tuple[bytes, int, int]  # tokens, tokens in a row, tokens of the answer
States: TypeAlias = Float[Tensor, "rows answer dim"]
Logits: TypeAlias = Float[Tensor, "rows answer vocab"]


@dataclass(frozen=True)
class Row:
    """The tokens of one text, the last `answer` of which the model is to write; 0 for a prompt alone."""

    ids: Ids
    answer: int = 0


@dataclass(eq=False)
class Memory:
    """What the frozen model made of rows, for audits of other adapters of the same base: `audit(..., memory=memory)`.

    `budget` is in bytes; rows beyond it are computed each time.
    """

    budget: int = 1 << 30
    used: int = 0
    kept: dict[Key, _Frozen] = field(default_factory=dict["Key", "_Frozen"], repr=False)


@dataclass(frozen=True, eq=False)
class _Frozen:
    below: int  # blocks that the adapter does not change
    entering: Tensor  # what enters the first of the others
    last: Tensor  # what the output embedding reads where the answer is predicted; its logits would be far larger
    beside: int | None  # what a block returns beside its state; None for no tuple


class Responder:
    """What is said at the answers of rows, frozen and adapted; made by `responding`."""

    def __init__(self, model: nn.Module, adapter: Adapter, memory: Memory) -> None:
        self.model = model
        self.adapter = adapter
        self.memory = memory
        host = Host.of(model, adapter.blocks)
        self.layers = host.blocks
        self.below = min(_below(host, adapter), len(self.layers) - 1)
        if host.head is None:
            raise ValueError(
                f"{type(host.inner).__name__} has no output embedding: it is scanned by what it would say next"
            )
        self.head = host.head
        self.device = host.device

    @torch.no_grad()
    def logits(self, ids: Int[Tensor, "rows seq"], answer: int) -> tuple[Logits, Logits]:
        """Frozen and adapted, where an answer of so many tokens, or what follows a prompt, is predicted."""
        ids = ids.to(self.device)
        key = (ids.cpu().numpy().tobytes(), ids.shape[1], answer)
        frozen = self.memory.kept.get(key)
        if frozen is None or frozen.below > self.below:
            frozen, said = self._frozen(ids, answer)
            size = sum(x.numel() * x.element_size() for x in (frozen.entering, frozen.last))
            if self.memory.used + size <= self.memory.budget:
                self.memory.used += size
                self.memory.kept[key] = frozen
        else:
            with self.adapter.off(), _skipping(list(self.layers), frozen):
                _, said = self.run(ids, answer, frozen.last)
        with _skipping(list(self.layers)[: frozen.below], frozen):
            return said, self.run(ids, answer)[1]

    def _frozen(self, ids: Tensor, answer: int) -> tuple[_Frozen, Logits]:
        seen: list[tuple[Tensor, int | None]] = []

        def enters(number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result = forward(*args, **kwargs)
            rest = len(result) - 1 if isinstance(result, tuple) else None
            seen.append((args[0] if args else kwargs["hidden_states"], rest))
            return result

        with forwards([self.layers[self.below]], enters), self.adapter.off():
            last, said = self.run(ids, answer)
        return _Frozen(self.below, seen[0][0], last, seen[0][1]), said

    def run(self, ids: Tensor, answer: int, last: Tensor | None = None) -> tuple[States, Logits]:
        """One forward: what the output embedding reads where the answer is predicted, or `last`, and its logits.

        It is a third of a small model's cost, and is given no more than is asked for.
        """
        read = [] if last is None else [last]
        stop = ids.shape[1] - bool(answer)
        start = ids.shape[1] - answer - 1

        def cut(module: nn.Module, args: tuple[Any, ...]) -> Any:
            if not read:
                read.append(args[0][:, start:stop].contiguous())  # a bfloat16 product with a slice takes very long
            return (read[0], *args[1:])

        handle = self.head.register_forward_pre_hook(Hook(cut))
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if Watcher.known(self.model):
            inputs["prompt_mask"] = torch.arange(ids.shape[1], device=ids.device).expand_as(ids) < ids.shape[1] - answer
        try:
            logits = self.model(**inputs).logits
        finally:
            handle.remove()
        return read[0], logits


@contextmanager
def responding(
    model: nn.Module, adapter: Adapter, *, tokenizer: Any = None, memory: Memory | None = None
) -> Generator[Responder]:
    """Inside, the adapter is at work, and it and the model are in evaluation mode."""
    with working(model, adapter, tokenizer), evaluating(model), evaluating(adapter):
        yield Responder(model, adapter, memory or Memory())


def batches(rows: Sequence[Row], size: int) -> Generator[tuple[list[int], Int[Tensor, "rows seq"], int]]:
    """Rows of one length together, no more than `size` at once: their numbers, their tokens, and their answers'."""
    alike: dict[tuple[int, int], list[int]] = {}
    for number, row in enumerate(rows):
        alike.setdefault((len(row.ids), row.answer), []).append(number)
    for (_, answer), numbers in alike.items():
        for start in range(0, len(numbers), size):
            some = numbers[start : start + size]
            yield some, torch.tensor([rows[i].ids for i in some]), answer


@contextmanager
def _skipping(layers: Sequence[nn.Module], frozen: _Frozen) -> Generator[None]:
    """Inside, these blocks do nothing but hand on what came out of the unchanged ones of the frozen run."""

    def given(number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return frozen.entering if frozen.beside is None else (frozen.entering, *[None] * frozen.beside)

    with forwards(layers, given):
        yield


def _below(host: Host, adapter: Adapter) -> int:
    """The number of blocks, from the first, that an adapter cannot change."""
    if adapter.sites:
        return host.blocks_below(adapter.sites)
    blocks = list(host.blocks)
    own = {id(parameter) for parameter in adapter.parameters()}
    changed = [layer for layer, block in enumerate(blocks) if own & {id(p) for p in block.parameters()}]
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    return min(changed) if changed and own <= inside else 0  # the embedding changes all
