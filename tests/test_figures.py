"""The look of all figures, on light pages and dark ones."""

import base64
import io

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import nbclient
import nbformat
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from PIL import Image

from helpers.lab import figures
from helpers.lab.estimates import Estimate

PALETTE = {name: getattr(figures, name) for name in ("THEORY", "SIMULATION", "DATA", "FOURTH")}
DARK_PAGE = "#121212"


@pytest.fixture(autouse=True)
def own_style():
    with mpl.rc_context():
        yield
    plt.close("all")


# Contrast, after https://www.w3.org/TR/WCAG21/#dfn-contrast-ratio


def luminance(color):
    """Return the relative luminance of an sRGB color."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return np.dot([0.2126, 0.7152, 0.0722], linear)


def contrast(one, other):
    darker, lighter = sorted([luminance(one), luminance(other)])
    return (lighter + 0.05) / (darker + 0.05)


# Columns of https://www.w3.org/TR/filter-effects-1/#feColorMatrixElement for 180°: cos = -1, sin = 0.
LUMA = np.array([0.213, 0.715, 0.072])
HUE_ROTATED_BY_HALF_A_TURN = np.tile(LUMA, (3, 1)) - (np.eye(3) - np.tile(LUMA, (3, 1)))


def on_dark_page(color):
    """Apply the style sheet's ``invert(1) hue-rotate(180deg)``."""
    return tuple(np.clip(HUE_ROTATED_BY_HALF_A_TURN @ (1 - np.array(to_rgb(color))), 0, 1))


def test_contrast_of_black_on_white_is_twenty_one():
    assert contrast("black", "white") == pytest.approx(21)


def test_the_filter_swaps_black_and_white():
    np.testing.assert_allclose(on_dark_page("black"), 1, atol=1e-12)
    np.testing.assert_allclose(on_dark_page("white"), 0, atol=1e-12)


@pytest.mark.parametrize("name", PALETTE)
def test_colors_stand_out_on_white(name):
    assert contrast(PALETTE[name], "white") >= 3


@pytest.mark.parametrize("name", PALETTE)
def test_colors_stand_out_on_a_dark_page(name):
    assert contrast(on_dark_page(PALETTE[name]), DARK_PAGE) >= 3


def test_ink_is_easy_to_read_on_either_page():
    assert contrast(figures.INK, "white") >= 7
    assert contrast(on_dark_page(figures.INK), DARK_PAGE) >= 7


def test_faint_lines_stand_out_on_either_page():
    assert contrast(figures.FAINT, "white") >= 3
    assert contrast(on_dark_page(figures.FAINT), DARK_PAGE) >= 3


def test_colors_differ():
    assert len(set(PALETTE.values())) == 4


# Figures


def test_axes_are_subplots():
    fig, ax = figures.axes()
    assert isinstance(fig, Figure)
    assert isinstance(ax, Axes)
    assert figures.axes(2, 3)[1].shape == (2, 3)


def test_axes_pass_on_options():
    _, (left, right) = figures.axes(1, 2, sharey=True)
    left.set_ylim(0, 7)
    assert right.get_ylim() == (0, 7)


def test_figures_have_the_books_style():
    fig, ax = figures.axes()
    assert fig.get_size_inches().tolist() == [7.0, 3.8]
    assert fig.get_dpi() == 144
    assert not ax.spines["right"].get_visible()
    assert not ax.spines["top"].get_visible()
    assert to_hex(ax.xaxis.label.get_color()) == figures.INK
    assert [ax.plot([0])[0].get_color() for _ in range(4)] == list(PALETTE.values())


def test_figures_have_a_transparent_ground():
    fig, ax = figures.axes()
    ax.axis("off")
    picture = io.BytesIO()
    fig.savefig(picture, format="png")
    picture.seek(0)
    assert (plt.imread(picture)[..., 3] == 0).all()


def test_theory_is_a_line():
    _, ax = figures.axes()
    figures.theory(ax, np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 8.0]), label="formula")
    (line,) = ax.lines
    np.testing.assert_array_equal(line.get_xydata(), [[1, 2], [2, 4], [3, 8]])
    assert (line.get_color(), line.get_linestyle(), line.get_marker()) == (figures.THEORY, "-", "None")
    assert line.get_label() == "formula"


def test_theory_may_have_another_color():
    _, ax = figures.axes()
    figures.theory(ax, np.zeros(2), np.zeros(2), color=figures.FOURTH)
    assert ax.lines[0].get_color() == figures.FOURTH


def error_bars(ax):
    (container,) = ax.containers
    assert isinstance(container, ErrorbarContainer)
    return container


ESTIMATE = Estimate([2.0, 4.0, 8.0], [0.1, 0.2, 0.3], 100, 0.0)


def test_simulation_is_dots_with_bars_of_two_standard_errors():
    _, ax = figures.axes()
    figures.simulation(ax, np.array([1.0, 2.0, 3.0]), ESTIMATE, label="simulation")
    container = error_bars(ax)
    dots, caps, (bars,) = container
    np.testing.assert_array_equal(dots.get_xydata(), [[1, 2], [2, 4], [3, 8]])
    assert (dots.get_color(), dots.get_linestyle(), dots.get_marker()) == (figures.SIMULATION, "None", "o")
    expected = [[[1, 1.8], [1, 2.2]], [[2, 3.6], [2, 4.4]], [[3, 7.4], [3, 8.6]]]
    np.testing.assert_allclose(bars.get_segments(), expected)
    assert len(caps) == 2
    assert container.get_label() == "simulation"


def test_simulation_takes_a_sequence_of_estimates():
    _, ax = figures.axes()
    parts = [Estimate(value, 0.1, 100, 0.0) for value in (2.0, 4.0, 8.0)]
    figures.simulation(ax, np.array([1.0, 2.0, 3.0]), parts)
    np.testing.assert_array_equal(error_bars(ax)[0].get_ydata(), [2, 4, 8])


def test_simulation_may_have_another_color_and_marker():
    _, ax = figures.axes()
    figures.simulation(ax, np.array([1.0, 2.0, 3.0]), ESTIMATE, color=figures.DATA, marker="s")
    dots = error_bars(ax)[0]
    assert (dots.get_color(), dots.get_marker()) == (figures.DATA, "s")


def test_a_curve_may_have_its_label_at_its_end():
    fig, ax = figures.axes()
    figures.theory(ax, np.array([1.0, 2.0]), np.array([2.0, 4.0]), label="floor", color=figures.DATA, label_at_end=True)
    fig.canvas.draw()
    (text,) = ax.texts
    assert (text.get_text(), text.xy, text.get_color()) == ("floor", (2, 4), figures.DATA)
    assert ax.get_legend_handles_labels() == ([], [])
    beside = text.get_window_extent()
    assert ax.transData.transform((2, 4))[0] < beside.x0
    assert beside.x1 <= fig.bbox.x1  # the layout makes room for it


CUT = Estimate([2.0, 4.0, 8.0], [0.5, 2.0, 5.0], 100, 0.0)  # the second bar reaches 0, the third one less


@pytest.mark.parametrize("before", [True, False])
def test_bars_that_reach_zero_end_at_a_logarithmic_axis_with_a_mark(before):
    fig, ax = figures.axes()
    if before:
        ax.set_yscale("log")
    figures.simulation(ax, np.array([1.0, 2.0, 3.0]), CUT, color=figures.DATA)
    if not before:
        figures.log_log(ax, ticks=[1, 2, 3], xlabel="x", ylabel="y")
    fig.canvas.draw()
    (marks,) = [line for line in ax.lines if line.get_marker() == "v"]
    feet = marks.get_transform().transform(marks.get_xydata())
    np.testing.assert_allclose(feet[:, 0], [ax.transData.transform((x, 1))[0] for x in (2, 3)])
    np.testing.assert_allclose(feet[:, 1], ax.bbox.y0)
    assert marks.get_color() == figures.DATA


def test_bars_on_a_linear_axis_have_no_mark():
    _, ax = figures.axes()
    figures.simulation(ax, np.array([1.0, 2.0, 3.0]), CUT)
    assert not [line for line in ax.lines if line.get_marker() == "v"]


def test_dots_lie_over_lines():
    _, ax = figures.axes()
    figures.simulation(ax, np.array([1.0, 2.0, 3.0]), ESTIMATE)
    figures.theory(ax, np.zeros(2), np.zeros(2))
    assert error_bars(ax)[0].get_zorder() > ax.lines[-1].get_zorder()


def test_logarithmic_axes_have_plain_numbers_at_their_ticks():
    fig, ax = figures.axes()
    ax.plot([1, 4, 64], [0.5, 0.02, 0.001])
    figures.log_log(ax, ticks=[1, 4, 16, 64], xlabel="batch size", ylabel="variance")
    fig.canvas.draw()
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("batch size", "variance")
    assert ax.get_xticks().tolist() == [1, 4, 16, 64]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "4", "16", "64"]
    assert {"0.001", "0.005", "0.02", "0.1"} <= {label.get_text() for label in ax.get_yticklabels()}
    assert len(ax.get_xticks(minor=True)) == len(ax.get_yticks(minor=True)) == 0


def test_log_log_axes_tick_where_asked_and_say_what_they_show():
    _, ax = figures.axes()
    ax.plot([4, 64], [1, 0.1])
    figures.log_log(ax, ticks=[4, 16, 64], xlabel="batch size", ylabel="variance")
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert list(ax.get_xticks()) == [4, 16, 64]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["4", "16", "64"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("batch size", "variance")


# What a figure says of itself


def described(draw):
    _, ax = figures.axes()
    draw(ax)
    ax.set(xlabel="size", ylabel="variance")
    head, of_axes = figures.description(ax.figure).split("\n")
    assert head == "<Figure size 1008x547.2 with 1 Axes>"
    return of_axes.removeprefix("size | variance: ")


@pytest.mark.parametrize(
    ("draw", "text"),
    [
        (lambda ax: ax.plot([1, 3], [2, 5]), "line (2 ± 1, 3.5 ± 1.5)"),
        (lambda ax: ax.plot([1, 3, 9], [2, 5, np.nan]), "line (4.33 ± 3.4, 3.5 ± 1.5)"),
        (lambda ax: ax.plot([], []), "line (nothing, nothing)"),
        (lambda ax: ax.plot([0.1, 0.2, -0.3], [1, 1, 1]), "line (0 ± 0.216, 1 ± 0)"),  # 2.8e-17 ± 0.216
        (lambda ax: ax.scatter([1, 3], [2, 5]), "points (2 ± 1, 3.5 ± 1.5)"),
        (lambda ax: ax.vlines([1, 3], 0, 4), "strokes (2 ± 1, 2 ± 2)"),
        (lambda ax: ax.imshow([[1.0, 2.0], [3.0, np.nan]]), "image (2 ± 0.816)"),
        (lambda ax: ax.axvline(7), "line (7 ± 0, 0.5 ± 0.5)"),
        # A bar's outline begins and ends in one corner.
        (lambda ax: ax.bar([1], [5], width=1), "area (0.9 ± 0.49, 2 ± 2.45)"),
    ],
)
def test_a_figure_says_what_it_draws(draw, text):
    assert described(draw) == text


def test_error_bars_are_part_of_what_is_drawn():
    def drawn(stderr):
        return described(lambda ax: figures.simulation(ax, [1.0, 2.0], Estimate([1.0, 2.0], stderr, 9, 0.0)))

    assert drawn([0.1, 0.2]) != drawn([0.1, 0.3])


def test_a_change_beyond_three_digits_is_not_seen_and_one_within_them_is():
    def drawn(y):
        return described(lambda ax: ax.plot([1, 2, 3], [1.0, 2.0, y]))

    assert drawn(3.1) == drawn(3.1000001)
    assert drawn(3.1) != drawn(3.13)


def test_a_picture_in_a_notebook_carries_what_its_figure_draws():
    code = "from helpers.lab import figures\nimport matplotlib.pyplot as plt\nfig, ax = figures.axes()\n"
    cells = [nbformat.v4.new_code_cell(code + f"ax.plot([1, 2], [3, {y}])\nplt.show()") for y in (4, 5)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook).execute()
    for cell, drawn in zip(notebook.cells, ("3.5 ± 0.5", "4 ± 1"), strict=True):
        (output,) = cell.outputs
        assert output.data["text/plain"] == f"<Figure size 1008x547.2 with 1 Axes>\n | : line (1.5 ± 0.5, {drawn})"
        picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
        assert picture.text["Description"] == output.data["text/plain"]
