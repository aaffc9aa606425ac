"""Where a trail lies: a layer, a stream and a token rule.

A transformer block adds to the residual stream twice. The streams of a `Site` are::

    embedding   the residual stream as it enters the first block
    attention   what attention adds: the output of its output projection
                (with head=i: the state of one head, as it enters that projection)
    mlp         what the feed-forward part adds: the output of its last projection, or of a mixture of experts
    block       the residual stream as it leaves the block (the default)

If a model family has a norm or a dropout between a projection and the residual stream, the site lies before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from tokenpaths.checking import as_whole
from tokenpaths.tokens import All, Rule

Stream: TypeAlias = Literal["embedding", "block", "attention", "mlp"]
Layers: TypeAlias = int | slice | Sequence[int] | Literal["all"]


@dataclass(frozen=True)
class Site:
    """One place to lay a trail. `sites` makes many at once.

    Args:
        layer: the block, from 0; a negative one is counted from the last.
        tokens: the rule that chooses the tokens.
        stream: which states of the block are moved (see the head of this file).
        head: the number of one attention head, for the stream "attention" only.

    Raises:
        TypeError: an argument is of another type.
        ValueError: there is no such stream, or layer or head do not go with it.
    """

    layer: int = 0
    tokens: Rule = All()
    stream: Stream = "block"
    head: int | None = None

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "layer", as_whole("layer", self.layer, None))
        except TypeError:
            raise TypeError(
                f"{self}: layer is one whole number; for several use sites(model, {self.layer!r})"
            ) from None
        if not isinstance(self.tokens, Rule):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"{self}: tokens is a token rule such as Last(1) or All(), not {self.tokens!r}")
        if self.stream not in get_args(Stream):
            raise ValueError(f"{self}: unknown stream {self.stream!r}; the streams are {', '.join(get_args(Stream))}")
        try:
            object.__setattr__(self, "head", self.head if self.head is None else as_whole("head", self.head, None))
        except TypeError:
            raise TypeError(f"{self}: head is the number of one attention head, or None") from None
        if self.head is not None and self.stream != "attention":
            raise ValueError(f"{self}: a head is part of stream 'attention', not of {self.stream!r}")
        if self.stream == "embedding" and self.layer != 0:
            raise ValueError(f"{self}: stream 'embedding' enters layer 0, so its layer is 0")
