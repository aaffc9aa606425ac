"""What is said of an argument of the wrong kind: what came, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any


def as_whole(what: str, value: Any, least: int | None = 1) -> int:
    """A whole number from `least` up, numpy's too, as an `int`.

    Raises `TypeError` for what is no whole number, as "4", 4.0 or True, and `ValueError` for a smaller one.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{what}={quoted(value)} must be a whole number, not {kind(value)}")
    if least is not None and value < least:
        raise ValueError(f"{what}={value} must be at least {least}")
    return int(value)


def as_number(what: str, value: Any) -> float:
    """A number, numpy's too. Raises `TypeError` for what is none, as "0.5", True or None."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{what} {quoted(value)} must be a number, not {kind(value)}")
    return float(value)


def check_list(what: str, items: Any, of: type | tuple[type, ...], instead: str) -> None:
    """Raise `TypeError` unless `items` is a list, or another sequence, of the kind wanted; it may be empty.

    Args:
        what: what takes it, as "Imitate: example", which the number of an item follows.
        items: what was given.
        of: the class, or classes, of an item.
        instead: what to give or do instead.
    """
    wanted = " or ".join(cls.__name__ for cls in (of if isinstance(of, tuple) else (of,)))
    if isinstance(items, of):
        raise TypeError(f"{what}s are given as a list, not as one {kind(items)}: put it in brackets, [...]")
    numbered = hasattr(items, "__len__") and hasattr(items, "__getitem__")
    if isinstance(items, (str, bytes, Mapping, type)) or not numbered:
        listed = " (a generator can be read once only: list(...))" if hasattr(items, "__next__") else ""
        raise TypeError(f"{what}s are a list of {wanted}, not {kind(items)}{listed}: {instead}")
    for place in range(len(items)):
        if not isinstance(items[place], of):
            raise TypeError(f"{what} {place} is {quoted(items[place])}, not of the kind {wanted}: {instead}")


def kind(value: Any) -> str:
    """What a value is, in a word: its class, or the class that it is."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def quoted(value: Any) -> str:
    """A value as Python writes it, cut and in one line, whatever its own `repr` does."""
    try:
        return f"{' '.join(map(str.strip, repr(value).splitlines())):.80}"
    except Exception:
        return f"<{type(value).__name__}>"
