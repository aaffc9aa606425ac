"""Pictures show the numbers they were given, name their axes, are 800 pixels wide, and leave matplotlib as it was."""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from PIL import Image
from subjects import MOVING

from tokenpaths import All, Example, Site, TrailMap
from tokenpaths.data import collate
from tokenpaths.drift import (
    Drift,
    Meter,
    attention_entropy,
    attention_js,
    cka,
    displacement,
    effective_rank,
    kl,
    plot_path,
    turning_angle,
)
from tokenpaths.engine import Reading, read, runs
from tokenpaths.report import Point, frontier

POINTS = [
    Point("low rank", 0.5, 0.1, (0.4, 0.6), (0.05, 0.2), label="0.5"),
    Point("low rank", 0.9, 1.0, label="1"),
    Point("full", 0.7, 0.4),
    Point("full", 0.6, 2.0, (0.5, float("inf"))),
]


def text(length: int, answer: int) -> Example:
    return Example(tuple(range(3, 3 + length)), (False,) * (length - answer) + (True,) * answer)


@pytest.fixture(scope="module")
def read_once() -> tuple[Drift, list[tuple[Reading, Reading]]]:
    torch.manual_seed(0)
    model = FAMILIES["llama"].make()
    model.set_attn_implementation("eager")
    trails = TrailMap({Site(1, All()): MOVING["LoReFT"](32)})
    batch = collate([text(9, answer=3), text(12, answer=3)])
    meter = Meter(
        *runs(model, trails),
        measures=(kl, displacement),
        quantities=(turning_angle,),
        sets=(cka,),
        set_quantities=(effective_rank,),
        attention=(attention_js,),
        attention_quantities=(attention_entropy,),
    )
    return meter.over([batch]).report(), read(*runs(model, trails), batch)


@pytest.fixture(scope="module")
def found(read_once: Any) -> Drift:
    return read_once[0]


@pytest.fixture(scope="module")
def pair(read_once: Any) -> tuple[Reading, Reading]:
    return read_once[1][0]


def image(figure: Any) -> Image.Image:
    file = io.BytesIO()
    figure.savefig(file)
    return Image.open(file)


def heat(figure: Any) -> np.ndarray:
    return figure.axes[0].images[0].get_array().filled(np.nan)


def ticks(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def test_every_picture_is_800_pixels_wide_and_says_what_it_shows(found, pair):
    pictures = [
        found.plot(["displacement", "cka"]),
        found.plot_positions(),
        found.plot_heads(),
        plot_path(*pair),
        frontier(POINTS),
        frontier(POINTS, log=True),
    ]
    for figure in pictures:
        assert image(figure).width == 800
        assert figure.get_suptitle()
        assert figure.axes[0].get_ylabel()
        assert any(axes.get_xlabel() for axes in figure.axes)


def test_drift_by_layer_draws_means_and_intervals(found):
    figure = found.plot(["displacement", "turning_angle", "cka"])
    moved, turned, alike = figure.axes
    (line,) = moved.lines
    layers = found["displacement"].layers
    assert line.get_ydata().tolist() == [found["displacement"][layer].mean for layer in layers]
    band = moved.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == max(found["displacement"][layer].interval[1] for layer in layers)
    assert [line.get_label() for line in turned.lines] == ["frozen", "steered"]
    assert turned.lines[1].get_ydata().tolist() == [s.mean for s in found["turning_angle"].after.summaries]
    assert turned.lines[1].get_xdata().tolist() == [1, 2]  # by name: it has no value at the embedding
    assert alike.lines[0].get_ydata().tolist() == list(found["cka"].values())
    assert ticks(alike.xaxis) == ["embed", "0", "1", "2", "norm"]
    assert "||h' - h||" in moved.get_ylabel()


def test_a_set_quantity_is_drawn_for_both_runs(found):
    (axes,) = found.plot(["effective_rank"]).axes
    assert [line.get_label() for line in axes.lines] == ["frozen", "steered"]


def test_layers_by_position_draws_what_the_report_holds(found):
    figure = found.plot_positions()
    offsets, means = found.by_position("displacement")
    seen = np.isfinite(means).any(0)
    np.testing.assert_array_equal(heat(figure), means[:, seen])
    assert figure.axes[0].images[0].get_extent()[:2] == [offsets[seen][0] - 0.5, offsets[seen][-1] + 0.5]
    assert ticks(figure.axes[0].yaxis) == ["embed", "0", "1", "2", "norm"]
    assert "||h' - h||" in figure.axes[1].get_ylabel()  # the colour bar


def test_a_signed_change_is_drawn_around_zero(found):
    shown = found.plot_positions("turning_angle").axes[0].images[0]
    assert shown.norm.vmin == -shown.norm.vmax
    assert shown.cmap.name == "PuOr_r"
    assert found.plot_positions("turning_angle", "before").axes[0].images[0].norm.vmin == 0


def test_heads_by_layer_draws_each_head_in_its_place(found):
    drawn = heat(found.plot_heads())
    assert drawn.shape == (3, 4)
    for layer in range(3):
        for head in range(4):
            assert drawn[layer, head] == found["attention_js"][f"block {layer} head {head}"].mean
    change = found["attention_entropy"].change
    assert heat(found.plot_heads("attention_entropy"))[2, 3] == change["block 2 head 3"].mean


def test_a_path_in_a_plane_keeps_its_distances(pair):
    before, after = pair
    flat = torch.randn(2, 32, dtype=torch.float64)
    names = ["embedding", "block 0", "block 1", "block 2"]
    frozen, steered = torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    make = lambda path: {n: (p @ flat).expand(len(before.ids), -1) for n, p in zip(names, path, strict=True)}  # noqa: E731
    figure = plot_path(
        dataclasses.replace(before, states=make(frozen)), dataclasses.replace(after, states=make(steered)), token=0
    )
    drawn = torch.cat([torch.tensor(line.get_xydata()) for line in figure.axes[0].lines])
    torch.testing.assert_close(torch.cdist(drawn, drawn), torch.cdist(*2 * [torch.cat((frozen, steered)) @ flat]))
    assert "token 1 of 9" in figure.get_suptitle()
    assert "100% of its displacement is seen" in figure.get_suptitle()


def test_a_path_against_itself_has_no_displacement(pair):
    figure = plot_path(pair[0], pair[0])
    frozen, steered = figure.axes[0].lines
    np.testing.assert_array_equal(frozen.get_xydata(), steered.get_xydata())
    assert "token 9 of 9" in figure.get_suptitle()
    assert "unmoved" in figure.get_suptitle()
    named = {text.get_text() for text in figure.axes[0].texts}
    assert {"embed", "2"} <= named <= {"embed", "0", "1", "2"}  # the norm is no part of a path


def test_frontier_draws_points_bars_and_the_best_so_far():
    figure = frontier(POINTS, drift="perplexity ratio")
    (axes,) = figure.axes
    best = axes.lines[0]
    assert best.get_xydata().tolist() == [[0.1, 0.5], [0.4, 0.7], [1.0, 0.9], [2.0, 0.9]]
    assert axes.get_legend_handles_labels()[1] == ["best at this drift or less", "low rank", "full"]
    first, _ = axes.containers
    assert first[0].get_xydata().tolist() == [[0.1, 0.5], [1.0, 0.9]]
    along, up = (bars.get_segments()[0] for bars in first[2])
    assert along[:, 0].tolist() == [0.05, 0.2]
    assert up[:, 1].tolist() == [0.4, 0.6]
    assert [text.get_text() for text in axes.texts] == ["0.5", "1", "", ""]
    assert axes.get_xlabel() == "perplexity ratio"


def test_nothing_moved_is_drawn_too():
    model = FAMILIES["llama"].make()
    meter = Meter(*runs(model, TrailMap({Site(1, All()): MOVING["LoReFT"](32)})), measures=(displacement,))
    meter.before = meter.after = dataclasses.replace(meter.after, shares=0)
    meter.read(collate([text(9, answer=0)]))
    report = meter.report()
    assert (heat(report.plot_positions()) == 0).all()
    assert image(report.plot_positions()).width == 800
    assert image(report.plot()).width == 800  # one text: the interval has no bounds, and there is no band


def test_what_cannot_be_drawn_is_refused(found, pair):
    with pytest.raises(ValueError, match="no names; the report has kl, displacement"):
        found.plot([])
    with pytest.raises(
        ValueError, match="'kl' was not measured by layer; these were: displacement, turning_angle, cka"
    ):
        found.plot(["kl"])
    with pytest.raises(ValueError, match="'attention_js' was not measured by layer"):
        found.plot_positions("attention_js")
    with pytest.raises(ValueError, match="'displacement' was not measured by head"):
        found.plot_heads("displacement")
    with pytest.raises(ValueError, match="no token 9 in a text of 9"):
        plot_path(*pair, token=9)
    with pytest.raises(ValueError, match="no points"):
        frontier([])
    with pytest.raises(ValueError, match="drift above 0 if log"):
        frontier([Point("a", 0.5, 0.0)], log=True)
    with pytest.raises(ValueError, match="must be finite"):
        frontier([Point("a", float("nan"), 1.0)])


def test_matplotlib_is_asked_for(monkeypatch, found):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'tokenpaths\[plots\]'"):
        found.plot()


def test_no_global_state_of_matplotlib_is_touched():
    program = """
import sys
from tokenpaths.report import tradeoff
assert "matplotlib" not in sys.modules
import matplotlib
def settings():  # without the backend, which is looked for when it is read
    return {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}
before = settings()
tradeoff.frontier([tradeoff.Point("a", 0.5, 1.0)]).savefig("/dev/null", format="png")
assert settings() == before
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
