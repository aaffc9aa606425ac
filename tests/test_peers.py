"""PEFT adapters by the tools of trails: the true frozen base, training, resuming, saving, measuring."""

from __future__ import annotations

import runpy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peers import METHODS, TAKE_FROM_THE_BASE, ids, logits, make, plain_texts, train
from tiny import llama, make_examples, make_tokenizer, make_trails
from torch import nn

import tokenpaths as tp
from tokenpaths import Imitate, Replay, Stay, forgetting
from tokenpaths.data import Task, Text
from tokenpaths.lab.peers import DualMemory, PeftAdapter, ReplayNear
from tokenpaths.limits import TrustRegion
from tokenpaths.site.fingerprint import fingerprint
from tokenpaths.training import Align, Attempts, StayStates

Watch = Callable[[nn.Module], nn.Module]
every_method = pytest.mark.parametrize("method", METHODS)


def flags(model: nn.Module) -> list[Any]:
    return [(name, p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()]


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@every_method
def test_off_is_the_frozen_base_and_leaves_everything(method: str, watch: Watch) -> None:
    frozen = logits(llama())
    model, adapter = make(method)
    fresh = logits(model)
    train(model, adapter)
    next(adapter.parameters()).requires_grad_(False)  # PEFT would unfreeze it
    watch(model)
    trained, before = logits(model), flags(model)
    assert (trained - fresh).abs().max() > 1e-2, "training changed nothing, so the test could not fail"
    with adapter.off():
        with adapter.off():
            inner = logits(model)
        assert torch.equal(logits(model), inner)
    tolerance = 2e-4 if method in TAKE_FROM_THE_BASE else 0.0
    assert (inner - frozen).abs().max() <= tolerance * frozen.abs().max()
    assert torch.equal(logits(model), trained)
    assert flags(model) == before
    with pytest.raises(KeyError), adapter.off():
        raise KeyError
    assert torch.equal(logits(model), trained)
    assert flags(model) == before


@every_method
def test_fresh_changes_nothing(method: str) -> None:
    frozen = logits(llama())
    fresh = logits(make(method)[0])
    exact = method in ("LoRA", "saved modules", "SC-LoRA", "CURLoRA")
    assert (fresh - frozen).abs().max() <= (0.0 if exact else 2e-4 * frozen.abs().max())


@every_method
@pytest.mark.filterwarnings(
    "ignore:step .*the loss of its examples"
)  # the distance of ReplayNear starts at 0, and is hundreds here
@pytest.mark.parametrize("goals", ["stay", "align", "replay"])
def test_trained_by_the_same_steps(method: str, goals: str) -> None:
    model, adapter = make(method)
    examples = make_examples()
    memory = DualMemory(adapter)
    base = [p for p in model.parameters() if all(p is not q for q in adapter.parameters())]
    kept = [p.detach().clone() for p in base]
    question = Attempts(
        [tp.Example((5, 6, 7, 8), (False, False, True, True))], [tp.Example((5, 6, 9, 8), (False, False, True, True))]
    )
    chosen: dict[str, list[tp.Objective]] = {
        "stay": [Imitate(examples), Stay(plain_texts(), within=0.05), StayStates(plain_texts(), weight=0.1)],
        "align": [Align([question], batch_size=1), Replay(plain_texts(), batch_size=2)],
        "replay": [Imitate(examples), ReplayNear(examples[:4], memory=memory, batch_size=2)],
    }
    trust = TrustRegion(plain_texts(2), most=0.05) if goals == "align" else None
    options: dict[str, Any] = dict(steps=3, batch_size=4, lr=1e-2, warmup=0, trust=trust, progress=False)
    found: list[tp.training.Step] = []
    for step in tp.steps(model, adapter, chosen[goals], **options):
        found.append(step)
        memory.update()
    assert all(torch.isfinite(torch.tensor(step.loss)) and step.grad_norm > 0 for step in found)
    assert trust is None or all(step.trust is not None and step.trust <= 0.05 for step in found)
    assert all(torch.equal(p, q) for p, q in zip(base, kept, strict=True))
    if goals == "stay":
        assert found[0].losses[1] < 1e-6 or method in ("DoRA", *TAKE_FROM_THE_BASE)


@every_method
def test_a_resumed_run_is_the_uninterrupted_one(method: str, tmp_path: Path) -> None:
    model, adapter = make(method)
    stays = [Imitate(make_examples()), Stay(plain_texts())]
    train(model, adapter, 4, goals=stays, checkpoint=tmp_path / "whole")
    stopped, half = make(method)
    for step in tp.steps(
        *(stopped, half, [Imitate(make_examples()), Stay(plain_texts())]),
        **dict(steps=4, batch_size=4, lr=3e-2, warmup=0, progress=False, checkpoint=tmp_path / "half", save_every=2),
    ):
        if step.step == 2:
            break
    again, rest = make(method)
    goals = [Imitate(make_examples()), Stay(plain_texts())]
    losses = train(again, rest, 4, goals=goals, checkpoint=tmp_path / "half", resume=True)
    assert len(losses) == 2
    for (name, p), q in zip(adapter.state_dict().items(), rest.state_dict().values(), strict=True):
        assert torch.equal(p, q), name
    assert torch.equal(logits(model), logits(again))


@every_method
def test_saved_and_loaded_by_peft(method: str, tmp_path: Path) -> None:
    model, adapter = make(method)
    train(model, adapter)
    adapter.save(tmp_path / "a" / "adapter")
    assert sorted(p.name for p in (tmp_path / "a" / "adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "checksums.json",
    ]
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["adapter"]
    if method == "CorDA":  # PEFT wants its preprocessing again
        other = make(method)[1]
        other.restore(tmp_path / "a" / "adapter")
        assert torch.equal(logits(other.peft_model), logits(model))
        return
    loaded = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "a" / "adapter")).eval()
    assert torch.equal(logits(loaded), logits(model))


@every_method
def test_restored_in_place(method: str, tmp_path: Path) -> None:
    model, adapter = make(method)
    train(model, adapter)
    adapter.save(tmp_path / "adapter")
    told, before = logits(model), flags(model)
    train(model, adapter)
    assert not torch.equal(logits(model), told)
    adapter.restore(tmp_path / "adapter")
    assert torch.equal(logits(model), told)
    assert flags(model) == before
    adapter.save(tmp_path / "adapter")  # an earlier one may be replaced


def test_measured_as_trails_are(watch: Watch) -> None:
    model, adapter = make("LoRA")
    train(model, adapter)
    watch(model)
    model.train()  # the dropout of LoRA is on: a reading turns it off
    texts, tokenizer = plain_texts(), make_tokenizer()
    found = tp.measure_drift(model, adapter, texts, cone=tp.Cone())
    model.eval()
    assert found["kl"].mean == pytest.approx(tp.drift.compare(llama(), model, texts)["kl"].mean, abs=1e-6)
    wide = llama(len(tokenizer))
    lora = PeftAdapter(peft.get_peft_model(wide, peft.LoraConfig(r=2, target_modules="all-linear")).eval())
    train(lora.peft_model, lora, lr=0.3)
    report = forgetting(lora.peft_model, lora, [Task("a", (Text("abc def"), Text("xyz uvw")))], tokenizer)
    assert report["a", "KL to frozen"].after > 0.01
    with lora.off():
        frozen = forgetting(lora.peft_model, lora, [Task("a", (Text("abc def"),))], tokenizer)
    assert frozen["a", "KL to frozen"].after == 0


def test_dropout_is_on_in_training_only() -> None:
    model, adapter = make("LoRA")
    seen: list[bool] = []
    drop = next(m for m in adapter.modules() if isinstance(m, nn.Dropout))
    drop.register_forward_hook(lambda module, args, output: seen.append(module.training))
    train(model, adapter, 1)
    assert seen
    assert all(seen)
    assert not model.training
    seen.clear()
    tp.measure_drift(model, adapter, plain_texts())
    assert seen == [False] * len(seen)


def test_the_light_cone_is_off_and_the_plan_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    model, adapter = make("LoRA")
    cone = tp.Cone()
    losses = train(model, adapter, explain=True, cone=cone)
    assert "PeftAdapter changes the weights of PeftModel, so it has no light cone" in capsys.readouterr().out
    assert cone.kept.used == 0
    assert losses == train(*make("LoRA"), cone=False)


def test_a_cone_of_the_users_is_refused() -> None:
    model, adapter = make("LoRA")
    with tp.Cone().over(model), pytest.raises(ValueError, match="a cone is at work in the model.*end it first"):
        train(model, adapter)


def test_repr_is_short() -> None:
    said = [repr(make(method)[1]) for method in METHODS]
    assert said[0].startswith("PeftAdapter(default: LoraConfig(r=4, target_modules=['down_proj', ")
    assert len(set(said)) == len(said)
    assert max(map(len, said)) < 300


@every_method
def test_the_fingerprint_is_that_of_the_base(method: str) -> None:
    model, adapter = make(method)
    train(model, adapter)
    with adapter.off():
        here = fingerprint(model)
    assert (here == fingerprint(llama())) == (method not in TAKE_FROM_THE_BASE)
    assert fingerprint(model) != here


def test_self_samples_are_of_the_frozen_model() -> None:
    tokenizer = make_tokenizer()
    wide = llama(len(tokenizer))
    settings = wide.generation_config
    told = tp.self_samples(wide, tokenizer, 3, max_new_tokens=5)
    lora = PeftAdapter(
        peft.get_peft_model(wide, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    )
    train(lora.peft_model, lora, lr=0.3)
    assert tp.self_samples(lora.peft_model, tokenizer, 3, max_new_tokens=5, trails=lora) == told
    assert tp.self_samples(lora.peft_model, tokenizer, 3, max_new_tokens=5) != told
    assert wide.generation_config is settings


def test_beside_trails() -> None:
    """LoRA is trained in a model that trails are attached to: they are part of its frozen base."""
    model, adapter = make("LoRA")
    trails = make_trails()
    with tp.attach(model, trails):
        with_trails = logits(model)
        train(model, adapter)
        with adapter.off():
            assert torch.equal(logits(model), with_trails)


def test_taken_factors_need_fresh() -> None:
    config = peft.LoraConfig(r=2, init_lora_weights="pissa", target_modules=["q_proj"])
    late = PeftAdapter(peft.get_peft_model(llama(), config).eval())
    with pytest.raises(ValueError, match=r"pissa took its first factors out .* fresh=True\) before training, or"):
        train(late.peft_model, late, goals=[Imitate(make_examples()), Stay(plain_texts())])
    assert len(train(late.peft_model, late)) == 4  # what asks for no frozen base goes on


def test_exchanged_factors_leave_the_graph_alone() -> None:
    """`off()` between a forward and its backward: the gradient is that of the factors of the forward."""
    gradients: list[torch.Tensor] = []
    for between in (False, True):
        model, adapter = make("PiSSA")
        train(model, adapter)
        loss = model(ids()).logits.square().mean()
        if between:
            with adapter.off():
                logits(model)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None]))
    assert torch.equal(*gradients)


def test_refusals(unchecked: None) -> None:
    with pytest.raises(TypeError, match="takes what get_peft_model returned, not LlamaForCausalLM"):
        PeftAdapter(llama())
    prompt = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="PromptTuningConfig prepends tokens to every text"):
        PeftAdapter(peft.get_peft_model(llama(), prompt))
    loose = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    loose.get_input_embeddings().requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"1 parameters outside the adapter learn as well.*embed_tokens.*no frozen base"
    ):
        PeftAdapter(loose)
    model, adapter = make("LoRA")
    with pytest.raises(TypeError, match=r"not PeftModel .*: a PEFT model is made one by tp.lab.peers.PeftAdapter\("):
        train(model, model)
    with pytest.raises(TypeError, match=r"not PeftModel .*: a PEFT model is made one by tp.lab.peers.PeftAdapter"):
        tp.measure_drift(model, model, plain_texts())
    with pytest.raises(ValueError, match="does not lie in this LlamaForCausalLM: give the PEFT model"):
        train(llama(), adapter)
    with pytest.raises(ValueError, match="a PeftAdapter lies in the model and is at work already"):
        tp.attach(model, adapter)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged into the weights: call unmerge_adapter\(\) first"):
        tp.measure_drift(model, adapter, plain_texts())
    model.unmerge_adapter()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    with pytest.raises(ValueError, match=r"active adapters are \('other',\) now, but were \('default',\)"):
        tp.measure_drift(model, adapter, plain_texts())
    with pytest.raises(ValueError, match=r"parameter of the adapter is frozen.*is_trainable=True"):
        train(model, adapter)
    kasa = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    kasa.peft_config["default"].init_lora_weights = "loftq"
    with pytest.raises(ValueError, match=r"loftq has replaced base weights.*compare\("), PeftAdapter(kasa).off():
        pass


def test_a_refused_save_leaves_what_was_there(tmp_path: Path) -> None:
    model, adapter = make("LoRA")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match=r"holds other files \(thesis.tex\), and would be replaced"):
        adapter.save(tmp_path / "mine")
    with pytest.raises(ValueError, match=r"is a file, and PEFT saves a folder"):
        adapter.save(tmp_path / "mine" / "thesis.tex")
    adapter.save(tmp_path / "adapter")
    content = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        next(adapter.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="not saved: .* holds NaN or infinity"):
        adapter.save(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == content
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "mine"]
    with pytest.raises(ValueError, match=r"is of another adapter than 'default': .* is absent there, \[64, 4\] here"):
        make("CURLoRA")[1].restore(tmp_path / "adapter")
    with pytest.raises(FileNotFoundError):
        adapter.restore(tmp_path / "nowhere")


def test_several_adapters(tmp_path: Path) -> None:
    """What is active is the adapter; another one beside it is neither trained nor saved."""
    model, _ = make("CURLoRA")
    from tokenpaths.lab.peers import CurLoraConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("second", CurLoraConfig(r=2, seed=1, target_modules="all-linear"))
    model.set_adapter("second")
    adapter = PeftAdapter(model)
    assert adapter.size() == 21 * 4
    before = state(model)
    train(model, adapter)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all(name.endswith("curlora_U.second") for name in moved)
    adapter.save(tmp_path / "adapter")
    assert [p.name for p in (tmp_path / "adapter").iterdir() if p.is_dir()] == ["second"]
    told = logits(model)
    train(model, adapter)
    adapter.restore(tmp_path / "adapter")
    assert torch.equal(logits(model), told)


@pytest.mark.parametrize("method", ["LoRA", "SC-LoRA", "CURLoRA"])
def test_half_precision(method: str) -> None:
    """The frozen base to the bit, and fresh adapters that change nothing, also under a coarse dtype."""
    frozen = logits(llama().to(torch.bfloat16))
    model, adapter = make(method, torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in adapter.parameters())  # as PEFT holds them
    assert torch.equal(logits(model), frozen)
    train(model, adapter)
    with adapter.off():
        assert torch.equal(logits(model), frozen)


def test_missing_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"built on PEFT, which is not installed: pip install tokenpaths\[peers\]"):
        runpy.run_path(str(Path(tp.__file__).parent / "lab" / "peers" / "__init__.py"))


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaForCausalLM

    tokenizer = make_tokenizer()
    config = llama(len(tokenizer)).config
    config.max_position_embeddings = 400  # a question has some 150 letters
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    import lora_with_trails as example

    run = example.Run(str(tmp_path / "model"), steps=2, train=8, test=2, samples=3, sample_tokens=6, batch=4)
    found = example.compare(run)
    assert set(found) == {"trail", "LoRA"}
    assert all(kl >= 0 for _, kl in found.values())
    told = capsys.readouterr().out
    assert "TrailMap: 0 of 2 held-out chains right, [0.00, 0.66]" in told
    assert "PeftAdapter: 0 of 2 held-out chains right" in told
    assert told.count("100.0% of tokens moved") == 2  # the same tokens for both
