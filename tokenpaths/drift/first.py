"""A first measure of drift: what the trails change on text, token by token, against the frozen model.

The frozen model is the same model with the trails off, so nothing is loaded twice, and what is compared is exactly what
the trails do.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from tokenpaths.attach import attach, is_attached
from tokenpaths.data import Batch, Example, collate
from tokenpaths.sites import find_blocks
from tokenpaths.trailmap import TrailMap


@dataclass(frozen=True)
class Drift:
    """Drift over the tokens of some texts. KL is KL(frozen || steered) of the next-token distribution, in nats a token.

    `kl_interval` is the 95 % bootstrap interval of the mean, over texts (texts are independent, tokens are not).
    `top1` is the share of tokens whose most likely next token is unchanged. `displacement` has, for each layer, the
    mean over tokens of ||h' - h|| / ||h|| of the residual stream after the block, in which tokens with massive
    activations weigh little. `moved` is the share of tokens that differ from the frozen model after the last block:
    where it is near 0, the other figures say nothing (`Last(n)` moves no more than n tokens of a text).
    """

    kl_mean: float
    kl_interval: tuple[float, float]
    kl_p99: float
    kl_max: float
    top1: float
    displacement: tuple[float, ...]
    moved: float
    tokens: int
    texts: int

    def __str__(self) -> str:
        low, high = self.kl_interval
        return (
            f"KL {self.kl_mean:.4f} [{low:.4f}, {high:.4f}] nats a token "
            f"(p99 {self.kl_p99:.3f}, max {self.kl_max:.3f}), "
            f"top-1 kept {self.top1:.1%}, displacement {max(self.displacement):.3f} at the most moved layer, "
            f"{self.moved:.1%} of {self.tokens} tokens in {self.texts} texts moved"
        )


def drift(
    model: nn.Module,
    trails: TrailMap,
    texts: Sequence[str] | Sequence[Example],
    tokenizer: Any = None,
    *,
    max_length: int = 256,
    batch_size: int = 4,
    progress: bool = False,
) -> Drift:
    """Measure how far `trails` move `model` on `texts`.

    A text given as a string is prompt throughout, cut to `max_length` tokens; an `Example` (from `encode`) keeps its
    border between prompt and answer, so rules such as `Answer()` find their tokens. The model is left as it was,
    trails attached or not. Raises `ValueError` for no texts, for strings without a tokenizer and for a text of under
    two tokens.
    """
    examples = _examples(texts, tokenizer, max_length)
    kl: list[np.ndarray] = []
    top1: list[float] = []
    moved: list[float] = []
    displacement: list[np.ndarray] = []
    attached = nullcontext() if is_attached(model, trails) else attach(model, trails, tokenizer=tokenizer)
    with attached, evaluating(model), torch.inference_mode(), _block_outputs(model, trails.blocks) as states:
        for start in tqdm(range(0, len(examples), batch_size), desc="drift", disable=not progress):
            batch = collate(examples[start : start + batch_size], pad_id=0).to(_device(model))
            with trails.off():
                frozen = model(**_inputs(batch)).logits
            before = list(states)
            steered = model(**_inputs(batch)).logits
            real = batch.attention_mask.bool()
            for row, tokens in enumerate(real):
                per_token, same = _compare(frozen[row][tokens], steered[row][tokens])
                kl.append(per_token.cpu().numpy())
                top1.extend(same.tolist())
            displacement.append(_displacement(before, states, real))
            moved.extend((before[-1] != states[-1]).any(-1)[real].tolist())
    every = np.concatenate(kl)
    return Drift(
        kl_mean=float(every.mean()),
        kl_interval=_bootstrap_over_texts(kl),
        kl_p99=float(np.quantile(every, 0.99)),
        kl_max=float(every.max()),
        top1=float(np.mean(top1)),
        displacement=tuple(float(x) for x in np.concatenate(displacement, 1).mean(1)),
        moved=float(np.mean(moved)),
        tokens=len(every),
        texts=len(examples),
    )


def _compare(
    frozen: Float[Tensor, "tokens vocab"], steered: Float[Tensor, "tokens vocab"]
) -> tuple[Float[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
    """KL(frozen || steered) and top-1 agreement of each token, in float32."""
    log_p, log_q = F.log_softmax(frozen.float(), -1), F.log_softmax(steered.float(), -1)
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).clamp_min(0)  # below 0 only by rounding
    return kl, log_p.argmax(-1) == log_q.argmax(-1)


def _displacement(before: list[Tensor], after: list[Tensor], real: Tensor) -> np.ndarray:
    """||h' - h|| / ||h||, layers x tokens."""
    layers: list[np.ndarray] = []
    for x, y in zip(before, after, strict=True):
        x, y = x[real].float(), y[real].float()
        layers.append(((y - x).norm(dim=-1) / x.norm(dim=-1).clamp_min(1e-12)).cpu().numpy())
    return np.stack(layers)


def _bootstrap_over_texts(kl: list[np.ndarray]) -> tuple[float, float]:
    """The 95 % interval of the mean over tokens; without bounds for a single text, which says nothing of others."""
    from scipy import stats  # half a second to import

    if len(kl) < 2:
        return -np.inf, np.inf
    sums, counts = [x.sum() for x in kl], [len(x) for x in kl]
    mean = lambda total, tokens, axis: total.sum(axis) / tokens.sum(axis)  # noqa: E731
    interval = stats.bootstrap((sums, counts), mean, paired=True, n_resamples=2000, method="percentile", rng=0)
    return float(interval.confidence_interval.low), float(interval.confidence_interval.high)


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Evaluation mode while it lasts; afterwards each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _block_outputs(model: nn.Module, blocks: str | None) -> Generator[list[Tensor]]:
    """The residual stream after each block, of the last forward. Hooked after the trails, so it is the moved one."""
    layers = find_blocks(model, blocks)
    states: list[Tensor] = []

    def keep(index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if index == 0:
                states.clear()
            states.append(output[0] if isinstance(output, tuple) else output)

        return hook

    handles = [layer.register_forward_hook(keep(index)) for index, layer in enumerate(layers)]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _examples(texts: Sequence[str] | Sequence[Example], tokenizer: Any, max_length: int) -> list[Example]:
    if not texts:
        raise ValueError("drift was given no texts")
    examples: list[Example] = []
    for index, text in enumerate(texts):
        if isinstance(text, str):
            if tokenizer is None:
                raise ValueError("drift on strings needs the tokenizer: drift(model, trails, texts, tokenizer)")
            ids = cast("list[int]", tokenizer(text)["input_ids"])[:max_length]
            text = Example(ids=tuple(ids), answer=(False,) * len(ids))
        if len(text.ids) < 2:
            raise ValueError(f"text {index} has {len(text.ids)} tokens; drift needs at least two")
        examples.append(text)
    return examples


def _inputs(batch: Batch) -> dict[str, Any]:
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "prompt_mask": batch.prompt_mask,
        "spans": batch.spans,
        "use_cache": False,
    }


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
