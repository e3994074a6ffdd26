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

    def __repr__(self) -> str:
        return f"{self.totals}\n{super().__repr__()}"

    def _repr_html_(self) -> str:
        chapters = dict.fromkeys(id.partition(".")[0] for id in self.row_ids)
        options = "".join(f'<option value="{name}">{name}</option>' for name in chapters)
        return (
            f'<div class="ledger"><p class="ledger-totals">{html.escape(self.totals)}</p>'
            f'<p class="ledger-filters" hidden><label>Chapter <select><option value="">all</option>{options}</select>'
            f'</label> <label>Search <input type="search"></label> <span role="status"></span></p>'
            f'<div class="ledger-scroll" tabindex="0" role="region" aria-label="All checks of all claims">'
            f"{super()._repr_html_()}</div></div>"
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
    link = Html(f'<a href="{page}#{record["id"]}">{record["id"]}</a>', record["id"])
    return [link, record["case"], source, derived, theory, simulated, z, catches, "✓"]


def _figure(numbers: Any, at: int) -> str:
    return f"{np.ravel(numbers)[at]:.5g}"
