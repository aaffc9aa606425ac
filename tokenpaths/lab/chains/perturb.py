"""A chain in steps, and what takes their place: a mistake, a paraphrase, a filler."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from tokenpaths.data.items import Question
from tokenpaths.files import patterns
from tokenpaths.lab.chains.answering import Ids, context, token_ids, write_on

SENTENCES = r"(?<=[.!?])\s+|\n+"
"""What stands between two steps that are sentences or lines."""
REWORD = "Say this in other words. Write one sentence and nothing else.\n\n{step}"
"""The prompt for a paraphrase."""
_WORTH_SWAPPING = re.compile(r"\d+(?:\.\d+)?|\b[A-Z]\w*")

Mistake: TypeAlias = Callable[[Question, Sequence[str], int, random.Random], "str | None"]
"""(item, steps of its chain, k, rng) -> a wrong step to stand for steps[k], or None where there is none."""
Paraphrase: TypeAlias = Callable[[Sequence[str]], "Sequence[str | None]"]
"""Steps -> the same steps in other words, in order; None for one that cannot be reworded."""


@dataclass(frozen=True)
class Piece:
    """A step of a chain, and what stands between it and what was before it."""

    gap: str
    step: str


Steps: TypeAlias = tuple[Piece, ...]
Altered: TypeAlias = "list[list[Ids | None]]"
"""For each item, by k, the reasoning whose first k steps are as they were; None where it cannot be altered at k."""


def check_separator(separator: str) -> None:
    """Raise `ValueError` for a pattern that no chain can be split at and put together again."""
    try:
        patterns.check(separator)
    except ValueError as error:
        raise ValueError(f"separator {separator!r:.80} is not a regular expression: {error}") from None
    if re.compile(separator).groups or re.fullmatch(separator, ""):
        raise ValueError(f"separator {separator!r} must have no groups and must not match nothing: use (?:...)")


def steps_of(chain: str, cue: str, separator: str) -> Steps:
    """The steps of a chain, without its answer: what comes before the last `cue`, or with no cue all but the last step.

    Where the cue is not found, because the model never came to an answer, all are steps.
    """
    mark = cue.strip() or cue  # a model may begin its last line otherwise
    body = chain[: chain.rindex(mark)] if mark and mark in chain else chain
    pieces: list[Piece] = []
    gap, start = "", 0
    for found in (*patterns.finditer(separator, body), None):
        step = body[start:] if found is None else body[start : found.start()]
        if step.strip():
            pieces.append(Piece(gap, step))
            gap = ""
        else:
            gap += step
        if found is not None:
            gap += found.group()
            start = found.end()
    return tuple(pieces if cue else pieces[:-1])


def joined(pieces: Sequence[Piece]) -> str:
    """The text of steps that follow one another."""
    return "".join(piece.gap + piece.step for piece in pieces)


def swapped(item: Question, steps: Sequence[str], k: int, rng: random.Random) -> str | None:
    """Step k with one number or name swapped for another of the same question and chain.

    A name is a word with a capital that is not the first of several in a step. A number is swapped for a number and a
    name for a name. None where the step has none of either, or there is no other.
    """
    text = " ".join([item.prompt, *steps])
    pools = [sorted({word for word in _WORTH_SWAPPING.findall(text) if word[0].isdigit() == digit}) for digit in (0, 1)]
    step = steps[k]
    places = [found for found in _WORTH_SWAPPING.finditer(step) if not _opens(step, found)]
    choices = [
        (found, other) for found in places for other in pools[found.group()[0].isdigit()] if other != found.group()
    ]
    if not choices:
        return None
    found, other = rng.choice(choices)
    return step[: found.start()] + other + step[found.end() :]


def _opens(step: str, found: re.Match[str]) -> bool:
    """Whether it is the first word of several: its capital says nothing."""
    return found.group()[0].isalpha() and not step[: found.start()].strip() and len(step.split()) > 1


def mistaken(
    items: Sequence[Question], chains: Sequence[Steps], mistake: Mistake, *, kept: bool, seed: int
) -> list[list[Steps | None]]:
    """For each chain, by k, its first k steps, step k gone wrong, and if `kept` the steps after it.

    Raises:
        ValueError: a mistake is empty, or equals the step that it replaces; names the item.
    """

    def wrong(number: int, k: int) -> Steps | None:
        chain = chains[number]
        steps = [piece.step for piece in chain]
        told = mistake(items[number], steps, k, random.Random(f"{seed} {number} {k}"))
        if told is None:
            return None
        if told.strip() in ("", steps[k].strip()):
            raise ValueError(
                f"item {number}: mistake gave {told!r:.40} for step {k}, {steps[k]!r:.40}, which is no mistake; let it "
                "give None where there is none"
            )
        return (*chain[:k], Piece(chain[k].gap, told), *(chain[k + 1 :] if kept else ()))

    return [[wrong(number, k) for k in range(len(chain))] for number, chain in enumerate(chains)]


def reworded(chains: Sequence[Steps], words: Mapping[str, str | None]) -> list[list[Steps | None]]:
    """For each chain, by k, its first k steps and the later ones in other words; None if one of them has none."""

    def later(chain: Steps, k: int) -> Steps | None:
        told = [(piece.gap, words[piece.step]) for piece in chain[k:]]
        new = tuple(Piece(gap, step) for gap, step in told if step is not None)
        return (*chain[:k], *new) if len(new) == len(told) else None

    return [[later(chain, k) for k in range(len(chain))] for chain in chains]


def filled(chains: Sequence[Steps], tokenizer: Any, filler: str) -> Altered:
    """For each chain, by k, its first k steps and then the filler's tokens, repeated to the length of the chain."""
    ids = token_ids(filler, tokenizer)

    def fill(chain: Steps, k: int) -> Ids:
        kept, length = token_ids(joined(chain[:k]), tokenizer), len(token_ids(joined(chain), tokenizer))
        return kept + tuple(ids[i % len(ids)] for i in range(length - len(kept)))

    return [[fill(chain, k) for k in range(len(chain))] for chain in chains]


def encoded(rows: Sequence[Sequence[Steps | None]], tokenizer: Any) -> Altered:
    """The token ids of altered chains."""
    return [[None if steps is None else token_ids(joined(steps), tokenizer) for steps in row] for row in rows]


def own_words(model: nn.Module, steps: Sequence[str], tokenizer: Any, max_batch_tokens: int) -> list[str | None]:
    """Each step in the model's other words, one line, written greedily with nothing but the step in the prompt.

    None where it writes nothing, or the step itself.
    """
    asked = [REWORD.format(step=step) for step in steps]
    if getattr(tokenizer, "chat_template", None):
        turns = [[{"role": "user", "content": text}] for text in asked]
        prompts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    else:
        prompts = [f"{text}\n\nIn other words:" for text in asked]
    room = 2 * max(len(token_ids(step, tokenizer)) for step in steps) + 8
    texts = write_on(
        model, [context(prompt, (), tokenizer) for prompt in prompts], tokenizer, room, None, max_batch_tokens
    )
    lines = [text.strip().partition("\n")[0].strip() for text in texts]
    return [line if line and line != step.strip() else None for line, step in zip(lines, steps, strict=True)]
