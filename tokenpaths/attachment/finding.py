"""What the arguments of a forward tell of its tokens.

A forward shows its new tokens and little else. The rest is put together from what came before it:

    padding   the attention mask, also that of an outer module where an inner one is given a mask of another form
    prompt    `prompt_mask` if given; else the running `generate` call; else labels (the prompt ends at the first one);
              else the forward that filled the cache; else, with an empty cache, everything
    ids       the tokens of this forward, behind those of the forwards that filled the cache

To an encoder everything is prompt; to the decoder of an encoder-decoder nothing is.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenpaths.attachment import caches
from tokenpaths.attachment.moment import Moment, context_of, fit, merged
from tokenpaths.tokens import Context

PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "cu_seq_lens", "seq_idx")
"""Arguments that tell attention, or a recurrence, where the examples of a packed row begin."""


@dataclass
class Generation:
    """A running `generate` call: the prompt it was given, and what it has prepared for the next forward."""

    prompt: Context
    embedded: bool = False  # the prompt was given as embeddings, and is not among the ids
    step: Step | None = None

    def width(self, step: Step) -> int:
        """The number of columns of a step, cached ones included."""
        return step.ids.shape[1] + (self.prompt.real.shape[1] if self.embedded else 0)


@dataclass(frozen=True, eq=False)
class Step:
    """The tokens of a step of `generate`, cached ones included, and its attention mask: none if it has no padding."""

    ids: Tensor
    mask: Tensor | None


def moment_of(
    named: Mapping[str, Any], given: Mapping[str, Any], generation: Generation | None, *, decodes: bool, writes: bool
) -> Moment:
    """What is known of a forward.

    Args:
        named: the arguments of the module that reads tokens.
        given: what the modules around it were given: masks, ids, labels, spans.
        generation: the `generate` call that it is part of.
        decodes: whether the module is the decoder of an encoder-decoder.
        writes: whether the model writes from left to right, so that labels say where the prompt ends.

    Raises:
        ValueError: what the arguments say does not suffice.
    """
    cache = caches.cache_in(named)
    new = named["input_ids"] if named.get("input_ids") is not None else named.get("inputs_embeds")
    if new is None:
        raise ValueError("the model was called with neither input_ids nor inputs_embeds")
    ids, length = _ids(named, given, new), new.shape[1]
    step = None
    if generation is not None:
        step, generation.step = generation.step, None
    if step is not None and step.mask is not None:
        past, real = step.mask.shape[1] - length, step.mask.bool()
    else:
        past = _past(cache, None if step is None or generation is None else generation.width(step) - length)
        real = _real(None if step else named.get("attention_mask"), given, new, past)
    before = _cached(cache, past, len(new))
    known_ids = step.ids if step is not None and step.ids.shape == real.shape else None
    if known_ids is None and ids is not None:  # not so in `generate` when the start of the prompt was cached before
        earlier = ids[:, :0] if before is None or before.ids is None else before.ids
        known_ids = torch.cat([fit(earlier, past, -1), ids], 1)
    if step and generation and not decodes and "prompt_mask" not in given:
        whole = generation.prompt
    else:
        whole = _prompt(given, real, past, length, before, decodes=decodes, writes=writes)
    spans = {name: fit(mask.bool(), real.shape[1], False) for name, mask in given.get("spans", {}).items()}
    given_rows = len(real) if generation is None else len(generation.prompt.real)
    last = caches.filled_up(cache, past) if past and not torch.compiler.is_compiling() else None
    kept = given.get("logits_to_keep", 0)
    return Moment(
        merged(real, known_ids, whole, spans),
        past,
        length,
        repeats=len(real) // given_rows if len(real) % given_rows == 0 else 1,
        written=whole.prompt.shape[1] <= past,
        restarts=_restarts(named, given, real[:, past:]) if step is None or not past else None,
        prompt_given="prompt_mask" in given,
        movers=frozenset() if last is None else last.movers,
        kept=kept if isinstance(kept, int) and 0 < kept < length else 0,
        decisions={} if last is None else last.decisions,
    )


def prompt_of(
    inputs: Tensor | None = None, generation_config: Any = None, *_: Any, defaults: Any = None, **kwargs: Any
) -> Context:
    """The prompt that a `generate` call is given. `defaults` is the model's own generation config."""
    ids = inputs if inputs is not None else kwargs.get("input_ids")
    mask, embeds = kwargs.get("attention_mask"), kwargs.get("inputs_embeds")
    if mask is not None and mask.ndim == 2:
        real = mask.bool()
    elif ids is not None and ids.ndim == 2:
        # as transformers infers it: padding counts as such unless it is an end-of-text token too
        sources = [kwargs, *(vars(config) for config in (generation_config, defaults) if config)]
        settings = ChainMap(*({name: v for name, v in source.items() if v is not None} for source in sources))
        pad, end = settings.get("pad_token_id"), settings.get("eos_token_id", [])
        no_padding = pad is None or pad in torch.atleast_1d(torch.as_tensor(end)).tolist()
        real = torch.ones_like(ids, dtype=torch.bool) if no_padding else ids != pad
    else:
        shown = ids if ids is not None else embeds
        real = torch.ones((1, 1) if shown is None else shown.shape[:2], dtype=torch.bool)
    return context_of(real, torch.ones_like(real), ids if ids is not None and ids.shape == real.shape else None)


def _ids(named: Mapping[str, Any], given: Mapping[str, Any], new: Tensor) -> Tensor | None:
    """The ids of the new tokens. An outer module may have been given them, and have embedded them itself."""
    if named.get("input_ids") is not None:
        return new
    outer = given.get("input_ids")
    return outer if isinstance(outer, Tensor) and outer.shape == new.shape[:2] else None


def _past(cache: Any, left: int | None) -> int:
    """How many tokens are cached. `left` of the columns of a step of `generate` are not new."""
    counted = caches.tokens_in(cache)
    if counted is None or (not counted and left):  # a recurrence does not count them, and `generate` knows
        counted = left if cache is not None or left is None else counted
    if counted is None:
        raise ValueError(
            f"the model was given a {type(cache).__name__} that does not say how many tokens it holds, and it was not "
            "filled by this model with trails attached: fill it with them attached, or run the whole text"
        )
    return counted


def _real(mask: Any, given: Mapping[str, Any], new: Tensor, past: int) -> Tensor:
    """The tokens that are not padding, cached ones first."""
    total = past + new.shape[1]
    outer = given.get("attention_mask")
    if not (isinstance(mask, Tensor) and mask.ndim == 2) and isinstance(outer, Tensor) and outer.ndim == 2:
        mask = outer if mask is not None and outer.shape[1] >= total and len(outer) == len(new) else mask
    if isinstance(mask, Tensor) and mask.ndim == 2:
        if mask.shape[1] < total:
            raise ValueError(
                f"attention_mask has {mask.shape[1]} columns, but there are {past} cached and {new.shape[1]} new "
                "tokens: token rules need the mask of all of them"
            )
        return mask[:, :total].bool()
    if mask is not None and "prompt_mask" not in given:
        raise ValueError(
            "token rules need a 2-D attention_mask (batch x tokens); with a mask of another form, give prompt_mask "
            "(batch x tokens, True for the prompt) as well"
        )
    return torch.ones(len(new), total, dtype=torch.bool, device=new.device)


def _prompt(
    given: Mapping[str, Any],
    real: Tensor,
    past: int,
    length: int,
    before: Context | None,
    *,
    decodes: bool,
    writes: bool,
) -> Context:
    """The prompt outside `generate`: as wide as it is known, which may be wider than this forward."""
    mask, labels = given.get("prompt_mask"), given.get("labels")
    if mask is not None:
        if mask.ndim != 2 or len(mask) != len(real) or mask.shape[1] < real.shape[1]:
            raise ValueError(
                f"prompt_mask has shape {list(mask.shape)}, but must be {len(real)} x at least {real.shape[1]} "
                "tokens, cached ones included"
            )
        return context_of(mask.bool(), mask.bool())
    if decodes:
        return context_of(real, torch.zeros_like(real))
    if not past:
        if writes and labels is not None and labels.ndim == 2 and labels.shape[1] == length:
            return context_of(real, (labels != -100).cumsum(1) == 0)
        return context_of(real, real)
    if before is None:
        raise ValueError(
            "the cache was not filled by this model with trails attached, so the prompt is not known: give "
            "prompt_mask (batch x tokens, cached ones included, True for the prompt)"
        )
    return before


def _cached(cache: Any, past: int, batch: int) -> Context | None:
    """What is known of a cache's tokens; of the rest of the prompt too, if the cache holds its beginning."""
    if not past or cache is None or torch.compiler.is_compiling():
        return None
    filled = caches.filled(cache)
    if filled is None or len(filled.context.real) != batch:
        return None
    known = filled.context
    if filled.past + filled.length == past:
        return known
    return context_of(known.real[:, :past], known.prompt[:, :past], None if known.ids is None else known.ids[:, :past])


def _restarts(named: Mapping[str, Any], given: Mapping[str, Any], real: Tensor) -> Tensor | None:
    """Where a row begins anew: a real token of another example, or one whose position is not behind the one before."""
    told = {name: value for name in PACKED if isinstance(value := named.get(name, given.get(name)), Tensor)}
    if any(value.ndim == 1 and len(value) > 2 for value in told.values()):  # where each example begins, and the end
        return torch.ones_like(real)
    positions, falls = named.get("position_ids"), torch.lt
    if (examples := told.get("seq_idx")) is not None and examples.shape == real.shape:
        positions, falls = examples, torch.ne
    elif isinstance(positions, Tensor) and positions.ndim == 3:  # time first, which the tokens of one image share
        positions = positions[0]
    elif isinstance(named.get("attention_mask"), Tensor):  # without, padding cannot be told, which shares a position
        falls = torch.le
    if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.shape[1] != real.shape[1]:
        return None
    fallen = falls(positions[:, 1:], positions[:, :-1]).to(real.device) & real[:, 1:] & real[:, :-1]
    return torch.cat([torch.zeros_like(real[:, :1]), fallen], 1)
