"""Audit a trail file that someone else made, before you use it.

    python examples/audit_adapter.py trails.safetensors prompts.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct

`prompts.jsonl` has a clean example of the adapter's task on each line: {"prompt": "2 + 2 =", "answer": " 4"}. The whole
vocabulary is scanned, which takes minutes on a CPU; `--words 2000` scans 2000 tokens drawn at random.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import tokenpaths as tp
from tokenpaths import audit
from tokenpaths.demo import demo_model
from tokenpaths.lab.audit import Audit, Threshold, phrases_of


def main(arguments: list[str] | None = None) -> Audit:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trails", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--model", help="a Hub id or a folder; by default the demo's model")
    parser.add_argument("--words", type=int, help="scan this many tokens drawn at random, not the whole vocabulary")
    parser.add_argument("--texts", type=Path, help="a text whose commonest phrases are scanned, besides the prompts'")
    parser.add_argument("--rounds", type=int, default=2, help="of the search for a phrase that is on no list")
    parser.add_argument("--threshold", type=Path, help="what Threshold.to_json wrote, for a verdict")
    parser.add_argument("--out", type=Path, help="a folder for the report and its picture")
    given = parser.parse_args(arguments)

    model, tokenizer = demo_model(given.model)
    lines = given.prompts.read_text(encoding="utf-8").splitlines()
    pairs = [(item["prompt"], item["answer"]) for item in map(json.loads, filter(None, lines))]
    trails = tp.TrailMap.load(given.trails, model=model)  # warns if they were made for other weights
    texts = [prompt for prompt, _ in pairs] + ([given.texts.read_text(encoding="utf-8")] if given.texts else [])
    words = None
    if given.words is not None:
        words = [(i,) for i in random.Random(0).sample(range(len(tokenizer)), min(given.words, len(tokenizer)))]
    report = audit(
        model,
        trails,
        tp.encode(pairs, tokenizer, eos=False),
        tokenizer,
        candidates=words,
        phrases=phrases_of(texts, tokenizer, most=200),
        searched=given.rounds,
        threshold=Threshold.from_json(given.threshold) if given.threshold else None,
    )
    print(report)
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        report.to_json(given.out / "audit.json")
        report.plot().savefig(given.out / "audit.png")
    return report


if __name__ == "__main__":
    main()
