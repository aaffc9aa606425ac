"""What PEFT has laid into a model, in some rows of a batch and not in the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenpaths.attachment.backward import running_backward
from tokenpaths.attachment.laid import Attachment
from tokenpaths.attachment.mode import follow
from tokenpaths.attachment.moment import Moment
from tokenpaths.attachment.moving import Plan
from tokenpaths.site import Host
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.trailmap.gate import Gate


class RowsOfAdapter(Attachment):
    """An adapter that lies in the model by itself, held to the rows that a gate opens, or that `rows` names.

    Raises `ValueError` for neither of them, for a strength, and for an adapter that cannot be held to rows.
    """

    def __init__(
        self,
        host: Host,
        trails: Adapter,
        gate: Gate | None,
        strength: float = 1.0,
        rows: Sequence[int] | None = None,
        spans: Any = None,
        tokenizer: Any = None,
        everywhere: bool | None = None,
    ) -> None:
        name = type(trails).__name__
        if gate is None and rows is None:
            raise ValueError(
                f"attach: a {name} lies in the model and is at work already: attach it behind a gate (when=gate), or "
                "in some rows (rows=[0, 2])"
            )
        if strength != 1 or spans is not None:
            raise ValueError(f"attach: strength and spans are for trails, and mean nothing to a {name}")
        trails.check(host.model)
        super().__init__(host, trails, gate, 1.0, rows, None, tokenizer, everywhere)

    def lay(self) -> None:
        super().lay()
        self.trails.by_rows(self._undo, self._at_work)

    def _at_work(self) -> Tensor | bool:
        """The rows of the running forward in which the adapter is at work; True and False for all and none."""
        if not self.acts():  # it was attached for another thread or task
            return True
        plan = self._plan_here()
        return False if plan is None else True if plan.opens is None else plan.opens

    def begin(self, moment: Moment | None, resting: bool = False) -> None:
        if not torch.compiler.is_compiling():
            self._now.backward = running_backward()
        follow(self.trails, self.host.blocks)
        self._go(None if resting or not self.trails.enabled else self._rows_of(moment))

    def _rows_of(self, moment: Moment | None) -> Plan | None:
        """The plan of a forward; None where no row is open. What reads no tokens, but images, is not gated."""
        if moment is None:
            return Plan(None, None, 1.0)
        opens = self._opens(moment)
        if self.rows is not None:
            count = len(moment.context.real) // moment.repeats
            if any(not 0 <= row < count for row in self.rows):
                raise ValueError(f"rows={self.rows} names a row that the batch of {count} does not have")
            named = torch.tensor([row // moment.repeats in self.rows for row in range(len(moment.context.real))])
            opens = named if opens is None else opens & named
        if opens is None or bool(opens.all()):
            return Plan(None, None, 1.0)
        return Plan(None, None, 1.0, opens=opens) if bool(opens.any()) else None
