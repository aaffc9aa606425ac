"""Hooks that stay behind when a model is copied, and methods that stand before a method of a class."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


class Hook:
    """A hook that stays behind when its model is copied or pickled: the copy is the frozen model.

    While it is not `awake` it does nothing, in the least time.
    """

    awake: bool = True

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __call__(self, *args: Any) -> Any:
        return self.call(*args) if self.awake else None

    def __reduce__(self) -> Any:
        return _inert, ()


class Observer(Hook):
    """A hook that looks and changes nothing."""


def _inert() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*args: Any) -> None: ...


def shadow(module: nn.Module, name: str, replacement: Callable[..., Any]) -> Callable[[], None]:
    """Let a bound method, set on the instance, stand before a method of its class; returns what undoes it.

    A deep copy of the model takes it along: there it does nothing.
    """
    before, method = vars(module).get(name), getattr(type(module), name)

    @functools.wraps(method)
    def standing(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        original = functools.partial(method, self) if before is None else before
        return replacement(original, *args, **kwargs) if self is module else original(*args, **kwargs)

    setattr(module, name, types.MethodType(standing, module))

    def undo() -> None:
        delattr(module, name)
        if before is not None:
            setattr(module, name, before)

    return undo


@contextmanager
def forwards(modules: Iterable[nn.Module], call: Callable[..., Any]) -> Generator[None]:
    """Inside, `modules[i].forward(...)` is `call(i, forward, ...)`. Hooks run as ever, since they are around it."""
    with ExitStack() as stack:
        for number, module in enumerate(modules):
            stack.callback(shadow(module, "forward", functools.partial(call, number)))
        yield
