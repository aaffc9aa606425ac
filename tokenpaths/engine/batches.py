"""Batches and progress bars, for everything that goes over items."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def batches(lengths: Sequence[int], max_batch_tokens: int) -> Iterator[list[int]]:
    """Indices, longest first, in batches whose number of rows times the longest is at most `max_batch_tokens`.

    An item that is longer by itself is a batch of one.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        fit = max(1, max_batch_tokens // lengths[order[0]])
        yield order[:fit]
        order = order[fit:]


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of `batch_size`, the shortest first, so that neighbours in length need little padding."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def shown(items: Iterable[T], what: str, progress: bool) -> Iterable[T]:
    """The items, with a progress bar named `what` if `progress` is set."""
    return bar(what, progress, items=items)


def bar(
    what: str, progress: bool, *, items: Iterable[Any] | None = None, done: int = 0, total: int | None = None
) -> Any:
    """A tqdm bar over items, or one that is moved by hand from `done` to `total`; hidden without `progress`."""
    from tqdm.auto import tqdm

    return tqdm(items, desc=what, disable=not progress, initial=done, total=total)
