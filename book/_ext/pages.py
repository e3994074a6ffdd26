"""Finishes the book's pages: what they load, how they fold, what they say of themselves."""

import json
import math
import re
from pathlib import Path

from docutils import nodes
from PIL import Image

from claim_rows import GroupClaims
from folds import FoldCells, depart_fold, fold, visit_fold
from formulas import reserve_widths
from front import PREREQUISITES
from helpers.lab.reading import length_of
from icons import trim_icons
from pictures import shrink_pictures
from scripts import choose_scripts, copy_scripts

# Names, punctuation and spaces of code have the color of the code around them.
PLAIN_CODE = re.compile(r'<span class="(?:n|nn|p|w)">([^<]*)</span>')
# Browsers would begin a line with the comma behind a formula.
FORMULA_AND_MARK = re.compile(r'(<span class="math [^>]*>[^<]*</span>[,.;:!?)]+)')
FIGURE = re.compile(r'(<div class="slider-figure"[^>]*)(><script[^>]*>)(.*?)(?=</script>)', re.DOTALL)
PICTURE = re.compile(r'<img ([^>]*src="[^"]*_images/([^"/]+\.(?:png|svg))")(?: style="([^"]*)")?')
VIEW_BOX = re.compile(r'<svg[^>]* viewBox="\S+ \S+ (\S+) (\S+)"')
FONT_SIZE = re.compile(r'font-size="([\d.]+)"')
DOTS_PER_PIXEL = 2  # at which the 11 points of a figure's text are 11 pixels
READABLE_TEXT = 11  # pixels

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
    if source.suffix != ".ipynb" or not paragraph.astext().startswith(PREREQUISITES):
        return
    length = length_of(json.loads(source.read_text(encoding="utf-8"))["cells"])
    story, workbench = length.story, length.workbench
    times = f" {story} minutes for the story, {workbench} with the code."
    paragraph += [
        nodes.Text(" "),
        nodes.emphasis(text="Reading time:"),
        nodes.Text(times),
    ]


def polish_text(app, pagename, templatename, context, doctree):
    """Mend what screen readers, phones and slow networks stumble over."""
    # docutils calls the bibliography a list, but its items no list items: to a
    # screen reader it would be an empty list.
    body = context.get("body", "").replace(' role="list"', "")
    body = reserve_widths(body)
    body = FORMULA_AND_MARK.sub(r'<span class="unbroken">\1</span>', body)
    body = FIGURE.sub(_reserve, body)
    sources = {name: source for source, name in app.builder.images.items()}
    body = PICTURE.sub(lambda found: _with_size(found, Path(app.srcdir) / sources[found[2]]), body)
    # A third of a chapter's weight.
    context["body"] = PLAIN_CODE.sub(r"\1", body)


def _reserve(figure):
    """Reserve the height of a slider figure, which is drawn later."""
    start, script, data = figure.groups()
    layout = json.loads(data)["layout"]
    style = f"--plot-height: {layout['height']}px; --sliders: {len(layout['sliders'])}"
    return f'{start} style="{style}"{script}{data}'


def _with_size(found, source):
    """Say how large a picture is, so that nothing moves when it comes, and how wide on a phone."""
    if source.suffix == ".svg":
        width, height, readable_width = _size_of_drawing(source)
    else:
        with Image.open(source) as picture:
            width, height = picture.size
        readable_width = width / DOTS_PER_PIXEL
    style = "; ".join(filter(None, [f"--readable-width: {readable_width:g}px", found[3]]))
    return f'<img width="{width}" height="{height}" style="{style}" {found[1]}'


def _size_of_drawing(source):
    """Return width and height of a drawing, and the width at which its smallest text can be read."""
    text = source.read_text(encoding="utf-8")
    view_box = VIEW_BOX.search(text)
    if view_box is None:
        raise ValueError(f"a drawing must have a viewBox, which {source.name} has not")
    width, height = view_box.groups()
    smallest = min(map(float, FONT_SIZE.findall(text)), default=math.inf)
    return width, height, READABLE_TEXT * float(width) / smallest


def finish(app, exception):
    """Add to the finished book what its pages load, and no icon that they do not."""
    if exception is None and app.builder.format == "html":
        static = Path(app.outdir) / "_static"
        copy_scripts(static)
        trim_icons(static)


def setup(app):
    app.connect("config-inited", offer_repository)
    app.connect("doctree-read", show_reading_times)
    app.connect("html-page-context", choose_scripts, priority=900)
    app.connect("html-page-context", polish_text, priority=900)
    app.connect("build-finished", finish)
    app.connect("build-finished", shrink_pictures)
    app.add_node(fold, html=(visit_fold, depart_fold))
    app.add_post_transform(FoldCells)
    app.add_post_transform(GroupClaims)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
