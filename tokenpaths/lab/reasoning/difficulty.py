"""The stages of `select` that ask a model: which questions it already solves, and what questions are about.

Whatever is attached to the model is on. The model's mode is restored.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from torch import nn

from tokenpaths.attachment.runs import evaluating
from tokenpaths.data.encoding import encode_texts
from tokenpaths.data.items import Choice, Question
from tokenpaths.engine.generate import generate
from tokenpaths.engine.likelihood import encode_choices, log_likelihoods, right
from tokenpaths.engine.means import mean_states
from tokenpaths.engine.readings import Run
from tokenpaths.undo import tidy


@tidy
def solved_by_likelihood(
    model: nn.Module, questions: Sequence[Question], tokenizer: Any, *, max_batch_tokens: int = 1500
) -> list[bool]:
    """Which multiple-choice questions a model solves: the answer alone has the largest summed log-likelihood.

    Args:
        model: a causal language model.
        questions: questions with `options`.
        tokenizer: the model's tokenizer.
        max_batch_tokens: the most tokens in one forward, padding included.

    Raises:
        ValueError: a question whose answer is none of its `options`.
    """
    choices: list[Choice] = []
    for number, question in enumerate(questions):
        if question.answer not in question.options:
            raise ValueError(
                f"problem {number}: its answer {question.answer!r:.40} is none of its options "
                f"{question.options!r:.80}; for free answers use solved_by_generation"
            )
        choices.append(Choice(question.options, question.options.index(question.answer), question.prompt))
    with evaluating(model):
        scores = log_likelihoods(model, encode_choices(choices, tokenizer), max_batch_tokens)
    return [bool(found == 1) for found in right(scores, choices)]


@tidy
def solved_by_generation(
    model: Any,
    questions: Sequence[Question],
    tokenizer: Any,
    read_answer: Callable[[str], str | None],
    *,
    max_new_tokens: int = 256,
    max_batch_tokens: int = 4000,
) -> list[bool]:
    r"""Which questions a model solves: `read_answer` finds the `answer` in what the model writes behind the prompt.

        solved_by_generation(model, pool, tokenizer, lambda text: text.split("Answer:")[-1].strip())

    Args:
        model: a causal language model. It writes greedily.
        questions: questions with answers.
        tokenizer: the model's tokenizer.
        read_answer: reads the answer from what the model wrote. It decides which answers are the same (s1 asked another
            model).
        max_new_tokens: the most tokens that the model writes for a question.
        max_batch_tokens: the most tokens in one batch, with padding and those to be written.
    """
    prompts = encode_texts([question.prompt for question in questions], tokenizer) if questions else []
    written = generate(model, prompts, tokenizer, max_new_tokens=max_new_tokens, max_batch_tokens=max_batch_tokens)
    return [read_answer(one.text) == question.answer for one, question in zip(written, questions, strict=True)]


@tidy
def clusters(
    model: nn.Module,
    texts: Sequence[str],
    tokenizer: Any,
    k: int,
    *,
    layer: str | None = None,
    seed: int = 0,
    max_batch_tokens: int = 1500,
) -> list[str]:
    """Domains for texts that have none: k-means clusters of mean hidden states, named "cluster 0" and so on.

    Each dimension is scaled to unit variance over the texts, because a few are far larger than the rest in most models.
    The clusters are those of `scipy.cluster.vq.kmeans2`, started by k-means++. Some may be empty.

    Args:
        model: a causal language model.
        texts: the texts.
        tokenizer: the model's tokenizer.
        k: the number of clusters.
        layer: the layer whose states are averaged over the tokens of a text, as in `tokenpaths.engine.Reading.states`:
            "embedding", "block 3". By default the last.
        seed: seeds k-means.
        max_batch_tokens: the most tokens in one forward, padding included.

    Raises:
        ValueError: k is not between 1 and the number of texts, a text has fewer than two tokens, or there is no such
            layer.
    """
    from scipy.cluster.vq import kmeans2

    if not 1 <= k <= len(texts):
        raise ValueError(f"{len(texts)} texts cannot be put into {k} clusters: k must be from 1 to their number")
    examples = encode_texts(texts, tokenizer)
    states = mean_states(Run(model), examples, layer, max_batch_tokens=max_batch_tokens).numpy()
    spread = states.std(0)
    states = (states - states.mean(0)) / np.where(spread > 0, spread, 1.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="One of the clusters is empty")
        _, labels = cast("Any", kmeans2)(states, k, minit="++", seed=seed)  # scipy before 1.15 has no `rng`
    return [f"cluster {label}" for label in labels]
