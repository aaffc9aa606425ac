"""The same trails under the real Hugging Face Trainer and TRL's SFTTrainer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from tiny import assert_equal, llama, make_examples, make_tokenizer, make_trails, state
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from tokenpaths import All, Imitate, Last, LoReFT, Site, TrailMap, attach, trainable
from tokenpaths.attachment import is_attached
from tokenpaths.data import IGNORED, collate
from tokenpaths.site.fingerprint import fingerprint
from tokenpaths.trails import RED


@pytest.fixture(autouse=True)
def _their_warnings() -> Iterator[None]:
    """Trainer and TRL warn of what is no business of these tests: missing GPUs, their own deprecations."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*pin_memory.*")
        warnings.filterwarnings("ignore", ".*use_reentrant.*")
        yield


ROWS = [
    {"input_ids": list(e.ids), "labels": [i if a else IGNORED for i, a in zip(e.ids, e.answer, strict=True)]}
    for e in make_examples(12)
]


def pad(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    width = max(len(row["input_ids"]) for row in rows)

    def fill(key: str, value: int) -> Tensor:
        return torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])

    mask = torch.tensor([[int(i < len(row["input_ids"])) for i in range(width)] for row in rows])
    return {"input_ids": fill("input_ids", 0), "labels": fill("labels", IGNORED), "attention_mask": mask}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    given: dict[str, Any] = dict(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return TrainingArguments(**{**given, **changes})


def run(model: nn.Module, folder: Path, resume: str | None = None, collator: Any = pad, **changes: Any) -> Trainer:
    trainer = Trainer(
        model,
        arguments(folder, **changes),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS),
        data_collator=collator,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def by_hand(batches: list[dict[str, Tensor]], max_grad_norm: float = 1.0) -> dict[str, Tensor]:
    """What the Trainer must arrive at: the same batches, an optimizer of torch's own, and `attach`."""
    trails, model = make_trails(), llama()
    optimizer = torch.optim.AdamW(trails.parameters(), lr=1e-2, weight_decay=0.0)
    with attach(model, trails):
        for step, batch in enumerate(batches):
            prompt = (batch["labels"] != IGNORED).cumsum(1) == 0
            logits = model(batch["input_ids"], batch["attention_mask"], prompt_mask=prompt).logits
            F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(trails.parameters(), max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * (1 - step / len(batches))
            optimizer.step()
            optimizer.zero_grad()
    return state(trails)


def test_trainer_trains_the_trails_and_only_them(tmp_path: Path, watch: Callable[[nn.Module], nn.Module]) -> None:
    model = watch(llama())
    trails = make_trails()
    before = state(trails)
    with trainable(model, trails) as inside:
        assert inside is trails
        assert is_attached(model, trails)
        learning = {name for name, p in model.named_parameters() if p.requires_grad}
        assert learning == {name for name, _ in trails.named_parameters()}  # so that the keys are a trail file's
        trainer = run(model, tmp_path)
        optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        assert optimized == {id(p) for p in trails.parameters()}
        metrics = trainer.evaluate()
    del model._is_accelerate_prepared  # a mark that the Trainer's own Accelerator leaves
    assert not any(torch.equal(before[name], tensor) for name, tensor in state(trails).items())
    assert 0 < metrics["eval_loss"] < 20
    # `trails` has learned what it says: evaluated outside of the Trainer it gives the same loss
    with torch.no_grad(), attach(model, trails):
        losses = [
            Imitate(e).loss(model, trails, collate(e)).item() * Imitate(e).terms(e)
            for e in (make_examples(12)[:8], make_examples(12)[8:])
        ]
    tokens = Imitate(make_examples(12)).terms(make_examples(12))
    assert sum(losses) / tokens == pytest.approx(metrics["eval_loss"], rel=0.05)  # the Trainer averages over batches


def test_trainer_arrives_where_a_loop_by_hand_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token rules see the same prompts, and clipping and weight decay act on the trails."""
    batches: list[dict[str, Tensor]] = []

    def keep(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batches.append(pad(rows))
        return batches[-1]

    results: list[dict[str, Tensor]] = []
    for changes in ({}, {"max_grad_norm": 1e-9}, {"weight_decay": 0.5}):
        trails, model = make_trails(), llama()
        with trainable(model, trails):
            run(model, tmp_path / str(len(results)), collator=keep, **changes)
        results.append(state(trails))
    assert_equal(results[0], by_hand(batches[:6]), 1e-5)
    assert_equal(results[1], by_hand(batches[:6], max_grad_norm=1e-9), 1e-5)
    for changed in results[1:]:
        assert max((changed[n] - results[0][n]).abs().max() for n in changed) > 1e-3


def test_checkpoints_hold_the_trails_and_not_the_base(tmp_path: Path) -> None:
    trails, model = make_trails(), llama()
    with trainable(model, trails):
        trainer = run(model, tmp_path)
        trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "checkpoint-6", tmp_path / "final"):
        assert not (folder / "config.json").exists()
        saved = TrailMap.from_pretrained(folder, model=model)  # does not warn: made for this base
        assert repr(saved) == repr(trails)
        assert_equal(state(saved), state(trails))
        files = [path for path in folder.iterdir() if path.suffix == ".safetensors"]
        assert {path.name for path in files} == {"trails.safetensors", "model.safetensors"}
        assert sum(path.stat().st_size for path in files) < 20_000
    assert sum(p.numel() for p in model.parameters()) * 4 > 100_000
    for path in (tmp_path / "checkpoint-6").rglob("*"):
        assert path.stat().st_size < 50_000, path


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_resuming_is_bit_equal_to_an_uninterrupted_run(tmp_path: Path, dropout: float) -> None:
    whole = make_trails(dropout)
    model = llama()
    with trainable(model, whole):
        run(model, tmp_path)
    resumed = make_trails(dropout)
    for parameter in resumed.parameters():
        nn.init.normal_(parameter)
    model = llama()
    with trainable(model, resumed):
        run(model, tmp_path / "again", resume=str(tmp_path / "checkpoint-3"))
    assert_equal(state(resumed), state(whole))


def test_resuming_warns_of_no_missing_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import transformers

    transformers.logging.enable_propagation()
    model = llama()
    try:
        with trainable(model, make_trails()):
            run(model, tmp_path)
            caplog.clear()
            run(model, tmp_path, resume=str(tmp_path / "checkpoint-3"))
    finally:
        transformers.logging.disable_propagation()
    assert not [r for r in caplog.records if "missing keys" in r.message or "unexpected keys" in r.message]


def test_a_state_that_lacks_part_of_the_base_is_still_an_error() -> None:
    model = llama()
    with trainable(model, make_trails()):
        whole = model.state_dict()
        own = {name: t for name, t in whole.items() if name.startswith("trails.")}
        assert model.load_state_dict(own, strict=False).missing_keys == []
        del whole["model.norm.weight"]
        assert model.load_state_dict(whole, strict=False).missing_keys == ["model.norm.weight"]


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    class Spoil(TrainerCallback):
        """After the first checkpoint everything gets worse."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                for parameter in trails.parameters():
                    parameter.data.normal_(std=10)

    trails, model = make_trails(), llama()
    with trainable(model, trails):
        trainer = Trainer(
            model,
            arguments(
                tmp_path, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True,
                metric_for_best_model="eval_loss",
            ),
            train_dataset=Dataset.from_list(ROWS), eval_dataset=Dataset.from_list(ROWS), data_collator=pad,
            callbacks=[Spoil()],
        )  # fmt: skip
        trainer.train()
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    assert_equal(state(trails), state(TrailMap.from_pretrained(tmp_path / "checkpoint-3")))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(
    tmp_path: Path, reentrant: bool, watch: Callable[[nn.Module], nn.Module]
) -> None:
    trails = TrailMap({Site(1, All(), "mlp"): RED(32), Site(1, Last(1)): LoReFT(32, 2), Site(2): RED(32)})
    results: list[dict[str, Tensor]] = []
    start = state(trails)
    for kwargs in ({}, dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant})):
        model = llama()
        trails.load_state_dict(start)
        with trainable(model, trails):
            run(model, tmp_path, **kwargs)
        results.append(state(trails))
    assert_equal(*results, 1e-5)
    assert all((results[0][name] - start[name]).abs().max() > 1e-3 for name in start)


def test_gradient_accumulation_is_the_same_as_a_larger_batch(tmp_path: Path) -> None:
    results: list[dict[str, Tensor]] = []
    for batch_size, accumulate in ((4, 1), (2, 2)):
        trails, model = make_trails(), llama()
        with trainable(model, trails):
            run(model, tmp_path, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulate)
        results.append(state(trails))
    assert_equal(*results, 1e-5)


def test_everything_is_as_before_after_an_exception(watch: Callable[[nn.Module], nn.Module]) -> None:
    model = llama()
    model.model.norm.weight.requires_grad_(False)
    model.lm_head.train()
    watch(model)
    with pytest.raises(KeyboardInterrupt), trainable(model, make_trails()):  # noqa: PT012
        model.train()
        raise KeyboardInterrupt
    assert "save_pretrained" not in vars(model)
    assert not hasattr(model, "trails")
    trails = make_trails()
    with pytest.raises(ValueError, match="layer 9 is out of range"), trainable(model, TrailMap({Site(9): RED(32)})):
        pass
    with trainable(model, trails), pytest.raises(ValueError, match="has an attribute 'trails' already"):  # noqa: SIM117
        with trainable(model, make_trails()):
            pass
    with pytest.raises(ValueError, match="every parameter of the trails is frozen"):  # noqa: SIM117
        with trainable(model, trails.requires_grad_(False)):
            pass


def test_the_fingerprint_in_a_checkpoint_is_that_of_the_base(tmp_path: Path) -> None:
    model, trails = llama(), make_trails()
    expected = fingerprint(model)
    with trainable(model, trails):
        model.save_pretrained(tmp_path)
        assert hasattr(model, "trails")
    assert expected.encode() in (tmp_path / "trails.safetensors").read_bytes()


def test_a_trainer_that_takes_the_labels_out_is_refused_unless_prompts_are_given(tmp_path: Path) -> None:
    """Label smoothing is computed from logits, so the model is called without labels."""
    model, trails = llama(), make_trails()
    with trainable(model, trails), pytest.raises(ValueError, match="called without labels, .*prompt_mask"):
        run(model, tmp_path, label_smoothing_factor=0.1)

    def with_prompts(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = pad(rows)
        return {**batch, "prompt_mask": (batch["labels"] != IGNORED).cumsum(1) == 0}

    with trainable(model, trails):
        Trainer(
            model,
            arguments(tmp_path, label_smoothing_factor=0.1, remove_unused_columns=False),
            train_dataset=Dataset.from_list(ROWS),
            data_collator=with_prompts,
        ).train()
    model, everywhere = llama(), TrailMap({Site(1, All()): RED(32)})  # which needs no prompt
    with trainable(model, everywhere):
        run(model, tmp_path, label_smoothing_factor=0.1)


def test_rows_that_pack_several_examples_are_refused() -> None:
    model = llama()
    ids, positions = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 1, 0, 1]])
    with trainable(model, make_trails()), pytest.raises(ValueError, match="packs several examples into one row"):
        model.train()(input_ids=ids, labels=ids, position_ids=positions)


def test_a_peft_model_as_base_keeps_its_adapter_frozen(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    lora = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    trails = make_trails()
    with trainable(model, trails):
        run(model, tmp_path)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert lora
    assert all(torch.equal(p, lora[name]) for name, p in model.named_parameters() if name in lora)
    assert_equal(state(TrailMap.from_pretrained(tmp_path / "checkpoint-6")), state(trails))
    again = make_trails()
    with trainable(model, again):
        run(model, tmp_path / "again", resume=str(tmp_path / "checkpoint-3"))
    assert_equal(state(again), state(trails))


def test_trl_sft_trains_completions_only(tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    tokenizer = make_tokenizer()
    rows = [{"prompt": "abc"[: 1 + i % 3] + "=", "completion": "xyz"[: 1 + i % 2]} for i in range(12)]
    seen: list[dict[str, Tensor]] = []

    def sft(trails: TrailMap, folder: Path, resume: str | None = None) -> None:
        model = llama(vocab_size=320)
        same = ("max_steps", "per_device_train_batch_size", "learning_rate", "save_steps", "use_cpu", "disable_tqdm")
        shared = {name: getattr(arguments(folder), name) for name in same}
        with trainable(model, trails):
            model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
            SFTTrainer(
                model=model,
                args=SFTConfig(str(folder), **shared, report_to=[], bf16=False, gradient_checkpointing=False),
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
            ).train(resume_from_checkpoint=resume)

    def make() -> TrailMap:
        torch.manual_seed(1)
        return TrailMap({Site(0, Last(1)): LoReFT(32, 2), Site(1, All()): RED(32)})

    trails = make()
    sft(trails, tmp_path)
    assert not any(torch.equal(t, make().state_dict()[name]) for name, t in state(trails).items())
    lengths: set[int] = set()
    for batch in seen:
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            prompt = ids[(labels != IGNORED).cumsum(0) == 0]
            assert tokenizer.decode(prompt).endswith("=")
            lengths.add(len(prompt))
    assert lengths == {2, 3}  # "ab" is one token
    assert_equal(state(TrailMap.from_pretrained(tmp_path / "checkpoint-6")), state(trails))

    resumed = make()
    sft(resumed, tmp_path / "again", str(tmp_path / "checkpoint-3"))
    assert_equal(state(resumed), state(trails))
