r"""The one way to let a model write: greedily or by sampling, behind prompts of any length.

    written = generate(model, prompts, tokenizer, max_new_tokens=32, stop_strings="\n")
    written[0].text, written[0].ids

**Which of the model's generation settings hold**: its end-of-text tokens (the tokenizer's end a text too), and nothing
else. Its temperature, top-p, top-k, penalties, forced and suppressed tokens are set aside while it writes here: what is
compared and measured is the distribution of the model itself, and all verbs compare alike. To write with them, call
`model.generate`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenpaths.attachment.hooks import Hook
from tokenpaths.attachment.runs import evaluating
from tokenpaths.attachment.watcher import Watcher
from tokenpaths.data.examples import Example, collate
from tokenpaths.engine.batches import batches, by_length
from tokenpaths.engine.settings import generating_as
from tokenpaths.randomness import own_randomness
from tokenpaths.site.host import output_embedding
from tokenpaths.undo import Undo, tidy

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Written:
    """What was written behind one prompt: its token ids, the end-of-text token included, and its text.

    The ids stop behind the end-of-text token, or behind the token that completes the stop string. The text has no
    end-of-text and no special tokens, and ends with the stop string where one was found.
    """

    ids: Ids
    text: str


@tidy
def generate(
    model: Any,
    prompts: Sequence[Example],
    tokenizer: Any,
    *,
    max_new_tokens: int,
    stop_strings: str | None = None,
    sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | None = None,
    batch_size: int = 32,
    max_batch_tokens: int | None = None,
) -> list[Written]:
    """What a model writes behind each prompt, as it stands, in evaluation mode; trails keep the mode that they are in.

    Args:
        model: a causal language model, with whatever is attached to it.
        prompts: examples. Their answer tokens count as written by the model already: to token rules, the prompt of an
            example ends before them.
        tokenizer: the model's tokenizer.
        max_new_tokens: the most tokens to write behind a prompt.
        stop_strings: a text that ends the writing, besides the end-of-text tokens.
        sample: draw tokens, and do not take the likeliest.
        temperature: p is proportional to p^(1 / temperature), if tokens are drawn.
        top_p: the words drawn from are the likeliest, of this probability together.
        seed: of the drawing. Torch's own random state is left alone. Without a seed it is used.
        batch_size: prompts in one batch.
        max_batch_tokens: instead of it, the most tokens in one batch, padding and what is to be written included.
    """
    from transformers import GenerationConfig

    lengths = [len(prompt) for prompt in prompts]
    if max_batch_tokens is None:
        parts = by_length(lengths, batch_size)
    else:
        parts = batches([length + max_new_tokens for length in lengths], max_batch_tokens)
    ends = end_tokens(model, tokenizer)
    pad = next((i for i in (tokenizer.pad_token_id, *ends) if i is not None), 0)
    config = GenerationConfig(
        do_sample=sample,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad,
        **(dict(temperature=temperature, top_p=top_p, top_k=0) if sample else {}),  # its own top_k is 50
    )
    more: dict[str, Any] = {}
    written: dict[int, Written] = {}
    with (
        torch.no_grad(),
        evaluating(model),
        nullcontext() if seed is None else own_randomness(seed, model.device),
        generating_as(model, config),
        _head_is_given_no_slice(model),
    ):
        for rows in parts:
            batch = collate([prompts[i] for i in rows], pad, "left").to(model.device)
            if Watcher.known(model):  # attached trails read it, and a model without them does not know it
                more["prompt_mask"] = batch.prompt_mask
            if stop_strings is not None:
                more["stopping_criteria"] = _holds(stop_strings, tokenizer, batch.input_ids.shape[1])
            told = model.generate(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, generation_config=config, **more
            )
            for i, row in zip(rows, told[:, batch.input_ids.shape[1] :].tolist(), strict=True):
                ids = _until(row, ends, tokenizer, stop_strings)
                said = ids[:-1] if ids and ids[-1] in ends else ids
                written[i] = Written(ids, cut(tokenizer.decode(list(said), skip_special_tokens=True), stop_strings))
    return [written[i] for i in range(len(prompts))]


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text: those that the model names, and the tokenizer's, which `encode` ends answers with."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = named if isinstance(named, (list, tuple)) else [named]
    return sorted({int(i) for i in (*found, tokenizer.eos_token_id) if i is not None})


def cut(text: str, stop_strings: str | None) -> str:
    """A text up to its first stop string, and with it."""
    if stop_strings is None or stop_strings not in text:
        return text
    return text[: text.index(stop_strings) + len(stop_strings)]


def _holds(stop_strings: str, tokenizer: Any, start: int) -> Any:
    """Ends a row when what is written from `start` on holds the stop string.

    `stop_strings` of transformers would also find one that begins in the prompt.
    """
    from transformers import StoppingCriteriaList

    end = len(stop_strings.encode()) + 8  # a token has a byte or more, so that older ones hold nothing new

    def found(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        texts = tokenizer.batch_decode(ids[:, max(start, ids.shape[1] - end) :])
        return torch.tensor([stop_strings in text for text in texts]).to(ids.device)

    return StoppingCriteriaList([found])


def _until(row: list[int], ends: Sequence[int], tokenizer: Any, stop_strings: str | None) -> Ids:
    """Token ids up to an end-of-text token, or up to the one that completes the stop string, and with it."""
    ids = tuple(row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))])
    if stop_strings is None or stop_strings not in tokenizer.decode(list(ids)):
        return ids
    said = range(1, len(ids))
    return ids[: 1 + bisect_left(said, True, key=lambda n: stop_strings in tokenizer.decode(list(ids[:n])))]


@contextmanager
def _head_is_given_no_slice(model: Any) -> Generator[None]:
    """Inside, the output embedding is given contiguous states.

    A prompt's last states are a strided slice, whose product takes 100 times as long in bfloat16 on a CPU.
    """
    head = output_embedding(model)
    if head is None:
        yield
        return
    copy = Hook(lambda module, args: (args[0].contiguous(), *args[1:]))
    with Undo() as undo:
        undo.hook(head.register_forward_pre_hook, copy, prepend=True)
        yield
