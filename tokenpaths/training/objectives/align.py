"""Confidence alignment: chains that end in the right answer shall be likelier than those that do not.

    sampled = sample_chains(model, questions, tokenizer, 6, read_answer=read, max_new_tokens=64)
    right = [chain for attempts in sampled.questions for chain in attempts.right]
    goals = [Imitate(right), Align(sampled.mixed, batch_size=2), Stay(encode_texts(texts, tokenizer))]

After Alignment Fine-Tuning (AFT), Wang et al. 2023, arXiv 2309.02144. `Align` alone teaches to rank, not to write:
`Imitate` on right chains is part of the recipe and keeps the quality of answers, `Stay` keeps the rest of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenpaths.attachment.runs import evaluating
from tokenpaths.checking import as_number, as_whole, check_list
from tokenpaths.data.encoding import encode_texts
from tokenpaths.data.examples import IGNORED, Batch, Example, check_examples, collate
from tokenpaths.data.items import Question
from tokenpaths.engine.forwards import answer_logits
from tokenpaths.engine.generate import generate
from tokenpaths.engine.logits import cross_entropy
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.training.objectives.base import Objective, tokens_of
from tokenpaths.undo import tidy

Constraint: TypeAlias = Literal["none", "detached", "boundary"]


@dataclass(frozen=True, init=False)
class Attempts(Example):
    """The chains of one question: examples of the same prompt that came to the right answer, or to a wrong one.

    It is one example of `Align`, so that all chains of a question stand in one batch. As an `Example`, with its length
    and tokens, it is the longest of the chains.

    Args:
        right: the chains with the right answer.
        wrong: the others.

    Raises:
        ValueError: there is no chain, a chain has no answer or another prompt than the first, or a chain comes twice.
    """

    right: tuple[Example, ...]
    wrong: tuple[Example, ...]

    def __init__(self, right: Sequence[Example], wrong: Sequence[Example]) -> None:
        for side in (right, wrong):
            check_examples("Attempts", side)
        chains = (*right, *wrong)
        if not chains:
            raise ValueError("Attempts needs at least one chain, right or wrong")
        for number, chain in enumerate(chains):
            if not any(chain.answer):
                raise ValueError(f"Attempts: chain {number} (right ones first) has no answer, so it has no score")
            if chain.ids[: chain.prompt_length] != chains[0].ids[: chains[0].prompt_length]:
                raise ValueError(f"Attempts: chain {number} (right ones first) has another prompt than the first")
            if chain.ids in (earlier.ids for earlier in chains[:number]):
                raise ValueError(f"Attempts: chain {number} (right ones first) is there twice: leave it out")
        longest = max(chains, key=len)
        super().__init__(longest.ids, longest.answer, longest.spans)
        object.__setattr__(self, "right", tuple(right))
        object.__setattr__(self, "wrong", tuple(wrong))


@dataclass
class Align(Objective):
    """The mean of `alignment_loss` over questions, of scores s(c) = 1/|c| sum_j log p(c_j | q, c_<j), in float32.

    A step runs all chains of `batch_size` questions in one forward: give a small `batch_size` here.

    Args:
        examples: an `Attempts` for each question, with right and wrong chains: `sampled.mixed`.
        constraint: what keeps wrong chains from being pushed down without end, see `alignment_loss`.
        margin: the depth of the boundary, in nats a token.

    Raises:
        ValueError: an example is no `Attempts`, or lacks right or wrong chains, a question comes twice, the margin is
            not above 0, or the constraint is not one of the three.
    """

    constraint: Constraint = "boundary"
    margin: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.constraint, self.margin)
        self._known: dict[tuple[int, ...], Attempts] = {}
        for number, example in enumerate(self.examples):
            if not isinstance(example, Attempts):
                raise ValueError(f"Align: example {number} is no Attempts(right, wrong), but {type(example).__name__}")
            if not (example.right and example.wrong):
                raise ValueError(
                    f"Align: question {number} has {len(example.right)} right and {len(example.wrong)} wrong chains, "
                    "but there is nothing to compare without both: take `sampled.mixed`"
                )
            if example.ids in self._known:
                raise ValueError(f"Align: question {number} stands twice: put its chains into one Attempts")
            self._known[example.ids] = example

    def loss(self, model: nn.Module, trails: Adapter, batch: Batch) -> Float[Tensor, ""]:
        questions = [self._known[ids] for ids in tokens_of(batch)]
        scored = _score(model, questions, batch)
        losses = [alignment_loss(right, wrong, self.constraint, self.margin) for right, wrong in scored]
        return torch.stack(losses).mean()


def alignment_loss(
    right: Float[Tensor, " p"], wrong: Float[Tensor, " n"], constraint: Constraint = "boundary", margin: float = 0.1
) -> Float[Tensor, ""]:
    """The loss of one question, from the scores s_p of its right chains and s_n of its wrong ones.

        none        log(1 + sum_p sum_n exp(s_n - s_p))
        detached    the same with s_n held fixed: right chains are raised, wrong ones left alone
        boundary    log(1 + sum_p sum_n [exp(s_n - s_p) + exp(T_p - s_n)]),  T_p = 2 (min_p s_p - margin) - s_p

    With T, the gradient by s_n is proportional to (sum_p exp(-s_p)) (exp(s_n) - exp(2 b - s_n)), b = min_p s_p -
    margin: a wrong chain is pushed down above b, up below b, and not at all at b. T is held fixed, so that right chains
    are only ever raised. With a gradient through T, the loss of one pair would be log(1 + 2 exp(-margin)
    cosh(s_p - s_n - margin)), a function of the distance alone, and a right chain would be pushed *down* once the wrong
    one lies below b. Source: AFT (arXiv 2309.02144); the default of `margin`, in nats a token, is ours.

    Raises:
        ValueError: the margin is not above 0, or the constraint is not one of the three.
    """
    _check(constraint, margin)
    wide = torch.promote_types(right.dtype, torch.float32)
    s_p, s_n = right.to(wide)[:, None], wrong.to(wide)[None, :]
    terms = [(s_n.detach() if constraint == "detached" else s_n) - s_p]
    if constraint == "boundary":
        fixed = s_p.detach()
        terms.append(2 * (fixed.min() - margin) - fixed - s_n)
    return torch.logsumexp(torch.cat([s_p.new_zeros(1), *(term.flatten() for term in terms)]), 0)


def scores(model: nn.Module, batch: Batch) -> Float[Tensor, " batch"]:
    """The mean log-probability of the answer tokens of each row, in nats, in float32 at least."""
    logits, targets = answer_logits(model, batch)
    log_probs = -cross_entropy(logits, targets)
    lengths = (batch.labels[:, 1:] != IGNORED).sum(1).tolist()
    return torch.stack([row.mean() for row in log_probs.split(lengths)])


@tidy
@torch.no_grad()
def score_attempts(
    model: nn.Module, questions: Sequence[Attempts], batch_size: int = 4
) -> list[tuple[Float[Tensor, " p"], Float[Tensor, " n"]]]:
    """The scores of the right and of the wrong chains of each question, in nats a token.

    Args:
        model: the model, with what is attached to it. It is read in evaluation mode; attached trails keep their mode.
        questions: the chains of each question.
        batch_size: questions in one forward.
    """
    device = next(model.parameters()).device
    scored: list[tuple[Tensor, Tensor]] = []
    with evaluating(model):
        for start in range(0, len(questions), batch_size):
            chosen = questions[start : start + batch_size]
            scored += _score(model, chosen, collate(chosen).to(device))
    return scored


def assessment_accuracy(scored: Sequence[tuple[Tensor, Tensor]]) -> float:
    """A-accuracy, P(s_right > s_wrong): the share of ordered pairs of each question, its mean over questions.

    A tie is not right.

    Args:
        scored: the scores of right and of wrong chains of each question, from `score_attempts`.

    Raises:
        ValueError: there are no questions, or one has no pair to compare.
    """
    if not scored or any(not len(right) or not len(wrong) for right, wrong in scored):
        raise ValueError("A-accuracy compares right with wrong chains: give questions that have both, `sampled.mixed`")
    shares = [(right[:, None] > wrong[None, :]).double().mean() for right, wrong in scored]
    return float(torch.stack(shares).mean())


@dataclass(frozen=True)
class Sampled:
    """What `sample_chains` found.

    Args:
        questions: the different chains of each question, in order.
        unread: the number of chains that had no answer to read.
    """

    questions: tuple[Attempts, ...] = field(repr=False)
    unread: int

    @property
    def mixed(self) -> list[Attempts]:
        """The questions with right and wrong chains."""
        return [attempts for attempts in self.questions if attempts.right and attempts.wrong]

    @property
    def only_right(self) -> list[Attempts]:
        """The questions with right chains only."""
        return [attempts for attempts in self.questions if not attempts.wrong]

    @property
    def only_wrong(self) -> list[Attempts]:
        """The questions with wrong chains only."""
        return [attempts for attempts in self.questions if not attempts.right]

    def __str__(self) -> str:
        chains = sum(len(attempts.right) + len(attempts.wrong) for attempts in self.questions)
        return (
            f"{len(self.questions)} questions, {chains} different chains ({self.unread} without an answer): "
            f"{len(self.mixed)} questions with right and wrong ones, {len(self.only_right)} with right ones only, "
            f"{len(self.only_wrong)} with wrong ones only"
        )


@tidy
def sample_chains(
    model: Any,
    questions: Sequence[Question],
    tokenizer: Any,
    k: int,
    *,
    read_answer: Callable[[str], str | None],
    max_new_tokens: int,
    stop_strings: str | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 4,
    seed: int = 0,
) -> Sampled:
    """Let the model, with what is attached to it, write `k` chains a question, and split them by their final answers.

    A chain is right if `read_answer` reads the question's answer in it, and wrong otherwise, also where it reads none.
    Of chains with the same tokens one is kept. The same arguments give the same chains; torch's own random state is
    left alone.

    Args:
        model: a causal language model.
        questions: prompts and right answers, in the form in which `read_answer` gives an answer.
        tokenizer: the model's tokenizer; it puts its special tokens on a prompt, as in `encode`.
        k: chains a question.
        read_answer: reads the final answer of a chain's text (without special tokens), or None.
        max_new_tokens: the most tokens of a chain.
        stop_strings: a text that ends a chain, such as "." or a line break, besides the end-of-text token.
        temperature: p is proportional to p^(1 / temperature).
        top_p: the words drawn from are the likeliest, of this probability together.
        batch_size: questions in one batch, each with k chains.
        seed: of the drawing.

    Raises:
        ValueError: there are no questions, a prompt has no token, or a number is out of range.
    """
    for name, value in dict(k=k, max_new_tokens=max_new_tokens, batch_size=batch_size).items():
        as_whole(f"sample_chains: {name}", value)
    check_list("sample_chains: question", questions, Question, "give Question(prompt, answer)")
    if not questions:
        raise ValueError("sample_chains: there are no questions")
    prompts = encode_texts([question.prompt for question in questions], tokenizer)
    written = generate(
        model,
        [prompt for prompt in prompts for _ in range(k)],
        tokenizer,
        max_new_tokens=max_new_tokens,
        stop_strings=stop_strings,
        sample=True,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        batch_size=batch_size * k,
    )
    found: list[Attempts] = []
    unread = 0
    for i, (prompt, question) in enumerate(zip(prompts, questions, strict=True)):
        sides: dict[bool, list[Example]] = {True: [], False: []}
        for chain in dict.fromkeys(one.ids for one in written[i * k : (i + 1) * k]):
            read = read_answer(tokenizer.decode(list(chain), skip_special_tokens=True))
            unread += read is None
            sides[read == question.answer].append(Example.of(prompt.ids, chain))
        found.append(Attempts(sides[True], sides[False]))
    return Sampled(tuple(found), unread)


def _score(model: nn.Module, questions: Sequence[Attempts], batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """The scores of right and of wrong chains. `batch` says on which device, and which spans trails ask for."""
    chains = [chain for attempts in questions for chain in (*attempts.right, *attempts.wrong)]
    found = scores(model, collate(chains, spans=batch.spans).to(batch.input_ids.device))
    sizes = [size for attempts in questions for size in (len(attempts.right), len(attempts.wrong))]
    parts = found.split(sizes)
    return list(zip(parts[::2], parts[1::2], strict=True))


def _check(constraint: Constraint, margin: float) -> None:
    if constraint not in get_args(Constraint):
        raise ValueError(f"constraint must be 'none', 'detached' or 'boundary', not {constraint!r}")
    if not (math.isfinite(as_number("margin", margin)) and margin > 0):
        raise ValueError(f"margin={margin} must be a finite number above 0")
