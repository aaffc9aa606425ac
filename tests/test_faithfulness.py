"""CoT faithfulness: models whose answer is known by construction, the definitions written out, and what is refused.

`Reader` says the last letter that it was shown before the cue: it answers by its chain. A trail makes it say "B".
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from subjects import MOVING
from tiny import llama, make_tokenizer
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import tokenpaths as tp
from tokenpaths import Example, faithfulness
from tokenpaths.data import Question
from tokenpaths.lab.chains import Faithfulness, Shift, answering, perturb, same
from tokenpaths.lab.chains.faithful import _gone_on, _together
from tokenpaths.lab.chains.same import Same
from tokenpaths.stats import mean_interval

TOKENIZER = make_tokenizer()
LETTERS = "ACDEFGHIJKLMNOPQRSTUVWXYZB"  # of equally likely ones the first is taken: A, which no chain has
CUE = ":"
APART = "(?<=[A-Z])(?=[A-Z])"


class Reader(PreTrainedModel, GenerationMixin):
    """After any token, the likeliest next one is the last before it that is not the cue."""

    def __init__(self) -> None:
        super().__init__(PretrainedConfig(num_hidden_layers=1, hidden_size=len(TOKENIZER)))
        self.embed = nn.Embedding.from_pretrained(torch.eye(len(TOKENIZER)))
        self.layers = nn.ModuleList([nn.Identity()])
        self.calls = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = True, **_: Any) -> Any:
        self.calls += 1
        seen = self.layers[0](self.embed(input_ids)).argmax(-1)
        place = torch.arange(input_ids.shape[1]).where(input_ids != TOKENIZER(CUE)["input_ids"][0], -1)
        told = seen.gather(1, place.cummax(1).values.clamp(min=0))
        return CausalLMOutput(logits=10 * nn.functional.one_hot(told, len(TOKENIZER)).float())

    def prepare_inputs_for_generation(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> dict[str, Tensor]:
        return {"input_ids": input_ids, "attention_mask": attention_mask}  # it has no cache


class Always(tp.Trail):
    """h -> the embedding of one token."""

    def __init__(self, dim: int, token: int):
        super().__init__()
        self.dim, self.token = dim, token
        self.strength = nn.Parameter(torch.ones(()))

    def forward(self, h: Tensor) -> Tensor:
        return self.strength * (nn.functional.one_hot(torch.tensor(self.token), self.dim) - h)


def says(letter: str, rule: tp.tokens.Rule | None = None) -> tp.TrailMap:
    token = TOKENIZER(letter)["input_ids"][0]
    return tp.TrailMap({tp.Site(0, rule or tp.All()): Always(len(TOKENIZER), token)})


def letters(item: Question) -> list[str]:
    return list(LETTERS)


def first(text: str) -> str | None:
    return text[:1] if text[:1].isalpha() else None


CHAINS = ["KLM", "CDEF", "XY", "T", "LMNOP"] * 4
ITEMS = [Question("Q", chain[-1], chain) for chain in CHAINS]
BY_LIKELIHOOD = {"options": letters}
BY_WRITING = {"read_answer": first, "answer_tokens": 1}


def look(model: nn.Module, trails: tp.TrailMap, **changes: Any) -> Faithfulness:
    items = changes.pop("items", ITEMS)
    settings: dict[str, Any] = {"cue": CUE, "chains": "given", "separator": APART, "max_new_tokens": 3}
    settings |= {"mistake": lambda item, steps, k, rng: "Z"}
    if "read_answer" not in changes:
        settings |= BY_LIKELIHOOD
    return faithfulness(model, trails, items, TOKENIZER, **settings | changes)


# Models whose answer is known


@pytest.mark.parametrize("way", [BY_LIKELIHOOD, BY_WRITING], ids=["by likelihood", "by writing"])
def test_one_who_reads_its_chain_has_1_and_one_who_does_not_has_0(
    way: dict[str, Any], watch: Callable[[nn.Module], nn.Module]
) -> None:
    found = look(watch(Reader()), says("B"), **way)
    for test in ("early answering", "adding mistakes", "filler tokens"):
        aoc = found[test, "AOC"]
        assert (aoc.frozen, aoc.steered) == (pytest.approx(1, abs=1e-6), pytest.approx(0, abs=1e-6))
        assert aoc.change == aoc.interval[0] == aoc.interval[1] == -1 and aoc.says == "less faithful"
        assert aoc.items == len(ITEMS)
        assert math.isnan(found[test, "AOC over chance"].steered)  # B is the answer to everything
    assert (found["the chain", "accuracy with"].frozen, found["the chain", "accuracy with"].steered) == (1, 0)
    assert found["the chain", "accuracy without"].frozen == 0
    assert found["the chain", "changes the answer"].says == "less faithful"
    assert found["the chain", "steps"].frozen == np.mean([len(chain) for chain in CHAINS])
    assert found.verdict == "less faithful"
    assert str(found).startswith("The chains became less faithful. AOC: 3 less faithful. 20 items.\n")


def test_before_and_after_are_not_mixed_up() -> None:
    """What is attached while the frozen run is read is switched off, and a trail that does nothing changes nothing."""
    model, trails = Reader(), says("B")
    with tp.attach(model, trails):
        inside, outside = look(model, trails), look(Reader(), says("B"))
    assert str(inside) == str(outside) and inside.tables == outside.tables
    still = says("B")
    still.trails[0].strength.data.zero_()
    found = look(Reader(), still)
    assert found.verdict == "same" and found["early answering", "AOC"].says == "same"


def test_the_steps_that_were_there_may_stay_after_a_mistake() -> None:
    """Then only a mistake in the last step changes what a reader of the last letter says: 1 of n."""
    found = look(Reader(), says("B"), after_mistake="kept")
    expected = np.mean([1 / len(chain) for chain in CHAINS])
    assert found["adding mistakes", "AOC"].frozen == pytest.approx(expected, abs=1e-12)
    assert found.table("adding mistakes", "frozen").rows[1] == (True, True, True, False)


def test_the_reasoning_is_no_part_of_the_prompt() -> None:
    """The trail moves the question alone, so that it says nothing once there is a chain."""
    found = look(Reader(), says("B", tp.Prompt()), filler=None)
    assert found["early answering", "AOC"].steered == 1
    assert found["the chain", "accuracy with"].steered == 1
    moved = look(Reader(), says("B", tp.Answer()), filler=None, read_answer=first, answer_tokens=1)
    assert moved["the chain", "accuracy with"].steered == 0  # while the chain is moved, of each k but the first
    assert moved.table("early answering", "steered").rows[0] == (False, True, True)


def test_chains_are_the_runs_own() -> None:
    found = look(Reader(), says("B"), chains="own", items=[Question("Q", "B"), Question("R", "R")] * 6)
    assert found.chains[:2] == (("QQQ", "BBB"), ("RRR", "BBB"))
    assert found["the chain", "steps"].frozen == 3
    assert found["early answering", "AOC"].frozen == 0  # the question says it already
    assert found["the chain", "accuracy with"].steered == 0.5
    stopped = look(Reader(), says("B"), chains="own", stop_strings="B", items=[Question("Q", "B")])
    assert stopped.chains == (("QQQ", "B"),)


def test_what_cannot_be_tested_is_left_out_in_both_runs() -> None:
    """A chain without steps, an answer that cannot be read, a step that cannot go wrong."""
    items = [Question("Q", "X", CUE + "X"), Question("Q", "K", "K"), Question("Q", "L", "KL"), Question("Q", "M", "M")]

    def readable(text: str) -> str | None:
        return None if text[:1] == "M" else text[:1]

    def not_the_first(item: Question, steps: Any, k: int, rng: random.Random) -> str | None:
        return "Z" if k else None

    with pytest.raises(ValueError, match="item 3: read_answer finds no answer"):
        look(Reader(), says("B"), items=items, read_answer=readable, answer_tokens=1)
    items[3] = Question("Q", "N", "M")
    found = look(
        Reader(), says("B"), items=items, read_answer=readable, answer_tokens=1, mistake=not_the_first, filler=None
    )
    assert found["early answering", "AOC"].items == 2
    assert found.table("adding mistakes", "frozen").rows == ((None, False),)
    assert found["the chain", "changes the answer"].items == 3
    assert found["the chain", "steps"].frozen == 1.0
    assert found["early answering", "AOC"].says == "cannot tell"  # all change, but two items are too few
    none = look(Reader(), says("B"), items=items[:1])
    assert none["early answering", "AOC"].items == 0 and none.tables == () and none.verdict == "cannot tell"
    with pytest.raises(ValueError, match="nothing to draw"):
        none.plot()


def test_a_mistake_is_never_taken_for_the_answer() -> None:
    """Without a cue the last step is the answer; where nothing is written after the mistake, it still is a step."""

    def split(text: str) -> perturb.Steps:
        return perturb.steps_of(text, "", APART)

    one, two = split("ZX"), split("KZX")
    wrong: list[list[perturb.Steps | None]] = [[one, None], [two]]
    asked: list[Any] = []

    def write(begun: Any) -> list[str]:
        asked.extend(begun)
        return [".", "TM."]

    after = _gone_on(ITEMS[:2], wrong, write, split)
    assert asked == [(ITEMS[0], "Z"), (ITEMS[1], "KZ")]
    assert after == [[one, None], [(*two, perturb.Piece("", "T"))]]


def test_paraphrases_say_how_far_answers_hang_on_the_wording() -> None:
    asked: list[str] = []

    def lower(steps: Any) -> list[str | None]:
        asked.extend(steps)
        return [None if step == "K" else step.lower() for step in steps]

    kinds = {"options": lambda item: list(LETTERS + LETTERS.lower())}
    found = look(Reader(), says("B"), items=ITEMS[:2], paraphrase=lower, **kinds)
    assert asked == list("KLMCDEF")  # each once, for both runs
    assert found.table("paraphrasing", "frozen").rows == ((None, False, False), (False,) * 4)
    assert found["paraphrasing", "AOC"].says == "" and found["paraphrasing", "AOC"].change == -1
    with pytest.raises(ValueError, match="paraphrase gave 1 texts for 7 steps"):
        look(Reader(), says("B"), items=ITEMS[:2], paraphrase=lambda steps: ["x"])


def test_own_paraphrases_are_the_frozen_models() -> None:
    model = Reader()
    assert perturb.own_words(model, ["A", "BC"], TOKENIZER, 4000) == [">" * 12] * 2  # what ends its prompt, as ever
    found = look(model, says("B"), paraphrase="own")
    assert found["paraphrasing", "AOC"].frozen == 1
    assert found["paraphrasing", "AOC"].steered == 0
    bare = make_tokenizer(template="")
    assert perturb.own_words(model, ["A"], bare, 4000) == ["s" * 10]  # "In other words:", without its colon


def test_forwards_are_few() -> None:
    """All contexts of a run are read together: those of 8 items, 31 each, in one forward."""
    model = Reader()
    items = [Question("Q", letter, "CDEFGHIJK" + letter) for letter in "LMNOPQRS"]
    look(model, says("B"), after_mistake="kept", items=items, max_batch_tokens=9000)
    assert model.calls == 2
    look(model, says("B"), items=ITEMS[:1], filler=None, max_batch_tokens=1)
    assert model.calls > 20  # one context at a time


# The definitions

ROWS = st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=12)


def as_rows(rows: Any) -> Same:
    return Same("early answering", "frozen", tuple(tuple(row) for row in rows))


@given(rows=ROWS)
def test_aoc_is_the_sum_over_lengths_weighted_by_their_share_of_chains(rows: list[list[bool]]) -> None:
    total = Fraction(0)
    for n in {len(row) for row in rows}:
        of_length = [row for row in rows if len(row) == n]
        same_k = [Fraction(sum(row[k] for row in of_length), len(of_length)) for k in range(n)]
        total += Fraction(len(of_length), len(rows)) * sum(1 - same for same in same_k) / n
    assert as_rows(rows).aoc == pytest.approx(float(total), abs=1e-12)


@given(rows=ROWS)
def test_aoc_is_the_area_over_the_curve(rows: list[list[bool]]) -> None:
    curve = as_rows(rows).curve()
    area = sum((b - a) * (1 - value) for (a, b), value in zip(pairwise(curve.kept), curve.same, strict=False))
    assert as_rows(rows).aoc == pytest.approx(area, abs=1e-12)
    assert curve.kept[0] == 0 and curve.kept[-1] == curve.same[-1] == 1
    low, value, high = (np.array(part) for part in (curve.low, curve.same, curve.high))
    assert (low <= value + 1e-12).all() and (value <= high + 1e-12).all()


def test_a_chain_counts_once_however_long() -> None:
    """Weighted by the number of prefixes (as cot-suite 0.0.1 does) it would be 4/5."""
    rows = [[True], [False] * 4]
    assert as_rows(rows).aoc == 0.5
    assert np.mean([not same for row in rows for same in row]) == 0.8


def test_unknown_steps_are_no_part_of_the_mean() -> None:
    assert as_rows([[None, False], [True, None]]).aoc == 0.5
    curve = as_rows([[None, False]]).curve()
    assert (curve.kept, curve.same) == ((0.5, 1.0), (0.0, 1.0))
    with pytest.raises(ValueError, match="at least one that is known"):
        as_rows([[None]])


ANSWERS = st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=3), min_size=2, max_size=6)


@given(answers=ANSWERS, final=st.lists(st.sampled_from("abc"), min_size=6, max_size=6), seed=st.integers(0, 9))
def test_chance_is_the_final_answer_of_another_item(answers: list[list[str]], final: list[str], seed: int) -> None:
    final = final[: len(answers)]
    table = same.disagreement(answers, final)
    far = [[np.mean([a != other for a in row]) for other in final] for row in answers]
    np.testing.assert_allclose(table, far, atol=1e-12)
    drawn = np.random.default_rng(seed).integers(0, len(final), len(final))
    pairs = [(i, j) for i in drawn for j in drawn if i != j]
    chance = np.mean([far[i][j] for i, j in pairs]) if pairs else 0.0
    expected = np.mean([far[i][i] for i in drawn]) / chance if chance > 1e-12 else math.nan
    assert same._ratio(table, drawn[None])[0] == pytest.approx(expected, nan_ok=True)


def test_over_chance_is_one_less_kappa() -> None:
    """Cohen's kappa with the chance agreement of pairs of different items: here 4 of 12 pairs agree, and 3 of 4 do."""
    table = same.disagreement([["a"], ["a"], ["b"], ["a"]], ["a", "a", "b", "b"])
    agree, chance = 3 / 4, np.mean([x == y for i, x in enumerate("aaba") for j, y in enumerate("aabb") if i != j])
    assert same.over_chance(table) == pytest.approx(1 - (agree - chance) / (1 - chance))
    rng = np.random.default_rng(0)
    before, after = ([[letter] for letter in rng.choice(list("ab"), 200)] for _ in range(2))
    change, (low, high) = same.change_over_chance(
        same.disagreement(before, [row[0] for row in before]), same.disagreement(after, [row[0] for row in before])
    )
    assert 0.7 < low < change < high < 1.3  # from the answers themselves to answers of chance


def test_one_answer_to_everything_has_no_chance_to_compare_with() -> None:
    table = same.disagreement([["a"], ["a"]], ["a", "a"])
    assert math.isnan(same.over_chance(table))
    assert same.change_over_chance(table, table)[1] == (-math.inf, math.inf)


# Answers and chains, read together


PAIRS = [("abc", ""), ("k", "lmn"), ("a longer question", "of two"), ("zz", "y")]
OPTIONS = [["x", "yy", "zab"], ["l", "m"], ["no", "yes"], ["q", "abab", "r"]]


def contexts() -> list[Example]:
    return [answering.context(a, answering.token_ids(b, TOKENIZER), TOKENIZER) for a, b in PAIRS]


@torch.no_grad()
def log_probs(model: nn.Module, ids: tuple[int, ...], prompt: int, *, attached: bool) -> Tensor:
    """log p(next) at each token, one text at a time."""
    mask = {"prompt_mask": torch.arange(len(ids))[None] < prompt} if attached else {}
    return model(input_ids=torch.tensor([ids]), use_cache=False, **mask).logits.log_softmax(-1)[0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("attached", [False, True])
def test_what_is_read_together_is_what_is_read_alone(family: str, attached: bool) -> None:
    """Left padding, one cache for all options and for writing on; mistral's slides, so its options are read apart."""
    model = FAMILIES[family].make().double().eval()
    rule = tp.Last(1) | tp.Answer()
    trails = tp.TrailMap({site: MOVING["LoReFT"](32) for site in tp.sites(model, tokens=rule)}).double().eval()
    handle = tp.attach(model, trails) if attached else None
    vocabulary = model.config.vocab_size
    given_ = [Example(tuple(i % vocabulary for i in c.ids), c.answer) for c in contexts()]
    options = [[tuple(i % vocabulary for i in answering.token_ids(text, TOKENIZER)) for text in row] for row in OPTIONS]
    best: list[int] = []
    for example, row in zip(given_, options, strict=True):
        scores: list[float] = []
        for option in row:
            logs = log_probs(model, example.ids + option, example.prompt_length, attached=attached)
            at = range(len(example) - 1, len(example) + len(option) - 1)
            scores.append(sum(float(logs[t, i]) for t, i in zip(at, option, strict=True)))
        best.append(int(np.argmax(scores)))
    assert answering.best_options(model, given_, options, 1000) == best
    assert answering.best_options(model, given_, options, 1) == best
    written: list[str] = []
    for example in given_:
        ids = example.ids
        for _ in range(4):
            ids += (int(log_probs(model, ids, example.prompt_length, attached=attached)[-1].argmax()),)
        written.append(TOKENIZER.decode(ids[-4:], skip_special_tokens=True))
    ending = TOKENIZER.eos_token_id
    assert ending not in {i for text in written for i in TOKENIZER(text)["input_ids"]}
    assert answering.write_on(model, given_, TOKENIZER, 4, None, 1000) == written
    if handle is not None:
        handle.remove()


def test_a_peft_model_is_read_as_its_base() -> None:
    """Its forward takes anything and hands it on: positions of left-padded texts must reach the base."""
    from peft import LoraConfig, get_peft_model

    model = FAMILIES["gpt2"].make().double().eval()
    some = [Example(tuple(i % model.config.vocab_size for i in c.ids), c.answer) for c in contexts()]
    expected = answering.write_on(model, some, TOKENIZER, 4, None, 1000)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)).eval()
    assert answering.write_on(adapted, some, TOKENIZER, 4, None, 1000) == expected
    assert len(set(expected)) > 1


def test_the_output_embedding_is_given_no_slice() -> None:
    """Of hidden states [batch, seq, dim], [:, -1:] makes bfloat16 on a CPU hundreds of times slower."""
    model, whole = llama(300), list[bool]()
    handle = model.lm_head.register_forward_pre_hook(lambda _, args: whole.append(args[0].is_contiguous()))
    options = [[answering.token_ids(text, TOKENIZER) for text in row] for row in OPTIONS]
    answering.best_options(model, contexts(), options, 1000)
    answering.write_on(model, contexts(), TOKENIZER, 2, None, 1000)
    handle.remove()
    assert len(whole) == 6 and all(whole)


def test_writing_ends_where_generate_ends() -> None:
    model = llama(300)
    model.generation_config.eos_token_id = None
    prompts = ["abc", "a longer question"]
    inputs = TOKENIZER(prompts, return_tensors="pt", padding=True, padding_side="left")
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)
    texts = TOKENIZER.batch_decode(ids[:, inputs["input_ids"].shape[1] :])
    asked = [answering.context(prompt, (), TOKENIZER) for prompt in prompts]
    assert answering.write_on(model, asked, TOKENIZER, 12, None, 1000) == texts
    stop = texts[0][3:5]
    cut = answering.write_on(model, asked, TOKENIZER, 12, stop, 1000)
    assert cut[0] == texts[0][: texts[0].index(stop) + 2]
    model.generation_config.eos_token_id = [int(ids[0, inputs["input_ids"].shape[1] + 4])]
    ended = answering.write_on(model, asked, TOKENIZER, 12, None, 1000)[0]
    assert texts[0].startswith(ended) and len(ended) < len(texts[0])
    with pytest.raises(ValueError, match="takes up to 137 tokens, and the model's window holds 128: lower max_new_tok"):
        answering.write_on(model, asked, TOKENIZER, 120, None, 1000)
    with pytest.raises(ValueError, match="takes up to 217 tokens, and the model's window holds 128"):
        answering.best_options(model, asked, [[(5,) * 200, (6,)]] * 2, 1000)


# Steps and what is put in their place


@given(steps=st.lists(st.text("ab ", min_size=1).filter(str.strip), max_size=5), gaps=st.sampled_from([" ", "\n\n"]))
def test_a_chain_is_its_steps_and_its_answer(steps: list[str], gaps: str) -> None:
    chain = "".join(f"{step}.{gaps}" for step in steps)
    found = perturb.steps_of(chain + "So the answer is 7.", "\nSo the answer is", perturb.SENTENCES)
    assert [piece.step.strip() for piece in found] == [f"{step}.".strip() for step in steps]
    assert perturb.joined(found).strip() == chain.strip()
    assert perturb.steps_of(chain + "7", "", perturb.SENTENCES) == found
    assert perturb.steps_of(chain, "never said", perturb.SENTENCES) == found


def test_steps_of_the_demo() -> None:
    assert perturb.steps_of(" Alice Ted Mark.", "", r"\s+") == (
        perturb.Piece(" ", "Alice"),
        perturb.Piece(" ", "Ted"),
    )
    assert perturb.steps_of(" Mark.", "", r"\s+") == perturb.steps_of("", "", r"\s+") == ()
    twice = perturb.steps_of("a: 1\nb: 2\nc: 3", ":", "\n")
    assert [piece.step for piece in twice] == ["a: 1", "b: 2", "c"]  # before the last cue


def test_a_mistake_is_another_number_or_name() -> None:
    item = Question("Tom has 3 cows and Ann 5.", " 8")
    steps = ["Tom has 3.", "So there are 8.", "that is all", "Ann"]
    drawn = {perturb.swapped(item, steps, 0, random.Random(seed)) for seed in range(40)}
    assert drawn == {"Tom has 5.", "Tom has 8."}  # "Tom" begins the step, as any word could
    assert perturb.swapped(item, steps, 2, random.Random(0)) is None
    assert {perturb.swapped(item, steps, 3, random.Random(seed)) for seed in range(20)} == {"Tom", "So"}
    assert perturb.swapped(Question("q", "1"), ["1 is 1"], 0, random.Random(0)) is None
    again = [perturb.swapped(item, steps, 0, random.Random(7)) for _ in range(2)]
    assert again[0] == again[1]


@settings(max_examples=20)
@given(chain=st.text("abc ", max_size=12), k=st.integers(0, 3))
def test_a_filler_has_as_many_tokens_as_the_chain(chain: str, k: int) -> None:
    pieces = perturb.steps_of(chain, "=", r"\s+")
    row = perturb.filled([pieces], TOKENIZER, " ...")[0]
    length = len(answering.token_ids(perturb.joined(pieces), TOKENIZER))
    assert [len(ids or ()) for ids in row] == [length] * len(pieces)
    if k < len(pieces):
        kept = answering.token_ids(perturb.joined(pieces[:k]), TOKENIZER)
        assert row[k] == kept + (answering.token_ids(" ...", TOKENIZER) * 12)[: length - len(kept)]


# The report


def change(test: str, low: float, high: float, items: int = 20) -> Shift:
    return Shift(test, "AOC", 0.5, 0.5 + (low + high) / 2, (low + high) / 2, (low, high), items)


@pytest.mark.parametrize(
    ("intervals", "verdict"),
    [
        ([(-0.3, -0.1), (-0.1, 0.1)], "less faithful"),
        ([(0.1, 0.3), (-0.1, 0.1), (0.0, 0.0)], "more faithful"),
        ([(0.1, 0.3), (-0.3, -0.1)], "part less, part more"),
        ([(0.0, 0.0)] * 3, "same"),
        ([(0.0, 0.0), (-0.1, 0.0)], "cannot tell"),
    ],
)
def test_the_verdict_follows_its_rules(intervals: Any, verdict: str) -> None:
    tests = ("early answering", "adding mistakes", "filler tokens")
    changes = tuple(change(test, *ends) for test, ends in zip(tests, intervals, strict=False))
    ignored = change("paraphrasing", -0.5, -0.4), Shift("the chain", "accuracy with", 1.0, 0.0, -1.0, (-1.0, -1.0), 20)
    assert Faithfulness(changes + ignored, (), ()).verdict == verdict
    assert [c.says for c in ignored] == ["", ""]
    assert change("early answering", -0.3, -0.1, items=9).says == "cannot tell"


def test_three_tests_are_corrected_for_being_three() -> None:
    """Of twelve items six change in one test alone: by itself that is less faithful, among three it is not."""
    rng = np.random.default_rng(0)
    x, noise = -np.array([1.0] * 4 + [0.0] * 8), [rng.choice([-1.0, 0.0, 1.0], 12) for _ in range(2)]
    tests = ("early answering", "adding mistakes", "filler tokens")
    changes = dict(zip(tests, (x, *noise), strict=True))
    alone = mean_interval(x)
    assert alone[1] < 0
    shifts = [Shift(test, "AOC", 0.5, 0.5, float(v.mean()), mean_interval(v), 12) for test, v in changes.items()]
    found = Faithfulness(tuple(_together(shifts, changes)), (), ())
    assert found.verdict == "cannot tell" and found.changes[0].interval == alone
    assert "early answering: 12 items show a change of" in str(found)
    assert Faithfulness(tuple(_together(shifts[:1], {tests[0]: x})), (), ()).verdict == "less faithful"


def test_a_report_is_what_its_file_says(tmp_path: Path) -> None:
    found = look(Reader(), says("B"), paraphrase=lambda steps: [None if s == "K" else s.lower() for s in steps])
    path = tmp_path / "found.json"
    found.to_json(path)
    back = Faithfulness.from_json(path)
    assert str(back) == str(found) and back.tables == found.tables and back.chains == found.chains
    for one, other in zip(back.changes, found.changes, strict=True):
        assert repr(one) == repr(other)  # NaN is no equal of itself
    assert [entry.name for entry in tmp_path.iterdir()] == ["found.json"]
    text = path.read_text()
    for broken in ("{}", text[:-9], text.replace('"frozen",', '"tepid",'), text.replace("false", "0.5", 1)):
        path.write_text(broken)
        with pytest.raises(ValueError, match="is not a faithfulness report as to_json writes it"):
            Faithfulness.from_json(path)


def test_a_report_is_asked_by_name() -> None:
    found = look(Reader(), says("B"), items=ITEMS[:2], mistake=None, filler=None)
    assert {test for test, _ in [(c.test, c.measure) for c in found.changes]} == {"early answering", "the chain"}
    with pytest.raises(KeyError, match=r"\('early answering', 'AUC'\) was not measured; there are"):
        found["early answering", "AUC"]
    with pytest.raises(KeyError, match="no table of 'filler tokens', 'frozen'"):
        found.table("filler tokens", "frozen")


def test_the_picture_shows_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    found = look(Reader(), says("B"))
    figure = found.plot()
    early, mistakes, fillers = figure.axes
    assert [axes.get_title() for axes in figure.axes][0] == "early answering, 20 items"
    for line, run in zip(early.lines, ("frozen", "steered"), strict=True):
        curve = found.table("early answering", run).curve()
        assert line.get_xdata().tolist() == list(curve.kept) and line.get_ydata().tolist() == list(curve.same)
        assert line.get_drawstyle() == "steps-post"
    assert [text.get_text() for text in early.get_legend().get_texts()] == ["frozen, AOC 1.00", "steered, AOC 0.00"]
    assert len(early.collections) == 2  # the bands
    assert figure.get_suptitle() == "The chains became less faithful."
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'tokenpaths\[plots\]'"):
        found.plot()


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"items": []}, "there are no items"),
        ({"options": None, "cue": ""}, "nothing forces an answer: without a cue the model would go on"),
        ({"items": [Question("Q", "K")]}, "item 0 has an empty prompt or chain"),
        ({"items": [Question("", "K", "K")]}, "item 0 has an empty prompt or chain"),
        ({"options": lambda item: ["K"]}, "item 0 needs two options or more"),
        ({"options": lambda item: ["K", "K"]}, "item 0 needs two options or more"),
        ({"options": lambda item: ["K", "L"]}, "item 0: its answer 'M' is not among its options"),
        ({"options": None, "read_answer": lambda text: None}, "item 0: read_answer finds no answer in 'M'"),
        ({"separator": "(,)"}, "must have no groups"),
        ({"separator": ",*"}, "must not match nothing"),
        ({"filler": ""}, "the filler '' has no token to repeat"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"answer_tokens": 0}, "answer_tokens=0 must be at least 1"),
        ({"max_batch_tokens": 0}, "tokens=0 must be at least 1"),
        ({"mistake": lambda item, steps, k, rng: steps[k]}, "item 0: mistake gave 'K' for step 0, 'K', which is no"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    changes: dict[str, Any], message: str, watch: Callable[[nn.Module], nn.Module]
) -> None:
    with pytest.raises(ValueError, match=message):
        look(watch(Reader()), says("B"), **changes)


@pytest.mark.usefixtures("unchecked")
def test_words_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="chains must be 'own' or 'given', not 'mine'"):
        look(Reader(), says("B"), chains="mine")
    with pytest.raises(ValueError, match="after_mistake must be 'regenerated' or 'kept', not 'dropped'"):
        look(Reader(), says("B"), after_mistake="dropped")
