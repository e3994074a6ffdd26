"""The ledger: every check of every claim of the book in one table, read from the notebooks' stored outputs."""

import html
import json
from collections.abc import Iterator, Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np

from helpers.lab.claims import ClaimError, percent
from helpers.lab.registry import REGISTRY, RegisteredClaim, miscounted, places, read_chapters
from helpers.lab.tables import Html, Table

ROOT = Path(__file__).parents[2]  # of the repository, with the book; an installed package has none
HEADERS = (
    "Claim",
    "Case",
    "Source",
    "Derived",
    "Formula or bound",
    "Simulated or computed",
    "z",
    "Would catch",
    "Held",
)
# On the page a claim is stated once, and its checks have these columns.
COLUMNS = ("Check", *HEADERS[3:])
KINDS = {"agree": "simulation", "exact": "exact", "bounded": "bound"}
ORDERS = {"": "as in the book", "z": "largest |z| first", "sharp": "sharpest first", "blunt": "least sharp first"}


class Ledger(Table):
    """A table of all checks, sortable and filterable on the HTML page, with totals on top.

    Parameters
    ----------
    root : Path
        The repository's folder: ``_toc.yml`` gives the order of the chapters, ``book`` holds their notebooks.
    registry : path
        The folder of the chapters' files.

    Raises
    ------
    ClaimError
        If a claim is checked more or less often than it is registered, or in two notebooks, or a stored check failed.
    """

    def __init__(self, root: Path = ROOT, registry: Traversable = REGISTRY) -> None:
        claims = _claims_in_reading_order(root, registry)
        records, pages = _records(root / "book")
        problems = miscounted(claims, (id for id, found in records.items() for _ in found))
        if problems:
            raise ClaimError("; ".join(problems))
        self.totals = _totals(records)
        rows = [_row(record, claim.source, pages[claim.id]) for claim in claims for record in records[claim.id]]
        ids = [f"{claim.id}.{number}" for claim in claims for number in range(1, claim.checks + 1)]
        super().__init__(HEADERS, rows, row_ids=ids)
        self._parts = {place.chapter: place.part for place in places(root / "_toc.yml")}
        self._claims, self._pages, self._records = claims, pages, records

    def __repr__(self) -> str:
        return f"{self.totals}\n{super().__repr__()}"

    def _repr_html_(self) -> str:
        chapters = dict.fromkeys(claim.id.partition(".")[0] for claim in self._claims)
        parts = dict.fromkeys(self._parts.get(name, "") for name in chapters)
        filters = "".join(
            [
                _select("part", "Part", {"": "all"} | {part: part for part in parts}),
                _select("chapter", "Chapter", {"": "all"} | {name: name for name in chapters}),
                _select("kind", "Kind", {"": "all"} | KINDS),
                _select("order", "Order", ORDERS),
            ]
        )
        head = "".join(f'<th scope="col">{name}</th>' for name in COLUMNS)
        body = "".join(map(self._html_group, self._claims))
        return (
            f'<div class="ledger"><p class="ledger-totals">{html.escape(self.totals)}</p>'
            f'<p class="ledger-filters" hidden>{filters}<label>Search <input type="search"></label> '
            f'<span role="status"></span></p><div class="ledger-scroll" tabindex="0" role="region" '
            f'aria-label="All checks of all claims"><table><thead><tr>{head}</tr></thead>{body}</table></div></div>'
        )

    def _html_group(self, claim: RegisteredClaim) -> str:
        """A claim: a row that states it, and a row for each of its checks."""
        chapter = claim.id.partition(".")[0]
        part = html.escape(self._parts.get(chapter, ""))
        link = f'<a href="{self._pages[claim.id]}#{claim.id}">{claim.id}</a>'
        rows = (_html_check(f"{claim.id}.{k}", record) for k, record in enumerate(self._records[claim.id], 1))
        return (
            f'<tbody data-part="{part}" data-chapter="{chapter}"><tr class="ledger-claim">'
            f'<th scope="rowgroup" colspan="{len(COLUMNS)}">{link} '
            f"{html.escape(claim.title)} <small>{html.escape(claim.source)}</small></th></tr>{''.join(rows)}</tbody>"
        )


def stored_claims(notebook: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the records of all claims in a notebook's stored outputs, in order.

    Parameters
    ----------
    notebook : mapping
        A notebook as JSON gives it.

    Returns
    -------
    list of dict
        What ``agree``, ``exact`` and ``bounded`` put under ``claim`` in the metadata of their outputs.
    """
    outputs = (output for cell in notebook["cells"] for output in cell.get("outputs", []))
    return [output["metadata"]["claim"] for output in outputs if "claim" in output.get("metadata", {})]


def _claims_in_reading_order(root: Path, registry: Traversable) -> list[RegisteredClaim]:
    registered = read_chapters(registry)
    listed = [place.chapter for place in places(root / "_toc.yml") if place.chapter in registered]
    return [claim for name in dict.fromkeys([*listed, *registered]) for claim in registered[name].claims]


def _notebooks(book: Path) -> Iterator[Path]:
    return (path for path in sorted(book.rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts)


def _records(book: Path) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """Return what the notebooks store of each claim, and the page where it is checked."""
    records, pages = {}, {}
    for path in _notebooks(book):
        page = path.relative_to(book).with_suffix(".html").as_posix()
        for record in stored_claims(json.loads(path.read_text(encoding="utf-8"))):
            id = record["id"]
            if pages.setdefault(id, page) != page:
                raise ClaimError(f"{id} is checked in {pages[id]} and in {page}")
            if not record["passed"]:
                raise ClaimError(f"{id} failed in {path.name}: {'; '.join(record['problems'])}")
            records.setdefault(id, []).append(record)
    return records, pages


def _totals(records: Mapping[str, list[dict[str, Any]]]) -> str:
    checks = [record for found in records.values() for record in found]
    kinds = {kind: sum(record["kind"] == kind for record in checks) for kind in ("agree", "exact", "bounded")}
    scores = np.concatenate([np.ravel(record["z"]) for record in checks if record["kind"] == "agree"] or [[]])
    largest = f", largest |z| {np.abs(scores).max():.2f} of {scores.size}" if scores.size else ""
    return (
        f"{len(records)} claims, {len(checks)} checks, all held: "
        f"{kinds['agree']} simulations against formulas{largest}; "
        f"{kinds['exact']} exact comparisons; {kinds['bounded']} bounds"
    )


def _row(record: Mapping[str, Any], source: str, page: str) -> list[str | Html]:
    link = Html(f'<a href="{page}#{record["id"]}">{record["id"]}</a>', record["id"])
    return [link, record["case"], source, *_figures(record)]


def _figures(record: Mapping[str, Any]) -> list[str]:
    """Return the cells of HEADERS[3:]."""
    derived = z = catches = ""
    at = record["shown"]
    if record["kind"] == "agree":
        derived = "" if record["derived"] is None else _figure(record["derived"], at)
        theory = _figure(record["formula"], at)
        simulated = f"{_figure(record['simulated'], at)} ± {np.ravel(record['stderr'])[at]:.2g}"
        z, catches = f"{np.ravel(record['z'])[at]:+.2f}", percent(record["would_catch"])
    elif record["kind"] == "exact":
        theory, simulated = _figure(record["formula"], at), _figure(record["computed"], at)
    else:
        theory, simulated = f"≤ {_figure(record['bound'], at)}", record["seen"]
    return [derived, theory, simulated, z, catches, "✓"]


def _figure(numbers: Any, at: int) -> str:
    return f"{np.ravel(numbers)[at]:.5g}"


def _select(name: str, label: str, options: Mapping[str, str]) -> str:
    listed = "".join(
        f'<option value="{html.escape(key)}">{html.escape(text)}</option>' for key, text in options.items()
    )
    return f'<label>{label} <select name="{name}">{listed}</select></label> '


def _html_check(id: str, record: Mapping[str, Any]) -> str:
    """A row for one check, which other pages can link to, with the figures by which it is sorted."""
    figures = ""
    if record["kind"] == "agree":
        figures = f' data-z="{np.abs(record["z"]).max():.4g}" data-catches="{record["would_catch"]:.4g}"'
    name = record["case"] or f"check {id.rpartition('.')[2]}"
    cells = "".join(
        f'<td data-label="{label}">{html.escape(cell)}</td>'
        for label, cell in zip(COLUMNS[1:], _figures(record), strict=True)
    )
    link = f'<a href="#{id}" title="Link to this check">{html.escape(name)}</a>'
    return f'<tr id="{id}" data-kind="{record["kind"]}"{figures}><th scope="row">{link}</th>{cells}</tr>'
