"""Drives the built book in a real Chromium, served from this machine, with every other host refused."""

import os
import re

import pytest
from playwright.sync_api import sync_playwright
from xdist.scheduler import LoadScopeScheduling

from tests.browser.site import FLAGS, HTML, WIDE, chromium, served

# How far things moved, each by the share of the screen that moved, since the page began to load.
WATCH_SHIFTS = """
  window.shift = 0;
  new PerformanceObserver(list => list.getEntries().forEach(entry => (window.shift += entry.value)))
    .observe({type: "layout-shift", buffered: true});
"""
TWO_FRAMES = "new Promise(painted => requestAnimationFrame(() => requestAnimationFrame(painted)))"


def page_of(nodeid):
    found = re.search(r"[\w/]+\.html", nodeid)
    return found[0] if found else ""


class ByPage(LoadScopeScheduling):
    """Gives all tests of a page to one worker, which opens it once. (Marked groups have no effect under pytest 9.2.)"""

    def _split_scope(self, nodeid):
        return page_of(nodeid) or nodeid


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: page_of(item.nodeid))


def pytest_xdist_make_scheduler(config, log):
    return ByPage(config, log)


@pytest.fixture(scope="session")
def site():
    """Address of a local server of the built book."""
    if not (HTML / "index.html").exists():
        pytest.fail("the book is not built: run make book first")
    with served() as address:
        yield address


@pytest.fixture(scope="session")
def browser():
    path = chromium()
    if path is None:
        message = "no Chromium found: install one (on Debian, the package chromium) or set CHROMIUM to its path"
        pytest.fail(message) if os.environ.get("REQUIRE_BROWSER") == "1" else pytest.skip(message)
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=list(FLAGS))


@pytest.fixture(scope="session")
def open_page(browser, site):
    """Return a function that opens a page of the book; the page then holds what went wrong in `troubles`.

    Pictures come after the text is painted, as on a slow network.
    """

    def open_(path, *, address=site, viewport=WIDE):
        page, troubles = browser.new_page(viewport=viewport, color_scheme="light"), []

        def route(route):
            if route.request.url.startswith((address, "data:", "blob:")):
                route.continue_()
            else:
                troubles.append(f"asks {route.request.url}")
                route.abort()

        page.add_init_script(WATCH_SHIFTS)
        page.route("**/*", route)
        pictures = []
        page.route("**/_images/**", lambda route: pictures.append(route))
        page.on("console", lambda message: message.type == "error" and troubles.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: troubles.append(f"script: {error}"))
        page.on("requestfailed", lambda request: troubles.append(f"failed: {request.url}"))
        page.on("response", lambda answer: answer.status >= 400 and troubles.append(f"{answer.status}: {answer.url}"))
        page.goto(f"{address}/{path}", wait_until="domcontentloaded")
        page.evaluate(TWO_FRAMES)
        page.unroute("**/_images/**")
        for picture in pictures:
            picture.continue_()
        page.wait_for_load_state("load")
        page.wait_for_function("!window.MathJax?.startup || window.MathJax.startup.promise.then(() => true)")
        page.troubles = troubles
        return page

    return open_
