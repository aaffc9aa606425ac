"""Adapters that learn a task in one form or in many: what each prompt of every wording gets with and without them.

A gate leaves a prompt to the frozen model to the bit, or to the adapter as it is without a gate (tests/test_gated.py).
So what an adapter does behind any gate follows from what it does without one, prompt by prompt, and where the gate is
open: no adapter is read twice.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from lay_a_trail import complete

import tokenpaths as tp
from benchmarks.common.models import twin
from benchmarks.common.reading import correct
from benchmarks.common.record import environment
from benchmarks.gates.prompts import RENAMED, SHOWN, TASKS, TESTED, TRAINED, far_test, own, renamed, wordings
from tokenpaths.data import Choice
from tokenpaths.demo import GEMMA, demo_model, fast_dtype
from tokenpaths.drift.edit import kl_of_prompts
from tokenpaths.engine.readings import runs
from tokenpaths.lab.peers import PeftAdapter, ScLoraConfig, sc_lora

RANK = 8
STEPS = {"trec": 60, "sentiment": 40, "links": 40}
LEFT_OUT = "c"  # a hand that came when adapters had been read on the others
KEPT = 48  # texts that a budget is held on


MODELS = {"smollm2": None, "gemma": GEMMA}


def load(model: str) -> tuple[Any, Any]:
    base, tokenizer = demo_model(MODELS[model], dtype=fast_dtype())
    base.requires_grad_(False)
    return base, tokenizer


def file(folder: Path, model: str, *told: object) -> Path:
    """Where a run is kept; that of the first model has no name of a model."""
    name = "-".join(map(str, (*(() if model == "smollm2" else (model,)), *told)))
    return folder / f"{name.replace(' ', '_')}.json"


@dataclass(frozen=True)
class Run:
    """A method that learns a task in its trained form, or in `forms` of them by turns."""

    kind: str
    task: str
    forms: int
    seed: int
    model: str = "smollm2"

    def file(self, folder: Path) -> Path:
        return file(folder, self.model, "adapter", self.kind, self.task, self.forms, self.seed)


@dataclass
class Made:
    """A model with a fresh adapter, its learning rate, and goals beside the task."""

    model: Any
    adapter: Any
    rate: float | None
    goals: list[Any] = field(default_factory=list[Any])
    finish: Callable[[], Any] | None = None  # makes of the trained adapter what is read


def lora(base: Any, tokenizer: Any, train: Sequence[tp.Example]) -> Made:
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    model = peft.get_peft_model(twin(base), config)
    return Made(model, PeftAdapter(model), 1e-3)


def start_of_sc_lora(base: Any, tokenizer: Any, train: Sequence[tp.Example]) -> Made:
    config = ScLoraConfig(r=RANK, alpha=2 * RANK, target_modules="all-linear")
    kept = tp.self_samples(base, tokenizer, KEPT, max_new_tokens=48)
    model, _ = sc_lora(twin(base), config, train[:128], kept, beta=0.8)
    return Made(model, PeftAdapter(model), 1e-3)


def trail(base: Any, tokenizer: Any, train: Sequence[tp.Example]) -> Made:
    at = tp.sites(base, slice(6, None), tp.Last(3) | tp.Answer())
    rate = 3e-3 if tp.width(base) == 576 else None  # of SmolLM2; on another model `steps` finds it
    return Made(base, tp.TrailMap({site: tp.DiReFT(tp.width(base), rank=RANK) for site in at}), rate)


def in_a_budget(make: Callable[..., Made], base: Any, tokenizer: Any, train: Sequence[tp.Example]) -> Made:
    """Held within 0.01 nats a token of the frozen model, on texts that it wrote itself."""
    made = make(base, tokenizer, train)
    kept = tp.self_samples(base, tokenizer, KEPT, max_new_tokens=48)
    return Made(made.model, made.adapter, made.rate, [tp.Stay(kept, within=0.01, batch_size=8)])


def guarded(base: Any, tokenizer: Any, train: Sequence[tp.Example]) -> Made:
    """A trail behind `guard`'s gates, which decide token by token; fitted once it is trained."""
    made = trail(base, tokenizer, train)
    kept = tp.self_samples(base, tokenizer, 160, max_new_tokens=48)
    made.finish = lambda: tp.guard(base, made.adapter, train[:256], kept, tokens=tp.All(), most=16384)[0]
    return made


KINDS: dict[str, Callable[[Any, Any, Sequence[tp.Example]], Made]] = {
    "LoRA": lora,
    "trail": trail,
    "SC-LoRA": start_of_sc_lora,
    "LoRA in a budget": partial(in_a_budget, lora),
    "SC-LoRA in a budget": partial(in_a_budget, start_of_sc_lora),
    "trail in a budget": partial(in_a_budget, trail),
    "guarded trail": guarded,
}


def taught(task: str, count: int, seed: int) -> list[tuple[str, str]]:
    """Training pairs, in the trained form, or each in one of `count` forms by turns."""
    items, forms = TASKS[task](), list(own(task).forms.values())[:count]
    some = random.Random(f"taught {seed}").choices(list(items.train), k=STEPS[task] * 16)
    return [(form.prompt(item), form.answer(item)) for item, form in zip(some, forms * len(some), strict=False)]


def learn(run: Run) -> dict[str, Any]:
    """Train an adapter, and read what it makes of every prompt."""
    base, tokenizer = load(run.model)
    train = tp.encode(taught(run.task, run.forms, run.seed), tokenizer, eos=False)
    torch.manual_seed(run.seed)
    made = KINDS[run.kind](base, tokenizer, train)
    goals = [tp.Imitate(train), *made.goals]
    for _ in tp.steps(
        made.model, made.adapter, goals, steps=STEPS[run.task], lr=made.rate, seed=run.seed, progress=False
    ):
        pass
    adapter = made.finish() if made.finish else made.adapter
    return {"run": vars(run), **environment(), **known(made.model, adapter, tokenizer, run.task)}


def frozen(name: str, task: str) -> dict[str, Any]:
    model, tokenizer = load(name)
    return {
        "run": {"kind": "frozen", "task": task, "model": name},
        **environment(),
        **known(model, None, tokenizer, task),
    }


def known(model: Any, adapter: Any, tokenizer: Any, task: str) -> dict[str, Any]:
    """Of each prompt of a form, whether it is answered rightly; of each other, the KL from the frozen model at its end.

    KL is in nats, of the token that comes next.
    """
    items = TASKS[task]().test
    right: dict[str, list[float]] = {}
    with tp.attach(model, adapter) if isinstance(adapter, tp.TrailMap) else nullcontext():
        for name, form in wordings(task).forms.items():
            if name.startswith(f"{LEFT_OUT}: "):
                continue
            some = items[: SHOWN if name == TRAINED else TESTED]
            if form.answers:
                right[name] = correct(model, tokenizer, [Choice(form.answers, i.right, form.prompt(i)) for i in some])
            else:
                right[name] = followed(model, tokenizer, [(form.prompt(item), item.answer) for item in some])
        if task == "links":
            form = own(task).forms["trained"]
            pairs = [(form.prompt(item), item.answer) for item in map(renamed, items[:SHOWN])]
            right[RENAMED] = followed(model, tokenizer, pairs)
        nats = {} if adapter is None else kl_of_prompts(*runs(model, adapter), others(task), tokenizer)
    told = {name: values.tolist() for name, values in nats.items()}
    return {"dtype": str(fast_dtype()), "right": right, "nats": told}


def followed(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Whether the person in whose hands each chain ends is the right one."""
    said = complete(model, tokenizer, [prompt for prompt, _ in pairs])
    return [float(_end(text) == _end(answer)) for text, (_, answer) in zip(said, pairs, strict=True)]


def _end(chain: str) -> str:
    return (chain.split(".", 1)[0].split() or [""])[-1]


def others(task: str) -> dict[str, list[str]]:
    """Prompts of other asks, and far ones, by name."""
    items = TASKS[task]().test[:TESTED]
    asks = {name: ask for name, ask in wordings(task).asks.items() if not name.startswith(f"{LEFT_OUT}: ")}
    prompts = {name: [ask.prompt(item) for item in items] for name, ask in asks.items()}
    return prompts | far_test(task, TESTED)
