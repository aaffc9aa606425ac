"""Files and folders that are written whole or not at all, and JSON that is read strictly."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from tokenpaths import files
from tokenpaths.files import TrailFileError, strict_json, whole

NAMES = ["t", "new", "earlier", ".earlier", ".writing-", "a b.json", "é" * 120]


def tree(folder: Path) -> dict[str, str | None]:
    """What lies in a folder: the text of each file, None for a folder."""
    found = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_text() if p.is_file() else None for p in found}


def fill(path: Path, text: str) -> None:
    """Make a folder with a file, and a folder with a file in it."""
    (path / "deep").mkdir(parents=True)
    (path / "one").write_text(text)
    (path / "deep/two").write_text(text)


def filled(name: str, text: str) -> dict[str, str | None]:
    return {name: None, f"{name}/deep": None, f"{name}/deep/two": text, f"{name}/one": text}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_made_and_replaced(tmp_path, name):
    for text in ("first", "second"):
        with whole(tmp_path / name) as beside:
            assert beside.name == name and not beside.exists()
            beside.write_text(text)
            assert (tmp_path / name).exists() == (text == "second"), "nothing changes before the end"
        assert tree(tmp_path) == {name: text}


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_made_and_replaced(tmp_path, name):
    fill(tmp_path / "deep", "other")
    (tmp_path / "deep").rename(tmp_path / "beside it")
    for text in ("first", "second"):
        with whole(str(tmp_path / name)) as beside:
            fill(beside, text)
            (beside / text).write_text("")
        assert tree(tmp_path) == {**filled("beside it", "other"), **filled(name, text), f"{name}/{text}": ""}


def test_folders_above_are_made_and_a_relative_path_will_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files.write_text("a/b/c", "text")
    files.write_text("plain", "caf\u00e9 \ud800")
    assert (tmp_path / "a/b/c").read_text() == "text"
    assert (tmp_path / "plain").read_text(encoding="utf-8") == "caf\u00e9 ?"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("write", [lambda path: path.write_text("half"), lambda path: fill(path, "half")])
@pytest.mark.parametrize("before", [None, "file", "folder"])
def test_an_error_inside_leaves_what_was_there_and_nothing_beside(tmp_path, before, write, error):
    if before == "file":
        (tmp_path / "t").write_text("before")
    elif before == "folder":
        fill(tmp_path / "t", "before")
    there = tree(tmp_path)

    def broken_off() -> None:
        with whole(tmp_path / "t") as beside:
            write(beside)
            raise error

    with pytest.raises(error):
        broken_off()
    assert tree(tmp_path) == there


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("done", [False, True])
def test_an_error_or_an_interruption_of_the_last_move(tmp_path, monkeypatch, error, done):
    fill(tmp_path / "t", "before")
    replace = os.replace

    def broken(source: Path, target: Path) -> None:
        if done:
            replace(source, target)
        raise error

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(error), whole(tmp_path / "t") as beside:
        fill(beside, "after")
    assert tree(tmp_path) == filled("t", "after" if done else "before")


def test_an_interruption_between_the_two_moves(tmp_path, monkeypatch):
    fill(tmp_path / "t", "before")
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        monkeypatch.undo()
        rename(self, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), whole(tmp_path / "t") as beside:
        fill(beside, "after")
    assert tree(tmp_path) == filled("t", "before")


@pytest.mark.parametrize("before", ["file", "folder"])
def test_nothing_written_is_an_error_and_changes_nothing(tmp_path, before):
    if before == "file":
        (tmp_path / "t").write_text("before")
    else:
        fill(tmp_path / "t", "before")
    there = tree(tmp_path)
    with pytest.raises(FileNotFoundError), whole(tmp_path / "t"):
        pass
    assert tree(tmp_path) == there


def test_a_folder_replaces_a_file_and_a_file_replaces_no_folder(tmp_path):
    (tmp_path / "t").write_text("file")
    with whole(tmp_path / "t") as beside:
        fill(beside, "folder")
    assert tree(tmp_path) == filled("t", "folder")
    with pytest.raises(IsADirectoryError), whole(tmp_path / "t") as beside:
        beside.write_text("file")
    assert tree(tmp_path) == filled("t", "folder")


def test_without_replace_the_folder_that_came_first_stays(tmp_path):
    def write(text: str) -> None:
        with whole(tmp_path / "t", replace=False) as beside:
            fill(beside, text)
            if text == "second":
                write("first")

    with pytest.raises(OSError, match="not empty"):
        write("second")
    assert tree(tmp_path) == filled("t", "first")


@pytest.mark.parametrize("path", [".", "..", "inner/.."])
def test_a_path_without_a_name_of_its_own_is_refused(tmp_path, monkeypatch, path):
    (tmp_path / "home/inner").mkdir(parents=True)
    (tmp_path / "home/kept").write_text("kept")
    monkeypatch.chdir(tmp_path / "home")
    there = tree(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"{path!r} does not end in the name of a file or a folder")):
        files.write_text(path, "text")
    assert tree(tmp_path) == there


def test_tensors_and_their_note_come_back(tmp_path):
    base = torch.arange(6.0)
    given = {"a": base[:3], "b": base[1:5].view(2, 2).T, "c": torch.tensor(True)}  # views of one storage
    files.write(tmp_path / "t", given, {"says": [1, 0.5, None, "é"]})
    tensors, note = files.read(tmp_path / "t")
    assert note == {"says": [1, 0.5, None, "é"]}
    assert tensors.keys() == given.keys() and all(torch.equal(tensors[name], given[name]) for name in given)
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write(tmp_path / "t", given, {"says": float("nan")})
    assert files.read(tmp_path / "t")[1] == note
    with pytest.raises(FileNotFoundError):
        files.read(tmp_path / "nowhere")
    (tmp_path / "t").write_bytes(b"")
    with pytest.raises(TrailFileError, match="not a whole safetensors file"):
        files.read(tmp_path / "t")


def test_strict_json():
    assert strict_json('{"a": [1, 2.5e3, {"a": null}], "b": ""}') == {"a": [1, 2500.0, {"a": None}], "b": ""}
    for text, message in (
        ("NaN", "NaN is not a finite number"),
        ("[-Infinity]", "-Infinity is not a finite number"),
        ('{"a": 1e999}', "1e999 is not a finite number"),
        ('[{"a": 1, "b": 2, "a": 1}]', "a key stands twice in one object"),
        ("{'a': 1}", "Expecting property name"),
        ("", "Expecting value"),
        ("1 2", "Extra data"),
        ("[" * 100_000, "recursion"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            strict_json(text)
