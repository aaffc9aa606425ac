"""What has been measured so far, a line of JSON each, so that a benchmark that was stopped goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def lines(file: Path) -> list[dict[str, Any]]:
    """What was told. A last line that a kill has cut off is passed over."""
    found: list[dict[str, Any]] = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def tell(file: Path, line: dict[str, Any]) -> None:
    """Add a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as told:
        told.write("\n" * (told.tell() > 0 and not file.read_bytes().endswith(b"\n")) + json.dumps(line) + "\n")
