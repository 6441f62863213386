"""Curves and pictures as PNG files, without a display and without global state."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import require
from .files import write

#: Told apart by line, marker and lightness, so also in greyscale.
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v")
COLOURS = ("#000000", "#c1440e", "#2a6ebb", "#6c9a2a", "#8a8a8a", "#b37ebe")

#: (xs, ys), or (xs, ys, lows, highs)
Curve = Sequence[Sequence[float]]


def curves(
    path: str | Path,
    series: Mapping[str, Curve],
    x_label: str,
    y_label: str,
    title: str = "",
    log_y: bool = False,
    log_x: bool = False,
) -> Path:
    """Draw curves over one pair of axes.

    Args:
        path: of the PNG file.
        series: the points (xs, ys) of each curve by its name in the legend, or (xs, ys, lows,
            highs) with a band around it; a curve is broken where y is not finite (on a
            logarithmic axis: not positive).
        x_label, y_label: what the axes show, with the unit: "time [s]", "outer iteration".
        title: above the axes.
        log_y, log_x: logarithmic axes.
    """
    many = len(series) > 6  # a legend of so many lines would hide the curves
    figure = _figure((8.4 if many else 6.4, 4.2))
    axes = figure.add_subplot()
    _draw(axes, series, log_x, log_y)
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    axes.legend(**({"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if many else {}))
    return _save(figure, path)


def panels(
    path: str | Path,
    series: Mapping[str, Mapping[str, Curve]],
    x_label: str,
    y_label: str,
    title: str = "",
    log_y: bool = False,
    log_x: bool = False,
    columns: int = 3,
) -> Path:
    """Draw curves over several pairs of axes of one scale, each under its own title.

    Args:
        series: the curves of each panel, as for :func:`curves`, by the panel's title.
        columns: panels per row.
    """
    columns = min(columns, len(series))
    rows = -(-len(series) // columns)
    figure = _figure((2.9 * columns + 0.6, 2.5 * rows + 0.5))
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axes, (name, curves_) in zip(grid, series.items(), strict=False):
        _draw(axes, curves_, log_x, log_y)
        axes.set_title(name, fontsize=10)
        axes.legend(fontsize=7)
    for axes in grid[len(series) :]:
        axes.set_axis_off()
    figure.supxlabel(x_label, fontsize=10)
    figure.supylabel(y_label, fontsize=10)
    if title:
        figure.suptitle(title, fontsize=11)
    return _save(figure, path)


def _draw(axes: Any, series: Mapping[str, Curve], log_x: bool, log_y: bool) -> None:
    if not series:
        raise ValueError("there are no curves to draw: series is empty")
    for i, (name, (xs, *heights)) in enumerate(series.items()):
        for ys in heights:
            if len(xs) != len(ys):
                raise ValueError(f"curve {name!r} has {len(xs)} x values and {len(ys)} y values")
        x = torch.as_tensor(xs, dtype=torch.float64).tolist()
        y, *band = (_drawn(ys, log_y) for ys in heights)
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(
            x,
            y,
            label=name,
            color=colour,
            linestyle=LINES[i % len(LINES)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=4,
            markevery=max(1, len(y) // 10),
        )
        if band:
            axes.fill_between(x, *band, color=colour, alpha=0.15, linewidth=0)
    if log_x:
        axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)


def _drawn(ys: Sequence[float], log_y: bool) -> list[float]:
    y = torch.as_tensor(ys, dtype=torch.float64).cpu()
    return torch.where(y.isfinite() & ((y > 0) | (not log_y)), y, torch.nan).tolist()


def image_grid(
    path: str | Path,
    images: Tensor,
    labels: Sequence[Any] | Tensor,
    title: str = "",
    columns: int = 10,
) -> Path:
    """Draw grey images in rows, each under its label, on one common scale that is shown beside.

    The smallest value of all is black, the largest white.

    Args:
        path: of the PNG file.
        images: shape (n, 1, height, width) or (n, height, width).
        labels: n of them, written above the images.
        title: above all.
        columns: images per row.
    """
    images = images.detach().float().cpu()
    if images.ndim == 4 and images.shape[1] == 1:
        images = images[:, 0]
    if images.ndim != 3 or len(images) == 0 or len(labels) != len(images):
        raise ValueError(
            f"a picture needs images of shape (n, 1, height, width) and n labels, "
            f"not {tuple(images.shape)} and {len(labels)} labels"
        )
    finite = images[images.isfinite()]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure = _figure((0.9 * columns + 1.2, 1.1 * rows + 0.6))
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    shown = None
    for axes in grid:
        axes.set_axis_off()
    for axes, image, label in zip(grid, images, labels, strict=False):
        shown = axes.imshow(image.tolist(), cmap="gray", vmin=low, vmax=high)
        axes.set_title(str(label.item() if isinstance(label, Tensor) else label), fontsize=9)
    figure.colorbar(shown, ax=list(grid), shrink=0.9, label="brightness")
    if title:
        figure.suptitle(title, fontsize=10)
    return _save(figure, path)


def _figure(inches: tuple[float, float]) -> Any:
    figure = require("matplotlib.figure", "drawing figures")
    require("matplotlib.backends.backend_agg", "drawing figures")
    return figure.Figure(figsize=inches, dpi=150, layout="constrained")


def _save(figure: Any, path: str | Path) -> Path:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    path = Path(path)
    write(path, content.getvalue())
    return path
