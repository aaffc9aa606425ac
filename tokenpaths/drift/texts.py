"""What drift is given, checked: its texts, and its measures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenpaths.checking import as_whole, quoted
from tokenpaths.data.examples import Example
from tokenpaths.data.tokenizing import check_tokenizer, tokenized


def check_functions(**given: Any) -> None:
    """Raise `TypeError` for measures that are no list of functions."""
    for name, functions in given.items():
        if callable(functions):
            raise TypeError(f"{name} is a list of functions, not one: give {name}=[{quoted(functions)}]")
        if wrong := [function for function in functions if not callable(function)]:
            raise TypeError(f"{name} are functions, as in tokenpaths.drift.kl, not {quoted(wrong[0])}")


def examples_of(texts: Sequence[str] | Sequence[Example], tokenizer: Any, max_length: int) -> list[Example]:
    """The texts as examples: a string is prompt throughout, an `Example` stays as it is. Raises as `measure_drift`."""
    as_whole("drift: max_length", max_length)
    if isinstance(texts, (str, Example)):
        raise TypeError(f"drift takes a list of texts, not {type(texts).__name__}: give [text]")
    if not isinstance(texts, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"drift takes a list of texts or Examples, not {type(texts).__name__}: give list(texts)")
    if not texts:
        raise ValueError("drift was given no texts")
    if tokenizer is not None:
        check_tokenizer(tokenizer)
    examples: list[Example] = []
    for index, text in enumerate(texts):
        if not isinstance(text, (str, Example)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"text {index} is {type(text).__name__}, but drift takes strings and Examples: make Examples of pairs "
                "and chats with encode(pairs, tokenizer)"
            )
        if isinstance(text, str) and tokenizer is None:
            raise ValueError("drift on strings needs the tokenizer: measure_drift(model, trails, texts, tokenizer)")
        ids = tokenized(tokenizer, text)[:max_length] if isinstance(text, str) else text.ids
        if len(ids) < 2:
            raise ValueError(f"text {index} has {len(ids)} tokens; drift needs at least two")
        examples.append(Example.of(ids) if isinstance(text, str) else text)
    return examples
