"""Draw docs/pictures: the drift of the demonstration's two trails on SmolLM2-135M-Instruct. Needs the extra `plots`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from lay_a_trail import TEXTS, Run, complete, halves, learn, score
from tasks import make_items

import tokenpaths as tp
from tokenpaths.data import collate
from tokenpaths.demo import demo_model, fast_dtype
from tokenpaths.drift import Meter, attention_js, cka, cosine_shift, displacement, kl, turning_angle
from tokenpaths.drift.plots import drift_by_layer, heads_by_layer, layers_by_position, paths
from tokenpaths.engine import read, runs
from tokenpaths.report import Point, frontier

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
STRENGTHS = (0.25, 0.5, 0.75, 1.0)


def main() -> None:
    run = Run()
    model, tokenizer = demo_model(dtype=fast_dtype())
    model.set_attn_implementation("eager")  # the others keep no attention maps
    train, test = make_items(run.train, run.seed), make_items(run.test, run.seed, held_out=True)
    trails = {arm: learn(model, tokenizer, train, arm, run) for arm in ("answer", "chain")}
    batch = collate(halves(tokenizer, TEXTS))
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
    pictures["drift_by_layer"] = drift_by_layer(found, ("displacement", "turning_angle", "cka"))
    pictures["layers_by_position"] = layers_by_position(found, "displacement")
    pictures["heads_by_layer"] = heads_by_layer(found, "attention_js")

    question = tp.encode([(test[0].question, test[0].chain)], tokenizer, eos=False)
    pictures["paths"] = paths(*read(*runs(model, trails["chain"]), collate(question))[0])

    with torch.no_grad():
        right = score(complete(model, tokenizer, [item.question for item in test]), test)
        points = [Point("frozen", right.right / right.of, 0.0, right.interval())]
        points += [point for arm in trails for point in strengths(model, tokenizer, trails[arm], arm, test)]
    pictures["frontier"] = frontier(
        points, task="right answers to held-out questions", drift="KL(frozen || steered) on ordinary text, nats"
    )
    PICTURES.mkdir(exist_ok=True)
    for name, picture in pictures.items():
        picture.savefig(PICTURES / f"{name}.png")
        print(PICTURES / f"{name}.png")


def strengths(model, tokenizer, trails, arm, test) -> list[Point]:
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
