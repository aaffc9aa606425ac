"""The tasks of compare.py and sequence.py: what is taught, and how many of the held-out items come out right.

Training, validation and test items are disjoint. Each is read the same way for every method: a choice by summed
log-likelihood, a chain by what the model writes.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _evaluate import TREC_ANSWERS, spaced
from _texts import texts

import tokenpaths as tp
from tokenpaths.data import Choice
from tokenpaths.engine.likelihood import encode_choices, log_likelihoods, right
from tokenpaths.lab.forgetting import trec, trec_pairs

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from lay_a_trail import complete
from tasks import make_items, read_answer

DATA = Path(os.environ.get("TOKENPATHS_DATA", Path(__file__).parents[2] / "shared/data"))
VALIDATION, TEST = 150, 200


@dataclass(frozen=True)
class Chosen:
    """Items of which the right option is to be the likeliest: (prompt, options, right)."""

    items: Sequence[tuple[str, Sequence[str], int]]

    def right(self, model: Any, tokenizer: Any) -> list[float]:
        return correct(model, tokenizer, [Choice(tuple(o), right, prompt) for prompt, o, right in self.items])


def correct(model: Any, tokenizer: Any, items: Sequence[Choice]) -> list[float]:
    """1 for each item whose right option has the largest summed log-likelihood, 1/k where k options have it, else 0."""
    return right(log_likelihoods(model, encode_choices(items, tokenizer), 1500), items).tolist()


@dataclass(frozen=True)
class Written:
    """Items whose answer is read from what the model writes: (prompt, text with the right answer)."""

    items: Sequence[tuple[str, str]]
    read: Callable[[str], Any]

    def right(self, model: Any, tokenizer: Any) -> list[float]:
        said = complete(model, tokenizer, [prompt for prompt, _ in self.items], batch=50)
        return [float(self.read(text) == self.read(wanted)) for text, (_, wanted) in zip(said, self.items, strict=True)]


@dataclass(frozen=True)
class Task:
    """`guess` is the accuracy of someone who does not read: the commonest right answer, or a blind choice."""

    name: str
    train: Sequence[tuple[str, str]]
    validation: Chosen | Written
    test: Chosen | Written
    guess: float
    steps: int


def question_kinds() -> Task:
    """TREC-6: which of six kinds of thing a question asks for."""
    pairs, answers = trec_pairs(DATA), list(TREC_ANSWERS.values())
    held = set(spaced(range(len(pairs)), VALIDATION))
    validation = [(pairs[i][0], answers, answers.index(pairs[i][1])) for i in sorted(held)]
    test = [(item.prompt, item.options, item.right) for item in trec(DATA, TEST).items]
    asked = {prompt for prompt, _, _ in validation}  # some questions are asked twice
    train = [pair for pair in pairs if pair[0] not in asked]
    rights = [right for _, _, right in test]
    guess = max(map(rights.count, rights)) / len(rights)
    return Task("trec", train, Chosen(validation), Chosen(test), guess, 60)


def links() -> Task:
    """The demo's chains: follow links in a shuffled list, one look-up at a time."""
    taught = make_items(640 + VALIDATION // 2, 0)
    train, validation = taught[:640], taught[640:]
    test = make_items(TEST // 2, 0, held_out=True)
    pairs = [[(item.question, item.chain) for item in items] for items in (train, validation, test)]
    return Task("links", pairs[0], Written(pairs[1], read_answer), Written(pairs[2], read_answer), 1 / 3, 40)


# Three more, which only the sequence of five uses


def text_kinds() -> Task:
    """Which kind of text a line is from. The halves of each text are for training and for test."""
    found = {kind: text for kind, text in texts(DATA).items() if kind != "wikitext2"}
    answers = [f" {kind}" for kind in found]
    rng = random.Random(0)
    items: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    for number, text in enumerate(found.values()):
        words = text.split()
        half = len(words) // 2
        for part, (low, high) in {"train": (0, half), "test": (half, len(words))}.items():
            for start in rng.sample(range(low, high - 12), 200 if part == "train" else 60):
                items[part].append((f"Text: {' '.join(words[start : start + 12])}\nKind:", number))
    for part in items.values():
        rng.shuffle(part)
    train = [(prompt, answers[right]) for prompt, right in items["train"]]
    tested = [(prompt, answers, right) for prompt, right in items["test"]]
    return Task("text kinds", train, Chosen(tested[:100]), Chosen(tested[100:]), 0.2, 40)


def larger() -> Task:
    """The larger of two numbers of three digits."""
    rng = random.Random(0)
    seen: dict[tuple[int, int], None] = {}
    while len(seen) < 1000:
        a, b = rng.sample(range(100, 1000), 2)
        seen[a, b] = None
    asked = [(f"Numbers: {a} and {b}\nLarger:", (f" {a}", f" {b}"), int(b > a)) for a, b in seen]
    train = [(prompt, options[right]) for prompt, options, right in asked[:700]]
    return Task("larger", train, Chosen(asked[700:850]), Chosen(asked[850:]), 0.5, 40)


def colours() -> Task:
    """What colour a thing was said to have, in a list of six."""
    rng = random.Random(0)
    things = "cup door hat car ball box chair lamp book coat shoe bag".split()
    names = " red, blue, green, black, white, brown, pink, grey".split(",")
    asked: list[tuple[str, Sequence[str], int]] = []
    for _ in range(1000):
        held = rng.sample(things, 6)
        said = {thing: rng.randrange(len(names)) for thing in held}
        wanted = rng.choice(held)
        told = ", ".join(f"{thing}{names[said[thing]]}" for thing in held)
        asked.append((f"List: {told}\nColour of {wanted}:", names, said[wanted]))
    train = [(prompt, options[right]) for prompt, options, right in asked[:700]]
    return Task("colours", train, Chosen(asked[700:850]), Chosen(asked[850:]), 1 / 8, 40)


MADE: dict[str, Callable[[], Task]] = {
    "trec": question_kinds,
    "links": links,
    "text kinds": text_kinds,
    "larger": larger,
    "colours": colours,
}
COMPARED = ("trec", "links")


def examples(tokenizer: Any, task: Task) -> list[tp.Example]:
    return tp.encode(list(task.train), tokenizer, eos=False)
