"""Does the learning rate that `steps` chooses carry over between models?

    python -m benchmarks.rates            # the runs that are missing, then the table; an hour on one core
    python -m benchmarks.rates --table

The chain of `make demo` is taught to SmolLM2-135M-Instruct and Gemma 3 270M: at rates set by hand, at the one that
`steps` finds, and at those of other ways to choose one; then to copies whose residual stream is scaled by 0.01 and by
100. Each run is kept in a file, so a benchmark that was stopped goes on. Accuracy is on 128 held-out questions, of
which the demo's own are the first 64, and drift is KL(frozen || steered) on the demo's four texts.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from lay_a_trail import TEXTS, Run, complete, halves, lay, score
from tasks import make_items

import tokenpaths as tp
from benchmarks.common.folders import KEPT
from benchmarks.common.kept import keep
from benchmarks.common.options import parser
from benchmarks.rates.first_step import first_step
from benchmarks.rates.models import load
from benchmarks.rates.table import table
from benchmarks.rates.ways import WAYS
from tokenpaths.training.feed import Feed

WORK = KEPT / "rates"
ITEMS = 128
BY_HAND = {"smollm2": [1e-3, 3e-3, 6e-3, 1e-2], "gemma": [5e-4, 1e-3, 2e-3, 3e-3]}
SCALES = [0.01, 100.0]
FOUND = "found"


@dataclass(frozen=True)
class Cell:
    """One run; `rate` is None for the one that `steps` finds."""

    model: str
    seed: int
    way: str
    rate: float | None = None
    scale: float = 1.0

    def file(self) -> Path:
        rate = FOUND if self.rate is None else f"{self.rate:.3g}"
        return WORK / f"{self.model}-{self.scale:g}-{rate}-{self.seed}.json"


def cells(seeds: list[int]) -> Iterator[Cell]:
    """The runs, in order of what is missed most where time is short."""
    for seed in seeds:
        for model, rates in BY_HAND.items():
            yield from (Cell(model, seed, f"by hand {rate:g}", rate) for rate in rates)
    for scale in [1.0, *SCALES]:
        for seed in seeds:
            yield from (Cell(model, seed, FOUND, None, scale) for model in BY_HAND)
    for way, choose in WAYS.items():
        for model in BY_HAND:
            tried = json.loads(first_file(model, seeds[0]).read_text())
            yield Cell(model, seeds[0], way, float(f"{choose(tried):.2g}"))


def first_file(model: str, seed: int) -> Path:
    return WORK / f"first-{model}-{seed}.json"


def main() -> None:
    told = parser(__doc__, seeds=True, table=True)
    told.add_argument("--only", default="", help="of the runs whose files begin so")
    options = told.parse_args()
    firsts = {(model, seed): first_file(model, seed) for model in BY_HAND for seed in options.seeds}
    if not options.table:
        for (model, seed), file in firsts.items():
            keep(file, functools.partial(tried, model, seed))
        for cell in cells(options.seeds):
            if cell.file().name.startswith(options.only):
                keep(cell.file(), functools.partial(measured, cell))
    tables = {file.stem: json.loads(file.read_text()) for file in firsts.values() if file.exists()}
    chosen = {
        way: {model: [choose(tables[first_file(model, seed).stem]) for seed in options.seeds] for model in BY_HAND}
        for way, choose in WAYS.items()
    }
    ran = [cell for cell in cells(options.seeds) if cell.file().exists()]
    runs = [{**json.loads(cell.file().read_text()), "way": cell.way} for cell in ran]
    table(runs, {"first_steps": tables, "chosen": chosen}, options.seeds)


@functools.lru_cache(maxsize=1)
def loaded(model: str, scale: float) -> tuple[Any, Any]:
    return load(model, scale)


def measured(cell: Cell) -> dict[str, Any]:
    """Teach the demo's chain, and measure what was learned and how far the model was moved."""
    model, tokenizer = loaded(cell.model, cell.scale)
    goal, trails = lesson(model, tokenizer, cell.seed)
    run = tp.steps(model, trails, [goal], steps=20, batch_size=16, lr=cell.rate, seed=cell.seed, progress=False)
    taken = [(step.loss, step.lr) for step in run]
    test = make_items(ITEMS, cell.seed, held_out=True)
    with tp.attach(model, trails):
        right = score(complete(model, tokenizer, [item.question for item in test]), test)
    drift = tp.measure_drift(model, trails, halves(tokenizer, TEXTS))["kl"].mean
    told = {
        **{name: value for name, value in vars(cell).items() if name != "way"},
        "lr": max(rate for _, rate in taken),
        "right": right.right,
        "of": right.of,
        "nats": drift,
        "losses": [round(loss, 4) for loss, _ in taken],
    }
    print(told, flush=True)
    return told


def tried(model: str, seed: int) -> list[dict[str, float]]:
    """The first step of a run at many rates."""
    base, tokenizer = loaded(model, 1.0)
    goal, trails = lesson(base, tokenizer, seed)
    base.requires_grad_(False)
    _, batch, _ = next(Feed([goal], [], 16, 1, seed, Accelerator()).batches(0))
    return first_step(base, trails, goal, batch)


def lesson(model: Any, tokenizer: Any, seed: int) -> tuple[tp.Imitate, tp.TrailMap]:
    """The demo's questions with their chains, and its trails."""
    run = Run(seed=seed)
    pairs = [(item.question, item.chain) for item in make_items(run.train, seed)]
    return tp.Imitate(tp.encode(pairs, tokenizer, eos=False)), lay(model, run)


if __name__ == "__main__":
    main()
