"""Write what an experiment measured: one result file with all that repeats it, and its lines in claims.json.

Every figure that README or docs state is a claim here, and no claim is written by hand.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.folders import CLAIMS, RESULTS, ROOT
from benchmarks.common.kept import write_json


@dataclass(frozen=True)
class Claim:
    """One figure. `interval` is the 95 % interval, or None for a count or a maximum that has none."""

    id: str
    claim: str
    measured: float
    unit: str
    target: str = ""
    interval: tuple[float, float] | None = None


def over_seeds(name: str, told: str, values: Sequence[float], unit: str, target: str = "") -> Claim:
    """The mean of the seeds, with the lowest and the highest one for its interval."""
    told = f"{told}, {len(values)} seeds; lowest and highest seed"
    return Claim(name, told, statistics.fmean(values), unit, target, (min(values), max(values)))


def of_ratio(name: str, told: str, found: Mapping[str, float], target: str = "") -> Claim:
    """What `clock.ratio` found."""
    return Claim(name, told, found["median"], "ratio", target, (found["low"], found["high"]))


def environment() -> dict[str, Any]:
    packages = ("torch", "transformers", "accelerate", "safetensors", "peft", "pyreft", "pyvene")
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": _hardware(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "commit": _run("git", "rev-parse", "--short", "HEAD"),
    }


def write(name: str, raw: Any, claims: list[Claim], *, seed: int | list[int]) -> None:
    """Write `results/<name>.json`, replace the claims of this experiment in `claims.json`, and print them.

    The command told is the one that measures: `--table` is left out, which only tells what was measured before.
    """
    options = [option for option in sys.argv[1:] if option != "--table"]
    command = shlex.join(["python", "-m", f"benchmarks.{name}", *options])
    path = RESULTS / f"{name}.json"
    where = environment()
    result = {"command": command, **where, "seed": seed, "claims": [asdict(c) for c in claims], "raw": raw}
    write_json(path, result)
    told = {entry["id"]: entry for entry in (json.loads(CLAIMS.read_text()) if CLAIMS.exists() else [])}
    for claim in claims:
        told[claim.id] = {
            **asdict(claim),
            "command": command,
            "file": str(path.relative_to(ROOT)),
            "date": where["date"],
            "hardware": where["hardware"],
        }
        print(claim)
    write_json(CLAIMS, [told[key] for key in sorted(told)])


def _hardware() -> str:
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cpu}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}{gpu}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT).stdout.strip()
