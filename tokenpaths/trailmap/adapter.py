"""What is trained beside a frozen base model: the little that training and measuring ask of it.

A `TrailMap` is one, and so is `peers.PeftAdapter`, which holds what PEFT has laid into a model. `steps`, objectives,
`drift` and `retention` take either, so that two runs may differ by the method and by nothing else.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import ClassVar

from torch import nn

from tokenpaths.site import Site


class Adapter(nn.Module, ABC):
    """Parameters that are trained while the base model is frozen.

    Its `parameters()` are its own and none of the base, and `train()` and `eval()` set the modes of its own modules, as
    of dropout. Where a function says `trails`, it takes any adapter.
    """

    saved_as: ClassVar[str]
    """The name that `save` is given in the folder of a run."""
    sites: tuple[Site, ...] = ()
    """Where it moves states; empty if it changes weights, so that nothing can be said of what it leaves as it was."""
    blocks: str | None = None
    """The name of the block list of a model that has several."""

    @abstractmethod
    def off(self) -> AbstractContextManager[None]:
        """Inside, the model is the frozen base; afterwards all is as before. It may be nested."""

    @abstractmethod
    def check(self, model: nn.Module) -> None:
        """Raise `ValueError` if it cannot work in this model."""

    @abstractmethod
    def save(self, path: str | os.PathLike[str], model: nn.Module | None = None) -> None:
        """Write it, whole or not at all. `model` is the base, for a note of which one it was."""

    @abstractmethod
    def restore(self, path: str | os.PathLike[str]) -> None:
        """Take over the numbers that `save` wrote, in place, to the bit."""

    def size(self) -> int:
        """The number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
