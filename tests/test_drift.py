"""Drift of a model by its trails, and of any two runs, against figures worked out from plain forwards."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES
from tiny import llama
from torch import Tensor, nn

import tokenpaths as tp
from tokenpaths.drift import compare
from tokenpaths.engine import Run

Watch = Callable[[nn.Module], nn.Module]
EXAMPLES = [
    tp.Example(ids=(5, 6, 7, 8, 9, 10), answer=(False, False, False, True, True, True)),
    tp.Example(ids=(11, 12, 13, 14), answer=(False, True, True, True)),
    tp.Example(ids=(20, 21, 22, 23, 24), answer=(False, False, True, True, True)),
]


def moving(model: nn.Module, rule: tp.tokens.Rule, layer: int = 1) -> tp.TrailMap:
    return tp.TrailMap({tp.Site(layer, rule): tp.LoReFT(tp.width(model), 4, init="paper")})


class Letters:
    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(c) % 90 for c in text]}


def test_fresh_trails_do_not_drift(watch: Watch) -> None:
    model = watch(FAMILIES["llama"].make())
    found = tp.measure_drift(model, tp.TrailMap({tp.Site(1, tp.All()): tp.LoReFT(32, 4)}), EXAMPLES)
    for record in found.records():
        if record["run"] in ("", "change"):
            assert [record[key] for key in ("mean", "low", "high", "p50", "p99", "max")] == [0] * 6, record
    assert found["nll"].before == found["nll"].after
    assert found.perplexity.ratio == 1 and found.perplexity.interval == (1, 1)
    assert (found.moved, found.tokens, found.texts, found.answers) == (0, 15, 3, 9)
    assert found["kl"].count == 15 and found["nll"].change.count == 12  # the last token of a text predicts nothing


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_figures_are_those_of_two_plain_forwards(batch_size: int, watch: Watch) -> None:
    model = watch(FAMILIES["llama"].make())
    trails = moving(model, tp.Answer())
    states: list[Tensor] = []

    def forward(ids: Tensor, **inputs: Tensor) -> Any:
        """With a hook of its own: the `output_hidden_states` of transformers 4.57 lack what trails add."""

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            states.append(output[0] if isinstance(output, tuple) else output)

        handle = model.model.layers[1].register_forward_hook(keep)
        output = model(ids, **inputs)
        handle.remove()
        return output

    kl: list[float] = []
    nll: list[float] = []
    flipped: list[bool] = []
    displacement: list[float] = []
    for example in EXAMPLES:
        ids = torch.tensor([example.ids])
        labels = torch.where(torch.tensor([example.answer]), ids, -100)
        with torch.no_grad():
            frozen = forward(ids)
            with tp.attach(model, trails):
                steered = forward(ids, labels=labels)
        p, q = frozen.logits[0].double().softmax(-1), steered.logits[0].double().softmax(-1)
        kl += (p * (p.log() - q.log())).sum(-1).tolist()
        flipped += (p.argmax(-1) != q.argmax(-1)).tolist()
        nll += (-q.log()[:-1].gather(-1, ids[0, 1:, None])).flatten().tolist()
        x, y = (rows.reshape(ids.shape[1], -1) for rows in states[-2:])
        displacement += ((y - x).norm(dim=-1) / x.norm(dim=-1)).tolist()
    found = tp.measure_drift(model, trails, EXAMPLES, batch_size=batch_size)
    assert found["kl"].mean == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert found["kl"].max == pytest.approx(max(kl), rel=1e-4)
    assert found["kl"].p50 == pytest.approx(sorted(kl)[7], rel=0.006)
    assert found["kl"].interval[0] <= found["kl"].mean <= found["kl"].interval[1]
    assert found["flips"].mean == sum(flipped) / len(flipped)
    assert found["nll"].after.mean == pytest.approx(sum(nll) / len(nll), rel=1e-4)
    assert found.perplexity.after == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)
    assert found.perplexity.ratio == pytest.approx(found.perplexity.after / found.perplexity.before)
    assert found.moved == 9 / 15
    by_layer = found["displacement"]
    assert by_layer.layers == ("embedding", "block 0", "block 1", "block 2", "norm")
    assert by_layer["embedding"].max == by_layer["block 0"].max == 0  # the light cone: below the first moved layer
    assert by_layer["block 1"].mean == pytest.approx(sum(displacement) / len(displacement), rel=1e-4)


def test_attached_or_not_is_the_same(watch: Watch) -> None:
    model = watch(FAMILIES["gpt2"].make())
    trails = moving(model, tp.All())
    apart = tp.measure_drift(model, trails, EXAMPLES)
    with tp.attach(model, trails):
        assert tp.measure_drift(model, trails, EXAMPLES) == apart


def test_dropout_of_trails_is_off_and_their_mode_as_before() -> None:
    model = FAMILIES["llama"].make()
    trails = tp.TrailMap({tp.Site(1): tp.LoReFT(32, 4, dropout=0.9, init="paper")}).train()
    assert tp.measure_drift(model, trails, EXAMPLES) == tp.measure_drift(model, trails, EXAMPLES)
    assert all(module.training for module in trails.modules())


def test_a_known_displacement_is_read_back() -> None:
    model = FAMILIES["llama"].make()
    trails = tp.TrailMap({tp.Site(1, tp.Last(1)): tp.Additive(32)})
    v = next(trails.parameters()).detach()
    with torch.no_grad():
        v.copy_(torch.randn(32))
        states = model(torch.tensor([EXAMPLES[0].ids]), output_hidden_states=True).hidden_states[2][0]
    found = tp.measure_drift(model, trails, EXAMPLES[:1])
    expected = float(v.norm() / states[2].norm())  # the third token is the last of the prompt
    assert found["displacement"]["block 1"].max == pytest.approx(expected, rel=1e-5)
    offsets, means = found.by_position("displacement")
    assert means.shape == (5, 129)
    at_block_1 = dict(zip(offsets.tolist(), means[2].tolist(), strict=True))
    assert [at_block_1[i] for i in (-2, -1, 1, 2, 3)] == [0] * 5
    assert at_block_1[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt_350m", "bert"])
def test_outside_the_light_cone_drift_is_exactly_zero(name: str) -> None:
    """Tokens before the first moved one (in a decoder), and layers below it."""
    model = FAMILIES[name].make()
    found = tp.measure_drift(
        model, moving(model, tp.Answer() if FAMILIES[name].kind == "decoder" else tp.All()), EXAMPLES
    )
    for name_ in ("displacement", "cosine_shift"):
        assert [found[name_][layer].max for layer in ("embedding", "block 0")] == [0, 0]
        assert found[name_]["block 1"].max > 0
    if FAMILIES[name].kind == "decoder":
        offsets, means = found.by_position("displacement")
        assert not means[:, (offsets > -3) & (offsets <= 0)].any()
        offsets, means = found.by_position("kl")
        assert not means[(offsets > -3) & (offsets <= 0)].any() and (means[(offsets > 0) & (offsets < 4)] > 0).all()


def test_a_plain_text_is_prompt_throughout() -> None:
    model = FAMILIES["llama"].make()
    found = tp.measure_drift(model, moving(model, tp.Last(1)), ["one text", "another"], Letters())
    assert found.moved == pytest.approx(2 / (8 + 7))
    assert found.answers == 0 and math.isnan(found.calibration[0])
    offsets, means = found.by_position("kl")
    assert offsets[~torch.tensor(means).isnan().numpy()].tolist() == list(range(-7, 1))


def test_a_text_is_cut() -> None:
    model = FAMILIES["llama"].make()
    assert tp.measure_drift(model, moving(model, tp.All()), ["one text"], Letters(), max_length=3).tokens == 3


def test_one_text_has_no_interval() -> None:
    model = FAMILIES["llama"].make()
    found = tp.measure_drift(model, moving(model, tp.All()), EXAMPLES[:1])
    assert found["kl"].interval == (-math.inf, math.inf)
    assert found.perplexity.interval == (0, math.inf)


def test_two_models_are_compared(watch: Watch) -> None:
    first, second = watch(llama()), watch(llama())
    same = compare(first, second, EXAMPLES)
    assert same["kl"].max == same["displacement"]["norm"].max == same.moved == 0
    other = llama()
    with torch.no_grad():
        other.model.layers[2].mlp.down_proj.weight.mul_(2)
    found = compare(first, other, EXAMPLES)
    assert found["displacement"]["block 1"].max == 0 < found["displacement"]["block 2"].mean
    assert found.moved == 1


def test_an_adapter_is_compared_on_and_off() -> None:
    from peft import LoraConfig, get_peft_model

    lora = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    merged = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"])).eval()
    merged.load_state_dict(lora.state_dict())
    found = compare(Run(lora, lora.disable_adapter), lora, EXAMPLES)
    assert compare(llama(), lora, EXAMPLES)["kl"].mean == found["kl"].mean > 0
    assert compare(llama(), merged.merge_and_unload(), EXAMPLES)["kl"].mean == pytest.approx(found["kl"].mean, rel=1e-3)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "no texts"),
        (["a text"], "needs the tokenizer"),
        ([tp.Example((5,), (False,))], "text 0 has 1 tokens"),
    ],
)
def test_what_it_refuses(watch: Watch, texts: list[str], message: str) -> None:
    model = watch(FAMILIES["llama"].make())
    with pytest.raises(ValueError, match=message):
        tp.measure_drift(model, moving(model, tp.All()), texts)


def test_one_string_is_no_list_of_texts(watch: Watch) -> None:
    model = watch(FAMILIES["llama"].make())
    with pytest.raises(TypeError, match=r"drift takes a list of texts, not str: give \[text\]"):
        tp.measure_drift(model, moving(model, tp.All()), "a text", Letters())


def test_an_empty_string_is_refused(watch: Watch) -> None:
    model = watch(FAMILIES["llama"].make())
    with pytest.raises(ValueError, match="text 1 has 0 tokens; drift needs at least two"):
        tp.measure_drift(model, moving(model, tp.All()), ["a text", ""], Letters())
