"""The parts: each measures one thing, and returns what is kept of it."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import tokenpaths as tp
from benchmarks.common.clock import alternate, exponent, flops, ratio, slope, timed
from benchmarks.common.models import twin
from benchmarks.common.process import Memory
from tokenpaths import Cone, Stay

from .arms import (
    ADAPTERS,
    BATCHES,
    LINEAR,
    QUERY_VALUE,
    STEPS,
    adapters,
    lora,
    lora_model,
    ours,
    pyreft_model,
    training,
)
from .setups import ON_GPU_ONLY, SHAPES, TASKS, Bench, Task

RATES = [1e-4 * 2**i for i in range(8)]  # of the eight arms
REHEARSED = (2, 128)  # texts and tokens of a Stay, and of a drift reading


@dataclass(frozen=True)
class Run:
    """How long to measure. The rounds that fill a cone are dropped with those that warm up."""

    rounds: int = 7
    quick: bool = False

    @property
    def warm(self) -> int:
        return BATCHES + 1

    def task(self, name: str) -> Task:
        return TASKS[name].small() if self.quick else TASKS[name]


def steps(shape: str, task: str, run: Run) -> dict[str, Any]:
    """One optimizer step of every method. Ours is timed from the second epoch on; its FLOPs are counted in both."""
    bench = Bench(shape, run.task(task))
    calls = {name: make(bench) for name, make in STEPS.items()}
    with adapters(bench) as others:
        arms = {name: timed(call) for name, call in calls.items()}
        arms |= {name: lambda step=step: step()["seconds"] for name, step in others.items()}
        seconds = alternate(arms, run.rounds, run.warm)
    counted = {name: flops(call) for name, call in calls.items()} | {"ours, first epoch": flops(ours(bench))}
    return {**against("ours", seconds), "flops": counted, "tokens": bench.batch * len(bench.examples(1)[0])}


def stay(shape: str, task: str, run: Run) -> dict[str, Any]:
    """What holding or reading drift on a few texts adds to a step, and what holding LoRA by KL adds to its step."""
    bench = Bench(shape, run.task(task))
    count, length = REHEARSED
    texts = bench.texts(count * BATCHES, length // 8 if run.quick else length)
    calls = {
        "step": ours(bench),
        "step and Stay": ours(bench, also=[Stay(texts, gain=0.0, batch_size=count)]),
        "step and drift": ours(bench, reads=texts[:count]),
        "lora": lora(bench),
        "lora and KL": lora(bench, stays=texts[:count]),
    }
    seconds = alternate({name: timed(call) for name, call in calls.items()}, run.rounds, run.warm)
    pairs = {"step and Stay": "step", "step and drift": "step", "lora and KL": "lora"}
    return {
        "seconds": seconds,
        "ratios": {name: ratio(seconds[name], seconds[base]) for name, base in pairs.items()},
        "flops": {name: flops(call) for name, call in calls.items()},
    }


@torch.no_grad()
def forward(shape: str, run: Run) -> dict[str, Any]:
    """A forward of a batch, steered and frozen."""
    bench = Bench(shape, run.task("all"))
    batch = next(bench.batches(bench.examples(bench.batch)))
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    steered, reft, low_rank = twin(bench.model), pyreft_model(bench), lora_model(bench)
    places = {"sources->base": (None, [[bench.positions()] * bench.batch] * len(bench.layers))}
    calls = {
        "ours": lambda: steered(**inputs, use_cache=False),
        "pyreft": lambda: reft(inputs, unit_locations=places),
        "lora all linear": lambda: low_rank(**inputs, use_cache=False),
        "frozen": lambda: bench.model(**inputs, use_cache=False),
    }
    with tp.attach(steered, bench.trails()):
        seconds = alternate({name: timed(call) for name, call in calls.items()}, 3 * run.rounds, run.warm)
    return against("ours", seconds)


@torch.no_grad()
def decode(shape: str, run: Run) -> dict[str, Any]:
    """A token behind a cache of so many: trails on the prompt's last token, trails on the answer too, and none."""
    model = Bench(shape, run.task("all")).model
    rules = {"Last(1)": tp.Last(1), "Last(1) | Answer()": tp.Last(1) | tp.Answer()}
    benches = {name: Bench(shape, Task(rule), model=model) for name, rule in rules.items()}
    models = {name: twin(bench.model) for name, bench in benches.items()} | {"frozen": model}
    found: dict[int, Any] = {}
    attached = [tp.attach(models[name], bench.trails()) for name, bench in benches.items()]
    for length in [16, 32, 64] if run.quick else [64, 128, 256, 512, 1024, 2048]:
        ids = torch.randint(3, SHAPES[shape].vocabulary, (1, length), device=model.device)
        arms = {name: timed(writer(models[name], ids)) for name in models}
        seconds = alternate(arms, 4 if run.quick else 128, 4)
        found[length] = against("frozen", seconds, inverse=True)
    for handle in attached:
        handle.remove()
    grown = {  # of the ratio, with each doubling of the length
        name: slope(
            [torch.tensor(float(n)).log2().item() for n in found for _ in found[n]["seconds"]["frozen"]],
            [
                a / b
                for n in found
                for a, b in zip(found[n]["seconds"][name], found[n]["seconds"]["frozen"], strict=True)
            ],
        )
        for name in rules
    }
    return {"lengths": found, "growth_per_doubling": grown}


def writer(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    """Writes one token after another behind a prompt, which is read here."""
    past = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True).past_key_values

    def write_one() -> None:
        seen = torch.ones(1, past.get_seq_length() + 1, dtype=torch.long, device=ids.device)
        model(input_ids=ids[:, -1:], attention_mask=seen, past_key_values=past, use_cache=True)

    return write_one


def arms(shape: str, task: str, epochs: int, run: Run) -> dict[str, Any]:
    """Eight learning rates on one data set: with one cone for all, with a cone of its own for each, and with none."""
    bench = Bench(shape, run.task(task))
    goals = [tp.Imitate(bench.examples(BATCHES * bench.batch))]

    def sweep(cone: Callable[[], Any]) -> Callable[[], None]:
        def all_arms() -> None:
            one, model = cone(), twin(bench.model)
            for rate in RATES:
                for _ in training(bench, model, bench.trails(), goals, cone=one, lr=rate, steps=None, epochs=epochs):
                    pass

        return all_arms

    calls = {"one cone": sweep(Cone)}
    calls |= {"separate": sweep(lambda: True), "no cone": sweep(lambda: False)}
    next(training(bench, twin(bench.model), bench.trails(), goals))  # warms up
    return against("one cone", alternate({name: timed(call) for name, call in calls.items()}, min(run.rounds, 3), 0))


def scale(shape: str, run: Run) -> dict[str, Any]:
    """Our step against prompt length, layers, rank and sites, with the exponent of each curve."""
    model = Bench(shape, run.task("all")).model
    count = len(tp.site.find_blocks(model))
    answers = tp.Last(1) | tp.Answer()
    task, ranks = run.task("all"), [1, 2, 4, 8, 16, 32, 64]
    depths = sorted({1, *(count * k // 4 for k in (1, 2, 3, 4))})
    lengths = [16, 32, 64] if run.quick else [64, 128, 256, 512, 1024, 2048]
    make = functools.partial(Bench, shape, model=model, batch=1)
    curves: dict[str, dict[int, Bench]] = {
        "prompt length, all tokens": {n: make(Task(tp.All(), prompt=n, answer=task.answer)) for n in lengths},
        "prompt length, answers only": {n: make(Task(answers, prompt=n, answer=task.answer)) for n in lengths},
        "layers, from the top down": {n: make(task, layers=list(range(count - n, count))) for n in depths},
        "sites, from the first layer on": {n: make(task, layers=spread(n, count)) for n in depths},
        "rank": {n: make(task, rank=n) for n in ranks},
    }
    found: dict[str, Any] = {}
    for name, benches in curves.items():
        each = {str(n): timed(ours(bench)) for n, bench in benches.items()}
        seconds = alternate(each, run.rounds, run.warm)
        found[name] = {"seconds": seconds, "exponent": exponent(list(benches), list(seconds.values()))}
    return found


def spread(n: int, count: int) -> list[int]:
    """n layers of so many, evenly, from the first on."""
    return sorted({i * count // n for i in range(n)})


def memory(shape: str, task: str, run: Run) -> dict[str, Any]:
    """The peak of each arm in a process of its own, over what that holds before its first step."""
    found: dict[str, Any] = {}
    for name in [*(name for name in STEPS if name != "frozen forward"), "adapters"]:
        if name == "adapters" and not ADAPTERS.exists():
            continue
        told = ["--memory", shape, task, name, *(["--quick"] if run.quick else [])]
        command = [sys.executable, "-m", "benchmarks.cost", *told]
        found[name] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    peaks = {name: figures["peak_mib"] for name, figures in found.items()}
    return {"arms": found, "ratios": {name: peaks["ours"] / peak for name, peak in peaks.items() if name != "ours"}}


def memory_of(shape: str, task: str, name: str, run: Run) -> dict[str, float]:
    """What one arm takes, in this process; two epochs, so that a cone is full."""
    if name != "adapters":
        STEPS[name](Bench("tiny", run.task(task)))()  # so that no library is loaded while it is measured
    bench = Bench(shape, run.task(task))
    if name == "adapters":
        with adapters(bench) as others:
            return [others[name]() for _ in range(2 * BATCHES)][-1]
    used = Memory()
    step = STEPS[name](bench)
    for _ in range(2 * BATCHES):
        step()
    return used.used() | state_of(bench, name)


def state_of(bench: Bench, name: str) -> dict[str, float]:
    """Bytes of what an arm learns, and of the buffers that it adds to the model for it."""
    if name.startswith("ours"):
        model: Any = bench.trails()
    elif name == "pyreft":
        model = torch.nn.ModuleList(pyreft_model(bench).interventions.values())
    else:
        model = lora_model(bench, QUERY_VALUE if name == "lora q,v" else LINEAR)
    learned = [p for p in model.parameters() if p.requires_grad]
    base = {id(tensor) for tensor in bench.model.buffers()}
    added = [tensor for tensor in model.buffers() if id(tensor) not in base]
    return {
        "parameter_bytes": sum(p.numel() * p.element_size() for p in learned),
        "buffer_bytes": sum(b.numel() * b.element_size() for b in added),
    }


def against(name: str, seconds: dict[str, list[float]], *, inverse: bool = False) -> dict[str, Any]:
    """The seconds, and the ratio of one arm to every other (of every other to it)."""
    others = [other for other in seconds if other != name]
    pairs = {other: (other, name) if inverse else (name, other) for other in others}
    return {"seconds": seconds, "ratios": {other: ratio(seconds[a], seconds[b]) for other, (a, b) in pairs.items()}}


def parts(run: Run) -> dict[str, Callable[[], Any]]:
    """Everything that is measured, by name."""
    shapes = ["tiny"] if run.quick else [s for s in SHAPES if torch.cuda.is_available() or s not in ON_GPU_ONLY]
    main = shapes[0]
    found: dict[str, Callable[[], Any]] = {}
    for shape in shapes:
        for task in ("all", "upper", "shared prompt"):
            found[f"steps/{shape}/{task}"] = functools.partial(steps, shape, task, run)
        found[f"forward/{shape}"] = functools.partial(forward, shape, run)
        found[f"decode/{shape}"] = functools.partial(decode, shape, run)
    for task in ("all",) if run.quick else ("all", "upper", "shared prompt"):
        found[f"memory/{main}/{task}"] = functools.partial(memory, main, task, run)
    for task in ("all", "upper"):
        found[f"stay/{main}/{task}"] = functools.partial(stay, main, task, run)
    for task, epochs in (("own prompts", 1), ("own prompts", 3), ("upper", 1)):
        found[f"arms/{main}/{task}/{epochs}"] = functools.partial(arms, main, task, epochs, run)
    found[f"scale/{main}"] = functools.partial(scale, main, run)
    return found
