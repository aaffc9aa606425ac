"""How likely a model finds what follows a prompt.

Whatever is attached to the model is at work. A prompt is run once for all its options where the model's cache can be
cut back to it, and once for each option where it cannot.
"""

from __future__ import annotations

import itertools
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
from tokenpaths.engine.batches import batches
from tokenpaths.engine.divergence import at_least_float32
from tokenpaths.engine.forwards import answers
from tokenpaths.engine.logits import cross_entropy, logits_at
from tokenpaths.site.host import forward_arguments
from tokenpaths.undo import tidy

Ids = tuple[int, ...]
Options = tuple[Example, ...]


def encode_choices(items: Sequence[Choice], tokenizer: Any) -> list[Options]:
    """The options of each item, as examples.

    Of whole sentences without a prompt, what all begin with is the prompt, and the rest the answer. Their likelihoods
    then differ as those of the sentences do, and a trail that lies on the answer lies on what is compared.

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
            options = _behind_their_beginning(options)
        encoded.append(tuple(options))
    return encoded


def _behind_their_beginning(options: Sequence[Example]) -> list[Example]:
    """Sentences as examples whose prompt is what all begin with, short of the last token of the shortest."""
    columns = zip(*(option.ids[:-1] for option in options), strict=False)
    alike = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    return [Example.of(option.ids[:alike], option.ids[alike:]) for option in options]


@tidy
@torch.no_grad()
def nats(
    model: nn.Module, examples: Sequence[Example], max_batch_tokens: int, *, from_token: Sequence[int] | None = None
) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """-sum_t log p(t | all before it) of each example, in nats, and over how many tokens t.

    Args:
        model: a causal language model, as it stands.
        examples: of an example with an answer, the tokens t are the answer; of one without, all tokens but the first.
        max_batch_tokens: the most tokens in one forward, padding included.
        from_token: for each example, the place before which no token is scored.

    Raises:
        ValueError: a sum is not finite.
    """
    sums, counts = np.zeros(len(examples)), np.zeros(len(examples), dtype=np.int64)
    for rows in batches([len(example) for example in examples], max_batch_tokens):
        batch = _to_read(collate([examples[i] for i in rows]))
        if from_token is not None:
            begins = torch.tensor([from_token[i] for i in rows])[:, None]
            scored = torch.arange(batch.labels.shape[1]) >= begins
            batch = replace(batch, labels=batch.labels.where(scored, IGNORED))
        batch = batch.to(next(model.parameters()).device)
        logits, targets = answers(model, batch)
        losses = torch.cat([cross_entropy(logits[chunk], targets[chunk]) for chunk in logits.chunks()])
        losses = losses.double().cpu().numpy()
        counts[rows] = (batch.labels != IGNORED).sum(1).cpu().numpy()
        sums[rows] = [part.sum() for part in np.split(losses, np.cumsum(counts[rows])[:-1])]
    return _finite(sums), counts


@tidy
def option_scores(
    model: nn.Module, contexts: Sequence[Example], options: Sequence[Sequence[Ids]], max_batch_tokens: int
) -> list[Float[np.ndarray, " options"]]:
    """For each context, the summed log-likelihood of each of its options, in nats.

    The contexts of a batch fill one cache, behind which the options are read. Where the cache cannot be cut back
    (sliding windows, recurrent states) and options have several tokens, each option is read as a text of its own.

    Args:
        model: a causal language model, as it stands.
        contexts: what stands before the options. The answer tokens of a context count as written by the model.
        options: for each context, the token ids of its options.
        max_batch_tokens: the most tokens in one forward, padding included.
    """
    scores = [np.zeros(len(row)) for row in options]
    alone: list[int] = []
    lengths = [len(context) + max(map(len, row)) for context, row in zip(contexts, options, strict=True)]
    for rows in batches(lengths, max_batch_tokens):
        found = behind(model, collate([contexts[i] for i in rows], side="left"), [options[i] for i in rows])
        if found is None:
            alone += rows
            continue
        for i, row in zip(rows, found, strict=True):
            scores[i] = row
    if alone:
        texts = [_continued(contexts[i], ids) for i in alone for ids in options[i]]
        begins = [len(contexts[i]) for i in alone for _ in options[i]]
        flat, _ = nats(model, texts, max_batch_tokens, from_token=begins)
        for i, part in zip(alone, np.split(flat, np.cumsum([len(options[i]) for i in alone])[:-1]), strict=True):
            scores[i] = -part
    return scores


@tidy
def log_likelihoods(
    model: nn.Module, items: Sequence[Options], max_batch_tokens: int
) -> list[Float[np.ndarray, " options"]]:
    """For each item of `encode_choices`, the summed log-likelihood of each option: of the answer, or the whole text."""
    asked = [i for i, options in enumerate(items) if any(options[0].answer)]
    lengths = [items[i][0].prompt_length for i in asked]
    prompts = [Example(items[i][0].ids[:n], (False,) * n) for i, n in zip(asked, lengths, strict=True)]
    answers = [[option.ids[n:] for option in items[i]] for i, n in zip(asked, lengths, strict=True)]
    found = dict(zip(asked, option_scores(model, prompts, answers, max_batch_tokens), strict=True))
    whole = [i for i in range(len(items)) if i not in found]
    if whole:
        flat, _ = nats(model, [option for i in whole for option in items[i]], max_batch_tokens)
        parts = np.split(-flat, np.cumsum([len(items[i]) for i in whole])[:-1])
        found |= dict(zip(whole, parts, strict=True))
    return [found[i] for i in range(len(items))]


def right(scores: Sequence[Float[np.ndarray, " options"]], items: Sequence[Choice]) -> Float[np.ndarray, " items"]:
    """1 where the right option is the likeliest, 1/k where it is one of k that are, else 0."""
    best = [row == row.max() for row in scores]
    return np.array([hit[item.right] / hit.sum() for hit, item in zip(best, items, strict=True)])


@tidy
def likeliest(
    model: nn.Module, contexts: Sequence[Example], options: Sequence[Sequence[Ids]], max_batch_tokens: int
) -> list[int]:
    """Which of its options each context is followed by most likely; the first of equals. See `option_scores`."""
    return [int(np.argmax(row)) for row in option_scores(model, contexts, options, max_batch_tokens)]


def _continued(before: Example, written: Ids) -> Example:
    return Example(before.ids + written, before.answer + (True,) * len(written))


@torch.no_grad()
def behind(
    model: nn.Module, contexts: Batch, options: Sequence[Sequence[Ids]]
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
            cache.crop(1 - ids.shape[1])  # a negative number is cut off the end
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
    if "position_ids" in forward_arguments(model) and not bool(real[:, 0].all()):
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
