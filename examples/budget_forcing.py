"""Give a model more or fewer tokens to think with, and see what they buy (budget forcing, s1).

    python examples/budget_forcing.py                            SmolLM2-135M-Instruct
    python examples/budget_forcing.py --model Qwen/Qwen3-0.6B    any Hugging Face id or folder

A trail is taught to follow links one at a time, ` Alice Mark.`: each name is a token of thinking, the full stop is the
delimiter that ends it, and the last name is the answer. Then it is made to stop after one name, after two, after three,
and to go on for at least four. The questions need two or three.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lay_a_trail import Run, learn
from tasks import Item, make_items, read_answer

import tokenpaths as tp
from tokenpaths.demo import demo_model, fast_dtype
from tokenpaths.lab.reasoning import BudgetForcing, Level, scaling

BUDGETS: dict[str, dict[str, Any]] = {
    "at most 1": dict(max_tokens=1),
    "at most 2": dict(max_tokens=2),
    "at most 3": dict(max_tokens=3),
    "as it likes": dict(),
    "at least 4": dict(min_tokens=4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face id or a folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--steps", type=int, default=20, help="of training the trail")
    parser.add_argument("--questions", type=int, default=48)
    parser.add_argument("--picture", help="where to draw accuracy against thinking tokens, such as scaling.png")
    options = parser.parse_args()

    run = Run(model=options.model, steps=options.steps)
    model, tokenizer = demo_model(run.model, dtype=fast_dtype())
    print(f"Teaching the chain: {run.steps} steps of {run.batch} questions")
    trails = learn(model, tokenizer, make_items(run.train, run.seed), "chain", run)
    test = make_items(options.questions, run.seed, held_out=True)

    levels: list[Level] = []
    with tp.attach(model, trails):
        for name, budget in BUDGETS.items():
            level, text, ended = answer(model, tokenizer, test, budget)
            levels.append(level)
            right = sum(level.right) / len(test)
            print(f"  {name:12} {right:.2f} right   {test[0].question.split()[-1]}{text!r}   {ended}")
    found = scaling(levels)
    print(f"\n{found}")
    if options.picture:
        found.plot().savefig(options.picture)


def answer(
    model: Any, tokenizer: Any, items: Sequence[Item], limits: dict[str, Any]
) -> tuple[Level, str, dict[str, int]]:
    """The thinking tokens and verdicts of all questions, the first text, and how often thinking ended in which way."""
    inputs = tokenizer([item.question for item in items], return_tensors="pt", padding=True, padding_side="left")
    budget = BudgetForcing(tokenizer, inputs["input_ids"], end=".", **limits)
    output = model.generate(
        **inputs, logits_processor=[budget], max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    counts = budget.counts(output)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [read_answer(text) == read_answer(item.answer) for text, item in zip(texts, items, strict=True)]
    level = Level([count.tokens for count in counts], right, limits.get("min_tokens"), limits.get("max_tokens"))
    return level, texts[0], dict(Counter(count.ended for count in counts))


if __name__ == "__main__":
    main()
