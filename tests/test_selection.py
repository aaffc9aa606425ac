"""Selection: the sampler against its definition, planted overlaps, what a model solves, and the funnel."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from tiny import llama, make_tokenizer

from tokenpaths.data import Question, contaminated, encode_texts, shared_grams
from tokenpaths.engine.means import mean_states
from tokenpaths.engine.readings import Run
from tokenpaths.lab.reasoning import (
    Funnel,
    clusters,
    sample,
    select,
    solved_by_generation,
    solved_by_likelihood,
)

TOKENIZER = make_tokenizer()
DOMAINS, LENGTHS = ["a", "a", "a", "b", "b", "c"], [5.0, 9.0, 7.0, 2.0, 2.0, 8.0]


# The sampler


def chances(n: int, domain_chance: Callable[[int, list[str]], list[float]]) -> dict[tuple[int, ...], float]:
    """The probability of each sequence of draws, by going through all of them."""
    found: dict[tuple[int, ...], float] = {}

    def go_on(drawn: tuple[int, ...], p: float) -> None:
        if len(drawn) == n:
            found[drawn] = p
            return
        left = [i for i in range(len(DOMAINS)) if i not in drawn]
        names = sorted({DOMAINS[i] for i in left})
        for name, q in zip(names, domain_chance(len(drawn), names), strict=True):
            ranked = sorted((i for i in left if DOMAINS[i] == name), key=lambda i: (-LENGTHS[i], i))
            total = sum(2.0**-rank for rank in range(len(ranked)))
            for rank, i in enumerate(ranked):
                if q:
                    go_on((*drawn, i), p * q * 2.0**-rank / total)

    go_on((), 1.0)
    return found


def uniform(_: int, names: list[str]) -> list[float]:
    return [1 / len(names)] * len(names)


WEIGHTS = {"a": 1.0, "b": 3.0, "c": 0.5, "d": 7.0}


def weighted(_: int, names: list[str]) -> list[float]:
    return [WEIGHTS[name] / sum(WEIGHTS[other] for other in names) for name in names]


def uniform_then_weighted(draw: int, names: list[str]) -> list[float]:
    return uniform(draw, names) if draw < 1 else weighted(draw, names)


@pytest.mark.parametrize(
    ("chance", "options"),
    [
        (uniform, {}),
        (weighted, dict(weights=WEIGHTS)),
        (uniform_then_weighted, dict(weights=WEIGHTS, uniform_first=1)),
    ],
)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_draws_have_the_chances_of_the_definition(n: int, chance: Any, options: dict[str, Any]) -> None:
    expected = chances(n, chance)
    assert sum(expected.values()) == pytest.approx(1)
    draws = 3000
    counted = Counter(tuple(sample(DOMAINS, LENGTHS, n, seed=seed, **options)) for seed in range(draws))
    assert set(counted) <= set(expected)
    common = [key for key, p in expected.items() if p * draws >= 5]
    rare = [key for key in expected if key not in set(common)]
    observed = [counted[key] for key in common] + [sum(counted[key] for key in rare)] * bool(rare)
    theory = [draws * expected[key] for key in common] + [draws * sum(expected[key] for key in rare)] * bool(rare)
    assert chisquare(observed, theory).pvalue > 1e-3


def test_all_items_are_drawn_once_and_the_same_again() -> None:
    for seed in range(20):
        drawn = sample(DOMAINS, LENGTHS, 6, seed=seed)
        assert sorted(drawn) == list(range(6))
        assert drawn == sample(DOMAINS, LENGTHS, 6, seed=seed)
    assert len({tuple(sample(DOMAINS, LENGTHS, 6, seed=seed)) for seed in range(20)}) > 10


def test_a_domain_of_many_items_is_no_trouble() -> None:
    drawn = sample(["a"] * 3000, [float(i) for i in range(3000)], 100)
    assert min(drawn) > 3000 - 150  # the longest, by far
    assert len(set(drawn)) == 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"], [1.0], 2), "2 items cannot be drawn of 1 without replacement"),
        ((["a"], [1.0, 2.0], 1), "1 domains and 2 lengths: each item needs one of both"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(*arguments)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1.0}, "weights has no entry for domain 'b'"),
        ({"a": 1.0, "b": -1.0}, "must not be negative"),
        ({"a": 1.0, "b": 0.0}, "after 1 draws only domains of weight 0 have items left: b"),
    ],
)
def test_weights_that_choose_nothing_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(["a", "b"], [1.0, 2.0], 2, weights=weights)


# Decontamination

LETTERS = st.sampled_from("abcd")


def overlaps(text: str, test: str, words: int) -> bool:
    """By the definition, window by window."""
    a, b = text.casefold().split(), test.casefold().split()
    size = min(words, len(b))
    windows = [b[i : i + size] for i in range(len(b) - size + 1)]
    return any(a[i : i + size] == window for i in range(len(a) - size + 1) for window in windows)


@settings(max_examples=100)
@given(
    st.lists(st.lists(LETTERS, max_size=12).map(" ".join), max_size=5),
    st.lists(st.lists(LETTERS, min_size=1, max_size=8).map(" ".join), min_size=1, max_size=3),
    st.integers(1, 5),
)
def test_overlaps_are_those_of_the_definition(texts: list[str], test: list[str], words: int) -> None:
    expected = [any(overlaps(text, one, words) for one in test) for text in texts]
    assert contaminated(texts, test, n=words) == expected


@pytest.mark.parametrize("seed", range(5))
def test_every_planted_overlap_is_found_and_nothing_else(seed: int) -> None:
    rng = random.Random(seed)
    word = lambda: "".join(rng.choices("abcdefghij", k=6))  # noqa: E731
    test = [" ".join(word() for _ in range(rng.randint(8, 20))) for _ in range(10)]
    texts, planted = [], []
    for _ in range(100):
        words = [word() for _ in range(20)]
        size = rng.choice([0, 7, 8, 9])
        if size:
            source = rng.choice([one.split() for one in test if len(one.split()) >= size])
            start = rng.randrange(len(source) - size + 1)
            copied = [rng.choice([str.upper, str.title, str])(part) for part in source[start : start + size]]
            at = rng.randrange(20)
            words[at:at] = copied
        texts.append("".join(part + rng.choice([" ", "\n", "\t", "  "]) for part in words))
        planted.append(size >= 8)
    assert contaminated(texts, test) == planted


def test_punctuation_can_be_part_of_a_word_and_a_test_without_words_is_refused() -> None:
    texts = ["One two, three", "one TWO three"]
    assert contaminated(texts, ["one two three"], split=lambda text: text.casefold().split()) == [False, True]
    with pytest.raises(ValueError, match="test text 1 has no words"):
        contaminated(["a"], ["b", " \n"])


def test_the_checks_of_contamination_agree_on_words() -> None:
    train = ["One two, three!", "one two four", "four"]
    assert contaminated(train, ["one two three"]) == [True, False, False]
    assert [(found.test, found.train) for found in shared_grams(train, ["one two three"])] == [(0, 0)]
    assert contaminated(train, ["two three", "ONE two; five"], n=2) == [True, True, False]


# What a model solves


def test_solved_by_likelihood_is_what_forwards_one_by_one_say() -> None:
    model = llama(300)
    options = (" yes", " no", " perhaps")
    problems = [Question(f"Is {i} odd?", options[i % 3], options=options) for i in range(9)]

    def likelihood(problem: Question, option: str) -> float:
        prompt, answer = (TOKENIZER(text)["input_ids"] for text in (problem.prompt, option))
        with torch.no_grad():
            logs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        return float(sum(logs[len(prompt) - 1 + i, token] for i, token in enumerate(answer)))

    best = [max(options, key=lambda option: likelihood(problem, option)) for problem in problems]
    expected = [problem.answer == option for problem, option in zip(problems, best, strict=True)]
    assert solved_by_likelihood(model, problems, TOKENIZER, max_batch_tokens=60) == expected
    assert True in expected
    assert False in expected


def test_a_choice_without_its_answer_is_refused() -> None:
    with pytest.raises(
        ValueError, match="problem 0: its answer 'x' is none of its options .* use solved_by_generation"
    ):
        solved_by_likelihood(llama(300), [Question("q", "x", options=("a", "b"))], TOKENIZER)


def test_solved_by_generation_reads_what_is_written(watch: Any) -> None:
    model = watch(llama(300))
    questions = ["ab", "hello there", "12", "a b c d", "x"]
    written: list[str] = []
    for question in questions:
        ids = TOKENIZER(question, return_tensors="pt")
        output = model.generate(**ids, do_sample=False, max_new_tokens=5, pad_token_id=0)
        written.append(TOKENIZER.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    problems = [
        Question(q, text if i % 2 else "wrong") for i, (q, text) in enumerate(zip(questions, written, strict=True))
    ]
    found = solved_by_generation(model, problems, TOKENIZER, lambda text: text, max_new_tokens=5, max_batch_tokens=30)
    assert found == [False, True, False, True, False]
    assert solved_by_generation(model, [], TOKENIZER, lambda text: text) == []


# Diversity


def test_clusters_find_texts_of_two_kinds(watch: Any) -> None:
    texts = [letter * (3 + i) for letter in "kW" for i in range(6)]
    model = watch(llama(300))
    labels = clusters(model, texts, TOKENIZER, 2, layer="embedding")
    assert len(set(labels[:6])) == len(set(labels[6:])) == 1
    assert labels[0] != labels[6]
    assert clusters(model, texts, TOKENIZER, 2, layer="embedding", max_batch_tokens=9) == labels
    assert set(labels) == {"cluster 0", "cluster 1"}


def test_mean_states_are_those_of_forwards_one_by_one() -> None:
    model = llama(300).double()
    examples = encode_texts(["abc", "a longer text", "xy"], TOKENIZER)
    for layer, number in (("embedding", 0), ("block 1", 2)):
        for skip_first in (False, True):
            found = mean_states(Run(model), examples, layer, skip_first=skip_first, max_batch_tokens=20)
            for row, example in zip(found, examples, strict=True):
                with torch.no_grad():
                    states = model(torch.tensor([example.ids]), output_hidden_states=True).hidden_states[number][0]
                torch.testing.assert_close(row, states[int(skip_first) :].mean(0))
    with pytest.raises(ValueError, match="there are no texts"):
        mean_states(Run(model), [])


def test_more_clusters_than_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="2 texts cannot be put into 3 clusters"):
        clusters(llama(300), ["a", "b"], TOKENIZER, 3)
    with pytest.raises(ValueError, match=r"layer 'block 9' is none of the model's, which are embedding, block 0,"):
        clusters(llama(300), ["aa", "bb"], TOKENIZER, 2, layer="block 9")


# The funnel


def pool() -> list[Question]:
    words = [f"w{i}" for i in range(12)]
    clean = [Question(f"question {i}", "", "step " * (i + 1), domain=f"d{i % 4}") for i in range(20)]
    dirty = [
        Question(" ".join(words), "", "step", domain="d0"),
        Question("q", "", "so " + " ".join(words[2:10]), domain="d1"),
    ]
    return [*clean, *dirty, Question("no trace", "", domain="d2")]


def solves_even(items: Sequence[Question]) -> list[bool]:
    return [len(p.chain.split()) % 2 == 0 for p in items]


def test_the_funnel_tells_what_each_step_left() -> None:
    asked: list[int] = []

    def solves(items: Sequence[Question]) -> list[bool]:
        asked.append(len(items))
        return solves_even(items)

    chosen = select(
        pool(),
        4,
        quality={"has a trace": lambda p: bool(p.chain)},
        test=[" ".join(f"W{i}" for i in range(12))],
        difficulty={"a model": solves},
    )
    told = [(step.name, step.dropped, step.left) for step in chosen.funnel.steps]
    assert told == [
        ("has a trace", 1, 22),
        ("shares no 8 words with a test item", 2, 20),
        ("not solved by a model", 10, 10),
        ("drawn over 2 domains", 6, 4),
    ]
    assert asked == [20]  # a model is asked of what is left only
    assert chosen.items == tuple(pool()[i] for i in chosen.indices)
    assert len(set(chosen.indices)) == 4
    assert all(len(p.chain.split()) % 2 for p in chosen.items)
    assert str(chosen.funnel).splitlines()[0].split() == ["the", "pool", "23"]


def test_select_draws_as_sample_does() -> None:
    items = pool()[:20]
    options = dict(weights={"x": 1.0, "y": 2.0}, uniform_first=2, seed=3)
    labels = ["x" if i < 10 else "y" for i in range(20)]
    chosen = select(items, 6, domains=lambda _: labels, length=lambda p: -len(p.chain), **options)
    assert list(chosen.indices) == sample(labels, [-float(len(p.chain)) for p in items], 6, **options)


def test_too_few_items_are_refused_with_the_funnel() -> None:
    with pytest.raises(ValueError, match=r"30 items were asked for, but 22 are left:\nthe pool[^\n]*\nhas a trace"):
        select(pool(), 30, quality={"has a trace": lambda p: bool(p.chain)})
    with pytest.raises(ValueError, match="at least one item, not 0"):
        select(pool(), 0)
    with pytest.raises(ValueError, match="'not solved by m' gave 1 verdicts on 23 items"):
        select(pool(), 3, difficulty={"m": lambda _: [True]})
    with pytest.raises(ValueError, match="domains gave 1 labels for 23 items"):
        select(pool(), 3, domains=lambda _: ["x"])


def test_the_funnel_as_a_file_and_a_picture(tmp_path: Path) -> None:
    funnel = select(pool(), 4, quality={"has a trace": lambda p: bool(p.chain)}).funnel
    funnel.to_json(tmp_path / "f.json")
    told = json.loads((tmp_path / "f.json").read_text())
    assert told["pool"] == 23
    assert told["steps"][0] == {"name": "has a trace", "dropped": 1, "left": 22}
    assert Funnel.from_json(tmp_path / "f.json") == funnel
    figure = funnel.plot()
    assert [bar.get_width() for bar in figure.axes[0].patches] == [23, 22, 4]
    assert np.allclose(figure.get_size_inches(), (8, 2.4))
