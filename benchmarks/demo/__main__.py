"""The demonstration of `make demo`, repeated over seeds: does the chain of tokens help on held-out questions?"""

from __future__ import annotations

from typing import Any

from lay_a_trail import Run, Score, demonstrate

from benchmarks.common.options import parser
from benchmarks.common.record import Claim, write

ARMS = {
    "demo_frozen_accuracy": ("frozen, no examples", "the frozen model, asked for the answer"),
    "demo_answer_only_accuracy": ("trail taught the answer", "a trail taught the answers alone"),
    "demo_chain_accuracy": ("trail taught the chain", "a trail taught the chain of tokens"),
}


def main() -> None:
    seeds = parser(__doc__, seeds=True).parse_args().seeds
    runs = [demonstrate(Run(seed=seed)) for seed in seeds]
    kinds = {"held-out": "accuracy", "longer": "longer_accuracy"}
    claims = [
        pooled(name.replace("accuracy", end), runs, arm, kind, words)
        for name, (arm, words) in ARMS.items()
        for kind, end in kinds.items()
    ]
    write("demo", runs, claims, seed=seeds)


def pooled(name: str, runs: list[dict[str, Any]], arm: str, kind: str, words: str) -> Claim:
    """All seeds together, with the Wilson interval of the pooled answers; the raw file has each seed."""
    parts = [run["scores"][arm][kind] for run in runs]
    both = Score(sum(p["right"] for p in parts), sum(p["of"] for p in parts))
    low, high = both.interval()
    told = f"following links, {kind} questions: share answered rightly by {words} ({len(runs)} seeds pooled)"
    share, interval = round(both.right / both.of, 4), (round(low, 4), round(high, 4))
    return Claim(name, told, share, "share of questions", interval=interval)


if __name__ == "__main__":
    main()
