"""Mixtures: the share is exact, each item comes once an epoch, and the order is known from a number alone."""

from __future__ import annotations

import itertools
import math
import pickle
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tokenpaths import mix
from tokenpaths.data import Mix, MixedStream
from tokenpaths.data.mixing import count

shares = st.one_of(st.fractions(0, Fraction(99, 100), max_denominator=200), st.sampled_from([0.0, 0.01, 0.005, 0.1]))
sizes = st.integers(1, 20)


def exact(share: float | Fraction) -> Fraction:
    return Fraction(str(share))


class Lines:
    """An iterable without a length that can begin again, as a file can be read again."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        yield from self.items


def mixture(task: int, original: int, share: float | Fraction, seed: int = 0, epochs: int = 1) -> Mix[tuple[str, int]]:
    made = mix(
        [("task", i) for i in range(task)], [("original", i) for i in range(original)], share, seed=seed, epochs=epochs
    )
    assert isinstance(made, Mix)
    return made


@given(share=shares, start=st.integers(0, 10**9), length=st.integers(1, 99))
def test_the_share_is_exact_over_any_prefix_and_any_stretch(share: Any, start: int, length: int) -> None:
    mixed, p = mixture(7, 5, share), exact(share)
    found = sum(mixed.at(i)[0] == "original" for i in range(start, start + length))
    assert found in (math.floor(p * length), math.ceil(p * length))
    prefix = sum(mixed.at(i)[0] == "original" for i in range(length))
    assert abs(prefix - p * length) <= Fraction(1, 2)
    assert prefix == count(length, p)


def test_one_per_cent_of_batches_of_32_is_not_rounded_to_none() -> None:
    mixed = mixture(3000, 50, 0.01)
    batches = [mixed[start : start + 32] for start in range(0, 32 * 75, 32)]
    held = [sum(part == "original" for part, _ in batch) for batch in batches]
    assert set(held) == {0, 1}
    assert sum(held) == 24  # 1 % of 2400
    assert mixed.share == Fraction(1, 100)  # which the float 0.01 is not


@given(task=sizes, original=sizes, share=shares, seed=st.integers(0, 2**63), epochs=st.integers(1, 3))
def test_every_task_item_comes_once_an_epoch_and_so_does_every_original(
    task: int, original: int, share: Any, seed: int, epochs: int
) -> None:
    mixed = mixture(task, original, share, seed, epochs)
    items = list(mixed)
    assert len(items) == len(mixed)
    assert items[-1][0] == "task"  # it ends with the last one, so that no original comes for nothing
    for part, size in (("task", task), ("original", original)):
        drawn = [number for name, number in items if name == part]
        for first in range(0, len(drawn), size):
            epoch = drawn[first : first + size]
            assert len(set(epoch)) == len(epoch)
            if part == "task":
                assert len(epoch) == size
    assert sum(name == "task" for name, _ in items) == task * epochs


def test_each_epoch_is_another_permutation_and_each_seed_too() -> None:
    epochs = [
        tuple(mixture(30, 30, 0.5, seed=s, epochs=2).at(i) for i in range(a, a + 60)) for s in (0, 1) for a in (0, 60)
    ]
    assert len({tuple(x for x in epoch if x[0] == part) for epoch in epochs for part in ("task", "original")}) == 8
    assert epochs[0] == tuple(mixture(30, 30, 0.5)[:60])  # known from the seed


@given(task=sizes, original=sizes, share=shares, epochs=st.integers(1, 3), data=st.data())
def test_a_run_goes_on_from_any_step_in_the_same_order(
    task: int, original: int, share: Any, epochs: int, data: st.DataObject
) -> None:
    whole = list(mixture(task, original, share, 3, epochs))
    step = data.draw(st.integers(0, len(whole)))
    again = mixture(task, original, share, 3, epochs)
    assert again[step:] == whole[step:]
    assert list(again.stream(step)) == whole[step:]
    assert list(again.stream().after(step // 2).after(step - step // 2)) == whole[step:]


@given(task=sizes, original=sizes, share=shares, epochs=st.integers(1, 3), data=st.data())
def test_streams_keep_their_order_and_have_the_same_share(
    task: int, original: int, share: Any, epochs: int, data: st.DataObject
) -> None:
    def stream() -> MixedStream[Any]:
        made = mix(
            Lines([("task", i) for i in range(task)]), Lines([("original", i) for i in range(original)]), share,
            epochs=epochs,
        )  # fmt: skip
        assert isinstance(made, MixedStream)
        return made

    items, like = list(stream()), mixture(task, original, share, epochs=epochs)
    assert [part for part, _ in items] == [part for part, _ in like]
    for part, size in (("task", task), ("original", original)):
        drawn = [number for name, number in items if name == part]
        assert drawn == [i % size for i in range(len(drawn))]
    step = data.draw(st.integers(0, len(items)))
    assert list(stream().after(step)) == items[step:]


def test_a_list_may_be_mixed_with_a_stream() -> None:
    items = list(mix([f"q{i}" for i in range(20)], Lines(["a", "b", "c"]), 0.2, seed=1, epochs=2))
    assert Counter(items) == Counter({**{f"q{i}": 2 for i in range(20)}, "a": 4, "b": 3, "c": 3})
    assert [x for x in items if x in "abc"][:4] == ["a", "b", "c", "a"]
    assert items[:20] != sorted(items[:20])  # the list is permuted


def test_data_sets_mix_and_a_loader_gives_each_batch_its_share(tmp_path: Path) -> None:
    task = Dataset.from_list([{"text": f"task {i}"} for i in range(76)])
    original = Dataset.from_list([{"text": f"original {i}"} for i in range(9)])
    mixed = mix(task, original, 0.05)
    assert isinstance(mixed, Mix)
    for workers in (0, 2):
        batches = list(DataLoader(mixed, batch_size=20, num_workers=workers))  # type: ignore[arg-type]
        assert [sum(text.startswith("original") for text in batch["text"]) for batch in batches] == [1, 1, 1, 1]
    assert [row["text"] for row in mixed] == [text for batch in batches for text in batch["text"]]
    assert pickle.loads(pickle.dumps(mixed))[7] == mixed[7]
    streamed = mix(task.to_iterable_dataset(), original, 0.05)
    assert isinstance(streamed, MixedStream)
    assert isinstance(original.to_iterable_dataset(), IterableDataset)
    batches = list(DataLoader(streamed, batch_size=20, num_workers=1))
    assert [text for batch in batches for text in batch["text"] if "task" in text] == task["text"]


def test_two_workers_may_not_read_one_stream() -> None:
    loader = DataLoader(mixture(9, 9, 0.5).stream(), batch_size=3, num_workers=2)
    with pytest.raises(RuntimeError, match="read by 2 workers, each of which would give all of it"):
        list(loader)


def test_the_trainer_takes_a_mixture_in_its_order(tmp_path: Path) -> None:
    import warnings

    from tiny import llama, make_examples, make_trails
    from transformers import Trainer, TrainingArguments

    from tokenpaths import trainable
    from tokenpaths.data import IGNORED, collate

    seen: list[list[int]] = []

    def pad(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        seen.append([row["number"] for row in rows])
        batch = collate([row["example"] for row in rows])
        labels = torch.where(batch.labels == IGNORED, IGNORED, batch.labels)
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}

    rows = [{"example": e, "number": i} for i, e in enumerate(make_examples(24))]
    mixed = mix(rows[:18], rows[18:], 0.25)
    for name, data in (("sequence", mixed), ("stream", mixed.stream())):
        if name == "sequence" and not hasattr(TrainingArguments, "train_sampling_strategy"):
            continue  # transformers 4 shuffles a sequence, whatever it is told
        model, trails = llama(), make_trails()
        options: dict[str, Any] = {} if name == "stream" else {"train_sampling_strategy": "sequential"}
        arguments = TrainingArguments(
            str(tmp_path / name), max_steps=5, per_device_train_batch_size=4, report_to=[], use_cpu=True,
            disable_tqdm=True, dataloader_pin_memory=False, remove_unused_columns=False, save_strategy="no", **options,
        )  # fmt: skip
        seen.clear()
        with warnings.catch_warnings(), trainable(model, trails):
            warnings.filterwarnings("ignore", ".*pin_memory.*")
            Trainer(model, arguments, train_dataset=data, data_collator=pad).train()  # type: ignore[arg-type]
        assert seen[:5] == [[row["number"] for row in mixed[start : start + 4]] for start in range(0, 20, 4)], name
        assert all(sum(number >= 18 for number in batch) == 1 for batch in seen[:5])


def test_what_cannot_be_mixed_is_refused_by_name() -> None:
    some = ["a", "b"]
    for share in (1, -0.01, math.nan, 1.5):
        with pytest.raises(ValueError, match="must be at least 0 and below 1"):
            mix(some, some, share)
    with pytest.raises(ValueError, match="epochs=0 must be at least 1"):
        mix(some, some, epochs=0)
    with pytest.raises(ValueError, match="original has no items to mix"):
        mix(some, [])
    with pytest.raises(ValueError, match="task has no items to mix"):
        mix([], some)
    assert sorted(mix(some, [], 0)) == some
    with pytest.raises(TypeError, match="task is a dict, not a list.*name one split"):
        mix({"train": some}, some)
    with pytest.raises(TypeError, match="original is an iterator, which cannot begin again"):
        mix(some, itertools.chain(some))
    with pytest.raises(ValueError, match="the original stream has no items"):
        list(mix(some, Lines([]), 0.5))
    with pytest.raises(ValueError, match="start is -1"):
        mixture(2, 2, 0.5).stream(-1)
    mixed = mixture(2, 2, 0.5)
    with pytest.raises(IndexError):
        mixed[len(mixed)]
    with pytest.raises(IndexError, match="it begins at 0"):
        mixed.at(-1)
    assert mixed[-1] == mixed[len(mixed) - 1]
    assert repr(mixture(99, 5, 0.01)) == "<100 items, 1 of them original: share 0.01>"
