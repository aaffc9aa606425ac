"""A model is looked at once, and trails are laid in once, whatever is then run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES
from tiny import llama, make_examples, make_tokenizer, make_trails
from torch import nn

import tokenpaths as tp
from tokenpaths.attachment import Attachment
from tokenpaths.attachment.handle import attachments
from tokenpaths.data.items import Choice, Question, Task, Text
from tokenpaths.lab.ab import frozen, steered
from tokenpaths.site import Host

TEXTS = ["ab ab ba", "bb a b a", "a b b", "ba ba ab a"]


def counting(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, only: object = None) -> list[int]:
    """How often a method is called, on `only` if given."""
    calls, method = [0], getattr(owner, name)

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += only is None or self is only
        return method(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


def test_attach_walks_the_module_tree_once_however_many_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    places = [tp.Site(layer, tp.Last(1), stream) for layer in range(3) for stream in ("attention", "mlp", "block")]
    trails = tp.TrailMap({site: tp.LoReFT(32, rank=2) for site in places})
    walks = counting(monkeypatch, nn.Module, "named_modules", only=model)
    with tp.attach(model, trails):
        assert walks == [1]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "t5"])
def test_a_host_is_what_the_model_is(family: str) -> None:
    model, blocks = FAMILIES[family].make(), FAMILIES[family].blocks
    host = Host.of(model, blocks)
    assert host.blocks is tp.site.find_blocks(model, blocks)
    assert host.head is model.get_output_embeddings()
    assert not host.compiled and host.inner is model and host.path[""] is model
    assert host.locate(tp.Site(-1))[0] == tp.Site(len(host.blocks) - 1)
    assert Host.of(torch.compile(model), blocks).compiled


def test_trails_at_the_output_of_a_block_leave_it_below() -> None:
    host = Host.of(llama())
    assert host.blocks_below([tp.Site(2), tp.Site(1)]) == 2
    assert host.blocks_below([tp.Site(2, stream="mlp"), tp.Site(-1)]) == 2
    assert host.blocks_below([]) == 0


def verbs() -> dict[str, Callable[[Any, tp.TrailMap, Any], object]]:
    texts = Task("texts", tuple(Text(text) for text in TEXTS))
    choices = Task("choices", tuple(Choice((" a", " b"), 0, text) for text in TEXTS))
    questions = [Question(text, " a", chain=" b a") for text in TEXTS]
    examples = make_examples(8)
    return {
        "measure_drift": lambda m, t, tok: tp.measure_drift(m, t, examples),
        "forgetting": lambda m, t, tok: tp.forgetting(m, t, [texts, choices], tok, max_batch_tokens=12),
        "way_or_form": lambda m, t, tok: tp.way_or_form(
            m, t, tok, train=questions, held_out=questions, batch_size=1, max_batch_tokens=12
        ),
        "ab_test": lambda m, t, tok: tp.ab_test(
            frozen(m), steered(m, t), questions, tok, retention=[texts, choices], max_new_tokens=2, batch_size=1
        ),
        "guard": lambda m, t, tok: tp.guard(m, t, examples, examples, batch_size=1),
        "steps": lambda m, t, tok: list(tp.steps(m, t, [tp.Imitate(examples)], steps=3, batch_size=2, progress=False)),
    }


@pytest.mark.filterwarnings("ignore:.*overlap with others")
@pytest.mark.parametrize("verb", verbs())
def test_a_verb_attaches_the_trails_once_for_each_of_its_tasks(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = llama(512), make_tokenizer()
    tasks = {"forgetting": 2, "ab_test": 3, "guard": 2, "way_or_form": 3}
    calls = counting(monkeypatch, Attachment, "__init__")
    verbs()[verb](model, make_trails(), tokenizer)
    assert 1 <= calls[0] <= tasks.get(verb, 1)
    assert not attachments(model)
