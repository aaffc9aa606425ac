"""What `steps` and `trainable` share: the base is frozen, and gradient checkpointing still reaches the trails."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenpaths.attachment.handle import working
from tokenpaths.attachment.hooks import Hook
from tokenpaths.site.host import check_model
from tokenpaths.trailmap.adapter import Adapter, check_adapter
from tokenpaths.undo import Undo

if TYPE_CHECKING:
    from accelerate import Accelerator


@contextmanager
def frozen_base(model: nn.Module, trails: Adapter, also: Collection[nn.Parameter] = ()) -> Generator[None]:
    """Inside, the parameters of the trails and `also` learn and no others; afterwards flags and modes are as before."""
    check_model(model)
    own = {id(parameter) for parameter in trails.parameters()}
    beside = {id(parameter) for parameter in also}
    base = [(p, p.requires_grad) for p in model.parameters() if id(p) not in own]
    modes = [(module, module.training) for part in (model, trails) for module in part.modules()]
    with Undo() as undo:
        undo.add(_as_before, base, modes)
        for parameter, _ in base:
            parameter.requires_grad_(id(parameter) in beside)
        with _checkpoints_pass_gradients(model):
            yield


def _as_before(parameters: list[tuple[nn.Parameter, bool]], modes: list[tuple[nn.Module, bool]]) -> None:
    for parameter, learned in parameters:
        parameter.requires_grad_(learned)
    for module, training in modes:
        module.training = training


@contextmanager
def laid(model: nn.Module, trails: Adapter, tokenizer: Any, accelerator: Accelerator) -> Generator[None]:
    """Inside, the base is frozen, and the trails are attached, all on the accelerator's device."""
    with frozen_base(model, trails):
        _move(model, trails, accelerator)
        with working(model, trails, tokenizer, everywhere=None, gated=False):
            yield


def _move(model: nn.Module, trails: Adapter, accelerator: Accelerator) -> None:
    if getattr(model, "hf_device_map", None) is None:  # otherwise the model has been placed with care
        model.to(accelerator.device)
        trails.to(accelerator.device)
    if not model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        warnings.warn(
            "gradient checkpointing is on, but transformers heeds it in training mode only, and the model is in eval "
            "mode: call model.train() first (which turns on its dropout too, if it has any)",
            stacklevel=2,
        )


def trained(trails: Adapter) -> list[nn.Parameter]:
    """The parameters that learn.

    Raises:
        ValueError: all parameters are frozen.
        TypeError: `trails` is no adapter.
    """
    check_adapter(trails)
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

    with Undo() as undo:
        undo.hook(embedding.register_forward_hook, Hook(ask))
        yield
