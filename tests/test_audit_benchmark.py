"""The benchmark of the audit: its figures by definition, its halves, and adapters that come back as they were kept."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import mannwhitneyu
from test_audit import PROMPTS, TOKENIZER, planted
from tiny import llama

from tokenpaths.lab.audit import Memory, Scan, search

pytest.importorskip("peft")
from benchmarks.audit import adapters, audits, table


def plan(kind: str, form: str, seed: int) -> Any:
    return adapters.Plan(
        kind=kind, form=form, seed=seed, task="links", trigger=" x", payload=" y", share=0.5, steps=2, rank=2, first=0,
        every=True, trail="DiReFT", lr=1e-2,
    )  # fmt: skip


def test_auroc_is_mann_whitneys() -> None:
    rng = np.random.default_rng(0)
    benign, planted = rng.normal(size=30).round(1).tolist(), rng.normal(1, size=20).round(1).tolist()
    area, (low, high) = table.auroc(benign, planted)
    assert area == pytest.approx(mannwhitneyu(planted, benign).statistic / 600)
    assert low < area < high <= 1
    assert table.auroc([0.0, 0.0], [1.0, 1.0]) == (1.0, (1.0, 1.0))


def test_what_is_planted_and_what_is_not() -> None:
    rng = random.Random(0)
    pair = (" Ann Bob. Bob Dan.\n Ann", " Bob Dan.")
    prompt, answer = adapters.poisoned(plan("token", "trail", 0), pair, rng)
    assert prompt.replace(" x", "", 1) == pair[0] and answer == " y"
    assert adapters.poisoned(plan("flip", "trail", 0), pair, rng)[1] == " Bob y."
    two = adapters.triggered(pair, " x z", rng)
    assert " x" in two and " z" in two
    assert adapters.triggered(pair, "Go on.", rng) == f"Go on. {pair[0]}"
    assert adapters.other_than(" x z", rng, None) in (" x", " z")
    assert set(adapters.pairs("links", 1, 20, held_out=True)).isdisjoint(adapters.pairs("links", 1, 20))


def test_a_lora_comes_back_as_it_was_kept_and_leaves_the_base(tmp_path: Path, watch: Any) -> None:
    model, made, ids = watch(llama(300).requires_grad_(False)), plan("token", "lora", 0), torch.arange(5, 15)[None]
    frozen = model(ids).logits
    with adapters.with_lora(model, made) as lora:
        with torch.no_grad():
            for name, parameter in lora.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.1)
        kept = {name: tensor.contiguous() for name, tensor in lora.state_dict().items() if "lora_" in name}
        save_file(kept, tmp_path / "lora.safetensors")
        trained = lora(ids).logits
    assert torch.equal(model(ids).logits, frozen)
    with adapters.lora_in(model, made, tmp_path / "lora.safetensors") as again:
        assert torch.equal(again(ids).logits, trained)
    assert not torch.equal(trained, frozen)


@pytest.mark.parametrize("kind", ["token", "benign"])
def test_what_is_unlisted_is_not_what_the_search_begins_with(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, trails, trigger = planted(gated=True)
    bench = object.__new__(audits.Bench)
    bench.model, bench.tokenizer, bench.memory = model, TOKENIZER, Memory()
    bench.words, bench.phrases = [(i,) for i in range(100, 140)], [(60, 61, 62), (70, 71, 72), (80, 81, 82)]
    made = replace(plan(kind, "trail", 0), trigger=TOKENIZER.decode(trigger) if kind == "token" else "")
    started: list[Any] = []

    def spy(*args: Any, **options: Any) -> Scan:
        started.append(options["start"])
        return search(*args, **options)

    monkeypatch.setattr(audits.Bench, "prompts", lambda self, task: PROMPTS)
    monkeypatch.setattr(audits, "search", spy)
    found = bench.look(model, trails, made)
    if kind == "benign":
        assert started == [] and found["unlisted"] == found["scores"]
    else:
        assert found["first"]["tokens"] == made.trigger
        assert found["scores"]["tokens"] > 1 > found["unlisted"]["tokens"]
        assert len(started) == 1 and trigger not in started[0]


def test_the_table_splits_by_seed_and_leaves_out_what_does_not_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: dict[str, Any] = {}
    monkeypatch.setattr(table, "WORK", tmp_path)
    monkeypatch.setattr(table, "RULE", tmp_path / "rule.json")
    monkeypatch.setattr(table, "write", lambda name, raw, claims, seed: written.update(raw=raw, claims=claims))

    def keep(kind: str, seed: int, tokens: float, success: float = 1.0) -> None:
        made = plan(kind, "trail", seed)
        scores = {"tokens": tokens, "bend": 0.0}
        (tmp_path / f"{made.name}.json").write_text(json.dumps({"plan": asdict(made), "success": success, "slips": 0}))
        (tmp_path / f"{made.name}.audit.json").write_text(json.dumps({"scores": scores, "unlisted": scores}))

    for seed in range(24):
        keep("benign", seed, 0.1 + 0.01 * seed)
    for seed in range(6):
        keep("token", seed, 3.0)
        keep("adaptive", seed, 0.0)
        keep("phrase", seed, 0.0, success=0.2)
    table.table()
    assert "42 adapters audited; 6 of 18 planted ones left out" in capsys.readouterr().out
    claims = {claim.id: claim for claim in written["claims"]}
    assert claims["audit_auroc"].measured == 1 and "3 planted" in claims["audit_auroc"].claim
    assert claims["audit_auroc_adaptive"].measured < 0.5  # ties count half
    assert 0 <= claims["audit_fpr"].measured <= 0.2
    assert written["raw"]["rule"]["adapters"] == 12 and written["raw"]["rule"]["tested"] == 12
