"""SC-LoRA and CURLoRA by their formulas, and PEFT's own behaviours on our layers."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import ids, logits, make, plain_texts, train
from safetensors.torch import save_file
from scipy.stats import chisquare
from tiny import llama, make_examples
from torch import nn

from tokenpaths.lab.peers import CurLoraConfig, PeftAdapter, ScLoraConfig, sc_lora
from tokenpaths.lab.peers.curlora import CurLoraLinear, column_odds, draw
from tokenpaths.lab.peers.layer import AddedLinear
from tokenpaths.lab.peers.sclora import ScLoraLinear, subspace

OURS = ["SC-LoRA", "CURLoRA"]
PIECES = {  # the configuration of a second adapter
    "SC-LoRA": lambda: ScLoraConfig(r=2, target_modules=["q_proj", "down_proj"]),
    "CURLoRA": lambda: CurLoraConfig(r=2, seed=1, target_modules=["q_proj", "down_proj"]),
}
our_method = pytest.mark.parametrize("method", OURS)


def gpt2() -> Any:
    """Its maps are Conv1D, which hold [in, out]; that of attention's output is square."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=96, initializer_range=0.3)
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()


def shuffled(adapter: PeftAdapter, seed: int = 0) -> PeftAdapter:
    """With trained parameters of any value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapter


# What PEFT asks of a method


@our_method
def test_merge_is_the_forward_and_unmerge_is_exact(method: str) -> None:
    frozen = logits(llama())
    model, adapter = make(method)
    shuffled(adapter)
    told = logits(model)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.merge_adapter(safe_merge=True)
    assert (logits(model) - told).abs().max() <= 1e-4 * told.abs().max()
    model.unmerge_adapter()
    assert torch.equal(logits(model), told)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    model.merge_adapter()
    with model.disable_adapter():  # as in PEFT's own layers, which it unmerges
        assert torch.equal(logits(model), frozen)
    assert (logits(model.merge_and_unload()) - told).abs().max() <= 1e-4 * told.abs().max()


@our_method
def test_a_damaged_adapter_is_not_merged_safely(method: str) -> None:
    model, adapter = make(method)
    with torch.no_grad():
        next(adapter.parameters()).fill_(torch.inf)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "base_layer" in name}
    with pytest.raises(ValueError, match="merging adapter 'default' would give NaN or infinity"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in before.items())


@our_method
def test_mixed_batch(method: str) -> None:
    """Each row is what it would be with its adapter alone."""
    model, adapter = make(method)
    shuffled(adapter)
    model.add_adapter("second", PIECES[method]())
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(".second"):
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2)))
    batch, names = ids(4), ["second", "__base__", "default", "second"]
    with torch.no_grad():
        mixed = model(batch, adapter_names=names).logits
        alone: dict[str, torch.Tensor] = {}
        for name in ("default", "second"):
            model.set_adapter(name)
            alone[name] = model(batch).logits
        with model.disable_adapter():
            alone["__base__"] = model(batch).logits
    for row, name in enumerate(names):
        assert torch.allclose(mixed[row], alone[name][row], atol=1e-4)
    assert not torch.allclose(alone["default"], alone["second"], atol=1e-2)
    with pytest.raises(ValueError, match="adapter_names has 'third', which is none of __base__, default, second"):
        model(batch, adapter_names=["third"] * 4)
    model.train()
    with pytest.raises(ValueError, match=r"adapter_names is for inference: call eval\(\) first"):
        model(batch, adapter_names=names)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match=r"needs the adapters apart from the weights: call unmerge_adapter\(\)"):
        model(batch, adapter_names=names)
    assert not any(module._forward_pre_hooks for module in model.modules())


@our_method
def test_unload_gives_the_base_back(method: str) -> None:
    frozen = logits(llama())
    model, adapter = make(method)
    shuffled(adapter)
    base = model.unload()
    assert not any(isinstance(module, AddedLinear) for module in base.modules())
    assert torch.equal(logits(base), frozen)


@our_method
def test_delete_adapter(method: str) -> None:
    model, _ = make(method)
    model.add_adapter("second", PIECES[method]())
    model.delete_adapter("second")
    assert not [name for name, _ in model.named_parameters() if "second" in name]
    assert not [name for name, _ in model.named_buffers() if "second" in name]


@our_method
def test_generation_with_a_cache_is_a_full_forward(method: str) -> None:
    model, adapter = make(method)
    shuffled(adapter)
    config = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    batch = ids()
    written = model.generate(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=True, **config)
    again = model.generate(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False, **config)
    assert torch.equal(written, again)


@pytest.mark.slow  # a process more
def test_the_same_in_a_fresh_process(tmp_path: Path) -> None:
    told: dict[str, torch.Tensor] = {}
    for method in OURS:
        model, adapter = make(method)
        train(model, adapter)
        adapter.save(tmp_path / method)
        told[method] = logits(model)
    save_file(told, tmp_path / "told.safetensors")
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch, peft, tokenpaths.lab.peers\nfrom pathlib import Path\nfrom safetensors.torch import load_file\n"
        f"from tiny import llama\nfrom peers import logits\nfolder = Path({str(tmp_path)!r})\n"
        "for method, told in load_file(folder / 'told.safetensors').items():\n"
        "    model = peft.PeftModel.from_pretrained(llama(), folder / method).eval()\n"
        "    print(method, torch.equal(told, logits(model)))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    assert sorted(done.stdout.splitlines()) == ["CURLoRA True", "SC-LoRA True"]


@our_method
def test_what_cannot_be_changed_is_refused(method: str) -> None:
    config = PIECES[method]()
    config.target_modules = ["embed_tokens"]
    with pytest.raises(TypeError, match="embed_tokens is a Embedding that .*Linear cannot change: target nn.Linear"):
        peft.get_peft_model(llama(), config)
    config = PIECES[method]()
    config.r = 33
    with pytest.raises(ValueError, match="q_proj: r=33 is more than its smaller side, 32"):
        peft.get_peft_model(llama(), config)


@our_method
def test_conv1d(method: str) -> None:
    """Also where it is square, and only its type tells which side is the input's."""
    frozen = logits(gpt2())
    if method == "CURLoRA":
        model = peft.get_peft_model(gpt2(), CurLoraConfig(r=3, target_modules=["c_proj", "c_attn"])).eval()
    else:
        config = ScLoraConfig(r=3, target_modules=["c_proj", "c_attn"])
        model = sc_lora(gpt2(), config, make_examples(), plain_texts(), beta=0.1)[0].eval()
    assert torch.equal(logits(model), frozen)
    shuffled(PeftAdapter(model))
    layers = [module for module in model.modules() if isinstance(module, AddedLinear)]
    assert {tuple(layer.base().shape) for layer in layers} == {(32, 32), (96, 32), (32, 128)}
    x = torch.randn(2, 5, 32)
    square = next(layer for layer in layers if layer.base().shape == (32, 32))
    with torch.no_grad():
        told = square(x) - square.base_layer(x)
        assert torch.allclose(told, x @ square.delta("default").mT, atol=1e-4)
        told = logits(model)
        model.merge_adapter()
        assert torch.allclose(logits(model), told, atol=1e-3)


# CURLoRA


def reference_change(x: torch.Tensor, w: torch.Tensor, c: Any, u: Any, r: Any, alpha: float) -> torch.Tensor:
    """x (alpha C U R), C columns and R rows of W as in x W."""
    return alpha * x.double() @ (w[:, c].double() @ u.double() @ w[r].double())


@pytest.mark.parametrize("sampling", ["paper", "published-code"])
def test_curlora_is_its_formula(sampling: Any) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(12, 20).double()
    holder = nn.ModuleDict({"map": linear})
    config = CurLoraConfig(r=5, alpha=0.7, sampling=sampling, seed=3, target_modules=["map"])
    layer = peft.inject_adapter_in_model(config, holder)["map"]
    assert isinstance(layer, CurLoraLinear)
    x, w = torch.randn(4, 12, dtype=torch.double), linear.weight.detach().T
    with torch.no_grad():
        assert torch.equal(layer(x), linear(x))
        layer.curlora_U["default"].copy_(torch.randn(5, 5))
    c, r = layer.curlora_C["default"], layer.curlora_R["default"]
    columns = [int((w == column[:, None]).all(0).nonzero()) for column in c.T]
    rows = [int((w == row).all(1).nonzero()) for row in r]
    assert sampling == "published-code" or len(set(columns)) == len(set(rows)) == 5
    with torch.no_grad():
        wanted = linear(x) + reference_change(x, w, columns, layer.curlora_U["default"], rows, 0.7)
        assert torch.allclose(layer(x), wanted)
        change, u = layer.delta("default"), layer.curlora_U["default"]
    assert torch.linalg.matrix_rank(change) <= 5
    assert change.norm() <= 0.7 * c.norm() * u.norm() * r.norm()
    assert [name for name, p in holder.named_parameters() if p.requires_grad] == ["map.curlora_U.default"]


@pytest.mark.parametrize("sampling", ["paper", "published-code"])
def test_columns_are_drawn_by_the_formula(sampling: Any) -> None:
    """First draws, and all ordered pairs: the second draw knows of the first, unless it is put back."""
    w = torch.tensor([[1.0, 2.0, 0.5, 3.0], [0.0, 1.0, 0.5, 1.0]])
    p = w.double().square().sum(0) / w.double().square().sum()
    odds = (1 / (p + 0.001) if sampling == "published-code" else 1 / p).numpy()
    odds = odds / odds.sum()
    assert np.allclose(column_odds(w, sampling).numpy(), odds)
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(tuple(draw(w, 2, sampling, generator).tolist()) for _ in range(4000))
    pairs = [(i, j) for i in range(4) for j in range(4) if sampling == "published-code" or i != j]
    again = sampling == "published-code"
    expected = np.array([odds[i] * (odds[j] if again else odds[j] / (1 - odds[i])) for i, j in pairs])
    assert set(drawn) <= set(pairs)
    assert chisquare([drawn[pair] for pair in pairs], 4000 * expected).pvalue > 1e-3


def test_wide_layers_are_drawn_uniformly_by_the_published_code() -> None:
    """What ALGORITHMS says of it: 0.001 drowns the shares, and the odds hardly differ."""
    w = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 0, 4096)
    code, paper = column_odds(w, "published-code"), column_odds(w, "paper")
    assert float(code.max() / code.min()) < 4
    assert float(paper.max() / paper.min()) > 1e3


def test_drawing_is_seeded_by_seed_and_module() -> None:
    def drawn(seed: int) -> list[torch.Tensor]:
        model = peft.get_peft_model(llama(), CurLoraConfig(r=4, seed=seed, target_modules=["q_proj", "o_proj"]))
        return [m.curlora_C["default"] for m in model.modules() if isinstance(m, CurLoraLinear)]

    torch.manual_seed(1)
    first = drawn(0)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert all(map(torch.equal, first, drawn(0)))
    assert torch.equal(torch.get_rng_state(), before)
    assert not all(map(torch.equal, first, drawn(1)))


def test_columns_of_zeros_are_never_drawn() -> None:
    w = torch.zeros(3, 6)
    w[:, 1], w[:, 4] = 1.0, 2.0
    generator = torch.Generator().manual_seed(0)
    assert {tuple(sorted(draw(w, 2, "paper", generator).tolist())) for _ in range(20)} == {(1, 4)}
    with pytest.raises(ValueError, match="q has 2 rows or columns other than zero, and r=3 are to be drawn"):
        draw(w, 3, "paper", generator, "q")
    with pytest.raises(ValueError, match="q holds NaN or infinity: nothing can be drawn of it"):
        draw(w / 0, 2, "paper", generator, "q")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(r=0), "r=0 must be at least 1"),
        (dict(alpha=float("nan")), "alpha=nan must be a finite number"),
        (dict(sampling="best"), "sampling='best' must be 'paper' or 'published-code'"),
    ],
)
def test_curlora_refuses(arguments: Any, message: str, unchecked: None) -> None:
    with pytest.raises(ValueError, match=message):
        CurLoraConfig(**arguments)


# SC-LoRA


def symmetric(n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(3 * n, n, generator=generator, dtype=torch.double) for _ in range(2))
    return a.T @ a / len(a) - 0.7 * b.T @ b / len(b)


@settings(max_examples=20)
@given(st.integers(3, 12), st.integers(1, 3), st.integers(0, 2**16))
def test_ky_fan(n: int, r: int, seed: int) -> None:
    """No subspace has a larger trace, and it is the sum of the r largest eigenvalues."""
    d = symmetric(n, seed)
    found = subspace(d, r)
    q = found.basis
    assert torch.allclose(q.T @ q, torch.eye(r, dtype=q.dtype), atol=1e-9)
    best = float((q.T @ d @ q).trace())
    values = np.linalg.eigvalsh(d.numpy())[::-1]
    assert best == pytest.approx(values[:r].sum())
    assert found.positive == (values > 0).sum()
    generator = torch.Generator().manual_seed(seed)
    others = torch.linalg.qr(torch.randn(15, n, r, generator=generator, dtype=torch.double)).Q
    nearby = torch.linalg.qr(q + 0.01 * torch.randn(15, n, r, generator=generator, dtype=torch.double)).Q
    for other in torch.cat([others, nearby]):
        assert float((other.T @ d @ other).trace()) <= best + 1e-9


def by_hand(model: Any, name: str, task: Any, keep: Any, beta: float) -> torch.Tensor:
    """D of one module from all its outputs at once, text by text and without padding."""
    module = model.get_submodule(name)
    moments: list[torch.Tensor] = []
    for examples in (task, keep):
        inputs: list[torch.Tensor] = []
        handle = module.register_forward_pre_hook(lambda m, args, into=inputs: into.append(args[0][0]))
        with torch.no_grad():
            for example in examples:
                model(torch.tensor([example.ids]))
        handle.remove()
        y = torch.cat(inputs) @ module.weight.detach().T
        moments.append(y.T @ y / len(y))
    return (1 - beta) * moments[0] - beta * moments[1]


def test_streamed_moments_are_those_of_all_at_once() -> None:
    """Whatever the batches and their padding; and the first factors are the formula's."""
    task, keep = make_examples(), plain_texts()
    names = [f"model.layers.{i}.{part}" for i in (0, 2) for part in ("self_attn.q_proj", "mlp.down_proj")]
    wanted = {name: by_hand(llama().double(), name, task, keep, 0.3) for name in names}
    for batch_size in (1, 5, 12):
        config = ScLoraConfig(r=3, alpha=6, target_modules=names)
        model, found = sc_lora(llama().double(), config, task, keep, beta=0.3, batch_size=batch_size)
        assert set(found) == {f"base_model.model.{name}" for name in names}
        for name in names:
            sub = found[f"base_model.model.{name}"]
            values, vectors = torch.linalg.eigh(wanted[name])
            assert torch.allclose(sub.eigenvalues.flip(0), values, atol=1e-9 * float(values.abs().max()))
            top = vectors[:, -3:]
            assert torch.allclose(sub.basis @ sub.basis.T, top @ top.T, atol=1e-6)
            layer = model.get_submodule(f"base_model.model.{name}")
            assert isinstance(layer, ScLoraLinear)
            a, b = layer.sclora_A["default"], layer.sclora_B["default"]
            assert torch.allclose(2.0 * b @ a, top @ top.T @ layer.base(), atol=1e-6)


def test_the_bias_is_no_part_of_the_moments() -> None:
    task, keep = make_examples(), plain_texts()
    model = gpt2().double()
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.bias.fill_(100.0)
    found = sc_lora(model, ScLoraConfig(r=2, target_modules=["h.0.attn.c_attn"]), task, keep, beta=0.1)[1]
    (sub,) = found.values()
    assert float(sub.eigenvalues.max()) < 1000


def test_beta_decides_what_the_subspace_is_of() -> None:
    """At 0 it is of the task, and at 1 nothing is left to gain."""
    task, keep = make_examples(), plain_texts()
    free = sc_lora(llama(), ScLoraConfig(r=2, target_modules=["q_proj"]), task, keep, beta=0.0)[1]
    assert all(sub.positive >= 2 for sub in free.values())
    with pytest.warns(
        UserWarning, match=r"3 of 3 targets have fewer positive eigenvalues than r=2, .* with 0: lower r"
    ):
        kept = sc_lora(llama(), ScLoraConfig(r=2, target_modules=["q_proj"]), task, keep, beta=1.0)[1]
    assert {sub.positive for sub in kept.values()} == {0}


def test_dropout_leaves_the_start_where_it_is() -> None:
    model, adapter = make("SC-LoRA")
    frozen = logits(llama())
    adapter.train()
    assert torch.equal(logits(model), frozen)
    shuffled(adapter)
    assert not torch.equal(logits(model), logits(model))


def test_sc_lora_refuses(unchecked: None) -> None:
    task, keep, config = make_examples(), plain_texts(), ScLoraConfig(r=2, target_modules=["q_proj"])
    plain = llama()
    for arguments, message in (
        (dict(beta=1.5), "beta=1.5 must be between 0 and 1"),
        (dict(batch_size=0), "batch_size=0 must be at least 1"),
        (dict(task=[]), "task has no examples"),
        (dict(keep=[]), "keep has no examples"),
    ):
        with pytest.raises(ValueError, match=message):
            sc_lora(plain, config, **{"task": task, "keep": keep, **arguments})
    assert not any(isinstance(module, AddedLinear) for module in plain.modules())
    for arguments, message in (
        (dict(r=0), "r=0 must be at least 1"),
        (dict(alpha=0), "alpha=0 must be a finite number above 0"),
        (dict(dropout=1.0), "dropout=1.0 must be at least 0 and below 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ScLoraConfig(**arguments)
    with torch.no_grad():
        plain.model.layers[0].mlp.down_proj.weight.fill_(torch.inf)
    flags = [p.requires_grad for p in plain.parameters()]
    with pytest.raises(ValueError, match="q_proj gave outputs that are not finite"):
        sc_lora(plain, config, task, keep)
    assert not any(isinstance(module, AddedLinear) for module in plain.modules())
    assert [p.requires_grad for p in plain.parameters()] == flags


def test_without_a_start_it_cannot_be_trained_unnoticed() -> None:
    model = peft.get_peft_model(llama(), ScLoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(FloatingPointError, match="the loss of goal 0"):
        train(model, PeftAdapter(model))
