"""A gate that opens for a task, asked in any words, and stays shut on all other requests.

forms = {"trained": prompts, "by list": prompts_in_other_words, ...}        # the same task in several wordings
found = fit_gate(model, tokenizer, forms, asks=asks, other={"news": news})  # what else is asked of the same texts
print(found)                                         # reliability, generality, locality
with attach(model, trails, when=found.gate): ...     # or trails.gate = found.gate, which is saved with them
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenpaths.attachment.runs import evaluating
from tokenpaths.attachment.watcher import Watcher
from tokenpaths.checking import as_whole, check_list
from tokenpaths.data.examples import Example, collate
from tokenpaths.data.tokenizing import check_tokenizer, inner, tokenized
from tokenpaths.engine.batches import batches
from tokenpaths.engine.readings import frozen
from tokenpaths.limits.asks import OPENINGS, content_of, other_asks
from tokenpaths.limits.openings import GateFit, KindRead, fitted
from tokenpaths.site import Host, width
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.trailmap.gate import Gate
from tokenpaths.training.samples import chat_opening, self_samples
from tokenpaths.undo import tidy

Prompts: TypeAlias = Sequence[str] | Mapping[str, Sequence[str]]
"""Prompts of one kind, or of several by name."""
PROBES = ("\n\nTask:", "\n\nIn one word, what is asked for above is")
"""What is put behind every prompt, each by itself, for the gate's reading alone."""
LEAST = 8  # prompts of a form


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
    probes: Sequence[str] = PROBES,
    trails: Adapter | None = None,
    max_batch_tokens: int = 1500,
    seed: int = 0,
) -> GateFit:
    """Fit a gate to a task, on what the frozen model makes of its prompts and of others.

    What is scored of a prompt is z (`Gate`). Each form and each kind of other prompts counts alike, however many
    prompts it has. Let mu1 be the mean over forms of their means, mu0 that over the other kinds, and S1, S0 the scatter
    of each class, which is the mean scatter within its kinds and the scatter of their means: so what forms differ in is
    spread within the task, and is not what the gate goes by. With D the standard deviations and R the correlations of
    (S1 + S0) / 2, R shrunk by 0.4 towards the unit matrix,

        w = D^-1 R^-1 D^-1 (mu1 - mu0)                       score(z) = (w . z - w . mu0) / (w . mu1 - w . mu0)

    Forms of which many prompts stay shut gain weight, so that none of those given is lost for the others: four times,
    the weight q_f in mu1 and S1 becomes q_f exp(3 (1 - share of f that opens)), normalised, as in group DRO.

    The threshold is of kinds that were not fitted: in 8 folds, an eighth of the forms, asks and kinds is left out, w is
    fitted to the rest, and they are scored by it. It is the larger of two conformal ranks (Vovk et al. 2005): the
    floor(near (n + 1))-th largest score of the n asks, and the floor(far (n + 1))-th of the far prompts. Prompts of
    kinds like those given thus open with about these probabilities at most; nothing is promised of others.

    Others are made beside those that are given. 40 asks of any text are put to the contents of the task's prompts,
    which is what the prompts of one form do not share: plainly, and in the dress of a chat, an instruction or code. 29
    more are put in the words of each form whose last line says what is asked. The frozen model writes `own` texts from
    39 beginnings, and chats.

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
        layers: where states are read; by default after the last block.
        probes: what stands behind each prompt when it is read, each by itself.
        trails: an adapter that lies in the model without being attached, as PEFT's do. It is off meanwhile.
        max_batch_tokens: the most tokens in one forward.
        seed: draws prompts, and what the model writes.

    Returns:
        The gate, and how it does on each kind when it was not fitted on it.

    Raises:
        TypeError: prompts that are no texts.
        ValueError: too few prompts of a form, or of others for `near` and `far`; or shares out of range.

    Fisher 1936 (the discriminant); Sagawa et al. 2020, arXiv 1911.08731 (group DRO); Jiang et al. 2023, arXiv
    2307.16645 (the probe).
    """
    check_tokenizer(tokenizer)
    for name, share in (("near", near), ("far", far)):
        if not 0 < share < 1:
            raise ValueError(f"fit_gate: {name}={share} must be above 0 and below 1: it is a share of prompts")
    check_list("fit_gate: probe", probes, str, "give texts: probes=['\\n\\nTask:']")
    forms = _kinds("task", task)
    for name, prompts in forms.items():
        if len(prompts) < LEAST:
            raise ValueError(f"fit_gate: the form {name!r} has {len(prompts)} prompts; a gate needs at least {LEAST}")
    kinds = [KindRead(name, "form", prompts, group) for group, (name, prompts) in enumerate(forms.items())]
    kinds += [KindRead(name, "ask", prompts) for name, prompts in _kinds("asks", asks).items()]
    shown = next((i for i, prompts in enumerate(forms.values()) if any(content_of(prompts)[::2])), 0)
    for group, prompts in enumerate(forms.values()):  # all asks are put once, to contents that a form shows
        kinds += made_asks(prompts, group, group == shown, 48 if len(forms) == 1 else 16, seed)
    kinds += [KindRead(name, "far", prompts) for name, prompts in _kinds("other", other).items()]
    with frozen(model, trails):
        if as_whole("fit_gate: own", own, 0):
            kinds += written(model, tokenizer, own, seed)
        host = Host.of(model)
        at = [len(host.blocks) - 1] if layers is None else sorted(set(layers))
        gate = Gate(at, [inner(tokenizer, probe) for probe in probes], width(model))
        for kind in kinds:
            kind.features = features(host, tokenizer, kind.prompts, gate, max_batch_tokens)
    return fitted(gate, kinds, near, far)


def _kinds(what: str, given: Prompts) -> dict[str, Sequence[str]]:
    kinds = given if isinstance(given, Mapping) else {what: given} if len(given) else {}
    for prompts in kinds.values():
        check_list(f"fit_gate: {what}: prompt", prompts, str, "give texts, by kind: {'name': [text, ...]}")
    return {name: prompts for name, prompts in kinds.items() if len(prompts)}


def made_asks(prompts: Sequence[str], group: int, plain: bool, cues: int, seed: int) -> list[KindRead]:
    """Other asks of one form's contents: at most `cues` in its words, which end otherwise; if `plain`, all others."""
    asks = other_asks(prompts, 6 if plain else 1, seed)
    made = [KindRead(name, "ask", some) for name, some in asks.items() if plain and not name.startswith("cue")]
    ends = [prompt for name, some in asks.items() if name.startswith("cue") for prompt in some]
    if ends:
        some = random.Random(f"cues {seed} {group}").sample(ends, min(len(ends), cues))
        made.append(KindRead(f"form {group} with another last line", "ask", some, group))
    return made


def written(model: nn.Module, tokenizer: Any, count: int, seed: int) -> list[KindRead]:
    """Texts of the frozen model, cut off anywhere, by what they begin with; and chats, if it has a template."""
    rng = random.Random(f"own {seed}")
    options: dict[str, Any] = {"max_new_tokens": 40, "batch_size": 40, "seed": seed}
    openings = [tokenized(tokenizer, opening, goes_on=True) for opening in OPENINGS]
    by: dict[tuple[int, ...], list[str]] = {}
    for example in self_samples(model, tokenizer, count, openings=openings, **options):
        until = rng.randint(min(8, len(example)), len(example))
        text = tokenizer.decode(example.ids[:until], skip_special_tokens=True)
        by.setdefault(example.ids[: example.prompt_length], []).append(text)
    kinds = [KindRead(f"own: {tokenizer.decode(begin)!r}", "far", texts) for begin, texts in by.items()]
    if getattr(tokenizer, "chat_template", None):
        said = self_samples(model, tokenizer, max(1, count // 6), openings=[chat_opening(tokenizer)], **options)
        words = [tokenizer.decode(one.ids[one.prompt_length :], skip_special_tokens=True) for one in said]
        chats = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
            for text in words
        ]
        kinds += [KindRead("own: chats", "far", chats), KindRead("own: what users say", "far", words)]
    return kinds


@torch.no_grad()
def features(
    host: Host, tokenizer: Any, prompts: Sequence[str], gate: Gate, max_batch_tokens: int
) -> Float[Tensor, "prompts features"]:
    """What a gate scores of prompts, in float64."""
    rows = [tuple(tokenized(tokenizer, prompt, goes_on=True)) for prompt in prompts]
    found: dict[int, Tensor] = {}
    watcher = Watcher(host.path, host.blocks)  # of its own: nothing is hooked
    with evaluating(host.model):
        for some in batches([len(row) + max(map(len, gate.probes)) for row in rows], max_batch_tokens):
            batch = collate([Example(rows[i], (False,) * len(rows[i])) for i in some], side="left")
            read = gate.features(watcher.read_behind(batch.to(host.device), gate))
            found.update(zip(some, read.double().cpu(), strict=True))
    return torch.stack([found[i] for i in range(len(rows))])
