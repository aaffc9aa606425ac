"""Does a gate know the task, or its form? Forms and asks that it has not met, by splits; and adapters behind it.

    python -m benchmarks.gates                   # what is missing of the runs, then the table (some hours)
    python -m benchmarks.gates --part splits     # or adapters, cost
    python -m benchmarks.gates --model gemma     # of Gemma 3 270M, beside SmolLM2
    python -m benchmarks.gates --table           # the table of the runs that are there

`splits`    forms and asks of all hands, split at random five times: gates from 1, 4, 8 and 16 forms, read on the rest;
            and gates from the first hand's, read on those of each other hand
`adapters`  LoRA, SC-LoRA and trails that learn a task in its trained form, or in 16 forms, without protections and in
            a budget: without a gate, and behind the gates of the first hand's forms
`cost`      the prefill of a prompt on which the gate is shut, and open, over the frozen model's

The probes, their layer and the shrinking were chosen on TREC's forms of the hands "mine", "a" and "theirs"
(docs/project/log.md). The hands "b" and "c", sentiment, links, and the far kinds of `far_test` had no part in it.
"""

from __future__ import annotations

import random
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tokenpaths as tp
from benchmarks.common.clock import alternate, ratio, timed
from benchmarks.common.folders import KEPT
from benchmarks.common.kept import keep, read
from benchmarks.common.models import twin
from benchmarks.common.options import parser
from benchmarks.common.record import environment, write
from benchmarks.gates.adapters import KINDS, MODELS, Run, file, frozen, learn, load
from benchmarks.gates.features import bare, gather
from benchmarks.gates.prompts import HANDS, RENAMED, TASKS, TRAINED
from benchmarks.gates.tables import claims, show
from tokenpaths.demo import demo_model
from tokenpaths.limits.kinds import conformal_rank
from tokenpaths.limits.openings import GateFit, KindRead, fitted
from tokenpaths.trailmap.gate import Gate

WORK = KEPT / "gates"
SEEDS = (0, 1, 2, 3, 4)
COUNTS = (1, 4, 8, 16)
MANY, GIVEN_ASKS = 16, 28
LEARNED = ("trec", "links")


# Splits


def gate_of(found: dict[Any, Tensor], like: Gate, forms: list[str], asks: list[str]) -> GateFit:
    """The gate that `fit_gate` makes of these forms and asks."""
    kinds: list[KindRead] = []
    for (name, role, part, form), z in found.items():
        if part != "fit":
            continue
        if role == "form" and name in forms:
            kinds.append(KindRead(name, "form", ["" for _ in z], forms.index(name), z.double()))
        elif role == "made" and form in forms:
            group = forms.index(form) if "another last line" in name else None
            kinds.append(KindRead(name, "ask", ["" for _ in z], group, z.double()))
        elif role == "far" or (role == "ask" and name in asks):
            kinds.append(KindRead(name, role, ["" for _ in z], None, z.double()))
    return fitted(like, kinds, 0.05, 0.01)


def scored(found: dict[Any, Tensor], gate: Gate) -> dict[tuple[str, str], Tensor]:
    """The score of every test prompt, by the name and role of its kind."""
    weight, bias = gate.weight.double(), gate.bias.double()
    return {(name, role): z.double() @ weight + bias for (name, role, part, _), z in found.items() if part == "test"}


def of(found: dict[Any, Tensor], role: str, hand: str = "") -> list[str]:
    """The names of forms or asks, of one hand or of all; the trained form first."""
    names = {name for name, r, *_ in found if r == role and name.startswith(hand)}
    return sorted(names, key=lambda name: (name != TRAINED, name))


def split(found: dict[Any, Tensor], seed: int, count: int, like: Gate) -> dict[str, Any]:
    """A gate from `count` forms, the trained one among them, and what it does on the rest, which `seed` draws."""
    rng = random.Random(f"split {seed}")
    trained, *rest = of(found, "form")
    forms = [trained, *rng.sample(rest, len(rest))]
    asks = of(found, "ask")
    rng.shuffle(asks)
    return opening(found, like, forms[:count], asks[:GIVEN_ASKS], forms[MANY:], asks[GIVEN_ASKS:])


def by_hand(found: dict[Any, Tensor], like: Gate, hand: str) -> dict[str, Any]:
    """A gate from the first hand's forms and asks, and what it does on those of another."""
    forms, asks = of(found, "form", "mine"), of(found, "ask", "mine")
    return opening(found, like, forms[:MANY], asks[:GIVEN_ASKS], of(found, "form", hand), of(found, "ask", hand))


def opening(
    found: dict[Any, Tensor], like: Gate, forms: list[str], asks: list[str], unseen: list[str], others: list[str]
) -> dict[str, Any]:
    made = gate_of(found, like, forms, asks)
    scores = scored(found, made.gate)
    opened = {key: float((score > 0).double().mean()) for key, score in scores.items()}
    far = [name for name, role in scores if role == "far"]
    yes = torch.cat([scores[name, "form"] for name in unseen])
    asked = torch.cat([scores[name, "ask"] for name in others])
    elsewhere = torch.cat([scores[name, "far"] for name in far])
    return {
        "trained": opened[TRAINED, "form"],
        "forms": {name: opened[name, "form"] for name in unseen},
        "asks": {name: opened[name, "ask"] for name in others},
        **({"renamed": opened[RENAMED, "renamed"]} if (RENAMED, "renamed") in opened else {}),
        "given asks": {name: opened[name, "ask"] for name in asks},
        "far": {name: opened[name, "far"] for name in far},
        "auroc asks": _auroc(yes, asked),
        "auroc far": _auroc(yes, elsewhere),
        "open at 5 % of asks and 1 % of far": float(
            (yes > max(asked.quantile(0.95), elsewhere.quantile(0.99))).double().mean()
        ),
        "told": {"generality": made.generality[0], "asks": made.locality("ask")[0], "far": made.locality("far")[0]},
    }


def _auroc(yes: Tensor, no: Tensor) -> float:
    return float((yes[:, None] > no[None]).double().mean())


def splits(model: Any, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """By task: every split, and under "opens" where gates of the first hand's forms are open."""
    like = bare(model, tokenizer)
    told: dict[str, Any] = {}
    for task in TASKS:
        found = gather(model, tokenizer, task, folder)
        told[task] = {str(n): [split(found, seed, n, like) for seed in SEEDS] for n in COUNTS}
        told[task] |= {f"hand {hand}": by_hand(found, like, hand) for hand in HANDS[1:] if of(found, "form", hand)}
        forms, asks = of(found, "form", "mine"), of(found, "ask", "mine")[:GIVEN_ASKS]
        gates = {str(n): gate_of(found, like, forms[:n], asks) for n in (1, MANY)}
        told[task]["opens"] = {
            n: {
                name: "".join("01"[x > 0] for x in score.tolist())
                for (name, _), score in scored(found, made.gate).items()
            }
            for n, made in gates.items()
        }
        told[task]["fits"] = {n: str(made) for n, made in gates.items()}
    return told


def simulated() -> dict[str, float]:
    """Of scores drawn from skewed distributions: how often a new one is beyond the conformal rank of 400."""
    rng = np.random.default_rng(0)
    rates: list[float] = []
    for shape in rng.uniform(0.5, 5, 400):
        scores, fresh = rng.gamma(shape, size=400), rng.gamma(shape, size=4000)
        threshold = np.sort(scores)[conformal_rank(0.95, len(scores)) - 1]
        rates.append(float((fresh > threshold).mean()))
    return {"promised": 0.05, "measured": statistics.fmean(rates)}


# Cost


def cost() -> dict[str, Any]:
    """Each arm has a model of its own, on which its trails stay attached."""
    base, tokenizer = demo_model()
    models: dict[str, Any] = {"frozen": base}
    for name, bias in (("shut", -1.0), ("open", 1.0)):
        models[name] = model = twin(base)
        trails = tp.TrailMap({site: tp.Additive(tp.width(model)) for site in tp.sites(model, tokens=tp.Last(1))})
        gate = bare(model, tokenizer)
        gate.bias.fill_(bias)
        tp.attach(model, trails, when=gate)

    def prefill(model: Any, ids: Tensor) -> None:
        with torch.no_grad():
            model(ids, use_cache=True)

    told: dict[str, Any] = {}
    for words in (60, 400):
        ids = tokenizer(" word" * words, return_tensors="pt")["input_ids"]
        seconds = alternate({name: timed(partial(prefill, model, ids)) for name, model in models.items()}, 12, 2)
        told[str(words)] = {name: ratio(seconds[name], seconds["frozen"]) for name in ("shut", "open")}
        told[str(words)]["raw"] = seconds
    return told


def table() -> None:
    done = {path.stem: read([path])[0] for path in sorted(WORK.glob("*.json"))}
    write("gates", done, claims(done), seed=list(SEEDS))
    show(done)


def adapters(model: str) -> None:
    for task in TASKS if model == "smollm2" else LEARNED:
        keep(file(WORK, model, "frozen", task), partial(frozen, model, task))
    for run in RUNS:
        if run.model == model:
            keep(run.file(WORK), partial(learn, run))


RUNS = [
    *(
        Run(kind, task, n, seed)
        for seed in SEEDS[:3]
        for kind in ("LoRA", "trail")
        for task in LEARNED
        for n in (16, 1)
    ),
    *(Run(kind, task, MANY, 0) for kind in KINDS for task in LEARNED),
    *(Run(kind, task, MANY, 0, "gemma") for task in LEARNED for kind in ("LoRA", "trail")),
]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--part", choices=("splits", "adapters", "cost"))
    options.add_argument("--model", choices=MODELS, default="smollm2")
    options.add_argument("--table", action="store_true")
    asked = options.parse_args()
    torch.set_num_threads(1)
    if not asked.table:
        if asked.part in (None, "splits"):
            folder = WORK if asked.model == "smollm2" else WORK / asked.model
            keep(
                file(WORK, asked.model, "splits"),
                lambda: {"splits": splits(*load(asked.model), folder), "simulated": simulated(), **environment()},
            )
        if asked.part in (None, "adapters"):
            adapters(asked.model)
        if asked.part in (None, "cost"):
            keep(WORK / "cost.json", cost)
    if asked.part is None:
        table()


if __name__ == "__main__":
    main()
