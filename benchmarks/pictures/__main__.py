"""Draw docs/pictures: the drift of the demonstration's two trails on SmolLM2-135M-Instruct. Needs the extra `plots`."""

from __future__ import annotations

from typing import Any

import torch
from lay_a_trail import TEXTS, Run, complete, halves, learn, score
from tasks import Item, make_items

import tokenpaths as tp
from benchmarks.common.folders import PICTURES
from tokenpaths.demo import demo_model
from tokenpaths.drift import Meter, attention_js, cka, cosine_shift, displacement, kl, plot_path, turning_angle
from tokenpaths.engine import read, runs
from tokenpaths.report import Point, frontier

STRENGTHS = (0.25, 0.5, 0.75, 1.0)


def main() -> None:
    run = Run()
    model, tokenizer = demo_model()
    model.set_attn_implementation("eager")  # the others keep no attention maps
    train, test = make_items(run.train, run.seed), make_items(run.test, run.seed, held_out=True)
    trails = {arm: learn(model, tokenizer, train, arm, run) for arm in ("answer", "chain")}
    batch = tp.data.collate(halves(tokenizer, TEXTS))
    pictures = {}

    meter = Meter(
        *runs(model, trails["chain"]),
        measures=(kl, displacement, cosine_shift),
        quantities=(turning_angle,),
        sets=(cka,),
        attention=(attention_js,),
    )
    meter.read(batch)
    found = meter.report()
    pictures["drift_by_layer"] = found.plot(("displacement", "turning_angle", "cka"))
    pictures["layers_by_position"] = found.plot_positions("displacement")
    pictures["heads_by_layer"] = found.plot_heads("attention_js")

    question = tp.encode([(test[0].question, test[0].chain)], tokenizer, eos=False)
    pictures["paths"] = plot_path(*read(*runs(model, trails["chain"]), tp.data.collate(question))[0])

    with torch.no_grad():
        right = score(complete(model, tokenizer, [item.question for item in test]), test)
        points = [Point("frozen", right.right / right.of, 0.0, right.interval())]
        points += [point for arm in trails for point in strengths(model, tokenizer, trails[arm], arm, test)]
    pictures["frontier"] = frontier(
        points, task="right answers to held-out questions", drift="KL(frozen || steered) on ordinary text, nats"
    )
    for name, picture in pictures.items():
        picture.savefig(PICTURES / f"{name}.png")
        print(PICTURES / f"{name}.png")


def strengths(model: Any, tokenizer: Any, trails: tp.TrailMap, arm: str, test: list[Item]) -> list[Point]:
    """The task and the drift of one trail at several strengths."""
    points = []
    for strength in STRENGTHS:
        with tp.attach(model, trails, strength=strength):
            right = score(complete(model, tokenizer, [item.question for item in test]), test)
            moved = tp.measure_drift(model, trails, halves(tokenizer, TEXTS), measures=(kl,))["kl"]
        print(arm, strength, right, moved, flush=True)
        series = f"taught the {arm}"
        points.append(
            Point(series, right.right / right.of, moved.mean, right.interval(), moved.interval, f"{strength:g}")
        )
    return points


if __name__ == "__main__":
    main()
