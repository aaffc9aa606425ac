"""The real pyreft 0.1.0 as an oracle: its six interventions with given weights, and whole-model logits through pyvene.

    pyreft = load_pyreft()                                        # the package itself; ImportError says what to install
    phi = intervention("loreft", R, W, b)                         # a pyreft module computing goldens.loreft
    logits = pyreft_logits(model, {3: phi}, ids, [[0, 1], [4, 5]])  # phi after block 3, at those positions of each row
    measure_parity()                                              # how far tokenpaths' trails are from all six

pyreft declares twenty requirements, `transformers==4.45.1` among them, and its import needs few of them. So install
both without: `pip install --no-deps pyreft==0.1.0 pyvene==0.1.8`. What the import does need is in NEEDS; no stand-in
replaces any of it.
"""

import contextlib
import copy
import importlib.util
import io
import types
import warnings
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tokenpaths import DiReFT, LoReFT, NoReFT, Trail
from tokenpaths.trails import BiasReFT, ConstantReFT, DirectReFT

# goldens.py function -> pyreft class
CLASSES = {
    "loreft": "LoreftIntervention",
    "noreft": "NoreftIntervention",
    "direct": "DireftIntervention",
    "direft_paper": "NodireftIntervention",
    "constant": "ConsreftIntervention",
    "bias": "LobireftIntervention",
}

# Site stream -> pyvene component. A head is missing: pyvene addresses it by a nested position, ("h.pos").
COMPONENTS = {
    "embedding": "block_input",
    "block": "block_output",
    "attention": "attention_output",
    "mlp": "mlp_output",
}

# pyvene.data_generators names matplotlib and networkx, pyreft's trainer datasets: imported, never entered here.
NEEDS = ("pyreft", "pyvene", "accelerate", "datasets", "matplotlib", "networkx")


def load_pyreft() -> types.ModuleType:
    """The pyreft package, its greeting and its warnings silenced. First call: 6 s, or 15 s from a cold disk."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"pyreft cannot be imported without {', '.join(missing)}. Install pyreft==0.1.0 and pyvene==0.1.8 with "
            "`pip install --no-deps`, for pyreft pins an old transformers; the others as usual."
        )
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import pyreft
    return pyreft


@contextlib.contextmanager
def mended() -> Iterator[None]:
    """What `ReftModel.load` needs to make all six classes: pyreft keeps neither their dtype nor `add_bias`."""
    module = load_pyreft().interventions
    before = {name: getattr(module, name).__init__ for name in CLASSES.values()}
    defaults = {"add_bias": False, "dtype": torch.float32}
    try:
        for name, init in before.items():
            getattr(module, name).__init__ = lambda self, init=init, **given: init(self, **{**defaults, **given})
        yield
    finally:
        for name, init in before.items():
            getattr(module, name).__init__ = init


def intervention(
    name: str, R: Float[Tensor, "rank dim"], W: Float[Tensor, "rank dim"], b: Float[Tensor, " rank"]
) -> nn.Module:
    """The pyreft class of the formula `name` (a key of CLASSES) with these weights, in their dtype.

    `phi(h)` is the moved state. No dropout, no activation, and no bias b' in the projection of NoReFT.
    """
    rank, dim = R.shape
    Class = getattr(load_pyreft(), CLASSES[name])
    with torch.random.fork_rng(devices=[]):  # pyreft draws its first weights, and torch completes R, at random
        phi = Class(embed_dim=dim, low_rank_dimension=rank, dtype=R.dtype, add_bias=False).to(R.dtype)
        copy_weights(phi, R, W, b)
    return phi


def copy_weights(
    phi: nn.Module, R: Float[Tensor, "rank dim"], W: Float[Tensor, "rank dim"], b: Float[Tensor, " rank"]
) -> None:
    """Copy R (or P), W, b into any of the six classes. The constant and the bias class have no W.

    pyreft keeps R transposed, behind torch's orthogonal parametrization, which is set by assignment; and P as it is.
    """
    if hasattr(phi, "rotate_layer"):
        phi.rotate_layer.weight = R.T
        gap = (phi.rotate_layer.weight - R.T).abs().max().item()
        assert gap < 10 * torch.finfo(R.dtype).eps, (
            f"pyreft took another R, off by {gap:.1e}: are its rows orthonormal?"
        )
    else:
        phi.proj_layer.weight.data.copy_(R)
    if _has_W(phi):
        phi.learned_source.weight.data.copy_(W)
        phi.learned_source.bias.data.copy_(b)
    else:
        phi.learned_source.data.copy_(b)


def gradients(
    phi: nn.Module, h: Float[Tensor, "*shape dim"], cotangent: Float[Tensor, "*shape dim"]
) -> dict[str, Tensor]:
    """d<phi(h), cotangent> / d h, R (or P), W, b, each in the shape of `copy_weights`; no W where the class has none.

    The gradient of R is taken at R itself, before torch's orthogonal parametrization bends it to the manifold.
    """
    h = h.clone().requires_grad_()
    with parametrize.cached():  # one R a forward, so that it can be differentiated by
        if hasattr(phi, "rotate_layer"):
            R, transposed = phi.rotate_layer.weight, True
        else:
            R, transposed = phi.proj_layer.weight, False
        inputs = {"h": h, "R": R}
        if _has_W(phi):
            inputs |= {"W": phi.learned_source.weight, "b": phi.learned_source.bias}
        else:
            inputs |= {"b": phi.learned_source}
        found = torch.autograd.grad((phi(h) * cotangent).sum(), list(inputs.values()))
    grads = dict(zip(inputs, found, strict=True))
    return grads | {"R": grads["R"].T} if transposed else grads


def reft_model(model: nn.Module, phis: dict[int, nn.Module], stream: str = "block") -> nn.Module:
    """pyreft's wrapper of a copy of `model`, with an intervention a layer. A copy, for pyvene removes foreign hooks."""
    pyreft = load_pyreft()
    sites = [
        {
            "layer": layer,
            "component": COMPONENTS[stream],
            "low_rank_dimension": phi.learned_source.bias.shape[0] if _has_W(phi) else phi.learned_source.shape[0],
            "intervention": phi,
        }
        for layer, phi in phis.items()
    ]
    return pyreft.get_reft_model(copy.deepcopy(model), pyreft.ReftConfig(representations=sites))


def pyreft_logits(
    model: nn.Module,
    phis: dict[int, nn.Module],
    ids: Int[Tensor, "batch seq"],
    positions: list[list[int]],
    stream: str = "block",
    **inputs: Tensor,
) -> Float[Tensor, "batch seq vocab"]:
    """Logits of `model` with `phis[l]` laid on `stream` of layer l, at `positions[row]`: columns, as many in every row.

    `inputs` go to the model: attention_mask, position_ids.
    """
    _, output = reft_model(model, phis, stream)(
        {"input_ids": ids, **inputs}, unit_locations={"sources->base": (None, [positions] * len(phis))}
    )
    return output.logits


# goldens.py function -> tokenpaths class
TRAILS = {
    "loreft": LoReFT,
    "noreft": NoReFT,
    "direct": DirectReFT,
    "direft_paper": DiReFT,
    "constant": ConstantReFT,
    "bias": BiasReFT,
}


@torch.no_grad()
def trail(
    name: str, R: Float[Tensor, "rank dim"], W: Float[Tensor, "rank dim"], b: Float[Tensor, " rank"]
) -> tuple[Trail, dict[str, nn.Parameter]]:
    """The tokenpaths trail of the formula `name` with these weights, in their dtype; and its own R (or P), W and b."""
    rank, dim = R.shape
    made = TRAILS[name](dim, rank).to(R.dtype)
    named = {
        "R": {"noreft": "P", "direft_paper": "W2"}.get(name, "rotation.weight"),
        "W": {"direft_paper": "W1", "constant": None, "bias": None}.get(name, "W"),
        "b": "b",
    }
    parameters = {letter: made.get_parameter(own) for letter, own in named.items() if own is not None}
    for letter, parameter in parameters.items():
        parameter.copy_({"R": R, "W": W, "b": b}[letter])
    return made, parameters


def differences(name: str, dim: int, rank: int, dtype: torch.dtype) -> dict[str, float]:
    """The largest |tokenpaths - pyreft| of the moved state and of its gradients, as a share of pyreft's largest entry.

    Weights and states are random. pyreft's gradient of R is carried to our parameter by torch's own QR in float64.
    """
    generator = torch.Generator().manual_seed(dim)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    R = -torch.linalg.qr(normal(dim, rank)).Q.T  # signs that LAPACK would not choose
    if name in ("noreft", "direft_paper"):
        R = 1.5 * R + 0.1
    R, W, b, h, cotangent = (
        t.to(dtype) for t in (R, normal(rank, dim) / dim**0.5, normal(rank), normal(2, 5, dim), normal(2, 5, dim))
    )
    phi = intervention(name, R, W, b)
    if hasattr(phi, "rotate_layer"):
        R = phi.rotate_layer.weight.detach().T.contiguous()  # as pyreft took it, through its own factorisation
    theirs = {"h'": phi(h).detach(), **gradients(phi, h, cotangent)}
    if name not in ("noreft", "direft_paper"):
        weight = R.double().requires_grad_()
        q, triangle = torch.linalg.qr(weight.T)
        rows = (q * triangle.diagonal().sign()).T
        (theirs["R"],) = torch.autograd.grad(rows, weight, theirs["R"].double())
    made, parameters = trail(name, R, W, b)
    state = h.clone().requires_grad_()
    moved = state + made(state)
    found = torch.autograd.grad((moved * cotangent).sum(), [state, *parameters.values()])
    ours = {"h'": moved.detach(), "h": found[0], **dict(zip(parameters, found[1:], strict=True))}
    assert ours.keys() == theirs.keys()
    return {key: ((ours[key] - theirs[key]).abs().max() / theirs[key].abs().max()).item() for key in ours}


def measure_parity() -> dict[str, float]:
    """For each formula the largest of `differences` in float32: forward and gradients, in 24 and in 576 dimensions.

    In more dimensions float32 sums are the limit: at 2048 both libraries are 1e-6 away from the gradient in float64.
    """
    return {name: max(max(differences(name, dim, 4, torch.float32).values()) for dim in (24, 576)) for name in CLASSES}


def _has_W(phi: nn.Module) -> bool:
    return isinstance(phi.learned_source, nn.Linear)
