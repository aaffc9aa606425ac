"""What a model already solves, and what a set of questions is about: the stages of `select` that ask a model.

Whatever is attached to the model is at work; its mode is afterwards as before.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from jaxtyping import Float
from torch import nn

from tokenpaths.data.encoding import encode_texts
from tokenpaths.data.examples import collate
from tokenpaths.data.items import Choice
from tokenpaths.engine.batches import batches
from tokenpaths.engine.generate import generate
from tokenpaths.engine.likelihood import encode_choices, log_likelihoods, right
from tokenpaths.engine.readings import Run, evaluating, read_one
from tokenpaths.lab.reasoning.selection import Problem


def solved_by_likelihood(
    model: nn.Module, problems: Sequence[Problem], tokenizer: Any, *, max_batch_tokens: int = 1500
) -> list[bool]:
    """Which multiple-choice problems a model solves: the answer alone has the largest summed log-likelihood.

    Forwards take at most `max_batch_tokens` tokens at a time.

    Raises:
        ValueError: a problem whose answer is none of its `options`.
    """
    choices: list[Choice] = []
    for number, problem in enumerate(problems):
        if problem.answer not in problem.options:
            raise ValueError(
                f"problem {number}: its answer {problem.answer!r:.40} is none of its options {problem.options!r:.80}; "
                "for free answers use solved_by_generation"
            )
        choices.append(Choice(problem.options, problem.options.index(problem.answer), problem.question))
    with evaluating(model):
        scores = log_likelihoods(model, encode_choices(choices, tokenizer), max_batch_tokens)
    return [bool(found == 1) for found in right(scores, choices)]


def solved_by_generation(
    model: Any,
    problems: Sequence[Problem],
    tokenizer: Any,
    read: Callable[[str], str | None],
    *,
    max_new_tokens: int = 256,
    max_batch_tokens: int = 4000,
) -> list[bool]:
    r"""Which problems a model solves: `read` finds a problem's `answer` in what the model writes behind the question.

        solved_by_generation(model, tokenizer, pool, lambda text: text.split("Answer:")[-1].strip())

    Decoding is greedy, with the model's other generation settings. A batch has at most `max_batch_tokens` tokens, those to be
    written included. What counts as the same answer is up to `read` (s1 asked another model).
    """
    prompts = encode_texts([p.question for p in problems], tokenizer) if problems else []
    written = generate(model, prompts, tokenizer, max_new_tokens=max_new_tokens, max_batch_tokens=max_batch_tokens)
    return [read(one.text) == problem.answer for one, problem in zip(written, problems, strict=True)]


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

    Each text is the mean over its tokens of the states of a layer, named as in `tokenpaths.drift.Reading.states`
    ("embedding", "block 3"; by default the last). Each dimension is scaled to unit variance over the texts, since a few
    are far larger than the rest in most models. `scipy.cluster.vq.kmeans2` finds the clusters, from k-means++; some may
    be empty.

    Raises:
        ValueError: k is not between 1 and the number of texts, a text has fewer than two tokens, or there is no such
            layer.
    """
    from scipy.cluster.vq import kmeans2

    if not 1 <= k <= len(texts):
        raise ValueError(f"{len(texts)} texts cannot be put into {k} clusters: k must be from 1 to their number")
    states = _mean_states(model, tokenizer, texts, layer, max_batch_tokens)
    spread = states.std(0)
    states = (states - states.mean(0)) / np.where(spread > 0, spread, 1.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="One of the clusters is empty")
        _, labels = cast("Any", kmeans2)(states, k, minit="++", seed=seed)  # scipy before 1.15 has no `rng`
    return [f"cluster {label}" for label in labels]


def _mean_states(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], layer: str | None, max_batch_tokens: int
) -> Float[np.ndarray, "texts dim"]:
    examples = encode_texts(texts, tokenizer)
    found: dict[int, Float[np.ndarray, " dim"]] = {}
    for rows in batches([len(example) for example in examples], max_batch_tokens):
        batch = collate([examples[i] for i in rows]).to(next(model.parameters()).device)
        with evaluating(model):
            readings = read_one(Run(model), batch)
        for i, reading in zip(rows, readings, strict=True):
            name = layer or list(reading.states)[-1]
            if name not in reading.states:
                raise ValueError(f"layer {name!r} is none of the model's, which are {', '.join(reading.states)}")
            found[i] = reading.states[name].double().mean(0).cpu().numpy()
    return np.stack([found[i] for i in range(len(texts))])
