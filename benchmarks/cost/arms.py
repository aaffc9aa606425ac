"""The arms: each makes one optimizer step of one method a call: forward, loss, backward, clipping at 1, AdamW.

Peers run as their own trainers run them: the model's loss over the labels, and gradients clipped by their norm, which
is what Hugging Face's Trainer does by default. Every arm collates its batches with `tokenpaths.collate`.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from pyreft_oracle import load_pyreft
from torch import Tensor, nn

import tokenpaths as tp
from benchmarks.common.folders import KEPT, ROOT
from benchmarks.common.models import twin
from tokenpaths.engine import answer_logits

from .setups import Bench

Call = Callable[[], Any]
BATCHES = 2  # in an epoch: few, so that the second epoch comes soon
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
QUERY_VALUE = ("q_proj", "v_proj")
ADAPTERS = KEPT / "benchmark-envs/adapters/bin/python"


# Ours


def training(
    bench: Bench, model: Any, trails: tp.TrailMap, goals: Sequence[tp.Objective], *, cone: Any = True, **options: Any
) -> Generator[tp.training.Step]:
    """`tokenpaths.steps`, as all parts call it."""
    options = {"steps": 10**6, "schedule": "constant", "warmup": 0, "cone": cone, **options}
    return tp.steps(model, trails, goals, batch_size=bench.batch, progress=False, **options)


def ours(
    bench: Bench, *, cone: Any = True, also: Iterable[tp.Objective] = (), reads: Sequence[tp.Example] | None = None
) -> Call:
    """`also` are goals beside imitation; `reads` are texts that drift is read on after each step."""
    model, trails = twin(bench.model), bench.trails()
    goals = [tp.Imitate(bench.examples(BATCHES * bench.batch)), *also]
    drift = (
        {} if reads is None else {"drift": lambda: tp.measure_drift(model, trails, reads)["kl"].mean, "drift_every": 1}
    )
    going = training(bench, model, trails, goals, cone=cone, **drift)
    return lambda: next(going)


# Peers


def frozen(bench: Bench) -> Call:
    """A forward of the frozen model, with no gradient and no loss."""
    batches = bench.batches(bench.examples(BATCHES * bench.batch))

    def forward() -> None:
        batch = next(batches)
        with torch.no_grad():
            bench.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)

    return forward


def pyreft(bench: Bench) -> Call:
    """pyreft 0.1.0's LoreftIntervention, with the loss of its ReftTrainer."""
    wrapped = pyreft_model(bench)
    parameters = [p for phi in wrapped.interventions.values() for p in phi.parameters() if p.requires_grad]
    places = torch.tensor(bench.positions()).expand(bench.batch, len(bench.layers), -1)

    def loss(batch: tp.data.Batch) -> Tensor:
        _, output = wrapped(
            {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask},
            unit_locations={"sources->base": (None, places.permute(1, 0, 2).tolist())},
            labels=batch.labels,
        )
        return output.loss

    return _step(bench, parameters, loss)


def pyreft_model(bench: Bench) -> Any:
    library = load_pyreft()
    sites = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": bench.rank,
            "intervention": library.LoreftIntervention(
                embed_dim=bench.width, low_rank_dimension=bench.rank, dtype=bench.model.dtype
            ),
        }
        for layer in bench.layers
    ]
    return library.get_reft_model(twin(bench.model), library.ReftConfig(representations=sites))


def lora(
    bench: Bench, targets: Sequence[str] = LINEAR, *, own_head: bool = True, stays: Sequence[tp.Example] | None = None
) -> Call:
    """PEFT's LoRA r=8 on the layers of the task.

    Without `own_head` its loss is ours, which computes the logits of the answer alone. `stays` are texts on which it is
    held to `disable_adapter()` by KL, as `Stay` does.
    """
    model = lora_model(bench, targets)
    parameters = [p for p in model.parameters() if p.requires_grad]
    held = None if stays is None else tp.data.collate(stays).to(bench.model.device)

    def loss(batch: tp.data.Batch) -> Tensor:
        if own_head:
            return model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels, use_cache=False
            ).loss
        logits, targets = answer_logits(model, batch)
        return F.cross_entropy(logits.float(), targets)

    def stay() -> Tensor:
        assert held is not None
        inputs = {"input_ids": held.input_ids, "attention_mask": held.attention_mask, "use_cache": False}
        with torch.no_grad(), model.disable_adapter():
            before = F.log_softmax(model(**inputs).logits.float(), -1)
        after = F.log_softmax(model(**inputs).logits.float(), -1)
        return F.kl_div(after, before, reduction="none", log_target=True).sum(-1).mean()

    return _step(bench, parameters, loss, stay if held is not None else None)


def lora_model(bench: Bench, targets: Sequence[str] = LINEAR) -> Any:
    import peft

    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=list(targets), layers_to_transform=bench.layers, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(twin(bench.model), config)


def _step(
    bench: Bench, parameters: list[nn.Parameter], loss: Callable[[tp.data.Batch], Tensor], also: Call | None = None
) -> Call:
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    batches = bench.batches(bench.examples(BATCHES * bench.batch))

    def step() -> None:
        loss(next(batches)).backward()
        if also is not None:
            also().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


STEPS: dict[str, Callable[[Bench], Call]] = {
    "ours": ours,
    "ours, no cone": lambda bench: ours(bench, cone=False),
    "pyreft": pyreft,
    "lora all linear": lora,
    "lora q,v": lambda bench: lora(bench, QUERY_VALUE),
    "lora all linear, answer logits": lambda bench: lora(bench, own_head=False),
    "frozen forward": frozen,
}


# adapters needs another transformers, and so another process


@contextmanager
def adapters(bench: Bench) -> Generator[dict[str, Callable[[], dict[str, float]]]]:
    """The arm of adapters 1.3.0, where its environment is (`--make-environment`), and no arm elsewhere.

    A call makes one step in the other process and returns what that says of it: `seconds`, and memory in MiB.
    """
    if not ADAPTERS.exists():
        print(f"no {ADAPTERS}: adapters is left out; `python -m benchmarks.cost --make-environment`", flush=True)
        yield {}
        return
    chosen = bench.positions()
    told = {
        "model": bench.shape.config(),
        "dtype": str(bench.model.dtype).removeprefix("torch."),
        "device": bench.model.device.type,
        "threads": torch.get_num_threads(),
        "layers": bench.layers,
        "from_end": chosen[0] > 0,  # it knows the first tokens of a text and the last ones
        "tokens": len(chosen),
        "rank": bench.rank,
        "batch": bench.batch,
        "examples": BATCHES * bench.batch,
        **{key: value for key, value in asdict(bench.task).items() if key in ("prompt", "answer")},
    }
    command = [str(ADAPTERS), "-m", "benchmarks.cost.peer", json.dumps(told)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        to, back = process.stdin, process.stdout

        def step() -> dict[str, float]:
            print("step", file=to, flush=True)
            line = back.readline()
            if not line:
                raise RuntimeError("the process of adapters has ended: its error is above")
            return json.loads(line)

        try:
            yield {"adapters": step}
        finally:
            to.close()
