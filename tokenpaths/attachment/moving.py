"""How hidden states are moved at the places of a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenpaths.attachment.hooks import Hook, Observer
from tokenpaths.site import Site
from tokenpaths.site.host import Place
from tokenpaths.trails.base import Trail
from tokenpaths.undo import Undo


@dataclass(frozen=True, eq=False)
class Plan:
    """What an attachment does in one forward: a mask for each rule (none known for images), and the strength.

    `chosen` numbers the tokens that the rules of one place choose, row after row of the batch; None is all of them.
    It is not known at all for images and inside torch.compile. Some layers may see the last `kept` tokens alone.
    """

    masks: list[Tensor] | None
    chosen: Mapping[tuple[int, ...], Tensor | None] | None
    strength: float
    kept: int = 0
    answers: tuple[bool, ...] | None = None  # to what else was asked of the device when the tokens were chosen
    opens: Tensor | None = None  # the rows that a gate opens; None for all
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


def move_chosen(parts: list[Part], rules: tuple[int, ...], plan: Plan, h: Tensor) -> Tensor:
    """The states at a place, with those of the chosen tokens moved. Where none is chosen, h itself."""
    assert plan.masks is not None
    if plan.kept == h.shape[1] and plan.masks[0].shape[1] > plan.kept:
        plan = _of_the_last(plan)
        assert plan.masks is not None
    nowhere = plan.chosen is not None and (rows := plan.chosen[rules]) is not None and not len(rows)
    if nowhere and not learns(parts):  # as while decoding under Last(1): nothing else is done to the state
        return h
    if plan.masks[0].numel() != h.shape[:-1].numel():
        raise ValueError(
            f"{parts[0].site}: the states there have shape {list(h.shape)}, which is not one for each of the "
            f"{list(plan.masks[0].shape)} tokens of this forward"
        )
    if plan.chosen is None or torch.compiler.is_compiling():
        return move_densely(parts, [plan.masks[part.rule] for part in parts], h, plan.strength)
    rows = plan.chosen[rules]
    if rows is None:
        return move_states(parts, flat_masks(parts, plan.masks, None), h.flatten(0, -2), plan.strength).view(h.shape)
    rows, states = rows.to(h.device), h.flatten(0, -2)
    moved = move_states(parts, flat_masks(parts, plan.masks, rows), states.index_select(0, rows), plan.strength)
    return states.index_copy(0, rows, moved).view(h.shape)


def _of_the_last(plan: Plan) -> Plan:
    """The plan of layers that see the last tokens only: those that share keys and values with layers below them."""
    assert plan.masks is not None
    masks, chosen = [mask[:, -plan.kept :] for mask in plan.masks], None
    if plan.chosen is not None:
        chosen = {rules: _numbers(masks, rules) for rules in plan.chosen}
    return replace(plan, masks=masks, chosen=chosen, kept=0)


def _numbers(masks: list[Tensor], rules: tuple[int, ...]) -> Tensor:
    return functools.reduce(torch.logical_or, (masks[rule] for rule in rules)).flatten().nonzero().squeeze(1)


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


def states_of(module: nn.Module, output: Any) -> Tensor:
    """The states in what a module returns: it, or the first of a tuple or list.

    Raises `TypeError` for anything else, in which it cannot be told what is the state of a token.
    """
    if isinstance(output, Tensor):
        return output
    if type(output) in (tuple, list) and isinstance(output[0], Tensor):
        return output[0]
    fields = ", ".join(getattr(output, "_fields", ()) or getattr(output, "keys", tuple)())
    raise TypeError(
        f"{type(module).__name__} returns {type(output).__name__}({fields}), neither states nor a tuple that begins "
        'with them: it cannot be told which is the state of a token. Use stream "attention" or "mlp"'
    )


def hook_place(
    undo: Undo, place: Place, move: Callable[[Tensor], Tensor], made: Callable[[Callable[..., Any]], Hook]
) -> None:
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
        if isinstance(output, Tensor):
            return change(output)
        return type(output)([change(states_of(module, output)), *output[1:]])

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    hooks: Any  # an OrderedDict
    if place.side == "output":
        hooks = vars(place.module)["_forward_hooks"]
        undo.hook(place.module.register_forward_hook, made(after))
    else:
        hooks = vars(place.module)["_forward_pre_hooks"]
        undo.hook(place.module.register_forward_pre_hook, made(before), with_kwargs=True)
    # a list first: another thread may hook the module meanwhile
    for key in [key for key, hook in list(hooks.items()) if not isinstance(hook, Hook) or isinstance(hook, Observer)]:
        with suppress(KeyError):
            hooks.move_to_end(key)
