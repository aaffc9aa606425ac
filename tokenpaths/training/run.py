"""A run to iterate over, which speaks up if nobody does."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Generator
from typing import Any, TypeVar

from tokenpaths.undo import tidy

T = TypeVar("T")


class Run(Generator[T]):
    """A generator that warns when it is thrown away, or the program ends, before its first step was asked for.

    Args:
        make: a function from what closes this run to the generator of its steps.
        name: what it is called in the warning.
    """

    def __init__(self, make: Callable[[Callable[[], None]], Generator[T]], name: str) -> None:
        self.name = name
        here = weakref.ref(self)

        def close() -> None:
            if (run := here()) is not None:
                run.close()

        self._steps = make(close)
        self._idle = weakref.finalize(self, _warn, name)

    def __repr__(self) -> str:
        state = "not begun: iterate over it" if self._idle.alive else "begun"
        return f"<{self.name}, {state}>"

    def send(self, value: None) -> T:
        self._idle.detach()
        return tidy(self._steps.send)(value)

    def throw(self, *error: Any) -> T:
        self._idle.detach()
        return self._steps.throw(*error)

    def close(self) -> None:
        self._idle.detach()
        self._steps.close()


def _warn(name: str) -> None:
    warnings.warn(
        f"{name} was never iterated over, so nothing was trained: for step in steps(...): ..., or list(steps(...))",
        stacklevel=2,
    )
