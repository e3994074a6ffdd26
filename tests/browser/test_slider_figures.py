"""What a page can do with a slider figure, in the browser: buttons, axes by choice, names at curves, cut error bars."""

import pytest

from helpers.lab import sliders
from helpers.lab.estimates import Estimate
from helpers.lab.sliders import Slider, SliderFigure
from tests.browser.site import PHONE

PAGE = """<!doctype html><html lang="en" data-theme="light"><head><title>A figure</title>
<link rel="stylesheet" href="_static/book.css"></head>
<body class="bd-article">{figure}<script src="_static/figures/sliders.js"></script></body></html>"""


def figure():
    """A choice between laws, each with an axis of its own, and a slider."""
    cut = Estimate([5.0, 2.0], [1.0, 2.0], 100, 0.0)
    traces = [
        (sliders.curve([1, 10], [5.0, 2.0], name="falling", name_at_end=True), (0, None)),
        (sliders.points([1, 10], cut, name="simulated"), (0, None)),
        (sliders.curve([1, 10], [1e5, 1e6], name="rising", name_at_end=True), (1, None)),
    ]
    laws = [{"yaxis": sliders.log_axis("variance", 1, high)} for high in (10, 1e7)]
    return SliderFigure(
        traces,
        sliders=[Slider("law", ["normal", "Cauchy"], axes=laws), Slider("batch size", ["1", "2"])],
        layout={"xaxis": sliders.log_axis("m", 0.8, 20)},
        alt="Curves.",
    )


@pytest.fixture(scope="module")
def page(browser, site):
    page = browser.new_page(viewport=PHONE)
    page.set_default_timeout(5_000)
    content = PAGE.format(figure=figure()._repr_mimebundle_()["text/html"])
    page.route("**/made.html", lambda route: route.fulfill(body=content, content_type="text/html; charset=utf-8"))
    page.goto(f"{site}/made.html")
    page.wait_for_selector(".slider-plot .main-svg")
    return page


def shown(page):
    """Names of the curves that can be seen, and the decades of the vertical axis."""
    return page.evaluate("""() => {
      const plot = document.querySelector(".slider-plot");
      const names = plot.data.filter(t => t.visible && t.opacity && t.x[0] !== null && t.name).map(t => t.name);
      return [names, plot.layout.yaxis.range];
    }""")


def test_a_choice_is_a_row_of_buttons_and_a_quantity_a_slider(page):
    assert page.get_by_role("group", name="law").get_by_role("radio").count() == 2
    assert page.get_by_role("slider", name="batch size").count() == 1
    for button in page.locator(".slider-controls fieldset label").all():
        assert button.bounding_box()["height"] >= 24  # what a finger hits: WCAG 2.2, 2.5.8


def test_the_keyboard_chooses_and_each_choice_has_its_axis(page):
    assert shown(page) == [["falling", "simulated"], [0, 1]]
    page.get_by_role("radio", name="normal").focus()
    for key, wanted in [("ArrowRight", [["rising"], [0, 7]]), ("ArrowLeft", [["falling", "simulated"], [0, 1]])]:
        page.keyboard.press(key)
        page.wait_for_timeout(100)
        assert shown(page) == wanted


def test_a_finger_chooses(page):
    page.get_by_role("radio", name="Cauchy").click()
    assert shown(page)[0] == ["rising"]
    page.get_by_role("radio", name="normal").click()
    assert shown(page)[0] == ["falling", "simulated"]


def test_names_at_curves_are_not_cut_off(page):
    for choice, name in (("Cauchy", "rising"), ("normal", "falling")):
        page.get_by_role("radio", name=choice).click()
        text = page.locator(".textpoint text", has_text=name).bounding_box()
        plot = page.locator(".slider-plot .main-svg").first.bounding_box()
        assert plot["x"] <= text["x"]
        assert text["x"] + text["width"] <= plot["x"] + plot["width"]


def test_a_bar_that_reaches_zero_ends_at_the_axis_with_a_mark(page):
    foot = page.locator(".slider-plot .xy2 .scatterlayer .point").bounding_box()
    size = page.evaluate("document.querySelector('.slider-plot')._fullLayout._size")
    top = page.locator(".slider-plot .main-svg").first.bounding_box()["y"]
    assert foot["y"] + foot["height"] / 2 == pytest.approx(top + size["t"] + size["h"], abs=3)
