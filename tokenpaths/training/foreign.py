"""Trails under the training loop of another library: Hugging Face `Trainer`, TRL."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tokenpaths import files
from tokenpaths.attachment.handle import attaching
from tokenpaths.attachment.hooks import Hook
from tokenpaths.attachment.runs import holding
from tokenpaths.data.examples import IGNORED
from tokenpaths.site.host import check_model
from tokenpaths.tokens import Answer as AnswerRule
from tokenpaths.tokens import Context, First, Last, Match, Prompt, Rule, leaves
from tokenpaths.trailmap.trailmap import FILE_NAME, TrailMap
from tokenpaths.training.beside import Also, Beside
from tokenpaths.training.frozen import frozen_base, trained
from tokenpaths.training.reach import Reach, standstill
from tokenpaths.undo import Undo

NAME = "trails"  # of the trails among the model's submodules, so that their keys are those of a trail file
# A Trainer looks for what it saved under this name, so it resumes from a trail file that is named so.
TRAINER_FILE_NAME = "model.safetensors"


@contextmanager
def trainable(model: nn.Module, trails: TrailMap, *, also: Also = None, **options: Any) -> Generator[TrailMap]:
    """Inside, training the model trains the trails, what is named beside them, and nothing else.

        with trainable(model, trails):
            Trainer(model, TrainingArguments("runs/a", max_grad_norm=1.0), train_dataset=rows).train()
        trails = TrailMap.from_pretrained("runs/a/checkpoint-500")

    Meanwhile the trails are parameters of the model, as `model.trails`, so that the optimizer, clipping, modes and
    device moves of the loop reach them; casts do not. `save_pretrained`, which a Trainer's checkpoints call, saves the
    trails, and beside them `also`, for `load_also`. The batches need `labels`, which say where the prompt ends, or
    `prompt_mask`.

    A warning is given of a batch without a label to learn from, of trails that no gradient reaches, and of a parameter
    that asks for a gradient and was not named.

    Args:
        model: a Hugging Face model.
        trails: what is trained.
        also: parameters of the model that are trained too, such as a new head: `also=model.score`. A module, a
            parameter, or a list of these.
        options: of `attach`.

    Raises:
        TypeError: `also` is something else.
        ValueError: the model lacks a site or `also`, all trails are frozen or cannot learn as they are attached, or the
            model has an attribute `trails` already; in the forward, a batch does not say where its prompts end, or has
            none for rules that choose in prompts only; in `save_pretrained`, a parameter that was not named learns.
        RuntimeError: another run over the model or the trails is open.
    """
    check_model(model)
    trained(trails)
    if hasattr(model, NAME):
        raise ValueError(f"{type(model).__name__} has an attribute {NAME!r} already: are its trails being trained?")
    beside = Beside(model, trails, also)
    base, undo = frozen_base(model, trails, beside.parameters), Undo()

    def close() -> None:
        """End it from outside, as tp.detach does. Each part is ended once more when the block is left."""
        undo.run()
        handle.remove()
        base.__exit__(None, None, None)

    with (
        holding(model, trails, "trainable(...)", close),
        base,
        attaching(model, trails, **options) as handle,
        undo,
    ):
        if stands := standstill(model, trails):
            raise ValueError(stands)
        undo.add(vars(model)["_modules"].pop, NAME, None)
        # by number, not as the map's own ModuleList, which would look like one more list of blocks
        model.add_module(NAME, _KeptFine({str(i): trail for i, trail in enumerate(trails.trails)}))
        if hasattr(model, "save_pretrained"):
            undo.add(_restore, model, "save_pretrained", vars(model).get("save_pretrained"))
            setattr(model, "save_pretrained", types.MethodType(_saver(trails, beside), model))  # noqa: B010
        undo.hook(model.register_load_state_dict_post_hook, _expect_only(beside))
        reach = Reach(trails)
        undo.add(register_optimizer_step_pre_hook(_reading(reach, trails)).remove)
        undo.hook(model.register_forward_pre_hook, Hook(_Guard(trails, beside, reach)), with_kwargs=True, prepend=True)
        yield trails
        reach.end()


class _KeptFine(nn.ModuleDict):
    """Trails inside a model that is moved and cast: they go with it to a device, and keep their dtypes.

    A Trainer with `bf16_full_eval` casts the model for good, and trails that are cast back are no longer what was
    trained.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _KeptFine:
        def move(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        return super()._apply(move, recurse)


_COUNTED = (First, Last, Prompt, AnswerRule, Match)  # the rules that depend on where the prompt ends


def _saver(trails: TrailMap, beside: Beside) -> Any:
    def save_pretrained(self: nn.Module, save_directory: Any, *_: Any, is_main_process: bool = True, **__: Any) -> None:
        """Save the trails, and what was named beside them: the rest of the base is frozen and not ours to copy."""
        if strangers := beside.strangers(self, trails):
            raise ValueError(f"not saved: {_unnamed(strangers)}")
        if not is_main_process:
            return
        folder = Path(save_directory)
        trails.save(folder / FILE_NAME, self)
        beside.save(folder)
        if not beside.tensors:
            trails.save(folder / TRAINER_FILE_NAME, self)
        else:
            files.write(folder / TRAINER_FILE_NAME, {**trails.state_dict(), **beside.tensors}, {"trainer": True})

    return save_pretrained


def _unnamed(strangers: list[str]) -> str:
    return (
        f"{len(strangers)} parameters of the base ask for a gradient and were not named, the first of them "
        f"{strangers[0]}: an optimizer would train them, and no checkpoint hold them. Name what is to learn beside the "
        "trails, as in trainable(model, trails, also=model.score), and leave requires_grad alone inside"
    )


def _expect_only(beside: Beside) -> Any:
    def expect(model: nn.Module, result: Any) -> None:
        """Let a state of what learns alone count as complete, although it lacks the base."""
        base = {name for name in model.state_dict() if not name.startswith(f"{NAME}.")} - beside.tensors.keys()
        if set(result.missing_keys) == base:
            result.missing_keys.clear()

    return expect


def _reading(reach: Reach, trails: TrailMap) -> Any:
    own = {id(parameter) for parameter in trails.parameters()}

    def read(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            reach.step()

    return read


class _Guard:
    """Looks at each batch of training before the model does."""

    def __init__(self, trails: TrailMap, beside: Beside, reach: Reach) -> None:
        self.trails, self.beside, self.reach = trails, beside, reach
        rules = [site.tokens for site in trails]
        self.counts = any(isinstance(leaf, _COUNTED) for rule in rules for leaf in leaves(rule))
        self.needs_prompt = all(map(_within_prompt, rules))
        self.told: set[str] = set()

    def __call__(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        if strangers := self.beside.strangers(model, self.trails):
            self._warn_once("strangers", _unnamed(strangers))
        if not getattr(model, "can_generate", lambda: True)():
            return
        if self.counts:
            _check_prompt(kwargs)
        labels = kwargs.get("labels")
        if isinstance(labels, Tensor) and labels.ndim == 2:
            self._check_labels(labels, kwargs)

    def _check_labels(self, labels: Tensor, kwargs: dict[str, Any]) -> None:
        """Only of batches before the first gradient: it costs a wait for the device."""
        if not self.reach.none_yet:
            return
        learned = labels != IGNORED
        if not bool(learned[:, 1:].any()):
            self._warn_once("labels", "every label of a batch is -100, so nothing is learned from it")
        real = kwargs.get("attention_mask")
        real = real.bool() if isinstance(real, Tensor) and real.shape == labels.shape else torch.ones_like(learned)
        prompt = kwargs.get("prompt_mask")
        prompt = (learned.cumsum(1) == 0) & real if prompt is None else prompt
        if self.needs_prompt and not bool(prompt.any()):
            raise ValueError(
                "no row of the batch has a prompt, as its labels begin at its first token, and the rules choose in "
                f"prompts only ({next(iter(self.trails)).tokens}): the trails would move no token and learn nothing. "
                "Set the labels of the prompt to -100, or use rules such as All() or Answer()"
            )

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self.told:
            self.told.add(key)
            warnings.warn(message, stacklevel=2)


def _within_prompt(rule: Rule) -> bool:
    """Whether a rule is made of rules that count in the prompt, and so chooses nothing where there is no prompt."""
    if not all(isinstance(leaf, (First, Last, Prompt)) for leaf in leaves(rule)):
        return False
    none = torch.zeros(1, 4, dtype=torch.bool)
    return not bool(rule.mask(Context(~none, none)).any())


def _check_prompt(kwargs: dict[str, Any]) -> None:
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
