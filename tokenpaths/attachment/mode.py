"""When the dropout of attached trails is on: in a forward of a model in training mode, and in a step of `steps`.

A model that is loaded is in eval mode, fresh trails are in training mode, as torch makes modules. If each kept its own,
equal calls of a steered model would differ. So the trails follow the blocks that they are attached to.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from weakref import WeakSet

from torch import nn

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
