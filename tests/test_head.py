"""Logits in chunks: equal to the whole, gradients too, on every family; and never many of them at one time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import families
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import DIM, VOCAB, llama, make_examples
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tokenpaths import Additive, Answer, Last, LoReFT, Site, Stay, TrailMap, attach, trainable
from tokenpaths.data import collate
from tokenpaths.engine import Logits, logits_at
from tokenpaths.engine import logits as head
from tokenpaths.engine.logits import cross_entropy, kl_from, top_k_kl

BATCH = collate(make_examples(4))
INPUTS: dict[str, Any] = dict(input_ids=BATCH.input_ids, attention_mask=BATCH.attention_mask, use_cache=False)
ROWS = BATCH.attention_mask.bool() & (BATCH.input_ids % 3 > 0)
TARGETS = torch.arange(int(ROWS.sum())) % VOCAB
SCALED = {"gemma2", "cohere", "cohere2", "granite"}  # what these give as logits is not what their head returned
SCALED |= set() if families.V5 else {"gptj", "codegen"}  # nor those of transformers 4, which make them float32

Watch = Callable[[nn.Module], nn.Module]


def frozen(model: Any) -> Any:
    return model.requires_grad_(False)


def laid(dtype: torch.dtype = torch.float32) -> TrailMap:
    trails = TrailMap({Site(0, Last(1)): LoReFT(DIM, 2, init="paper"), Site(1, ~Answer()): Additive(DIM)})
    return trails.to(dtype)


def chosen(model: nn.Module, **more: Any) -> Logits:
    return logits_at(model, lambda: model(**INPUTS, **more), ROWS)


def waits(logits: Logits) -> bool:
    """Whether the logits are still to be made."""
    return logits.states.shape[-1] != logits.vocab


def whole(model: nn.Module, **more: Any) -> Tensor:
    """The cross-entropy from the logits of all tokens, at once."""
    logits = model(**INPUTS, **more).logits[ROWS]
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), TARGETS, reduction="sum")


def ours(model: nn.Module, **more: Any) -> Tensor:
    return chosen(model, **more).sum(cross_entropy, TARGETS, at_once=3)


def by_parameter(loss: Tensor, trails: TrailMap) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(trails.parameters())))


def assert_alike(model: nn.Module, trails: TrailMap, tolerance: float = 1e-10) -> None:
    """In value and in the gradient of every parameter of the trails, which is there."""
    expected, found = whole(model), ours(model)
    assert abs(float((expected - found).detach())) < tolerance
    assert found.dtype == expected.dtype
    for full, mine in zip(by_parameter(expected, trails), by_parameter(found, trails), strict=True):
        assert full.abs().max() > 10 * tolerance
        assert (full - mine).abs().max() < tolerance


# --- the same as the whole --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", families.DECODERS)
def test_every_family_gives_the_loss_and_gradient_of_whole_logits(name: str, watch: Watch) -> None:
    family = families.DECODERS[name]
    model = watch(frozen(family.make().double() if family.float64 else family.make()))
    trails = laid(next(model.parameters()).dtype)
    with attach(model, trails):
        assert_alike(model, trails, 1e-10 if family.float64 else 1e-3)
        assert waits(chosen(model)) == (name not in SCALED)


@settings(max_examples=50)
@given(
    st.integers(0, 9), st.integers(1, 11), st.sampled_from(["ce", "kl", "weighted"]), st.booleans(), st.integers(0, 999)
)
def test_chunks_add_up_to_the_whole(n: int, at_once: int, kind: str, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(5, 7, bias=bias).double().requires_grad_(False)
    states = torch.randn(n, 5, dtype=torch.float64, requires_grad=True)
    before, weights = Logits(torch.randn(n, 5, dtype=torch.float64), layer, 7), torch.rand(n, dtype=torch.float64)
    words = torch.randint(7, (n,))
    q = layer(states).log_softmax(-1)
    p = layer(before.states).log_softmax(-1)
    picked = -q.gather(1, words[:, None])[:, 0]
    term, targets, rows = {
        "ce": (cross_entropy, (words,), picked),
        "kl": (kl_from, (before,), (p.exp() * (p - q)).sum(-1)),
        "weighted": (lambda logits, ids, w: w * cross_entropy(logits, ids), (words, weights), weights * picked),
    }[kind]
    found, expected = Logits(states, layer, 7).sum(term, *targets, at_once=at_once), rows.sum()
    (mine,) = torch.autograd.grad(3 * found, states)
    (full,) = torch.autograd.grad(3 * expected, states)
    assert (found - expected).abs() < 1e-10
    assert n == 0 or (mine - full).abs().max() < 1e-10
    with torch.no_grad():
        assert (Logits(states, layer, 7).sum(term, *targets, at_once=at_once) - expected).abs() < 1e-10


def test_no_rows_are_a_sum_of_nothing_that_still_has_a_gradient() -> None:
    model, trails = frozen(llama()), laid()
    with attach(model, trails):
        logits = logits_at(model, lambda: model(**INPUTS), torch.zeros_like(ROWS))
        found = logits.sum(cross_entropy, torch.zeros(0, dtype=torch.long))
        gradients = by_parameter(found, trails)
    assert waits(logits) and len(logits) == 0
    assert found == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_tied_heads(watch: Watch) -> None:
    model = llama().double()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    trails = laid(torch.float64)
    with attach(watch(frozen(model)), trails):
        assert_alike(model, trails)
        assert waits(chosen(model))


# --- where the head cannot run apart, the chosen logits are made whole ------------------------------------------------


def test_without_an_output_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    model, trails = frozen(llama().double()), laid(torch.float64)
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
    with attach(model, trails):
        assert_alike(model, trails)
        assert not waits(chosen(model))


def test_a_head_that_learns_keeps_its_gradient() -> None:
    model = frozen(llama().double())
    weight = model.lm_head.weight.requires_grad_(True)
    (full,), (mine,) = (torch.autograd.grad(loss, weight) for loss in (whole(model), ours(model)))
    assert full.abs().max() > 1e-3
    assert (full - mine).abs().max() < 1e-10


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo on transformers 4.57
@pytest.mark.parametrize("part", ["model", "head"])
def test_compiled(part: str, unchecked: None) -> None:
    model = frozen(llama().double())
    expected = whole(model)
    if part == "head":
        model.lm_head.compile(backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    for _ in range(2):
        assert not waits(chosen(model))
        assert (ours(model) - expected).abs() < 1e-10


def test_hooks_of_others_on_the_head_see_the_chosen_rows_once(watch: Watch) -> None:
    model, trails = watch(frozen(llama().double())), laid(torch.float64)
    seen: list[torch.Size] = []
    expected = chosen(model)[:].shape
    handles = [
        model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape)),
        model.lm_head.register_full_backward_hook(lambda module, to, of: seen.append(of[0].shape)),
    ]
    try:
        with attach(model, trails):
            by_parameter(ours(model), trails)
            assert seen == [expected, expected]
            assert_alike(model, trails)
    finally:
        for handle in handles:
            handle.remove()


def halve(module: Any, args: Any, output: Any) -> None:
    output.logits = output.logits / 2


def halve_in_place(module: Any, args: Any, output: Any) -> None:
    output.logits.div_(2)


def look(module: Any, args: Any, output: Any) -> None:
    with torch.no_grad():
        assert torch.cat([output.logits, output.logits]).isfinite().all()


@pytest.mark.parametrize("hook", [halve, halve_in_place, look])
def test_what_others_do_to_the_output_of_the_model_is_done(hook: Any) -> None:
    model, trails = frozen(llama().double()), laid(torch.float64)
    with attach(model, trails):
        handle = model.register_forward_hook(hook)
        assert_alike(model, trails)
        assert not waits(chosen(model))
        handle.remove()
        assert waits(chosen(model))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model, trails = llama().double().train(), laid(torch.float64)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with trainable(model, trails):
        expected = by_backward(whole(model, prompt_mask=BATCH.prompt_mask), trails)
        found = by_backward(ours(model, prompt_mask=BATCH.prompt_mask), trails)
        assert waits(chosen(model, prompt_mask=BATCH.prompt_mask))
    assert all(a.abs().max() > 1e-6 and (a - b).abs().max() < 1e-10 for a, b in zip(expected, found, strict=True))


def by_backward(loss: Tensor, trails: TrailMap) -> list[Tensor]:
    trails.zero_grad()
    loss.backward()
    return [p.grad for p in trails.parameters() if p.grad is not None]


def test_an_output_as_a_tuple() -> None:
    model = frozen(llama().double())
    logits = chosen(model, return_dict=False)
    assert waits(logits)
    assert (logits.sum(cross_entropy, TARGETS) - whole(model)).abs() < 1e-10


def test_a_failed_forward_leaves_no_hook(watch: Watch) -> None:
    model = watch(frozen(llama()))
    with pytest.raises(IndexError):
        logits_at(model, lambda: model(torch.tensor([[VOCAB + 1]])), torch.ones(1, 1, dtype=torch.bool))


@pytest.mark.parametrize("where", ["q_proj", "lm_head"])
@pytest.mark.filterwarnings("ignore:.*lm_head:UserWarning")
def test_peft(where: str) -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(llama().double(), LoraConfig(r=2, target_modules=[where], init_lora_weights=False))
    learned = [p for p in model.parameters() if p.requires_grad]
    full, mine = (torch.autograd.grad(loss, learned) for loss in (whole(model), ours(model)))
    assert waits(chosen(model)) == (where == "q_proj")
    assert all(a.abs().max() > 1e-6 and (a - b).abs().max() < 1e-10 for a, b in zip(full, mine, strict=True))
    model.requires_grad_(False)
    assert waits(chosen(model))  # an adapter on the head that is frozen is a part of it
    assert (ours(model) - whole(model)).abs() < 1e-10


@pytest.fixture
def gloo(tmp_path: Any) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
@pytest.mark.filterwarnings("ignore")  # DDP says that nothing was unused
def test_ddp(options: dict[str, Any], gloo: None) -> None:
    model, trails = frozen(llama().double()), laid(torch.float64)
    with trainable(model, trails):
        expected = by_parameter(whole(model), trails)
        wrapped = DistributedDataParallel(model, **options)
        for _ in range(2):
            trails.zero_grad()
            logits = chosen(wrapped)
            logits.sum(cross_entropy, TARGETS, at_once=3).backward()
        assert not waits(logits)
    for full, parameter in zip(expected, trails.parameters(), strict=True):
        assert parameter.grad is not None and (full - parameter.grad).abs().max() < 1e-10


# --- precision --------------------------------------------------------------------------------------------------------


def test_autocast_of_the_forward_is_that_of_the_head() -> None:
    """Also when the logits are made outside of it."""
    model, trails = frozen(llama()), laid()
    with attach(model, trails):
        with torch.autocast("cpu", torch.bfloat16):
            expected, inside, logits = whole(model), ours(model), chosen(model)
        assert waits(logits)
        found = [inside, logits.sum(cross_entropy, TARGETS, at_once=3)]
        by_float32_head = Logits(logits.states, model.lm_head, VOCAB).sum(cross_entropy, TARGETS)
        for loss in found:
            assert_close_in_bfloat16(loss, expected, trails)
    assert float(by_float32_head.detach()) != pytest.approx(float(expected.detach()), rel=1e-5)


def assert_close_in_bfloat16(found: Tensor, expected: Tensor, trails: TrailMap) -> None:
    assert found.dtype == torch.float32
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    full, mine = (torch.autograd.grad(x, list(trails.parameters()), retain_graph=True) for x in (expected, found))
    for a, b in zip(full, mine, strict=True):
        assert (a - b).norm() < 0.02 * a.norm()


def test_a_bfloat16_model_sums_in_float32() -> None:
    model, trails = frozen(llama().bfloat16()), laid()
    with attach(model, trails):
        assert_close_in_bfloat16(ours(model), whole(model), trails)


# --- what it costs ----------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most numbers in any tensor that is made inside."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and not func.is_view:
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("term", ["ce", "kl"])
def test_no_more_than_a_chunk_of_logits_is_held_and_nothing_is_computed_twice(term: str) -> None:
    words, n, at_once = 8192, 128, 2
    model = frozen(llama(words))
    ids = torch.randint(words, (4, n // 4))
    shift = torch.zeros(DIM, requires_grad=True)
    model.model.norm.register_forward_hook(lambda module, args, output: output + shift)

    def logits() -> Logits:
        return logits_at(model, lambda: model(input_ids=ids), torch.ones_like(ids, dtype=torch.bool))

    with Largest() as largest:
        with torch.no_grad():
            before = logits()
        after = logits()
        made, target = (kl_from, before) if term == "kl" else (cross_entropy, ids.flatten())
        after.sum(made, target, at_once=at_once).backward()
    assert largest.numel == at_once * words  # and n * words, 64 times as many, nowhere
    before, after = (Logits(x.states.detach(), x.head, x.vocab) for x in (before, after))
    after.states.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        after.sum(made, before if term == "kl" else target, at_once=at_once).backward()
    product = 2 * n * DIM * words
    assert counter.get_total_flops() == product * (3 if term == "kl" else 2)  # the frozen logits, the logits, their W^T


def test_a_stay_holds_no_more_in_either_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    words = 4096
    monkeypatch.setattr(head, "CHUNK", 4 * words * 2)
    model, trails = frozen(llama(words)), laid()
    with attach(model, trails), Largest() as largest:
        Stay(make_examples(12)).loss(model, trails, collate(make_examples(12))).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trails.parameters())
    assert largest.numel == 2 * words


def test_a_chunk_fills_the_budget_unless_told_otherwise() -> None:
    seen: list[int] = []

    def count(logits: Tensor) -> Tensor:
        seen.append(len(logits))
        return logits[:, 0]

    logits = Logits(torch.zeros(100, 2), nn.Linear(2, 2**18).requires_grad_(False), 2**18)
    logits.sum(count)
    assert seen == [64, 36]  # 64 x 2^18 float32 numbers are 64 MiB


# --- errors -----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_summed_is_refused() -> None:
    logits = Logits(torch.randn(3, 2, requires_grad=True), nn.Linear(2, 4).requires_grad_(False), 4)
    other = Logits(torch.randn(3, 2, requires_grad=True), logits.head, 4)
    ids = torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="at_once=0 must be at least 1"):
        logits.sum(cross_entropy, ids, at_once=0)
    with pytest.raises(ValueError, match="2 targets for the logits of 3 tokens"):
        logits.sum(cross_entropy, ids[:2])
    with pytest.raises(ValueError, match="requires a gradient, which it would not get: detach it"):
        logits.sum(kl_from, other)
    with torch.no_grad():
        assert logits.sum(kl_from, other) > 0
    with pytest.raises(ValueError, match=r"gave shape \[\] for 3 rows: one number a row is due"):
        logits.sum(lambda logits: logits.sum())
    with pytest.raises(RuntimeError, match=r"no second derivative: apply the term to logits\[:\]"):
        torch.autograd.grad(logits.sum(cross_entropy, ids), logits.states, create_graph=True)


def test_logits_of_other_tokens_are_refused() -> None:
    model = frozen(llama())
    with pytest.raises(ValueError, match=r"gave logits of shape \[4, 2, 96\], where \d+ of \[4, 7\] tokens were asked"):
        chosen(model, logits_to_keep=2)


# --- the top of a distribution ----------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.sampled_from([0.1, 1.0, 5.0, 30.0]), st.booleans(), st.integers(0, 999))
def test_the_top_and_the_rest_bound_the_divergence(k: int, sharp: float, near: bool, seed: int) -> None:
    torch.manual_seed(seed)
    x = sharp * torch.randn(5, 7, dtype=torch.float64)
    y = x + 0.1 * torch.randn_like(x) if near else sharp * torch.randn_like(x)
    p, q = x.log_softmax(-1), y.log_softmax(-1)
    full = (p.exp() * (p - q)).sum(-1)
    top, words = p.topk(k)
    rest = p.scatter(-1, words, -torch.inf).logsumexp(-1)
    known, missed = top_k_kl(q, top, words, rest)
    assert (known <= full + 1e-10).all()
    assert (full <= known + missed + 1e-10).all()
    if k == 6:  # the rest is one word
        assert torch.allclose(known, full, atol=1e-10)
        assert torch.allclose(missed, torch.zeros_like(missed), atol=1e-10)


def test_the_bound_on_what_the_top_misses_is_reached() -> None:
    """By a rest that is all on one word, as likely as the least of the top, and the word that q finds least likely."""
    p = torch.tensor([[0.5, 0.25, 0.25, 0.0]], dtype=torch.float64)
    q = torch.tensor([[0.4, 0.3, 0.1, 0.2]], dtype=torch.float64)
    top, words = p[:, :2].log(), torch.tensor([[0, 1]])
    known, missed = top_k_kl(q.log(), top, words, torch.tensor([0.25], dtype=torch.float64).log())
    full = torch.xlogy(p, p / q).sum(-1)
    assert missed > 0.1
    assert torch.allclose(known + missed, full, atol=1e-12)


def test_top_k_gradients_are_finite_where_nothing_rests() -> None:
    steered = torch.randn(1, 4, requires_grad=True)
    known, missed = top_k_kl(
        steered.log_softmax(-1), torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0, 1]]), torch.tensor([-torch.inf])
    )
    (known + missed).sum().backward()
    assert missed == 0
    assert steered.grad is not None and steered.grad.isfinite().all() and steered.grad.abs().max() > 0
    with pytest.raises(ValueError, match="top 4 of 4 words leave no rest"):
        top_k_kl(steered, steered, torch.arange(4)[None], torch.zeros(1))
