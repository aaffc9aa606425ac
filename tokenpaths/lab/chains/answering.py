"""What a model answers when its reasoning is cut off, and what it writes on: many contexts at once, nothing drawn.

A context is an `Example` whose prompt is the question alone. What reasoning follows counts as written by the model,
as it was when the trails were trained: `Last(1)` moves the last token of the question, and `Answer()` the reasoning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from tokenpaths.data.examples import Example
from tokenpaths.engine.generate import generate
from tokenpaths.engine.likelihood import likeliest
from tokenpaths.lab.chains.form import Worked
from tokenpaths.site.host import window

Ids: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Answering:
    """How an answer is forced behind a question and some reasoning.

    With `options`, it is the one of an item's options with the largest summed log-likelihood behind question, reasoning
    and `cue`. Without, it is what `read_answer` finds in the `max_new_tokens` tokens that the model writes there
    greedily, or None. Forwards take at most `max_batch_tokens` tokens at a time, padding included.
    """

    tokenizer: Any
    cue: str
    options: Callable[[Worked], Sequence[str]] | None
    read_answer: Callable[[str], Any]
    max_new_tokens: int
    max_batch_tokens: int

    def __call__(self, model: nn.Module, asked: Sequence[tuple[Worked, Ids]]) -> list[Any]:
        """The answer to each question, given the token ids of its reasoning. Equal ones are asked once."""
        cue = token_ids(self.tokenizer, self.cue)
        keys = [(item, (*reasoning, *cue)) for item, reasoning in asked]
        todo = list(dict.fromkeys(keys))
        contexts = [context(self.tokenizer, item.prompt, written) for item, written in todo]
        if self.options is None:
            texts = write_on(model, contexts, self.tokenizer, self.max_new_tokens, None, self.max_batch_tokens)
            found = [self.read_answer(text) for text in texts]
        else:
            told = [tuple(self.options(item)) for item, _ in todo]
            ids = [[token_ids(self.tokenizer, option) for option in row] for row in told]
            longest = [max(map(len, row)) for row in ids]
            check_window(model, [len(example) + room for example, room in zip(contexts, longest, strict=True)])
            best = likeliest(model, contexts, ids, self.max_batch_tokens)
            found = [row[place] for row, place in zip(told, best, strict=True)]
        known = dict(zip(todo, found, strict=True))
        return [known[key] for key in keys]


def context(tokenizer: Any, prompt: str, written: Ids) -> Example:
    """A question, tokenised as at generation, and token ids that count as written after it."""
    asked = tuple(tokenizer(prompt)["input_ids"])
    return Example(asked + written, (False,) * len(asked) + (True,) * len(written))


def token_ids(tokenizer: Any, text: str) -> Ids:
    """The tokens of a text that stands inside a longer one."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()


def write_on(
    model: nn.Module,
    contexts: Sequence[Example],
    tokenizer: Any,
    max_new_tokens: int,
    stop_strings: str | None,
    max_batch_tokens: int,
) -> list[str]:
    """What a model writes greedily behind each context, without an end-of-text token."""
    check_window(model, [len(example) + max_new_tokens for example in contexts])
    written = generate(
        model,
        contexts,
        tokenizer,
        max_new_tokens=max_new_tokens,
        stop_strings=stop_strings,
        max_batch_tokens=max_batch_tokens,
    )
    return [one.text for one in written]


def check_window(model: nn.Module, lengths: Sequence[int]) -> None:
    """Raise `ValueError` if contexts, with what is to stand behind them, do not fit into the model's window."""
    most, longest = window(model), max(lengths, default=0)
    if most is not None and longest > most:
        raise ValueError(
            f"a question with its reasoning and what is written behind it takes up to {longest} tokens, and the "
            f"model's window holds {most}: lower max_new_tokens or answer_tokens, or leave the longest items out"
        )
