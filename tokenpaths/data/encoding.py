"""From text to examples: a prompt and what the model is to write behind it, as token ids.

    examples = encode([("2 + 2 =", " 4")], tokenizer)                    # a prompt and its answer
    examples = encode([Question("2 + 2 =", " 4")], tokenizer)            # a question
    examples = encode([[{"role": "user", "content": "Hi"},               # or a chat
                        {"role": "assistant", "content": "Hello!"}]], tokenizer)
    texts = encode_texts(["Cows eat grass."], tokenizer)                 # no answer: all of it is prompt
    parts = encode_parts([("2 + 3 + 4 =", {"steps": " 5", "answer": " 9."})], tokenizer)

Prompt and answer are tokenised apart, so that no token lies across the border between them: at generation the model is
given a prompt that ends there. Nothing is cut unless you ask for it. Special tokens that a text has already, as a
rendered chat has its begin-of-text token, are not put there a second time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast

from tokenpaths.data.examples import Example
from tokenpaths.data.items import Question
from tokenpaths.data.tokenizing import around, check_tokenizer, inner, tokenized

Item: TypeAlias = "tuple[str, str] | Question | Sequence[Mapping[str, Any]]"


def encode(
    pairs: Sequence[Item],
    tokenizer: Any,
    *,
    eos: bool = True,
    turns: Literal["all", "last"] = "all",
    max_length: int | None = None,
    truncation: Literal["refuse", "left"] = "refuse",
    template: Mapping[str, Any] | None = None,
) -> list[Example]:
    """Turn pairs of prompt and answer, questions, or chats into token ids.

    Args:
        pairs: each item is a pair of strings; or a `Question`, whose chain follows the prompt, or its answer if it has
            no chain; or a chat, a list of {"role", "content"} messages for the chat template.
        tokenizer: a Hugging Face tokenizer. It puts its special tokens on a prompt as it does at generation.
        eos: end an answer with the end-of-text token. In a chat the template says how a turn ends.
        turns: train on every assistant turn of a chat, or on the last one, which must then end the chat.
        max_length: the most tokens that an example may have.
        truncation: what happens to a longer example: "refuse" raises an error, "left" cuts tokens from the start of its
            prompt, but not the tokenizer's begin-of-text token. An answer is never cut.
        template: further arguments of the chat template, such as {"enable_thinking": False}.

    Returns:
        An example an item, in order.

    Raises:
        ValueError: there are no items, an item is empty, too long, or of no known form, the chat template rewrites
            earlier turns, or the tokenizer has no end-of-text token to end an answer with.
        TypeError: `pairs` is no list.
    """
    _check_list(pairs, "(prompt, answer) pairs or of chats", "pairs")
    check_tokenizer(tokenizer)
    if turns not in ("all", "last"):
        raise ValueError(f"turns must be 'all' or 'last', not {turns!r}")
    if truncation not in ("refuse", "left"):
        raise ValueError(f"truncation must be 'refuse' or 'left', not {truncation!r}")
    _check_length(max_length)
    if truncation == "left" and max_length is None:
        raise ValueError("truncation='left' needs max_length=, the number of tokens to cut to")
    end = _end(tokenizer, eos and any(_pair(item) for item in pairs))
    start = tuple(around(tokenizer)[0]) if truncation == "left" else ()
    examples: list[Example] = []
    for number, item in enumerate(pairs):
        try:
            if pair := _pair(item):
                example = _encode_pair(tokenizer, *pair, end)
            elif _is_chat(item):
                example = _encode_chat(tokenizer, cast("Sequence[Mapping[str, Any]]", item), turns, template or {})
            else:
                raise ValueError(
                    f"neither a (prompt, answer) pair of strings nor a list of messages: {item!r:.80}{_hint(item)}"
                )
            examples.append(_fit(example, max_length, truncation, start))
        except ValueError as error:
            raise ValueError(f"item {number}: {error}") from error
    return examples


def encode_texts(texts: Sequence[str], tokenizer: Any, *, max_length: int | None = None) -> list[Example]:
    """Turn texts into examples that have no answer: all of each is prompt.

    Args:
        texts: strings.
        tokenizer: a Hugging Face tokenizer.
        max_length: the most tokens of an example; a longer text is cut at its end.

    Raises:
        ValueError: there are no texts, or one of them has no token.
        TypeError: `texts` is no list.
    """
    _check_list(texts, "texts", "texts")
    check_tokenizer(tokenizer)
    _check_length(max_length)
    examples: list[Example] = []
    for number, text in enumerate(texts):
        if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"text {number} must be a string, not {type(text).__name__} ({text!r:.60}): pairs go to encode(...)"
            )
        ids = tokenized(tokenizer, text)[:max_length]
        if not ids:
            raise ValueError(f"text {number} has no token: {text!r:.40}")
        examples.append(Example.of(ids))
    return examples


def encode_parts(pairs: Sequence[tuple[str, Mapping[str, str]]], tokenizer: Any, *, eos: bool = True) -> list[Example]:
    """Turn prompts and answers in named parts into examples with a span for each part.

    Args:
        pairs: each item is a prompt and its parts, by name, in the order in which they are written. Parts are tokenised
            apart, so that no token lies across the border of two.
        tokenizer: a Hugging Face tokenizer.
        eos: end the last part with the end-of-text token.

    Raises:
        ValueError: there are no pairs, a prompt has no token, an answer has no part or an empty one, or the tokenizer
            has no end-of-text token to end an answer with.
        TypeError: `pairs` is no list.
    """
    _check_list(pairs, "pairs of a prompt and its parts", "pairs")
    check_tokenizer(tokenizer)
    end = _end(tokenizer, eos)
    examples: list[Example] = []
    for number, item in enumerate(pairs):
        if not (isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[1], Mapping)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f'item {number} is {item!r:.80}, but must be a prompt and its parts: ("2 + 3 =", {{"answer": " 5"}})'
            )
        prompt, parts = item
        given = _prompt(tokenizer, prompt)
        if not given or not parts:
            raise ValueError(f"item {number} has {len(given)} prompt tokens and {len(parts)} parts, but needs both")
        pieces = {name: inner(tokenizer, text) for name, text in parts.items()}
        if empty := [name for name, piece in pieces.items() if not piece]:
            raise ValueError(f"item {number}: its part {empty[0]!r} is empty, leave it out")
        last = list(parts)[-1]
        pieces[last] = _ended(pieces[last], end)
        bounds = list(itertools.accumulate(map(len, pieces.values()), initial=len(given)))
        spans = dict(zip(pieces, itertools.pairwise(bounds), strict=True))
        examples.append(Example.of(given, list(itertools.chain(*pieces.values())), spans))
    return examples


def _check_list(items: Any, what: str, kind: str) -> None:
    if isinstance(items, str) or not isinstance(items, Sequence):
        instead = (
            "give list(...)" if hasattr(items, "__iter__") and not isinstance(items, str) else "put it in brackets"
        )
        raise TypeError(f"encoding takes a list of {what}, not {type(items).__name__}: {instead}, before the tokenizer")
    if not items:
        raise ValueError(f"there is nothing to encode: the list of {kind} is empty")


def _check_length(max_length: Any) -> None:
    if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1):
        raise ValueError(f"max_length={max_length!r} must be a whole number of tokens from 1 up, or None")


def _end(tokenizer: Any, wanted: bool) -> list[int]:
    """The end-of-text token behind an answer; nothing where none is wanted."""
    if not wanted:
        return []
    if tokenizer.eos_token_id is None:
        raise ValueError("this tokenizer has no end-of-text token: pass eos=False, or set tokenizer.eos_token")
    return [tokenizer.eos_token_id]


def _pair(item: Any) -> tuple[str, str] | None:
    """The prompt of an item and what follows it; None for a chat and for what is no item."""
    if isinstance(item, Question):
        item = (item.prompt, item.chain or item.answer)
    if isinstance(item, (tuple, list)) and len(item) == 2 and all(isinstance(text, str) for text in item):
        return item[0], item[1]
    return None


def _hint(item: Any) -> str:
    """What to do with something that is no item."""
    if isinstance(item, str):
        return ". A pair alone stands in a list, [(prompt, answer)]; texts without an answer go to encode_texts"
    if isinstance(item, Mapping) and "role" in item:
        return ". A chat is a list of messages, so one chat alone is [[message, message]]"
    if isinstance(item, Mapping) and "messages" in item:
        return '. A chat is given as its messages: item["messages"]'
    if isinstance(item, Mapping):
        return f". Make pairs of it, (item[...], item[...]), of its keys {', '.join(map(str, item))}"
    return ""


def _is_chat(item: Any) -> bool:
    return isinstance(item, Sequence) and all(isinstance(m, Mapping) and "role" in m for m in item)


def _encode_pair(tokenizer: Any, prompt: str, answer: str, end: list[int]) -> Example:
    given, written = _prompt(tokenizer, prompt), inner(tokenizer, answer)
    if not given:
        raise ValueError(f"its prompt {prompt!r} is empty: the answer has nothing to follow from")
    if not written:
        raise ValueError(f"its answer {answer!r} is empty: there is nothing to train on")
    _check_inner(tokenizer, written, answer)
    return Example.of(given, _ended(written, end))


def _encode_chat(tokenizer: Any, chat: Sequence[Mapping[str, Any]], turns: str, template: Mapping[str, Any]) -> Example:
    ids: list[int] = []
    answer: list[bool] = []
    for text, written in _turns(tokenizer, chat, turns, template):
        piece = inner(tokenizer, text)
        stop = _end_of_turn(tokenizer, piece) if written else 0
        ids += piece
        answer += [i < stop for i in range(len(piece))]
    return Example(tuple(ids), tuple(answer))


def _end_of_turn(tokenizer: Any, ids: list[int]) -> int:
    """The length of a turn without the white space that the template puts behind its last special token.

    The model stops at that token, so it never writes what follows.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    end = max((i + 1 for i, token in enumerate(ids) if token in special), default=len(ids))
    return len(ids) if tokenizer.decode(ids[end:]).strip() else end


def _turns(
    tokenizer: Any, chat: Sequence[Mapping[str, Any]], turns: str, template: Mapping[str, Any]
) -> Iterator[tuple[str, bool]]:
    """The text of a chat in pieces, and whether the model is trained to write each.

    A turn begins where the template ends when it is asked for that turn, and ends where the template ends after it.
    """
    if not chat:
        raise ValueError("the chat is empty")
    said = [i for i, message in enumerate(chat) if message["role"] == "assistant"]
    if not said:
        raise ValueError("the chat has no message of role 'assistant', so there is nothing to train on")
    if turns == "last":
        if said[-1] != len(chat) - 1:
            raise ValueError(f"turns='last', but the chat ends with a message of role {chat[-1]['role']!r}")
        said = said[-1:]
    if said[0] == 0:
        raise ValueError("the chat begins with the assistant: its prompt would be empty")
    if empty := [i for i in said if not (chat[i].get("content") or chat[i].get("tool_calls"))]:
        raise ValueError(f"message {empty[0]}, of the assistant, is empty: there is nothing to train on")

    def render(count: int, asking: bool) -> str:
        try:
            return tokenizer.apply_chat_template(
                list(chat[:count]), tokenize=False, add_generation_prompt=asking, **template
            )
        except Exception as error:  # a template may refuse in any way, and jinja's errors are not ours to import
            raise ValueError(f"the chat template refuses its first {count} messages: {error}") from error

    done = ""
    for i in said:
        for count, asking in ((i, True), (i + 1, False)):
            text = render(count, asking)
            _check_extends(done, text, i, turns)
            yield text[len(done) :], not asking
            done = text


def _check_extends(before: str, after: str, turn: int, turns: str) -> None:
    if not after.startswith(before):
        same = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False))))
        remedy = "train on turns='last'" if turns == "all" else "render the text yourself and pass (prompt, answer)"
        raise ValueError(
            f"the chat template does not extend at message {turn}: {before[same:][:30]!r} becomes "
            f"{after[same:][:30]!r} when more is said, so the turn cannot be told apart: {remedy}, or see template="
        )


def _prompt(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a prompt, as at generation; none for an empty one."""
    return tokenized(tokenizer, text, goes_on=True) if text else []


def _ended(ids: list[int], end: list[int]) -> list[int]:
    """The tokens of an answer with the end-of-text token behind them, unless they end with it already."""
    return ids if end and ids[-1:] == end else ids + end


def _check_inner(tokenizer: Any, ids: list[int], answer: str) -> None:
    """Refuse an answer that begins as a text of its own does: the begin-of-text token would stand in the middle."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is not None and ids[0] == bos and around(tokenizer)[0] == [bos]:
        raise ValueError(
            f"its answer {answer!r:.40} begins with the tokenizer's begin-of-text token, which would then stand in the "
            "middle: take it out of the answer"
        )


def _fit(example: Example, max_length: int | None, truncation: str, start: tuple[int, ...]) -> Example:
    """The example, if it has at most `max_length` tokens; else the same with a shorter prompt that begins alike."""
    if max_length is None or len(example) <= max_length:
        return example
    sizes = f"{len(example)} tokens ({example.prompt_length} of the prompt) for a window of {max_length}"
    if truncation == "refuse":
        raise ValueError(f"{sizes}: pass truncation='left' to cut prompts at their start, or leave the item out")
    keep = len(start) if example.ids[: len(start)] == start else 0
    cut = len(example) - max_length
    if keep + cut >= example.prompt_length:
        raise ValueError(f"{sizes}: the answer alone fills it, and an answer is never cut")
    return Example(example.ids[:keep] + example.ids[keep + cut :], example.answer[:keep] + example.answer[keep + cut :])
