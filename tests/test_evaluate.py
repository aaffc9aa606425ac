"""The benchmarks' texts and evaluations: likelihoods against the definition, data sets against their files."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from subjects import MOVING
from tiny import make_tokenizer
from torch import nn

import tokenpaths as tp
from tokenpaths import Example

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import _evaluate as ev
import _texts as texts

RULES = {"all": tp.All(), "last": tp.Last(1), "answer": tp.Answer(), "prompt": tp.Prompt(), "none": None}
LENGTHS = [(5, (1, 1, 1)), (5, (3, 1, 2, 4)), (7, (2, 2)), (5, (1, 4, 1, 1, 2)), (2, (1, 3)), (9, (1, 1))]


def draw(length: int, generator: torch.Generator) -> tuple[int, ...]:
    return tuple(torch.randint(3, 96, (length,), generator=generator).tolist())


def make_items() -> list[ev.Choice]:
    """Prompts of several lengths, some alike, with two to five answers of one to four tokens; and two whole texts."""
    generator = torch.Generator().manual_seed(0)
    items: list[ev.Choice] = []
    for length, answers in LENGTHS:
        prompt = draw(length, generator)
        masks = [(False,) * length + (True,) * n for n in answers]
        items.append(ev.Choice(tuple(Example((*prompt, *draw(len(m) - length, generator)), m) for m in masks), 1))
    first = draw(1, generator)
    whole = [Example((*first, *draw(n, generator)), (False,) * (n + 1)) for n in (6, 4)]
    return [*items[:3], ev.Choice(tuple(whole), 0), *items[3:], ev.Choice(tuple(reversed(whole)), 0)]


ITEMS = make_items()
EXAMPLES = [option for item in ITEMS for option in item.options]


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, watch: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return watch(FAMILIES[request.param].make().double().eval())


def attached(model: nn.Module, rule: tp.tokens.Rule | None) -> Any:
    """Trails that move a lot, in all layers."""
    trails = tp.TrailMap({site: MOVING["LoReFT"](tp.width(model)) for site in tp.sites(model, tokens=rule or tp.All())})
    return nullcontext() if rule is None else tp.attach(model, trails.double().eval())


@torch.no_grad()
def by_definition(model: nn.Module, example: Example, rule: tp.tokens.Rule | None) -> float:
    """-sum log p(t | all before it), one example at a time: of the answer, or of a text from its second token on."""
    ids = torch.tensor([example.ids])
    mask = {} if rule is None else {"prompt_mask": torch.arange(len(example))[None] < example.prompt_length}
    logs = model(input_ids=ids, **mask).logits.log_softmax(-1)[0]
    start = example.prompt_length if any(example.answer) else 1
    return -sum(float(logs[t - 1, example.ids[t]]) for t in range(start, len(example)))


# Likelihoods


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_nats_are_the_definition(model: nn.Module, rule: tp.tokens.Rule | None) -> None:
    with attached(model, rule):
        sums, counts = ev.nats(model, EXAMPLES, max_batch_tokens=30)
        expected = [by_definition(model, example, rule) for example in EXAMPLES]
    np.testing.assert_allclose(sums, expected, rtol=1e-9)
    assert counts.tolist() == [sum(e.answer) if any(e.answer) else len(e) - 1 for e in EXAMPLES]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("tokens", [1, 1500])
def test_options_behind_a_cached_prompt_score_as_without_one(
    model: nn.Module, rule: tp.tokens.Rule | None, tokens: int
) -> None:
    with attached(model, rule):
        scores = ev.log_likelihoods(model, ITEMS, tokens)
        expected = [[-by_definition(model, option, rule) for option in item.options] for item in ITEMS]
    for found, wanted in zip(scores, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_trails_are_at_work_in_every_score() -> None:
    """Else the two tests above would compare the frozen model with itself."""
    model = FAMILIES["llama"].make().double().eval()
    frozen = ev.log_likelihoods(model, ITEMS)
    for rule in (tp.All(), tp.Last(1), tp.Answer()):
        with attached(model, rule):
            moved = ev.log_likelihoods(model, ITEMS)
        long = [len(option) - option.prompt_length > 1 for item in ITEMS for option in item.options]
        same = np.isclose(np.concatenate(frozen), np.concatenate(moved))
        asked = [bool(item.prompt) for item in ITEMS for _ in item.options]
        if rule == tp.Answer():  # an answer of one token is predicted from the prompt, and a text has no answer
            assert (~same).tolist() == long
        else:
            assert not same[asked].any()


def test_the_likeliest_option_is_chosen(model: nn.Module) -> None:
    expected = [int(np.argmin([by_definition(model, o, None) for o in item.options])) for item in ITEMS]
    assert ev.choose(model, ITEMS) == expected
    assert ev.correct(model, ITEMS).tolist() == [int(e == i.right) for e, i in zip(expected, ITEMS, strict=True)]
    assert 0 < ev.correct(model, ITEMS).sum() < len(ITEMS)


def test_batches_hold_no_more_tokens_than_asked_for() -> None:
    lengths = [3, 90, 7, 7, 12, 200, 1]
    batches = list(ev._batches(lengths, 100))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 100 for b in batches)


def test_a_broken_model_is_not_scored() -> None:
    model = FAMILIES["llama"].make().eval()
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="not a finite number"):
        ev.nats(model, EXAMPLES)
    with pytest.raises(ValueError, match="not a finite number"):
        ev.choose(model, ITEMS)


def test_items_that_cannot_be_scored_are_refused() -> None:
    a, b = Example((5, 6, 7), (False, True, True)), Example((6, 6, 7), (False, True, True))
    whole = Example((5, 6, 7), (False,) * 3)
    for options in [(a, b), (a, whole), (dataclasses.replace(a, answer=(False, True, False)), a)]:
        with pytest.raises(ValueError, match="must follow one prompt"):
            ev.Choice(options, 0)
    with pytest.raises(ValueError, match="option 2 of 2"):
        ev.Choice((a, a), 2)
    with pytest.raises(ValueError, match="example 1 has one token"):
        ev.nats(FAMILIES["llama"].make(), [a, Example((5,), (False,))])


# Data sets


def test_trec_drops_what_training_asks(tmp_path: Path) -> None:
    (tmp_path / "trec").mkdir()
    train = "NUM:count How many Os are there ?\nABBR:exp What is BUN ?\nHUM:ind Who wrote `` Fran\xe7oise '' ?\n"
    (tmp_path / "trec/TREC.train").write_bytes(train.encode("latin-1"))
    (tmp_path / "trec/TREC.test").write_text("ABBR:exp What is BUN ?\nLOC:city Where is A: B ?\n")
    tokenizer = make_tokenizer()
    sets = ev.trec(tokenizer, tmp_path)
    assert sets.train[0] == ("Question: How many Os are there ?\nAnswer type:", " number")
    assert "Fran\xe7oise" in sets.train[2][0]
    assert sets.dropped == 1
    (item,) = sets.test
    told = [tokenizer.decode(option.ids[option.prompt_length :]) for option in item.options]
    assert told == [" abbreviation", " entity", " description", " person", " location", " number"]
    assert item.right == 4
    assert tokenizer.decode(item.prompt) == "Question: Where is A: B ?\nAnswer type:"


def test_arc_easy_is_a_cloze(tmp_path: Path) -> None:
    (tmp_path / "arc_easy").mkdir()
    asked = "Please choose the correct answer to the question: Why?\n\nAnswer1: it is. Answer2: no Answer3: two words"
    item = {"instruction": asked + "\n\nAnswer format: answer1/answer2/answer3", "answer": "answer3"}
    (tmp_path / "arc_easy/test.json").write_text(json.dumps([item]))
    tokenizer = make_tokenizer()
    (found,) = ev.arc_easy(tokenizer, tmp_path)
    assert tokenizer.decode(found.prompt) == "Question: Why?\nAnswer:"
    told = [tokenizer.decode(option.ids[option.prompt_length :]) for option in found.options]
    assert told == [" it is.", " no", " two words"]
    assert found.right == 2


def test_the_real_data_sets_are_read_whole(data_folder: Path) -> None:
    tokenizer = make_tokenizer()
    sets = ev.trec(tokenizer, data_folder)
    assert (len(sets.train), len(sets.test), sets.dropped) == (5452, 490, 10)
    arc = ev.arc_easy(tokenizer, data_folder, 300)
    assert {len(item.options) for item in arc} <= {3, 4, 5}
    assert len(ev.blimp(tokenizer, data_folder)) == 3000
    pairs = ev.blimp(tokenizer, data_folder, 10)
    assert tokenizer.decode(pairs[0].options[0].ids) == "Susan revealed herself."
    assert not any(pairs[0].options[0].answer)
    assert len({item.options for item in pairs}) == 10


def test_items_are_spaced_evenly() -> None:
    assert ev.spaced(range(10), 5) == [0, 2, 4, 6, 8]
    assert ev.spaced(range(3), None) == [0, 1, 2]
    with pytest.raises(ValueError, match="4 of 3 items"):
        ev.spaced(range(3), 4)


# Intervals


def test_arms_that_agree_have_changed_by_nothing() -> None:
    same = np.array([0, 1, 1, 0])
    assert ev.points(same, same) == (0, 0, 0)
    assert ev.perplexity_ratio(same, same, np.full(4, 255)) == (1, 1, 1)


def test_points_are_the_paired_difference() -> None:
    """Against the normal interval, which holds for so many items; unpaired it would be wider by half."""
    rng = np.random.default_rng(1)
    before = rng.integers(0, 2, 4000)
    after = np.where(rng.random(4000) < 0.1, rng.integers(0, 2, 4000), before)
    change = 100 * (after - before)
    half = 1.96 * change.std() / np.sqrt(4000)
    found = ev.points(before, after)
    assert found.value == pytest.approx(change.mean())
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=0.05 * half)


def test_perplexity_ratio_weighs_windows_by_their_tokens() -> None:
    before, after, counts = np.array([10.0, 40.0]), np.array([11.0, 48.0]), np.array([10, 20])
    found = ev.perplexity_ratio(before, after, counts)
    assert found.value == pytest.approx(np.exp(59 / 30) / np.exp(50 / 30))
    assert (found.low, found.high) == pytest.approx((np.exp(1 / 10), np.exp(8 / 20)))


def test_unpaired_arms_are_refused() -> None:
    with pytest.raises(ValueError, match="paired values are needed"):
        ev.points(np.zeros(3), np.zeros(4))


# Texts


def test_windows_are_spaced_and_do_not_overlap() -> None:
    tokenizer = make_tokenizer()
    words = "".join(chr(33 + i % 60) for i in range(1000))
    whole = tokenizer(words)["input_ids"]
    cuts = texts.cut(tokenizer, words, 4, 100)
    starts = [
        next(i for i in range(250 * k, 250 * (k + 1)) if tuple(whole[i : i + 100]) == c.ids) for k, c in enumerate(cuts)
    ]
    assert len({start % 250 for start in starts}) == 1
    assert all(len(c) == 100 and not any(c.answer) for c in cuts)
    assert cuts == texts.cut(tokenizer, words, 4, 100)
    assert cuts != texts.cut(tokenizer, words, 4, 100, seed=1)
    with pytest.raises(ValueError, match="does not hold 5 windows of 400"):
        texts.cut(tokenizer, words, 5, 400)


def test_a_package_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "sayings-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("sayings/data/b.txt", "second\r\n")
        wheel.writestr("sayings/data/a.txt", "first\r\n")
        wheel.writestr("sayings/data/deeper/c.txt", "not this")
        wheel.writestr("sayings-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: sayings\nVersion: 1.0\n")
        wheel.writestr("sayings-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("sayings-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    source = texts.Source("sayings", "1.0", "data/*.txt", lambda files: "|".join(files.values()))
    for _ in range(2):
        assert source.text(tmp_path / "cache") == "first\n|second\n"
        (tmp_path / "sayings-1.0-py3-none-any.whl").unlink(missing_ok=True)
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == ["sayings-1.0"]
    with pytest.raises(RuntimeError, match=r"pip could not download sayings 2\.0"):
        dataclasses.replace(source, version="2.0").text(tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match="holds no file"):
        dataclasses.replace(source, files="*.md").text(tmp_path / "cache")


def test_files_of_a_source_distribution_are_read(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "p-1.tar.gz", "w:gz") as archive:
        for name in ("p-1/tests/data/x.txt", "p-1/other/x.txt"):
            entry = tarfile.TarInfo(name)
            entry.size = len(name)
            archive.addfile(entry, io.BytesIO(name.encode()))
    assert texts._members(tmp_path / "p-1.tar.gz", "tests/data/x.txt") == {
        "p-1/tests/data/x.txt": b"p-1/tests/data/x.txt"
    }


def test_texts_are_cleaned() -> None:
    assert texts._verse({"v": "Introduction \nBook I \n Of Man's \n"}) == "Book I\n Of Man's"
    spoken = "conversations:\n- - Hi\n  - 1963\n  - ok\n- - Hi\n  - 1963\n  - ok\n- - Who\n  - Me\n"
    told = texts._dialogue({"a.yml": spoken, "coding.yml": "conversations:\n- - x\n  - y\n"})
    assert told == "A: Hi\nB: 1963\nA: ok\n\nA: Who\nB: Me\n"
    task = {"instruction": "Add.", "instances": [{"input": "1 1", "output": "2"}, {"input": "", "output": "3\n"}]}
    assert texts._tasks(json.dumps(task)) == "Add.\n1 1\n2\n\nAdd.\n3\n"


# The real model


def test_smollm2_reads_english(smollm2: tuple[Any, Any], data_folder: Path) -> None:
    model, tokenizer = smollm2
    wiki = (data_folder / "wikitext2/test.txt").read_text(encoding="utf-8")
    (window,) = texts.cut(tokenizer, wiki[:8000], 1, 96)
    shuffled = dataclasses.replace(window, ids=tuple(np.random.default_rng(0).permutation(window.ids).tolist()))
    (written, jumbled), _ = ev.nats(model, [window, shuffled])
    assert written < 0.8 * jumbled
    arc = ev.arc_easy(tokenizer, data_folder, 1)
    for item, found in zip(arc, ev.log_likelihoods(model, arc), strict=True):
        np.testing.assert_allclose(found, -ev.nats(model, item.options)[0], rtol=1e-4)
    assert ev.correct(model, ev.blimp(tokenizer, data_folder, 10)).mean() > 0.5
