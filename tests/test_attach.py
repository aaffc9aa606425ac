"""attach: its handle, several maps at once, and what it refuses."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import transformers
from families import FAMILIES, LAYERS
from laws import PROMPTS, Case, assert_close, block_outputs, padded
from subjects import MOVING

import tokenpaths as tp
from tokenpaths import Additive, All, Answer, Capped, Last, LoReFT, Match, Site, Span, Tokens, Trail, TrailMap, attach
from tokenpaths.attachment import is_attached
from tokenpaths.trails import Chain

INPUTS = padded(PROMPTS)
CASE = Case("llama", "model.layers", "LoReFT", "all", "block")


@pytest.fixture
def model(watch):
    return watch(FAMILIES["llama"].make().requires_grad_(False))


ALL = All()


def one(name="LoReFT", layer=1, rule=ALL, **more):
    return TrailMap({Site(layer, rule, **more): MOVING[name](32)})


def logits(model, **more):
    with torch.no_grad():
        return model(**INPUTS, **more).logits


# --- the handle


def test_the_handle(model):
    trails = one()
    frozen = logits(model)
    handle = attach(model, trails)
    assert repr(handle) == "<attached: 1 sites, strength 1.0>" and is_attached(model, trails)
    assert not is_attached(model, one())
    moved = logits(model)
    handle.remove()
    handle.remove()
    assert repr(handle) == "<removed: 1 sites, strength 1.0>" and not is_attached(model, trails)
    assert torch.equal(logits(model), frozen) and not torch.equal(moved, frozen)


def test_strength_at_run_time(model):
    trails = one()
    frozen = block_outputs(model, CASE, INPUTS)[1]
    with attach(model, trails, strength=2.0) as handle:
        double = block_outputs(model, CASE, INPUTS)[1]
        handle.strength = 1.0
        full = block_outputs(model, CASE, INPUTS)[1]
        handle.strength = 0.0
        assert torch.equal(block_outputs(model, CASE, INPUTS)[1], frozen)
        handle.strength = -1.0
        back = block_outputs(model, CASE, INPUTS)[1]
    assert_close(double - frozen, 2 * (full - frozen))
    assert_close(back - frozen, frozen - full)


def test_off_and_on_again(model):
    trails, other = one(), one("RED", 2)
    frozen = logits(model)
    with attach(model, trails), attach(model, other):
        both = logits(model)
        with trails.off():
            only_other = logits(model)
            with trails.off(), other.off():
                assert torch.equal(logits(model), frozen)
            assert torch.equal(logits(model), only_other)
        assert torch.equal(logits(model), both)
        with pytest.raises(KeyError), trails.off():
            raise KeyError
        assert torch.equal(logits(model), both)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_removed_in_any_order(model, order):
    maps = [one("LoReFT"), one("RED"), one("Additive", 0, stream="embedding")]
    frozen = logits(model)
    handles = [attach(model, trails) for trails in maps]
    for done, i in enumerate(order, 1):
        handles[i].remove()
        fresh = FAMILIES["llama"].make()
        for trails in (trails for j, trails in enumerate(maps) if j not in order[:done]):
            attach(fresh, trails)
        assert torch.equal(logits(fresh), logits(model))
    assert torch.equal(logits(model), frozen)


def test_a_later_map_reads_the_moved_state(model):
    first, second = one("LoReFT"), one("RED")
    chain = TrailMap({Site(1): Chain(first[Site(1)], second[Site(1)])})
    with attach(model, chain):
        expected = logits(model)
    with attach(model, first), attach(model, second):
        assert_close(logits(model), expected)
    with attach(model, second), attach(model, first):
        assert not torch.allclose(logits(model), expected, atol=1e-3)


def test_the_same_map_is_not_attached_twice(model):
    """As in a cell of a notebook that is run twice. Each row may have its own strength."""
    vector = TrailMap({Site(1): MOVING["Additive"](32)})
    with attach(model, vector, strength=2.0):
        double = logits(model)
    with attach(model, vector):
        single = logits(model)
        with pytest.raises(RuntimeError, match=r"attached to the model already.*tp.attached\(model\).*tp.detach"):
            attach(model, vector)
        assert torch.equal(logits(model), single)
    with attach(model, vector, rows=[0]), attach(model, vector, strength=2.0, rows=[1, 2]):
        assert_close(logits(model), torch.cat([single[:1], double[1:]]))


def test_what_is_attached_is_listed_and_taken_away(model):
    frozen, first, second = logits(model), one(), one("RED", layer=2)
    attach(model, first)
    handle = attach(model, second)
    assert [each.trails for each in tp.attached(model)] == [first, second]
    tp.detach(model)
    assert tp.attached(model) == [] and repr(handle) == "<removed: 1 sites, strength 1.0>"
    assert torch.equal(logits(model), frozen)
    tp.detach(model)


def test_two_sites_of_a_map_at_one_place_read_the_same_state(model):
    """... and their displacements are added."""
    first, second = MOVING["LoReFT"](32), MOVING["RED"](32)
    together = TrailMap({Site(1, All()): first, Site(1, Last(2)): second})
    frozen = block_outputs(model, CASE, INPUTS)[1]
    with attach(model, together):
        moved = block_outputs(model, CASE, INPUTS)[1]
    last = torch.tensor([[0] * 4 + [1] * 2] * 3)[..., None]
    real = INPUTS["attention_mask"][..., None]
    assert_close(moved, frozen + real * first(frozen) + last * second(frozen))


def test_a_tied_trail(model):
    """One trail at two sites: stored once, moved at both, and its gradient is the sum."""
    trail = MOVING["LoReFT"](32)
    tied = TrailMap({Site(0, Last(1)): trail, Site(2, All()): trail})
    apart = TrailMap({site: copy.deepcopy(trail) for site in tied})
    for trails in (tied, apart):
        with attach(model, trails):
            model(**INPUTS).logits.square().mean().backward()
    twice = [sum(p.grad for p in pair) for pair in zip(*(t.parameters() for t in apart.trails), strict=True)]
    for parameter, grad in zip(trail.parameters(), twice, strict=True):
        assert_close(parameter.grad, grad)


def test_heads_of_one_layer(model):
    heads = {Site(1, stream="attention", head=i): Additive(8) for i in (0, 3)}
    for trail in heads.values():
        torch.nn.init.normal_(trail.v)
    seen = []
    with attach(model, TrailMap(heads)):
        handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        logits(model)
        handle.remove()
    handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(model)
    handle.remove()
    changed = (seen[0] != seen[1]).any(0).any(0)
    assert changed.tolist() == [True] * 8 + [False] * 16 + [True] * 8


def test_modes_dtypes_and_states_of_a_map(model):
    """to and state_dict are those of any module, attached or not; in a forward the mode is that of the model."""
    trails = TrailMap({Site(1): LoReFT(32, 2, init="paper", dropout=0.5)})
    state = {name: value.clone() for name, value in trails.state_dict().items()}
    with attach(model, trails):
        model.train()
        assert not torch.equal(logits(model), logits(model))  # dropout
        model.eval()
        sure = logits(model)
        assert torch.equal(logits(model), sure)
        trails.to(torch.bfloat16)
        assert (logits(model) - sure).abs().max() < 0.05 * sure.abs().max()
        trails.to(torch.float32).load_state_dict(state)
        assert torch.equal(logits(model), sure)


def test_new_weights_are_seen_at_once(model):
    """Also when an optimizer writes through `.data`, or in inference mode."""
    trails = one()
    with attach(model, trails), torch.inference_mode():
        before = logits(model)
        for parameter in trails.parameters():
            parameter.data.add_(0.1)
        assert not torch.equal(logits(model), before)


def test_foreign_attributes_survive(model):
    """A `generate` of the user's own is called, and is there again afterwards."""
    calls = []
    own = model.generate

    def counting(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    model.generate = counting
    with attach(model, one(rule=Last(1))):
        model.generate(**INPUTS, max_new_tokens=2)
    assert calls == [1] and vars(model)["generate"] is counting
    del model.generate


def test_hooks_see_the_moved_state_whenever_they_were_made(model):
    """... and those of the user stay in their order."""
    order, states = [], {}

    def reader(name):
        def read(module, args, output):
            order.append(name)
            states[name] = output

        return read

    block = model.model.layers[1]
    handles = [block.register_forward_hook(reader(name)) for name in "ab"]
    with attach(model, one()):
        handles.append(block.register_forward_hook(reader("c")))
        with attach(model, one("RED")):
            logits(model)
    assert order == ["a", "b", "c"]
    assert torch.equal(states["a"], states["c"])
    for handle in handles:
        handle.remove()


def test_where_nothing_was_asked_nothing_runs(model):
    """A block called by itself, outside a forward of the model, is left alone."""
    block, h = model.model.layers[1], torch.randn(1, 4, 32)
    rope = model.model.rotary_emb(h, torch.arange(4)[None])
    frozen = block(h, position_embeddings=rope)
    with attach(model, one()):
        assert torch.equal(block(h, position_embeddings=rope), frozen)


# --- what is refused, and how it is said


class Wrong(Trail):
    def __init__(self):
        super().__init__()

    def forward(self, h):
        return h[..., :1]


REFUSED = {
    "width": (lambda: one_of(LoReFT(16, 4)), "Site.*is for width 16, but the states there have width 32"),
    "width inside a wrapper": (lambda: one_of(Capped(LoReFT(16, 4), 0.1)), "is for width 16"),
    "layer": (lambda: one(layer=7), f"layer 7 is out of range; the model has {LAYERS} layers, 0 to {LAYERS - 1}"),
    "head": (lambda: one(stream="attention", head=9), "head 9 is out of range"),
    "twice": (
        lambda: TrailMap({Site(-1): Additive(32), Site(2): Additive(32)}),
        "are the same place in this model: a site named twice",
    ),
    "NaN": (lambda: poisoned(torch.nan), "parameter 'v' of its trail holds NaN or infinity"),
    "infinity": (lambda: poisoned(torch.inf), "parameter 'v' of its trail holds NaN or infinity"),
    "no tokenizer": (lambda: one(rule=Match("a") | Last(1)), r"give attach\(..., tokenizer=your_tokenizer\)"),
    "no block list": (lambda: TrailMap({Site(1): Additive(32)}, blocks="nowhere"), "blocks='nowhere' names 0"),
}


def one_of(trail):
    return TrailMap({Site(1): trail})


def poisoned(value):
    trails = TrailMap({Site(1): Additive(32)})
    with torch.no_grad():
        trails[Site(1)].v[3] = value
    return trails


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_attach(model, name):
    trails, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        attach(model, trails())


def test_a_dict_is_not_a_map(model, unchecked):
    with pytest.raises(TypeError, match=r"attach takes a TrailMap, not dict: wrap a dict as TrailMap\(\{...\}\)"):
        attach(model, {Site(1): Additive(32)})


def four_dimensional():
    return torch.ones(3, 1, 6, 6, dtype=torch.bool).tril()


FORWARDS = {
    "rows": (dict(rows=[3]), {}, r"rows=\(3,\) names a row that the batch of 3 does not have"),
    "negative rows": (dict(rows=[-1]), {}, "names a row that the batch of 3 does not have"),
    "spans of attach": (dict(spans={"a": [(0, 1)]}), {}, r"spans\['a'\] has 1 rows, the batch 3"),
    "prompt_mask": (
        {},
        dict(prompt_mask=torch.ones(2, 6)),
        r"prompt_mask has shape \[2, 6\], but must be 3 x at least 6",
    ),
    "narrow prompt_mask": ({}, dict(prompt_mask=torch.ones(3, 5)), r"prompt_mask has shape \[3, 5\]"),
    "flat prompt_mask": ({}, dict(prompt_mask=torch.ones(3)), r"prompt_mask has shape \[3\]"),
    "4-D mask": ({}, dict(attention_mask=four_dimensional()), "with a mask of another form, give prompt_mask"),
    "short mask": (
        {},
        dict(attention_mask=torch.ones(3, 4)),
        "attention_mask has 4 columns, but there are 0 cached and 6 new tokens",
    ),
    "nothing": ({}, dict(input_ids=None), "neither input_ids nor inputs_embeds|exactly one of input_ids"),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_refused_by_a_forward(model, name):
    """The forward fails, the next good one does not notice."""
    options, inputs, message = FORWARDS[name]
    trails = one()
    with attach(model, trails):
        expected = logits(model)
    with attach(model, trails, **options), pytest.raises(ValueError, match=message):
        model(**{**INPUTS, **inputs})
    with attach(model, trails):
        with pytest.raises((ValueError, RuntimeError)):
            model(**{**INPUTS, "prompt_mask": torch.ones(1)})
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Span("steps"), "Span.*needs a span of that name.*spans given are: none"),
        (Tokens([5]), "reads token ids, but the model was called without input_ids"),
    ],
)
def test_refused_for_a_rule(model, rule, message):
    embeds = model.get_input_embeddings()(INPUTS["input_ids"])
    with attach(model, one(rule=rule)), pytest.raises(ValueError, match=message):
        model(inputs_embeds=embeds, attention_mask=INPUTS["attention_mask"])


def test_a_trail_of_the_wrong_shape(model):
    with attach(model, one_of(Wrong())), pytest.raises(ValueError, match=r"Wrong\(\) returned shape .* for states of"):
        model(**INPUTS)


def test_a_mask_of_another_form_with_a_prompt_mask(model):
    """A 4-D attention mask is used as it is; the rules then take every token for real."""
    ids = torch.tensor([PROMPTS[0]])
    causal = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    with attach(model, one(rule=Last(1))), torch.no_grad():
        plain = model(ids).logits
        assert_close(model(ids, attention_mask=causal, prompt_mask=torch.ones(1, 6)).logits, plain)


def test_a_mask_does_not_survive_its_forward(model):
    ids = torch.tensor([PROMPTS[0]])
    with attach(model, one(rule=Answer())), torch.no_grad():
        frozen = model(ids).logits
        moved = model(ids, prompt_mask=torch.tensor([[1, 1, 0, 0, 0, 0]])).logits
        broken = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids, prompt_mask=torch.tensor([[1, 1, 0, 0, 0, 0]]))
        broken.remove()
        assert torch.equal(model(ids).logits, frozen)
    assert not torch.equal(moved, frozen)


def test_a_block_that_returns_a_list_is_moved_and_another_kind_of_output_is_refused(watch):
    sizes = dict(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64)
    listing = watch(transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**sizes)).eval())
    trails = TrailMap({Site(1, All()): MOVING["Additive"](32)})
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = listing(ids, output_hidden_states=True).hidden_states
        with attach(listing, trails):
            after = listing(ids, output_hidden_states=True).hidden_states
        assert torch.equal(after[1], before[1])
        torch.testing.assert_close(after[2], before[2] + trails[Site(1, All())](before[2]))
    config = transformers.ReformerConfig(
        vocab_size=96, hidden_size=32, num_attention_heads=2, attention_head_size=16, attn_layers=["local"] * 2,
        axial_pos_embds=False, max_position_embeddings=64, is_decoder=True, feed_forward_size=32,
        local_attn_chunk_length=8,
    )  # fmt: skip
    two = watch(transformers.ReformerModelWithLMHead(config).eval())
    with (
        attach(two, TrailMap({Site(1, All()): MOVING["Additive"](32)})),
        pytest.raises(TypeError, match=r"ReformerLayer returns ReformerOutput\(hidden_states, .* neither states nor"),
    ):
        two(ids)
