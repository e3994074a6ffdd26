"""Every page, in the browser: complete without a network, readable on a phone, in the dark, and by a screen reader."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from axe_playwright_python.sync_playwright import Axe

from helpers.lab import registry
from tests.book_promises import UNREVISED
from tests.browser.site import HTML, PHONE, WIDE

ROOT = Path(__file__).parents[2]
TOC = (ROOT / "_toc.yml").read_text(encoding="utf-8")
PAGES = [f"{name}.html" for name in re.findall(r"(?:file|root): (\S+)", TOC)]
CHAPTERS = [f"{place.page}.html" for place in registry.places(ROOT / "_toc.yml")]
REVISED = [page for page in CHAPTERS if Path(page).stem not in UNREVISED]
CHAPTER = CHAPTERS[0]
LEDGER = "book/ledger.html"
# A chapter, a page of the reference, and front matter with tables and formulas.
ONE_OF_EACH_KIND = [CHAPTER, next(page for page in PAGES if page.startswith("book/api/")), "book/notation.html", LEDGER]
of_chapters = pytest.mark.parametrize("page", CHAPTERS, indirect=True)
of_one_of_each_kind = pytest.mark.parametrize("page", ONE_OF_EACH_KIND, indirect=True)
of_the_chapter = pytest.mark.parametrize("page", [CHAPTER], indirect=True)
of_the_ledger = pytest.mark.parametrize("page", [LEDGER], indirect=True)


def sideways(page):
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def luminance(page, selector):
    """Relative brightness, 0 to 1, of an element's background."""
    color = page.evaluate("s => getComputedStyle(document.querySelector(s)).backgroundColor", selector)
    return sum(map(int, re.findall(r"\d+", color)[:3])) / (3 * 255)


def test_the_table_of_contents_names_all_pages():
    toc = yaml.safe_load(TOC)
    assert f"{toc['root']}.html" in PAGES
    assert {CHAPTER, LEDGER} < set(PAGES)


# Each page is opened once, on one worker, and a test leaves it as it found it. What holds for all pages alike, because
# one template makes them, is looked at on one page of each kind; what a page says or draws itself, on every page.


@pytest.fixture(scope="module", params=PAGES)
def page(open_page, request):
    page = open_page(request.param)
    yield page
    page.close()


def dress(page, viewport, scheme):
    if page.viewport_size != viewport:
        page.set_viewport_size(viewport)
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.wait_for_function(f"document.documentElement.dataset.theme === '{scheme}'")


def test_nothing_fails_and_no_other_host_is_asked(page):
    bytes_of(page)
    page.wait_for_load_state("networkidle")
    assert page.troubles == []


def test_formulas_are_typeset(page):
    wanted = page.locator("span.math, div.math").count()
    sizes = page.eval_on_selector_all(
        "mjx-container", "found => found.filter(x => x.checkVisibility()).map(x => x.getBoundingClientRect().height)"
    )
    assert page.locator("mjx-container").count() >= wanted
    assert all(size > 5 for size in sizes)
    assert page.locator("mjx-merror").count() == 0


def test_no_folder_of_the_machine_that_built_it_is_named(page):
    assert str(ROOT) not in page.content()


def test_headings_do_not_skip_a_level(page):
    levels = page.eval_on_selector_all("article :is(h1,h2,h3,h4,h5,h6)", "all => all.map(x => +x.tagName[1])")
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def bytes_of(page):
    """Compressed size of everything that a page has loaded, by its address."""
    page.wait_for_function("document.querySelectorAll('.slider-figure:not(:has(.main-svg))').length === 0")
    return dict(
        page.evaluate(
            "[...performance.getEntriesByType('navigation'), ...performance.getEntriesByType('resource')]"
            ".map(found => [found.name, found.encodedBodySize])"
        )
    )


def test_a_page_is_light(page):
    sizes = bytes_of(page)
    # Text waits neither for formulas nor for figures.
    text = sum(size for name, size in sizes.items() if not re.search(r"/(_images|mathjax|figures)/", name))
    assert 30_000 < text <= 200_000
    assert sum(sizes.values()) <= 1_300_000


def test_a_page_waits_for_one_script_at_most(page):
    waits = page.evaluate("[...document.scripts].filter(x => x.src && !x.defer && !x.async).map(x => x.src)")
    assert [name for name in waits if "documentation_options.js" not in name] == []


@of_chapters
def test_what_a_page_loads_late_has_its_place(page):
    assert any("plotly" in name for name in bytes_of(page))
    assert page.evaluate("window.shift") < 0.01


def test_what_a_phone_loads_late_has_its_place(open_page):
    page = open_page(CHAPTER, viewport=PHONE)
    bytes_of(page)
    assert page.evaluate("window.shift") < 0.01
    page.close()


@of_chapters
def test_text_in_pictures_is_readable_on_a_phone(page):
    dress(page, PHONE, "light")
    pictures = page.locator("article img[src$='.png']:visible")
    # A figure has 144 dots an inch, and its text 11 points, which are 22 dots.
    heights = pictures.evaluate_all("all => all.map(x => (22 * x.getBoundingClientRect().width) / x.naturalWidth)")
    assert heights
    assert min(heights) >= 11 - 1e-3
    texts = page.locator(".slider-plot svg text").evaluate_all(
        "all => all.map(x => parseFloat(getComputedStyle(x).fontSize))"
    )
    assert min(texts) >= 11


@of_chapters
def test_text_in_drawings_is_readable_on_a_phone(page):
    dress(page, PHONE, "light")
    drawings = page.locator("article img[src$='.svg']:visible").evaluate_all("""all => Promise.all(all.map(async x => {
      const drawn = new DOMParser().parseFromString(await (await fetch(x.src)).text(), "image/svg+xml").documentElement;
      const sizes = [...drawn.querySelectorAll("text")]
        .map(found => parseFloat(found.closest("[font-size]").getAttribute("font-size")));
      return Math.min(...sizes) * x.getBoundingClientRect().width / drawn.viewBox.baseVal.width;
    }))""")
    assert drawings
    assert min(drawings) >= 11 - 1e-3


@pytest.mark.parametrize("page", REVISED, indirect=True)
def test_a_page_is_not_mostly_code(page):
    dress(page, WIDE, "light")
    share = page.evaluate("""() => {
      const height = selector => [...document.querySelectorAll(selector)].filter(x => x.checkVisibility())
        .reduce((sum, x) => sum + x.getBoundingClientRect().height, 0);
      return height("article div.cell_input") / height("article");
    }""")
    assert share <= 0.25


@of_the_chapter
def test_the_contents_mark_the_section_that_is_being_read(page):
    dress(page, WIDE, "light")
    current = page.locator("nav.page-toc a.active")
    for link in page.locator("nav.page-toc a:visible").all()[1:4]:
        page.evaluate("id => document.getElementById(id).scrollIntoView()", link.get_attribute("href")[1:])
        page.wait_for_function("link => link.classList.contains('active')", arg=link.element_handle())
        assert current.count() == 1
        assert link.get_attribute("aria-current") == "true"
    page.evaluate("window.scrollBy(0, 2 * innerHeight)")  # a section that is taller than the screen keeps its mark
    page.wait_for_timeout(100)
    assert current.count() == 1
    page.evaluate("window.scrollTo(0, 0)")


# Colors take axe nearly all of its time: text that looks like other text, on the same ground, is left out.
OF_COLORS = ["color-contrast", "link-in-text-block"]
MARK_LOOKS = """() => {
  const grounds = new Map([[null, ""]]), seen = new Set();
  const ground = element => {
    if (!grounds.has(element)) {
      const style = getComputedStyle(element);
      const own = [style.backgroundColor, style.backgroundImage, style.opacity, style.filter];
      grounds.set(element, ground(element.parentElement) + own);
    }
    return grounds.get(element);
  };
  document.querySelectorAll("[data-look]").forEach(element => delete element.dataset.look);
  for (const element of document.querySelectorAll("body *")) {
    const isText = [...element.childNodes].some(node => node.nodeType === Node.TEXT_NODE && node.data.trim());
    if (!element.checkVisibility() || !(isText || element.matches("a, input, select"))) continue;
    const style = getComputedStyle(element), around = getComputedStyle(element.parentElement);
    const font = [style.color, style.fontSize, style.fontWeight, style.textDecorationLine, around.color];
    const look = [element.localName, ...font, ground(element)].join();
    if (!seen.has(look)) element.dataset.look = "";
    seen.add(look);
  }
}"""
LOOKS = {"include": [["[data-look]"]]}


def serious(page, context=None, **options):
    violations = Axe().run(page, context, {"resultTypes": ["violations"], **options}).response["violations"]
    return [
        f"{found['id']}: {node['html'][:160]}"
        for found in violations
        if found["impact"] in ("serious", "critical")
        for node in found["nodes"]
    ]


def test_axe_finds_nothing_serious(page):
    dress(page, WIDE, "light")
    assert serious(page, rules={rule: {"enabled": False} for rule in OF_COLORS}) == []
    page.evaluate(MARK_LOOKS)
    assert serious(page, LOOKS, runOnly=OF_COLORS) == []


def test_axe_finds_no_faint_color_in_the_dark(page):
    dress(page, WIDE, "dark")
    page.evaluate(MARK_LOOKS)
    assert serious(page, LOOKS, runOnly=OF_COLORS) == []


@of_the_chapter
@pytest.mark.parametrize(
    ("selector", "style"),
    [("article p:visible", "color: #bbb"), ("article p a:visible", "color: #444; text-decoration: none")],
)
def test_axe_would_find_faint_text_and_links_like_text(page, selector, style):
    dress(page, WIDE, "light")
    last = page.locator(selector).last
    last.evaluate("(found, style) => (found.style.cssText = style)", style)
    page.evaluate(MARK_LOOKS)
    assert serious(page, LOOKS, runOnly=OF_COLORS) != []
    last.evaluate("found => (found.style.cssText = '')")


def test_a_phone_does_not_scroll_sideways(page):
    dress(page, PHONE, "light")
    assert sideways(page) == 0
    # Everything is open, and letters are wide: other machines have other fonts.
    page.evaluate("""() => {
      document.body.style.letterSpacing = "1px";
      document.querySelectorAll("details").forEach(found => (found.open = true));
    }""")
    assert sideways(page) == 0
    page.evaluate("""() => {
      document.body.style.letterSpacing = "";
      document.querySelectorAll("details").forEach(found => (found.open = false));
    }""")


@of_chapters
def test_two_formulas_share_a_display_only_where_both_fit_on_a_phone(page):
    dress(page, PHONE, "light")
    wide = page.evaluate(r"""[...MathJax.startup.document.math]
      .filter(found => found.display && /\\q?quad/.test(found.math))
      .filter(found => found.typesetRoot.checkVisibility())
      .filter(found => {
        const box = found.typesetRoot.closest("div.math");
        return box.scrollWidth > box.clientWidth;
      })
      .map(found => found.math)""")
    assert wide == []


@of_chapters
def test_a_formula_wider_than_a_phone_scrolls_by_itself(page):
    dress(page, PHONE, "light")
    assert (
        page.evaluate("""[...document.querySelectorAll("article div.math")].filter(box => {
      const found = box.getBoundingClientRect(), scrolls = getComputedStyle(box).overflowX === "auto";
      return box.checkVisibility() && (found.right > innerWidth || (box.scrollWidth > box.clientWidth && !scrolls));
    }).map(box => box.textContent)""")
        == []
    )


@of_the_chapter
def test_no_line_begins_with_the_mark_behind_a_formula(page):
    dress(page, PHONE, "light")
    alone = page.evaluate("""() => {
      const top = node => {
        const range = document.createRange();
        range.setStart(node, 0);
        range.setEnd(node, 1);
        return range.getBoundingClientRect().top;
      };
      return [...document.querySelectorAll("article .math")].filter(math => {
        const mark = math.nextSibling, box = math.getBoundingClientRect();
        return mark?.nodeType === Node.TEXT_NODE && /^[,.;:]/.test(mark.data) && box.width && top(mark) >= box.bottom;
      }).map(math => math.parentElement.textContent.slice(0, 80));
    }""")
    assert alone == []


@of_one_of_each_kind
def test_dark_mode_is_dark(page):
    dress(page, WIDE, "light")
    assert luminance(page, "body") > 0.9
    dress(page, WIDE, "dark")
    assert luminance(page, "body") < 0.2
    shades = page.eval_on_selector_all(
        "article img, article .cell_output > .output, details.claim",
        "all => all.map(x => getComputedStyle(x).backgroundColor)",
    )
    for shade in shades:
        *color, alpha = map(float, [*re.findall(r"[\d.]+", shade), "1"][:4])
        assert alpha == 0 or sum(color) / (3 * 255) < 0.3, shade


def test_only_pages_with_a_figure_load_plotly(page):
    assert any("plotly" in name for name in bytes_of(page)) == (page.locator(".slider-figure").count() > 0)


def test_the_book_opens_from_disk(open_page):
    page = open_page(CHAPTER, address=HTML.as_uri())
    page.wait_for_selector("mjx-container")
    page.wait_for_selector(".slider-plot .main-svg")
    assert page.troubles == []


@pytest.mark.parametrize("path", [CHAPTER, "index.html"])
def test_the_text_shows_within_a_second(browser, site, path):
    page = browser.new_page()
    paint = "performance.getEntriesByName('first-contentful-paint')"
    for _ in range(4):  # other tests load the machine, and the first look fills the caches: the best of four counts
        page.goto(f"{site}/{path}", wait_until="commit")
        page.wait_for_function(f"{paint}.length > 0")
        time = page.evaluate(f"{paint}[0].startTime")
        if time < 1000:
            break
    assert time < 1000


# What can be done on a page.


@of_the_chapter
def test_the_theme_button_switches(page):
    modes = set()
    for _ in range(3):
        page.locator("button.theme-switch-button").first.click()
        modes.add(page.evaluate("document.documentElement.dataset.theme"))
    assert modes == {"light", "dark"}


@of_chapters
def test_a_keyboard_moves_every_slider(page):
    page.wait_for_function("document.querySelectorAll('.slider-figure:not(:has(.main-svg))').length === 0")
    controls = page.locator(".slider-controls input:is([type=range], :checked)")
    state = "document.querySelector('.slider-plot').data.map(t => [t.visible, t.opacity]).join()"
    for control in controls.all():
        for key, back in (("ArrowRight", "ArrowLeft"), ("ArrowLeft", "ArrowRight")):  # one of them stands at an end
            before = page.evaluate(state)
            control.focus()
            page.keyboard.press(key)
            page.wait_for_timeout(50)
            if page.evaluate(state) != before:
                page.keyboard.press(back)
                break
        else:
            pytest.fail(f"{control.evaluate('x => x.parentElement.textContent')} does not move")


# What has the focus: null outside the text; does one see that, and which is it of what a reader opens or moves?
FOCUSED = """() => {
  const now = document.activeElement, box = now.getBoundingClientRect();
  if (!now.closest("article")) return null;
  const style = getComputedStyle(now.matches("[type=radio]") ? now.nextElementSibling : now);
  const outlined = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 1;
  const kinds = ["details.fold > summary", "summary", "[type=range]", "button.toggle-button", "*"];
  now.dataset.stop ??= String(document.querySelectorAll("[data-stop]").length);
  return {
    kind: kinds.find(x => now.matches(x)), stop: now.dataset.stop, isOpen: now.parentElement.open, value: now.value,
    seen: (outlined || style.boxShadow !== "none") && box.bottom > 0 && box.top < innerHeight,
  };
}"""


@of_the_chapter
def test_a_keyboard_alone_reads_a_chapter(page):
    dress(page, WIDE, "light")
    page.evaluate("document.querySelectorAll('details').forEach(found => (found.open = false))")
    wanted = page.locator("article :is(summary, [type=range], button.toggle-button)").locator("visible=true").count()
    page.locator("article h1").first.evaluate("x => { x.tabIndex = -1; x.focus(); }")
    reached = {}
    while True:
        page.keyboard.press("Tab")
        found = page.evaluate(FOCUSED)
        if found is None or found["stop"] in reached:
            break
        assert found["seen"], page.evaluate("document.activeElement.outerHTML")
        reached[found["stop"]] = found["kind"]
        if found["kind"] == "details.fold > summary":
            page.keyboard.press("Enter")
            assert page.evaluate(FOCUSED)["isOpen"]
            page.keyboard.press("Enter")
        elif found["kind"] == "[type=range]":
            move, back = ("ArrowRight", "ArrowLeft") if found["value"] == "0" else ("ArrowLeft", "ArrowRight")
            page.keyboard.press(move)
            assert page.evaluate(FOCUSED)["value"] != found["value"]
            page.keyboard.press(back)
            assert page.evaluate(FOCUSED)["value"] == found["value"]
    assert sum(kind != "*" for kind in reached.values()) == wanted
    assert {"details.fold > summary", "[type=range]", "button.toggle-button"} <= set(reached.values())


@of_the_chapter
def test_sliders_change_what_the_figure_shows(page):
    page.wait_for_selector(".slider-plot .main-svg")
    sliders = page.locator(".slider-controls input")
    assert sliders.count() == 2

    def shown():
        return page.evaluate(
            "() => document.querySelector('.slider-plot').data"
            ".filter(t => t.visible && t.opacity && t.mode === 'text').map(t => t.text[0])"
        )

    seen = [shown()]
    for slider, key in ((0, "ArrowLeft"), (1, "ArrowLeft")):  # where a batch is large enough
        sliders.nth(slider).focus()
        page.keyboard.press(key)
        seen.append(shown())
    assert all(len(texts) == 1 for texts in seen)
    assert len({texts[0] for texts in seen}) == 3
    page.keyboard.press("End")
    sliders.nth(0).focus()
    page.keyboard.press("End")
    assert shown() == ["no batch is large enough"]


@of_the_chapter
def test_claims_solutions_and_cells_open_by_keyboard(page):
    for summary in ("details.claim > summary", "details.fold > summary", "details.sd-dropdown > summary"):
        first = page.locator(summary).first
        first.focus()
        page.keyboard.press("Enter")
        assert first.evaluate("found => found.parentElement.open"), summary
    toggle = page.locator(".solution.dropdown button.toggle-button").first
    toggle.focus()
    page.keyboard.press("Enter")
    assert "toggle-hidden" not in page.locator(".solution.dropdown").first.get_attribute("class")


@of_the_ledger
def test_the_ledger_filters(page):
    checks = page.locator(".ledger tbody tr:not(.ledger-claim)")
    visible, search = checks.locator("visible=true"), page.locator(".ledger input")
    total = checks.count()
    search.fill("berry")
    assert 0 < visible.count() < total
    search.fill("a batch is worth")  # of a statement
    assert 0 < visible.count() < total
    search.fill("")
    for name, value, wanted in [
        ("chapter", "minibatch_loss", "tbody[data-chapter=minibatch_loss] tr:not(.ledger-claim)"),
        ("kind", "bounded", "tr[data-kind=bounded]"),
    ]:
        page.locator(f".ledger select[name={name}]").select_option(value)
        assert 0 < visible.count() == page.locator(f".ledger {wanted}").count() < total
        page.locator(f".ledger select[name={name}]").select_option("")
    assert visible.count() == total


@of_the_ledger
def test_the_ledger_sorts(page):
    order = page.locator(".ledger select[name=order]")
    first = "all => all.map(body => body.rows[1].dataset)"
    for name, key, sign in [("z", "z", -1), ("sharp", "catches", 1), ("blunt", "catches", -1)]:
        order.select_option(name)
        found = [data.get(key) for data in page.locator(".ledger tbody").evaluate_all(first)]
        figures = [sign * float(figure) for figure in found if figure]
        assert figures == sorted(figures)
        assert not any(found[len(figures) :])
    order.select_option("")


@of_the_ledger
def test_the_ledger_shows_all_columns_and_its_rows_are_linked(page):
    dress(page, WIDE, "light")
    cells = "[...document.querySelectorAll('.ledger :is(td, th)')]"
    assert page.evaluate(f"{cells}.every(cell => cell.getBoundingClientRect().right <= innerWidth)")
    id = page.locator(".ledger tbody tr[id]").last.get_attribute("id")
    page.locator(".ledger tbody tr[id] a").last.click()
    assert page.evaluate("decodeURIComponent(location.hash.slice(1))") == id
    assert page.locator(".ledger tr:target").count() == 1
    page.locator(".ledger-claim a").first.click()
    page.wait_for_url("**/minibatch_loss.html#*")
    assert page.evaluate("!!document.getElementById(decodeURIComponent(location.hash.slice(1)))")


def test_search_finds_a_word_of_chapter_1(open_page):
    page = open_page("search.html?q=intraclass")
    page.wait_for_selector("#search-results li a")
    page.wait_for_selector("#search-results .context")  # an excerpt
    assert any(
        "minibatch_loss" in link for link in page.locator("#search-results a").evaluate_all("a => a.map(x => x.href)")
    )
    assert page.troubles == []


@of_the_chapter
def test_chapters_can_be_downloaded_and_their_code_copied(page):
    sources = page.locator("a[download], a.btn-download-source-button").evaluate_all("a => a.map(x => x.href)")
    assert any(link.endswith("minibatch_loss.ipynb") for link in sources)
    assert page.locator("button.copybtn").count() > 20
    assert page.locator("a.left-prev").count() == page.locator("a.right-next").count() == 1


@of_the_chapter
def test_printing_shows_solutions_and_no_sidebar(page):
    page.emulate_media(media="print")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator(".bd-sidebar-primary").first.is_hidden()
    assert page.locator(".solution.dropdown").first.evaluate("x => !x.classList.contains('toggle-hidden')")
    assert page.locator("details.sd-dropdown").first.evaluate("x => x.open")
    assert page.locator(".toggle-button").first.is_hidden()
    # A cell cut in two would leave an empty frame on the page before.
    assert page.locator(".cell_input").first.evaluate("x => getComputedStyle(x).breakInside") == "avoid"
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    page.emulate_media(media="screen")
