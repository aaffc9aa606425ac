"""Does drift foretell forgetting?  Rank correlations of the measures with nats lost on text that was never rehearsed.

Twelve trails without limits are taught a little of TREC-6, at learning rates and on layers that harm the model more or
less. Drift is measured on WikiText-2 test text. What it is to foretell is the mean of the nats a token lost on the five
other kinds of text of `common/texts.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import stats

import tokenpaths as tp
from benchmarks.common.folders import DATA
from benchmarks.common.reading import counts_of, nats_of
from benchmarks.common.record import Claim, write
from benchmarks.common.texts import UNSEEN, kinds
from tokenpaths.demo import demo_model
from tokenpaths.drift import (
    Meter,
    attention_entropy,
    attention_js,
    brier,
    cka,
    cosine_shift,
    displacement,
    effective_rank,
    flips,
    frechet,
    js,
    kl,
    mmd,
    nll,
    participation_ratio,
    path_length,
    procrustes,
    reverse_kl,
    rsa,
    sink_mass,
    sliced_w2,
    turning_angle,
)
from tokenpaths.engine import runs
from tokenpaths.lab.forgetting import trec_pairs

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
LAYERS = {"all": slice(None), "upper half": slice(15, None), "three": [7, 15, 23]}
STEPS, BATCH = 25, 8
WINDOWS, WIDTH, SAMPLE = 6, 128, 256
SIMILAR = {"cka", "rsa"}  # 1 where nothing has changed


def train(model: Any, examples: list[tp.Example], layers: Any, lr: float, seed: int) -> tp.TrailMap:
    torch.manual_seed(seed)
    trails = tp.TrailMap({site: tp.DiReFT(tp.width(model), rank=4) for site in tp.sites(model, layers)})
    for _ in tp.steps(
        model, trails, [tp.Imitate(examples)], steps=STEPS, batch_size=BATCH // 2, accumulate=2, lr=lr, seed=seed,
        progress=False,
    ):  # fmt: skip
        pass
    return trails


def spoken(model: Any, texts: dict[str, list[tp.Example]]) -> float:
    """Nats a token, the mean over the unseen kinds of text."""
    nats, counts = nats_of(model, texts), counts_of(texts)
    return float(np.mean([sum(nats[kind]) / sum(counts[kind]) for kind in texts]))


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
        meter.read(tp.data.collate(examples[start : start + 2]))
    found: dict[str, list[float]] = {}
    for record in meter.report().records():
        if record["run"] in ("", "change") and record["mean"] is not None:
            value = 1 - record["mean"] if record["name"] in SIMILAR else abs(record["mean"])
            found.setdefault(record["name"], []).append(value)
    return {name: float(np.nanmean(values)) for name, values in found.items()}


def measure() -> tuple[list[dict[str, Any]], float]:
    """What each trail harms and how far it drifts; and the nats of the frozen model."""
    model, tokenizer = demo_model()
    found = kinds(tokenizer, WINDOWS // 2, WIDTH)
    texts = {kind: found[kind] for kind in UNSEEN}
    examples = kinds(tokenizer, WINDOWS, WIDTH)["wikitext2"]
    task = tp.encode(trec_pairs(DATA), tokenizer, eos=False)
    before = spoken(model, texts)
    rows: list[dict[str, Any]] = []
    for seed, (layers, lr) in enumerate((layers, lr) for layers in LAYERS for lr in RATES):
        trails = train(model, task, LAYERS[layers], lr, seed)
        with tp.attach(model, trails):
            harm = spoken(model, texts) - before
        model.set_attn_implementation("eager")
        drifts = read(model, trails, examples)
        model.set_attn_implementation("sdpa")
        rows.append({"layers": layers, "lr": lr, "seed": seed, "harm": harm, **drifts})
        print(layers, lr, f"harm {harm:.4f} KL {drifts['kl']:.4f}", flush=True)
    return rows, before


def rank(x: np.ndarray, y: np.ndarray) -> float:
    return stats.spearmanr(x, y).statistic


def correlation(values: np.ndarray, harms: np.ndarray) -> dict[str, float]:
    """Of a measure with the harm, and its interval over trails."""
    drawn = stats.bootstrap(
        (values, harms), rank, paired=True, vectorized=False, n_resamples=2000, method="percentile", rng=0
    )
    low, high = drawn.confidence_interval
    return {"rank": float(rank(values, harms)), "low": float(low), "high": float(high)}


def main() -> None:
    torch.set_num_threads(1)
    rows, before = measure()
    harms = np.array([row["harm"] for row in rows])
    measures = [name for name in rows[0] if name not in ("layers", "lr", "seed", "harm")]
    found = {name: correlation(np.array([row[name] for row in rows]), harms) for name in measures}
    for name, c in sorted(found.items(), key=lambda item: -item[1]["rank"]):
        print(f"{name:20} {c['rank']:.3f} [{c['low']:.3f}, {c['high']:.3f}]")
    first = found["kl"]
    told = (
        f"Spearman rank correlation, over {len(rows)} trained trails, of KL on WikiText-2 test with nats lost on five "
        "kinds of text that were never rehearsed; bootstrap over trails"
    )
    bounds = (first["low"], first["high"])
    claim = Claim("drift_foretells_forgetting", told, first["rank"], "correlation", ">= 0.9", bounds)
    raw = {"trails": rows, "correlations": found, "frozen_nats": before}
    write("foretell", raw, [claim], seed=list(range(len(rows))))


if __name__ == "__main__":
    main()
