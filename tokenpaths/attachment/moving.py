"""How hidden states are moved at the places of a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenpaths.attachment.hooks import Hook, Observer
from tokenpaths.site import Site
from tokenpaths.site.host import Place
from tokenpaths.trails.base import Trail


@dataclass(frozen=True, eq=False)
class Plan:
    """What an attachment does in one forward: a mask for each rule (none known for images), and the strength.

    `chosen` numbers the tokens that the rules of one place choose, row after row of the batch; None is all of them.
    It is not known at all for images and inside torch.compile.
    """

    masks: list[Tensor] | None
    chosen: Mapping[tuple[int, ...], Tensor | None] | None
    strength: float
    learns: bool = field(default_factory=torch.is_grad_enabled)  # in its forward, whatever asks for it again


@dataclass(frozen=True)
class Part:
    """One trail at a place, and the number of its rule among the attachment's rules."""

    site: Site
    trail: Trail
    rule: int


def chooses(plan: Plan) -> bool:
    """Whether a plan may choose a token anywhere. Not a method: torch.compile could not trace one in tests."""
    return plan.chosen is None or any(rows is None or len(rows) for rows in plan.chosen.values())


def rules_of(parts: list[Part]) -> tuple[int, ...]:
    """The rules of one place."""
    return tuple(sorted({part.rule for part in parts}))


def learns(parts: list[Part]) -> bool:
    """Whether gradients are recorded and a trail here is trained.

    Such trails run even where no token is chosen: they then get gradients of zero, for which DDP waits.
    """
    return torch.is_grad_enabled() and any(p.requires_grad for part in parts for p in part.trail.parameters())


def flat_masks(parts: list[Part], masks: list[Tensor], rows: Tensor | None) -> list[Tensor]:
    """For each trail at a place, which of the chosen tokens it moves; [] for a trail that is alone, and moves all."""
    if len(parts) == 1:
        return []
    flat = [masks[part.rule].flatten() for part in parts]
    return flat if rows is None else [mask.to(rows.device).index_select(0, rows) for mask in flat]


def move_densely(parts: list[Part], masks: list[Tensor], h: Tensor, strength: float) -> Tensor:
    """Move all tokens and keep the chosen ones. torch.compile cannot trace a gather whose size depends on values."""
    masks = [mask.to(h.device).reshape(h.shape[:-1]) for mask in masks]
    moved = move_states(parts, masks if len(parts) > 1 else [], h, strength)
    # where, not a product with the mask: unmoved tokens stay bit-equal, and cannot catch a NaN
    return torch.where(functools.reduce(torch.logical_or, masks).unsqueeze(-1), moved, h)


def move_states(parts: list[Part], masks: list[Tensor], h: Tensor, strength: float) -> Tensor:
    """The moved states, h + strength * (the sum of the trails' displacements of h).

    The sum is computed in the wider of the dtypes of states and trails, so that a trail in a coarse dtype does not
    coarsen the states. `masks` say which tokens each of several trails moves.
    """
    wide, total = h, None
    with torch.autocast(h.device.type, enabled=False):
        for number, part in enumerate(parts):
            weight = next(part.trail.parameters(), None)
            dtype = torch.promote_types(h.dtype, torch.float32) if weight is None else weight.dtype
            given = h.to(h.device if weight is None else weight.device, dtype)
            d = part.trail(given)
            if d.shape != h.shape:
                raise ValueError(
                    f"{part.site}: {part.trail} returned shape {list(d.shape)} for states of {list(h.shape)}"
                )
            d = d.to(h.device)
            if masks:
                d = torch.where(masks[number].to(h.device).unsqueeze(-1), d, 0)
            total = d if total is None else total + d
            if given.device == h.device and dtype == torch.promote_types(h.dtype, dtype):
                wide = given  # cast once, for the trail and for the sum
        assert total is not None
        return torch.add(wide, total, alpha=strength).to(h.dtype)


def hook_place(place: Place, move: Callable[[Tensor], Tensor]) -> tuple[RemovableHandle, Hook]:
    """Hook a place. Our hooks run before all others there, so whoever reads the module reads the moved states."""

    def change(h: Tensor) -> Tensor:
        if place.columns is None:
            return move(h)
        part = h[..., place.columns]
        moved = move(part)
        if moved is part:
            return h
        changed = h.clone()
        changed[..., place.columns] = moved
        return changed

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    if place.side == "output":
        hooks: dict[int, Any] = vars(place.module)["_forward_hooks"]
        made = Hook(after)
        handle = place.module.register_forward_hook(made)
    else:
        hooks = vars(place.module)["_forward_pre_hooks"]
        made = Hook(before)
        handle = place.module.register_forward_pre_hook(made, with_kwargs=True)
    for key in [key for key, hook in hooks.items() if not isinstance(hook, Hook) or isinstance(hook, Observer)]:
        hooks[key] = hooks.pop(key)
    return handle, made
