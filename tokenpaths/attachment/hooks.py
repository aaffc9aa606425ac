"""Hooks that stay behind when a model is copied, and methods that stand before a method of a class."""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tokenpaths.undo import Undo


class Hook:
    """A hook that stays behind when its model is copied or pickled: the copy is the frozen model.

    It acts in the thread that made it: what measures a model in one thread sees no forward of another.
    """

    awake: bool = True

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call
        self.thread = threading.get_ident()

    def __call__(self, *args: Any) -> Any:
        return self.call(*args) if self.awake and self.is_here() else None

    def is_here(self) -> bool:
        """Whether the running thread is the one that made it. What torch.compile traces is for all threads."""
        return torch.compiler.is_compiling() or threading.get_ident() == self.thread

    def __reduce__(self) -> Any:
        return _inert, ()


def only_here(call: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that acts in the thread that made it, and that the light cone takes for a user's."""
    hook = Hook(call)
    return lambda *args: hook(*args)


class EveryThread(Hook):
    """A hook that acts in every thread."""

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)


@contextmanager
def alone(modules: Iterable[nn.Module], doing: str) -> Generator[None]:
    """Inside, no other thread runs these modules: for what changes their numbers for a while.

    Raises `RuntimeError` in a thread that would run them, or that is here for one of them already.
    """
    modules = list(modules)
    mine = _Alone(doing, frozenset(map(id, modules)))
    refuse = EveryThread(mine.refuse)
    with Undo() as undo:
        undo.add(_leave, mine)
        with _lock:
            for other in _ALONE:
                if other.modules & mine.modules:
                    other.refuse()
            _ALONE.append(mine)
        for module in modules:
            undo.hook(module.register_forward_pre_hook, refuse)
        yield


class _Alone:
    def __init__(self, doing: str, modules: frozenset[int]) -> None:
        self.doing, self.modules, self.thread = doing, modules, threading.get_ident()

    def refuse(self, *args: Any) -> None:
        if threading.get_ident() != self.thread:
            raise RuntimeError(f"another thread {self.doing}: wait for its end, or take a copy of the model")


_ALONE: list[_Alone] = []


def _leave(mine: _Alone) -> None:
    with _lock:
        _ALONE[:] = [other for other in _ALONE if other is not mine]


class Observer(Hook):
    """A hook that looks and changes nothing. It does not see what a gate reads."""

    def __call__(self, *args: Any) -> Any:
        return None if _READING.on and not torch.compiler.is_compiling() else super().__call__(*args)


class _Reading(threading.local):
    on: bool = False


_READING = _Reading()


@contextmanager
def unobserved() -> Generator[None]:
    """Inside, no `Observer` looks at the forwards of this thread."""
    with Undo() as undo:
        undo.set(_READING, "on", True)
        yield


def _inert() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*args: Any) -> None: ...


def shadow(undo: Undo, module: nn.Module, name: str, replacement: Callable[..., Any]) -> None:
    """Let `replacement(original, *args)` stand before a method of a module, until `undo` runs.

    Several may stand before one method, and be taken away in any order. A deep copy of the model takes them along:
    there they do nothing.
    """
    layer = _Layer(replacement)
    undo.add(_take_away, module, name, layer)
    with _lock:
        there: Any = vars(module).get(name)
        layers = _layers_of(module, there)
        (_stand(module, name, there) if layers is None else layers).append(layer)


_LAYERS = "_tokenpaths_layers"
_lock = threading.RLock()


class _Layer:
    """One replacement that stands before a method."""

    def __init__(self, replacement: Callable[..., Any]) -> None:
        self.replacement = replacement


def _stand(module: nn.Module, name: str, before: Callable[..., Any] | None) -> list[_Layer]:
    """Put a bound method before that of the class, or before what was set on the instance; gives its layers."""
    method, layers = getattr(type(module), name), list[_Layer]()

    @functools.wraps(method)
    def standing(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(method, self) if before is None else before
        for layer in tuple(layers) if self is module else ():
            call = functools.partial(layer.replacement, call)
        return call(*args, **kwargs)

    vars(standing).update({_LAYERS: layers, "_before": before})
    vars(module)[name] = types.MethodType(standing, module)
    return layers


def _layers_of(module: nn.Module, there: Any) -> list[_Layer] | None:
    """What stands before a method, by what is set on the instance; None if nothing of ours does."""
    ours = isinstance(there, types.MethodType) and there.__self__ is module
    return getattr(there.__func__, _LAYERS, None) if ours else None


def _take_away(module: nn.Module, name: str, layer: _Layer) -> None:
    with _lock:
        there: Any = vars(module).get(name)
        layers = _layers_of(module, there)
        if layers is None:
            return
        layers[:] = [other for other in layers if other is not layer]
        if layers:
            return
        before = vars(there.__func__)["_before"]
        if before is None:
            vars(module).pop(name, None)
        else:
            vars(module)[name] = before


@contextmanager
def forwards(modules: Iterable[nn.Module], call: Callable[..., Any]) -> Generator[None]:
    """Inside, `modules[i].forward(...)` is `call(i, forward, ...)`, in this thread.

    Hooks run as ever, since they are around it.
    """
    here = Hook(call)

    def standing(number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return call(number, forward, *args, **kwargs) if here.is_here() else forward(*args, **kwargs)

    with Undo() as undo:
        for number, module in enumerate(modules):
            shadow(undo, module, "forward", functools.partial(standing, number))
        yield
