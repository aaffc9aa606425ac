"""Tables, claims and the picture of the comparison, from the runs that there are."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.common import reading
from benchmarks.common.folders import PICTURES
from benchmarks.common.reading import points
from benchmarks.common.record import Claim, over_seeds, write
from benchmarks.common.texts import UNSEEN

TRAIL, LORA = "guarded trail", "LoRA"

Runs = list[dict[str, Any]]  # of one method and protection, a run a seed
Cells = dict[tuple[str, str, str], Runs]  # by task, method and protection


def cells(runs: Sequence[dict[str, Any]]) -> Cells:
    found: Cells = {}
    for run in runs:
        found.setdefault((run["run"]["task"], run["run"]["method"], run["run"]["protection"]), []).append(run)
    return found


def lost(run: dict[str, Any], kind: str) -> float:
    """Nats a token lost on a kind of text."""
    return reading.lost(run["before"]["nats"][kind], run["after"]["nats"][kind], run["before"]["counts"][kind])


def worst(run: dict[str, Any]) -> float:
    """Nats a token lost on the kind of text, of those never rehearsed, that lost most."""
    return max(lost(run, kind) for kind in UNSEEN)


def accuracy(runs: Runs) -> np.ndarray:
    """Of each item, the share of seeds that were right."""
    return np.mean([run["after"]["task"] for run in runs], axis=0)


def shown(values: Sequence[float], form: str = ".3f") -> str:
    """The mean, and the lowest and highest seed."""
    mean = statistics.fmean(values)
    return f"{mean:{form}} [{min(values):{form}}, {max(values):{form}}]" if len(values) > 1 else f"{mean:{form}}"


def markdown(found: Cells, task: str) -> str:
    base = next(runs[0]["before"] for (name, _, _), runs in found.items() if name == task)
    lines = [
        f"\n{task}: frozen accuracy {np.mean(base['task']):.3f}\n",
        "| method | protection | seeds | accuracy | WikiText-2, nats | worst unseen kind, nats | own samples, nats | "
        "ARC-Easy | BLiMP | parameters | lr | CPU s | GFLOP a step | peak MiB |",
        "|" + "---|" * 14,
    ]
    for (name, method, protection), runs in found.items():
        if name != task:
            continue
        choices = [
            points(base[kind], np.mean([run["after"][kind] for run in runs], axis=0)) for kind in ("arc_easy", "blimp")
        ]
        lines.append(
            f"| {method} | {protection} | {len(runs)} | "
            f"{shown([float(np.mean(run['after']['task'])) for run in runs])} | "
            f"{shown([lost(run, 'wikitext2') for run in runs], '+.4f')} | "
            f"{shown([worst(run) for run in runs], '+.4f')} | "
            f"{shown([lost(run, 'own samples') for run in runs], '+.4f')} | "
            + " | ".join(f"{change:+.1f}" for change in choices)
            + f" | {runs[0]['parameters']:,} | {runs[0]['lr']:g} | "
            f"{statistics.fmean(run['seconds'] for run in runs):.0f} | "
            f"{runs[0]['step_flops'] / 1e9:.0f} | {statistics.median(run['peak_mib'] for run in runs):.0f} |"
        )
    return "\n".join(lines)


def claims(found: Cells, task: str) -> list[Claim]:
    made: list[Claim] = []
    for (name, method, protection), runs in found.items():
        if name != task or protection != "none":
            continue
        slug = method.lower().replace("-", "_").replace(" ", "_")
        told = f"{method} without protections, {task}"
        right = [float(np.mean(run["after"]["task"])) for run in runs]
        nats = [lost(run, "wikitext2") for run in runs]
        made.append(over_seeds(f"method_{slug}_accuracy", f"test accuracy, {told}", right, "accuracy"))
        made.append(over_seeds(f"method_{slug}_wikitext2_nats", f"nats lost on WikiText-2 test, {told}", nats, "nats"))
    trail, plain = found.get((task, TRAIL, "none")), found.get((task, LORA, "none"))
    held = found.get((task, LORA, "both"))
    if trail and plain:
        pairs = list(zip(trail, plain, strict=False))
        made += [
            ratio("trail_vs_lora_forgetting_ratio", f"nats lost on WikiText-2 test, {TRAIL} over plain LoRA, {task}",
                  [(lost(a, "wikitext2"), lost(b, "wikitext2")) for a, b in pairs], "<= 0.1"),
            Claim("trail_vs_lora_parameters_ratio", f"trainable parameters, {TRAIL} over LoRA r=8 on all linear maps",
                  trail[0]["parameters"] / plain[0]["parameters"], "ratio", "<= 0.2"),
            ratio("trail_vs_lora_seconds_ratio", f"CPU seconds of training, fitting of gates included, {TRAIL} over "
                  f"plain LoRA, {task}", [(a["seconds"], b["seconds"]) for a, b in pairs], "<= 1"),
        ]  # fmt: skip
        change = points(accuracy(plain), accuracy(trail))
        made.append(
            Claim("trail_vs_lora_accuracy_difference", f"test accuracy of {TRAIL} less that of plain LoRA, {task}, in "
                  "pairs, seeds averaged", change.value / 100, "accuracy", "interval holds 0",
                  (change.low / 100, change.high / 100))
        )  # fmt: skip
    if trail and held:
        pairs = list(zip(trail, held, strict=False))
        made.append(
            ratio("trail_vs_protected_lora_worst_ratio", f"nats lost on the worst unseen kind of text, {TRAIL} over "
                  f"LoRA with rehearsal and budget, {task}", [(worst(a), worst(b)) for a, b in pairs], "<= 0.5")
        )  # fmt: skip
    return made


def ratio(name: str, told: str, pairs: Sequence[tuple[float, float]], target: str) -> Claim:
    """Of the sums over seeds, with the lowest and highest seed."""
    ours, theirs = (sum(side) for side in zip(*pairs, strict=True))
    by_seed = [a / b for a, b in pairs]
    told = f"{told}, {len(pairs)} seeds; lowest and highest seed"
    return Claim(name, told, ours / theirs, "ratio", target, (min(by_seed), max(by_seed)))


def picture(found: Cells, tasks: Sequence[str]) -> Any:
    """Plasticity against stability: a dot a seed, filled with both protections, and the Pareto front of the means."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2 * len(tasks), 5), layout="constrained")
    methods = list(dict.fromkeys(method for _, method, _ in found))
    for axes, task in zip(np.atleast_1d(figure.subplots(1, len(tasks))), tasks, strict=True):
        means: list[tuple[float, float]] = []
        for (name, method, protection), runs in found.items():
            if name != task or protection not in ("none", "both"):
                continue
            colour = f"C{methods.index(method)}"
            x = [max(worst(run), 1e-4) for run in runs]
            y = [float(np.mean(run["after"]["task"])) for run in runs]
            means.append((statistics.fmean(x), statistics.fmean(y)))
            face = colour if protection == "both" else "none"
            label = method + (", protected" if protection == "both" else "")
            axes.scatter(x, y, color=colour, facecolors=face, label=label, s=36)
        front = [p for p in sorted(means) if not any(q[0] <= p[0] and q[1] > p[1] for q in means)]
        axes.plot(*zip(*front, strict=True), color="grey", linewidth=1, linestyle=":", zorder=0)
        axes.set(xscale="log", title=task, ylabel="accuracy on held-out items")
        axes.set_xlabel("nats a token lost on the worst unseen kind of text (0.0001 or less at the left)")
        axes.grid(alpha=0.2)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    return figure


def tables(runs: Sequence[dict[str, Any]], tasks: Sequence[str], *, quick: bool) -> None:
    if not runs:
        raise SystemExit("no run is kept: run this without --table")
    found = cells(runs)
    there = [task for task in tasks if any(name == task for name, _, _ in found)]
    for task in there:
        print(markdown(found, task))
    made = claims(found, tasks[0])
    if quick:
        print(*made, sep="\n")
    else:
        frozen = {task: next(run["before"] for run in runs if run["run"]["task"] == task) for task in there}
        told = [{key: value for key, value in run.items() if key != "before"} for run in runs]
        write("compare", {"frozen": frozen, "runs": told}, made, seed=sorted({run["run"]["seed"] for run in runs}))
        picture(found, there).savefig(PICTURES / "compare.png", dpi=100)
