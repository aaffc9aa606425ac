"""Where a gate opens: the discriminants and the threshold, from what was read of prompts; and how it does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tokenpaths.drift.edit import Edit, of_share
from tokenpaths.limits.kinds import HELD, conformal_least, conformal_rank
from tokenpaths.stats.intervals import UNKNOWN, Interval, mean_interval
from tokenpaths.trailmap.gate import Gate

Role: TypeAlias = Literal["form", "ask", "far"]
FOLDS = 8
SHRINK = 0.4
"""How far correlations are shrunk towards zero."""
ROUNDS, RATE = 4, 3.0
"""How often forms are weighed anew, and how strongly by what they lack."""


@dataclass(eq=False)
class KindRead:
    """Prompts of one kind. Those of one `group` are left out together: a form, and asks in its words."""

    name: str
    role: Role
    prompts: Sequence[str]
    group: int | None = None
    features: Tensor = torch.empty(0)


@dataclass(frozen=True)
class KindOpened:
    """How a gate does on one kind of prompts, whose direction and threshold were fitted without this kind.

    `role` is "form" for a wording of the task, "ask" for another ask of the task's texts, and "far" for anything else.
    `opened` is the share of its prompts that open. For a form, `known` is the share of prompts that open when other
    prompts of this form were fitted.
    """

    name: str
    role: Role
    prompts: int
    opened: float
    known: float = math.nan


@dataclass(frozen=True, eq=False)
class GateFit:
    """A fitted gate, and how it does.

    Args:
        gate: for `attach(model, trails, when=gate)`.
        kinds: each kind that was read.
        near: the share of other asks that may open, as promised.
        far: the same of anything else.
    """

    gate: Gate
    kinds: tuple[KindOpened, ...]
    near: float
    far: float

    def opened(self, role: Role) -> list[float]:
        """The share of prompts that open, of each kind of this role, which was not fitted."""
        return [kind.opened for kind in self.kinds if kind.role == role]

    @property
    def reliability(self) -> tuple[float, Interval]:
        """The share of unseen prompts of known forms that open."""
        return _mean([kind.known for kind in self.kinds if kind.role == "form"])

    @property
    def generality(self) -> tuple[float, Interval]:
        """The share of prompts of an unseen form that open; NaN where only one form was given."""
        forms = self.opened("form")
        return _mean(forms) if len(forms) > 1 else (math.nan, UNKNOWN)

    def locality(self, role: Literal["ask", "far"]) -> tuple[float, Interval]:
        """The share of prompts of an unseen ask, or far kind, that open."""
        return _mean(self.opened(role))

    @property
    def edit(self) -> Edit:
        """The same, kind by kind: the shares of prompts that open. Those of known forms are of prompts held out."""
        forms = [kind for kind in self.kinds if kind.role == "form"]
        known = tuple(of_share(kind.name, kind.known, len(range(0, kind.prompts, HELD))) for kind in forms)
        unseen = tuple(of_share(kind.name, kind.opened, kind.prompts) for kind in forms if len(forms) > 1)
        others = tuple(of_share(kind.name, kind.opened, kind.prompts) for kind in self.kinds if kind.role != "form")
        return Edit(known, unseen, others, "share that opens", "share that opens")

    def __str__(self) -> str:
        forms = self.opened("form")
        lines = [f"opens on {_told(self.reliability)} of unseen prompts of the {len(forms)} forms given (reliability)"]
        if len(forms) > 1:
            lines.append(
                f"     on {_told(self.generality)} of a form not given, on {min(forms):.2f} of the worst (generality)"
            )
        else:
            lines.append("     on forms not given: cannot tell, as one form was given (generality)")
        parts: tuple[tuple[Literal["ask", "far"], str, float], ...] = (
            ("ask", "other asks of the texts", self.near),
            ("far", "far prompts", self.far),
        )
        for role, name, most in parts:
            kinds = self.opened(role)
            told = _told(self.locality(role))
            lines.append(
                f"     on {told} of {name}, of a kind not given, {len(kinds)} kinds; set for {most:.0%} (locality)"
            )
        return "\n".join(lines)


def fitted(gate: Gate, kinds: Sequence[KindRead], near: float, far: float) -> GateFit:
    """A gate like this one with numbers from features, and how each kind does in the fold that leaves it out."""
    fold = _folds(kinds)
    forms = [i for i, kind in enumerate(kinds) if kind.role == "form"]
    others = {number: _others(kinds, fold, number) for number in (*sorted(set(fold)), None)}
    weights = torch.full((len(forms),), 1 / len(forms), dtype=torch.float64)

    def score_without(number: int | None) -> _Score:
        left = [i for i in forms if fold[i] != number] or forms  # one form is always fitted
        some = weights[[forms.index(i) for i in left]]
        return _Score.between(*_moments([kinds[i].features for i in left], some), *others[number])

    def unseen() -> list[Tensor]:
        scores = {number: score_without(number) for number in set(fold)}
        return [scores[number](kind.features) for kind, number in zip(kinds, fold, strict=True)]

    def level(scores: list[Tensor]) -> float:
        return max(_rank(kinds, scores, "ask", near), _rank(kinds, scores, "far", far))

    for _ in range(ROUNDS if len(forms) > 1 else 0):
        whole, threshold = score_without(None), level(unseen())
        opened = torch.tensor([_share(whole(kinds[i].features) > threshold) for i in forms], dtype=torch.float64)
        weights = torch.softmax(weights.log() + RATE * (1 - opened), 0)
    whole, scores = score_without(None), unseen()
    threshold = level(scores)
    made = Gate(gate.layers, gate.probes, gate.dim)
    made.weight.copy_(whole.w)
    made.bias.fill_(-whole.zero - threshold)
    held = [torch.arange(len(kind.prompts)) % HELD == 0 for kind in kinds]
    rest = [replace(kind, features=kind.features[~part]) for kind, part in zip(kinds, held, strict=True)]
    seen = _Score.between(*_moments([rest[i].features for i in forms], weights), *_others(rest, fold, None))
    told: list[KindOpened] = []
    for kind, part, score in zip(kinds, held, scores, strict=True):
        known = _share(seen(kind.features[part]) > threshold) if kind.role == "form" else math.nan
        told.append(KindOpened(kind.name, kind.role, len(kind.prompts), _share(score > threshold), known))
    return GateFit(made, tuple(told), near, far)


def _others(kinds: Sequence[KindRead], fold: Sequence[int], number: int | None) -> tuple[Tensor, Tensor]:
    """The moments of all kinds but forms, without those of a fold."""
    return _moments([k.features for k, f in zip(kinds, fold, strict=True) if k.role != "form" and f != number])


def _folds(kinds: Sequence[KindRead]) -> list[int]:
    """The fold of each kind: kinds of each role in turn, and those of a group together."""
    count = {"form": 0, "ask": 0, "far": 0}
    found: list[int] = []
    for kind in kinds:
        found.append((count[kind.role] if kind.group is None else kind.group) % FOLDS)
        count[kind.role] += 1
    return found


def _rank(kinds: Sequence[KindRead], scores: Sequence[Tensor], role: Role, share: float) -> float:
    """The score that at most this share of unseen prompts of a role is beyond; -inf where none was read."""
    found = torch.cat(
        [score for kind, score in zip(kinds, scores, strict=True) if kind.role == role] or [torch.empty(0)]
    )
    if not len(found):
        return -math.inf
    rank = conformal_rank(1 - share, len(found))
    if rank > len(found):
        raise ValueError(
            f"fit_gate: that {share:g} of {role} prompts open cannot be promised from {len(found)}: it takes "
            f"{conformal_least(1 - share)}. Give more, raise own=, or the share"
        )
    return float(found.sort().values[rank - 1])


@dataclass(frozen=True, eq=False)
class _Score:
    """w . z - zero: 0 for the mean of other kinds, 1 for that of forms."""

    w: Float[Tensor, " features"]
    zero: float

    def __call__(self, features: Float[Tensor, "prompts features"]) -> Float[Tensor, " prompts"]:
        return features @ self.w - self.zero

    @staticmethod
    def between(mu1: Tensor, s1: Tensor, mu0: Tensor, s0: Tensor) -> _Score:
        """Fisher's discriminant."""
        s = (s1 + s0) / 2
        d = s.diagonal().clamp_min(1e-12).sqrt()
        r = (1 - SHRINK) * s / d / d[:, None]
        r.diagonal().add_(SHRINK)
        way = torch.linalg.solve(r, (mu1 - mu0) / d) / d
        w = way / (way @ (mu1 - mu0)).clamp_min(1e-12)
        return _Score(w, float(w @ mu0))


def _moments(
    kinds: Sequence[Tensor], weights: Float[Tensor, " kinds"] | None = None
) -> tuple[Float[Tensor, " features"], Float[Tensor, "features features"]]:
    """The mean of kinds' means, and the scatter within kinds and between their means; all count alike by default."""
    kinds = [z for z in kinds if len(z)]
    shares = torch.ones(len(kinds), dtype=torch.float64) if weights is None else weights
    shares = shares / shares.sum()
    means = torch.stack([z.mean(0) for z in kinds])
    mu = shares @ means
    within = [(z - m) * (share / len(z)).sqrt() for z, m, share in zip(kinds, means, shares, strict=True)]
    rows = torch.cat([*within, (means - mu) * shares.sqrt()[:, None]])
    return mu, rows.mT @ rows


def _share(opened: Tensor) -> float:
    return float(opened.double().mean()) if len(opened) else math.nan


def _mean(shares: Sequence[float]) -> tuple[float, Interval]:
    """The mean over kinds, and its interval, kinds being the items."""
    values = np.array(shares, dtype=float)
    if not len(values):
        return math.nan, UNKNOWN
    return float(values.mean()), mean_interval(values, within=(0, 1))


def _told(value: tuple[float, Interval]) -> str:
    mean, (low, high) = value
    return f"{mean:.3f} ({low:.3f} to {high:.3f})"
