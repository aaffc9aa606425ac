"""Original data among the task's: an exact share of items, spread evenly, in an order known from a number alone.

    mixed = mix(task, original, share=0.01)     # every hundredth item is an original one
    mixed[32 * 7 : 32 * 8]                      # the eighth batch of 32: no state is kept, so a run resumes anywhere

With p = `share`, the number of originals among the first n items is O(n) = floor(p n + 1/2), in exact arithmetic. Item
i is an original where O(i + 1) > O(i). So any n items in a row hold floor(p n) or ceil(p n) originals, and the first n
are within half an item of p n. (With random draws at 1 %, most batches of 32 have none and some have three.) Every task
item comes once an epoch, in a new permutation each epoch, and so do the originals, in epochs of their own.

The share is of items, as in Bethune et al. 2025 (arXiv 2502.06042), whose items are all of one length. Where originals
are longer, their share of the tokens is larger: cut them, or give them an objective of their own (`Replay`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeGuard, TypeVar, cast, overload, runtime_checkable

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from tokenpaths.checking import as_number, as_whole

Item = TypeVar("Item")
Item_co = TypeVar("Item_co", covariant=True)
Share: TypeAlias = int | float | Fraction
Part: TypeAlias = Literal["task", "original"]
Order: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]


@runtime_checkable
class Numbered(Protocol[Item_co]):
    """Items that can be taken by number, as from a list or a `datasets.Dataset`."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Item_co: ...


Source: TypeAlias = Iterable[Item] | Numbered[Item]


@overload
def mix(
    task: Numbered[Item], original: Numbered[Item], share: Share = 0.01, *, seed: int = 0, epochs: int = 1
) -> Mix[Item]: ...
@overload
def mix(
    task: Source[Item], original: Source[Item], share: Share = 0.01, *, seed: int = 0, epochs: int = 1
) -> Mix[Item] | MixedStream[Item]: ...
def mix(
    task: Source[Item], original: Source[Item], share: Share = 0.01, *, seed: int = 0, epochs: int = 1
) -> Mix[Item] | MixedStream[Item]:
    """Put original items among the task's, so that they are `share` of all items.

    Args:
        task: a list, a `datasets.Dataset`, or another thing with a length and numbered items; or an iterable of items.
        original: the same, or an iterable beside a list.
        share: of the original items among all items, in [0, 1). A float is read as written: 0.01 is 1/100.
        seed: of the permutations.
        epochs: how often each task item comes before the mixture ends. The originals begin again whenever they end.

    Returns:
        A sequence, if both have a length; else a stream, in which an iterable keeps the order that it has.

    Raises:
        ValueError: the share is outside [0, 1), or there is nothing to take from.
        TypeError: a dict of splits, or an iterator, which could not begin again.
    """
    exact = _checked(task, original, share, epochs)
    if _numbered(task) and _numbered(original):
        return Mix(task, original, exact, seed, epochs)
    return MixedStream(task, original, exact, seed, epochs)


@dataclass(frozen=True, eq=False, repr=False)
class Mix(Sequence[Item]):
    """A mixture with random access, from `mix`: its length is that of `epochs` epochs of the task.

    For a `DataLoader` or a `Trainer` that must not shuffle it: `train_sampling_strategy="sequential"`, or `stream()`.
    """

    task: Numbered[Item]
    original: Numbered[Item]
    share: Fraction
    seed: int
    epochs: int

    def __len__(self) -> int:
        # the smallest n with n - floor(p n + 1/2) >= the number of task items
        return (self.epochs * len(self.task) - Fraction(1, 2)) // (1 - self.share) + 1

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self.at(i) for i in range(len(self))[index]]
        return self.at(range(len(self))[index])

    def at(self, index: int) -> Item:
        """Item `index` of a mixture that never ends: as `mixed[index]`, and on through further epochs."""
        part, place = self.origin(index)
        return (self.task if part == "task" else self.original)[place]

    def origin(self, index: int) -> tuple[Part, int]:
        """Where item `index` comes from: of the task or original, and its place there."""
        if index < 0:
            raise IndexError(f"a mixture has no item {index}: it begins at 0")
        originals = count(index, self.share)
        if count(index + 1, self.share) > originals:
            return "original", _drawn(self.seed, 1, originals, len(self.original))
        return "task", _drawn(self.seed, 0, index - originals, len(self.task))

    def stream(self, start: int = 0) -> MixedStream[Item]:
        """The same items in the same order, from `start` on, as an iterable that no sampler can shuffle."""
        return MixedStream(self.task, self.original, self.share, self.seed, self.epochs, start)

    def __repr__(self) -> str:
        return f"<{len(self)} items, {count(len(self), self.share)} of them original: share {float(self.share):g}>"


@dataclass(frozen=True, eq=False, repr=False)
class MixedStream(IterableDataset[Item], Generic[Item]):
    """A mixture to iterate over, from `mix`, of iterables that can be begun again; a torch `IterableDataset`.

    It ends when the task has been gone through `epochs` times, with its last item. It must be read by one worker of a
    `DataLoader` at most, or its order would be lost.
    """

    task: Source[Item]
    original: Source[Item]
    share: Fraction
    seed: int
    epochs: int
    start: int = 0

    def __post_init__(self) -> None:
        if self.start < 0:
            raise ValueError(f"start is {self.start}, but a stream has items from 0 on")

    def after(self, items: int) -> MixedStream[Item]:
        """The rest of this stream after `items` items: where a run that has seen them goes on."""
        return replace(self, start=self.start + items)

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise RuntimeError(
                f"a MixedStream is being read by {worker.num_workers} workers, each of which would give all of it: use "
                "DataLoader(num_workers=0 or 1), or a mixture of sequences, which any number of workers can share"
            )
        originals = count(self.start, self.share)
        task = _read(self.task, self.start - originals, self.seed, 0, self.epochs)
        original = _read(self.original, originals, self.seed, 1, None)
        ended = object()
        ahead = next(task, ended)  # one ahead, so that nothing comes after the last task item
        for index in itertools.count(self.start):
            if ahead is ended:
                return
            if count(index + 1, self.share) > count(index, self.share):
                yield next(original)
            else:
                yield cast("Item", ahead)
                ahead = next(task, ended)


def count(items: int, share: Fraction) -> int:
    """O(n) = floor(p n + 1/2): how many of the first n items are original ones."""
    return (2 * items * share.numerator + share.denominator) // (2 * share.denominator)


def _read(source: Source[Item], rank: int, seed: int, part: int, epochs: int | None) -> Iterator[Item]:
    """The items of a source from number `rank` on, through its epochs; without end where `epochs` is None."""
    if _numbered(source):
        for drawn in itertools.count(rank):
            if epochs is not None and drawn >= epochs * len(source):
                return
            yield source[_drawn(seed, part, drawn, len(source))]
    for _ in itertools.count() if epochs is None else range(epochs):
        found = False
        for item in cast("Iterable[Item]", source):
            found = True
            if rank:
                rank -= 1
            else:
                yield item
        if not found:
            raise ValueError(f"the {('task', 'original')[part]} stream has no items")


def _drawn(seed: int, part: int, rank: int, length: int) -> int:
    """The place of the item drawn as number `rank` from a source of `length` items."""
    epoch, place = divmod(rank, length)
    return int(_order(seed, part, epoch, length)[place])


@lru_cache(maxsize=4)
def _order(seed: int, part: int, epoch: int, length: int) -> Order:
    return np.random.default_rng([seed, part, epoch]).permutation(length)


def _numbered(source: Source[Item]) -> TypeGuard[Numbered[Item]]:
    """Whether items can be taken by number. A torch `IterableDataset` has the methods, but raises in one of them."""
    return isinstance(source, Numbered) and not isinstance(source, IterableDataset)


def _checked(task: Any, original: Any, share: Share, epochs: int) -> Fraction:
    """The share in exact arithmetic, after everything has been checked."""
    as_whole("epochs", epochs)
    if not 0 <= as_number("share", share) < 1:
        raise ValueError(f"share is {share}, but must be at least 0 and below 1: the original items among all items")
    for name, source in (("task", task), ("original", original)):
        if isinstance(source, (str, Mapping)):
            kind = type(source).__name__  # pyright: ignore[reportUnknownArgumentType]
            raise TypeError(f"{name} is a {kind}, not a list, data set or iterable of items: name one split of it")
        if isinstance(source, Iterator):
            raise TypeError(f"{name} is an iterator, which cannot begin again: give what it iterates over")
        if _numbered(source) and not len(source) and (name == "task" or share):
            raise ValueError(f"{name} has no items to mix")
    return Fraction(str(share))  # as it is written: the float 0.01 is not 1/100
