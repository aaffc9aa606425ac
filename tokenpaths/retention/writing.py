"""What a run writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tokenpaths.data import Example, collate
from tokenpaths.drift.readings import Run, evaluating


@torch.no_grad()
def write(
    run: Run, tokenizer: Any, prompts: Sequence[Example], *, stop: str | None, max_new_tokens: int, batch_size: int
) -> list[str]:
    """What a run writes greedily behind each prompt (an example that is all prompt), cut behind `stop`."""
    model: Any = run.model
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    until = {} if stop is None else {"stop_strings": [stop], "tokenizer": tokenizer}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = collate([prompts[i] for i in rows], pad, "left").to(next(model.parameters()).device)
        with run.inside(), evaluating(model):
            ids = model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=pad,
                **until,
            )
        told = tokenizer.batch_decode(ids[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
        for i, text in zip(rows, told, strict=True):
            texts[i] = text if stop is None or stop not in text else text[: text.index(stop) + len(stop)]
    return texts
