"""Trails and LoRA in one model: trained, measured, gated and saved as one adapter."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gated import LAYERS, PROBES, ROWS, assert_decided, gate_for, lora_model, opened, trails, written
from tiny import make_examples

import tokenpaths as tp
from tokenpaths.files import TrailFileError
from tokenpaths.trailmap import Together
from tokenpaths.trailmap.gate import Gate


def both() -> tuple[Any, Together]:
    model, lora = lora_model()
    return model, Together(trails(), lora)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(torch.tensor([row])).logits[0] for row in ROWS])


def copied(adapter: Together) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in adapter.state_dict().items()}


def train(model: Any, adapter: Together, count: int = 3, **options: Any) -> list[float]:
    goals = [tp.Imitate(make_examples(8))]
    asked = {"lr": 0.01, "progress": False, **options}
    return [step.loss for step in tp.steps(model, adapter, goals, steps=count, **asked)]


def test_both_learn_by_one_gradient() -> None:
    """One step of SGD is what plain PyTorch does with the parameters of both."""
    model, adapter = both()
    before = copied(adapter)
    plain: Any = {"clip": None, "schedule": "constant", "warmup": 0, "lr": None}
    train(model, adapter, 1, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), **plain)
    found = copied(adapter)
    adapter.load_state_dict(before)
    laid, lora = adapter.members
    with tp.attach(model, laid):
        batch = tp.data.collate(make_examples(8))
        loss = torch.nn.functional.cross_entropy(*tp.engine.forwards.answer_logits(model, batch))
        mine = [*laid.parameters(), *lora.parameters()]
        grads = torch.autograd.grad(loss, mine)
    with torch.no_grad():
        for parameter, grad in zip(mine, grads, strict=True):
            parameter -= 0.1 * grad
    for name, tensor in adapter.state_dict().items():
        assert not torch.equal(found[name], before[name])
        torch.testing.assert_close(tensor, found[name], rtol=1e-3, atol=1e-5)


def test_off_is_the_frozen_model_and_a_measurement_sees_both(watch: Any) -> None:
    model, adapter = both()
    watch(model)
    laid, lora = adapter.members
    with lora.off():
        frozen = logits(model)
    with adapter.off():
        assert torch.equal(logits(model), frozen)
    texts = [tp.Example(tuple(row), (False,) * len(row)) for row in ROWS]
    with torch.no_grad(), tp.attach(model, laid):
        steered = [model(torch.tensor([row])).logits[0].log_softmax(-1) for row in ROWS]
        with adapter.off():
            base = [model(torch.tensor([row])).logits[0].log_softmax(-1) for row in ROWS]
    due = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(base, steered, strict=True)]).mean()
    assert tp.measure_drift(model, adapter, texts)["kl"].mean == pytest.approx(float(due), rel=1e-4)


def test_one_gate_holds_both(watch: Any) -> None:
    model, adapter = both()
    watch(model)
    laid, lora = adapter.members
    with torch.no_grad(), adapter.off():
        frozen = [model(torch.tensor([row])).logits for row in ROWS]
        gate = gate_for(model, LAYERS[2])
        opens = opened(model, gate)
    assert set(opens) == {True, False}
    with torch.no_grad(), tp.attach(model, laid):
        steered = [model(torch.tensor([row])).logits for row in ROWS]
    for parts in ([adapter], [laid, lora]):
        with torch.no_grad(), ExitStack() as stack:
            for part in parts:
                stack.enter_context(tp.attach(model, part, when=gate))
            for row, x, y, is_open in zip(ROWS, frozen, steered, opens, strict=True):
                assert torch.equal(model(torch.tensor([row])).logits, y if is_open else x)
    with tp.attach(model, laid):
        steered_texts = written(model)[1]
    with adapter.off():
        frozen_texts = written(model)[1]
    with tp.attach(model, adapter, when=gate):
        assert_decided(opens, written(model)[1], frozen_texts, steered_texts)
    with tp.attach(model, adapter, rows=[1, 2]):
        assert_decided([False, True, True, False], written(model)[1], frozen_texts, steered_texts)
    with tp.attach(model, adapter):
        assert torch.equal(written(model)[1], steered_texts)
    adapter.gate = gate
    for row, is_open in zip(ROWS, opens, strict=True):
        kl = tp.measure_drift(model, adapter, [tp.Example(tuple(row), (False,) * len(row))])["kl"].mean
        assert (kl > 0) == is_open
    assert not tp.attached(model)


def test_a_killed_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    model, adapter = both()
    whole = train(model, adapter, 4)
    due = copied(adapter)
    told: Any = dict(goals=[tp.Imitate(make_examples(8))], steps=4, lr=0.01, progress=False, save_every=2)
    model, adapter = both()
    run = tp.steps(model, adapter, checkpoint=tmp_path / "run", **told)
    assert [next(run).loss, next(run).loss] == whole[:2]
    run.close()
    model, adapter = both()
    rest = list(tp.steps(model, adapter, checkpoint=tmp_path / "run", resume=True, **told))
    assert [step.loss for step in rest] == whole[2:]
    assert all(torch.equal(tensor, due[name]) for name, tensor in adapter.state_dict().items())


def test_saved_and_restored_with_the_gate(tmp_path: Path) -> None:
    model, adapter = both()
    train(model, adapter)
    adapter.gate = Gate((1,), PROBES, 32)
    adapter.gate.weight.normal_()
    adapter.save(tmp_path / "both", model)
    adapter.save(tmp_path / "both", model)
    again = both()[1]
    again.restore(tmp_path / "both")
    assert again.state_dict().keys() == adapter.state_dict().keys()
    assert all(torch.equal(tensor, adapter.state_dict()[name]) for name, tensor in again.state_dict().items())
    (tmp_path / "both" / "1-adapter" / "adapter_model.safetensors").write_bytes(b"damaged")
    fresh = both()[1]
    before = copied(fresh)
    with pytest.raises(TrailFileError):
        fresh.restore(tmp_path / "both")
    assert fresh.gate is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())
    (tmp_path / "both" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt"):
        adapter.save(tmp_path / "both")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        adapter.restore(tmp_path / "nowhere")


def test_what_is_not_together_is_refused() -> None:
    model, adapter = both()
    laid, lora = adapter.members
    with pytest.raises(ValueError, match="takes two adapters or more, each once, not 1"):
        Together(laid)
    with pytest.raises(ValueError, match="two adapters or more"):
        Together(laid, laid)
    with tp.attach(model, laid), pytest.raises(RuntimeError, match="this map is attached to the model already"):
        tp.attach(model, adapter)
    with pytest.raises(ValueError, match=r"strength=0\.5 is for trails, and means nothing to a Together"):
        tp.attach(model, adapter, strength=0.5)
    lora.gate = Gate((1,), PROBES, 32)
    with pytest.raises(ValueError, match="a PeftAdapter has a gate of its own"):
        Together(laid, lora)
