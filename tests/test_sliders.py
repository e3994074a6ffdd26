"""Figures with sliders: which traces show where, what the legend names, and how they are stored."""

import json
import re

import numpy as np
import pytest

from helpers.lab import figures, sliders
from helpers.lab.estimates import Estimate
from helpers.lab.sliders import Slider, SliderFigure

ESTIMATE = Estimate([2.0, 4.0, 8.0], [0.1, 0.2, 0.3], 100, 0.0)

# Traces and axes


def test_a_curve_is_a_line_without_markers():
    trace = sliders.curve([1, 2], [3.0, 4.0], name="theory")
    assert trace == {
        "x": [1, 2],
        "y": [3.0, 4.0],
        "name": "theory",
        "mode": "lines",
        "line": {"color": figures.THEORY, "dash": "solid"},
    }


def test_a_curve_may_have_another_color_and_dashes():
    trace = sliders.curve([1], [1], name="floor", color=figures.DATA, dash="dot")
    assert trace["line"] == {"color": figures.DATA, "dash": "dot"}


@pytest.mark.parametrize(
    ("y", "side"), [([3.0, 4.0], "top left"), ([3.0, 3.0], "top left"), ([4.0, 3.0], "bottom left")]
)
def test_a_curve_may_have_its_name_at_its_end(y, side):
    trace = sliders.curve([1, 2], y, name="floor", color=figures.DATA, name_at_end=True)
    assert (trace["mode"], trace["text"], trace["textposition"]) == ("lines+text", ["", "floor"], side)
    assert trace["textfont"] == {"color": figures.DATA}


def test_points_have_bars_of_two_standard_errors():
    trace = sliders.points([1, 2, 3], ESTIMATE, name="simulated")
    assert (trace["x"], list(trace["y"])) == ([1, 2, 3], [2, 4, 8])
    np.testing.assert_allclose(trace["error_y"]["array"], [0.2, 0.4, 0.6])
    assert trace["error_y"]["type"] == "data"
    assert (trace["mode"], trace["marker"], trace["name"]) == ("markers", {"color": figures.SIMULATION}, "simulated")


def test_points_take_a_sequence_of_estimates_and_another_color():
    parts = [Estimate(value, 0.1, 100, 0.0) for value in (2.0, 4.0)]
    trace = sliders.points([1, 2], parts, name="measured", color=figures.DATA)
    assert list(trace["y"]) == [2, 4]
    assert trace["marker"] == {"color": figures.DATA}


def test_points_need_an_estimate_each():
    with pytest.raises(ValueError, match=re.escape("an estimate for each of 2 points, got shape (3,)")):
        sliders.points([1, 2], ESTIMATE, name="simulated")


def test_a_note_is_text_at_a_place():
    assert sliders.note("m = 7", 3, 0.1) == {"x": [3], "y": [0.1], "text": ["m = 7"], "mode": "text"}


def test_a_logarithmic_axis_runs_between_its_ends():
    axis = sliders.log_axis("batch size m", 0.1, 1000)
    assert (axis["type"], axis["title"], axis["dtick"]) == ("log", {"text": "batch size m"}, 1)
    assert axis["range"] == pytest.approx([-1, 3])
    *_, opacity = re.findall(r"[\d.]+", axis["gridcolor"])
    assert 0 < float(opacity) < 1


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-1, 1), (2, 2), (3, 2), (1, float("nan"))])
def test_a_logarithmic_axis_refuses_ends_that_it_cannot_have(low, high):
    with pytest.raises(ValueError, match=f"^a logarithmic axis must have 0 < low < high, got {low} and {high}$"):
        sliders.log_axis("x", low, high)


# Sliders and buttons


@pytest.mark.parametrize(
    "labels", [["1", "16"], ["none", "10 %"], ["-1", "∞"], ["1e-3"], ["layer 2", "layer 3"], [".5"], ["(0, 1)"]]
)
def test_positions_with_numbers_are_those_of_a_slider(labels):
    assert not Slider("x", labels).is_choice


@pytest.mark.parametrize("labels", [["ReLU", "tanh"], ["L1", "L2"], ["ResNet-18", "VGG-16"], ["none", "half"]])
def test_positions_with_names_are_a_choice(labels):
    assert Slider("x", labels).is_choice


def test_a_choice_is_stored_as_such():
    figure = slider_figure(sliders=[Slider("law", ["normal", "uniform"]), Slider("se", ["1", "2", "3"])])
    choice, slider = figure.figure["layout"]["sliders"]
    assert choice["name"] == "buttons"
    assert "name" not in slider


AXES = [{"yaxis": sliders.log_axis("y", 1, 10)}, {"yaxis": sliders.log_axis("y", 1, 1000)}]


def test_a_position_may_have_axes_of_its_own():
    figure = slider_figure(sliders=[Slider("ρ", ["0", "0.5"], 1, axes=AXES), Slider("se", ["a", "b", "c"])])
    layout = figure.figure["layout"]
    assert layout["yaxis"]["range"] == [0, 3]
    ranges = [step["args"][1]["yaxis"]["range"] for step in layout["sliders"][0]["steps"]]
    assert ranges == [[0, 1], [0, 3]]
    assert all(step["args"][1] == {} for step in layout["sliders"][1]["steps"])


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (AXES[:1], "p has 2 positions, got axes for 1"),
        ([AXES[0], {"xaxis": {}}], "p must have the same axes at each position, got [['yaxis'], ['xaxis']]"),
    ],
)
def test_axes_are_refused_that_would_stay_behind(axes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Slider("p", ["a", "b"], axes=axes)


def test_two_sliders_do_not_move_one_axis():
    with pytest.raises(ValueError, match=re.escape("one slider alone may change an axis, got ['yaxis'] twice")):
        slider_figure(sliders=[Slider("ρ", ["0", "0.5"], axes=AXES), Slider("se", list("abc"), axes=[*AXES, AXES[0]])])


# Error bars on a logarithmic axis


def cut_bars(**changes):
    """Points whose second bar reaches 0 and third one less; the first is left whole."""
    estimates = Estimate([2.0, 4.0, 8.0], [0.5, 2.0, 5.0], 100, 0.0)
    dots = sliders.points([1, 2, 3], estimates, name="simulated", color=figures.DATA)
    given = {"traces": [(dots, (1,))], "sliders": [Slider("p", ["1", "2"])], "alt": "Dots."}
    return SliderFigure(**given | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"layout": {"yaxis": sliders.log_axis("y", 1, 10)}},
        {"layout": {}, "sliders": [Slider("p", ["1", "2"], axes=AXES)]},
    ],
)
def test_bars_that_reach_zero_end_at_a_logarithmic_axis_with_a_mark(changes):
    figure = cut_bars(**changes)
    layout = figure.figure["layout"]
    marks = figure.figure["data"][1]
    assert (marks["x"], marks["y"], marks["yaxis"]) == ([2, 3], [0, 0], "y2")
    assert marks["marker"] == {"color": figures.DATA, "symbol": "triangle-down", "size": 9}
    # The foot of the plot, whatever the range of the axis with the dots.
    assert (layout["yaxis2"]["overlaying"], layout["yaxis2"]["range"]) == ("y", [0, 1])
    assert [shown(figure, position) for position in (0, 1)] == [[2], [0, 1, 2]]  # 2 is the legend's entry


@pytest.mark.parametrize("yaxis", [{}, {"type": "linear"}])
def test_bars_on_a_linear_axis_have_no_mark(yaxis):
    figure = cut_bars(layout={"yaxis": yaxis})
    assert len(figure.figure["data"]) == 2
    assert "yaxis2" not in figure.figure["layout"]


# The figure


def slider_figure(**changes):
    traces = [
        ({"x": [1, 2], "y": np.array([1 / 3, 2e-7])}, (0, None)),
        ({"x": [1, 2], "y": [5.0, 6.0]}, (1, 0)),
        ({"x": [1, 2], "y": [7.0, 8.0]}, (1, 2)),
    ]
    given = {
        "traces": traces,
        "sliders": [Slider("ρ", ["0", "0.5"]), Slider("se", ["a", "b", "c"], active=2)],
        "layout": {"xaxis": {"title": "</script>"}},
        "alt": 'A line that "falls".',
    }
    return SliderFigure(**given | changes)


def shown(figure, *positions):
    """Indices of the traces that Plotly shows once its sliders have been moved to these positions."""
    data = [dict(trace) for trace in figure.figure["data"]]
    for slider, position in zip(figure.figure["layout"]["sliders"], positions, strict=True):
        change, _ = slider["steps"][position]["args"]
        for attribute, values in change.items():
            for trace, value in zip(data, values, strict=True):
                trace[attribute] = value
    return [k for k, trace in enumerate(data) if trace["visible"] and trace.get("opacity", 1)]


def test_a_trace_shows_where_both_sliders_say_so():
    figure = slider_figure()
    assert {(i, j): shown(figure, i, j) for i in (0, 1) for j in (0, 1, 2)} == {
        (0, 0): [0],
        (0, 1): [0],
        (0, 2): [0],
        (1, 0): [1],
        (1, 1): [],
        (1, 2): [2],
    }


def test_a_slider_figure_starts_where_its_sliders_stand():
    figure = slider_figure()
    standing = [slider["active"] for slider in figure.figure["layout"]["sliders"]]
    assert standing == [0, 2]
    started = [k for k, trace in enumerate(figure.figure["data"]) if trace["visible"] and trace.get("opacity", 1)]
    assert started == shown(figure, *standing)


def test_one_slider_is_enough():
    figure = slider_figure(traces=[({"y": [1]}, (0,)), ({"y": [2]}, (1,))], sliders=[Slider("p", ["a", "b"])])
    assert [trace["visible"] for trace in figure.figure["data"]] == [True, False]


def test_a_slider_figure_is_stored_in_three_forms():
    bundle = slider_figure()._repr_mimebundle_()
    assert bundle["text/plain"] == 'Figure with sliders: A line that "falls".'
    assert 'aria-label="A line that &quot;falls&quot;."' in bundle["text/html"]
    stored = re.fullmatch(r"<div [^>]*><script [^>]*>(.*)</script></div>", bundle["text/html"])[1]
    assert "</" not in stored
    plotly = bundle["application/vnd.plotly.v1+json"]
    assert plotly.pop("config") == {"displayModeBar": False}
    on_page = json.loads(stored)
    first, second = (slider["pad"]["t"] for slider in plotly["layout"]["sliders"])
    # Plotly needs some 80 pixels for each of its sliders.
    assert second - first >= 80
    assert plotly["layout"].pop("height") - on_page["layout"].pop("height") >= 2 * 80
    assert on_page == plotly
    assert plotly["data"][0]["y"] == [0.3333, 2e-7]
    assert slider_figure()._repr_mimebundle_()["text/html"] == bundle["text/html"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliders": []}, "one or two sliders, got 0"),
        ({"sliders": [Slider("a", ["b"])] * 3}, "one or two sliders, got 3"),
        ({"alt": " "}, "described in words, got ' '"),
        ({"traces": [({"y": [1]}, (0,))]}, "a position for each of 2 sliders"),
        ({"traces": [({"y": [1]}, (2, 0))]}, "ρ has 2 positions, got 2"),
        ({"traces": [({"y": [1]}, (0, -1))]}, "se has 3 positions, got -1"),
    ],
)
def test_a_slider_figure_refuses(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        slider_figure(**changes)


# The legend


def named_figure():
    """One slider; "theory" shows at either position, "wanted" and a note at one only, and one trace has no name."""
    traces = [
        (sliders.curve([1], [2.0], name="theory"), (0,)),
        (sliders.points([1, 2, 3], ESTIMATE, name="simulated"), (0,)),
        (sliders.curve([1], [3.0], name="theory", color=figures.FOURTH), (1,)),
        (sliders.note("here", 1, 1), (1,)),
        (sliders.curve([1], [4.0], name="wanted", dash="dash") | {"showlegend": True}, (1,)),
    ]
    layout = {"xaxis": sliders.log_axis("x", 1, 10)}
    return SliderFigure(traces, sliders=[Slider("p", ["a", "b"])], layout=layout, alt="Two curves.")


def test_the_legend_has_one_entry_a_name_with_the_looks_of_the_first():
    figure = named_figure()
    entries = [trace for trace in figure.figure["data"] if trace.get("showlegend", True)]
    assert [(entry["name"], entry["mode"]) for entry in entries] == [
        ("theory", "lines"),
        ("simulated", "markers"),
        ("wanted", "lines"),
    ]
    assert entries[0]["line"] == {"color": figures.THEORY, "dash": "solid"}
    assert entries[1]["marker"] == {"color": figures.SIMULATION}
    assert entries[2]["line"]["dash"] == "dash"


def test_a_name_at_its_curve_is_not_in_the_legend():
    curves = [(sliders.curve([1, 2], [1.0, 2.0], name=name, name_at_end=name == "a"), (None,)) for name in "ab"]
    figure = SliderFigure(curves, sliders=[Slider("p", ["1", "2"])], layout={}, alt="Lines.")
    assert [trace["name"] for trace in figure.figure["data"] if trace.get("showlegend", True)] == ["b"]


def test_entries_of_the_legend_hold_no_data_and_show_wherever_the_sliders_stand():
    figure = named_figure()
    entries = [k for k, trace in enumerate(figure.figure["data"]) if trace.get("showlegend", True)]
    assert all(figure.figure["data"][k][axis] == [None] for k in entries for axis in "xy")
    (slider,) = figure.figure["layout"]["sliders"]
    for step in slider["steps"]:
        assert all(step["args"][0]["visible"][k] for k in entries)


def test_the_legend_stands_on_the_plot_and_grows_upwards():
    legend = named_figure().figure["layout"]["legend"]
    assert legend["yanchor"] == "bottom"
    assert legend["y"] > 1


def test_a_click_on_the_legend_hides_nothing():
    legend = named_figure().figure["layout"]["legend"]
    assert not legend["itemclick"]
    assert not legend["itemdoubleclick"]


def test_a_figure_leaves_the_given_traces_alone():
    trace = sliders.curve([1], [2.0], name="theory")
    SliderFigure([(trace, (0,))], sliders=[Slider("p", ["a", "b"])], layout={}, alt="A line.")
    assert trace == sliders.curve([1], [2.0], name="theory")
