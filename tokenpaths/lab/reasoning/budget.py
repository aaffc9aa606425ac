"""Budget forcing: how long a model may think, and how long it must (s1, Muennighoff et al. 2025, section 3.1).

    inputs = tokenizer(questions, return_tensors="pt", padding=True, padding_side="left")
    budget = BudgetForcing(tokenizer, inputs["input_ids"], end="</think>", answer=" Answer:", max_tokens=200, waits=1)
    output = model.generate(**inputs, logits_processor=[budget], max_new_tokens=300)
    budget.counts(output)       # of each row: its thinking tokens, its Waits, and how the thinking ended

A **thinking token** is a token that is generated before the first token of the first whole delimiter, or before the
end-of-text token. Where neither comes, every generated token is one. Waits are thinking tokens; delimiters are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenpaths.data.tokenizing import inner

Delimiter: TypeAlias = str | Sequence[int]
_LOG_PROBABILITIES = 1e-4  # logits whose logsumexp is so near to 0 in every row are log-probabilities


@dataclass(frozen=True)
class Thinking:
    """The thinking tokens of one generated row, how often a Wait was forced, and how its thinking ended.

    `ended` is "itself" (the model wrote a delimiter), "maximum" (a delimiter was forced), "eos" (the text ended without
    one) or "unfinished" (`generate` stopped first, as at `max_new_tokens`).
    """

    tokens: int
    waits: int
    ended: Literal["itself", "maximum", "eos", "unfinished"]


class BudgetForcing:
    r"""A logits processor for `model.generate(..., logits_processor=[budget])` that holds a budget of thinking tokens.

    A row's model **would stop** where its likeliest next token is a stop token: the first token of a delimiter, or an
    end-of-text token. With n thinking tokens written so far, in this order:

    1. n = `max_tokens`: the delimiter and `answer` are forced. A delimiter that the model has begun is completed.
    2. A Wait that has begun is forced to its end.
    3. The model would stop, fewer than `waits` Waits were forced, and one more ends within `max_tokens`: it is forced.
    4. n < `min_tokens`, or such a Wait is left: stop tokens are suppressed, also when sampling.
    5. Else, and once the thinking has ended, the scores are untouched. Without limits they always are.

    So each row whose generation is long enough has min_tokens <= n <= max_tokens. Greedy and sampled decoding, padding
    on the left, streaming, assisted decoding and attached trails all work; beam search is refused.

    **Delimiters are token sequences**, not text: a string is tokenised once, by itself. Another tokenisation of it is
    not recognised, as when a byte-pair tokenizer merges its first character with what came before. Give each as a
    delimiter of its own, `end=["</think>", [1234, 25]]`. The first is the one that is forced. Choose one whose first
    token the model writes for nothing else: "\n" would make every line break a stop.

    **State** is read from the tokens themselves. Only the columns of Waits are remembered, each until a call comes with
    rows that do not reach it. So a budget may be used again with the same prompt, and is refused with another.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: Int[Tensor, "batch width"],
        *,
        end: Delimiter | Sequence[Delimiter],
        answer: Delimiter = "",
        min_tokens: int = 0,
        max_tokens: int | None = None,
        waits: int = 0,
        wait: Delimiter = "Wait",
        eos: int | Sequence[int] | None = None,
    ) -> None:
        """Set the budget of one batch of prompts.

        Args:
            tokenizer: the model's tokenizer. It is used only here, for strings without special tokens around them.
            prompt: the `input_ids` that `generate` is given.
            end: the delimiter that ends thinking, or several. The first is forced at the maximum.
            answer: what is forced behind the delimiter at the maximum, such as "Final Answer:".
            min_tokens: the fewest thinking tokens.
            max_tokens: the most thinking tokens; no limit if None.
            waits: how often `wait` replaces a stop.
            wait: what is forced in place of a stop. It must hold no stop token.
            eos: the end-of-text tokens; by default the tokenizer's. Models with several name them in
                `model.generation_config.eos_token_id`.

        Raises:
            ValueError: limits that contradict each other, strings without tokens, or stop tokens in `wait` or in a
                delimiter that `answer` follows.
            TypeError: a prompt that is no tensor of two dimensions.
        """
        if not isinstance(prompt, Tensor) or prompt.ndim != 2:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"prompt is the input_ids that generate is given, [batch, width], not {type(prompt).__name__}: pass "
                'inputs["input_ids"]'
            )
        self.prompt = prompt
        self.ends = [_ids(tokenizer, one, "end") for one in _several(end)]
        self.answer = _ids(tokenizer, answer, "answer") if len(answer) else []
        self.min_tokens, self.max_tokens, self.waits = min_tokens, max_tokens, waits
        self.wait = _ids(tokenizer, wait, "wait") if waits else []
        given = tokenizer.eos_token_id if eos is None else eos
        self.eos = [] if given is None else [given] if isinstance(given, int) else [int(i) for i in given]
        self.stops = sorted({one[0] for one in self.ends} | set(self.eos))
        if min(min_tokens, waits, max_tokens or 0) < 0:
            raise ValueError(f"min_tokens={min_tokens}, max_tokens={max_tokens} and waits={waits} must not be negative")
        if max_tokens is not None and min_tokens > max_tokens:
            raise ValueError(f"min_tokens={min_tokens} is more than max_tokens={max_tokens}: nothing is as long")
        if stopping := sorted(set(self.wait) & set(self.stops)):
            raise ValueError(
                f"wait={wait!r} holds token {stopping[0]}, which begins a delimiter or ends the text: choose another"
            )
        if self.answer and set(self.ends[0]) & set(self.eos):
            raise ValueError(f"end={end!r} ends the text, so that no answer can be forced behind it: leave answer out")
        self._pad = tokenizer.pad_token_id
        self._waited: list[list[int]] = []  # of each row, the columns at which a Wait was forced, behind the prompt
        self._last: Tensor | None = None

    def __call__(
        self, input_ids: Int[Tensor, "rows total"], scores: Float[Tensor, "rows vocab"]
    ) -> Float[Tensor, "rows vocab"]:
        written = self._written(input_ids)
        self._check(input_ids, scores)
        rows, n = written.shape
        if len(self._waited) != rows:
            self._waited = [[] for _ in range(rows)]
        self._waited = [[column for column in columns if column < n] for columns in self._waited]
        if self.max_tokens is not None and n >= self.max_tokens:
            return _forced(scores, self._closing(written))
        return self._thinking(written, scores)

    def counts(self, output: Int[Tensor, "rows total"]) -> list[Thinking]:
        """The thinking of each row that `generate` returned (its `sequences`, if it returned more)."""
        written = self._written(output)
        lengths = torch.full((len(written),), written.shape[1])
        if self._pad is not None and self._pad not in self.eos:  # a row that stopped early for another reason is padded
            lengths = (written != self._pad).flip(1).cummax(1).values.sum(1)
        waited = self._waited if len(self._waited) == len(written) else [[] for _ in written]
        found = (self._delimited(written).tolist(), self._first(written, self.eos).tolist(), waited, lengths.tolist())
        return [self._count(*row) for row in zip(*found, strict=True)]

    def _count(self, start: int, eos: int, waited: list[int], length: int) -> Thinking:
        tokens = min(start, eos, length)
        waits = sum(column < tokens for column in waited)
        if tokens == length:
            return Thinking(tokens, waits, "unfinished")
        if eos < start:
            return Thinking(tokens, waits, "eos")
        return Thinking(tokens, waits, "maximum" if start == self.max_tokens else "itself")

    def _thinking(self, written: Tensor, scores: Tensor) -> Tensor:
        """Rules 2 to 5, before the maximum."""
        n = written.shape[1]
        if not self.waits and n >= self.min_tokens:
            return scores
        over = (torch.minimum(self._delimited(written), self._first(written, self.eos)) < n).tolist()
        stops = torch.tensor(self.stops, device=scores.device)
        would_stop = torch.isin(scores.argmax(-1), stops).tolist()
        fits = self.max_tokens is None or n + len(self.wait) <= self.max_tokens
        force: dict[int, int] = {}
        suppress: list[int] = []
        for row, columns in enumerate(self._waited):
            if over[row]:
                continue
            if columns and n - columns[-1] < len(self.wait):
                force[row] = self.wait[n - columns[-1]]
                continue
            left = fits and len(columns) < self.waits
            if left and would_stop[row]:
                columns.append(n)
                force[row] = self.wait[0]
            elif left or n < self.min_tokens:
                suppress.append(row)
        scores = _forced(scores, force)
        if suppress:
            scores = scores.clone()
            scores[torch.tensor(suppress, device=scores.device)[:, None], stops] = -torch.inf
        return scores

    def _closing(self, written: Tensor) -> dict[int, int]:
        """Rule 1: the token that each row must write from the maximum on, until it has written its answer prefix.

        What a row must write depends on its tokens up to the maximum alone.
        """
        assert self.max_tokens is not None
        n = written.shape[1]
        if n - self.max_tokens >= max(map(len, self.ends)) + len(self.answer):
            return {}
        before = written[:, : self.max_tokens]
        open_ = torch.minimum(self._delimited(before), self._first(before, self.eos)) == self.max_tokens
        force: dict[int, int] = {}
        for row in open_.nonzero()[:, 0].tolist():
            closing = self._rest(before[row].tolist()) + self.answer
            if n - self.max_tokens < len(closing):
                force[row] = closing[n - self.max_tokens]
        return force

    def _rest(self, before: list[int]) -> list[int]:
        """What completes the delimiter that a row has begun, the longest if several; else the whole first one."""
        begun = [(k, end) for end in self.ends for k in range(1, len(end)) if before[-k:] == end[:k]]
        k, end = max(begun, key=lambda found: found[0], default=(0, self.ends[0]))
        return end[k:]

    def _delimited(self, written: Int[Tensor, "rows n"]) -> Int[Tensor, " rows"]:
        """Where the first whole delimiter of each row starts; n where there is none."""
        rows, n = written.shape
        starts = [written.new_full((rows,), n)]
        for end in self.ends:
            if len(end) <= n:
                hits = (written.unfold(1, len(end), 1) == written.new_tensor(end)).all(-1)
                starts.append(_first_true(hits, n))
        return torch.stack(starts).amin(0)

    def _first(self, written: Int[Tensor, "rows n"], ids: list[int]) -> Int[Tensor, " rows"]:
        """Where the first of some ids stands in each row; n where there is none."""
        return _first_true(torch.isin(written, written.new_tensor(ids)), written.shape[1])

    def _written(self, input_ids: Int[Tensor, "rows total"]) -> Int[Tensor, "rows n"]:
        """What was generated behind the prompt."""
        batch, width = self.prompt.shape
        rows, total = input_ids.shape
        given = self.prompt.to(input_ids.device)
        if rows % batch or total < width or not input_ids[:, :width].equal(given.repeat_interleave(rows // batch, 0)):
            raise ValueError(
                f"this budget was made for {batch} prompts of {width} tokens, and these {rows} rows of {total} do not "
                "begin with them: make a new BudgetForcing for each batch of prompts, from the input_ids that generate "
                "is given"
            )
        return input_ids[:, width:]

    def _check(self, input_ids: Tensor, scores: Tensor) -> None:
        """Refuse beam search, whose scores are log-probabilities and whose rows change places, and unknown tokens."""
        (batch, width), (rows, total) = self.prompt.shape, input_ids.shape
        normalised = total == width and rows > batch and bool((scores.logsumexp(-1).abs() < _LOG_PROBABILITIES).all())
        last, self._last = self._last, input_ids
        moved = last is not None and last.shape == (rows, total - 1) and not last.equal(input_ids[:, :-1])
        if normalised or moved:
            raise ValueError(
                "budget forcing was given beam search (num_beams > 1), in which forced tokens compete by likelihood "
                "with beams that stopped by themselves: generate greedily or by sampling"
            )
        largest = max(*self.stops, *self.ends[0], *self.answer, *self.wait)
        if largest >= scores.shape[1]:
            raise ValueError(
                f"token {largest} of the budget is beyond the {scores.shape[1]} of the model: give its own tokenizer"
            )


def _several(end: Delimiter | Sequence[Delimiter]) -> list[Delimiter]:
    if isinstance(end, str) or all(isinstance(i, int) for i in end):
        return [end]  # pyright: ignore[reportReturnType]
    return list(end)  # pyright: ignore[reportReturnType]


def _ids(tokenizer: Any, given: Delimiter, name: str) -> list[int]:
    found = inner(tokenizer, given) if isinstance(given, str) else given
    ids = [int(i) for i in found]
    if not ids:
        raise ValueError(f"{name}={given!r} has no token: there is nothing to recognise or to write")
    return ids


def _first_true(hits: Bool[Tensor, "rows n"], otherwise: int) -> Int[Tensor, " rows"]:
    if not hits.shape[1]:
        return torch.full((len(hits),), otherwise, device=hits.device)
    return torch.where(hits.any(1), hits.int().argmax(1), otherwise)


def _forced(scores: Float[Tensor, "rows vocab"], tokens: dict[int, int]) -> Float[Tensor, "rows vocab"]:
    """The scores with a single token left in each row that is named, whatever its score was."""
    if not tokens:
        return scores
    rows, only = (torch.tensor(list(part), device=scores.device) for part in (tokens.keys(), tokens.values()))
    scores = scores.clone()
    scores[rows] = -torch.inf
    scores[rows, only] = 0.0
    return scores
