"""One run of the comparison: one method is trained, and what it learned and lost is read."""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

import tokenpaths as tp
from benchmarks.common.folders import DATA, KEPT
from benchmarks.common.kept import kept, read
from benchmarks.common.process import peak_mib
from benchmarks.common.reading import correct, counts_of, nats_of
from benchmarks.common.record import environment
from benchmarks.common.texts import kinds
from tokenpaths.lab.forgetting import arc_easy, blimp

from .methods import METHODS, Bench, Method
from .tasks import MADE

WORK = KEPT / "compare"
COUNTED = 6  # steps whose FLOPs are counted: the longest `every`
TRIAL_SEED = 100
EQUAL = "equal FLOPs"


@dataclass(frozen=True)
class One:
    """One run. `lr` is None where it is to be the chosen one, and given in a trial."""

    task: str
    method: str
    protection: str
    seed: int
    lr: float | None = None
    quick: bool = False

    @property
    def name(self) -> str:
        parts = [self.task, self.method, self.protection, f"seed {self.seed}"]
        parts += [] if self.lr is None else [f"lr {self.lr:g}"]
        return ", ".join(parts)

    @property
    def folder(self) -> Path:
        return WORK / ("quick" if self.quick else "full")

    @property
    def file(self) -> Path:
        return self.folder / f"{self.name.replace(', ', '--').replace(' ', '-')}.json"


def measure(one: One) -> dict[str, Any]:
    """Train one method and read what it learned and lost. A trial of a learning rate reads validation items only."""
    bench = Bench(MADE[one.task](), WORK, one.quick)
    trial = one.lr is not None
    rate = one.lr or chosen_rate(one)
    method = METHODS[one.method].make(bench, one.seed)
    goals: list[Any] = [tp.Imitate(bench.train), *method.goals]
    if one.protection in ("rehearsal", "both"):
        goals.append(tp.Replay(bench.rehearsed, every=6, batch_size=1))  # of 6 x 16 + 1 examples one: 1.03 %
    if one.protection in ("budget", "both"):
        goals.append(tp.Stay(bench.held, within=0.01, batch_size=2))
    resident, count = peak_mib(), equal_steps(one, bench, method) if one.protection == EQUAL else bench.steps
    found: dict[str, Any] = {"run": vars(one), **environment(), "lr": rate, "steps": count}
    found["parameters"] = sum(p.numel() for p in method.adapter.parameters() if p.requires_grad)
    with ExitStack() as stack:
        began, counter = time.process_time(), stack.enter_context(FlopCounterMode(display=False))
        for step in tp.steps(
            method.model, method.adapter, goals, steps=count, batch_size=16, lr=rate, seed=one.seed,
            progress=False,
        ):  # fmt: skip
            method.after_step()
            if step.step == COUNTED:
                stack.close()  # counting slows a step down, so these are not timed
                began = time.process_time()
    trained = time.process_time()
    adapter = method.adapter if trial else method.finish()  # a rate is chosen before gates are fitted
    found["seconds"] = (trained - began) * count / (count - COUNTED) + time.process_time() - trained
    found |= {"step_flops": counter.get_total_flops() / COUNTED, "peak_mib": peak_mib() - resident}
    found |= {"losses": step.losses, "notes": method.notes}
    with method.at_work(adapter):
        if trial:
            return found | {"validation": bench.task.validation.right(method.model, bench.tokenizer)}
        found["after"] = reading(bench, method.model, one.quick)
    file = one.folder / f"frozen-{one.task}.json"
    return found | {"before": kept(file, lambda: reading(bench, bench.model, one.quick))}


def reading(bench: Bench, model: Any, quick: bool) -> dict[str, Any]:
    """Outcomes an item, and nats a window, of a model as it is at work."""
    texts = kinds(bench.tokenizer, windows=2 if quick else 4)
    texts["own samples"] = bench.own(3, 16 if quick else 32)
    return {
        "nats": nats_of(model, texts),
        "counts": counts_of(texts),
        "task": bench.task.test.right(model, bench.tokenizer),
        "arc_easy": correct(model, bench.tokenizer, arc_easy(DATA, 40).items),
        "blimp": correct(model, bench.tokenizer, blimp(DATA, 100).items),
    }


def equal_steps(one: One, bench: Bench, method: Method) -> int:
    """As many as take LoRA's FLOPs, less those of the forwards that fit gates: 2 a weight of the blocks and token."""
    plain = [One(one.task, name, "none", one.seed, quick=one.quick) for name in ("LoRA", one.method)]
    lora, own = read(run.file for run in plain)
    weights = sum(p.numel() for block in tp.site.find_blocks(bench.model) for p in block.parameters())
    fitting = 2 * weights * method.notes.get("tokens that gates are fitted on", 0)
    return round((lora["steps"] * lora["step_flops"] - fitting) / own["step_flops"])


def chosen_rate(one: One) -> float:
    """The learning rate of the trial that was right most often on validation items; of equals the lower."""
    found = {trial["lr"]: trial["validation"] for trial in read(trial.file for trial in trials(one))}
    return max(found, key=lambda rate: (statistics.fmean(found[rate]), -rate))


def trials(one: One) -> list[One]:
    """The trials of learning rates that a run waits for; the quick version has time for two."""
    rates = METHODS[one.method].rates[: 2 if one.quick else None] if one.lr is None else ()
    return [One(one.task, one.method, "none", TRIAL_SEED, rate, one.quick) for rate in rates]
