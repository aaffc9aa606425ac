"""The tasks of the comparison and of the sequence: what is taught, and how many of the held-out items come out right.

Training, validation and test items are disjoint. Each is read the same way for every method: a choice by summed
log-likelihood, a chain by what the model writes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lay_a_trail import complete
from tasks import make_items, read_answer

import tokenpaths as tp
from benchmarks.common.folders import DATA
from benchmarks.common.reading import correct
from benchmarks.common.texts import UNSEEN, texts
from tokenpaths.data import Choice
from tokenpaths.data.items import spaced
from tokenpaths.lab.forgetting import trec, trec_pairs

VALIDATION, TEST = 150, 200


@dataclass(frozen=True)
class Chosen:
    """Items of which the right option is to be the likeliest."""

    items: Sequence[Choice]

    def right(self, model: Any, tokenizer: Any) -> list[float]:
        return correct(model, tokenizer, self.items)


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
    """What is taught and tested. `guess` is the accuracy of one who does not read: the commonest answer, or a draw."""

    name: str
    train: Sequence[tuple[str, str]]
    validation: Chosen | Written
    test: Chosen | Written
    guess: float
    steps: int


def question_kinds() -> Task:
    """TREC-6: which of six kinds of thing a question asks for."""
    pairs, test = trec_pairs(DATA), trec(DATA, TEST).items
    answers = test[0].options
    held = [pairs[i] for i in spaced(range(len(pairs)), VALIDATION)]
    validation = [Choice(answers, answers.index(answer), prompt) for prompt, answer in held]
    asked = {prompt for prompt, _ in held}  # some questions are asked twice
    rights = [item.right for item in test]
    guess = max(map(rights.count, rights)) / len(rights)
    return Task("trec", [pair for pair in pairs if pair[0] not in asked], Chosen(validation), Chosen(test), guess, 60)


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
    whole, rng = texts(), random.Random(0)
    answers = tuple(f" {kind}" for kind in UNSEEN)
    items: dict[str, list[Choice]] = {"train": [], "test": []}
    for number, kind in enumerate(UNSEEN):
        words = whole[kind].split()
        half = len(words) // 2
        for part, (low, high) in {"train": (0, half), "test": (half, len(words))}.items():
            for start in rng.sample(range(low, high - 12), 200 if part == "train" else 60):
                prompt = f"Text: {' '.join(words[start : start + 12])}\nKind:"
                items[part].append(Choice(answers, number, prompt))
    for part in items.values():
        rng.shuffle(part)
    return asked_apart("text kinds", [*items["train"], *items["test"]], (1000, 1100), 0.2)


def larger() -> Task:
    """The larger of two numbers of three digits."""
    rng = random.Random(0)
    seen: dict[tuple[int, int], None] = {}
    while len(seen) < 1000:
        a, b = rng.sample(range(100, 1000), 2)
        seen[a, b] = None
    items = [Choice((f" {a}", f" {b}"), int(b > a), f"Numbers: {a} and {b}\nLarger:") for a, b in seen]
    return asked_apart("larger", items, (700, 850), 0.5)


def colours() -> Task:
    """What colour a thing was said to have, in a list of six."""
    rng = random.Random(0)
    things = "cup door hat car ball box chair lamp book coat shoe bag".split()
    names = tuple(" red, blue, green, black, white, brown, pink, grey".split(","))
    items: list[Choice] = []
    for _ in range(1000):
        held = rng.sample(things, 6)
        said = {thing: rng.randrange(len(names)) for thing in held}
        wanted = rng.choice(held)
        told = ", ".join(f"{thing}{names[said[thing]]}" for thing in held)
        items.append(Choice(names, said[wanted], f"List: {told}\nColour of {wanted}:"))
    return asked_apart("colours", items, (700, 850), 1 / 8)


def asked_apart(name: str, items: Sequence[Choice], borders: tuple[int, int], guess: float) -> Task:
    """A task of 40 steps from items in this order: those of training, of validation, and of test."""
    taught, tested = borders
    train = [(item.prompt, item.options[item.right]) for item in items[:taught]]
    return Task(name, train, Chosen(items[taught:tested]), Chosen(items[tested:]), guess, 40)


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
