"""A small server: threads that answer requests on one model, steered, frozen, and with trails of their own.

run(folder)      # a thousand requests in four threads
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tokenpaths as tp
from benchmarks.common.kept import kept

KINDS = ("steered", "off", "own", "own LoReFT")


def run(folder: Path, requests: int = 1000, threads: int = 4, device: str = "cpu") -> dict[str, Any]:
    """Answer requests in turns and at once, each by generation with its logits, and count those that differ.

    Returns `threads_wrong`: answers that are not bit for bit those given alone, errors among them.
    """
    return kept(folder / f"threads-{requests}-{threads}.json", lambda: _run(requests, threads, device))


def _run(requests: int, threads: int, device: str) -> dict[str, Any]:
    torch.manual_seed(0)
    size = dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(**size, pad_token_id=0, initializer_range=0.6)).eval().to(device)
    server = _trails(tp.Site(1, tp.Last(1) | tp.Answer()), tp.Additive(32)).to(device)
    draw = random.Random(0)
    asked = [(draw.choice(KINDS), tuple(draw.choices(range(3, 96), k=draw.randint(3, 20)))) for _ in range(requests)]

    def answer(request: tuple[str, tuple[int, ...]]) -> Any:
        kind, prompt = request
        own = tp.Additive(32) if kind == "own" else tp.LoReFT(32, rank=4)
        trails = _trails(tp.Site(2, tp.All()), own).to(device) if kind.startswith("own") else None
        with server.off() if kind == "off" else nullcontext(), tp.attach(model, trails) if trails else nullcontext():
            return _generated(model, prompt)

    with tp.attach(model, server):
        alone = {request: answer(request) for request in set(asked)}
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(lambda request: _or_error(answer, request), asked))
    wrong = [kind for (kind, prompt), got in zip(asked, found, strict=True) if got != alone[kind, prompt]]
    errors = sorted({got for got in found if isinstance(got, str)})
    return {
        "threads_wrong": len(wrong),
        "requests": requests,
        "threads": threads,
        "kinds": {kind: sum(kind == one for one, _ in asked) for kind in KINDS},
        "wrong": {kind: wrong.count(kind) for kind in KINDS},
        "errors": errors,
    }


def _trails(site: tp.Site, trail: tp.Trail) -> tp.TrailMap:
    """The same numbers for each request of a kind, drawn without torch's own random state."""
    generator = torch.Generator().manual_seed(site.layer)
    with torch.no_grad():
        for parameter in trail.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return tp.TrailMap({site: trail})


def _generated(model: Any, prompt: tuple[int, ...]) -> Any:
    ids = torch.tensor([prompt], device=model.device)
    fixed = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
    told = dict(output_logits=True, return_dict_in_generate=True)
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **fixed, **told)
    return found.sequences.tolist(), torch.stack(found.logits).flatten().tolist()


def _or_error(answer: Any, request: Any) -> Any:
    try:
        return answer(request)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
