"""The demonstration of `make demo`, repeated over seeds: does the chain of tokens help on held-out questions?"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from _record import Claim, write

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from lay_a_trail import Run, Score, demonstrate

ARMS = {
    "demo_frozen_accuracy": ("frozen, no examples", "the frozen model, asked for the answer"),
    "demo_answer_only_accuracy": ("trail taught the answer", "a trail taught the answers alone"),
    "demo_chain_accuracy": ("trail taught the chain", "a trail taught the chain of tokens"),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    runs = [demonstrate(Run(seed=seed)) for seed in options.seeds]
    claims = [
        claim
        for name, (arm, words) in ARMS.items()
        for claim in (
            _claim(name, runs, arm, "held-out", words),
            _claim(name.replace("accuracy", "longer_accuracy"), runs, arm, "longer", words),
        )
    ]
    write("demo", runs, claims, seed=options.seeds)
    for claim in claims:
        print(claim)


def _claim(name: str, runs: list[dict[str, Any]], arm: str, kind: str, words: str) -> Claim:
    """All seeds together, with the Wilson interval of the pooled answers; the raw file has each seed."""
    parts = [run["scores"][arm][kind] for run in runs]
    pooled = Score(sum(p["right"] for p in parts), sum(p["of"] for p in parts))
    low, high = pooled.interval()
    return Claim(
        id=name,
        claim=f"following links, {kind} questions: share answered rightly by {words} ({len(runs)} seeds pooled)",
        measured=round(pooled.right / pooled.of, 4),
        interval=(round(low, 4), round(high, 4)),
        unit="share of questions",
    )


if __name__ == "__main__":
    main()
