"""Law 14: the key of whatever is kept changes with any bit of what the value depends on, and with nothing else."""

from __future__ import annotations

import copy
import functools
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DIM, VOCAB, llama, make_examples, make_trails
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import tokenpaths as tp
from tokenpaths import Cone, Imitate, steps
from tokenpaths.engine.cone.keys import Computing
from tokenpaths.engine.forwards import forward
from tokenpaths.lab.audit.respond import Memory, Responder
from tokenpaths.site import Host
from tokenpaths.site.fingerprint import fingerprint
from tokenpaths.site.identity import Identity, exact_key
from tokenpaths.training import Waypoints, capture_states

BATCH = tp.data.collate([tp.Example(e.ids, (False,) * len(e)) for e in make_examples(4, seed=3)])
REAL = BATCH.attention_mask.bool()


class Packed(nn.Module):
    """Two int8 weights in an int32, scales of groups and a table that is not saved: as GPTQ and its like keep them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.shift = linear.in_features, linear.out_features, 128
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        whole = (linear.weight.detach() / scale).round().to(torch.int32) + self.shift
        self.register_buffer("qweight", whole[:, ::2] << 8 | whole[:, 1::2])
        self.register_buffer("scales", scale)
        self.register_buffer("order", torch.arange(linear.in_features), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.stack([self.qweight >> 8 & 255, self.qweight & 255], -1).flatten(1) - self.shift
        return nn.functional.linear(x, (pairs * self.scales)[:, self.order].to(x.dtype))


def packed() -> Any:
    model = llama()
    for block in model.model.layers:
        for name, child in list(block.mlp.named_children()):
            if isinstance(child, nn.Linear):
                setattr(block.mlp, name, Packed(child))
    return model


def tied() -> Any:
    model = llama()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def offloaded(model: Any) -> Any:
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=torch.device("cpu"))
    return model


def with_lora() -> Any:
    peft = pytest.importorskip("peft")
    config = dict(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(llama(), peft.LoraConfig(**config))
    model.add_adapter("second", peft.LoraConfig(**config, lora_alpha=4))
    return model.eval()


def int8() -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    model = llama()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


KINDS: dict[str, Callable[[], Any]] = {
    "float32": llama,
    "bfloat16": lambda: llama().to(torch.bfloat16),
    "tied": tied,
    "packed in buffers": packed,
    "torchao int8": int8,
    "offloaded": lambda: offloaded(llama()),
    "LoRA": with_lora,
}


def memory_key(model: Any) -> str:
    return Responder(model, make_trails(), Memory()).base


KEYS: dict[str, Callable[[Any], str]] = {
    "exact key": exact_key,  # of checkpoints, targets and samples
    "cone": lambda model: Computing(Host.of(model)).how,
    "audit": memory_key,
}


def stored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every plain tensor that a model's numbers lie in."""
    seen: set[int] = set()
    for module in model.modules():
        offloaded = getattr(vars(module).get("_hf_hook"), "weights_map", None)
        for name, parameter in module._parameters.items():
            if offloaded is not None and parameter is not None:
                yield name, offloaded[name]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        parts = tensor.__tensor_flatten__()[0] if is_traceable_wrapper_subclass(tensor) else []
        yield from [(f"{name}.{part}", getattr(tensor, part)) for part in parts] or [(name, tensor)]


def flip(tensor: Tensor, rng: random.Random) -> Callable[[], None]:
    """Flip one bit, anywhere, where nothing counts it: in the bytes. Returns what flips it back."""
    data = tensor.detach().view(-1).view(torch.uint8).numpy()
    place, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
    data[place] ^= bit
    return lambda: data.__setitem__(place, data[place] ^ bit)


@pytest.mark.parametrize("kind", KINDS)
def test_one_flipped_bit_anywhere_gives_another_key(kind: str) -> None:
    model, rng = KINDS[kind](), random.Random(kind)
    before = {name: key(model) for name, key in KEYS.items()}
    found = list(stored(model))
    assert len(found) >= 29
    for number, (name, tensor) in enumerate(found if kind == "packed in buffers" else rng.sample(found, 10)):
        undo = flip(tensor, rng)
        for cache in KEYS if number < 2 else ("exact key",):
            assert KEYS[cache](model) != before[cache], (cache, name)
        undo()
    assert {name: key(model) for name, key in KEYS.items()} == before


@pytest.mark.parametrize("kind", KINDS)
def test_two_swapped_weights_give_another_key(kind: str) -> None:
    """Their sum is as before, and so is every one of them."""
    model = KINDS[kind]()
    name, tensor = max(stored(model), key=lambda pair: pair[1].numel())
    data, before = tensor.detach().view(-1), exact_key(model)
    i, j = next((0, j) for j in range(1, len(data)) if data[j] != data[0])
    data[[i, j]] = data[[j, i]].clone()
    assert exact_key(model) != before, name
    data[[i, j]] = data[[j, i]].clone()
    assert exact_key(model) == before


def test_all_weights_moved_within_the_rounding_of_bfloat16_give_another_key() -> None:
    """They have one fingerprint, which is for the warning of a file alone."""
    model = llama().to(torch.bfloat16).float()
    key, words = exact_key(model), fingerprint(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1 + 2**-10
    assert fingerprint(model) == words and exact_key(model) != key


@pytest.mark.parametrize("base", ["float32", "tied", "packed in buffers"])
def test_offloading_alone_changes_no_key(base: str, tmp_path: Path) -> None:
    from accelerate import cpu_offload, disk_offload

    model = KINDS[base]()
    key, words = exact_key(model), fingerprint(model)
    with_buffers = functools.partial(cpu_offload, offload_buffers=True)
    for number, offload in enumerate((cpu_offload, disk_offload, with_buffers)):
        other = copy.deepcopy(model)
        more = {"offload_dir": str(tmp_path / str(number))} if offload is disk_offload else {}
        offload(other, execution_device=torch.device("cpu"), **more)
        assert next(other.parameters()).is_meta
        for _ in range(2):
            assert (exact_key(other), fingerprint(other)) == (key, words)
            other(BATCH.input_ids)
    file = next((tmp_path / "1").glob("*layers.1.self_attn.q_proj.weight.dat"))
    disk_offload(other := copy.deepcopy(model), str(tmp_path / "1"), execution_device=torch.device("cpu"))
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    assert exact_key(other) != key


def test_a_saved_and_loaded_model_a_copy_and_a_wrapper_have_the_same_key(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    model = llama()
    key = exact_key(model)
    model.save_pretrained(tmp_path)
    assert exact_key(LlamaForCausalLM.from_pretrained(tmp_path)) == key
    assert exact_key(copy.deepcopy(model)) == exact_key(nn.DataParallel(model)) == key
    model.config.name_or_path, model.config.use_cache, model.config.pad_token_id = "elsewhere", False, 2
    model.add_module("trails", make_trails())  # as a trainer puts them
    assert exact_key(model.train()) == key


@pytest.mark.slow
def test_the_key_is_the_same_in_another_process() -> None:
    program = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_laws_keys import KINDS, exact_key
print(json.dumps([exact_key(KINDS[kind]()) for kind in ("float32", "packed in buffers", "tied", "offloaded")]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    here = [exact_key(KINDS[kind]()) for kind in ("float32", "packed in buffers", "tied", "offloaded")]
    assert json.loads(done.stdout.splitlines()[-1]) == here


def test_a_disabled_adapter_leaves_the_key_of_the_base() -> None:
    model = with_lora()
    with model.disable_adapter():
        assert exact_key(model) == exact_key(llama())
    on = exact_key(model)
    model.set_adapter("second")
    assert len({on, exact_key(model), exact_key(llama())}) == 3


SETTINGS: dict[str, Callable[[Any], Any]] = {
    "sliding window": lambda m: setattr(m.config, "sliding_window", 3),
    "rope scaling": lambda m: m.model.rotary_emb.inv_freq.data.mul_(0.5),
    "attention scaling": lambda m: setattr(m.model.layers[0].self_attn, "scaling", 0.9),
    "epsilon": lambda m: setattr(m.model.layers[0].input_layernorm, "variance_epsilon", 0.5),
    "activation": lambda m: setattr(m.model.layers[0].mlp, "act_fn", nn.GELU()),
    "a plain tensor": lambda m: setattr(m.model.layers[0], "bias", torch.ones(2)),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_that_changes_the_function_changes_the_key(setting: str) -> None:
    model = llama()
    key = exact_key(model)
    SETTINGS[setting](model)
    assert exact_key(model) != key


@pytest.mark.parametrize(
    "around",
    [
        lambda m: torch.autocast("cpu", torch.bfloat16),
        lambda m: m.set_attn_implementation("eager"),
        lambda m: m.train(),
        lambda m: m.model.layers[1].train(),
    ],
    ids=["autocast", "attention", "training", "one block in training"],
)
def test_how_a_model_computes_is_in_the_key_of_a_cone(around: Callable[[Any], Any]) -> None:
    model = llama()
    computing = Computing(Host.of(model))
    before = computing.how
    inside = around(model)
    with inside if hasattr(inside, "__exit__") else nullcontext():
        assert computing.how != before


def test_an_identity_reads_again_what_was_written_to_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenpaths.site import identity

    read: list[str] = []
    digest = identity._digest
    monkeypatch.setattr(identity, "_digest", lambda held: read.append(held.name) or digest(held))
    model = llama()
    known = Identity(model)
    first = known.key()
    assert len(read) >= 30 and known.key() == first
    read.clear()
    with torch.no_grad():
        model.model.norm.weight[3] += 1
    assert known.key() not in (first, "") and read == ["model.norm.weight"]
    model.model.norm = copy.deepcopy(model.model.norm)
    assert known.key() == exact_key(model)
    with pytest.raises(ValueError, match=r"embed_tokens.weight is on the meta device, and no hook of acc"):
        exact_key(copy.deepcopy(model).to("meta"))


# --- every cache, used across a change


def write(m: Any) -> None:
    with torch.no_grad():
        m.model.layers[0].mlp.up_proj.weight.mul_(1.5)


def swap(m: Any) -> None:
    m.model.layers[0].self_attn.v_proj.weight.data[:] = m.model.layers[0].self_attn.v_proj.weight.data.flip(0)


def behind_its_back(m: Any) -> None:
    m.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)


def lora_layer(m: Any) -> Any:
    return m.base_model.model.model.layers[0].self_attn.q_proj


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], bool]] = {  # a base, a change, whether torch sees it
    "an optimizer's step": (llama, write, True),
    "a write through data": (llama, behind_its_back, False),
    "another tensor": (llama, lambda m: setattr(m.model.norm, "weight", nn.Parameter(torch.rand(DIM))), True),
    "a buffer": (packed, lambda m: m.model.layers[0].mlp.up_proj.scales.mul_(2), True),
    "an unsaved buffer": (packed, lambda m: m.model.layers[0].mlp.up_proj.order.copy_(torch.arange(DIM).flip(0)), True),
    "another module": (llama, lambda m: setattr(m.model.layers[0], "mlp", copy.deepcopy(m.model.layers[2].mlp)), True),
    "a window": (llama, lambda m: setattr(m.config, "rms_norm_eps", 0.1), True),
    "another adapter": (with_lora, lambda m: m.set_adapter("second"), True),
    "a merged adapter": (with_lora, lambda m: m.merge_adapter(["second"]), True),
    "an adapter's weight": (with_lora, lambda m: lora_layer(m).set_scale("default", 3.0), True),
    "a disabled adapter": (with_lora, lambda m: m.base_model.disable_adapter_layers(), True),
}


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
@pytest.mark.parametrize("change", CHANGES)
def test_a_cone_forgets_a_base_that_has_changed(change: str) -> None:
    """In the next use of it in any case; and at once where torch, or the state of the layers, shows the change."""
    make, alter, seen = CHANGES[change]
    for within in (False, True) if seen else (False,):
        model, cone = make(), Cone()
        trails = tp.TrailMap({tp.Site(2, tp.All()): tp.DiReFT(DIM, 2, init="paper")})
        with torch.no_grad(), tp.attach(model, trails):
            with cone.over(model):
                forward(model, BATCH)
                if within:
                    alter(model)
                    again = forward(model, BATCH).logits
            if not within:
                alter(model)
                with cone.over(model):
                    again = forward(model, BATCH).logits
            torch.testing.assert_close(again[REAL], forward(model, BATCH).logits[REAL], rtol=0, atol=1e-4)


class Two(nn.Module):
    """Two stacks of blocks, the second behind the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = llama(), llama()
        with torch.no_grad():
            self.second.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        self.config = self.first.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Tensor:
        states = self.first.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        for block in self.second.model.layers:
            places = torch.arange(input_ids.shape[1])[None]
            turns = self.second.model.rotary_emb(states.last_hidden_state, places)
            states.last_hidden_state = block(states.last_hidden_state, position_embeddings=turns)
        return states.last_hidden_state


def test_two_stacks_of_one_model_do_not_share_what_is_kept() -> None:
    model, names = Two(), ("first.model.layers", "second.model.layers")
    keys = {Computing(Host.of(model, name)).how for name in names}
    assert len(keys) == 2


def test_trails_on_another_stack_are_heeded() -> None:
    model, cone = Two(), Cone()
    below = tp.TrailMap({tp.Site(0, tp.All()): tp.DiReFT(DIM, 2, init="paper")}, blocks="first.model.layers")
    above = tp.TrailMap({tp.Site(2, tp.All()): tp.DiReFT(DIM, 2, init="paper")}, blocks="second.model.layers")
    ids = BATCH.input_ids[:1, :3]
    with torch.no_grad(), tp.attach(model, above), cone.over(model, "second.model.layers"):
        model(ids)
        with tp.attach(model, below):
            moved = model(ids)
    with torch.no_grad(), tp.attach(model, above), tp.attach(model, below):
        torch.testing.assert_close(moved, model(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_company_of_a_row_are_run_in_full(kind: str) -> None:
    """Beyond the length from which the longest row of a batch scales the positions of all."""
    from transformers import LlamaConfig, LlamaForCausalLM

    short = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
    if kind == "longrope":
        short |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    size = dict(vocab_size=VOCAB, hidden_size=DIM, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
    torch.manual_seed(0)
    config = LlamaConfig(**size, max_position_embeddings=8, rope_parameters=short, initializer_range=0.6)
    model, cone = LlamaForCausalLM(config).eval(), Cone()
    trails = tp.TrailMap({tp.Site(2, tp.All()): tp.DiReFT(DIM, 2, init="paper")})
    rows = [tuple(range(3, 3 + n)) for n in (20, 6, 5)]
    both = tp.data.collate([tp.Example(ids, (False,) * len(ids)) for ids in rows])
    few = tp.data.collate([tp.Example(ids, (False,) * len(ids)) for ids in rows[1:]])
    with torch.no_grad(), tp.attach(model, trails):
        expected = {batch: forward(model, batch).logits[batch.attention_mask.bool()] for batch in (few, both)}
        with cone.over(model):
            for batch in (few, both, few, both):
                found = forward(model, batch).logits[batch.attention_mask.bool()]
                torch.testing.assert_close(found, expected[batch], rtol=0, atol=1e-4)
    assert cone.kept.used > 0


def test_an_audit_remembers_nothing_of_another_base() -> None:
    memory, trails = Memory(), make_trails()
    ids = BATCH.input_ids[:, :3]
    model, other = llama(), llama()
    swap(other)
    with torch.no_grad(), tp.attach(model, trails):
        Responder(model, trails, memory).logits(ids, 1)
        used = memory.used
        Responder(model, trails, memory).logits(ids, 1)
        assert memory.used == used > 0
        with tp.attach(model, tp.TrailMap({tp.Site(0, tp.All()): tp.DiReFT(DIM, 2, init="paper")})):
            Responder(model, trails, memory).logits(ids, 1)  # the frozen run has another map at work
        assert memory.used == 2 * used
    with torch.no_grad(), tp.attach(other, trails):
        found = Responder(other, trails, memory).logits(ids, 1)
        expected = Responder(other, trails, Memory()).logits(ids, 1)
    assert all(map(torch.equal, found, expected))


def test_a_run_is_not_resumed_over_another_base_or_with_other_targets(tmp_path: Path) -> None:
    examples, site = make_examples(), tp.Site(1, tp.All())
    others = [tp.Example((5, *e.ids), (False, *e.answer)) for e in examples]

    def run(model: Any, helped: list[tp.Example], **more: Any) -> None:
        targets = capture_states(llama(), examples, helped, [site])
        goals = [Imitate(examples), Waypoints(examples, targets=targets)]
        list(steps(model, make_trails(), goals, steps=2, progress=False, checkpoint=tmp_path, **more))

    run(llama(), others)
    swap(other := llama())
    assert fingerprint(other) != ""
    with pytest.raises(ValueError, match=r"is of another run, .*model was '[0-9a-f]{32}', is '[0-9a-f]{32}'"):
        run(other, others, resume=True)
    with pytest.raises(ValueError, match=r"is of another run, .*'Targets [0-9a-f]{16}'"):
        run(llama(), [tp.Example((6, *e.ids), (False, *e.answer)) for e in examples], resume=True)
    run(llama(), others, resume=True)


def test_targets_of_another_base_are_told_at_each_model() -> None:
    examples, site = make_examples(4), tp.Site(1, tp.All())
    targets = capture_states(llama(), examples, examples, [site])
    goal = Waypoints(examples, targets=targets)
    swap(other := llama())
    list(steps(llama(), make_trails(), [goal], steps=1, progress=False))
    with pytest.warns(UserWarning, match="the targets were captured from"):
        list(steps(other, make_trails(), [goal], steps=1, progress=False))
