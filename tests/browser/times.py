"""Times how soon a page can be read: ``make pages-bench``, or ``python -m tests.browser.times [FOLDER]``.

A phone is a quarter of this machine's processor behind 1.6 Mbit/s. Each time is the median of three visits.
"""

import statistics
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.browser.site import FLAGS, HTML, PHONE, WIDE, chromium, served

VISITS = 3
SLOW_NETWORK = {"offline": False, "latency": 150, "downloadThroughput": 200_000, "uploadThroughput": 94_000}
COLUMNS = ("first paint", "DOM ready", "formulas", "figure", "kB", "shift")
WATCH = """
  window.times = {shift: 0};
  new PerformanceObserver(list => list.getEntries().forEach(entry => (times.shift += entry.value)))
    .observe({type: "layout-shift", buffered: true});
  const look = () => {
    if (!times.formulas && window.MathJax?.startup?.promise)
      MathJax.startup.promise.then(() => (times.formulas ??= performance.now() / 1000));
    if (!times.figure && document.querySelector(".slider-plot .main-svg"))
      times.figure = performance.now() / 1000;
    if (!(times.formulas && times.figure)) setTimeout(look, 20);
  };
  look();
"""
READ = """() => {
  const page = performance.getEntriesByType("navigation")[0];
  const paint = performance.getEntriesByName("first-contentful-paint")[0].startTime / 1000;
  const parts = [page, ...performance.getEntriesByType("resource")];
  const kilobytes = parts.reduce((sum, part) => sum + part.encodedBodySize, 0) / 1000;
  const ready = page.domContentLoadedEventStart / 1000;
  return [paint, ready, times.formulas ?? NaN, times.figure ?? NaN, kilobytes, times.shift];
}"""


def visit(browser, address, viewport, *, slow):
    """Open a page in a fresh browser context and return its figures, in the order of COLUMNS."""
    context = browser.new_context(viewport=viewport)
    page = context.new_page()
    if slow:
        session = context.new_cdp_session(page)
        session.send("Network.enable")
        session.send("Network.emulateNetworkConditions", SLOW_NETWORK)
        session.send("Emulation.setCPUThrottlingRate", {"rate": 4})
    page.set_default_timeout(180_000)
    page.add_init_script(WATCH)
    page.goto(address, wait_until="load")
    page.wait_for_function("!window.MathJax || times.formulas")
    page.wait_for_function("!document.querySelector('.slider-figure') || times.figure")
    page.wait_for_function("performance.getEntriesByName('first-contentful-paint').length > 0")
    page.wait_for_function("performance.getEntriesByType('navigation')[0].loadEventEnd > 0")
    found = page.evaluate(READ)
    context.close()
    return found


def main(folder=HTML):
    pages = [path for path in sorted(folder.glob("book/*/*.html")) if "api" not in path.parts]
    with sync_playwright() as playwright, served(folder) as address:
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        print(f"{'':34}" + "".join(f"{name:>12}" for name in COLUMNS))
        for page in [folder / "index.html", *pages]:
            for name, viewport in (("desktop", WIDE), ("phone", PHONE)):
                url = f"{address}/{page.relative_to(folder).as_posix()}"
                runs = [visit(browser, url, viewport, slow=name == "phone") for _ in range(VISITS)]
                found = map(statistics.median, zip(*runs, strict=True))
                print(f"{page.stem:24}{name:10}" + "".join(f"{value:12.3g}" for value in found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
