"""Regular expressions that a file or a user gives, matched within a bound of time.

Some patterns take twice as long with each further character, as `(a+)+$` does in most engines. Python's `re` cannot be
stopped meanwhile; the package `regex` can. A pattern means what it means in `re`.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

SECONDS = 5.0
"""How long one text may take, of the processor."""
LONGEST = 10_000
"""The most characters of a pattern."""
# a backslash and what it takes the meaning of, a set, or a brace that is no repeat: `re` takes that one literally
_BRACES = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(?!\d*,?\d*\})", re.DOTALL)


def check(pattern: str) -> None:
    """Raise `ValueError` for what is no regular expression of Python's `re`, or is longer than 10,000 characters."""
    if len(pattern) > LONGEST:
        raise ValueError(f"it has {len(pattern):,} characters, and the most is {LONGEST:,}")
    try:
        re.compile(pattern)
        _compiled(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from None


def finditer(pattern: str, text: str, seconds: float = SECONDS, *, start: int = 0, end: int | None = None) -> list[Any]:
    """The matches of a pattern in `text[start:end]`, as the `finditer` of a compiled pattern of `re` gives them.

    Raises `ValueError`, which names the pattern, where that takes longer than `seconds`.
    """
    try:
        return list(_compiled(pattern).finditer(text, start, end, timeout=max(seconds, 1e-3)))
    except TimeoutError:
        raise ValueError(
            f"the pattern {pattern!r:.80} was not matched within {SECONDS:g} s in a text of {len(text):,} characters: "
            "it tries too many ways; write it without a repeat inside a repeat, as a+ for (a+)+"
        ) from None


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> Any:
    import regex

    literal = _BRACES.sub(lambda found: r"\{" if found.group() == "{" else found.group(), pattern)
    try:
        return regex.compile(literal, regex.VERSION0)
    except regex.error as error:
        raise re.error(str(error)) from None
