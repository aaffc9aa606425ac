"""The methods that are compared with trails, on a tiny model: a new one is one line of METHODS."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from tiny import llama, make_examples

import tokenpaths as tp
from tokenpaths.lab.peers import CurLoraConfig, PeftAdapter, ScLoraConfig, sc_lora

Make = Callable[[Any], PeftAdapter]


def plain_texts(count: int = 6, seed: int = 3) -> list[tp.Example]:
    return [tp.Example(e.ids, (False,) * len(e)) for e in make_examples(count, seed)]


def by_config(config: Callable[[], peft.PeftConfig], fresh: bool = False) -> Make:
    def make(model: Any) -> PeftAdapter:
        torch.manual_seed(0)
        return PeftAdapter(peft.get_peft_model(model, config()).eval(), fresh=fresh)

    return make


def by_sc_lora(model: Any) -> PeftAdapter:
    config = ScLoraConfig(r=4, dropout=0.1, target_modules="all-linear")
    return PeftAdapter(sc_lora(model, config, make_examples(), plain_texts(), beta=0.2)[0].eval())


def by_corda(model: Any) -> PeftAdapter:
    pytest.importorskip("attr", reason="PEFT's CorDA imports attrs, which PEFT does not install")
    from peft.tuners.lora.corda import preprocess_corda

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights="corda")
    config.corda_config = peft.tuners.lora.config.CordaConfig(corda_method="kpm")
    ids = torch.randint(3, 90, (8, 64), generator=torch.Generator().manual_seed(0))
    preprocess_corda(model, config, run_model=lambda: [model(row[None]) for row in ids])  # it knows no batches
    torch.manual_seed(0)
    return PeftAdapter(peft.get_peft_model(model, config).eval(), fresh=True)


METHODS: dict[str, Make] = {
    "LoRA": by_config(lambda: peft.LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear")),
    "DoRA": by_config(lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"])),
    "PiSSA": by_config(
        lambda: peft.LoraConfig(r=4, init_lora_weights="pissa", target_modules="all-linear"), fresh=True
    ),
    "CorDA": by_corda,
    "OSF": by_config(lambda: peft.OSFConfig(effective_rank=24, target_modules=["q_proj", "up_proj"])),
    "saved modules": by_config(lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "SC-LoRA": by_sc_lora,
    "CURLoRA": by_config(lambda: CurLoraConfig(r=4, target_modules="all-linear")),
}
"""Of each, an adapter laid into a model, not trained yet."""

TAKE_FROM_THE_BASE = ("PiSSA", "CorDA")  # their frozen base is the original up to rounding, that of the others is equal


def make(method: str, dtype: torch.dtype = torch.float32) -> tuple[Any, PeftAdapter]:
    """The PEFT model and its adapter; always the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, about what it was asked to do
        adapter = METHODS[method](llama().to(dtype))
    return adapter.peft_model, adapter


def train(model: Any, adapter: tp.trailmap.Adapter, steps: int = 4, **more: Any) -> list[float]:
    """So that the adapter is no longer what it was."""
    goals = more.pop("goals", [tp.Imitate(make_examples())])
    settings = {"batch_size": 4, "lr": 3e-2, "warmup": 0, "progress": False, **more}
    return [step.loss for step in tp.steps(model, adapter, goals, steps=steps, **settings)]


def ids(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(1))


def logits(model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids(), *args, **kwargs).logits
