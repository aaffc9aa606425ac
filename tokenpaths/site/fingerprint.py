"""Which weights a model has: a name and a hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import nn

from tokenpaths.site.host import unwrapped
from tokenpaths.trails.base import Trail


def describe(model: nn.Module) -> dict[str, str]:
    """The name of a model, and the fingerprint of its weights."""
    inner = unwrapped(model)
    name = getattr(getattr(inner, "config", None), "name_or_path", "") or type(inner).__name__
    return {"name": str(name), "fingerprint": fingerprint(inner)}


def fingerprint(model: nn.Module, without: Iterable[nn.Parameter] = ()) -> str:
    """A hash of a model's parameters, by name, shape and value: the same in float32 as in bfloat16.

    Trails that lie among the model's modules are left out, as are the parameters `without`, values on the meta device
    (offloaded weights), and what PEFT has laid into the model while that is disabled: then it is that of the bare base.
    """
    laid = {id(p) for module in model.modules() if isinstance(module, Trail) for p in module.parameters()}
    laid |= {id(parameter) for parameter in without}
    idle = [module for module in model.modules() if getattr(module, "disable_adapters", None) is True]  # PEFT's layers
    beside = [child for module in idle for name, child in module.named_children() if name not in _WRAPPED]
    laid |= {id(parameter) for module in beside for parameter in module.parameters()}
    named = [(_bare(name) if idle else name, parameter) for name, parameter in model.named_parameters()]
    digest = hashlib.sha256()
    for name, parameter in sorted(named, key=lambda pair: pair[0]):
        if id(parameter) in laid:
            continue
        digest.update(f"{name}{list(parameter.shape)}".encode())
        if not parameter.is_meta:
            bits = parameter.detach().flatten().to(torch.bfloat16).view(torch.int16)
            sample = bits[:: max(1, len(bits) // 64)][:64]  # their order, which the sum does not see
            digest.update(f"{bits.sum(dtype=torch.int64)}{sample.tolist()}".encode())
    return digest.hexdigest()[:16]


_WRAPPED = ("base_layer", "original_module")  # what PEFT names the module that it has put one of its own around


def _bare(name: str) -> str:
    """The name of a parameter in the base that PEFT has wrapped."""
    for wrapped in _WRAPPED:
        name = name.replace(f".{wrapped}.", ".")
    return name.removeprefix("base_model.model.")
