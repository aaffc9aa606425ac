"""The arms: each is one limit on trails, with what is rehearsed and what is made of the trained trails."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import tokenpaths as tp
from benchmarks.common.folders import DATA, KEPT
from benchmarks.common.models import WIDTH, Base
from tokenpaths import Stay, confine, guard
from tokenpaths.lab.forgetting import trec, trec_pairs
from tokenpaths.limits import TrustRegion
from tokenpaths.training import StayAttention, StayMoments, StayStates

WORK = KEPT / "budget"  # runs and their trails, until they are a table
LR = 3e-3
FIRST = 10  # of the layers that the recommended limit uses: below, states say which token it is, not what it is for


class Bench(Base):
    """The model, the task and the texts, for one size of batch."""

    def __init__(self, batch: int) -> None:
        super().__init__(WORK)
        self.batch = batch
        self.train = tp.encode(trec_pairs(DATA), self.tokenizer, eos=False)
        self.test = trec(DATA).items

    @functools.cached_property
    def rehearsed(self) -> list[tp.Example]:
        """Original text."""
        return self.original(256)

    @functools.cached_property
    def written(self) -> list[tp.Example]:
        """What the frozen model writes: texts of its own, and what it makes of the beginnings of the task's prompts."""
        return [*self.own(1, 64), *self.own(2, 64, self.train, "-trec")]

    def plain(self) -> tp.trails.Trail:
        return tp.trails.DiReFT(self.dim, rank=4)

    def everywhere(self, make: Callable[[], tp.trails.Trail]) -> tp.TrailMap:
        return tp.TrailMap({site: make() for site in tp.sites(self.model)})

    @property
    def texts(self) -> int:
        """Rehearsal texts a step: 2 x 128 tokens beside 32 questions."""
        return max(1, self.batch * 2 * 128 // 32 // WIDTH)


# Trails, further goals, and options of `steps`; "finish" has what is made of the trained trails, by the arm's name.
Made = tuple[tp.TrailMap, list[Any], dict[str, Any]]


def unlimited(bench: Bench, lr: float = LR) -> Made:
    return bench.everywhere(bench.plain), [], {"lr": lr}


def three_layers(bench: Bench) -> Made:
    return tp.TrailMap({site: bench.plain() for site in tp.sites(bench.model, [7, 15, 23])}), [], {}


def fixed(bench: Bench, weight: float = 1.0) -> Made:
    """The simple baseline: KL to the frozen model at a fixed weight."""
    goal = Stay(bench.rehearsed, weight=weight, gain=0, batch_size=bench.texts)
    return bench.everywhere(bench.plain), [goal], {}


def stay(bench: Bench, kind: type[Stay] = Stay, every: int = 1, within: float = 0.01, own: bool = False) -> Made:
    goal = kind(bench.written if own else bench.rehearsed, within=within, every=every, batch_size=bench.texts)
    return bench.everywhere(bench.plain), [goal], {}


def stay_attention(bench: Bench) -> Made:
    bench.model.set_attn_implementation("eager")
    return stay(bench, StayAttention)


def capped(bench: Bench, cap: float = 0.05) -> Made:
    return bench.everywhere(lambda: tp.Capped(bench.plain(), cap)), [], {}


def trust(bench: Bench) -> Made:
    return bench.everywhere(bench.plain), [], {"trust": TrustRegion(bench.rehearsed[: 2 * bench.texts], most=0.001)}


def confined(bench: Bench, contrastive: bool = False) -> Made:
    trails = bench.everywhere(lambda: tp.Confined(bench.plain(), bench.dim, bench.dim // 4))
    confine(bench.model, trails, bench.rehearsed[:64], bench.train[:256] if contrastive else None)
    return trails, [], {}


def gated(bench: Bench) -> Made:
    trails = bench.everywhere(lambda: tp.trails.Gated(bench.plain(), bench.dim))
    return trails, [Stay(bench.rehearsed, within=0.01, batch_size=bench.texts)], {}


def guarded(bench: Bench, first: int, **others: str) -> Made:
    """Trained where the answer is written; then gates are put before the trails, which act on all tokens."""
    text, own = bench.rehearsed, bench.written
    texts = {"original": text[::2], "own": own, "both": [*text[::4], *own[::2]]}

    def finish(other: str, trails: tp.TrailMap) -> tp.TrailMap:
        if other == "none":
            return trails
        return guard(bench.model, trails, bench.train[:256], texts[other], most=8192)[0]

    places = tp.sites(bench.model, slice(first, None), tp.Last(1) | tp.Answer())
    made = {arm.replace("_", " "): functools.partial(finish, other) for arm, other in others.items()}
    return tp.TrailMap({site: bench.plain() for site in places}), [], {"finish": made}


ARMS: dict[str, tuple[str, Callable[[Bench], Made]]] = {
    "none": ("no limit", unlimited),
    "none 1e-3": ("no limit, lr 1e-3", lambda b: unlimited(b, 1e-3)),
    "three layers": ("no limit, three layers only", three_layers),
    "fixed": ("KL to frozen, fixed weight 1", fixed),
    "stay": ("Stay: KL within 0.01 nats", stay),
    "stay every 4": ("Stay every 4th step", lambda b: stay(b, every=4)),
    "stay self": ("Stay on self-samples", lambda b: stay(b, own=True)),
    "stay states": ("StayStates within 0.01", lambda b: stay(b, StayStates)),
    "stay moments": ("StayMoments within 0.01", lambda b: stay(b, StayMoments)),
    "stay attention": ("StayAttention within 0.01", stay_attention),
    "capped": ("Capped at 5 % of the state", capped),
    "trust": ("TrustRegion: 0.001 nats a step", trust),
    "confined": ("Confined to what text uses least", confined),
    "contrastive": ("Confined, contrastive directions", lambda b: confined(b, contrastive=True)),
    "gated": ("learned gate + Stay", gated),
    "guarded": ("guard, all layers", lambda b: guarded(b, 0, guarded="original")),
    "recommended": (
        f"recommended: guard, from layer {FIRST} on",
        lambda b: guarded(b, FIRST, recommended="both", recommended_self="own", rule="none"),
    ),
    "rule": (f"token rule Last(1) | Answer() only, from layer {FIRST} on", lambda b: guarded(b, FIRST, rule="none")),
    "recommended self": ("recommended, with self-samples only", lambda b: guarded(b, FIRST, recommended_self="own")),
}
