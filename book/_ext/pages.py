"""Pages that need no other host: MathJax and Plotly are shipped with the book.

Jupyter Book loads every script of ``_static`` on every page, so the big ones are
copied into the finished book here, and scripts that ask a CDN are dropped.
"""

import importlib.resources
import json
import re
import shutil
from pathlib import Path

from docutils import nodes
from folds import FoldCells, depart_fold, fold, visit_fold
from icons import trim_icons
from plotly.offline import get_plotlyjs

from helpers.lab.reading import length_of

MATHJAX = (
    importlib.resources.files("sphinx-mathjax-offline") / "static" / "mathjax"
)
# What tex-chtml.js loads on demand: fonts, rare TeX commands, accessibility.
MATHJAX_PARTS = (
    "tex-chtml.js",
    "output/chtml/fonts",
    "input/tex/extensions",
    "a11y",
)
PLOTLY = "plotly/plotly.min.js"
FIGURE_MARK = 'class="slider-figure"'
# Names, punctuation and spaces of code have the color of the code around them.
PLAIN_CODE = re.compile(r'<span class="(?:n|nn|p|w)">([^<]*)</span>')
# Browsers would begin a line with the comma behind a formula.
FORMULA_AND_MARK = re.compile(r'(<span class="math [^>]*>[^<]*</span>[,.;:!?)]+)')

# What the theme offers once it knows where the book's repository is.
REPOSITORY_BUTTONS = {
    "use_edit_page_button": True,
    "use_repository_button": True,
    "launch_buttons": {
        "notebook_interface": "jupyterlab",
        "colab_url": "https://colab.research.google.com",
        "binderhub_url": "https://mybinder.org",
    },
}


def offer_repository(app, config):
    """Turn on the buttons that need the repository, if its address is known."""
    if config.html_theme_options.get("repository_url"):
        config.html_theme_options.update(REPOSITORY_BUTTONS)


def show_reading_times(app, doctree):
    """Add to a chapter's line of prerequisites how long story and code take."""
    source = Path(app.env.doc2path(app.env.docname))
    paragraph = next(doctree.findall(nodes.paragraph), nodes.paragraph())
    if source.suffix != ".ipynb" or not paragraph.astext().startswith(
        "Prerequisites"
    ):
        return
    length = length_of(json.loads(source.read_text(encoding="utf-8"))["cells"])
    story, workbench = length.story, length.workbench
    times = f" {story} minutes for the story, {workbench} with the code."
    paragraph += [
        nodes.Text(" "),
        nodes.emphasis(text="Reading time:"),
        nodes.Text(times),
    ]


def choose_scripts(app, pagename, templatename, context, doctree):
    """Add Plotly to pages with a slider figure; drop Thebe, which asks a CDN."""
    if FIGURE_MARK in context.get("body", ""):
        app.add_js_file(PLOTLY, loading_method="defer")
        app.add_js_file("sliders/sliders.js", loading_method="defer")
    scripts = context.get("script_files", [])
    context["script_files"] = [
        x for x in scripts if "thebe" not in _text_of(x).lower()
    ]


def polish_text(app, pagename, templatename, context, doctree):
    """Mend what screen readers, phones and slow networks stumble over."""
    # docutils calls the bibliography a list, but its items no list items: to a
    # screen reader it would be an empty list.
    body = context.get("body", "").replace(' role="list"', "")
    body = FORMULA_AND_MARK.sub(r'<span class="unbroken">\1</span>', body)
    # A third of a chapter's weight.
    context["body"] = PLAIN_CODE.sub(r"\1", body)


def _text_of(script):
    body = getattr(script, "attributes", {}).get("body", "")
    return f"{getattr(script, 'filename', script)} {body}"


def copy_scripts(app, exception):
    """Copy MathJax and Plotly into the finished book."""
    if exception is not None or app.builder.format != "html":
        return
    static = Path(app.outdir) / "_static"
    for part in MATHJAX_PARTS:
        source, target = Path(str(MATHJAX / part)), static / "mathjax" / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, target)
    (static / PLOTLY).parent.mkdir(parents=True, exist_ok=True)
    (static / PLOTLY).write_text(get_plotlyjs(), encoding="utf-8")
    (static / "sliders").mkdir(exist_ok=True)
    shutil.copyfile(
        Path(__file__).with_name("sliders.js"), static / "sliders" / "sliders.js"
    )
    # Their icons come from the web fonts in the theme's style sheet.
    for leftover in (static / "scripts").glob("fontawesome*"):
        leftover.unlink()
    trim_icons(static)


def setup(app):
    app.connect("config-inited", offer_repository)
    app.connect("doctree-read", show_reading_times)
    app.connect("html-page-context", choose_scripts, priority=900)
    app.connect("html-page-context", polish_text, priority=900)
    app.connect("build-finished", copy_scripts)
    app.add_node(fold, html=(visit_fold, depart_fold))
    app.add_post_transform(FoldCells)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
