"""Law 15: a verdict says what it was read on, cannot tell of too little, and is the same for all kinds of arms.

A new maker of verdicts is one line in `MAKERS`, and inherits every law.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from subjects import MOVING
from tiny import DIM, llama, make_tokenizer
from torch import Tensor, nn

import tokenpaths as tp
from tokenpaths import ab_test, audit, faithfulness, forgetting, way_or_form
from tokenpaths.data import Choice, Question, Task, Text, split_texts
from tokenpaths.engine import Run, reached, runs, share_reached
from tokenpaths.engine import likelihood as scoring
from tokenpaths.lab.ab import Arm, frozen, steered
from tokenpaths.lab.audit import Threshold
from tokenpaths.lab.forgetting import Forgetting, Harness, Loss
from tokenpaths.lab.forgetting.harness import Samples
from tokenpaths.lab.peers import PeftAdapter
from tokenpaths.stats import verdicts
from tokenpaths.stats.intervals import mean_interval
from tokenpaths.stats.paired import holm
from tokenpaths.trailmap import Adapter

TOKENIZER = make_tokenizer()
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = [f"{LETTERS[i]}{LETTERS[(3 * i + 1) % 26]} {LETTERS[(5 * i + 2) % 26]} went by." for i in range(26)]
RECIPE = tp.Last(1) | tp.Answer()
NOBODY = tp.Tokens([1])  # a token that no text here has


@dataclass(frozen=True)
class Told:
    """What a maker said: its verdicts, its items, the share of tokens moved, and its text."""

    words: list[str]
    items: int
    moved: float
    text: str


def texts(count: int) -> Task:
    return Task("texts", tuple(Text(word) for word in WORDS[:count]))


def choices(count: int) -> tuple[Choice, ...]:
    return tuple(Choice((f"The {word}", f"The {word[::-1]}"), 0) for word in WORDS[:count])


def questions(count: int) -> list[Question]:
    return [Question(f"{letter}=", letter, f"x{letter}y{letter}") for letter in LETTERS[:count]]


def of_forgetting(model: Any, trails: Adapter, count: int) -> Told:
    found = forgetting(model, trails, [texts(count), Task("pairs", choices(count))], TOKENIZER)
    judged = [loss for loss in found.losses if loss.better]
    return Told([loss.verdict for loss in judged], judged[0].items, min(x.moved for x in judged), str(found))


def of_ab(model: Any, trails: Adapter, count: int) -> Told:
    arm = steered(model, trails)
    found = ab_test(frozen_of(model, trails), arm, choices(count), TOKENIZER, retention=[texts(count)])["steered"]
    shares = [found.moved, *(figure.moved for figure in found.retained)]
    words = [found.task, *(figure.says for figure in found.retained)]
    return Told(words, found.effect.items, min(shares), " ".join(found.reasons))


def frozen_of(model: Any, trails: Adapter) -> Arm:
    return Arm("frozen", [Run(model, trails.off)])


def of_way_or_form(model: Any, trails: Adapter, count: int) -> Told:
    asked: Any = {"train": questions(count), "held_out": questions(count)[::-1], "stop_strings": "."}
    found = way_or_form(model, trails, TOKENIZER, separator="(?<=[a-z])(?=[a-z])", read_answer=last, words=1, **asked)
    return Told([found.verdict], found.scores[0].items, found.moved, str(found))


def last(text: str) -> str | None:
    return text[-1:] or None


def of_faithfulness(model: Any, trails: Adapter, count: int) -> Told:
    found = faithfulness(
        model, trails, questions(count), TOKENIZER, cue=":", options=lambda item: list(LETTERS), chains="given",
        separator="(?<=[a-z])(?=[a-z])", mistake=lambda item, steps, k, rng: "z" if steps[k] != "z" else "q",
        after_mistake="kept",
    )  # fmt: skip
    shift = found["early answering", "AOC"]
    return Told([found.verdict], shift.items, shift.moved, str(found))


def of_audit(model: Any, trails: Adapter, count: int) -> Told:
    prompts = tp.encode([(item.prompt, item.chain) for item in questions(count)], TOKENIZER, eos=False)
    rule = Threshold({"bend": 0.0}, {"bend": 1.0}, 3.0, 20)
    found = audit(model, trails, prompts, TOKENIZER, candidates=[(70,), (80,)], threshold=rule)
    said = {None: "cannot tell", True: "suspicious", False: "not suspicious"}[found.suspicious]
    return Told([said], found.items, found.moved, str(found))


Maker = Callable[[Any, Adapter, int], Told]
MAKERS: dict[str, tuple[Maker, int]] = {  # each with its least number of items
    "forgetting": (of_forgetting, verdicts.LEAST_ITEMS),
    "ab_test": (of_ab, verdicts.LEAST_ITEMS),
    "way_or_form": (of_way_or_form, verdicts.LEAST_ITEMS),
    "faithfulness": (of_faithfulness, verdicts.LEAST_ITEMS),
    "audit": (of_audit, verdicts.LEAST_PROMPTS),
}
makers = pytest.mark.parametrize(("make", "least"), MAKERS.values(), ids=MAKERS)


def laid(model: Any, rule: tp.tokens.Rule, name: str = "LoReFT") -> tp.TrailMap:
    return tp.TrailMap({site: MOVING[name](DIM) for site in tp.sites(model, [0, 1], rule)}).eval()


def lora(model: Any) -> tuple[Any, PeftAdapter]:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    inside = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    return inside, PeftAdapter(inside)


class Push(Adapter):
    """A constant on what a block gives, by a hook: an arm that moves all tokens and has no sites, as LoRA has none."""

    saved_as: ClassVar[str] = "push"

    def __init__(self, block: nn.Module, by: Tensor):
        super().__init__()
        self.by, self.on = nn.Parameter(by), True
        block.register_forward_hook(self._push)

    def _push(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.on:
            return None
        return (output[0] + self.by, *output[1:]) if isinstance(output, tuple) else output + self.by

    @contextmanager
    def off(self) -> Generator[None]:
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before

    def check(self, model: nn.Module) -> None: ...
    def save(self, path: Any, model: nn.Module | None = None) -> None: ...
    def restore(self, path: Any) -> None: ...


# What it was read on


@makers
@pytest.mark.parametrize("arm", ["trail", "LoRA"])
def test_a_verdict_says_its_items_and_the_share_of_tokens_moved(make: Maker, least: int, arm: str) -> None:
    """The recipe's rule and LoRA move the same tokens: all that are read."""
    model = llama(300)
    adapter: Adapter = laid(model, RECIPE)
    if arm == "LoRA":
        model, adapter = lora(model)
    told = make(model, adapter, least)
    assert told.items == least and told.moved == 1.0
    if make is not of_ab:  # whose reasons name it where it decides, and whose table always
        assert str(least) in told.text and "moved" in told.text


@makers
def test_too_few_items_cannot_tell(make: Maker, least: int) -> None:
    model = llama(300)
    told = make(model, laid(model, tp.All()), least - 1)
    assert set(told.words) == {"cannot tell"}
    assert f"{least - 1} of the {least} items that a verdict needs" in told.text


@makers
@pytest.mark.parametrize("kind", ["a token that is not there", "off", "strength 0"])
def test_too_few_moved_tokens_cannot_tell(make: Maker, least: int, kind: str) -> None:
    model = llama(300)
    trails = laid(model, NOBODY if kind == "a token that is not there" else tp.All())
    count = max(least, 12)
    if kind == "off":
        with trails.off():
            told = make(model, trails, count)
    elif kind == "strength 0":
        with tp.attach(model, trails, strength=0.0):
            told = make(model, trails, count)
    else:
        told = make(model, trails, count)
    assert told.moved == 0.0 and set(told.words) == {"cannot tell"}
    assert "0.0% of tokens moved, of the 50% that a verdict needs" in told.text


@makers
def test_two_kinds_of_arm_that_do_the_same_are_told_the_same(make: Maker, least: int) -> None:
    by = torch.randn(DIM, generator=torch.Generator().manual_seed(1))
    model = llama(300)
    trails = tp.TrailMap({tp.Site(1): tp.Additive(DIM)})
    with torch.no_grad():
        next(trails.parameters()).copy_(by)
    one = make(model, trails, 12)
    other = llama(300)
    two = make(other, Push(other.model.layers[1], by), 12) if make is not of_audit else one  # which needs parts
    assert (one.words, one.items, one.moved) == (two.words, two.items, two.moved)


# The texts of FAULTS.md D


def test_the_recipe_sees_on_plain_texts_what_drift_sees() -> None:
    """Before, every token of them was prompt, and the trail moved the last one, whose prediction nobody reads."""
    model = llama(300)
    trails = laid(model, RECIPE)
    split = forgetting(model, trails, [texts(12)], TOKENIZER)
    found, moved = split["texts", "nats a token"], split["texts", "KL to frozen"].after
    assert found.moved == 1.0 and abs(found.change) > 0.1 and moved > 0.5
    plain = forgetting(model, trails, [texts(12)], TOKENIZER, splits=0)
    for measure in ("nats a token", "bits a byte"):
        assert plain["texts", measure].change == 0 and plain["texts", measure].verdict == "cannot tell"
    assert "perplexity" not in str(plain) and "0.0% of tokens moved" in str(plain)
    arms = frozen(model), steered(model, trails)
    nats, far = ab_test(*arms, choices(12), TOKENIZER, retention=[texts(12)])["steered"].retained
    assert far.says == "lost" and far.loss == pytest.approx(moved, rel=1e-5)
    assert nats.loss == pytest.approx(found.change, rel=1e-4)
    kept = ab_test(*arms, choices(12), TOKENIZER, retention=[texts(12)], splits=0)["steered"]
    assert {figure.says for figure in kept.retained} == {"cannot tell"}
    assert "within their margins" not in " ".join(kept.reasons)


def test_sentences_without_a_prompt_are_moved_where_they_differ() -> None:
    """Minimal pairs, as BLiMP's: what both begin with is the prompt, and the likelihoods differ as they did."""
    model = llama(300).double()
    (options,) = scoring.encode_choices([Choice(("The cat is.", "The cat are."), 0)], TOKENIZER)
    assert [example.prompt_length for example in options] == [len("The cat "), len("The cat ")]
    (shorter, longer) = scoring.encode_choices([Choice(("A cow", "A cow is"), 0)], TOKENIZER)[0]
    assert (shorter.prompt_length, longer.prompt_length) == (len("A co"), len("A co"))
    (one, two), ids = scoring.log_likelihoods(model, [options], 1500)[0], [example.ids for example in options]
    with torch.no_grad():
        whole = [-float(model(torch.tensor([i]), labels=torch.tensor([i])).loss) * (len(i) - 1) for i in ids]
    assert one - two == pytest.approx(whole[0] - whole[1], abs=1e-4)
    pairs = Task("pairs", choices(20))
    found = forgetting(model, laid(model, RECIPE).double(), [pairs], TOKENIZER)["pairs", "accuracy"]
    assert found.moved == 1.0


def test_all_arms_are_read_on_the_same_tokens() -> None:
    """Whatever an arm moves, the frozen figures beside it are the same to the bit."""
    model = llama(300)
    found = [forgetting(model, laid(model, rule), [texts(10)], TOKENIZER) for rule in (RECIPE, tp.All(), NOBODY)]
    inside, adapter = lora(llama(300))
    found.append(forgetting(inside, adapter, [texts(10)], TOKENIZER))
    for measure in ("nats a token", "bits a byte"):
        assert len({report["texts", measure].before for report in found}) == 1


def test_drift_does_not_speak_of_tokens_that_nothing_moved() -> None:
    model = llama(300)
    trails = laid(model, RECIPE)
    plain = tp.measure_drift(model, trails, WORDS[:4], TOKENIZER)
    told = str(plain)
    share = 4 / sum(len(tp.data.encode_texts([word], TOKENIZER)[0]) for word in WORDS[:4])
    assert plain.reached == pytest.approx(share) and told.startswith(f"cannot tell: {share:.1%} of ")
    assert "perplexity" not in told and f"{plain['kl'].mean / share:.4f} a moved one" in told
    split = tp.measure_drift(model, trails, split_texts(WORDS[:4], TOKENIZER), TOKENIZER)
    assert split.reached > 0.4
    whole = tp.measure_drift(model, laid(model, tp.All()), WORDS[:4], TOKENIZER)
    assert whole.reached == 1 and "perplexity" in str(whole)
    fresh = tp.TrailMap({tp.Site(1): tp.LoReFT(DIM, 2)})
    shut = tp.measure_drift(model, fresh, WORDS[:4], TOKENIZER)
    assert (shut.moved, shut.reached) == (0, 1) and "(1.000x)" in str(shut)


def test_a_budget_is_not_kept_by_texts_that_nothing_moved() -> None:
    model = llama(300)
    trails = laid(model, RECIPE)
    with pytest.raises(
        ValueError, match="no strength can be told to keep the budget: cannot tell: .* tokens in 4 texts"
    ):
        tp.strength_within(model, trails, WORDS[:4], TOKENIZER, budget=100.0)
    assert tp.strength_within(model, trails, split_texts(WORDS[:4], TOKENIZER), budget=100.0) == 1.0


# Splits


@settings(max_examples=30)
@given(length=st.integers(2, 40), splits=st.integers(1, 6), seed=st.integers(0, 9))
def test_a_text_is_split_at_several_places_that_are_its_own(length: int, splits: int, seed: int) -> None:
    word = "".join(LETTERS[(7 * i + seed) % 26] for i in range(length)).replace("ab", "ba")
    parts = split_texts([word], TOKENIZER, splits, seed=seed)
    places = [part.prompt_length for part in parts]
    ids = tp.data.encode_texts([word], TOKENIZER)[0].ids
    assert len(parts) == min(splits, len(ids) - 1) and {part.ids for part in parts} == {ids}
    assert places == sorted(set(places)) and places[0] >= 1 and places[-1] < len(ids)
    beside = split_texts(["else", word], TOKENIZER, splits, seed=seed)
    assert beside[-len(parts) :] == parts


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(ValueError, match="text 1 has one token: there is nothing in it to split"):
        split_texts(["xy", "x"], TOKENIZER)
    with pytest.raises(ValueError, match="a text of 2 tokens cannot be split at 0 places"):
        split_texts(["xy"], TOKENIZER, 0)
    model = llama(300)
    with pytest.raises(ValueError, match="splits=-1 is the number of places at which a text is split"):
        forgetting(model, laid(model, tp.All()), [texts(2)], TOKENIZER, splits=-1)


# What is moved

RULES: dict[str, tuple[tp.tokens.Rule, list[int]]] = {  # and what they reach of a prompt of 3 and an answer of 3
    "all": (tp.All(), [1, 1, 1, 1, 1, 1]),
    "first": (tp.First(1), [1, 1, 1, 1, 1, 1]),
    "last": (tp.Last(1), [0, 0, 1, 1, 1, 1]),
    "answer": (tp.Answer(), [0, 0, 0, 1, 1, 1]),
    "recipe": (RECIPE, [0, 0, 1, 1, 1, 1]),
    "token": (tp.Tokens([13]), [0, 0, 0, 0, 1, 1]),
    "nobody": (NOBODY, [0, 0, 0, 0, 0, 0]),
}


@pytest.mark.parametrize(("rule", "expected"), RULES.values(), ids=RULES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_is_reached_is_what_does_differ(rule: tp.tokens.Rule, expected: list[int], side: Any) -> None:
    model = llama(300)
    examples = [tp.Example.of((9, 10, 11), (12, 13, 14)), tp.Example.of((9, 10), (11,))]
    batch = tp.data.collate(examples, side=side)
    both = runs(model, laid(model, rule))
    mask = reached(*both, batch)
    assert mask[0].int().tolist() == expected
    assert not mask[~batch.attention_mask.bool()].any()
    with both[0].reading(), torch.no_grad():
        x = model(batch.input_ids[:1], output_hidden_states=True).hidden_states[-1]
    with both[1].reading(), torch.no_grad():
        prompt = {"prompt_mask": batch.prompt_mask[:1]}
        y = model(batch.input_ids[:1], output_hidden_states=True, **prompt).hidden_states[-1]
    assert (x != y).any(-1)[0].int().tolist() == expected


def test_the_last_block_moves_nothing_behind_and_what_both_runs_have_does_not_count() -> None:
    model, example = llama(300), tp.Example.of((9, 10, 11), (12, 13, 14))
    last_block = tp.TrailMap({tp.Site(-1, tp.Last(1)): MOVING["LoReFT"](DIM)})
    assert share_reached(*runs(model, last_block), [example]) == pytest.approx(1 / 3)
    background, trails = laid(model, tp.All()), tp.TrailMap({tp.Site(0, tp.Answer()): tp.LoReFT(DIM, 2)})
    with tp.attach(model, background):
        assert share_reached(*runs(model, trails), [example]) == pytest.approx(2 / 3)
        assert share_reached(Run(model), Run(model), [example]) == 1  # whatever else it is that differs
    assert share_reached(Run(model), Run(llama(300)), [example]) == 1
    assert math.isnan(share_reached(Run(model), Run(model), []))


# Several tests, one verdict


@settings(max_examples=40)
@given(shifts=st.lists(st.floats(0, 1.2), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_steps_down_as_holm_does(shifts: list[float], seed: int) -> None:
    """Judged by intervals, the same tests are told as by Holm's p-values of the same test, Student's t here."""
    from scipy.stats import t, ttest_1samp

    data = [np.random.default_rng([seed, i]).normal(shift, 1, 15) for i, shift in enumerate(shifts)]

    def interval(x: np.ndarray) -> Callable[[float], tuple[float, float]]:
        def at(confidence: float) -> tuple[float, float]:
            half = float(t.ppf((1 + confidence) / 2, len(x) - 1)) * x.std(ddof=1) / math.sqrt(len(x))
            return float(x.mean() - half), float(x.mean() + half)

        return at

    intervals = [interval(x) for x in data]
    confidences = verdicts.step_down(intervals, [0.0] * len(data))
    told = [verdicts.outside(make(c), 0.0) for make, c in zip(intervals, confidences, strict=True)]
    assert told == [p <= 0.05 for p in holm([float(ttest_1samp(x, 0).pvalue) for x in data])]


def test_tasks_without_a_change_are_rarely_called_changed() -> None:
    """Six tasks of noise: uncorrected, a quarter of reports would call one worse or better."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(100):
        data = [rng.normal(0, 1, 16) for _ in range(6)]
        makes = [lambda c, x=x: mean_interval(x, confidence=c) for x in data]
        confidences = verdicts.step_down(makes, [0.0] * 6)
        wrong += any(verdicts.outside(make(c), 0.0) for make, c in zip(makes, confidences, strict=True))
    assert wrong <= 10


def test_the_same_is_an_interval_within_the_margin_and_never_the_want_of_a_difference() -> None:
    def loss(low: float, high: float, **rest: Any) -> Loss:
        return Loss("t", "nats a token", 2.0, 2.0, 0.0, (low, high), 20, "lower", adjusted=(low, high), **rest)

    assert loss(-0.2, 0.3, margin=0.05).verdict == "cannot tell"
    assert loss(-0.04, 0.05, margin=0.05).verdict == "same"
    assert loss(0.01, 0.02, margin=0.05).verdict == "worse"
    assert loss(-0.04, 0.05).verdict == "cannot tell"  # without a margin
    assert loss(0.0, 0.0, moved=0.4).verdict == "cannot tell"


def test_a_note_says_what_may_hide() -> None:
    changes = np.random.default_rng(0).normal(0, 1, 20)
    least = verdicts.noticeable(changes)
    told = [np.random.default_rng(i).normal(least, changes.std(ddof=1), 20) for i in range(300)]
    shown = np.mean([mean_interval(x)[0] > 0 for x in told])
    assert 0.7 < shown < 0.9
    assert math.isnan(verdicts.noticeable(np.ones(9))) and math.isnan(verdicts.noticeable(np.ones(1)))
    assert verdicts.may_still(10) == pytest.approx(0.2589, abs=1e-4)


# Files and the harness


def test_a_report_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """It has no margin and no interval of all tests together; a share that was too small is too small now."""
    old = tmp_path / "old.json"
    row = '{"task": "t", "measure": "nats a token", "before": 3.0, "after": 3.0, "change": 0.0, "interval": [0.0, 0.0],'
    row += ' "items": 16, "better": "lower", "guess": null, "moved": 0.04}'
    old.write_text('{"losses": [' + row + "]}")
    (loss,) = Forgetting.from_json(old).losses
    assert loss.adjusted is None and loss.verdict == "cannot tell"
    old.write_text('{"losses": [' + row.replace("0.04", "1.0") + "]}")
    assert Forgetting.from_json(old).losses[0].verdict == "same"
    old.write_text('{"losses": [' + row.replace('"items": 16, ', "") + "]}")
    with pytest.raises(ValueError, match="is not a forgetting report"):
        Forgetting.from_json(old)


@dataclass(frozen=True)
class Asked(Harness):
    """A harness without the library: what it is asked is what it scores."""

    written: bool = False

    def samples(self, model: nn.Module, tokenizer: Any) -> Any:
        values = np.ones(40)
        return {("cloze", "acc"): Samples(tuple(range(40)), values, True, self.written)}


@pytest.mark.parametrize(
    ("rule", "written", "moved"),
    [(RECIPE, False, 0.0), (RECIPE, True, 1.0), (tp.All(), False, 1.0), (tp.Tokens([5]), True, 0.0)],
)
def test_the_harness_has_no_prompts_that_a_rule_could_find(rule: tp.tokens.Rule, written: bool, moved: float) -> None:
    model = llama(300)
    found = forgetting(model, laid(model, rule), [Asked(["cloze"], written=written)], TOKENIZER)["cloze", "acc"]
    assert found.moved == moved and found.verdict == "cannot tell"  # 40 items: up to 0.09 may have changed
    assert ("0.0% of tokens moved" in found.reason) == (moved == 0)


def test_functions_are_arms_whose_share_is_not_known() -> None:
    def says(word: str) -> Callable[[list[str]], Sequence[str]]:
        return lambda prompts: [word] * len(prompts)

    asked = [Question(letter, "x") for letter in LETTERS]
    found = ab_test(Arm("a", [says("y")]), Arm("b", [says("x")]), asked)
    assert math.isnan(found["b"].moved) and found.verdict == "better"
    few = ab_test(Arm("a", [says("y")]), Arm("b", [says("x")]), asked[:9])
    assert few["b"].adjusted < 0.05 and few.verdict == "cannot tell"
    assert "Too little: 9 of the 10 items that a verdict needs." in few["b"].reasons
