"""What is trained beside a frozen base model, and the few things that training and measuring ask of it.

A `TrailMap` is an adapter. So is `PeftAdapter` of `tokenpaths.lab.peers`, which holds what PEFT has put into a model.
Whatever trains or measures takes either, so that two runs can differ in the method alone.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

from torch import Tensor, nn

from tokenpaths.checking import kind, quoted
from tokenpaths.files import TrailFileError
from tokenpaths.site import Site
from tokenpaths.trailmap.gate import Gate
from tokenpaths.trails.base import Trail
from tokenpaths.undo import Undo


class Adapter(nn.Module, ABC):
    """Parameters that are trained while the base model is frozen.

    Its `parameters()` are its own and none of the base. `train()` and `eval()` set the modes of its own modules, as of
    dropout. An argument that is named `trails` takes any adapter.
    """

    saved_as: ClassVar[str]
    """The name of its file or folder in the folder of a run."""
    sites: tuple[Site, ...] = ()
    """Where it moves states; empty if it changes weights, and may move every state."""
    blocks: str | None = None
    """The name of the block list of a model that has several."""

    def __init__(self) -> None:
        super().__init__()
        self.gate: Gate | None = None
        """What decides, once for each prompt, whether the adapter is at work. It is saved with it."""

    def items(self) -> list[tuple[Site, Trail]]:
        """Each site with its trail; none of an adapter that changes weights."""
        return []

    @property
    def members(self) -> tuple[Adapter, ...]:
        """What is attached by itself: the adapter, or each of those that it is made of."""
        return (self,)

    @property
    def enabled(self) -> bool:
        """Whether it is at work in the running thread or task, and not inside `off()`."""
        return True

    def switched(self, on: bool) -> AbstractContextManager[None]:
        """Inside, it is off unless `on`; then it is as it was."""
        return nullcontext() if on else self.off()

    def by_rows(self, undo: Undo, at_work: Callable[[], Tensor | bool]) -> None:
        """Hold an adapter that changes weights to the rows of a batch that `at_work` tells, until `undo` runs.

        Raises `ValueError` for one that cannot be.
        """
        raise ValueError(f"a {type(self).__name__} cannot be at work in some rows alone")

    @property
    def running(self) -> list[nn.Module]:
        """The modules of a model, or its own, that run where it is at work."""
        return list(self.modules())

    @abstractmethod
    def off(self) -> AbstractContextManager[None]:
        """Inside, the model is the frozen base; afterwards all is as before. These contexts may be nested."""

    @abstractmethod
    def check(self, model: nn.Module) -> None:
        """Raise `ValueError` if it cannot work in this model."""

    @abstractmethod
    def save(self, path: str | os.PathLike[str], model: nn.Module | None = None) -> None:
        """Write it to a file or folder, whole or not at all. `model` is the base, whose fingerprint is kept."""

    @abstractmethod
    def restore(self, path: str | os.PathLike[str]) -> None:
        """Copy the numbers that `save` wrote into its own parameters, to the bit."""

    def check_gate(self, gate: Gate | None, path: str | os.PathLike[str]) -> None:
        """Raise `TrailFileError` for a file whose gate, if there is one, has other arguments than this adapter's."""
        if self.gate is not None and (gate is None or gate.note() != self.gate.note()):
            raise TrailFileError(
                f"{os.fspath(path)} has {'no gate' if gate is None else gate}, and this adapter {self.gate}: take the "
                "gate away first (trails.gate = None), and then that of the file, if any, is taken over"
            )

    def take_gate(self, gate: Gate | None) -> None:
        """Take over a gate that `check_gate` has passed: in place where there is one, for handles that ask it."""
        if self.gate is None or gate is None:
            self.gate = gate
        else:
            self.gate.fill(gate.state_dict())

    def size(self) -> int:
        """The number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)


def check_adapter(trails: object) -> None:
    """Raise `TypeError` for what is no adapter, with what to give instead."""
    if isinstance(trails, Adapter):
        return
    if isinstance(trails, (str, os.PathLike)):
        instead = "load it, TrailMap.load(path)"
    elif hasattr(trails, "peft_config"):
        instead = "a PEFT model is made one by tp.lab.peers.PeftAdapter(peft_model)"
    else:
        instead = "lay trails at sites, TrailMap({Site(15, Last(1)): trail})"
    raise TypeError(f"a TrailMap or another Adapter is expected, not {kind(trails)} ({quoted(trails)}): {instead}")
