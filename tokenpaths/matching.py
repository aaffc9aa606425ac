"""Regular expressions in the text of a row, as it is written token by token: what the rule `Match` reads.

What was found in the beginning of a row holds for all of it, so a row that has grown by a token costs that token: its
text is decoded behind the tokens before it, and its matches are sought from the last character on that no match can
hold. A pattern that may match any character, as `(?s).+`, is sought from the beginning of the text.
"""

from __future__ import annotations

import importlib
import re
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar

from tokenpaths.files import patterns

State = TypeVar("State")
Flags = tuple[bool, ...]
_STEPS = 8  # a row is known if one that is shorter by so much is: speculative decoding adds several tokens at once
_TOKENS = 2**20  # how many tokens of rows are remembered


def check_pattern(pattern: str) -> None:
    """Raise `ValueError` for what is no regular expression."""
    try:
        patterns.check(pattern)
    except ValueError as error:
        raise ValueError(f"Match({pattern!r:.80}) is not a regular expression: {error}") from None


def matched(pattern: str, texts: Sequence[str], given: Sequence[bool]) -> Flags:
    """Whether each token of a row overlaps a match: of a prompt as a whole, else of the text up to and with it.

    Args:
        pattern: a regular expression.
        texts: the text of each token.
        given: whether each token is of the prompt.
    """
    key = (pattern, tuple(texts), tuple(given))
    before = _MATCHED.longest(key)
    if before is None or any(given[len(before.chosen) :]):  # more of the prompt may change what was matched in it
        before = _Matched((), "", 0)
    found = _go_on(pattern, texts, given, before)
    _MATCHED.keep(key, found, len(texts))
    return found.chosen


def token_pieces(tokenizer: Any) -> Callable[[Sequence[int]], list[str]]:
    """A function from the ids of one sequence to the text of each token, for any Hugging Face `tokenizer`.

    The texts of all tokens, joined, are the decoded text; only a character that is unfinished at its end is missing.
    Each token is decoded behind the tokens before it, as streaming decoders do. So spaces and characters of several
    tokens come out right, and no piece depends on a later token.
    """
    memory: _Memory[tuple[tuple[str, ...], int, int]] = _Memory()

    @lru_cache(maxsize=65536)
    def decode(ids: tuple[int, ...]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def pieces(ids: Sequence[int]) -> list[str]:
        key = (tuple(ids),)
        known, anchor, read = memory.longest(key) or ((), 0, 0)
        texts = list(known)
        for end in range(len(texts) + 1, len(ids) + 1):
            text = decode(tuple(ids[anchor:end]))[len(decode(tuple(ids[anchor:read]))) :]
            if text.endswith("\ufffd"):  # an unfinished character: wait for its last token
                texts.append("")
                continue
            texts.append(text)
            anchor, read = read, end
        memory.keep(key, (tuple(texts), anchor, read), len(texts))
        return texts

    return pieces


@dataclass(frozen=True)
class _Matched:
    """What is known of a row: of each token whether it is chosen, their text, and where a match may still begin."""

    chosen: Flags
    text: str
    since: int


def _go_on(pattern: str, texts: Sequence[str], given: Sequence[bool], before: _Matched) -> _Matched:
    text = before.text + "".join(texts[len(before.chosen) :])
    stops, until = _stops(pattern), time.thread_time() + patterns.SECONDS

    def search(start: int, end: int) -> list[tuple[int, int]]:
        found = patterns.finditer(pattern, text, until - time.thread_time(), start=start, end=end)
        return [match.span() for match in found]

    chosen, known, since = list(before.chosen), len(before.chosen), before.since
    ends = list(_ends(texts[known:], len(before.text)))
    prompt_end = max((end for end, prompt in zip(ends, given[known:], strict=True) if prompt), default=0)
    # an empty match chooses nothing
    in_prompt = [span for span in search(0, prompt_end) if span[1] > span[0]] if prompt_end else []
    stop_of = [stop for _, stop in in_prompt]
    start = len(before.text)
    for end, prompt in zip(ends, given[known:], strict=True):
        if start == end:
            chosen.append(False)
        elif prompt:
            first = bisect_right(stop_of, start)
            chosen.append(first < len(stop_of) and in_prompt[first][0] < end)
        else:
            chosen.append(any(max(first, start) < last for first, last in search(since, end)))
        if stops is not None:
            since = next((i + 1 for i in range(end - 1, start - 1, -1) if stops(text[i])), since)
        start = end
    return _Matched(tuple(chosen), text, since)


def _ends(texts: Sequence[str], start: int) -> Iterator[int]:
    for text in texts:
        start += len(text)
        yield start


@lru_cache(maxsize=256)
def _stops(pattern: str) -> Callable[[str], bool] | None:
    """Whether a character can stand in no match of the pattern, so that none goes past it; None if it is not known."""
    names = ("re._parser", "re._compiler") if sys.version_info >= (3, 11) else ("sre_parse", "sre_compile")
    parser, compiler = map(importlib.import_module, names)
    try:
        parsed = parser.parse(pattern)
        leaves = list(_leaves(parser, parsed))
        if not leaves:  # as in "$", which takes no character at all
            return lambda character: True
        any_of = parser.SubPattern(parsed.state, [(parser.BRANCH, (None, leaves))])
        one: re.Pattern[str] = compiler.compile(any_of)
    except (_UnknownError, re.error, OverflowError, RecursionError, RuntimeError):
        return None
    return lru_cache(maxsize=4096)(lambda character: one.match(character) is None)


class _UnknownError(Exception):
    """A pattern has a part that is not looked through."""


def _leaves(parser: Any, parsed: Any) -> Iterator[Any]:
    """The parts of a parsed pattern that take one character each."""
    for kind, value in parsed:
        name = str(kind)
        if name in ("LITERAL", "NOT_LITERAL", "IN", "ANY"):
            yield parser.SubPattern(parsed.state, [(kind, value)])
        elif name == "SUBPATTERN":
            _, on, off, inside = value
            for leaf in _leaves(parser, inside):  # under the flags of the group
                yield parser.SubPattern(parsed.state, [(kind, (None, on, off, leaf))])
        elif name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            yield from _leaves(parser, value[2])
        elif name == "BRANCH":
            for branch in value[1]:
                yield from _leaves(parser, branch)
        elif name == "ATOMIC_GROUP":
            yield from _leaves(parser, value)
        elif name not in ("AT", "ASSERT", "ASSERT_NOT", "FAILURE"):  # these take none
            raise _UnknownError


class _Memory(Generic[State]):
    """What is known of the latest rows, so that a longer one goes on where it ended."""

    def __init__(self) -> None:
        self.known: dict[Hashable, tuple[State, int]] = {}
        self.tokens = 0
        self.lock = threading.Lock()

    def longest(self, key: tuple[Any, ...]) -> State | None:
        """The state of the row, or of the longest beginning of it that is known."""
        length = len(key[-1])
        for size in range(length, max(0, length - _STEPS) - 1, -1):
            part = tuple(each if isinstance(each, str) else each[:size] for each in key)
            if (found := self.known.get(part)) is not None:
                return found[0]
        return None

    def keep(self, key: Hashable, state: State, tokens: int) -> None:
        """Remember a row, and forget the oldest."""
        with self.lock:
            _, before = self.known.pop(key, (None, 0))
            self.known[key] = state, tokens
            self.tokens += tokens - before
            while self.tokens > _TOKENS:
                self.tokens -= self.known.pop(next(iter(self.known)))[1]


_MATCHED: _Memory[_Matched] = _Memory()
