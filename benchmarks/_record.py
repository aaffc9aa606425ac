"""Write what a benchmark measured: one result file with everything needed to repeat it, and its lines in claims.json.

Every figure that README or docs state is a claim here, and no claim is written by hand.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
CLAIMS = FOLDER / "claims.json"


@dataclass(frozen=True)
class Claim:
    """One figure. `interval` is the 95 % interval, or None for a count or a maximum that has none."""

    id: str
    claim: str
    measured: float
    unit: str
    target: str = ""
    interval: tuple[float, float] | None = None


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


def write(name: str, raw: Any, claims: list[Claim], *, seed: int | list[int], command: str | None = None) -> Path:
    """Write `results/<name>.json` and replace this benchmark's entries in `claims.json`."""
    script, *options = sys.argv
    command = command or shlex.join(["python", f"benchmarks/{Path(script).name}", *options])
    path = RESULTS / f"{name}.json"
    where = environment()
    result = {"command": command, **where, "seed": seed, "claims": [asdict(c) for c in claims], "raw": raw}
    write_json(path, result)
    told = {entry["id"]: entry for entry in (json.loads(CLAIMS.read_text()) if CLAIMS.exists() else [])}
    for claim in claims:
        told[claim.id] = {
            **asdict(claim),
            "command": command,
            "file": str(path.relative_to(FOLDER.parent)),
            "date": where["date"],
            "hardware": where["hardware"],
        }
    write_json(CLAIMS, [told[key] for key in sorted(told)])
    return path


def claimed(file: Path) -> Path | None:
    """A file that says that this process makes another; None where a process that lives makes it."""
    claim = file.with_suffix(".claim")
    claim.parent.mkdir(parents=True, exist_ok=True)
    try:
        with claim.open("x") as made:
            made.write(str(os.getpid()))
    except FileExistsError:
        if Path("/proc", claim.read_text() or "self").exists():
            return None
        claim.unlink(missing_ok=True)
        return claimed(file)
    return claim


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all, in a folder that may have to be made. Several processes may do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    os.replace(beside, path)


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
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=FOLDER).stdout.strip()
