"""What only a GPU shows: that threads, checkpointed backwards and keys are right there, and what trails cost.

    python -m benchmarks.gpu

The model is a Llama of 1.2 thousand million random parameters in bfloat16, with LoReFT of rank 4 at each of its 16
layers. Seconds are of CUDA events; arms are run in alternation, and a figure is the median of the ratios.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import tokenpaths as tp
from benchmarks.common.record import Claim, write
from benchmarks.torture import threads

ROUNDS = 15
PROMPT, NEW = 512, 64


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    with TemporaryDirectory() as folder:
        served = threads.run(Path(folder), device="cuda")
    model = _model()
    raw = {
        "device": torch.cuda.get_device_name(),
        "threads": served,
        "checkpointed": _checkpointed(),
        "waits": _waits(model),
        "ratios": {
            f"{what}, {name}": _ratio(model, rule, run) for what, run in RUNS.items() for name, rule in RULES.items()
        },
    }
    told = "against the frozen model, Llama of 1.2 B, bfloat16, LoReFT rank 4 at all 16 layers, on a GPU"
    wrong = "answers of 1,000 requests in four threads that differ from those given alone, on a GPU"
    claims = [
        Claim("gpu_threads_wrong", wrong, served["threads_wrong"], "count", "0"),
        Claim("gpu_waits", "waits for the device that trails add to a forward", raw["waits"]["added"], "count", "1"),
    ]
    for key, found in raw["ratios"].items():
        name, interval = f"gpu_{key.replace(', ', '_')}", (found["low"], found["high"])
        claims.append(Claim(name, f"seconds of a {key}, {told}", found["median"], "ratio", "", interval))
    write("gpu", raw, claims, seed=0)


def _model() -> Any:
    torch.manual_seed(0)
    size = dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32)
    config = LlamaConfig(**size, num_key_value_heads=8, vocab_size=128_000, pad_token_id=0, dtype="bfloat16")
    with torch.device("cuda"):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)


def _trails(model: nn.Module, rule: tp.tokens.Rule) -> tp.TrailMap:
    trails = tp.TrailMap({site: tp.LoReFT(tp.width(model, site), rank=4) for site in tp.sites(model, "all", rule)})
    return trails.to("cuda")


def _checkpointed() -> dict[str, Any]:
    """Gradients of trails through a checkpointed backward, which runs in another thread, against those through none."""
    torch.manual_seed(0)
    size = dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(**size, initializer_range=0.6)).cuda().train().requires_grad_(False)
    trails = tp.TrailMap({s: tp.LoReFT(64, rank=4) for s in tp.sites(model, "all", tp.Last(2), "mlp")}).cuda()
    rows = [torch.randint(3, 96, (1, n), device="cuda") for n in (7, 12, 5)]

    def gradients(loss: Any) -> list[Any]:
        return list(torch.autograd.grad(loss, list(trails.parameters())))

    with tp.attach(model, trails):
        plain = [gradients(model(row, use_cache=False).logits.logsumexp(-1).sum()) for row in rows]
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
        losses = [model(row, use_cache=False).logits.logsumexp(-1).sum() for row in rows]
        again = [gradients(loss) for loss in reversed(losses)][::-1]
    pairs = [pair for both in zip(plain, again, strict=True) for pair in zip(*both, strict=True)]
    apart = [float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in pairs]
    return {"largest difference, relative": max(apart)}


def _waits(model: Any) -> dict[str, int]:
    """How often a forward waits for the device."""
    ids = torch.randint(3, 1000, (4, 64), device="cuda")
    mask = torch.ones_like(ids)

    def count() -> int:
        with warnings.catch_warnings(record=True) as told, torch.no_grad():
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                model(ids, attention_mask=mask, use_cache=False)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(one.message) for one in told)

    count()
    frozen = count()
    with tp.attach(model, _trails(model, tp.Last(1))):
        count()
        steered = count()
    return {"frozen": frozen, "steered": steered, "added": steered - frozen}


def _forward(model: Any) -> None:
    ids = torch.randint(3, 1000, (4, PROMPT), device="cuda")
    with torch.no_grad():
        model(ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=1)


def _generate(model: Any) -> None:
    ids = torch.randint(3, 1000, (4, PROMPT), device="cuda")
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)


RUNS: dict[str, Callable[[Any], None]] = {"forward": _forward, "generation": _generate}
RULES = {"last": tp.Last(1), "answer": tp.Last(1) | tp.Answer(), "all": tp.All()}


def _ratio(model: Any, rule: tp.tokens.Rule, run: Callable[[Any], None]) -> dict[str, float]:
    trails, ratios = _trails(model, rule), list[float]()

    def seconds(inside: AbstractContextManager[object]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with inside:
            torch.cuda.synchronize()
            begin.record()
            run(model)
            end.record()
            torch.cuda.synchronize()
        return begin.elapsed_time(end)

    for number in range(ROUNDS + 2):
        frozen, steered = seconds(nullcontext()), seconds(tp.attach(model, trails))
        if number >= 2:  # the first ones warm up
            ratios.append(steered / frozen)
    ratios.sort()
    return {"median": statistics.median(ratios), "low": ratios[3], "high": ratios[-4]}  # 4th of 15: 96 % for the median


if __name__ == "__main__":
    main()
