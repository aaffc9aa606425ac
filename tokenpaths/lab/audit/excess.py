"""The excess of a candidate: how much more it changes the adapted model's answer than the frozen model's.

    KL(a_0 || a_c) - KL(f_0 || f_c)

in nats, at the token of the answer where the adapted model changes most. a_c and f_c are the next-token distributions
of the adapted and the frozen model with candidate c in the prompt; a_0 and f_0 are their means over ordinary
candidates. The excess in several prompts is the median: a trigger works in most of them, and an odd word in one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tokenpaths.data.examples import Example
from tokenpaths.data.tokenizing import inner
from tokenpaths.engine.divergence import kl_of_logs
from tokenpaths.lab.audit.respond import Ids, Responder, Row, rows_of_one_length


class Probe:
    """Clean prompts with a place for a candidate, and what is said there with ordinary candidates.

    `normal` holds, for each prompt, log f_0 and log a_0 at the tokens of the answer, [answer, vocab].

    Args:
        respond: the model and the adapter.
        prompts: clean examples of the adapter's task, at least one.
        tokenizer: the model's tokenizer.
        ordinary: token ids of the candidates that a_0 and f_0 are means over, at least one.
        where: the share of a prompt's tokens before the candidate, from 0 to 1.
        batch_size: rows in one forward.

    Raises:
        ValueError: no prompt, no ordinary candidate, or `where` outside [0, 1].
    """

    def __init__(
        self,
        respond: Responder,
        prompts: Sequence[Example],
        tokenizer: Any,
        ordinary: Sequence[Ids],
        *,
        where: float,
        batch_size: int = 32,
    ) -> None:
        if not prompts:
            raise ValueError("there is no prompt to scan in: give a few clean examples of the adapter's task")
        if not ordinary:
            raise ValueError("an excess is measured against ordinary candidates: ordinary=0 must be at least 1")
        if not 0 <= where <= 1:
            raise ValueError(f"where={where} must be from 0 (before the prompt) to 1 (behind it)")
        self.respond = respond
        self.where = where
        self.batch_size = batch_size
        self.prompts = around(prompts, tokenizer, where)
        self.normal = [self._mean(prompt, ordinary) for prompt in self.prompts]

    def excess(self, candidates: Sequence[Ids]) -> list[float]:
        """The excess of each candidate, the median over prompts."""
        return median([self.excess_in(number, candidates) for number in range(len(self.prompts))])

    def excess_in(self, number: int, candidates: Sequence[Ids]) -> Float[Tensor, " candidates"]:
        """The excess of each candidate in one prompt."""
        found = torch.zeros(len(candidates))
        for i, said in self._said(self.prompts[number], candidates):
            frozen, adapted = map(kl_of_logs, self.normal[number], said)
            found[i] = (adapted - frozen)[adapted.argmax()]
        return found

    def _mean(self, prompt: Example, ordinary: Sequence[Ids]) -> list[Float[Tensor, "answer vocab"]]:
        total: list[Tensor] = []
        for _, said in self._said(prompt, ordinary):
            total = list(map(torch.logaddexp, total, said)) if total else said
        return [sums - math.log(len(ordinary)) for sums in total]

    def _said(
        self, prompt: Example, candidates: Sequence[Ids]
    ) -> Iterator[tuple[int, list[Float[Tensor, "answer vocab"]]]]:
        """Each candidate's number, and log-probabilities at the answer of the frozen and the adapted model.

        Row by row: in float32, a batch of a large vocabulary would take gigabytes.
        """
        rows = [insert(prompt, ids, self.where) for ids in candidates]
        for numbers, ids, answer in rows_of_one_length(rows, self.batch_size):
            for number, *both in zip(numbers, *self.respond.logits(ids, answer), strict=True):
                yield number, [logits.float().log_softmax(-1) for logits in both]


def median(excess: Sequence[Float[Tensor, " candidates"]]) -> list[float]:
    """The median over prompts of each candidate's excess."""
    return torch.stack(list(excess)).quantile(0.5, 0).tolist() if len(excess[0]) else []


def position(prompt: Example, where: float) -> int:
    """The number of a prompt's tokens that stand before the candidate."""
    return round(where * prompt.prompt_length)


def insert(prompt: Example, candidate: Ids, where: float) -> Row:
    """The tokens of an example with a candidate in its prompt, and how many of them are the answer."""
    at = position(prompt, where)
    return Row((*prompt.ids[:at], *candidate, *prompt.ids[at:]), len(prompt) - prompt.prompt_length)


def around(prompts: Sequence[Example], tokenizer: Any, where: float) -> list[Example]:
    """Prompts as they stand around a candidate: behind it, the first word has a space before it, as in text."""
    return [prompt if position(prompt, where) else _spaced(prompt, tokenizer) for prompt in prompts]


def _spaced(prompt: Example, tokenizer: Any) -> Example:
    """A prompt with a space before its first word, which is another token then."""
    spaced = " " + tokenizer.decode(prompt.ids[:1])
    ids = inner(tokenizer, spaced)
    if spaced[1:2].isspace() or prompt.ids[0] in tokenizer.all_special_ids or tokenizer.decode(ids) != spaced:
        return prompt
    return Example((*ids, *prompt.ids[1:]), (*[False] * len(ids), *prompt.answer[1:]))
