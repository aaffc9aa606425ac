"""Five tasks, one after another, without a label at run time of which one is asked: what is left of the first?

    python -m benchmarks.sequence                  # the runs that are missing, then the table
    python -m benchmarks.sequence --only LoRA      # of the methods whose names begin so
    python -m benchmarks.sequence --table

Tasks come in an order that is turned by one place from seed to seed. Every method sees the same examples for the same
number of steps, at the learning rate that the comparison chose for it on TREC-6. Backward transfer is the mean, over
all tasks but the last, of the accuracy after all less that right after the task itself (Lopez-Paz and Ranzato 2017,
arXiv 1706.08840); forgetting is its negative part, task by task. What may be kept of earlier tasks, 64 examples in a
reservoir, is replayed by I-LoRA and the shared trail, and shown to the gates of the growing trails as what is not
theirs. LoRA and CURLoRA keep nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import tokenpaths as tp
from benchmarks.common.folders import KEPT, PICTURES
from benchmarks.common.kept import keep, read
from benchmarks.common.options import parser
from benchmarks.common.reading import counts_of, lost, nats_of
from benchmarks.common.record import environment, over_seeds, write
from benchmarks.common.texts import as_text, kinds
from benchmarks.compare import runs as compared
from benchmarks.compare.methods import AT, FIRST, RANK, Bench, curlora, lora
from benchmarks.compare.tasks import MADE, Task, examples

WORK = KEPT / "sequence"
RESERVOIR = 64  # examples of earlier tasks
ITEMS = 60  # of each task's test


class Learner:
    """A method that learns one task after another. `learn` trains on a task; inside `at_work` all are at work."""

    def __init__(self, bench: Bench, seed: int, rate: float) -> None:
        self.bench, self.seed, self.rate = bench, seed, rate
        self.model: Any = bench.model
        self.reservoir = tp.lab.peers.Reservoir(RESERVOIR, seed)

    def steps(self, adapter: Any, goals: list[Any], count: int) -> Iterator[Any]:
        return tp.steps(
            self.model, adapter, goals, steps=count, batch_size=16, lr=self.rate, seed=self.seed,
            progress=False,
        )  # fmt: skip

    def learn(self, train: list[tp.Example], steps: int) -> None:
        raise NotImplementedError

    def at_work(self) -> AbstractContextManager[Any]:
        return nullcontext()


class Low(Learner):
    """LoRA or CURLoRA: one adapter, trained on."""

    make: Callable[[Bench, int], Any] = staticmethod(lora)

    def __init__(self, bench: Bench, seed: int, rate: float) -> None:
        super().__init__(bench, seed, rate)
        made = self.make(bench, seed)
        self.model, self.adapter = made.model, made.adapter

    def learn(self, train: list[tp.Example], steps: int) -> None:
        for _ in self.steps(self.adapter, [tp.Imitate(train)], steps):
            pass


class Cur(Low):
    make = staticmethod(curlora)


class Interpolated(Low):
    """I-LoRA: replay near a slow memory, which is what is used."""

    def __init__(self, bench: Bench, seed: int, rate: float) -> None:
        super().__init__(bench, seed, rate)
        self.memory = tp.lab.peers.DualMemory(self.adapter, decay=0.95)

    def learn(self, train: list[tp.Example], steps: int) -> None:
        goals: list[Any] = [tp.Imitate(train)]
        if len(self.reservoir):
            goals.append(tp.lab.peers.ReplayNear(list(self.reservoir), memory=self.memory, batch_size=4))
        for _ in self.steps(self.adapter, goals, steps):
            self.memory.update()

    def at_work(self) -> AbstractContextManager[Any]:
        return self.memory.slow()


class Shared(Learner):
    """One trail for all tasks, with replay of what is kept of the earlier ones."""

    def __init__(self, bench: Bench, seed: int, rate: float) -> None:
        super().__init__(bench, seed, rate)
        self.trails = fresh(bench, seed)

    def learn(self, train: list[tp.Example], steps: int) -> None:
        goals: list[Any] = [tp.Imitate(train)]
        if len(self.reservoir):
            goals.append(tp.Imitate(list(self.reservoir), batch_size=4))
        for _ in self.steps(self.trails, goals, steps):
            pass

    def at_work(self) -> AbstractContextManager[Any]:
        return tp.attach(self.model, self.trails)


class Growing(Learner):
    """A new trail for each task, behind gates that know its states; the older ones are frozen, and all are attached."""

    def __init__(self, bench: Bench, seed: int, rate: float) -> None:
        super().__init__(bench, seed, rate)
        self.laid: list[tp.TrailMap] = []

    def learn(self, train: list[tp.Example], steps: int) -> None:
        trails = fresh(self.bench, self.seed + len(self.laid))
        with self.at_work():
            for _ in self.steps(trails, [tp.Imitate(train)], steps):
                pass
            others = [*self.bench.plain, *map(as_text, self.reservoir)]
            guarded, _ = tp.guard(self.model, trails, train[:256], others, tokens=AT, most=16384)
        self.laid.append(guarded)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        with ExitStack() as stack:
            for trails in self.laid:
                stack.enter_context(tp.attach(self.model, trails))
            yield


METHODS: dict[str, tuple[type[Learner], str]] = {  # and whose learning rate it takes
    "growing guarded trails": (Growing, "guarded trail"),
    "LoRA": (Low, "LoRA"),
    "I-LoRA": (Interpolated, "I-LoRA"),
    "shared trail, replay": (Shared, "guarded trail"),
    "CURLoRA": (Cur, "CURLoRA"),
}


def fresh(bench: Bench, seed: int) -> tp.TrailMap:
    torch.manual_seed(seed)
    sites = tp.sites(bench.model, slice(FIRST, None), AT)
    return tp.TrailMap({site: tp.DiReFT(bench.dim, rank=RANK) for site in sites})


# One run


@dataclass(frozen=True)
class Run:
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}, seed {self.seed}"

    @property
    def file(self) -> Path:
        return WORK / f"{self.name.replace(', ', '--').replace(' ', '-')}.json"


def measure(run: Run) -> dict[str, Any]:
    kind, alike = METHODS[run.method]
    rate = compared.chosen_rate(compared.One("trec", alike, "none", run.seed))
    names = list(MADE)
    order = names[run.seed % len(names) :] + names[: run.seed % len(names)]
    tasks = {name: fewer(MADE[name]()) for name in order}
    bench = Bench(tasks[order[0]], compared.WORK)
    texts = kinds(bench.tokenizer, windows=4)
    before = {name: task.test.right(bench.model, bench.tokenizer) for name, task in tasks.items()}
    frozen = nats_of(bench.model, texts)
    learner = kind(bench, run.seed, rate)
    after_own: dict[str, list[int]] = {}
    seconds = 0.0
    for name, task in tasks.items():
        bench.task = task
        train = examples(bench.tokenizer, task)
        began = time.process_time()
        learner.learn(train, task.steps)
        seconds += time.process_time() - began
        learner.reservoir.extend(train[:: max(1, len(train) // 200)])
        with learner.at_work():
            after_own[name] = task.test.right(learner.model, bench.tokenizer)
        print(run.name, name, statistics.fmean(before[name]), statistics.fmean(after_own[name]), flush=True)
    with learner.at_work():
        after_all = {name: task.test.right(learner.model, bench.tokenizer) for name, task in tasks.items()}
        steered = nats_of(learner.model, texts)
    print(run.name, {name: statistics.fmean(right) for name, right in after_all.items()}, flush=True)
    return {
        "run": vars(run), **environment(), "order": order, "lr": rate, "seconds": seconds,
        "frozen": before, "after own": after_own, "after all": after_all,
        "nats": {kind: [frozen[kind], steered[kind]] for kind in texts},
        "counts": counts_of(texts),
    }  # fmt: skip


def fewer(task: Task) -> Task:
    """Half the steps, and as many test items as there is time for."""
    return replace(task, steps=task.steps // 2, test=replace(task.test, items=task.test.items[:ITEMS]))


# The table


def transfer(run: dict[str, Any]) -> list[float]:
    """Accuracy after all less that right after the task, of every task but the last."""
    return [
        statistics.fmean(run["after all"][name]) - statistics.fmean(run["after own"][name])
        for name in run["order"][:-1]
    ]


def table() -> None:
    found = {m: runs for m in METHODS if (runs := read(Run(m, seed).file for seed in range(5)))}
    if not found:
        raise SystemExit("no run is kept: run this without --table")
    names = list(MADE)
    print(f"| method | seeds | {' | '.join(names)} | mean | backward transfer | forgetting | WikiText-2, nats |")
    print("|" + "---|" * (len(names) + 6))
    for method, runs in found.items():
        shares = [statistics.fmean(statistics.fmean(run["after all"][name]) for run in runs) for name in names]
        back = [statistics.fmean(transfer(run)) for run in runs]
        gone = statistics.fmean(statistics.fmean(max(-t, 0) for t in transfer(run)) for run in runs)
        cells = [f"{share:.2f}" for share in [*shares, statistics.fmean(shares)]]
        cells += [f"{statistics.fmean(back):+.3f} [{min(back):+.3f}, {max(back):+.3f}]", f"{gone:.3f}"]
        nats = [lost(*run["nats"]["wikitext2"], run["counts"]["wikitext2"]) for run in runs]
        cells.append(f"{statistics.fmean(nats):+.4f}")
        print(f"| {method} | {len(runs)} | {' | '.join(cells)} |")
    if runs := found.get("growing guarded trails"):
        back = [statistics.fmean(transfer(run)) for run in runs]
        told = "backward transfer over five tasks of growing guarded trails, mean accuracy after all less that right "
        claim = over_seeds("five_tasks_backward_transfer", f"{told}after each task", back, "accuracy")
        write("sequence", found, [claim], seed=sorted({run["run"]["seed"] for runs in found.values() for run in runs}))
    picture(found).savefig(PICTURES / "sequence.png", dpi=100)


def picture(found: dict[str, list[dict[str, Any]]]) -> Any:
    """Accuracy by the place of a task in the sequence: right after it, and after all."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(found), 3.4), layout="constrained")
    rows = figure.subplots(1, len(found), sharey=True, squeeze=False)
    for axes, (method, runs) in zip(rows[0], found.items(), strict=True):
        for key, label in (("after own", "right after it"), ("after all", "after all five"), ("frozen", "frozen")):
            by_place = [
                statistics.fmean(statistics.fmean(run[key][run["order"][place]]) for run in runs) for place in range(5)
            ]
            axes.plot(range(1, 6), by_place, "o-" if key != "frozen" else ":", label=label, markersize=4)
        axes.set(title=method, xlabel="place of the task", ylim=(0, 1.02))
        axes.title.set_fontsize(10)
    figure.axes[0].set_ylabel("accuracy on held-out items")
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    options = parser(__doc__, seeds=True, table=True)
    options.add_argument("--only", default="", help="the beginning of the names of the methods")
    told = options.parse_args()
    torch.set_num_threads(1)
    for one in [Run(method, seed) for seed in told.seeds for method in METHODS if method.startswith(told.only)]:
        if not told.table:
            keep(one.file, lambda run=one: measure(run))
    table()
