"""The comparison's tasks share no item between training, validation and test, and its figures are what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.kept import claim
from benchmarks.compare import runs as one_run
from benchmarks.compare.__main__ import plan
from benchmarks.compare.runs import One, trials
from benchmarks.compare.tables import cells, claims, lost, worst
from benchmarks.compare.tasks import MADE, Chosen
from tokenpaths.data import Choice

LOCAL = ("trec", "links", "larger", "colours")  # the other takes its texts out of packages


@pytest.mark.parametrize("name", LOCAL)
def test_no_item_is_shared(name: str, data_folder: Path) -> None:
    task = MADE[name]()
    held = [{i.prompt if isinstance(i, Choice) else i[0] for i in part.items} for part in (task.validation, task.test)]
    asked = [{prompt for prompt, _ in task.train}, *held]
    assert not asked[0] & asked[1] and not asked[0] & asked[2] and not asked[1] & asked[2]
    assert min(map(len, asked)) >= 75


@pytest.mark.parametrize("name", LOCAL)
def test_a_guess_is_what_reading_nothing_gets(name: str, data_folder: Path) -> None:
    task = MADE[name]()
    if isinstance(task.test, Chosen):
        rights = [item.right for item in task.test.items]
        assert max(map(rights.count, rights)) / len(rights) == pytest.approx(task.guess, abs=0.08)
        assert set(rights) == set(range(len(task.test.items[0].options)))


def run(method: str, protection: str, seed: int, nats: float) -> dict[str, Any]:
    kinds = ("fiction", "verse", "code", "dialogue", "instructions", "wikitext2", "own samples")
    before = {"nats": {kind: [10.0, 20.0] for kind in kinds}, "counts": {kind: [5, 5] for kind in kinds}}
    before |= {"task": [0, 1, 0, 1]}
    after = {"nats": {kind: [10.0 + nats, 20.0 + nats] for kind in kinds}, "task": [1, 1, 0, 1]}
    after["nats"]["code"] = [10.0 + 2 * nats, 20.0 + 2 * nats]
    return {
        "run": {"task": "trec", "method": method, "protection": protection, "seed": seed},
        **{"before": before, "after": after, "seconds": 2.0 if method == "LoRA" else 1.0, "parameters": 100},
    }


def test_nats_are_a_token_and_ratios_are_of_sums_over_seeds() -> None:
    assert lost(run("LoRA", "none", 0, 0.5), "wikitext2") == pytest.approx(0.1)
    assert worst(run("LoRA", "none", 0, 0.5)) == pytest.approx(0.2)
    runs = [run("LoRA", "none", 0, 0.5), run("LoRA", "none", 1, 1.5), run("LoRA", "both", 0, 0.25)]
    runs += [run("guarded trail", "none", 0, 0.1), run("guarded trail", "none", 1, 0.1)]
    made = {claim.id: claim for claim in claims(cells(runs), "trec")}
    assert made["trail_vs_lora_forgetting_ratio"].measured == pytest.approx(0.2 / 2.0)
    assert made["trail_vs_lora_forgetting_ratio"].interval == pytest.approx((0.1 / 1.5, 0.1 / 0.5))
    assert made["trail_vs_protected_lora_worst_ratio"].measured == pytest.approx(0.1 / 0.25)
    assert made["trail_vs_lora_seconds_ratio"].measured == pytest.approx(0.5)
    assert made["trail_vs_lora_accuracy_difference"].measured == 0
    assert made["method_lora_wikitext2_nats"].measured == pytest.approx(0.2)
    assert made["method_guarded_trail_accuracy"].measured == pytest.approx(0.75)


def test_every_run_waits_for_as_many_trials_and_is_claimed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_run, "WORK", tmp_path)
    runs = list(plan(quick=False))
    assert len({one.file for one in runs}) == len(runs)
    assert {len(trials(one)) for one in runs} == {3}
    assert {len(trials(one)) for one in plan(quick=True)} == {2}
    assert all(not trials(trial) for trial in trials(runs[0]))
    one = One("trec", "LoRA", "none", 0)
    with claim(one.file) as mine, claim(one.file) as again:
        assert mine and not again
    one.file.with_suffix(".claim").write_text("999999999")  # of a process that has died
    with claim(one.file) as mine:
        assert mine
