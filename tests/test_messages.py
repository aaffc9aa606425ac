# ruff: noqa: E501 - one line for each mistake
"""What is said to someone who gives the wrong thing: what came, what was expected, what to do.

MISTAKES: one line for each: its name, what is done, the error, and words of the message. A new mistake is one line.
Each is refused before anything has changed: the model and the trails are as they were, to the bit.
"""

from __future__ import annotations

import re
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny import DIM, VOCAB, llama, make_examples, make_tokenizer, make_trails
from torch import Tensor, nn

import tokenpaths as tp
from tokenpaths import Answer, Capped, Example, Imitate, Last, LoReFT, Replay, Site, Stay, TrailMap
from tokenpaths.data import Question, collate, encode_parts
from tokenpaths.drift import Meter, compare, kl
from tokenpaths.engine.readings import Run
from tokenpaths.testing import check_trail
from tokenpaths.trails import Chain, Confined, Gated, Scaled
from tokenpaths.training.objectives.align import Align, Attempts, sample_chains
from tokenpaths.training.objectives.parts import ImitateParts
from tokenpaths.training.objectives.waypoints import Waypoints, capture_states

EXAMPLES = make_examples(4)
FOREIGN = [Example((5, 6, VOCAB + 900), (False, False, True))]


class World:
    """A fresh model with its tokenizer and trails."""

    def __init__(self) -> None:
        self.model, self.tokenizer, self.trails = llama(512), make_tokenizer(), make_trails()

    def steps(self, goals: Any = None, **options: Any) -> Any:
        goals = [Imitate(EXAMPLES)] if goals is None else goals
        options = {"steps": 2, "batch_size": 2, "progress": False, **options}
        return list(tp.steps(self.model, options.pop("trails", self.trails), goals, **options))

    def drift(self, texts: Any = EXAMPLES, **options: Any) -> Any:
        return tp.measure_drift(self.model, options.pop("trails", self.trails), texts, **options)


class Whole(tp.Trail):
    """Returns the moved state."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.v = nn.Parameter(torch.zeros(dim))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.v


class Forgetful(tp.Trail):
    """Does not keep its argument."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.zeros(dim))

    def forward(self, h: Tensor) -> Tensor:
        return self.v.expand_as(h)


class FloatLoss(Imitate):
    def loss(self, model: Any, trails: Any, batch: Any) -> Any:
        return super().loss(model, trails, batch).item()


def pyreft_intervention() -> nn.Module:
    cls = type("LoreftIntervention", (nn.Module,), {"__module__": "pyreft.interventions"})
    return cls()


def halved(trails: TrailMap) -> TrailMap:
    return trails.half()


def later(w: World, strength: Any) -> None:
    with tp.attach(w.model, w.trails) as handle:
        handle.strength = strength


ENCODE = "tokenizer) makes Examples of pairs and chats"
# fmt: off
MISTAKES: dict[str, tuple[Callable[[World], Any], type[Exception], str]] = {
    # examples
    "pairs for examples": (lambda w: Imitate([("a", " b")]), TypeError, "Imitate: example 0 is ('a', ' b'), not of the kind Example: encode(pairs, " + ENCODE),
    "dicts for examples": (lambda w: Imitate([{"prompt": "a"}]), TypeError, "Imitate: example 0 is {'prompt': 'a'}, not of the kind Example"),
    "a dict for examples": (lambda w: Imitate({"a": "b"}), TypeError, "Imitate: examples are a list of Example, not dict"),
    "one example": (lambda w: Imitate(EXAMPLES[0]), TypeError, "Imitate: examples are given as a list, not as one Example: put it in brackets"),
    "a string": (lambda w: Stay("some text"), TypeError, "Stay: examples are a list of Example, not str: encode(pairs, "),
    "strings": (lambda w: Replay(["some text"]), TypeError, "Replay: example 0 is 'some text', not of the kind Example: encode(pairs, "),
    "a generator": (lambda w: Imitate(e for e in EXAMPLES), TypeError, "not generator (a generator can be read once only: list(...))"),
    "None": (lambda w: Imitate(None), TypeError, "Imitate: examples are a list of Example, not NoneType"),
    "no example": (lambda w: Imitate([]), ValueError, "Imitate has no examples to train on"),
    "text as ids": (lambda w: Example.of("a text"), TypeError, "token ids are a list of whole numbers, not str ('a text'): encode([(prompt, answer)], tokenizer)"),
    "numbers as strings": (lambda w: Example(("5", "6"), (False, True)), TypeError, "token ids are a list of whole numbers"),
    "broken ids": (lambda w: Example((5, 6.5), (False, True)), TypeError, "token ids are a list of whole numbers"),
    "padding as ids": (lambda w: Example((5, -100), (False, True)), ValueError, "token -100 of an Example is negative"),
    "a flag for all": (lambda w: Example((5, 6), True), TypeError, "answer says True or False of each token, but is True"),
    "a span without an end": (lambda w: Example((5, 6), (False, True), {"s": 1}), TypeError, "span 's' is 1, but must be (start, stop), counted in tokens"),
    "pairs collated": (lambda w: collate([("a", "b")]), TypeError, "collate: example 0 is ('a', 'b'), not of the kind Example"),
    "chains as text": (lambda w: Attempts(["right"], []), TypeError, "Attempts: example 0 is 'right', not of the kind Example"),
    "plain examples for Align": (lambda w: Align(EXAMPLES), ValueError, "Align: example 0 is no Attempts(right, wrong), but Example"),
    "parts as a list": (lambda w: ImitateParts(EXAMPLES, parts=["answer"]), TypeError, "ImitateParts: parts are weights by name"),
    "targets as a path": (lambda w: Waypoints(EXAMPLES, targets="targets.safetensors"), TypeError, "Waypoints: targets are what capture_states returned, not 'targets.safetensors'"),
    # numbers
    "a weight as a string": (lambda w: Imitate(EXAMPLES, weight="1"), TypeError, "Imitate: weight '1' must be a number, not str"),
    "a weight as a flag": (lambda w: Imitate(EXAMPLES, weight=True), TypeError, "Imitate: weight True must be a number, not bool"),
    "a broken batch size": (lambda w: Imitate(EXAMPLES, batch_size=2.0), TypeError, "Imitate: batch_size=2.0 must be a whole number, not float"),
    "a budget as a string": (lambda w: Stay(EXAMPLES, within="0.01"), TypeError, "Stay: within '0.01' must be a number, not str"),
    "rank as a string": (lambda w: LoReFT(DIM, rank="4"), TypeError, "LoReFT: rank='4' must be a whole number, not str"),
    "a broken rank": (lambda w: LoReFT(DIM, rank=4.0), TypeError, "LoReFT: rank=4.0 must be a whole number, not float"),
    "the model as width": (lambda w: LoReFT(w.model, rank=4), TypeError, "must be a whole number, not LlamaForCausalLM: give the width of the states, tokenpaths.width(model)"),
    "no width": (lambda w: tp.Additive(None), TypeError, "Additive: dim=None must be a whole number, not NoneType: give the width"),
    "width zero": (lambda w: tp.PSR(0), ValueError, "PSR: dim=0 must be at least 1"),
    "dropout as a string": (lambda w: LoReFT(DIM, 4, dropout="0.1"), TypeError, "LoReFT: dropout '0.1' must be a number, not str"),
    "a factor as a string": (lambda w: Scaled(tp.Additive(DIM), "0.5"), TypeError, "Scaled: factor '0.5' must be a number, not str"),
    "a cap of None": (lambda w: Capped(tp.Additive(DIM), None), TypeError, "Capped: cap None must be a number, not NoneType"),
    "directions as a string": (lambda w: Confined(tp.Additive(DIM), DIM, "2"), TypeError, "Confined: directions='2' must be a whole number, not str"),
    "a share as a string": (lambda w: tp.mix([1], [2], "0.01"), TypeError, "share '0.01' must be a number, not str"),
    # trails, sites and rules
    "a class for a trail": (lambda w: Scaled(LoReFT, 0.5), TypeError, "what Scaled wraps must be a Trail, not the class LoReFT"),
    "a module for a trail": (lambda w: Gated(nn.Linear(2, 2), DIM), TypeError, "Let its class inherit from tokenpaths.Trail, and return the displacement of h"),
    "a string for a trail": (lambda w: Chain(tp.Additive(DIM), "LoReFT"), TypeError, "the second trail of Chain must be a Trail, not str ('LoReFT'). Give one such as LoReFT(dim, rank=4)"),
    "pyreft's for a trail": (lambda w: TrailMap({Site(): pyreft_intervention()}), TypeError, "see the table in docs/trails.md"),
    "a class laid at a site": (lambda w: TrailMap({Site(): LoReFT}), TypeError, "Make one of the class, as in LoReFT(dim, rank=4)"),
    "a tuple for a site": (lambda w: TrailMap({(1, Last(1)): tp.Additive(DIM)}), TypeError, "Write Site(15, Last(1))"),
    "a layer as a string": (lambda w: Site("1"), TypeError, "layer is one whole number"),
    "several layers for a site": (lambda w: Site([1, 2]), TypeError, "for several use sites(model, [1, 2])"),
    "a class for a rule": (lambda w: Site(1, Last), TypeError, "tokens is a token rule such as Last(1) or All()"),
    "a rule as a string": (lambda w: Site(1, "Last(1)"), TypeError, "tokens is a token rule such as Last(1) or All(), not 'Last(1)'"),
    "a number for a rule": (lambda w: Answer() - 5, TypeError, "both sides must be token rules"),
    # models
    "a name for a model": (lambda w: tp.width("gpt2"), TypeError, "a model is expected, a torch module, not str ('gpt2'): load it first, AutoModelForCausalLM.from_pretrained(name)"),
    "a class for a model": (lambda w: tp.sites(type(w.model)), TypeError, "not the class LlamaForCausalLM"),
    "a tokenizer for a model": (lambda w: tp.width(w.tokenizer), TypeError, "a model is expected, a torch module, not "),
    "a pipeline for a model": (lambda w: tp.width(types.SimpleNamespace(model=w.model)), TypeError, "give its .model"),
    "strength as a string": (lambda w: tp.attach(w.model, w.trails, strength="0.5"), TypeError, "attach: strength '0.5' must be a number, not str"),
    "a strength of each row": (lambda w: tp.attach(w.model, w.trails, strength=torch.ones(2)), TypeError, "attach: strength tensor([1., 1.]) must be a number, not Tensor"),
    "an endless strength": (lambda w: tp.attach(w.model, w.trails, strength=float("nan")), ValueError, "attach: strength nan is not finite"),
    "strength later as a string": (lambda w: later(w, "0.5"), TypeError, "attach: strength '0.5' must be a number, not str"),
    "one row": (lambda w: tp.attach(w.model, w.trails, rows=1), TypeError, "attach: rows are given as a list, not as one int: put it in brackets"),
    "rows as text": (lambda w: tp.attach(w.model, w.trails, rows=["1"]), TypeError, "attach: row 0 is '1', not of the kind int or Integral: give their numbers in the batch"),
    "spans as pairs": (lambda w: tp.attach(w.model, w.trails, spans=[(0, 1)]), TypeError, "attach: spans are a dict, {name: [(start, stop) of each row]}, not list"),
    "a span of one row alone": (lambda w: tp.attach(w.model, w.trails, spans={"s": (0, 1)}), TypeError, "attach: span 's' of row 0 is 0, but must be (start, stop)"),
    "a span that ends before it begins": (lambda w: tp.attach(w.model, w.trails, spans={"s": [(2, 1)]}), ValueError, "attach: span 's' of row 0 ends before it begins: (2, 1)"),
    "a tokenizer by name": (lambda w: tp.attach(w.model, w.trails, tokenizer="gpt2"), TypeError, "a tokenizer is expected, not its name 'gpt2'"),
    "a name attached to": (lambda w: tp.attach("gpt2", w.trails), TypeError, "a model is expected, a torch module, not str"),
    "a name trained": (lambda w: list(tp.steps("gpt2", w.trails, [Imitate(EXAMPLES)], steps=1)), TypeError, "a model is expected"),
    "a name measured": (lambda w: tp.measure_drift("gpt2", w.trails, EXAMPLES), TypeError, "a model is expected"),
    "a name in trainable": (lambda w: tp.trainable("gpt2", w.trails).__enter__(), TypeError, "a model is expected"),
    "a name that writes": (lambda w: tp.self_samples("gpt2", w.tokenizer, 2), TypeError, "a model is expected"),
    "a name compared": (lambda w: compare(w.model, "gpt2", EXAMPLES), TypeError, "a model is expected"),
    "a name captured": (lambda w: capture_states("gpt2", EXAMPLES, EXAMPLES, [Site()]), TypeError, "a model is expected"),
    "a name in forgetting": (lambda w: tp.forgetting("gpt2", w.trails, [_task()], w.tokenizer), TypeError, "a model is expected"),
    "a model without weights": (lambda w: list(tp.steps(w.model.to("meta"), w.trails, [Imitate(EXAMPLES)], steps=1)), ValueError, "are on the meta device, which holds no numbers: load the model with from_pretrained"),
    # maps
    "a dict of trails trained": (lambda w: w.steps(trails={Site(): LoReFT(DIM, 2)}), TypeError, "a TrailMap or another Adapter is expected, not dict"),
    "a trail trained": (lambda w: w.steps(trails=LoReFT(DIM, 2)), TypeError, "lay trails at sites, TrailMap({Site(15, Last(1)): trail})"),
    "a path measured": (lambda w: w.drift(trails="a.safetensors"), TypeError, "not str ('a.safetensors'): load it, TrailMap.load(path)"),
    "a dict in forgetting": (lambda w: tp.forgetting(w.model, {}, [_task()], w.tokenizer), TypeError, "a TrailMap or another Adapter is expected"),
    "another width": (lambda w: w.steps(trails=TrailMap({Site(1, Last(1)): LoReFT(64, 2)})), ValueError, "is for width 64, but the states there have width 32"),
    "a layer too high": (lambda w: w.drift(trails=TrailMap({Site(9): LoReFT(DIM, 2)})), ValueError, "layer 9 is out of range; the model has 3 layers"),
    # training
    "one goal": (lambda w: w.steps(Imitate(EXAMPLES)), ValueError, "goals must be a list of Objectives, such as [Imitate(examples)], not Imitate("),
    "the class of a goal": (lambda w: w.steps([Imitate]), ValueError, "goals must be a list of Objectives"),
    "examples as goals": (lambda w: w.steps(EXAMPLES), ValueError, "goals must be a list of Objectives"),
    "another tokenizer's examples": (lambda w: w.steps([Imitate(FOREIGN)]), ValueError, "goal 0 (Imitate): example 0 has the token 996, but LlamaForCausalLM knows only"),
    "steps as a string": (lambda w: w.steps(steps="5"), TypeError, "steps='5' must be a whole number, not str"),
    "a batch size as a string": (lambda w: w.steps(batch_size="5"), TypeError, "batch_size='5' must be a whole number, not str"),
    "lr as a string": (lambda w: w.steps(lr="1e-3"), TypeError, "lr '1e-3' must be a number, not str"),
    "an optimizer that is made": (lambda w: w.steps(optimizer=torch.optim.SGD(w.trails.parameters(), lr=0.1)), TypeError, "must be a function from a list of parameters to an optimizer"),
    "a loss as a float": (lambda w: w.steps([FloatLoss(EXAMPLES)]), TypeError, "the loss of goal 0 (FloatLoss) is"),
    "trails in float16": (lambda w: w.steps(trails=halved(w.trails)), ValueError, "is float16, in which gradients vanish and AdamW divides by zero, so that NaN follows at any lr: call trails.float()"),
    "a name for a tokenizer": (lambda w: w.steps(tokenizer="gpt2"), TypeError, "a tokenizer is expected, not its name 'gpt2': give AutoTokenizer.from_pretrained(name)"),
    # drift
    "one string": (lambda w: w.drift("one string", tokenizer=w.tokenizer), TypeError, "drift takes a list of texts, not str: give [text]"),
    "one example measured": (lambda w: w.drift(EXAMPLES[0]), TypeError, "drift takes a list of texts, not Example: give [text]"),
    "a generator of texts": (lambda w: w.drift(e for e in EXAMPLES), TypeError, "not generator: give list(texts)"),
    "pairs measured": (lambda w: w.drift([("a", "b")]), TypeError, "text 0 is tuple, but drift takes strings and Examples"),
    "strings without a tokenizer": (lambda w: w.drift(["a b"]), ValueError, "drift on strings needs the tokenizer"),
    "the model for a tokenizer": (lambda w: w.drift(["a b"], tokenizer=w.model), TypeError, "a tokenizer is expected where a model was given"),
    "an empty text": (lambda w: w.drift([""], tokenizer=w.tokenizer), ValueError, "text 0 has 0 tokens; drift needs at least two"),
    "another tokenizer's texts": (lambda w: w.drift([Example.of([5, 999])]), ValueError, "drift: example 0 has the token 999"),
    "one measure": (lambda w: w.drift(measures=kl), TypeError, "measures is a list of functions, not one"),
    "measures by name": (lambda w: w.drift(measures=["kl"]), TypeError, "measures are functions, as in tokenpaths.drift.kl, not 'kl'"),
    "cone=True in drift": (lambda w: w.drift(cone=True), TypeError, "cone=True must be a Cone"),
    "a length as a string": (lambda w: w.drift(max_length="64"), TypeError, "drift: max_length='64' must be a whole number"),
    "a sample as a string": (lambda w: Meter(Run(w.model), Run(w.model), sample="9"), TypeError, "sample='9' must be a whole number"),
    # text
    "one pair": (lambda w: tp.encode(("a", "b"), w.tokenizer), ValueError, "item 0: neither a (prompt, answer) pair of strings nor a list of messages: 'a'. A pair alone stands in a list, [(prompt, answer)]"),
    "one chat": (lambda w: tp.encode([{"role": "user", "content": "a"}], w.tokenizer), ValueError, "one chat alone is [[message, message]]"),
    "rows of a data set": (lambda w: tp.encode([{"prompt": "a", "completion": "b"}], w.tokenizer), ValueError, "of its keys prompt, completion"),
    "a question of numbers": (lambda w: tp.encode([Question("2 + 2", 4)], w.tokenizer), ValueError, "item 0: neither a (prompt, answer) pair of strings"),
    "the tokenizer first": (lambda w: tp.encode(w.tokenizer, [("a", "b")]), TypeError, "encoding takes a list of (prompt, answer) pairs or of chats, not "),
    "a generator of pairs": (lambda w: tp.encode((p for p in [("a", "b")]), w.tokenizer), TypeError, "not generator: give list(...)"),
    "a name to encode with": (lambda w: tp.encode([("a", "b")], "gpt2"), TypeError, "not its name 'gpt2'"),
    "a processor to encode with": (lambda w: tp.encode([("a", "b")], types.SimpleNamespace(tokenizer=w.tokenizer)), TypeError, "give processor.tokenizer"),
    "pairs as texts": (lambda w: tp.encode_texts([("a", "b")], w.tokenizer), TypeError, "text 0 must be a string, not tuple"),
    "one text": (lambda w: tp.encode_texts("a text", w.tokenizer), TypeError, "encoding takes a list of texts, not str"),
    "an empty text encoded": (lambda w: tp.encode_texts([""], w.tokenizer), ValueError, "text 0 has no token"),
    "a length of zero": (lambda w: tp.encode_texts(["a"], w.tokenizer, max_length=0), ValueError, "max_length=0 must be a whole number of tokens from 1 up"),
    "parts without names": (lambda w: encode_parts([("a", ["b"])], w.tokenizer), TypeError, "item 0 is ('a', ['b']), but must be a prompt and its parts"),
    "a count as a string": (lambda w: tp.self_samples(w.model, w.tokenizer, "5"), TypeError, "count='5' must be a whole number"),
    "questions as pairs": (lambda w: sample_chains(w.model, [("a", "b")], w.tokenizer, 2, read_answer=str, max_new_tokens=2), TypeError, "sample_chains: question 0 is ('a', 'b'), not of the kind Question"),
}
# fmt: on


def _task() -> Any:
    from tokenpaths.data import Task, Text

    return Task("texts", (Text("some text"), Text("other text")))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_and_nothing_has_changed(unchecked: None, watch: Any, name: str) -> None:
    do, error, words = MISTAKES[name]
    world = World()
    if "without weights" not in name:
        watch(world.model)
    if "float16" not in name:
        before = {k: v.clone() for k, v in world.trails.state_dict().items()}
    with pytest.raises(error) as raised:
        do(world)
    assert words in str(raised.value)
    assert len(str(raised.value)) < 500  # it is read in a terminal
    if "float16" not in name:
        assert all(torch.equal(before[k], v) for k, v in world.trails.state_dict().items())


def test_numbers_of_numpy_are_numbers(unchecked: None) -> None:
    trail = Scaled(LoReFT(np.int64(DIM), rank=np.int32(4), dropout=np.float32(0.0)), np.float64(0.5))
    assert type(trail.trail.rank) is int and type(trail.trail.dim) is int
    assert Site(np.int64(3)) == Site(3) and type(Site(np.int64(3)).layer) is int
    assert Example(np.array([5, 6]), np.array([False, True])) == Example((5, 6), (False, True))


def test_a_trail_that_breaks_its_promises_can_be_shown() -> None:
    assert re.match(r"Forgetful\(\.\.\.: Forgetful does not keep its argument 'dim'", repr(Forgetful(4)))
    assert "Forgetful" in repr(TrailMap({Site(): Forgetful(4)}))
    untaught = Forgetful.__new__(Forgetful)  # whose __init__ did not come to its end
    assert repr(untaught).startswith("Forgetful(")


def test_the_moved_state_for_a_displacement_is_named(watch: Any) -> None:
    with pytest.raises(AssertionError, match=r"Whole returns h \+ d, the moved state. Return d alone"):
        check_trail(Whole)
    world = World()
    watch(world.model)
    trails = TrailMap({Site(1, Last(1)): Whole(DIM)})
    with pytest.warns(UserWarning, match=r"Whole\(dim=32\) seems to return h \+ d, the moved state"):
        world.steps(trails=trails, steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        world.steps(steps=1)


def test_drift_without_a_cone_is_measured_in_full() -> None:
    world = World()
    assert world.drift(cone=False)["kl"].mean == world.drift()["kl"].mean


def test_a_room_is_a_module_however_it_is_imported() -> None:
    import tokenpaths.drift as drift
    import tokenpaths.lab.audit as audit

    assert drift is sys.modules["tokenpaths.drift"] and audit is sys.modules["tokenpaths.lab.audit"]
