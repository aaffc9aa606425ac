"""Confidence alignment: losses by their formulas in float64, gradients where they must vanish, chains kept together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import DIM, assert_equal, assert_slopes, llama, make_tokenizer, make_trails, state
from torch import Tensor, nn

import tokenpaths as tp
from tokenpaths import Example, Imitate, steps
from tokenpaths.data import Question, collate
from tokenpaths.training import Align, Attempts, Step, assessment_accuracy, sample_chains, score_attempts
from tokenpaths.training.objectives.align import alignment_loss, scores

Watch = Callable[[nn.Module], nn.Module]
SOME = settings(max_examples=40)
SCORES = st.lists(st.floats(-8, 0), min_size=1, max_size=4)


def chain(prompt: Sequence[int], answer: Sequence[int]) -> Example:
    return Example((*prompt, *answer), (False,) * len(prompt) + (True,) * len(answer))


def make_questions(count: int = 6, seed: int = 0) -> list[Attempts]:
    """Questions of 2 to 5 tokens with one to three right and one or two wrong chains of 1 to 4 tokens."""
    generator = torch.Generator().manual_seed(seed)
    made: list[Attempts] = []
    for i in range(count):
        prompt = [3 + i, *torch.randint(3, 90, (1 + i % 4,), generator=generator).tolist()]
        chains = [
            chain(prompt, [10 + j, *torch.randint(3, 90, ((i + j) % 4,), generator=generator).tolist()])
            for j in range(2 + i % 3 + 1)
        ]
        made.append(Attempts(chains[: 1 + i % 3], chains[1 + i % 3 :]))
    return made


def train(model: nn.Module, trails: tp.TrailMap, goals: list[Any], **options: Any) -> list[Step]:
    return list(steps(model, trails, goals, **{"steps": 6, "lr": 1e-2, "progress": False, **options}))


# --- the loss of one question -----------------------------------------------------------------------------------------


def by_hand(right: list[float], wrong: list[float], constraint: str, margin: float) -> float:
    """1 + a sum over pairs, as written."""
    boundary = min(right) - margin
    total = 1.0
    for s_p in right:
        for s_n in wrong:
            total += math.exp(s_n - s_p)
            if constraint == "boundary":
                total += math.exp(2 * boundary - s_p - s_n)
    return math.log(total)


@SOME
@given(SCORES, SCORES, st.sampled_from(["none", "detached", "boundary"]), st.floats(0.01, 2))
def test_losses_are_those_of_the_formula(
    right: list[float], wrong: list[float], constraint: Any, margin: float
) -> None:
    found = alignment_loss(torch.tensor(right).double(), torch.tensor(wrong).double(), constraint, margin)
    assert float(found) == pytest.approx(by_hand(right, wrong, constraint, margin), rel=1e-6)


@SOME
@given(SCORES, SCORES, st.sampled_from(["none", "detached", "boundary"]), st.floats(0.01, 2))
def test_gradients_are_those_of_the_formula(
    right: list[float], wrong: list[float], constraint: Any, margin: float
) -> None:
    """By hand: T and what is detached are constants."""
    p, n = (torch.tensor(x).double().requires_grad_() for x in (right, wrong))
    by_p, by_n = torch.autograd.grad(alignment_loss(p, n, constraint, margin), (p, n), materialize_grads=True)
    z = math.exp(by_hand(right, wrong, constraint, margin))
    b = min(right) - margin
    for i, s_p in enumerate(right):
        assert float(by_p[i]) == pytest.approx(-sum(math.exp(s_n - s_p) for s_n in wrong) / z, rel=1e-6, abs=1e-12)
    for j, s_n in enumerate(wrong):
        pull = math.exp(s_n) - (math.exp(2 * b - s_n) if constraint == "boundary" else 0)
        expected = 0 if constraint == "detached" else sum(math.exp(-s_p) for s_p in right) * pull / z
        assert float(by_n[j]) == pytest.approx(expected, rel=1e-6, abs=1e-6 if constraint == "boundary" else 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_boundary_is_where_a_wrong_chain_is_let_be(dtype: torch.dtype) -> None:
    right = torch.tensor([-0.75, -1.0, -0.25], dtype=dtype)
    wrong = torch.tensor([-1.5, -1.75, -1.25], dtype=dtype, requires_grad=True)  # at, below and above -1 - 0.5
    alignment_loss(right, wrong, "boundary", 0.5).backward()
    assert wrong.grad is not None
    at, below, above = wrong.grad.tolist()
    assert at == 0.0  # exactly
    assert below < -1e-3
    assert above > 1e-3


@SOME
@given(SCORES, SCORES, st.floats(0.01, 2))
def test_the_sign_of_the_boundary_and_right_chains_are_only_raised(
    right: list[float], wrong: list[float], margin: float
) -> None:
    p, n = (torch.tensor(x).double().requires_grad_() for x in (right, wrong))
    assume(all(abs(s - (min(right) - margin)) > 1e-3 for s in wrong))
    alignment_loss(p, n, "boundary", margin).backward()
    assert p.grad is not None and n.grad is not None
    assert (n.grad.sign() == (n.detach() - (min(right) - margin)).sign()).all()
    assert (p.grad <= 0).all()


@pytest.mark.parametrize("constraint", ["none", "detached", "boundary"])
def test_scores_far_apart_do_not_overflow(constraint: Any) -> None:
    right = torch.tensor([-2000.0, -1.0], requires_grad=True)
    found = alignment_loss(right, torch.tensor([-1.0, -3000.0]), constraint)
    found.backward()
    assert found.isfinite() and right.grad is not None and right.grad.isfinite().all()


def test_half_precision_scores_are_compared_in_float32() -> None:
    scores = torch.tensor([-1.0], dtype=torch.bfloat16), torch.tensor([-1.0078125], dtype=torch.bfloat16)
    found = alignment_loss(*scores, "none")
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(math.log(1 + math.exp(-0.0078125)), rel=1e-6)


# --- the objective ----------------------------------------------------------------------------------------------------


def score_by_hand(model: Any, example: Example) -> float:
    """The mean log-probability of an answer, alone in its batch, in float64."""
    given = example.prompt_length
    ids = torch.tensor([example.ids])
    with torch.no_grad():
        prompt_mask = torch.arange(len(example))[None] < given
        logits = model(ids, prompt_mask=prompt_mask).logits[0].double().log_softmax(-1)
    return float(torch.stack([logits[t - 1, example.ids[t]] for t in range(given, len(example))]).mean())


@pytest.mark.parametrize("side", ["right", "left"])
def test_scores_are_mean_log_probabilities(side: Any, watch: Watch) -> None:
    model, trails = watch(llama()), make_trails()
    chains = [c for q in make_questions() for c in (*q.right, *q.wrong)]
    with tp.attach(model, trails):
        found = scores(model, collate(chains, side=side)).tolist()
        assert found == pytest.approx([score_by_hand(model, c) for c in chains], rel=1e-5)


@pytest.mark.parametrize("constraint", ["none", "detached", "boundary"])
def test_the_loss_is_the_mean_over_questions(constraint: Any, watch: Watch) -> None:
    model, trails, questions = watch(llama()), make_trails(), make_questions()
    goal = Align(questions, constraint=constraint, margin=0.3)
    with tp.attach(model, trails):
        found = goal.loss(model, trails, collate(questions[1:4])).detach()
        expected = [
            by_hand(*([score_by_hand(model, c) for c in side] for side in (q.right, q.wrong)), constraint, 0.3)
            for q in questions[1:4]
        ]
    assert float(found) == pytest.approx(sum(expected) / 3, rel=1e-5)


def test_gradients_of_the_trails_agree_with_finite_differences(unchecked: None) -> None:
    # a mean over chains and pairs of a whole model; its RMSNorm rounds to float32, hence the wide steps
    model, questions = llama().double(), make_questions(3)
    torch.manual_seed(0)
    trails = tp.TrailMap({tp.Site(1): tp.DiReFT(DIM, 2, init="paper")}).double()
    goal = Align(questions, constraint="none")
    assert_slopes(model, trails, goal, questions)


def test_how_questions_are_split_changes_nothing() -> None:
    trained: list[dict[str, Tensor]] = []
    for shape in (dict(batch_size=4), dict(batch_size=1, accumulate=4)):
        trails = make_trails()
        train(llama(), trails, [Align(make_questions(8))], steps=2, **shape)
        trained.append(state(trails))
    assert_equal(*trained, 1e-5)


def test_a_resumed_run_ends_where_a_whole_one_does(tmp_path: Path) -> None:
    questions, trained = make_questions(), list[dict[str, Tensor]]()
    goal = Align(questions, batch_size=2)
    for folder, stops in (("whole", False), ("stopped", True)):
        options = dict(steps=4, checkpoint=tmp_path / folder, save_every=2, lr=1e-2, progress=False)
        trails = make_trails()
        if stops:
            for step in steps(llama(), trails, [goal], **options):  # type: ignore[arg-type]
                if step.step == 3:
                    break
        trails = make_trails()
        assert len(train(llama(), trails, [goal], resume=stops, **options)) == (2 if stops else 4)
        trained.append(state(trails))
    assert_equal(*trained)


def test_spans_that_trails_ask_for_reach_the_chains(watch: Watch) -> None:
    model, trails = watch(llama()), tp.TrailMap({tp.Site(1, tp.Span("cue")): tp.Additive(DIM)})
    questions = [
        Attempts(
            [Example(c.ids, c.answer, {"cue": (0, 1)}) for c in q.right],
            [Example(c.ids, c.answer, {"cue": (1, 2)}) for c in q.wrong],
        )
        for q in make_questions(4)
    ]
    done = train(model, trails, [Align(questions, constraint="none")], steps=8, batch_size=2, lr=0.1)
    assert done[-1].losses[0] < done[0].losses[0]


@pytest.mark.slow
def test_training_raises_a_accuracy_and_constraints_keep_wrong_chains(watch: Watch) -> None:
    """Unconstrained, wrong chains are pushed down without end; with either constraint they are not."""
    model, questions = watch(llama()), make_questions(4)
    before = score_attempts(model, questions)
    mean: dict[str, float] = {"before": float(torch.cat([wrong for _, wrong in before]).mean())}
    for constraint in ("none", "detached", "boundary"):
        torch.manual_seed(0)
        trails = tp.TrailMap({tp.Site(0): tp.DiReFT(DIM, 4), tp.Site(2): tp.DiReFT(DIM, 4)})
        goal: Any = Align(questions, constraint=constraint, margin=0.5, batch_size=4)
        train(model, trails, [goal], steps=16, lr=7e-2)
        with tp.attach(model, trails):
            after = score_attempts(model, questions)
        assert assessment_accuracy(after) > assessment_accuracy(before)
        assert assessment_accuracy(after) > 0.9
        mean[constraint] = float(torch.cat([wrong for _, wrong in after]).mean())
        if constraint == "boundary":
            depth = [float(right.min() - wrong.min()) for right, wrong in after]
            assert max(depth) < 3  # wrong chains lie about the margin below the worst right one
    assert mean["none"] < min(mean["boundary"], mean["detached"]) - 2


def test_with_imitation_and_a_stay_it_is_the_whole_recipe(watch: Watch) -> None:
    questions = make_questions(6)
    right = [c for q in questions for c in q.right]
    texts = [Example(c.ids, (False,) * len(c)) for c in right]
    goals = [Imitate(right), Align(questions, batch_size=2), tp.Stay(texts, batch_size=2)]
    done = train(watch(llama()), make_trails(), goals, batch_size=4, steps=3)
    assert len(done[-1].losses) == 3


# --- A-accuracy -------------------------------------------------------------------------------------------------------


def test_a_accuracy_is_the_share_of_ordered_pairs_of_each_question() -> None:
    scored = [
        (torch.tensor([-1.0, -3.0]), torch.tensor([-2.0])),  # one of two pairs
        (torch.tensor([-1.0]), torch.tensor([-2.0, -1.0, -3.0, -9.0])),  # three of four: a tie is not right
    ]
    assert assessment_accuracy(scored) == pytest.approx((1 / 2 + 3 / 4) / 2)
    with pytest.raises(ValueError, match="questions that have both"):
        assessment_accuracy([*scored, (torch.tensor([-1.0]), torch.tensor([]))])


def test_scores_of_questions_do_not_depend_on_the_batch(watch: Watch) -> None:
    model, questions = watch(llama()), make_questions()
    one, all_ = score_attempts(model, questions, 1), score_attempts(model, questions, 6)
    for (r1, w1), (r2, w2) in zip(one, all_, strict=True):
        assert torch.allclose(r1, r2, atol=1e-5) and torch.allclose(w1, w2, atol=1e-5)
        assert not r1.requires_grad


# --- sampling ---------------------------------------------------------------------------------------------------------

QUESTIONS = [Question(prompt, "x") for prompt in ("ab", "c", "hello", "q")]


def first_letter_is_low(text: str) -> str | None:
    return None if not text else "x" if ord(text[0]) % 2 else "y"


def sample(model: Any, **options: Any) -> Any:
    tokenizer = make_tokenizer()
    options = {"read_answer": first_letter_is_low, "max_new_tokens": 6, **options}
    return sample_chains(model, QUESTIONS, tokenizer, options.pop("k", 5), **options)


def test_chains_are_split_by_their_answers_and_all_is_reported(watch: Watch) -> None:
    tokenizer = make_tokenizer()
    model = watch(llama(len(tokenizer)))
    found = sample(model)
    assert len(found.questions) == len(QUESTIONS)
    unread = 0
    for question, attempts in zip(QUESTIONS, found.questions, strict=True):
        for side, is_right in ((attempts.right, True), (attempts.wrong, False)):
            for c in side:
                given = c.prompt_length
                assert tokenizer.decode(c.ids[:given]) == question.prompt
                assert len(c) - given <= 6
                read = first_letter_is_low(tokenizer.decode(c.ids[given:], skip_special_tokens=True))
                unread += read is None
                assert (read == "x") == is_right
    assert unread <= found.unread
    assert len(found.mixed) + len(found.only_right) + len(found.only_wrong) == len(QUESTIONS)
    assert found.mixed  # otherwise nothing was tested
    assert f"{len(found.only_wrong)} with wrong ones only" in str(found)
    train(model, make_trails_for(model), [Align(found.mixed, batch_size=1)], steps=1)


def make_trails_for(model: Any) -> tp.TrailMap:
    return tp.TrailMap({tp.Site(1): tp.Additive(tp.width(model))})


def test_one_sided_questions_are_kept_apart_and_refused_by_align() -> None:
    model = llama(len(make_tokenizer()))
    found = sample(model, read_answer=lambda text: "x")
    assert (found.mixed, len(found.only_right)) == ([], len(QUESTIONS))
    with pytest.raises(ValueError, match=r"question 0 has \d right and 0 wrong chains"):
        Align(found.questions)
    found = sample(model, read_answer=lambda text: None)
    assert len(found.only_wrong) == len(QUESTIONS)
    assert found.unread == sum(len(q.wrong) for q in found.questions)


def test_sampling_follows_from_its_seed_and_leaves_torchs_state_alone() -> None:
    model = llama(len(make_tokenizer()))
    torch.manual_seed(7)
    first = sample(model, seed=3)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), drawn)
    assert sample(model, seed=3).questions == first.questions
    assert sample(model, seed=4).questions != first.questions


def test_a_sharp_model_gives_each_chain_once() -> None:
    found = sample(llama(len(make_tokenizer())), temperature=1e-3)
    assert [len(q.right) + len(q.wrong) for q in found.questions] == [1] * len(QUESTIONS)


def test_chains_end_at_the_end_of_text_and_at_the_given_text() -> None:
    tokenizer = make_tokenizer()
    model = llama(len(tokenizer))
    loud = tokenizer.convert_tokens_to_ids("e")
    with torch.no_grad():  # "e" is likely at every place
        model.lm_head.weight[loud] = 0.0
        model.lm_head.weight[2] = 0.0
        model.lm_head.weight.mul_(0.05)
    found = sample(model, k=12, stop_strings="e", max_new_tokens=100)
    ended: set[int] = set()
    for attempts in found.questions:
        for c in (*attempts.right, *attempts.wrong):
            answer = c.ids[c.prompt_length :]
            assert all(i not in (loud, 2) for i in answer[:-1])
            ended.add(answer[-1])
    assert {loud, 2} & ended


def test_trails_attached_are_what_writes(watch: Watch) -> None:
    tokenizer = make_tokenizer()
    model = watch(llama(len(tokenizer)))
    torch.manual_seed(0)
    trails = tp.TrailMap({tp.Site(2): tp.DiReFT(DIM, 2, init="paper")})
    with tp.attach(model, trails):
        steered = sample(model)
    assert steered.questions != sample(model).questions


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(dict(k=0), "k=0 must be at least 1"), (dict(max_new_tokens=0), "max_new_tokens=0 must be")],
)
def test_sampling_refuses_what_makes_no_sense(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(llama(len(make_tokenizer())), **wrong)
    with pytest.raises(ValueError, match="no questions"):
        sample_chains(llama(), [], make_tokenizer(), 2, read_answer=lambda text: text, max_new_tokens=2)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_attempts_that_are_none_are_refused() -> None:
    one = chain([3, 4], [5])
    with pytest.raises(ValueError, match="at least one chain"):
        Attempts([], [])
    with pytest.raises(ValueError, match="chain 1 .* another prompt"):
        Attempts([one], [chain([3, 6], [5])])
    with pytest.raises(ValueError, match="chain 1 .* another prompt"):
        Attempts([one], [chain([3, 4, 6], [5])])
    with pytest.raises(ValueError, match="chain 0 .* no answer"):
        Attempts([Example((3, 4), (False, False))], [one])
    with pytest.raises(ValueError, match="there twice"):
        Attempts([one], [one])


def test_goals_that_cannot_be_aligned_are_refused(unchecked: None) -> None:
    (question, *_) = make_questions()
    with pytest.raises(ValueError, match="example 0 is no Attempts"):
        Align([chain([3], [4])])
    with pytest.raises(ValueError, match="question 1 stands twice"):
        Align([question, question])
    with pytest.raises(ValueError, match="margin=0.0 must be"):
        Align([question], margin=0.0)
    with pytest.raises(ValueError, match="constraint must be 'none', 'detached' or 'boundary', not 'both'"):
        Align([question], constraint="both")  # type: ignore[arg-type]


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_attempts_are_looked_at_as_their_longest_chain(seed: int) -> None:
    for attempts in make_questions(3, seed):
        assert len(attempts) == max(map(len, (*attempts.right, *attempts.wrong)))
        assert attempts.prompt_length == attempts.wrong[0].prompt_length
