"""One decision a request: the frozen model reads the prompt, and a gate opens or shuts its attachment for the row.

A forward that holds a prompt runs frozen at first, with nothing moved. Then the probes are run behind the prompt, over
the keys and values that this forward has cached, as far as the deepest layer that a gate reads; and every row is
decided, for its prompt and its answer together. Where no row opens, the forward is over, and it was the frozen model's.
Where one opens, what was cached is taken back, and the forward runs again with the attachments at work in the rows that
opened.

Where there is no such cache (a recurrence, a cache of fixed size), or the prompts do not end where this forward ends
(they are padded behind, followed by their answers, or prefilled in chunks), or do not begin in it (behind a cache that
others filled), prompt and probes are read together in a forward of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from tokenpaths.attachment import caches
from tokenpaths.attachment.hooks import Hook, unobserved
from tokenpaths.attachment.moment import Decision, Moment
from tokenpaths.attachment.moving import states_of
from tokenpaths.checking import kind, quoted
from tokenpaths.data.examples import Batch, Example, collate
from tokenpaths.site import Host
from tokenpaths.site.host import text_config
from tokenpaths.trailmap.gate import Gate
from tokenpaths.undo import Undo

Probes: TypeAlias = Sequence[tuple[int, ...]]


class _Read(Exception):
    """The deepest layer that a gate reads was reached: no more of this forward is wanted."""


@dataclass(eq=False)
class Deciding:
    """The decisions that one forward must make.

    Args:
        moment: the forward.
        gates: the gates that are asked, by the numbers of their attachments.
        blocks: the blocks that they count.
        takes: the arguments of the module that reads tokens.
        others: whether something else is at work, for which the forward must run again in any case.
        alone: of these attachments no two act on one request; and the rows that each is for, if it is not for all.
    """

    moment: Moment
    gates: Mapping[int, Gate]
    blocks: nn.ModuleList
    takes: frozenset[str]
    others: bool
    alone: Mapping[int, Sequence[int] | None] = field(default_factory=dict[int, Sequence[int] | None])
    made: dict[int, Decision] = field(default_factory=dict[int, Decision])
    states: dict[int, list[Tensor]] = field(default_factory=dict[int, list[Tensor]])

    def run(self, forward: Callable[[], Any], named: Mapping[str, Any], module: Callable[..., Any]) -> Any:
        """The output of the frozen forward; None where it must run again, or was not run.

        Args:
            forward: runs it.
            named: its arguments.
            module: runs the same module on other arguments.

        Raises `ValueError` where the prompt cannot be read.
        """
        cache = caches.cache_in(named)
        if not self._ends_here() or not caches.grows(cache):
            return self._decide(lambda probes: self._apart(module, probes), behind=False)
        again = caches.going_back(cache)
        output = forward()
        filled = cache if cache is not None or not isinstance(output, Mapping) else caches.cache_in(output)
        if filled is None or not caches.grows(filled):
            self._decide(lambda probes: self._apart(module, probes), behind=False)
        else:
            self._decide(lambda probes: self._behind(module, probes, filled), behind=True)
        if self.others or any(bool(decision.opens.any()) for decision in self.made.values()):
            again()
            return None
        return output

    @cached_property
    def width(self) -> int:
        """How many columns the prompts fill."""
        return asked(self.moment)

    @cached_property
    def read(self) -> Bool[Tensor, "batch seq"]:
        """What is read of each row: its prompt, or all of a row without one."""
        real = self.moment.context.real
        prompt = self.moment.context.prompt & real
        return torch.where(prompt.any(1, keepdim=True), prompt, real)

    def _ends_here(self) -> bool:
        """Whether all prompts begin and end in this forward, so that the probe can stand right behind them.

        Behind padding, a sliding window would not reach as far.
        """
        moment = self.moment
        if moment.past or not {"position_ids", "past_key_values"} <= self.takes or self.width != moment.length:
            return False
        return bool(self.read[:, -1].all())

    def decided(self) -> Moment:
        """The moment, with the decisions."""
        return replace(self.moment, decisions={**self.moment.decisions, **self.made})

    def _decide(self, read: Callable[[Probes], None], behind: bool) -> None:
        """Decide every row by every gate; all probes are read in one forward.

        `read` runs each row's prompt with every probe, the probes of a row one after another. They all begin at its
        first column if it runs them `behind` the prompts, and else all end at its last.
        """
        probes = list(dict.fromkeys(probe for gate in self.gates.values() for probe in gate.probes))
        layers = sorted({layer for gate in self.gates.values() for layer in gate.layers})
        ends = [len(probe) - 1 if behind else -1 for probe in probes]
        seen: dict[int, list[Tensor]] = {}
        with self._looking(layers, ends, seen), unobserved(), torch.no_grad(), suppress(_Read):
            read(probes)
        scores: dict[int, Tensor] = {}
        repeats = self.moment.repeats
        for number, gate in self.gates.items():
            self.states[number] = [seen[layer][probes.index(p)] for p in gate.probes for layer in gate.layers]
            scores[number] = gate.scores(self.states[number]).cpu()[::repeats]  # beams of a prompt go together
        highest = self._highest(scores)
        for number, score in scores.items():
            opens = (score > 0) & (highest == number) if number in self.alone else score > 0
            self.made[number] = Decision(opens.repeat_interleave(repeats), self.width)

    def _highest(self, scores: Mapping[int, Tensor]) -> Int[Tensor, " rows"]:
        """Of the attachments that act alone, the number of the one with the highest score in each row that it is in."""
        numbers = [0, *self.alone]
        rivals = torch.full([len(numbers), len(next(iter(scores.values())))], -math.inf)
        for rival, (number, rows) in zip(rivals[1:], self.alone.items(), strict=True):
            there = slice(None) if rows is None else list(rows)
            rival[there] = scores[number][there]
        return torch.tensor(numbers)[rivals.argmax(0)]

    def _looking(self, layers: list[int], ends: list[int], seen: dict[int, list[Tensor]]) -> Undo:
        """Inside, states are looked at where each probe ends, and the forward is over at the deepest of the layers."""
        undo = Undo()
        for layer in layers:

            def look(module: nn.Module, args: Any, output: Any, layer: int = layer) -> None:
                states = states_of(module, output)
                seen[layer] = [states[i :: len(ends), end].detach().clone() for i, end in enumerate(ends)]
                if layer == layers[-1]:
                    raise _Read

            undo.hook(self.blocks[layer].register_forward_hook, Hook(look))
        return undo

    def _behind(self, module: Callable[..., Any], probes: Probes, cache: Any) -> None:
        """Run the probes behind the prompts, over what is cached of them; afterwards the cache is as it was.

        A shorter probe is filled up behind its end, where its own tokens do not see.
        """
        width = max(map(len, probes))
        ids = torch.tensor([[*probe, *probe[-1:] * (width - len(probe))] for probe in probes], device=self.read.device)
        read = self.read.repeat_interleave(len(probes), 0)
        back = caches.going_back(cache)
        try:
            for layer in cache.layers:
                layer.batch_repeat_interleave(len(probes))
            module(
                input_ids=ids.repeat(len(self.read), 1),
                attention_mask=torch.cat([read.long(), read.new_ones(len(read), width).long()], 1),
                position_ids=read.sum(1, keepdim=True) + torch.arange(width, device=read.device),
                past_key_values=cache,
                use_cache=True,
            )
        finally:
            back()

    def _apart(self, module: Callable[..., Any], probes: Probes) -> None:
        """Run prompts and probes together, without a cache. Raises `ValueError` where tokens are not known."""
        ids, read = self.moment.context.ids, self.read
        if ids is None or bool((ids.lt(0) & read).any()):
            raise ValueError(
                f"a gate reads the whole prompt, but the ids of its first {self.moment.past} tokens are not known, "
                "which come from a cache that was filled without the gate, or were given as embeddings: run the whole "
                "prompt, as ids"
            )
        rows = [(*row[mask].tolist(), *probe) for row, mask in zip(ids, read, strict=True) for probe in probes]
        batch = collate([Example(row, (False,) * len(row)) for row in rows], side="left").to(ids.device)
        module(**inputs_of(batch, self.takes, use_cache=False))


def inputs_of(batch: Batch, takes: Container[str], use_cache: bool) -> dict[str, Any]:
    """What a module is given to read a batch that is padded before, as far as it takes it."""
    given = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "position_ids": (batch.attention_mask.cumsum(1) - 1).clamp_min(0),
        "use_cache": use_cache,
    }
    return {name: value for name, value in given.items() if name in takes}


def check_gate(gate: object, host: Host) -> None:
    """Raise `TypeError` for what is no gate, and `ValueError` for one that cannot read this model."""
    if not isinstance(gate, Gate):
        raise TypeError(f"attach: when={quoted(gate)} is {kind(gate)}, but must be a Gate, as tp.fit_gate makes one")
    config = text_config(host.inner)
    dim, words = getattr(config, "hidden_size", gate.dim), getattr(config, "vocab_size", math.inf)
    if (most := max(map(max, gate.probes))) >= words:
        raise ValueError(
            f"attach: the gate reads behind token {most}, but the model has {words} tokens: fit a gate for "
            "this model, tp.fit_gate(model, ...)"
        )
    if gate.layers[-1] >= len(host.blocks) or gate.dim != dim:
        raise ValueError(
            f"attach: the gate reads states of width {gate.dim} at layer {gate.layers[-1]}, but the model has "
            f"{len(host.blocks)} layers of width {dim}: fit a gate for this model, tp.fit_gate(model, ...)"
        )


def asked(moment: Moment) -> int:
    """How many columns the prompts fill, padding on their left included; all of a forward in which nobody has one."""
    prompt = moment.context.prompt & moment.context.real
    return int((prompt.any(0) * torch.arange(1, prompt.shape[1] + 1, device=prompt.device)).max()) or prompt.shape[1]


def undecided(moment: Moment, number: int) -> bool:
    """Whether a forward shows tokens of a prompt that the attachment of this number has not decided on."""
    if moment.written:
        return False
    known = moment.decisions.get(number)
    return known is None or known.width != asked(moment)
