"""What `steps` and `trainable` share: the base is frozen, and gradient checkpointing still reaches the trails."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokenpaths.attachment.hooks import Hook
from tokenpaths.trailmap.adapter import Adapter


@contextmanager
def frozen_base(model: nn.Module, trails: Adapter) -> Generator[None]:
    """Inside, the parameters of the trails learn and no others; afterwards `requires_grad` and modes are as before."""
    own = {id(parameter) for parameter in trails.parameters()}
    base = [(p, p.requires_grad) for p in model.parameters() if id(p) not in own]
    modes = [(module, module.training) for part in (model, trails) for module in part.modules()]
    try:
        for parameter, _ in base:
            parameter.requires_grad_(False)
        with _checkpoints_pass_gradients(model):
            yield
    finally:
        for parameter, learned in base:
            parameter.requires_grad_(learned)
        for module, training in modes:
            module.training = training


def trained(trails: Adapter) -> list[nn.Parameter]:
    """The parameters that learn.

    Raises:
        ValueError: all parameters are frozen.
        TypeError: `trails` is no adapter.
    """
    if not isinstance(trails, Adapter):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"a TrailMap or another Adapter is trained, not {type(trails).__name__}: wrap a dict as TrailMap({{...}}), "
            "a PEFT model as peers.PeftAdapter(peft_model)"
        )
    parameters = [p for p in trails.parameters() if p.requires_grad]
    if not parameters and trails.sites:
        raise ValueError("every parameter of the trails is frozen, so there is nothing to train: requires_grad_(True)")
    if not parameters:
        raise ValueError(
            "every parameter of the adapter is frozen, so there is nothing to train: PeftModel.from_pretrained freezes "
            "it unless told is_trainable=True"
        )
    return parameters


@contextmanager
def _checkpoints_pass_gradients(model: nn.Module) -> Generator[None]:
    """Inside, a reentrant gradient checkpoint passes gradients on.

    It does so only if its input requires a gradient, and the output of a frozen embedding does not. (transformers 5
    sees to this itself, 4.57 for PEFT only.)
    """
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if embedding is None:
        yield
        return

    def ask(module: nn.Module, args: Any, output: Tensor) -> None:
        if torch.is_grad_enabled() and any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
            output.requires_grad_()

    handle = embedding.register_forward_hook(Hook(ask))
    try:
        yield
    finally:
        handle.remove()
