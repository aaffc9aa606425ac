"""One run: an arm is trained from a seed, and what it kept is read into a file of its own."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import tokenpaths as tp
from benchmarks.common.folders import DATA
from benchmarks.common.kept import kept, write_json
from benchmarks.common.reading import correct, counts_of, nats_of
from benchmarks.common.texts import kinds
from tokenpaths.lab.forgetting import arc_easy, blimp

from .arms import ARMS, LR, WORK, Bench, unlimited

TRAIN = 200  # steps
COUNTED = 4


def run(arm: str, seed: int, batch: int, items: int | None) -> None:
    """Train one arm from one seed and read what it kept, into a file of its own."""
    bench = Bench(batch)
    frozen = kept(WORK / f"frozen-{items}.json", lambda: read(bench, items))
    torch.manual_seed(seed)
    began = time.process_time()
    with FlopCounterMode(display=False) as fitting:
        trails, goals, options = ARMS[arm][1](bench)
    fitted = time.process_time()
    finish = options.pop("finish", {arm: lambda trails: trails})
    micro = max(1, min(8, batch // 2))  # sorted by length, small batches pad little
    log: list[dict[str, Any]] = []
    counter = FlopCounterMode(display=False)
    counter.__enter__()  # the first steps are counted, as many as the longest `every`
    for step in tp.steps(
        bench.model, trails, [tp.Imitate(bench.train), *goals], steps=TRAIN, batch_size=micro,
        accumulate=batch // micro, **{"lr": LR, **options}, seed=seed, progress=False,
    ):  # fmt: skip
        if step.step == COUNTED:
            counter.__exit__(None, None, None)
        log.append({"losses": step.losses, "weights": step.weights, "kept": step.kept, "trust": step.trust})
        if step.step % 20 == 0:
            print(arm, seed, step.step, [round(loss, 3) for loss in step.losses], step.weights, flush=True)
    trained = time.process_time() - fitted
    for name, make in finish.items():
        began_again = time.process_time()
        with FlopCounterMode(display=False) as finishing:
            made = make(trails)
        seconds = fitted - began + time.process_time() - began_again
        with tp.attach(bench.model, made):
            after = read(bench, items)
        result = {
            "arm": name, "seed": seed, "parameters": made.size(), "fit_seconds": seconds, "train_seconds": trained,
            "fit_flops": fitting.get_total_flops() + finishing.get_total_flops(),
            "step_flops": counter.get_total_flops() / COUNTED, "frozen": frozen, "after": after, "log": log,
        }  # fmt: skip
        write_json(path(name, seed, batch), result)
        made.save(path(name, seed, batch).with_suffix(".safetensors"), bench.model)


def read(bench: Bench, items: int | None) -> dict[str, Any]:
    """Everything that is read of a model: outcomes an item, and nats a window."""
    texts = kinds(bench.tokenizer, windows=4)
    texts["own samples"] = bench.own(3, 32)
    tasks = {"trec": bench.test, "arc_easy": arc_easy(DATA, items).items, "blimp": blimp(DATA, items).items}
    chosen = {name: correct(bench.model, bench.tokenizer, asked) for name, asked in tasks.items()}
    return {**nats_of(bench.model, texts), "counts": counts_of(texts), **chosen}


def path(arm: str, seed: int, batch: int) -> Path:
    return WORK / f"batch-{batch}" / f"{arm.replace(' ', '-')}-{seed}.json"


def unlimited_flops(batch: int) -> float:
    """FLOPs of a step without limits, where no such run has been made: the first steps of one."""
    bench = Bench(batch)
    trails, _, options = unlimited(bench)
    micro = min(8, batch // 2)
    with FlopCounterMode(display=False) as counter:
        for _ in tp.steps(
            bench.model, trails, [tp.Imitate(bench.train)], steps=COUNTED, batch_size=micro,
            accumulate=batch // micro, seed=0, progress=False, **options,
        ):  # fmt: skip
            pass
    return counter.get_total_flops() / COUNTED
