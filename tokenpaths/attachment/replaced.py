"""Whether hooked modules are still where they were: on one that was replaced, a trail would be gone without a word."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from torch import nn

from tokenpaths.site import Host

Edge: TypeAlias = tuple[nn.Module, str, nn.Module]
"""A parent, the name of a child, and the child."""


def edges_to(host: Host, hooked: Sequence[nn.Module]) -> list[Edge]:
    """The steps (parent, name, child) from the block list down to the modules that are hooked."""
    wanted, found = {id(module) for module in hooked}, list[Edge]()

    def reaches(module: nn.Module) -> bool:
        below = [(name, child) for name, child in module.named_children() if reaches(child)]
        found.extend((module, name, child) for name, child in below)
        return bool(below) or id(module) in wanted

    reaches(host.blocks)
    names = list(host.path)
    for outer, inner in itertools.pairwise(names):
        found.append((host.path[outer], inner.rpartition(".")[2], host.path[inner]))
    holder = host.path[names[-1]]
    found += [(holder, name, child) for name, child in holder.named_children() if child is host.blocks]
    return found


def check_in_place(edges: Iterable[Edge]) -> None:
    """Raise `RuntimeError` if a child was replaced by something that it is not inside of."""
    for parent, name, child in edges:
        now = vars(parent)["_modules"].get(name)
        if now is not child and (now is None or all(part is not child for part in now.modules())):
            raise RuntimeError(
                f"{type(parent).__name__}.{name} was replaced while trails are attached to it or inside of it (as "
                "PEFT's merge_and_unload or a quantiser does): remove the trails (tp.detach(model)), and attach them "
                "to the model as it is now"
            )
