"""Trails in weights and as a LoRA do what attached trails do; what no weights carry is refused with the reason."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from peft import PeftModel
from tiny import DIM, llama
from transformers import AutoModelForCausalLM

import tokenpaths as tp
from tokenpaths.interop import merge, to_peft
from tokenpaths.interop.affine import affine
from tokenpaths.trails import PSR, RED, BiasReFT, Chain, ConstantReFT, DirectReFT, Scaled

IDS = torch.arange(5, 17)[None]
pytestmark = pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")  # told in the docstring of to_peft
LOW_RANK = {
    "LoReFT": lambda dim=DIM: tp.LoReFT(dim, 3),
    "NoReFT": lambda dim=DIM: tp.NoReFT(dim, 3),
    "DiReFT": lambda dim=DIM: tp.DiReFT(dim, 3),
    "DirectReFT": lambda dim=DIM: DirectReFT(dim, 3),
    "ConstantReFT": lambda dim=DIM: ConstantReFT(dim, 3),
    "BiasReFT": lambda dim=DIM: BiasReFT(dim, 3),
    "Additive": lambda dim=DIM: tp.Additive(dim),
    "Scaled": lambda dim=DIM: Scaled(tp.LoReFT(dim, 3), 0.5),
    "Chain": lambda dim=DIM: Chain(tp.LoReFT(dim, 3), tp.DiReFT(dim, 2)),
    "Confined": lambda dim=DIM: tp.Confined(tp.DiReFT(dim, 3), dim, 4),
}
AFFINE = {**LOW_RANK, "RED": lambda dim=DIM: RED(dim)}


def random(trail: tp.Trail, seed: int = 0) -> tp.Trail:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trail.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in trail.named_buffers():
            if name.endswith("U"):
                buffer.copy_(torch.linalg.qr(torch.randn(buffer.shape[::-1], generator=generator)).Q.mT)
    return trail


def logits(model: Any, trails: tp.TrailMap | None = None, strength: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        if trails is None:
            return model(input_ids=IDS).logits
        with tp.attach(model, trails, strength=strength):
            return model(input_ids=IDS).logits


def assert_alike(found: torch.Tensor, expected: torch.Tensor, frozen: torch.Tensor) -> None:
    """Within 1e-4 of how large they are, of logits that were moved by far more."""
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (expected - frozen).abs().max() > 0.05


def with_biases() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**{**llama().config.to_dict(), "attention_bias": True, "mlp_bias": True})
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def maps(make: Any) -> tp.TrailMap:
    places = (tp.Site(0, stream="attention"), tp.Site(1, stream="mlp"), tp.Site(2, stream="mlp"))
    return tp.TrailMap({site: random(make(), seed) for seed, site in enumerate(places)})


@pytest.mark.parametrize("name", AFFINE)
def test_the_affine_parts_give_the_displacement(name: str) -> None:
    trail = random(AFFINE[name]())
    parts, h = affine(trail), torch.randn(7, DIM)
    assert parts is not None
    found = (parts.M @ h.double().T + parts.k[:, None]).T @ parts.B.T
    torch.testing.assert_close(found, trail(h).double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", AFFINE)
def test_merged_trails_do_what_attached_ones_do_and_come_out_to_the_bit(
    name: str, biased: bool, tmp_path: Path
) -> None:
    model, trails = with_biases() if biased else llama(), maps(AFFINE[name])
    before, flags = copy.deepcopy(model.state_dict()), (model.config.attention_bias, model.config.mlp_bias)
    frozen, expected = logits(model), logits(model, trails, 0.7)
    merged = merge(model, trails, strength=0.7)
    assert_alike(logits(model), expected, frozen)
    model.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_alike(logits(again), expected, frozen)
    merged.undo()
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert (model.config.attention_bias, model.config.mlp_bias) == flags and torch.equal(logits(model), frozen)


def test_what_is_merged_stays_when_its_handle_is_dropped_and_goes_with_its_block() -> None:
    model, trails = llama(), maps(AFFINE["LoReFT"])
    frozen, expected = logits(model), logits(model, trails)
    with merge(model, trails) as merged:
        assert "model.layers.1.mlp.down_proj.weight" in repr(merged)
        assert_alike(logits(model), expected, frozen)
    assert torch.equal(logits(model), frozen) and repr(merged) == "<merged, and undone>"
    merge(model, trails)
    assert_alike(logits(model), expected, frozen)


@pytest.mark.parametrize("name", [name for name in LOW_RANK if name != "Additive"])
def test_one_head_and_the_whole_attention_are_merged_together(name: str, tmp_path: Path) -> None:
    model = llama()
    head = tp.Site(1, stream="attention", head=2)
    trails = tp.TrailMap(
        {
            tp.Site(1, stream="attention"): random(tp.LoReFT(DIM, 2), 5),
            head: random(LOW_RANK[name](DIM // 4) if name != "Confined" else tp.Confined(tp.DiReFT(8, 3), 8, 4), 6),
        }
    )
    frozen, expected = logits(model), logits(model, trails)
    to_peft(trails, tmp_path / "lora", model)
    assert_alike(logits(PeftModel.from_pretrained(llama(), str(tmp_path / "lora"))), expected, frozen)
    merge(model, trails)
    assert_alike(logits(model), expected, frozen)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", LOW_RANK)
def test_real_peft_does_what_attached_trails_do(name: str, biased: bool, tmp_path: Path) -> None:
    make = with_biases if biased else llama
    model, trails = make(), maps(LOW_RANK[name])
    before = copy.deepcopy(model.state_dict())
    frozen, expected = logits(model), logits(model, trails, 0.7)
    to_peft(trails, tmp_path / "lora", model, strength=0.7)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    lora = PeftModel.from_pretrained(make(), str(tmp_path / "lora"))
    assert_alike(logits(lora), expected, frozen)
    if biased:
        assert_alike(logits(lora.merge_and_unload()), expected, frozen)


@pytest.mark.parametrize("make", [lambda: tp.Additive(DIM), lambda: BiasReFT(DIM, 3)])
def test_constants_at_a_block_go_into_a_bias(make: Any, tmp_path: Path) -> None:
    model = llama()
    trails = tp.TrailMap({tp.Site(0): random(make()), tp.Site(0, stream="mlp"): random(tp.LoReFT(DIM, 2), 3)})
    frozen, expected = logits(model), logits(model, trails)
    to_peft(trails, tmp_path / "lora", model)
    assert_alike(logits(PeftModel.from_pretrained(llama(), str(tmp_path / "lora"))), expected, frozen)
    merge(model, trails)
    assert_alike(logits(model), expected, frozen)


def tied() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**{**llama().config.to_dict(), "tie_word_embeddings": True})).eval()


EMBEDDED = {
    "LoReFT": (tp.Site(stream="embedding"), lambda: tp.LoReFT(DIM, 3)),
    "PSR at some": (tp.Site(0, tp.Tokens([5, 6, 8, 9]), "embedding"), lambda: PSR(DIM)),
    "Capped": (tp.Site(stream="embedding"), lambda: tp.Capped(tp.LoReFT(DIM, 3), 0.5)),
    "LoReFT at some": (tp.Site(0, tp.Tokens([5, 8]), "embedding"), lambda: tp.LoReFT(DIM, 3)),
}


@pytest.mark.parametrize("make", [llama, tied])
@pytest.mark.parametrize("name", EMBEDDED)
def test_the_table_carries_any_trail_and_a_tied_head_keeps_its_own(name: str, make: Any, tmp_path: Path) -> None:
    site, trail = EMBEDDED[name]
    laid = random(trail())
    if isinstance(laid, PSR):
        torch.nn.init.constant_(laid.b, 2.0)  # it opens
    model, trails = make(), tp.TrailMap({site: laid})
    frozen, expected = logits(model), logits(model, trails)
    if "LoReFT" in name:
        to_peft(trails, tmp_path / "lora", model)
        assert_alike(logits(PeftModel.from_pretrained(make(), str(tmp_path / "lora"))), expected, frozen)
    with merge(model, trails):
        assert_alike(logits(model), expected, frozen)
        model.save_pretrained(tmp_path / "merged")
        assert_alike(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()), expected, frozen)
    assert torch.equal(logits(model), frozen)
    assert model.config.tie_word_embeddings is (make is tied)


MERGED = ("llama", "qwen2", "gemma3", "gpt2", "gpt_neox", "phi", "olmo2")


@pytest.mark.parametrize("family", [name for name in MERGED if name in FAMILIES])
def test_families_carry_what_they_can_and_refuse_the_rest(family: str) -> None:
    """With b = 0 no bias is needed; a norm behind the projection does not matter, for the site lies before it."""
    model = FAMILIES[family].make()
    dim = tp.width(model)
    trails = tp.TrailMap(
        {s: random(tp.LoReFT(dim, 2), 2) for s in (tp.Site(1, stream="attention"), tp.Site(0, stream="mlp"))}
    )
    for _, trail in trails.items():
        torch.nn.init.zeros_(trail.b)
    before = copy.deepcopy(model.state_dict())
    frozen, expected = logits(model), logits(model, trails)
    with merge(model, trails, savable=False):
        assert (logits(model) - expected).abs().max() < 1e-4 * expected.abs().max()
        assert not torch.equal(expected, frozen)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    constant = tp.TrailMap({tp.Site(1): random(tp.Additive(dim))})
    expected = logits(model, constant)
    if family in ("gemma3", "olmo2"):  # a norm stands between the projection and the residual stream
        with pytest.raises(ValueError, match="something stands between a projection and the residual stream"):
            merge(model, constant, savable=False)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    else:
        with merge(model, constant, savable=False):
            assert (logits(model) - expected).abs().max() < 1e-4 * expected.abs().max()


def lora_model() -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(llama(), LoraConfig(target_modules=["o_proj", "down_proj"]))


def gated() -> tp.TrailMap:
    from tokenpaths.trailmap.gate import Gate

    trails = tp.TrailMap({tp.Site(1, stream="mlp"): tp.LoReFT(DIM, 2)})
    trails.gate = Gate([1], [[5]], DIM)
    return trails


REFUSED = {
    "rule": (llama, tp.TrailMap({tp.Site(1, tp.Last(1), "mlp"): tp.LoReFT(DIM, 2)}), "weights act on every token"),
    "block": (
        llama,
        tp.TrailMap({tp.Site(1): random(tp.LoReFT(DIM, 2))}),
        "only constant trails can be merged at a block",
    ),
    "gated trail": (llama, tp.TrailMap({tp.Site(1, stream="mlp"): PSR(DIM)}), "PSR is not affine in what it reads"),
    "gate": (llama, gated(), "a gate decides for each request"),
    "capped": (
        llama,
        tp.TrailMap({tp.Site(1, stream="mlp"): tp.Capped(tp.Additive(DIM), 1.0)}),
        "Capped is not affine",
    ),
    "peft": (lora_model, tp.TrailMap({tp.Site(1, stream="mlp"): tp.LoReFT(DIM, 2)}), "merge PEFT's own adapters first"),
    "no bias": (
        FAMILIES["qwen2"].make,
        tp.TrailMap({tp.Site(1, stream="mlp"): random(tp.Additive(32))}),
        "Qwen2ForCausalLM has no bias at model.layers.1.mlp.down_proj.bias",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_weights_carry_is_refused_and_nothing_changes(name: str, tmp_path: Path) -> None:
    make, trails, message = REFUSED[name]
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        merge(model, trails)
    if name != "no bias":
        with pytest.raises(ValueError, match=message):
            to_peft(trails, tmp_path / "lora", model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not (tmp_path / "lora").exists()


def test_attached_trails_are_taken_away_before_they_are_merged() -> None:
    model, trails = llama(), maps(AFFINE["LoReFT"])
    with tp.attach(model, trails), pytest.raises(ValueError, match=r"detach\(model\) first"):
        merge(model, trails)


def test_a_lora_tells_no_path_of_this_machine(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    to_peft(maps(AFFINE["LoReFT"]), tmp_path / "lora", loaded)
    assert str(tmp_path) not in (tmp_path / "lora" / "adapter_config.json").read_text()


def test_full_rank_is_merged_and_is_no_lora(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="RED changes every dimension by itself, which is of full rank: use merge"):
        to_peft(maps(AFFINE["RED"]), tmp_path / "lora", llama())
