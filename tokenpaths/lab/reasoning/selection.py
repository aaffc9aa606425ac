"""A few items worth learning from: quality, difficulty and diversity (s1, Muennighoff et al. 2025, section 2).

    chosen = select(
        pool,
        100,
        quality={"has a trace": lambda p: bool(p.trace)},
        test=test_questions,
        difficulty={"SmolLM2": lambda items: solved_by_generation(model, tokenizer, items, read)},
        domains=lambda items: clusters(model, tokenizer, [p.question for p in items], 20),
    )
    print(chosen.funnel)        # how many each step left over
    pairs = [(p.question, p.trace) for p in chosen.items]

Each stage is a plain function that can be called by itself: `contaminated`, `solved_by_generation`,
`solved_by_likelihood`, `clusters` and `sample`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeAlias

import numpy as np

from tokenpaths.files import write_text


@dataclass(frozen=True)
class Problem:
    """An item of a pool: a question, the trace that a teacher wrote (its thinking and its answer), and what is known.

    `answer` is what `solved_by_generation` compares with, `options` make it a multiple choice that holds the answer,
    and `domain` is the field it belongs to.
    """

    question: str
    trace: str
    answer: str = ""
    domain: str = ""
    options: tuple[str, ...] = ()


Verdicts: TypeAlias = Callable[[Sequence[Problem]], Sequence[bool]]
Labels: TypeAlias = Callable[[Sequence[Problem]], Sequence[str]]


@dataclass(frozen=True)
class Step:
    """A step of a selection: why items were dropped, how many were, and how many were left."""

    name: str
    dropped: int
    left: int


@dataclass(frozen=True)
class Funnel:
    """How a pool of so many items became a selection."""

    pool: int
    steps: tuple[Step, ...]

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON file, whole or not at all."""
        write_text(path, json.dumps(asdict(self), indent=1, ensure_ascii=False))

    def __str__(self) -> str:
        rows = [("the pool", "", self.pool), *((s.name, f"-{s.dropped}", s.left) for s in self.steps)]
        width = max(len(name) for name, _, _ in rows)
        return "\n".join(f"{name:{width}}  {dropped:>8}  {left:>8}" for name, dropped, left in rows)


@dataclass(frozen=True)
class Selection:
    """The chosen items in the order in which they were drawn, where they stand in the pool, and the funnel."""

    items: tuple[Problem, ...]
    indices: tuple[int, ...]
    funnel: Funnel


def select(
    pool: Sequence[Problem],
    n: int,
    *,
    quality: Mapping[str, Callable[[Problem], bool]] | None = None,
    test: Sequence[str] = (),
    difficulty: Mapping[str, Verdicts] | None = None,
    domains: Labels | None = None,
    length: Callable[[Problem], float] | None = None,
    weights: Mapping[str, float] | None = None,
    uniform_first: int = 0,
    seed: int = 0,
) -> Selection:
    """Choose `n` items of a pool. Every step reads only what the steps before it have left over.

    Args:
        pool: what there is to choose from.
        n: how many items to choose.
        quality: predicates by name; an item that fails one is dropped.
        test: texts that are tested on; an item whose question or trace is `contaminated` by one is dropped.
        difficulty: by the name of a model, a function that tells which items it solves; these are dropped.
        domains: a function that labels the items; without it their own `domain` is taken.
        length: of a trace, for the preference of long ones; without it the number of words.
        weights: of the domains, as `sample` takes them.
        uniform_first: so many draws take domains uniformly all the same, as `sample` does.
        seed: of the draws.

    Raises:
        ValueError: fewer than `n` items are left to draw from (with the funnel), or a function that does not return one
            value for each item.
    """
    if n < 1:
        raise ValueError(f"select must choose at least one item, not {n}")
    left = list(range(len(pool)))
    steps: list[Step] = []

    def keep(name: str, good: Sequence[bool]) -> None:
        nonlocal left
        if len(good) != len(left):
            raise ValueError(f"{name!r} gave {len(good)} verdicts on {len(left)} items: one each is needed")
        before, left = len(left), [i for i, kept in zip(left, good, strict=True) if kept]
        steps.append(Step(name, before - len(left), len(left)))

    for name, good in (quality or {}).items():
        keep(name, [bool(good(pool[i])) for i in left])
    if test:
        parts = [contaminated([getattr(pool[i], part) for i in left], test) for part in ("question", "trace")]
        keep("shares no 8 words with a test item", [not any(found) for found in zip(*parts, strict=True)])
    for name, solves in (difficulty or {}).items():
        keep(f"not solved by {name}", [not solved for solved in solves([pool[i] for i in left])])
    items = [pool[i] for i in left]
    if len(items) < n:
        raise ValueError(f"{n} items were asked for, but {len(items)} are left:\n{Funnel(len(pool), tuple(steps))}")
    labels = [p.domain for p in items] if domains is None else list(domains(items))
    if len(labels) != len(items):
        raise ValueError(f"domains gave {len(labels)} labels for {len(items)} items: one each is needed")
    lengths = [float(len(p.trace.split()) if length is None else length(p)) for p in items]
    drawn = sample(labels, lengths, n, weights=weights, uniform_first=uniform_first, seed=seed)
    steps.append(Step(f"drawn over {len(set(labels))} domains", len(items) - n, n))
    indices = tuple(left[i] for i in drawn)
    return Selection(tuple(pool[i] for i in indices), indices, Funnel(len(pool), tuple(steps)))


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

    Ranks are counted anew after each draw; of equally long items the earlier has the lower rank. The paper says that
    domains are uniform; its code draws the last 300 of 1,000 by weights, which is `uniform_first=700`.

    Returns the indices of the drawn items, in order.

    Raises:
        ValueError: too few items, or weights that are negative, missing for a domain, or 0 for all domains with items
            left.
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


def contaminated(texts: Sequence[str], test: Sequence[str], *, words: int = 8) -> list[bool]:
    """Which texts share `words` consecutive words with a test text (of a shorter test text: hold the whole of it).

    Words are what stands between white space, in any case (`str.casefold`); punctuation belongs to its word.

    Raises `ValueError` for a test text without words.
    """
    grams: dict[int, set[tuple[str, ...]]] = {}
    for number, text in enumerate(test):
        split = _words(text)
        if not split:
            raise ValueError(f"test text {number} has no words: {text!r:.40}")
        size = min(words, len(split))
        grams.setdefault(size, set()).update(_grams(split, size))
    return [any(not found.isdisjoint(_grams(_words(text), size)) for size, found in grams.items()) for text in texts]


def _words(text: str) -> list[str]:
    return text.casefold().split()


def _grams(words: list[str], size: int) -> set[tuple[str, ...]]:
    return set(zip(*(words[i:] for i in range(size)), strict=False))
