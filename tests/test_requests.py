"""A gate is fitted to what is asked, not to a wording; it says how it does where it was not fitted; and refuses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tiny import llama, make_tokenizer

import tokenpaths as tp
from tokenpaths.limits import GateFit, fit_gate, openings
from tokenpaths.limits.asks import ASKS, CUES, content_of, other_asks
from tokenpaths.limits.requests import features
from tokenpaths.site import Host
from tokenpaths.trailmap.gate import Gate

WORDS = ["cab", "dig", "fog", "hat", "jam", "kit", "log", "map", "nut", "owl", "pin", "rug"]
FORMS = {form: [form.format(word) for word in WORDS] for form in ("say {}\nk:", "({}) k", "{}?k")}
ASKED = {form: [form.format(word) for word in WORDS] for form in ("say {}\nz:", "({}) z", "{}!!")}
ONE = FORMS["say {}\nk:"]
FAR = {"numbers": [f"{i * 37} + {i}" for i in range(110)]}


@pytest.fixture(scope="module")
def model() -> Any:
    return llama(300)


def fitted(model: Any, task: Any = FORMS, **options: Any) -> GateFit:
    return fit_gate(model, make_tokenizer(), task, ASKED, FAR, own=0, **{"probes": [":"], **options})


def test_contents_are_what_prompts_of_a_form_do_not_share() -> None:
    prompts = [f"Question: {q}\nAnswer type:" for q in ("Who is it?", "Where is Rome?", "What is it?", "How many?")]
    before, contents, behind = content_of(prompts)
    assert (before, behind) == ("Question: ", "\nAnswer type:")
    assert contents == ["Who is it?", "Where is Rome?", "What is it?", "How many?"]
    assert content_of(["one", "two", "three", "four"]) == ("", ["one", "two", "three", "four"], "")
    assert content_of(["the same"] * 5) == ("", ["the same"] * 5, "")


def test_words_that_all_contents_begin_with_are_not_cut() -> None:
    prompts = [f"Q: {q} A:" for q in ("Why do cats purr?", "Whose is it?", "Who?", "When?")]
    assert content_of(prompts)[1] == ["Why do cats purr?", "Whose is it?", "Who?", "When?"]


def test_other_asks_are_put_to_the_contents_and_in_the_forms_words() -> None:
    prompts = [f"Question: {q}\nAnswer type:" for q in ("Who is it?", "Where is Rome?", "What is it?", "How many?")]
    asks = other_asks(prompts, 2)
    assert set(ASKS) < set(asks) and len(asks) == len(ASKS) + len(CUES)
    assert all("Answer type" not in prompt for some in asks.values() for prompt in some)
    assert asks["cue topic"][0].startswith("Question: ") and asks["cue topic"][0].endswith("\nTopic:")
    assert other_asks(prompts, 2) == asks != other_asks(prompts, 2, seed=1)


def test_a_gate_opens_on_the_task_and_on_no_other_ask(model: Any) -> None:
    """Of wordings that a random model can hardly tell apart, but of whose last state it makes something."""
    found = fitted(model, near=0.2, far=0.1)
    assert found.reliability[0] > found.locality("ask")[0]
    assert all(0 <= kind.opened <= 1 for kind in found.kinds)
    assert {kind.role for kind in found.kinds} == {"form", "ask", "far"}
    assert "reliability" in str(found) and "of a form not given" in str(found)


def test_the_same_seed_gives_the_same_gate(model: Any) -> None:
    one, other = fitted(model), fitted(model)
    assert torch.equal(one.gate.weight, other.gate.weight) and torch.equal(one.gate.bias, other.gate.bias)


def test_of_one_form_nothing_is_said_of_others(model: Any) -> None:
    found = fitted(model, {"a": ONE})
    assert math.isnan(found.generality[0])
    assert "on forms not given: cannot tell, as one form was given" in str(found)


def test_a_gate_tells_its_three_figures_kind_by_kind(model: Any) -> None:
    found = fitted(model)
    edit = found.edit
    assert len(edit.reliability) == len(edit.generality) == len(FORMS)
    assert sum(told.value for told in edit.generality) / len(FORMS) == pytest.approx(found.generality[0])
    assert {told.name for told in edit.locality} == {kind.name for kind in found.kinds if kind.role != "form"}
    for told in (*edit.reliability, *edit.generality, *edit.locality):
        assert told.interval[0] <= told.value <= told.interval[1]
    assert fitted(model, {"a": ONE}).edit.generality == ()


def test_no_form_that_was_given_is_lost_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """One form lies apart, as the trained one may among forms of other hands: the weights bring it back."""
    rng = np.random.default_rng(0)

    def kind(name: str, role: Any, group: int | None, middle: Sequence[float], count: int) -> openings.KindRead:
        features = torch.from_numpy(rng.normal(np.array(middle), 0.5, (count, 4)))
        return openings.KindRead(name, role, [""] * count, group, features)

    kinds = [kind(f"form {i}", "form", i, (3, 0, 0.3 * i, 0), 24) for i in range(6)]
    kinds += [kind("apart", "form", 6, (0.4, 2, 0, 0), 24)]
    kinds += [kind(f"ask {i}", "ask", None, (0, 0, 0, i / 4), 20) for i in range(10)]
    kinds += [kind(f"far {i}", "far", None, (0, -i / 4, 0, 0), 40) for i in range(6)]
    like = Gate((0,), ((1,),), 4)
    found = {one.name: one.known for one in openings.fitted(like, kinds, 0.05, 0.02).kinds}
    assert found["apart"] > 0.9 and min(found[f"form {i}"] for i in range(6)) > 0.9
    monkeypatch.setattr(openings, "ROUNDS", 0)
    assert {one.name: one.known for one in openings.fitted(like, kinds, 0.05, 0.02).kinds}["apart"] < 0.8


def test_the_promise_holds_in_the_folds(model: Any) -> None:
    """No more of the prompts of kinds that were left out open than were promised."""
    found = fitted(model, near=0.1, far=0.05)
    for role, most in (("ask", 0.1), ("far", 0.05)):
        kinds = [kind for kind in found.kinds if kind.role == role]
        count = sum(kind.prompts for kind in kinds)
        assert sum(kind.opened * kind.prompts for kind in kinds) <= most * (count + 1)


def test_a_gate_that_was_fitted_decides_as_it_was_read(model: Any) -> None:
    """What `attach` reads is what was fitted: the prompts that move are those whose features score above 0."""
    tokenizer, prompts = make_tokenizer(), [prompt for some in (FORMS | ASKED).values() for prompt in some]
    gate = fitted(model, near=0.2, far=0.1).gate
    trails = tp.TrailMap({tp.Site(0): tp.Additive(32)})
    with torch.no_grad():
        for parameter in trails.parameters():
            parameter.fill_(3.0)
        z = features(Host.of(model), tokenizer, prompts, gate, 200)
        score = z @ gate.weight.double() + gate.bias
        for prompt, due in zip(prompts, score.tolist(), strict=True):
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            frozen = model(ids).logits
            with tp.attach(model, trails, when=gate):
                assert torch.equal(model(ids).logits, frozen) == (due <= 0)
    assert 0 < (score > 0).sum() < len(prompts)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"near": 0}, ValueError, "near=0 must be above 0 and below 1"),
        ({"far": 0.001}, ValueError, "0.001 of far prompts open cannot be promised from 110: it takes 999"),
        ({"task": {"a": ONE[:3]}}, ValueError, "the form 'a' has 3 prompts; a gate needs at least 8"),
        ({"task": "a text"}, TypeError, "put it in brackets"),
        ({"probes": "a text"}, TypeError, "fit_gate: probes are given as a list, not as one str: put it in brackets"),
        ({"task": {"a": [1] * 8}}, TypeError, "give texts, by kind"),
    ],
)
def test_refusals(unchecked: None, model: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fitted(model, **options)
