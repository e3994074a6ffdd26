"""Folds code away under a label that says what it holds.

A code cell with the tag ``hide-input`` is folded; its label is the comment in its
first line. Folded cells that follow each other, with nothing but rows of claims
between them, are one fold, and the rows stand behind it. With ``hide-cell``
outputs are folded as well; behind a dropdown, such cells go into it.
"""

import html

from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform

CLAIM = '<details class="claim'
UNLABELED = "Code"


class fold(nodes.Element):
    """What a reader opens by its ``label``."""


def visit_fold(self, node):
    label = html.escape(node["label"], quote=False)
    self.body.append(f'<details class="fold"><summary>{label}</summary>\n')


def depart_fold(self, node):
    self.body.append("</details>\n")


class FoldCells(SphinxPostTransform):
    """Makes one fold of each run of folded cells; MyST-NB would fold each."""

    default_priority = 190
    formats = ("html",)

    def run(self, **kwargs):
        for run in list(_runs(self.document)):
            dropdown = _shown_before(run[0])
            for cell in run:
                cell["with_output"] = cell.attributes.pop("hide_mode") == "all"
            if run[0]["with_output"] and _is_dropdown(dropdown):
                _move(run, dropdown)
            else:
                _fold(run)


def _runs(document):
    run = []
    for cell in document.findall(_is_folded):
        if run and not _continues(run[-1], cell):
            yield run
            run = []
        run.append(cell)
    if run:
        yield run


def _is_folded(node):
    return getattr(node, "attributes", {}).get("hide_mode") in ("input", "all")


def _is_dropdown(node):
    return node is not None and node.get("design_component") == "dropdown"


def _continues(last, cell):
    if last["hide_mode"] != cell["hide_mode"] or _shown_before(cell) is not last:
        return False
    # A figure keeps a fold of its own, right above it.
    return last["hide_mode"] == "all" or all(map(_is_claim, _output_of(last)))


def _shown_before(cell):
    """Return the element before a cell; a cell that only glues shows nothing."""
    siblings = cell.parent.children[: cell.parent.index(cell)]
    return next((node for node in reversed(siblings) if node.children), None)


def _output_of(cell):
    (*_, last) = cell.children
    return last.children if last.get("nb_element") == "cell_code_output" else []


def _is_claim(node):
    return isinstance(node, nodes.raw) and node.astext().startswith(CLAIM)


def _label_of(cell):
    first, *_ = cell.astext().splitlines()
    return first.lstrip("# ") if first.startswith("#") else ""


def _joined(labels):
    """Say once what consecutive labels begin with: ``Code: the law · figure 1``."""
    parts, last = [], None
    for label in labels:
        kind, colon, rest = label.partition(": ")
        parts.append(rest if colon and kind == last else label)
        last = kind
    return " · ".join(parts)


def _move(run, container):
    for cell in run:
        cell.parent.remove(cell)
        container.append(cell)


def _fold(run):
    """Put the code of all cells, perhaps with outputs, into one fold; other outputs become one, behind it."""
    head, *others = run
    labels = dict.fromkeys(filter(None, map(_label_of, run)))
    folded, output = fold(label=_joined(labels) or UNLABELED), []
    for cell in run:
        code, *shown = cell.children
        folded.append(code)
        if cell["with_output"]:
            folded.extend(shown)
        elif output:  # claims of one statement in several cells are one row
            output[0].extend(part for node in shown for part in node.children)
        else:
            output.extend(shown)
    for cell in others:
        cell.parent.remove(cell)
    head.children = []
    head.extend([folded, *output])
