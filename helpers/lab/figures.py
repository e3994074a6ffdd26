"""One look for all figures: theory is a line, simulation dots with error bars, data a third color.

Figures are drawn in dark ink on a transparent ground. On a dark page the book's style sheet inverts lightness and
keeps hues, so one picture serves both.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
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
    return plt.subplots(rows, columns, **kwargs)


def log_log(ax: Axes, *, ticks: Sequence[int], xlabel: str, ylabel: str) -> None:
    """Make both axes logarithmic and write their ticks as plain numbers; `ticks` are those of the x axis."""
    ax.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())


def theory(ax: Axes, x: np.ndarray, y: np.ndarray, *, label: str | None = None, color: str = THEORY) -> None:
    """Draw what a formula says: a line."""
    ax.plot(x, y, color=color, label=label, zorder=1)


def simulation(
    ax: Axes,
    x: np.ndarray,
    estimates: Estimate | Sequence[Estimate],
    *,
    label: str | None = None,
    color: str = SIMULATION,
    marker: str = "o",
) -> None:
    """Draw estimates as dots with bars of two standard errors; pass ``color=DATA`` for a real network."""
    if not isinstance(estimates, Estimate):
        estimates = stack(estimates)
    ax.errorbar(
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
