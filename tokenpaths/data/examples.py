"""Examples and batches: token ids, and which of them the model is trained to write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import index
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tokenpaths.checking import check_list, kind, quoted

IGNORED = -100  # the label of a token that is not trained to be written, as everywhere in transformers


@dataclass(frozen=True)
class Example:
    """One sequence of token ids, and which of them the model is trained to write.

    Args:
        ids: the token ids, at least one.
        answer: of each token, whether the model is trained to write it. The first token cannot be.
        spans: stretches of the sequence by name, each (start, stop) counted in tokens, for the rule `Span(name)`.

    Raises:
        TypeError: `ids` are no token ids, or `answer` no flags.
        ValueError: there is no token, an id is negative, `answer` has another length, the first token is of the answer,
            or a span lies outside.
    """

    ids: tuple[int, ...]
    answer: tuple[bool, ...]
    spans: Mapping[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]], hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", _token_ids(self.ids))
        object.__setattr__(self, "answer", _flags(self.answer))
        if not self.ids:
            raise ValueError("an Example needs at least one token")
        if min(self.ids) < 0:
            raise ValueError(
                f"token {min(self.ids)} of an Example is negative: token ids are from 0 up, without padding"
            )
        if len(self.answer) != len(self.ids):
            raise ValueError(
                f"answer says of each token whether it is trained: {len(self.answer)} for {len(self)} tokens"
            )
        if self.answer[0]:
            raise ValueError("the first token cannot be of the answer: there is nothing before it to predict it from")
        for name, span in dict(self.spans).items():
            pair = isinstance(span, (tuple, list)) and len(span) == 2  # pyright: ignore[reportUnnecessaryIsInstance]
            if not (pair and all(isinstance(at, int) for at in span)):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"span {name!r} is {quoted(span)}, but must be (start, stop), counted in tokens")
            start, stop = span
            if not 0 <= start <= stop <= len(self):
                raise ValueError(f"span {name!r} is ({start}, {stop}), outside the {len(self)} tokens of the example")

    @classmethod
    def of(
        cls, prompt: Sequence[int], answer: Sequence[int] = (), spans: Mapping[str, tuple[int, int]] | None = None
    ) -> Example:
        """A prompt, and behind it an answer that is trained to be written."""
        prompt, answer = _token_ids(prompt), _token_ids(answer)
        return Example((*prompt, *answer), (False,) * len(prompt) + (True,) * len(answer), spans or {})

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def prompt_length(self) -> int:
        """The number of tokens before the first answer token; all of them where there is no answer."""
        return self.answer.index(True) if any(self.answer) else len(self)


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples as tensors, padded to one length.

    Args:
        input_ids: the token ids.
        attention_mask: 1 on tokens, 0 on padding.
        labels: the token ids of the answer, -100 elsewhere.
        prompt_mask: True before the first answer token.
        spans: for each name, True on the stretches of that name.
    """

    input_ids: Int[Tensor, "batch seq"]
    attention_mask: Int[Tensor, "batch seq"]
    labels: Int[Tensor, "batch seq"]
    prompt_mask: Bool[Tensor, "batch seq"]
    spans: Mapping[str, Bool[Tensor, "batch seq"]] = field(default_factory=dict[str, Tensor])

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved, spans={name: mask.to(device) for name, mask in self.spans.items()})


def collate(
    examples: Sequence[Example],
    pad_id: int = 0,
    side: Literal["right", "left"] = "right",
    *,
    spans: Iterable[str] = (),
) -> Batch:
    """Pad examples to the longest.

    Args:
        examples: at least one.
        pad_id: the id of padding. It is masked away, so any id that the model has will do.
        side: where the padding stands.
        spans: names that the batch has a mask for, besides those that an example names.

    Raises:
        ValueError: there are no examples, or the side is neither of the two.
    """
    check_examples("collate", examples)
    if not examples:
        raise ValueError("a batch needs at least one example")
    if side not in ("right", "left"):
        raise ValueError(f"side must be 'right' or 'left', not {side!r}")
    width = max(map(len, examples))

    def pad(rows: Iterable[Sequence[int]], value: int) -> Tensor:
        fill = [([value] * (width - len(row)), list(row)) for row in rows]
        return torch.tensor([row + gap if side == "right" else gap + row for gap, row in fill])

    def stretch(e: Example, start: int, stop: int) -> list[int]:
        return [int(start <= i < stop) for i in range(len(e))]

    ids = pad((e.ids for e in examples), pad_id)
    answer = pad((e.answer for e in examples), False).bool()
    names = sorted({name for e in examples for name in e.spans} | set(spans))
    return Batch(
        input_ids=ids,
        attention_mask=pad(([1] * len(e) for e in examples), 0),
        labels=torch.where(answer, ids, IGNORED),
        prompt_mask=pad((stretch(e, 0, e.prompt_length) for e in examples), 0).bool(),
        spans={n: pad((stretch(e, *e.spans.get(n, (0, 0))) for e in examples), 0).bool() for n in names},
    )


def check_examples(who: str, examples: Any) -> None:
    """Raise `TypeError`, with what to do instead, unless `examples` is a list of examples; it may be empty."""
    instead = "encode(pairs, tokenizer) makes Examples of pairs and chats, encode_texts(texts, tokenizer) of texts"
    check_list(f"{who}: example", examples, Example, instead)


def _token_ids(ids: Any) -> tuple[int, ...]:
    try:
        return tuple(index(i) for i in ids)  # not int(), which would cut 1.5 and read "7"
    except TypeError:
        instead = "encode([(prompt, answer)], tokenizer) makes Examples of text"
        raise TypeError(f"token ids are a list of whole numbers, not {kind(ids)} ({quoted(ids)}): {instead}") from None


def _flags(answer: Any) -> tuple[bool, ...]:
    try:
        return tuple(bool(a) for a in answer)
    except TypeError:
        raise TypeError(f"answer says True or False of each token, but is {quoted(answer)}") from None
