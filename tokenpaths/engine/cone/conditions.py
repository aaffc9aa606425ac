"""When a forward may be shortened: what in a call, in a module or in its hooks stands in the way."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from tokenpaths.attachment.handle import Attachment
from tokenpaths.attachment.hooks import Hook, Observer
from tokenpaths.attachment.watcher import Watcher
from tokenpaths.site.host import is_compiled, two_sided, unwrapped
from tokenpaths.undo import Undo


def always_in_full(model: nn.Module) -> str | None:
    """Why no forward of a model is ever shortened, or None."""
    if two_sided(model):
        return "it has an encoder and a decoder"
    if is_compiled(model):
        return "it is compiled: its graph does not see what is left out"
    if (
        any(type(p).__name__ == "DTensor" for p in unwrapped(model).parameters())
        or "FullyShard" in type(model).__name__
    ):
        return "its weights are spread over processes, which must all run the same"
    return None


_HARMLESS = {"input_ids", "attention_mask", "labels", "prompt_mask", "spans", "return_dict", "logits_to_keep"}


def plain_call(named: Mapping[str, Any], config: Any) -> bool:
    """Whether the states of a forward follow from token ids and a mask alone, and nothing else is asked of it."""
    asked = {name: getattr(config, name, None) for name in ("use_cache", "output_hidden_states", "output_attentions")}
    asked |= {name: value for name, value in named.items() if value is not None}
    ids, mask = named.get("input_ids"), named.get("attention_mask")
    tokens = isinstance(ids, Tensor) and (mask is None or (isinstance(mask, Tensor) and mask.shape == ids.shape))
    return tokens and all(name in _HARMLESS or value is None or value is False for name, value in asked.items())


def independent_length(model: nn.Module) -> int | None:
    """The most tokens of a row whose states do not depend on its company; None for any number.

    Rotary positions that are scaled by the length of the batch (dynamic NTK, LongRoPE) change beyond a length.
    """
    lengths: list[int] = []
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", None)
        kinds = list(kinds.values()) if isinstance(kinds, Mapping) else [kinds]
        if {"dynamic", "longrope"} & set(kinds):
            lengths += _numbers(getattr(module, "original_max_seq_len", None))
            lengths += _numbers(getattr(getattr(module, "config", None), "original_max_position_embeddings", None))
            for name in ("rope_parameters", "rope_scaling"):
                lengths += _numbers(getattr(getattr(module, "config", None), name, None))
    return min(lengths, default=None)


def _numbers(value: Any) -> list[int]:
    """A length, or those that a configuration of rotary positions states, of all layers."""
    if isinstance(value, Mapping):
        parts = cast("Mapping[str, Any]", value).items()
        named = [part for key, part in parts if isinstance(part, Mapping) or key == "original_max_position_embeddings"]
        return [number for part in named for number in _numbers(part)]
    return [value] if isinstance(value, int) else []


def others_at_work(model: nn.Module, own: Watcher) -> bool:
    """Whether trails move states of another list of blocks, which may feed this one, or a gate reads whole prompts."""
    found = [(watcher, one) for watcher in Watcher.known(model) for one in watcher.acting()]
    at_work = [(watcher, one) for watcher, one in found if isinstance(one, Attachment) and one.trails.enabled]
    return any(watcher is not own or one.gate is not None for watcher, one in at_work)


def solid(real: Bool[Tensor, "batch seq"]) -> Bool[Tensor, ""]:
    """Whether the real tokens of each row stand together."""
    begins = real[:, :1].long().sum(1) + (real[:, 1:] & ~real[:, :-1]).sum(1)
    return (begins == 1).all()


def draws(module: nn.Module) -> bool:
    """Whether a module drops at random while it is in training mode."""
    names = {name for name in vars(module) if "drop" in name.lower() or "jitter" in name.lower()}
    if "dropout" in type(module).__name__.lower():
        names.add("p")
    shares = [getattr(module, name, None) for name in names]
    return any(isinstance(share, float) and share > 0 for share in shares)


def plain_values(values: Any) -> bool:
    """Whether the values are tensors, numbers and such, and tuples of these: nothing that a block could write to."""
    return all(
        plain_values(value)
        if isinstance(value, tuple)
        else value is None or isinstance(value, (Tensor, int, float, str, torch.dtype, torch.device))
        for value in values
    )


def foreign_hooks(module: nn.Module) -> tuple[list[Any], list[Any]]:
    """The hooks after and before a module's forward that look at states or change them.

    Those of attached trails are not among them, nor are those that transformers keeps for when it is asked for states.
    """

    def others(hooks: Mapping[int, Any]) -> list[Any]:
        return [
            hook
            for hook in list(hooks.values())
            if (not isinstance(hook, Hook) or isinstance(hook, Observer))
            and getattr(hook, "__module__", "") != "transformers.utils.output_capturing"
        ]

    inside = vars(module)
    return others(inside["_forward_hooks"]), others(inside["_forward_pre_hooks"])


def hooked(module: nn.Module) -> bool:
    """Whether a hook looks at what goes through a module, or changes it."""
    after, before = foreign_hooks(module)
    return bool(after or before)


@contextmanager
def unseen(model: nn.Module) -> Generator[None]:
    """Inside, no hook is there but those of attached trails."""
    taken: list[tuple[dict[int, Any], dict[int, Any]]] = []
    for module in model.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            hooks: dict[int, Any] = vars(module)[name]
            if any(not isinstance(hook, Hook) for hook in list(hooks.values())):
                taken.append((hooks, dict(hooks)))
    with Undo() as undo:
        for hooks, before in taken:
            undo.add(_put_back, hooks, before)
            for key in [key for key, hook in before.items() if not isinstance(hook, Hook)]:
                del hooks[key]
        yield


def _put_back(hooks: dict[int, Any], before: dict[int, Any]) -> None:
    hooks.clear()
    hooks.update(before)
