"""Five tasks, one after another, asked in unseen words, and nobody says which: who knows whose trail is to answer?

    python -m benchmarks.routing             # the runs that are missing (20 minutes a seed), then the table
    python -m benchmarks.routing --table

Each task gets a trail, which is trained in eight forms and never touched again. A request is then answered by the
trails that a router opens: the gates of `fit_gate`, each fitted when its task came, and shown 16 prompts of each
earlier one; of those that open the one with the highest score; the highest score of all; the nearest centroid of input
embeddings; GainLoRA's gates. One LoRA that is trained on all tasks in turn stands beside them. Test items are asked in
words that were taught, and in words that were not, of which those of TREC-6 and links are by other hands. Far prompts
belong to no task.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import tokenpaths as tp
from benchmarks.common.folders import KEPT
from benchmarks.common.kept import keep, read
from benchmarks.common.options import parser
from benchmarks.common.record import Claim, environment, over_seeds, write
from benchmarks.gates.adapters import load, lora, trail
from benchmarks.gates.prompts import far_test
from benchmarks.routing.routers import Alone, Centroids, GainLora, Gates, Highest, Router
from benchmarks.routing.words import Worded, worded

WORK = KEPT / "routing"
TASKS = ("trec", "links", "text kinds", "larger", "colours")
ITEMS, FITTED, EARLIER, FAR = 60, 24, 16, 40
WORDS = ("taught", "unseen")


@dataclass(frozen=True)
class Run:
    seed: int

    @property
    def order(self) -> tuple[str, ...]:
        turn = self.seed % len(TASKS)
        return TASKS[turn:] + TASKS[:turn]

    @property
    def file(self) -> Path:
        return WORK / f"seed-{self.seed}.json"


class Bench:
    """The frozen model with a trail for each task so far, and what each combination of them answers."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.model, self.tokenizer = load("smollm2")
        self.laid: list[tp.TrailMap] = []
        self.known: dict[tuple[str, str, int, tuple[float, ...]], float] = {}

    def learn(self, task: Worded) -> None:
        torch.manual_seed(self.seed)
        made = trail(self.model, self.tokenizer, [])
        self.train(made, task)
        self.laid.append(made.adapter)

    def train(self, made: Any, task: Worded) -> None:
        items = [task.items.train[i % len(task.items.train)] for i in range(16 * task.steps)]
        examples = tp.encode(task.pairs(items, task.taught), self.tokenizer, eos=False)
        options: dict[str, Any] = {"steps": task.steps, "lr": made.rate, "seed": self.seed, "progress": False}
        for _ in tp.steps(made.model, made.adapter, [tp.Imitate(examples)], **options):
            pass

    def right(self, task: Worded, words: str, strengths: Sequence[tuple[float, ...]]) -> list[float]:
        """Whether each test item is answered rightly where each trail has its strength; each combination once."""
        asked = task.asked(ITEMS)[words]
        full = [tuple(row) + (0.0,) * (len(TASKS) - len(row)) for row in strengths]
        for combination in dict.fromkeys(full):
            rows = [i for i, row in enumerate(full) if row == combination]
            rows = [i for i in rows if (task.name, words, i, combination) not in self.known]
            if not rows:
                continue
            with ExitStack() as stack:
                for trails, strength in zip(self.laid, combination, strict=False):
                    if strength:
                        stack.enter_context(tp.attach(self.model, trails, strength=strength))
                values = task.right(self.model, self.tokenizer, [asked[i] for i in rows])
            for i, value in zip(rows, values, strict=True):
                self.known[task.name, words, i, combination] = value
        return [self.known[task.name, words, i, combination] for i, combination in enumerate(full)]

    def answered(self, router: Router, task: Worded) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for words, asked in task.asked(ITEMS).items():
            strengths = router.strengths([form.prompt(item) for item, form in asked])
            found[words] = {"right": self.right(task, words, strengths), "strengths": strengths}
        return found


def measure(run: Run) -> dict[str, Any]:
    tasks = {name: worded(name) for name in run.order}
    bench = Bench(run.seed)
    model, tokenizer = bench.model, bench.tokenizer
    gates = Gates(model, tokenizer, run.seed)
    routers: dict[str, Router] = {
        "gates": gates,
        "gates, one alone": Alone(gates),
        "highest score": Highest(gates),
        "centroids": Centroids(model, tokenizer, run.seed),
        "GainLoRA's gates": GainLora(model, tokenizer, run.seed),
    }
    after_own: dict[str, Any] = {name: {} for name in routers}
    earlier: dict[str, list[str]] = {}
    began = time.time()
    for name, task in tasks.items():
        bench.learn(task)
        fit = {form.name: [form.prompt(item) for item in task.items.fit[:FITTED]] for form in task.taught}
        for arm, router in routers.items():
            router.learn(fit, earlier)
            after_own[arm][name] = bench.answered(router, task)
        earlier[name] = [prompt for prompt, _ in task.pairs(task.items.fit[-EARLIER:], task.taught)]
        print(run, name, f"{time.time() - began:.0f} s", flush=True)
    after_all = {
        arm: {name: bench.answered(router, task) for name, task in tasks.items()} for arm, router in routers.items()
    }
    own = [tuple(float(i == k) for i in range(len(TASKS))) for k in range(len(TASKS))]
    told = {
        name: {
            words: {
                "frozen": bench.right(task, words, [()] * ITEMS),
                "its own trail": bench.right(task, words, [own[k]] * ITEMS),
            }
            for words in WORDS
        }
        for k, (name, task) in enumerate(tasks.items())
    }
    kinds = far_test("trec", FAR)
    far = [prompt for kind, prompts in kinds.items() if kind not in ("numbers", *TASKS) for prompt in prompts]
    opened = {arm: router.strengths(far) for arm, router in routers.items()}
    return {
        "run": vars(run), **environment(), "order": run.order, "after own": after_own, "after all": after_all,
        "told": told, "far": opened, "LoRA": trained_on(run, list(tasks.values())),
    }  # fmt: skip


def trained_on(run: Run, tasks: Sequence[Worded]) -> dict[str, Any]:
    """One LoRA, trained on task after task: what it answers rightly after each of its own, and after all."""
    bench = Bench(run.seed)
    torch.manual_seed(run.seed)
    made = lora(bench.model, bench.tokenizer, [])

    def right(task: Worded) -> dict[str, list[float]]:
        return {w: task.right(made.model, bench.tokenizer, asked) for w, asked in task.asked(ITEMS).items()}

    after_own: dict[str, Any] = {}
    for task in tasks:
        bench.train(made, task)
        after_own[task.name] = right(task)
    return {"after own": after_own, "after all": {task.name: right(task) for task in tasks}}


# The table


def accuracy(run: dict[str, Any], arm: str, when: str, words: str) -> list[float]:
    """Of each task, in the order in which they came."""
    if arm in ("frozen", "its own trail"):
        return [statistics.fmean(run["told"][name][words][arm]) for name in run["order"]]
    if arm == "LoRA":
        return [statistics.fmean(run["LoRA"][when][name][words]) for name in run["order"]]
    return [statistics.fmean(run[when][arm][name][words]["right"]) for name in run["order"]]


def transfer(run: dict[str, Any], arm: str, words: str) -> float:
    """Accuracy after all less that right after the task, of every task but the last."""
    after, own = (accuracy(run, arm, when, words)[:-1] for when in ("after all", "after own"))
    return statistics.fmean(x - y for x, y in zip(after, own, strict=True))


def opens(run: dict[str, Any], arm: str, words: str) -> tuple[float, float]:
    """The share of prompts for which the right trail is at work, and for which another one is."""
    right: list[bool] = []
    other: list[bool] = []
    for number, name in enumerate(run["order"]):
        for row in run["after all"][arm][name][words]["strengths"]:
            right.append(row[number] > 0)
            other.append(any(x > 0 for i, x in enumerate(row) if i != number))
    return statistics.fmean(right), statistics.fmean(other)


def table() -> None:
    runs = read(Run(seed).file for seed in range(5))
    if not runs:
        raise SystemExit("no run is kept: run this without --table")
    arms = ["frozen", "its own trail", *runs[0]["after all"], "LoRA"]
    for words in WORDS:
        print(f"\n{words} words: arm | mean accuracy | backward transfer | right trail, another's at work | far, any")
        for arm in arms:
            cells = [statistics.fmean(statistics.fmean(accuracy(run, arm, "after all", words)) for run in runs)]
            if arm not in ("frozen", "its own trail"):
                cells.append(statistics.fmean(transfer(run, arm, words) for run in runs))
            if arm in runs[0]["after all"]:
                cells += [
                    statistics.fmean(part) for part in zip(*(opens(run, arm, words) for run in runs), strict=True)
                ]
                cells.append(statistics.fmean(any(row) for run in runs for row in run["far"][arm]))
            print("|", arm, "|", " | ".join(f"{cell:.3f}" for cell in cells), "|")
    write("routing", runs, list(claims(runs)), seed=[run["run"]["seed"] for run in runs])


def claims(runs: Sequence[dict[str, Any]]) -> list[Claim]:
    found: list[Claim] = []
    for words, target in (("unseen", "0.85"), ("taught", "")):
        for arm in (*runs[0]["after all"], "LoRA", "frozen", "its own trail"):
            name = f"routing_{_SHORT[arm]}_{words}"
            about = f"mean accuracy on five tasks in sequence, in {words} words, answered by {_LONG[arm]}"
            values = [statistics.fmean(accuracy(run, arm, "after all", words)) for run in runs]
            found.append(over_seeds(name, about, values, "share", target if arm == "gates, one alone" else ""))
            if arm in ("frozen", "its own trail"):
                continue
            back = [transfer(run, arm, words) for run in runs]
            about = f"backward transfer over five tasks, in {words} words, answered by {_LONG[arm]}"
            found.append(
                over_seeds(f"{name}_backward", about, back, "accuracy", "0" if arm == "gates, one alone" else "")
            )
            if arm == "LoRA":
                continue
            if words == "taught":
                about = f"share of far prompts, which belong to no task, for which a trail is at work, by {_LONG[arm]}"
                far = [statistics.fmean(any(row) for row in run["far"][arm]) for run in runs]
                found.append(over_seeds(f"routing_{_SHORT[arm]}_far", about, far, "share"))
            other = [opens(run, arm, words)[1] for run in runs]
            about = f"share of prompts at which another task's trail is at work, in {words} words, by {_LONG[arm]}"
            found.append(
                over_seeds(f"{name}_other", about, other, "share", "0.01" if arm == "gates, one alone" else "")
            )
    return found


_SHORT = {
    "gates": "gates",
    "gates, one alone": "alone",
    "highest score": "highest",
    "centroids": "centroids",
    "GainLoRA's gates": "gainlora",
    "LoRA": "lora",
    "frozen": "frozen",
    "its own trail": "own",
}
_LONG = {
    "gates": "the trails whose gates open",
    "gates, one alone": "the trail of the highest score that opens",
    "highest score": "the trail of the highest score",
    "centroids": "the trail of the nearest centroid",
    "GainLoRA's gates": "the trails that GainLoRA's gates weigh",
    "LoRA": "one LoRA that is trained on",
    "frozen": "the frozen model",
    "its own trail": "the task's own trail",
}


if __name__ == "__main__":
    options = parser(__doc__, seeds=True, table=True)
    told = options.parse_args()
    torch.set_num_threads(1)
    for one in map(Run, told.seeds):
        if not told.table:
            keep(one.file, lambda run=one: measure(run))
    table()
