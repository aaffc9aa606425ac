"""Texts without a prompt, each split into prompt and answer at several places.

    examples = split_texts(["The sea is deep and cold."], tokenizer)      # three examples of one text

To token rules a plain text is prompt throughout: `Last(1) | Answer()` would move its last token only, whose prediction
nobody reads. Split, the rest of it is the answer, as if the model were writing it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from tokenpaths.data.encoding import encode_texts
from tokenpaths.data.examples import Example

SPLITS = 3
"""The places at which a text is split unless told otherwise: one in each third of it."""


def split_texts(
    texts: Sequence[str], tokenizer: Any, splits: int = SPLITS, *, seed: int = 0, max_length: int | None = None
) -> list[Example]:
    """Turn texts into examples with prompt and answer, `splits` of each text one behind the other.

    Args:
        texts: strings, of two tokens or more each.
        tokenizer: a Hugging Face tokenizer. A text is tokenised whole: its tokens are those of `encode_texts`.
        splits: the number of places at which a text is split; fewer in a text of fewer tokens.
        seed: draws the places. A text has the same ones whatever stands beside it.
        max_length: the most tokens of an example; a longer text is cut at its end.

    Raises:
        ValueError: `splits` below 1, or as `encode_texts`, or a text of one token.
    """
    examples = encode_texts(texts, tokenizer, max_length=max_length)
    for number, example in enumerate(examples):
        if len(example) < 2:
            raise ValueError(f"text {number} has one token: there is nothing in it to split")
    return [part for example in examples for part in split(example, splits, seed)]


def split(example: Example, splits: int = SPLITS, seed: int = 0) -> list[Example]:
    """The same tokens with the answer beginning at another place each time.

    The borders between the tokens are cut into `splits` equal stretches, and one border is drawn in each.

    Raises:
        ValueError: `splits` below 1, or one token, which has no border.
    """
    borders = len(example) - 1
    if splits < 1 or borders < 1:
        raise ValueError(f"a text of {borders + 1} tokens cannot be split at {splits} places: both must allow one")
    count = min(splits, borders)
    random_ = random.Random(f"{seed} {example.ids}")
    edges = [1 + borders * i // count for i in range(count + 1)]
    places = [random_.randrange(edges[i], edges[i + 1]) for i in range(count)]
    return [Example(example.ids, tuple(i >= place for i in range(len(example))), example.spans) for place in places]
