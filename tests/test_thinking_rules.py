"""Trails on the thinking only: the first tokens of the answer, and prompt tokens that attention calls critical."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import DIM, llama, make_examples, make_tokenizer
from torch import Tensor

import tokenpaths as tp
from tokenpaths import AnswerFirst, DiReFT, Example
from tokenpaths.data import collate
from tokenpaths.lab.reasoning import critical, critical_rule, rows_of_spans
from tokenpaths.tokens import Context

TOKENIZER = make_tokenizer()


def eager() -> Any:
    model = llama(300)
    model.set_attn_implementation("eager")
    return model


# The first tokens of the answer. The laws of tests/laws*.py run over Prompt() | AnswerFirst(2).


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), min_size=1, max_size=4), st.integers(1, 7), st.booleans()
)
def test_answer_first_counts_from_the_end_of_the_prompt(rows: list[tuple[int, int]], n: int, left: bool) -> None:
    total = max(p + a for p, a in rows) + 1
    real, prompt, expected = (torch.zeros(len(rows), total, dtype=torch.bool) for _ in range(3))
    for i, (p, a) in enumerate(rows):
        start = total - p - a if left else 0
        real[i, start : start + p + a] = True
        prompt[i, : start + p] = True  # generate() calls the padding before a prompt prompt as well
        expected[i, start + p : start + p + min(a, n)] = True
    assert torch.equal(AnswerFirst(n).mask(Context(real=real, prompt=prompt)), expected)


@pytest.mark.parametrize("n", [0, -1, True, 1.0])
def test_answer_first_of_nothing_is_refused(n: Any, unchecked: None) -> None:
    with pytest.raises(ValueError, match=r"AnswerFirst\(n=.*\) must choose at least one token: n is a whole number"):
        AnswerFirst(n)


def test_answer_first_is_neither_answer_nor_another_number_and_comes_back_from_a_file(tmp_path: Path) -> None:
    assert len({AnswerFirst(2), AnswerFirst(3), tp.Answer(), tp.First(2), tp.Last(2)}) == 5
    assert repr(tp.Prompt() | AnswerFirst(8)) == "(Prompt() | AnswerFirst(n=8))"
    trails = tp.TrailMap({tp.Site(1, tp.Prompt() | AnswerFirst(8)): DiReFT(DIM, 2)})
    trails.save(tmp_path / "t.safetensors")
    assert tp.TrailMap.load(tmp_path / "t.safetensors").sites == trails.sites


def test_behind_the_first_tokens_the_model_is_left_alone() -> None:
    """The block's output differs from the frozen model's at the prompt and the first two tokens only."""
    model = llama(300)
    torch.manual_seed(0)
    trails = tp.TrailMap({tp.Site(2, tp.Prompt() | AnswerFirst(2)): DiReFT(DIM, 2, init="paper")})
    moved: list[bool] = []

    def see(_: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    states: list[Tensor] = []
    ids = torch.tensor([[5, 6, 7]])
    frozen = model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
    with tp.attach(model, trails):
        output = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    handle = model.model.layers[2].register_forward_hook(see)
    with torch.no_grad():
        model(output)
        with tp.attach(model, trails):
            model(output, prompt_mask=torch.arange(output.shape[1])[None] < 3)
    handle.remove()
    moved = (states[0] != states[1]).any(-1)[0].tolist()
    assert moved == [True] * 5 + [False] * (output.shape[1] - 5)
    assert frozen.shape[1] == 4


# Critical tokens


def by_hand(model: Any, example: Example, by: str, layers: list[int], skip: int) -> list[int]:
    """Prompt tokens by their score, highest first, from one forward of the prompt alone, in loops."""
    p = example.prompt_length
    with torch.no_grad():
        maps = model(torch.tensor([example.ids[:p]]), output_attentions=True).attentions
    flow = sum(maps[layer][0].double().mean(0) for layer in layers) / len(layers)
    scores: dict[int, float] = {}
    for j in range(skip, p):
        later = [float(flow[i, j]) for i in range(j + 1, p)]
        scores[j] = float(flow[j, j]) if by == "own" else sum(later) / max(1, len(later))
    return sorted(scores, key=lambda j: -scores[j])


@pytest.mark.parametrize("layers", [None, [0], [1, 2]])
@pytest.mark.parametrize("by", ["received", "own"])
def test_critical_tokens_are_those_of_the_definition(by: Literal["received", "own"], layers: Any, watch: Any) -> None:
    model, examples = watch(eager()), make_examples(8)
    reference = eager()  # transformers leaves hooks of its own where it is asked for maps
    for found, example in zip(
        critical(model, examples, 3, by=by, layers=layers, max_batch_tokens=16), examples, strict=True
    ):
        best = by_hand(reference, example, by, layers or [0, 1, 2], 1)[:3]
        assert [found.spans[f"critical {k}"] for k in range(len(best))] == [(j, j + 1) for j in best]
        assert all(found.spans[f"critical {k}"] == (0, 0) for k in range(len(best), 3))
        assert (found.ids, found.answer) == (example.ids, example.answer)


def test_the_answer_and_other_spans_do_not_matter() -> None:
    model = eager()
    whole = Example((5, 6, 7, 8, 9, 10), (False,) * 4 + (True,) * 2, {"mine": (1, 3)})
    alone = Example((5, 6, 7, 8), (False,) * 4)
    found, expected = critical(model, [whole], 2)[0].spans, critical(model, [alone], 2)[0].spans
    assert {key: found[key] for key in expected} == expected
    assert found["mine"] == (1, 3)


def test_a_planted_flow_is_found() -> None:
    """Where all attention goes to equal keys it is uniform, 1 / (i + 1) of token i: its scores are known."""
    model = eager()
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.q_proj.weight.zero_()
    example = Example(tuple(range(5, 11)), (False,) * 6)
    assert [critical(model, [example], 4)[0].spans[f"critical {k}"][0] for k in range(4)] == [1, 2, 3, 4]
    own = critical(model, [example], 2, by="own", skip=0)[0].spans
    assert [own[f"critical {k}"][0] for k in range(2)] == [0, 1]


def test_trails_move_the_critical_tokens_in_training_and_when_generating() -> None:
    model, examples = eager(), critical(eager(), make_examples(6), 2, name="key")
    trails = tp.TrailMap({tp.Site(0, critical_rule(2, "key")): DiReFT(DIM, 2, init="paper")})
    batch = collate(examples)
    states: list[Tensor] = []
    handle = model.model.layers[0].register_forward_hook(lambda _m, _a, output: states.append(output))
    with torch.no_grad():
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        with tp.attach(model, trails, spans=rows_of_spans(examples)):
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    handle.remove()
    moved = (states[0] != states[1]).any(-1)
    for row, example in enumerate(examples):
        named = {j for start, stop in example.spans.values() for j in range(start, stop)}
        assert set(moved[row].nonzero()[:, 0].tolist()) == named
        assert named
    before = [p.clone() for p in trails.parameters()]
    for _ in tp.steps(model, trails, [tp.Imitate(examples)], steps=3, batch_size=6, lr=1e-2, progress=False):
        pass
    assert any(not torch.equal(a, b) for a, b in zip(before, trails.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(count=0), "needs count >= 1 and skip >= 0, not 0 and 1"),
        (dict(count=1, skip=-1), "needs count >= 1 and skip >= 0"),
        (dict(count=1, layers=[3]), r"layers=\[3\] must name some of the 3 layers, counted from 0"),
        (dict(count=1, layers=[]), r"layers=\[\] must name some of the 3"),
    ],
)
def test_critical_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        critical(eager(), make_examples(2), **options)


def test_critical_needs_maps(unchecked: None) -> None:
    with pytest.raises(ValueError, match=r'no attention maps.*Switch with model.set_attn_implementation\("eager"\)'):
        critical(llama(300), make_examples(2), 1)
    with pytest.raises(ValueError, match="by must be 'received' or 'own', not 'given'"):
        critical(eager(), make_examples(2), 1, by="given")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="count is a whole number from 1 up"):
        critical_rule(0)
