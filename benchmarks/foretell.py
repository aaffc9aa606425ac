"""Does drift foretell forgetting?  Rank correlations of the measures with nats lost on text that was never rehearsed.

Reads the trails that `budget.py` has trained. Drift is measured on WikiText-2 test text. What is foretold is the mean
of the nats a token lost on the five kinds of text that no arm has rehearsed (of which WikiText-2 is none).

    python benchmarks/budget.py && python benchmarks/foretell.py
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import torch
from _record import Claim, write
from _texts import kinds
from budget import DATA, UNSEEN, WORK
from scipy import stats

import tokenpaths as tp
from tokenpaths.demo import demo_model, fast_dtype
from tokenpaths.drift import Meter, runs
from tokenpaths.drift.attention import attention_entropy, attention_js, sink_mass
from tokenpaths.drift.measures import (
    brier,
    cosine_shift,
    displacement,
    flips,
    js,
    kl,
    nll,
    path_length,
    reverse_kl,
    turning_angle,
)  # fmt: skip
from tokenpaths.drift.sets import (
    cka,
    effective_rank,
    frechet,
    mmd,
    participation_ratio,
    procrustes,
    rsa,
    sliced_w2,
)  # fmt: skip

WINDOWS, WIDTH, SAMPLE = 6, 128, 256
SIMILAR = {"cka", "rsa"}  # 1 where nothing has changed


def harm(result: dict[str, Any]) -> float:
    """Nats lost a token, the mean over the unseen kinds of text."""
    frozen, after = result["frozen"], result["after"]
    return float(np.mean([(np.sum(after[k]) - np.sum(frozen[k])) / np.sum(frozen["counts"][k]) for k in UNSEEN]))


def read(model: Any, trails: tp.TrailMap, examples: list[tp.Example]) -> dict[str, float]:
    """Each measure as one number: its mean over tokens, and over the layers where it has any."""
    meter = Meter(
        *runs(model, trails),
        measures=(kl, reverse_kl, js, flips, displacement, cosine_shift),
        quantities=(nll, brier, path_length, turning_angle),
        sets=(cka, rsa, procrustes, frechet, mmd, sliced_w2),
        set_quantities=(effective_rank, participation_ratio),
        attention=(attention_js,),
        attention_quantities=(attention_entropy, sink_mass),
        sample=SAMPLE,
    )
    for start in range(0, len(examples), 2):
        meter.read(tp.collate(examples[start : start + 2]))
    found: dict[str, list[float]] = {}
    for record in meter.report().records():
        if record["run"] in ("", "change") and record["mean"] is not None:
            value = 1 - record["mean"] if record["name"] in SIMILAR else abs(record["mean"])
            found.setdefault(record["name"], []).append(value)
    return {name: float(np.nanmean(values)) for name, values in found.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    told = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = demo_model(dtype=fast_dtype())
    model.set_attn_implementation("eager")
    examples = kinds(tokenizer, DATA, WINDOWS, WIDTH)["wikitext2"]
    rows: list[dict[str, Any]] = []
    for file in sorted((WORK / f"batch-{told.batch}").glob("*.json")):
        result = json.loads(file.read_text())
        drifts = read(model, tp.TrailMap.load(file.with_suffix(".safetensors")), examples)
        rows.append({"arm": result["arm"], "seed": result["seed"], "harm": harm(result), **drifts})
        print(rows[-1]["arm"], rows[-1]["seed"], round(rows[-1]["harm"], 4), round(drifts["kl"], 4), flush=True)
    lost = np.array([row["harm"] for row in rows])
    correlations: dict[str, Any] = {}
    for name in rows[0]:
        if name not in ("arm", "seed", "harm"):
            values = np.array([row[name] for row in rows])
            rank = lambda x, y: stats.spearmanr(x, y).statistic  # noqa: E731
            drawn = stats.bootstrap((values, lost), rank, paired=True, vectorized=False, n_resamples=2000, rng=0)
            low, high = drawn.confidence_interval
            correlations[name] = {"rank": float(rank(values, lost)), "low": float(low), "high": float(high)}
    for name, c in sorted(correlations.items(), key=lambda item: -item[1]["rank"]):
        print(f"{name:20} {c['rank']:.3f} [{c['low']:.3f}, {c['high']:.3f}]")
    first = correlations["kl"]
    write(
        "foretell",
        {"batch": told.batch, "trails": rows, "correlations": correlations},
        [
            Claim(
                "drift_foretells_forgetting",
                f"Spearman rank correlation, over {len(rows)} trained trails, of KL on WikiText-2 test "
                "with nats lost on five kinds of text that were never rehearsed; bootstrap over trails",
                first["rank"],
                "correlation",
                ">= 0.9",
                (first["low"], first["high"]),
            )
        ],
        seed=sorted({row["seed"] for row in rows}),
    )
