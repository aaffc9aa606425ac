r"""The demo's task: follow links in a shuffled list. Made procedurally, with the standard library alone.

A question lists who hands the parcel to whom, in random order, then names a starting person. The answer is the person
who holds it in the end::

    question   " Sam Ted. Tom Alice. Ann Luke. Alice Mark. Luke Rose. Ray Sam.\n Tom"
    chain      " Alice Mark."       one look-up in the list at a time
    answer     " Mark."             all look-ups at once

**Why the chain can help.** Each of its steps copies the word that follows the last one in the list, which a small
frozen model almost does; the answer alone needs two to five such look-ups in one forward pass.

**Shortcuts.** Each item holds three separate paths and asks for the end of one that is drawn uniformly. Someone who
only finds the people who hand nothing on, and picks one of them, is right a third of the time: `GUESS`, the score to
beat beside the majority answer. People are drawn afresh for every item, so no answer is favoured.

**Disjoint by construction.** The set of an item's paths is hashed (crc32 of the sorted paths, the same everywhere). One
set in four is reserved for held-out items and the rest for training, so no held-out set of paths is seen in training,
whatever the order of its links or its start; single links do recur. Longer items have more links and longer paths than
any training item.

All items of one kind have the same number of words, and each word is one token for SmolLM2: no batch needs padding.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

PEOPLE = (
    "Ann Bob Dan Tom Sam Max Kim Ben Ray Jim Mary John Jack Paul Mark Luke Rose Jane Adam Alice Carl Nick Alex Peter "
    "Leo Amy Meg Pam Sue Ron Ted Roy"
).split()
HOPS = (3, 3, 2)
"""Length of each path of a training or held-out item."""
LONGER_HOPS = (5, 4, 4)
"""Length of each path of a longer item: every one beyond all of `HOPS`."""
GUESS = 1 / 3
"""Expected accuracy of naming the end of any path."""
_RESERVED = 4  # one set of paths in four is held out


@dataclass(frozen=True)
class Item:
    """One question; `chain` and `answer` are what the two ways of teaching append to it, leading space included."""

    question: str
    chain: str
    answer: str


def make_items(n: int, seed: int, *, held_out: bool = False, hops: Sequence[int] = HOPS) -> list[Item]:
    """`n` distinct items. The same arguments always give the same items; the start is on a random path."""
    if not hops or min(hops) < 1 or sum(hops) + len(hops) > len(PEOPLE):
        raise ValueError(f"hops={tuple(hops)} needs one to {len(PEOPLE)} people in all, and at least 1 hop a path")
    rng = random.Random(f"{seed} {held_out} {tuple(hops)}")
    items: list[Item] = []
    seen: set[int] = set()
    while len(items) < n:
        lengths = rng.sample(list(hops), len(hops))  # the first path is the one asked for
        people = iter(rng.sample(PEOPLE, sum(hops) + len(hops)))
        paths = [[next(people) for _ in range(length + 1)] for length in lengths]
        key = zlib.crc32("|".join(sorted(" ".join(path) for path in paths)).encode())
        if (key % _RESERVED == 0) != held_out or key in seen:
            continue
        seen.add(key)
        links = [link for path in paths for link in pairwise(path)]
        rng.shuffle(links)
        start, *rest = paths[0]
        question = "".join(f" {giver} {taker}." for giver, taker in links) + f"\n {start}"
        items.append(Item(question, "".join(f" {person}" for person in rest) + ".", f" {rest[-1]}."))
    return items


def few_shot_prompt(examples: Sequence[Item], question: str = "") -> str:
    """The examples with their chains, one after another, then the question: what the frozen model is shown."""
    return "".join(f"{item.question}{item.chain}\n" for item in examples) + question


def read_answer(text: str) -> str | None:
    """The last person named before the first full stop of a continuation; None if that is not a person."""
    words = text.split(".", 1)[0].split()
    return words[-1] if words and words[-1] in PEOPLE else None


def majority_accuracy(train: Sequence[Item], test: Sequence[Item]) -> float:
    """Accuracy of always giving the commonest answer of `train`."""
    answers = [item.answer for item in train]
    commonest = max(sorted(set(answers)), key=answers.count)
    return sum(item.answer == commonest for item in test) / len(test)
