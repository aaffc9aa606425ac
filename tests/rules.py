"""The token rules that every law is run over: one line each. A new rule is one line here, and inherits all tests.

They are read with `TOKENIZER`, and with one span a row: `SPANS` for the three rows of `laws.ROWS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenpaths import All, Answer, AnswerFirst, First, Last, Match, Prompt, Span, Tokens
from tokenpaths.tokens import Rule

RULES: dict[str, Rule] = {
    "all": All(),
    "prompt": Prompt(),
    "answer": Answer(),
    "prompt | answer first": Prompt() | AnswerFirst(2),
    "first": First(2),
    "last": Last(1),
    "last 3": Last(3),
    "tokens": Tokens(range(3, 40)),
    "match": Match("[b-f]."),
    "span": Span("middle"),
    "first | last": First(1) | Last(1),
    "all - tokens": All() - Tokens(range(40, 90)),
    "answer & match": Answer() & Match("[a-m]"),
    "~last": ~Last(2),
}

SPANS = {"middle": [(1, 3), (0, 2), (1, 2)]}


class Letters:
    """A tokenizer whose tokens are one letter each."""

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(chr(97 + int(i) % 26) for i in ids)


TOKENIZER = Letters()
