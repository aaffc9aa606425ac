"""The methods of the comparison and of the sequence, each made to be trained by the same `steps`."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import tokenpaths as tp
from benchmarks.common.models import Base, twin
from benchmarks.common.reading import TOKENS
from tokenpaths.engine.likelihood import nats

from .tasks import Task, examples

FIRST = 6  # layer of trails that are guarded: below, states say which token it is, not what it is for
RANK = 8
SHUT = 0.25  # nats of the task's answers that gates may cost, before they are fitted on fewer texts
AT = tp.Last(3) | tp.Answer()


class Bench(Base):
    """The model, the examples of a task, and the texts of protections: the same for every method."""

    def __init__(self, task: Task, folder: Path, quick: bool = False) -> None:
        super().__init__(folder, eager=True)
        self.task = task
        self.steps = task.steps // 2 if quick else task.steps
        self.train = examples(self.tokenizer, task)

    @functools.cached_property
    def rehearsed(self) -> list[tp.Example]:
        """Original text."""
        return self.original(128)

    @functools.cached_property
    def plain(self) -> list[tp.Example]:
        """Original text, and the model's own."""
        return [*self.rehearsed[::2], *self.own(1, 32)]

    @functools.cached_property
    def held(self) -> list[tp.Example]:
        """What drift is held on and gates are fitted on: the same, and the model's versions of prompts."""
        return [*self.plain, *self.own(2, 160, self.train, f"-{self.task.name.replace(' ', '-')}")]


@dataclass
class Method:
    """Something to train: a model with an adapter of it.

    `after_step` is called after each step; `finish` gives the adapter to measure, and `at_work` puts it to work.
    """

    model: Any
    adapter: Any
    goals: Sequence[Any] = ()
    after_step: Callable[[], None] = lambda: None
    finish: Callable[[], Any] = lambda: None
    at_work: Callable[[Any], AbstractContextManager[Any]] = lambda adapter: nullcontext()
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """How a method is made for a seed, the learning rates to try, and what else it is run with.

    `protected`: under protections as well. `equal`: for as many steps as LoRA's FLOPs allow, since its own are others.
    """

    make: Callable[[Bench, int], Method]
    rates: tuple[float, float, float]
    protected: bool = True
    equal: bool = False


def trail(
    bench: Bench,
    seed: int,
    rule: tp.tokens.Rule,
    make: Callable[[int], tp.Trail],
    first: int = 0,
    guarded: bool = False,
) -> Method:
    torch.manual_seed(seed)
    sites = tp.sites(bench.model, slice(first, None), rule)
    trails = tp.TrailMap({site: make(bench.dim) for site in sites})
    notes: dict[str, Any] = {}
    if guarded:
        notes["tokens that gates are fitted on"] = sum(map(len, [*bench.train[:256], *bench.held]))

    def finish() -> tp.TrailMap:
        if not guarded:
            return trails
        # the names of a chain stand in its prompt too, so there the gates work beside the token rule
        kept = rule if bench.task.name == "links" else tp.All()
        fit = functools.partial(tp.guard, bench.model, trails, bench.train[:256], tokens=kept, most=16384)
        gated, fits = fit(bench.held)
        if answer_nats(bench, gated) - answer_nats(bench, trails) > SHUT:
            notes["gates are shut on the task by texts that begin as its prompts do"] = True
            gated, fits = fit(bench.plain)
        notes["open on the task"] = [fit.task for fit in fits.values()]
        return gated

    work: Any = functools.partial(tp.attach, bench.model)
    return Method(bench.model, trails, finish=finish, at_work=work, notes=notes)


def answer_nats(bench: Bench, trails: tp.TrailMap) -> float:
    """Nats a token of answers in training that no gate was fitted on."""
    with tp.attach(bench.model, trails):
        told, count = nats(bench.model, bench.train[256:384], TOKENS)
    return float(told.sum() / count.sum())


def guarded_trail(bench: Bench, seed: int) -> Method:
    """The recommended trail: at the end of the prompt and in the answer, above the first fifth, and then guarded."""
    return trail(bench, seed, AT, lambda dim: tp.DiReFT(dim, rank=RANK), FIRST, guarded=True)


def bare_trail(bench: Bench, seed: int) -> Method:
    """The same trail on all tokens, without gates: what LoRA is among weights."""
    return trail(bench, seed, tp.All(), lambda dim: tp.DiReFT(dim, rank=RANK), FIRST)


def loreft(bench: Bench, seed: int) -> Method:
    """As published for reasoning tasks: LoReFT on all layers, the first and last seven tokens of the prompt."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some prompts are shorter
        return trail(bench, seed, tp.First(7) | tp.Last(7), lambda dim: tp.LoReFT(dim, rank=4))


def peft_method(model: Any, **more: Any) -> Method:
    adapter = tp.lab.peers.PeftAdapter(model)
    return Method(model, adapter, finish=lambda: adapter, **more)


def lora(bench: Bench, seed: int, **options: Any) -> Method:
    """PEFT's LoRA of rank 8 on all linear maps of the blocks."""
    import peft

    torch.manual_seed(seed)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    return peft_method(peft.get_peft_model(twin(bench.model), config))


def sc_lora(bench: Bench, seed: int) -> Method:
    """Begun in the subspace of the task's outputs, away from those of original text (beta 0.8)."""
    torch.manual_seed(seed)
    config = tp.lab.peers.ScLoraConfig(r=8, alpha=16, target_modules="all-linear")
    model, found = tp.lab.peers.sc_lora(twin(bench.model), config, bench.train[:256], bench.rehearsed[:64], beta=0.8)
    return peft_method(model, notes={"fewest positive eigenvalues": min(s.positive for s in found.values())})


def curlora(bench: Bench, seed: int) -> Method:
    import peft

    config = tp.lab.peers.CurLoraConfig(r=16, target_modules="all-linear", seed=seed)
    return peft_method(peft.get_peft_model(twin(bench.model), config))


def i_lora(bench: Bench, seed: int) -> Method:
    """LoRA with a slow memory, which is what is measured, and replay of original text: as much as rehearsal has."""
    made = lora(bench, seed)
    memory = tp.lab.peers.DualMemory(made.adapter, decay=0.95)
    old = [tp.Example(e.ids, (False,) + (True,) * (len(e) - 1)) for e in bench.rehearsed]
    made.goals = [tp.lab.peers.ReplayNear(old, memory=memory, every=6, batch_size=1)]
    made.after_step = memory.update
    made.at_work = lambda adapter: memory.slow()
    return made


METHODS: dict[str, Recipe] = {
    "guarded trail": Recipe(guarded_trail, (1e-3, 3e-3, 1e-2), protected=False, equal=True),
    "LoRA": Recipe(lora, (3e-4, 1e-3, 3e-3)),
    "SC-LoRA": Recipe(sc_lora, (3e-4, 1e-3, 3e-3)),
    "trail": Recipe(bare_trail, (1e-3, 3e-3, 1e-2)),
    "CURLoRA": Recipe(curlora, (3e-3, 1e-2, 1e-1)),
    "I-LoRA": Recipe(i_lora, (3e-4, 1e-3, 3e-3), protected=False),
    "LoReFT": Recipe(loreft, (1e-3, 3e-3, 1e-2), equal=True),
}
