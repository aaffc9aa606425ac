"""Waypoints: bring hidden states, or attention, to where they are when the model has been helped.

    plain = encode([(question, answer)], tokenizer)
    helped = encode([(examples_shown + question, answer)], tokenizer)      # or a system prompt, or a chain of thought
    layers = sites(model, range(10, 20), Last(1) | Answer())
    targets = capture_states(model, plain, helped, layers, path="targets.safetensors")
    for step in steps(model, trails, [Waypoints(plain, targets=targets)], steps=100): ...

Targets are captured once, from the frozen model that has the help in its context. The steered model, which has not, is
to match them. **Corresponding tokens** are counted from the end: the last token of the plain example is the last of the
helped one, and so on. A token that is matched must be the same in both, except the last one of the prompt: behind a
chain of thought the answer begins after another token than behind the question.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias, get_args
from weakref import ref

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenpaths.attachment.handle import attachments
from tokenpaths.attachment.runs import evaluating
from tokenpaths.checking import check_list, quoted
from tokenpaths.data.examples import Batch, Example, check_examples, collate
from tokenpaths.engine.batches import by_length
from tokenpaths.engine.divergence import at_least_float32, kl_of_rows
from tokenpaths.engine.forwards import forward_states
from tokenpaths.engine.states import recording, recording_maps
from tokenpaths.site import Host, Site
from tokenpaths.site.fingerprint import describe
from tokenpaths.site.host import check_model
from tokenpaths.site.identity import exact_key
from tokenpaths.tokens import Context, token_pieces
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.training.objectives.base import Objective, host_of, tokens_of
from tokenpaths.training.objectives.targets import Kind, Targets, store
from tokenpaths.undo import tidy

By: TypeAlias = Literal["relative", "mse", "cosine"]


@dataclass
class _Matching(Objective):
    """What matching states and matching attention share: the mean distance to targets, over sites and tokens."""

    targets: Targets = field(kw_only=True)
    kind: ClassVar[Kind]

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if not isinstance(self.targets, Targets):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"{name}: targets are what capture_{self.kind} returned, not {quoted(self.targets)}")
        if self.targets.kind != self.kind:
            raise ValueError(f"{name} needs targets of capture_{self.kind}, not of {self.targets.kind}")
        for number, example in enumerate(self.examples):
            if example.ids not in self.targets:
                raise ValueError(f"{name}: example {number} has no targets: capture them for it first")
        self._checked: ref[nn.Module] | None = None  # the model that the targets were last found to be of

    def loss(self, model: nn.Module, trails: Adapter, batch: Batch) -> Float[Tensor, ""]:
        if self._checked is None or self._checked() is not model:
            with trails.off():
                self.targets.check(model)
            self._checked = ref(model)
        with _reading(host_of(model, trails), self.targets.sites, self.kind) as seen:
            forward_states(model, batch)
        first = batch.attention_mask.argmax(1).tolist()  # where the text of each row begins
        apart: list[Tensor] = []
        for site, read in enumerate(seen()):
            for row, ids in enumerate(tokens_of(batch)):
                positions, target = self.targets.of(ids, site)
                text = slice(first[row], first[row] + len(ids))
                steered = _rows(read, row, text, positions.to(read.device))
                apart.append(self.distance(at_least_float32(steered), at_least_float32(target.to(read.device))))
        return torch.cat(apart).mean()

    def distance(self, steered: Tensor, target: Tensor) -> Float[Tensor, " n"]:
        """The distance of each token from its target."""
        raise NotImplementedError

    def terms(self, examples: Sequence[Example]) -> int:
        return sum(self.targets.count(example.ids) for example in examples)


@dataclass
class Waypoints(_Matching):
    """The mean distance of states h' of the steered model to their targets t, over all sites and tokens captured.

        relative    ||h' - t||^2 / ||t||^2
        mse         ||h' - t||^2 / dim
        cosine      1 - cos(h', t)

    With `PSR` trails on all layers and tokens and "mse" it is the recipe of "Steer like the LLM" (PSR, arXiv
    2605.03907) as a digest gives it: at one layer, mse(h + d, t) is the error of the displacement d against the
    activation difference t - h that the prompt makes. (Unlike there, all layers are steered at once while they learn.)

    Args:
        examples: the plain examples that `targets` were captured for, or some of them.
        targets: what `capture_states` returned.
        by: the distance.

    Raises:
        ValueError: `targets` are of another kind or lack an example, or `by` is not one of the three.
    """

    by: By = field(default="relative", kw_only=True)
    kind: ClassVar[Kind] = "states"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by not in get_args(By):
            raise ValueError(f"by must be 'relative', 'mse' or 'cosine', not {self.by!r}")

    def distance(self, steered: Float[Tensor, "n dim"], target: Float[Tensor, "n dim"]) -> Float[Tensor, " n"]:
        if self.by == "cosine":
            return 1 - F.cosine_similarity(steered, target, dim=-1)
        square = (steered - target).square()
        if self.by == "mse":
            return square.mean(-1)
        return square.sum(-1) / target.square().sum(-1).clamp_min(1e-12)


@dataclass
class WaypointsAttention(_Matching):
    """KL(target || steered) of attention rows, in nats, the mean over heads, then over sites and tokens captured.

    Without the help nothing can be attended to in it, so the attention that the helped model pays to the help is added
    to the first token of the plain text, the attention sink. Needs eager attention.

    Args:
        examples: the plain examples that `targets` were captured for, or some of them.
        targets: what `capture_attention` returned.

    Raises:
        ValueError: `targets` are of another kind or lack an example.
    """

    kind: ClassVar[Kind] = "attention"

    def distance(
        self, steered: Float[Tensor, "n heads tokens"], target: Float[Tensor, "n heads tokens"]
    ) -> Float[Tensor, " n"]:
        return kl_of_rows(target, steered).mean(-1)


@tidy
def capture_states(
    model: nn.Module,
    examples: Sequence[Example],
    helped: Sequence[Example],
    sites: Sequence[Site],
    *,
    path: str | os.PathLike[str] | None = None,
    batch_size: int = 8,
    blocks: str | None = None,
    tokenizer: Any = None,
) -> Targets:
    """Capture where the states of `examples` should be: where they are in the frozen model given `helped` instead.

    Args:
        model: the frozen model. It is read in evaluation mode.
        examples: without the help, as the steered model will see them.
        helped: the same examples with the help in their prompts, in the same order.
        sites: layers, streams and tokens to capture. The token rules choose among the tokens of the plain examples.
        path: a safetensors file that they are written to as they come, whole or not at all, and read from. Unless
            given, they are kept in memory. A plain example that comes twice is stored once.
        batch_size: helped examples in one forward.
        blocks: names the block list of a model that has several.
        tokenizer: for `Match`.

    Raises:
        ValueError: trails are attached and on, the lists differ in length, no token of an example is chosen, or a
            chosen token is not the same in the helped example.
    """
    return _capture("states", model, examples, helped, sites, path, batch_size, blocks, tokenizer)


@tidy
def capture_attention(
    model: nn.Module,
    examples: Sequence[Example],
    helped: Sequence[Example],
    sites: Sequence[Site],
    *,
    path: str | os.PathLike[str] | None = None,
    batch_size: int = 8,
    blocks: str | None = None,
    tokenizer: Any = None,
) -> Targets:
    """Capture attention rows instead of states, at sites of stream "attention", of one head each or of all.

    Arguments and errors are those of `capture_states`; `WaypointsAttention` says what becomes of attention to the help.
    A captured token takes heads x (tokens of its example) numbers. Needs eager attention.
    """
    check_list("capture: site", sites, Site, "sites(model, layers, tokens, 'attention') makes a list of them")
    if wrong := [site for site in sites if site.stream != "attention"]:
        raise ValueError(f"{wrong[0]}: attention rows are captured at sites of stream 'attention'")
    return _capture("attention", model, examples, helped, sites, path, batch_size, blocks, tokenizer)


@torch.no_grad()
def _capture(
    kind: Kind,
    model: nn.Module,
    examples: Sequence[Example],
    helped: Sequence[Example],
    sites: Sequence[Site],
    path: str | os.PathLike[str] | None,
    batch_size: int,
    blocks: str | None,
    tokenizer: Any,
) -> Targets:
    check_model(model)
    check_examples("capture", examples)
    check_examples("capture, helped", helped)
    check_list("capture: site", sites, Site, "sites(model, layers, tokens) makes a list of them")
    if any(attachment.trails.enabled for attachment in attachments(model)):
        raise ValueError("trails are at work in the model, but targets are the frozen one's: capture in trails.off()")
    if not sites:
        raise ValueError("capture needs at least one site")
    host = Host.of(model, blocks)
    found = [host.locate(site)[0] for site in sites]
    pairs = _pairs(examples, helped)
    chosen = [_positions(number, plain, help, found, tokenizer) for number, plain, help in pairs]

    def values() -> Generator[tuple[int, list[Tensor]]]:
        """The number of each example, and what is stored of it at each site."""
        for numbers in by_length([len(help) for _, _, help in pairs], batch_size):
            batch = collate([pairs[i][2] for i in numbers]).to(host.device)
            with _reading(host, found, kind) as seen:
                forward_states(model, batch)
            for row, number in enumerate(numbers):
                _, plain, help = pairs[number]
                shift, text = len(help) - len(plain), slice(0, len(help))
                rows = [
                    _rows(r, row, text, p.to(r.device) + shift) for r, p in zip(seen(), chosen[number], strict=True)
                ]
                yield number, [_without_help(r, shift) for r in rows] if kind == "attention" else rows

    base = {**describe(model), "key": exact_key(model)}
    with evaluating(model):
        return store(path, kind, found, base, [plain.ids for _, plain, _ in pairs], chosen, values())


def _without_help(rows: Float[Tensor, "n heads tokens"], shift: int) -> Float[Tensor, "n heads _"]:
    """Attention rows over the plain text: the attention that was paid to the help is added to the first token."""
    return torch.cat([rows[..., : shift + 1].sum(-1, keepdim=True), rows[..., shift + 1 :]], -1)


def _pairs(examples: Sequence[Example], helped: Sequence[Example]) -> list[tuple[int, Example, Example]]:
    """The examples to capture, each once: its number, the plain and the helped example."""
    if not examples or len(examples) != len(helped):
        raise ValueError(f"capture takes a helped example for each plain one, not {len(helped)} for {len(examples)}")
    kept: dict[tuple[int, ...], tuple[int, Example, Example]] = {}
    for number, (plain, help) in enumerate(zip(examples, helped, strict=True)):
        if len(help) < len(plain):
            raise ValueError(f"example {number} has {len(plain)} tokens, helped {len(help)}: help makes it longer")
        before = kept.setdefault(plain.ids, (number, plain, help))
        if before[1:] != (plain, help) or before[1].spans != plain.spans:
            raise ValueError(
                f"examples {before[0]} and {number} have the same tokens, but are not helped or answered alike: there "
                "would be two targets for one text"
            )
    return list(kept.values())


def _positions(
    number: int, plain: Example, helped: Example, sites: Sequence[Site], tokenizer: Any
) -> list[Int[Tensor, " n"]]:
    """The positions to capture in a plain example, for each site; each must have its like in the helped example."""
    batch = collate([plain])
    pieces = None if tokenizer is None else token_pieces(tokenizer)
    context = Context(batch.attention_mask.bool(), batch.prompt_mask, batch.input_ids, batch.spans, pieces)
    masks = {rule: rule.mask(context)[0] for rule in dict.fromkeys(site.tokens for site in sites)}
    chosen = [masks[site.tokens].nonzero()[:, 0] for site in sites]
    if not any(map(len, chosen)):
        raise ValueError(f"example {number}: no token of it is chosen at any site, so there is nothing to match")
    shift = len(helped) - len(plain)
    for site, positions in zip(sites, chosen, strict=True):
        for p in positions.tolist():
            if plain.ids[p] != helped.ids[p + shift] and p != plain.prompt_length - 1:
                raise ValueError(
                    f"example {number}, {site}: token {p} ({plain.ids[p]}) is {helped.ids[p + shift]} in the helped "
                    "example, counted from the end. Choose tokens that both have, as in All() - First(1) where the "
                    "help stands behind a begin-of-text token"
                )
    return chosen


@contextmanager
def _reading(
    host: Host, sites: Sequence[Site], kind: Kind
) -> Generator[Callable[[], list[Float[Tensor, "batch ..."]]]]:
    """What stands at sites in the last forward inside: states [batch, seq, dim] or maps [batch, heads, seq, seq]."""
    if kind == "states":
        with recording({site: host.locate(site)[1] for site in sites}) as states:
            yield lambda: [states[site] for site in sites]
        return

    layers = [host.locate(site)[0].layer for site in sites]
    with recording_maps(host, set(layers)) as maps:
        yield lambda: [
            maps[layer] if site.head is None else maps[layer][:, site.head : site.head + 1]
            for layer, site in zip(layers, sites, strict=True)
        ]


def _rows(read: Tensor, row: int, text: slice, positions: Tensor) -> Tensor:
    """States [n, dim] or attention rows [n, heads, tokens] of one text, whose padding is cut off."""
    if read.ndim == 4:
        return rearrange(read[row, :, text, text][:, positions], "heads chosen keys -> chosen heads keys")
    return read[row, text][positions]
