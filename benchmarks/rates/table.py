"""The table and the claims of what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.common.record import Claim, over_seeds, write

Runs = list[dict[str, Any]]
PLACE = {"smollm2": "first", "gemma": "second"}
CALLED = {"smollm2": "SmolLM2-135M-Instruct", "gemma": "Gemma 3 270M"}


def table(runs: Runs, rest: dict[str, Any], seeds: Sequence[int]) -> None:
    """Print the table, and write the result file and the claims."""
    print(f"\n{'model':10}{'scale':>7}{'way':>38}{'rates':>20}{'right':>8}{'nats':>8}{'seeds':>7}")
    for key in dict.fromkeys(_key(run) for run in runs):
        told = [run for run in runs if _key(run) == key]
        rates = f"{min(run['lr'] for run in told):.2g} to {max(run['lr'] for run in told):.2g}"
        model, scale, way = key
        print(f"{model:10}{scale:>7g}{way:>38}{rates:>20}{_right(told):>8.3f}{_mean(told, 'nats'):>8.3f}{len(told):>7}")
    for way, rates in rest["chosen"].items():
        print(way, {model: [f"{rate:.2g}" for rate in found] for model, found in rates.items()})
    claims = [claim for model in PLACE for claim in _claims(runs, model)]
    write("rates", {"runs": runs, **rest}, [*claims, _of_copies(runs)], seed=list(seeds))


def _claims(runs: Runs, model: str) -> list[Claim]:
    """Of one model: at the rate that is found, and at the best of the rates set by hand, which knows the test items."""
    here = [run for run in runs if run["model"] == model and run["scale"] == 1]
    found = [run for run in here if run["way"] == "found"]
    by_hand = [[run for run in here if run["way"] == way] for way in sorted({run["way"] for run in here})]
    best = max((arm for arm in by_hand if arm[0]["way"].startswith("by hand")), key=_right)
    name, told = f"defaults_{PLACE[model]}_model", f"the demo's chain, {CALLED[model]}, 128 held-out questions a seed"
    at = f"at the best of the rates set by hand ({best[0]['lr']:g})"
    return [
        over_seeds(f"{name}_accuracy", f"{told}: share right at the rate found", _shares(found), "share of questions"),
        over_seeds(f"{name}_best", f"{told}: share right {at}", _shares(best), "share of questions"),
        over_seeds(f"{name}_drift", f"{told}: drift at the rate found", [run["nats"] for run in found], "nats a token"),
        over_seeds(f"{name}_best_drift", f"{told}: drift {at}", [run["nats"] for run in best], "nats a token"),
    ]


def _of_copies(runs: Runs) -> Claim:
    """The worst of the scaled copies."""
    copies = {(run["model"], run["scale"]) for run in runs if run["scale"] != 1}
    arms = [[run for run in runs if (run["model"], run["scale"]) == copy] for copy in sorted(copies)]
    worst = min(arms, key=_right)
    all_of_them = ", ".join(f"{CALLED[model]} times {scale:g}" for model, scale in sorted(copies))
    told = (
        f"the demo's chain at the rate found, copies with a scaled residual stream ({all_of_them}): share right in the "
        f"worst, {CALLED[worst[0]['model']]} times {worst[0]['scale']:g}"
    )
    return over_seeds("defaults_scaled_model_accuracy", told, _shares(worst), "share of questions")


def _key(run: dict[str, Any]) -> tuple[str, float, str]:
    return run["model"], run["scale"], run["way"]


def _shares(runs: Runs) -> list[float]:
    return [run["right"] / run["of"] for run in runs]


def _right(runs: Runs) -> float:
    return statistics.fmean(_shares(runs))


def _mean(runs: Runs, name: str) -> float:
    return statistics.fmean(run[name] for run in runs)
