"""The ledger's page with 600 checks, three times as many as three chapters have: work counted, not timed."""

import re

import pytest

from tests.browser.conftest import TWO_FRAMES
from tests.browser.site import HTML, WIDE

ROWS = 600


def long_ledger():
    """The built page, its claims repeated under other names until there are ROWS checks."""
    text = (HTML / "book" / "ledger.html").read_text(encoding="utf-8")
    claims = re.findall(r"<tbody.*?</tbody>", text, re.DOTALL)
    made, count = [], 0
    while count < ROWS:
        claim = claims[len(made) % len(claims)]
        made.append(re.sub(r'((?:id="|href="#)[^"]*)', rf"\1.{len(made)}", claim))
        count += claim.count("<tr id=")
    return re.sub(r"<tbody.*</tbody>", lambda _: "".join(made), text, flags=re.DOTALL), count


@pytest.fixture(scope="module")
def ledger(browser, site):
    """The page, and how many checks it has."""
    content, count = long_ledger()
    page = browser.new_page(viewport=WIDE)
    page.route("**/long.html", lambda route: route.fulfill(body=content, content_type="text/html; charset=utf-8"))
    page.goto(f"{site}/book/long.html")
    yield page, count
    page.close()


def work(page, action):
    """How often the browser laid out and styled the page because of an action."""
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")

    def counts():
        page.evaluate(TWO_FRAMES)
        found = {metric["name"]: metric["value"] for metric in session.send("Performance.getMetrics")["metrics"]}
        return found["LayoutCount"], found["RecalcStyleCount"]

    before = counts()
    action()
    after = counts()
    session.detach()
    return [late - early for early, late in zip(before, after, strict=True)]


def test_a_check_takes_few_elements(ledger):
    page, count = ledger
    assert count >= ROWS
    assert page.locator(".ledger tbody tr[id]").count() == count
    assert page.locator(".ledger *").count() < 12 * count


@pytest.mark.parametrize(
    "action",
    [
        lambda page: page.locator(".ledger input").fill("berry"),
        lambda page: page.locator(".ledger input").fill(""),
        lambda page: page.locator(".ledger select[name=order]").select_option("sharp"),
        lambda page: page.locator(".ledger select[name=kind]").select_option("bounded"),
    ],
    ids=["search", "show all", "sort", "filter"],
)
def test_one_action_is_not_one_layout_for_each_row(ledger, action):
    page, _ = ledger
    layouts, styles = work(page, lambda: action(page))
    assert 1 <= layouts <= 10
    assert styles <= 20
