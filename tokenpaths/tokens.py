r"""Token rules: which tokens a trail moves.

A rule is a small value that turns what is known of a batch into a mask::

    First(2) | Last(1)        the first two prompt tokens and the last one
    Answer() - Tokens([198])  what the model writes, but not its newlines
    Match(r"\d+") & Prompt()  the digits of the question

Rules count positions among the real tokens, without padding. The same tokens are chosen with left padding, with right
padding and while decoding from a key/value cache. Every rule is **causal after the prompt**: whether a generated token
is chosen never depends on the tokens after it, so cached generation and a full forward agree.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tokenpaths.matching import check_pattern, matched
from tokenpaths.matching import token_pieces as token_pieces

_LARGEST = 2**63  # what an int64 tensor can be compared with


@dataclass(frozen=True, eq=False)
class Context:
    """What is known of a batch of token sequences. Columns run from the first cached token to the last known one.

    Args:
        real: which tokens are not padding.
        prompt: which tokens the model is given; it writes the others, or is trained to write them.
        ids: the token ids, with -1 for a token that was cached before `attach`; None without `input_ids`.
        spans: a mask for each named span.
        pieces: a function from the ids of one sequence to the text of each token; None without a tokenizer.
    """

    real: Bool[Tensor, "batch total"]
    prompt: Bool[Tensor, "batch total"]
    ids: Int[Tensor, "batch total"] | None = None
    spans: Mapping[str, Bool[Tensor, "batch total"]] = field(default_factory=dict[str, Tensor])
    pieces: Callable[[Sequence[int]], list[str]] | None = None


@dataclass(frozen=True)
class Rule(ABC):
    """A choice of tokens. `|`, `&`, `-` and `~` combine rules. Your own rule is a frozen dataclass with `choose`."""

    @abstractmethod
    def choose(self, context: Context) -> Bool[Tensor, "batch total"]:
        """The chosen tokens; padding is ignored. Raises `ValueError` if the context lacks what the rule reads."""

    def mask(self, context: Context) -> Bool[Tensor, "batch total"]:
        """The chosen tokens, without padding."""
        return self.choose(context) & context.real

    def __or__(self, other: Rule) -> Rule:
        return Either(self, other)

    def __and__(self, other: Rule) -> Rule:
        return Both(self, other)

    def __sub__(self, other: Rule) -> Rule:
        return Without(self, other)

    def __invert__(self) -> Rule:
        return Not(self)


@dataclass(frozen=True)
class All(Rule):
    """Every token."""

    def choose(self, context: Context) -> Bool[Tensor, "batch total"]:
        return context.real


@dataclass(frozen=True)
class Prompt(Rule):
    """The tokens that the model is given: all of them at prefill, those before the first label when training."""

    def choose(self, context: Context) -> Bool[Tensor, "batch total"]:
        return context.prompt & context.real


@dataclass(frozen=True)
class Answer(Rule):
    """The tokens that the model writes, or is trained to write: every real token that is not of the prompt."""

    def choose(self, context: Context) -> Bool[Tensor, "batch total"]:
        return context.real & ~context.prompt


@dataclass(frozen=True)
class Counted(Rule):
    """A rule that chooses `n` tokens. Raises `ValueError` unless n is a whole number from 1 up."""

    n: int = 1

    def __post_init__(self) -> None:
        whole = isinstance(self.n, int) and not isinstance(self.n, bool)  # pyright: ignore[reportUnnecessaryIsInstance]
        if not whole or not 1 <= self.n < _LARGEST:
            raise ValueError(f"{self} must choose at least one token: n is a whole number from 1 up")


@dataclass(frozen=True)
class AnswerFirst(Counted, Answer):
    """The first `n` tokens of the answer (all of a shorter answer).

    BREP (Liang et al. 2025, arXiv 2511.10707) steers the prompt and the beginning of what follows it:
    `Prompt() | AnswerFirst(8)`.
    """

    def choose(self, context: Context) -> Bool[Tensor, "batch total"]:
        answer = Answer().choose(context)
        return answer & (answer.cumsum(1) <= self.n)


@dataclass(frozen=True)
class First(Counted):
    """The first `n` tokens of the prompt (all of a shorter prompt)."""

    def choose(self, context: Context) -> Bool[Tensor, "batch total"]:
        prompt = context.prompt & context.real
        return prompt & (prompt.cumsum(1) <= self.n)


@dataclass(frozen=True)
class Last(Counted):
    """The last `n` tokens of the prompt (all of a shorter prompt), also while decoding: never the newest token."""

    def choose(self, context: Context) -> Bool[Tensor, "batch total"]:
        prompt = context.prompt & context.real
        return prompt & (prompt.sum(1, keepdim=True) - prompt.cumsum(1) < self.n)


@dataclass(frozen=True)
class Tokens(Rule):
    """Every token, of prompt or answer, whose id is one of `ids`.

    Raises `TypeError` for what is no sequence of whole numbers, and `ValueError` for an empty one or a negative id.
    """

    ids: Iterable[int]

    def __post_init__(self) -> None:
        try:
            given = list(self.ids)
            ids = None if any(isinstance(i, bool) for i in given) else tuple(sorted({index(i) for i in given}))
        except TypeError:
            ids = None
        if ids is None:
            raise TypeError(f"Tokens takes a sequence of token ids, as in Tokens([198, 13]), not {self.ids!r}")
        if not ids:
            raise ValueError("Tokens([]) would choose nothing: give at least one token id")
        if ids[0] < 0 or ids[-1] >= _LARGEST:
            raise ValueError(f"{self}: token ids are whole numbers from 0 up")
        object.__setattr__(self, "ids", ids)

    def choose(self, context: Context) -> Bool[Tensor, "batch total"]:
        ids = _ids(self, context)
        return torch.isin(ids, torch.tensor(list(self.ids), device=ids.device))


@dataclass(frozen=True)
class Match(Rule):
    """Every token that overlaps a match of a regular expression (as of Python's `re`) in the decoded text.

    The prompt is matched as a whole. A token of the answer is chosen if a match in the text *up to and including* it
    overlaps it, so that decoding token by token chooses the same tokens. A character whose bytes are spread over
    several tokens belongs to the last of them. The rule needs `attach(..., tokenizer=)`.

    A pattern may come from a file, so a text that takes it longer than five seconds is refused, with `ValueError`.

    Raises `TypeError` for a pattern that is no string, and `ValueError` for one that `re` cannot compile.
    """

    pattern: str

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"Match takes a regular expression as a string, not {self.pattern!r}")
        check_pattern(self.pattern)

    def choose(self, context: Context) -> Bool[Tensor, "batch total"]:
        ids = _ids(self, context)
        if context.pieces is None:
            raise ValueError(f"{self} reads the decoded text: give attach(..., tokenizer=your_tokenizer)")
        rows = [
            self._choose_row(row_ids[real].tolist(), prompt[real].tolist(), context.pieces)
            for row_ids, real, prompt in zip(ids, context.real, context.prompt, strict=True)
        ]
        chosen = torch.zeros_like(context.real)
        chosen[context.real] = torch.tensor(sum(rows, []), dtype=torch.bool, device=chosen.device)
        return chosen

    def _choose_row(
        self, ids: list[int], prompt: list[bool], pieces: Callable[[Sequence[int]], list[str]]
    ) -> list[bool]:
        if any(i < 0 for i in ids):
            raise ValueError(f"{self} needs the ids of all earlier tokens, but the cache was filled before attach()")
        return list(matched(self.pattern, pieces(ids), prompt))


@dataclass(frozen=True)
class Span(Rule):
    """A named span of each example: `Span("steps")` reads the `spans["steps"]` that `Example` or `attach` was given.

    Raises `TypeError` for a name that is no string.
    """

    name: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"Span takes the name of a span as a string, not {self.name!r}")

    def choose(self, context: Context) -> Bool[Tensor, "batch total"]:
        if self.name not in context.spans:
            known = ", ".join(sorted(context.spans)) or "none"
            raise ValueError(f"{self} needs a span of that name for each example, but the spans given are: {known}")
        return context.spans[self.name]


@dataclass(frozen=True)
class Pair(Rule):
    """A combination of two rules. Raises `TypeError` for what is no rule."""

    left: Rule
    right: Rule
    sign: ClassVar[str]

    def __post_init__(self) -> None:
        if not (isinstance(self.left, Rule) and isinstance(self.right, Rule)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"{self}: both sides must be token rules, as in First(2) {self.sign} Last(1)")

    def __repr__(self) -> str:
        return f"({self.left!r} {self.sign} {self.right!r})"


class Either(Pair):
    """`left | right`."""

    sign = "|"

    def choose(self, context: Context) -> Bool[Tensor, "batch total"]:
        return self.left.mask(context) | self.right.mask(context)


class Both(Pair):
    """`left & right`."""

    sign = "&"

    def choose(self, context: Context) -> Bool[Tensor, "batch total"]:
        return self.left.mask(context) & self.right.mask(context)


class Without(Pair):
    """`left - right`."""

    sign = "-"

    def choose(self, context: Context) -> Bool[Tensor, "batch total"]:
        return self.left.mask(context) & ~self.right.mask(context)


@dataclass(frozen=True)
class Not(Rule):
    """`~rule`: the real tokens that the rule does not choose. Raises `TypeError` for what is no rule."""

    rule: Rule

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Rule):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"Not takes a token rule, not {self.rule!r}")

    def choose(self, context: Context) -> Bool[Tensor, "batch total"]:
        return ~self.rule.mask(context)

    def __repr__(self) -> str:
        return f"~{self.rule!r}"


def leaves(rule: Rule) -> Iterator[Rule]:
    """The rules that a combined rule is made of, from left to right, down to those that hold no other."""
    parts = [value for value in vars(rule).values() if isinstance(value, Rule)]
    if not parts:
        yield rule
    for part in parts:
        yield from leaves(part)


def _ids(rule: Rule, context: Context) -> Int[Tensor, "batch total"]:
    if context.ids is None:
        raise ValueError(f"{rule} reads token ids, but the model was called without input_ids")
    return context.ids
