"""One run at a time over a model, and over a map of trails. Two would train on top of each other, and say nothing.

What measures a model, in evaluation mode, may do so in several threads at once, but not beside a run of another one.

A run that is kept and not ended, as by a variable of a notebook whose cell was interrupted, holds them still.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.undo import Undo


@dataclass(frozen=True, eq=False)
class _Run:
    name: str
    model: frozenset[int]
    trails: frozenset[int]
    close: Callable[[], None]
    thread: int = field(default_factory=threading.get_ident)


@dataclass(eq=False)
class _Evaluation:
    """One use of `evaluating`: the modules that it puts back into training mode, and all that rely on eval mode."""

    covers: frozenset[int]
    training: list[nn.Module]
    thread: int = field(default_factory=threading.get_ident)


_OPEN: list[_Run] = []
_EVALUATIONS: list[_Evaluation] = []
_LOCK = threading.RLock()  # the end of a lost run may come inside, by the garbage collector


@contextmanager
def holding(model: nn.Module, trails: Adapter, name: str, close: Callable[[], None]) -> Generator[None]:
    """Inside, a run holds a model and what it trains.

    Args:
        model: the model.
        trails: what is trained.
        name: of the run, for the message to the next one.
        close: ends the run. It holds no reference that keeps the run alive.

    Raises:
        RuntimeError: another run holds one of them, or another thread evaluates the model.
    """
    run = _Run(name, _parts(model), _parts(trails), close)
    with Undo() as undo:
        undo.add(_release, run)
        with _LOCK:
            for other in list(_OPEN):
                if other.trails & run.trails or other.model & run.model:
                    what = "these trails" if other.trails & run.trails else "this model"
                    raise RuntimeError(
                        f"{name}: {other.name} over {what} is still open, and the two would train on top of each "
                        "other. Finish it first, or close its iterator or with block; tp.detach(model) ends all"
                    )
            for other in _EVALUATIONS:
                if other.thread != run.thread and other.covers & run.model:
                    raise RuntimeError(
                        f"{name}: another thread measures this model, in evaluation mode: train when it is done, or a "
                        "copy of the model"
                    )
            _OPEN.append(run)
        yield


def _release(run: _Run) -> None:
    with _LOCK:
        _OPEN[:] = [other for other in _OPEN if other is not run]


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Evaluation mode while it lasts; afterwards each module is in the mode that it was in.

    Where other threads still evaluate the model then, the last of them puts it back.

    Raises `RuntimeError` while another thread trains the model: its dropout would be off.
    """
    modules = list(model.modules())
    with Undo() as undo:
        with _LOCK:
            _check_untrained(model)
            mine = _Evaluation(frozenset(map(id, modules)), [module for module in modules if module.training])
            undo.add(_finish, mine)
            _EVALUATIONS.append(mine)
            model.eval()
        yield


def _finish(mine: _Evaluation) -> None:
    with _LOCK:
        _EVALUATIONS[:] = [other for other in _EVALUATIONS if other is not mine]
        for module in mine.training:
            others = [o for o in _EVALUATIONS if o.thread != mine.thread and id(module) in o.covers]
            if others:
                others[0].training.append(module)  # the outermost of its thread
            else:
                module.training = True


def _check_untrained(model: nn.Module) -> None:
    """Raise `RuntimeError` while a run of another thread holds a model."""
    there = [run for run in list(_OPEN) if run.thread != threading.get_ident()]
    if there and (busy := [run.name for run in there if run.model & _parts(model)]):
        raise RuntimeError(
            f"{busy[0]} trains this model in another thread, and what is measured here would turn its dropout off: "
            "measure when it has ended, or on a copy of the model"
        )


def close_runs(model: nn.Module) -> None:
    """End every run that holds a model. Afterwards its trails are detached and its grad flags are as before."""
    parts = _parts(model)
    for run in [run for run in _OPEN if run.model & parts]:
        run.close()
        _release(run)


def _parts(module: nn.Module) -> frozenset[int]:
    """The modules that have parameters of their own: PEFT, DDP and torch.compile wrap a model around the same ones."""
    return frozenset(id(part) for part in module.modules() if next(part.parameters(recurse=False), None) is not None)
