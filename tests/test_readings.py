"""Reading two runs side by side: what is read, and what both share being computed once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from families import FAMILIES, MISSING
from tiny import llama, make_examples, make_trails
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tokenpaths as tp
from tokenpaths.data import Batch, collate
from tokenpaths.engine import Reading, Run, evaluating, read, runs
from tokenpaths.site import Host

Watch = Callable[[nn.Module], nn.Module]
TEXT_MODELS = {name: family for name, family in FAMILIES.items() if family.kind in ("decoder", "encoder")}
EXAMPLES = make_examples(3)


def laid(model: nn.Module, *sites: tp.Site) -> tp.TrailMap:
    """Trails that move much, with the same numbers each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return tp.TrailMap({site: tp.LoReFT(tp.width(model), 4, init="paper") for site in sites})


def unshared(pair: tuple[Run, Run]) -> tuple[Run, Run]:
    return pair[0], replace(pair[1], shares=0)


def assert_same(a: Reading, b: Reading) -> None:
    assert a.states.keys() == b.states.keys()
    assert torch.equal(a.logits, b.logits)
    assert all(torch.equal(a.states[name], b.states[name]) for name in a.states)


def flops(pair: tuple[Run, Run], batch: Batch) -> int:
    with FlopCounterMode(display=False) as counter:
        read(*pair, batch)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_sharing_changes_no_bit(name: str, watch: Watch) -> None:
    model = watch(TEXT_MODELS[name].make())
    sides: tuple[Literal["left", "right"], ...] = ("left", "right")
    for site, side in zip((tp.Site(1, tp.All()), tp.Site(2, tp.All(), "mlp")), sides, strict=True):
        pair, batch = runs(model, laid(model, site)), collate(EXAMPLES, side=side)
        assert pair[1].shares == 2
        for shared, plain in zip(read(*pair, batch), read(*unshared(pair), batch), strict=True):
            assert_same(shared[0], plain[0])
            assert_same(shared[1], plain[1])
            equal = [torch.equal(shared[0].states[layer], shared[1].states[layer]) for layer in shared[0].states]
            assert equal == [i < site.layer + 1 for i in range(len(equal))]  # and moved from there on


@pytest.mark.parametrize("name", "llama gemma3 granite gpt2 gpt_neox opt_350m bloom falcon mpt xglm bert".split())
def test_states_are_those_of_transformers(name: str) -> None:
    if name in MISSING:
        pytest.skip(MISSING[name])
    model = TEXT_MODELS[name].make()
    batch = collate(EXAMPLES[:1])
    found, _ = read(Run(model), Run(model), batch)[0]
    with torch.no_grad():
        told = model(batch.input_ids, output_hidden_states=True)
    assert torch.equal(found.logits, told.logits[0])
    for i in range(3):  # hidden_states[3] has gone through the final norm
        assert torch.equal(found.states[["embedding", "block 0", "block 1"][i]], told.hidden_states[i][0])


@pytest.mark.parametrize(
    ("site", "shared"),
    [
        (tp.Site(0, stream="embedding"), 0),
        (tp.Site(0), 1),
        (tp.Site(1, stream="attention", head=2), 1),
        (tp.Site(1, stream="mlp"), 1),
        (tp.Site(-1), 3),
    ],
)
def test_what_is_shared_is_not_computed_twice(site: tp.Site, shared: int) -> None:
    model = llama().requires_grad_(False)
    sites = {site, tp.Site(-1)}
    trails = tp.TrailMap({site: tp.trails.RED(tp.width(model, site)) for site in sites}).requires_grad_(False)
    assert Host.of(model, trails.blocks).blocks_below(trails.sites) == shared
    pair, batch = runs(model, trails), collate(EXAMPLES)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    once = counter.get_total_flops()
    blocks = sum(
        sum(of.values())
        for name, of in counter.get_flop_counts().items()
        if ".layers." in name and name.count(".") == 3
    )
    assert flops(unshared(pair), batch) == 2 * once
    assert flops(pair, batch) == 2 * once - blocks * shared // 3


def test_hooks_of_others_run_on_shared_blocks() -> None:
    model = llama()
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output))
    read(*runs(model, laid(model, tp.Site(2))), collate(EXAMPLES))
    assert len(seen) == 6


class Notebook(nn.Module):
    """A model whose blocks write into a list of the model's that they pass on: none of them may be left out."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(8, 8)

        def forward(self, hidden_states: Tensor, notes: list[Tensor]) -> Tensor:
            notes.append(self.map(hidden_states))
            return hidden_states + sum(notes)

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[Tensor] = []
        self.embed = nn.Embedding(96, 8)
        self.layers = nn.ModuleList(self.Block() for _ in range(3))
        self.head = nn.Linear(8, 96)
        self.config = type("Config", (), {"hidden_size": 8, "num_hidden_layers": 3})()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        self.notes.clear()
        h = self.embed(input_ids)
        for layer in self.layers:
            h = layer(h, notes=self.notes)
        return type("Output", (dict,), {"logits": self.head(h)})()


def test_blocks_that_leave_marks_are_not_shared(watch: Watch) -> None:
    model = watch(Notebook())
    pair = runs(model, laid(model, tp.Site(1)))
    batch = collate(EXAMPLES)
    for shared, plain in zip(read(*pair, batch), read(*unshared(pair), batch), strict=True):
        assert_same(shared[1], plain[1])
        assert list(shared[0].states) == ["embedding", "block 0", "block 1", "block 2"]  # no output embedding is known


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_cut_off(side: Literal["left", "right"]) -> None:
    model, trails = llama().double(), make_trails().double()
    rounding = dict(rtol=1e-4, atol=1e-4)  # rotary angles are in float32, and positions shift with the padding
    together = read(*runs(model, trails), collate(EXAMPLES, side=side))
    for example, pair in zip(EXAMPLES, together, strict=True):
        alone = read(*runs(model, trails), collate([example]))[0]
        for x, y in zip(pair, alone, strict=True):
            assert tuple(x.ids.tolist()) == example.ids and tuple(x.answer.tolist()) == example.answer
            assert int(x.prompt.sum()) == example.prompt_length
            torch.testing.assert_close(x.logits, y.logits, **rounding)
            for name in x.states:
                torch.testing.assert_close(x.states[name], y.states[name], **rounding)


def test_states_are_views() -> None:
    reading, _ = read(Run(llama()), Run(llama()), collate(EXAMPLES))[0]
    assert all(state._is_view() for state in reading.states.values())


def test_spans_and_the_prompt_reach_the_rules() -> None:
    model = llama()
    examples = [tp.Example((5, 6, 7, 8), (False, False, True, True), {"fact": (1, 2)})]
    for rule, moved in ((tp.Span("fact"), [1]), (tp.Answer(), [2, 3]), (tp.Last(1), [1])):
        x, y = read(*runs(model, laid(model, tp.Site(2, rule))), collate(examples))[0]
        assert (x.states["block 2"] != y.states["block 2"]).any(-1).nonzero().flatten().tolist() == moved


def test_through_peft(watch: Watch) -> None:
    from peft import LoraConfig, get_peft_model

    lora = watch(get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)))
    pair = runs(lora, laid(lora, tp.Site(1, tp.All())))
    batch = collate(EXAMPLES)
    for shared, plain in zip(read(*pair, batch), read(*unshared(pair), batch), strict=True):
        assert_same(shared[1], plain[1])
        assert "norm" in shared[1].states


@pytest.mark.parametrize("where", ["outside", "in place"])
def test_a_compiled_model_is_read_as_it_is(where: str, unchecked: None) -> None:
    model, batch = small(num_hidden_layers=2), collate(EXAMPLES)
    expected = read(*runs(model, laid(model, tp.Site(1))), batch)
    compiled: Any = torch.compile(model, backend="eager") if where == "outside" else model
    if where == "in place":
        model.compile(backend="eager")
    with torch.no_grad():
        compiled(batch.input_ids)
    for got, want in zip(read(*runs(compiled, laid(model, tp.Site(1))), batch), expected, strict=True):
        assert_same(got[1], want[1])


def test_modes_are_each_as_before() -> None:
    model = llama()
    model.model.layers[1].train()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before


def test_an_error_leaves_nothing_behind(watch: Watch) -> None:
    model = watch(llama())

    class Fails(tp.Trail):
        def forward(self, h: Tensor) -> Tensor:
            raise RuntimeError("this trail fails")

    trails = tp.TrailMap({tp.Site(1): Fails()})
    with pytest.raises(RuntimeError, match="this trail fails"):
        read(*runs(model, trails), collate(EXAMPLES))
    assert not tp.attachment.is_attached(model, trails)


def poisoned(layer: str) -> nn.Module:
    model = llama()
    with torch.no_grad():
        if layer == "logits":
            model.lm_head.weight[5] = torch.inf
        else:
            model.model.layers[int(layer[-1])].mlp.down_proj.weight[0] = torch.nan
    return model


@pytest.mark.parametrize("layer", ["block 1", "logits"])
def test_nan_is_named(layer: str) -> None:
    for pair, run in (((llama(), poisoned(layer)), "after"), ((poisoned(layer), llama()), "before")):
        with pytest.raises(ValueError, match=f"text 0 of the batch, the run {run}: NaN or infinity at '{layer}'"):
            read(Run(pair[0]), Run(pair[1]), collate(EXAMPLES))


def test_nan_in_padding_is_no_matter() -> None:
    """Rows of padding may attend to nothing at all."""
    model = llama()

    def spoil(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.where(batch.attention_mask.bool()[..., None], output, torch.nan)

    batch = collate(EXAMPLES)
    model.lm_head.register_forward_hook(spoil)
    assert len(read(Run(model), Run(model), batch)) == 3


def small(**changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = dict(vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32)
    return LlamaForCausalLM(LlamaConfig(**{**size, **changes})).eval()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 99}, "the vocabulary has size 96 before and 99 after"),
        ({"num_hidden_layers": 2}, "the number of layers is 5 before and 4 after"),
        ({"hidden_size": 16}, "the width of 'embedding' is 32 before and 16 after"),
    ],
)
def test_models_that_do_not_compare(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(Run(llama()), Run(small(**changes)), collate(EXAMPLES))


def test_what_it_refuses(watch: Watch) -> None:
    run = Run(watch(llama()))
    one, batch = collate([tp.Example((5,), (False,)), EXAMPLES[0]]), collate(EXAMPLES)
    with pytest.raises(ValueError, match="text 0 of the batch has 1 tokens; drift needs at least two"):
        read(run, run, one)
    empty = Batch(*(value[:0] for value in (batch.input_ids, batch.attention_mask, batch.labels, batch.prompt_mask)))
    with pytest.raises(ValueError, match="the batch is empty"):
        read(run, run, empty)
    holes = batch.attention_mask.clone()
    holes[2, 1] = 0
    with pytest.raises(ValueError, match="text 2 of the batch has padding between its tokens"):
        read(run, run, replace(batch, attention_mask=holes))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has an encoder and a decoder"):
        read(*[Run(FAMILIES["t5"].make(), blocks="decoder.block")] * 2, batch)
    with pytest.raises(ValueError, match="LlamaModel gives no logits"):
        read(*[Run(run.model.model)] * 2, batch)
