"""From text to token ids: the one place where a tokenizer is called.

A tokenizer puts special tokens around a text, and so may the text itself: a chat that was rendered by
`apply_chat_template(tokenize=False)` begins with the begin-of-text token. None is put there twice.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def tokenized(tokenizer: Any, text: str, *, goes_on: bool = False) -> list[int]:
    """The tokens of a text, with the special tokens that the tokenizer puts around it, each of them once.

    Those that the text begins or ends with itself are not put there again.

    Args:
        tokenizer: a Hugging Face tokenizer.
        text: the text. An empty one may still have special tokens.
        goes_on: something follows the text, so the end-of-text token that some tokenizers put behind it is left out.
    """
    ids = list(_called(tokenizer, text)["input_ids"])
    if not hasattr(tokenizer, "all_special_ids"):  # a plain function from text to ids
        return ids
    ends = goes_on and ids[-1:] == [getattr(tokenizer, "eos_token_id", None)]
    if not text or not ends and not _begins_twice(ids) and not _begins_twice(ids[::-1]):
        return ids
    before, after = around(tokenizer)
    if before and ids[: 2 * len(before)] == before * 2:
        ids = ids[len(before) :]
    if after and ids[-2 * len(after) :] == after * 2:
        ids = ids[: -len(after)]
    if ends and after == ids[-1:]:
        ids = ids[:-1]
    return ids


def inner(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text that stands inside a longer one: no special tokens but those that it holds itself."""
    return list(_called(tokenizer, text, add_special_tokens=False)["input_ids"]) if text else []


def around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and behind a text."""
    bare = inner(tokenizer, "a")
    whole = list(tokenizer("a")["input_ids"])
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), len(whole))
    return whole[:start], whole[start + len(bare) :]


def check_tokenizer(tokenizer: Any) -> None:
    """Raise `TypeError` for what is no tokenizer: a name, a model, a processor of images and text."""
    name = type(tokenizer).__name__
    if isinstance(tokenizer, nn.Module):
        raise TypeError(f"a tokenizer is expected where a model was given ({name}): are the two in the other order?")
    if isinstance(tokenizer, str):
        raise TypeError(
            f"a tokenizer is expected, not its name {tokenizer!r:.60}: give AutoTokenizer.from_pretrained(name)"
        )
    if hasattr(tokenizer, "tokenizer") and not hasattr(tokenizer, "eos_token_id"):
        raise TypeError(f"a tokenizer is expected, not a {name}: give processor.tokenizer")
    if not callable(tokenizer) or isinstance(tokenizer, type):
        raise TypeError(
            f"a Hugging Face tokenizer is expected, not {name} ({tokenizer!r:.60}): texts come before the tokenizer"
        )


def check_decoder(tokenizer: Any) -> None:
    """Raise `TypeError` for what is no tokenizer and has no `decode`, which is all that `Match` needs."""
    if not callable(getattr(tokenizer, "decode", None)):
        check_tokenizer(tokenizer)


def _called(tokenizer: Any, text: str, **options: Any) -> Any:
    """What the tokenizer gives, without its warning that a text is longer than the model's window."""
    return tokenizer(text, **options, **({"verbose": False} if hasattr(tokenizer, "verbose") else {}))


def _begins_twice(ids: list[int]) -> bool:
    """Whether the first one to four tokens come again at once."""
    return any(ids[:n] == ids[n : 2 * n] for n in range(1, min(4, len(ids) // 2) + 1))
