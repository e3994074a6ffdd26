"""Shows claims statement first: the rows of one claim under one line that says what it states."""

import html
import itertools
import re

from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform

from helpers.lab.registry import read_chapters

# What helpers.lab.claims.Claim stores for the page, if the claim holds.
ROW = re.compile(
    r'<details class="claim claim-passed"><summary><span[^>]*>✓</span> (?P<sentence>.*?) '
    r"<small>(?P<slug>\w+)(?: \[(?P<case>.*?)\])?</small></summary><code>(?P<row>.*?)</code></details>",
    re.DOTALL,
)


class GroupClaims(SphinxPostTransform):
    """Puts consecutive rows of a claim under its title, behind the code of their cells."""

    default_priority = 195  # after folds have brought the outputs of their cells together
    formats = ("html",)

    def run(self, **kwargs):
        chapter = read_chapters().get(self.env.docname.rpartition("/")[2])
        titles = {claim.id.partition(".")[2]: claim.title for claim in chapter.claims} if chapter else {}
        for output in self.document.findall(_is_output):
            groups = itertools.groupby(output.children, lambda node: _slug_of(node, titles))
            shown = [part for slug, rows in groups for part in _lines(slug, list(rows), titles)]
            output.children = []
            output.extend(shown)


def _is_output(node):
    return isinstance(node, nodes.container) and node.get("nb_element") == "cell_code_output"


def _match(node):
    return ROW.fullmatch(node.astext().strip()) if isinstance(node, nodes.raw) else None


def _slug_of(node, titles):
    row = _match(node)
    return row["slug"] if row and row["slug"] in titles else None


def _lines(slug, rows, titles):
    if slug is None:
        return rows
    checks = "".join(_check(_match(row)) for row in rows)
    count = f" · {len(rows)} checks" if len(rows) > 1 else ""
    text = (
        f'<details class="claim claim-passed"><summary><span aria-hidden="true">✓</span> {html.escape(titles[slug])} '
        f"<small>{slug}{count}</small></summary><ul>{checks}</ul></details>"
    )
    return [nodes.raw("", text, format="html", classes=["output", "text_html"])]


def _check(row):
    case = f"<em>{row['case']}:</em> " if row["case"] else ""
    return f"<li>{case}{row['sentence']} <code>{row['row']}</code></li>"
