"""Values that hold in one thread, or in one task of an event loop, and in no other."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from tokenpaths.undo import Undo

Entry = TypeVar("Entry")


class _Traced(threading.local):
    entries: tuple[Any, ...] = ()


class Scoped(Generic[Entry]):
    """Entries that the running thread or task has added: `entries()` in another one does not give them.

    A task, `asyncio.to_thread` and `contextvars.copy_context().run` begin with the entries of whoever started them, a
    thread with none. An entry of theirs that is taken away elsewhere stays in their copy: let it know that it is over.
    """

    def __init__(self, name: str) -> None:
        self._entries: ContextVar[tuple[Entry, ...]] = ContextVar(name)
        self._traced = _Traced()  # torch.compile traces no ContextVar, and guards on attributes of a thread

    def entries(self) -> tuple[Entry, ...]:
        """Those of the running thread or task, oldest first."""
        return self._traced.entries if torch.compiler.is_compiling() else self._entries.get(())

    def is_known(self) -> bool:
        """Whether the running thread has added an entry, or began with the context of one that had, or was asked to."""
        return self._entries.get(None) is not None

    def begin(self) -> None:
        """Let it be known here that there are none, so that whoever takes this context along knows it too."""
        self._put(self._entries.get(()))

    def add(self, entry: Entry) -> None:
        """Let an entry hold here."""
        self._put((*self._entries.get(()), entry))

    def discard(self, entry: Entry) -> None:
        """Let it hold here no longer."""
        self._put(tuple(each for each in self._entries.get(()) if each is not entry))

    def _put(self, entries: tuple[Entry, ...]) -> None:
        self._entries.set(entries)
        self._traced.entries = entries


@dataclass(eq=False)
class _Turn:
    switch: Switch
    on: bool
    open: bool = True  # a task may have taken it along, and outlive it


_TURNS: Scoped[_Turn] = Scoped("tokenpaths: what is turned on or off in one thread or task")
_OFF_IN_MAIN: list[_Turn] = []


class Switch:
    """What is on, unless the running thread or task is inside `off()`.

    Args:
        name: what the user calls to turn it off, for the message.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        _TURNS.begin()

    @contextmanager
    def off(self) -> Generator[None]:
        """Inside, it is off, and a thread of which that cannot be told is refused."""
        turn = _Turn(self, False)
        with Undo() as undo:
            undo.add(_end, turn)
            if in_main_thread():
                _OFF_IN_MAIN.append(turn)
            _TURNS.add(turn)
            yield

    @contextmanager
    def turned(self, on: bool) -> Generator[None]:
        """Inside, it is on or off, for code that starts no threads of its own."""
        turn = _Turn(self, on)
        with Undo() as undo:
            undo.add(_end, turn)
            _TURNS.add(turn)
            yield

    def is_on(self) -> bool:
        """Whether it is on here.

        Raises `RuntimeError` in a thread of which that cannot be told: the main thread is inside `off()`.
        """
        for turn in reversed(_TURNS.entries()):
            if turn.switch is self and turn.open:
                return turn.on
        if any(turn.switch is self for turn in _OFF_IN_MAIN) and not (in_main_thread() or _TURNS.is_known()):
            raise RuntimeError(
                f"the main thread is inside {self.name}, and it cannot be told whether this thread was started to run "
                "the frozen model as well: enter off() in this thread too, or run it in contextvars.copy_context(), as "
                "asyncio.to_thread does; if it is to be steered, let another thread than the main one enter off()"
            )
        return True


def _end(turn: _Turn) -> None:
    turn.open = False
    _TURNS.discard(turn)
    _OFF_IN_MAIN[:] = [other for other in _OFF_IN_MAIN if other is not turn]


class _Here(threading.local):
    def __init__(self) -> None:
        self.is_main = threading.current_thread() is threading.main_thread()


_here = _Here()


def in_main_thread() -> bool:
    """Whether the running thread is the main one."""
    return _here.is_main


def running_task() -> asyncio.Task[Any] | None:
    """The task of an event loop that is running in this thread; None outside of any."""
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        return None
