"""Trails for engines that are not Hugging Face models: a function for a hook on a layer, and EasySteer's payloads.

move = hook(trails, Site(15))                        # once; it keeps nothing between calls
h = move(h, position, prompt_length)                 # in the engine: states of one request there, chunk by chunk

A gate is asked once for each request, where its prompt is known (`opens`); what it shuts is not passed through `move`.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from tokenpaths.attachment.moving import Part, move_states
from tokenpaths.interop.affine import Affine, affine
from tokenpaths.site import Site
from tokenpaths.tokens import All, Answer, AnswerFirst, Context, Either, First, Last, Prompt, Rule, Tokens, leaves
from tokenpaths.trailmap.gate import Gate
from tokenpaths.trailmap.trailmap import TrailMap
from tokenpaths.trails.base import Trail

Move: TypeAlias = Callable[[Tensor, int, int], Tensor]
_COUNTED = (All, Prompt, Answer, AnswerFirst, First, Last)
"""The rules that need no more than positions and the length of the prompt."""


def hook(trails: TrailMap, site: Site, *, strength: float = 1.0) -> Move:
    """A function that does at one place what `attach` does there.

    `move(states, position, prompt_length)` takes the states of successive tokens of one request, n x d, the position of
    the first of them, counted from 0 without padding, and the number of tokens of the prompt; it gives the moved
    states, of the same dtype, and the very ones where no token is chosen. It keeps nothing: chunks of a prompt, a
    prefix that came from a cache, and requests of many threads may come in any order.

    Args:
        trails: the map. Its trails are not copied, and act in the mode that they are in: call `trails.eval()` first.
        site: the layer, stream and head whose states the engine hands over, counted as in the map. Its rule is not
            read: all trails of the map that lie there act, each by its own.
        strength: multiplies every displacement.

    Raises:
        ValueError: no trail lies there, or a rule reads more than positions (`Tokens`, `Match`, `Span`).
    """
    found = [(at, trail) for at, trail in trails.items() if _place(at) == _place(site)]
    if not found:
        places = ", ".join(str(at) for at in trails.sites)
        raise ValueError(f"no trail lies at {site}; the sites are {places:.300}")
    for at, _ in found:
        if odd := next((leaf for leaf in leaves(at.tokens) if not isinstance(leaf, _COUNTED)), None):
            raise ValueError(
                f"{at}: {odd} reads the tokens, and a hook is told their positions alone: lay it elsewhere"
            )
    parts = [Part(at, trail, number) for number, (at, trail) in enumerate(found)]
    return functools.partial(_move, parts, strength)


def _place(site: Site) -> tuple[int, str, int | None]:
    return site.layer, site.stream, site.head


@torch.no_grad()
def _move(parts: list[Part], strength: float, states: Tensor, position: int, prompt_length: int) -> Tensor:
    if states.ndim != 2 or position < 0 or prompt_length < 1:
        raise ValueError(
            "a hook takes the states of one request, n x d, the position of the first from 0 up, and the length of "
            f"the prompt from 1 up; it was given shape {list(states.shape)}, {position} and {prompt_length}"
        )
    until = position + len(states)
    real = torch.ones(1, max(until, prompt_length), dtype=torch.bool)
    prompt = real.clone()
    prompt[:, prompt_length:] = False
    context = Context(real, prompt, None)
    masks = [part.site.tokens.mask(context)[0, position:until] for part in parts]
    rows = functools.reduce(torch.logical_or, masks).nonzero().squeeze(1).to(states.device)
    if not len(rows):
        return states
    chosen = [mask.to(rows.device)[rows] for mask in masks] if len(parts) > 1 else []
    return states.index_copy(0, rows, move_states(parts, chosen, states.index_select(0, rows), strength))


def opens(gate: Gate, states: Sequence[Float[Tensor, " dim"]]) -> bool:
    """Whether a gate opens for a request.

    Args:
        gate: `trails.gate`.
        states: of the frozen model, behind blocks `gate.layers`, at the last token of prompt + probe, for each of
            `gate.probes`: all layers of the first probe, then those of the next. The engine runs the prompt once with
            each probe behind it, and writes nothing.

    Raises `ValueError` for another number of states.
    """
    due = len(gate.layers) * len(gate.probes)
    if len(states) != due:
        raise ValueError(f"the gate reads {due} states, one for each probe and layer, and was given {len(states)}")
    return bool(gate.opens([state[None] for state in states])[0])


# EasySteer


@torch.no_grad()
def easysteer(trails: TrailMap) -> list[dict[str, Any]]:
    """One vector of EasySteer's `SteeringSpec` for each trail: `{"algorithm", "payload", "layers", "apply"}`.

    Constants become "direct" (h + v). Other affine trails B (M y + k) become "loreft", with rotate_layer = B,
    learned_source_weight = M + B^T and learned_source_bias = k, which is the same displacement whether or not B is
    orthonormal. Payloads are EasySteer's version 1: numbers in float32, as base64.

    Raises `ValueError` for a gate, for trails that are not affine, for another stream than block, for rules that
    EasySteer does not have, and for two trails at one layer, the second of which would read what the first moved.
    """
    if trails.gate is not None:
        raise ValueError("EasySteer has no gates: set trails.gate = None, and ask serve.opens before each request")
    layers = [site.layer for site in trails.sites]
    if twice := next((layer for layer in layers if layers.count(layer) > 1), None):
        raise ValueError(f"two trails lie at layer {twice}: EasySteer lets the second read what the first has moved")
    return [_vector(site, trail) for site, trail in trails.items()]


def _vector(site: Site, trail: Trail) -> dict[str, Any]:
    told = affine(trail)
    if site.stream != "block" or told is None or told.full:
        raise ValueError(f"{site}: EasySteer moves what blocks give, by affine trails of low rank, not {trail!r:.80}")
    if told.constant is not None:
        kind, tensors, extra = "direct", {f"layer.{site.layer}": told.constant}, {}
    else:
        kind, tensors, extra = "loreft", _loreft(told), {"layer": site.layer}
    named = {"direct": "direction", "loreft": "reft"}[kind]
    payload = _payload(named, {name: part.float().cpu().contiguous() for name, part in tensors.items()}, extra)
    return {"algorithm": kind, "payload": payload, "layers": [site.layer], "apply": _apply(site)}


def _payload(kind: str, tensors: dict[str, Tensor], extra: dict[str, int]) -> dict[str, Any]:
    """With EasySteer's checksum: of the kind, of names, shapes and bytes in order of name, and of what is beside."""
    digest = hashlib.sha256(f"{kind}:1".encode())
    shown: dict[str, Any] = {}
    for name, part in sorted(tensors.items()):
        content = part.numpy().tobytes()
        digest.update(name.encode() + str(tuple(part.shape)).encode() + content)
        shown[name] = {"shape": list(part.shape), "data": base64.b64encode(content).decode()}
    for name, value in sorted(extra.items()):
        digest.update(f"{name}={value!r}".encode())
    return {"version": 1, "kind": kind, "tensors": shown, "extra": extra, "sha256": digest.hexdigest()}


def _loreft(told: Affine) -> dict[str, Tensor]:
    return {
        "rotate_layer": told.B,
        "learned_source_weight": told.M + told.B.mT,
        "learned_source_bias": told.k,
    }


def _apply(site: Site) -> dict[str, Any]:
    """A rule as EasySteer's clauses."""
    found: dict[str, Any] = {}
    for rule in _united(site.tokens):
        match rule:
            case All():
                clause: dict[str, Any] = {"prompt": "all", "generation": "all"}
            case AnswerFirst():
                clause = {"generation_window": [0, rule.n]}
            case Prompt():
                clause = {"prompt": "all"}
            case Answer():
                clause = {"generation": "all"}
            case First():
                clause = {"prompt_window": [0, rule.n]}
            case Last():
                clause = {"prompt_window": [-rule.n, None]}
            case Tokens():
                clause = {"prompt_tokens": list(rule.ids), "generation_tokens": list(rule.ids)}
            case _:
                raise ValueError(f"{site}: EasySteer has no clause for {rule}")
        if set(found) & set(clause):
            raise ValueError(f"{site}: EasySteer takes one {min(set(found) & set(clause))} a vector")
        found |= clause
    return found


def _united(rule: Rule) -> list[Rule]:
    return [*_united(rule.left), *_united(rule.right)] if isinstance(rule, Either) else [rule]
