"""What is measured: the arms of replay, alignment, waypoints, and the way or the form."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from lay_a_trail import Run, complete, learn, score
from tasks import HOPS, LONGER_HOPS, PEOPLE, Item, few_shot_prompt, make_items, read_answer

import tokenpaths as tp
from benchmarks.common.folders import DATA, KEPT
from benchmarks.common.models import Base
from tokenpaths import forgetting, way_or_form
from tokenpaths.data import Question
from tokenpaths.lab.forgetting import arc_easy, blimp, trec, trec_pairs, wikitext2

WORK = KEPT / "retention"
STEPS, BATCH, LR = 100, 8, 3e-3  # of replay
OTHERS = {  # in the place of PEOPLE, each one token for SmolLM2
    "renamed": "David Michael James Robert William Thomas Daniel Matthew Anthony Steven Andrew Kevin Brian George "
    "Edward Ronald Timothy Jason Gary Jeffrey Ryan Eric Stephen Larry Justin Scott Frank Raymond Patrick Sarah Emily "
    "Emma",
    "places": "Paris Rome London Berlin Madrid Moscow Tokyo Boston Chicago Texas Ohio Iowa Utah Maine Florida Georgia "
    "India China Japan Spain Italy France Egypt Kenya Cuba Peru Chile Brazil Canada Mexico Iran Iraq",
}


class Bench(Base):
    """The model, and the suite that forgetting is read on."""

    def __init__(self) -> None:
        super().__init__(WORK, eager=True)

    def suite(self) -> list[Any]:
        texts = self.tokenizer.batch_decode([e.ids for e in self.own(7, 32)], skip_special_tokens=True)
        words = tuple(tp.data.Text(text) for text in texts if len(self.tokenizer(text)["input_ids"]) > 8)
        tasks = [trec(DATA, 200), wikitext2(DATA, 16), arc_easy(DATA, 40), blimp(DATA, 100)]
        return [*tasks, tp.data.Task("own words", words)]


# Replay


def rehearsed(bench: Bench, kind: str) -> list[tp.Example]:
    return bench.original(256) if kind == "original" else bench.own(1, 64)


def replayed(kind: str, share: float) -> Callable[[Bench, list[tp.Example]], list[Any]]:
    """One stream of the task and a share of texts, trained on their cross-entropy."""

    def goals(bench: Bench, task: list[tp.Example]) -> list[Any]:
        return [tp.Replay(tp.mix(task, rehearsed(bench, kind), share, epochs=2))]

    return goals


def stayed(kind: str, replay: float = 0.0) -> Callable[[Bench, list[tp.Example]], list[Any]]:
    def goals(bench: Bench, task: list[tp.Example]) -> list[Any]:
        first = replayed(kind, replay)(bench, task) if replay else [tp.Imitate(task)]
        return [*first, tp.Stay(rehearsed(bench, kind), within=0.01, batch_size=1)]

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
    trails = tp.TrailMap({site: tp.DiReFT(bench.dim, 4) for site in tp.sites(bench.model)})
    began = time.process_time()
    goals = ARMS[arm](bench, task)
    taken = list(tp.steps(bench.model, trails, goals, steps=STEPS, batch_size=BATCH, lr=LR, seed=seed, progress=False))
    seconds = time.process_time() - began
    found = forgetting(bench.model, trails, bench.suite(), bench.tokenizer, splits=0)  # these lie on every token
    print(found, flush=True)
    return {"suite": found.records(), "seconds": seconds, "losses": [step.losses for step in taken[-10:]]}


# The chains of the demo


def worked(items: list[Item], names: dict[str, str] | None = None) -> list[Question]:
    """Items as the report takes them, with other names if given."""

    def said(text: str) -> str:
        return re.sub("[A-Za-z]+", lambda word: (names or {}).get(word[0], word[0]), text)

    return [Question(said(i.question), said(i.answer), said(i.chain)) for i in items]


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
        bench.model, trails, bench.tokenizer, train=worked(make_items(run.train, seed)[:64]), held_out=worked(held_out),
        forms={**forms, "longer": worked(longer)}, read_answer=last_name, stop_strings=".", words=2,
    )  # fmt: skip
    print(report, flush=True)
    found = {"scores": {s.name: asdict(s) for s in report.scores}, "signs": [asdict(s) for s in report.signs]}
    return found | {"verdict": report.verdict, "text": str(report)}


def align(bench: Bench, arm: str, seed: int) -> dict[str, Any]:
    """AFT behind the demo's trails: A-accuracy on held-out questions, and whether answers got better or worse."""
    trails, run = taught(bench, seed)
    asked = make_items(48, seed + 100)
    tested = make_items(48, seed, held_out=True)

    def sampled(items: list[Item]) -> Any:
        with tp.attach(bench.model, trails):
            return tp.training.sample_chains(
                bench.model, [Question(i.question, i.answer.strip(" .")) for i in items], bench.tokenizer, 4,
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
