"""Choose the few questions worth learning from, as s1 chose 1,000 of 59,029, and see where the others were dropped.

    python examples/select_problems.py                            SmolLM2-135M-Instruct
    python examples/select_problems.py --model Qwen/Qwen3-0.6B    any Hugging Face id or folder

The pool holds questions of the demo's task, most of them easy: their domain is how many links must be followed. Dropped
is what shares 8 words with a test question and what the model answers without help; of the rest, a domain is drawn, and
in it a question, the longer its chain the likelier.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from tasks import make_items, read_answer

from tokenpaths.data import Question
from tokenpaths.demo import demo_model, fast_dtype
from tokenpaths.lab.reasoning import select, solved_by_generation

POOL = {(1, 1, 1): 6, (2, 2, 1): 3, (3, 3, 2): 2, (4, 4, 3): 1}
"""Lengths of a question's paths, and how many parts of the pool are such."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face id or a folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--pool", type=int, default=240)
    parser.add_argument("--choose", type=int, default=24)
    parser.add_argument("--report", help="where to write the funnel, such as funnel.json")
    parser.add_argument("--picture", help="where to draw it, such as funnel.png")
    options = parser.parse_args()

    model, tokenizer = demo_model(options.model, dtype=fast_dtype())
    pool = problems(options.pool)
    test = [problem.prompt for problem in pool[::40]]  # as if some had leaked

    def solves(items: Any) -> list[bool]:
        return solved_by_generation(model, items, tokenizer, read_answer, max_new_tokens=5)

    chosen = select(pool, options.choose, test=test, difficulty={"the frozen model": solves}, seed=0)
    print(chosen.funnel)
    for name, items in (("pool", pool), ("chosen", chosen.items)):
        print(f"links to follow, {name}: {dict(sorted(Counter(item.domain for item in items).items()))}")
    print(f"for example:\n{chosen.items[0].prompt}{chosen.items[0].chain}")
    if options.report:
        chosen.funnel.to_json(options.report)
    if options.picture:
        chosen.funnel.plot().savefig(options.picture)


def problems(count: int) -> list[Question]:
    parts = sum(POOL.values())
    return [
        Question(item.question, item.answer.strip(" ."), item.chain, domain=str(len(item.chain.split())))
        for hops, part in POOL.items()
        for item in make_items(count * part // parts, 0, hops=hops)
    ]


if __name__ == "__main__":
    main()
