"""Every figure in README and docs is a claim, and every claim stands in the result file that it names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CLAIMS = {entry["id"]: entry for entry in json.loads((ROOT / "benchmarks/claims.json").read_text())}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARK = re.compile(r"([-+]?[\d,]*\.?\d+(?:e-?\d+)?)\s*(%?)\s*<!--\s*claim:\s*(\w+)\s*-->")
OWED = {
    "import_seconds",
    "families_holding_all_laws",
    "pyreft_parity_max_abs",
    "demo_chain_accuracy",
    "demo_answer_only_accuracy",
    "demo_frozen_accuracy",
    "memorised_tokens_rank1",
    "drift_foretells_forgetting",
    "drift_reading_cost_ratio",
    "budget_accuracy",
    "budget_wikitext2_ppl_ratio",
    "budget_worst_unseen_ppl_ratio",
    "budget_self_samples_worst_ppl_ratio",
    "budget_arc_easy_points",
    "budget_blimp_points",
    "budget_training_cost_ratio",
    "train_all_layers_vs_pyreft",
    "train_all_layers_vs_lora",
    "train_upper_half_vs_pyreft",
    "train_shared_prompt_vs_pyreft",
    "stay_overhead",
    "forward_overhead",
    "decode_overhead",
    "peak_memory_vs_lora",
    "eight_arms_ratio",
    "flops_all_layers_vs_lora",
    "replay_1pct_wikitext2_nats",
    "self_rehearsal_wikitext2_nats",
    "aft_a_accuracy_gain",
    "waypoints_task_gain",
    "renamed_longer_kept",
    "ab_interval_coverage",
    "ab_type1_error",
    "ab_50_minutes",
    "budget_forcing_exact",
    "faithfulness_change_trail",
    "faithfulness_change_lora",
    "audit_auroc",
    "audit_auroc_adaptive",
    "audit_fpr",
    "s1_selected_vs_random",
    "five_tasks_backward_transfer",
    "trail_vs_lora_forgetting_ratio",
    "trail_vs_protected_lora_worst_ratio",
    "trail_vs_lora_parameters_ratio",
    "trail_vs_lora_accuracy_difference",
    "method_guarded_trail_accuracy",
    "method_guarded_trail_wikitext2_nats",
    "method_lora_accuracy",
    "method_lora_wikitext2_nats",
    "method_sc_lora_accuracy",
    "method_sc_lora_wikitext2_nats",
    "method_curlora_accuracy",
    "method_curlora_wikitext2_nats",
    "method_i_lora_accuracy",
    "method_i_lora_wikitext2_nats",
    "method_loreft_accuracy",
    "method_loreft_wikitext2_nats",
}


def test_owed_claims_are_there() -> None:
    assert set(CLAIMS) >= OWED


@pytest.mark.parametrize("name", sorted(CLAIMS))
def test_claim_stands_in_its_result_file(name: str) -> None:
    entry = CLAIMS[name]
    result = json.loads((ROOT / entry["file"]).read_text())
    told = next(claim for claim in result["claims"] if claim["id"] == name)
    for key in ("claim", "target", "measured", "interval", "unit"):
        assert entry[key] == told[key], key
    for key in ("command", "date", "hardware"):
        assert entry[key] == result[key], key
    assert result["versions"]["torch"] and result["raw"] is not None
    experiment = Path(entry["file"]).stem
    assert f"{entry['command']} ".startswith(f"python -m benchmarks.{experiment} ")
    assert (ROOT / "benchmarks" / experiment / "__main__.py").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_figures_in_docs_are_the_measured_ones(page: Path) -> None:
    text = page.read_text()
    assert len(MARK.findall(text)) == text.count("<!-- claim:"), "a claim mark does not follow its figure"
    for figure, percent, name in MARK.findall(text):
        value = float(figure.replace(",", "")) / (100 if percent else 1)
        digits = len(figure.split(".")[1]) if "." in figure and "e" not in figure else 0
        tolerance = 0.51 * 10**-digits / (100 if percent else 1) if "e" not in figure else 0.06 * value
        assert value == pytest.approx(CLAIMS[name]["measured"], abs=tolerance), f"{page.name}: {name}"
        assert CLAIMS[name]["file"].split("/")[-1] in text, f"{page.name} states {name} but links to no result file"
