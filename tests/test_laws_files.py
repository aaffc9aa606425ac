"""Laws of files, over the list of all formats in benchmarks/torture/formats.py: a new loader is one line there."""

from __future__ import annotations

import os
import random
import re
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.torture.formats import FORMATS, documented, files_of
from benchmarks.torture.mutants import mutant, resealed
from tokenpaths.files import TrailFileError

pytestmark = [
    pytest.mark.usefixtures("unchecked"),
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning"),
]
EVERY = pytest.mark.parametrize("name", FORMATS)
OURS = pytest.mark.parametrize("name", [name for name, each in FORMATS.items() if each.ours])


@contextmanager
def in_time(seconds: int = 20) -> Iterator[None]:
    """A loader that hangs is an error."""

    def ring(*_: Any) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(name: str, path: Path) -> Exception | None:
    """What a loader refuses a path with; None if it reads it. Any other error is not caught."""
    with in_time():
        try:
            FORMATS[name].read(path)
        except Exception as error:
            if not documented(error, FORMATS[name].ours):
                raise
            return error
    return None


@EVERY
def test_what_is_written_is_read_back_equal(name, tmp_path):
    first, second = (FORMATS[name].write(tmp_path / each) for each in "ab")
    assert FORMATS[name].read(first) == FORMATS[name].read(second) == FORMATS[name].read(first)
    left = {path.name for path in tmp_path.rglob("*")}
    assert not [each for each in left if each.startswith(".")]


@OURS
def test_one_flipped_bit_in_any_file_is_noticed(name, tmp_path):
    path = FORMATS[name].write(tmp_path)
    rng = random.Random(0)
    for file in files_of(path):
        content = file.read_bytes()
        for place in rng.sample(range(len(content)), min(24, len(content))):
            file.write_bytes(content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :])
            error = refused(name, path)
            assert isinstance(error, TrailFileError), f"byte {place} of {file.name}"
            assert str(path.name) in str(error)
        file.write_bytes(content)
    assert refused(name, path) is None


@EVERY
def test_a_damaged_file_is_refused_with_the_documented_error(name, tmp_path):
    path = FORMATS[name].write(tmp_path)
    for file in files_of(path):
        content = file.read_bytes()
        for seed in range(12):
            file.write_bytes((mutant if seed % 3 else resealed)(content, seed))
            refused(name, path)
        for length in (0, 1, len(content) // 3, len(content) - 1):
            file.write_bytes(content[:length])
            error = refused(name, path)
            assert error is not None or not FORMATS[name].ours, f"{file.name} cut after {length} bytes is read"
        file.write_bytes(content)


HOSTILE = {
    "no UTF-8": b"\xff\xfe\x00\x9c" * 50,
    "deep": b"[" * 100_000,
    "deep object": b'{"a":' * 50_000,
    "null": b"null",
    "a list": b"[1]",
    "an empty object": b"{}",
    "a huge number": b'{"capacity": 1' + b"0" * 400 + b"}",
    "not finite": b'{"value": NaN}',
    "a length": b"\xff" * 8 + b"{}",
    "a key twice": b'{"a": 1, "a": 2}',
    "control characters": b'{"\\u001b[31m\\ud800": "\\u001b]0;x\\u0007"}',
    "nothing but spaces": b" " * 50_000,
}


@EVERY
def test_a_file_of_something_else_is_refused_with_the_documented_error(name, tmp_path):
    path = FORMATS[name].write(tmp_path)
    for file in files_of(path):
        content = file.read_bytes()
        for what, bad in HOSTILE.items():
            file.write_bytes(bad)
            error = refused(name, path)
            assert error is not None or not FORMATS[name].ours, what
            assert not re.search("[\0-\x08\x0e-\x1f\ud800-\udfff]", str(error)), "it cannot steer a terminal"
        file.write_bytes(content)


@EVERY
def test_what_is_no_file_does_not_hang(name, tmp_path):
    path = FORMATS[name].write(tmp_path)
    for file in files_of(path):
        content = file.read_bytes()
        for put in (
            lambda file: os.mkfifo(file),
            lambda file: file.symlink_to("/dev/zero"),
            lambda file: file.symlink_to("/dev/urandom"),
            lambda file: file.symlink_to(file.name),  # in a circle
            lambda file: file.mkdir(),
        ):
            file.unlink()
            put(file)
            error = refused(name, path)
            assert error is not None or not FORMATS[name].ours or "checksums.json" in file.name, file.name
            file.rmdir() if file.is_dir() else file.unlink()
            file.write_bytes(content)
        file.unlink()
        needed = FORMATS[name].ours and name != "cone store" and file.name != "checksums.json"
        assert isinstance(refused(name, path), OSError | TrailFileError) or not needed
        file.write_bytes(content)
    missing = refused(name, tmp_path / "nowhere" / "at all")
    assert isinstance(missing, FileNotFoundError) or name == "cone store"


@OURS
def test_a_file_keeps_its_mode_and_a_link_stays_a_link(name, tmp_path):
    path = FORMATS[name].write(tmp_path / "a")
    if not path.is_file():
        return
    path.chmod(0o600)
    FORMATS[name].write(tmp_path / "a")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (tmp_path / "b").mkdir()
    path.rename(tmp_path / "kept")
    path.symlink_to(tmp_path / "kept")
    before = (tmp_path / "kept").stat().st_ino
    FORMATS[name].write(tmp_path / "a")
    assert path.is_symlink() and (tmp_path / "kept").stat().st_ino != before
    assert stat.S_IMODE((tmp_path / "kept").stat().st_mode) == 0o600
    assert refused(name, path) is None
