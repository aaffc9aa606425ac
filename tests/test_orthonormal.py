"""R R^T = I at every step, whatever the optimizer, the dtype or a resume does; and cheaply."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
import transformers
from subjects import moving, tiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tokenpaths import All, LoReFT, TrailMap, attach, sites
from tokenpaths.trails import OrthonormalRows, Scaled
from tokenpaths.trails.stiefel import prepare, release

DIM, RANK = 12, 3


def gap(rows: Tensor) -> float:
    """The largest entry of R R^T - I."""
    rows = rows.detach().double()
    return (rows @ rows.mT - torch.eye(len(rows))).abs().max().item()


class Brutal(torch.optim.Optimizer):
    """Sign steps and decay through `.data`, which leaves no trace in a tensor's version counter."""

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(0.9).sub_(group["lr"] * parameter.grad.sign())


OPTIMIZERS = {
    "SGD with momentum": lambda p, eps: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p, eps: torch.optim.Adam(p, lr=0.05, eps=eps),
    "AdamW": lambda p, eps: torch.optim.AdamW(p, lr=0.05, weight_decay=0.01, eps=eps),
    "AdamW, strong decay": lambda p, eps: torch.optim.AdamW(p, lr=0.5, weight_decay=0.5, eps=eps),
    "RMSprop": lambda p, eps: torch.optim.RMSprop(p, lr=0.05, eps=eps),
    "Adafactor": lambda p, eps: transformers.Adafactor(p),
    "through .data": lambda p, eps: Brutal(p),
}


def objective(trail: LoReFT, target: Tensor, h: Tensor) -> Tensor:
    """Has its minimum at R = target up to a rotation, W h + b free."""
    return (h + trail(h) - h @ target).float().square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_are_orthonormal_at_every_step(name, dtype):
    trail = moving(lambda dim: LoReFT(dim, RANK))(DIM).to(dtype)
    h, target = torch.randn(64, DIM).to(dtype), 0.3 * torch.randn(DIM, DIM).to(dtype)
    optimizer = OPTIMIZERS[name](trail.parameters(), 1e-4 if dtype == torch.float16 else 1e-8)
    before = trail.R.detach().clone()
    for _ in range(30):
        optimizer.zero_grad()
        objective(trail, target, h).backward()
        optimizer.step()
        assert trail.rotation.weight.isfinite().all()
        assert trail.rotation().dtype == torch.float32 and gap(trail.rotation()) < 1e-6
        assert trail.R.dtype == dtype and gap(trail.R) < max(1e-6, 2 * torch.finfo(dtype).eps)
    assert (trail.R - before).abs().max() > 0.05, "R has not been trained"


@pytest.mark.parametrize("scale", [1e-15, 1e-3, 1e3, 1e15])
def test_the_size_of_the_weight_does_not_matter(scale):
    rows = OrthonormalRows(RANK, DIM)
    expected = rows().detach()
    rows.weight.data.mul_(scale)
    torch.testing.assert_close(rows(), expected, rtol=0, atol=1e-6)
    assert gap(rows()) < 1e-6
    (rows() * torch.randn(RANK, DIM)).sum().backward()
    assert rows.weight.grad.isfinite().all()


def test_decay_alone_never_ends_it():
    """What torch's own parametrization is zeroed by."""
    rows = OrthonormalRows(RANK, DIM)
    expected = rows().detach()
    optimizer = torch.optim.AdamW(rows.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        (0 * rows()).sum().backward()
        optimizer.step()
    assert rows.weight.abs().max() < 1e-5
    torch.testing.assert_close(rows(), expected, rtol=0, atol=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one():
    h, target = torch.randn(64, DIM), 0.3 * torch.randn(DIM, DIM)
    trail = moving(lambda dim: LoReFT(dim, RANK))(DIM)
    optimizer = torch.optim.AdamW(trail.parameters(), lr=0.05)

    def train(trail: LoReFT, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            objective(trail, target, h).backward()
            optimizer.step()

    train(trail, optimizer, 5)
    state = copy.deepcopy((trail.state_dict(), optimizer.state_dict()))
    train(trail, optimizer, 5)

    resumed = LoReFT(DIM, RANK)
    resumed(h)  # has factors of other weights
    other = torch.optim.AdamW(resumed.parameters(), lr=0.05)
    resumed.load_state_dict(state[0])
    other.load_state_dict(state[1])
    train(resumed, other, 5)
    assert torch.equal(resumed.R, trail.R) and torch.equal(resumed.W, trail.W)


# --- never stale


def test_no_way_of_changing_the_weight_leaves_old_rows():
    rows = OrthonormalRows(RANK, DIM)

    def fresh() -> bool:
        """Whether the rows are those of a module that never had factors."""
        again = OrthonormalRows(RANK, DIM).to(rows.weight.dtype)
        again.weight.data = rows.weight.detach().clone()
        prepare([rows])
        prepared = torch.equal(rows(), again())
        release([rows])
        return prepared and torch.equal(rows(), again())

    assert fresh()
    rows.weight.data.add_(1)
    assert fresh()
    rows.weight.data = torch.randn(RANK, DIM)
    assert fresh()
    with torch.no_grad():
        rows.weight[0, 0] = 7
    assert fresh()
    rows.load_state_dict({"weight": torch.randn(RANK, DIM)})
    assert fresh()
    rows.load_state_dict({"weight": torch.randn(RANK, DIM)}, assign=True)
    assert fresh()
    rows.weight = nn.Parameter(torch.randn(RANK, DIM))
    assert fresh()
    with torch.inference_mode():
        rows()
        rows.weight.data.mul_(torch.rand(DIM))
        rows()
    assert fresh()
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float32):
        rows.to(dtype)
        assert fresh() and rows().dtype == (dtype if dtype == torch.float64 else torch.float32)
    rows.to("meta")
    assert rows().is_meta


def test_a_forward_that_fails_does_not_leave_the_factors_trusted():
    model = tiny("llama")
    trails = TrailMap({site: LoReFT(24, 4) for site in sites(model)})
    with attach(model, trails):
        handle = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(torch.tensor([[5, 6]]))
        handle.remove()
        for part in rotations(trails):
            part.weight.data.add_(1)
            assert gap(part()) < 1e-6
            before = part().detach().clone()
            part.weight.data.mul_(torch.rand(24))
            assert not torch.equal(part(), before)


def test_a_call_of_the_inner_model_does_not_leave_the_factors_trusted():
    model = tiny("llama")
    trails = TrailMap({site: LoReFT(24, 4) for site in sites(model)})
    handle = attach(model, trails)
    for end in (lambda: None, handle.remove):
        model.model(torch.tensor([[5, 6]]))
        end()
        for part in rotations(trails):
            before = part().detach().clone()
            part.weight.data.mul_(torch.rand(24))
            assert not torch.equal(part(), before)


def test_factors_of_inference_mode_serve_training():
    trail, h = LoReFT(DIM, RANK, init="paper"), torch.randn(4, DIM)
    with torch.inference_mode():
        trail(h)
    trail(h).sum().backward()
    expected = trail.rotation.weight.grad.clone()
    trail.zero_grad()
    trail.rotation._factors = None
    trail(h).sum().backward()
    assert torch.equal(trail.rotation.weight.grad, expected) and expected.any()


# --- the gradient


@pytest.mark.parametrize(("rank", "dim"), [(1, 5), (3, 7), (4, 4)])
def test_gradient_against_finite_differences_and_torch(rank, dim):
    rows = OrthonormalRows(rank, dim).double()
    rows.weight.data.add_(0.5 * torch.randn(rank, dim))

    def ours(weight: Tensor) -> Tensor:
        rows.weight.data = weight.detach()
        rows()
        return apply(rows, weight)

    def torchs(weight: Tensor) -> Tensor:
        q, triangle = torch.linalg.qr(weight.mT)
        return (q * triangle.diagonal().sign()).mT

    weight = rows.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(ours, weight)
    cotangent = torch.randn(rank, dim, dtype=torch.float64)
    (mine,) = torch.autograd.grad((ours(weight) * cotangent).sum(), weight)
    (theirs,) = torch.autograd.grad((torchs(weight) * cotangent).sum(), weight)
    torch.testing.assert_close(ours(weight), torchs(weight), rtol=0, atol=1e-14)
    torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)


def apply(rows: OrthonormalRows, weight: Tensor) -> Tensor:
    """The rows as a function of a weight that is not a leaf of the module."""
    from tokenpaths.trails.stiefel import _WithFactors

    _, r, triangle = rows._factors
    return _WithFactors.apply(weight, r, triangle)


def test_a_second_derivative_is_refused_and_not_wrong():
    rows = OrthonormalRows(RANK, DIM)
    (grad,) = torch.autograd.grad(rows().exp().sum(), rows.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_trails_compile(unchecked):
    trail, h = moving(lambda dim: LoReFT(dim, RANK))(DIM), torch.randn(4, DIM)
    trail(h).square().sum().backward()
    expected, grads = trail(h).detach(), [p.grad.clone() for p in trail.parameters()]
    trail.zero_grad()
    compiled = torch.compile(trail, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(h), expected, rtol=0, atol=1e-6)
    compiled(h).square().sum().backward()
    for parameter, grad in zip(trail.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-4)


# --- the cost


def rotations(trails: TrailMap) -> list[OrthonormalRows]:
    return [module for module in trails.modules() if isinstance(module, OrthonormalRows)]


class Counting(TorchDispatchMode):
    """Counts the QR factorisations, with the shapes they were given, and the comparisons of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.comparisons = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "linalg_qr" in str(function):
            self.shapes.append(tuple(args[0].shape))
        compared = str(function) in ("aten.equal.default", "aten.ne.Tensor") and args[0].shape[1:] == (4, 24)
        self.comparisons += compared
        return function(*args, **(kwargs or {}))


def test_one_batched_factorisation_an_optimizer_step():
    """Three layers, four accumulated micro-batches: one QR of three matrices a step, and one comparison a forward."""
    model = tiny("llama").requires_grad_(False)
    trails = TrailMap({site: LoReFT(24, 4) for site in sites(model, "all", All())})
    optimizer = torch.optim.AdamW(trails.parameters(), lr=0.01)
    ids = torch.randint(3, 61, (4, 2, 6))
    with attach(model, trails), Counting() as counted:
        for step in range(3):
            counted.shapes.clear()
            counted.comparisons = 0
            for micro in ids:
                model(micro, labels=micro).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            # at the first step the factors of each trail's own construction still hold
            assert counted.shapes == ([] if step == 0 else [(3, 24, 4)])
            assert counted.comparisons == len(ids)


def test_shapes_are_batched_apart_and_tied_trails_factorised_once():
    model = tiny("llama")
    places = sites(model, "all", All(), "block") + sites(model, "all", All(), "mlp")
    tied = LoReFT(24, 4)
    trails = TrailMap(
        dict(zip(places, [tied, tied, *(LoReFT(24, r) for r in (4, 2, 2)), Scaled(tied, 0.5)], strict=True))
    )
    with attach(model, trails), Counting() as counted:
        for part in rotations(trails):
            part.weight.data.add_(0.1)
        model(torch.tensor([[5, 6, 7]]))
    assert sorted(counted.shapes) == [(2, 24, 2), (2, 24, 4)]


def test_many_layers_at_once_are_the_same_as_one_by_one():
    together, apart = ([OrthonormalRows(RANK, DIM) for _ in range(5)] for _ in range(2))
    for one, other in zip(together, apart, strict=True):
        one.weight.data.normal_()
        other.load_state_dict(one.state_dict())
    prepare(together)
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one(), other())


def test_nothing_is_as_large_as_dim_times_dim():
    dim, rank = 512, 4
    trail, h = LoReFT(dim, rank, init="paper"), torch.randn(8, dim)
    largest = 0

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple) else (result,):
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel(), tensor.untyped_storage().nbytes() // tensor.element_size())
            return result

    saved: list[Tensor] = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with Watching(), keep:
        trail.rotation.weight.data.add_(0.1)
        trail(h).sum().backward()
    assert largest == dim * max(rank, len(h))
    assert {name: tuple(t.shape) for name, t in trail.state_dict().items()} == {
        "rotation.weight": (rank, dim),
        "W": (rank, dim),
        "b": (rank,),
    }
    assert sum(t.numel() for t in saved) < 16 * dim * rank
    cached = sum(t.numel() for t in trail.rotation._factors)
    assert cached == 2 * rank * dim + rank * rank


def test_factors_do_not_keep_a_graph():
    rows = OrthonormalRows(RANK, DIM)
    out = rows().sum()
    node = weakref.ref(out)
    assert all(not tensor.requires_grad for tensor in rows._factors)
    out.backward()
    del out
    assert node() is None


# --- a fresh LoReFT


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 0.0), (torch.float64, 2e-7), (torch.float16, 2e-4), (torch.bfloat16, 1e-3)]
)
def test_how_far_a_cast_moves_a_fresh_loreft(dtype, limit):
    """R is factorised anew in another dtype, so W - R is no longer exactly zero, as LoReFT's docstring says."""
    for dim, rank in ((64, 8), (576, 4), (4096, 8)):
        trail, h = LoReFT(dim, rank).to(dtype), torch.randn(16, dim).to(dtype)
        moved = (trail(h).double().norm(dim=-1) / h.double().norm(dim=-1)).max().item()
        assert moved <= limit


def test_factors_move_with_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made anew on another device R would differ by rounding, and a fresh LoReFT would no longer be the identity."""
    rotation = OrthonormalRows(3, 8)
    before = rotation()
    monkeypatch.setattr(torch.linalg, "qr", lambda *_: pytest.fail("factorised again"))
    assert torch.equal(rotation.to("cpu")(), before)
    monkeypatch.undo()
    rotation.to("meta").to_empty(device="cpu")
    with torch.no_grad():
        rotation.weight.copy_(torch.randn(3, 8))
    assert torch.allclose(rotation() @ rotation().mT, torch.eye(3), atol=1e-6)
