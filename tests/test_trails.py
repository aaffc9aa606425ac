"""Every trail keeps the contract, computes its formula, and refuses bad arguments by name."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import goldens
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from subjects import MOVING, TRAILS, moving
from torch import Tensor, nn

import tokenpaths
from tokenpaths import PSR, Additive, Capped, DiReFT, LoReFT, NoReFT, Trail, TrailMap, sites
from tokenpaths.testing import check_trail
from tokenpaths.trails import RED, BiasReFT, Chain, ConstantReFT, DirectReFT, Gated, ReFTr1, Scaled, arguments

REFT = {
    "loreft": LoReFT,
    "noreft": NoReFT,
    "direct": DirectReFT,
    "direft_paper": DiReFT,
    "constant": ConstantReFT,
    "bias": BiasReFT,
}
ORTHONORMAL = ("loreft", "direct", "constant", "bias")


@torch.no_grad()
def give(trail: Any, R: Tensor, W: Tensor, b: Tensor) -> Any:
    """Give a trail of the ReFT family the weights of its formula in goldens.py."""
    trail.to(R.dtype)
    if isinstance(trail, DiReFT):
        trail.W2.copy_(R)
        trail.W1.copy_(W)
    elif isinstance(trail, NoReFT):
        trail.P.copy_(R)
    else:
        trail.rotation.weight.copy_(R)
    if isinstance(trail, (LoReFT, NoReFT, DirectReFT)):
        trail.W.copy_(W)
    trail.b.copy_(b)
    return trail


# --- the contract


@pytest.mark.parametrize("dim", [4, 16, 33])
@pytest.mark.parametrize("name", TRAILS)
def test_every_trail_keeps_the_contract(name, dim):
    check_trail(TRAILS[name], dim)


@pytest.mark.parametrize("cls", [LoReFT, NoReFT, DiReFT, DirectReFT, BiasReFT, ReFTr1, PSR, ConstantReFT])
def test_every_option_keeps_the_contract(cls):
    names = (
        ("init", "dropout", "rank") if issubclass(cls, (LoReFT, NoReFT, DiReFT, DirectReFT, BiasReFT)) else ("init",)
    )
    options = {"init": "paper", "dropout": 0.5, "rank": 3}
    if cls is ConstantReFT:
        names = ("dropout", "rank")
    chosen = {name: options[name] for name in names}
    check_trail(lambda dim: cls(dim, **chosen))
    check_trail(lambda dim: Gated(Scaled(Capped(Chain(cls(dim, **chosen), RED(dim)), 1.0), -2.0), dim))
    if "rank" in chosen:
        check_trail(lambda dim: cls(dim, dim))


def test_the_check_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    check_trail(TRAILS["LoReFT"])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_check_needs_no_pytest():
    code = (
        "import sys; from tokenpaths.trails import RED; from tokenpaths.testing import check_trail; check_trail(RED);"
        "assert not {'pytest', 'hypothesis', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=f"{tokenpaths.__path__[0]}/..")


class Sound(Trail):
    """v * h, and parts that subclasses break: each of them breaks one promise alone."""

    def __init__(self, dim: int, rank: int = 4) -> None:
        super().__init__()
        self.dim = dim
        self.rank = rank
        self.v = nn.Parameter(torch.zeros(dim))

    def forward(self, h):
        return self.v * h


class Elsewhere(nn.Module):
    pass


class OtherShape(Sound):
    def forward(self, h):
        return (self.v * h)[..., :2]


class Pair(Sound):
    def forward(self, h):
        return self.v * h, h


class NoLeadingShape(Sound):
    def forward(self, h):
        batch, seq, _ = h.shape
        return self.v * h.view(batch, seq, -1)


class OtherDtype(Sound):
    def forward(self, h):
        return (self.v * h).float()


class NotCast(Sound):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.plain = torch.ones(dim, dim)

    def forward(self, h):
        return self.v * (h @ self.plain)


class Overflows(Sound):
    def forward(self, h):
        return self.v * h + (h - h).exp() / (h - h)


class Moves(Sound):
    def forward(self, h):
        return self.v * h + 1e-30


class Exempt(Sound):
    starts_at_identity = False


class InPlace(Sound):
    def forward(self, h):
        with torch.no_grad():
            h += 1
        return self.v * h


class Random(Sound):
    def forward(self, h):
        return self.v * h * torch.rand(())


class Statistics(Sound):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, h):
        self.calls += 1
        return self.v * h


class Forgets(Sound):
    def __init__(self, dim: int, rank: int = 4) -> None:
        super().__init__(dim)
        del self.rank


class AnyArguments(Sound):
    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim)


class Changes(Sound):
    def __init__(self, dim: int, rank: int = 4) -> None:
        super().__init__(dim)
        self.rank = 2 * rank


class Unsaveable(Sound):
    def __init__(self, dim: int, rank: Any = torch.float32) -> None:
        super().__init__(dim, rank)


class OtherParameters(Sound):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.w = nn.Parameter(torch.zeros(int(torch.randint(1, 10**6, ()))))


class KeptAside(Sound):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.aside = torch.randn(dim)

    def forward(self, h):
        return self.v * h * self.aside.to(h)


class DividesByNorm(Sound):
    def forward(self, h):
        return self.v * h / h.norm(dim=-1, keepdim=True)


class RootOfZero(Sound):
    def forward(self, h):
        return self.v * h.square().sum(-1, keepdim=True).sqrt()


class Explodes(Sound):
    def forward(self, h):
        return self.v * h.sinh()


class MeanOverTokens(Sound):
    def forward(self, h):
        return self.v * (h - h.flatten(0, -2).mean(0))


class ByPosition(Sound):
    def forward(self, h):
        return self.v * h * torch.arange(h.shape[-2]).to(h).unsqueeze(-1)


class FlatOtherwise(Sound):
    def forward(self, h):
        return self.v * h * (h.ndim - 1)


class BatchNorm(Sound):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, h):
        return self.v * (self.norm(h.flatten(0, -2)) if h.numel() > self.dim or not self.training else h).view_as(h)


class Detached(Sound):
    def forward(self, h):
        return self.v.data * h


class Unused(Sound):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.w = nn.Parameter(torch.zeros(dim))


class KeepsGraph(Sound):
    kept: Any = None

    def forward(self, h):
        if self.kept is None or self.kept.dtype != h.dtype:
            self.kept = self.v * self.v.sign()
        return self.kept * h


BROKEN: dict[type[nn.Module], str] = {
    Elsewhere: r"make\(16\) gave Elsewhere\(\), which is no Trail: let your class inherit from tokenpaths\.Trail",
    OtherShape: r"promise 1 .*same shape.*OtherShape gave shape \[5, 2\] for states of shape \[5, 16\]\. Return",
    Pair: r"promise 1 .*same shape.*Pair gave a tuple for states of shape \[5, 16\]\. Return",
    NoLeadingShape: r"promise 1 .*in torch\.float32 failed for states of shape \[5, 16\]: not enough.*any lead",
    OtherDtype: r"promise 1 .*same dtype.*in torch\.float64 gave torch\.float32 .*end with \.to\(h\.dtype\)",
    NotCast: r"promise 1 is broken: NotCast in torch\.float64 failed .*keep fixed ones with register_buffer",
    Overflows: r"Overflows in torch\.float32 gave NaN or infinity: compute what overflows or vanishes in float32",
    Moves: r"promise 3 .*a fresh Moves moved a state\. Start a factor .* at exactly zero, or set starts_at_identity",
    Exempt: r"Exempt has starts_at_identity = False, but a fresh one moved nothing: leave that line out",
    InPlace: r"InPlace changed the states that it was given: return the displacement, and work on no h in place",
    Random: r"Random gave two answers .*in eval mode: draw random numbers only if self\.training",
    Statistics: r"Statistics changed its own calls in eval mode: keep statistics only if self\.training",
    Forgets: r"promise 4 .*Forgets does not keep its argument 'rank': write `self\.rank = rank` in __init__",
    AnyArguments: r"promise 4 .*AnyArguments\.__init__ takes \*\*options: name each argument",
    Changes: r"promise 4 .*Changes\(dim=16, rank=8\) was rebuilt as Changes\(dim=16, rank=16\)\. Keep each argument",
    Unsaveable: r"Unsaveable cannot be saved, .*argument 'rank' is torch\.float32, which a trail file can.*Promise 4",
    OtherParameters: r"OtherParameters cannot be saved, rebuilt.*has shape \[.*alone decides which parameters",
    KeptAside: r"KeptAside moves states differently after saving and loading: .*nn\.Parameter or with register_buffer",
    DividesByNorm: r"DividesByNorm gave NaN or infinity for zero states \(times 0\): guard divisions and roots",
    RootOfZero: r"RootOfZero: the gradient of the states is NaN or infinite for zero states .*: a root .*clamp_min",
    Explodes: r"Explodes gave NaN or infinity for large states \(times 1e\+06\): .*do not overflow",
    MeanOverTokens: r"promise 2 .*with MeanOverTokens, a token beside other tokens is moved otherwise .*Use no mean",
    ByPosition: r"promise 2 .*with ByPosition, a token beside other tokens is moved otherwise than alone",
    FlatOtherwise: r"promise 2 .*with FlatOtherwise, a token is moved otherwise in a flat batch of tokens",
    BatchNorm: r"promise 2 .*a token is moved otherwise, in train mode, when the tokens beside it change",
    Detached: r"Detached has no gradient: leave out detach\(\), \.data, \.item\(\) and no_grad\(\)",
    Unused: r"no gradient reaches w of Unused: use it in forward .*requires_grad_\(False\)",
    KeepsGraph: r"KeepsGraph cannot be trained: .*second time.*Keep no tensor with its graph from one forward",
}


@pytest.mark.parametrize("cls", BROKEN, ids=lambda cls: cls.__name__)
def test_each_broken_promise_is_named(cls):
    make = (lambda dim: cls()) if cls is Elsewhere else cls
    with pytest.raises(AssertionError, match=r"(?s)" + BROKEN[cls]):
        check_trail(make)


def test_a_sound_trail_of_your_own_passes():
    check_trail(Sound)
    check_trail(lambda dim: Sound(dim).requires_grad_(False))
    check_trail(lambda dim: Chain(Sound(dim), Capped(Sound(dim), 0.1)))


def test_a_trail_that_defines_no_forward_says_so():
    with pytest.raises(NotImplementedError, match=r"Trail must define forward\(h\) and return the displacement of h"):
        Trail()(torch.zeros(1, 2))


# --- the formulas


@pytest.mark.parametrize("name", REFT)
def test_formulas_give_the_goldens(name):
    trail = give(REFT[name](6, 2), goldens.R, goldens.W, goldens.B)
    moved = goldens.X + trail(goldens.X)
    expected = goldens.FORMULAS[name](goldens.X, goldens.R, goldens.W, goldens.B)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-14)
    assert abs(moved.sum().item() - goldens.SUMS[name]) < goldens.ROUNDING
    if name == "loreft":
        torch.testing.assert_close(moved[0, 0], goldens.LOREFT_ROW, rtol=0, atol=goldens.ROUNDING)


@pytest.mark.parametrize("name", REFT)
@pytest.mark.parametrize(("dim", "rank"), [(7, 1), (24, 4), (8, 8)])
def test_formulas_in_float64(name, dim, rank):
    R = torch.linalg.qr(torch.randn(dim, rank, dtype=torch.float64)).Q.mT
    if name not in ORTHONORMAL:
        R = 1.5 * R + 0.1
    W, b, h = (torch.randn(shape, dtype=torch.float64) for shape in ((rank, dim), (rank,), (3, 5, dim)))
    trail = give(REFT[name](dim, rank, **({} if name == "constant" else {"init": "paper"})), R, W, b)
    torch.testing.assert_close(h + trail(h), goldens.FORMULAS[name](h, R, W, b), rtol=1e-12, atol=1e-12)


def test_formulas_outside_the_family():
    dim = 8
    h, v, w, z, s, b = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 5, dim), *[(dim,)] * 5))
    beta, a = torch.tensor(0.3, dtype=torch.float64), torch.tensor(-1.7, dtype=torch.float64)
    unit = v / v.norm()

    def same(trail: Trail, expected: Tensor, **weights: Tensor) -> Trail:
        with torch.no_grad():
            for name, value in weights.items():
                trail.double().get_parameter(name).copy_(value)
        torch.testing.assert_close(trail(h), expected, rtol=1e-12, atol=1e-12)
        return trail

    additive = same(Additive(dim), v.expand_as(h), v=v)
    red = same(RED(dim), s * h + b - h, s=s, b=b)
    same(ReFTr1(dim), a * (h @ unit + beta).clamp_min(0)[..., None] * unit, v=v, a=a, b=beta)
    same(PSR(dim), (h @ w + beta).clamp_min(0)[..., None] * z, w=w, z=z, b=beta)
    same(Scaled(red, -0.5), -0.5 * (s * h + b - h))
    same(Gated(additive, dim), (1 / (1 + (-(h @ w + beta)).exp()))[..., None] * v, w=w, b=beta)
    same(Chain(additive, red), s * (h + v) + b - h)
    same(Chain(red, additive), s * h + b + v - h)
    shorter = (0.5 * h.norm(dim=-1, keepdim=True) / v.norm()).clamp_max(1)
    torch.testing.assert_close(Capped(additive, 0.5)(h), shorter * v, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", REFT)
def test_displacements_have_the_rank_of_the_trail(name):
    trail = moving(lambda dim: REFT[name](dim, 3))(24).double()
    displacement = trail(torch.randn(100, 24, dtype=torch.float64)).detach()
    values = torch.linalg.svdvals(displacement)
    assert values[3:].max() < 1e-12 * values[0]
    if name != "bias":
        assert values[2] > 1e-3 * values[0]
    if name in ORTHONORMAL:
        R = trail.R.detach()
        torch.testing.assert_close(displacement @ R.mT @ R, displacement, rtol=0, atol=1e-12)


def test_loreft_sets_the_coordinates_in_its_subspace():
    trail, h = MOVING["LoReFT"](24).double(), torch.randn(3, 5, 24, dtype=torch.float64)
    moved = h + trail(h)
    torch.testing.assert_close(moved @ trail.R.mT, h @ trail.W.mT + trail.b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["loreft", "noreft", "direct", "direft_paper", "bias"])
def test_the_papers_initialisation(name):
    trail = REFT[name](576, 4, init="paper")
    h = torch.randn(1000, 576)
    moved = (trail(h).norm(dim=-1) / h.norm(dim=-1)).mean().item()
    assert not trail.starts_at_identity and moved > 0.01
    if name == "loreft":  # ALGORITHMS.md: sqrt(r / d) = 0.083 from R h, and a little more from W h
        assert 0.08 < moved < 0.105


def test_dropout_leaves_the_rest_of_the_state_alone():
    """Dropout of the code keeps the displacement in the subspace; pyreft's zeroes coordinates of the state itself."""
    trail = moving(lambda dim: LoReFT(dim, 4, dropout=0.5))(16)
    h = torch.randn(64, 16)
    displacement = trail(h)
    assert not torch.equal(displacement, trail(h))
    code = displacement @ trail.R.mT
    torch.testing.assert_close(code @ trail.R, displacement, rtol=0, atol=1e-5)
    assert 0.3 < (code.abs() < 1e-6).float().mean() < 0.7
    assert torch.equal(trail.eval()(h), trail(h))


# --- the cap

NUMBERS = st.sampled_from([0.0, 1e-20, -1e-6, 0.3, -1.0, 7.0, -1e3, 1e6, 1e12, -3e25, 1e30])


class Given(Trail):
    """Whatever displacement it was given."""

    def __init__(self, displacement: Tensor) -> None:
        super().__init__()
        self.displacement = displacement

    def forward(self, h):
        return self.displacement


@given(
    st.lists(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=5, max_size=5), min_size=1, max_size=4),
    st.sampled_from([0.0, 1e-4, 0.1, 1.0, 3.0]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_the_cap_is_exact(pairs, cap, dtype):
    h, d = torch.tensor(pairs, dtype=dtype).unbind(-1)
    capped = Capped(Given(d), cap)(h)
    long, limit = d.double().norm(dim=-1), cap * h.double().norm(dim=-1)
    assert bool((capped.double().norm(dim=-1) <= limit).all())
    expected = d.double() * (limit / long.clamp_min(1e-300)).clamp_max(1).unsqueeze(-1)
    error = (capped.double() - expected).norm(dim=-1)
    assert bool((error <= 20 * torch.finfo(dtype).eps * torch.minimum(long, limit)).all())
    within = long < 0.999 * limit
    assert torch.equal(capped[within], d[within])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [64, 4096, 16384])
def test_the_cap_is_exact_in_wide_models(dim, dtype):
    h = torch.cat([torch.randn(200, dim, dtype=dtype), torch.full((1, dim), 1.1, dtype=dtype)])
    d = torch.cat([3 * torch.randn(200, dim, dtype=dtype), torch.full((1, dim), 1.3, dtype=dtype)])
    share = Capped(Given(d), 0.1)(h).double().norm(dim=-1) / h.double().norm(dim=-1)
    assert 0.1 * (1 - 1e-5) < share.min() <= share.max() <= 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_cap_holds_in_half_precision(dtype):
    h = torch.randn(50, 64).to(dtype)
    for size in (1, 300, 6e4):  # 300^2 is more than float16 can hold
        capped = Capped(Given(torch.full((50, 64), size).to(dtype)), 0.1)(h)
        share = capped.double().norm(dim=-1) / h.double().norm(dim=-1)
        assert capped.dtype == dtype
        assert 0.1 * (1 - 16 * torch.finfo(dtype).eps) < share.min() <= share.max() <= 0.1


def test_the_cap_has_finite_gradients_where_there_is_no_direction():
    for h, d in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1e30, 0.0), (0.0, 1e30), (1e30, 1e30), (1.0, 1e-38)):
        state, displacement = (torch.full((2, 8), value, requires_grad=True) for value in (h, d))
        capped = Capped(Given(displacement), 0.1)(state)
        capped.sum().backward()
        assert capped.isfinite().all() and state.grad.isfinite().all() and displacement.grad.isfinite().all(), (h, d)
    fresh = Capped(NoReFT(8, 2), 0.1)
    fresh(torch.randn(3, 8)).sum().backward()
    assert fresh.trail.W.grad.any(), "a capped trail must learn from its first step"


def test_the_caps_gradient():
    state, displacement = (torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    long = 3 * displacement.detach().clone().requires_grad_()
    for cap in (0.1, 1.0, 10.0):
        assert torch.autograd.gradcheck(lambda h, d, cap=cap: Capped(Given(d), cap)(h), (state, displacement))
        assert torch.autograd.gradcheck(lambda h, d, cap=cap: Capped(Given(d), cap)(h), (state, long))


# --- arguments


def test_parameter_counts():
    def count(trail: nn.Module) -> int:
        return sum(parameter.numel() for parameter in trail.parameters())

    with torch.device("meta"):
        assert count(LoReFT(4096, 4)) == 32_772
        assert count(DiReFT(4096, 4)) == count(NoReFT(4096, 4)) == count(DirectReFT(4096, 4)) == 32_772
        assert count(ConstantReFT(4096, 1)) == count(BiasReFT(4096, 1)) == 4_097
        assert 32 * count(LoReFT(4096, 8)) == 2_097_408
        assert (count(Additive(64)), count(RED(64)), count(ReFTr1(64)), count(PSR(64))) == (64, 128, 66, 129)
        assert count(Gated(Additive(64), 64)) == 64 + 65


def test_first_and_last_tokens_tied_in_a_whole_model():
    """r = 8 in 32 layers of width 4096: as many as the paper's 0.031 % of LLaMA-7B."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
        trails = TrailMap({s: LoReFT(4096, 8) for s in sites(model, "all", tokenpaths.First(7) | tokenpaths.Last(7))})
        assert trails.size() == 2_097_408
        assert round(100 * trails.size() / sum(p.numel() for p in model.parameters()), 4) == 0.0311


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "rank above dim": (lambda: LoReFT(16, 17), r"LoReFT: rank 17 must be from 1 to dim 16"),
    "rank of zero": (lambda: DiReFT(16, 0), r"DiReFT: rank 0 must be from 1 to dim 16"),
    "init": (lambda: NoReFT(16, 4, init="zero"), r"NoReFT: init must be 'identity' or 'paper', not 'zero'"),
    "init of ReFTr1": (lambda: ReFTr1(16, init="zero"), r"ReFTr1: init must be 'identity' or 'paper', not 'zero'"),
    "init of PSR": (lambda: PSR(16, init="no"), r"PSR: init must be 'identity' or 'paper', not 'no'"),
    "dropout of one": (lambda: BiasReFT(16, 4, dropout=1.0), r"BiasReFT: dropout 1\.0 must be at least 0 and below 1"),
    "dropout below zero": (lambda: ConstantReFT(16, 4, dropout=-0.1), r"ConstantReFT: dropout -0\.1 must be at least"),
    "dropout of NaN": (lambda: LoReFT(16, 4, dropout=float("nan")), r"LoReFT: dropout nan must be at least 0"),
    "cap below zero": (lambda: Capped(RED(16), -0.1), r"Capped: cap -0\.1 must be a finite number, at least 0"),
    "cap of NaN": (lambda: Capped(RED(16), float("nan")), r"Capped: cap nan must be a finite number, at least 0"),
    "factor of infinity": (lambda: Scaled(RED(16), float("inf")), r"Scaled: factor inf must be a finite number"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_by_name(case, unchecked):
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", TRAILS)
def test_repr_evaluates_back_to_an_equal_trail(name):
    trail = TRAILS[name](16)
    again = eval(repr(trail), vars(tokenpaths.trails).copy())
    assert type(again) is type(trail) and repr(again) == repr(trail)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in trail.named_parameters()}
    assert arguments(trail).keys() == arguments(again).keys()


@pytest.mark.parametrize("name", TRAILS)
def test_a_copy_is_independent(name):
    trail = MOVING[name](16)
    h = torch.randn(4, 16)
    trail(h).sum().backward()
    copied, before = copy.deepcopy(trail), trail(h).detach()
    assert torch.equal(copied(h), before)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(1 + torch.rand_like(parameter))
    assert not torch.equal(copied(h), before) and torch.equal(trail(h), before)
