"""One task in many words, other asks of the same texts, and prompts and texts far from it.

    items, mine, theirs = TASKS["trec"](), own("trec"), by_others("trec")
    mine.forms["trained"].prompt(items.fit[0])

The forms and asks in `data/` were written for this by two hands, of which the second had not seen those of the first.
Those of promptsource and FLAN, and sixteen asks more, stand in the data folder.
"""

from __future__ import annotations

import io
import json
import random
import re
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks import PEOPLE, make_items

from benchmarks.common.folders import DATA, KEPT
from benchmarks.common.texts import Source, fetch, texts
from benchmarks.compare.tasks import colours, larger
from benchmarks.retention.parts import OTHERS
from tokenpaths.lab.forgetting import trec, trec_pairs

HERE = Path(__file__).parent / "data"
HANDS = ("mine", "a", "b", "c", "theirs")
TRAINED = "mine: trained"
RENAMED = "renamed"  # the trained form of links, with names that nobody was taught
PARTS = ("fit", "test")
FITTED, SHOWN, TESTED = 24, 120, 24  # prompts of a form: for a gate, of the trained form to be tested, of others


@dataclass(frozen=True)
class Item:
    """What stands in a wording, and the number of the right answer; or the answer, where it is the same in all."""

    fields: Mapping[str, str]
    right: int = 0
    answer: str = ""


@dataclass(frozen=True)
class Wording:
    """A form of the task, or another ask: how an item is put into words."""

    name: str
    template: str
    answers: tuple[str, ...] = ()
    options: str = ""

    def prompt(self, item: Item) -> str:
        return self.template.format(**item.fields, options=self.options)

    def answer(self, item: Item) -> str:
        return item.answer or self.answers[item.right]


@dataclass(frozen=True)
class Wordings:
    """Forms and asks by name."""

    forms: dict[str, Wording]
    asks: dict[str, Wording]


@dataclass(frozen=True)
class Items:
    """A task's items, each part disjoint from the others. `train` teaches the adapter."""

    train: Sequence[Item]
    fit: Sequence[Item]
    test: Sequence[Item]


def wordings(task: str) -> Wordings:
    """The forms and asks of all hands, by names such as "mine: trained"."""
    found = Wordings({}, {})
    for hand in HANDS:
        some = by_others(task) if hand == "theirs" else own(task, "" if hand == "mine" else f"_{hand}")
        for whole, part in ((found.forms, some.forms), (found.asks, some.asks)):
            whole |= {f"{hand}: {name}": one for name, one in part.items() if hand == "mine" or name != "trained"}
    return found


def own(task: str, hand: str = "") -> Wordings:
    """The forms and asks in `data/`, written for this; those of "_a" and "_c" by hands that had not seen the first."""
    path = HERE / f"{task}{hand}.json"
    told = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"forms": [], "asks": []}
    return Wordings(*({one["name"]: _wording(one) for one in told[kind]} for kind in ("forms", "asks")))


def by_others(task: str) -> Wordings:
    """Forms of promptsource and FLAN (TREC alone), and sixteen asks about a text."""
    asks = json.loads((DATA / "forms/forms_neighbours.json").read_text(encoding="utf-8"))
    forms = json.loads((DATA / "forms/forms_trec.json").read_text(encoding="utf-8")) if task == "trec" else []
    word = {"trec": "Question", "sentiment": "Review", "links": "List"}[task]
    asked = [_wording({**ask, "template": ask["template"].replace("Review", word)}) for ask in asks]
    return Wordings({form["name"]: _reordered(_wording(form)) for form in forms}, {ask.name: ask for ask in asked})


def _wording(told: Mapping[str, Any]) -> Wording:
    keys = ("name", "template", "options")
    answers = tuple(spaced(str(answer), told["template"]) for answer in told.get("answers", ()))
    return Wording(**{key: told[key] for key in keys if key in told}, answers=answers)


def spaced(answer: str, template: str) -> str:
    """An answer stands behind a space, unless the template ends in what it follows at once."""
    return answer if answer[:1].isspace() or template[-1:] in "\n([{\"'`*_>#" else f" {answer}"


def _reordered(form: Wording) -> Wording:
    """promptsource and FLAN have the description before the entity."""
    a, d, e, *rest = form.answers
    return Wording(form.name, form.template, (a, e, d, *rest), options=form.options)


# The tasks


def _parted(items: list[Item], sizes: Mapping[str, int], test: Sequence[Item] = ()) -> Items:
    parts: dict[str, Sequence[Item]] = {}
    for part in PARTS:
        parts[part], items = (
            (test[: sizes[part]], items) if part == "test" and test else (items[: sizes[part]], items[sizes[part] :])
        )
    return Items(train=items, **parts)


SIZES = {"fit": 200, "test": 200}


def question_kinds() -> Items:
    """TREC-6."""
    chosen = trec(DATA, 490).items
    order = [option.strip() for option in chosen[0].options]
    known = [(prompt, order.index(answer.strip())) for prompt, answer in trec_pairs(DATA)]
    tested = [(item.prompt, item.right) for item in chosen]
    wanted = ("abbreviation", "entity", "description", "person", "location", "number")

    def item(prompt: str, right: int) -> Item:
        text = prompt.removeprefix("Question: ").removesuffix("\nAnswer type:")
        return Item({"text": text}, wanted.index(order[right]))

    taught = [item(*pair) for pair in dict.fromkeys(known)]
    random.Random(0).shuffle(taught)
    test = [item(*pair) for pair in tested]
    random.Random(0).shuffle(test)
    return _parted(taught, SIZES, test)


REVIEWS = Source("vaderSentiment", "3.3.2", "hutto_ICWSM_2014.tar.gz", lambda files: "", sdist=True)


def sentiment() -> Items:
    """Snippets of film reviews, which twenty readers rated at 1 of 4 or more, or below -1 (Hutto and Gilbert 2014)."""
    archive = fetch(REVIEWS, KEPT / "texts")
    with tarfile.open(archive) as outer:
        (name,) = [name for name in outer.getnames() if name.endswith(REVIEWS.files)]
        inner = outer.extractfile(name)
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as files:
            file = files.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            assert file is not None
            lines = file.read().decode("latin-1").splitlines()
    rated = [line.split("\t") for line in lines]
    items = [
        Item({"text": text.strip()}, int(float(score) > 0))
        for _, score, text in rated
        if abs(float(score)) >= 1 and 5 <= len(text.split()) <= 30
    ]
    random.Random(0).shuffle(items)
    kept = {0: 0, 1: 0}
    least = min(sum(item.right == right for item in items) for right in kept)
    balanced: list[Item] = []
    for one in items:
        kept[one.right] += 1
        if kept[one.right] <= least:
            balanced.append(one)
    return _parted(balanced, SIZES)


def links() -> Items:
    """The demo's chains: follow links in a shuffled list."""

    def item(made: Any) -> Item:
        told, start = made.question.rsplit("\n ", 1)
        return Item({"links": told, "start": start, "text": made.question.strip()}, answer=made.chain)

    taught, test = make_items(1200, 0), make_items(SIZES["test"], 0, held_out=True)
    return _parted([item(one) for one in taught], SIZES, [item(one) for one in test])


def renamed(item: Item) -> Item:
    """An item of links with other names, each one token as well."""
    names = dict(zip(PEOPLE, OTHERS["renamed"].split(), strict=True))

    def put(text: str) -> str:
        return re.sub(r"[A-Z][a-z]+", lambda found: names[found.group()], text)

    return Item({key: put(text) for key, text in item.fields.items()}, answer=put(item.answer))


TASKS: dict[str, Callable[[], Items]] = {"trec": question_kinds, "sentiment": sentiment, "links": links}


# Far from them


def far_known(count: int) -> dict[str, list[str]]:
    """Kinds of prompts and texts that a user would have at hand: for fitting."""
    valid = [line.strip() for line in (DATA / "wikitext2/valid.txt").read_text(encoding="utf-8").split("\n")]
    paragraphs = [" ".join(line.split()[:60]) for line in valid if len(line.split()) > 60]
    lines = (DATA / "gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines()
    sums = [json.loads(line)["question"] for line in lines[: 4 * count]]
    pairs = sorted((DATA / "blimp").glob("*.jsonl"))
    good = [json.loads(line)["sentence_good"] for path in pairs for line in path.read_text().splitlines()[:40]]
    return {
        "encyclopedia": _some(paragraphs, count),
        "sums": _some([f"Question: {one}\nAnswer:" for one in sums], count),
        "sentences": _some([f"Sentence: {one}\nIs it acceptable?" for one in good], count),
    }


def far_test(task: str, count: int) -> dict[str, list[str]]:
    """Kinds that no gate has met."""
    whole = texts()
    found = {kind: _stretches(whole[kind], count) for kind in ("fiction", "verse", "code", "dialogue")}
    tasks = [json.loads(line) for line in (DATA / "instruct/seed_tasks.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = [f"{one['instruction']}\n{one['instances'][0]['input']}".strip() for one in tasks]
    found["instructions"] = _some([one for one in asked if len(one.split()) < 80], count)
    (arc,) = (DATA / "arc_easy").glob("*.json*")
    told = json.loads(arc.read_text(encoding="utf-8"))
    found["science"] = _some([one["instruction"] for one in told], count)
    found["numbers"] = _some([prompt for prompt, _ in larger().train], count)
    found["colours"] = _some([prompt for prompt, _ in colours().train], count)
    for other in TASKS:
        if other != task:
            items, forms = TASKS[other]().test, list(own(other).forms.values())
            found[other] = [forms[i % len(forms)].prompt(items[i]) for i in range(count)]
    return found


def _some(given: Sequence[str], count: int) -> list[str]:
    return random.Random(0).sample(list(given), min(count, len(given)))


def _stretches(text: str, count: int, width: int = 40) -> list[str]:
    words = text.split(" ")
    starts = random.Random(0).sample(range(len(words) - width), count)
    return [" ".join(words[start : start + width]) for start in starts]
