"""Text from models and files in print, in Markdown, on pages and in figures is text, and steers nothing."""

from __future__ import annotations

import re
import warnings

import pytest

from benchmarks.torture.formats import of_kind, records
from tokenpaths.lab.audit.report import Threshold
from tokenpaths.report import Point, frontier, pages
from tokenpaths.report.escaping import html, markdown, mathtext, one_line
from tokenpaths.report.figures import empty_figure, forest
from tokenpaths.report.tables import markdown_table, text_table

HOSTILE = "a $\\frac{$ <script>x</script> [l](javascript:x) `c` **b** ~s~ |\n\x1b[31m\x07\u202e\ud800 &lt; _i_ a_b $x$"
CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]")


def test_each_place_has_its_own_escapes():
    assert one_line("a\nb\t\x1b[31m") == "a\\nb\\t\\x1b[31m"
    assert html("<a&'\">") == "&lt;a&amp;&#x27;&quot;&gt;"
    assert markdown("a | b\n*c* `d` <e> < 3 [f](g) [0.1, 0.2] _h_ i_j &lt; \\") == (
        "a \\| b \\*c\\* \\`d\\` &lt;e> < 3 [f\\](g) [0.1, 0.2] \\_h\\_ i_j &amp;lt; \\\\"
    )
    assert mathtext("$x$ costs $5\x1b") == "\\$x\\$ costs \\$5\\x1b"


def test_tables_hold_text():
    rows = [["name", "value"], [HOSTILE, "[0.1, 0.2]"]]
    told = text_table(rows)
    assert not CONTROL.search(told) and told.count("\n") == 1
    told = markdown_table(rows)
    assert (
        told.count("\n") == 2
        and "<script>" not in told
        and not re.search(r"(?<!\\)\]\(", told)
        and "[0.1, 0.2]" in told
    )
    assert not CONTROL.search(told)
    assert "<script>" not in pages.table(rows)


@pytest.mark.parametrize("kind", list(records()), ids=lambda kind: kind.__name__)
def test_every_report_with_text_from_a_file_can_be_printed_and_drawn(kind, unchecked):
    pytest.importorskip("matplotlib")
    made = of_kind(kind)
    assert not CONTROL.search(str(made))
    if hasattr(made, "to_markdown"):
        assert "<b>" not in made.to_markdown() and not CONTROL.search(made.to_markdown())
    if hasattr(made, "plot") and kind.__name__ not in ("Drift",):  # whose panels are named by the caller
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made.plot()._repr_png_()


def test_figures_draw_any_name():
    pytest.importorskip("matplotlib")
    figure = empty_figure(HOSTILE, 3.0)
    forest(figure.subplots(), [HOSTILE, "$\\frac{$"], [0.1, 0.2], [(0.0, 0.2), (0.1, 0.3)], ["#000000"] * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert figure._repr_png_().startswith(b"\x89PNG")
        points = [Point("$\\frac{$", 0.5, 0.1, label="$\\frac{$ $"), Point("b", 0.6, 0.2)]
        assert frontier(points, task="$\\frac{$ $", drift="$ $", log=True)._repr_png_()


@pytest.mark.parametrize(
    "wrong",
    [
        dict(value=float("nan")),
        dict(centre={"tokens": float("nan")}),
        dict(spread={"tokens": 0.0}),
        dict(spread={"tokens": float("inf")}),
        dict(centre={}, spread={}),
        dict(spread={"other": 1.0}),
        dict(adapters=0),
        dict(wrong=3, tested=2),
    ],
)
def test_a_threshold_that_could_flag_nothing_is_refused(wrong):
    given = dict(centre={"tokens": 0.5}, spread={"tokens": 1.5}, value=2.5, adapters=9)
    with pytest.raises(ValueError, match="a threshold has a finite centre|cannot be"):
        Threshold(**{**given, **wrong})


def test_a_threshold_of_a_file_without_a_value_is_refused_and_a_score_of_nan_is_flagged(tmp_path):
    (tmp_path / "t.json").write_text(
        '{"centre": {"a": 1}, "spread": {"a": 1}, "value": null, "adapters": 9, "wrong": 0, "tested": 0}'
    )
    with pytest.raises(ValueError, match="t.json is not a threshold of an audit as to_json writes it: a threshold"):
        Threshold.from_json(tmp_path / "t.json")
    threshold = Threshold({"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 1.0}, 2.0, 9)
    for scores in ({"a": float("nan"), "b": 0.0}, {"b": 0.0, "a": float("nan")}):
        assert threshold.flags(scores)
    with pytest.raises(ValueError, match="a score of a benign adapter is not finite"):
        Threshold.fit([{"a": 1.0 + i} for i in range(8)] + [{"a": float("nan")}], detectors=["a"])
