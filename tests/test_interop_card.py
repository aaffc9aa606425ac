"""A card tells what was measured, in the words of the reports, and nothing of the machine that made it."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from test_interop_weights import random
from tiny import DIM, llama, make_examples

import tokenpaths as tp
from tokenpaths.interop import card
from tokenpaths.trailmap.trailmap import FILE_NAME


def model() -> Any:
    made = llama()
    made.config._name_or_path = "me/tiny-llama"
    return made


def trails() -> tp.TrailMap:
    return tp.TrailMap({tp.Site(1): random(tp.LoReFT(DIM, 3)), tp.Site(2, tp.Last(1)): random(tp.Additive(DIM))})


def test_a_card_holds_the_reports_and_says_what_was_not_measured(tmp_path: Path) -> None:
    base, laid = model(), trails()
    drift = tp.measure_drift(base, laid, make_examples(6))
    text = card(laid, base, drift={"short texts": drift}, license="apache-2.0", notes="For tests.")
    assert drift.to_markdown() in text and "For tests." in text
    for heading in ("## What was learned", "## Where it acts", "## What was lost"):
        assert re.search(rf"{heading}\n\nnot measured\n", text), heading
    read = ModelCard(text).data
    assert read.base_model == "me/tiny-llama" and read.library_name == "tokenpaths" and read.license == "apache-2.0"
    assert "base_model:adapter:me/tiny-llama" in read.tags
    (result,) = read.eval_results
    assert result.dataset_name == "short texts" and result.metric_value == float(f"{drift['kl'].mean:.4g}")
    laid.save(tmp_path / FILE_NAME, base)
    assert hashlib.sha256((tmp_path / FILE_NAME).read_bytes()).hexdigest() in text


def test_without_measurements_there_are_no_numbers_of_them() -> None:
    text = card(trails(), model())
    assert text.count("not measured") == 4 and ModelCard(text).data.eval_results is None


def test_a_drift_that_cannot_be_told_is_no_metric() -> None:
    base, last = model(), tp.TrailMap({tp.Site(1, tp.Last(1)): random(tp.LoReFT(DIM, 3))})
    texts = [tp.Example(tuple(range(3, 63)), (False,) * 60) for _ in range(4)]
    drift = tp.measure_drift(base, last, texts)
    assert drift.too_little
    text = card(last, base, drift={"texts": drift})
    assert ModelCard(text).data.eval_results is None and "cannot tell" in text


def test_a_folder_of_this_machine_is_not_told(tmp_path: Path) -> None:
    base = model()
    base.config._name_or_path = str(tmp_path)
    text = card(trails(), base)
    assert str(tmp_path) not in text and ModelCard(text).data.base_model is None
    with pytest.raises(ValueError, match="a path of this machine: take it out of the notes"):
        card(trails(), model(), notes=f"see {Path.cwd()}/notes")


def test_the_lines_that_load_it_run(tmp_path: Path) -> None:
    base, laid = llama(), trails()
    base.save_pretrained(tmp_path / "base")
    laid.save(tmp_path / "trails" / FILE_NAME, base)
    text = card(laid, base)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = code.replace("'the base model'", repr(str(tmp_path / "base")))
    code = code.replace('"the name of this repository"', repr(str(tmp_path / "trails")))
    found: dict[str, Any] = {}
    exec(code, found)
    assert torch.equal(found["trails"][tp.Site(1)].W, laid[tp.Site(1)].W)
