"""Faults that people reported of like tools: each works right here, or is refused with words that say why.

A new one is a line of REPORTS in benchmarks/torture/reports.py.
"""

from __future__ import annotations

import pytest

from benchmarks.torture.reports import REPORTS, verdict

MUST_WORK = {1, 2, 4, 5, 6, 10, 11, 13, 14, 15, 16, 18, 19, 20, 23, 24, 28, 29, 30, 31, 33, 34, 35}


@pytest.mark.usefixtures("traceable")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", REPORTS, ids=lambda number: f"{number}-{REPORTS[number][0].__name__}")
def test_a_public_report_is_right_or_refused(number: int) -> None:
    told, said = verdict(*REPORTS[number])
    assert told in (("right",) if number in MUST_WORK else ("right", "refused")), said
