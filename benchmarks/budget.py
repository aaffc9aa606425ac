"""What does each limit keep, and what does it cost?  Trails on all layers and all tokens, taught TREC-6.

Each arm is one limit on rank-4 additive trails (`DiReFT`), trained the same way, on the same batches of the same seeds:

    python benchmarks/budget.py                     # the runs that are missing, one after another, then the table
    python benchmarks/budget.py --run guarded 0     # one run, to have several at a time
    python benchmarks/budget.py --table             # the table of what there is

Task accuracy is read on the whole test set. Forgetting is read, in pairs with the frozen model, on kinds of text no arm
has rehearsed (`_texts.py`), on texts the frozen model wrote, on ARC-Easy and on BLiMP. Rehearsal and the fitting of
gates and subspaces read WikiText-2 validation text; the arms named `self` read only what the frozen model itself wrote.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _evaluate import arc_easy, blimp, correct, nats, perplexity_ratio, points, trec
from _record import Claim, write
from _texts import cut, kinds
from torch.utils.flop_counter import FlopCounterMode

import tokenpaths as tp
from tokenpaths import Stay, confine, guard
from tokenpaths.demo import _cache, demo_model, fast_dtype
from tokenpaths.limits import TrustRegion
from tokenpaths.training import StayAttention, StayMoments, StayStates

DATA = Path(os.environ.get("TOKENPATHS_DATA", Path(__file__).parents[2] / "shared/data"))
WORK = _cache() / "budget"  # runs and their trails, until they are a table
TRAIN, LR, WIDTH = 200, 3e-3, 64  # steps, learning rate, tokens of a rehearsal text
COUNTED = 4
FIRST = 10  # of the layers that the recommended limit uses: below, states say which token it is, not what it is for


class Bench:
    """The model, the task and the texts, for one size of batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.model, self.tokenizer = demo_model(dtype=fast_dtype())
        task = trec(self.tokenizer, DATA)
        self.train = tp.encode(task.train, self.tokenizer, eos=False)
        self.test = task.test
        self.prompts = [prompt for prompt, _ in task.train]
        self.dim = tp.width(self.model)

    @functools.cached_property
    def original(self) -> list[tp.Example]:
        """Original data: WikiText-2 validation text."""
        return cut(self.tokenizer, (DATA / "wikitext2/valid.txt").read_text(encoding="utf-8"), 256, WIDTH)

    @functools.cached_property
    def own(self) -> list[tp.Example]:
        """What the frozen model writes: texts of its own, and what it makes of the beginnings of the task's prompts."""
        return [*self.samples(1, 64), *self.samples(2, 64, from_prompts=True)]

    def samples(self, seed: int, count: int, *, from_prompts: bool = False) -> list[tp.Example]:
        """Texts that the frozen model has sampled, from a random token, or from 8 tokens of a prompt."""
        file = WORK / "samples" / f"{seed}-{count}-{WIDTH}{'-from-prompts' if from_prompts else ''}.json"
        if not file.exists():
            torch.manual_seed(seed)
            starts = torch.randint(1000, 20000, (count, 1))
            if from_prompts:
                long = [example.ids[:8] for example in self.train if example.prompt_length > 12]
                starts = torch.tensor([long[i] for i in torch.randperm(len(long))[:count].tolist()])
            said = self.model.generate(
                starts, attention_mask=torch.ones_like(starts), max_new_tokens=WIDTH - starts.shape[1], do_sample=True,
                top_k=0, pad_token_id=0,
            )  # fmt: skip
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps([[i for i in row if i != 0] for row in said.tolist()]))  # 0 ends a text here
        return [tp.Example(tuple(row), (False,) * len(row)) for row in json.loads(file.read_text()) if len(row) > 1]

    def plain(self) -> tp.trails.Trail:
        return tp.trails.DiReFT(self.dim, rank=4)

    def everywhere(self, make: Callable[[], tp.trails.Trail]) -> tp.TrailMap:
        return tp.TrailMap({site: make() for site in tp.sites(self.model)})

    @property
    def texts(self) -> int:
        """Rehearsal texts a step: 2 x 128 tokens beside 32 questions."""
        return max(1, self.batch * 2 * 128 // 32 // WIDTH)


# Trails, further goals, and options of `steps`; "finish" has what is made of the trained trails, by the arm's name.
Made = tuple[tp.TrailMap, list[Any], dict[str, Any]]


def unlimited(bench: Bench, lr: float = LR) -> Made:
    return bench.everywhere(bench.plain), [], {"lr": lr}


def three_layers(bench: Bench) -> Made:
    return tp.TrailMap({site: bench.plain() for site in tp.sites(bench.model, [7, 15, 23])}), [], {}


def fixed(bench: Bench, weight: float = 1.0) -> Made:
    """The simple baseline: KL to the frozen model at a fixed weight."""
    goal = Stay(bench.original, weight=weight, gain=0, batch_size=bench.texts)
    return bench.everywhere(bench.plain), [goal], {}


def stay(bench: Bench, kind: type[Stay] = Stay, every: int = 1, within: float = 0.01, own: bool = False) -> Made:
    goal = kind(bench.own if own else bench.original, within=within, every=every, batch_size=bench.texts)
    return bench.everywhere(bench.plain), [goal], {}


def stay_attention(bench: Bench) -> Made:
    bench.model.set_attn_implementation("eager")
    return stay(bench, StayAttention)


def capped(bench: Bench, cap: float = 0.05) -> Made:
    return bench.everywhere(lambda: tp.Capped(bench.plain(), cap)), [], {}


def trust(bench: Bench) -> Made:
    return bench.everywhere(bench.plain), [], {"trust": TrustRegion(bench.original[: 2 * bench.texts], most=0.001)}


def confined(bench: Bench, contrastive: bool = False) -> Made:
    trails = bench.everywhere(lambda: tp.Confined(bench.plain(), bench.dim, bench.dim // 4))
    confine(bench.model, trails, bench.original[:64], bench.train[:256] if contrastive else None)
    return trails, [], {}


def gated(bench: Bench) -> Made:
    trails = bench.everywhere(lambda: tp.trails.Gated(bench.plain(), bench.dim))
    return trails, [Stay(bench.original, within=0.01, batch_size=bench.texts)], {}


def guarded(bench: Bench, first: int, **others: str) -> Made:
    """Trained where the answer is written; then gates are put before the trails, which act on all tokens."""
    texts = {"original": bench.original[::2], "own": bench.own, "both": [*bench.original[::4], *bench.own[::2]]}

    def finish(other: str, trails: tp.TrailMap) -> tp.TrailMap:
        if other == "none":
            return trails
        return guard(bench.model, trails, bench.train[:256], texts[other], most=8192)[0]

    places = tp.sites(bench.model, slice(first, None), tp.Last(1) | tp.Answer())
    made = {arm.replace("_", " "): functools.partial(finish, other) for arm, other in others.items()}
    return tp.TrailMap({site: bench.plain() for site in places}), [], {"finish": made}


ARMS: dict[str, tuple[str, Callable[[Bench], Made]]] = {
    "none": ("no limit", unlimited),
    "none 1e-3": ("no limit, lr 1e-3", lambda b: unlimited(b, 1e-3)),
    "three layers": ("no limit, three layers only", three_layers),
    "fixed": ("KL to frozen, fixed weight 1", fixed),
    "stay": ("Stay: KL within 0.01 nats", stay),
    "stay every 4": ("Stay every 4th step", lambda b: stay(b, every=4)),
    "stay self": ("Stay on self-samples", lambda b: stay(b, own=True)),
    "stay states": ("StayStates within 0.01", lambda b: stay(b, StayStates)),
    "stay moments": ("StayMoments within 0.01", lambda b: stay(b, StayMoments)),
    "stay attention": ("StayAttention within 0.01", stay_attention),
    "capped": ("Capped at 5 % of the state", capped),
    "trust": ("TrustRegion: 0.001 nats a step", trust),
    "confined": ("Confined to what text uses least", confined),
    "contrastive": ("Confined, contrastive directions", lambda b: confined(b, contrastive=True)),
    "gated": ("learned gate + Stay", gated),
    "guarded": ("guard, all layers", lambda b: guarded(b, 0, guarded="original")),
    "recommended": (
        f"recommended: guard, from layer {FIRST} on",
        lambda b: guarded(b, FIRST, recommended="both", recommended_self="own", rule="none"),
    ),
    "rule": (f"token rule Last(1) | Answer() only, from layer {FIRST} on", lambda b: guarded(b, FIRST, rule="none")),
    "recommended self": ("recommended, with self-samples only", lambda b: guarded(b, FIRST, recommended_self="own")),
}

# One run


def run(arm: str, seed: int, batch: int, items: int | None) -> None:
    """Train one arm from one seed and read what it kept, into a file of its own."""
    torch.set_num_threads(1)
    bench = Bench(batch)
    frozen = evaluation(bench, items)
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
    folder = WORK / f"batch-{batch}"
    folder.mkdir(parents=True, exist_ok=True)
    trained = time.process_time() - fitted
    for name, make in finish.items():
        began_again = time.process_time()
        with FlopCounterMode(display=False) as finishing:
            made = make(trails)
        seconds = fitted - began + time.process_time() - began_again
        with tp.attach(bench.model, made):
            after = read(bench, items)
        made.save(path(name, seed, batch).with_suffix(".safetensors"), bench.model)
        result = {
            "arm": name, "seed": seed, "parameters": made.size(), "fit_seconds": seconds, "train_seconds": trained,
            "fit_flops": fitting.get_total_flops() + finishing.get_total_flops(),
            "step_flops": counter.get_total_flops() / COUNTED, "frozen": frozen, "after": after, "log": log,
        }  # fmt: skip
        path(name, seed, batch).write_text(json.dumps(result))


def read(bench: Bench, items: int | None) -> dict[str, Any]:
    """Everything that is read of a model: outcomes an item, and nats a window."""
    texts = kinds(bench.tokenizer, DATA, windows=4)
    texts["own samples"] = bench.samples(3, 32)
    found: dict[str, Any] = {kind: nats(bench.model, windows)[0].tolist() for kind, windows in texts.items()}
    found["counts"] = {kind: [len(window) - 1 for window in windows] for kind, windows in texts.items()}
    found["trec"] = correct(bench.model, bench.test).tolist()
    found["arc_easy"] = correct(bench.model, arc_easy(bench.tokenizer, DATA, items)).tolist()
    found["blimp"] = correct(bench.model, blimp(bench.tokenizer, DATA, items)).tolist()
    return found


def evaluation(bench: Bench, items: int | None) -> dict[str, Any]:
    """What the frozen model does, read once."""
    file = WORK / f"frozen-{items}.json"
    if not file.exists():
        found = read(bench, items)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found))
    return json.loads(file.read_text())


def path(arm: str, seed: int, batch: int) -> Path:
    return WORK / f"batch-{batch}" / f"{arm.replace(' ', '-')}-{seed}.json"


# The table

UNSEEN = ["fiction", "verse", "code", "dialogue", "instructions"]


def table() -> None:
    """All runs that there are, as one result file, a table for each size of batch, and a picture.

    The claims are of the largest batch.
    """
    found: dict[int, dict[str, Any]] = {}
    for folder in sorted(WORK.glob("batch-*"), key=lambda folder: -int(folder.name.removeprefix("batch-"))):
        batch = int(folder.name.removeprefix("batch-"))
        runs = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
        found[batch] = {
            "protocol": {"steps": TRAIN, "batch": batch, "lr": LR, "rehearsal_width": WIDTH},
            "frozen": frozen_figures(runs[0]["frozen"]),
            "arms": summary(runs, batch),
            "runs": [{key: value for key, value in run.items() if key != "frozen"} for run in runs],
        }
    rows = {batch: part["arms"] for batch, part in found.items()}
    raw = {f"batch {batch}": part for batch, part in found.items()}
    seeds = {run["seed"] for part in found.values() for run in part["runs"]}
    write("budget", raw, claims(rows[max(rows)]), seed=sorted(seeds))
    picture(rows).savefig(Path(__file__).parents[1] / "docs/pictures/budget.png", dpi=100)
    for batch, arms in rows.items():
        print(f"\nbatch {batch}, frozen: {raw[f'batch {batch}']['frozen']}\n\n{markdown(arms)}")


def frozen_figures(frozen: dict[str, Any]) -> dict[str, Any]:
    return {
        **{name: 100 * float(np.mean(frozen[name])) for name in ("trec", "arc_easy", "blimp")},
        "items": {name: len(frozen[name]) for name in ("trec", "arc_easy", "blimp")},
        "perplexity": {k: float(np.exp(np.sum(frozen[k]) / np.sum(n))) for k, n in frozen["counts"].items()},
    }


def summary(runs: list[dict[str, Any]], batch: int) -> dict[str, dict[str, Any]]:
    """A row an arm: items and windows are averaged over seeds, and intervals are over items and windows."""
    arms = {arm: mine for arm in ARMS if (mine := [run for run in runs if run["arm"] == arm])}
    frozen = runs[0]["frozen"]
    base = np.mean([run["step_flops"] for run in arms["none"]]) if "none" in arms else unlimited_flops(batch)
    rows: dict[str, dict[str, Any]] = {}
    for arm, mine in arms.items():
        after = {key: np.mean([run["after"][key] for run in mine], axis=0) for key in frozen if key != "counts"}
        ratios = {
            kind: perplexity_ratio(np.array(frozen[kind]), after[kind], np.array(frozen["counts"][kind]))
            for kind in [*UNSEEN, "wikitext2", "own samples"]
        }
        rows[arm] = {
            "limit": ARMS[arm][0],
            "seeds": [run["seed"] for run in mine],
            "accuracy": 100 * float(after["trec"].mean()),
            "accuracy_by_seed": [100 * float(np.mean(run["after"]["trec"])) for run in mine],
            "ratios": ratios,
            "worst": max(UNSEEN, key=lambda kind: ratios[kind].value),
            "worst_by_seed": [worst(run) for run in mine],
            "arc_easy": points(np.array(frozen["arc_easy"]), after["arc_easy"]),
            "blimp": points(np.array(frozen["blimp"]), after["blimp"]),
            "flops": float(np.mean([run["step_flops"] + run["fit_flops"] / TRAIN for run in mine]) / base),
            "cpu_seconds": float(np.mean([run["train_seconds"] + run["fit_seconds"] for run in mine])),
            "parameters": mine[0]["parameters"],
        }
    return rows


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


def worst(run: dict[str, Any]) -> float:
    """The largest perplexity ratio of a run, over the kinds of text that were never rehearsed."""
    frozen, after = run["frozen"], run["after"]
    change = {k: (np.sum(after[k]) - np.sum(frozen[k])) / np.sum(frozen["counts"][k]) for k in UNSEEN}
    return float(np.exp(max(change.values())))


def claims(rows: dict[str, dict[str, Any]]) -> list[Claim]:
    best, own = rows["recommended"], rows["recommended self"]
    seeds = f"{len(best['seeds'])} seeds"
    by_seed = (min(best["accuracy_by_seed"]) / 100, max(best["accuracy_by_seed"]) / 100)
    cost = "FLOPs of training with the recommended limit, fitting included, over those without a limit"
    worst, alone = best["worst"], own["worst"]
    changes = [
        ("wikitext2_ppl_ratio", "WikiText-2 test perplexity over frozen", "", best["ratios"]["wikitext2"], "ratio"),
        ("worst_unseen_ppl_ratio", f"perplexity over frozen on the worst unseen kind of text ({worst})", "<= 1.01",
         best["ratios"][worst], "ratio"),
        ("self_samples_worst_ppl_ratio", f"the same with self-samples only ({alone})", "<= 1.015",
         own["ratios"][alone], "ratio"),
        ("arc_easy_points", "ARC-Easy, change in points", "within 0.5", best["arc_easy"], "points"),
        ("blimp_points", "BLiMP, change in points", "within 0.5", best["blimp"], "points"),
    ]  # fmt: skip
    return [
        Claim(
            "budget_accuracy", f"TREC-6 test accuracy with the recommended limit, {seeds}; lowest and highest seed",
            best["accuracy"] / 100, "accuracy", ">= 0.97", by_seed,
        ),
        *(
            Claim(f"budget_{name}", f"{what}, recommended limit, {seeds}", c.value, unit, target, (c.low, c.high))
            for name, what, target, c, unit in changes
        ),
        Claim("budget_training_cost_ratio", cost, best["flops"], "ratio", "<= 1.25"),
    ]  # fmt: skip


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| limit | seeds | TREC-6 % | WikiText-2 | worst unseen kind | own samples | ARC-Easy | BLiMP | FLOPs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        three = [row["ratios"][kind] for kind in ("wikitext2", row["worst"], "own samples")]
        shown = [f"{r.value:.3f} [{r.low:.3f}, {r.high:.3f}]" for r in three]
        shown[1] += f" {row['worst']}"
        moved = [f"{row[k].value:+.1f} [{row[k].low:+.1f}, {row[k].high:+.1f}]" for k in ("arc_easy", "blimp")]
        cells = [row["limit"], str(len(row["seeds"])), f"{row['accuracy']:.1f}", *shown, *moved, f"{row['flops']:.2f}x"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(tables: dict[int, dict[str, dict[str, Any]]]) -> Any:
    """Task accuracy against the worst perplexity ratio, a dot a seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    every = [(f"{arm}, batch {batch}", row) for batch, rows in tables.items() for arm, row in rows.items()]
    for number, (arm, row) in enumerate(every):
        marker, colour = "osD^vP"[number // 8 % 6], f"C{number % 8}"
        lost = [max(100 * (ratio - 1), 1e-3) for ratio in row["worst_by_seed"]]
        axes.plot(lost, row["accuracy_by_seed"], marker, color=colour, label=arm, alpha=0.8)
    axes.axvline(1, color="grey", linestyle=":", linewidth=1)
    axes.axhline(97, color="grey", linestyle=":", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("perplexity lost on the worst kind of text never rehearsed (%, 0.001 or less at the left edge)")
    axes.set_ylabel("TREC-6 accuracy (%)")
    axes.set_title("What each limit learns and what it loses (SmolLM2-135M, a dot a seed)")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--items", type=int, help="of ARC-Easy and of BLiMP; all unless told")
    parser.add_argument("--run", nargs=2, metavar=("ARM", "SEED"))
    parser.add_argument("--table", action="store_true")
    told = parser.parse_args()
    if told.run:
        run(told.run[0], int(told.run[1]), told.batch, told.items)
    else:
        for seed in range(0 if told.table else told.seeds):
            for arm in ARMS:
                if not path(arm, seed, told.batch).exists():  # in a process of its own, which leaves nothing behind
                    sizes = ["--batch", str(told.batch)] + (["--items", str(told.items)] if told.items else [])
                    subprocess.run([sys.executable, __file__, *sizes, "--run", arm, str(seed)], check=True)
        table()
