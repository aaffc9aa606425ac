"""One decision a request: the frozen model reads the prompt, and a gate opens or shuts its attachment for the row.

A forward that holds a prompt runs frozen at first, with nothing moved. When the deepest layer that a gate reads is
reached, every row is decided, for its prompt and its answer together. Where no row opens, that forward is the frozen
model's and simply goes on. Where one opens, it is left at that layer, what it put into the cache is taken back, and the
forward runs again with the attachments at work in the rows that opened.

A prompt that this forward shows in part only (prefilled in chunks, or behind a cache that others filled) is read whole
in a forward of its own, which ends at the same layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from tokenpaths.attachment import caches
from tokenpaths.attachment.hooks import Hook
from tokenpaths.attachment.moment import Decision, Moment
from tokenpaths.attachment.moving import states_of
from tokenpaths.checking import kind, quoted
from tokenpaths.site import Host
from tokenpaths.site.host import text_config
from tokenpaths.trailmap.gate import Gate, Reading
from tokenpaths.undo import Undo


class _Decided(Exception):
    """The deepest layer that a gate reads was reached, and the forward is not wanted any further."""


@dataclass(eq=False)
class Deciding:
    """The decisions that one forward must make.

    Args:
        moment: the forward.
        gates: the gates that are asked, by the numbers of their attachments.
        blocks: the blocks that they count.
        others: whether something else is at work that an open gate would not be needed for.
    """

    moment: Moment
    gates: Mapping[int, Gate]
    blocks: nn.ModuleList
    others: bool
    made: dict[int, Decision] = field(default_factory=dict[int, Decision])

    def run(self, forward: Callable[[], Any], named: Mapping[str, Any], plain: Callable[..., Any]) -> Any:
        """The output of a forward in which nothing is moved; None where it must run again, or was not run.

        Args:
            forward: runs it.
            named: its arguments.
            plain: runs the same module on other arguments, as far as it takes them.

        Raises `ValueError` where the prompt cannot be read.
        """
        moment = self.moment
        cache = caches.cache_in(named)
        apart = moment.past > 0 or moment.kept > 0 or asked(moment) > moment.length or not caches.can_go_back(cache)
        if apart:
            self._read_apart(plain)
            return None
        back = caches.going_back(cache)
        try:
            with self._looking(stop=False):
                return forward()
        except _Decided:
            back()
            return None

    def decided(self) -> Moment:
        """The moment, with the decisions."""
        return replace(self.moment, decisions={**self.moment.decisions, **self.made})

    def _read_apart(self, plain: Callable[..., Any]) -> None:
        """Read the prompt in a forward of its own, without a cache."""
        ids, real = self.moment.context.ids, self.moment.context.real
        width = asked(self.moment)
        if ids is None or bool((ids[:, :width].lt(0) & real[:, :width]).any()):
            raise ValueError(
                f"a gate reads the whole prompt, but the first {self.moment.past} tokens of it come from a cache that "
                "was filled without it, and their ids are not known: run the whole prompt"
            )
        real = real[:, :width]
        positions = (real.cumsum(1) - 1).clamp_min(0)
        try:
            with torch.no_grad(), self._looking(stop=True):
                plain(
                    input_ids=ids[:, :width].clamp_min(0),
                    attention_mask=real.long(),
                    position_ids=positions,
                    use_cache=False,
                )
        except _Decided:
            return
        raise RuntimeError("the forward of a prompt did not reach the layer that its gate reads")

    def _looking(self, *, stop: bool) -> Undo:
        """Inside, the states that the gates read are looked at, and at the deepest of them all rows are decided."""
        undo = Undo()
        seen: dict[Reading, Tensor] = {}
        wanted = sorted({reading for gate in self.gates.values() for reading in gate.readings})
        layers = sorted({reading.layer for reading in wanted})
        for layer in layers:

            def look(module: nn.Module, args: Any, output: Any, layer: int = layer) -> None:
                states = states_of(module, output).detach()
                mask = _read_tokens(self.moment)[:, : states.shape[1]].to(states.device)
                for reading in wanted:
                    if reading.layer == layer:
                        seen[reading] = reading.of(states, mask)
                if layer == layers[-1] and (self._decide(seen) or stop):
                    raise _Decided

            undo.hook(self.blocks[layer].register_forward_hook, Hook(look))
        return undo

    def _decide(self, seen: Mapping[Reading, Tensor]) -> bool:
        """Decide every row; whether the forward must run again."""
        width, repeats = asked(self.moment), self.moment.repeats
        for number, gate in self.gates.items():
            opens = gate.opens({reading: seen[reading] for reading in gate.readings}).cpu()
            opens = opens.view(-1, repeats)[:, :1].expand(-1, repeats).flatten()  # beams of a prompt go together
            self.made[number] = Decision(opens, width)
        return self.others or bool(torch.stack([d.opens.any() for d in self.made.values()]).any())


def check_gate(gate: object, host: Host) -> None:
    """Raise `TypeError` for what is no gate, and `ValueError` for one that cannot read this model."""
    if not isinstance(gate, Gate):
        raise TypeError(f"attach: when={quoted(gate)} is {kind(gate)}, but must be a Gate, as tp.fit_gate makes one")
    deepest, count = max(reading.layer for reading in gate.readings), len(host.blocks)
    dim = getattr(text_config(host.inner), "hidden_size", gate.dim)
    if deepest >= count or gate.dim != dim:
        raise ValueError(
            f"attach: the gate reads states of width {gate.dim} at layer {deepest}, but the model has {count} layers "
            f"of width {dim}: fit a gate for this model, tp.fit_gate(model, ...)"
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


def _read_tokens(moment: Moment) -> Bool[Tensor, "batch seq"]:
    """What is read of each row: its prompt, or all of a row without one."""
    real = moment.context.real
    prompt = moment.context.prompt & real
    return torch.where(prompt.any(1, keepdim=True), prompt, real)
