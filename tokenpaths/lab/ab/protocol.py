"""The A/B test: the same items asked of every arm, compared in pairs, one verdict.

    report = ab_test(frozen(model), steered(model, trails), questions, tokenizer, read_answer=read, retention=tasks)
    report.verdict        # "better", "worse" or "cannot tell", by the rule at the head of `lab.ab.comparison`
    print(report)
    report.to_html("report.html")

Arms are asked last, after everything that may be refused and after retention.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tokenpaths.data.contamination import GRAM, Overlap, exact, shared_grams
from tokenpaths.data.items import Choice, Question, Task
from tokenpaths.data.splitting import SPLITS
from tokenpaths.engine.batches import shown
from tokenpaths.engine.readings import Run
from tokenpaths.lab.ab.arms import Arm
from tokenpaths.lab.ab.asking import Asking, Item, Score, as_question
from tokenpaths.lab.ab.comparison import Comparison
from tokenpaths.lab.ab.embedding import nearest
from tokenpaths.lab.ab.report import Answers, Report
from tokenpaths.lab.ab.retained import MARGINS, Margins, Retained, retained
from tokenpaths.lab.chains.form import last_word
from tokenpaths.stats.paired import Effect, effect, holm
from tokenpaths.stats.power import foresee
from tokenpaths.stats.sequential import always_valid, evidence
from tokenpaths.stats.verdicts import LEAST_ITEMS
from tokenpaths.undo import tidy

BETS, MIXTURE = "bets on won items, valid at all looks", "an always-valid mixture interval"


@tidy
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
    splits: int = SPLITS,
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
        examples: questions, answered greedily, or choices, answered by the largest summed log-likelihood.
        tokenizer: of the models; not needed if functions answer.
        read_answer: reads the answer from what was written, and from the right answer; equal ones are right.
        score: instead of `read_answer`, one number for what was written behind a question, larger is better.
        retention: tasks that an arm should do as well as `a`, within `margins`.
        reference: the arm that KL is measured to; `a` if none is given.
        margins: how much may be lost, in nats a token, share of right choices, and nats a token of KL.
        splits: the number of places at which texts of `retention` without a prompt are split into prompt and answer,
            for all arms alike (`data.splitting`).
        training: prompts of training, to search for those of the examples.
        stop_early: look at the outcomes after every `look_every` items, in random order, and stop when they tell. For
            right or wrong outcomes and one seed an arm; p and intervals hold at all looks together, and are wider.
        look_every: items between two looks.
        alpha: the chance of calling equal tasks different, over all arms together.
        power: the probability with which "would tell" tells.
        stop_strings: a string that ends an answer; what comes after it is cut.
        max_new_tokens: the most tokens of an answer.
        batch_size: of generation.
        max_batch_tokens: the most tokens in one forward where likelihoods are read, padding included.
        seed: of the order of items, sign flips and resamples.
        progress: show bars.

    Returns:
        The report: `verdict`, `reasons`, every outcome; `print`, `to_html`, `to_json`, `plot`.

    Raises:
        ValueError: no examples, two arms or tasks of one name, a right answer that `read_answer` does not read, a score
            that is not finite, an arm that returns another number of texts, or a function where likelihoods are needed.
    """
    others = [b] if isinstance(b, Arm) else list(b)
    arms, reference, items = [a, *others], reference or a, list[Item](examples)
    _check(arms, items, tokenizer, read_answer, score, retention, reference)
    if not (0 < alpha < 1 and 0 < power < 1 and look_every > 0):
        raise ValueError(f"alpha={alpha} and power={power} must lie between 0 and 1, look_every={look_every} above 0")
    if stop_early:
        _check_early(arms, score)
        random.Random(seed).shuffle(items)
    questions = [as_question(item) for item in items]
    overlaps, searched = _search(reference, tokenizer, training, [question.prompt for question in questions])
    kept = retained(
        a, others, reference, retention, tokenizer,
        margins=margins, alpha=alpha, splits=splits, max_batch_tokens=max_batch_tokens, seed=seed, progress=progress,
    )  # fmt: skip
    asking = Asking(tokenizer, read_answer, score, stop_strings, max_new_tokens, batch_size, max_batch_tokens)
    answers, most = _ask(arms, items, asking, look_every if stop_early else None, alpha, progress)
    count = len(answers[0].scores[0])
    moved = {
        arm.name: asking.moved(a, arm, items[:count], mine.written)
        for arm, mine in zip(others, answers[1:], strict=True)
    }
    overlaps = tuple(overlap for overlap in overlaps if overlap.test < count)
    return Report(
        a=a.name,
        comparisons=_compare(answers, kept, overlaps, most, moved, alpha, power, seed),
        asked=tuple(questions[:count]),
        of=len(items),
        answers=answers,
        alpha=alpha,
        overlaps=overlaps,
        searched=searched,
    )


def _ask(
    arms: Sequence[Arm], items: Sequence[Item], asking: Asking, look_every: int | None, alpha: float, progress: bool
) -> tuple[tuple[Answers, ...], dict[str, float]]:
    """What every arm answers, arm a first; and the largest evidence of each other arm, if the test may stop early."""
    texts: list[list[list[str]]] = [[[] for _ in arm.seeds] for arm in arms]
    scores: list[list[list[float]]] = [[[] for _ in arm.seeds] for arm in arms]
    most = {arm.name: 1.0 for arm in arms[1:]} if look_every else {}
    step = look_every or len(items)
    for start in shown(range(0, len(items), step), "asking", progress):
        for arm, of_texts, of_scores in zip(arms, texts, scores, strict=True):
            for one, written, scored in zip(arm.seeds, of_texts, of_scores, strict=True):
                more = asking.ask(one, items[start : start + step])
                written += more[0]
                scored += more[1]
        if look_every:
            for arm, (scored,) in zip(arms[1:], scores[1:], strict=True):
                change = np.subtract(scored, scores[0][0])
                now = evidence(int((change > 0).sum()), int((change < 0).sum()))
                most[arm.name] = max(most[arm.name], now)
            if len(scores[0][0]) >= LEAST_ITEMS and max(holm([1 / found for found in most.values()])) <= alpha:
                break
    answers = (
        Answers(arm.name, tuple(map(tuple, scored)), tuple(map(tuple, written)))
        for arm, scored, written in zip(arms, scores, texts, strict=True)
    )
    return tuple(answers), most


def _compare(
    answers: Sequence[Answers],
    kept: dict[str, tuple[Retained, ...]],
    overlaps: Sequence[Overlap],
    most: dict[str, float],
    moved: dict[str, float],
    alpha: float,
    power: float,
    seed: int,
) -> tuple[Comparison, ...]:
    """Each arm against arm a: effect, power and what was retained."""
    a, *others = answers
    seen = sorted({overlap.test for overlap in overlaps if overlap.kind != "embedding"})
    some = 0 < len(seen) < len(a.scores[0])

    def compare(arm: Answers, without: Sequence[int] = ()) -> Effect:
        x, y = (np.delete(np.array(each.scores), without, axis=1) for each in (a, arm))
        return effect(x, y, confidence=1 - alpha, seed=seed)

    found = [compare(arm) for arm in others]
    foreseen = [foresee(each, alpha=alpha / len(others), target=power) for each in found]
    if most:
        found = [_always_valid(each, most[arm.arm]) for arm, each in zip(others, found, strict=True)]
    adjusted = holm([each.p for each in found])
    return tuple(
        Comparison(
            arm=arm.arm,
            effect=found[i],
            adjusted=adjusted[i],
            alpha=alpha,
            power=foreseen[i],
            retained=kept[arm.arm],
            clean=compare(arm, seen) if some and not most else None,
            evidence=most.get(arm.arm),
            moved=moved[arm.arm],
        )
        for i, arm in enumerate(others)
    )


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


def _check(
    arms: Sequence[Arm],
    examples: Sequence[Item],
    tokenizer: Any,
    read_answer: Callable[[str], Any],
    score: Score | None,
    retention: Sequence[Task],
    reference: Arm,
) -> None:
    """What `ab_test` refuses before anybody is asked."""
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
        models += [run for arm in (*arms, reference) for run in arm.runs]  # raises for functions
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
