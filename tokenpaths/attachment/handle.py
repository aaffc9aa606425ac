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
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenpaths.attachment.forgotten import no_longer, watch_for
from tokenpaths.attachment.hooks import Hook
from tokenpaths.attachment.mode import follow
from tokenpaths.attachment.moment import Moment
from tokenpaths.attachment.moving import (
    Part,
    Plan,
    chooses,
    flat_masks,
    hook_place,
    learns,
    move_densely,
    move_states,
    rules_of,
)
from tokenpaths.attachment.watcher import Watcher
from tokenpaths.site import Host, Place, Site
from tokenpaths.tokens import Both, Context, Either, First, Last, Match, Prompt, Rule, Without, leaves, token_pieces
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.trailmap.trailmap import TrailMap
from tokenpaths.trails.base import Trail
from tokenpaths.trails.stiefel import OrthonormalRows, prepare, release

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
    """Put trails to work in a model, in place, until the returned handle is removed or its `with` block ends.

    At the tokens that a site's rule chooses, a state h becomes h + strength * trail(h). A model may carry several
    attachments. A later one reads the states as the earlier ones have moved them, and so do all foreign hooks. Gradient
    checkpointing needs the trails until `backward()` is done.

    Args:
        model: a Hugging Face model. If torch.compile has compiled it, give what torch.compile returned.
        trails: what is laid where.
        strength: multiplies every displacement. It may be changed at run time: `handle.strength = 0.5`.
        rows: the rows of the batch that are moved; all unless given. Several maps with different rows give each row its
            own trails.
        spans: for `Span` rules, the (start, stop) of each row, counted in real tokens.
        tokenizer: for `Match` rules, which read the decoded text.

    Raises:
        TypeError: `trails` is no `TrailMap`.
        ValueError: a site that the model does not have or that is named twice, a trail of another width, or parameters
            that are not finite. Nothing is changed then.
    """
    if not isinstance(trails, TrailMap):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"attach takes a TrailMap, not {type(trails).__name__}: {_instead(trails)}")
    return Attachment(Host.of(model, trails.blocks), trails, strength, rows, spans, tokenizer)


def working(model: nn.Module, trails: Adapter, tokenizer: Any = None) -> AbstractContextManager[object]:
    """Inside, trails are attached, unless they are already. An adapter of another kind must lie in the model by itself.

    Raises `ValueError` as `attach` and `Adapter.check` do.
    """
    if isinstance(trails, Adapter) and not isinstance(trails, TrailMap):  # pyright: ignore[reportUnnecessaryIsInstance]
        trails.check(model)
        return nullcontext()
    return nullcontext() if is_attached(model, trails) else attach(model, trails, tokenizer=tokenizer)


def is_attached(model: nn.Module, trails: Adapter) -> bool:
    """Whether this very map is attached to the model."""
    return any(attachment.trails is trails for attachment in attachments(model))


def attachments(model: nn.Module) -> list[Attachment]:
    """The attachments of a model."""
    listeners = [listener for watcher in Watcher.known(model) for listener in watcher.listeners]
    return [listener for listener in listeners if isinstance(listener, Attachment)]


class Attachment:
    """A handle on attached trails, and a context manager that removes them at its end."""

    def __init__(
        self,
        host: Host,
        trails: TrailMap,
        strength: float,
        rows: Sequence[int] | None,
        spans: Spans | None,
        tokenizer: Any,
    ) -> None:
        self.host = host
        self.trails = trails
        self.strength = strength
        self.rows = None if rows is None else tuple(rows)
        self.spans = spans or {}
        self._pieces = None if tokenizer is None else token_pieces(tokenizer)
        self._rules = list(dict.fromkeys(site.tokens for site in trails.sites))
        self._prompt_only = all(_within_prompt(rule) for rule in self._rules)
        self._hooks: list[Hook] = []
        self.plan: Plan | None = None  # what is done in this forward; None while the trails are off
        self._rotations = [module for module in trails.modules() if isinstance(module, OrthonormalRows)]
        self._handles: list[RemovableHandle] = []
        places = self._locate()  # refuses before anything is changed
        self._unions = list(dict.fromkeys(rules_of(parts) for _, parts in places))
        self._watcher = Watcher.of(host)
        self._watcher.join(self, compiled=host.compiled)
        for place, parts in places:
            handle, hook = hook_place(place, self._mover(parts))
            self._handles.append(handle)
            self._hooks.append(hook)
        follow(trails, host.blocks)
        watch_for(self)

    def remove(self) -> None:
        """Take the trails away and leave the model as it was. Removing twice does no harm."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._watcher.leave(self)
        no_longer(self)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "attached" if self._handles else "removed"
        return f"<{state}: {len(self.trails)} sites, strength {self.strength}>"

    def _go(self, plan: Plan | None) -> None:
        """Take up a plan. Where it chooses no token and no gradients are recorded, the hooks do nothing."""
        self.plan = plan
        awake = plan is not None and (plan.learns or chooses(plan))
        for hook in self._hooks:
            hook.awake = awake

    def begin(self, moment: Moment | None) -> None:
        """A forward begins: choose its tokens."""
        follow(self.trails, self.host.blocks)
        if not self.trails.enabled:
            self._go(None)
            return
        plan = Plan(None, None, self.strength) if moment is None else self._plan(moment)
        self._go(plan)
        if chooses(plan):  # else R may not be needed
            prepare(self._rotations)

    def end(self) -> None:
        """The forward is over, or has failed. The plan stays, for blocks that a backward computes again."""
        release(self._rotations)

    def resume(self, plan: Plan | None) -> None:
        """A backward begins through the forward that had this plan."""
        inside = any(site.stream in ("attention", "mlp") for site in self.trails)  # these a block computes again
        if not self._handles and inside and self._watcher.checkpointing():
            raise RuntimeError("the trails were removed before backward(), which gradient checkpointing needs them for")
        follow(self.trails, self.host.blocks)
        self._go(plan)

    def _plan(self, moment: Moment) -> Plan:
        """The masks of a forward and the chosen tokens of all places, found with one wait for the device."""
        if self._prompt_only and moment.written:
            none = moment.context.real.new_zeros((len(moment.context.real), moment.length))
            nowhere = dict.fromkeys(self._unions, none.new_empty(0, dtype=torch.long))
            return Plan([none] * len(self._rules), nowhere, self.strength)
        masks = self.masks(moment)
        if torch.compiler.is_compiling():  # numbers that depend on values cannot be traced
            return Plan(masks, None, self.strength)
        unions = [functools.reduce(torch.logical_or, (masks[rule] for rule in rules)) for rules in self._unions]
        chosen: dict[tuple[int, ...], Tensor | None] = {}
        for rules, union in zip(self._unions, torch.stack(unions).flatten(1).cpu(), strict=True):
            numbers = union.nonzero().squeeze(1)
            chosen[rules] = None if len(numbers) == len(union) else numbers.to(masks[0].device)
        return Plan(masks, chosen, self.strength)

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

    def _locate(self) -> list[tuple[Place, list[Part]]]:
        """The places of all sites, with what moves there. Sites at one place read the same state."""
        grouped: dict[tuple[nn.Module, str, int | None], tuple[Place, list[Part]]] = {}
        seen: dict[Site, Site] = {}
        for site, trail in self.trails.items():
            found, place = self.host.locate(site)
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
            grouped.setdefault(key, (place, []))[1].append(Part(found, trail, self._rules.index(site.tokens)))
        return list(grouped.values())

    def _mover(self, parts: list[Part]) -> Callable[[Tensor], Tensor]:
        rules = rules_of(parts)

        def move(h: Tensor) -> Tensor:
            plan = self.plan
            if plan is None:
                return h
            nowhere = plan.chosen is not None and (rows := plan.chosen[rules]) is not None and not len(rows)
            if nowhere and not learns(parts):  # as while decoding under Last(1): nothing else is done to the state
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
                return move_densely(parts, [plan.masks[part.rule] for part in parts], h, plan.strength)
            rows = plan.chosen[rules]
            if rows is None:
                return move_states(parts, flat_masks(parts, plan.masks, None), h.flatten(0, -2), plan.strength).view(
                    h.shape
                )
            rows, states = rows.to(h.device), h.flatten(0, -2)
            moved = move_states(parts, flat_masks(parts, plan.masks, rows), states.index_select(0, rows), plan.strength)
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
    """What to do with something that is no map of trails."""
    if isinstance(given, Adapter):
        return "it is at work already"
    if hasattr(given, "peft_config"):
        return "a PEFT model is made an adapter by tp.lab.peers.PeftAdapter(peft_model), which needs no attach"
    return "wrap a dict as TrailMap({...})"


def _within_prompt(rule: Rule) -> bool:
    """Whether a rule can choose tokens of the prompt only, whatever the tokens are."""
    if isinstance(rule, Either):
        return _within_prompt(rule.left) and _within_prompt(rule.right)
    if isinstance(rule, Both):
        return _within_prompt(rule.left) or _within_prompt(rule.right)
    if isinstance(rule, Without):
        return _within_prompt(rule.left)
    return isinstance(rule, (First, Last, Prompt))
