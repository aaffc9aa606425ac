"""How likely a model finds what follows a prompt.

Whatever is attached to the model is at work. A prompt is run once for all its options where the model's cache can be
cut back to it, and once for each option where it cannot.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tokenpaths.attachment.watcher import Watcher
from tokenpaths.data.encoding import encode, encode_texts
from tokenpaths.data.examples import IGNORED, Batch, Example, collate
from tokenpaths.data.items import Choice
from tokenpaths.engine.answers import answer_logits
from tokenpaths.engine.batches import batches
from tokenpaths.engine.divergence import at_least_float32
from tokenpaths.engine.logits import logits_at
from tokenpaths.site.host import unwrapped

Options = tuple[Example, ...]


def encode_choices(items: Sequence[Choice], tokenizer: Any) -> list[Options]:
    """The options of each item, as examples.

    Raises:
        ValueError: an item's sentences, which follow no prompt, begin with different tokens, of which no model tells
            the likelihood; names the item.
    """
    encoded: list[Options] = []
    for number, item in enumerate(items):
        if item.prompt:
            options = encode([(item.prompt, option) for option in item.options], tokenizer, eos=False)
        else:
            options = encode_texts(item.options, tokenizer)
            if len({option.ids[0] for option in options}) > 1:
                raise ValueError(
                    f"item {number}: its sentences begin with different tokens, whose likelihood nothing before them "
                    "tells. Give the item a prompt, or use a tokenizer that begins texts with a special token"
                )
            if shortest := [option for option in item.options if len(encode_texts([option], tokenizer)[0]) < 2]:
                raise ValueError(f"item {number}: {shortest[0]!r:.40} is one token: there is nothing in it to predict")
        encoded.append(tuple(options))
    return encoded


@torch.no_grad()
def nats(
    model: nn.Module, examples: Sequence[Example], max_batch_tokens: int
) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """-sum_t log p(t | all before it) of each example, and over how many tokens t: its answer, or all but the first.

    Batches have at most `max_batch_tokens` tokens, padding included.
    """
    sums, counts = np.zeros(len(examples)), np.zeros(len(examples), dtype=np.int64)
    for rows in batches([len(example) for example in examples], max_batch_tokens):
        batch = _to_read(collate([examples[i] for i in rows])).to(next(model.parameters()).device)
        logits, targets = answer_logits(model, batch)
        losses = F.cross_entropy(at_least_float32(logits), targets, reduction="none").double().cpu().numpy()
        counts[rows] = (batch.labels != IGNORED).sum(1).cpu().numpy()
        sums[rows] = [part.sum() for part in np.split(losses, np.cumsum(counts[rows])[:-1])]
    return _finite(sums), counts


def log_likelihoods(
    model: nn.Module, items: Sequence[Options], max_batch_tokens: int
) -> list[Float[np.ndarray, " options"]]:
    """Of each item, the summed log-likelihood of each option: of the answer, or of the whole text."""
    scores = [np.zeros(len(options)) for options in items]
    asked = [i for i, options in enumerate(items) if any(options[0].answer)]
    asked.sort(key=lambda i: (items[i][0].prompt_length, sum(map(len, items[i]))))  # little padding of answers
    alone = [i for i, options in enumerate(items) if not any(options[0].answer)]
    for rows in batches([items[i][0].prompt_length for i in asked], max_batch_tokens):
        chosen = [asked[row] for row in rows]
        prompts = [items[i][0].ids[: items[i][0].prompt_length] for i in chosen]
        contexts = collate([Example(ids, (False,) * len(ids)) for ids in prompts], side="left")
        found = behind(
            model,
            contexts,
            [[o.ids[len(ids) :] for o in items[i]] for i, ids in zip(chosen, prompts, strict=True)],
        )
        if found is None:
            alone += chosen
            continue
        for i, row in zip(chosen, found, strict=True):
            scores[i] = row
    if alone:
        flat, _ = nats(model, [option for i in alone for option in items[i]], max_batch_tokens)
        ends = np.cumsum([len(items[i]) for i in alone])
        for i, part in zip(alone, np.split(flat, ends[:-1]), strict=True):
            scores[i] = -part
    return scores


def right(scores: Sequence[Float[np.ndarray, " options"]], items: Sequence[Choice]) -> Float[np.ndarray, " items"]:
    """1 where the right option is the likeliest, 1/k where it is one of k that are, else 0."""
    best = [row == row.max() for row in scores]
    return np.array([hit[item.right] / hit.sum() for hit, item in zip(best, items, strict=True)])


@torch.no_grad()
def likeliest(
    model: nn.Module, contexts: Sequence[Example], options: Sequence[Sequence[tuple[int, ...]]], max_batch_tokens: int
) -> list[int]:
    """Which of its options each context is followed by most likely; the first of equals.

    The contexts of a batch fill one cache, behind which the options are read. Where it cannot be cut back (sliding
    windows, recurrent states), and options have several tokens, each is read as a text of its own.
    """
    best = [0] * len(contexts)
    longest = [max(map(len, row)) for row in options]
    lengths = [len(example) + longest[i] for i, example in enumerate(contexts)]
    for rows in batches(lengths, max_batch_tokens):
        told = [options[i] for i in rows]
        found = behind(model, collate([contexts[i] for i in rows], side="left"), told)
        if found is None:
            found = [_one_by_one(model, contexts[i], options[i], max_batch_tokens) for i in rows]
        for i, scores in zip(rows, found, strict=True):
            best[i] = int(np.argmax(scores))
    return best


def _one_by_one(
    model: nn.Module, before: Example, options: Sequence[tuple[int, ...]], max_batch_tokens: int
) -> np.ndarray:
    """The log-likelihoods of options, each in a forward over the whole of its text."""
    scores = np.zeros(len(options))
    device = next(model.parameters()).device
    for rows in batches([len(before) + len(ids) for ids in options], max_batch_tokens):
        batch = collate([_written_behind(before, options[i]) for i in rows])
        place = torch.arange(batch.input_ids.shape[1])[None]
        asked = (batch.labels != IGNORED) & (place >= len(before))
        batch = replace(batch, labels=torch.where(asked, batch.labels, IGNORED)).to(device)
        logits, targets = answer_logits(model, batch)
        losses = F.cross_entropy(logits, targets, reduction="none").double().cpu().numpy()
        ends = np.cumsum([len(options[i]) for i in rows])
        scores[rows] = [-part.sum() for part in np.split(losses, ends[:-1])]
    return scores


def _written_behind(before: Example, written: tuple[int, ...]) -> Example:
    return Example(before.ids + written, before.answer + (True,) * len(written))


@torch.no_grad()
def behind(
    model: nn.Module, contexts: Batch, options: Sequence[Sequence[tuple[int, ...]]]
) -> list[Float[np.ndarray, " options"]] | None:
    """The summed log-likelihoods of options, as token ids, behind contexts that are padded at the left or not at all.

    The contexts fill a cache. The first option of every row is run behind it, the cache is cut back to the contexts,
    and so on: the cache keeps its rows, so that attached trails still know which prompt is whose. None where the
    model's cache cannot be cut, unless all options are of one token.
    """
    contexts = contexts.to(next(model.parameters()).device)
    first, cache = cached_forward(model, contexts.input_ids, contexts.attention_mask, contexts.prompt_mask, last=True)
    if any(len(ids) > 1 for row in options for ids in row) and not _can_be_cut(cache):
        return None
    first = first.log_softmax(-1)
    scores = np.full((len(options), max(map(len, options))), np.nan)
    for k in range(scores.shape[1]):
        ids, real = _padded([row[k] if k < len(row) else () for row in options], contexts.input_ids.device)
        logs = first
        if ids.shape[1] > 1:  # the last token of an option predicts nothing that is asked for
            mask = torch.cat([contexts.attention_mask, real[:, :-1]], 1)
            prompt = F.pad(contexts.prompt_mask, (0, ids.shape[1] - 1))
            following, cache = cached_forward(model, ids[:, :-1], mask, prompt, cache)
            logs = torch.cat([first, following.log_softmax(-1)], 1)
            cache.crop(1 - ids.shape[1])  # cuts so many tokens off
        said = logs.gather(2, ids[..., None])[..., 0].double().where(real.bool(), 0.0)
        scores[:, k] = said.sum(1).cpu().numpy()
    return [_finite(found[: len(row)]) for found, row in zip(scores, options, strict=True)]


def cached_forward(
    model: nn.Module,
    ids: Int[Tensor, "batch new"],
    real: Int[Tensor, "batch seq"],
    prompt: Bool[Tensor, "batch seq"],
    cache: Any = None,
    *,
    last: bool = False,
) -> tuple[Float[Tensor, "batch kept vocab"], Any]:
    """The logits of new tokens behind those of a cache (or of all tokens, behind none), and the cache with them.

    `real` and `prompt` are of all tokens, cached ones first. Padding may stand at the left: positions are counted
    without it, as `generate` does. With `last`, the logits are those of the last token alone, and no others are made:
    not by `logits_to_keep`, whose slice of the hidden states takes hundreds of times as long in bfloat16 on a CPU.
    """
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": real, "use_cache": True}
    if cache is not None:
        inputs["past_key_values"] = cache
    if Watcher.known(model):  # attached trails read it, and a model without them does not know it
        inputs["prompt_mask"] = prompt
    if _takes_positions(model) and not bool(real[:, 0].all()):
        inputs["position_ids"] = (real.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    outputs: list[Any] = []

    def call() -> Any:
        outputs.append(model(**inputs))
        return outputs[0]

    if last:
        rows = torch.zeros_like(ids, dtype=torch.bool)
        rows[:, -1] = True
        logits = logits_at(model, call, rows)[:][:, None]
    else:
        logits = at_least_float32(call().logits)
    return logits, getattr(outputs[0], "past_key_values", None)


def _takes_positions(model: nn.Module) -> bool:
    """Whether the forward of the model, inside its wrappers, can be told positions."""
    inner: Any = unwrapped(model)
    base = inner.get_base_model() if hasattr(inner, "get_base_model") else inner  # PEFT hands all arguments on
    return "position_ids" in inspect.signature(base.forward).parameters


def _can_be_cut(cache: Any) -> bool:
    """Whether it is a cache of plain keys and values: sliding windows and recurrent states forget what they were."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, real


def _to_read(batch: Batch) -> Batch:
    """Label a text that is all prompt from its second token on. To token rules it stays a prompt."""
    without_answer = (batch.labels == IGNORED).all(1, keepdim=True)
    after_first = F.pad(batch.attention_mask[:, 1:].bool(), (1, 0))
    return replace(batch, labels=torch.where(without_answer & after_first, batch.input_ids, batch.labels))


def _finite(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    if not np.isfinite(values).all():
        raise ValueError("the model gave a log-likelihood that is not a finite number: a trail or a weight is broken")
    return values
