"""Pictures of drift, 800 pixels wide: by layer, by position, by head, along a token's path, and against the task.

    drift_by_layer(found, ["displacement", "cosine_shift"]).savefig("drift.png")

Each function returns a matplotlib `Figure` of its own and touches no global state of matplotlib (no pyplot), so it can
be called anywhere; what is not to your taste you can change in `figure.axes`. Needs the extra `plots`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float

from tokenpaths.drift.report import Drift, RunName
from tokenpaths.engine.readings import Reading
from tokenpaths.report.figures import empty_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
from tokenpaths.report.figures import COLOURS, grid

RUNS = {"": ("", COLOURS[0], "o"), "before": ("frozen", COLOURS[0], "o"), "after": ("steered", COLOURS[1], "s")}


UNITS = {
    "kl": "KL(frozen || steered), nats",
    "reverse_kl": "KL(steered || frozen), nats",
    "js": "Jensen-Shannon divergence, nats",
    "flips": "share of tokens with another top-1",
    "displacement": "displacement, ||h' - h|| / ||h||",
    "cosine_shift": "cosine shift, 1 - cos(h, h')",
    "nll": "-log p(next token), nats",
    "step_length": "step length, unit of the states",
    "turning_angle": "turning angle, radians",
    "curvature": "curvature, radians per unit",
    "path_length": "path length, unit of the states",
    "cka": "debiased CKA",
    "mmd": "MMD², no unit",
    "frechet": "Fréchet distance, unit of the states",
    "sliced_w2": "sliced W2, unit of the states",
    "procrustes": "Procrustes angle, radians",
    "principal_angle": "principal angle, radians",
    "effective_rank": "effective rank, directions",
    "participation_ratio": "participation ratio, directions",
    "attention_js": "Jensen-Shannon divergence, nats",
    "attention_entropy": "entropy of attention, nats",
    "sink_mass": "attention to the first token, share",
}


"""What an axis says of a measure. Any other goes by its name."""


def drift_by_layer(report: Drift, names: Sequence[str] = ("displacement",)) -> Figure:
    """Measures by layer, averaged over tokens: a panel for each name, the 95 % interval over texts as a band.

    Of a quantity, the frozen and the steered run are drawn together. A set measure has no interval.

    Raises:
        ValueError: no names, or a name that the report does not have by layer.
    """
    if not names:
        raise ValueError(f"drift_by_layer was given no names; the report has {', '.join(report.names)}")
    lines = {name: _lines(report, name) for name in names}
    layers = max(([r["layer"] for r in run] for runs in lines.values() for run in runs.values()), key=len)
    figure = empty_figure(
        f"Drift by layer: mean over {report.tokens:,} tokens, 95 % interval over {report.texts:,} texts",
        height=1.7 + 2.3 * len(names),
    )
    panels = figure.subplots(len(names), sharex=True, squeeze=False)[:, 0]
    for axes, (name, runs) in zip(panels, lines.items(), strict=True):
        for run, records in runs.items():
            places = [layers.index(record["layer"]) for record in records]
            mean, low, high = (np.array([record[key] for record in records]) for key in ("mean", "low", "high"))
            label, colour, marker = RUNS[run]
            axes.plot(places, mean, marker + "-", markersize=4, color=colour, label=label)
            axes.fill_between(places, low, high, where=np.isfinite(high - low), color=colour, alpha=0.2, linewidth=0)
        if len(runs) > 1:
            axes.legend(frameon=False)
        axes.set_ylabel(UNITS.get(name, name))
        grid(axes)
    _name_layers(panels[-1].xaxis, layers)
    panels[-1].set_xlabel("layer (numbers are blocks)")
    return figure


def layers_by_position(report: Drift, name: str = "displacement", run: RunName | None = None) -> Figure:
    """A heat map of a measure: layers upward, and tokens by their distance from the end of the prompt, at 0.

    The outermost columns stand for all tokens beyond them; grey has no tokens. The colours end at the 99th percentile.
    Of a quantity, `run` chooses "before", "after" or "change" (the default).

    Raises:
        ValueError: the measure has no layers.
        KeyError: the report has no positions for this name.
    """
    offsets, means = report.by_position(name, run)
    if means.ndim != 2 or name not in _layered(report):
        raise ValueError(f"{name!r} was not measured by layer; these were: {', '.join(_layered(report))}")
    layers = list(dict.fromkeys(r["layer"] for r in report.records() if r["name"] == name))
    seen = np.flatnonzero(np.isfinite(means).any(0))
    shown = slice(seen[0], seen[-1] + 1)
    offsets, means = offsets[shown], means[:, shown]
    figure = empty_figure(f"Drift by layer and position: mean over {report.tokens:,} tokens", height=5.0)
    axes = figure.subplots()
    _heat(axes, means, (offsets[0] - 0.5, offsets[-1] + 0.5), UNITS.get(name, name))
    if offsets[0] < 0 < offsets[-1]:
        axes.axvline(0.5, color="white", linewidth=1.5)
    _name_layers(axes.yaxis, layers)
    axes.set_xlabel("token, counted from the last token of the prompt (0); right of the line is the answer")
    axes.set_ylabel("layer (numbers are blocks)")
    return figure


def heads_by_layer(report: Drift, name: str = "attention_js", run: RunName | None = None) -> Figure:
    """A heat map of an attention measure, averaged over tokens: layers upward, heads along. Grey has no head.

    Of a quantity, `run` chooses "before", "after" or "change" (the default).

    Raises:
        ValueError: the report does not have this name by head.
    """
    records = [r for r in report.records() if r["name"] == name and " head " in r["layer"]]
    run = run or ("change" if any(r["run"] == "change" for r in records) else "")
    places = [(*r["layer"].split(" head "), r["mean"]) for r in records if r["run"] == run]
    if not places:
        raise ValueError(
            f"{name!r} was not measured by head; give it to the meter: Meter(..., attention=(attention_js,)). "
            f"The report has {', '.join(report.names)}"
        )
    layers = list(dict.fromkeys(layer for layer, _, _ in places))
    means = np.full((len(layers), 1 + max(int(head) for _, head, _ in places)), np.nan)
    for layer, head, mean in places:
        means[layers.index(layer), int(head)] = mean
    figure = empty_figure(f"Drift of attention: mean over {report.tokens:,} tokens", height=5.0)
    axes = figure.subplots()
    _heat(axes, means, (-0.5, means.shape[1] - 0.5), UNITS.get(name, name))
    axes.set_xticks(range(0, means.shape[1], math.ceil(means.shape[1] / 18)))
    _name_layers(axes.yaxis, layers)
    axes.set_xlabel("head")
    axes.set_ylabel("layer (numbers are blocks)")
    return figure


def paths(before: Reading, after: Reading, token: int = -1) -> Figure:
    """The way of one token through the layers, frozen and steered, in the plane of the frozen path.

    The axes are the first two principal components of the frozen states, embedding and blocks; both are in the unit of
    the states and to one scale, and the frozen path ends to the upper right. The title says how much of the
    displacement lies in this plane: the rest is not seen.

    Raises:
        ValueError: under three states of one width, or no such token.
    """
    if not -len(before.ids) <= token < len(before.ids):
        raise ValueError(f"there is no token {token} in a text of {len(before.ids)}")
    frozen, layers = _path(before, token)
    steered, _ = _path(after, token)
    if len(layers) < 3 or frozen.shape != steered.shape:
        raise ValueError(f"a path needs three states of one width or more in both runs; there are {len(layers)}")
    centre = frozen.mean(0)
    _, spread, directions = torch.linalg.svd(frozen - centre, full_matrices=False)
    plane = directions[:2].T
    plane = plane * torch.where((frozen[-1] - centre) @ plane < 0, -1, 1)  # an SVD leaves the signs open
    held = (spread.square() / spread.square().sum()).tolist()
    moved = steered - frozen
    share = ((moved @ plane).norm() / moved.norm()).item()
    seen = "unmoved" if math.isnan(share) else f"{share:.0%} of its displacement is seen"
    where = f"token {token % len(before.ids) + 1} of {len(before.ids)}"
    figure = empty_figure(f"Path of {where} through the layers: {seen}", height=6.0)
    axes = figure.subplots()
    points = ((torch.cat((frozen, steered)) - centre) @ plane).numpy()
    colours: list[str] = []
    for half, run in zip(np.split(points, 2), ("before", "after"), strict=True):
        label, colour, marker = RUNS[run]
        axes.plot(*half.T, marker + "-", markersize=4, color=colour, label=label, alpha=0.8)
        colours += [colour] * len(layers)
    for i in _apart(points):
        name = _short(layers[i % len(layers)])
        axes.annotate(name, points[i], (5, 4), textcoords="offset points", fontsize=9, color=colours[i])
    axes.set_xlabel(f"first principal component ({held[0]:.0%} of the frozen path's variance)")
    axes.set_ylabel(f"second principal component ({held[1]:.0%})")
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.1)
    axes.legend(frameon=False, title="numbers are blocks")
    grid(axes)
    return figure


def _lines(report: Drift, name: str) -> dict[RunName, list[dict[str, Any]]]:
    """The records of a name by run, in order of depth; of a quantity without its change."""
    found: dict[RunName, list[dict[str, Any]]] = {}
    for record in report.records():
        if record["name"] == name and name in _layered(report) and record["run"] != "change":
            found.setdefault(record["run"], []).append(record)
    if not found:
        raise ValueError(f"{name!r} was not measured by layer; these were: {', '.join(_layered(report))}")
    return found


def _layered(report: Drift) -> list[str]:
    """The names that have layers, but no heads."""
    return list(dict.fromkeys(r["name"] for r in report.records() if r["layer"] and " head " not in r["layer"]))


def _name_layers(axis: Any, layers: Sequence[str]) -> None:
    """Name the layers that there is room for: all that are no blocks, and every so many blocks."""
    step = math.ceil(len(layers) / 18)
    names = [_short(layer) for layer in layers]
    shown = [i for i, name in enumerate(names) if not name.isdigit() or int(name) % step == 0]
    if step > 1:  # a word takes the room of its neighbours
        shown = [i for i in shown if not names[i].isdigit() or all(n.isdigit() for n in names[i - 1 : i + 2])]
    axis.set_ticks(shown, [names[i] for i in shown])


def _apart(points: Float[np.ndarray, "n 2"]) -> list[int]:
    """Points, the last one and then from the first on, that lie far enough from each other to be labelled."""
    room = 0.05 * float(np.ptp(points, axis=0).max())
    chosen: list[int] = []
    for i in (len(points) - 1, *range(len(points) - 1)):
        if all(float(np.linalg.norm(points[i] - points[j])) > room for j in chosen):
            chosen.append(i)
    return chosen


def _short(layer: str) -> str:
    return "embed" if layer == "embedding" else layer.removeprefix("block ")


def _heat(axes: Axes, means: Float[np.ndarray, "rows columns"], span: tuple[float, float], label: str) -> None:
    """Signed values around white, others from dark to light; the few largest share the last colour."""
    most = float(np.nanpercentile(np.abs(means), 99)) or 1.0
    signed = bool((means < 0).any())
    beyond = bool(np.nanmax(np.abs(means)) > most)
    image = axes.imshow(
        means,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(*span, -0.5, len(means) - 0.5),
        cmap="PuOr_r" if signed else "viridis",
        vmin=-most if signed else 0,
        vmax=most,
    )
    axes.set_facecolor("0.85")
    extend = "neither" if not beyond else "both" if signed else "max"
    axes.figure.colorbar(image, ax=axes, label=label, extend=extend)


def _path(reading: Reading, token: int) -> tuple[Float[torch.Tensor, "layers dim"], list[str]]:
    """A token's states of one width, from the embedding on, without the final norm, which is in another unit."""
    states = {name: state[token].detach().double().cpu() for name, state in reading.states.items() if name != "norm"}
    width = len(states["block 0"])
    layers = [name for name, state in states.items() if len(state) == width]
    return torch.stack([states[name] for name in layers]), layers
