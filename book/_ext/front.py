"""What leads to the book: a chapter's stored figure on the front page, and what a page says of itself to others."""

import base64
import html
import json
import re
from pathlib import Path

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

# Made from the notebooks, beside the other pictures.
PICTURES = "book/images/stored"
ABOUT = "Deep learning explained through random variables: derived, simulated, measured, broken on purpose."
TAG = re.compile(r"<[^>]+>")
LONGEST = 200
PREREQUISITES = "Prerequisites"


class StoredFigure(SphinxDirective):
    """Shows a figure that a notebook stores: ``{stored-figure} part/chapter fig-name``, with a caption of its own."""

    required_arguments = 2
    has_content = True

    def run(self):
        notebook, name = self.arguments
        source, root = Path(self.env.srcdir) / "book" / f"{notebook}.ipynb", Path(self.env.srcdir)
        self.env.note_dependency(str(source))
        cells = json.loads(source.read_text(encoding="utf-8"))["cells"]
        named = [cell for cell in cells if _described(cell).get("figure", {}).get("name") == name]
        if len(named) != 1:
            raise self.error(f"{notebook} must have one figure called {name}, got {len(named)}")
        (cell,) = named
        picture = root / PICTURES / f"{name}.png"
        picture.parent.mkdir(exist_ok=True)
        picture.write_bytes(next(_pictures(cell)))
        image = nodes.image(uri=f"/{PICTURES}/{name}.png", alt=_described(cell)["image"]["alt"])
        text, messages = self.state.inline_text(" ".join(self.content), self.lineno)
        # A caption would be numbered.
        legend = nodes.legend("", nodes.paragraph("", "", *text))
        return [nodes.figure("", image, legend, classes=["stored-figure"]), *messages]


def _described(cell):
    return cell["metadata"].get("mystnb", {})


def _pictures(cell):
    return (
        base64.b64decode(output["data"]["image/png"])
        for output in cell["outputs"]
        if "image/png" in output.get("data", {})
    )


def describe(app, pagename, templatename, context, doctree):
    """Say in a page's head what it is about: for search engines, and for who links to it."""
    title = TAG.sub("", context.get("title") or app.config.html_title)
    text = html.escape(description_of(doctree) or ABOUT)
    fields = {
        "og:title": title if pagename != app.config.root_doc else app.config.html_title,
        "og:description": text,
        "og:type": "website" if pagename == app.config.root_doc else "article",
        "og:site_name": app.config.html_title,
    }
    tags = [f'<meta name="description" content="{text}" />']
    tags += [f'<meta property="{name}" content="{value}" />' for name, value in fields.items()]
    context["metatags"] = context.get("metatags", "") + "\n".join(["", *tags])


def description_of(doctree):
    """Return the first paragraph of a page, cut behind a word, without the line of prerequisites."""
    if doctree is None:
        return ""
    texts = (" ".join(paragraph.astext().split()) for paragraph in doctree.findall(nodes.paragraph))
    text = next((text for text in texts if text and not text.startswith(PREREQUISITES)), "")
    return text if len(text) <= LONGEST else text[:LONGEST].rpartition(" ")[0] + " …"


def setup(app):
    app.add_directive("stored-figure", StoredFigure)
    app.connect("html-page-context", describe)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
