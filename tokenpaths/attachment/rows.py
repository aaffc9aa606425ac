"""What PEFT has laid into a model, in some rows of a batch and not in the others; and trails beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from tokenpaths.attachment.laid import Attachment
from tokenpaths.attachment.moment import Moment
from tokenpaths.attachment.moving import Part, Plan
from tokenpaths.checking import quoted
from tokenpaths.site import Host, Place
from tokenpaths.trailmap.adapter import Adapter
from tokenpaths.trailmap.gate import Gate


class _InRows(Attachment):
    """An attachment of what is at work in a model by itself. Its plans know the rows in which that shall be."""

    def lay(self) -> None:
        super().lay()
        if self.gate is not None or self.rows is not None:
            self.trails.by_rows(self._undo, self._at_work)

    def _at_work(self) -> Tensor | bool:
        """The rows of the running forward in which the adapter is at work; True and False for all and none."""
        if not self.acts():  # it was attached for another thread or task
            return True
        plan = self._plan_here()
        return False if plan is None else True if plan.opens is None else plan.opens

    @property
    def strength(self) -> float:
        """What every displacement is multiplied by; 1 where weights change, which are not multiplied."""
        return self._strength

    @strength.setter
    def strength(self, strength: float) -> None:
        if strength != 1 and not self.trails.sites:
            name = type(self.trails).__name__
            raise ValueError(f"attach: strength={quoted(strength)} is for trails, and means nothing to a {name}")
        Attachment.strength.__set__(self, strength)

    def _rows(self, moment: Moment) -> Tensor | None:
        """The rows in which it is at work; None for all of them."""
        rows = self._planner.rows_at_work(moment, self._opens(moment))
        return None if rows is None or bool(rows.all()) else rows


class Mixed(_InRows):
    """Trails, and adapters that lie in the model by themselves, as one: `Together`."""

    def _locate(self) -> list[tuple[Place, list[Part]]]:
        self.trails.check(self.host.model)
        return super()._locate()

    def _plan(self, moment: Moment) -> Plan | None:
        """None where no row is open."""
        rows = self._rows(moment)
        plan = super()._plan(moment) if rows is None or bool(rows.any()) else None
        return None if plan is None else replace(plan, opens=rows)


class RowsOfAdapter(_InRows):
    """An adapter that lies in the model by itself, held to the rows that a gate opens, or that `rows` names.

    Raises `ValueError` for neither of them, for a strength, and for an adapter that cannot be held to rows.
    """

    def __init__(
        self,
        host: Host,
        trails: Adapter,
        gate: Gate | None,
        alone: bool = False,
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
        if spans is not None:
            raise ValueError(f"attach: spans are for trails, and mean nothing to a {name}")
        trails.check(host.model)
        super().__init__(host, trails, gate, alone, strength, rows, None, tokenizer, everywhere)

    def _plan(self, moment: Moment) -> Plan | None:
        """None where no row is open."""
        rows = self._rows(moment)
        return Plan(None, None, 1.0, opens=rows) if rows is None or bool(rows.any()) else None
