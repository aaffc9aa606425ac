"""The table, the claims and the picture of the limits."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.common.folders import PICTURES
from benchmarks.common.kept import read
from benchmarks.common.models import WIDTH
from benchmarks.common.reading import lost, perplexity_ratio, points
from benchmarks.common.record import Claim, write
from benchmarks.common.texts import UNSEEN

from .arms import ARMS, LR, WORK
from .runs import TRAIN, unlimited_flops


def table() -> None:
    """All runs that there are, as one result file, a table for each size of batch, and a picture.

    The claims are of the largest batch.
    """
    found: dict[int, dict[str, Any]] = {}
    for folder in sorted(WORK.glob("batch-*"), key=lambda folder: -int(folder.name.removeprefix("batch-"))):
        batch = int(folder.name.removeprefix("batch-"))
        runs = read(sorted(folder.glob("*.json")))
        found[batch] = {
            "protocol": {"steps": TRAIN, "batch": batch, "lr": LR, "rehearsal_width": WIDTH},
            "frozen": frozen_figures(runs[0]["frozen"]),
            "arms": summary(runs, batch),
            "runs": [{key: value for key, value in run.items() if key != "frozen"} for run in runs],
        }
    if not found:
        raise SystemExit(f"no run is kept in {WORK}: run this without --table")
    rows = {batch: part["arms"] for batch, part in found.items()}
    raw = {f"batch {batch}": part for batch, part in found.items()}
    seeds = {run["seed"] for part in found.values() for run in part["runs"]}
    write("budget", raw, claims(rows[max(rows)]), seed=sorted(seeds))
    picture(rows).savefig(PICTURES / "budget.png", dpi=100)
    for batch, arms in rows.items():
        print(f"\nbatch {batch}, frozen: {raw[f'batch {batch}']['frozen']}\n\n{markdown(arms)}")


def frozen_figures(frozen: dict[str, Any]) -> dict[str, Any]:
    return {
        **{name: 100 * float(np.mean(frozen[name])) for name in ("trec", "arc_easy", "blimp")},
        "items": {name: len(frozen[name]) for name in ("trec", "arc_easy", "blimp")},
        "perplexity": {k: float(np.exp(np.sum(frozen[k]) / np.sum(n))) for k, n in frozen["counts"].items()},
    }


def summary(runs: list[dict[str, Any]], batch: int) -> dict[str, dict[str, Any]]:
    """A row an arm: items and windows are averaged over seeds, and intervals are over items and windows."""
    arms = {arm: mine for arm in ARMS if (mine := [run for run in runs if run["arm"] == arm])}
    frozen = runs[0]["frozen"]
    base = np.mean([run["step_flops"] for run in arms["none"]]) if "none" in arms else unlimited_flops(batch)
    rows: dict[str, dict[str, Any]] = {}
    for arm, mine in arms.items():
        after = {key: np.mean([run["after"][key] for run in mine], axis=0) for key in frozen if key != "counts"}
        ratios = {
            kind: perplexity_ratio(frozen[kind], after[kind], frozen["counts"][kind])
            for kind in [*UNSEEN, "wikitext2", "own samples"]
        }
        rows[arm] = {
            "limit": ARMS[arm][0],
            "seeds": [run["seed"] for run in mine],
            "accuracy": 100 * float(after["trec"].mean()),
            "accuracy_by_seed": [100 * float(np.mean(run["after"]["trec"])) for run in mine],
            "ratios": ratios,
            "worst": max(UNSEEN, key=lambda kind: ratios[kind].value),
            "worst_by_seed": [worst(run) for run in mine],
            "arc_easy": points(frozen["arc_easy"], after["arc_easy"]),
            "blimp": points(frozen["blimp"], after["blimp"]),
            "flops": float(np.mean([run["step_flops"] + run["fit_flops"] / TRAIN for run in mine]) / base),
            "cpu_seconds": float(np.mean([run["train_seconds"] + run["fit_seconds"] for run in mine])),
            "parameters": mine[0]["parameters"],
        }
    return rows


def worst(run: dict[str, Any]) -> float:
    """The largest perplexity ratio of a run, over the kinds of text that were never rehearsed."""
    frozen, after = run["frozen"], run["after"]
    return float(np.exp(max(lost(frozen[kind], after[kind], frozen["counts"][kind]) for kind in UNSEEN)))


def claims(rows: dict[str, dict[str, Any]]) -> list[Claim]:
    best, own = rows["recommended"], rows["recommended self"]
    seeds = f"{len(best['seeds'])} seeds"
    by_seed = (min(best["accuracy_by_seed"]) / 100, max(best["accuracy_by_seed"]) / 100)
    cost = "FLOPs of training with the recommended limit, fitting included, over those without a limit"
    worst, alone = best["worst"], own["worst"]
    changes = [
        ("wikitext2_ppl_ratio", "WikiText-2 test perplexity over frozen", "", best["ratios"]["wikitext2"], "ratio"),
        ("worst_unseen_ppl_ratio", f"perplexity over frozen on the worst unseen kind of text ({worst})", "<= 1.01",
         best["ratios"][worst], "ratio"),
        ("self_samples_worst_ppl_ratio", f"the same with self-samples only ({alone})", "<= 1.015",
         own["ratios"][alone], "ratio"),
        ("arc_easy_points", "ARC-Easy, change in points", "within 0.5", best["arc_easy"], "points"),
        ("blimp_points", "BLiMP, change in points", "within 0.5", best["blimp"], "points"),
    ]  # fmt: skip
    return [
        Claim(
            "budget_accuracy", f"TREC-6 test accuracy with the recommended limit, {seeds}; lowest and highest seed",
            best["accuracy"] / 100, "accuracy", ">= 0.97", by_seed,
        ),
        *(
            Claim(f"budget_{name}", f"{what}, recommended limit, {seeds}", c.value, unit, target, (c.low, c.high))
            for name, what, target, c, unit in changes
        ),
        Claim("budget_training_cost_ratio", cost, best["flops"], "ratio", "<= 1.25"),
    ]  # fmt: skip


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| limit | seeds | TREC-6 % | WikiText-2 | worst unseen kind | own samples | ARC-Easy | BLiMP | FLOPs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        three = [row["ratios"][kind] for kind in ("wikitext2", row["worst"], "own samples")]
        shown = [f"{ratio:.3f}" for ratio in three]
        shown[1] += f" {row['worst']}"
        moved = [f"{row[kind]:+.1f}" for kind in ("arc_easy", "blimp")]
        cells = [row["limit"], str(len(row["seeds"])), f"{row['accuracy']:.1f}", *shown, *moved, f"{row['flops']:.2f}x"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(tables: dict[int, dict[str, dict[str, Any]]]) -> Any:
    """Task accuracy against the worst perplexity ratio, a dot a seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    every = [(f"{arm}, batch {batch}", row) for batch, rows in tables.items() for arm, row in rows.items()]
    for number, (arm, row) in enumerate(every):
        marker, colour = "osD^vP"[number // 8 % 6], f"C{number % 8}"
        lost = [max(100 * (ratio - 1), 1e-3) for ratio in row["worst_by_seed"]]
        axes.plot(lost, row["accuracy_by_seed"], marker, color=colour, label=arm, alpha=0.8)
    axes.axvline(1, color="grey", linestyle=":", linewidth=1)
    axes.axhline(97, color="grey", linestyle=":", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("perplexity lost on the worst kind of text never rehearsed (%, 0.001 or less at the left edge)")
    axes.set_ylabel("TREC-6 accuracy (%)")
    axes.set_title("What each limit learns and what it loses (SmolLM2-135M, a dot a seed)")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    return figure
