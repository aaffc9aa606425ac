"""A steered model against the frozen one, on 50 questions, in pairs: one verdict, as an HTML page.

    python examples/ab_test.py --out report.html                       # trains the demo's trail first, briefly
    python examples/ab_test.py --out report.html --trails mine.safetensors
    python examples/ab_test.py --out report.html --seeds 3             # three trainings, judged as a method

The skill is following links (see tasks.py). To be called better, the trail must follow them better than the frozen
model, and on text that the frozen model itself wrote lose no more than the margins say: 0.05 nats a token, and 0.1 nats
a token of KL. The demo's trail has no limits (docs/limits.md), and it does not keep within these.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace

from lay_a_trail import Run, learn
from tasks import make_items, read_answer

import tokenpaths as tp
from tokenpaths import ab_test
from tokenpaths.data import Question, Task, Text
from tokenpaths.demo import demo_model
from tokenpaths.lab.ab import Margins, frozen, steered


@dataclass(frozen=True)
class Dials:
    """What is asked, and how much may be lost."""

    items: int = 50
    texts: int = 24
    margins: Margins = Margins(nats=0.05, kl=0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="report.html", help="where the page is written; the raw outcomes beside it")
    parser.add_argument("--model", help="a Hugging Face id or a folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--trails", help="a trail file to judge, instead of training one")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of the trail")
    parser.add_argument("--stop-early", action="store_true", help="stop asking when the outcomes tell")
    options = parser.parse_args()

    began, dials, run = time.perf_counter(), Dials(), Run(model=options.model)
    model, tokenizer = demo_model(options.model)
    train = make_items(run.train, run.seed)
    if options.trails:
        trails = [tp.TrailMap.load(options.trails, model=model)]
    else:
        runs = [replace(run, seed=run.seed + number) for number in range(options.seeds)]
        trails = [learn(model, tokenizer, train, "chain", each) for each in runs]

    own = tp.self_samples(model, tokenizer, dials.texts, max_new_tokens=48, seed=run.seed)
    said = tokenizer.batch_decode([example.ids for example in own], skip_special_tokens=True)
    report = ab_test(
        frozen(model),
        steered(model, *trails, name="trail"),
        [Question(item.question, item.answer) for item in make_items(dials.items, run.seed, held_out=True)],
        tokenizer,
        read_answer=read_answer,
        retention=[
            Task("own words", tuple(Text(text) for text in said if text.count(" ") > 8))
        ],  # split, for both arms
        margins=dials.margins,
        training=[item.question for item in train],
        stop_early=options.stop_early,
        stop_strings=".",
        max_new_tokens=8,
        progress=True,
    )
    print(report)
    report.to_html(options.out)
    report.to_json(options.out.removesuffix(".html") + ".json")
    print(f"\n{options.out} written, {time.perf_counter() - began:.0f} seconds in all")


if __name__ == "__main__":
    main()
