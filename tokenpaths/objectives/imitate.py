"""Imitation: make the model write the answers, token by token."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenpaths.adapter import Adapter
from tokenpaths.cone import inputs_of, narrowed
from tokenpaths.data import IGNORED, Batch, Example
from tokenpaths.objectives.base import Objective
from tokenpaths.objectives.head import Logits, cross_entropy, logits_at
from tokenpaths.watcher import Hook


@dataclass
class Imitate(Objective):
    """Mean cross-entropy of the answer tokens: -1/n sum_t log p(answer_t | all before it), in float32 at least."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for number, example in enumerate(self.examples):
            if not any(example.answer):
                raise ValueError(f"Imitate: example {number} has no answer to imitate")

    def loss(self, model: nn.Module, trails: Adapter, batch: Batch) -> Float[Tensor, ""]:
        logits, targets = answers(model, batch)
        return logits.sum(cross_entropy, targets) / len(targets)

    def terms(self, examples: Sequence[Example]) -> int:
        return sum(sum(example.answer) for example in examples)


def answer_logits(model: nn.Module, batch: Batch) -> tuple[Float[Tensor, "answers vocab"], Int[Tensor, " answers"]]:
    """The logits that predict each answer token of a batch, and those tokens, in order of row and column.

    Only the hidden states that predict an answer go through the output embedding, as one matrix: for a short answer
    that saves most of the vocabulary's cost. Works through DDP and PEFT, with or without trails attached.
    """
    logits, targets = answers(model, batch)
    return logits[:], targets


def answers(model: nn.Module, batch: Batch) -> tuple[Logits, Int[Tensor, " answers"]]:
    """As `answer_logits`, with logits that are made when they are asked for: `logits.sum(cross_entropy, targets)`.

    With a cone at work, tokens before the first that a trail moves or whose logits are wanted are not run.
    """
    _check_causal(_inside(model))
    predicts = F.pad(batch.labels[:, 1:] != IGNORED, (0, 1))
    with narrowed(model, batch, predicts) as (inputs, rows):
        logits = logits_at(model, lambda: _call(model, inputs), rows)
    return logits, batch.labels[:, 1:][predicts[:, :-1]].to(logits.states.device)


def forward(model: nn.Module, batch: Batch) -> Any:
    """What a model gives for a batch, through DDP and PEFT, with or without trails attached."""
    return _call(model, inputs_of(batch))


def _call(model: nn.Module, inputs: dict[str, Any]) -> Any:
    with _without_leftovers(_inside(model)):
        return model(**inputs)


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
def _without_leftovers(model: nn.Module) -> Generator[None]:
    """Inside, what is meant for attached trails is dropped when no trails are there to take it."""

    def drop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {name: value for name, value in kwargs.items() if name not in ("prompt_mask", "spans")}

    handle = model.register_forward_pre_hook(Hook(drop), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
