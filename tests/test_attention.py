"""The attention maps of two runs against those of transformers, and measures of maps against their definitions."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy
from torch import Tensor, nn

import tokenpaths as tp
from tokenpaths import Example
from tokenpaths.data import Batch, collate
from tokenpaths.drift import attention_entropy, attention_js, read_attention, sink_mass
from tokenpaths.engine import Run, read, runs

Watch = Callable[[nn.Module], nn.Module]
Maps = dict[tuple[str, int], Tensor]
LENGTHS = (7, 4, 9)
EXAMPLES = [Example(tuple(range(3 + n, 3 + 2 * n)), (False,) * (n - 2) + (True,) * 2) for n in LENGTHS]
SEEDS = st.integers(0, 2**31)


def make(name: str, attention: str = "eager") -> Any:
    model: Any = FAMILIES[name].make()
    if name.startswith("falcon") or name == "bert":  # chooses its attention when it is built; BERT in transformers 4
        return type(model)._from_config(model.config, attn_implementation=attention).eval()
    model.set_attn_implementation(attention)
    return model


def additive(model: nn.Module, *places: tp.Site) -> tp.TrailMap:
    trails = tp.TrailMap({site: tp.Additive(tp.width(model, site)) for site in places or (tp.Site(0),)})
    with torch.no_grad():
        for parameter in trails.parameters():
            parameter.normal_()
    return trails


def shown(before: Run, after: Run, batch: Batch) -> tuple[Maps, Maps]:
    frozen: Maps = {}
    steered: Maps = {}

    def see(layer: str, row: int, p: Tensor, q: Tensor) -> None:
        assert (layer, row) not in frozen
        frozen[layer, row], steered[layer, row] = p.clone(), q.clone()

    read_attention(before, after, batch, see)
    return frozen, steered


def equal(x: Maps, y: Maps) -> bool:
    return x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)


def moved(x: Maps, y: Maps) -> set[str]:
    """The layers at which two runs differ."""
    return {key[0] for key in x if not torch.equal(x[key], y[key])}


def own(run: Run, batch: Batch) -> Maps:
    """What transformers gives as `attentions`, by layer and row, without padding."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if "use_cache" in inspect.signature(run.model.forward).parameters:
        inputs["use_cache"] = False  # a cache lays keys out in another order, and some CPUs then round otherwise
    with run.inside(), torch.no_grad():
        attentions = run.model(**inputs, output_attentions=True).attentions
    return {
        (f"block {layer}", row): maps[row][:, real][:, :, real]
        for layer, maps in enumerate(attentions)
        for row, real in enumerate(batch.attention_mask.bool())
    }


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "name",
    "llama mistral gemma2 gemma3 gpt_oss deepseek_v3 mixtral gpt2 gptj gpt_bigcode gpt_neo gpt_neox opt opt_350m "
    "bloom falcon falcon_rw mpt bert".split(),
)
def test_maps_are_those_of_transformers(name: str, side: Any) -> None:
    model, batch = make(name), collate(EXAMPLES, side=side)
    trails = additive(model)
    with tp.attach(model, trails):
        before, after = runs(model, trails)
        frozen, steered = shown(before, after, batch)
        assert equal(frozen, own(before, batch)) and equal(steered, own(after, batch))
    assert moved(frozen, steered) == {"block 1", "block 2"}  # the trail lies on the output of block 0
    for p in frozen.values():
        assert name == "gpt_oss" or torch.allclose(p.sum(-1), torch.ones(()))  # has a learned sink beside the tokens


def test_readings_are_those_of_read(watch: Watch) -> None:
    model, batch = watch(make("llama")), collate(EXAMPLES)
    both = runs(model, additive(model))
    for found, expected in zip(read_attention(*both, batch, lambda *_: None), read(*both, batch), strict=True):
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x.logits, y.logits)
            assert all(torch.equal(x.states[name], y.states[name]) for name in y.states)


@pytest.mark.parametrize("site", [tp.Site(0, stream="embedding"), tp.Site(1, stream="attention", head=2)])
def test_trails_inside_attention(site: tp.Site) -> None:
    """The maps are made again after the forwards, through modules that trails are hooked into."""
    model, batch = make("llama"), collate(EXAMPLES)
    trails = additive(model, site)
    before, after = runs(model, trails)
    frozen, steered = shown(before, after, batch)
    with tp.attach(model, trails):
        assert equal(frozen, own(before, batch)) and equal(steered, own(after, batch))
    assert moved(frozen, steered) == {f"block {i}" for i in range(2 if site.layer else 0, 3)}


def lora() -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(make("llama"), config).eval()


@pytest.mark.parametrize("off", ["before", "after"])
def test_adapters_on_and_off(off: str) -> None:
    """LoRA on the queries changes how a map is made and not only of what: each run's maps are made inside that run."""
    model, batch = lora(), collate(EXAMPLES)
    before = Run(model, model.disable_adapter if off == "before" else nullcontext)
    after = Run(model, model.disable_adapter if off == "after" else nullcontext)
    expected = own(before, batch), own(after, batch)
    frozen, steered = shown(before, after, batch)
    assert equal(frozen, expected[0]) and equal(steered, expected[1])
    assert moved(frozen, steered) == {"block 0", "block 1", "block 2"}


def test_two_models() -> None:
    before, after, batch = make("llama"), make("mistral"), collate(EXAMPLES)
    expected = own(Run(before), batch), own(Run(after), batch)
    for model in (before, after):  # it stays so, but is read without dropout
        model.train()
        for block in model.model.layers:
            block.self_attn.attention_dropout = 0.5
    frozen, steered = shown(Run(before), Run(after), batch)
    assert equal(frozen, expected[0]) and equal(steered, expected[1])
    assert before.training and after.training


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_against_itself_is_exactly_zero(name: str, dtype: torch.dtype) -> None:
    model = make(name).to(dtype)
    frozen, steered = shown(Run(model), Run(model), collate(EXAMPLES))
    for key, p in frozen.items():
        assert (attention_js(p, steered[key]) == 0).all()
        assert attention_js(p, p).dtype == attention_entropy(p).dtype == sink_mass(p).dtype == torch.float32


def test_two_maps_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make("llama"), collate(EXAMPLES)
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    softmax = torch.nn.functional.softmax

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        maps = softmax(*args, **kwargs)
        made.append(weakref.ref(maps))
        alive.append(sum(ref() is not None for ref in made))
        return maps

    monkeypatch.setattr(torch.nn.functional, "softmax", counting)
    read_attention(Run(model), Run(model), batch, lambda *_: alive.append(sum(ref() is not None for ref in made)))
    forwards, shown = [1, 1, 1] * 2, [1, 2, *[2] * len(LENGTHS)] * 3
    assert alive == forwards + shown


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "LlamaAttention"), ("gpt2", "GPT2Attention"), ("falcon", "FalconAttention")]
)
def test_without_eager_attention(name: str, kind: str, watch: Watch) -> None:
    """Under sdpa, the default, transformers gives None in place of maps, and says nothing."""
    model = watch(make(name, "sdpa"))
    with pytest.raises(ValueError, match=rf'block 0 \({kind}\).*sdpa.*set_attn_implementation\("eager"\)'):
        shown(Run(model), Run(model), collate(EXAMPLES))


def test_without_attention() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4)
    model = transformers.MambaForCausalLM(config).eval()
    with pytest.raises(ValueError, match=r"found no attention in the blocks of MambaForCausalLM"):
        shown(Run(model), Run(model), collate(EXAMPLES))


def test_other_layers_or_heads() -> None:
    model, batch = make("llama"), collate(EXAMPLES)
    config = type(model.config)(
        **{**model.config.to_dict(), "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 4}
    )
    heads = type(model)._from_config(config, attn_implementation="eager").eval()
    with pytest.raises(ValueError, match="the attention of block 0 has 4 heads before and 8 after"):
        shown(Run(model), Run(heads), batch)
    config = type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": 2})
    fewer = type(model)._from_config(config, attn_implementation="eager").eval()
    with pytest.raises(ValueError, match="layers"):
        shown(Run(model), Run(fewer), batch)


def test_errors_leave_no_hooks(watch: Watch) -> None:
    model = watch(make("llama"))

    def see(*_: Any) -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        read_attention(Run(model), Run(model), collate(EXAMPLES), see)
    with pytest.raises(ValueError, match="token"):
        read_attention(Run(model), Run(model), collate([Example((3,), (False,))]), see)


def draw(seed: int, heads: int = 3, n: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    """Causal maps, some rows of them with all on one token."""
    scores = 5 * torch.randn(heads, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scores[0] *= 100
    return scores.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf).softmax(-1).to(dtype)


@given(SEEDS)
@settings(max_examples=20)
def test_measures_of_maps_against_scipy(seed: int) -> None:
    p, q = draw(seed), draw(seed + 1)
    x, y = p.numpy(), q.numpy()
    np.testing.assert_allclose(attention_js(p, q), jensenshannon(x, y, axis=-1) ** 2, rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(attention_entropy(p), entropy(x, axis=-1), atol=1e-12)
    assert torch.equal(sink_mass(p), p[:, :, 0]) and (sink_mass(p)[:, 0] == 1).all()


@given(SEEDS)
@settings(max_examples=20)
def test_attention_js_is_symmetric_and_bounded(seed: int) -> None:
    p, q = draw(seed, dtype=torch.float32), draw(seed + 1, dtype=torch.float32)
    found = attention_js(p, q)
    torch.testing.assert_close(found, attention_js(q, p), rtol=1e-6, atol=0)
    assert (found >= 0).all() and (found <= math.log(2) + 1e-6).all()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(attention_js(p[:, :, order], q[:, :, order]), found)
    torch.testing.assert_close(attention_js(p[:, order], q[:, order]), found[:, order])


def test_attention_js_of_maps_apart_and_of_close_ones() -> None:
    apart = torch.eye(4)[None]
    torch.testing.assert_close(attention_js(apart, apart.flip(-1)), torch.full((1, 4), math.log(2)))
    p = torch.full((1, 2, 2), 0.5)
    shift = torch.tensor([1e-4, -1e-4])
    torch.testing.assert_close(attention_js(p, p + shift), torch.full((1, 2), (2e-4) ** 2 / 8), rtol=1e-3, atol=0)


def test_learned_sink_is_a_column() -> None:
    """A row of gpt-oss sums to less than 1; a row in bfloat16 only seems to."""
    p, q = torch.tensor([[[0.2, 0.0], [0.1, 0.1]]]), torch.tensor([[[0.6, 0.0], [0.1, 0.1]]])
    x, y = np.array([0.2, 0.8]), np.array([0.6, 0.4])
    assert attention_js(p, q)[0, 0].item() == pytest.approx(jensenshannon(x, y) ** 2, rel=1e-5)
    assert attention_entropy(p)[0].tolist() == pytest.approx([entropy(x), entropy([0.1, 0.1, 0.8])])
    assert sink_mass(p).tolist() == [[pytest.approx(0.2), pytest.approx(0.1)]]
    even = torch.full((1, 7, 7), 1 / 7, dtype=torch.bfloat16)
    assert even.float().sum(-1).ne(1).all()
    torch.testing.assert_close(attention_entropy(even), torch.full((1, 7), math.log(7)), rtol=1e-6, atol=0)
