"""One look for all figures: theory is a line, simulation dots with error bars, data a third colour.

Figures are drawn in dark ink on a transparent ground. On a dark page the book's style sheet inverts lightness and
keeps hues, so one picture serves both.
"""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Slider:
    """A slider of :class:`SliderFigure`: its name, what its positions are called, and where it stands at first."""

    name: str
    labels: Sequence[str]
    active: int = 0


class SliderFigure:
    """A Plotly figure with one or two sliders that needs no kernel: everything is computed beforehand.

    In a notebook it is stored in three forms: for JupyterLab, for the HTML page (whose script draws it, with range
    inputs that take the keyboard), and as text.

    Parameters
    ----------
    traces : sequence of (trace, positions)
        A Plotly trace as a mapping, and at which position of each slider it shows: an index, or None for any.
        Numbers are rounded to four digits, so that the stored figure is the same on every machine.
    sliders : sequence of Slider
        One or two.
    layout : mapping
        Plotly's layout: axes, margins.
    alt : str
        What a person who cannot see the figure needs to know.

    Raises
    ------
    ValueError
        If there are not one or two sliders, the description is empty, or a position does not exist.
    """

    def __init__(
        self,
        traces: Sequence[tuple[Mapping[str, Any], Sequence[int | None]]],
        *,
        sliders: Sequence[Slider],
        layout: Mapping[str, Any],
        alt: str,
    ) -> None:
        if len(sliders) not in (1, 2):
            raise ValueError(f"a figure must have one or two sliders, got {len(sliders)}")
        if not alt.strip():
            raise ValueError(f"a figure must be described in words, got {alt!r}")
        for _, positions in traces:
            if len(positions) != len(sliders):
                raise ValueError(f"a trace needs a position for each of {len(sliders)} sliders, got {positions}")
            for position, slider in zip(positions, sliders, strict=True):
                if position is not None and not 0 <= position < len(slider.labels):
                    raise ValueError(f"{slider.name} has {len(slider.labels)} positions, got {position}")
        self.alt = alt
        # Each slider has an attribute of its own, so that two combine without code: a trace shows if both say so.
        attributes = (("visible", True, False), ("opacity", 1, 0))[: len(sliders)]
        controls, data = [], [_rounded(trace) for trace, _ in traces]
        for k, (slider, (attribute, on, off)) in enumerate(zip(sliders, attributes, strict=True)):
            states = [
                [on if positions[k] in (None, step) else off for _, positions in traces]
                for step in range(len(slider.labels))
            ]
            steps = [
                {"method": "restyle", "label": label, "args": [{attribute: state}]}
                for label, state in zip(slider.labels, states, strict=True)
            ]
            prefix = {"prefix": f"{slider.name}: "}
            below = {"y": -0.25 - 0.42 * k, "pad": {"t": 10}}
            controls.append({"active": slider.active, "currentvalue": prefix, "steps": steps, **below})
            for trace, state in zip(data, states[slider.active], strict=True):
                trace[attribute] = state
        self.figure = {"data": data, "layout": _rounded(_PLOTLY_LAYOUT | layout) | {"sliders": controls}}

    def __repr__(self) -> str:
        return f"Figure with sliders: {self.alt}"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        stored = json.dumps(self.figure, sort_keys=True, ensure_ascii=False).replace("</", "<\\/")
        page = (
            f'<div class="slider-figure" role="group" aria-label="{html.escape(self.alt, quote=True)}">'
            f'<script type="application/json">{stored}</script></div>'
        )
        config = {"displayModeBar": False}  # its share button would send the chart to another host
        plotly = self.figure | {"config": config}
        return {"application/vnd.plotly.v1+json": plotly, "text/html": page, "text/plain": repr(self)}


_PLOTLY_LAYOUT = {
    "font": {"color": INK, "size": 14},
    "height": 420,
    "hovermode": "closest",
    "legend": {"orientation": "h", "y": 1.12},
    "margin": {"l": 70, "r": 20, "t": 20, "b": 60},
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
}


def _rounded(value: Any) -> Any:
    """Copy nested data for JSON with all numbers rounded to four digits."""
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_rounded(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.4g}")
    return value.item() if isinstance(value, np.integer) else value
