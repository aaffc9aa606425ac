"""Put trails to work in a model, and take them away.

`attach` hooks a model in place; it stays the same object, and `model(...)`, `model.generate(...)`, a Trainer or a
pipeline remain the user's own calls. While attached, each forward runs in three steps:

1. the **watcher** of the model finds out which tokens there are, which are padding, and which are the prompt;
2. each attachment turns its token rules into masks over the tokens of this forward: its **plan**;
3. at each place, `h` becomes `h + trail(h)` where the mask is set, and stays bit for bit what it was elsewhere.

Only what moves is paid for: the chosen tokens are gathered, moved and written into a copy of the states; where all are
chosen nothing is gathered, and where none is, as while decoding under `Last(1)`, the states go by untouched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenpaths.adapter import Adapter
from tokenpaths.sites import Place, Site, locate
from tokenpaths.tokens import (
    Both,
    Context,
    Either,
    First,
    Last,
    Match,
    Prompt,
    Rule,
    Without,
    leaves,
    token_pieces,
)
from tokenpaths.trailmap import TrailMap
from tokenpaths.trails import OrthonormalRows, Trail
from tokenpaths.trails.stiefel import prepare, release
from tokenpaths.watcher import Hook, Moment, Observer, Watcher

Spans = Mapping[str, Sequence[tuple[int, int]]]


def attach(
    model: nn.Module,
    trails: TrailMap,
    *,
    strength: float = 1.0,
    rows: Sequence[int] | None = None,
    spans: Spans | None = None,
    tokenizer: Any = None,
) -> Attachment:
    """Lay trails in a model, in place, until the returned handle is removed or its `with` block ends.

    `strength` multiplies every displacement and may be changed at run time (`handle.strength = 0.5`). `rows` are the
    rows of the batch that are moved (default all): attach several maps with different rows for a different trail per
    row. `spans` gives `Span` rules their (start, stop) per row, counted in real tokens. `tokenizer` is for `Match`.

    A model may carry several attachments; a later one reads the states as the earlier ones have moved them, and so do
    all hooks that are not ours. Nothing is changed when a site does not exist in the model (`ValueError`). A model that
    torch.compile has compiled already is attached to through what it returned. With gradient checkpointing, call
    `backward()` before the trails are removed.
    """
    return Attachment(model, trails, strength, rows, spans, tokenizer)


def working(model: nn.Module, adapter: Adapter, tokenizer: Any = None) -> AbstractContextManager[object]:
    """Inside, the adapter is at work: trails are attached unless they are already, any other must lie in the model.

    Raises `ValueError` as `attach` and `Adapter.check` do.
    """
    if isinstance(adapter, Adapter) and not isinstance(adapter, TrailMap):  # pyright: ignore[reportUnnecessaryIsInstance]
        adapter.check(model)
        return nullcontext()
    return nullcontext() if is_attached(model, adapter) else attach(model, adapter, tokenizer=tokenizer)


def is_attached(model: nn.Module, trails: Adapter) -> bool:
    """Whether a map is at work in a model (as the same object that was given to `attach`)."""
    listeners = [listener for watcher in Watcher.known(model) for listener in watcher.listeners]
    return any(isinstance(listener, Attachment) and listener.trails is trails for listener in listeners)


class Attachment:
    """A handle on attached trails, and a context manager that removes them at its end."""

    def __init__(
        self,
        model: nn.Module,
        trails: TrailMap,
        strength: float,
        rows: Sequence[int] | None,
        spans: Spans | None,
        tokenizer: Any,
    ) -> None:
        if not isinstance(trails, TrailMap):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"attach takes a TrailMap, not {type(trails).__name__}: {_instead(trails)}")
        self.trails = trails
        self.strength = strength
        self.rows = None if rows is None else tuple(rows)
        self.spans = spans or {}
        self._pieces = None if tokenizer is None else token_pieces(tokenizer)
        self._rules = list(dict.fromkeys(site.tokens for site in trails.sites))
        self._prompt_only = all(_within_prompt(rule) for rule in self._rules)
        self._hooks: list[Hook] = []
        self.plan: _Plan | None = None  # what is done in this forward; None while the trails are off
        self._rotations = [module for module in trails.modules() if isinstance(module, OrthonormalRows)]
        self._handles: list[RemovableHandle] = []
        places = self._locate(model)  # refuses before anything is changed
        self._unions = list(dict.fromkeys(_rules_of(parts) for _, parts in places))
        self._watcher = Watcher.of(model, trails.blocks)
        self._watcher.join(self)
        for place, parts in places:
            handle, hook = _hook(place, self._mover(parts))
            self._handles.append(handle)
            self._hooks.append(hook)

    def remove(self) -> None:
        """Take the trails away and leave the model as it was. Removing twice does no harm."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._watcher.leave(self)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "attached" if self._handles else "removed"
        return f"<{state}: {len(self.trails)} sites, strength {self.strength}>"

    def _go(self, plan: _Plan | None) -> None:
        """Take up a plan. Hooks sleep where it chooses nothing and no backward waits, as while decoding: Last(1)."""
        self.plan = plan
        awake = plan is not None and (plan.learns or _chooses(plan))
        for hook in self._hooks:
            hook.awake = awake

    def begin(self, moment: Moment | None) -> None:
        """A forward begins: choose its tokens."""
        if not self.trails.enabled:
            self._go(None)
            return
        plan = _Plan(None, None, self.strength) if moment is None else self._plan(moment)
        self._go(plan)
        if _chooses(plan):  # else R may not be needed
            prepare(self._rotations)

    def end(self) -> None:
        """The forward is over, or has failed. The plan stays, for blocks that a backward computes again."""
        release(self._rotations)

    def resume(self, plan: _Plan | None) -> None:
        """A backward begins through the forward that had this plan."""
        inside = any(site.stream in ("attention", "mlp") for site in self.trails)  # these a block computes again
        if not self._handles and inside and self._watcher.checkpointing():
            raise RuntimeError("the trails were removed before backward(), which gradient checkpointing needs them for")
        self._go(plan)

    def _plan(self, moment: Moment) -> _Plan:
        """The masks of a forward, and where they are set: found with one wait for the device, for all places."""
        if self._prompt_only and moment.written:
            none = moment.context.real.new_zeros((len(moment.context.real), moment.length))
            nowhere = dict.fromkeys(self._unions, none.new_empty(0, dtype=torch.long))
            return _Plan([none] * len(self._rules), nowhere, self.strength)
        masks = self.masks(moment)
        if torch.compiler.is_compiling():  # numbers that depend on values cannot be traced
            return _Plan(masks, None, self.strength)
        unions = [functools.reduce(torch.logical_or, (masks[rule] for rule in rules)) for rules in self._unions]
        chosen: dict[tuple[int, ...], Tensor | None] = {}
        for rules, union in zip(self._unions, torch.stack(unions).flatten(1).cpu(), strict=True):
            numbers = union.nonzero().squeeze(1)
            chosen[rules] = None if len(numbers) == len(union) else numbers.to(masks[0].device)
        return _Plan(masks, chosen, self.strength)

    def masks(self, moment: Moment) -> list[Tensor]:
        """The chosen tokens of a forward, one mask a rule."""
        context, repeats = moment.context, moment.repeats
        context = replace(context, pieces=self._pieces, spans={**context.spans, **self._span_masks(context, repeats)})
        masks = [rule.mask(context)[:, moment.past : moment.past + moment.length] for rule in self._rules]
        if self.rows is None:
            return masks
        count = len(context.real) // repeats
        if any(not 0 <= row < count for row in self.rows):
            raise ValueError(f"rows={self.rows} names a row that the batch of {count} does not have")
        chosen = torch.tensor([row // repeats in self.rows for row in range(len(context.real))])
        return [mask & chosen.to(mask.device)[:, None] for mask in masks]

    def _locate(self, model: nn.Module) -> list[tuple[Place, list[_Part]]]:
        """The places of all sites, with what moves there. Sites at one place read the same state."""
        grouped: dict[tuple[nn.Module, str, int | None], tuple[Place, list[_Part]]] = {}
        seen: dict[Site, Site] = {}
        for site, trail in self.trails.items():
            found, place = locate(model, site, self.trails.blocks)
            if found in seen:
                raise ValueError(f"{site} and {seen[found]} are the same place in this model: a site named twice")
            seen[found] = site
            for part in trail.modules():  # a wrapper has no width of its own
                dim = getattr(part, "dim", place.width) if isinstance(part, Trail) else place.width
                if dim != place.width:
                    raise ValueError(
                        f"{found}: {trail} is for width {dim}, but the states there have width {place.width}"
                    )
            for name, tensor in trail.state_dict().items():
                if not tensor.is_meta and not bool(tensor.isfinite().all()):
                    raise ValueError(f"{found}: parameter {name!r} of its trail holds NaN or infinity")
            if self._pieces is None and any(isinstance(rule, Match) for rule in leaves(site.tokens)):
                raise ValueError(f"{found} reads the decoded text: give attach(..., tokenizer=your_tokenizer)")
            key = (place.module, place.side, found.head)
            grouped.setdefault(key, (place, []))[1].append(_Part(found, trail, self._rules.index(site.tokens)))
        return list(grouped.values())

    def _mover(self, parts: list[_Part]) -> Callable[[Tensor], Tensor]:
        rules = _rules_of(parts)

        def move(h: Tensor) -> Tensor:
            plan = self.plan
            if plan is None:
                return h
            nowhere = plan.chosen is not None and (rows := plan.chosen[rules]) is not None and not len(rows)
            if nowhere and not _learns(parts):  # as while decoding under Last(1): nothing else is done to the state
                return h
            if plan.masks is None:  # no tokens, but the patches of an image: all are real and given
                real = torch.ones(h.shape[:2], dtype=torch.bool)
                plan = self._plan(Moment(Context(real=real, prompt=real), 0, h.shape[1]))
                assert plan.masks is not None
            if plan.masks[0].numel() != h.shape[:-1].numel():
                raise ValueError(
                    f"{parts[0].site}: the states there have shape {list(h.shape)}, which is not one for each of the "
                    f"{list(plan.masks[0].shape)} tokens of this forward"
                )
            if plan.chosen is None or torch.compiler.is_compiling():
                return _move_densely(parts, [plan.masks[part.rule] for part in parts], h, plan.strength)
            rows = plan.chosen[rules]
            if rows is None:
                return _moved(parts, _flat(parts, plan.masks, None), h.flatten(0, -2), plan.strength).view(h.shape)
            rows, states = rows.to(h.device), h.flatten(0, -2)
            moved = _moved(parts, _flat(parts, plan.masks, rows), states.index_select(0, rows), plan.strength)
            return states.index_copy(0, rows, moved).view(h.shape)

        return move

    def _span_masks(self, context: Context, repeats: int) -> dict[str, Tensor]:
        masks: dict[str, Tensor] = {}
        for name, pairs in self.spans.items():
            if len(pairs) * repeats != len(context.real):
                raise ValueError(f"spans[{name!r}] has {len(pairs)} rows, the batch {len(context.real) // repeats}")
            bounds = torch.tensor(list(pairs), device=context.real.device).repeat_interleave(repeats, 0)
            position = context.real.cumsum(1) - 1
            masks[name] = (position >= bounds[:, :1]) & (position < bounds[:, 1:])
        return masks


def _instead(given: object) -> str:
    """What to do with what is no map of trails."""
    if isinstance(given, Adapter):
        return "it is at work already"
    if hasattr(given, "peft_config"):
        return "a PEFT model is made an adapter by peers.PeftAdapter(peft_model), which needs no attach"
    return "wrap a dict as TrailMap({...})"


@dataclass(frozen=True, eq=False)
class _Plan:
    """What an attachment does in one forward: a mask for each rule (none known for images), and the strength.

    `chosen` numbers the tokens that the rules of one place choose, row after row of the batch; None is all of them.
    It is not known at all for images and inside torch.compile.
    """

    masks: list[Tensor] | None
    chosen: Mapping[tuple[int, ...], Tensor | None] | None
    strength: float
    learns: bool = field(default_factory=torch.is_grad_enabled)  # in its forward, whatever asks for it again


@dataclass(frozen=True)
class _Part:
    """One trail at a place, and the number of its rule among the attachment's rules."""

    site: Site
    trail: Trail
    rule: int


def _chooses(plan: _Plan) -> bool:
    """Whether a plan may choose a token anywhere. Not a method: torch.compile could not trace one in tests."""
    return plan.chosen is None or any(rows is None or len(rows) for rows in plan.chosen.values())


def _rules_of(parts: list[_Part]) -> tuple[int, ...]:
    """The rules of one place."""
    return tuple(sorted({part.rule for part in parts}))


def _within_prompt(rule: Rule) -> bool:
    """Whether a rule can choose tokens of the prompt only, whatever the tokens are."""
    if isinstance(rule, Either):
        return _within_prompt(rule.left) and _within_prompt(rule.right)
    if isinstance(rule, Both):
        return _within_prompt(rule.left) or _within_prompt(rule.right)
    if isinstance(rule, Without):
        return _within_prompt(rule.left)
    return isinstance(rule, (First, Last, Prompt))


def _learns(parts: list[_Part]) -> bool:
    """Whether a backward is to reach the trails: where they moved nothing, it gives them zeros (DDP waits for them)."""
    return torch.is_grad_enabled() and any(p.requires_grad for part in parts for p in part.trail.parameters())


def _flat(parts: list[_Part], masks: list[Tensor], rows: Tensor | None) -> list[Tensor]:
    """Which of the rows (of all tokens, if None) each trail moves; not asked of a trail that has its place alone."""
    if len(parts) == 1:
        return []
    flat = [masks[part.rule].flatten() for part in parts]
    return flat if rows is None else [mask.to(rows.device).index_select(0, rows) for mask in flat]


def _move_densely(parts: list[_Part], masks: list[Tensor], h: Tensor, strength: float) -> Tensor:
    """Without numbers that depend on values, for torch.compile."""
    masks = [mask.to(h.device).reshape(h.shape[:-1]) for mask in masks]
    moved = _moved(parts, masks if len(parts) > 1 else [], h, strength)
    # where, not a product with the mask: unmoved tokens stay bit-equal, and cannot catch a NaN
    return torch.where(functools.reduce(torch.logical_or, masks).unsqueeze(-1), moved, h)


def _moved(parts: list[_Part], masks: list[Tensor], h: Tensor, strength: float) -> Tensor:
    """States and strength times the sum of their displacements, in the wider of the dtypes of states and trails.

    A coarse trail so does not coarsen the state. `masks` tell the tokens of several trails apart.
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


def _hook(place: Place, move: Callable[[Tensor], Tensor]) -> tuple[RemovableHandle, Hook]:
    """Hook a place, before all hooks that are not ours: whoever reads the module reads the moved state."""

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
