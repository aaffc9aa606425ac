"""Laws 1 and 8 over what models live in: torch.compile, accelerate, PEFT, DDP, FSDP, quantised layers, copies."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from conftest import unchanged
from families import FAMILIES
from laws import Case, assert_close, generated, padded
from subjects import MOVING
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tokenpaths import Site, TrailMap, attach
from tokenpaths.attachment import is_attached
from tokenpaths.site.host import find_blocks

FAMILY = pytest.mark.parametrize("family", ["llama", "gpt2"])
STREAM = pytest.mark.parametrize("stream", ["block", "embedding", "attention", "mlp", "head"])
INPUTS = padded([[5, 47, 31, 66, 8, 90], [17, 4, 73, 29]])
LABELS = INPUTS["input_ids"].clone()
LABELS[:, :4] = -100


def laid(family: str, rule: str = "last", stream: str = "block", trail: str = "LoReFT"):
    case = Case(family, FAMILIES[family].blocks, trail, rule, stream)
    model = case.model()
    return case, model, case.trails(model, MOVING[trail])


def gradients(model, trails, **inputs):
    trails.zero_grad()
    model(**(inputs or {**INPUTS, "labels": LABELS})).loss.backward()
    return [parameter.grad.clone() for parameter in trails.parameters()]


def assert_same(ones, others):
    for one, other in zip(ones, others, strict=True):
        assert_close(one, other)


# --- torch.compile


def shallow(family, rule="last", stream="block"):
    """One layer compiles three times as fast as three."""
    case, model, _ = laid(family)
    del find_blocks(model)[1:]
    model.config.num_hidden_layers = 1
    case = Case(family, case.blocks, "LoReFT", rule, stream)
    return model, case.trails(model, MOVING["LoReFT"])


def by_hand(model, trails):
    """Gradients with the loss outside the model, as transformers' own logs and so cannot be compiled with GPT-2."""
    trails.zero_grad()
    logits = model(**INPUTS, prompt_mask=LABELS == -100).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten()).backward()
    return [parameter.grad.clone() for parameter in trails.parameters()]


SLOW = [  # every stream, both families, three compilers
    pytest.param(family, stream, backend, marks=pytest.mark.slow)
    for family in ("llama", "gpt2")
    for stream in ("block", "embedding", "attention", "mlp", "head")
    for backend in ("aot_eager", "inductor")
]


@pytest.mark.filterwarnings("ignore")  # of torch.compile itself
@pytest.mark.parametrize(("family", "stream", "backend"), [("llama", "mlp", "aot_eager"), *SLOW])
def test_compile(family, stream, backend, traceable):
    model, trails = shallow(family, "last", stream)
    with attach(model, trails):
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        assert_close(compiled(**INPUTS).logits, model(**INPUTS).logits)
        assert_same(by_hand(compiled, trails), by_hand(model, trails))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_compiled_code_follows(family, traceable):
    """Strength, off, a step of an optimizer, a second map, and the end are seen by what was compiled before."""
    model, trails = shallow(family)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    frozen = model(**INPUTS).logits
    with torch.no_grad(), attach(model, trails) as handle:

        def moved():
            now = model(**INPUTS).logits
            assert_close(compiled(**INPUTS).logits, now)  # compiled, it moves all tokens and takes the chosen ones
            return now

        full = moved()
        handle.strength = 0.5
        half = moved()
        with trails.off():
            assert torch.equal(moved(), frozen)
        for parameter in trails.parameters():
            parameter.mul_(1.1)
        assert not torch.equal(moved(), half) and not torch.equal(half, full)
        with attach(model, TrailMap({Site(0): MOVING["RED"](32)})):
            both = moved()
        assert not torch.equal(moved(), both)
    assert torch.equal(compiled(**INPUTS).logits, frozen)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_before_it_is_attached(in_place, traceable):
    model, trails = shallow("llama")
    with attach(model, trails):
        expected = model(**INPUTS).logits
    compiled = model if in_place else torch.compile(model, backend="eager")
    if in_place:
        model.compile(backend="eager")
    frozen = compiled(**INPUTS).logits
    with attach(compiled, trails):
        assert_close(compiled(**INPUTS).logits, expected)
    assert torch.equal(compiled(**INPUTS).logits, frozen)


# --- accelerate


@pytest.mark.filterwarnings("ignore:.*whereas the model is on meta:UserWarning")  # generate() of transformers 4
@STREAM
@FAMILY
def test_offloaded_by_accelerate(family, stream):
    from accelerate import cpu_offload

    _, model, trails = laid(family, stream=stream)
    with attach(model, trails):
        expected, answer, grads = model(**INPUTS).logits, generated(model, INPUTS), gradients(model, trails)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).is_meta
    frozen = model(**INPUTS).logits
    with attach(model, trails):
        assert_close(model(**INPUTS).logits, expected)
        assert generated(model, INPUTS).sequences.equal(answer.sequences)
        assert_same(gradients(model, trails), grads)
    assert torch.equal(model(**INPUTS).logits, frozen)


def test_dispatched_by_accelerate(tmp_path):
    from accelerate import dispatch_model

    _, model, trails = laid("llama")
    with attach(model, trails):
        expected = model(**INPUTS).logits
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    with attach(model, trails) as handle:  # hooks that accelerate adds afterwards
        dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
        assert_close(model(**INPUTS).logits, expected)
        handle.remove()
        with attach(model, trails):
            assert_close(model(**INPUTS).logits, expected)


# --- PEFT


def with_lora(model):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear"))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return wrapped.eval()


@pytest.mark.parametrize("stream", ["block", "attention", "mlp", "head"])
@FAMILY
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_on_a_peft_model(family, stream):
    _, model, trails = laid(family, "answer", stream)
    with attach(model, trails):
        no_lora = model(**INPUTS, labels=LABELS).logits
    wrapped = with_lora(model)
    frozen = wrapped(**INPUTS, labels=LABELS).logits
    with attach(wrapped, trails):
        assert is_attached(wrapped, trails) and is_attached(model, trails)
        moved, answer = wrapped(**INPUTS, labels=LABELS).logits, generated(wrapped, INPUTS)
        same = generated(model, INPUTS)  # around the wrapper
        assert same.sequences.equal(answer.sequences)
        assert_close(model(**INPUTS, labels=LABELS).logits, moved)
        with wrapped.disable_adapter():
            assert_close(wrapped(**INPUTS, labels=LABELS).logits, no_lora)
        plain = generated(wrapped, INPUTS, use_cache=False)
        assert plain.sequences.equal(answer.sequences)
    with attach(model, trails):  # the inner model, called through the wrapper
        assert_close(wrapped(**INPUTS, labels=LABELS).logits, moved)
        assert generated(wrapped, INPUTS).sequences.equal(answer.sequences)
    assert not torch.equal(moved, frozen)
    assert torch.equal(wrapped(**INPUTS, labels=LABELS).logits, frozen)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_a_wrapper_and_its_inside_in_any_order():
    _, model, trails = laid("llama", "answer")
    wrapped = with_lora(model)
    other = TrailMap({Site(1): MOVING["RED"](32)})
    with unchanged(model):
        outer, inner = attach(wrapped, trails), attach(model, other)
        both = generated(wrapped, INPUTS)
        outer.remove()
        generated(wrapped, INPUTS)
        inner.remove()
        assert "generate" not in vars(model)
        inner, outer = attach(model, other), attach(wrapped, trails)
        inner.remove()
        outer.remove()
    assert both is not None


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("stream", ["block", "mlp"])
def test_lora_laid_over_attached_trails(stream):
    """Trails first, LoRA second: the same at a block; an inner stream is then moved before LoRA adds its part."""
    _, model, trails = laid("llama", "all", stream)
    with attach(model, trails):
        wrapped = with_lora(model)
        first = wrapped(**INPUTS).logits
    with attach(wrapped, trails):
        second = wrapped(**INPUTS).logits
    assert torch.allclose(first, second, atol=1e-4) == (stream == "block")


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_trails_and_lora_train_together():
    _, model, trails = laid("llama", "answer")
    wrapped = with_lora(model).train()
    with attach(wrapped, trails):
        grads = gradients(wrapped, trails)
    assert all(grad.abs().sum() > 0 for grad in grads)
    assert all(p.grad is not None for name, p in wrapped.named_parameters() if "lora" in name)


# --- several processes, here one


@pytest.fixture(scope="module")
def gloo(tmp_path_factory):
    store = tmp_path_factory.mktemp("gloo") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Both(nn.Module):
    """A model and its trails as one module, which is what DDP must hold to average the trails' gradients."""

    def __init__(self, model, trails):
        super().__init__()
        self.model, self.trails = model, trails

    def forward(self, **inputs):
        return self.model(**inputs)


@pytest.mark.filterwarnings("ignore:.*gloo.*", "ignore:.*barrier.*")
@pytest.mark.parametrize("static_graph", [False, True])
def test_ddp(gloo, static_graph):
    _, model, trails = laid("llama", "answer")
    with attach(model, trails):
        expected = gradients(model, trails)
        parallel = DistributedDataParallel(Both(model, trails), static_graph=static_graph)
        for _ in range(2):
            assert_same(gradients(parallel, trails), expected)
    mask = (LABELS == -100) & (INPUTS["attention_mask"] == 1)
    moved = model.requires_grad_(True)
    parallel = DistributedDataParallel(moved)  # the model alone, trails attached through the wrapper
    with attach(parallel, trails):
        assert_same(gradients(parallel, trails), expected)
        assert_close(parallel(**INPUTS, prompt_mask=mask).logits, parallel(**INPUTS, labels=LABELS).logits)


@pytest.mark.filterwarnings("ignore")
def test_fsdp(gloo):
    """Both kinds of FSDP on one gloo process: the blocks are sharded, the trails are not."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    _, model, trails = laid("llama", "answer")
    with attach(model, trails):
        expected, logits = gradients(model, trails), model(**INPUTS).logits
    mesh = init_device_mesh("cpu", (1,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with attach(model, trails):
        assert_close(model(**INPUTS).logits, logits)
        assert_same(gradients(model, trails), expected)


# --- quantised layers


class Int8(nn.Module):
    """Weight-only int8, one scale a row: what quantised layers of other libraries look like from outside."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


@STREAM
def test_quantised(stream):
    case, model, _ = laid("llama", "last", stream)
    for block in model.model.layers:
        for holder in (block.self_attn, block.mlp):
            for name, child in list(holder.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(holder, name, Int8(child))
    dequantised = copy.deepcopy(model)
    for block in dequantised.model.layers:
        for holder in (block.self_attn, block.mlp):
            for name, child in list(holder.named_children()):
                if isinstance(child, Int8):
                    linear = nn.Linear(child.in_features, child.out_features, bias=False)
                    linear.weight.data = child.weight.float() * child.scale
                    setattr(holder, name, linear)
    trails = case.trails(model, MOVING["LoReFT"])
    assert next(trails.parameters()).dtype == torch.float32
    frozen = model(**INPUTS).logits
    with attach(model, trails), attach(dequantised, trails):
        assert_close(model(**INPUTS).logits, dequantised(**INPUTS).logits)
        assert_same(gradients(model, trails), gradients(dequantised, trails))
        assert generated(model, INPUTS).sequences.equal(generated(dequantised, INPUTS).sequences)
    assert torch.equal(model(**INPUTS).logits, frozen)


# --- copies


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "vit"])
def test_a_copy_of_an_attached_model_is_frozen(family):
    """As a reference model is copied before training: the trails stay with the original."""
    case = Case(family, FAMILIES[family].blocks, "RED", "all", "block")
    model = case.model()
    trails = case.trails(model, MOVING["RED"])
    inputs = case.batch(model=model)
    frozen = model(**inputs).logits
    with attach(model, trails):
        moved = model(**inputs).logits
        duplicate = copy.deepcopy(model)
        assert torch.equal(duplicate(**inputs).logits, frozen)
        if family in ("llama", "gpt2"):
            assert not generated(duplicate, inputs).sequences.equal(generated(model, inputs).sequences)
        with attach(duplicate, trails, strength=0.5):
            half = duplicate(**inputs).logits
        assert torch.equal(model(**inputs).logits, moved)
    assert not torch.equal(half, moved) and not torch.equal(half, frozen)
    assert torch.equal(duplicate(**inputs).logits, frozen)


def test_hooks_pickle_as_nothing():
    linear = nn.Linear(2, 2)
    from tokenpaths.attachment.hooks import Hook

    linear.register_forward_hook(Hook(lambda *_: torch.zeros(2)))
    assert linear(torch.ones(2)).eq(0).all()
    assert not pickle.loads(pickle.dumps(linear))(torch.ones(2)).eq(0).all()


def test_a_state_dict_has_no_trails():
    _, model, trails = laid("llama")
    names = set(model.state_dict())
    with attach(model, trails):
        assert set(model.state_dict()) == names
        torch.save(model.state_dict(), io.BytesIO())


def test_a_dropped_model_is_freed():
    _, model, trails = laid("llama")
    attach(model, trails)
    model(**INPUTS, use_cache=True)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_two_models_share_one_map():
    _, model, trails = laid("llama")
    other = copy.deepcopy(model)
    with attach(model, trails), attach(other, trails, strength=0.5):
        assert not torch.equal(model(**INPUTS).logits, other(**INPUTS).logits)
