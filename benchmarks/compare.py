"""Side by side: trails, LoReFT, LoRA, SC-LoRA, CURLoRA, I-LoRA and others, with and without the same protections.

    python benchmarks/compare.py                   # what has not been measured yet, then the tables
    python benchmarks/compare.py --only trec LoRA  # the runs whose names hold these words
    python benchmarks/compare.py --table           # the tables of what there is
    python benchmarks/compare.py --quick           # a small honest version, about 15 minutes (`make compare-quick`)

A run is a method, a protection, a task and a seed, in a process of its own, kept in a file until all are a table; start
the script twice to use two cores. All methods see the same examples in the same order for the same number of steps, at
the learning rate that of three was right most often on validation items, which neither training nor test holds.
Protections: none; **rehearsal**, cross-entropy of WikiText-2 validation text, one text in 97 examples; **budget**,
`Stay` within 0.01 nats on that text and on what the frozen model writes itself; **both**. Methods whose steps have
other FLOPs than LoRA's run a second time, without protections, for as many steps as its FLOPs allow (**equal FLOPs**).
Forgetting is read in pairs with the frozen model on kinds of text that no run has rehearsed.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _compare_methods import METHODS, Bench, Method
from _compare_tables import tables
from _compare_tasks import COMPARED, DATA, MADE, correct
from _evaluate import nats
from _record import claimed, environment, write_json
from _texts import kinds
from torch.utils.flop_counter import FlopCounterMode

import tokenpaths as tp
from tokenpaths.demo import _cache
from tokenpaths.lab.forgetting import arc_easy, blimp

WORK = _cache() / "compare"
COUNTED = 6  # steps whose FLOPs are counted: the longest `every`
TRIAL_SEED = 100
EQUAL = "equal FLOPs"
PROTECTIONS = ("none", "both", EQUAL, "budget", "rehearsal")


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
    def file(self) -> Path:
        return WORK / ("quick" if self.quick else "full") / f"{self.name.replace(', ', '--').replace(' ', '-')}.json"

    def result(self) -> Any:
        return json.loads(self.file.read_text()) if self.file.exists() else None


# One run


def measure(one: One) -> dict[str, Any]:
    """Train one method and read what it learned and lost. A trial of a learning rate reads validation items only."""
    torch.set_num_threads(1)
    bench = Bench(MADE[one.task](), one.quick)
    trial = one.lr is not None
    rate = one.lr or chosen_rate(one)
    method = METHODS[one.method].make(bench, one.seed)
    goals: list[Any] = [tp.Imitate(bench.train), *method.goals]
    if one.protection in ("rehearsal", "both"):
        goals.append(tp.Replay(bench.original, every=6, batch_size=1))  # of 6 x 16 + 1 examples one: 1.03 %
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
        found["after"] = reading(bench, one.quick, method.model)
    return found | {"before": reading(bench, one.quick)}


def reading(bench: Bench, quick: bool, model: Any = None) -> dict[str, Any]:
    """Outcomes an item, and nats a window, of a model as it is at work; of the frozen one they are read once."""
    if model is None:
        file = WORK / ("quick" if quick else "full") / f"frozen-{bench.task.name}.json"
        if not file.exists():
            write_json(file, reading(bench, quick, bench.model))
        return json.loads(file.read_text())
    texts = kinds(bench.tokenizer, bench.data, windows=2 if quick else 4)
    texts["own samples"] = bench.own(3, 16 if quick else 32)
    found: dict[str, Any] = {kind: nats(model, windows)[0].tolist() for kind, windows in texts.items()}
    choices = {"arc_easy": arc_easy(DATA, 40), "blimp": blimp(DATA, 100)}
    return {
        "nats": found,
        "counts": {kind: [len(window) - 1 for window in windows] for kind, windows in texts.items()},
        "task": bench.task.test.right(model, bench.tokenizer),
        **{name: correct(model, bench.tokenizer, task.items) for name, task in choices.items()},
    }


def equal_steps(one: One, bench: Bench, method: Method) -> int:
    """As many as take LoRA's FLOPs, less those of the forwards that fit gates: 2 a weight of the blocks and token."""
    lora, own = (One(one.task, name, "none", one.seed, quick=one.quick).result() for name in ("LoRA", one.method))
    weights = sum(p.numel() for block in tp.site.find_blocks(bench.model) for p in block.parameters())
    fitting = 2 * weights * method.notes.get("tokens that gates are fitted on", 0)
    return round((lora["steps"] * lora["step_flops"] - fitting) / own["step_flops"])


def chosen_rate(one: One) -> float:
    """The learning rate of the trial that was right most often on validation items; of equals the lower."""
    found = {trial.lr: trial.result()["validation"] for trial in trials(one)}
    return max(found, key=lambda rate: (statistics.fmean(found[rate]), -rate))


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# All runs


def plan(quick: bool) -> Iterator[One]:
    """Every run, the most telling first."""
    methods = [name for name in METHODS if not quick or name in ("guarded trail", "LoRA", "SC-LoRA")]
    for protection in ("none", "both") if quick else PROTECTIONS:
        for task in COMPARED[: 1 if quick else None]:
            for method in methods:
                recipe = METHODS[method]
                if protection == "none" or (recipe.equal if protection == EQUAL else recipe.protected):
                    yield from (One(task, method, protection, seed, quick=quick) for seed in range(1 if quick else 3))


def trials(one: One) -> list[One]:
    """The trials of learning rates that a run waits for; the quick version has time for two."""
    rates = METHODS[one.method].rates[: 2 if one.quick else None] if one.lr is None else ()
    return [One(one.task, one.method, "none", TRIAL_SEED, rate, one.quick) for rate in rates]


def _before(one: One) -> list[One]:
    """A run behind all that it needs."""
    return [*(part for other in needs(one) for part in _before(other)), one]


def needs(one: One) -> list[One]:
    """The runs that must be there before it."""
    same = ("LoRA", one.method) if one.protection == EQUAL else ()
    return [*trials(one), *(One(one.task, method, "none", one.seed, quick=one.quick) for method in same)]


def work(wanted: list[One]) -> None:
    """Measure what is missing, each in a process of its own. Several may work side by side."""
    while missing := [one for one in wanted if not one.file.exists()]:
        for one in missing:
            if all(other.file.exists() for other in needs(one)) and (claim := claimed(one.file)):
                print(time.strftime("%H:%M:%S"), one.name, flush=True)
                try:
                    subprocess.run([sys.executable, __file__, "--run", json.dumps(vars(one))], check=True)
                finally:
                    claim.unlink()
                break
        else:
            time.sleep(5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="runs whose names hold all of these")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--quick", action="store_true", help="one task, one seed, three methods, half the steps")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.run:
        one = One(**json.loads(told.run))
        return write_json(one.file, measure(one))
    runs = list(plan(told.quick))
    chosen = [one for one in runs if all(word in one.name for word in told.only)]
    if not told.table:
        work(list(dict.fromkeys(part for one in chosen for part in _before(one))))
    if not told.only:
        found = [result for one in runs if (result := one.result())]
        print(f"{len(found)} of {len(runs)} runs")
        tables(found, COMPARED, quick=told.quick)


if __name__ == "__main__":
    main()
