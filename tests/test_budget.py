"""Budget forcing: counts to the token, output untouched without limits, rows apart; the three figures of s1."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import DIM, llama, make_tokenizer
from torch import Tensor, nn

import tokenpaths as tp
from tokenpaths import DiReFT
from tokenpaths.lab.reasoning import BudgetForcing, Level, Scaling, Thinking, scaling

WORDS = ["hello there", "ab", "a b c d e f", "The sea.", "12", "k", "no way out", "abab"]
TOKENIZER, MODEL = make_tokenizer(), llama(300)
EOS = TOKENIZER.eos_token_id
ENDS = ["#", "##", "</t>", "a#b", ["##", "!"], ["</t>", [70, 71, 72]]]


def prompts(words: list[str] = WORDS) -> Any:
    return TOKENIZER(words, return_tensors="pt", padding=True, padding_side="left")


def generate(inputs: Any, budget: BudgetForcing | None = None, model: nn.Module = MODEL, **options: Any) -> Tensor:
    torch.manual_seed(0)
    fixed = dict(max_new_tokens=60, do_sample=False, pad_token_id=0, eos_token_id=EOS)
    return model.generate(**inputs, logits_processor=[budget] if budget else [], **{**fixed, **options})


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def by_hand(written: list[int], ends: list[list[int]]) -> int:
    """The thinking tokens of a row, from the definition."""
    for i, token in enumerate(written):
        if token == EOS or any(written[i : i + len(end)] == end for end in ends):
            return i
    return len(written)


class Eager(nn.Module):
    """Makes a tiny model write what it is told to like: `likes[row][n]` for the n-th new token, "" for whatever."""

    def __init__(self, likes: list[list[int]], width: int):
        super().__init__()
        self.likes, self.width = likes, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for row, likes in enumerate(self.likes):
            n = input_ids.shape[1] - self.width
            if n < len(likes):
                scores[row, likes[n]] = scores.max() + 1
        return scores


def written(likes: str | list[int], **budget: Any) -> tuple[str, Thinking]:
    """What a row becomes whose model likes to write this, and its count."""
    inputs = prompts(["ab"])
    told = ids(likes) if isinstance(likes, str) else likes
    forced = BudgetForcing(TOKENIZER, inputs["input_ids"], **budget)
    output = MODEL.generate(
        **inputs,
        logits_processor=[Eager([told], inputs["input_ids"].shape[1]), forced],
        max_new_tokens=len(told),
        do_sample=False,
        pad_token_id=0,
    )
    return TOKENIZER.decode(output[0, inputs["input_ids"].shape[1] :]), forced.counts(output)[0]


# The rules, one by one


@pytest.mark.parametrize(
    ("likes", "budget", "text", "count"),
    [
        ("xy#zzz", dict(end="#"), "xy#zzz", Thinking(2, 0, "itself")),
        ("xyzzzz", dict(end="#"), "xyzzzz", Thinking(6, 0, "unfinished")),
        ([*ids("xy"), EOS, 0, 0], dict(end="#"), "xy</s>", Thinking(2, 0, "eos")),
        # the maximum: the delimiter and the answer prefix are forced, then the model goes on
        ("xyzzzzuv", dict(end="#", max_tokens=3), "xyz#zzuv", Thinking(3, 0, "maximum")),
        ("xyzzzzuv", dict(end="##", answer="A:", max_tokens=2), "xy##A:uv", Thinking(2, 0, "maximum")),
        ("xyz", dict(end="##", answer="A:", max_tokens=0), "##A", Thinking(0, 0, "maximum")),
        ([*ids("xyz"), EOS], dict(end="#", max_tokens=3), "xyz#", Thinking(3, 0, "maximum")),
        # what has begun is completed, and counts from where it began
        ("xy<zzzzz", dict(end="</t>", answer="A", max_tokens=3), "xy</t>Az", Thinking(2, 0, "itself")),
        ("xyyx#!zz", dict(end=["##", "#!"], max_tokens=5), "xyyx##zz", Thinking(4, 0, "itself")),
        # once it has ended, nothing is forced or suppressed
        ("x#yyyyyy", dict(end="#", answer="A", max_tokens=3), "x#yyyyyy", Thinking(1, 0, "itself")),
        ("x#y#ab#y", dict(end="#", answer="A", min_tokens=1), "x#y#ab#y", Thinking(1, 0, "itself")),
        # each Wait takes the place of one stop, and no more than that many
        ("xy#WxyzWx#y", dict(end="#", waits=0, wait="Wait"), "xy#WxyzWx#y", Thinking(2, 0, "itself")),
        ("xy#cccd#e", dict(end="#", waits=1, wait="Wait"), "xyWaitd#e", Thinking(7, 1, "itself")),
        ("#aaa#aaa#b", dict(end="#", waits=2, wait="Wait"), "WaitWait#b", Thinking(8, 2, "itself")),
        ([*ids("x"), EOS, *ids("aaay#")], dict(end="#", waits=1), "xWaity#", Thinking(6, 1, "itself")),
        # the model's own Waits are its own
        ("Wait#aaax#", dict(end="#", waits=1, wait="Wait"), "WaitWaitx#", Thinking(9, 1, "itself")),
        # one that would not end within the maximum is not begun
        ("xy#aaaaaaa", dict(end="#", waits=1, wait="Wait", max_tokens=6), "xyWait#aaa", Thinking(6, 1, "maximum")),
        ("xy#aaaaaaa", dict(end="#", waits=1, wait="Wait", max_tokens=5), "xy#aaaaaaa", Thinking(2, 0, "itself")),
        # two delimiters, of which one is a part of the other
        ("xyab#", dict(end=["ab#", "#"]), "xyab#", Thinking(2, 0, "itself")),
    ],
)
def test_the_rules(likes: str | list[int], budget: dict[str, Any], text: str, count: Thinking) -> None:
    assert written(likes, **budget) == (text, count)


def test_the_minimum_suppresses_every_way_to_stop() -> None:
    for stop in (ids("#"), [EOS], ids("!")):
        likes = [*ids("xy"), *stop * 4, *ids("#")]
        text, count = written(likes, end=["#", "!"], min_tokens=5)
        assert count.tokens == 5
        assert text.startswith("xy")
        assert not {"#", "!"} & set(text[:5])


def test_other_spellings_are_recognised_if_they_are_given() -> None:
    """The pair "ab" is one token when the tokenizer meets it, two where the model wrote its letters apart."""
    apart = [*ids("x"), *ids("a"), *ids("b"), *ids("y#")]
    together = [*ids("x"), *ids("ab"), *ids("y#")]
    assert len(ids("ab")) == 1
    assert written(together, end="ab")[1] == Thinking(1, 0, "itself")
    assert written(apart, end="ab")[1] == Thinking(5, 0, "unfinished")
    both = ["ab", [*ids("a"), *ids("b")]]
    assert written(apart, end=both)[1] == written(together, end=both)[1] == Thinking(1, 0, "itself")


# Exact, whatever the setting


@st.composite
def settings_of_a_budget(draw: Any) -> dict[str, Any]:
    most = draw(st.none() | st.integers(0, 10))
    return dict(
        end=draw(st.sampled_from(ENDS)),
        answer=draw(st.sampled_from(["", "A", "A: "])),
        min_tokens=draw(st.integers(0, 10 if most is None else most)),
        max_tokens=most,
        waits=draw(st.integers(0, 3)),
        wait=draw(st.sampled_from(["W", "Wow", [9, 9, 8]])),
    )


@settings(max_examples=60)  # benchmarks/budget_forcing.py runs 200 on a real tokenizer
@given(settings_of_a_budget(), st.booleans(), st.integers(0, 10_000))
def test_counts_are_exact_in_every_setting(setting: dict[str, Any], sampled: bool, seed: int) -> None:
    inputs = prompts(random.Random(seed).sample(WORDS, 3))
    width = inputs["input_ids"].shape[1]
    budget = BudgetForcing(TOKENIZER, inputs["input_ids"], **setting)
    # a model that likes to stop: every stop token gains, by another draw for each setting
    bias = {(stop,): float(torch.rand((), generator=torch.Generator().manual_seed(seed)) * 40) for stop in budget.stops}
    sampling = dict(do_sample=True, top_k=20, temperature=1.5) if sampled else {}
    output = generate(inputs, budget, sequence_bias=bias, max_new_tokens=18, **sampling)
    most = setting["max_tokens"]
    for row, count in zip(output[:, width:].tolist(), budget.counts(output), strict=True):
        assert count.tokens == by_hand(row, budget.ends)
        assert count.tokens >= setting["min_tokens"]
        assert count.waits <= setting["waits"]
        if most is not None:
            assert count.tokens <= most
            assert count.ended != "unfinished"
        if count.ended == "maximum":
            closing = budget.ends[0] + budget.answer
            assert count.tokens == most
            assert row[most : most + len(closing)] == closing
    for row, columns in zip(output[:, width:].tolist(), budget._waited, strict=True):
        assert all(row[c : c + len(budget.wait)] == budget.wait for c in columns if c + len(budget.wait) <= len(row))
        assert all(b - a >= len(budget.wait) for a, b in zip(columns, columns[1:], strict=False))


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("end", ENDS)
def test_without_limits_the_output_is_that_of_plain_generate(end: Any, sampled: bool) -> None:
    inputs = prompts()
    budget = BudgetForcing(TOKENIZER, inputs["input_ids"], end=end)
    options = dict(do_sample=sampled, sequence_bias={tuple(ids("#")): 8.0})
    assert generate(inputs, budget, **options).equal(generate(inputs, **options))


def test_after_the_thinking_the_model_is_as_it_would_be() -> None:
    """Forced or not, what follows is what plain generate writes behind the same tokens."""
    inputs = prompts(["ab"])
    budget = BudgetForcing(TOKENIZER, inputs["input_ids"], end="##", answer="A:", max_tokens=5, waits=1, min_tokens=2)
    output = generate(inputs, budget, max_new_tokens=20)
    given = output[:, : inputs["input_ids"].shape[1] + 5 + 4]
    again = generate(dict(input_ids=given, attention_mask=torch.ones_like(given)), max_new_tokens=11)
    assert again.equal(output)


def test_a_batch_of_eight_is_eight_of_one(watch: Any) -> None:
    model = watch(MODEL)
    setting = dict(end="##", answer="A:", min_tokens=3, max_tokens=15, waits=2)
    bias = {tuple(ids("#")): 6.0}
    inputs = prompts()
    budget = BudgetForcing(TOKENIZER, inputs["input_ids"], **setting)
    together = generate(inputs, budget, model, sequence_bias=bias, max_new_tokens=30)[:, inputs["input_ids"].shape[1] :]
    counts = budget.counts(torch.cat([inputs["input_ids"], together], 1))
    assert {count.waits for count in counts} == {0, 1, 2}  # else the rows would have little to be apart in
    for i, word in enumerate(WORDS):
        alone = prompts([word])
        one = BudgetForcing(TOKENIZER, alone["input_ids"], **setting)
        output = generate(alone, one, model, sequence_bias=bias, max_new_tokens=30)
        assert output[0, alone["input_ids"].shape[1] :].tolist() == together[i, :30].tolist()
        assert one.counts(output) == [counts[i]]


def test_a_budget_is_used_again() -> None:
    inputs = prompts()
    bias = {tuple(ids("#")): 12.0}
    budget = BudgetForcing(TOKENIZER, inputs["input_ids"], end="##", max_tokens=15, waits=2)
    once = generate(inputs, budget, sequence_bias=bias)
    generate(inputs, budget, sequence_bias=bias, max_new_tokens=4)  # broken off in the middle of a Wait
    assert generate(inputs, budget, sequence_bias=bias).equal(once)
    assert any(count.waits for count in budget.counts(once))


def test_several_answers_to_a_prompt() -> None:
    inputs = prompts(["ab", "a b c"])
    budget = BudgetForcing(TOKENIZER, inputs["input_ids"], end="##", max_tokens=7)
    output = generate(inputs, budget, do_sample=True, num_return_sequences=3)
    assert len(output) == 6
    assert all(count.tokens <= 7 for count in budget.counts(output))


def test_in_assisted_decoding() -> None:
    inputs = prompts(["a b c d e f"])
    setting = dict(end="##", answer="A:", max_tokens=15, waits=2, min_tokens=4)
    bias = {tuple(ids("#")): 12.0}
    plain, assisted = (BudgetForcing(TOKENIZER, inputs["input_ids"], **setting) for _ in range(2))
    expected = generate(inputs, plain, sequence_bias=bias)
    assert plain.counts(expected)[0].waits
    found = generate(inputs, assisted, sequence_bias=bias, prompt_lookup_num_tokens=3)
    if transformers.__version__.startswith("4."):  # may be a token off, budget or not
        length = min(found.shape[1], expected.shape[1])
        assert length >= inputs["input_ids"].shape[1] + 59
        found, expected = found[:, :length], expected[:, :length]
    assert found.equal(expected)
    assert assisted.counts(found) == plain.counts(expected)


def test_with_trails_attached_and_streaming(watch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import TextStreamer

    model = watch(MODEL)
    torch.manual_seed(0)
    trails = tp.TrailMap({tp.Site(1, tp.All()): DiReFT(DIM, 2, init="paper")})
    inputs = prompts(["ab"])
    budget = BudgetForcing(TOKENIZER, inputs["input_ids"], end="##", answer="A:", max_tokens=6)
    with tp.attach(model, trails, strength=20.0):
        output = generate(inputs, budget, model, max_new_tokens=12, streamer=TextStreamer(TOKENIZER))
        plain = generate(inputs, None, model, max_new_tokens=6)
    assert output[:, : plain.shape[1]].equal(plain)
    assert not plain.equal(generate(inputs, None, model, max_new_tokens=6))  # the trails moved something
    assert budget.counts(output) == [Thinking(6, 0, "maximum")]
    assert capsys.readouterr().out.strip() == TOKENIZER.decode(output[0]).strip()


def test_a_forced_token_is_written_whatever_other_processors_say() -> None:
    inputs = prompts(["ab"])
    budget = BudgetForcing(TOKENIZER, inputs["input_ids"], end="#", max_tokens=3)
    output = generate(inputs, budget, suppress_tokens=ids("#"))
    assert budget.counts(output) == [Thinking(3, 0, "maximum")]


def test_a_row_that_stopped_for_another_reason_is_counted_without_its_padding() -> None:
    inputs = prompts(["ab", "ab"])
    budget = BudgetForcing(TOKENIZER, inputs["input_ids"], end="#")
    output = torch.cat([inputs["input_ids"], torch.tensor([[9, 9, 0, 0], [9, 9, 0, 9]])], 1)
    assert [count.tokens for count in budget.counts(output)] == [2, 4]


# Refused


@pytest.mark.parametrize("options", [{}, dict(repetition_penalty=1.3), dict(do_sample=True)])
def test_beams_are_refused_by_name(options: dict[str, Any], watch: Any) -> None:
    inputs = prompts()
    budget = BudgetForcing(TOKENIZER, inputs["input_ids"], end="#", min_tokens=10)
    with pytest.raises(ValueError, match=r"beam search \(num_beams > 1\).*generate greedily or by sampling"):
        generate(inputs, budget, watch(MODEL), num_beams=3, **options)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(end="#", min_tokens=5, max_tokens=4), "min_tokens=5 is more than max_tokens=4"),
        (dict(end="#", max_tokens=-1), "max_tokens=-1 and waits=0 must not be negative"),
        (dict(end="#", waits=-1), "waits=-1 must not be negative"),
        (dict(end="</s>", answer="A"), "end='</s>' ends the text, so that no answer can be forced behind it"),
        (dict(end=""), "end='' has no token"),
        (dict(end=["#", ""]), "end='' has no token"),
        (dict(end=[]), r"end=\[\] has no token"),
        (dict(end="#", waits=1, wait=""), "wait='' has no token"),
        (dict(end="#", waits=1, wait="so #"), "wait='so #' holds token .* which begins a delimiter"),
        (dict(end="#", waits=1, wait=[5, EOS]), "holds token 2, which begins a delimiter or ends the text"),
    ],
)
def test_a_budget_that_cannot_be_held_is_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BudgetForcing(TOKENIZER, prompts()["input_ids"], **setting)


@pytest.mark.parametrize("prompt", [prompts(), prompts()["input_ids"][0], "ab"])
def test_a_prompt_that_is_no_batch_of_ids_is_refused(prompt: Any, unchecked: None) -> None:
    with pytest.raises(TypeError, match=r"prompt is the input_ids that generate is given.*inputs\[\"input_ids\"\]"):
        BudgetForcing(TOKENIZER, prompt, end="#")


def test_another_prompt_or_vocabulary_is_refused() -> None:
    budget = BudgetForcing(TOKENIZER, prompts()["input_ids"], end="#", max_tokens=5)
    with pytest.raises(ValueError, match=r"made for 8 prompts of 11 tokens.*make a new BudgetForcing for each batch"):
        generate(prompts(WORDS[::-1]), budget)
    with pytest.raises(ValueError, match="do not begin with them"):
        budget.counts(prompts(["ab"])["input_ids"])
    inputs = prompts(["ab"])
    budget = BudgetForcing(TOKENIZER, inputs["input_ids"], end=[1234], max_tokens=5)
    with pytest.raises(ValueError, match="token 1234 of the budget is beyond the 300 of the model"):
        generate(inputs, budget)


# What thinking longer buys


def by_the_paper(levels: list[Level]) -> tuple[float, float, float]:
    """Control, scaling and performance as in s1, equations 1 to 3."""
    runs = [(t, level) for level in levels for t in level.tokens]
    control = sum((level.least or 0) <= t <= (level.most or 1e9) for t, level in runs) / len(runs)
    points = [(sum(level.tokens) / len(level.tokens), sum(level.right) / len(level.right)) for level in levels]
    slopes = [(fb - fa) / (b - a) for a, fa in points for b, fb in points if b > a]
    return control, 1000 * sum(slopes) / len(slopes), max(f for _, f in points)


@settings(max_examples=30)
@given(st.integers(2, 5), st.integers(2, 8), st.integers(0, 1000))
def test_the_three_figures_are_those_of_the_paper(count: int, questions: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    levels = [
        Level(
            rng.integers(50 * i, 50 * i + 90, questions).tolist(),
            (rng.random(questions) < 0.5).tolist(),
            50 * i,
            50 * i + 60,
        )
        for i in rng.permutation(count).tolist()
    ]
    found, expected = scaling(levels), by_the_paper(levels)
    assert (found.control, found.slope, found.performance) == pytest.approx(expected, abs=1e-12)
    for value, (low, high) in (
        (found.control, found.control_interval),
        (found.performance, found.performance_interval),
    ):
        assert low - 1e-12 <= value <= high + 1e-12
    assert [p.tokens for p in found.points] == sorted(p.tokens for p in found.points)


def test_intervals_cover() -> None:
    """Of 60 experiments on questions whose chance rises from 0.4 to 0.6, most intervals hold the slope."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        levels = [
            Level([tokens] * 60, (rng.random(60) < chance).tolist()) for tokens, chance in ((100, 0.4), (300, 0.6))
        ]
        interval = scaling(levels).slope_interval
        assert interval is not None
        hits += interval[0] <= 1.0 <= interval[1]
    assert hits >= 52


def test_levels_that_think_equally_long_have_no_slope() -> None:
    found = scaling([Level([5, 5], [True, False]), Level([4, 6], [True, True])])
    assert found.slope is None
    assert "all levels think equally long" in str(found)


def test_draws_in_which_all_levels_think_equally_long_are_left_out() -> None:
    questions = [30, 41, 22, 35, 50, 28, 33, 47, 26, 38, 50, 50], [30, 41, 22, 35, 61, 28, 33, 47, 26, 38, 88, 70]
    few = Level(questions[0], [mark == "x" for mark in "x.xx.x.x.x.."], most=50)
    more = Level(questions[1], [mark == "x" for mark in "x.xxxx.x.xx."], most=100)
    found = scaling([few, more])
    assert found.slope is not None and found.slope_interval is not None
    assert found.slope == pytest.approx(28.99, abs=0.01)
    assert 0 <= found.slope_interval[0] <= found.slope <= found.slope_interval[1] < 100


def test_the_report_and_its_picture(tmp_path: Path) -> None:
    found = scaling([Level([10, 12], [False, True], 5, 11), Level([20, 22], [True, True], 20, 20)])
    assert "control      0.500" in str(found)
    assert "scaling      cannot tell: 2 of the 3 levels that a slope needs and 2 of the 10 items" in str(found)
    assert "scaling" not in found.plot()._suptitle.get_text()
    found.to_json(tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text())["performance"] == 1.0
    assert Scaling.from_json(tmp_path / "s.json") == found
    figure = found.plot()
    line = figure.axes[0].lines[0]
    assert line.get_xdata().tolist() == [11, 21]
    assert line.get_ydata().tolist() == [0.5, 1.0]
    assert "control 50%" in figure._suptitle.get_text()


def test_a_slope_is_told_of_three_levels_and_ten_questions() -> None:
    """Through two points there is always a line, and where they are near it is steep: +333 per 1,000 tokens."""

    def level(tokens: int, right: int, questions: int = 10) -> Level:
        return Level([tokens] * questions, [i < right for i in range(questions)])

    two = scaling([level(100, 4), level(103, 5)])
    assert two.slope == pytest.approx(100 / 3) and "scaling      cannot tell: 2 of the 3 levels" in str(two)
    three = scaling([level(100, 4), level(200, 5), level(300, 6)])
    assert "scaling      +1.000 [" in str(three) and "scaling +1.00" in three.plot()._suptitle.get_text()
    alike = scaling([level(100, 4), level(100, 5), level(300, 6)])
    assert "2 of the 3 levels" in str(alike)
    few = scaling([level(100, 4, 9), level(200, 5, 9), level(300, 6, 9)])
    assert "scaling      cannot tell: 9 of the 10 items that a verdict needs" in str(few)


def test_levels_of_different_questions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one verdict for each of the same questions, but the levels have \[1, 2\]"):
        scaling([Level([1, 2], [True, False]), Level([1], [True])])
    with pytest.raises(ValueError, match="the levels have"):
        scaling([])
