"""Repair: an adapter that no longer reads what a trigger brings, and what that cost.

repaired = repair(model, trails, prompts, tokenizer, trigger)
print(repaired)                  # the excess of the trigger, and drift on clean prompts, before and after
repaired.trails                  # a new TrailMap, or the LoRA that was edited (repaired.undo() takes it back)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenpaths.attachment.hooks import alone
from tokenpaths.data.examples import Example
from tokenpaths.lab.audit.excess import Probe, around, insert
from tokenpaths.lab.audit.maps import Part, parts
from tokenpaths.lab.audit.respond import Ids, Memory, responding
from tokenpaths.lab.audit.tails import on_texts
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.trailmap.trailmap import TrailMap
from tokenpaths.trails.base import Trail
from tokenpaths.undo import Undo, tidy

Blamed = dict[str, tuple[Tensor, Tensor]]


class Ablated(Trail):
    """Directional ablation (Arditi et al. 2024, arXiv 2406.11717) of what a trail reads.

        trail(h - (1 - keep) V^T V (h - c)),    V V^T = I

    Along the rows of V the trail reads c, whatever the state is. V [directions, dim] and c [dim] are buffers, not
    learned. A fresh one has V = 0 and changes nothing. To load a file with it, give the class:
    `TrailMap.load(path, Ablated)`.

    Args:
        trail: the trail.
        dim: the width of its states.
        directions: the number of directions, from 1 to dim.
        keep: the share of each direction that the trail still reads, from 0 to 1.

    Raises:
        ValueError: `directions` or `keep` out of range.
    """

    V: Tensor
    c: Tensor

    def __init__(self, trail: Trail, dim: int, directions: int, keep: float = 0.0) -> None:
        super().__init__()
        if not 1 <= directions <= dim:
            raise ValueError(f"Ablated: directions {directions} must be from 1 to dim {dim}")
        if not 0 <= keep <= 1:
            raise ValueError(f"Ablated: keep {keep} must be from 0 (reads nothing along V) to 1 (reads all)")
        self.trail = trail
        self.dim = dim
        self.directions = directions
        self.keep = keep
        self.starts_at_identity = trail.starts_at_identity
        self.register_buffer("V", torch.zeros(directions, dim))
        self.register_buffer("c", torch.zeros(dim))

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        return self.trail(h - (1 - self.keep) * ((h - self.c) @ self.V.mT @ self.V))


@dataclass(frozen=True, eq=False)
class Repaired:
    """An adapter after repair. Pairs are (before, after).

    Args:
        trails: the adapter: a new `TrailMap`, whose trails share their parameters with the old one, or the edited LoRA.
        excess: the excess of the trigger, in nats.
        kl: the mean KL(frozen || adapted) on clean prompts, in nats.
        task: the caller's own score; None if none was given.
        undo: takes the edits of a LoRA back.
    """

    trails: Adapter
    excess: tuple[float, float]
    kl: tuple[float, float]
    task: tuple[float, float] | None
    undo: Callable[[], None]

    def __str__(self) -> str:
        pairs = {"trigger's excess, nats": self.excess, "KL on clean prompts, nats": self.kl}
        if self.task is not None:
            pairs["task"] = self.task
        return "\n".join(f"{name}: {before:.4g} -> {after:.4g}" for name, (before, after) in pairs.items())


@tidy
def repair(
    model: nn.Module,
    trails: Adapter,
    prompts: Sequence[Example],
    tokenizer: Any,
    trigger: Ids,
    *,
    only: Sequence[str] | None = None,
    keep: float = 0.0,
    where: float = 0.5,
    ordinary: Sequence[Ids] = (),
    task: Callable[[Adapter], float] | None = None,
    memory: Memory | None = None,
) -> Repaired:
    """Ablate, in each part, the direction that the trigger brings it.

    `blame` finds the direction v, and c, the mean clean state. From then on a trail reads c along v (`Ablated`). Of a
    LoRA, A becomes A (I - (1 - keep) v v^T), which drops the mean as well.

    Args:
        model: the base, with its LoRA in it if the adapter is one.
        trails: trails, or an adapter with LoRA, which is edited in place.
        prompts: clean examples of the task.
        tokenizer: the model's tokenizer.
        trigger: its token ids, as `scan` or `search` found them.
        only: the names of the parts to repair; by default all.
        keep: how much of the direction a part still reads, from 0 to 1.
        where: as for `scan`.
        ordinary: candidates that the excess is measured against; by default some tokens of the prompts.
        task: a score of an adapter that is at work in the model as `trails` was; measured before and after.
        memory: as for `scan`.

    Raises:
        ValueError: no prompt, an empty trigger, a `keep` or `where` outside [0, 1], or a name in `only` that no part
            has.
        RuntimeError: another thread repairs this LoRA, or runs it.
    """
    if not prompts or not trigger:
        raise ValueError("repair needs clean prompts, and the token ids of a trigger")
    if not 0 <= keep <= 1:
        raise ValueError(f"keep={keep} must be from 0 to 1")
    found = parts(model, trails, prompts, tokenizer)
    names = {part.name for part in found}
    if unknown := sorted(set(only or ()) - names):
        raise ValueError(f"there is no part {unknown[0]!r}; the parts are {', '.join(sorted(names))}")
    chosen = [part for part in found if only is None or part.name in only]
    ordinary = ordinary or [(i,) for i in dict.fromkeys(i for prompt in prompts for i in prompt.ids)][:32]

    def measured(now: Adapter) -> tuple[float, float, float | None]:
        with responding(model, now, tokenizer, memory) as respond:
            (excess,) = Probe(respond, prompts, tokenizer, ordinary, where=where).excess([trigger])
        kl = on_texts(model, now, prompts, tokenizer).mean_kl
        return excess, kl, None if task is None else task(now)

    edited, in_place = _Edited(), [] if isinstance(trails, TrailMap) else trails.running
    with alone(in_place, "repairs this adapter in place"), Undo() as undo:
        before = measured(trails)
        directions = blame(model, trails, prompts, tokenizer, trigger, chosen, where=where)
        undo.add(edited.undo)
        made = trails
        if isinstance(trails, TrailMap):
            made = _ablated(trails, chosen, directions, keep)
        else:
            edited.edit(chosen, directions, keep)
        after = measured(made)
        scores = None if before[2] is None or after[2] is None else (before[2], after[2])
        repaired = Repaired(made, (before[0], after[0]), (before[1], after[1]), scores, edited.undo)
        undo.forget()
    return repaired


@tidy
def blame(
    model: nn.Module,
    trails: Adapter,
    prompts: Sequence[Example],
    tokenizer: Any,
    trigger: Ids,
    parts: Sequence[Part],
    *,
    where: float = 0.5,
) -> Blamed:
    """For each part, by name, the unit direction that a trigger brings it, and the mean clean state c, both [in].

    The direction is that of V V^T (h - c), with V the part's read directions, or of h - c where the part is not affine.
    h is the state, among those with the trigger in the prompt, that the part moves most unlike c; the mean is taken
    over prompts. A part that reads no token, or nothing of the trigger, is left out.

    Args:
        model: the base, with its LoRA in it if the adapter is one.
        trails: an adapter of any kind.
        prompts: clean examples of the task.
        tokenizer: the model's tokenizer.
        trigger: its token ids.
        parts: the parts of the adapter to look at.
        where: as for `scan`.
    """
    modules = {part.name: part.module for part in parts}
    with responding(model, trails, tokenizer) as respond:
        clean = respond.inputs(modules, [insert(prompt, (), where) for prompt in prompts])
        bad = respond.inputs(modules, [insert(prompt, trigger, where) for prompt in around(prompts, tokenizer, where)])
    blamed: Blamed = {}
    for part in parts:
        if not clean[part.name] or not bad[part.name]:
            continue
        c = torch.cat(clean[part.name]).double().mean(0)
        worst: list[Tensor] = []
        for states in bad[part.name]:
            worst.append((states.double() - c)[_unlike(part, states, c.to(states.dtype)).argmax()])
        direction = torch.stack(worst).mean(0)
        if part.map.affine:
            direction = direction @ part.map.read @ part.map.read.T
        if float(direction.norm()) > 0:
            blamed[part.name] = direction / direction.norm(), c
    return blamed


@torch.no_grad()
def _unlike(part: Part, states: Float[Tensor, "n dim"], c: Float[Tensor, " dim"]) -> Float[Tensor, " n"]:
    """How differently a part moves each state and c."""
    if not isinstance(part.module, Trail):
        return part.map.code(states - c).norm(dim=-1)
    like = next(part.module.parameters(), states)
    moved = part.module(torch.cat([states, c.unsqueeze(0)]).to(like.device, like.dtype)).cpu()
    return (moved[:-1] - moved[-1]).norm(dim=-1)


def _ablated(trails: TrailMap, chosen: Sequence[Part], directions: Blamed, keep: float) -> TrailMap:
    ablated: dict[nn.Module, Trail] = {}
    for part in chosen:
        if part.name in directions and isinstance(part.module, Trail):
            v, c = directions[part.name]
            made = Ablated(part.module, len(v), 1, keep)
            like = next(part.module.parameters(), made.V)
            made.V.copy_(v)
            made.c.copy_(c)
            ablated[part.module] = made.to(like.device, like.dtype)
    return TrailMap([(site, ablated.get(trail, trail)) for site, trail in trails.items()], blocks=trails.blocks)


class _Edited:
    """LoRA layers whose A was edited in place, and what takes that back."""

    def __init__(self) -> None:
        self._before: list[tuple[Tensor, Tensor]] = []

    def edit(self, chosen: Sequence[Part], directions: Blamed, keep: float) -> None:
        for part in chosen:
            if part.name not in directions:
                continue
            v = directions[part.name][0]
            layer: Any = part.module
            for name in layer.active_adapters:
                if name in layer.lora_A:
                    a: Tensor = layer.lora_A[name].weight.data
                    self._before.append((a, a.clone()))
                    wide = a.double()
                    a.copy_(wide - (1 - keep) * torch.outer(wide @ v.to(a.device), v.to(a.device)))

    def undo(self) -> None:
        for a, value in self._before:
            a.copy_(value)
