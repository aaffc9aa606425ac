"""Whether a gradient reaches what is trained. A run in which none does ends like any other, with nothing learned."""

from __future__ import annotations

import warnings

from torch import nn

from tokenpaths.attachment.handle import attachments
from tokenpaths.trailmap.adapter import Adapter

PATIENCE = 10
"""A run says so after this many steps without any gradient, and at its end."""
WHY = (
    "the rules may choose no token of these batches, the strength or the goals' weights may be 0, the trails off, a "
    "gate shut, or the labels all -100"
)


class Reach:
    """The trails of a run that no gradient has reached yet; an adapter without sites counts as one.

    `told` says that the user knows already that none will.
    """

    def __init__(self, trails: Adapter, told: bool = False) -> None:
        self.steps, self.told = 0, told
        self.none_yet = True
        found: dict[str, nn.Module] = {"the adapter": trails}
        if trails.items():
            found = {str(site): trail for site, trail in reversed(trails.items())}
            found |= {type(part).__name__: part for part in trails.members if not part.items()}
        learning = {name: [p for p in part.parameters() if p.requires_grad] for name, part in found.items()}
        self._without = {name: parameters for name, parameters in learning.items() if parameters}

    def step(self) -> None:
        """A step is about to be taken: its gradients are there."""
        self.steps += 1
        reached = [
            name
            for name, parameters in self._without.items()
            if any(p.grad is not None and bool(p.grad.any()) for p in parameters)
        ]
        for name in reached:
            del self._without[name]
        self.none_yet &= not reached
        if self.none_yet and self.steps == PATIENCE and not self.told:
            self.told = True
            self._warn(f"in {PATIENCE} steps no gradient has reached the trails, so nothing is learned: {WHY}")

    def end(self, all_examples: bool = True) -> None:
        """The run is over. Trails that are late count only if all examples have been seen."""
        if self.none_yet and self.steps and not self.told:
            self._warn(f"no gradient has reached the trails in any step, so nothing was learned: {WHY}")
        elif not self.none_yet and self._without and all_examples:
            names = ", ".join(reversed(self._without))
            self._warn(f"no gradient has reached the trail at {names} in {self.steps} steps, so it has learned nothing")

    @staticmethod
    def _warn(message: str) -> None:
        warnings.warn(message, stacklevel=4)


def standstill(model: nn.Module, trails: Adapter) -> str | None:
    """Why trails cannot learn as they are attached now, or None."""
    for attachment in attachments(model):
        if attachment.trails is trails and attachment.strength == 0:
            return "the trails are attached at strength 0, where no gradient reaches them and nothing is learned"
        if attachment.trails is trails and attachment.rows == ():
            return "the trails are attached with rows=(), so they move nothing and nothing is learned"
    return None
