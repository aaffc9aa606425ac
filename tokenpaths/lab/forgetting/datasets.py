"""Public data sets as tasks, read from a folder of their files.

A file that is missing is a `FileNotFoundError`; one that is not what it is named after a `TrailFileError`, which is a
`ValueError`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from tokenpaths.data.items import Choice, Task, Text, spaced
from tokenpaths.files import TrailFileError, read_text, strict_json


def wikitext2(folder: str | os.PathLike[str], windows: int = 16, characters: int = 1100) -> Task:
    """WikiText-2 test (Merity et al. 2016), `wikitext2/test.txt`: evenly spaced stretches that begin and end at words.

    Lengths are in characters, so that the task is the same for all tokenizers. A vocabulary of 50,000 tokens makes
    about 250 tokens of 1100 characters.

    Args:
        folder: that holds the file.
        windows: the number of stretches.
        characters: the length of a stretch, less a cut word at each end.

    Raises:
        ValueError: the stretches would overlap.
    """
    text = read_text(file := Path(folder) / "wikitext2/test.txt")
    stride = len(text) // windows
    if not 0 < characters < stride:
        raise ValueError(f"{windows} stretches of {characters} characters do not fit in {len(text)} characters")
    # the first and the last word of a stretch may be cut in two, and are left out
    stretches = (text[i * stride : i * stride + characters].split(" ", 1)[1].rsplit(" ", 1)[0] for i in range(windows))
    with _in(file):
        return Task("wikitext2", tuple(Text(stretch) for stretch in stretches), "WikiText-2 raw, test; CC BY-SA 3.0")


_TREC = {
    "ABBR": " abbreviation",
    "ENTY": " entity",
    "DESC": " description",
    "HUM": " person",
    "LOC": " location",
    "NUM": " number",
}


def trec(folder: str | os.PathLike[str], n: int | None = None) -> Task:
    """TREC-6 test (Li and Roth 2002), `trec/TREC.test`: which of six kinds of thing a question asks for.

    Questions that `trec/TREC.train` asks too are left out. `n` of the others are taken, evenly spaced; None for all.
    Raises `ValueError` for more than there are.
    """
    known = {question for _, question in _questions(Path(folder) / "trec/TREC.train")}
    told = list(_TREC)
    with _in(test := Path(folder) / "trec/TREC.test"):
        items = [
            Choice(tuple(_TREC.values()), told.index(kind), f"Question: {question}\nAnswer type:")
            for kind, question in _questions(test)
            if question not in known
        ]
    return Task("trec", tuple(spaced(items, n)), "TREC-6 test, without questions of the training set")


def trec_pairs(folder: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """The training set of `trec`, as pairs for `tokenpaths.encode`."""
    lines = _questions(Path(folder) / "trec/TREC.train")
    with _in(Path(folder) / "trec/TREC.train"):
        return [(f"Question: {question}\nAnswer type:", _TREC[kind]) for kind, question in lines]


def arc_easy(folder: str | os.PathLike[str], n: int | None = None) -> Task:
    """ARC-Easy test (Clark et al. 2018), `arc_easy/test.json`, as a cloze: each answer's text after the question.

    `n` items are taken, evenly spaced; None for all. Raises `ValueError` for more than there are.
    """
    items: list[Choice] = []
    with _in(file := Path(folder) / "arc_easy/test.json"):
        for item in strict_json(read_text(file)):
            asked = item["instruction"].removeprefix("Please choose the correct answer to the question: ")
            question, *told = re.split(r"\bAnswer\d+: ", asked.rsplit("\n\nAnswer format:", 1)[0])
            right, prompt = int(item["answer"].removeprefix("answer")) - 1, f"Question: {question.rstrip()}\nAnswer:"
            items.append(Choice(tuple(" " + answer.strip() for answer in told), right, prompt))
    return Task("arc_easy", tuple(spaced(items, n)), "ARC-Easy test; ODC-By and CC BY-SA 4.0")


def blimp(folder: str | os.PathLike[str], n: int | None = None) -> Task:
    """BLiMP (Warstadt et al. 2020), `blimp/*.jsonl`: a good sentence against a bad one.

    `n` pairs are taken, evenly spaced over the paradigms; None for all. Raises `ValueError` for more than there are.
    """
    files = sorted((Path(folder) / "blimp").glob("*.jsonl"))
    if not files:
        raise FileNotFoundError(f"{Path(folder) / 'blimp'} holds no file of BLiMP, *.jsonl")
    items: list[Choice] = []
    for file in files:
        with _in(file):
            pairs = [strict_json(line) for line in read_text(file).removesuffix("\n").split("\n")]
            items += [Choice((str(pair["sentence_good"]), str(pair["sentence_bad"])), 0) for pair in pairs]
    return Task("blimp", tuple(spaced(items, n)), f"BLiMP, {len(files)} paradigms; CC BY 4.0")


def _questions(file: Path) -> list[tuple[str, str]]:
    """Lines such as `NUM:count How many Os are there ?`, as kind and question."""
    with _in(file):
        parts = [re.split("[: ]", line, maxsplit=2) for line in read_text(file, "latin-1").splitlines()]
        return [(kind, question.strip()) for kind, _, question in parts]


@contextmanager
def _in(file: Path) -> Generator[None]:
    """Inside, whatever a file fails by is told as `TrailFileError`, with its name."""
    try:
        yield
    except (OSError, TrailFileError):
        raise
    except Exception as error:  # a damaged file may fail in any way
        told = f"{type(error).__name__}: {error}"
        raise TrailFileError(f"{file} is not the data set that it is named after ({told}): fetch it again") from error
