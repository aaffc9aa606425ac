"""A few questions worth learning from: quality, difficulty and diversity (s1, Muennighoff et al. 2025, section 2).

    chosen = select(
        pool,
        100,
        quality={"has a chain": lambda item: bool(item.chain)},
        test=test_questions,
        difficulty={"SmolLM2": lambda items: solved_by_generation(model, items, tokenizer, read_answer)},
        domains=lambda items: clusters(model, [item.prompt for item in items], tokenizer, 20),
    )
    print(chosen.funnel)        # how many items each stage left
    pairs = [(item.prompt, item.chain) for item in chosen.items]

Each stage is a plain function that can be called by itself: `tokenpaths.data.contaminated`, `solved_by_generation`,
`solved_by_likelihood`, `clusters` and `sample`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeAlias

import numpy as np

from tokenpaths.data.contamination import contaminated
from tokenpaths.data.items import Question
from tokenpaths.report.escaping import mathtext
from tokenpaths.report.figures import COLOURS, GREY, empty_figure
from tokenpaths.report.records import Record
from tokenpaths.report.tables import text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Verdicts: TypeAlias = Callable[[Sequence[Question]], Sequence[bool]]
Labels: TypeAlias = Callable[[Sequence[Question]], Sequence[str]]


@dataclass(frozen=True)
class Stage:
    """A stage of a selection: what it keeps, how many items it dropped, and how many it left."""

    name: str
    dropped: int
    left: int


@dataclass(frozen=True)
class Funnel(Record):
    """The stages that turned a pool of `pool` items into a selection."""

    what: ClassVar[str] = "the funnel of a selection"

    pool: int
    steps: tuple[Stage, ...]

    def __str__(self) -> str:
        rows = [("the pool", "", self.pool), *((stage.name, f"-{stage.dropped}", stage.left) for stage in self.steps)]
        return text_table([[name, f"{dropped:>8}", f"{left:>8}"] for name, dropped, left in rows])

    def plot(self) -> Figure:
        """The number of items that each stage left, from the whole pool at the top to the chosen items.

        Raises `ImportError` where matplotlib is missing.
        """
        names = ["the pool", *(mathtext(stage.name) for stage in self.steps)]
        left = [self.pool, *(stage.left for stage in self.steps)]
        figure = empty_figure(f"{self.pool:,} items, {left[-1]:,} selected", 1.2 + 0.4 * len(names))
        axes = figure.subplots()
        bars = axes.barh(names, left, color=[GREY, *[COLOURS[0]] * len(self.steps)])
        axes.bar_label(bars, [f"{count:,}" for count in left], padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel("items left")
        return figure


@dataclass(frozen=True)
class Selection:
    """The chosen items in the order in which they were drawn, their numbers in the pool, and the funnel."""

    items: tuple[Question, ...]
    indices: tuple[int, ...]
    funnel: Funnel


def select(
    pool: Sequence[Question],
    n: int,
    *,
    quality: Mapping[str, Callable[[Question], bool]] | None = None,
    test: Sequence[str] = (),
    difficulty: Mapping[str, Verdicts] | None = None,
    domains: Labels | None = None,
    length: Callable[[Question], float] | None = None,
    weights: Mapping[str, float] | None = None,
    uniform_first: int = 0,
    seed: int = 0,
) -> Selection:
    """Choose `n` items of a pool. Each stage reads only the items that the stages before it have left.

    Args:
        pool: the items to choose from.
        n: the number of items to choose.
        quality: predicates by name. An item that fails one is dropped.
        test: the texts of the test. An item whose prompt or chain is `contaminated` by one is dropped.
        difficulty: by the name of a model, a function that tells for each item whether the model solves it. Solved
            items are dropped.
        domains: a function that labels the items. By default a label is the item's own `domain`.
        length: the length of an item's chain, for the preference of long ones. By default its number of words.
        weights: the weights of the domains, as `sample` takes them.
        uniform_first: the number of draws at the start that take domains uniformly, as in `sample`.
        seed: seeds the draws.

    Raises:
        ValueError: fewer than `n` items are left to draw from (with the funnel), or a function does not return one
            value for each item.
    """
    if n < 1:
        raise ValueError(f"select must choose at least one item, not {n}")
    left = list(range(len(pool)))
    stages: list[Stage] = []

    def keep(name: str, good: Sequence[bool]) -> None:
        nonlocal left
        if len(good) != len(left):
            raise ValueError(f"{name!r} gave {len(good)} verdicts on {len(left)} items: one each is needed")
        before, left = len(left), [i for i, kept in zip(left, good, strict=True) if kept]
        stages.append(Stage(name, before - len(left), len(left)))

    for name, good in (quality or {}).items():
        keep(name, [bool(good(pool[i])) for i in left])
    if test:
        parts = [contaminated([getattr(pool[i], part) for i in left], test) for part in ("prompt", "chain")]
        keep("shares no 8 words with a test item", [not any(found) for found in zip(*parts, strict=True)])
    for name, solves in (difficulty or {}).items():
        keep(f"not solved by {name}", [not solved for solved in solves([pool[i] for i in left])])
    items = [pool[i] for i in left]
    if len(items) < n:
        raise ValueError(f"{n} items were asked for, but {len(items)} are left:\n{Funnel(len(pool), tuple(stages))}")
    labels = [item.domain for item in items] if domains is None else list(domains(items))
    if len(labels) != len(items):
        raise ValueError(f"domains gave {len(labels)} labels for {len(items)} items: one each is needed")
    lengths = [float(len(item.chain.split()) if length is None else length(item)) for item in items]
    drawn = sample(labels, lengths, n, weights=weights, uniform_first=uniform_first, seed=seed)
    stages.append(Stage(f"drawn over {len(set(labels))} domains", len(items) - n, n))
    indices = tuple(left[i] for i in drawn)
    return Selection(tuple(pool[i] for i in indices), indices, Funnel(len(pool), tuple(stages)))


def sample(
    domains: Sequence[str],
    lengths: Sequence[float],
    n: int,
    *,
    weights: Mapping[str, float] | None = None,
    uniform_first: int = 0,
    seed: int = 0,
) -> list[int]:
    """Draw `n` items without replacement: first a domain, then one of its items, the longer the likelier.

        P(domain d) = 1 / number of domains that have items left        (the paper)
        P(domain d) = w_d / sum of w over those domains                 (`weights`, from draw `uniform_first` on)
        P(item | d) = 2^-rank / sum over the items left in d            rank 0 = the longest of those left

    Ranks are counted anew after each draw. Of equally long items the earlier has the lower rank. The paper says that
    domains are uniform; its code draws the last 300 of 1,000 by weights, which is `uniform_first=700`.

    Args:
        domains: the domain of each item.
        lengths: the length of each item's chain, in any unit.
        n: the number of draws.
        weights: the weight of each domain. By default domains are uniform.
        uniform_first: the number of draws at the start that do not use `weights`.
        seed: seeds the draws.

    Returns:
        The numbers of the drawn items, in the order of the draws.

    Raises:
        ValueError: fewer than `n` items, or weights that are negative, missing for a domain, or 0 for all domains with
            items left.
    """
    if len(domains) != len(lengths):
        raise ValueError(f"{len(domains)} domains and {len(lengths)} lengths: each item needs one of both")
    if n > len(domains):
        raise ValueError(f"{n} items cannot be drawn of {len(domains)} without replacement")
    if weights is not None:
        if missing := sorted(set(domains) - set(weights)):
            raise ValueError(f"weights has no entry for domain {missing[0]!r}")
        if min(weights.values()) < 0:
            raise ValueError("weights of domains must not be negative")
    left: dict[str, list[int]] = {name: [] for name in sorted(set(domains))}
    for i in sorted(range(len(domains)), key=lambda i: -lengths[i]):  # stable: the earlier of equals comes first
        left[domains[i]].append(i)
    rng = np.random.default_rng(seed)
    drawn: list[int] = []
    while len(drawn) < n:
        names = [name for name, items in left.items() if items]
        weighted = weights is not None and len(drawn) >= uniform_first
        shares = np.array([weights[name] if weights is not None and weighted else 1.0 for name in names])
        if not shares.sum() > 0:
            raise ValueError(f"after {len(drawn)} draws only domains of weight 0 have items left: {', '.join(names)}")
        items = left[names[rng.choice(len(names), p=shares / shares.sum())]]
        ranks = 0.5 ** np.arange(len(items))
        drawn.append(items.pop(rng.choice(len(items), p=ranks / ranks.sum())))
    return drawn
