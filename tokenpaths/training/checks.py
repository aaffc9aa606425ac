"""Checks before the first step: data that the model or the token rules can do nothing with is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from tokenpaths.data.examples import Example, collate
from tokenpaths.site.host import window
from tokenpaths.tokens import Context, First, Last, Match, Not, Rule, Span, Without, leaves, token_pieces
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.training.objectives.base import Objective

Pieces = Callable[[Sequence[int]], list[str]]


def check(model: nn.Module, trails: Adapter, goals: Sequence[Objective], tokenizer: Any) -> None:
    """Check a run before its first step, and warn of what is likely a mistake.

    Raises:
        ValueError: there are no goals, the trails do not fit the model, an example is longer than the model's window, a
            token rule chooses nothing anywhere in the examples, or a rule needs a tokenizer and there is none.
    """
    if not isinstance(goals, Sequence) or not goals or not all(isinstance(goal, Objective) for goal in goals):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"goals must be a list of Objectives, such as [Imitate(examples)], not {goals!r:.80}")
    if not trails.sites:  # an adapter with sites is checked when it is attached
        trails.check(model)
    _check_window(model, goals)
    rules = [leaf for site in trails.sites for leaf in leaves(site.tokens)]
    if tokenizer is None and (matches := [rule for rule in rules if isinstance(rule, Match)]):
        raise ValueError(f"{matches[0]} reads the decoded text: give steps(..., tokenizer=your_tokenizer)")
    examples = [example for goal in goals for example in goal.examples]
    _check_rules(trails, examples, None if tokenizer is None else token_pieces(tokenizer))
    _warn_of_short_prompts(rules, examples)


def span_names(trails: Adapter) -> list[str]:
    """The names of the spans that the token rules of the trails ask for."""
    return sorted({leaf.name for site in trails.sites for leaf in leaves(site.tokens) if isinstance(leaf, Span)})


def _check_window(model: nn.Module, goals: Sequence[Objective]) -> None:
    most = window(model)
    if most is None:
        return
    for number, goal in enumerate(goals):
        for place, example in enumerate(goal.examples):
            if len(example) > most:
                raise ValueError(
                    f"goal {number} ({type(goal).__name__}), example {place} has {len(example)} tokens, more than the "
                    f"model's window of {most}: encode(..., max_length={most}) refuses or cuts such examples"
                )


def _check_rules(trails: Adapter, examples: Sequence[Example], pieces: Pieces | None) -> None:
    """Raise for a rule, or a simple rule in it, that chooses no token anywhere; warn of one that takes nothing away."""
    unseen = {rule for site in trails.sites for rule in (site.tokens, *leaves(site.tokens))}
    for start in range(0, len(examples), 64):
        if not unseen:
            return
        batch = collate(examples[start : start + 64], spans=span_names(trails))
        context = Context(batch.attention_mask.bool(), batch.prompt_mask, batch.input_ids, batch.spans, pieces)
        unseen = {rule for rule in unseen if not bool(rule.mask(context).any())}
    signed = [(site, *pair) for site in trails.sites for pair in (*_signed(site.tokens), (site.tokens, False))]
    for site, rule, taken_away in signed:
        if rule in unseen and not taken_away:
            raise ValueError(
                f"{site}: {rule} chooses no token anywhere in the {len(examples)} training examples, so its trail "
                "would learn nothing there"
            )
    for site, rule, _ in signed:
        if rule in unseen:
            warnings.warn(f"{site}: {rule} takes nothing away anywhere in the training set", stacklevel=4)


def _signed(rule: Rule, taken_away: bool = False) -> Iterator[tuple[Rule, bool]]:
    """The simple rules in a rule, and whether each takes tokens away, as the second of `Answer() - Tokens([198])`."""
    parts = [(value, taken_away) for value in vars(rule).values() if isinstance(value, Rule)]
    if isinstance(rule, Without):
        parts = [(rule.left, taken_away), (rule.right, not taken_away)]
    elif isinstance(rule, Not):
        parts = [(rule.rule, not taken_away)]
    if not parts:
        yield rule, taken_away
    for part, sign in parts:
        yield from _signed(part, sign)


def _warn_of_short_prompts(rules: Sequence[Rule], examples: Sequence[Example]) -> None:
    lengths = [example.prompt_length for example in examples]
    for rule in dict.fromkeys(rules):
        if isinstance(rule, (First, Last)) and (short := sum(length < rule.n for length in lengths)):
            tokens = "1 token" if rule.n == 1 else f"{rule.n} tokens"
            warnings.warn(
                f"{rule}: {short} of {len(lengths)} prompts have fewer than {tokens}, and all of each is chosen",
                stacklevel=4,
            )
