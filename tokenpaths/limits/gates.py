"""Gates before trained trails: on which states they act."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tokenpaths.limits.kinds import Kind, Kinds, Text, drawn, levels, told
from tokenpaths.limits.states import entering
from tokenpaths.site import Site
from tokenpaths.tokens import All, Rule
from tokenpaths.trailmap.trailmap import TrailMap
from tokenpaths.trails.base import Trail
from tokenpaths.trails.wrappers import Guarded, at_unit_scale
from tokenpaths.undo import tidy

_ELSEWHERE = "task, elsewhere"  # the tokens of the task's texts that its rule does not choose


@dataclass(frozen=True)
class Guard:
    """How a gate does on texts that it was not fitted on.

    `task` and `other` are its mean opening, 0 to 1, on states of the task and on others; `other_share` is the share of
    the others that it opens on at all. `kinds` is of all gates together: what was read of each kind of other text, and
    what is promised of it.
    """

    task: float
    other: float
    other_share: float
    kinds: tuple[Kind, ...] = ()

    @property
    def promised(self) -> float:
        """An unseen text of any kind that was read keeps all gates shut with this probability at least."""
        return min((kind.promised for kind in self.kinds), default=0.0)

    def __str__(self) -> str:
        opens = f"open {self.task:.3f} on the task's tokens, on {self.other_share:.2%} of other tokens"
        return "\n".join([opens, *(f"  {kind}" for kind in self.kinds)])


class Gates(NamedTuple):
    """Guarded trails, and how each gate does, by the sites of these trails: `trails, fits = guard(...)`."""

    trails: TrailMap
    fits: dict[Site, Guard]


@tidy
def guard(
    model: nn.Module,
    trails: TrailMap,
    task: Kinds,
    other: Kinds,
    tokenizer: Any = None,
    *,
    tokens: Rule = All(),
    shut: float | None = None,
    most: int = 4096,
    batch_size: int = 8,
    seed: int = 0,
) -> Gates:
    """Put a gate before each trained trail. It opens on states like those the trail was trained on, and on no others.

        trails = TrailMap({site: DiReFT(dim, rank=4) for site in sites(model, tokens=Last(1) | Answer())})
        for step in steps(model, trails, [Imitate(examples)], steps=200): ...
        trails, fits = guard(model, trails, examples, {"news": news, "code": code, "chat": chats})

    The trails come back as `Guarded`, at the same layers and streams but with the rule `tokens`. A gate finds its
    states by itself, so that the end of the prompt need not be known. Text on which all gates stay shut is, to the bit,
    as the frozen model has it.

    At each site there are two classes of states, at unit scale as `Guarded` reads them. The task's are those that enter
    the trail, moved by the trails below, at the tokens that its rule chooses in `task`; their mean is mu1. The others
    are what `tokens` chooses besides in `task`, and all of the frozen model's states in `other`; their mean is mu0. Let
    S be the pooled covariance within the classes, shrunk by 1 % towards its diagonal. A state h is scored by Fisher's
    discriminant,

        score(h) = w . h,    w = S^-1 (mu1 - mu0)

    One text in four of each kind is held out, drawn at random. One open token is enough to move a text, so thresholds
    are of whole texts: let m be a text's largest score at a gate, and m' that of the texts the gate was fitted on,

        excess(text) = max over gates of (m - mean m') / u,    high = mean m' + e u

    with u the larger of max m' - mean m' and half the way from mean m' to the task's mean score, and with e, for
    all gates, the largest over the kinds of the ceil(shut (n + 1))-th smallest excess of the n held-out texts. So an
    unseen text of any of these kinds keeps all gates shut with probability `shut` (split conformal prediction, Vovk et
    al. 2005), which needs n >= 1 / (1 - shut) - 1. Let `low` be the 2 % quantile of the task's scores on held-out
    texts. The gate is 0 up to the score high + (low - high) / 2, is 1 from high + 3 (low - high) / 4 on, and is linear
    between. Where the classes overlap (low <= high) it is 0 up to `high` and 1 from the median of the
    task's scores on, and a warning says so.

    The more kinds of text `other` holds, the better: a gate mistakes for the task what looks like the task, and nothing
    is promised of a kind that was not read.

    Args:
        model: the model that the trails were trained in.
        trails: trained trails. They share their parameters with those that are returned.
        task: examples such as they were trained on, or several kinds of them by name.
        other: examples of anything else, such as `encode_texts(texts, tokenizer)`, or better several kinds by name. As
            many texts are read of each kind, as far as there are, and the promise holds for each.
        tokenizer: for `Match` rules.
        tokens: the token rule of the guarded trails. Keep the rule that the trails were trained with where states alone
            cannot tell the task's tokens, as in a chain of names that its prompt holds too.
        shut: the share of unseen texts of each kind that must keep all gates shut, above 0 and below 1. Unless given,
            as much as the held-out texts can promise, n / (n + 1).
        most: about this many tokens of `task`, and of `other`, are read, but of each kind at least 8 texts. Meanwhile
            their states at all sites are kept in memory.
        batch_size: examples in one forward.
        seed: draws the texts that are read, and those of them that are held out.

    Returns:
        The guarded trails, and for each of their sites how its gate does, with what was read and what is promised.

    Raises:
        ValueError: `shut` out of range or more than the held-out texts can promise, fewer than 8 examples of a kind, a
            rule that chooses no token of `task`, or trails that are attached already.

    Fisher 1936 (the discriminant).
    """
    if shut is not None and not 0 < shut < 1:
        raise ValueError(f"shut={shut} must be above 0 and below 1: it is a share of unseen texts")
    ours, theirs = drawn("task", task, most, seed), drawn("other", other, most, seed)
    own = _read(model, trails, ours, 1.0, tokens, tokenizer, batch_size)
    rest = _read(model, trails, theirs, 0.0, All(), tokenizer, batch_size, first=len(ours))
    texts = [*(replace(text, kind=_ELSEWHERE) for text in ours), *theirs]
    by_trail: dict[Trail, list[Site]] = {}  # a tied trail has one gate for all its sites
    for site, trail in trails.items():
        by_trail.setdefault(trail, []).append(site)
    gates: dict[Trail, _Gate] = {}
    for trail, at in by_trail.items():
        yes = _States.joined([own[site].where(own[site].chosen) for site in at])
        no = [own[site].where(~own[site].chosen & own[site].reached) for site in at]
        gates[trail] = _Gate(trail, at[0], texts, yes, _States.joined([*no, *(rest[site] for site in at)]))
    found = levels(texts, torch.stack([gate.excess() for gate in gates.values()]).amax(0), shut)
    beyond = max(level.excess for level in found)
    for gate in gates.values():
        if gate.place(beyond):
            message = "states of the task overlap with others, so its gate is shut on some of the task's"
            warnings.warn(f"{gate.site}: {message}", stacklevel=2)
    opened = torch.stack([gate.opens_on() for gate in gates.values()]).any(0)
    kinds = tuple(told(level, texts, opened) for level in found)
    sites = {site: Site(site.layer, tokens, site.stream, site.head) for site in trails}
    made = TrailMap([(sites[site], gates[trail].guarded) for site, trail in trails.items()], blocks=trails.blocks)
    return Gates(made, {sites[site]: gates[trail].measured(kinds) for site, trail in trails.items()})


@dataclass(frozen=True, eq=False)
class _States:
    """States at unit scale: which the trail's rule chooses, which the new rule, and the number of each one's text."""

    states: Float[Tensor, "n dim"]
    chosen: Bool[Tensor, " n"]
    reached: Bool[Tensor, " n"]
    text: Int[Tensor, " n"]

    def where(self, mask: Bool[Tensor, " n"]) -> _States:
        return _States(self.states[mask], self.chosen[mask], self.reached[mask], self.text[mask])

    @staticmethod
    def joined(some: Sequence[_States]) -> _States:
        parts = zip(*((s.states, s.chosen, s.reached, s.text) for s in some), strict=True)
        return _States(*(torch.cat(part) for part in parts))


def _read(
    model: nn.Module,
    trails: TrailMap,
    texts: Sequence[Text],
    strength: float,
    tokens: Rule,
    tokenizer: Any,
    batch_size: int,
    first: int = 0,
) -> dict[Site, _States]:
    """What enters each trail at a strength; the texts are numbered from `first`."""
    parts: dict[Site, list[_States]] = {site: [] for site in trails}
    examples = [text.example for text in texts]
    for batch, context, states in entering(model, trails, examples, strength, tokenizer, batch_size):
        number = torch.arange(first, first + len(batch)).unsqueeze(1).expand_as(batch.input_ids)
        real, reached = context.real, tokens.mask(context)
        for site, (state, mask) in states.items():
            unit = at_unit_scale(state[real].float()).cpu()
            parts[site].append(_States(unit, mask[real], reached[real], number[real]))
        first += len(batch)
    return {site: _States.joined(found) for site, found in parts.items()}


class _Gate:
    """The gate of one trail, with the states of the task (`yes`) and the others (`no`): fitted, then placed."""

    def __init__(self, trail: Trail, site: Site, texts: Sequence[Text], yes: _States, no: _States) -> None:
        held = torch.tensor([text.held for text in texts])
        if not bool(held[yes.text].any()) or bool(held[yes.text].all()):
            count = sum(text.kind == _ELSEWHERE for text in texts)
            raise ValueError(
                f"{site}: {site.tokens} chooses no token in the {count} examples of task that were read, or only in "
                "those that are held out, or only in the others"
            )
        self.site = site
        self.guarded = Guarded(trail, yes.states.shape[1])
        self.yes, self.no, self.held = yes, no, held
        self.w = _discriminant(yes.states[~held[yes.text]].double(), no.states[~held[no.text]].double())
        self.task = yes.states[held[yes.text]].double() @ self.w
        nothing = torch.full((len(texts),), -math.inf, dtype=torch.float64)
        peaks = nothing.scatter_reduce(0, no.text, no.states.double() @ self.w, "amax")
        fitted = peaks[~held & peaks.isfinite()]
        self.peaks, self.usual = peaks, fitted.mean()
        far = (yes.states[~held[yes.text]].double() @ self.w).mean() - self.usual
        # in units of the largest alone, a gate whose texts reach alike would lift the thresholds of all others; half
        # the way to the task is a distance that a gate can spare
        self.unit = torch.maximum(fitted.max() - self.usual, 0.5 * far).clamp_min(1e-12)

    def excess(self) -> Float[Tensor, " texts"]:
        """How high each text reaches: 0 as the mean of the fitted texts, 1 as the highest of them or higher."""
        return (self.peaks - self.usual) / self.unit

    def place(self, excess: float) -> bool:
        """Put the gate's threshold at an excess; whether the task overlaps with the others there."""
        high, low = self.usual + excess * self.unit, self.task.quantile(0.02)
        overlap = bool(low <= high)
        if overlap:
            start, wide = high, torch.maximum(self.task.median(), high + 1e-3 * high.abs().clamp_min(1e-6))
            start = start + 1e-3 * (wide - start)  # shut on the text at the threshold, whatever rounding makes of it
        else:
            start, wide = high + 0.5 * (low - high), high + 0.75 * (low - high)
        self.guarded.w.copy_(self.w / (wide - start))
        self.guarded.b.copy_(-start / (wide - start))
        like = next(self.guarded.trail.parameters(), self.guarded.w)
        self.guarded.to(like.device, like.dtype)
        return overlap

    def _open(self, states: Float[Tensor, "n dim"]) -> Float[Tensor, " n"]:
        return self.guarded.gate(states.to(self.guarded.w)).double().cpu()

    def opens_on(self) -> Bool[Tensor, " texts"]:
        """The texts with a token, besides those of the task, that the gate opens on."""
        opened = torch.zeros_like(self.held)
        opened[self.no.text[self._open(self.no.states) > 0]] = True
        return opened

    def measured(self, kinds: tuple[Kind, ...]) -> Guard:
        task = self._open(self.yes.states[self.held[self.yes.text]])
        other = self._open(self.no.states[self.held[self.no.text]])
        return Guard(float(task.mean()), float(other.mean()), float((other > 0).double().mean()), kinds)


def _discriminant(yes: Float[Tensor, "m dim"], no: Float[Tensor, "n dim"]) -> Float[Tensor, " dim"]:
    """Fisher's S^-1 (mu1 - mu0), on dimensions scaled to unit variance so that shrinking treats them alike."""
    gap = yes.mean(0) - no.mean(0)
    within = torch.cat([yes - yes.mean(0), no - no.mean(0)])
    scale = within.std(0).clamp_min(1e-12)
    within = within / scale
    s = within.mT @ within / len(within)
    s = 0.99 * s + 0.01 * torch.eye(len(s), dtype=s.dtype)
    return torch.linalg.solve(s, gap / scale) / scale
