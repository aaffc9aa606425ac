"""A gate that opens for a task, asked in any words, and stays shut on all other requests.

forms = {"trained": prompts, "by list": prompts_in_other_words, ...}        # the same task in several wordings
found = fit_gate(model, tokenizer, forms, asks=asks, other={"news": news})  # what else is asked of the same texts
print(found)                                         # reliability, generality, locality
with attach(model, trails, when=found.gate): ...     # or trails.gate = found.gate, which is saved with them
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenpaths.attachment.runs import evaluating
from tokenpaths.checking import as_whole, check_list
from tokenpaths.data.examples import Example, collate
from tokenpaths.data.tokenizing import check_tokenizer, tokenized
from tokenpaths.engine.batches import batches
from tokenpaths.engine.forwards import forward_states
from tokenpaths.engine.readings import frozen
from tokenpaths.engine.states import recording
from tokenpaths.limits.asks import OPENINGS, content_of, other_asks
from tokenpaths.site import Host, Place
from tokenpaths.stats.intervals import UNKNOWN, Interval, mean_interval
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.trailmap.gate import Gate
from tokenpaths.training.samples import chat_opening, self_samples
from tokenpaths.undo import tidy

Prompts: TypeAlias = Sequence[str] | Mapping[str, Sequence[str]]
"""Prompts of one kind, or of several by name."""
Role = Literal["form", "ask", "far"]
PROBE = "\n\nTask:"
"""What is put behind every prompt, for the gate's reading alone."""
LEAST = 8  # prompts of a form
FOLDS = 8
SHRINK = 0.4
"""How far correlations are shrunk towards zero."""


@dataclass(frozen=True)
class KindOpened:
    """How a gate does on one kind of prompts, whose direction and threshold were fitted without this kind.

    `role` is "form" for a wording of the task, "ask" for another ask of the task's texts, and "far" for anything else.
    `opened` is the share of its prompts that open. For a form, `known` is the share of prompts that open when other
    prompts of this form were fitted.
    """

    name: str
    role: Role
    prompts: int
    opened: float
    known: float = math.nan


@dataclass(frozen=True, eq=False)
class GateFit:
    """A fitted gate, and how it does.

    Args:
        gate: for `attach(model, trails, when=gate)`.
        kinds: each kind that was read.
        near: the share of other asks that may open, as promised.
        far: the same of anything else.
    """

    gate: Gate
    kinds: tuple[KindOpened, ...]
    near: float
    far: float

    def opened(self, role: Role) -> list[float]:
        """The share of prompts that open, of each kind of this role, which was not fitted."""
        return [kind.opened for kind in self.kinds if kind.role == role]

    @property
    def reliability(self) -> tuple[float, Interval]:
        """The share of unseen prompts of known forms that open."""
        return _mean([kind.known for kind in self.kinds if kind.role == "form"])

    @property
    def generality(self) -> tuple[float, Interval]:
        """The share of prompts of an unseen form that open; NaN where only one form was given."""
        forms = self.opened("form")
        return _mean(forms) if len(forms) > 1 else (math.nan, UNKNOWN)

    def locality(self, role: Literal["ask", "far"]) -> tuple[float, Interval]:
        """The share of prompts of an unseen ask, or far kind, that open."""
        return _mean(self.opened(role))

    def __str__(self) -> str:
        forms = self.opened("form")
        lines = [f"opens on {_told(self.reliability)} of unseen prompts of the {len(forms)} forms given (reliability)"]
        if len(forms) > 1:
            lines.append(
                f"     on {_told(self.generality)} of a form not given, on {min(forms):.2f} of the worst (generality)"
            )
        else:
            lines.append("     on forms not given: cannot tell, as one form was given (generality)")
        parts: tuple[tuple[Literal["ask", "far"], str, float], ...] = (
            ("ask", "other asks of the texts", self.near),
            ("far", "far prompts", self.far),
        )
        for role, name, most in parts:
            kinds = self.opened(role)
            told = _told(self.locality(role))
            lines.append(
                f"     on {told} of {name}, of a kind not given, {len(kinds)} kinds; set for {most:.0%} (locality)"
            )
        return "\n".join(lines)


@tidy
def fit_gate(
    model: nn.Module,
    tokenizer: Any,
    task: Prompts,
    asks: Prompts = (),
    other: Prompts = (),
    *,
    near: float = 0.05,
    far: float = 0.01,
    own: int = 160,
    layers: Sequence[int] | None = None,
    probe: str = PROBE,
    trails: Adapter | None = None,
    max_batch_tokens: int = 1500,
    seed: int = 0,
) -> GateFit:
    """Fit a gate to a task, on what the frozen model makes of its prompts and of others.

    What is scored of a prompt is z (`Gate`). Each form and each kind of other prompts counts alike, however many
    prompts it has. Let mu1 be the mean over forms of their means, mu0 that over the other kinds, and S1, S0 the scatter
    of each class, which is the mean scatter within its kinds and the scatter of their means. With D the standard
    deviations and R the correlations of (S1 + S0) / 2, R shrunk by 0.4 towards the unit matrix,

        w = D^-1 R^-1 D^-1 (mu1 - mu0)                       score(z) = (w . z - w . mu0) / (w . mu1 - w . mu0)

    So what forms differ in is spread within the task, and is not what the gate goes by. The threshold is of kinds that
    were not fitted: in 8 folds, an eighth of the forms, asks and kinds is left out, a direction fitted to the rest, and
    they are scored by it. It is the larger of two conformal ranks (Vovk et al. 2005): the floor(near (n + 1))-th
    largest score of the n asks, and the floor(far (n + 1))-th of the far prompts. Prompts of kinds like those given
    thus open with these probabilities at most; nothing is promised of others.

    Others are made beside those that are given. 40 asks of any text are put to the contents of the task's prompts,
    which is what the prompts of one form do not share; and 29 more in the words of each form whose last line says what
    is asked. The frozen model writes `own` texts from 39 beginnings, and chats.

    Args:
        model: the frozen model. Trails that are attached are off meanwhile.
        tokenizer: its tokenizer.
        task: prompts of the task, at least 8 of each form, by the name of the form. The more forms, and the more unlike
            they are, the better: from one form, nobody can tell what is the task and what its wording.
        asks: prompts that ask something else of the same texts, by kind.
        other: any other prompts, by kind.
        near: the share of other asks that may open.
        far: the share of far prompts that may open.
        own: how many texts the model writes. With 0 it writes none.
        layers: where states are read; by default after the last block, and a tenth of the blocks before it.
        probe: what stands behind each prompt when it is read.
        trails: an adapter that lies in the model without being attached, as PEFT's do. It is off meanwhile.
        max_batch_tokens: the most tokens in one forward.
        seed: draws prompts, and what the model writes.

    Returns:
        The gate, and how it does on each kind when it was not fitted on it.

    Raises:
        TypeError: prompts that are no texts.
        ValueError: too few prompts of a form, or of others for `near` and `far`; or shares out of range.

    Fisher 1936 (the discriminant); Jiang et al. 2023, arXiv 2307.16645 (the probe).
    """
    check_tokenizer(tokenizer)
    for name, share in (("near", near), ("far", far)):
        if not 0 < share < 1:
            raise ValueError(f"fit_gate: {name}={share} must be above 0 and below 1: it is a share of prompts")
    forms = _kinds("task", task)
    for name, prompts in forms.items():
        if len(prompts) < LEAST:
            raise ValueError(f"fit_gate: the form {name!r} has {len(prompts)} prompts; a gate needs at least {LEAST}")
    kinds = [_Kind(name, "form", prompts, group) for group, (name, prompts) in enumerate(forms.items())]
    kinds += [_Kind(name, "ask", prompts) for name, prompts in _kinds("asks", asks).items()]
    kinds += _made_asks(list(forms.values()), seed)
    kinds += [_Kind(name, "far", prompts) for name, prompts in _kinds("other", other).items()]
    with frozen(model, trails):
        if as_whole("fit_gate: own", own, 0):
            kinds += _written(model, tokenizer, own, seed)
        host = Host.of(model)
        count = len(host.blocks)
        at = tuple(sorted({count - 1 - count // 10, count - 1} if layers is None else set(layers)))
        gate = Gate(at, _probe_of(tokenizer, probe), 1)
        for kind in kinds:
            kind.features = _features(host, tokenizer, kind.prompts, gate, max_batch_tokens)
    return _fitted(gate, kinds, near, far)


@dataclass(eq=False)
class _Kind:
    """Prompts of one kind. Those of one `group` are left out together: a form, and asks in its words."""

    name: str
    role: Role
    prompts: Sequence[str]
    group: int | None = None
    features: Tensor = torch.empty(0)


def _kinds(what: str, given: Prompts) -> dict[str, Sequence[str]]:
    kinds = given if isinstance(given, Mapping) else {what: given} if len(given) else {}
    for prompts in kinds.values():
        check_list(f"fit_gate: {what}: prompt", prompts, str, "give texts, by kind: {'name': [text, ...]}")
    return {name: prompts for name, prompts in kinds.items() if len(prompts)}


def _made_asks(forms: Sequence[Sequence[str]], seed: int) -> list[_Kind]:
    """Other asks of the contents: all of them once, and in the words of each form some that end otherwise."""
    plain = next((i for i, prompts in enumerate(forms) if any(content_of(prompts)[::2])), 0)
    made: list[_Kind] = []
    for group, prompts in enumerate(forms):
        asks = other_asks(prompts, 6 if group == plain else 1, seed)
        cues = [prompt for name, some in asks.items() if name.startswith("cue") for prompt in some]
        if group == plain:
            made += [_Kind(name, "ask", some) for name, some in asks.items() if not name.startswith("cue")]
        if cues:
            some = random.Random(f"cues {seed} {group}").sample(cues, min(len(cues), 48 if len(forms) == 1 else 16))
            made.append(_Kind(f"form {group} with another last line", "ask", some, group))
    return made


def _written(model: nn.Module, tokenizer: Any, count: int, seed: int) -> list[_Kind]:
    """Texts of the frozen model, cut off anywhere, by what they begin with; and chats, if it has a template."""
    rng = random.Random(f"own {seed}")
    options: dict[str, Any] = {"max_new_tokens": 40, "batch_size": 40, "seed": seed}
    openings = [tokenized(tokenizer, opening, goes_on=True) for opening in OPENINGS]
    by: dict[tuple[int, ...], list[str]] = {}
    for example in self_samples(model, tokenizer, count, openings=openings, **options):
        until = rng.randint(min(8, len(example)), len(example))
        text = tokenizer.decode(example.ids[:until], skip_special_tokens=True)
        by.setdefault(example.ids[: example.prompt_length], []).append(text)
    kinds = [_Kind(f"own: {tokenizer.decode(begin)!r}", "far", texts) for begin, texts in by.items()]
    if getattr(tokenizer, "chat_template", None):
        said = self_samples(model, tokenizer, max(1, count // 6), openings=[chat_opening(tokenizer)], **options)
        words = [tokenizer.decode(one.ids[one.prompt_length :], skip_special_tokens=True) for one in said]
        chats = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
            for text in words
        ]
        kinds += [_Kind("own: chats", "far", chats), _Kind("own: what users say", "far", words)]
    return kinds


def _probe_of(tokenizer: Any, probe: str) -> list[int]:
    """The ids of a probe as it stands behind a text."""
    before, whole = tokenized(tokenizer, "."), tokenized(tokenizer, "." + probe)
    return whole[len(before) :] if whole[: len(before)] == before else tokenized(tokenizer, probe)


@torch.no_grad()
def _features(
    host: Host, tokenizer: Any, prompts: Sequence[str], gate: Gate, max_batch_tokens: int
) -> Float[Tensor, "prompts features"]:
    """What a gate scores of prompts, in float64."""
    rows = [[*tokenized(tokenizer, prompt, goes_on=True), *gate.probe] for prompt in prompts]
    places = {layer: Place(host.blocks[layer], "output") for layer in gate.layers}
    found: dict[int, Tensor] = {}
    with recording(places) as states, evaluating(host.model):
        for some in batches([len(row) for row in rows], max_batch_tokens):
            batch = collate([Example(tuple(rows[i]), (False,) * len(rows[i])) for i in some])
            forward_states(host.model, batch.to(host.device))
            last = batch.attention_mask.sum(1) - 1
            at = torch.arange(len(some))
            read = gate.features([states[layer][at, last.to(states[layer].device)] for layer in gate.layers])
            found.update(zip(some, read.double().cpu(), strict=True))
    return torch.stack([found[i] for i in range(len(rows))])


def _fitted(gate: Gate, kinds: Sequence[_Kind], near: float, far: float) -> GateFit:
    """The gate of features that were read, and how each kind does in the folds that leave it out."""
    fold = _folds(kinds)
    unseen = [torch.empty(0)] * len(kinds)
    for number in range(FOLDS):
        left = [i for i in range(len(kinds)) if fold[i] == number]
        if left:
            rest = [kind for i, kind in enumerate(kinds) if i not in left]
            if not any(kind.role == "form" for kind in rest):  # one form: it cannot be left out
                rest += [kind for kind in kinds if kind.role == "form"]
            score = _Score.of([(kind.role, kind.features) for kind in rest])
            for i in left:
                unseen[i] = score(kinds[i].features)
    parts = [[i % 4 == 0 for i in range(len(kind.prompts))] for kind in kinds]
    seen = _Score.of([(kind.role, kind.features[~torch.tensor(held)]) for kind, held in zip(kinds, parts, strict=True)])
    threshold = max(_rank(kinds, unseen, "ask", near), _rank(kinds, unseen, "far", far))
    score = _Score.of([(kind.role, kind.features) for kind in kinds])
    made = Gate(gate.layers, gate.probe, len(score.w) // len(gate.layers))
    made.weight.copy_(score.w / score.gap)
    made.bias.fill_(float(-score.zero / score.gap - threshold))
    told = [
        KindOpened(
            kind.name,
            kind.role,
            len(kind.prompts),
            _share(unseen[i] > threshold),
            _share(seen(kind.features[torch.tensor(held)]) > threshold) if kind.role == "form" else math.nan,
        )
        for i, (kind, held) in enumerate(zip(kinds, parts, strict=True))
    ]
    return GateFit(made, tuple(told), near, far)


def _folds(kinds: Sequence[_Kind]) -> list[int]:
    """The fold of each kind: kinds of each role in turn, and those of a group together."""
    count = {"form": 0, "ask": 0, "far": 0}
    found: list[int] = []
    for kind in kinds:
        found.append((count[kind.role] if kind.group is None else kind.group) % FOLDS)
        count[kind.role] += 1
    return found


def _rank(kinds: Sequence[_Kind], scores: Sequence[Tensor], role: Role, share: float) -> float:
    """The floor(share (n + 1))-th largest score of prompts of a role; -inf where there is none."""
    found = torch.cat(
        [score for kind, score in zip(kinds, scores, strict=True) if kind.role == role] or [torch.empty(0)]
    )
    if not len(found):
        return -math.inf
    rank = math.floor(share * (len(found) + 1) + 1e-9)
    if rank < 1:
        raise ValueError(
            f"fit_gate: that {share:g} of {role} prompts open cannot be promised from {len(found)}: it takes "
            f"{math.ceil(1 / share - 1)}. Give more, raise own=, or the share"
        )
    return float(found.sort(descending=True).values[rank - 1])


@dataclass(frozen=True, eq=False)
class _Score:
    """(w . z - zero) / gap: 0 for the mean of other kinds, 1 for that of forms."""

    w: Float[Tensor, " features"]
    zero: Float[Tensor, ""]
    gap: Float[Tensor, ""]

    def __call__(self, features: Float[Tensor, "prompts features"]) -> Float[Tensor, " prompts"]:
        return (features @ self.w - self.zero) / self.gap

    @staticmethod
    def of(kinds: Sequence[tuple[Role, Tensor]]) -> _Score:
        """Fisher's discriminant, in which each kind counts alike."""
        yes, no = ([z for role, z in kinds if (role == "form") == is_form and len(z)] for is_form in (True, False))
        mu1, s1 = _moments(yes)
        mu0, s0 = _moments(no)
        s = (s1 + s0) / 2
        d = s.diagonal().clamp_min(1e-12).sqrt()
        r = (1 - SHRINK) * s / d / d[:, None]
        r.diagonal().add_(SHRINK)
        w = torch.linalg.solve(r, (mu1 - mu0) / d) / d
        return _Score(w, w @ mu0, (w @ (mu1 - mu0)).clamp_min(1e-12))


def _moments(kinds: Sequence[Tensor]) -> tuple[Float[Tensor, " features"], Float[Tensor, "features features"]]:
    """The mean of kinds' means, and the scatter within kinds and between their means."""
    means = torch.stack([z.mean(0) for z in kinds])
    mu = means.mean(0)
    within = torch.stack([z.mean(0) for z in kinds])
    rows = torch.cat([(z - m) / math.sqrt(len(z)) for z, m in zip(kinds, within, strict=True)])
    apart = means - mu
    return mu, (rows.mT @ rows + apart.mT @ apart) / len(kinds)


def _share(opened: Tensor) -> float:
    return float(opened.double().mean()) if len(opened) else math.nan


def _mean(shares: Sequence[float]) -> tuple[float, Interval]:
    """The mean over kinds, and its interval, kinds being the items."""
    values = np.array(shares, dtype=float)
    if not len(values):
        return math.nan, UNKNOWN
    return float(values.mean()), mean_interval(values, within=(0, 1))


def _told(value: tuple[float, Interval]) -> str:
    mean, (low, high) = value
    return f"{mean:.3f} ({low:.3f} to {high:.3f})"
