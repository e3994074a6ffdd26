"""Tables: one way to print them, as aligned text in a terminal and as accessible HTML on a page."""

import html
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

# What a column of numbers holds: 148 ± 8, -0.5, ≤ 100, 1.1 %, 3 of 8, nan, or nothing.
NUMBER = re.compile(r"[≤≈]? ?[+-]?(\d.*|nan|inf)|")


@dataclass(frozen=True)
class Html:
    """A cell that is more than text, such as a link.

    Parameters
    ----------
    markup : str
        What the page shows, with its text already escaped.
    text : str
        What a terminal shows.
    """

    markup: str
    text: str


class Table:
    """A table that shows itself as text and as HTML.

    The first cell of a row is the row's header: it names what the others are about.

    Parameters
    ----------
    header : sequence of str
        The names of the columns.
    rows : sequence of sequences of (str or Html)
        As many cells a row as there are columns.
    caption : str
        What the table shows, above it.
    note : str
        What it amounts to, below it.
    row_ids : sequence of str, optional
        Anchors, one a row, to which other pages can link.

    Raises
    ------
    ValueError
        If a row has more or fewer cells than there are columns, or there are not as many ids as rows.

    Examples
    --------
    >>> Table(["layer", "forward", "backward"], [["in", "1.5", "0.25"], ["out", "12", "1"]], note="It grows.")
    layer  forward  backward
    in         1.5      0.25
    out         12         1
    It grows.
    """

    def __init__(
        self,
        header: Sequence[str],
        rows: Sequence[Sequence[str | Html]],
        *,
        caption: str = "",
        note: str = "",
        row_ids: Sequence[str] | None = None,
    ) -> None:
        for row in rows:
            if len(row) != len(header):
                raise ValueError(f"a row must have {len(header)} cells, one a column, got {len(row)}: {list(row)}")
        if row_ids is not None and len(row_ids) != len(rows):
            raise ValueError(f"there must be {len(rows)} row_ids, one a row, got {len(row_ids)}")
        self.header, self.rows = list(header), [list(row) for row in rows]
        self.caption, self.note, self.row_ids = caption, note, row_ids

    def __repr__(self) -> str:
        rows = [self.header, *([_text(cell) for cell in row] for row in self.rows)]
        columns = [_align(column) for column in zip(*rows, strict=True)]
        lines = ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]
        return "\n".join(filter(None, [self.caption, *lines, self.note]))

    def _repr_html_(self) -> str:
        caption = f"<caption>{html.escape(self.caption)}</caption>" if self.caption else ""
        note = f"<p>{html.escape(self.note)}</p>" if self.note else ""
        head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in self.header)
        ids = [None] * len(self.rows) if self.row_ids is None else self.row_ids
        body = "".join(self._html_row(id, row) for id, row in zip(ids, self.rows, strict=True))
        table = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
        return f'<table class="claims">{caption}{table}</table>{note}'

    def _html_row(self, id: str | None, row: Sequence[str | Html]) -> str:
        first, *others = [_markup(cell) for cell in row]
        # Where the style lays a row out as a card, on a phone, each cell is shown with its label.
        labels = [html.escape(name) for name in self.header[1:]]
        cells = "".join(f'<td data-label="{label}">{cell}</td>' for label, cell in zip(labels, others, strict=True))
        anchor = "" if id is None else f' id="{html.escape(id)}"'
        return f'<tr{anchor}><th scope="row">{first}</th>{cells}</tr>'


def _text(cell: str | Html) -> str:
    return cell.text if isinstance(cell, Html) else cell


def _markup(cell: str | Html) -> str:
    return cell.markup if isinstance(cell, Html) else html.escape(cell)


def _align(column: Sequence[str]) -> list[str]:
    """Pad the cells of a column to one width: numbers on the left, words on the right."""
    width = max(map(_width, column))
    numbers = all(NUMBER.fullmatch(cell) for cell in column[1:])
    fills = [" " * (width - _width(cell)) for cell in column]
    return [fill + cell if numbers else cell + fill for fill, cell in zip(fills, column, strict=True)]


def _width(text: str) -> int:
    """Count the places that a text takes; the accent of L̂ takes none."""
    return sum(not unicodedata.combining(character) for character in text)
