"""A check of your own trail: does it keep the promises that tokenpaths relies on?

    from tokenpaths.testing import check_trail


    def test_my_trail():
        check_trail(lambda dim: MyTrail(dim, rank=4))

It does not need pytest.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tokenpaths.randomness import own_randomness
from tokenpaths.site import Site
from tokenpaths.trailmap.notes import trail_to_note
from tokenpaths.trailmap.trailmap import TrailMap
from tokenpaths.trails.base import Trail, arguments, returns_the_moved_state


def check_trail(make: Callable[[int], Trail], dim: int = 16, *, seed: int = 0) -> None:
    """Assert that the trails which `make(dim)` makes keep the four promises of `Trail`, and what follows from them.

    A trail can be saved and loaded, gives the same answer twice in eval mode, sends a finite gradient to every
    parameter, and works in float64 and bfloat16. The random state is left as it was.

    Args:
        make: a function from the width of the states to a fresh trail, such as the class itself.
        dim: the width to check it at.
        seed: the seed of the states that the trail is checked on.

    Raises:
        AssertionError: a promise is broken. The message names it and says what to do.
    """
    with own_randomness(seed):
        trail = make(dim)
        assert isinstance(trail, Trail), (  # pyright: ignore[reportUnnecessaryIsInstance]
            f"make({dim}) gave {trail!r:.80}, which is no Trail: let your class inherit from tokenpaths.Trail"
        )
        moving = copy.deepcopy(trail)
        with torch.no_grad():  # away from the start, where much is zero
            for parameter in moving.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        _check_arguments(trail)
        _check_shape_and_dtype(trail, dim)
        _check_start(trail, dim)
        for each in (trail, moving):
            _check_determinism(each, dim)
            _check_saving(each, dim)
            _check_finite(each, dim)
        _check_each_token_on_its_own(moving, dim)
        _check_gradients(moving, dim)


def _check_arguments(trail: Trail) -> None:
    try:
        arguments(trail)
    except TypeError as error:
        raise AssertionError(f"promise 4 is broken (every argument is kept as an attribute): {error}") from error


def _check_shape_and_dtype(trail: Trail, dim: int) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        cast = copy.deepcopy(trail).to(dtype).eval()
        for shape in ((5, dim), (1, 1, dim), (2, 3, dim)):
            h = torch.randn(shape).to(dtype)
            try:
                d = cast(h)
            except Exception as error:
                raise AssertionError(
                    f"promise 1 is broken: {_name(trail)} in {dtype} failed for states of shape {list(shape)}: {error}"
                    ". Take any leading shape; make new tensors with h.new_zeros(...) and the like, and keep fixed "
                    "ones with register_buffer, so that they follow the trail's dtype and device"
                ) from error
            assert isinstance(d, Tensor) and d.shape == h.shape, (
                f"promise 1 is broken (same shape): {_name(trail)} gave {_shape(d)} for states of shape {list(shape)}. "
                "Return the displacement of h alone: one vector of the same width for each token"
            )
            assert d.dtype == dtype, (
                f"promise 1 is broken (same dtype): {_name(trail)} in {dtype} gave {d.dtype} for states of {dtype}. "
                "Compute in any dtype, and end with .to(h.dtype)"
            )
            assert bool(d.isfinite().all()), (
                f"{_name(trail)} in {dtype} gave NaN or infinity: compute what overflows or vanishes in float32"
            )


def _check_start(trail: Trail, dim: int) -> None:
    h = torch.randn(4, 8, dim)
    moved = any(bool(copy.deepcopy(trail).train(mode)(h).any()) for mode in (True, False))
    if trail.starts_at_identity and moved and returns_the_moved_state(trail, h):
        raise AssertionError(
            f"promise 1 is broken (the displacement): {_name(trail)} returns h + d, the moved state. Return d alone: "
            "what the trail returns is added to h"
        )
    if trail.starts_at_identity:
        assert not moved, (
            f"promise 3 is broken (a fresh trail moves nothing): a fresh {_name(trail)} moved a state. Start a factor "
            "of its displacement at exactly zero, or set starts_at_identity = False if its formula admits no identity"
        )
    else:
        assert moved, (
            f"{_name(trail)} has starts_at_identity = False, but a fresh one moved nothing: leave that line out"
        )


def _check_determinism(trail: Trail, dim: int) -> None:
    trail = copy.deepcopy(trail).eval()
    h = torch.randn(4, 8, dim)
    given, state = h.clone(), copy.deepcopy(trail.state_dict())
    with torch.no_grad():
        first = trail(h).clone()
        assert torch.equal(h, given), (
            f"{_name(trail)} changed the states that it was given: return the displacement, and work on no h in place"
        )
        torch.manual_seed(1)
        second = trail(h)
    assert torch.equal(first, second), (
        f"{_name(trail)} gave two answers for the same states in eval mode: draw random numbers only if self.training"
    )
    changed = [name for name, tensor in trail.state_dict().items() if not torch.equal(tensor, state[name])]
    assert not changed, (
        f"{_name(trail)} changed its own {', '.join(changed)} in eval mode: keep statistics only if self.training"
    )


def _check_saving(trail: Trail, dim: int) -> None:
    trail = copy.deepcopy(trail).eval()
    classes = {type(module) for module in trail.modules() if isinstance(module, Trail)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trail.safetensors"
        try:
            TrailMap({Site(): trail}).save(path)
            loaded = TrailMap.load(path, *classes)[Site()].eval()
        except Exception as error:
            raise AssertionError(
                f"{_name(trail)} cannot be saved, rebuilt from its arguments and loaded: {error}. Promise 4: whatever "
                "__init__ is given is kept unchanged, and alone decides which parameters there are"
            ) from error
    assert trail_to_note(loaded) == trail_to_note(trail), (
        f"promise 4 is broken: {trail!r} was rebuilt as {loaded!r}. Keep each argument of __init__ as it was given"
    )
    h = torch.randn(4, 8, dim)
    with torch.no_grad():
        same = torch.equal(loaded(h), trail(h))
    assert same, (
        f"{_name(trail)} moves states differently after saving and loading: something that it reads is not saved. Keep "
        "every tensor as an nn.Parameter or with register_buffer, and every other value as an argument of __init__"
    )


def _check_finite(trail: Trail, dim: int) -> None:
    fresh = trail
    for words, scale in (("zero", 0.0), ("tiny", 1e-12), ("large", 1e6)):
        trail = copy.deepcopy(fresh)
        h = (scale * torch.randn(4, 8, dim)).requires_grad_()
        d = trail(h)
        assert bool(d.isfinite().all()), (
            f"{_name(trail)} gave NaN or infinity for {words} states (times {scale:g}): guard divisions and roots, and "
            "use functions that do not overflow"
        )
        if d.requires_grad:
            d.sum().backward()
        found = {"the states": h.grad, **{name: p.grad for name, p in trail.named_parameters()}}
        for name, grad in found.items():
            assert grad is None or bool(grad.isfinite().all()), (
                f"{_name(trail)}: the gradient of {name} is NaN or infinite for {words} states (times {scale:g}): a "
                "root or norm has none at zero, and torch.where does not hide it; use clamp_min before the root"
            )


def _check_each_token_on_its_own(trail: Trail, dim: int) -> None:
    trail = copy.deepcopy(trail).double()
    h = torch.randn(3, 5, dim, dtype=torch.float64)
    others = torch.randn_like(h) * 100
    others[1, 2] = h[1, 2]
    with torch.no_grad():
        trail.eval()
        together = trail(h)
        alone = torch.stack([trail(token.view(1, 1, -1)).view(-1) for token in h.view(-1, dim)]).view_as(h)
        flat = trail(h.view(-1, dim)).view_as(h)
        trail.train()
        torch.manual_seed(0)
        first = trail(h)[1, 2]
        torch.manual_seed(0)  # the same dropout
        second = trail(others)[1, 2]
    for answer, expected, how in (
        (together, alone, "beside other tokens is moved otherwise than alone"),
        (flat, alone, "is moved otherwise in a flat batch of tokens, which some models have"),
        (second, first, "is moved otherwise, in train mode, when the tokens beside it change"),
    ):
        assert torch.allclose(answer, expected, rtol=1e-6, atol=1e-9), (
            f"promise 2 is broken (each token is moved on its own): with {_name(trail)}, a token {how}. Use no mean, "
            "norm, softmax or position over any dimension but the last"
        )


def _check_gradients(trail: Trail, dim: int) -> None:
    trail = copy.deepcopy(trail).train()
    h = torch.randn(8, 8, dim)
    for _ in range(2):
        trail.zero_grad()
        d = trail(h)
        trained = {name: p for name, p in trail.named_parameters() if p.requires_grad}
        if not trained:
            return
        assert d.requires_grad, (
            f"{_name(trail)} has no gradient: leave out detach(), .data, .item() and no_grad() between its "
            "parameters and the result"
        )
        try:
            (d * torch.randn_like(d)).sum().backward()
        except RuntimeError as error:
            raise AssertionError(
                f"{_name(trail)} cannot be trained: {error}. Keep no tensor with its graph from one forward to the next"
            ) from error
        dead = [name for name, p in trained.items() if p.grad is None or not bool(p.grad.any())]
        assert not dead, (
            f"no gradient reaches {', '.join(dead)} of {_name(trail)}: use it in forward without detach() or .data, "
            "keep it with register_buffer if it is not trained, or call requires_grad_(False) on it"
        )


def _name(trail: Trail) -> str:
    return type(trail).__name__


def _shape(answer: object) -> str:
    return f"shape {list(answer.shape)}" if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
