"""When the dropout of attached trails is on: in a forward of a model in training mode, and in a step of `steps`.

A model that is loaded is in eval mode, fresh trails are in training mode, as torch makes modules. If each kept its own,
equal calls of a steered model would differ. So the trails follow the blocks that they are attached to.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.undo import Undo

_LEARNING: WeakSet[Adapter] = WeakSet()
_KEPT: WeakKeyDictionary[nn.Module, tuple[set[object], bool]] = WeakKeyDictionary()
_LOCK = threading.RLock()


def follow(trails: Adapter, blocks: nn.Module) -> None:
    """Before a forward: put the trails into the mode of the blocks, unless they are in a step of `steps`."""
    if trails.training != blocks.training and trails not in _LEARNING:
        trails.train(blocks.training)


def keep_mode(undo: Undo, trails: Adapter) -> None:
    """When `undo` runs, the trails are in the mode that they are in now, unless others keep their mode as well."""
    user = object()
    undo.add(_let_go, trails, user)
    with _LOCK:
        for module in trails.modules():
            users, _ = _KEPT.setdefault(module, (set(), module.training))
            users.add(user)


def _let_go(trails: Adapter, user: object) -> None:
    with _LOCK:
        for module in trails.modules():
            if module in _KEPT:
                users, training = _KEPT[module]
                users.discard(user)
                if not users:
                    module.training = training
                    del _KEPT[module]


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
