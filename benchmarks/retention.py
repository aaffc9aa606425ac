"""Learning without forgetting: what rehearsal keeps, what alignment and waypoints teach, and whether it is the way.

    python benchmarks/retention.py                       # what has not been measured yet, then the table
    python benchmarks/retention.py --part replay         # some of it: replay, align, waypoints or form; --seeds 0 1 2
    python benchmarks/retention.py --table               # the table of what there is

`replay` teaches TREC-6 to rank-4 additive trails on all layers and tokens, which without limits wrecks the model, in
batches of 8, and mixes in what is rehearsed. `align`, `waypoints` and `form` are about the chains of `make demo`.
Everything is read on held-out items, in pairs with the frozen model. Each run is kept in a file until all are a table.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from _record import Claim, environment, write, write_json
from _texts import cut

import tokenpaths as tp
from tokenpaths import forgetting, way_or_form
from tokenpaths.demo import _cache, demo_model, fast_dtype
from tokenpaths.lab.chains import Worked
from tokenpaths.lab.forgetting import arc_easy, blimp, trec, trec_pairs, wikitext2

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from lay_a_trail import Run, complete, learn, score
from tasks import HOPS, LONGER_HOPS, PEOPLE, Item, few_shot_prompt, make_items, read_answer

DATA = Path(os.environ.get("TOKENPATHS_DATA", Path(__file__).parents[2] / "shared/data"))
WORK = _cache() / "retention"
STEPS, BATCH, LR, WIDTH = 100, 8, 3e-3, 64  # of replay; tokens of a rehearsed text
OTHERS = {  # in the place of PEOPLE, each one token for SmolLM2
    "renamed": "David Michael James Robert William Thomas Daniel Matthew Anthony Steven Andrew Kevin Brian George "
    "Edward Ronald Timothy Jason Gary Jeffrey Ryan Eric Stephen Larry Justin Scott Frank Raymond Patrick Sarah Emily "
    "Emma",
    "places": "Paris Rome London Berlin Madrid Moscow Tokyo Boston Chicago Texas Ohio Iowa Utah Maine Florida Georgia "
    "India China Japan Spain Italy France Egypt Kenya Cuba Peru Chile Brazil Canada Mexico Iran Iraq",
}


class Bench:
    """The model, and the texts that arms rehearse."""

    def __init__(self) -> None:
        self.model, self.tokenizer = demo_model(dtype=fast_dtype())
        self.model.requires_grad_(False)
        self.model.set_attn_implementation("eager")  # the quicker one for texts this short on a processor, in bfloat16

    def original(self) -> list[tp.Example]:
        """WikiText-2 validation text, of which no item of the suite is made."""
        return cut(self.tokenizer, (DATA / "wikitext2/valid.txt").read_text(encoding="utf-8"), 256, WIDTH)

    def own(self, seed: int, count: int) -> list[tp.Example]:
        """What the frozen model writes, as text that is all prompt."""
        path = WORK / f"own-{seed}.jsonl"
        said = tp.self_samples(self.model, self.tokenizer, count, max_new_tokens=WIDTH, seed=seed, path=path)
        return [tp.Example(e.ids, (False,) * len(e)) for e in said]

    def suite(self) -> list[Any]:
        texts = self.tokenizer.batch_decode([e.ids for e in self.own(7, 32)], skip_special_tokens=True)
        words = tuple(tp.data.Text(text) for text in texts if len(self.tokenizer(text)["input_ids"]) > 8)
        tasks = [trec(DATA, 200), wikitext2(DATA, 16), arc_easy(DATA, 40), blimp(DATA, 100)]
        return [*tasks, tp.data.Task("own words", words)]


# Replay


def replayed(kind: str, share: float) -> Callable[[Bench, list[tp.Example]], list[Any]]:
    """One stream of the task and a share of texts, trained on their cross-entropy."""

    def goals(bench: Bench, task: list[tp.Example]) -> list[Any]:
        texts = bench.original() if kind == "original" else bench.own(1, 64)
        return [tp.Replay(tp.mix(task, texts, share, epochs=2))]

    return goals


def stayed(kind: str, replay: float = 0.0) -> Callable[[Bench, list[tp.Example]], list[Any]]:
    def goals(bench: Bench, task: list[tp.Example]) -> list[Any]:
        texts = bench.original() if kind == "original" else bench.own(1, 64)
        first = replayed(kind, replay)(bench, task) if replay else [tp.Imitate(task)]
        return [*first, tp.Stay(texts, within=0.01, batch_size=1)]

    return goals


ARMS: dict[str, Callable[[Bench, list[tp.Example]], list[Any]]] = {
    "none": lambda bench, task: [tp.Imitate(task)],
    "replay 1 %": replayed("original", 0.01),
    "self-rehearsal 1 %": replayed("own", 0.01),
    "replay 10 %": replayed("original", 0.10),
    "Stay on original": stayed("original"),
    "Stay on own": stayed("own"),
    "Stay and replay 1 %": stayed("original", 0.01),
    "replay 0.5 %": replayed("original", 0.005),
    "replay 2 %": replayed("original", 0.02),
    "replay 5 %": replayed("original", 0.05),
}


def replay(bench: Bench, arm: str, seed: int) -> dict[str, Any]:
    task = tp.encode(trec_pairs(DATA), bench.tokenizer, eos=False)
    torch.manual_seed(seed)
    dim = tp.width(bench.model)
    trails = tp.TrailMap({site: tp.DiReFT(dim, 4) for site in tp.sites(bench.model)})
    began = time.process_time()
    goals = ARMS[arm](bench, task)
    taken = list(tp.steps(bench.model, trails, goals, steps=STEPS, batch_size=BATCH, lr=LR, seed=seed, progress=False))
    seconds = time.process_time() - began
    found = forgetting(bench.model, trails, bench.suite(), bench.tokenizer)
    print(found, flush=True)
    return {"suite": found.records(), "seconds": seconds, "losses": [step.losses for step in taken[-10:]]}


# The chains of the demo


def worked(items: list[Item], names: dict[str, str] | None = None) -> list[Worked]:
    """Items as the report takes them, with other names if given."""

    def said(text: str) -> str:
        return re.sub("[A-Za-z]+", lambda word: (names or {}).get(word[0], word[0]), text)

    return [Worked(said(i.question), said(i.chain), said(i.answer)) for i in items]


def last_name(text: str) -> str | None:
    words = text.split(".", 1)[0].split()
    return words[-1] if words else None


def taught(bench: Bench, seed: int) -> tuple[tp.TrailMap, Run]:
    run = Run(seed=seed)
    return learn(bench.model, bench.tokenizer, make_items(run.train, seed), "chain", run), run


def form(bench: Bench, arm: str, seed: int) -> dict[str, Any]:
    """Way or form: the demo's trails on other people's names, on places, and on longer paths."""
    trails, run = taught(bench, seed)
    held_out, longer = (make_items(64, seed, held_out=True, hops=hops) for hops in (HOPS, LONGER_HOPS))
    forms = {name: worked(held_out, dict(zip(PEOPLE, others.split(), strict=True))) for name, others in OTHERS.items()}
    report = way_or_form(
        bench.model,
        trails,
        bench.tokenizer,
        train=worked(make_items(run.train, seed)[:64]),
        held_out=worked(held_out),
        forms={**forms, "longer": worked(longer)},
        read_answer=last_name,
        stop_strings=".",
        words=2,
    )
    print(report, flush=True)
    scores = {s.name: asdict(s) for s in report.scores}
    return {
        "scores": scores,
        "signs": [asdict(s) for s in report.signs],
        "verdict": report.verdict,
        "text": str(report),
    }


def align(bench: Bench, arm: str, seed: int) -> dict[str, Any]:
    """AFT behind the demo's trails: A-accuracy on held-out questions, and whether answers got better or worse."""
    trails, run = taught(bench, seed)
    asked = make_items(48, seed + 100)
    tested = make_items(48, seed, held_out=True)

    def sampled(items: list[Item]) -> Any:
        with tp.attach(bench.model, trails):
            return tp.training.sample_chains(
                bench.model, [(i.question, i.answer.strip(" .")) for i in items], bench.tokenizer, 4,
                read_answer=read_answer, max_new_tokens=6, stop_strings=".", batch_size=8, seed=seed,
            )  # fmt: skip

    train, test = sampled(asked), sampled(tested)
    print(train, test, flush=True)

    def measured() -> dict[str, Any]:
        with tp.attach(bench.model, trails):
            scored = tp.training.score_attempts(bench.model, test.mixed)
            right = score(complete(bench.model, bench.tokenizer, [i.question for i in tested]), tested)
        wrong = torch.cat([n for _, n in scored])
        good = torch.cat([p for p, _ in scored])
        return {
            "a_accuracy": tp.training.assessment_accuracy(scored),
            "right": right.right,
            "of": right.of,
            "mean_score_right": float(good.mean()),
            "mean_score_wrong": float(wrong.mean()),
        }

    before = measured()
    examples = tp.encode([(i.question, i.chain) for i in asked], bench.tokenizer, eos=False)
    goals: list[Any] = [tp.Imitate(examples), tp.training.Align(train.mixed, constraint=arm, batch_size=4)]
    if arm == "without":
        goals = goals[:1]
    for _ in tp.steps(bench.model, trails, goals, steps=20, batch_size=8, lr=1e-3, seed=seed, progress=False):
        pass
    found = {"before": before, "after": measured(), "mixed": [len(train.mixed), len(test.mixed)]}
    print(arm, seed, found, flush=True)
    return found


def waypoints(bench: Bench, arm: str, seed: int) -> dict[str, Any]:
    """States of the model that is shown chains, without the chains: no token of an answer is trained."""
    run = Run(seed=seed)
    items, tested = make_items(96, seed), make_items(96, seed, held_out=True)
    shown, items = items[:4], items[4:]
    model, tokenizer = bench.model, bench.tokenizer
    plain = tp.encode([(i.question, i.chain) for i in items], tokenizer, eos=False)
    helped = tp.encode([(few_shot_prompt(shown, i.question), i.chain) for i in items], tokenizer, eos=False)
    depth = len(tp.site.find_blocks(model))
    where = tp.sites(model, range(run.first_layer * depth // 30, depth, 2), tp.Last(1) | tp.Answer())
    targets = tp.training.capture_states(model, plain, helped, where)
    torch.manual_seed(seed)
    trails = tp.TrailMap({site: tp.LoReFT(tp.width(model), run.rank) for site in where})
    goal = tp.training.Waypoints(plain, targets=targets, by=arm)

    def right(prompts: list[str]) -> int:
        return score(complete(model, tokenizer, prompts), tested).right

    found = {
        "of": len(tested),
        "frozen": right([i.question for i in tested]),
        "helped": right([few_shot_prompt(shown, i.question) for i in tested]),
    }
    losses = [
        step.loss
        for step in tp.steps(model, trails, [goal], steps=60, batch_size=16, lr=run.lr, seed=seed, progress=False)
    ]
    with tp.attach(model, trails):
        found["steered"] = right([i.question for i in tested])
    found |= {"first_loss": losses[0], "last_loss": losses[-1]}
    print(arm, seed, found, flush=True)
    return found


PARTS: dict[str, tuple[Callable[[Bench, str, int], dict[str, Any]], list[str]]] = {
    "form": (form, ["demo"]),
    "align": (align, ["boundary", "none", "detached", "without"]),
    "waypoints": (waypoints, ["relative"]),
    "replay": (replay, list(ARMS)),
}

# The table


def path(part: str, arm: str, seed: int) -> Path:
    return WORK / f"{part}-{arm.replace(' ', '-')}-{seed}.json"


def read(part: str, arm: str) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for s in range(10) if (file := path(part, arm, s)).exists()]


def mean(values: list[float]) -> tuple[float, tuple[float, float]]:
    """The mean over seeds, and the lowest and highest seed."""
    return statistics.fmean(values), (min(values), max(values))


def change(runs: list[dict[str, Any]], task: str, measure: str) -> list[float]:
    return [figure(run, task, measure)["change"] for run in runs]


def figure(run: dict[str, Any], task: str, measure: str) -> dict[str, Any]:
    return next(loss for loss in run["suite"] if (loss["task"], loss["measure"]) == (task, measure))


def table() -> None:
    raw = {part: {arm: read(part, arm) for arm in arms} for part, (_, arms) in PARTS.items()}
    claims: list[Claim] = []

    def claim(name: str, told: str, values: list[float], unit: str, target: str = "") -> None:
        if values:
            found, seeds = mean(values)
            claims.append(
                Claim(name, f"{told}, {len(values)} seeds; lowest and highest seed", found, unit, target, seeds)
            )

    for name, arm in (
        ("replay_1pct_wikitext2_nats", "replay 1 %"),
        ("self_rehearsal_wikitext2_nats", "self-rehearsal 1 %"),
    ):
        runs = raw["replay"][arm]
        accuracy = [figure(run, "trec", "accuracy")["after"] for run in runs]
        if runs:
            told = f"nats a token lost on WikiText-2 test, {arm}, TREC-6 at {statistics.fmean(accuracy):.3f}"
            claim(name, told, change(runs, "wikitext2", "nats a token"), "nats")
    gains = [run["after"]["a_accuracy"] - run["before"]["a_accuracy"] for run in raw["align"]["boundary"]]
    claim("aft_a_accuracy_gain", "gain in A-accuracy on held-out questions, boundary constraint", gains, "accuracy")
    gains = [(run["steered"] - run["frozen"]) / run["of"] for run in raw["waypoints"]["relative"]]
    claim("waypoints_task_gain", "gain in held-out accuracy of waypoints from four chains shown", gains, "accuracy")
    kept = [
        min(run["scores"][form]["steered"] for form in ("renamed", "longer")) / run["scores"]["held-out"]["steered"]
        for run in raw["form"]["demo"]
    ]
    claim(
        "renamed_longer_kept",
        "share of held-out accuracy kept, the worse of renamed and longer",
        kept,
        "share",
        ">= 0.8",
    )
    for part, arms in raw.items():
        for arm, runs in arms.items():
            if part == "replay" and runs:
                figures = {
                    f"{loss['task']} {loss['measure']}": mean(change(runs, loss["task"], loss["measure"]))
                    for loss in runs[0]["suite"]
                }
                print(arm, len(runs), {k: f"{v[0]:+.3f} [{v[1][0]:+.3f}, {v[1][1]:+.3f}]" for k, v in figures.items()})
    for made in claims:
        print(made)
    write("retention", raw, claims, seed=[0, 1, 2])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(PARTS))
    parser.add_argument("--arms", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="measure nothing")
    told = parser.parse_args()
    torch.set_num_threads(1)
    if not told.table:
        bench = Bench()
        for part, (measure, arms) in PARTS.items():
            for seed in told.seeds if told.part in (None, part) else []:
                for arm in told.arms or arms:
                    if not (file := path(part, arm, seed)).exists():
                        made = {"arm": arm, "seed": seed, **environment(), **measure(bench, arm, seed)}
                        write_json(file, made)
    if told.part is None:
        table()
