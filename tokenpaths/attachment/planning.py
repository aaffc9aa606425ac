"""From token rules to the tokens of a forward."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from tokenpaths.attachment.moment import Moment
from tokenpaths.attachment.moving import Plan
from tokenpaths.checking import as_whole, check_list, kind, quoted
from tokenpaths.data.tokenizing import check_decoder
from tokenpaths.tokens import (
    Answer,
    AnswerFirst,
    Both,
    Context,
    Either,
    First,
    Last,
    Match,
    Prompt,
    Rule,
    Tokens,
    Without,
    leaves,
    token_pieces,
)

Spans = Mapping[str, Sequence[tuple[int, int]]]
_COUNTED = (First, Last, AnswerFirst, Match)  # what these mean in a row of several examples nobody can tell
_BY_PROMPT = (Prompt, Answer)  # and these, unless it is said which tokens are the prompts
_BY_TEXT = (Tokens, Match)


class Planner:
    """The rules of an attachment, and what they read.

    Args:
        rules: the token rules of its sites.
        rows: the rows of the batch that are moved; None for all.
        spans: for `Span` rules, the (start, stop) of each row.
        tokenizer: for `Match` rules.

    Raises `TypeError` for one that is not of its kind, and `ValueError` for a span that ends before it begins.
    """

    def __init__(self, rules: Sequence[Rule], rows: Sequence[int] | None, spans: Spans | None, tokenizer: Any) -> None:
        if tokenizer is not None:
            check_decoder(tokenizer)
        self.rules = list(dict.fromkeys(rules))
        self.rows = _checked_rows(rows)
        self.spans = _checked_spans(spans)
        self.pieces = token_pieces(tokenizer) if hasattr(tokenizer, "decode") else None
        self.places: list[tuple[int, ...]] = []  # the numbers of the rules that share a place
        self._prompt_only = all(_within_prompt(rule) for rule in self.rules)
        kinds = [type(leaf) for rule in self.rules for leaf in leaves(rule)]
        self._counted = [kind.__name__ for kind in kinds if issubclass(kind, _COUNTED)]
        self._by_prompt = [kind.__name__ for kind in kinds if issubclass(kind, _BY_PROMPT)]
        self._by_text = any(issubclass(kind, _BY_TEXT) for kind in kinds)

    def plan(
        self,
        moment: Moment,
        strength: float,
        *,
        moves_none_cached: bool,
        asked: Sequence[Tensor] = (),
        opens: Tensor | None = None,
    ) -> Plan:
        """What is done in a forward, found with one wait for the device.

        `moves_none_cached`: no cached token was moved by this attachment, so that it must not choose any.
        `asked` are answered by the way: booleans on the device. `opens` are the rows that its gate opens.

        Raises `ValueError` where it does, and for rules that have no meaning in a packed row.
        """
        if self._prompt_only and moment.written and not (moves_none_cached and moment.past):
            none = moment.context.real.new_zeros((len(moment.context.real), moment.length))
            nowhere = dict.fromkeys(self.places, none.new_empty(0, dtype=torch.long))
            return Plan([none] * len(self.rules), nowhere, strength)
        whole = self._whole(moment, opens)
        masks = [mask[:, moment.past : moment.past + moment.length] for mask in whole]
        if torch.compiler.is_compiling():  # numbers that depend on values cannot be traced
            return Plan(masks, None, strength, moment.kept)
        unions = [functools.reduce(torch.logical_or, (masks[rule] for rule in rules)) for rules in self.places]
        checks = self._checks(moment, whole if moves_none_cached and moment.past else [])
        more = [*(check.any() for check, _ in checks), *asked]
        flat = torch.cat([torch.stack(unions).flatten(), *(one[None].to(unions[0].device) for one in more)]).cpu()
        found, told = flat[: len(flat) - len(more)], flat[len(flat) - len(more) :].tolist()
        for (_, message), wrong in zip(checks, told[: len(checks)], strict=True):
            if wrong and moment.prompt_given and "cache" in message:  # who says what is in the cache knows of it
                warnings.warn(message, stacklevel=2)
            elif wrong:
                raise ValueError(message)
        chosen: dict[tuple[int, ...], Tensor | None] = {}
        for rules, union in zip(self.places, found.view(len(unions), -1), strict=True):
            numbers = union.nonzero().squeeze(1)
            chosen[rules] = None if len(numbers) == len(union) else numbers.to(masks[0].device, non_blocking=True)
        return Plan(masks, chosen, strength, moment.kept, tuple(told[len(checks) :]))

    def masks(self, moment: Moment) -> list[Tensor]:
        """The chosen tokens of a forward, one mask a rule."""
        return [mask[:, moment.past : moment.past + moment.length] for mask in self._whole(moment)]

    def _whole(self, moment: Moment, opens: Tensor | None = None) -> list[Tensor]:
        """The chosen tokens, cached ones included."""
        context, repeats = moment.context, moment.repeats
        context = replace(context, pieces=self.pieces, spans={**context.spans, **self._span_masks(context, repeats)})
        masks = [rule.mask(context) for rule in self.rules]
        rows = self.rows_at_work(moment, opens)
        return masks if rows is None else [mask & rows.to(mask.device)[:, None] for mask in masks]

    def rows_at_work(self, moment: Moment, opens: Tensor | None) -> Tensor | None:
        """Which rows are moved: those that the gate opens and that `rows` names; None for all."""
        if self.rows is None:
            return opens
        count, repeats = len(moment.context.real) // moment.repeats, moment.repeats
        if any(not 0 <= row < count for row in self.rows):
            raise ValueError(f"rows={self.rows} names a row that the batch of {count} does not have")
        named = torch.tensor([row // repeats in self.rows for row in range(len(moment.context.real))])
        return named if opens is None else named & opens

    def _checks(self, moment: Moment, whole: Sequence[Tensor]) -> list[tuple[Tensor, str]]:
        """What must be nowhere true, and the message where it is. `whole` are masks that must choose nothing cached."""
        checks: list[tuple[Tensor, str]] = []
        unclear = self._counted + ([] if moment.prompt_given else self._by_prompt)
        if moment.restarts is not None and unclear:
            message = (
                "the batch packs several examples into one row, as its positions tell, where "
                f"{', '.join(dict.fromkeys(unclear))} have no meaning: set packing=False and padding_free=False, or "
                "lay the trails at rules that look at each token alone (All, Tokens)"
            )
            checks.append((moment.restarts, message))
        past = moment.past
        for rule, mask in zip(self.rules, whole, strict=bool(whole)):
            message = (
                f"{rule} chooses tokens among the first {past}, which come from a cache that was filled without these "
                "trails, so they were not moved: fill the cache with the trails attached, or run the whole text"
            )
            checks.append((mask[:, :past], message))
        if whole and self._by_text and moment.context.ids is not None:
            unknown = (moment.context.ids[:, :past] < 0) & moment.context.real[:, :past]
            message = (
                f"the first {past} tokens come from a cache that was filled without these trails, and their ids are "
                "not known to the rules that read them: fill the cache with the trails attached"
            )
            checks.append((unknown, message))
        return checks

    def _span_masks(self, context: Context, repeats: int) -> dict[str, Tensor]:
        masks: dict[str, Tensor] = {}
        for name, pairs in self.spans.items():
            if len(pairs) * repeats != len(context.real):
                raise ValueError(f"spans[{name!r}] has {len(pairs)} rows, the batch {len(context.real) // repeats}")
            bounds = torch.tensor(list(pairs), device=context.real.device).repeat_interleave(repeats, 0)
            position = context.real.cumsum(1) - 1
            masks[name] = (position >= bounds[:, :1]) & (position < bounds[:, 1:])
        return masks


def _within_prompt(rule: Rule) -> bool:
    """Whether a rule can choose tokens of the prompt only, whatever the tokens are."""
    if isinstance(rule, Either):
        return _within_prompt(rule.left) and _within_prompt(rule.right)
    if isinstance(rule, Both):
        return _within_prompt(rule.left) or _within_prompt(rule.right)
    if isinstance(rule, Without):
        return _within_prompt(rule.left)
    return isinstance(rule, (First, Last, Prompt))


def _checked_rows(rows: Any) -> tuple[int, ...] | None:
    if rows is None:
        return None
    check_list("attach: row", rows, (int, Integral), "give their numbers in the batch, as rows=[0, 2]")
    return tuple(as_whole("attach: row", row, least=None) for row in rows)


def _checked_spans(spans: Any) -> Spans:
    if spans is None:
        return {}
    if not isinstance(spans, Mapping):
        raise TypeError(f"attach: spans are a dict, {{name: [(start, stop) of each row]}}, not {kind(spans)}")
    for name, pairs in spans.items():
        for row, pair in enumerate(pairs if isinstance(pairs, Sequence) else [pairs]):
            if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
                raise TypeError(f"attach: span {name!r} of row {row} is {quoted(pair)}, but must be (start, stop)")
            start, stop = (as_whole(f"attach: a bound of span {name!r} of row {row}", bound, 0) for bound in pair)
            if stop < start:
                raise ValueError(f"attach: span {name!r} of row {row} ends before it begins: ({start}, {stop})")
    return spans
