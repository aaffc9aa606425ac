"""Files and folders that are written whole or not at all, and JSON that is read strictly."""

from __future__ import annotations

import errno
import os
import re
import signal
import stat
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tokenpaths import Match, files
from tokenpaths.files import TrailFileError, documents, patterns, strict_json, whole
from tokenpaths.tokens import Context

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


# Killed writers, modes, links, and the disk


def killed(path: Path, kind: str) -> None:
    """Write a file in another process, which is killed half way; a folder, between its two moves."""

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if not (child := os.fork()):
        try:
            with whole(path) as beside:
                if kind == "folder":
                    beside.mkdir()
                    os.replace = die
                else:
                    beside.write_text("half")
                    die()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_what_a_killed_writer_left_is_cleared_by_the_next_of_that_name_and_that_of_a_living_one_is_not(tmp_path):
    killed(tmp_path / "t", "file")
    (stray,) = tmp_path.iterdir()
    assert stray.name.startswith(".writing-")
    files.write_text(tmp_path / "other", "text")
    assert stray.exists(), "another name's"
    with whole(tmp_path / "t") as beside:
        assert not stray.exists()
        beside.write_text("slow")
        files.write_text(tmp_path / "t", "quick")  # another writer of that name, while this one lives
        assert beside.read_text() == "slow"
    assert tree(tmp_path) == {"t": "slow", "other": "text"}


def test_a_folder_that_a_killed_writer_was_about_to_replace_is_put_back(tmp_path):
    fill(tmp_path / "t", "before")
    killed(tmp_path / "t", "folder")
    assert not (tmp_path / "t").exists()
    files.sweep(tmp_path)
    assert tree(tmp_path) == filled("t", "before")


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_a_replaced_file_keeps_its_mode_and_a_link_stays_one(tmp_path, mode):
    (tmp_path / "there").mkdir()
    kept, link = tmp_path / "there/kept", tmp_path / "link"
    kept.write_text("before")
    kept.chmod(mode)
    link.symlink_to("there/kept")
    files.write_text(link, "after")
    assert link.is_symlink() and kept.read_text() == "after"
    assert stat.S_IMODE(kept.stat().st_mode) == mode
    kept.unlink()
    files.write_text(link, "again")  # a link that leads to nothing yet
    assert link.is_symlink() and kept.read_text() == "again"


def test_a_link_in_a_circle_and_what_is_no_file_are_not_replaced(tmp_path):
    (tmp_path / "circle").symlink_to("circle")
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("circle", "links that lead in a circle"), ("pipe", "is a pipe, a device or a socket")):
        with pytest.raises(OSError, match=message):
            files.write_text(tmp_path / name, "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["circle", "pipe"]


def test_every_file_of_a_folder_and_the_folders_are_brought_onto_the_disk(tmp_path, monkeypatch):
    synced: set[str] = set()
    sync = os.fsync

    def noted(handle: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{handle}"))
        sync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    with whole(tmp_path / "t") as beside:
        fill(beside, "text")
        place = str(beside)
    assert synced >= {f"{place}{part}" for part in ("", "/one", "/deep", "/deep/two")} | {str(tmp_path)}


def test_a_folder_without_room_is_told_beforehand(tmp_path, monkeypatch):
    files.check_room(tmp_path / "made", 10_000)
    assert list((tmp_path / "made").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="cannot hold the 5 bytes that are to be written there .*: make room, or"):
        files.check_room(tmp_path / "file", 5)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=re.escape("cannot hold the 5 bytes that are to be written there (No space left")):
        files.check_room(tmp_path, 5)

    def unable(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", unable)
    files.check_room(tmp_path, 5)


# Checksums


def test_a_part_of_a_file_is_checked_when_it_is_read_and_not_before(tmp_path):
    numbers = torch.arange(200_000, dtype=torch.float32)  # four blocks
    files.write(tmp_path / "t", {"numbers": numbers, "one": torch.tensor(3)}, {})
    file = files.TensorFile(tmp_path / "t")
    assert torch.equal(file.entries("numbers", 70_000, 140_000), numbers[70_000:140_000])
    assert torch.equal(file.tensor("numbers"), numbers) and file.tensor("one") == 3
    assert file.entries("numbers", 5, 5).tolist() == []
    content = bytearray((tmp_path / "t").read_bytes())
    content[-2] ^= 1
    (tmp_path / "t").write_bytes(content)
    assert torch.equal(file.entries("numbers", 0, 10), numbers[:10])
    for read in (lambda: file.entries("numbers", 199_990, 200_000), lambda: files.read(tmp_path / "t")):
        with pytest.raises(TrailFileError, match="t was changed since it was written .the checksum of its numbers dif"):
            read()
    (tmp_path / "t").write_bytes(content[:-400_000])  # what is mapped into memory would now end the process
    assert torch.equal(file.entries("numbers", 0, 10), numbers[:10])
    with pytest.raises(TrailFileError, match="t was cut off since it was opened: copy or download it again"):
        file.entries("numbers", 199_000, 200_000)
    with pytest.raises(TrailFileError, match="has no entries 5 to 200001 of 'numbers'"):
        file.entries("numbers", 5, 200_001)


def test_a_file_of_version_1_has_no_checksums_and_is_read(tmp_path):
    tensors = {"a": torch.arange(3.0)}
    note = {"tokenpaths": '{"says": 1, "version": 1}'}
    (tmp_path / "t").write_bytes(safetensors.torch.save(tensors, note))
    found, told = files.read(tmp_path / "t")
    assert torch.equal(found["a"], tensors["a"]) and told == {"says": 1}
    assert files.TensorFile(tmp_path / "t").checksum is None
    (tmp_path / "t").write_bytes(safetensors.torch.save(tensors, {"tokenpaths": '{"version": 2}'}))
    with pytest.raises(TrailFileError, match="the checksum of its header differs"):
        files.read(tmp_path / "t")


def test_json_has_a_checksum_that_people_may_take_out(tmp_path):
    path = tmp_path / "t.json"
    files.write_json(path, {"é": [1, None], "odd": "\ud800"}, indent=1)
    assert files.read_json(path) == {"é": [1, None], "odd": "\ud800"}
    text = path.read_text()
    path.write_text(text.replace("1,", "2,"))
    with pytest.raises(TrailFileError, match="or take out 'sha256' if you changed it yourself"):
        files.read_json(path)
    path.write_text('{"by hand": 3}')
    assert files.read_json(path) == {"by hand": 3}
    files.write_json(path, {"first": 1}, [{"second": "a\u2028b"}])
    assert len(files.read_lines(path)) == 2
    path.write_text(path.read_text() + "\n")
    with pytest.raises(TrailFileError, match="t.json was changed since it was written"):
        files.read_lines(path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"x": float("nan")})


def test_a_text_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MOST", 100)
    (tmp_path / "t").write_text("x" * 101)
    with pytest.raises(TrailFileError, match="t is larger than the 100 bytes that such a file may have"):
        files.read_text(tmp_path / "t")
    with pytest.raises(ValueError, match="would have 188 bytes, and 100 is the most that is read"):
        files.write_json(tmp_path / "u", {"x": "y" * 100})


def test_an_error_cannot_steer_a_terminal():
    told = str(TrailFileError("a\x1b[31mb\u202ec\ud800\n\td\x9b"))
    assert told == "a\\x1b[31mb\\u202ec\\ud800\n\td\\x9b"


# Patterns


@pytest.mark.parametrize(
    "pattern", [r"\d+", "a{e}b", r"\{e}", "[{}]+", "a{2}", "{a}", r"(?<=[.!?])\s+|\n+", "(?i)É", "x*"]
)
def test_a_pattern_means_what_it_means_in_re(pattern):
    for text in ("aaab a{e}b {e} foo xx a{2 b.\n\nc! d", "{a}{}{{", "ÉéÉ 12", ""):
        assert [m.span() for m in patterns.finditer(pattern, text)] == [m.span() for m in re.finditer(pattern, text)]


def test_a_pattern_that_takes_for_ever_is_stopped_and_named():
    with pytest.raises(ValueError, match=re.escape(r"the pattern '(a+)+$' was not matched within")):
        patterns.finditer("(a+)+$", "a" * 5000 + "b", 0.05)
    for bad in ("(", "(" * 9999 + ")" * 9999, "a" * 10_001, r"\p{L}"):
        with pytest.raises(ValueError, match=r"."):
            patterns.check(bad)


def test_a_match_rule_with_such_a_pattern_is_refused_at_the_forward_by_name(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    ids = torch.tensor([[1] * 3000 + [2]])
    everything = torch.ones_like(ids, dtype=torch.bool)
    context = Context(everything, everything, ids, pieces=lambda ids: ["a" if i == 1 else "b" for i in ids])
    with pytest.raises(ValueError, match=re.escape(r"the pattern '(a+)+$' was not matched within")):
        Match("(a+)+$").choose(context)
