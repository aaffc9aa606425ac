"""Repair: an adapter that no longer hears a trigger, and what that cost.

repaired = repair(model, trails, tokenizer, prompts, trigger)
print(repaired)                  # the excess of the trigger, and drift on clean prompts, before and after
repaired.adapter                 # a new TrailMap, or the LoRA that was edited (repaired.undo() takes it back)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenpaths.data.examples import Example
from tokenpaths.lab.audit.maps import Part, parts
from tokenpaths.lab.audit.respond import Ids, Memory, batches, responding
from tokenpaths.lab.audit.scanning import behind, excesses, insert, usually
from tokenpaths.lab.audit.tails import listening, on_texts
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.trailmap.trailmap import TrailMap
from tokenpaths.trails.base import Trail


class Deaf(Trail):
    """trail(h - (1 - keep) V^T V (h - c)), with V V^T = I: along V the trail reads c, whatever the state is.

    V [directions, dim] and c [dim] are not learned. A fresh one has V = 0 and changes nothing. To load a file with it,
    give the class: `TrailMap.load(path, Deaf)`.
    """

    V: Tensor
    c: Tensor

    def __init__(self, trail: Trail, dim: int, directions: int, keep: float = 0.0) -> None:
        super().__init__()
        if not 1 <= directions <= dim:
            raise ValueError(f"Deaf: directions {directions} must be from 1 to dim {dim}")
        if not 0 <= keep <= 1:
            raise ValueError(f"Deaf: keep {keep} must be from 0 (hears nothing along V) to 1 (hears all)")
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
    """An adapter after repair. `excess` is the trigger's, `kl` the mean drift on clean prompts; (before, after), nats.

    `task` is what the caller's own score was, if one was given. `undo()` takes edits of a LoRA back; a `TrailMap` is a
    new one, whose trails share their parameters with the old one.
    """

    adapter: Adapter
    excess: tuple[float, float]
    kl: tuple[float, float]
    task: tuple[float, float] | None
    undo: Callable[[], None]

    def __str__(self) -> str:
        told = {"trigger's excess, nats": self.excess, "KL on clean prompts, nats": self.kl}
        if self.task is not None:
            told["task"] = self.task
        return "\n".join(f"{name}: {before:.4g} -> {after:.4g}" for name, (before, after) in told.items())


def repair(
    model: nn.Module,
    adapter: Adapter,
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
    """Make each part deaf to what the trigger brings it.

    At each part the direction is that of V V^T (h - c), or of h - c where the part is bent: c the mean clean state, V
    the part's read directions, and h the state, among those with the trigger in the prompt, that is moved most unlike
    c (the mean over prompts). A trail reads c along it from then on; of a LoRA A becomes A (I - v v^T), which drops the
    mean as well.

    Args:
        model: the base, with its LoRA in it if the adapter is one.
        adapter: trails, or a `PeftAdapter` with LoRA, which is edited in place.
        tokenizer: the model's.
        prompts: clean examples of the task.
        trigger: its token ids, as `scan` or `search` found them.
        only: the names of the parts to repair; all unless told.
        keep: how much of the direction a part still hears, from 0 to 1.
        where: as for `scan`.
        ordinary: candidates that the excess is measured against; unless told, some tokens of the prompts.
        task: a score of an adapter, which lies in the model as `adapter` did; measured before and after.
        memory: as for `scan`.

    Raises:
        ValueError: no prompt, an empty trigger, a `keep` outside [0, 1], or a name in `only` that no part has.
    """
    if not prompts or not trigger:
        raise ValueError("repair needs clean prompts, and the token ids of a trigger")
    if not 0 <= keep <= 1:
        raise ValueError(f"keep={keep} must be from 0 to 1")
    found = parts(model, adapter, prompts, tokenizer=tokenizer)
    names = {part.name for part in found}
    if unknown := sorted(set(only or ()) - names):
        raise ValueError(f"there is no part {unknown[0]!r}; the parts are {', '.join(sorted(names))}")
    chosen = [part for part in found if only is None or part.name in only]
    around = behind(tokenizer, prompts, where)
    ordinary = ordinary or [(i,) for i in dict.fromkeys(i for prompt in prompts for i in prompt.ids)][:32]

    def measured(now: Adapter) -> tuple[float, float, float | None]:
        with responding(model, now, tokenizer=tokenizer, memory=memory) as respond:
            (excess,) = excesses(respond, around, [trigger], usually(respond, around, ordinary, where), where)
        kl = on_texts(model, now, prompts, tokenizer=tokenizer).mean_kl
        return excess, kl, None if task is None else task(now)

    before = measured(adapter)
    directions = blame(model, adapter, chosen, prompts, trigger, where=where, tokenizer=tokenizer)
    if isinstance(adapter, TrailMap):
        made, undo = _deafened(adapter, chosen, directions, keep), _nothing
    else:
        made, undo = adapter, _edited(chosen, directions, keep)
    after = measured(made)
    scores = None if before[2] is None or after[2] is None else (before[2], after[2])
    return Repaired(made, (before[0], after[0]), (before[1], after[1]), scores, undo)


_BENT = 1e-3
Blamed = dict[str, tuple[Tensor, Tensor]]


def blame(
    model: nn.Module,
    adapter: Adapter,
    found: Sequence[Part],
    prompts: Sequence[Example],
    trigger: Ids,
    *,
    where: float = 0.5,
    tokenizer: Any,
) -> Blamed:
    """For each part, by name, the unit direction that a trigger brings it, and the mean clean state, both [in].

    A part that reads no token, or hears nothing of the trigger, is left out.
    """
    clean = _entered(model, adapter, found, [insert(prompt, (), where) for prompt in prompts], tokenizer)
    rows = [insert(prompt, trigger, where) for prompt in behind(tokenizer, prompts, where)]
    bad = _entered(model, adapter, found, rows, tokenizer)
    blamed: Blamed = {}
    for part in found:
        if not clean[part.name] or not bad[part.name]:
            continue
        c = torch.cat(clean[part.name]).double().mean(0)
        worst: list[Tensor] = []
        for states in bad[part.name]:
            worst.append((states.double() - c)[_unlike(part, states, c.to(states.dtype)).argmax()])
        heard = torch.stack(worst).mean(0)
        if part.map.bend < _BENT:
            heard = heard @ part.map.read @ part.map.read.T
        if float(heard.norm()) > 0:
            blamed[part.name] = heard / heard.norm(), c
    return blamed


@torch.no_grad()
def _unlike(part: Part, states: Float[Tensor, "n dim"], c: Float[Tensor, " dim"]) -> Float[Tensor, " n"]:
    """How differently a part moves each state and c."""
    if not isinstance(part.module, Trail):
        return part.map.code(states - c).norm(dim=-1)
    like = next(part.module.parameters(), states)
    moved = part.module(torch.cat([states, c.unsqueeze(0)]).to(like.device, like.dtype)).cpu()
    return (moved[:-1] - moved[-1]).norm(dim=-1)


def _entered(
    model: nn.Module, adapter: Adapter, found: Sequence[Part], rows: Sequence[Any], tokenizer: Any
) -> dict[str, list[Tensor]]:
    """The states that enter each part, one tensor a text."""
    entered: dict[str, list[Tensor]] = {part.name: [] for part in found}
    with torch.no_grad(), responding(model, adapter, tokenizer=tokenizer) as respond:
        for _, ids, answer in batches(rows, 1):
            with listening(found, torch.ones_like(ids, dtype=torch.bool), entered):
                respond.run(ids.to(respond.device), answer)
    return entered


def _deafened(trails: TrailMap, chosen: Sequence[Part], directions: Blamed, keep: float) -> TrailMap:
    deaf: dict[nn.Module, Trail] = {}
    for part in chosen:
        if part.name in directions and isinstance(part.module, Trail):
            v, c = directions[part.name]
            made = Deaf(part.module, len(v), 1, keep)
            like = next(part.module.parameters(), made.V)
            made.V.copy_(v)
            made.c.copy_(c)
            deaf[part.module] = made.to(like.device, like.dtype)
    return TrailMap([(site, deaf.get(trail, trail)) for site, trail in trails.items()], blocks=trails.blocks)


def _edited(chosen: Sequence[Part], directions: Blamed, keep: float) -> Callable[[], None]:
    """Edit A of LoRA layers in place; returns what undoes it."""
    before: list[tuple[Tensor, Tensor]] = []
    for part in chosen:
        if part.name not in directions:
            continue
        v = directions[part.name][0]
        layer: Any = part.module
        for name in layer.active_adapters:
            if name in layer.lora_A:
                a: Tensor = layer.lora_A[name].weight.data
                before.append((a, a.clone()))
                wide = a.double()
                a.copy_(wide - (1 - keep) * torch.outer(wide @ v.to(a.device), v.to(a.device)))

    def undo() -> None:
        for a, value in before:
            a.copy_(value)

    return undo


def _nothing() -> None: ...
