"""What does reading drift cost beside the forwards that it needs, and does its memory grow?

Trails on all layers, so that the two runs share nothing but the embedding: the default measures of `drift`, against a
frozen and a steered forward of the same batches, in alternation, in CPU seconds of one thread. Memory is the peak of
the process while a tiny random Llama is read, over ten thousand, a hundred thousand and a million tokens.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch

import tokenpaths as tp
from benchmarks.common.clock import timed
from benchmarks.common.process import peak_mib
from benchmarks.common.record import Claim, write
from tokenpaths.demo import demo_model
from tokenpaths.drift import Meter
from tokenpaths.engine import runs

ROUNDS, TEXTS, WIDTH = 7, 4, 256
TOKENS = [10_000, 100_000, 1_000_000]


def texts(count: int, width: int, vocabulary: int, seed: int) -> tp.data.Batch:
    ids = torch.randint(3, vocabulary, (count, width), generator=torch.Generator().manual_seed(seed))
    return tp.data.collate([tp.Example(tuple(row), (False,) * width) for row in ids.tolist()])


def moving(model: Any) -> tp.TrailMap:
    torch.manual_seed(0)
    return tp.TrailMap({s: tp.trails.DiReFT(tp.width(model), 4, init="paper") for s in tp.sites(model)})


def forwards(model: Any, trails: tp.TrailMap, batch: tp.data.Batch) -> None:
    inputs = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    with torch.no_grad():
        model(**inputs)
        with tp.attach(model, trails):
            model(**inputs, prompt_mask=batch.prompt_mask)


def costs() -> list[dict[str, float]]:
    model, tokenizer = demo_model()
    trails = moving(model)
    meter = Meter(*runs(model, trails))
    rounds = []
    for seed in range(ROUNDS + 1):
        batch = texts(TEXTS, WIDTH, len(tokenizer), seed)
        plain = timed(partial(forwards, model, trails, batch))()
        read = timed(partial(meter.read, batch))()
        rounds.append({"forwards": plain, "reading": read, "ratio": read / plain})
        print(rounds[-1], flush=True)
    return rounds[1:]  # the first one warms up


def memory() -> list[dict[str, float]]:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config).eval()
    meter, read, found = Meter(*runs(model, moving(model))), 0, []
    for tokens in TOKENS:
        while read < tokens:
            meter.read(texts(8, 250, 512, read))
            read += 8 * 250
        found.append({"tokens": read, "peak_mib": peak_mib()})
        print(found[-1], flush=True)
    return found


def main() -> None:
    torch.set_num_threads(1)
    grown = memory()
    rounds = costs()
    ratios = sorted(round["ratio"] for round in rounds)
    cost = (
        f"CPU time of reading drift over that of the two forwards it needs, median of {len(ratios)} rounds of "
        f"{TEXTS * WIDTH} tokens, SmolLM2-135M with trails on all layers; lowest and highest round"
    )
    growth = "peak memory of a process that has read a million tokens, over that after ten thousand"
    times = grown[-1]["peak_mib"] / grown[0]["peak_mib"]
    claims = [
        Claim("drift_reading_cost_ratio", cost, statistics.median(ratios), "ratio", "<= 1.15", (ratios[0], ratios[-1])),
        Claim("drift_reading_memory_growth", growth, times, "ratio", "flat"),
    ]
    write("reading_cost", {"rounds": rounds, "memory": grown}, claims, seed=0)


if __name__ == "__main__":
    main()
