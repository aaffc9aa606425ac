"""Imitation: make the model write the answers, token by token."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tokenpaths.data import IGNORED, Batch, Example
from tokenpaths.objectives.base import Objective
from tokenpaths.trailmap import TrailMap


@dataclass
class Imitate(Objective):
    """Mean cross-entropy of the answer tokens: -1/n sum_t log p(answer_t | all before it), in float32 at least."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for number, example in enumerate(self.examples):
            if not any(example.answer):
                raise ValueError(f"Imitate: example {number} has no answer to imitate")

    def loss(self, model: nn.Module, trails: TrailMap, batch: Batch) -> Float[Tensor, ""]:
        logits, targets = answer_logits(model, batch)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)

    def terms(self, examples: Sequence[Example]) -> int:
        return sum(sum(example.answer) for example in examples)


def answer_logits(model: nn.Module, batch: Batch) -> tuple[Float[Tensor, "answers vocab"], Int[Tensor, " answers"]]:
    """The logits that predict each answer token of a batch, and those tokens, in order of row and column.

    Only the hidden states that predict an answer go through the output embedding, as one matrix: for a short answer
    that saves most of the vocabulary's cost. Works through DDP and PEFT, with or without trails attached.
    """
    root = _inside(model)
    _check_causal(root)
    predicts = F.pad(batch.labels[:, 1:] != IGNORED, (0, 1))
    with _only_answers(root, predicts):
        output = forward(model, batch)
    logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
    if logits.ndim == 3:  # no separate output embedding was called: the whole logits are here
        logits = logits[predicts.to(logits.device)]
    return logits, batch.labels[:, 1:][predicts[:, :-1]].to(logits.device)


def forward(model: nn.Module, batch: Batch) -> Any:
    """What a model gives for a batch, through DDP and PEFT, with or without trails attached."""
    with _without_leftovers(_inside(model)):
        return model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            prompt_mask=batch.prompt_mask,
            spans=batch.spans,
            use_cache=False,
        )


def _inside(model: nn.Module) -> nn.Module:
    """The model inside DDP."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _check_causal(model: nn.Module) -> None:
    two_sided = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    if two_sided or not getattr(model, "can_generate", lambda: True)():
        raise ValueError(
            f"{type(model).__name__} does not write a text from left to right: Imitate needs a causal language model"
        )


@contextmanager
def _only_answers(model: nn.Module, rows: Bool[Tensor, "batch seq"]) -> Generator[None]:
    """Inside, the output embedding is given the chosen hidden states only, as one matrix."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    compiled = hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None
    if head is None or compiled:  # a compiled graph would not see that a hook comes and goes
        yield
        return

    def select(module: nn.Module, args: tuple[Any, ...]) -> Any:
        hidden = args[0]
        if hidden.ndim != 3 or hidden.shape[:2] != rows.shape:
            return None
        return (hidden[rows.to(hidden.device)], *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _without_leftovers(model: nn.Module) -> Generator[None]:
    """Inside, what is meant for attached trails is dropped when no trails are there to take it."""

    def drop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {name: value for name, value in kwargs.items() if name not in ("prompt_mask", "spans")}

    handle = model.register_forward_pre_hook(drop, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
