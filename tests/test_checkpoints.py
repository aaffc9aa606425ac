"""Checkpoints that are damaged, in the way, of another run or have no room; caches that cannot be written."""

from __future__ import annotations

import errno
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_equal, llama, make_examples, make_trails, state

import tokenpaths as tp
from tokenpaths import files
from tokenpaths.engine.cone import Cone
from tokenpaths.files import TrailFileError
from tokenpaths.training.objectives.waypoints import Waypoints, capture_states


def train(trails: Any, folder: Path, goals: Any = None, **options: Any) -> list[Any]:
    given = dict(steps=4, batch_size=4, save_every=1, progress=False, checkpoint=folder)
    return list(tp.steps(llama(), trails, goals or [tp.Imitate(make_examples())], **{**given, **options}))


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, Any]:
    """The folder of a run of four steps, and the trails that it ended with."""
    trails = make_trails()
    train(trails, tmp_path / "run")
    return tmp_path / "run", trails


@pytest.mark.parametrize("name", ["run.json", "optimizer.safetensors", "trails.safetensors"])
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning_and_the_run_ends_the_same(run, name) -> None:
    folder, whole = run
    path = folder / "step-00000004" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    told = f"step-00000004 cannot be continued: {path} .* the run goes on from step-00000003, and takes the later steps"
    resumed = make_trails()
    with pytest.warns(UserWarning, match=told):
        assert [step.step for step in train(resumed, folder, resume=True)] == [4]
    assert_equal(state(resumed), state(whole))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train(make_trails(), folder, resume=True) == []


def test_where_no_checkpoint_is_whole_the_run_is_not_resumed(run) -> None:
    folder, _ = run
    for path in folder.glob("step-*"):
        (path / "optimizer.safetensors").unlink()
    trails = make_trails()
    before = state(trails)
    with pytest.raises(
        TrailFileError, match="no checkpoint in .* is whole: step-00000004 .*optimizer.safetensors is missing"
    ):
        train(trails, folder, resume=True)
    assert_equal(state(trails), before)


@pytest.mark.parametrize("name", ["step-9", "step-²", "step-99999999", "step-0000009٣", "step-000000x9", "step-"])
def test_a_folder_of_another_name_or_an_empty_one_hides_no_checkpoint(run, name) -> None:
    folder, _ = run
    (folder / name).mkdir()
    assert train(make_trails(), folder, resume=True) == []
    (folder / "step-00000005").write_text("a file")
    assert train(make_trails(), folder, resume=True) == []


def test_steps_are_counted_as_numbers(run) -> None:
    folder, _ = run
    assert files.read_json(folder / "step-00000004/run.json")["step"] == 4
    (folder / "step-00000004").rename(folder / "step-100000000")
    with pytest.warns(
        UserWarning, match=r"step-100000000 cannot be .* is of another step .* goes on from step-00000003"
    ):
        assert [step.step for step in train(make_trails(), folder, resume=True)] == [4]


def test_a_checkpoint_of_an_earlier_version_is_refused_by_name(run) -> None:
    folder, _ = run
    for path in folder.glob("step-*/run.json"):
        old = {key: value for key, value in files.read_json(path).items() if key != "files"}
        path.write_text(json.dumps(old))
    with pytest.raises(TrailFileError, match="is of an earlier version, and has no checksums: go on with that version"):
        train(make_trails(), folder, resume=True)


def test_a_folder_without_room_is_noticed_before_training_begins(tmp_path, monkeypatch) -> None:
    trails = make_trails()
    before = state(trails)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=re.escape("name another folder")):
        train(trails, tmp_path / "file" / "run")
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=re.escape("(No space left on device): make room, or name another folder")):
        train(trails, tmp_path / "run")
    assert_equal(state(trails), before)


def test_a_run_that_has_ended_is_read_where_nothing_can_be_written(run, monkeypatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", full)
    assert train(make_trails(), run[0], resume=True) == []


def test_an_infinite_limit_is_noted(tmp_path) -> None:
    train(make_trails(), tmp_path / "run", clip=float("inf"))
    assert train(make_trails(), tmp_path / "run", clip=float("inf"), resume=True) == []
    with pytest.raises(ValueError, match="clip was 'Infinity', is 1.0"):
        train(make_trails(), tmp_path / "run", resume=True)


def test_resuming_with_other_targets_is_refused(tmp_path) -> None:
    model, examples = llama(), make_examples()
    sites = tp.sites(model, [1], tp.Answer())
    kept = capture_states(model, examples, examples, sites)
    again = capture_states(model, examples, examples, sites)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] += 1
    other = capture_states(model, examples, examples, sites)
    assert kept.checksum == again.checksum != other.checksum
    on_disk = [capture_states(llama(), examples, examples, sites, path=tmp_path / name) for name in "ab"]
    assert on_disk[0].checksum == on_disk[1].checksum
    imitate = tp.Imitate(examples)  # the targets are what the fresh trails give, and alone have no gradient
    train(make_trails(), tmp_path / "run", [imitate, Waypoints(examples, targets=kept)])
    assert train(make_trails(), tmp_path / "run", [imitate, Waypoints(examples, targets=again)], resume=True) == []
    with pytest.raises(ValueError, match="resuming would not continue it: goals was .*Targets"):
        train(make_trails(), tmp_path / "run", [imitate, Waypoints(examples, targets=other)], resume=True)


def test_a_cone_that_cannot_be_written_is_a_warning_and_training_goes_on_equal(tmp_path, monkeypatch) -> None:
    expected, found = make_trails(), make_trails()
    train(expected, tmp_path / "a", cone=Cone(folder=tmp_path / "cone"))
    monkeypatch.setattr(files, "write", full)
    cone = Cone(folder=tmp_path / "other")
    with pytest.warns(UserWarning, match="other cannot be written .*No space left.*: no more is kept there"):
        list(tp.steps(llama(), found, [tp.Imitate(make_examples())], steps=4, batch_size=4, progress=False, cone=cone))
    assert_equal(state(found), state(expected), 1e-6)


def test_a_cone_whose_folder_was_cleared_meanwhile_computes_anew(tmp_path) -> None:
    cone = Cone(folder=tmp_path)
    expected, found = make_trails(), make_trails()
    goals, options = [tp.Imitate(make_examples())], dict(steps=3, batch_size=4, progress=False, cone=cone)
    list(tp.steps(llama(), expected, goals, **options))
    for path in tmp_path.iterdir():
        path.unlink()
    list(tp.steps(llama(), found, goals, **options))
    assert_equal(state(found), state(expected), 1e-6)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file, but a cone is kept in a folder"):
        Cone(folder=tmp_path / "file")
