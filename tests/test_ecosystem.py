"""What others build on a model works with trails: TRL's DPO and GRPO, sentence embeddings, PEFT over bare models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DIM, llama, make_tokenizer

import tokenpaths as tp

pytestmark = pytest.mark.filterwarnings("ignore")
OPTIONS: dict[str, Any] = {
    "max_steps": 3, "per_device_train_batch_size": 2, "report_to": [], "disable_tqdm": True, "bf16": False,
    "use_cpu": True, "dataloader_pin_memory": False, "learning_rate": 1e-2, "save_strategy": "no", "logging_steps": 1,
}  # fmt: skip


def trails() -> tp.TrailMap:
    return tp.TrailMap({tp.Site(1, tp.Last(1) | tp.Answer()): tp.LoReFT(DIM, rank=2)})


def saved(folder: Path) -> Any:
    """A model of a folder: DPO loads its reference from there, which so is the frozen base."""
    from transformers import AutoModelForCausalLM

    llama(len(make_tokenizer())).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def assert_only_trails_learned(model: Any, base: dict[str, torch.Tensor], laid: tp.TrailMap, fresh: Any) -> None:
    assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())
    assert all(not torch.equal(value, fresh[name]) for name, value in laid.state_dict().items())
    assert not tp.attached(model)


def test_dpo_prefers_by_trails_alone_against_the_frozen_base(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model, laid = saved(tmp_path / "base"), trails()
    base, fresh = copy.deepcopy(model.state_dict()), copy.deepcopy(laid.state_dict())
    pairs = [("abc", " de", " xy"), ("hij", " kl", " mn")]
    data = Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in pairs])
    with tp.trainable(model, laid):
        config = DPOConfig(str(tmp_path / "dpo"), **OPTIONS)
        trainer = DPOTrainer(model, args=config, train_dataset=data, processing_class=make_tokenizer())
        trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < losses[0]  # fresh trails are the reference
    assert_only_trails_learned(model, base, laid, fresh)


def test_grpo_moves_trails_alone_towards_the_reward(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model, laid = saved(tmp_path / "base"), trails()
    base, fresh = copy.deepcopy(model.state_dict()), copy.deepcopy(laid.state_dict())
    seen: list[list[str]] = []

    def reward(completions: list[str], **_: Any) -> list[float]:
        seen.append(completions)
        return [float(len(set(text))) for text in completions]

    config = GRPOConfig(str(tmp_path / "grpo"), num_generations=2, max_completion_length=6, **OPTIONS)
    data = Dataset.from_list([{"prompt": "abc"}, {"prompt": "hij"}])
    with tp.trainable(model, laid):
        GRPOTrainer(model, reward, args=config, train_dataset=data, processing_class=make_tokenizer()).train()
    assert seen and all(len(some) == 2 for some in seen)
    assert_only_trails_learned(model, base, laid, fresh)


def everywhere() -> tp.TrailMap:
    return tp.TrailMap({tp.Site(1): tp.LoReFT(DIM, rank=2, init="paper")})


def bare() -> Any:
    return llama().model


def bare_with_lora() -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(llama().model, LoraConfig(target_modules=["o_proj"]))


@pytest.mark.parametrize("make", [bare, bare_with_lora, llama])
@torch.no_grad()
def test_a_forward_that_goes_past_the_hooks_of_its_model_is_steered_too(make: Any) -> None:
    """PEFT runs `model.forward(...)` of what it wraps, and so does sentence-transformers."""
    model, ids = make(), torch.tensor([[5, 6, 7]])
    frozen = model(input_ids=ids)[0]
    with tp.attach(model, everywhere()):
        steered = model(input_ids=ids)[0]
        assert torch.equal(model.forward(input_ids=ids)[0], steered) and not torch.equal(steered, frozen)
    assert torch.equal(model.forward(input_ids=ids)[0], frozen)
    assert not any("forward" in vars(module) for module in model.modules())


def test_sentence_embeddings_are_steered(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from sentence_transformers import SentenceTransformer, models

    tokenizer = make_tokenizer()
    llama(len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    embedder: Any = SentenceTransformer(modules=[models.Transformer(str(tmp_path)), models.Pooling(DIM)], device="cpu")
    texts = ["abc", "a longer text"]
    before = embedder.encode(texts)
    with tp.attach(embedder[0].auto_model, everywhere()):
        steered = embedder.encode(texts)
    assert abs(steered - before).max() > 0.01 and (embedder.encode(texts) == before).all()
