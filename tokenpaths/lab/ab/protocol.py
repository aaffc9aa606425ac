"""The A/B test: the same items asked of every arm, compared in pairs, one verdict.

    report = ab_test(frozen(model), steered(model, trails), questions, tokenizer, read_answer=read, retention=tasks)
    report.verdict        # "better", "worse" or "cannot tell", by the rule at the head of `tokenpaths.ab.report`
    print(report)
    report.to_html("report.html")

Arms are asked last: what is refused is refused before that, and retention is measured.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from tqdm.auto import tqdm

from tokenpaths.data.contamination import GRAM, Overlap, exact, shared_grams
from tokenpaths.data.encoding import encode_texts
from tokenpaths.data.items import Choice, Task
from tokenpaths.engine.generate import generate
from tokenpaths.engine.likelihood import encode_choices, log_likelihoods, right
from tokenpaths.engine.readings import Run, evaluating
from tokenpaths.lab.ab.arms import Arm
from tokenpaths.lab.ab.embedding import nearest
from tokenpaths.lab.ab.report import Answers, Asked, Comparison, Report
from tokenpaths.lab.ab.retained import MARGINS, Margins, Retained, retained
from tokenpaths.lab.chains.form import last_word
from tokenpaths.stats.paired import Effect, effect, holm
from tokenpaths.stats.power import foresee
from tokenpaths.stats.sequential import always_valid, evidence


@dataclass(frozen=True)
class Question:
    """A prompt, and the right answer to what a model writes behind it."""

    prompt: str
    answer: str


Item: TypeAlias = "Question | Choice"
Score: TypeAlias = Callable[[str, Question], float]
BETS, MIXTURE = "bets on won items, valid at all looks", "an always-valid mixture interval"
Told: TypeAlias = "tuple[list[str], list[float]]"  # of some items, what one seed of an arm wrote and scored


def ab_test(
    a: Arm,
    b: Arm | Sequence[Arm],
    examples: Sequence[Question] | Sequence[Choice],
    tokenizer: Any = None,
    *,
    read_answer: Callable[[str], Any] = last_word,
    score: Score | None = None,
    retention: Sequence[Task] = (),
    reference: Arm | None = None,
    margins: Margins = MARGINS,
    training: Sequence[str] = (),
    stop_early: bool = False,
    look_every: int = 10,
    alpha: float = 0.05,
    power: float = 0.8,
    stop_strings: str | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    max_batch_tokens: int = 1500,
    seed: int = 0,
    progress: bool = False,
) -> Report:
    """Compare arm `b` (or several arms) with arm `a` on the same examples.

    Args:
        a: the arm to beat, say `frozen(model)`.
        b: the arm to judge, or several; an arm with several seeds is judged as a method.
        examples: questions to answer greedily, or choices, answered by the largest summed log-likelihood.
        tokenizer: of the models; not needed if functions answer.
        read_answer: reads the answer from what was written, and from the right answer; equal ones are right.
        score: instead of `read_answer`, one number for what was written behind a question, larger is better.
        retention: tasks that an arm should do as well as `a`, within `margins`.
        reference: the arm that KL is measured to; `a` if none is given.
        margins: how much may be lost, in nats a token, share of right choices, and nats a token of KL.
        training: prompts of training, to search for those of the examples.
        stop_early: look at the outcomes after every `look_every` items, in random order, and stop when they tell. For
            right or wrong outcomes and one seed an arm; p and intervals hold at all looks together, and are wider.
        look_every: items between two looks.
        alpha: the chance of calling equal tasks different, over all arms together.
        power: the probability with which "would tell" tells.
        stop_strings: a string that ends an answer; what comes after it is cut.
        max_new_tokens: room for an answer.
        batch_size: of generation.
        max_batch_tokens: the most tokens in one forward where likelihoods are read.
        seed: of the order of items, sign flips and resamples.
        progress: show bars.

    Raises:
        ValueError: no examples, two arms or tasks of one name, a right answer that `read_answer` does not read, a score
            that is not finite, an arm that returns another number of texts, or a function where likelihoods are needed.
    """
    others = [b] if isinstance(b, Arm) else list(b)
    arms = [a, *others]
    reference = reference or a
    _check(arms, examples, tokenizer, read_answer, score, retention, reference)
    if not (0 < alpha < 1 and 0 < power < 1 and look_every > 0):
        raise ValueError(f"alpha={alpha} and power={power} must lie between 0 and 1, look_every={look_every} above 0")
    items: list[Item] = list(examples)
    if stop_early:
        _check_early(arms, score)
        random.Random(seed).shuffle(items)

    overlaps, searched = _search(reference, tokenizer, training, [_prompt(item) for item in items])
    kept = retained(
        a, others, reference, retention, tokenizer,
        margins=margins, alpha=alpha, max_batch_tokens=max_batch_tokens, seed=seed, progress=progress,
    )  # fmt: skip

    def answer(one: Any, asked: Sequence[Item]) -> Told:
        questions = [item for item in asked if isinstance(item, Question)]
        if not questions:
            return _choose(one, tokenizer, [item for item in asked if isinstance(item, Choice)], max_batch_tokens)
        prompts = [question.prompt for question in questions]
        if isinstance(one, Run):
            with one.reading() as model:
                written = generate(
                    model, encode_texts(prompts, tokenizer), tokenizer, max_new_tokens=max_new_tokens,
                    stop_strings=stop_strings, batch_size=batch_size,
                )  # fmt: skip
            texts = [each.text for each in written]
        else:
            texts = list(one(prompts))
        return texts, _scores(texts, questions, read_answer, score)

    step = look_every if stop_early else len(items)
    told: dict[str, list[Told]] = {arm.name: [([], []) for _ in arm.seeds] for arm in arms}
    most = {arm.name: 1.0 for arm in others}  # the largest evidence until now
    count = 0
    for asked in tqdm([items[i : i + step] for i in range(0, len(items), step)], "asking", disable=not progress):
        count += len(asked)
        for arm in arms:
            for one, (texts, scores) in zip(arm.seeds, told[arm.name], strict=True):
                new_texts, new_scores = answer(one, asked)
                texts += new_texts
                scores += new_scores
        if stop_early:
            for arm in others:
                most[arm.name] = max(most[arm.name], _evidence(told[a.name], told[arm.name]))
            if max(holm([1 / found for found in most.values()])) <= alpha:
                break
    answers = tuple(
        Answers(arm.name, tuple(tuple(s) for _, s in told[arm.name]), tuple(tuple(t) for t, _ in told[arm.name]))
        for arm in arms
    )
    overlaps = tuple(overlap for overlap in overlaps if overlap.test < count)
    return Report(
        a=a.name,
        comparisons=_compare(answers, kept, overlaps, most if stop_early else {}, alpha, power, seed),
        asked=tuple(Asked(_prompt(item), _right_answer(item)) for item in items[:count]),
        of=len(items),
        answers=answers,
        alpha=alpha,
        overlaps=overlaps,
        searched=searched,
    )


def _compare(
    answers: Sequence[Answers],
    kept: dict[str, tuple[Retained, ...]],
    overlaps: Sequence[Overlap],
    most: dict[str, float],
    alpha: float,
    power: float,
    seed: int,
) -> tuple[Comparison, ...]:
    a, *others = (np.array(arm.scores) for arm in answers)
    names = [arm.arm for arm in answers[1:]]
    seen = sorted({overlap.test for overlap in overlaps if overlap.kind != "embedding"})

    def compare(scores: np.ndarray, without: Sequence[int] = ()) -> Effect:
        rest = [np.delete(arm, without, axis=1) for arm in (a, scores)]
        return effect(*rest, confidence=1 - alpha, seed=seed)

    effects = [compare(scores) for scores in others]
    foreseen = [foresee(found, alpha=alpha / len(others), target=power) for found in effects]
    if most:
        effects = [_always_valid(found, most[name]) for name, found in zip(names, effects, strict=True)]
    adjusted = holm([found.p for found in effects])
    some = 0 < len(seen) < a.shape[1]
    return tuple(
        Comparison(
            arm=name,
            effect=effects[i],
            adjusted=adjusted[i],
            alpha=alpha,
            power=foreseen[i],
            retained=kept[name],
            clean=compare(others[i], seen) if some and not most else None,
            evidence=most.get(name),
        )
        for i, name in enumerate(names)
    )


def _evidence(a: list[Told], b: list[Told]) -> float:
    change = np.array(b[0][1]) - np.array(a[0][1])
    return evidence(int((change > 0).sum()), int((change < 0).sum()))


def _always_valid(found: Effect, most: float) -> Effect:
    """The same effect, with a p-value and an interval that hold at all looks together."""
    interval = always_valid(found.wins, found.losses, found.items, found.confidence)
    value = (found.wins - found.losses) / found.items  # tied choices, worth 1 / k, are won or lost
    return replace(found, value=value, p=min(1.0, 1 / most), interval=interval, test=BETS, method=MIXTURE)


def _search(
    reference: Arm, tokenizer: Any, training: Sequence[str], prompts: Sequence[str]
) -> tuple[tuple[Overlap, ...], tuple[str, ...]]:
    """Test prompts in training, and the nearest pairs by embedding where the reference is a model."""
    if not training:
        return (), ()
    found = [*exact(training, prompts), *shared_grams(training, prompts)]
    searched = ["exact match", f"{GRAM}-grams of words"]
    if all(isinstance(one, Run) for one in reference.seeds):
        found += nearest(reference.runs[0], training, prompts, tokenizer)
        searched.append("mean hidden states of the reference")
    return tuple(found), tuple(searched)


@torch.no_grad()
def _choose(run: Run, tokenizer: Any, items: Sequence[Choice], max_batch_tokens: int) -> Told:
    with run.inside(), evaluating(run.model):
        likely = log_likelihoods(run.model, encode_choices(items, tokenizer), max_batch_tokens)
    chosen = [item.options[int(row.argmax())] for item, row in zip(items, likely, strict=True)]
    return chosen, right(likely, items).tolist()


def _scores(
    texts: Sequence[str], questions: Sequence[Question], read_answer: Callable[[str], Any], score: Score | None
) -> list[float]:
    if len(texts) != len(questions):
        raise ValueError(
            f"an arm returned {len(texts)} texts for {len(questions)} prompts: it must return one for each"
        )
    pairs = zip(texts, questions, strict=True)
    if score is None:
        return [float(read_answer(text) == read_answer(question.answer)) for text, question in pairs]
    found = [float(score(text, question)) for text, question in pairs]
    if strange := [number for number, value in enumerate(found) if not np.isfinite(value)]:
        raise ValueError(f"score gave {found[strange[0]]} for {texts[strange[0]]!r:.40}: give a finite number")
    return found


def _prompt(item: Item) -> str:
    return item.prompt or (item.options[item.right] if isinstance(item, Choice) else "")


def _right_answer(item: Item) -> str:
    return item.answer if isinstance(item, Question) else item.options[item.right]


def _check(
    arms: Sequence[Arm],
    examples: Sequence[Item],
    tokenizer: Any,
    read_answer: Callable[[str], Any],
    score: Score | None,
    retention: Sequence[Task],
    reference: Arm,
) -> None:
    """Refuse before anybody is asked."""
    if len(arms) < 2:
        raise ValueError("there is no arm to compare with a: give b an arm, or a list of arms")
    for kind, names in (("arms", [arm.name for arm in arms]), ("tasks", [task.name for task in retention])):
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"two {kind} go by the name {twice[0]!r}: the report could not tell them apart")
    if not examples:
        raise ValueError("there are no examples: give a list of Question(prompt, answer) or of Choice")
    if len({type(item) for item in examples}) > 1:
        raise ValueError("examples must be all Question or all Choice: test each kind on its own")
    choices = isinstance(examples[0], Choice)
    models = [one for arm in arms for one in arm.seeds if isinstance(one, Run)]
    if choices or retention:
        models += [run for arm in (*arms, reference) for run in arm.runs]  # refuses functions
    if models and tokenizer is None:
        raise ValueError("an arm is a model, which needs its tokenizer: ab_test(a, b, examples, tokenizer)")
    if retention and len(reference.runs) > 1:
        raise ValueError(
            f"KL is measured to one run, but {reference.name!r} has {len(reference.runs)} seeds: give reference="
        )
    for number, item in enumerate(examples):
        if isinstance(item, Question) and not item.prompt:
            raise ValueError(f"example {number} has an empty prompt")
        if isinstance(item, Question) and score is None and read_answer(item.answer) is None:
            raise ValueError(f"example {number}: read_answer finds no answer in {item.answer!r:.40}")


def _check_early(arms: Sequence[Arm], score: Score | None) -> None:
    if score is not None or any(len(arm.seeds) > 1 for arm in arms):
        raise ValueError("stop_early is for right or wrong outcomes and one seed an arm: leave out score and seeds")
