"""Gates before trained trails: on which states they act."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
from tokenpaths.undo import tidy

_HELD = 4  # one text in 4 is held out, to place the gate's threshold


@dataclass(frozen=True)
class Guard:
    """How a gate does on texts that it was not fitted on.

    `task` and `other` are its mean opening, 0 to 1, on states of the task and on others; `other_share` is the share of
    the others that it opens on at all.
    """

    task: float
    other: float
    other_share: float


class Gates(NamedTuple):
    """Guarded trails, and how each gate does, by the sites of these trails: `trails, fits = guard(...)`."""

    trails: TrailMap
    fits: dict[Site, Guard]


@tidy
def guard(
    model: nn.Module,
    trails: TrailMap,
    task: Sequence[Example],
    other: Sequence[Example],
    tokenizer: Any = None,
    *,
    tokens: Rule = All(),
    shut: float = 0.9999,
    most: int = 4096,
    batch_size: int = 8,
) -> Gates:
    """Put a gate before each trained trail. It opens on states like those the trail was trained on, and on no others.

        trails = TrailMap({site: DiReFT(dim, rank=4) for site in sites(model, tokens=Last(1) | Answer())})
        for step in steps(model, trails, [Imitate(examples)], steps=200): ...
        trails, fits = guard(model, trails, examples, encode_texts(texts, tokenizer))

    The trails come back as `Guarded`, at the same layers and streams but with the rule `tokens`. A gate finds its
    states by itself, so that the end of the prompt need not be known. Text on which all gates stay shut is, to the bit,
    as the frozen model has it.

    At each site there are two classes of states, at unit scale as `Guarded` reads them. The task's are those that enter
    the trail, moved by the trails below, at the tokens that its rule chooses in `task`; their mean is mu1. The others
    are what `tokens` chooses besides in `task`, and all of the frozen model's states in `other`; their mean is mu0. Let
    S be the pooled covariance within the classes, shrunk by 1 % towards its diagonal. A state h is scored by Fisher's
    discriminant,

        score(h) = w . h,    w = S^-1 (mu1 - mu0)

    One text in four is held out. On these let `high` be the quantile `shut` of the others' scores, and `low` the 2 %
    quantile of the task's. The gate is 0 up to the score high + (low - high) / 2, is 1 from high + 3 (low - high) / 4
    on, and is linear between. Where the classes overlap (low <= high) it is 0 up to `high` and 1 from the median of the
    task's scores on, and a warning says so.

    The more kinds of text `other` holds, the better: a gate mistakes for the task what looks like the task.

    Args:
        model: the model that the trails were trained in.
        trails: trained trails. They share their parameters with those that are returned.
        task: examples such as they were trained on.
        other: examples of anything else, such as `encode_texts(texts, tokenizer)`.
        tokenizer: for `Match` rules.
        tokens: the token rule of the guarded trails. Keep the rule that the trails were trained with where states alone
            cannot tell the task's tokens, as in a chain of names that its prompt holds too.
        shut: the share of the other states on which a gate must be shut, above 0 and at most 1.
        most: about this many tokens of `task`, and of `other`, are read, from evenly spaced examples. Meanwhile their
            states at all sites are kept in memory.
        batch_size: examples in one forward.

    Returns:
        The guarded trails, and for each of their sites how its gate does.

    Raises:
        ValueError: `shut` out of range, fewer than 8 examples, a rule that chooses no token of `task`, or trails that
            are attached already.

    Fisher 1936 (the discriminant).
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
    by_trail: dict[Trail, list[Site]] = {}  # a tied trail has one gate for all its sites
    for site, trail in trails.items():
        by_trail.setdefault(trail, []).append(site)
    for trail, at in by_trail.items():
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
    return Gates(made, {sites[site]: found[trail] for site, trail in trails.items()})


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
    """States at one site, at unit scale: which of them its rule chooses, which the new rule, and which are held out."""

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
    """What enters each trail at a strength: about `most` states, of evenly spaced examples."""
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
