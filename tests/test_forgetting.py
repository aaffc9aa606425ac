"""What a model lost: tasks as files, likelihoods and figures by definition, intervals as published."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from subjects import MOVING
from tiny import llama, make_tokenizer
from torch import nn

import tokenpaths as tp
from tokenpaths import Example, forgetting
from tokenpaths.data import Choice, Task, Text, split_texts
from tokenpaths.engine import likelihood as scoring
from tokenpaths.lab.forgetting import Forgetting, Harness, Loss, arc_easy, blimp, trec, trec_pairs, wikitext2
from tokenpaths.report.figures import COLOURS
from tokenpaths.stats import effect, intervals

TEXTS = Task("letters", (Text("The sea."), Text(" is deep.", prompt="The well"), Text("A longer text of some words.")))
CHOICES = Task(
    "cloze",
    (
        Choice((" x", " yy", " zzz"), 1, "Question: q\nAnswer:"),
        Choice((" x", " yy", " zzz"), 0, "Question: qq\nAnswer:"),
        Choice((" x", " yy", " zzz"), 2, "Question: r\nAnswer:"),
    ),
)
PAIRS = Task("pairs", (Choice(("The cat is.", "The cat are."), 0), Choice(("A cow", "A cow is a cow"), 1)))
RULES = {"all": tp.All(), "last": tp.Last(1), "answer": tp.Answer(), "prompt": tp.Prompt(), "none": None}


def model_and_trails(rule: tp.tokens.Rule) -> tuple[Any, tp.TrailMap]:
    model = llama(300).double()
    return model, tp.TrailMap({site: MOVING["LoReFT"](32) for site in tp.sites(model, tokens=rule)}).double().eval()


@torch.no_grad()
def log_probs(model: nn.Module, ids: tuple[int, ...], prompt: int | None) -> torch.Tensor:
    """log p(token t + 1 | all up to t), one text at a time, [n - 1, vocabulary]."""
    mask = {} if prompt is None else {"prompt_mask": torch.arange(len(ids))[None] < prompt}
    return model(input_ids=torch.tensor([ids]), **mask).logits.log_softmax(-1)[0, :-1]


# Tasks as files

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)


OPTIONS = st.lists(TEXT, min_size=2, max_size=4, unique=True)


@settings(max_examples=10)
@given(
    texts=st.lists(st.tuples(TEXT, st.just("") | TEXT), min_size=1, max_size=4),
    choices=st.lists(st.tuples(OPTIONS, st.integers(0, 1), st.just("") | TEXT), min_size=1, max_size=4),
    name=TEXT,
    note=st.just("") | TEXT,
)
def test_a_task_is_what_its_file_says(
    texts: list[Any], choices: list[Any], name: str, note: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("task") / "task.jsonl"
    for items in ([Text(*text) for text in texts], [Choice(tuple(o), right, prompt) for o, right, prompt in choices]):
        task = Task(name, tuple(items), note)
        task.save(path)
        assert Task.load(path) == task
        assert [entry.name for entry in path.parent.iterdir()] == ["task.jsonl"]


HEAD = '{"kind": "choice", "name": "c"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1: the file is empty"),
        ('{"kind": "text"}\n', "line 1: 'name' is missing; the line has kind"),
        ('{"kind": "essay", "name": "e"}\n', "line 1: kind is 'essay', but must be"),
        ('{"kind": "text", "name": "e", "nte": ""}\n', "line 1: 'nte' is no key of this form"),
        ('{"kind": "text", "name": "e"}\n{"text": ""}\n', "line 2: the text is empty"),
        ('{"kind": "text", "name": "e"}\n{"text": 3}\n', "line 2: text must be a string, not 3"),
        ('{"kind": "text", "name": "e"}\n', "line 1: task 'e' must have items"),
        (HEAD + '{"options": ["a", "b"], "right": 2}\n', "line 2: right is 2, but must be the number of one of 2"),
        (HEAD + '{"options": ["a", "b"], "right": true}\n', "line 2: right must be a whole number, not true"),
        (HEAD + '{"options": ["a", "a"], "right": 0}\n', "line 2: a choice needs two options or more, all different"),
        (HEAD + '{"options": "ab", "right": 0}\n', "line 2: options must be a list of strings, not"),
        (HEAD + '{"options": ["a", "b"], "right": 0}\n[1]\n', r"line 3: a line holds a JSON object, not \[1\]"),
        (HEAD + '{"options": ["a", "b"], "right": 0}\n\n', "line 3: Expecting value"),
        (HEAD + '{"options": ["a", "b"], "right": 0, "right": 1}\n', "line 2: a key stands twice in one object"),
    ],
)
def test_a_file_of_another_form_is_refused_by_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        Task.load(path)


def test_trec_drops_what_training_asks(tmp_path: Path) -> None:
    (tmp_path / "trec").mkdir()
    train = "NUM:count How many Os are there ?\nABBR:exp What is BUN ?\nHUM:ind Who wrote `` Fran\xe7oise '' ?\n"
    (tmp_path / "trec/TREC.train").write_bytes(train.encode("latin-1"))
    (tmp_path / "trec/TREC.test").write_text("ABBR:exp What is BUN ?\nLOC:city Where is A: B ?\n")
    (item,) = trec(tmp_path).items
    told = (" abbreviation", " entity", " description", " person", " location", " number")
    assert item == Choice(told, 4, "Question: Where is A: B ?\nAnswer type:")
    assert trec_pairs(tmp_path)[0] == ("Question: How many Os are there ?\nAnswer type:", " number")


def test_arc_easy_is_a_cloze(tmp_path: Path) -> None:
    (tmp_path / "arc_easy").mkdir()
    asked = "Please choose the correct answer to the question: Why?\n\nAnswer1: it is. Answer2: no Answer3: two words"
    item = {"instruction": asked + "\n\nAnswer format: answer1/answer2/answer3", "answer": "answer3"}
    (tmp_path / "arc_easy/test.json").write_text(json.dumps([item]))
    assert arc_easy(tmp_path).items == (Choice((" it is.", " no", " two words"), 2, "Question: Why?\nAnswer:"),)


def test_the_real_data_sets_are_read_whole(data_folder: Path, tmp_path: Path) -> None:
    for task, count in ((trec(data_folder), 490), (arc_easy(data_folder, 300), 300), (blimp(data_folder), 3000)):
        assert len(task.items) == count
        task.save(tmp_path / "task.jsonl")
        assert Task.load(tmp_path / "task.jsonl") == task
    assert len(set(blimp(data_folder, 10).items)) == 10
    wiki = (data_folder / "wikitext2/test.txt").read_text(encoding="utf-8")
    stretches = [item.text for item in wikitext2(data_folder, 5, 400).items]
    places = [wiki.index(stretch) for stretch in stretches]
    assert places == sorted(places)
    for place, stretch in zip(places, stretches, strict=True):
        assert 350 < len(stretch) <= 400
        assert wiki[place - 1].isspace() and wiki[place + len(stretch)].isspace()
    with pytest.raises(ValueError, match="5 stretches of 4000000 characters do not fit"):
        wikitext2(data_folder, 5, 4_000_000)
    with pytest.raises(ValueError, match="4000 of 3000 items"):
        blimp(data_folder, 4000)


# Likelihoods


def by_definition(model: nn.Module, example: Example, rule: tp.tokens.Rule | None) -> float:
    logs = log_probs(model, example.ids, None if rule is None else example.prompt_length)
    start = example.prompt_length if any(example.answer) else 1
    return sum(float(logs[t - 1, example.ids[t]]) for t in range(start, len(example)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_options_score_by_the_definition(
    family: str, rule: tp.tokens.Rule | None, watch: Callable[[nn.Module], nn.Module]
) -> None:
    """Behind one cached prompt, or, in a model whose cache slides, without."""
    model = watch(FAMILIES[family].make().double().eval())
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 96, (n,), generator=generator).tolist())

    items: list[tuple[Example, ...]] = []
    for length, answers in [(5, (1, 1)), (5, (3, 1, 2)), (2, (1, 3))]:
        prompt = draw(length)
        masks = [(False,) * length + (True,) * n for n in answers]
        items.append(tuple(Example((*prompt, *draw(len(m) - length)), m) for m in masks))
        items.append(tuple(Example((9, *draw(n)), (False,) * (n + 1)) for n in answers))
    trails = tp.TrailMap({site: MOVING["LoReFT"](32) for site in tp.sites(model, tokens=rule or tp.All())})
    with nullcontext() if rule is None else tp.attach(model, trails.double().eval()):
        found = scoring.log_likelihoods(model, items, max_batch_tokens=1 if family == "gpt2" else 30)
        expected = [[by_definition(model, option, rule) for option in options] for options in items]
    for row, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(row, wanted, rtol=1e-9)


def test_a_prompt_is_run_once_for_all_its_options() -> None:
    model = llama(300)
    tokenizer = make_tokenizer()
    seen: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    encoded = scoring.encode_choices([CHOICES.items[0]], tokenizer)
    scoring.log_likelihoods(model, encoded, 1500)
    handle.remove()
    assert seen == [encoded[0][0].prompt_length, 1, 2, 3]  # of each option all tokens but the last


def test_equal_options_share_the_point() -> None:
    """A model that finds all alike must not be right wherever the right option comes first."""
    items = [Choice(("a", "b", "c"), 0), Choice(("a", "b", "c"), 2), Choice(("a", "b", "c"), 1)]
    scores = [np.array([-1.0, -1.0, -2.0]), np.array([-3.0, -3.0, -3.0]), np.array([-1.0, -2.0, -3.0])]
    assert scoring.right(scores, items).tolist() == [0.5, 1 / 3, 0.0]


def test_sentences_that_begin_differently_are_refused_unless_something_stands_before_them() -> None:
    model, trails = model_and_trails(tp.All())
    task = Task("minimal", (Choice(("He is", "They is"), 0),))
    with pytest.raises(ValueError, match="task 'minimal': item 0: its sentences begin with different tokens"):
        forgetting(model, trails, [task], make_tokenizer())
    assert forgetting(model, trails, [task], make_tokenizer(bos=True))["minimal", "accuracy"].items == 1


# Figures


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("rule", [tp.All(), tp.Last(1), tp.Answer()], ids=["all", "last", "answer"])
@pytest.mark.parametrize("splits", [0, 1, 3])
def test_texts_are_measured_by_the_definition(bos: bool, rule: tp.tokens.Rule, splits: int) -> None:
    """A text without a prompt: one that is prompt throughout, or split, each split counting as a text of its own."""
    model, trails = model_and_trails(rule)
    tokenizer = make_tokenizer(bos=bos)
    found = forgetting(model, trails, [TEXTS], tokenizer, max_batch_tokens=40, splits=splits)
    before, after, kl, count, size = 0.0, 0.0, 0.0, 0, 0
    changes: list[float] = []
    for item in TEXTS.items:
        assert isinstance(item, Text)
        start = tokenizer(item.prompt or item.text)["input_ids"]
        ids = (
            tuple(start) if not item.prompt else (*start, *tokenizer(item.text, add_special_tokens=False)["input_ids"])
        )
        ends = [(len(start), len(start) if item.prompt else 1)]  # of the prompt, and the first token that is scored
        if splits and not item.prompt:
            places = [part.prompt_length for part in split_texts([item.text], tokenizer, splits)]
            assert len(places) == splits and places == sorted(set(places))
            ends = [(place, place) for place in places]
        for prompt, first in ends:
            p = log_probs(model, ids, None)[first - 1 :]
            with tp.attach(model, trails):
                q = log_probs(model, ids, prompt)[first - 1 :]
            told = torch.tensor(ids[first:])[:, None]
            before -= float(p.gather(1, told).sum())
            after -= float(q.gather(1, told).sum())
            changes.append(float((p - q).gather(1, told).sum()))
            kl += float((p.exp() * (p - q)).sum())
            count += len(told)
            size += len(item.text) - (0 if item.prompt else first - bos)
    for measure, x, y, n in (
        ("nats a token", before, after, count),
        ("bits a byte", before, after, size * math.log(2)),
        ("KL to frozen", 0.0, kl, count),
    ):
        loss = found["letters", measure]
        assert (loss.before, loss.after) == pytest.approx((x / n, y / n), rel=1e-9, abs=1e-12)
        assert loss.change == pytest.approx((y - x) / n, rel=1e-9, abs=1e-12)
        assert loss.interval[0] <= loss.change <= loss.interval[1]
    assert found["letters", "KL to frozen"].after > (1e-3 if splits or rule != tp.Answer() else 0)


def test_accuracies_are_paired_by_item() -> None:
    model, trails = model_and_trails(tp.All())
    tokenizer = make_tokenizer()
    found = forgetting(model, trails, [CHOICES, PAIRS], tokenizer)
    for task in (CHOICES, PAIRS):
        encoded = scoring.encode_choices(task.items, tokenizer)
        wanted: list[np.ndarray] = []
        for attached in (False, True):
            with tp.attach(model, trails) if attached else nullcontext():
                rule = tp.All() if attached else None
                scores = [np.array([by_definition(model, o, rule) for o in options]) for options in encoded]
            wanted.append(np.array([float(row.argmax() == i.right) for row, i in zip(scores, task.items, strict=True)]))
        loss = found[task.name, "accuracy"]
        assert (loss.before, loss.after) == (wanted[0].mean(), wanted[1].mean())
        assert loss.interval == effect(*wanted).interval  # of pairs of right and wrong
    assert found["cloze", "accuracy"].guess == pytest.approx(1 / 3)  # always the same option, as often right as any
    assert found["pairs", "accuracy"].guess == 0.5


def test_what_was_taught_is_told_beside_what_was_lost(watch: Callable[[nn.Module], nn.Module]) -> None:
    model, trails = model_and_trails(tp.All())
    tokenizer = make_tokenizer()
    watch(model)
    found = forgetting(model, trails, [TEXTS], tokenizer, trained=CHOICES, forms=[PAIRS])
    assert found.edit.reliability[0].value == found["cloze", "accuracy"].after
    assert found.edit.generality[0].value == found["pairs", "accuracy"].after
    (far,) = found.edit.locality
    assert (far.name, far.value, far.interval) == (
        "letters",
        found["letters", "KL to frozen"].after,
        found["letters", "KL to frozen"].interval,
    )
    assert far.value > 0
    text = str(found)
    assert "reliability: accuracy" in text and "of 3 items, cloze" in text
    assert "locality: nats from the frozen model" in text and "letters" in text
    alone = str(forgetting(model, trails, [CHOICES], tokenizer))
    for line in (
        "reliability: cannot tell, no items of the trained form were given",
        "generality: cannot tell, no other forms were given",
        "locality: cannot tell, no other requests or texts were given",
    ):
        assert line in alone and line.split(": cannot tell")[0] + ": cannot tell" not in text
    unread = replace(found, losses=(replace(found["cloze", "accuracy"], after=math.nan),))  # as a file may say
    assert "reliability: accuracy nan" in str(unread) and "generality: cannot tell" in str(unread)
    with pytest.raises(ValueError, match="'letters' is a task of text: what was learned is told by the right choices"):
        forgetting(model, trails, [CHOICES], tokenizer, forms=[TEXTS])


def test_a_fresh_trail_has_lost_nothing_at_all() -> None:
    """That is told of texts, whose every number is what it was, and of choices where they are many enough to tell."""
    model = llama(300)
    trails = tp.TrailMap({site: tp.LoReFT(32, 2) for site in tp.sites(model)})
    tokenizer = make_tokenizer()
    for loss in forgetting(model, trails, [TEXTS, CHOICES, PAIRS], tokenizer).losses:
        assert loss.change == 0 and loss.interval[0] <= 0 <= loss.interval[1]
        assert loss.verdict == ("cannot tell" if loss.better else "")  # three items
    texts = Task("letters", tuple(Text(f"The {word} is deep.") for word in "abcdefghijkl"))
    few, many = (Task(f"{n}", tuple(Choice((f"x{i} is", f"x{i} are"), 0) for i in range(n))) for n in (12, 120))
    found = forgetting(model, trails, [texts, few, many], tokenizer)
    for measure in ("nats a token", "bits a byte"):
        assert (found["letters", measure].interval, found["letters", measure].verdict) == ((0, 0), "same")
    assert (found["12", "accuracy"].verdict, found["120", "accuracy"].verdict) == ("cannot tell", "same")
    assert "12, accuracy: no item changed; up to 22.1% of such may." in str(found)


def test_it_is_the_same_attached_or_not_and_leaves_all_as_it_was(watch: Callable[[nn.Module], nn.Module]) -> None:
    model, trails = model_and_trails(tp.All())
    suite = [TEXTS, CHOICES]
    with tp.attach(model, trails, strength=0.5):
        half = forgetting(model, trails, suite, make_tokenizer())
        assert trails.enabled
    watch(model)
    whole = forgetting(model, trails, suite, make_tokenizer())
    with tp.attach(model, trails):
        assert forgetting(model, trails, suite, make_tokenizer()).losses == whole.losses
    assert 0 < half["letters", "KL to frozen"].after < whole["letters", "KL to frozen"].after


def test_text_that_is_hardly_moved_is_pointed_out() -> None:
    model, trails = model_and_trails(tp.Answer())
    found = forgetting(model, trails, [Task("t", (Text("all of it is prompt"),))], make_tokenizer(), splits=0)
    assert found["t", "KL to frozen"].moved == 0
    assert "0.0% of tokens moved: too few to say much" in str(found)


def test_what_cannot_be_measured_is_refused() -> None:
    model, trails = model_and_trails(tp.All())
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match="the suite is empty"):
        forgetting(model, trails, [], tokenizer)
    with pytest.raises(ValueError, match="two tasks go by the name 'letters'"):
        forgetting(model, trails, [TEXTS, TEXTS], tokenizer)
    with pytest.raises(ValueError, match="task 't', item 1: it has one token"):
        forgetting(model, trails, [Task("t", (Text("fine"), Text("a")))], tokenizer)
    with pytest.raises(ValueError, match="task 't' has an item of 200 tokens, and the model's window holds 128"):
        forgetting(model, trails, [Task("t", (Text("x" * 200),))], tokenizer)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN or infinity"):
        forgetting(model, trails, [TEXTS], tokenizer)
    with pytest.raises(ValueError, match="not a finite number"):
        forgetting(model, trails, [CHOICES], tokenizer)


# The report

REPORT = Forgetting(
    (
        Loss("wiki", "nats a token", 3.0, 3.5, 0.5, (0.4, 0.6), 16, "lower"),
        Loss("wiki", "bits a byte", 1.0, 1.1, 0.1, (0.05, 0.15), 16, "lower"),
        Loss("wiki", "KL to frozen", 0.0, 0.2, 0.2, (0.1, 0.3), 16, "", moved=1.0),
        Loss("trec", "accuracy", 0.3, 0.9, 0.6, (0.5, 0.7), 100, "higher", guess=0.28),
        Loss("arc", "accuracy", 0.5, 0.45, -0.05, (-0.15, 0.05), 100, "higher", guess=0.25),
        Loss("one", "accuracy", 1.0, 0.0, -1.0, (-math.inf, math.inf), 1, "higher", guess=0.5),
    )
)


def test_the_table_says_what_was_found() -> None:
    lines = str(REPORT).splitlines()
    assert [loss.verdict for loss in REPORT.losses] == ["worse", "worse", "", "better", "cannot tell", "cannot tell"]
    assert "perplexity 20.09 -> 33.12 (1.649x)" in lines[1]
    assert "+0.5000 [+0.4000, +0.6000]" in lines[1]
    assert "guessing 0.280" in lines[4]
    table = lines[: 1 + len(REPORT.losses)]
    assert REPORT.to_markdown().count("|") == (len(table) + 1) * 9
    assert lines[len(table)].startswith("Verdicts of 4 test(s) at 0.05 together (Holm), each of 10 items or more")
    assert lines[-1] == "one, accuracy: 1 of the 10 items that a verdict needs."
    with pytest.raises(KeyError, match="'trec', 'accuracy'"):
        REPORT["trec", "nats"]


def test_a_report_is_written_and_read(tmp_path: Path) -> None:
    REPORT.to_json(tmp_path / "report.json")
    assert str(Forgetting.from_json(tmp_path / "report.json")) == str(REPORT)
    assert [r["verdict"] for r in REPORT.records()] == [loss.verdict for loss in REPORT.losses]
    (tmp_path / "other.json").write_text('{"losses": [{"task": "t"}]}')
    with pytest.raises(ValueError, match="is not a forgetting report"):
        Forgetting.from_json(tmp_path / "other.json")
    text = (tmp_path / "report.json").read_text()
    (tmp_path / "other.json").write_text(text.replace('"losses"', '"losses": [], "losses"', 1))
    with pytest.raises(ValueError, match="is not a forgetting report.*a key stands twice in one object"):
        Forgetting.from_json(tmp_path / "other.json")


def test_the_picture_shows_each_change_in_its_unit() -> None:
    figure = REPORT.plot()
    nats, points = figure.axes
    assert [label.get_text() for label in nats.get_yticklabels()] == ["wiki: nats a token", "wiki: KL to frozen"]
    assert [label.get_text().split(":")[0] for label in points.get_yticklabels()] == ["trec", "arc", "one"]
    assert [float(bar[0].get_xdata()[0]) for bar in points.containers] == pytest.approx([60, -5, -100])
    assert points.containers[0][2][0].get_segments()[0][:, 0].tolist() == pytest.approx([50, 70])
    assert points.containers[0][0].get_color() == COLOURS[2]
    assert nats.containers[0][0].get_color() == COLOURS[1]
    assert figure.get_figwidth() == 8


# Intervals


def test_newcombe_agrees_with_his_table() -> None:
    """Newcombe 1998, table II, method 10: 56/70 against 48/80, and 9/10 against 3/10."""
    make = lambda a, n: np.array([1.0] * a + [0.0] * (n - a))  # noqa: E731
    assert intervals.newcombe(make(56, 70), make(48, 80)) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert intervals.newcombe(make(9, 10), make(3, 10)) == pytest.approx((0.1705, 0.8090), abs=5e-5)


def test_the_ratio_of_proportions_is_that_of_katz_for_many_and_has_bounds_for_few() -> None:
    from scipy.stats.contingency import relative_risk

    make = lambda a, n: np.array([1.0] * a + [0.0] * (n - a))  # noqa: E731
    wanted = relative_risk(8000, 10000, 9000, 10000).confidence_interval()
    assert intervals.ratio_interval(make(8000, 10000), make(9000, 10000)) == pytest.approx(
        (wanted.low, wanted.high), rel=1e-3
    )
    for a, m, b, n in [(0, 20, 20, 20), (20, 20, 20, 20), (3, 3, 2, 2), (5, 20, 1, 20)]:
        low, high = intervals.ratio_interval(make(a, m), make(b, n))
        assert 0 <= low <= (a / m) / (b / n) <= high < math.inf
        assert high - low > 0.1


def test_the_interval_of_a_ratio_covers_it() -> None:
    """Of 300 draws of 40 and 60 items with 0.6 and 0.8, 95 % give or take 3."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        low, high = intervals.ratio_interval((rng.random(40) < 0.6).astype(float), (rng.random(60) < 0.8).astype(float))
        held += low <= 0.75 <= high
    assert 0.92 < held / 300 < 0.98


def test_the_interval_of_a_mean_is_the_normal_one_for_many() -> None:
    rng = np.random.default_rng(1)
    values, weights = rng.normal(2.0, 1.0, 2000), rng.uniform(1, 3, 2000)
    mean = values.sum() / weights.sum()
    half = 1.96 * (values - mean * weights).std() / weights.mean() / math.sqrt(2000)
    assert intervals.mean_interval(values, weights) == pytest.approx((mean - half, mean + half), abs=0.06 * half)
    assert intervals.mean_interval(np.ones(5)) == (1, 1)
    assert intervals.mean_interval(np.ones(1)) == (-math.inf, math.inf)


# lm-evaluation-harness


def test_the_harness_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    model, trails = model_and_trails(tp.All())
    with pytest.raises(ImportError, match="pip install lm_eval"):
        forgetting(model, trails, [Harness(["arc_easy"])], make_tokenizer())
    with pytest.raises(ValueError, match="list of names"):
        Harness("arc_easy")


TASK_FILE = """
task: tiny_cloze
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: right
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.mark.filterwarnings("ignore")
def test_tasks_of_the_harness_agree_with_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"q": i.prompt, "options": list(i.options), "right": i.right} for i in CHOICES.items]  # type: ignore[union-attr]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny_cloze.yaml").write_text(TASK_FILE.format(file=tmp_path / "items.jsonl"))
    model, trails = model_and_trails(tp.All())
    found = forgetting(model, trails, [CHOICES, Harness(["tiny_cloze"], include=str(tmp_path))], make_tokenizer())
    ours, theirs = found["cloze", "accuracy"], found["tiny_cloze", "acc"]
    assert (ours.before, ours.after, ours.interval) == (theirs.before, theirs.after, theirs.interval)
