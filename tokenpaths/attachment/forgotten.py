"""An optimizer that trains the base, or nothing, and leaves out the trails attached to it: said before its step.

with attach(model, trails):
    Trainer(model, ...).train()      # trains model.parameters(), and attached trails are none of these
"""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable
from weakref import WeakSet

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from tokenpaths.site import Host
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.undo import Undo


@runtime_checkable
class _Attached(Protocol):
    @property
    def host(self) -> Host: ...
    @property
    def trails(self) -> Adapter: ...


_ATTACHED: WeakSet[Any] = WeakSet()
_NAMED: WeakSet[torch.optim.Optimizer] = WeakSet()
_hook: RemovableHandle | None = None


def watch_for(attachment: _Attached) -> None:
    """Trails were attached: warn, once, of an optimizer that trains their base and not them."""
    global _hook
    _ATTACHED.add(attachment)
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_look)


def no_longer(attachment: _Attached) -> None:
    """The trails were detached."""
    global _hook
    _ATTACHED.discard(attachment)
    if not _ATTACHED and _hook is not None:
        _hook.remove()
        _hook = None


@contextmanager
def trains_what_was_named(optimizer: torch.optim.Optimizer) -> Generator[None]:
    """Inside, it is the optimizer of a `steps`, whose user has said what is trained."""
    with Undo() as undo:
        undo.add(_NAMED.discard, optimizer)
        _NAMED.add(optimizer)
        yield


def _look(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if optimizer in _NAMED:
        return
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for attachment in list(_ATTACHED):
        learning = [p for p in attachment.trails.parameters() if p.requires_grad]
        if not learning or any(id(p) in trained for p in learning):  # frozen trails are laid on purpose
            continue
        base = [name for name, p in attachment.host.model.named_parameters() if id(p) in trained]
        if base or not trained:  # that of a Trainer over a frozen base holds nothing at all
            _ATTACHED.discard(attachment)
            _warn(type(optimizer).__name__, attachment.host.model, base)


def _warn(optimizer: str, model: nn.Module, base: list[str]) -> None:
    kind = type(model).__name__
    trains = f"{len(base)} parameters of the base {kind}, the first of them {base[0]}," if base else "nothing"
    warnings.warn(
        f"{optimizer} trains {trains} and none of the trails attached to {kind}: attach does not make trails "
        "parameters of the model, which is what a Trainer trains. To train the trails and leave the base alone: "
        "with tp.trainable(model, trails): ... To train the base around trails that stay as they are: "
        "trails.requires_grad_(False)",
        stacklevel=4,
    )
