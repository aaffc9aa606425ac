"""Modes of a model and of trails, for a while.

When the dropout of attached trails is on: in a forward of a model in training mode, and in a step of `steps`.

A model that is loaded is in eval mode, fresh trails are in training mode, as torch makes modules. If each kept its own,
equal calls of a steered model would differ. So the trails follow the blocks that they are attached to.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakSet

from torch import nn

from tokenpaths.attachment.runs import check_untrained_elsewhere
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.undo import Undo

_LEARNING: WeakSet[Adapter] = WeakSet()


def follow(trails: Adapter, blocks: nn.Module) -> None:
    """Before a forward: put the trails into the mode of the blocks, unless they are in a step of `steps`."""
    if trails.training != blocks.training and trails not in _LEARNING:
        trails.train(blocks.training)


@contextmanager
def learning(trails: Adapter) -> Generator[None]:
    """Inside, the trails are in training mode, whatever the model's; afterwards each module is as it was."""
    with Undo() as undo:
        for module in trails.modules():
            undo.add(setattr, module, "training", module.training)
        undo.add(_LEARNING.discard, trails)
        _LEARNING.add(trails)
        trails.train()
        yield


@dataclass(eq=False)
class _Evaluation:
    """One use of `evaluating`: the modules that it puts back into training mode, and all that rely on eval mode."""

    covers: frozenset[int]
    training: list[nn.Module]
    thread: int = field(default_factory=threading.get_ident)


_EVALUATIONS: list[_Evaluation] = []
_LOCK = threading.RLock()


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Evaluation mode while it lasts; afterwards each module is in the mode that it was in.

    Where other threads still evaluate the model then, the last of them puts it back.

    Raises `RuntimeError` while another thread trains the model: its dropout would be off.
    """
    check_untrained_elsewhere(model)
    modules = list(model.modules())
    with Undo() as undo:
        with _LOCK:
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
                others[-1].training.append(module)
            else:
                module.training = True
