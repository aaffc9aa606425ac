"""Learning without forgetting: what rehearsal keeps, what alignment and waypoints teach, and whether it is the way.

    python -m benchmarks.retention                       # what has not been measured yet, then the table
    python -m benchmarks.retention --part replay         # some of it: replay, align, waypoints or form; --seeds 0 1 2
    python -m benchmarks.retention --table               # the table of what there is

`replay` teaches TREC-6 to rank-4 additive trails on all layers and tokens, which without limits wrecks the model, in
batches of 8, and mixes in what is rehearsed. `align`, `waypoints` and `form` are about the chains of `make demo`.
Everything is read on held-out items, in pairs with the frozen model. Each run is kept in a file until all are a table.
"""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import kept
from benchmarks.common.options import parser
from benchmarks.common.record import Claim, environment, over_seeds, write

from .parts import PARTS, WORK, Bench


def path(part: str, arm: str, seed: int) -> Path:
    return WORK / f"{part}-{arm.replace(' ', '-')}-{seed}.json"


def read(part: str, arm: str) -> list[dict[str, Any]]:
    return kept.read(path(part, arm, seed) for seed in range(10))


def change(runs: list[dict[str, Any]], task: str, measure: str) -> list[float]:
    return [figure(run, task, measure)["change"] for run in runs]


def figure(run: dict[str, Any], task: str, measure: str) -> dict[str, Any]:
    return next(loss for loss in run["suite"] if (loss["task"], loss["measure"]) == (task, measure))


def table() -> None:
    raw = {part: {arm: read(part, arm) for arm in arms} for part, (_, arms) in PARTS.items()}
    if not any(runs for arms in raw.values() for runs in arms.values()):
        raise SystemExit(f"no run is kept in {WORK}: run this without --table")
    claims: list[Claim] = []

    def claim(name: str, told: str, values: list[float], unit: str, target: str = "") -> None:
        if values:
            claims.append(over_seeds(name, told, values, unit, target))

    for name, arm in (
        ("replay_1pct_wikitext2_nats", "replay 1 %"),
        ("self_rehearsal_wikitext2_nats", "self-rehearsal 1 %"),
    ):
        runs = raw["replay"][arm]
        accuracy = [figure(run, "trec", "accuracy")["after"] for run in runs]
        if runs:
            told = f"nats a token lost on WikiText-2 test, {arm}, TREC-6 at {statistics.fmean(accuracy):.3f}"
            claim(name, told, change(runs, "wikitext2", "nats a token"), "nats")
    gains = [run["after"]["a_accuracy"] - run["before"]["a_accuracy"] for run in raw["align"]["boundary"]]
    claim("aft_a_accuracy_gain", "gain in A-accuracy on held-out questions, boundary constraint", gains, "accuracy")
    gains = [(run["steered"] - run["frozen"]) / run["of"] for run in raw["waypoints"]["relative"]]
    claim("waypoints_task_gain", "gain in held-out accuracy of waypoints from four chains shown", gains, "accuracy")
    shares = [
        min(run["scores"][form]["steered"] for form in ("renamed", "longer")) / run["scores"]["held-out"]["steered"]
        for run in raw["form"]["demo"]
    ]
    told = "share of held-out accuracy kept, the worse of renamed and longer"
    claim("renamed_longer_kept", told, shares, "share", ">= 0.8")
    for arm, runs in raw["replay"].items():
        for loss in runs[0]["suite"] if runs else []:
            found = change(runs, loss["task"], loss["measure"])
            bounds = f"[{min(found):+.3f}, {max(found):+.3f}]"
            print(arm, loss["task"], loss["measure"], f"{statistics.fmean(found):+.3f} {bounds}", len(runs))
    write("retention", raw, claims, seed=[0, 1, 2])


if __name__ == "__main__":
    options = parser(__doc__, seeds=True, table=True)
    options.add_argument("--part", choices=list(PARTS))
    options.add_argument("--arms", nargs="+")
    told = options.parse_args()
    torch.set_num_threads(1)
    if not told.table:
        bench = Bench()
        for part, (measure, arms) in PARTS.items():
            for seed in told.seeds if told.part in (None, part) else []:
                for arm in told.arms or arms:
                    made = {"arm": arm, "seed": seed, **environment()}
                    run = partial(measure, bench, arm, seed)
                    kept.keep(path(part, arm, seed), lambda made=made, run=run: made | run())
    if told.part is None:
        table()
