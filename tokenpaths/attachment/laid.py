"""Trails at work in a model: what `attach` gives, and what it does in each forward."""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenpaths.attachment.backward import NO_BACKWARD, at_the_end, in_backward, running_backward
from tokenpaths.attachment.forgotten import no_longer, watch_for
from tokenpaths.attachment.hooks import Hook
from tokenpaths.attachment.mode import follow, keep_mode
from tokenpaths.attachment.moment import Moment
from tokenpaths.attachment.moving import Part, Plan, chooses, hook_place, move_chosen, rules_of
from tokenpaths.attachment.planning import Planner, Spans
from tokenpaths.attachment.replaced import check_in_place, edges_to
from tokenpaths.attachment.watcher import Watcher
from tokenpaths.checking import as_number
from tokenpaths.scope import Scoped, in_main_thread, running_task
from tokenpaths.site import Host, Place, Site
from tokenpaths.tokens import Context, Match, leaves
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.trailmap.gate import Gate
from tokenpaths.trails.base import Trail
from tokenpaths.trails.stiefel import OrthonormalRows, changed, groups, prepare, release
from tokenpaths.undo import Undo


def attachments(model: nn.Module) -> list[Attachment]:
    """The attachments of a model."""
    listeners = [listener for watcher in Watcher.known(model) for listener in watcher.listeners]
    return [listener for listener in listeners if isinstance(listener, Attachment)]


class _Now(threading.local):
    """What an attachment does in the forward that one thread runs."""

    plan: Plan | None = None  # None outside of a forward, and while the trails are off
    awake: bool = False
    backward: int = NO_BACKWARD  # the backward that this forward is part of


class _PlaceHook(Hook):
    """The hook at one place. Where there is nothing to do in the running thread it does nothing, in the least time."""

    def __init__(self, call: Callable[..., Any], now: _Now) -> None:
        super().__init__(call)
        self.now = now

    def __call__(self, *args: Any) -> Any:
        return self.call(*args) if self.now.awake or in_backward() else None


_NUMBERS = itertools.count(1)
_HERE: Scoped[Attachment] = Scoped("tokenpaths: trails attached in one thread or task")


class Attachment:
    """A handle on attached trails, and a context manager that removes them at its end."""

    def __init__(
        self,
        host: Host,
        trails: Adapter,
        gate: Gate | None = None,
        alone: bool = False,
        strength: float = 1.0,
        rows: Sequence[int] | None = None,
        spans: Spans | None = None,
        tokenizer: Any = None,
        everywhere: bool | None = None,
    ) -> None:
        if alone and gate is None:
            raise ValueError(
                "attach: alone=True picks among adapters by their gates, and this one has none: give when="
            )
        self.host = host
        self.trails = trails
        self.gate = gate
        self._alone = alone
        self.strength = strength
        self.number = next(_NUMBERS)
        self.everywhere = in_main_thread() if everywhere is None else everywhere
        self.unclear = everywhere is None and not self.everywhere
        self.task = running_task()
        self._planner = Planner([site.tokens for site, _ in trails.items()], rows, spans, tokenizer)
        self.rows = self._planner.rows
        self._now = _Now()
        self._again: dict[int, Plan | None] = {}  # by number: the plans of forwards whose backward is going on
        self._rotations = [module for module in trails.modules() if isinstance(module, OrthonormalRows)]
        self._undo = Undo()
        self._places = self._locate()  # refuses before anything is changed
        self._planner.places = list(dict.fromkeys(rules_of(parts) for _, parts in self._places))
        self._watcher = Watcher.of(host)
        _check_company(self, Watcher.beside(host))
        self._edges = edges_to(host, [place.module for place, _ in self._places])

    def lay(self) -> None:
        """Hook the model. What has come of it when it is interrupted is taken back by `remove`."""
        self._undo.add(self._leave)
        if not self.everywhere:
            _HERE.add(self)
        self._watcher = self._watcher.join(self)
        for place, parts in self._places:
            hook_place(self._undo, place, self._mover(parts), functools.partial(_PlaceHook, now=self._now))
        keep_mode(self._undo, self.trails)
        follow(self.trails, self.host.blocks)
        watch_for(self)

    def remove(self) -> None:
        """Take the trails away and leave the model as it was. Removing twice does no harm."""
        try:
            self._undo.run()
        except BaseException:
            self._undo.run()  # what is left, if it was interrupted
            raise

    def _leave(self) -> None:
        _HERE.discard(self)
        self._watcher.leave(self)
        no_longer(self)

    @property
    def strength(self) -> float:
        """What every displacement is multiplied by."""
        return self._strength

    @strength.setter
    def strength(self, strength: float) -> None:
        if not math.isfinite(as_number("attach: strength", strength)):
            raise ValueError(f"attach: strength {strength} is not finite")
        self._strength = strength

    @property
    def alone(self) -> bool:
        """Whether it gives way where the gate of another such attachment has a higher score."""
        return self._alone and self.trails.enabled

    @property
    def is_on(self) -> bool:
        """Whether it has not been removed."""
        return any(listener is self for listener in self._watcher.listeners)

    @property
    def plan(self) -> Plan | None:
        """What is done in the forward that the running thread is inside of."""
        return self._now.plan

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.remove()
        except BaseException:
            self.remove()  # it may not have begun
            raise

    def __repr__(self) -> str:
        state = "attached" if self.is_on else "removed"
        where = "" if self.everywhere else ", in one thread"
        gate = "" if self.gate is None else ", behind a gate"
        return f"<{state}: {len(self.trails.items())} sites, strength {self.strength}{gate}{where}>"

    def acts(self) -> bool:
        """Whether it moves states in the running thread or task."""
        return self.everywhere or any(each is self for each in _HERE.entries())

    def _go(self, plan: Plan | None) -> None:
        """Take up a plan. Where it chooses no token and no gradients are recorded, the hooks do nothing."""
        now = self._now
        now.plan = plan
        now.awake = plan is not None and (plan.learns or chooses(plan))

    def begin(self, moment: Moment | None, resting: bool = False) -> None:
        """A forward begins: choose its tokens; none while it is resting."""
        if not torch.compiler.is_compiling():
            self._now.backward = running_backward()
            check_in_place(self._edges)
        follow(self.trails, self.host.blocks)
        if resting or not self.trails.enabled:
            self._go(None)
            return
        plan = Plan(None, None, self.strength) if moment is None else self._plan(moment)
        self._go(plan)
        if plan is not None and chooses(plan):  # else R may not be needed
            prepare(self._rotations, plan.answers)

    def end(self, before: Plan | None) -> None:
        """The forward is over, or has failed; `before` is the plan of one that it was inside of."""
        release(self._rotations)
        self._go(before)

    def resume(self, plan: Plan | None, backward: int) -> None:
        """A backward begins through the forward that had this plan: blocks that it computes again follow it."""
        streams = {site.stream for site, _ in self.trails.items()}
        inside = bool(streams & {"attention", "mlp"})  # these a block computes again
        if not self.is_on and inside and self._watcher.checkpointing():
            raise RuntimeError("the trails were removed before backward(), which gradient checkpointing needs them for")
        follow(self.trails, self.host.blocks)
        self._again[backward] = plan
        at_the_end(functools.partial(self._again.pop, backward, None))

    def _plan_here(self) -> Plan | None:
        """The plan of the running forward, or of the one whose blocks the running backward computes again."""
        if torch.compiler.is_compiling() or (backward := running_backward()) == self._now.backward:
            return self._now.plan
        if backward not in self._again:
            raise RuntimeError(
                "a block is computed again in a backward (gradient checkpointing) whose forward is not known: call "
                "backward() on what came of the model's own output"
            )
        return self._again[backward]

    def _plan(self, moment: Moment) -> Plan | None:
        cached = moment.movers is not None and self.number not in moment.movers
        asked = [] if torch.compiler.is_compiling() else [changed(group) for group in groups(self._rotations)]
        opens = self._opens(moment)
        return self._planner.plan(moment, self.strength, moves_none_cached=cached, asked=asked, opens=opens)

    def _opens(self, moment: Moment) -> Tensor | None:
        """The rows that the gate has opened; None without a gate. Raises where nobody can tell."""
        if self.gate is None:
            return None
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "a gate decides by what it reads, which torch.compile cannot trace: use the model without it, or ask "
                "gate.decide(model, prompts) first and attach with rows="
            )
        if self.number not in moment.decisions:
            raise ValueError(
                f"the first {moment.past} tokens come from a cache that was filled without this gate, which has not "
                "read their prompt: fill the cache with the trails attached behind it, or run the whole text"
            )
        return moment.decisions[self.number].opens

    def masks(self, moment: Moment) -> list[Tensor]:
        """The chosen tokens of a forward, one mask a rule."""
        return self._planner.masks(moment)

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
            if self._planner.pieces is None and any(isinstance(rule, Match) for rule in leaves(site.tokens)):
                raise ValueError(f"{found} reads the decoded text: give attach(..., tokenizer=your_tokenizer)")
            key = (place.module, place.side, found.head)
            grouped.setdefault(key, (place, []))[1].append(Part(found, trail, self._planner.rules.index(site.tokens)))
        return list(grouped.values())

    def _mover(self, parts: list[Part]) -> Callable[[Tensor], Tensor]:
        rules = rules_of(parts)

        def move(h: Tensor) -> Tensor:
            plan = self._plan_here()
            if plan is not None and plan.masks is None:
                # no tokens, but the patches of an image: all are real and given
                real = torch.ones(h.shape[:2], dtype=torch.bool)
                plan = self._plan(Moment(Context(real=real, prompt=real), 0, h.shape[1]))
            return h if plan is None else move_chosen(parts, rules, plan, h)

        return move


def _check_company(new: Attachment, watchers: Sequence[Watcher]) -> None:
    """Raise `RuntimeError` where a state would be moved twice by one map, or by maps of two tasks."""
    for other in (listener for watcher in watchers for listener in watcher.listeners):
        if not isinstance(other, Attachment) or not (other.acts() or new.everywhere):
            continue
        overlap = new.rows is None or other.rows is None or not set(new.rows).isdisjoint(other.rows)
        if overlap and not set(other.trails.members).isdisjoint(new.trails.members):
            raise RuntimeError(
                "this map is attached to the model already, and would move its states twice: go on with the handle "
                "that is there (tp.attached(model)), or take it away first (tp.detach(model))"
            )
        busy = other.task is not None and not other.task.done()
        if busy and new.task is not None and other.task is not new.task and other.everywhere:
            raise RuntimeError(
                "another task of the event loop has trails attached to this model, and its forwards would be moved by "
                "both: attach(..., everywhere=False) in both keeps each to its own task"
            )
