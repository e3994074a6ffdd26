"""Figures with sliders, for plain HTML pages: the figure, and the traces and axes that it is made of."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from helpers.lab.estimates import Estimate, stack
from helpers.lab.figures import INK, SIMULATION, THEORY

GRID = "rgba(138, 144, 153, 0.3)"  # translucent, so that it shows on light pages and dark ones
# Of what stands below a plot in JupyterLab, in pixels: the axis, and each of Plotly's own sliders with its labels.
AXIS_HEIGHT, SLIDER_HEIGHT = 70, 85
# A number that stands for itself: in "1e-3" and "layer 2", but not in "L2" or "ResNet-18".
NUMBER = re.compile(r"(?<![\w-])-?\d")

Trace = dict[str, Any]


def curve(
    x: np.ndarray,
    y: np.ndarray,
    *,
    name: str,
    color: str = THEORY,
    dash: str = "solid",
    name_at_end: bool = False,
) -> Trace:
    """Return a trace that is a line, for what a formula says.

    Parameters
    ----------
    x, y : array
        Its points.
    name : str
        What the legend calls it.
    color : str
        One of the colors of :mod:`helpers.lab.figures`.
    dash : str
        Plotly's name of a line style: ``"solid"``, ``"dash"``, ``"dot"``.
    name_at_end : bool
        Whether the name stands at the last point, which the axes must show, and not in the legend.

    Returns
    -------
    dict
    """
    line = {"x": x, "y": y, "mode": "lines", "line": {"color": color, "dash": dash}, "name": name}
    if not name_at_end:
        return line
    # Inside of the plot, and on the side where the line does not come from.
    side = "top left" if y[-1] >= y[-2] else "bottom left"
    text = {"text": [""] * (len(x) - 1) + [name], "textposition": side, "textfont": {"color": color}}
    return line | text | {"mode": "lines+text"}


def points(x: np.ndarray, estimates: Estimate | Sequence[Estimate], *, name: str, color: str = SIMULATION) -> Trace:
    """Return a trace of dots with bars of two standard errors, for what was simulated or measured.

    Where a bar reaches zero or less, and the axis is logarithmic, :class:`SliderFigure` lets it end at the axis, with
    a triangle.

    Parameters
    ----------
    x : array
        Where they lie.
    estimates : Estimate or sequence of Estimate
        As many as `x`.
    name : str
        What the legend calls them.
    color : str
        One of the colors of :mod:`helpers.lab.figures`.

    Returns
    -------
    dict

    Raises
    ------
    ValueError
        If there is not an estimate for each `x`.
    """
    if not isinstance(estimates, Estimate):
        estimates = stack(estimates)
    if estimates.value.shape != (len(x),):
        raise ValueError(f"there must be an estimate for each of {len(x)} points, got shape {estimates.value.shape}")
    bars = {"type": "data", "array": 2 * estimates.stderr}
    dots = {"x": x, "y": estimates.value, "error_y": bars}
    return dots | {"mode": "markers", "marker": {"color": color}, "name": name}


def note(text: str, x: float, y: float) -> Trace:
    """Return a trace that is one line of text, centered at (x, y); the legend leaves it out."""
    return {"x": [x], "y": [y], "text": [text], "mode": "text"}


def log_axis(title: str, low: float, high: float) -> dict[str, Any]:
    """Return a logarithmic axis with ticks at the powers of ten.

    Parameters
    ----------
    title : str
        What it shows, with the unit.
    low, high : float
        Its ends.

    Returns
    -------
    dict
        For ``layout["xaxis"]`` or ``layout["yaxis"]``.

    Raises
    ------
    ValueError
        If not ``0 < low < high``.
    """
    if not 0 < low < high:
        raise ValueError(f"a logarithmic axis must have 0 < low < high, got {low} and {high}")
    ends = {"type": "log", "range": [np.log10(low), np.log10(high)], "dtick": 1}
    return ends | {"title": {"text": title}, "gridcolor": GRID}


@dataclass(frozen=True)
class Slider:
    """A slider of :class:`SliderFigure`, or a row of buttons if its positions have names and not numbers.

    Parameters
    ----------
    name : str
        What it changes, with the unit.
    labels : sequence of str
        What its positions are called.
    active : int
        Where it stands at first.
    axes : sequence of mapping, optional
        For each position, the axes that the figure has there, where one range would hide the data:
        ``{"yaxis": log_axis("variance", 1e-3, 1)}``.

    Raises
    ------
    ValueError
        If the axes are not as many as the labels, or not the same ones at each position.

    Examples
    --------
    >>> Slider("batch size m", ["1", "16", "256"]).is_choice
    False
    >>> Slider("activation", ["ReLU", "tanh"]).is_choice
    True
    """

    name: str
    labels: Sequence[str]
    active: int = 0
    axes: Sequence[Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        if self.axes is None:
            return
        if len(self.axes) != len(self.labels):
            raise ValueError(f"{self.name} has {len(self.labels)} positions, got axes for {len(self.axes)}")
        if len({frozenset(axes) for axes in self.axes}) > 1:
            raise ValueError(f"{self.name} must have the same axes at each position, got {list(map(list, self.axes))}")

    @property
    def is_choice(self) -> bool:
        """Whether its positions are names, since no label has a number that stands for itself."""
        return not any(map(NUMBER.search, self.labels))


class SliderFigure:
    """A Plotly figure with one or two sliders that needs no kernel: everything is computed beforehand.

    In a notebook it is stored in three forms: for JupyterLab, for the HTML page (whose script draws it, with range
    inputs and buttons that take the keyboard), and as text. The legend has one entry for each name of a trace that does
    not stand at its curve. An entry looks like the first trace of that name, and stays the same wherever the sliders
    stand.

    Parameters
    ----------
    traces : sequence of (trace, positions)
        A Plotly trace as a mapping, such as :func:`curve`, :func:`points` or :func:`note` return, and at which
        position of each slider it shows: an index, or None for any.
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
        If there are not one or two sliders, both change one axis, the description is empty, or a position does not
        exist.
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
        moved = [axis for slider in sliders if slider.axes for axis in slider.axes[0]]
        if twice := sorted({axis for axis in moved if moved.count(axis) > 1}):
            raise ValueError(f"one slider alone may change an axis, got {twice} twice")
        self.alt = alt
        self.figure = {"data": [], "layout": _PLOTLY_LAYOUT | layout | {"sliders": []}}
        logarithmic = any(
            axes.get("yaxis", {}).get("type") == "log"
            for axes in [layout, *(axes for slider in sliders for axes in slider.axes or [])]
        )
        marks = [(_marks_at_axis(trace), positions) for trace, positions in traces if logarithmic]
        marks = [(trace, positions) for trace, positions in marks if trace["x"]]
        if marks:
            self.figure["layout"]["yaxis2"] = _HEIGHT_OF_PLOT
        entries = [(entry, [None] * len(sliders)) for entry in _legend([trace for trace, _ in traces])]
        drawn = [(dict(trace) | {"showlegend": False}, positions) for trace, positions in [*traces, *marks]] + entries
        self.figure["data"] = [trace for trace, _ in drawn]
        self._control(sliders, [positions for _, positions in drawn])
        self.figure = _rounded(self.figure)

    def _control(self, sliders: Sequence[Slider], positions: Sequence[Sequence[int | None]]) -> None:
        """Add the sliders to the figure, and let it show what they show where they stand at first."""
        # Each slider has an attribute of its own, so that two combine without code: a trace shows if both say so.
        attributes = (("visible", True, False), ("opacity", 1, 0))
        for k, (slider, (attribute, on, off)) in enumerate(zip(sliders, attributes, strict=False)):
            states = [
                [on if position[k] in (None, step) else off for position in positions]
                for step in range(len(slider.labels))
            ]
            axes = slider.axes or [{}] * len(slider.labels)
            steps = [
                {"method": "update", "label": label, "args": [{attribute: state}, dict(changed)]}
                for label, state, changed in zip(slider.labels, states, axes, strict=True)
            ]
            control = {"active": slider.active, "currentvalue": {"prefix": f"{slider.name}: "}, "steps": steps}
            control |= {"y": 0, "pad": {"t": AXIS_HEIGHT + SLIDER_HEIGHT * k}}
            control |= {"name": "buttons"} if slider.is_choice else {}
            self.figure["layout"]["sliders"].append(control)
            self.figure["layout"] |= axes[slider.active]
            for trace, state in zip(self.figure["data"], states[slider.active], strict=True):
                trace[attribute] = state

    def __repr__(self) -> str:
        return f"Figure with sliders: {self.alt}"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        stored = json.dumps(self.figure, sort_keys=True, ensure_ascii=False).replace("</", "<\\/")
        page = (
            f'<div class="slider-figure" role="group" aria-label="{html.escape(self.alt, quote=True)}">'
            f'<script type="application/json">{stored}</script></div>'
        )
        # JupyterLab draws Plotly's own sliders below the plot; the page has other ones, above it.
        layout = self.figure["layout"]
        roomy = layout | {"height": layout["height"] + SLIDER_HEIGHT * len(layout["sliders"])}
        config = {"displayModeBar": False}  # its share button would send the chart to another host
        plotly = self.figure | {"layout": roomy, "config": config}
        return {"application/vnd.plotly.v1+json": plotly, "text/html": page, "text/plain": repr(self)}


_PLOTLY_LAYOUT = {
    "font": {"color": INK, "size": 14},
    "height": 420,
    "hovermode": "closest",
    # On a phone the legend has several rows: it grows upwards, and the plot makes room.
    "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "itemclick": False, "itemdoubleclick": False},
    "margin": {"l": 70, "r": 20, "t": 20, "b": 60},
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
}


# An axis whose 0 is the foot of the plot, wherever the other axis begins.
_HEIGHT_OF_PLOT = {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True}


def _marks_at_axis(trace: Mapping[str, Any]) -> Trace:
    """Return a trace of triangles at the foot of the plot, where an error bar reaches zero or less."""
    bars = trace.get("error_y", {}).get("array", [])
    x = [x for x, y, bar in zip(trace["x"], trace["y"], bars, strict=False) if y <= bar] if len(bars) else []
    marker = trace.get("marker", {}) | {"symbol": "triangle-down", "size": 9}
    feet = {"x": x, "y": [0] * len(x), "yaxis": "y2", "cliponaxis": False}
    return feet | {"mode": "markers", "marker": marker, "hoverinfo": "skip"}


def _legend(traces: Sequence[Mapping[str, Any]]) -> list[Trace]:
    """Return a trace without points for each name, since the entries of hidden traces would pile up or vanish."""
    firsts: dict[str, Mapping[str, Any]] = {}
    for trace in traces:
        if "name" in trace and "text" not in trace:
            firsts.setdefault(trace["name"], trace)
    looks = ("name", "mode", "line", "marker")
    return [
        {key: trace[key] for key in looks if key in trace} | {"x": [None], "y": [None]} for trace in firsts.values()
    ]


def _rounded(value: Any) -> Any:
    """Copy nested data for JSON with all numbers rounded to four digits."""
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_rounded(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.4g}")
    return value.item() if isinstance(value, np.integer) else value
