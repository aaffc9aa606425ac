"""The chain of token: losses by parts, the answer's read apart, and tokens whose embeddings live in the trail."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import DIM, assert_equal, assert_slopes, llama, make_tokenizer, make_trails, state
from torch import Tensor, nn

import tokenpaths as tp
from tokenpaths import Example, Imitate, encode, steps
from tokenpaths.data import collate, encode_parts
from tokenpaths.training import ImitateParts, Step

Watch = Callable[[nn.Module], nn.Module]
PAIRS = [
    ("2+3", {"steps": "=5+4", "answer": "=9"}),
    ("what", {"steps": "c", "answer": "defg"}),
    ("xyz", {"answer": "q"}),
    ("ok", {"steps": "ab", "check": "ok", "answer": "ab"}),
]


def make_chains(**options: Any) -> list[Example]:
    return encode_parts(PAIRS, make_tokenizer(), **options)


def model_for() -> Any:
    return llama(len(make_tokenizer()))


def train(model: nn.Module, trails: tp.TrailMap, goals: list[Any], **options: Any) -> list[Step]:
    return list(steps(model, trails, goals, **{"steps": 6, "batch_size": 4, "lr": 1e-2, "progress": False, **options}))


# --- encoding ---------------------------------------------------------------------------------------------------------


def test_each_part_has_a_span_and_the_whole_reads_as_written() -> None:
    tokenizer = make_tokenizer()
    for example, (prompt, parts) in zip(make_chains(), PAIRS, strict=True):
        assert tokenizer.decode(example.ids) == prompt + "".join(parts.values()) + "</s>"
        assert tokenizer.decode(example.ids[: example.prompt_length]) == prompt
        assert all(example.answer[example.prompt_length :])
        assert list(example.spans) == list(parts)
        for name, text in parts.items():
            end = "</s>" if name == list(parts)[-1] else ""
            assert tokenizer.decode(example.ids[slice(*example.spans[name])]) == text + end
        assert example.spans[list(parts)[-1]][1] == len(example)


def test_no_token_lies_across_the_border_of_two_parts() -> None:
    (apart,) = encode_parts([("x", {"steps": "a", "answer": "b"})], make_tokenizer(), eos=False)
    (together,) = encode([("x", "ab")], make_tokenizer(), eos=False)
    assert len(apart) == len(together) + 1  # "ab" is one token


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "nothing to encode"),
        ([("", {"answer": "a"})], "item 0 has 0 prompt tokens and 1 parts"),
        ([("a", {})], "item 0 has 1 prompt tokens and 0 parts"),
        ([("a", {"answer": "b"}), ("a", {"steps": "", "answer": "b"})], "item 1: its part 'steps' is empty"),
    ],
)
def test_what_cannot_be_encoded_is_refused(pairs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_parts(pairs, make_tokenizer())


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="pass eos=False"):
        encode_parts(PAIRS, tokenizer)
    assert encode_parts(PAIRS, tokenizer, eos=False)


# --- the loss ---------------------------------------------------------------------------------------------------------


def by_hand(model: Any, examples: list[Example], parts: dict[str, float]) -> float:
    """Token by token, each example alone, in float64; trails are attached."""
    losses: list[float] = []
    for example in examples:
        with torch.no_grad():
            mask = torch.arange(len(example))[None] < example.prompt_length
            log_p = model(torch.tensor([example.ids]), prompt_mask=mask).logits[0].double().log_softmax(-1)
        for name, weight in parts.items():
            losses += [-weight * float(log_p[t - 1, example.ids[t]]) for t in range(*example.spans.get(name, (0, 0)))]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "parts",
    [{"steps": 0.5, "answer": 2.0}, {"answer": 1.0}, {"answer": 1.0, "check": 0.0}, {"steps": 1, "answer": 0.3}],
)
def test_the_loss_is_the_weighted_mean_of_the_definition(parts: dict[str, float], side: Any, watch: Watch) -> None:
    model, trails, examples = watch(model_for()), make_trails(), make_chains()
    goal = ImitateParts(examples, parts=parts)
    with tp.attach(model, trails):
        found = goal.loss(model, trails, collate(examples, side=side)).detach()
        assert float(found) == pytest.approx(by_hand(model, examples, parts), rel=1e-5)


def test_with_weights_of_one_it_is_imitation(watch: Watch) -> None:
    model, trails, examples = watch(model_for()), make_trails(), make_chains()
    goal = ImitateParts(examples, parts={"steps": 1, "check": 1, "answer": 1})
    gradients: list[list[Tensor]] = []
    with tp.attach(model, trails):
        for each in (goal, Imitate(examples)):
            loss = each.loss(model, trails, collate(examples))
            gradients.append(list(torch.autograd.grad(loss, list(trails.parameters()), materialize_grads=True)))
            gradients[-1].append(loss.detach())
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    assert goal.terms(examples) == Imitate(examples).terms(examples)


@settings(max_examples=8)
@given(st.floats(0, 3), st.floats(0, 3))
def test_the_loss_is_linear_in_the_weights(a: float, b: float) -> None:
    model, trails, examples = _MODEL, _TRAILS, make_chains()[:2]  # each with both parts
    with tp.attach(model, trails), torch.no_grad():

        def loss(**parts: float) -> float:
            return float(ImitateParts(examples, parts=parts).loss(model, trails, collate(examples)))

        whole = loss(steps=a, answer=b)
        assert whole == pytest.approx(a * loss(steps=1, answer=0) + b * loss(steps=0, answer=1), rel=1e-4, abs=1e-5)


_MODEL, _TRAILS = model_for(), make_trails()


def test_gradients_agree_with_finite_differences(unchecked: None) -> None:
    model, examples = model_for().double(), make_chains()
    torch.manual_seed(0)
    trails = tp.TrailMap({tp.Site(2): tp.DiReFT(DIM, 2, init="paper")}).double()
    goal = ImitateParts(examples, parts={"steps": 0.5, "answer": 2.0})
    assert_slopes(model, trails, goal, examples)


def test_how_examples_are_split_changes_nothing() -> None:
    """Also where a micro-batch has none of a part."""
    trained: list[dict[str, Tensor]] = []
    for shape in (dict(batch_size=4), dict(batch_size=1, accumulate=4)):
        trails = make_trails()
        train(model_for(), trails, [ImitateParts(make_chains(), parts={"steps": 0.5, "answer": 2})], steps=2, **shape)
        trained.append(state(trails))
    assert_equal(*trained, 1e-5)


def test_the_answers_loss_is_reported_apart_and_changes_nothing(watch: Watch) -> None:
    """A goal of weight 0 is read in the steps in which it is due, and the trails learn as if it were not there."""
    model, examples = watch(model_for()), make_chains()
    whole = ImitateParts(examples, parts={"steps": 0.5, "answer": 1.0})
    answer = ImitateParts(examples, parts={"answer": 1.0}, weight=0.0, every=3)
    trained: list[dict[str, Tensor]] = []
    for goals in ([whole], [whole, answer]):
        trails = make_trails()
        done = train(model, trails, goals, steps=4)
        trained.append(state(trails))
    assert_equal(*trained)
    assert [math.isnan(step.losses[1]) for step in done] == [False, True, True, False]
    with tp.attach(model, make_trails()):
        assert done[0].losses[1] == pytest.approx(by_hand(model, examples, {"answer": 1.0}), rel=1e-4)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "name the parts to learn"),
        ({"answer": -1.0}, "weight -1.0 of part 'answer' must be finite"),
        ({"answer": math.nan}, "weight nan of part 'answer'"),
        ({"steps": 1.0}, "example 2 has none of the parts 'steps'; its spans: 'answer'"),
        ({"answer": 1.0, "all": 1.0}, "the parts 'answer', 'all' of example 0 share a token"),
        ({"question": 1.0}, "of example 0 hold tokens that are not of its answer"),
    ],
)
def test_parts_that_make_no_sense_are_refused(parts: dict[str, float], message: str) -> None:
    examples = [
        Example(e.ids, e.answer, {**e.spans, "all": (e.prompt_length, len(e)), "question": (0, e.prompt_length)})
        if i == 0
        else e
        for i, e in enumerate(make_chains())
    ]
    with pytest.raises(ValueError, match=message):
        ImitateParts(examples, parts=parts)


# --- tokens of the trail ----------------------------------------------------------------------------------------------

CUE = 255 + 3  # an id that no text of these tests contains


def cued(tokenizer: Any, pairs: list[tuple[str, str]]) -> list[Example]:
    """The trail token at the end of each prompt."""
    examples = encode(pairs, tokenizer, eos=False)
    return [
        Example(
            (*e.ids[: e.prompt_length], CUE, *e.ids[e.prompt_length :]),
            (*e.answer[: e.prompt_length], False, *e.answer[e.prompt_length :]),
        )
        for e in examples
    ]


def test_a_trail_token_has_its_embedding_in_the_trail_and_not_in_the_base(tmp_path: Path, watch: Watch) -> None:
    tokenizer = make_tokenizer()
    model: Any = watch(model_for())
    examples = cued(tokenizer, [("what", "y")])
    trails = tp.TrailMap({tp.Site(0, tp.Tokens([CUE]), "embedding"): tp.Additive(tp.width(model))})
    done = train(model, trails, [Imitate(examples)], steps=50, batch_size=1, lr=0.2)
    assert done[-1].loss < 0.2 * done[0].loss

    trails.save(tmp_path / "cue.safetensors", model)
    trails = tp.TrailMap.load(tmp_path / "cue.safetensors", model=model)
    question = torch.tensor([[*tokenizer("what")["input_ids"], CUE]])
    with tp.attach(model, trails), torch.no_grad():
        written = model.generate(question, attention_mask=torch.ones_like(question), max_new_tokens=1, do_sample=False)
        assert tokenizer.decode(written[0, question.shape[1] :]) == "y"
        without = model(question[:, :-1]).logits  # a text without the token is the frozen model's, bit for bit
    with torch.no_grad():
        assert torch.equal(without, model(question[:, :-1]).logits)
        # and the vector is the token's embedding: put into the base, it gives what the trail gives
        with tp.attach(model, trails):
            steered = model(question).logits
        embeddings = model.get_input_embeddings()(question)
        embeddings[0, -1] += next(iter(trails.parameters()))
        assert torch.allclose(model(inputs_embeds=embeddings).logits, steered, atol=1e-4)
