"""The demo's task: items are sound, disjoint, and what the docstring promises."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import tasks
from tasks import HOPS, LONGER_HOPS, Item, make_items


def links(item: Item) -> dict[str, str]:
    listed = item.question.split("\n")[0].split(".")
    return dict(pair.split() for pair in listed if pair.strip())


@pytest.mark.parametrize("hops", [HOPS, LONGER_HOPS])
def test_the_chain_follows_the_links_to_the_answer(hops: tuple[int, ...]) -> None:
    for item in make_items(50, 3, hops=hops):
        graph, person = links(item), item.question.split()[-1]
        for step in item.chain.rstrip(".").split():
            assert graph[person] == step
            person = step
        assert person not in graph
        assert item.answer == f" {person}."
        assert tasks.read_answer(item.chain) == tasks.read_answer(item.answer) == person


def test_training_and_held_out_share_no_set_of_links() -> None:
    train = {frozenset(links(item).items()) for item in make_items(400, 0)}
    held_out = {frozenset(links(item).items()) for item in make_items(200, 0, held_out=True)}
    assert len(train) == 400
    assert len(held_out) == 200
    assert not train & held_out


def test_longer_items_are_longer_than_any_other() -> None:
    assert min(LONGER_HOPS) > max(HOPS)


def test_answers_are_balanced() -> None:
    counts = Counter(item.answer for item in make_items(3200, 1))
    assert len(counts) == len(tasks.PEOPLE)
    assert max(counts.values()) < 1.5 * 3200 / len(tasks.PEOPLE)


def test_items_are_a_function_of_their_arguments() -> None:
    assert make_items(5, 7) == make_items(5, 7)
    assert make_items(5, 7) != make_items(5, 8)


def test_impossible_paths_are_refused() -> None:
    with pytest.raises(ValueError, match="needs one to 32 people"):
        make_items(1, 0, hops=(40,))


@pytest.mark.parametrize(
    ("text", "answer"), [(" Ann Bob. Tom", "Bob"), (" the cat.", None), ("", None), (" Bob", "Bob")]
)
def test_read_answer(text: str, answer: str | None) -> None:
    assert tasks.read_answer(text) == answer
