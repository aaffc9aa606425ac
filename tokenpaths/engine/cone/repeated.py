"""One batch in two runs: what the lowest blocks made of it in the first is handed on in the second."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenpaths.attachment.hooks import forwards
from tokenpaths.engine.cone.conditions import plain_values


@dataclass(frozen=True, eq=False)
class _Call:
    """What a block was given, and what its `forward` made of it."""

    given: tuple[tuple[Any, ...], dict[str, Any]]
    result: Any


class Repeated:
    """The calls of blocks in one run. In another, a block that is given the same again gives back the same result."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        self.blocks = list(blocks)
        self.calls: dict[int, _Call] = {}

    @contextmanager
    def record(self) -> Generator[None]:
        """Inside, the calls of the blocks are kept."""

        def call(number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result = forward(*args, **kwargs)
            if plain_values([args, *kwargs.values()]):  # a cache, say, may be written to, which a kept result is not
                self.calls[number] = _Call((args, kwargs), result)
            return result

        with forwards(self.blocks, call):
            yield

    @contextmanager
    def replay(self) -> Generator[None]:
        """Inside, a block whose call is kept does not run if it is given the same, to the bit."""

        def call(number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            kept = self.calls.get(number)
            if kept is not None and _same((args, kwargs), kept.given):
                return kept.result
            return forward(*args, **kwargs)

        with forwards(self.blocks, call):
            yield


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
