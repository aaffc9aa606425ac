"""Trails under the training loop of another library: Hugging Face `Trainer`, TRL."""

from __future__ import annotations

import types
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenpaths.attachment.handle import attach
from tokenpaths.tokens import Answer as AnswerRule
from tokenpaths.tokens import First, Last, Match, Prompt, leaves
from tokenpaths.trailmap.trailmap import FILE_NAME, TrailMap
from tokenpaths.training.frozen import frozen_base, trained
from tokenpaths.undo import Undo

NAME = "trails"  # of the trails among the model's submodules, so that their keys are those of a trail file
# A Trainer looks for what it saved under this name, so it resumes from a trail file that is named so.
TRAINER_FILE_NAME = "model.safetensors"


@contextmanager
def trainable(model: nn.Module, trails: TrailMap, **options: Any) -> Generator[TrailMap]:
    """Inside, training the model trains the trails and nothing else.

        with trainable(model, trails):
            Trainer(model, TrainingArguments("runs/a", max_grad_norm=1.0), train_dataset=rows).train()
        trails = TrailMap.from_pretrained("runs/a/checkpoint-500")

    Meanwhile the trails are parameters of the model, as `model.trails`, so that the optimizer, clipping, modes and
    device moves of the loop reach them. `save_pretrained`, which a Trainer's checkpoints call, saves the trails alone.
    The batches need `labels`, which say where the prompt ends, or `prompt_mask`.

    Args:
        model: a Hugging Face model.
        trails: what is trained.
        options: of `attach`.

    Raises:
        ValueError: the model lacks a site, all trails are frozen, or the model has an attribute `trails` already; in
            the forward, a batch does not say where its prompts end.
    """
    trained(trails)
    if hasattr(model, NAME):
        raise ValueError(f"{type(model).__name__} has an attribute {NAME!r} already: are its trails being trained?")
    with frozen_base(model, trails), attach(model, trails, **options), Undo() as undo:
        undo.add(model._modules.pop, NAME, None)
        # by number, not as the map's own ModuleList, which would look like one more list of blocks
        model.add_module(NAME, nn.ModuleDict({str(i): trail for i, trail in enumerate(trails.trails)}))
        if hasattr(model, "save_pretrained"):
            undo.add(_restore, model, "save_pretrained", vars(model).get("save_pretrained"))
            setattr(model, "save_pretrained", types.MethodType(_saver(trails), model))  # noqa: B010
        undo.hook(model.register_load_state_dict_post_hook, _expect_trails_only)
        if any(isinstance(leaf, _COUNTED) for site in trails for leaf in leaves(site.tokens)):
            undo.hook(model.register_forward_pre_hook, _check_prompt, with_kwargs=True, prepend=True)
        yield trails


_COUNTED = (First, Last, Prompt, AnswerRule, Match)  # the rules that depend on where the prompt ends


def _saver(trails: TrailMap) -> Any:
    def save_pretrained(self: nn.Module, save_directory: Any, *_: Any, is_main_process: bool = True, **__: Any) -> None:
        """Save the trails: the base is frozen and not ours to copy."""
        if not is_main_process:
            return
        for name in (FILE_NAME, TRAINER_FILE_NAME):
            trails.save(Path(save_directory) / name, self)

    return save_pretrained


def _expect_trails_only(model: nn.Module, result: Any) -> None:
    """Let a state of the trails alone count as complete, although it lacks the base."""
    base = {name for name in model.state_dict() if not name.startswith(f"{NAME}.")}
    if set(result.missing_keys) == base:
        result.missing_keys.clear()


def _check_prompt(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    if not (model.training and torch.is_grad_enabled() and getattr(model, "can_generate", lambda: True)()):
        return
    if kwargs.get("labels") is None and kwargs.get("prompt_mask") is None:
        raise ValueError(
            "the model was called without labels, so it is not known where the prompts end (label smoothing and a "
            "loss function of your own make a Trainer take the labels out): put prompt_mask in the batch, True on the "
            "prompt, with remove_unused_columns=False"
        )
    positions = kwargs.get("position_ids")
    if kwargs.get("attention_mask") is None and isinstance(positions, Tensor) and bool((positions.diff() < 0).any()):
        raise ValueError(
            "the batch packs several examples into one row, where 'the first' and 'the last' prompt token have no "
            "meaning: set packing=False and padding_free=False"
        )


def _restore(model: nn.Module, name: str, before: Any) -> None:
    vars(model).pop(name, None)
    if before is not None:
        setattr(model, name, before)
