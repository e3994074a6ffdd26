"""What the book says of its chapters, made from the registry and ``_toc.yml``.

``{parts}`` is the list of parts and chapters, ``{sources}`` the rows of the
source map, ``{modules}`` the table of the reference, and ``{chapter}`` the number
of a chapter, with a link to it. The reference's page of each chapter's module is
written before Sphinx looks for pages.
"""

from dataclasses import dataclass
from pathlib import Path

import yaml
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.addnodes import pending_xref
from sphinx.util.docutils import SphinxDirective, SphinxRole

from helpers.lab import registry

TO_COME = "book/to_come.yml"
REFERENCE = "book/api"
MODULE_PAGE = """\
# Chapter {number}: `helpers.{chapter}`

```{{eval-rst}}
.. automodule:: helpers.{chapter}
   :members:
```
"""


@dataclass(frozen=True)
class Entry:
    """A chapter, with a place in the book unless it is still to come."""

    part: str
    title: str
    sources: set
    place: registry.Place | None = None

    @property
    def link(self):
        if self.place is None:
            return self.title
        return f"{{doc}}`{self.place.number} {self.title} </{self.place.page}>`"

    @property
    def state(self):
        return "to come" if self.place is None else "ready"


def book_of(root):
    """Return the captions of all parts, and all chapters, those to come last."""
    places = registry.places(root / "_toc.yml")
    plan = yaml.safe_load((root / TO_COME).read_text(encoding="utf-8"))
    listed = []
    for place in places:
        chapter = registry.read_chapter(place.chapter, root / "helpers/registry")
        sources = {source for claim in chapter.claims for source in claim.sources}
        listed.append(Entry(place.part, chapter.title, sources, place))
    written = {place.chapter for place in places}
    to_come = [
        Entry(part, chapter["title"], set(registry.split(chapter["source"])))
        for part, chapters in plan.items()
        for name, chapter in chapters.items()
        if name not in written
    ]
    parts = dict.fromkeys([*plan, *(place.part for place in places)])
    return list(parts), listed + to_come


def table(header, rows):
    """Return the lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


class Made(SphinxDirective):
    """A table whose rows are made: a subclass says which."""

    has_content = True

    def run(self):
        root = Path(self.env.srcdir)
        for path in ("_toc.yml", TO_COME):
            self.env.note_dependency(str(root / path))
        for path in (root / "helpers/registry").glob("*.yml"):
            self.env.note_dependency(str(path))
        lines = self.lines(root)
        parent = nodes.Element()
        text = StringList(lines, source=self.get_source_info()[0])
        self.state.nested_parse(text, self.content_offset, parent)
        return parent.children


class Parts(Made):
    """An item for each part: what it asks, which its text says by the part's numeral, and links to its chapters."""

    def lines(self, root):
        parts, chapters = book_of(root)
        questions = dict([cell.strip() for cell in line.split("|")] for line in self.content)
        lines = []
        for part in parts:
            question = questions.get(part.partition(" ")[0], "")
            linked = [chapter.link for chapter in chapters if chapter.part == part and chapter.place]
            lines += [f"- **{part}.** {question}", *(f"  - {link}" for link in linked)]
        return lines


class Sources(Made):
    """The source map: its sections are written, their chapters made."""

    def lines(self, root):
        _, chapters = book_of(root)
        rows = []
        for line in self.content:
            section, subject, problems = (cell.strip() for cell in line.split("|"))
            wanted = {section, *registry.split(problems)}
            treating = [chapter for chapter in chapters if chapter.sources & wanted]
            links = ", ".join(chapter.link for chapter in treating)
            states = dict.fromkeys(chapter.state for chapter in treating)
            state = ", ".join(states) if len(states) == 1 else "in part"
            rows.append([section, subject, problems, links, state])
        return table(["source", "subject", "problems", "chapters", "state"], rows)


class Modules(Made):
    """The reference's table: the rows of its text, then one for each chapter."""

    def lines(self, root):
        rows = [[cell.strip() for cell in line.split("|")] for line in self.content]
        for place in registry.places(root / "_toc.yml"):
            chapter = registry.read_chapter(place.chapter, root / "helpers/registry")
            link = f"{{doc}}`helpers.{chapter.name} </{REFERENCE}/{chapter.name}>`"
            rows.append([link, f"chapter {place.number}: {chapter.module}"])
        return table(["module", "holds"], rows)


class Number(SphinxRole):
    """The number of a chapter, as ``_toc.yml`` has it, with a link to it."""

    def run(self):
        toc = Path(self.env.srcdir) / "_toc.yml"
        self.env.note_dependency(str(toc))
        places = {place.chapter: place for place in registry.places(toc)}
        if self.text not in places:
            names = ", ".join(places)
            message = f"a chapter must be one of {names}, got {self.text!r}"
            return [], [self.inliner.reporter.error(message, line=self.lineno)]
        place = places[self.text]
        text = nodes.inline(text=str(place.number))
        target = {
            "refdomain": "std",
            "reftype": "doc",
            "reftarget": f"/{place.page}",
        }
        return [pending_xref("", text, refexplicit=True, refwarn=True, **target)], []


def write_module_pages(app, config):
    """Write the page of each chapter's module, where it is not there already."""
    root = Path(app.srcdir)
    for place in registry.places(root / "_toc.yml"):
        page = root / REFERENCE / f"{place.chapter}.md"
        text = MODULE_PAGE.format(number=place.number, chapter=place.chapter)
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.parent.mkdir(exist_ok=True)
            page.write_text(text, encoding="utf-8")


def offer_no_edit(app, pagename, templatename, context, doctree):
    """A page that is made has no source that a reader could edit."""
    made = {f"{REFERENCE}/{place.chapter}" for place in registry.places(Path(app.srcdir) / "_toc.yml")}
    if pagename in made:
        context["page_source_suffix"] = ""


def setup(app):
    app.add_directive("parts", Parts)
    app.add_directive("sources", Sources)
    app.add_directive("modules", Modules)
    app.add_role("chapter", Number())
    app.connect("config-inited", write_module_pages)
    app.connect("html-page-context", offer_no_edit, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
