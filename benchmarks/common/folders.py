"""Where the benchmarks find their data, and where they leave what they measure."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PICTURES = ROOT / "docs/pictures"
RESULTS = ROOT / "benchmarks/results"
CLAIMS = ROOT / "benchmarks/claims.json"
DATA = Path(os.environ.get("TOKENPATHS_DATA", ROOT.parent / "shared/data"))
KEPT = Path(os.environ.get("TOKENPATHS_CACHE", Path.home() / ".cache/tokenpaths"))
"""Runs are kept here, in a folder an experiment, until all of them are a table."""
