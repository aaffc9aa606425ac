"""What does a training step, a forward, a token cost, beside pyreft, adapters, PEFT's LoRA and the frozen model?

    python benchmarks/cost.py                        # what has not been measured yet, then the table
    python benchmarks/cost.py --part steps           # some of it: steps, stay, forward, decode, arms, scale or memory
    python benchmarks/cost.py --part steps/smollm2   # or less, by the beginning of its name; --again measures it anew
    python benchmarks/cost.py --table                # the table of what there is
    python benchmarks/cost.py --quick                # every part once on a tiny model: that it runs, and no figures
    python benchmarks/cost.py --make-environment     # for adapters, which needs a transformers of its own

Arms take turns in one process, CPU seconds of one thread (on a GPU, seconds of the clock), and what is compared is the
ratio of two arms in one round. adapters runs in a process beside, in the same turns. Each part is kept in a file until
all are a table, so that it can be measured when the machine is quiet.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _cost_arms import (
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
from _cost_clock import alternate, exponent, flops, ratio, slope, timed
from _cost_process import Memory
from _cost_setups import ON_GPU_ONLY, SHAPES, TASKS, Bench, Task
from _record import Claim, environment, write, write_json

import tokenpaths as tp
from tokenpaths import Cone, Stay
from tokenpaths.demo import _cache

WORK = _cache() / "cost"  # what was measured, until it is a table
PICTURE = Path(__file__).parents[1] / "docs/pictures/cost.png"
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


# The parts: each measures one thing, and returns what is kept of it


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
    steered, reft, low_rank = bench.twin(), pyreft_model(bench), lora_model(bench)
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
    models = {name: bench.twin() for name, bench in benches.items()} | {"frozen": model}
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
            one, model = cone(), bench.twin()
            for rate in RATES:
                for _ in training(bench, model, bench.trails(), goals, cone=one, lr=rate, steps=None, epochs=epochs):
                    pass

        return all_arms

    calls = {"one cone": sweep(Cone)}
    calls |= {"separate": sweep(lambda: True), "no cone": sweep(lambda: False)}
    next(training(bench, bench.twin(), bench.trails(), goals))  # warms up
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
        command = [sys.executable, __file__, "--memory", shape, task, name, *(["--quick"] if run.quick else [])]
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


def path(name: str, run: Run) -> Path:
    return WORK / ("quick" if run.quick else "full") / f"{name.replace(' ', '-').replace('/', '--')}.json"


def measure(name: str, part: Callable[[], Any], run: Run) -> None:
    where = environment()
    found = {"name": name, **where, "measured": part()}
    write_json(path(name, run), found)


# The table


def table(run: Run) -> None:
    """All that was measured, as one result file with its claims and a picture; only printed after `--quick`."""
    files = {name: path(name, run) for name in parts(run)}
    found = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    for name in files.keys() - found.keys():
        print(f"not measured yet: {name}")
    measured = {name: part["measured"] for name, part in found.items()}
    made = claims(measured, next(iter(files)).split("/")[1])
    print(markdown(made))
    if run.quick:
        return
    write("cost", found, made, seed=0)
    picture(measured).savefig(PICTURE, dpi=100)


def claims(found: dict[str, Any], shape: str) -> list[Claim]:
    """Of one model: what has been measured of it."""
    what = f"{shape}, LoReFT rank 4"
    step = "time of a training step, 224 prompt and 32 answer tokens"
    steps = [
        ("train_all_layers_vs_pyreft", "all", "pyreft", f"{step}, all layers and tokens, over pyreft's", "<= 0.80"),
        ("train_all_layers_vs_lora", "all", "lora all linear", f"{step}, all layers and tokens, over LoRA's r=8 on all "
         "linear maps", "<= 0.80"),
        ("train_upper_half_vs_pyreft", "upper", "pyreft", f"{step}, upper half of the layers, second epoch on, over "
         "pyreft's", "<= 0.50"),
        ("train_shared_prompt_vs_pyreft", "shared prompt", "pyreft", f"{step}, Last(1) | Answer(), 200 tokens of the "
         "prompt shared by all, second epoch on, over pyreft's", "<= 0.25"),
    ]  # fmt: skip
    made = [
        claim(name, f"{told}; {what}", part["ratios"][peer], target)
        for name, task, peer, told, target in steps
        if (part := found.get(f"steps/{shape}/{task}"))
    ]
    if part := found.get(f"steps/{shape}/all"):
        counted = part["flops"]["ours"] / part["flops"]["lora all linear"]
        told = f"FLOPs of a training step, all layers and tokens, over those of LoRA r=8 on all linear maps; {what}"
        made.append(Claim("flops_all_layers_vs_lora", told, counted, "ratio", "<= 0.83"))
    if part := found.get(f"stay/{shape}/all"):
        told = f"time of a training step with Stay on 2 x 128 tokens over that without, all layers and tokens; {what}"
        made.append(claim("stay_overhead", told, part["ratios"]["step and Stay"], "<= 1.15"))
        told = "time of a training step with a drift reading of 2 x 128 tokens over that without, all layers and tokens"
        made.append(claim("drift_each_step_overhead", f"{told}; {what}", part["ratios"]["step and drift"], "<= 1.15"))
        told = "LoRA: time of a training step with KL to disable_adapter() on 2 x 128 tokens over that without; "
        made.append(claim("lora_stay_overhead", told + shape, part["ratios"]["lora and KL"], ""))
    if part := found.get(f"forward/{shape}"):
        told = f"time of a steered forward over a frozen one, all layers and tokens; {what}"
        made.append(claim("forward_overhead", told, part["ratios"]["frozen"], "<= 1.02"))
    if part := found.get(f"decode/{shape}"):
        lengths = part["lengths"]
        pooled = [[t for n in lengths for t in lengths[n]["seconds"][name]] for name in ("Last(1)", "frozen")]
        told = f"time of a decoded token over the frozen model's, Last(1) on all layers, cache of 64 to 2048; {what}"
        made.append(claim("decode_overhead", told, ratio(*pooled), "<= 1.005"))
    if part := found.get(f"memory/{shape}/all"):
        told = f"peak memory of training over that of LoRA, both above what the process holds before; {what}"
        made.append(Claim("peak_memory_vs_lora", told, part["ratios"]["lora all linear"], "ratio", "< 1"))
    epochs = next((n for n in (3, 1) if f"arms/{shape}/own prompts/{n}" in found), None)
    if part := found.get(f"arms/{shape}/own prompts/{epochs}"):
        # the kinder of the two for a peer: in few epochs a cone that is not shared may cost more than it saves
        apart = min(("separate", "no cone"), key=lambda name: statistics.median(part["seconds"][name]))
        each = "with a cone each" if apart == "separate" else "without one, which took less than with a cone each"
        told = f"time of eight learning rates that share one Cone over eight runs {each}"
        told = f"{told}; Last(1) | Answer(), epochs of two steps: {epochs}; {what}"
        made.append(claim("eight_arms_ratio", told, part["ratios"][apart], "<= 0.6"))
    return made


def claim(name: str, told: str, found: dict[str, float], target: str) -> Claim:
    return Claim(name, told, found["median"], "ratio", target, (found["low"], found["high"]))


def markdown(made: list[Claim]) -> str:
    lines = ["| what | measured | target |", "|---|---|---|"]
    for c in made:
        spread = "" if c.interval is None else f" [{c.interval[0]:.3f}, {c.interval[1]:.3f}]"
        lines.append(f"| {c.claim} | {c.measured:.3f}{spread} | {c.target} |")
    return "\n".join(lines)


def picture(found: dict[str, Any]) -> Any:
    """Training steps by arm, the curves of cost, and decoding against length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    bars, curves, tokens = figure.subplots(1, 3)
    tasks = [task for task in ("all", "upper", "shared prompt") if f"steps/smollm2/{task}" in found]
    for number, task in enumerate(tasks):
        seconds = found[f"steps/smollm2/{task}"]["seconds"]
        places = [i + 0.27 * (number - 1) for i in range(len(seconds))]
        bars.barh(places, [statistics.median(s) for s in seconds.values()], height=0.25, label=task)
        bars.set_yticks(range(len(seconds)), list(seconds))
    bars.invert_yaxis()
    bars.set_xlabel("CPU seconds of a training step")
    for name, curve in found.get("scale/smollm2", {}).items():
        sizes = [int(n) for n in curve["seconds"]]
        medians = [statistics.median(s) for s in curve["seconds"].values()]
        curves.plot(sizes, medians, "o-", label=f"{name}: exponent {curve['exponent']['slope']:.2f}", markersize=3)
    curves.set(xscale="log", yscale="log", xlabel="tokens, layers, sites or rank", ylabel="CPU seconds of our step")
    curves.set_ylim(top=60)  # room for the legend
    lengths = found.get("decode/smollm2", {}).get("lengths", {})
    for name in ("Last(1)", "Last(1) | Answer()"):
        ratios = [part["ratios"][name] for part in lengths.values()]
        at = [int(n) for n in lengths]
        tokens.plot(at, [r["median"] for r in ratios], "o-", label=name, markersize=3)
        tokens.fill_between(at, [r["low"] for r in ratios], [r["high"] for r in ratios], alpha=0.2)
    tokens.set(xscale="log", xlabel="tokens in the cache", ylabel="a token, steered over frozen")
    tokens.axhline(1, color="grey", linewidth=1, linestyle=":")
    for axes in (bars, curves, tokens):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8, loc="upper left" if axes is curves else "best")
    figure.suptitle("What steering costs (SmolLM2-135M, one thread)")
    return figure


def make_environment() -> None:
    """adapters 1.3.0 with the transformers that it needs and the torch of this environment."""
    folder = ADAPTERS.parents[1]
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    torch_here = f"torch=={torch.__version__.partition('+')[0]}"
    pip = [str(ADAPTERS), "-m", "pip", "install", "-q"]
    subprocess.run([*pip, torch_here], check=True)  # first and alone, so that pip takes the machine's own build
    subprocess.run([*pip, torch_here, "transformers==4.57.6", "adapters==1.3.0"], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="", help="the beginning of the names of what to measure")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--again", action="store_true", help="measure what has been measured")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds")
    parser.add_argument("--make-environment", action="store_true")
    parser.add_argument("--memory", nargs=3, metavar=("SHAPE", "TASK", "ARM"), help=argparse.SUPPRESS)
    told = parser.parse_args()
    torch.set_num_threads(1)
    run = Run(rounds=2 if told.quick else told.rounds, quick=told.quick)
    if told.make_environment:
        return make_environment()
    if told.memory:
        return print(json.dumps(memory_of(*told.memory, run)))
    chosen = {name: part for name, part in parts(run).items() if name.startswith(told.part)}
    if not chosen:
        parser.error(f"--part {told.part!r} begins none of: {', '.join(parts(run))}")
    for name, part in chosen.items():
        if not told.table and (told.again or not path(name, run).exists()):
            print(name, flush=True)
            measure(name, part, run)
    if not told.part or told.table:
        table(run)


if __name__ == "__main__":
    main()
