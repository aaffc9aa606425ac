"""What a model is asked: questions with answers, choices and texts; and tasks, which are data and not code.

    Question("3 + 4 =", answer=" 7")                            the model writes, and its answer is read and compared
    Choice((" Paris", " Rome"), 0, "The capital of France is")  the likeliest option is compared with the right one
    Text("A whole text.")                                       its likelihood is measured

A task is one JSONL file. Its first line is a header, and each further line an item::

    {"kind": "text", "name": "letters", "note": "where it is from, its licence"}
    {"text": "A whole text, scored from its second token on."}
    {"text": " and this is what follows.", "prompt": "This is not scored,"}

    {"kind": "choice", "name": "capitals", "note": ""}
    {"prompt": "The capital of France is", "options": [" Paris", " Rome"], "right": 0}
    {"options": ["The cats sleep.", "The cats sleeps."], "right": 0}

Without a prompt the options are whole sentences, one of which is right (a minimal pair, as in BLiMP). A prompt and what
follows it are tokenised apart, so what follows must begin with its own space.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias, TypeVar

from tokenpaths.files import TrailFileError, read_lines, strict_json, write_json

T = TypeVar("T")


@dataclass(frozen=True)
class Text:
    """A text whose likelihood is measured: behind its prompt, or from its second token on if it has no prompt."""

    text: str
    prompt: str = ""

    def __post_init__(self) -> None:
        if not self.text:
            raise ValueError("the text is empty: there is nothing in it to predict")


@dataclass(frozen=True)
class Choice:
    """Options, of which number `right` is right: continuations of a prompt, or whole sentences without one."""

    options: tuple[str, ...]
    right: int
    prompt: str = ""

    def __post_init__(self) -> None:
        if len(set(self.options)) != len(self.options) or len(self.options) < 2 or not all(self.options):
            raise ValueError(
                f"a choice needs two options or more, all different and none empty, not {list(self.options)!r:.80}"
            )
        if not 0 <= self.right < len(self.options):
            raise ValueError(f"right is {self.right}, but must be the number of one of {len(self.options)} options")


@dataclass(frozen=True)
class Question:
    """What a model is asked, and the right answer to what it writes.

    Args:
        prompt: the text before what the model writes.
        answer: the right answer, as it is read from a text. Empty if it is not known.
        chain: a worked solution, up to the answer and with it.
        options: the answers to choose from, the right one among them.
        domain: the field that the question belongs to.
    """

    prompt: str
    answer: str
    chain: str = ""
    options: tuple[str, ...] = ()
    domain: str = ""


Item: TypeAlias = "Text | Choice"


@dataclass(frozen=True)
class Task:
    """Items of one kind under a name; `note` says where they are from."""

    name: str
    items: tuple[Item, ...]
    note: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a task needs a name, to be told from others in a report")
        if {type(item) for item in self.items} not in ({Text}, {Choice}):
            raise ValueError(f"task {self.name!r} must have items, all Text or all Choice")

    @property
    def kind(self) -> str:
        """The kind of the items: "text" or "choice"."""
        return "text" if isinstance(self.items[0], Text) else "choice"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the task to one JSONL file with a checksum in its header, whole or not at all."""
        header = {"kind": self.kind, "name": self.name, "note": self.note}
        items = ({key: value for key, value in asdict(item).items() if value != ""} for item in self.items)
        write_json(path, header, items)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Task:
        """Read what `save` wrote, or any file of the form above. One without a checksum is read unchecked.

        Raises:
            FileNotFoundError: there is no such file.
            IsADirectoryError: it is a folder.
            TrailFileError: the file is not of that form, and the error names the line; or it was changed since it was
                written. It is a `ValueError`.
        """
        lines = read_lines(path)
        number, items = 1, list[Item]()
        try:
            if lines == [""]:
                raise ValueError('the file is empty: it should begin with {"kind": "text" or "choice", "name": ...}')
            header = _record(lines[0], {"kind", "name"}, {"note", "sha256"})
            if header["kind"] not in ("text", "choice"):
                raise ValueError(f'kind is {header["kind"]!r}, but must be "text" or "choice"')
            for line in lines[1:]:
                number += 1  # the error names it
                if header["kind"] == "text":
                    items.append(Text(**_record(line, {"text"}, {"prompt"})))
                else:
                    items.append(Choice(**_record(line, {"options", "right"}, {"prompt"})))
            return cls(header["name"], tuple(items), header.get("note", ""))
        except ValueError as error:
            raise TrailFileError(f"{os.fspath(path)}, line {number}: {error}") from error


def spaced(items: Sequence[T], n: int | None) -> list[T]:
    """`n` of the items, evenly spaced; all of them where `n` is None."""
    if n is None:
        return list(items)
    if not 0 < n <= len(items):
        raise ValueError(f"{n} of {len(items)} items were asked for")
    return [items[i * len(items) // n] for i in range(n)]


def _record(line: str, needed: set[str], known: set[str]) -> dict[str, Any]:
    """The JSON object on a line, which has all keys of `needed` and no key beyond these and `known`."""
    value = strict_json(line)
    if not isinstance(value, dict):
        raise ValueError(f"a line holds a JSON object, not {line:.40}")
    if missing := sorted(needed - set(value)):
        raise ValueError(f"{missing[0]!r} is missing; the line has {', '.join(sorted(value)) or 'no keys'}")
    if strange := sorted(set(value) - needed - known):
        raise ValueError(f"{strange[0]!r} is no key of this form, which has {', '.join(sorted(needed | known))}")
    return {key: _typed(key, part) for key, part in value.items()}


def _typed(key: str, value: Any) -> Any:
    """What JSON gives, as an item holds it: options a tuple of strings, `right` a whole number, all else strings."""
    if key == "options" and isinstance(value, list) and all(isinstance(option, str) for option in value):
        return tuple(value)
    wanted = {"options": "a list of strings", "right": "a whole number"}.get(key, "a string")
    if key == "options" or type(value) is not (int if key == "right" else str):
        raise ValueError(f"{key} must be {wanted}, not {json.dumps(value):.40}")
    return value
