"""The trails that every law is run over: one line each. A new trail is one line here, and inherits all tests.

TRAILS["LoReFT"](16)     a fresh one for states of width 16 (at least 4)
MOVING["LoReFT"](16)     the same, moved away from the identity: always the same numbers for one name and width
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tokenpaths import PSR, Additive, Capped, Confined, DiReFT, LoReFT, NoReFT, Trail
from tokenpaths.trails import RED, BiasReFT, Chain, ConstantReFT, DirectReFT, Gated, Guarded, ReFTr1, Scaled

TRAILS: dict[str, Callable[[int], Trail]] = {
    "LoReFT": lambda dim: LoReFT(dim, 4),
    "NoReFT": lambda dim: NoReFT(dim, 4),
    "DiReFT": lambda dim: DiReFT(dim, 4),
    "DirectReFT": lambda dim: DirectReFT(dim, 4),
    "ConstantReFT": lambda dim: ConstantReFT(dim, 4),
    "BiasReFT": lambda dim: BiasReFT(dim, 4),
    "Additive": lambda dim: Additive(dim),
    "RED": lambda dim: RED(dim),
    "ReFTr1": lambda dim: ReFTr1(dim),
    "PSR": lambda dim: PSR(dim),
    "Scaled": lambda dim: Scaled(NoReFT(dim, 2), 0.5),
    "Capped": lambda dim: Capped(LoReFT(dim, 2), 0.1),
    "Gated": lambda dim: Gated(DiReFT(dim, 2), dim),
    "Guarded": lambda dim: Guarded(DiReFT(dim, 2), dim),
    "Confined": lambda dim: Confined(DiReFT(dim, 2), dim, dim // 2),
    "Chain": lambda dim: Chain(LoReFT(dim, 2), RED(dim)),
    "nested": lambda dim: Capped(Gated(Chain(Scaled(LoReFT(dim, 1), 2.0), Additive(dim)), dim), 0.5),
}


def moving(make: Callable[[int], Trail]) -> Callable[[int], Trail]:
    """The same trail with noise on every parameter, and its gates open on most states."""

    def moved(dim: int) -> Trail:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(dim)
            trail = make(dim)
            for parameter in trail.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
            for module in trail.modules():
                if isinstance(module, (ReFTr1, PSR, Gated)):
                    module.b.fill_(10.0)
                if isinstance(module, (PSR, Gated)):
                    module.w.mul_(0.1)
                if isinstance(module, PSR):
                    module.z.mul_(0.1)
                if isinstance(module, Guarded):
                    module.w.copy_(0.05 * torch.randn(dim))
                    module.b.fill_(0.5)
                if isinstance(module, ReFTr1):
                    module.a.fill_(0.1)
        return trail

    return moved


MOVING: dict[str, Callable[[int], Trail]] = {name: moving(make) for name, make in TRAILS.items()}


def tiny(family: str, **changes: Any) -> Any:
    """A random GPT-2 or Llama in float64: 3 layers, 4 heads, 24 dimensions, with biases and norms that matter."""
    import transformers

    sizes = dict(vocab_size=61, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=32)
    common = dict(sizes, hidden_size=24, initializer_range=0.6, bos_token_id=1, eos_token_id=2, **changes)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        if family == "gpt2":
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**common))
        else:
            common = dict(intermediate_size=40, num_key_value_heads=2, **common)
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common))
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(0.5, 0.5)
    return model.double().eval()
