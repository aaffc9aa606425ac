"""Where a trail lies: block lists, streams, widths, layers and heads, in every family."""

from __future__ import annotations

import re

import peft
import pytest
import torch
import transformers
from families import DIM, FAMILIES, HEADS, LAYERS, Family
from torch import nn

from tokenpaths import All, First, Last, Site, sites, width
from tokenpaths.site import Host, find_blocks

STREAMS = ["embedding", "block", "attention", "mlp"]


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request) -> tuple[Family, nn.Module, str | None]:
    """A family, its model, and what must be said as `blocks=`."""
    made = FAMILIES[request.param]
    return made, made.make(), "decoder.block" if made.kind == "encoder-decoder" else None


def run(family: Family, model: nn.Module) -> None:
    ids = torch.arange(3, 10)[None]
    if family.kind == "vision":
        model(pixel_values=torch.randn(1, 3, 16, 16))
    elif family.kind == "encoder-decoder":
        model(input_ids=ids, decoder_input_ids=ids)
    else:
        model(input_ids=ids)


def test_blocks_are_found_by_structure(family):
    made, model, blocks = family
    assert find_blocks(model, blocks) is model.get_submodule(made.blocks)
    assert find_blocks(model, made.blocks) is model.get_submodule(made.blocks)
    assert len(find_blocks(model, blocks)) == LAYERS


def test_every_stream_of_every_layer_is_where_states_of_its_width_pass(family):
    made, model, blocks = family
    seen: dict[Site, tuple[int, ...]] = {}
    hooks = []
    for stream in STREAMS:
        for layer in [0] if stream == "embedding" else range(-1, -LAYERS - 1, -1):
            site, place = Host.of(model, blocks).locate(Site(layer, First(), stream))
            assert site == Site(layer % LAYERS, First(), stream)
            assert (place.width, place.columns) == (DIM, None)
            assert width(model, site, blocks=blocks) == DIM
            inside = [m for m in model.get_submodule(made.blocks)[site.layer].modules() if m is place.module]
            assert inside, "a site lies within its own block"
            hooks.append(watch_width(place, seen, site))
    for layer in range(LAYERS):
        slices = [Host.of(model, blocks).locate(Site(layer, stream="attention", head=head))[1] for head in range(HEADS)]
        size = slices[0].width
        assert [s.columns for s in slices] == [slice(i * size, (i + 1) * size) for i in range(HEADS)]
        hooks.append(watch_width(slices[0], seen, Site(layer, stream="attention", head=0)))
    run(made, model)
    for hook in hooks:
        hook.remove()
    heads = {site: shape for site, shape in seen.items() if site.head is not None}
    assert all(shape[-1] == HEADS * width(model, site, blocks=blocks) for site, shape in heads.items())
    assert all(shape[-1] == DIM for site, shape in seen.items() if site not in heads)
    assert len(seen) == 4 * LAYERS + 1, "every place is passed in a forward"


def watch_width(place, seen, site):
    if place.side == "output":
        return place.module.register_forward_hook(
            lambda _, __, out: seen.update({site: (out[0] if isinstance(out, tuple) else out).shape})
        )
    return place.module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update({site: (args[0] if args else kwargs["hidden_states"]).shape}),
        with_kwargs=True,
    )


def test_layers_by_index_negative_index_slice_list_and_all(family):
    _, model, blocks = family
    rule = Last(2)

    def chosen(layers, **more) -> list[int]:
        found = sites(model, layers, rule, blocks=blocks, **more)
        assert all(site == Site(site.layer, rule) for site in found)
        return [site.layer for site in found]

    assert chosen("all") == chosen(slice(None)) == chosen(range(LAYERS)) == [0, 1, 2]
    assert chosen(1) == chosen(-2) == chosen([1]) == chosen([1, -2, 1]) == [1]
    assert chosen([-1, 0]) == chosen((0, 2)) == chosen(slice(0, None, 2)) == [0, 2]
    assert chosen(slice(-2, None)) == [1, 2]
    assert sites(model, blocks=blocks) == [Site(0), Site(1), Site(2)]
    assert sites(model, [2], stream="attention", head=1, blocks=blocks) == [Site(2, All(), "attention", 1)]
    for layer in (LAYERS, -LAYERS - 1):
        with pytest.raises(ValueError, match=f"layer {layer} is out of range; the model has 3 layers, 0 to 2"):
            chosen([0, layer])
        with pytest.raises(ValueError, match=re.escape(f"Site(layer={layer}, tokens=Last(n=2)")):
            Host.of(model, blocks).locate(Site(layer, rule))
    with pytest.raises(ValueError, match=re.escape("layers=slice(3, None, None) holds none of the 3 layers")):
        chosen(slice(3, None))
    with pytest.raises(ValueError, match=re.escape("layers=[] holds none of the 3 layers")):
        chosen([])


def test_a_head_out_of_range(family):
    _, model, blocks = family
    for head in (HEADS, -1):
        with pytest.raises(ValueError, match=f"head {head} is out of range; the layer has {HEADS} heads"):
            Host.of(model, blocks).locate(Site(1, stream="attention", head=head))


PLACES = {  # family: attention and mlp of layer 1
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "phi": ("self_attn.dense", "mlp.fc2"),
    "mixtral": ("self_attn.o_proj", "mlp"),
    "qwen2_moe": ("self_attn.o_proj", "mlp"),
    "deepseek_v3": ("self_attn.o_proj", "mlp"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neo": ("attn.attention.out_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "opt": ("self_attn.out_proj", "fc2"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "mpt": ("attn.out_proj", "ffn.down_proj"),
    "bert": ("attention.output.dense", "output.dense"),
    "modernbert": ("attn.Wo", "mlp.Wo"),
    "t5": ("layer.0.SelfAttention.o", "layer.2.DenseReluDense.wo"),  # self-attention, not the one to the encoder
}


@pytest.mark.parametrize("name", PLACES)
def test_the_projections_by_name(name):
    if name not in FAMILIES:
        pytest.skip("not in this transformers")
    model, blocks = FAMILIES[name].make(), FAMILIES[name].blocks
    block = model.get_submodule(blocks)[1]
    attention, mlp = (
        Host.of(model, blocks).locate(Site(1, stream=stream))[1].module for stream in ("attention", "mlp")
    )
    if name == "mixtral" and not hasattr(block, "mlp"):
        assert mlp is block.block_sparse_moe  # its name in transformers 4
    else:
        assert mlp is block.get_submodule(PLACES[name][1])
    assert attention is block.get_submodule(PLACES[name][0])


def test_a_model_with_two_block_lists_asks_which():
    model = FAMILIES["t5"].make()
    message = (
        "cannot tell which modules are the blocks of T5ForConditionalGeneration: 2 module lists have as many entries "
        "as its configuration has layers ([3]). Name the block list with blocks=..., one of: "
        "'encoder.block' (3 x T5Block); 'decoder.block' (3 x T5Block)"
    )
    for call in (find_blocks, sites, width):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(model)
    assert find_blocks(model, "encoder.block") is model.encoder.block
    assert width(model, blocks="encoder.block") == DIM
    for wrong, count in (("block", 2), ("decoder.blocks", 0), ("ecoder.block", 0), ("", 0)):
        with pytest.raises(ValueError, match=re.escape(f"blocks={wrong!r} names {count} block lists of T5ForCond")):
            find_blocks(model, wrong)


def test_a_name_that_is_whole_is_preferred_to_one_that_ends_alike():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)]), "vision": nn.Module()})
    model["vision"].layers = nn.ModuleList([nn.Linear(2, 2)])
    assert find_blocks(model, "layers") is model["layers"]
    assert find_blocks(model, "vision.layers") is model["vision"].layers


def test_models_that_have_no_such_place_say_so():
    config = transformers.MambaConfig(vocab_size=32, hidden_size=8, num_hidden_layers=2, state_size=4)
    mamba = transformers.MambaForCausalLM(config)
    assert sites(mamba) == [Site(0), Site(1)]
    assert width(mamba) == 8
    with pytest.raises(ValueError, match="found no attention output projection in MambaBlock, so use stream 'block'"):
        Host.of(mamba).locate(Site(0, stream="attention"))
    with pytest.raises(ValueError, match="found no feed-forward projection of width 8 in MambaBlock"):
        Host.of(mamba).locate(Site(0, stream="mlp"))
    with pytest.raises(
        ValueError, match=re.escape("cannot tell which modules are the blocks of Linear: 0 module lists")
    ):
        find_blocks(nn.Linear(2, 2))
    plain = nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]))
    with pytest.raises(ValueError, match=r"cannot tell the width of Sequential: it has no config\.hidden_size"):
        width(plain)


class Wrapper(nn.Module):
    """Holds a model as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def lora(model: nn.Module) -> nn.Module:
    targets = {"llama": ["q_proj", "o_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "t5": ["q", "o", "wo"]}
    config = peft.LoraConfig(r=2, target_modules=targets[model.config.model_type], fan_in_fan_out=False)
    return peft.get_peft_model(model, config)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize(
    "wrap", [Wrapper, lora, lambda m: Wrapper(lora(m)), torch.compile, lambda m: torch.compile(Wrapper(m))]
)
def test_inside_wrappers_the_same_places_are_found(name, wrap):
    model = FAMILIES[name].make()
    blocks = FAMILIES[name].blocks
    expected = model.get_submodule(blocks)
    wrapped = wrap(model)
    assert find_blocks(wrapped, blocks) is expected
    if name != "t5":
        assert find_blocks(wrapped) is expected
    for stream in STREAMS:
        site = Site(0, stream=stream)
        # made after wrapping, as LoRA replaces the projections: its layer is the place, not the frozen map inside it
        assert Host.of(wrapped, blocks).locate(site)[1] == Host.of(model, blocks).locate(site)[1]
        assert width(wrapped, site, blocks=blocks) == DIM
    if "lora" in str(type(Host.of(wrapped, blocks).locate(Site(0, stream="attention"))[1].module)).lower():
        assert isinstance(wrapped, peft.PeftModel) or isinstance(wrapped.module, peft.PeftModel)
    elif wrap is lora:
        raise AssertionError("the place is inside the LoRA layer")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Site("all"), TypeError, "layer is one whole number; for several use sites(model, 'all')"),
        (lambda: Site([1, 2]), TypeError, "for several use sites(model, [1, 2])"),
        (lambda: Site(True), TypeError, "layer is one whole number"),
        (lambda: Site(1.0), TypeError, "layer is one whole number"),
        (lambda: Site(1, "last"), TypeError, "tokens is a token rule such as Last(1) or All(), not 'last'"),
        (lambda: Site(1, Last), TypeError, "tokens is a token rule such as Last(1) or All(), not <class"),
        (
            lambda: Site(1, stream="residual"),
            ValueError,
            "unknown stream 'residual'; the streams are embedding, block, attention, mlp",
        ),
        (lambda: Site(1, stream=["block"]), ValueError, "unknown stream ['block']"),
        (lambda: Site(1, head=0), ValueError, "a head is part of stream 'attention', not of 'block'"),
        (lambda: Site(1, stream="attention", head="0"), TypeError, "head is the number of one attention head, or None"),
        (lambda: Site(1, stream="attention", head=True), TypeError, "head is the number of one attention head"),
        (lambda: Site(1, stream="embedding"), ValueError, "stream 'embedding' enters layer 0, so its layer is 0"),
    ],
)
def test_a_bad_site_is_refused_with_a_message(unchecked, make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()


@pytest.mark.parametrize("layers", ["15", "last", 1.5, [0.5], None, ["0"]])
def test_layers_that_are_none_are_refused(unchecked, layers):
    with pytest.raises(
        TypeError, match=re.escape(f"layers is a layer, a slice, a list of layers or 'all', not {layers!r}")
    ):
        sites(FAMILIES["llama"].make(), layers)


def test_a_site_is_a_value():
    assert Site(1, First() | Last()) == Site(1, First() | Last())
    assert len({Site(1), Site(1, All(), "block"), Site(2), Site(1, Last()), Site(1, stream="mlp")}) == 4
    assert repr(Site(1, Last(2))) == "Site(layer=1, tokens=Last(n=2), stream='block', head=None)"
