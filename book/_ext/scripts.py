"""Which scripts a page loads: shipped with the book, as few as it needs, and late.

Jupyter Book loads every script of ``_static`` on every page, so the big ones are
copied into the finished book here, and scripts that ask a CDN are dropped.
"""

import importlib.resources
import re
import shutil
from pathlib import Path

HERE = Path(__file__).parent
MATHJAX = importlib.resources.files("sphinx-mathjax-offline") / "static" / "mathjax"
# What tex-chtml.js loads on demand: fonts, rare TeX commands, accessibility.
MATHJAX_PARTS = (
    "tex-chtml.js",
    "output/chtml/fonts",
    "input/tex/extensions",
    "a11y",
)
OWN = {
    "plotly-basic.min.js": HERE / "plotly" / "plotly-basic.min.js",
    "sliders.js": HERE / "sliders.js",
}
SEARCH = "search"
SEARCH_TEXT = "<search page>"  # stands for the text that this page of the theme has not
# What says that a page needs a script; every other script is needed everywhere.
NEEDED_FOR = {
    "mathjax": 'class="math ',
    "ledger.js": 'class="ledger"',
    "design-tabs.js": 'class="sd-tab',
    "togglebutton.js": "dropdown admonition",
    "/search.js": SEARCH_TEXT,
}
FIGURE_MARK = 'class="slider-figure"'
# Thebe asks a CDN. Its own name is in its file and in what configures it.
UNWANTED = re.compile("thebe", re.IGNORECASE)
# An inline script behind it reads what it defines.
BLOCKING = "documentation_options.js"


def choose_scripts(app, pagename, templatename, context, doctree):
    """Leave a page the scripts that it needs, all but one of them deferred."""
    body = context.get("body", "") if pagename != SEARCH else SEARCH_TEXT
    if FIGURE_MARK in body:
        app.add_js_file("figures/sliders.js")
    scripts = [
        script
        for script in context.get("script_files", [])
        if not UNWANTED.search(_text_of(script)) and _is_needed(script, body)
    ]
    # The theme's search page has scripts that run at once and rest on the others.
    if pagename != SEARCH:
        scripts = [_deferred(script) for script in scripts]
    context["script_files"] = scripts


def _deferred(script):
    if not script.filename or script.filename.partition("?")[0].endswith(BLOCKING):
        return script
    attributes = script.attributes | {"defer": "defer"}
    return type(script)(script.filename, priority=script.priority, **attributes)


def _text_of(script):
    return f"{script.filename} {script.attributes.get('body', '')}"


def _is_needed(script, body):
    marks = [mark for name, mark in NEEDED_FOR.items() if name in _text_of(script)]
    return all(mark in body for mark in marks)


def copy_scripts(static):
    """Copy MathJax, Plotly and what draws slider figures into the finished book.

    Parameters
    ----------
    static : Path
        The ``_static`` folder of the finished book.
    """
    for part in MATHJAX_PARTS:
        source, target = Path(str(MATHJAX / part)), static / "mathjax" / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, target)
    (static / "figures").mkdir(exist_ok=True)
    for name, source in OWN.items():
        shutil.copyfile(source, static / "figures" / name)
    # Their icons come from the web fonts in the theme's style sheet.
    for leftover in (static / "scripts").glob("fontawesome*"):
        leftover.unlink()
