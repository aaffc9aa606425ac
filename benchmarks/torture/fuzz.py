"""Damaged files: none loads with other numbers, and none is refused with an error that is not documented.

run(folder)          # ten thousand mutants of tensors, and four hundred of each format, JSON included
run(folder, 400, 8)  # a quick look
"""

from __future__ import annotations

import signal
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.torture.formats import FORMATS, documented, files_of
from benchmarks.torture.mutants import mutant, resealed
from benchmarks.torture.partial import lines, tell

NUMBERS = ("trails", "trails, restored", "checkpoint", "cone store", "targets")
"""The formats whose mutants are read for changed numbers."""
PORTION = 100
LONGEST = 60
"""Seconds after which a loader is said to hang."""


def run(folder: Path, mutants: int = 10_000, each: int = 400) -> dict[str, Any]:
    """Read mutants, and go on where an earlier call with these arguments was stopped.

    Args:
        folder: where partial results are kept, as `fuzz.jsonl`.
        mutants: how many mutants of one to eight bytes are read, of all formats of numbers together.
        each: how many mutants of each format are read for errors that are not documented. A third of them have a right
            checksum or none.

    Returns:
        `fuzz_undetected` and `fuzz_foreign_exceptions`, the counts by format of what was refused, read with the same
        and read with other numbers, and the errors that were not documented.
    """
    file = folder / "fuzz.jsonl"
    done = {(line["law"], line["format"], line["first"], line["last"]): line for line in lines(file)}
    share = -(-mutants // len(NUMBERS))
    jobs = [("undetected", name, first, min(first + PORTION, share)) for name in NUMBERS for first in _from(share)]
    jobs += [("foreign", name, first, min(first + PORTION, each)) for name in FORMATS for first in _from(each)]
    found: list[dict[str, Any]] = []
    for job in jobs:
        if job not in done:
            done[job] = {**dict(zip(("law", "format", "first", "last"), job, strict=True)), **_portion(*job)}
            tell(file, done[job])
        found.append(done[job])
    return _counted(found)


def _from(count: int) -> range:
    return range(0, count, PORTION)


def _portion(law: str, name: str, first: int, last: int) -> dict[str, Any]:
    """Mutants of these numbers, each in one file of a format."""
    counts, errors = Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = FORMATS[name].write(Path(folder))
        sound, parts = FORMATS[name].read(path), files_of(path)
        contents = [part.read_bytes() for part in parts]
        for seed in range(first, last):
            place = seed % len(parts)
            change = resealed if law == "foreign" and seed % 3 == 0 else mutant
            parts[place].write_bytes(change(contents[place], seed))
            try:
                with _in_time():
                    counts["same" if FORMATS[name].read(path) == sound else "other"] += 1
            except Exception as error:
                counts["refused"] += 1
                if not documented(error, FORMATS[name].ours):
                    errors[f"{type(error).__name__}: {error!s:.100} (seed {seed})"] += 1
            parts[place].write_bytes(contents[place])
    return {"counts": dict(counts), "errors": dict(errors)}


class Hang(BaseException):
    """A loader took too long. Not an `Exception`, which a loader may turn into its own."""


@contextmanager
def _in_time() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(LONGEST)
    try:
        yield
    except Hang:
        raise RuntimeError(f"no answer within {LONGEST} s") from None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _counted(found: list[dict[str, Any]]) -> dict[str, Any]:
    by_format: dict[str, dict[str, Counter[str]]] = {"undetected": {}, "foreign": {}}
    errors = Counter[str]()
    for line in found:
        by_format[line["law"]].setdefault(line["format"], Counter()).update(line["counts"])
        errors.update({f"{line['format']}: {error}": count for error, count in line["errors"].items()})
    undetected = by_format["undetected"]
    return {
        "fuzz_undetected": sum(counts["other"] for counts in undetected.values()),
        "fuzz_foreign_exceptions": sum(errors.values()),
        "mutants": sum(sum(counts.values()) for counts in undetected.values()),
        "undetected_by_format": {name: dict(counts) for name, counts in undetected.items()},
        "foreign_by_format": {name: dict(counts) for name, counts in by_format["foreign"].items()},
        "errors": dict(errors),
    }
