"""What a kept state follows from beside its tokens: the weights, and how they are put to work."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from tokenpaths.site import Host
from tokenpaths.site.host import text_config
from tokenpaths.site.identity import Identity, bare


def circumstances(model: nn.Module) -> str:
    """How a model computes: device, autocast, precision of matrix products, kind of attention, and its modes."""
    host_configs = (getattr(model, "config", None), text_config(model))
    attention = [getattr(config, "_attn_implementation", None) for config in host_configs]
    first = next((p for p in model.parameters() if not p.is_meta), None)
    kind = "cpu" if first is None else first.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return f"{kind} {cast} {torch.get_float32_matmul_precision()} {attention} {_modes(model)}"


class Computing:
    """What computes the states that a cone keeps: `how` names it, and changes when anything of it does."""

    def __init__(self, host: Host) -> None:
        names = {id(module): name for name, module in host.inner.named_modules()}
        self._model: Any = host.inner
        self._identity = Identity(host.inner)
        self._blocks = bare(names[id(host.blocks)])  # a model may have several lists of blocks

    @property
    def how(self) -> str:
        return f"{self._identity.key()} {self._blocks} {circumstances(self._model)}"


def _modes(model: nn.Module) -> str:
    """Which modules are in training mode: a block may do something else in it than to drop at random."""
    modes = [module.training for module in model.modules()]
    if len(set(modes)) == 1:
        return "training" if modes[0] else "evaluation"
    return hashlib.blake2b(bytes(modes), digest_size=8).hexdigest()
