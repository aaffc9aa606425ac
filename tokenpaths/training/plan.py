"""What `steps(..., explain=True)` prints: what a run leaves out, what it keeps for that, and what it saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from tokenpaths.attachment.handle import Attachment
from tokenpaths.data.examples import IGNORED, Example, collate
from tokenpaths.data.mixing import Mix
from tokenpaths.engine.cone.cone import ActiveCone, Cone, active_cone
from tokenpaths.engine.cone.prefix import WORTHWHILE, common_prefix, starts
from tokenpaths.engine.cone.room import Need, Room, need_of, rooms, token_bytes
from tokenpaths.site import Host
from tokenpaths.site.host import text_config
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.training.objectives.base import Objective
from tokenpaths.training.objectives.imitate import Imitate
from tokenpaths.training.objectives.stay import Stay

_ALONE = 128
"""What it costs to compute a row by itself, in tokens of a batch. A cone does so once for each row that it keeps."""


@dataclass(frozen=True)
class GoalPlan:
    """The plan for one goal. Tokens are means over its examples; FLOPs and bytes are expected, not measured.

    Args:
        name: the class of the goal.
        tokens: the length of an example.
        run: its tokens that are run in a forward with the trails on.
        shared: the tokens that all prompts begin with.
        kept_bytes: what is kept of all examples.
        flops: of a step from the second epoch on, when everything to be kept is there.
        flops_in_full: of a step without a cone.
        pays: whether examples come often enough to be kept.
        room: which part of it the budget holds.
        state_bytes: of a token's hidden state.
        pair_bytes: of a token's keys and values in all blocks that are run.
    """

    name: str
    tokens: float
    run: float
    shared: int
    kept_bytes: float
    flops: float
    flops_in_full: float
    pays: bool = True
    room: Room = Room()
    state_bytes: int = 0
    pair_bytes: int = 0

    def _kept(self, budget: int) -> str:
        """What is kept of the goal, in words."""
        a_token = [f"{_bytes(self.pair_bytes)} of keys and values a token"] if self.run < self.tokens else []
        a_token += [f"{_bytes(self.state_bytes)} a hidden state"]
        words = (
            f"kept: {_bytes(self.kept_bytes)} for all examples ({', '.join(a_token)}), of a budget of {_bytes(budget)}"
        )
        if self.room.share < 1 and self.run == self.tokens:
            words += f"; that holds the states of {self.room.share:.2f} of them, the others are run in each step"
        return words


@dataclass(frozen=True)
class Plan:
    """What a run leaves out. `str(plan)` says it in words.

    Args:
        model: the class of the model.
        blocks: the number of its blocks.
        below: the blocks below the first moved state.
        goals: the plan for each goal.
        budget: bytes that the cone may keep; None for a run without a cone.
        in_full: why rows are run whole, if they are.
        boundless: the class of an adapter without a cone.
    """

    model: str
    blocks: int
    below: int
    goals: tuple[GoalPlan, ...]
    budget: int | None
    in_full: str | None
    boundless: str | None = None

    def __str__(self) -> str:
        if self.boundless is not None:
            return (
                f"{self.boundless} changes the weights of {self.model}, so it has no light cone: everything is run in "
                "every step"
            )
        lines = [f"The light cone of the trails in {self.model}, {self.blocks} blocks:"]
        if self.budget is None:
            return f"{lines[0]} off, everything is run in every step"
        lines.append(
            f"  layers  {self.below} blocks lie below the first moved state: they are run once for each example"
        )
        if self.in_full is not None:
            lines.append(f"  tokens  rows are run whole: {self.in_full}")
        for number, goal in enumerate(self.goals):
            lines.append(f"  goal {number}, {goal.name}: {goal.tokens:.0f} tokens an example")
            if not goal.pays:
                lines.append(
                    "    each comes too seldom for keeping to pay: they are run in full "
                    "(give a Cone that several runs share, and they are kept)"
                )
                continue
            if goal.run < goal.tokens:
                front = f", the first {goal.shared} of them once for all" if goal.shared else ""
                lines.append(
                    f"    {goal.tokens - goal.run:.0f} of them are unmoved: kept as keys and values{front}; "
                    f"{goal.run:.0f} are run"
                )
            lines.append(f"    {goal._kept(self.budget)}")  # pyright: ignore[reportPrivateUsage]
            share = goal.flops / goal.flops_in_full
            lines.append(
                f"    a step: {goal.flops / 1e9:.3g} GFLOP from the second epoch on, instead of "
                f"{goal.flops_in_full / 1e9:.3g} ({share:.2f}x)"
            )
        return "\n".join(lines)


def pays(goal: Objective, draws: float) -> bool:
    """Whether it pays to keep rows: each of the `draws` of a row but the first saves the row's tokens."""
    examples = _some(goal)
    return (draws - 1) * sum(map(len, examples)) / len(examples) >= _ALONE


def _some(goal: Objective) -> list[Example]:
    """At least 256 examples of a goal, evenly spaced; all of them if there are fewer."""
    return list(goal.examples[:: max(1, len(goal.examples) // 256)])


def rooms_of(worker: ActiveCone, goals: Sequence[Objective], pays: Sequence[bool]) -> list[Room]:
    """What the cone has room for, of the examples of each goal."""
    below = worker.below()
    behind = worker.attached() if worker.whole_rows() is None else None
    needs: list[Need] = []
    for goal, kept in zip(goals, pays, strict=True):
        some = _some(goal)
        mean = sum(map(len, some)) / len(some)
        count = len(goal.examples) / (goal.examples.epochs if isinstance(goal.examples, Mix) else 1)
        before = _before(goal, some, behind)
        seen = bool(below) + isinstance(goal, Stay)
        need = need_of(worker.host, count, mean, below, seen, before, len(common_prefix(goal.examples)))
        needs.append(need if kept else Need(0.0))
    return rooms(needs, worker.cone.budget)


def _before(goal: Objective, some: Sequence[Example], behind: Sequence[Attachment] | None) -> float:
    """The tokens of an example that are not run, on average; 0 where rows are run whole."""
    if behind is None or not isinstance(goal, Imitate):
        return 0.0
    cuts: list[int] = []
    for start in range(0, len(some), 32):
        batch = collate(some[start : start + 32])
        needed = F.pad(batch.labels[:, 1:] != IGNORED, (0, 1))
        cuts += starts(behind, batch, needed)
    mean = sum(map(len, some)) / len(some)
    before = sum(cuts) / len(cuts)
    return before if mean - before <= WORTHWHILE * mean else 0.0


def plan(
    model: nn.Module,
    trails: Adapter,
    goals: Sequence[Objective],
    in_a_step: Sequence[int],
    cone: Cone | None,
    pays: Sequence[bool],
) -> Plan:
    """The plan of a run whose trails are attached.

    Args:
        model: the model, inside the cone if there is one.
        trails: what is trained.
        goals: the objectives.
        in_a_step: how many examples of each goal a step has.
        cone: the cone of the run; None for none.
        pays: whether the cone keeps the examples of each goal.
    """
    host, worker = Host.of(model, trails.blocks), active_cone(model)
    below = host.blocks_below(trails.sites)
    on = worker is not None and cone is not None
    in_full = worker.whole_rows() if worker is not None else None
    found = rooms_of(worker, goals, pays) if worker is not None and on else [Room()] * len(goals)
    planned = [
        _goal(
            host,
            trails,
            goal,
            count,
            below if on and kept else 0,
            below,
            worker.attached() if worker is not None and on and kept and in_full is None else None,
            kept,
            room,
        )
        for goal, count, kept, room in zip(goals, in_a_step, pays, found, strict=True)
    ]
    budget = cone.budget if on and cone is not None else None
    boundless = None if trails.sites else type(trails).__name__
    return Plan(type(host.inner).__name__, len(host.blocks), below, tuple(planned), budget, in_full, boundless)


def _goal(
    host: Host,
    trails: Adapter,
    goal: Objective,
    count: int,
    left_out: int,
    below: int,
    behind: Sequence[Attachment] | None,
    pays: bool,
    room: Room,
) -> GoalPlan:
    """The plan of one goal. `behind`: the attachments whose unmoved prefix is kept, None where rows are run whole."""
    examples = _some(goal)
    mean = sum(map(len, examples)) / len(examples)
    answers = sum(sum(example.answer) for example in examples) / len(examples)
    shared = len(common_prefix(goal.examples))
    before = _before(goal, examples, behind)
    cost = _Cost.of(host, trails)
    if not room.prefixes:  # as the cone does
        behind_front = mean - shared <= WORTHWHILE * mean and shared * cost.blocks > mean * left_out
        before = min(before, shared) if behind_front else 0.0
    run, shared, share = mean - before, shared if before else 0, 1.0 if before else room.share
    rows = answers if isinstance(goal, Imitate) else mean
    learned = range(below, cost.blocks)
    full = cost.forward(range(cost.blocks), mean, mean) + cost.backward(learned, mean, mean) + cost.head(rows, True)
    ours = cost.forward(range(left_out, cost.blocks), run, mean) + cost.backward(learned, run, mean)
    ours += cost.head(rows, True) + (1 - share) * cost.forward(range(left_out), mean, mean)
    if isinstance(goal, Stay):  # the frozen forward: its last states are kept as well
        frozen = cost.forward(range(cost.blocks), mean, mean)
        full += frozen + cost.head(rows, False)
        ours += (1 - share if left_out else 1) * frozen + cost.head(rows, False)
    states = (run if before else mean) * cost.state_bytes * (bool(left_out) + isinstance(goal, Stay))
    pairs = max(before - shared, 0) * cost.pair_bytes * (cost.blocks - left_out)
    kept = (states + pairs) * len(goal.examples) + shared * cost.pair_bytes * cost.blocks
    sizes = dict(state_bytes=cost.state_bytes, pair_bytes=cost.pair_bytes * (cost.blocks - left_out))
    return GoalPlan(type(goal).__name__, mean, run, shared, kept, ours * count, full * count, pays, room, **sizes)


@dataclass(frozen=True)
class _Cost:
    """FLOPs of one row of tokens: two for each weight and token, and four x width for each token and its key."""

    blocks: int
    weights: float  # of one block
    width: int  # of all heads' values
    embedding: int
    state_bytes: int  # of a hidden state
    pair_bytes: int  # of a token's key and value in one block

    @classmethod
    def of(cls, host: Host, trails: Adapter) -> _Cost:
        layers = host.blocks
        config = text_config(host.inner)
        heads = int(config.num_attention_heads)
        size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        own = {id(p) for p in trails.parameters()}
        weights = sum(p.numel() for p in layers.parameters() if p.ndim > 1 and id(p) not in own) / len(layers)
        state, pair = token_bytes(host)
        return cls(
            blocks=len(layers),
            weights=weights,
            width=heads * size,
            embedding=int(config.vocab_size) * int(config.hidden_size),
            state_bytes=state,
            pair_bytes=pair or 0,
        )

    def forward(self, blocks: range, tokens: float, keys: float) -> float:
        return len(blocks) * (2 * self.weights * tokens + 4 * self.width * tokens * keys)

    def backward(self, blocks: range, tokens: float, keys: float) -> float:
        """Through frozen weights: gradients of the states and none of the weights. Attention costs 2.5 forwards."""
        return len(blocks) * (2 * self.weights * tokens + 10 * self.width * tokens * keys)

    def head(self, rows: float, learned: bool) -> float:
        return 2 * self.embedding * rows * (2 if learned else 1)


def _bytes(count: int | float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
