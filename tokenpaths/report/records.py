"""Reports in files: dataclasses as JSON, and back by their annotations. Nothing in a file is executed or imported."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from typing import Any, ClassVar, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from tokenpaths import files

R = TypeVar("R", bound="Record")


class Record:
    """A frozen dataclass that can be written to a JSON file, and read back equal.

    JSON has no infinity and no NaN: they become null. Read back, null is NaN; in an interval (a pair of floats) it is
    minus or plus infinity; in a field with the metadata {"null": x} it is x.
    """

    what: ClassVar[str] = "a report"
    """What the file is, for the error that refuses another."""
    derived: ClassVar[tuple[str, ...]] = ()
    """Names of properties that are written before the fields, for a reader of the file. Reading passes over them."""

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one JSON file with its checksum, whole or not at all."""
        told = {name: getattr(self, name) for name in self.derived} | asdict(cast("Any", self))
        files.write_json(path, finite(told), indent=1)

    @classmethod
    def from_json(cls: type[R], path: str | os.PathLike[str]) -> R:
        """Read what `to_json` wrote.

        A file without a checksum, as earlier versions and people write, is read too.

        Raises:
            FileNotFoundError: there is no such file.
            IsADirectoryError: it is a folder.
            TrailFileError: it is any other file, or was changed since it was written. It is a `ValueError`.
        """
        try:
            found = {key: value for key, value in files.read_json(path).items() if key not in cls.derived}
            return cast("R", _built(cls, found))
        except OSError:
            raise
        except Exception as error:  # what is damaged may fail in any way
            raise files.TrailFileError(f"{os.fspath(path)} is not {cls.what} as to_json writes it: {error}") from error


def finite(value: Any) -> Any:
    """The same value, with None for infinities and NaN, and lists for tuples."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in cast("dict[Any, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in cast("list[Any]", value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _built(kind: Any, value: Any) -> Any:
    """What `finite` made JSON of, built again by the annotations of a dataclass or of its parts."""
    if is_dataclass(kind):
        hints, make = get_type_hints(kind), cast("Callable[..., Any]", kind)
        needed = {field.name for field in fields(kind) if field.default is MISSING}  # others came to older files later
        if not needed <= set(value) <= {field.name for field in fields(kind)}:
            raise ValueError(f"its keys are {', '.join(sorted(value)):.200}")
        given = [field for field in fields(kind) if field.name in value]
        return make(**{field.name: _field(field, hints[field.name], value[field.name]) for field in given})
    origin, parts = get_origin(kind), get_args(kind)
    if kind == tuple[float, float]:
        low, high = value
        return (-math.inf if low is None else float(low), math.inf if high is None else float(high))
    if origin is tuple:
        kinds = [parts[0]] * len(value) if parts[-1] is Ellipsis else parts
        return tuple(_built(part, each) for part, each in zip(kinds, value, strict=True))
    if origin is dict:
        return {_built(parts[0], key): _built(parts[1], each) for key, each in value.items()}
    if origin is Literal:
        if value not in parts:
            raise ValueError(f"{value!r:.40} is none of {', '.join(map(repr, parts))}")
        return value
    if origin is Union or type(None) in parts:
        return None if value is None else _built(parts[0], value)
    if kind is float:
        return math.nan if value is None else float(value)
    if kind is not Any and type(value) is not kind:
        raise TypeError(f"{value!r:.40} should be of type {kind.__name__}")
    return value


def _field(field: Field[Any], kind: Any, value: Any) -> Any:
    return field.metadata["null"] if value is None and "null" in field.metadata else _built(kind, value)
