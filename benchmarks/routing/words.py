"""The five tasks of `benchmarks/sequence`, each in words that are taught and in others."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.reading import correct
from benchmarks.compare import tasks as plain
from benchmarks.gates import prompts
from benchmarks.gates.adapters import followed
from benchmarks.gates.prompts import Item, Items, Wording, by_others, own, spaced
from tokenpaths.data import Choice

FORMS = Path(__file__).with_name("forms.json")


@dataclass(frozen=True)
class Worded:
    """A task, the words it is taught in, and other words. `options` tells the answers to an item in a form."""

    name: str
    items: Items
    taught: Sequence[Wording]
    unseen: Sequence[Wording]
    steps: int
    options: Callable[[Item, Wording], tuple[str, ...]]

    def pairs(self, items: Sequence[Item], forms: Sequence[Wording]) -> list[tuple[str, str]]:
        """Prompts and answers, the forms by turns."""
        return [(form.prompt(item), self.answer(item, form)) for item, form in _by_turns(items, forms)]

    def answer(self, item: Item, form: Wording) -> str:
        return item.answer or self.options(item, form)[item.right]

    def right(self, model: Any, tokenizer: Any, asked: Sequence[tuple[Item, Wording]]) -> list[float]:
        """Of each item in a form, whether it is answered rightly."""
        if not self.options(*asked[0]):
            return followed(model, tokenizer, [(form.prompt(item), item.answer) for item, form in asked])
        return correct(model, tokenizer, [Choice(self.options(i, f), i.right, f.prompt(i)) for i, f in asked])

    def asked(self, count: int) -> dict[str, list[tuple[Item, Wording]]]:
        """Test items, in words that were taught and in unseen ones."""
        some = self.items.test[:count]
        return {"taught": _by_turns(some, self.taught), "unseen": _by_turns(some, self.unseen)}


def _by_turns(items: Sequence[Item], forms: Sequence[Wording]) -> list[tuple[Item, Wording]]:
    return [(item, forms[i % len(forms)]) for i, item in enumerate(items)]


def worded(name: str) -> Worded:
    if name in ("trec", "links"):
        taught = list(own(name).forms.values())[:8]
        unseen = [form for some in (by_others(name), own(name, "_b"), own(name, "_c")) for form in some.forms.values()]
        return Worded(name, prompts.TASKS[name](), taught, unseen, plain.MADE[name]().steps, _same)
    task = plain.MADE[name]()
    assert isinstance(task.test, plain.Chosen)
    shape, told = SHAPES[name], json.loads(FORMS.read_text(encoding="utf-8"))[name]
    answers = task.test.items[0].options if name != "larger" else ()
    forms = {
        kind: [
            Wording(template, template, tuple(spaced(answer.strip(), template) for answer in answers))
            for template in told[kind]
        ]
        for kind in ("taught", "unseen")
    }
    train = [_item(shape, prompt, answers, answer) for prompt, answer in task.train]
    test = [_item(shape, item.prompt, answers, item.options[item.right]) for item in task.test.items]
    items = Items(train=train[200:], fit=train[:200], test=test)
    return Worded(name, items, forms["taught"], forms["unseen"], task.steps, _numbers if name == "larger" else _same)


SHAPES: Mapping[str, str] = {
    "text kinds": r"Text: (?P<text>.*)\nKind:",
    "larger": r"Numbers: (?P<a>\d+) and (?P<b>\d+)\nLarger:",
    "colours": r"List: (?P<list>.*)\nColour of (?P<thing>\w+):",
}


def _item(shape: str, prompt: str, answers: Sequence[str], answer: str) -> Item:
    """What stands in the plain form of a task."""
    found = re.fullmatch(shape, prompt, re.DOTALL)
    assert found is not None, prompt
    fields = found.groupdict()
    return Item(fields, answers.index(answer) if answers else int(answer.strip() == fields["b"]))


def _same(item: Item, form: Wording) -> tuple[str, ...]:
    return form.answers


def _numbers(item: Item, form: Wording) -> tuple[str, ...]:
    return tuple(spaced(item.fields[key], form.template) for key in "ab")
