"""The logits that predict the answers of a batch."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenpaths.attachment.hooks import Hook
from tokenpaths.data.examples import IGNORED, Batch, Example, check_examples
from tokenpaths.engine.cone.prefix import inputs_of, narrowed
from tokenpaths.engine.logits import Logits, logits_at
from tokenpaths.site.host import output_embedding, two_sided, vocabulary
from tokenpaths.undo import Undo


def answer_logits(model: nn.Module, batch: Batch) -> tuple[Float[Tensor, "answers vocab"], Int[Tensor, " answers"]]:
    """The logits that predict each answer token of a batch, and those tokens, in order of row and column.

    Only the hidden states that predict an answer go through the output embedding, as one matrix: for a short answer
    that saves most of the vocabulary's cost. Works through DDP and PEFT, with or without trails attached.
    """
    logits, targets = answers(model, batch)
    return logits[:], targets


def answers(model: nn.Module, batch: Batch) -> tuple[Logits, Int[Tensor, " answers"]]:
    """As `answer_logits`, with logits that are made when they are asked for: `logits.sum(cross_entropy, targets)`.

    Inside a cone, tokens before the first that a trail moves or whose logits are wanted are not run.
    """
    check_causal(_inside(model))
    predicts = F.pad(batch.labels[:, 1:] != IGNORED, (0, 1))
    with narrowed(model, batch, predicts) as (inputs, rows):
        logits = logits_at(model, lambda: _call(model, inputs), rows)
    return logits, batch.labels[:, 1:][predicts[:, :-1]].to(logits.states.device)


def forward(model: nn.Module, batch: Batch) -> Any:
    """What a model gives for a batch, through DDP and PEFT, with or without trails attached."""
    return _call(model, inputs_of(batch))


def forward_states(model: nn.Module, batch: Batch) -> None:
    """A forward of which no logits are wanted, but what others see of its states: the output embedding does nothing."""
    if output_embedding(model) is None:
        forward(model, batch)
    else:
        logits_at(model, lambda: forward(model, batch), torch.zeros_like(batch.attention_mask, dtype=torch.bool))


def check_known(who: str, model: nn.Module, examples: Sequence[Example]) -> None:
    """Raise unless these are examples (`TypeError`) whose tokens the model has an embedding of (`ValueError`)."""
    check_examples(who, examples)
    count = vocabulary(model)
    for number, example in enumerate(examples if count is not None else ()):
        if max(example.ids) >= (count or 0):
            raise ValueError(
                f"{who}: example {number} has the token {max(example.ids)}, but {type(model).__name__} knows only the "
                f"{count} tokens from 0 up: was it encoded with another model's tokenizer?"
            )


def _call(model: nn.Module, inputs: dict[str, Any]) -> Any:
    with _without_leftovers(_inside(model)):
        return model(**inputs)


def _inside(model: nn.Module) -> nn.Module:
    """The model inside DDP."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def check_causal(model: nn.Module) -> None:
    """Raise `ValueError` for a model that does not write from left to right."""
    if two_sided(model) or not getattr(model, "can_generate", lambda: True)():
        raise ValueError(
            f"{type(model).__name__} does not write a text from left to right: Imitate needs a causal language model"
        )


@contextmanager
def _without_leftovers(model: nn.Module) -> Generator[None]:
    """Inside, what is meant for attached trails is dropped when no trails are there to take it."""

    def drop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {name: value for name, value in kwargs.items() if name not in ("prompt_mask", "spans")}

    with Undo() as undo:
        undo.hook(model.register_forward_pre_hook, Hook(drop), with_kwargs=True)
        yield
