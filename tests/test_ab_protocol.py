"""The A/B test as a whole: who is asked what, what is compared with what, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from subjects import MOVING
from tiny import llama, make_tokenizer
from torch import nn

import tokenpaths as tp
from tokenpaths import ab_test, forgetting
from tokenpaths.data import Choice, Overlap, Question, Task, Text, exact, shared_grams
from tokenpaths.engine import Run
from tokenpaths.engine import likelihood as scoring
from tokenpaths.lab.ab import Arm, Margins, Report, frozen, nearest, steered
from tokenpaths.stats import effect, evidence, foresee

Watch = Callable[[nn.Module], nn.Module]
TEXTS = Task("letters", (Text("The sea."), Text(" is deep.", prompt="The well"), Text("A longer text of some words.")))
CHOICES = (
    Choice((" x", " yy", " zzz"), 1, "Question: q\nAnswer:"),
    Choice((" x", " yy", " zzz"), 0, "Question: qq\nAnswer:"),
    Choice((" x", " yy", " zzz"), 2, "Question: r\nAnswer:"),
    Choice((" a", " b", " c"), 1, "Question: s\nAnswer:"),
)
QUESTIONS = [Question(f"{i} + 1 =", f" {i + 1}") for i in range(40)]


def knows(right: Callable[[int], bool]) -> Callable[[list[str]], list[str]]:
    """Answers question i rightly if `right(i)`."""

    def ask(prompts: list[str]) -> list[str]:
        numbers = [int(prompt.split()[0]) for prompt in prompts]
        return [f"It is {i + 1}." if right(i) else "It is 0." for i in numbers]

    return ask


def some(model: Any, scale: float = 1.0, seed: int = 0) -> tp.TrailMap:
    torch.manual_seed(seed)
    trails = tp.TrailMap({site: MOVING["LoReFT"](32) for site in tp.sites(model, tokens=tp.All())})
    with torch.no_grad():
        for parameter in trails.parameters():
            parameter.mul_(scale)
    return trails.eval()


# Who is asked what


def test_functions_are_arms_and_outcomes_are_kept() -> None:
    a, b = Arm("guess", [knows(lambda i: i % 4 == 0)]), Arm("sums", [knows(lambda i: i % 8 != 1)])
    report = ab_test(a, b, QUESTIONS)
    right = [[float(i % 4 == 0) for i in range(40)], [float(i % 8 != 1) for i in range(40)]]
    assert [arm.scores for arm in report.answers] == [(tuple(row),) for row in right]
    found = report["sums"]
    assert found.effect == effect(*map(np.array, right))
    assert (found.effect.wins, found.effect.losses, found.adjusted) == (25, 0, found.effect.p)
    assert report.verdict == "better" and report.of_arm("guess").mean == 0.25
    assert ab_test(b, a, QUESTIONS).verdict == "worse"
    assert report.asked[3].prompt == "3 + 1 =" and report.answers[1].written[0][3] == "It is 4."
    assert report.discordant("sums") == [i for i in range(40) if (i % 4 == 0) != (i % 8 != 1)]


@settings(max_examples=12)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=40, max_size=40))
def test_swapped_arms_swap_the_verdict(pairs: list[tuple[bool, bool]]) -> None:
    a, b = (Arm(name, [knows(lambda i, k=k: pairs[i][k])]) for k, name in enumerate("ab"))
    there, back = ab_test(a, b, QUESTIONS).verdict, ab_test(b, a, QUESTIONS).verdict
    assert {there, back} in ({"cannot tell"}, {"better", "worse"})


def test_two_arms_are_compared_with_holm() -> None:
    arms = [Arm(f"b{j}", [knows(lambda i, k=k: i < 10 + k)]) for j, k in enumerate((6, 6, 30))]
    report = ab_test(Arm("a", [knows(lambda i: i < 10)]), arms, QUESTIONS)
    assert [c.effect.p for c in report.comparisons] == pytest.approx([2 / 2**6, 2 / 2**6, 2 / 2**30])
    assert [c.adjusted for c in report.comparisons] == pytest.approx([2 / 2**5, 2 / 2**5, 6 / 2**30])
    assert [c.verdict for c in report.comparisons] == ["cannot tell", "cannot tell", "better"]
    alone = foresee(report["b0"].effect)
    assert report["b0"].power.detectable > alone.detectable  # what three arms leave of alpha
    with pytest.raises(ValueError, match=r"3 arms were compared with 'a': ask report\[arm\]"):
        _ = report.verdict
    with pytest.raises(KeyError, match="no arm 'c' was compared with 'a'"):
        report["c"]


def test_a_score_may_be_any_number() -> None:
    a, b = (
        Arm("short", [lambda prompts: ["x"] * len(prompts)]),
        Arm("long", [lambda p: ["xy" * (3 + len(t)) for t in p]]),
    )
    found = ab_test(a, b, QUESTIONS, score=lambda text, question: len(text) / len(question.prompt))["long"]
    want = [(6 + 2 * len(q.prompt) - 1) / len(q.prompt) for q in QUESTIONS]
    assert found.effect.value == pytest.approx(np.mean(want)) and found.effect.test == "sign flips"


def test_models_answer_as_they_generate_and_are_left_as_they_were(watch: Watch) -> None:
    model: Any = watch(llama(300))
    tokenizer, trails = make_tokenizer(), some(llama(300))
    questions = [Question(prompt, "") for prompt in ("abc", "a long one", "to be", "x")]
    asked: dict[str, Any] = {"score": lambda text, question: float(len(text)), "max_new_tokens": 5, "batch_size": 3}
    arms = frozen(model), steered(model, trails, name="s")
    report = ab_test(*arms, questions, tokenizer, **asked)

    def written() -> list[str]:
        texts: list[str] = []
        for question in questions:
            ids = tokenizer(question.prompt, return_tensors="pt")
            told = model.generate(**ids, max_new_tokens=5, do_sample=False)[0, ids["input_ids"].shape[1] :]
            texts.append(tokenizer.decode(told, skip_special_tokens=True))
        return texts

    assert list(report.answers[0].written[0]) == written()
    with tp.attach(model, trails):
        assert list(report.answers[1].written[0]) == written() != list(report.answers[0].written[0])
        again = ab_test(*arms, questions, tokenizer, **asked)  # the frozen arm is frozen, whatever is attached
    assert again == report


def test_choices_are_scored_by_likelihood() -> None:
    model, tokenizer = llama(300), make_tokenizer()
    trails = some(model)
    report = ab_test(frozen(model), steered(model, trails), CHOICES, tokenizer)
    encoded = scoring.encode_choices(CHOICES, tokenizer)
    with tp.attach(model, trails):
        likely = scoring.log_likelihoods(model, encoded, 1500)
    assert list(report.of_arm("steered").scores[0]) == scoring.right(likely, CHOICES).tolist()
    chosen = [item.options[int(row.argmax())] for item, row in zip(CHOICES, likely, strict=True)]
    assert list(report.of_arm("steered").written[0]) == chosen
    assert report.asked[0].answer == " yy"


def test_texts_are_cut_behind_stop() -> None:
    model, tokenizer = llama(300), make_tokenizer()
    kind: dict[str, Any] = {"score": lambda text, question: 0.0, "max_new_tokens": 12}
    whole = ab_test(frozen(model), frozen(model, name="b"), [Question("abc", "")], tokenizer, **kind)
    text = whole.answers[0].written[0][0]
    cut = ab_test(
        frozen(model), frozen(model, name="b"), [Question("abc", "")], tokenizer, stop_strings=text[2], **kind
    )
    assert cut.answers[0].written[0][0] == text[: text.index(text[2]) + 1]


# Retention and drift


def test_retention_is_what_forgetting_finds() -> None:
    model, tokenizer = llama(300).double(), make_tokenizer()
    trails = some(model).double()
    tasks = [TEXTS, Task("cloze", CHOICES)]
    report = ab_test(frozen(model), steered(model, trails), CHOICES, tokenizer, retention=tasks)
    known = forgetting(model, trails, tasks, tokenizer)
    assert [(r.task, r.measure) for r in report["steered"].retained] == [
        ("letters", "nats a token"),
        ("letters", "KL to frozen"),
        ("cloze", "accuracy"),
    ]
    for found in report["steered"].retained:
        loss = known[found.task, found.measure]
        sign = -1 if found.measure == "accuracy" else 1
        assert found.loss == pytest.approx(sign * loss.change)
        assert found.after == pytest.approx(loss.after) and found.before == pytest.approx(loss.before)
        assert found.interval[0] <= found.loss <= found.interval[1]
        assert found.confidence == pytest.approx(1 - 0.05 / 3)
    assert "100.0% of tokens moved" in report["steered"].retained[1].note


def test_another_reference_than_arm_a() -> None:
    model, tokenizer = llama(300), make_tokenizer()
    a, b = (steered(model, some(model, scale), name=name) for name, scale in (("a", 0.5), ("b", 1.0)))
    report = ab_test(a, b, CHOICES, tokenizer, retention=[TEXTS], reference=frozen(model))
    nats, far = report["b"].retained
    known = forgetting(model, some(model, 1.0), [TEXTS], tokenizer)
    assert far.loss == pytest.approx(known["letters", "KL to frozen"].after, rel=1e-5)
    assert nats.after == pytest.approx(known["letters", "nats a token"].after, rel=1e-5)
    half = forgetting(model, some(model, 0.5), [TEXTS], tokenizer)
    assert nats.before == pytest.approx(half["letters", "nats a token"].after, rel=1e-5)


def test_seeds_of_one_method() -> None:
    model, tokenizer = llama(300), make_tokenizer()
    maps = [some(model, seed=seed) for seed in range(3)]
    report = ab_test(frozen(model), steered(model, *maps), CHOICES, tokenizer, retention=[TEXTS])
    scores = report.of_arm("steered").scores
    assert len(scores) == 3
    for row, trails in zip(scores, maps, strict=True):
        assert row == ab_test(frozen(model), steered(model, trails), CHOICES, tokenizer).of_arm("steered").scores[0]
    assert report["steered"].effect.test.startswith("Cochran-Cox")
    alone = [forgetting(model, trails, [TEXTS], tokenizer)["letters", "nats a token"].after for trails in maps]
    assert report["steered"].retained[0].after == pytest.approx(np.mean(alone), rel=1e-5)
    assert "steered 3; they and the items are both random" in str(report)
    with pytest.raises(ValueError, match="'steered' has 3 seeds: give reference="):
        ab_test(steered(model, *maps), frozen(model), CHOICES, tokenizer, retention=[TEXTS])


def test_a_fresh_trail_keeps_everything_and_gains_nothing() -> None:
    model, tokenizer = llama(300), make_tokenizer()
    fresh = tp.TrailMap({site: tp.LoReFT(32, rank=2) for site in tp.sites(model)})
    texts = Task("letters", tuple(Text(f"The {word} is deep.") for word in "abcdefghijkl"))
    report = ab_test(frozen(model), steered(model, fresh), CHOICES * 5, tokenizer, retention=[texts])
    assert report.verdict == "cannot tell" and report["steered"].effect.p == 1.0
    for figure in report["steered"].retained:
        assert (figure.loss, figure.interval, figure.says) == (0.0, (0.0, 0.0), "kept")
        assert "100.0% of tokens moved; no text changed; up to 26.5% of such may" in figure.note  # 1 - 0.025^(1/12)
    few = ab_test(frozen(model), steered(model, fresh), CHOICES * 5, tokenizer, retention=[TEXTS])["steered"]
    assert {figure.says for figure in few.retained} == {"cannot tell"}
    assert "letters, KL to frozen: cannot tell, 3 of the 10 items that a verdict needs." in few.reasons


# Stopping early


def test_the_test_stops_when_it_tells_and_asks_no_further() -> None:
    asked: list[int] = []

    def count(prompts: list[str]) -> list[str]:
        asked.append(len(prompts))
        return knows(lambda i: True)(prompts)

    report = ab_test(Arm("a", [knows(lambda i: False)]), Arm("b", [count]), QUESTIONS, stop_early=True, look_every=5)
    assert asked == [5, 5] and report.of == 40 and len(report.asked) == 10  # 2^10 / 11 = 93 at the second look
    assert report["b"].evidence == pytest.approx(evidence(10, 0)) and report.verdict == "better"
    assert report["b"].effect.p == pytest.approx(11 / 2**10)
    assert report["b"].effect.interval[0] > 0
    assert len({question.prompt for question in report.asked}) == 10
    assert "looked at 10 of 40 items" in str(report)


def test_without_a_difference_it_asks_everything() -> None:
    a, b = (Arm(name, [knows(lambda i, k=k: i % 2 == k)]) for k, name in enumerate("ab"))
    report = ab_test(a, b, QUESTIONS, stop_early=True)
    assert len(report.asked) == 40 and report.verdict == "cannot tell"
    assert report["b"].effect.p == 1 / report["b"].evidence
    other = ab_test(a, b, QUESTIONS, stop_early=True, seed=1)
    assert [q.prompt for q in other.asked] != [q.prompt for q in report.asked]


# Was the test seen in training?


def test_exact_matches_mind_no_case_and_no_punctuation() -> None:
    assert exact(["a b", "The Cat, sat."], ["the cat sat", "a", "A  B!"]) == [
        Overlap("exact", 0, 1, 1.0),
        Overlap("exact", 2, 0, 1.0),
    ]
    assert exact(["..."], ["!"]) == []


def test_shared_stretches_of_words() -> None:
    words = [f"w{i}" for i in range(20)]
    train = [" ".join(words[:9]), " ".join(words[5:20])]
    test = [" ".join(words[4:14]), " ".join(words[::2]), "W3, w4 w5!", "w5 w4"]
    assert shared_grams(train, test) == [Overlap("n-gram", 2, 0, 1.0), Overlap("n-gram", 0, 1, 2 / 3)]
    assert [o.test for o in shared_grams(train, test, n=2)] == [2, 0]
    with pytest.raises(ValueError, match="n=0 must be at least 1"):
        shared_grams(train, test, n=0)


@settings(max_examples=30)
@given(st.lists(st.text("ab .", max_size=12), max_size=5), st.lists(st.text("ab .", max_size=12), max_size=5))
def test_an_exact_match_shares_all_its_stretches(train: list[str], test: list[str]) -> None:
    whole = {o.test for o in shared_grams(train, test, n=3) if o.score == 1.0}
    assert {o.test for o in exact(train, test)} <= whole


def test_the_nearest_text_is_the_text_itself(watch: Watch) -> None:
    model, tokenizer = watch(llama(300)), make_tokenizer()
    train = ["a cat sat here", "dogs bark", "12 + 30 = 42", "rain and wind today"]
    found = nearest(
        Run(model), train, ["12 + 30 = 42", "cows eat hay", "a cat sat there"], tokenizer, max_batch_tokens=32
    )
    assert [(o.test, o.train) for o in found[:2]] == [(0, 2), (2, 0)]
    assert found[0].score == pytest.approx(1.0) and found[0].score > found[1].score > found[2].score


def test_the_effect_is_told_without_items_that_were_seen() -> None:
    a, b = Arm("a", [knows(lambda i: i >= 10)]), Arm("b", [knows(lambda i: True)])
    report = ab_test(a, b, QUESTIONS, training=["0 + 1 =", "1 + 1", "3 + 1 ="])
    assert report.verdict == "better"
    clean = report["b"].clean
    assert clean is not None and (clean.items, clean.wins) == (37, 7)
    assert {overlap.test for overlap in report.overlaps} == {0, 1, 3}
    assert "3 test items were seen" in str(report) and "Without them, b: " in str(report)


def test_a_model_also_looks_for_near_texts() -> None:
    model, tokenizer = llama(300), make_tokenizer()
    report = ab_test(
        frozen(model), frozen(model, name="b"), CHOICES, tokenizer, training=["Question: q\nAnswer:", "no"]
    )
    assert report.overlaps[0] == Overlap("exact", 0, 0, 1.0)
    assert sum(overlap.kind == "embedding" for overlap in report.overlaps) == 4
    clean = report["b"].clean
    assert clean is not None and clean.items == 3  # a near text is shown, and no more


# Refused, before anybody is asked


def never(prompts: list[str]) -> Sequence[str]:
    raise AssertionError("was asked")


A, B = Arm("a", [never]), Arm("b", [never])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Arm("", [never]), "an arm needs a name"),
        (lambda: Arm("a", []), "arm 'a' has nobody who answers"),
        (lambda: steered(llama()), "arm 'steered' has nobody who answers"),
        (lambda: Margins(nats=0.0), "the margin of nats is 0.0, but must be above 0"),
        (lambda: Margins(kl=math.nan), "the margin of kl is nan"),
        (lambda: ab_test(A, [], QUESTIONS), "no arm to compare with a"),
        (lambda: ab_test(A, Arm("a", [never]), QUESTIONS), "two arms go by the name 'a'"),
        (lambda: ab_test(A, B, []), "there are no examples"),
        (lambda: ab_test(A, B, [Question("", "1")]), "example 0 has an empty prompt"),
        (lambda: ab_test(A, B, [Question("q", " ")]), "example 0: read_answer finds no answer in ' '"),
        (lambda: ab_test(A, B, CHOICES), "arm 'a' is a function from prompts to texts, which tells no likelihoods"),
        (lambda: ab_test(A, B, QUESTIONS, retention=[TEXTS]), "arm 'a' is a function"),
        (lambda: ab_test(A, frozen(llama()), QUESTIONS), "an arm is a model, which needs its tokenizer"),
        (lambda: ab_test(A, B, QUESTIONS, retention=[TEXTS, TEXTS]), "two tasks go by the name 'letters'"),
        (lambda: ab_test(A, B, QUESTIONS, alpha=1.0), "alpha=1.0 and power=0.8 must lie between 0 and 1"),
        (lambda: ab_test(A, B, QUESTIONS, stop_early=True, score=lambda t, q: 0.0), "stop_early is for right or wrong"),
        (lambda: ab_test(A, Arm("b", [never, never]), QUESTIONS, stop_early=True), "one seed an arm"),
    ],
)
def test_refused_before_anybody_is_asked(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_mixed_examples_are_refused() -> None:
    mixed: Any = [QUESTIONS[0], CHOICES[0]]
    with pytest.raises(ValueError, match="must be all Question or all Choice"):
        ab_test(A, B, mixed)


def test_what_an_arm_gives_back_is_checked() -> None:
    few = Arm("b", [lambda prompts: ["x"]])
    with pytest.raises(ValueError, match="an arm returned 1 texts for 40 prompts: it must return one for each"):
        ab_test(few, A, QUESTIONS)
    words = Arm("b", [lambda prompts: ["x"] * len(prompts)])
    with pytest.raises(ValueError, match="score gave nan for 'x': give a finite number"):
        ab_test(words, A, QUESTIONS, score=lambda text, question: math.nan)


def test_a_text_beyond_the_window_is_refused() -> None:
    model, tokenizer = llama(300), make_tokenizer()
    long = Task("long", (Text("a" * 500),))
    with pytest.raises(ValueError, match="task 'long' has an item of 500 tokens, and the model's window holds 128"):
        ab_test(frozen(model), frozen(model, name="b"), CHOICES, tokenizer, retention=[long])


def test_reports_are_equal_where_all_is_equal() -> None:
    a, b = Arm("a", [knows(lambda i: i % 3 == 0)]), Arm("b", [knows(lambda i: i % 2 == 0)])
    first, second = ab_test(a, b, QUESTIONS), ab_test(a, b, QUESTIONS)
    assert isinstance(first, Report) and first == second
