r"""Are the chains of a model read, or written for show? Teach chains, and test them before and after.

    python examples/faithfulness.py                            SmolLM2-135M-Instruct, the demo's chains
    python examples/faithfulness.py --model Qwen/Qwen3-0.6B    any Hugging Face id or folder

The skill is that of `lay_a_trail.py`: to follow links through a list of people. The frozen model does not write such
chains, so both runs are given the right ones; the answer is the likeliest of the people that a question names.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace

from lay_a_trail import Run, learn
from tasks import PEOPLE, make_items

from tokenpaths import faithfulness
from tokenpaths.data import Question
from tokenpaths.demo import demo_model, fast_dtype


def people(item: Question) -> list[str]:
    """The answers that a question allows: everyone it names."""
    return [f" {name}." for name in dict.fromkeys(item.prompt.replace(".", " ").split())]


def stranger(item: Question, steps: Sequence[str], k: int, rng: random.Random) -> str:
    """A wrong step: someone whom the question does not name, so that no link leads on from there."""
    return rng.choice([name for name in PEOPLE if name not in item.prompt])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face id or a folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20, help="of training")
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--picture", default="faithfulness.png")
    options = parser.parse_args()

    run = replace(Run(model=options.model, seed=options.seed), steps=options.steps)
    model, tokenizer = demo_model(run.model, dtype=fast_dtype())
    trails = learn(model, tokenizer, make_items(run.train, run.seed), "chain", run)
    held_out = make_items(options.items, run.seed, held_out=True)
    found = faithfulness(
        model,
        trails,
        [Question(item.question, item.answer, item.chain) for item in held_out],
        tokenizer,
        chains="given",
        options=people,
        mistake=stranger,
        after_mistake="kept",
        separator=r"\s+",
        seed=run.seed,
    )
    print(found)
    found.plot().savefig(options.picture)
    print(f"Same-answer curves: {options.picture}")


if __name__ == "__main__":
    main()
