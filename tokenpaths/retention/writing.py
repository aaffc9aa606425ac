"""What a run writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tokenpaths.data import Example, collate
from tokenpaths.drift.readings import Run, evaluating


def write(
    run: Run, tokenizer: Any, prompts: Sequence[Example], *, stop: str | None, max_new_tokens: int, batch_size: int
) -> list[str]:
    """What a run writes greedily behind each prompt (an example that is all prompt), cut behind `stop`."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        with run.inside(), evaluating(run.model):
            told = write_batch(run.model, tokenizer, [prompts[i] for i in rows], stop, max_new_tokens)
        for i, text in zip(rows, told, strict=True):
            texts[i] = text
    return texts


@torch.no_grad()
def write_batch(
    model: Any, tokenizer: Any, prompts: Sequence[Example], stop: str | None, max_new_tokens: int
) -> list[str]:
    """What a model writes greedily behind prompts, all in one batch, cut behind `stop`."""
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    until = {} if stop is None else {"stop_strings": [stop], "tokenizer": tokenizer}
    batch = collate(prompts, pad, "left").to(next(model.parameters()).device)
    ids = model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        **until,
    )
    told = tokenizer.batch_decode(ids[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return [cut(text, stop) for text in told]


def cut(text: str, stop: str | None) -> str:
    """A text up to its first `stop`, and with it."""
    return text if stop is None or stop not in text else text[: text.index(stop) + len(stop)]
