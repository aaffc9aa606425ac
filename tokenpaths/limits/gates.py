"""Limits on what a trail can do: in which directions, on which states, and how strongly.

`confine` is called before training, and says in which directions a trail may move a state. `guard` and
`strength_within` are called after it: on which states the trails shall act, and how strongly.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tokenpaths.data.examples import Example
from tokenpaths.limits.states import entering
from tokenpaths.site import Site
from tokenpaths.tokens import All, Rule
from tokenpaths.trailmap.trailmap import TrailMap
from tokenpaths.trails.base import Trail
from tokenpaths.trails.wrappers import Guarded, at_unit_scale

_HELD = 4  # one text in so many is held out, to place the gate's threshold


@dataclass(frozen=True)
class Guard:
    """How a gate fits, on texts that it was not fitted on: its mean opening, and the share of tokens it opens on."""

    task: float
    other: float
    other_share: float


def guard(
    model: nn.Module,
    trails: TrailMap,
    task: Sequence[Example],
    other: Sequence[Example],
    *,
    tokens: Rule = All(),
    shut: float = 0.9999,
    most: int = 4096,
    tokenizer: Any = None,
    batch_size: int = 8,
) -> tuple[TrailMap, dict[Site, Guard]]:
    """Put a gate before each trained trail, which opens on states like those it was trained on, and on no others.

        trails = TrailMap({site: DiReFT(dim, rank=4) for site in sites(model, tokens=Last(1) | Answer())})
        for step in steps(model, trails, [Imitate(examples)], steps=200): ...
        trails, fits = guard(model, trails, examples, plain(tokenizer, texts))

    The trails come back as `Guarded`, at the same layers and streams but at `tokens`: where the prompt ends need no
    longer be known, since the gate finds the states by itself; and text on which it stays shut is left to the bit as
    the frozen model has it. At each site, let mu1 be the mean of the states (at unit scale, as `Guarded` reads them)
    that enter the trail at the tokens its rule chooses in `task`, moved as they are by the trails below; mu0 that of
    the other states of `task` that `tokens` chooses, and of the frozen model's in `other`; and S their pooled
    covariance within both classes, shrunk by 1 % towards its diagonal. Fisher's discriminant w = S^-1 (mu1 - mu0)
    scores a state. On held-out texts, one in four, let `high` be the quantile `shut` of the other states' scores and
    `low` the 2 % quantile of the task's: the gate begins to open half way from `high` to `low`, and is wide open at
    three quarters. Where the classes overlap it begins at `high`.

    The more kinds of text `other` holds, the better: what a gate takes for the task are prompts that look like it.

    Args:
        model: the model that the trails were trained in.
        trails: trained trails. They share their parameters with those that are returned.
        task: examples such as they were trained on.
        other: examples of anything else, such as `plain(tokenizer, texts)`.
        tokens: the token rule of the guarded trails. Where the task's own tokens cannot be told apart by their states,
            as in a chain of names that its prompt holds too, keep the rule that the trails were trained at.
        shut: the share of the other states on which a gate must be shut.
        most: so many tokens, about, are read of `task`, and of `other`, evenly spaced. Their states at all sites are
            kept in memory meanwhile.
        tokenizer: for `Match` rules.
        batch_size: of the forwards.

    Raises:
        ValueError: too few texts, or a rule that chooses no token of `task`, or every one.
    """
    if not 0 < shut <= 1:
        raise ValueError(f"shut={shut} must be above 0 and at most 1")
    for name, examples in (("task", task), ("other", other)):
        if len(examples) < 2 * _HELD:
            raise ValueError(f"{name} has {len(examples)} examples; a gate needs at least {2 * _HELD}")
    own = _sample(model, trails, task, 1.0, tokens, most, tokenizer, batch_size)
    rest = _sample(model, trails, other, 0.0, All(), most, tokenizer, batch_size)
    gates: dict[Trail, Guarded] = {}
    found: dict[Trail, Guard] = {}
    for trail, at in _by_trail(trails).items():
        ours = [own[site] for site in at]
        yes = _Sample.joined([sample.where(sample.chosen) for sample in ours])
        no = _Sample.joined([*(s.where(~s.chosen & s.reached) for s in ours), *(rest[site] for site in at)])
        if not len(yes.states):
            raise ValueError(f"{at[0]}: {at[0].tokens} chooses no token in the {len(task)} examples of task")
        gates[trail], found[trail], overlap = _fit(trail, yes, no, shut)
        if overlap:
            warnings.warn(
                f"{at[0]}: states of the task overlap with others, so its gate is shut on some of the task's",
                stacklevel=2,
            )
    sites = {site: Site(site.layer, tokens, site.stream, site.head) for site in trails}
    made = TrailMap([(sites[site], gates[trail]) for site, trail in trails.items()], blocks=trails.blocks)
    return made, {sites[site]: found[trail] for site, trail in trails.items()}


def _fit(trail: Trail, yes: _Sample, no: _Sample, shut: float) -> tuple[Guarded, Guard, bool]:
    """A gate for a trail, how it does on the states that are held out, and whether the classes overlap there."""
    w = _discriminant(yes.states[~yes.held].double(), no.states[~no.held].double())
    task, other = yes.states[yes.held].double() @ w, no.states[no.held].double() @ w
    high, low = other.quantile(shut), task.quantile(0.02)
    overlap = bool(low <= high)
    if overlap:
        start, wide = high, torch.maximum(task.median(), high + 1e-3 * high.abs().clamp_min(1e-6))
    else:
        start, wide = high + 0.5 * (low - high), high + 0.75 * (low - high)
    guarded = Guarded(trail, yes.states.shape[1])
    guarded.w.copy_(w / (wide - start))
    guarded.b.copy_(-start / (wide - start))
    like = next(trail.parameters(), guarded.w)
    guarded.to(like.device, like.dtype)
    opened, closed = (((x - start) / (wide - start)).clamp(0, 1) for x in (task, other))
    return guarded, Guard(float(opened.mean()), float(closed.mean()), float((closed > 0).double().mean())), overlap


@dataclass(frozen=True, eq=False)
class _Sample:
    """States at one site, at unit scale: which of them its rule chooses, which the new one, which are held out."""

    states: Float[Tensor, "n dim"]
    chosen: Bool[Tensor, " n"]
    reached: Bool[Tensor, " n"]
    held: Bool[Tensor, " n"]

    def where(self, mask: Bool[Tensor, " n"]) -> _Sample:
        return _Sample(self.states[mask], self.chosen[mask], self.reached[mask], self.held[mask])

    @staticmethod
    def joined(samples: Sequence[_Sample]) -> _Sample:
        parts = zip(*((s.states, s.chosen, s.reached, s.held) for s in samples), strict=True)
        return _Sample(*(torch.cat(part) for part in parts))


def _by_trail(trails: TrailMap) -> dict[Trail, list[Site]]:
    """Each trail, and the sites where it lies."""
    found: dict[Trail, list[Site]] = {}
    for site, trail in trails.items():
        found.setdefault(trail, []).append(site)
    return found


def _sample(
    model: nn.Module,
    trails: TrailMap,
    examples: Sequence[Example],
    strength: float,
    tokens: Rule,
    most: int,
    tokenizer: Any,
    batch_size: int,
) -> dict[Site, _Sample]:
    """What enters each trail, at a strength: the states of evenly spaced examples, about `most` of them."""
    chosen = examples[:: max(1, round(sum(map(len, examples)) / most))]
    parts: dict[Site, list[_Sample]] = {site: [] for site in trails}
    seen = 0
    for batch, context, states in entering(model, trails, chosen, strength, tokenizer, batch_size):
        held = torch.arange(seen, seen + len(batch)).unsqueeze(1).expand_as(batch.input_ids) % _HELD == 0
        real, reached = context.real, tokens.mask(context)
        for site, (state, mask) in states.items():
            unit = at_unit_scale(state[real].float()).cpu()
            parts[site].append(_Sample(unit, mask[real], reached[real], held[real]))
        seen += len(batch)
    return {site: _Sample.joined(found) for site, found in parts.items()}


def _discriminant(yes: Float[Tensor, "m dim"], no: Float[Tensor, "n dim"]) -> Float[Tensor, " dim"]:
    """Fisher's S^-1 (mu1 - mu0), on dimensions scaled to unit variance so that shrinking treats them alike."""
    gap = yes.mean(0) - no.mean(0)
    within = torch.cat([yes - yes.mean(0), no - no.mean(0)])
    scale = within.std(0).clamp_min(1e-12)
    within = within / scale
    s = within.mT @ within / len(within)
    s = 0.99 * s + 0.01 * torch.eye(len(s), dtype=s.dtype)
    return torch.linalg.solve(s, gap / scale) / scale
