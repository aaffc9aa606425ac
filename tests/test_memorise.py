"""The memorisation demonstration of the ReFT paper, on a short text of random words."""

from __future__ import annotations

from typing import Any

from benchmarks.memorise.__main__ import make_text, memorise


def test_one_rank_1_trail_recalls_a_text(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    run = memorise(model, tokenizer, 4, seed=1, layer=8, lr=2e-2, most_steps=120)
    assert run["parameters"] == 576 + 1
    assert run["held"] == 4


def test_texts_are_random_words() -> None:
    assert make_text(1) != make_text(2)
    assert make_text(1) == make_text(1)
