"""The laws that hold for any trail, token rule, stream and model family: each is a function of one `Case`.

`LAWS` lists them, `drawn` and `covering` choose cases, and `holds_all_laws("llama")` names the laws that a family
breaks. A new trail (subjects.py), rule (rules.py) or family (families.py) is one line there, and inherits every law.
The laws that need no product are in test_laws_generate.py (ways to generate), test_laws_training.py (backward passes,
dtypes, labels) and test_laws_hosts.py (compile, PEFT, accelerate, DDP, FSDP, copies).
"""

from __future__ import annotations

import inspect
import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import unchanged
from families import FAMILIES, PAD, V5, Family
from rules import RULES, SPANS, TOKENIZER
from subjects import MOVING, TRAILS
from torch import Tensor, nn

from tokenpaths import Cone, Example, Trail, TrailMap, attach, sites, width
from tokenpaths.attachment import Attachment
from tokenpaths.data import collate
from tokenpaths.engine import answer_logits
from tokenpaths.engine.forwards import forward
from tokenpaths.site.host import find_blocks

STREAMS = ["block", "embedding", "attention", "mlp", "head"]
NEEDS_IDS = {"tokens", "match", "all - tokens", "answer & match"}
MAY_STAY_SHUT = {"ReFTr1", "PSR", "Gated", "Guarded", "nested"}  # trails with a gate
PROMPTS = [[5, 47, 31, 66, 8, 90], [17, 4, 73, 29], [61, 12, 36]]
NEW = 4  # tokens to generate
_FRONT = (44, 7, 19, 81, 3, 62, 90, 15)
LABELLED = [  # rows of tokens, and the length of the prompt of each
    ((*_FRONT, 5, 47, 31, 66, 8, 90, 12), 14),
    ((*_FRONT, 17, 4, 73, 29, 33, 50), 11),
    ((*_FRONT, 61, 12, 36, 77), 10),
]

MODES: dict[str, dict[str, Any]] = {  # ways to generate
    "greedy": {},
    "sampled": dict(do_sample=True, num_return_sequences=2),
    "beams": dict(num_beams=3, num_return_sequences=2),
    "chunks": dict(prefill_chunk_size=3),
    "static": dict(cache_implementation="static"),
}


@dataclass(frozen=True)
class Case:
    """One draw of the product. `blocks` names the block list that carries the trails."""

    family: str
    blocks: str
    trail: str
    rule: str
    stream: str
    mode: str = "greedy"

    def __str__(self) -> str:
        return f"{self.family} {self.blocks}: {self.trail} on {self.stream}, {self.rule}, {self.mode}"

    @property
    def facts(self) -> Family:
        return FAMILIES[self.family]

    @property
    def decodes(self) -> bool:
        """Whether the moved blocks read from left to right."""
        return self.facts.kind == "decoder" or self.blocks.startswith("decoder")

    def model(self, exact: bool = False) -> nn.Module:
        """A fresh model; `exact` asks for float64 where the family can."""
        model = self.facts.make().requires_grad_(False)
        return model.double() if exact and self.facts.float64 else model

    def trails(self, model: nn.Module, make: Callable[[int], Trail], layers: Any = "all") -> TrailMap:
        stream, head = ("attention", 1) if self.stream == "head" else (self.stream, None)
        layers = 0 if self.stream == "embedding" else layers
        laid = sites(model, layers, RULES[self.rule], stream, head, blocks=self.blocks)
        trails = TrailMap({site: make(width(model, site, blocks=self.blocks)) for site in laid}, blocks=self.blocks)
        return trails.double() if next(model.parameters()).dtype == torch.float64 else trails

    def attach(self, model: nn.Module, trails: TrailMap, rows: range = range(len(PROMPTS))) -> Attachment:
        """`rows`: the rows of PROMPTS that make up the batch."""
        return attach(model, trails, spans={"middle": [SPANS["middle"][i] for i in rows]}, tokenizer=TOKENIZER)

    def batch(self, rows: range = range(len(PROMPTS)), side: str = "left", model: nn.Module | None = None) -> Any:
        """Arguments of a forward; with the model, in its dtype and with position ids where it needs them."""
        if self.facts.kind == "vision":
            pixels = torch.randn(len(PROMPTS), 3, 16, 16, generator=torch.Generator().manual_seed(1))[list(rows)]
            return dict(pixel_values=pixels.to(next(model.parameters()).dtype) if model else pixels)
        inputs = padded([PROMPTS[i] for i in rows], side)
        if self.facts.kind == "encoder-decoder":
            decoded = torch.tensor([[PAD, 7, 33, 50, 9], [PAD, 81, 20, 6, 64], [PAD, 30, 31, 32, 33]])
            return dict(**inputs, decoder_input_ids=decoded[list(rows)])
        if model is not None and "position_ids" in inspect.signature(model.forward).parameters:
            inputs["position_ids"] = positions(inputs["attention_mask"])
        return inputs


def padded(rows: list[list[int]], side: str = "left") -> dict[str, Tensor]:
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), PAD)
    for line, row in zip(ids, rows, strict=True):
        line[slice(longest - len(row), None) if side == "left" else slice(len(row))] = torch.tensor(row)
    return dict(input_ids=ids, attention_mask=(ids != PAD).long())


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def assert_close(one: Tensor, other: Tensor) -> None:
    # the norms of most families round to float32 inside a float64 model, and generate returns float32
    atol = 1e-4 * max(1.0, float(other.detach().abs().max())) if other.numel() else 0.0
    torch.testing.assert_close(one, other, rtol=0, atol=atol, check_dtype=False)


def assert_equal(one: Tensor, other: Tensor) -> None:
    assert torch.equal(one, other)


def generated(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> Any:
    torch.manual_seed(0)
    fixed = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=PAD, suppress_tokens=[PAD])
    asked = dict(output_logits=True, return_dict_in_generate=True)
    return model.generate(**inputs, **{**fixed, **asked, **options})


# Each law raises AssertionError where it is broken, and returns where it does not apply.


def nothing_stays(case: Case) -> None:
    """Law 1: removed, or left by an error, the model is as it was, bit for bit."""
    model = case.model()
    inputs = case.batch(model=model)
    with unchanged(model), torch.no_grad():
        before = model(**inputs).logits
        trails = case.trails(model, MOVING[case.trail])
        with case.attach(model, trails):
            model(**inputs)
        assert torch.equal(model(**inputs).logits, before)
        with pytest.raises(KeyError, match="from the user"), case.attach(model, trails):
            raise KeyError("from the user")
        last = find_blocks(model, case.blocks)[-1]
        broken = last.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), case.attach(model, trails):
            model(**inputs)
        broken.remove()
        assert torch.equal(model(**inputs).logits, before)


def fresh_trails_move_nothing(case: Case) -> None:
    """Law 2: with fresh trails attached, outputs are bit-equal to the frozen model's; so with any switched off."""
    model = case.model()
    inputs = case.batch(model=model)
    before = model(**inputs).logits
    trails = case.trails(model, TRAILS[case.trail])
    with case.attach(model, trails):
        if all(trail.starts_at_identity for trail in trails.trails):
            assert torch.equal(model(**inputs).logits, before)
    trails = case.trails(model, MOVING[case.trail])
    with case.attach(model, trails), trails.off():
        assert torch.equal(model(**inputs).logits, before)


def cached_is_uncached(case: Case) -> None:
    """Law 3: decoding with a cache = without one = one forward over the whole text, padded on either side."""
    if case.facts.kind not in ("decoder", "encoder-decoder"):
        return
    facts, options = case.facts, MODES[case.mode]
    if case.mode == "static" and not facts.static_cache or case.mode == "chunks" and not facts.chunked_prefill:
        options = {}
    if facts.kind == "encoder-decoder" and case.mode == "chunks":
        options = {}
    model = case.model(exact=True)
    trails = case.trails(model, MOVING[case.trail])
    inputs = padded(PROMPTS)
    with torch.no_grad(), case.attach(model, trails):
        cached = generated(model, inputs, **options)
        plainly = {k: v for k, v in options.items() if k not in ("prefill_chunk_size", "cache_implementation")}
        uncached = generated(model, inputs, **plainly, use_cache=False)
        assert cached.sequences.equal(uncached.sequences)
        for one, other in zip(cached.logits, uncached.logits, strict=True):
            assert_close(one, other)
        if plainly or case.facts.kind != "decoder":
            return
        for side in ("left", "right"):
            written = cached.sequences[:, -NEW:].tolist()
            texts = [prompt + answer for prompt, answer in zip(PROMPTS, written, strict=True)]
            whole = padded(texts, side)
            ends = positions(whole["attention_mask"]) == torch.tensor([[len(p)] for p in PROMPTS])
            prompt_mask = ends.cumsum(1) == 0
            if "position_ids" in inspect.signature(model.forward).parameters:
                whole["position_ids"] = positions(whole["attention_mask"])
            logits = model(**whole, prompt_mask=prompt_mask).logits
            predicts = [slice(e - 1, e - 1 + NEW) for e in ends.long().argmax(1).tolist()]
            assert_close(
                torch.stack([row[where] for row, where in zip(logits, predicts, strict=True)]),
                torch.stack(cached.logits, 1),
            )


def padding_changes_nothing(case: Case) -> None:
    """Law 4: left padding = right padding = none; a batch = its rows one by one = its halves."""
    model = case.model(exact=True)
    trails = case.trails(model, MOVING[case.trail])

    def run(rows: range, side: str) -> list[Tensor]:
        inputs = case.batch(rows, side, model)
        with torch.no_grad(), case.attach(model, trails, rows):
            logits = model(**inputs).logits
        if case.facts.kind in ("vision", "encoder-decoder"):
            return list(logits)
        return [row[mask.bool()] for row, mask in zip(logits, inputs["attention_mask"], strict=True)]

    left = run(range(3), "left")
    for others in (
        run(range(3), "right"),
        [logits for row in range(3) for logits in run(range(row, row + 1), "left")],
        run(range(2), "left") + run(range(2, 3), "right"),
    ):
        for one, other in zip(left, others, strict=True):
            assert_close(one, other)


def the_light_cone_is_dark_outside(case: Case) -> None:
    """Law 5: below the first moved layer, and before the first moved token, states are bit-equal to the frozen ones."""
    model = case.model()
    inputs = case.batch(side="right", model=model)
    trails = case.trails(model, MOVING[case.trail], layers=[1, 2])
    first = 0 if case.stream == "embedding" else 1
    frozen, moved = block_outputs(model, case, inputs), None
    with case.attach(model, trails) as handle, plans(handle) as seen:
        moved = block_outputs(model, case, inputs)
    assert seen[-1] is not None
    chosen = seen[-1].masks
    for layer in range(first):
        assert torch.equal(moved[layer], frozen[layer])
    if chosen is None:  # images
        assert case.rule in ("answer", "first | last") or not torch.equal(moved[first], frozen[first])
        return
    (mask,) = chosen
    if case.decodes:
        before = mask.cumsum(1) == 0  # the tokens before the first moved one, or all
        # experts gather their tokens: with more or fewer of them a matrix product rounds otherwise
        mixture = any(name.endswith("experts") for name, _ in model.named_modules())
        for one, other in zip(moved, frozen, strict=True):
            if before.any():
                (assert_close if mixture else assert_equal)(one[before], other[before])
    # ... and inside it is light: a law about nothing would always hold
    shut = case.trail in MAY_STAY_SHUT
    if mask.any() and not shut:
        assert not torch.equal(moved[-1], frozen[-1])
    if case.stream == "block" and not shut:
        assert (moved[1] != frozen[1]).any(-1)[mask].all()


@contextmanager
def plans(handle: Attachment) -> Iterator[list[Any]]:
    """The plan of each forward inside: it is known inside of the forward only."""
    seen: list[Any] = []
    look = find_blocks(handle.host.model, handle.trails.blocks)[-1].register_forward_hook(
        lambda *_: seen.append(handle.plan)
    )
    yield seen
    look.remove()


def block_outputs(model: nn.Module, case: Case, inputs: dict[str, Tensor]) -> list[Tensor]:
    states: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(note) for block in find_blocks(model, case.blocks)]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return states


def checkpointing_changes_no_gradient(case: Case) -> None:
    """Law 8, in part: recomputing blocks in the backward gives the same gradients, whatever runs in between."""
    gradients: list[list[Tensor]] = []
    for reentrant in (None, False, True):
        model = case.model(exact=True).train()
        if not model.supports_gradient_checkpointing:
            return
        trails = case.trails(model, MOVING[case.trail])
        inputs = case.batch(side="right", model=model)
        if case.facts.kind != "vision":
            model.enable_input_require_grads()  # as reentrant checkpointing wants it
        elif reentrant:
            continue
        if reentrant is not None:
            model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
        with case.attach(model, trails):
            torch.manual_seed(0)
            loss = model(**inputs).logits.float().square().mean()
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # torch says that there is nothing to checkpoint
                with trails.off():
                    model(**inputs)
                if case.facts.kind != "vision":
                    flipped = {name: value.flip(1) for name, value in inputs.items()}
                    if "position_ids" in flipped:
                        flipped["position_ids"] = positions(flipped["attention_mask"])
                    model(**flipped)
            loss.backward()
        gradients.append([torch.zeros(1) if p.grad is None else p.grad for p in trails.parameters()])
    plain, *others = gradients
    for other in others:
        for one, two in zip(other, plain, strict=True):
            assert_close(one, two)


def the_cone_changes_nothing(case: Case) -> None:
    """What is computed once and kept gives the loss and the gradients of a forward in full, each time it is used."""
    if case.facts.kind != "decoder":
        return
    model = case.model(exact=True)
    trails = case.trails(model, MOVING[case.trail], layers=[1, 2])
    batch = collate([Example(ids, (False,) * n + (True,) * (len(ids) - n)) for ids, n in LABELLED])
    found: list[list[Tensor]] = []

    def add_pass() -> None:
        trails.zero_grad()
        logits, targets = answer_logits(model, batch)
        whole = forward(model, batch).logits[batch.attention_mask.bool()]
        with torch.no_grad(), trails.off():
            frozen = forward(model, batch).logits[batch.attention_mask.bool()]
        loss = F.cross_entropy(logits, targets) + (whole - frozen).square().mean()
        if loss.requires_grad:
            loss.backward()
        found.append([loss.detach(), *(torch.zeros(1) if p.grad is None else p.grad for p in trails.parameters())])

    with warnings.catch_warnings(), attach(model, trails, spans={"middle": [(1, 3)] * len(batch)}, tokenizer=TOKENIZER):
        warnings.simplefilter("error")  # no family here is to be run in full
        add_pass()
        with Cone().over(model, case.blocks) as worker:
            assert worker is not None
            for _ in range(2):
                add_pass()
            worker.shared = [tuple(batch.input_ids[0][:8].tolist())]
            add_pass()
    for other in found[1:]:
        for one, two in zip(other, found[0], strict=True):
            assert_close(one, two)


def others_still_see(case: Case) -> None:
    """Law 9: foreign hooks fire once and survive; hidden states are the moved ones; attentions are still there."""
    model = case.model()
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    inputs = case.batch(model=model)
    blocks = find_blocks(model, case.blocks)
    fired: list[str] = []
    seen: list[Tensor] = []

    def early(module: nn.Module, args: Any, output: Any) -> None:
        fired.append("early")
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [blocks[1].register_forward_hook(early)]
    model(**inputs, output_hidden_states=True, output_attentions=True)
    trails = case.trails(model, MOVING[case.trail])
    fired.clear(), seen.clear()
    with torch.no_grad(), case.attach(model, trails):
        handles.append(blocks[1].register_forward_hook(lambda *_: fired.append("late")))
        output = model(**inputs, output_hidden_states=True, output_attentions=True)
        assert fired == ["early", "late"]
    encodes = case.facts.kind == "encoder-decoder" and not case.decodes
    prefix = "encoder_" if encodes else "decoder_" if case.facts.kind == "encoder-decoder" else ""
    hidden = getattr(output, prefix + "hidden_states")
    if V5:  # transformers 4 takes them inside the block's forward, where no hook has come yet
        assert torch.equal(hidden[2], seen[0])
    assert all(isinstance(a, Tensor) for a in getattr(output, prefix + "attentions"))
    with torch.no_grad():
        again = model(**inputs, output_hidden_states=True)
    assert fired == ["early", "late"] * 2
    mask = inputs.get("attention_mask")
    if V5 and case.rule == "all" and case.stream == "block" and case.facts.kind == "decoder":
        assert (again.hidden_states[2] != hidden[2]).any(-1)[mask.bool()].all() or case.trail in MAY_STAY_SHUT
    for handle in handles:
        handle.remove()


def a_refusal_leaves_nothing(case: Case) -> None:
    """Law 10: what is refused changes nothing."""
    model = case.model()
    with unchanged(model):
        wrong = case.trails(model, lambda dim: TRAILS[case.trail](dim))
        with torch.no_grad():
            next(wrong.parameters()).flatten()[0] = torch.nan
        with pytest.raises(ValueError, match="holds NaN or infinity"):
            case.attach(model, wrong)
        trails = case.trails(model, MOVING[case.trail])
        if case.facts.kind in ("decoder", "encoder"):
            inputs = case.batch(model=model)
            with case.attach(model, trails), pytest.raises(ValueError, match="prompt_mask has shape"):
                model(**inputs, prompt_mask=torch.ones(3, 2))
            two_rows = case.attach(model, trails, range(2))
            with two_rows, pytest.raises(ValueError, match=r"spans\['middle'\] has 2 rows, the batch 3"):
                model(**inputs)


LAWS: dict[str, Callable[[Case], None]] = {
    f.__name__: f
    for f in (
        nothing_stays,
        fresh_trails_move_nothing,
        cached_is_uncached,
        padding_changes_nothing,
        the_light_cone_is_dark_outside,
        checkpointing_changes_no_gradient,
        the_cone_changes_nothing,
        others_still_see,
        a_refusal_leaves_nothing,
    )
}


AXES: dict[str, list[str]] = dict(trail=list(TRAILS), rule=list(RULES), stream=STREAMS, mode=list(MODES))


def block_lists(family: str) -> list[str]:
    facts = FAMILIES[family]
    return ["encoder.block", "decoder.block"] if facts.kind == "encoder-decoder" else [facts.blocks]


def rules(family: str) -> list[str]:
    return [rule for rule in RULES if FAMILIES[family].kind != "vision" or rule not in NEEDS_IDS]


def drawn(law: str, family: str, count: int) -> list[Case]:
    """Cases drawn with a fixed seed; an encoder-decoder has each side in turn."""
    random_ = random.Random(f"{law} {family}")
    sides, axes = block_lists(family), {**AXES, "rule": rules(family)}
    return [
        Case(family, sides[i % len(sides)], **{axis: random_.choice(values) for axis, values in axes.items()})
        for i in range(count)
    ]


def covering(family: str, every: tuple[str, ...] = ()) -> Iterator[Case]:
    """All combinations of the axes in `every`; the others take all their values in turn."""
    random_ = random.Random(family)
    axes = {**AXES, "rule": rules(family)}
    turns = {axis: itertools.cycle(random_.sample(values, len(values))) for axis, values in axes.items()}
    longest = [range(max(map(len, axes.values())))]
    for blocks in block_lists(family):
        for combination in itertools.product(*([axes[axis] for axis in every] or longest)):
            fixed = dict(zip(every, combination, strict=False))
            yield Case(family, blocks, **{axis: fixed.get(axis) or next(turn) for axis, turn in turns.items()})


def holds_all_laws(family: str, count: int = 3) -> list[str]:
    """The laws that a family breaks, each with the first case and error that shows it."""
    broken: list[str] = []
    for name, law in LAWS.items():
        for case in drawn(name, family, count):
            try:
                law(case)
            except Exception as error:
                broken.append(f"{name}: {case}: {type(error).__name__} {str(error).strip().partition(chr(10))[0]:.150}")
                break
    return broken
