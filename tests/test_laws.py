"""Every law on every family: drawn cases here, many more of them in the slow suite."""

from __future__ import annotations

import pytest
from families import FAMILIES
from laws import LAWS, drawn

SLOW_CASES = 25


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("law", LAWS)
def test_law(law: str, family: str) -> None:
    (case,) = drawn(law, family, 1)
    LAWS[law](case)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("law", LAWS)
def test_law_on_many_cases(law: str, family: str) -> None:
    for case in drawn(law, family, SLOW_CASES):
        try:
            LAWS[law](case)
        except Exception as error:
            raise AssertionError(f"{case}") from error
