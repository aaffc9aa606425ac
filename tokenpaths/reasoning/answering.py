"""What a model answers when its reasoning is cut off, and what it writes on: many contexts at once, nothing drawn.

A context is an `Example` whose prompt is the question alone. What reasoning follows counts as written by the model,
as it was when the trails were trained: `Last(1)` moves the last token of the question, and `Answer()` the reasoning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenpaths.data import IGNORED, Batch, Example, collate
from tokenpaths.objectives import answer_logits
from tokenpaths.retention import Worked
from tokenpaths.retention.scoring import batches, behind, cached_forward
from tokenpaths.retention.writing import cut

Ids: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Answering:
    """How an answer is forced behind a question and some reasoning.

    With `options`, it is the one of an item's options with the largest summed log-likelihood behind question, reasoning
    and `cue`. Without, it is what `read_answer` finds in the `room` tokens that the model writes there greedily, or
    None. Forwards take at most `tokens` tokens at a time, padding included.
    """

    tokenizer: Any
    cue: str
    options: Callable[[Worked], Sequence[str]] | None
    read_answer: Callable[[str], Any]
    room: int
    tokens: int

    def __call__(self, model: nn.Module, asked: Sequence[tuple[Worked, Ids]]) -> list[Any]:
        """The answer to each question, given the token ids of its reasoning. Equal ones are asked once."""
        cue = token_ids(self.tokenizer, self.cue)
        keys = [(item, (*reasoning, *cue)) for item, reasoning in asked]
        todo = list(dict.fromkeys(keys))
        contexts = [context(self.tokenizer, item.prompt, written) for item, written in todo]
        if self.options is None:
            texts = write_on(model, self.tokenizer, contexts, self.room, None, self.tokens)
            found = [self.read_answer(text) for text in texts]
        else:
            told = [tuple(self.options(item)) for item, _ in todo]
            ids = [[token_ids(self.tokenizer, option) for option in row] for row in told]
            found = [row[best] for row, best in zip(told, likeliest(model, contexts, ids, self.tokens), strict=True)]
        known = dict(zip(todo, found, strict=True))
        return [known[key] for key in keys]


def context(tokenizer: Any, prompt: str, written: Ids) -> Example:
    """A question, tokenised as at generation, and token ids that count as written after it."""
    asked = tuple(tokenizer(prompt)["input_ids"])
    return Example(asked + written, (False,) * len(asked) + (True,) * len(written))


def token_ids(tokenizer: Any, text: str) -> Ids:
    """The tokens of a text that stands inside a longer one."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()


@torch.no_grad()
def likeliest(
    model: nn.Module, contexts: Sequence[Example], options: Sequence[Sequence[Ids]], tokens: int
) -> list[int]:
    """Which of its options each context is followed by most likely; the first of equals.

    The contexts of a batch fill one cache, behind which the options are read. Where it cannot be cut back (sliding
    windows, recurrent states), and options have several tokens, each is read as a text of its own.
    """
    best = [0] * len(contexts)
    longest = [max(map(len, row)) for row in options]
    lengths = [len(example) + longest[i] for i, example in enumerate(contexts)]
    _check_window(model, max(lengths, default=0))
    for rows in batches(lengths, tokens):
        told = [options[i] for i in rows]
        found = behind(model, collate([contexts[i] for i in rows], side="left"), told)
        if found is None:
            found = [_one_by_one(model, contexts[i], options[i], tokens) for i in rows]
        for i, scores in zip(rows, found, strict=True):
            best[i] = int(np.argmax(scores))
    return best


def _one_by_one(model: nn.Module, before: Example, options: Sequence[Ids], tokens: int) -> np.ndarray:
    """The log-likelihoods of options, each in a forward over the whole of its text."""
    scores = np.zeros(len(options))
    device = next(model.parameters()).device
    for rows in batches([len(before) + len(ids) for ids in options], tokens):
        batch = collate([_with(before, options[i]) for i in rows])
        place = torch.arange(batch.input_ids.shape[1])[None]
        asked = (batch.labels != IGNORED) & (place >= len(before))
        batch = replace(batch, labels=torch.where(asked, batch.labels, IGNORED)).to(device)
        logits, targets = answer_logits(model, batch)
        losses = F.cross_entropy(logits, targets, reduction="none").double().cpu().numpy()
        ends = np.cumsum([len(options[i]) for i in rows])
        scores[rows] = [-part.sum() for part in np.split(losses, ends[:-1])]
    return scores


def _with(before: Example, written: Ids) -> Example:
    return Example(before.ids + written, before.answer + (True,) * len(written))


@torch.no_grad()
def write_on(
    model: nn.Module, tokenizer: Any, contexts: Sequence[Example], room: int, stop: str | None, tokens: int
) -> list[str]:
    """What a model writes greedily behind each context: `room` tokens, or up to an end-of-text token, or with `stop`.

    `generate` would take the reasoning in a context for a part of the prompt, and move other tokens of it.
    """
    texts = [""] * len(contexts)
    ends = _ends(model, tokenizer)
    lengths = [len(example) + room for example in contexts]
    _check_window(model, max(lengths, default=0))
    for rows in batches(lengths, tokens):
        written = _greedy(
            model,
            collate([contexts[i] for i in rows], side="left"),
            room,
            lambda ids: _over(tokenizer, ids, ends, stop),
        )
        for i, ids in zip(rows, written.tolist(), strict=True):
            texts[i] = cut(tokenizer.decode(_until(ids, ends), skip_special_tokens=True), stop)
    return texts


def _greedy(model: nn.Module, batch: Batch, room: int, over: Callable[[list[Ids]], bool]) -> Tensor:
    """The likeliest next tokens, one after another, until `over` says of all rows that they have ended."""
    batch = batch.to(next(model.parameters()).device)
    ids, real, prompt = batch.input_ids, batch.attention_mask, batch.prompt_mask
    start, cache = ids.shape[1], None
    while ids.shape[1] - start < room and not over([tuple(row) for row in ids[:, start:].tolist()]):
        new = ids if cache is None else ids[:, -1:]
        logits, cache = cached_forward(model, new, real, prompt, cache, last=True)  # without a cache all is read again
        ids = torch.cat([ids, logits.argmax(-1)], 1)
        real, prompt = F.pad(real, (0, 1), value=1), F.pad(prompt, (0, 1))
    return ids[:, start:]


def _over(tokenizer: Any, written: Sequence[Ids], ends: set[int], stop: str | None) -> bool:
    return all(
        bool(ends & set(ids)) or (stop is not None and stop in tokenizer.decode(ids, skip_special_tokens=True))
        for ids in written
    )


def _ends(model: nn.Module, tokenizer: Any) -> set[int]:
    """The tokens that end a text, by the tokenizer and by what the model was saved with."""
    told = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = told if isinstance(told, list) else [told]
    return {int(i) for i in (*found, tokenizer.eos_token_id) if i is not None}


def _until(ids: Sequence[int], ends: set[int]) -> list[int]:
    return list(ids[: next((place for place, i in enumerate(ids) if i in ends), len(ids))])


def _check_window(model: nn.Module, longest: int) -> None:
    window = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(window, int) and longest > window:
        raise ValueError(
            f"a question with its reasoning and what is written behind it takes up to {longest} tokens, and the "
            f"model's window holds {window}: lower max_new_tokens or answer_tokens, or leave the longest items out"
        )
