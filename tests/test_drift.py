"""The first measure of drift, against figures worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from families import FAMILIES
from torch import nn

import tokenpaths as tp
from tokenpaths.drift.first import evaluating

Watch = Callable[[nn.Module], nn.Module]
EXAMPLES = [
    tp.Example(ids=(5, 6, 7, 8, 9, 10), answer=(False, False, False, True, True, True)),
    tp.Example(ids=(11, 12, 13, 14), answer=(False, True, True, True)),
    tp.Example(ids=(20, 21, 22, 23, 24), answer=(False, False, True, True, True)),
]


def moving(model: nn.Module, rule: tp.Rule, layer: int = 1) -> tp.TrailMap:
    return tp.TrailMap({tp.Site(layer, rule): tp.LoReFT(tp.width(model), 4, init="paper")})


def test_fresh_trails_do_not_drift(watch: Watch) -> None:
    model = watch(FAMILIES["llama"].make())
    found = tp.drift(model, tp.TrailMap({tp.Site(1, tp.All()): tp.LoReFT(32, 4)}), EXAMPLES)
    assert (found.kl_mean, found.kl_max, found.top1, found.moved) == (0, 0, 1, 0)
    assert found.displacement == (0, 0, 0)
    assert (found.tokens, found.texts) == (15, 3)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_figures_are_those_of_two_plain_forwards(batch_size: int) -> None:
    model = FAMILIES["llama"].make()  # not watched: transformers leaves hooks behind for output_hidden_states
    trails = moving(model, tp.Answer())
    kl: list[float] = []
    same: list[bool] = []
    displacement: list[float] = []
    moved: list[bool] = []
    for example in EXAMPLES:
        ids = torch.tensor([example.ids])
        labels = torch.where(torch.tensor([example.answer]), ids, -100)
        with torch.no_grad():
            frozen = model(ids, output_hidden_states=True)
            with tp.attach(model, trails):
                steered = model(ids, labels=labels, output_hidden_states=True)
        p, q = frozen.logits[0].double().softmax(-1), steered.logits[0].double().softmax(-1)
        kl += (p * (p.log() - q.log())).sum(-1).tolist()
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
        x, y = frozen.hidden_states[2][0], steered.hidden_states[2][0]
        displacement += ((y - x).norm(dim=-1) / x.norm(dim=-1)).tolist()
        moved += list(example.answer)
    found = tp.drift(model, trails, EXAMPLES, batch_size=batch_size)
    assert found.kl_mean == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert found.kl_max == pytest.approx(max(kl), rel=1e-4)
    assert found.top1 == sum(same) / len(same)
    assert found.moved == sum(moved) / len(moved)
    assert found.displacement[0] == 0  # the light cone: nothing below the first moved layer
    assert found.displacement[1] == pytest.approx(sum(displacement) / len(displacement), rel=1e-4)
    assert found.kl_interval[0] <= found.kl_mean <= found.kl_interval[1]


def test_attached_or_not_is_the_same(watch: Watch) -> None:
    model = watch(FAMILIES["gpt2"].make())
    trails = moving(model, tp.All())
    apart = tp.drift(model, trails, EXAMPLES)
    with tp.attach(model, trails):
        assert tp.drift(model, trails, EXAMPLES) == apart


def test_a_plain_text_is_prompt_throughout() -> None:
    class Letters:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [3 + ord(c) % 90 for c in text]}

    model = FAMILIES["llama"].make()
    found = tp.drift(model, moving(model, tp.Last(1)), ["one text", "another"], Letters())
    assert found.moved == pytest.approx(2 / (8 + 7))


def test_one_text_has_no_interval() -> None:
    model = FAMILIES["llama"].make()
    assert tp.drift(model, moving(model, tp.All()), EXAMPLES[:1]).kl_interval == (-math.inf, math.inf)


def test_modes_are_each_as_before() -> None:
    model = FAMILIES["llama"].make()
    model.model.layers[1].train()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize(
    ("texts", "message"),
    [([], "no texts"), (["a text"], "needs the tokenizer"), ([tp.Example((5,), (False,))], "text 0 has 1 tokens")],
)
def test_what_it_refuses(watch: Watch, texts: list[str], message: str) -> None:
    model = watch(FAMILIES["llama"].make())
    with pytest.raises(ValueError, match=message):
        tp.drift(model, moving(model, tp.All()), texts)
