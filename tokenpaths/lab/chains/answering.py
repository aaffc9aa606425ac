"""What a model answers behind a question and some reasoning, and what it writes there: many contexts at once, greedily.

A context is an `Example` whose prompt is the question alone. The reasoning counts as written by the model, as it was
when the trails were trained: `Last(1)` moves the last token of the question, and `Answer()` the reasoning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from tokenpaths.data.examples import Example
from tokenpaths.data.items import Question
from tokenpaths.data.tokenizing import inner, tokenized
from tokenpaths.engine.generate import generate
from tokenpaths.engine.likelihood import likeliest
from tokenpaths.site.host import window

Ids: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Answering:
    """How an answer is forced behind a question and some reasoning.

    Args:
        tokenizer: the model's tokenizer.
        cue: what stands between the reasoning and the answer.
        options: the answers that a question can have. The answer is the option with the largest summed log-likelihood
            behind question, reasoning and cue. With None, the model writes the answer.
        read_answer: reads the answer from what the model writes, or gives None.
        max_new_tokens: the most tokens that the model writes for an answer.
        max_batch_tokens: the most tokens in one forward, padding included.
    """

    tokenizer: Any
    cue: str
    options: Callable[[Question], Sequence[str]] | None
    read_answer: Callable[[str], Any]
    max_new_tokens: int
    max_batch_tokens: int

    def __call__(self, model: nn.Module, asked: Sequence[tuple[Question, Ids]]) -> list[Any]:
        """The answer to each question, given the token ids of its reasoning. Equal ones are asked once."""
        cue = token_ids(self.cue, self.tokenizer)
        keys = [(item, (*reasoning, *cue)) for item, reasoning in asked]
        once = list(dict.fromkeys(keys))
        contexts = [context(item.prompt, written, self.tokenizer) for item, written in once]
        if self.options is None:
            texts = write_on(model, contexts, self.tokenizer, self.max_new_tokens, None, self.max_batch_tokens)
            found = [self.read_answer(text) for text in texts]
        else:
            options = [tuple(self.options(item)) for item, _ in once]
            ids = [[token_ids(option, self.tokenizer) for option in row] for row in options]
            best = best_options(model, contexts, ids, self.max_batch_tokens)
            found = [row[place] for row, place in zip(options, best, strict=True)]
        known = dict(zip(once, found, strict=True))
        return [known[key] for key in keys]


def context(prompt: str, written: Ids, tokenizer: Any) -> Example:
    """A question, tokenised as at generation, and token ids that count as written after it."""
    return Example.of(tokenized(tokenizer, prompt, goes_on=True), written)


def token_ids(text: str, tokenizer: Any) -> Ids:
    """The tokens of a text that stands inside a longer one."""
    return tuple(inner(tokenizer, text))


def best_options(
    model: nn.Module, contexts: Sequence[Example], options: Sequence[Sequence[Ids]], max_batch_tokens: int
) -> list[int]:
    """The number of each context's likeliest option, as `likeliest`. Raises `ValueError` as `write_on`."""
    _check_window(model, [len(one) + max(map(len, row)) for one, row in zip(contexts, options, strict=True)])
    return likeliest(model, contexts, options, max_batch_tokens)


def write_on(
    model: nn.Module,
    contexts: Sequence[Example],
    tokenizer: Any,
    max_new_tokens: int,
    stop_strings: str | None,
    max_batch_tokens: int,
) -> list[str]:
    """What a model writes greedily behind each context, without an end-of-text token. The arguments are `generate`'s.

    Raises `ValueError` if a context, with what is written behind it, does not fit into the model's window.
    """
    _check_window(model, [len(example) + max_new_tokens for example in contexts])
    written = generate(
        model,
        contexts,
        tokenizer,
        max_new_tokens=max_new_tokens,
        stop_strings=stop_strings,
        max_batch_tokens=max_batch_tokens,
    )
    return [one.text for one in written]


def _check_window(model: nn.Module, lengths: Sequence[int]) -> None:
    most, longest = window(model), max(lengths, default=0)
    if most is not None and longest > most:
        raise ValueError(
            f"a question with its reasoning and what is written behind it takes up to {longest} tokens, and the "
            f"model's window holds {most}: lower max_new_tokens or answer_tokens, or leave the longest items out"
        )
