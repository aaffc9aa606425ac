"""Pictures of drift, 800 pixels wide: by layer, by position, by head, and along a token's path.

    found.plot(["displacement", "cosine_shift"]).savefig("drift.png")     # `Drift` chooses the numbers
    plot_path(before, after, token=-1)                                    # of two readings of a text

Each function returns a matplotlib `Figure` of its own and touches no global state of matplotlib (no pyplot), so it can
be called anywhere. Change what you like in `figure.axes`. Needs the extra `plots`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float

from tokenpaths.engine.readings import Reading
from tokenpaths.report.escaping import mathtext
from tokenpaths.report.figures import COLOURS, empty_figure, grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Lines: TypeAlias = Mapping[str, Sequence[Mapping[str, Any]]]
"""Records with "layer", "mean", "low" and "high", by run and in order of depth."""

RUNS = {"": ("", COLOURS[0], "o"), "before": ("frozen", COLOURS[0], "o"), "after": ("steered", COLOURS[1], "s")}
"""The label, colour and marker of a run."""
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


def draw_layers(panels: Mapping[str, Lines], title: str) -> Figure:
    """Means by layer, and their intervals as bands: a panel for each name, a line for each run."""
    layers = max(([r["layer"] for r in line] for lines in panels.values() for line in lines.values()), key=len)
    figure = empty_figure(title, height=1.7 + 2.3 * len(panels))
    every = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, (name, lines) in zip(every, panels.items(), strict=True):
        for run, records in lines.items():
            places = [layers.index(record["layer"]) for record in records]
            mean, low, high = (np.array([record[key] for record in records]) for key in ("mean", "low", "high"))
            label, colour, marker = RUNS[run]
            axes.plot(places, mean, marker + "-", markersize=4, color=colour, label=label)
            axes.fill_between(places, low, high, where=np.isfinite(high - low), color=colour, alpha=0.2, linewidth=0)
        if len(lines) > 1:
            axes.legend(frameon=False)
        axes.set_ylabel(UNITS.get(name) or mathtext(name))
        grid(axes)
    _name_layers(every[-1].xaxis, layers)
    every[-1].set_xlabel("layer (numbers are blocks)")
    return figure


def draw_positions(
    offsets: Float[np.ndarray, " offsets"],
    means: Float[np.ndarray, "layers offsets"],
    layers: Sequence[str],
    name: str,
    title: str,
) -> Figure:
    """A heat map of means: layers upward, tokens along by their offset. Ends that have no token are cut off."""
    seen = np.flatnonzero(np.isfinite(means).any(0))
    shown = slice(seen[0], seen[-1] + 1)
    first, last = float(offsets[shown][0]), float(offsets[shown][-1])
    figure, axes = _heat_map(means[:, shown], (first - 0.5, last + 0.5), layers, name, title)
    if first < 0 < last:
        axes.axvline(0.5, color="white", linewidth=1.5)
    axes.set_xlabel("token, counted from the last token of the prompt (0); right of the line is the answer")
    return figure


def draw_heads(means: Float[np.ndarray, "layers heads"], layers: Sequence[str], name: str, title: str) -> Figure:
    """A heat map of means: layers upward, heads along. NaN stands where a layer has no such head."""
    heads = means.shape[1]
    figure, axes = _heat_map(means, (-0.5, heads - 0.5), layers, name, title)
    axes.set_xticks(range(0, heads, math.ceil(heads / 18)))
    axes.set_xlabel("head")
    return figure


def plot_path(before: Reading, after: Reading, token: int = -1) -> Figure:
    """The path of one token through the layers, frozen and steered, in the plane of the frozen path.

    The axes are the first two principal components of the frozen states, from the embedding to the last block. Both are
    in the unit of the states and to one scale, and the frozen path ends to the upper right. The title says how much of
    the displacement lies in this plane: the rest is not seen.

    Args:
        before: the frozen reading of a text.
        after: the steered reading of the same text.
        token: the token's place in the text; a negative one is counted from the end.

    Raises:
        ValueError: there are fewer than three states of one width, or no such token.
        ImportError: matplotlib is not installed.
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
        axes.annotate(mathtext(name), points[i], (5, 4), textcoords="offset points", fontsize=9, color=colours[i])
    axes.set_xlabel(f"first principal component ({held[0]:.0%} of the frozen path's variance)")
    axes.set_ylabel(f"second principal component ({held[1]:.0%})")
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.1)
    axes.legend(frameon=False, title="numbers are blocks")
    grid(axes)
    return figure


def _name_layers(axis: Any, layers: Sequence[str]) -> None:
    """Name the layers that there is room for: all that are no blocks, and every k-th block."""
    step = math.ceil(len(layers) / 18)
    names = [_short(layer) for layer in layers]
    shown = [i for i, name in enumerate(names) if not name.isdigit() or int(name) % step == 0]
    if step > 1:  # a word takes the room of its neighbours
        shown = [i for i in shown if not names[i].isdigit() or all(n.isdigit() for n in names[i - 1 : i + 2])]
    axis.set_ticks(shown, [mathtext(names[i]) for i in shown])


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


def _heat_map(
    means: Float[np.ndarray, "rows columns"], span: tuple[float, float], layers: Sequence[str], name: str, title: str
) -> tuple[Figure, Axes]:
    """A row for each layer, over a span of x. Signed values are around white, others from dark to light; NaN is grey.

    The colours end at the 99th percentile, so that the few largest values share the last colour.
    """
    most = float(np.nanpercentile(np.abs(means), 99)) or 1.0
    signed = bool((means < 0).any())
    beyond = bool(np.nanmax(np.abs(means)) > most)
    figure = empty_figure(title, height=5.0)
    axes: Axes = figure.subplots()
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
    figure.colorbar(image, ax=axes, label=UNITS.get(name) or mathtext(name), extend=extend)
    _name_layers(axes.yaxis, layers)
    axes.set_ylabel("layer (numbers are blocks)")
    return figure, axes


def _path(reading: Reading, token: int) -> tuple[Float[torch.Tensor, "layers dim"], list[str]]:
    """A token's states of one width, from the embedding on, without the final norm, which is in another unit."""
    states = {name: state[token].detach().double().cpu() for name, state in reading.states.items() if name != "norm"}
    width = len(states["block 0"])
    layers = [name for name, state in states.items() if len(state) == width]
    return torch.stack([states[name] for name in layers]), layers
