"""How items are put to those who answer: questions are written greedily, choices are told by likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from tokenpaths.data.encoding import encode_texts
from tokenpaths.data.examples import Example
from tokenpaths.data.items import Choice, Question
from tokenpaths.engine.generate import generate
from tokenpaths.engine.likelihood import encode_choices, log_likelihoods, right
from tokenpaths.engine.reach import share_reached
from tokenpaths.engine.readings import Run
from tokenpaths.lab.ab.arms import Arm, Ask

Item: TypeAlias = "Question | Choice"
Score: TypeAlias = Callable[[str, Question], float]


@dataclass(frozen=True)
class Asking:
    """What is the same for all arms; the arguments are those of `ab_test`."""

    tokenizer: Any
    read_answer: Callable[[str], Any]
    score: Score | None
    stop_strings: str | None
    max_new_tokens: int
    batch_size: int
    max_batch_tokens: int

    def ask(self, one: Run | Ask, items: Sequence[Item]) -> tuple[list[str], list[float]]:
        """What one model or function writes or chooses for each item, and the scores.

        Raises:
            ValueError: a function returns another number of texts, or `score` a number that is not finite.
        """
        choices = [item for item in items if isinstance(item, Choice)]
        if choices and isinstance(one, Run):
            return self._choose(one, choices)
        questions = [item for item in items if isinstance(item, Question)]
        texts = self._write(one, [question.prompt for question in questions])
        if len(texts) != len(questions):
            raise ValueError(
                f"an arm returned {len(texts)} texts for {len(questions)} prompts: it must return one for each"
            )
        return texts, [self._score(text, question) for text, question in zip(texts, questions, strict=True)]

    def moved(self, a: Arm, b: Arm, items: Sequence[Item], written: Sequence[Sequence[str]]) -> float:
        """The share of the predictions behind the answers that may differ between arms a and b, the least over seeds.

        Args:
            a: the arm that is compared with; its first seed stands for all.
            b: the other arm.
            items: what was asked.
            written: what each seed of b wrote or chose; the words of an answer are what its predictions are behind.

        Returns:
            NaN where one of the two is a function.
        """
        if not all(isinstance(one, Run) for one in (*a.seeds, *b.seeds)):
            return math.nan
        shares: list[float] = []
        for run, texts in zip(b.runs, written, strict=True):
            if choices := [item for item in items if isinstance(item, Choice)]:
                examples = [option for options in encode_choices(choices, self.tokenizer) for option in options]
            else:
                asked = encode_texts([item.prompt for item in items], self.tokenizer)
                told = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
                # an answer without a token was still predicted, by the last of the prompt
                examples = [Example.of(each.ids, ids or each.ids[-1:]) for each, ids in zip(asked, told, strict=True)]
            shares.append(share_reached(a.runs[0], run, examples, self.max_batch_tokens))
        return min(shares)

    def _write(self, one: Run | Ask, prompts: list[str]) -> list[str]:
        if not isinstance(one, Run):
            return list(one(prompts))
        with one.reading() as model:
            written = generate(
                model,
                encode_texts(prompts, self.tokenizer),
                self.tokenizer,
                max_new_tokens=self.max_new_tokens,
                stop_strings=self.stop_strings,
                batch_size=self.batch_size,
            )
        return [each.text for each in written]

    def _score(self, text: str, question: Question) -> float:
        if self.score is None:
            return float(self.read_answer(text) == self.read_answer(question.answer))
        found = float(self.score(text, question))
        if not np.isfinite(found):
            raise ValueError(f"score gave {found} for {text!r:.40}: give a finite number")
        return found

    def _choose(self, run: Run, items: Sequence[Choice]) -> tuple[list[str], list[float]]:
        with run.reading() as model:
            likely = log_likelihoods(model, encode_choices(items, self.tokenizer), self.max_batch_tokens)
        chosen = [item.options[int(row.argmax())] for item, row in zip(items, likely, strict=True)]
        return chosen, right(likely, items).tolist()


def as_question(item: Item) -> Question:
    """What is asked, with its right answer."""
    if isinstance(item, Question):
        return item
    told = item.options[item.right]
    return Question(item.prompt or told, told)
