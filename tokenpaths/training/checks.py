"""Checks before the first step: data that the model or the token rules can do nothing with is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenpaths.checking import as_number, as_whole, quoted
from tokenpaths.data.examples import Example, collate
from tokenpaths.data.tokenizing import check_decoder
from tokenpaths.engine.forwards import check_known
from tokenpaths.site.host import check_model, window
from tokenpaths.tokens import Context, First, Last, Match, Not, Rule, Span, Without, leaves, token_pieces
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.trails.base import returns_the_moved_state
from tokenpaths.training.objectives.base import Objective

Pieces = Callable[[Sequence[int]], list[str]]


def check(model: nn.Module, trails: Adapter, goals: Sequence[Objective], tokenizer: Any) -> None:
    """Check a run before its first step, and warn of what is likely a mistake.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: there are no goals, the trails do not fit the model or are float16, the model's weights are on the
            meta device, an example is longer than the model's window or holds a token that it does not know, a token
            rule chooses nothing anywhere in the examples, or a rule needs a tokenizer and there is none.
    """
    check_model(model)
    if tokenizer is not None:
        check_decoder(tokenizer)
    if not isinstance(goals, Sequence) or not goals or not all(isinstance(goal, Objective) for goal in goals):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"goals must be a list of Objectives, such as [Imitate(examples)], not {goals!r:.80}")
    if not trails.sites:  # an adapter with sites is checked when it is attached
        trails.check(model)
    _check_numbers(model, trails)
    for place, goal in enumerate(goals):
        check_known(f"goal {place} ({type(goal).__name__})", model, goal.examples)
    _check_window(model, goals)
    _warn_of_moved_states(trails)
    rules = [leaf for site, _ in trails.items() for leaf in leaves(site.tokens)]
    if tokenizer is None and (matches := [rule for rule in rules if isinstance(rule, Match)]):
        raise ValueError(f"{matches[0]} reads the decoded text: give steps(..., tokenizer=your_tokenizer)")
    examples = [example for goal in goals for example in goal.examples]
    _check_rules(trails, examples, None if tokenizer is None else token_pieces(tokenizer))
    _warn_of_short_prompts(rules, examples)


def check_options(counts: dict[str, Any], numbers: dict[str, Any], optimizer: Any) -> None:
    """Raise `TypeError` for an option of `steps` that is no number where one is due, and for a made optimizer."""
    for name, value in counts.items():
        if value is not None:
            as_whole(name, value, None)
    for name, value in numbers.items():
        if value is not None:
            as_number(name, value)
    if optimizer is not None and (isinstance(optimizer, torch.optim.Optimizer) or not callable(optimizer)):
        raise TypeError(
            f"optimizer={quoted(optimizer)} must be a function from a list of parameters to an optimizer, as in "
            "optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1)"
        )


def checked_loss(loss: Any, goal: Objective, place: int) -> Tensor:
    """The loss of a goal. Raises `TypeError` for what is no tensor, which has no gradient."""
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"the loss of goal {place} ({type(goal).__name__}) is {quoted(loss)}, a {type(loss).__name__}: `loss` "
            "returns a tensor of one number that depends on the trails, without .item() or float()"
        )
    return loss


def span_names(trails: Adapter) -> list[str]:
    """The names of the spans that the token rules of the trails ask for."""
    return sorted({leaf.name for site, _ in trails.items() for leaf in leaves(site.tokens) if isinstance(leaf, Span)})


def _check_numbers(model: nn.Module, trails: Adapter) -> None:
    """Refuse weights that are not there, and trails in a dtype in which AdamW divides by zero."""
    parameters = list(model.parameters())
    placed = getattr(model, "hf_device_map", None) is not None  # offloaded weights come when they are needed
    if parameters and not placed and all(parameter.is_meta for parameter in parameters):
        raise ValueError(
            f"the weights of {type(model).__name__} are on the meta device, which holds no numbers: load the "
            "model with from_pretrained(...)"
        )
    for name, parameter in trails.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            raise ValueError(
                f"{name} of the trails is float16, in which gradients vanish and AdamW divides by zero, so that NaN "
                "follows at any lr: call trails.float() first. The model may stay in float16"
            )


def _warn_of_moved_states(trails: Adapter) -> None:
    """Warn of a trail of the user's own that seems to return h + d, and so doubles the state."""
    for trail in dict.fromkeys(getattr(trails, "trails", ())):
        dim, weight = getattr(trail, "dim", None), next(trail.parameters(), None)
        if type(trail).__module__.startswith("tokenpaths.") or not isinstance(dim, int) or weight is None:
            continue
        h = torch.randn(4, dim, generator=torch.Generator().manual_seed(0)).to(weight)
        try:
            moved = returns_the_moved_state(trail, h)
        except Exception:  # whatever is wrong with it is told where it is used
            continue
        if moved:
            warnings.warn(
                f"{trail} seems to return h + d, the moved state, which is then added to h once more: return the "
                "displacement d alone. `tokenpaths.testing.check_trail` checks this",
                stacklevel=4,
            )


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
    unseen = {rule for site, _ in trails.items() for rule in (site.tokens, *leaves(site.tokens))}
    for start in range(0, len(examples), 64):
        if not unseen:
            return
        batch = collate(examples[start : start + 64], spans=span_names(trails))
        context = Context(batch.attention_mask.bool(), batch.prompt_mask, batch.input_ids, batch.spans, pieces)
        unseen = {rule for rule in unseen if not bool(rule.mask(context).any())}
    signed = [(site, *pair) for site, _ in trails.items() for pair in (*_signed(site.tokens), (site.tokens, False))]
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
