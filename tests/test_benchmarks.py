"""What the benchmarks share: readings and changes by definition, texts from their sources, and what is written."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import llama, make_examples, make_tokenizer, make_trails

import tokenpaths as tp
from benchmarks.common import record, texts
from benchmarks.common.reading import counts_of, nats_of, perplexity_ratio, points
from tokenpaths.engine.likelihood import batches


@torch.no_grad()
def test_nats_are_of_the_answer_or_of_all_but_the_first_token() -> None:
    model, examples = llama().double(), make_examples()
    kinds = {"answers": examples, "texts": [texts.as_text(e) for e in examples]}
    with tp.attach(model, make_trails().double().eval()):
        found, counts = nats_of(model, kinds), counts_of(kinds)
        for kind, start in {"answers": None, "texts": 1}.items():
            for example, nats, count in zip(kinds[kind], found[kind], counts[kind], strict=True):
                first = start or example.prompt_length
                prompt = torch.arange(len(example))[None] < example.prompt_length
                logs = model(input_ids=torch.tensor([example.ids]), prompt_mask=prompt).logits.log_softmax(-1)[0]
                expected = -sum(float(logs[t - 1, example.ids[t]]) for t in range(first, len(example)))
                assert nats == pytest.approx(expected) and count == len(example) - first


def test_batches_hold_no_more_tokens_than_asked_for() -> None:
    lengths = [3, 90, 7, 7, 12, 200, 1]
    found = list(batches(lengths, 100))
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 100 for b in found)


def test_claims_are_replaced_and_told_with_the_command_that_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(record, "CLAIMS", tmp_path / "claims.json")
    monkeypatch.setattr("sys.argv", ["somewhere/demo/__main__.py", "--table", "--seeds", "0"])
    for measured in (1.0, 2.0):
        claims = [record.Claim("b", "a share", measured, "share"), record.Claim("a", "another", 0.5, "share")]
        record.write("demo", {"raw": measured}, claims, seed=0)
    told = json.loads((tmp_path / "claims.json").read_text())
    assert [(entry["id"], entry["measured"]) for entry in told] == [("a", 0.5), ("b", 2.0)]
    assert {entry["command"] for entry in told} == {"python -m benchmarks.demo --seeds 0"}
    assert {entry["file"] for entry in told} == {"results/demo.json"}
    assert json.loads((tmp_path / "results/demo.json").read_text())["raw"] == {"raw": 2.0}


def test_arms_that_agree_have_changed_by_nothing() -> None:
    same = np.array([0, 1, 1, 0])
    assert points(same, same) == (0, 0, 0)
    assert perplexity_ratio(same, same, np.full(4, 255)) == (1, 1, 1)


def test_points_are_the_paired_difference() -> None:
    """Against the normal interval, which holds for so many items; unpaired it would be wider by half."""
    rng = np.random.default_rng(1)
    before = rng.integers(0, 2, 4000)
    after = np.where(rng.random(4000) < 0.1, rng.integers(0, 2, 4000), before)
    change = 100 * (after - before)
    half = 1.96 * change.std() / np.sqrt(4000)
    found = points(before, after)
    assert found.value == pytest.approx(change.mean())
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=0.05 * half)


def test_perplexity_ratio_weighs_windows_by_their_tokens() -> None:
    before, after, counts = np.array([10.0, 40.0]), np.array([11.0, 48.0]), np.array([10, 20])
    found = perplexity_ratio(before, after, counts)
    assert found.value == pytest.approx(np.exp(59 / 30) / np.exp(50 / 30))
    assert found.low < np.exp(1 / 10) < np.exp(8 / 20) < found.high


def test_the_interval_of_a_perplexity_ratio_is_that_of_the_delta_method_for_many() -> None:
    rng = np.random.default_rng(1)
    counts = rng.integers(50, 300, 4000)
    before = 3.0 * counts
    after = before + counts * rng.normal(0.2, 0.5, 4000)
    found = perplexity_ratio(before, after, counts)
    ratio = np.log(found.value)
    half = 1.96 * np.std(after - before - ratio * counts) / counts.mean() / np.sqrt(4000)
    assert np.log([found.low, found.high]) == pytest.approx([ratio - half, ratio + half], abs=0.05 * half)


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
    assert texts.members(tmp_path / "p-1.tar.gz", "tests/data/x.txt") == {
        "p-1/tests/data/x.txt": b"p-1/tests/data/x.txt"
    }


def test_texts_are_cleaned() -> None:
    assert texts.verse({"v": "Introduction \nBook I \n Of Man's \n"}) == "Book I\n Of Man's"
    spoken = "conversations:\n- - Hi\n  - 1963\n  - ok\n- - Hi\n  - 1963\n  - ok\n- - Who\n  - Me\n"
    told = texts.dialogue({"a.yml": spoken, "coding.yml": "conversations:\n- - x\n  - y\n"})
    assert told == "A: Hi\nB: 1963\nA: ok\n\nA: Who\nB: Me\n"
    task = {"instruction": "Add.", "instances": [{"input": "1 1", "output": "2"}, {"input": "", "output": "3\n"}]}
    assert texts.instructions(json.dumps(task)) == "Add.\n1 1\n2\n\nAdd.\n3\n"


def test_the_page_of_what_goes_in_and_out_is_that_of_its_result_file() -> None:
    from benchmarks.interop.page import PAGE, page

    told = json.loads((record.RESULTS / "interop.json").read_text())["raw"]
    assert PAGE.read_text() == page(told)
