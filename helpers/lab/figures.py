"""One look for all figures: theory is a line, simulation dots with error bars, data a third color.

Figures are drawn in dark ink on a transparent ground. On a dark page the book's style sheet inverts lightness and
keeps hues, so one picture serves both.

In a notebook a figure also says as text what it draws, and its picture carries that text: so a stored picture that is
gone, exchanged or out of date is noticed, on whatever machine and with whatever fonts it is drawn again.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from IPython.core.getipython import get_ipython
from IPython.core.pylabtools import print_figure
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator

from helpers.lab.estimates import Estimate, stack

THEORY, SIMULATION, DATA, FOURTH = "#1565a8", "#c2410c", "#0f766e", "#7e3fa8"
INK, FAINT = "#22262b", "#8a9099"

STYLE = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.prop_cycle": cycler(color=[THEORY, SIMULATION, DATA, FOURTH]),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "figure.figsize": (7.0, 3.8),
    "figure.dpi": 144,
    "font.size": 11,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 2.0,
    "savefig.facecolor": "none",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def axes(rows: int = 1, columns: int = 1, **kwargs: object) -> tuple[Figure, Axes | np.ndarray]:
    """Return ``plt.subplots(rows, columns, **kwargs)`` in the book's style."""
    plt.rcParams.update(STYLE)
    figure_and_axes = plt.subplots(rows, columns, **kwargs)
    _say_what_is_drawn()  # after the first figure, with which the notebook's own way to show one is set up
    return figure_and_axes


def log_log(ax: Axes, *, ticks: Sequence[int], xlabel: str, ylabel: str) -> None:
    """Make both axes logarithmic and write their ticks as plain numbers; `ticks` are those of the x axis."""
    ax.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())
    for bars in [drawn for drawn in ax.containers if isinstance(drawn, ErrorbarContainer)]:
        _mark_bars_below_zero(ax, bars)


def theory(
    ax: Axes,
    x: np.ndarray,
    y: np.ndarray,
    *,
    label: str | None = None,
    color: str = THEORY,
    label_at_end: bool = False,
) -> None:
    """Draw what a formula says: a line, with its label in the legend or beside its last point."""
    ax.plot(x, y, color=color, label=None if label_at_end else label, zorder=1)
    if label_at_end:
        beside = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
        ax.annotate(label, (x[-1], y[-1]), color=color, **beside)


def simulation(
    ax: Axes,
    x: np.ndarray,
    estimates: Estimate | Sequence[Estimate],
    *,
    label: str | None = None,
    color: str = SIMULATION,
    marker: str = "o",
) -> None:
    """Draw estimates as dots with bars of two standard errors; pass ``color=DATA`` for a real network.

    Where a bar reaches zero or less it ends at a logarithmic axis with a triangle.
    """
    if not isinstance(estimates, Estimate):
        estimates = stack(estimates)
    bars = ax.errorbar(
        x,
        estimates.value,
        yerr=2 * estimates.stderr,
        fmt=marker,
        color=color,
        label=label,
        markersize=5,
        elinewidth=1.5,
        capsize=2,
        zorder=2,
    )
    if ax.get_yscale() == "log":
        _mark_bars_below_zero(ax, bars)


def _mark_bars_below_zero(ax: Axes, bars: ErrorbarContainer) -> None:
    """Draw a triangle at the foot of the plot for each bar that a logarithmic axis cuts off."""
    dots, _, (strokes,) = bars
    feet = [stroke[0, 0] for stroke in strokes.get_segments() if stroke[0, 1] <= 0]
    if feet:
        mark = {"marker": "v", "markersize": 6, "linestyle": "none", "clip_on": False}
        ax.plot(feet, [0] * len(feet), color=dots.get_color(), transform=ax.get_xaxis_transform(), **mark)


def description(figure: Figure) -> str:
    """Return as text what a figure draws, to three digits: the same wherever the same numbers are drawn.

    Parameters
    ----------
    figure : matplotlib.figure.Figure

    Returns
    -------
    str
        A line for the figure, and one for each of its axes: both labels, and for each line, cloud of points, area,
        bundle of strokes and image the mean and the standard deviation of its coordinates (of an image, its values).
    """
    lines = [repr(figure)]
    for ax in figure.axes:
        drawn = [*ax.lines, *ax.collections, *ax.patches, *ax.images]
        lines.append(f"{ax.get_xlabel()} | {ax.get_ylabel()}: {', '.join(map(_summary, drawn))}")
    return "\n".join(lines)


def _summary(artist: Artist) -> str:
    if isinstance(artist, AxesImage):
        name, columns = "image", [np.ma.filled(artist.get_array().astype(float), np.nan)]
    elif isinstance(artist, Line2D):
        name, columns = "line", artist.get_xydata().T
    elif isinstance(artist, PathCollection):
        name, columns = "points", np.ma.filled(artist.get_offsets().astype(float), np.nan).T
    elif isinstance(artist, Patch):
        name, columns = "area", artist.get_patch_transform().transform(artist.get_path().vertices).T
    else:
        name, columns = "strokes", np.concatenate([path.vertices for path in artist.get_paths()]).T
    return f"{name} ({', '.join(map(_mean_and_deviation, columns))})"


def _mean_and_deviation(values: np.ndarray) -> str:
    """Return both as text; what rounding leaves of a sum that cancels is 0."""
    values = values[np.isfinite(values)]
    if not values.size:
        return "nothing"
    figures = np.array([values.mean(), values.std()])
    figures[np.abs(figures) < 1e-9 * np.abs(values).max()] = 0
    return f"{figures[0]:.3g} ± {figures[1]:.3g}"


def _say_what_is_drawn() -> None:
    """Make a running notebook show figures with their description, as text and inside of the picture."""
    if (shell := get_ipython()) is None:
        return
    formatters = shell.display_formatter.formatters
    formatters["text/plain"].for_type(Figure, lambda figure, printer, cycle: printer.text(description(figure)))
    formatters["image/png"].for_type(Figure, _described_picture)


def _described_picture(figure: Figure) -> str:
    return print_figure(figure, base64=True, metadata={"Description": description(figure)})
