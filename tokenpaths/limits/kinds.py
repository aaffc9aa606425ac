"""Kinds of text that a gate shall stay shut on: which texts are read, and what those that are held out promise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from jaxtyping import Bool, Float
from torch import Tensor

from tokenpaths.data.examples import Example
from tokenpaths.stats.intervals import at_most
from tokenpaths.stats.sampling import order

Kinds: TypeAlias = Sequence[Example] | Mapping[str, Sequence[Example]]
"""Examples of one kind of text, or of several by name."""
HELD = 4  # one text in 4 of each kind is held out
LEAST = 2 * HELD  # texts of each kind


@dataclass(frozen=True)
class Kind:
    """What was read of one kind of text, and what is promised of it.

    Args:
        name: its name in `other`; "other" where that is one list, and "task, elsewhere" for the tokens of the task's
            texts that its rule does not choose.
        texts: how many of its texts were read.
        given: how many there were.
        tokens: how many tokens these texts have.
        held: how many of the texts read were held out: no gate was fitted on them.
        opened: on how many of these some gate opens.
        promised: an unseen text of this kind keeps all gates shut with this probability at least.
        limit: with 95 % confidence, no more than this share of all such texts opens a gate.
    """

    name: str
    texts: int
    given: int
    tokens: int
    held: int
    opened: int
    promised: float
    limit: float

    def __str__(self) -> str:
        return (
            f"{self.name}: read {self.texts} of {self.given} texts, {self.tokens} tokens; a gate opens on "
            f"{self.opened} of {self.held} held-out texts (95 %: at most {self.limit:.1%} of all such); an unseen text "
            f"keeps all gates shut with probability {self.promised:.3f}"
        )


@dataclass(frozen=True)
class Text:
    """A text that is read: its kind, how many of that kind there are, and whether it is held out."""

    kind: str
    given: int
    example: Example
    held: bool


def drawn(name: str, given: Kinds, most: int, seed: int) -> list[Text]:
    """Texts of about `most` tokens: of each kind in turn, drawn at random, and one in four of each held out.

    Raises:
        ValueError: there is no kind, or one of fewer than 8 examples.
    """
    kinds = given if isinstance(given, Mapping) else {name: given}
    for kind, examples in kinds.items():
        if len(examples) < LEAST:
            told = f"{name}[{kind!r}]" if isinstance(given, Mapping) else name
            raise ValueError(f"{told} has {len(examples)} examples; a gate needs at least {LEAST}")
    if not kinds:
        raise ValueError(f"{name} holds no kind of text")
    shuffled = {kind: [examples[i] for i in order(len(examples), seed)] for kind, examples in kinds.items()}
    texts: list[Text] = []
    tokens = 0
    for number in range(max(map(len, shuffled.values()))):
        for kind, examples in shuffled.items():
            if number < len(examples) and (number < LEAST or tokens < most):
                texts.append(Text(kind, len(examples), examples[number], number % HELD == 0))
                tokens += len(examples[number])
    return texts


@dataclass(frozen=True)
class Level:
    """The excess that a share of a kind's unseen texts does not go beyond: the rank-th smallest of `held` of them."""

    kind: str
    excess: float
    rank: int
    held: int

    @property
    def promised(self) -> float:
        return self.rank / (self.held + 1)


def conformal_rank(kept: float, items: int) -> int:
    """The rank, from the smallest of n scores, that an unseen one is beyond with probability 1 - `kept` at most.

    It is ceil(kept (n + 1)). Where that is more than n, it takes `conformal_least(kept)` scores (Vovk et al. 2005).
    """
    return math.ceil(kept * (items + 1) - 1e-9)


def conformal_least(kept: float) -> int:
    """How many scores there must be for a rank among them."""
    return math.ceil(1 / (1 - kept) - 1 - 1e-9)


def levels(texts: Sequence[Text], excess: Float[Tensor, " texts"], shut: float | None) -> list[Level]:
    """The level of each kind: the ceil(shut (n + 1))-th smallest excess of its n held-out texts.

    Without `shut` it is the largest. Texts whose excess is -inf have no token to open on, and are left out.

    Raises:
        ValueError: the held-out texts of a kind are too few for `shut`.
    """
    found: list[Level] = []
    for kind in dict.fromkeys(text.kind for text in texts):
        values = sorted(
            value
            for text, value in zip(texts, excess.tolist(), strict=True)
            if text.kind == kind and text.held and value > -math.inf
        )
        if not values:
            continue
        rank = len(values) if shut is None else conformal_rank(shut, len(values))
        if shut is not None and rank > len(values):
            need = conformal_least(shut)
            raise ValueError(
                f"shut={shut} cannot be promised of {kind!r}: it takes {need} held-out texts of each kind, and "
                f"{len(values)} were held out, one in {HELD} of those read. Give {HELD * need} texts of each kind or a "
                "larger most=, or leave shut out and read what is promised"
            )
        found.append(Level(kind, values[rank - 1], rank, len(values)))
    return found


def told(level: Level, texts: Sequence[Text], opened: Bool[Tensor, " texts"]) -> Kind:
    """The report of a kind, with the texts on which some gate opens."""
    own = [(text, opens) for text, opens in zip(texts, opened.tolist(), strict=True) if text.kind == level.kind]
    return Kind(
        name=level.kind,
        texts=len(own),
        given=own[0][0].given,
        tokens=sum(len(text.example) for text, _ in own),
        held=level.held,
        opened=sum(text.held and opens for text, opens in own),
        promised=level.promised,
        # of texts beyond the rank-th of n, the share is beta(n - rank + 1, rank), whatever they are (Wilks 1941)
        limit=at_most(level.held - level.rank, level.held),
    )
