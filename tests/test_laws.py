"""The laws over the product of trails, rules, streams, ways to generate and families.

Fast: every family under a case of each law, drawn with a fixed seed, and one family under cases in which every
trail, rule, stream and way occurs. Slow: every rule on every stream for each family, and the whole product of trails,
rules and streams for two families.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from families import FAMILIES
from laws import LAWS, Case, covering, drawn

LAW = pytest.mark.parametrize("law", LAWS)


def check(law: str, cases: Iterable[Case]) -> None:
    for case in cases:
        try:
            LAWS[law](case)
        except Exception as error:
            raise AssertionError(f"{law} does not hold for {case}") from error


@pytest.mark.parametrize("family", FAMILIES)
@LAW
def test_every_family(law, family):
    check(law, drawn(law, family, 1 if FAMILIES[family].kind != "encoder-decoder" else 2))


@LAW
def test_every_trail_rule_and_stream(law):
    check(law, covering("llama"))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@LAW
def test_every_rule_on_every_stream(law, family):
    check(law, covering(family, every=("rule", "stream")))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@LAW
def test_the_whole_product(law, family):
    check(law, covering(family, every=("trail", "rule", "stream")))
