"""The ledger: every check of every claim of the book in one table, read from the notebooks' stored outputs."""

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from helpers.lab.claims import REGISTRY, ClaimError, percent, source_of

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


class Ledger:
    """A table of all checks, sortable and filterable on the HTML page, with totals on top.

    Parameters
    ----------
    registry : Path
        ``claims.yml``; the notebooks are those below its folder.

    Raises
    ------
    ClaimError
        If a registered claim was not checked in exactly one notebook, a checked one is not registered, or a stored
        check failed.
    """

    def __init__(self, registry: Path = REGISTRY) -> None:
        registered = yaml.safe_load(registry.read_text(encoding="utf-8")) or {}
        records, homes = {id: [] for id in registered}, {}
        for path in sorted(registry.parent.rglob("*.ipynb")):
            if ".ipynb_checkpoints" in path.parts:
                continue
            for record in stored_claims(json.loads(path.read_text(encoding="utf-8"))):
                page = path.relative_to(registry.parent).with_suffix(".html").as_posix()
                if record["id"] not in records:
                    raise ClaimError(f"{record['id']} is checked in {path.name} but not registered in {registry.name}")
                if homes.setdefault(record["id"], page) != page:
                    raise ClaimError(f"{record['id']} is checked in {homes[record['id']]} and in {page}")
                if not record["passed"]:
                    raise ClaimError(f"{record['id']} failed in {path.name}: {'; '.join(record['problems'])}")
                records[record["id"]].append(record)
        missing = [id for id, found in records.items() if not found]
        if missing:
            raise ClaimError(f"registered but checked in no notebook: {', '.join(missing)}")
        self.rows = [
            _row(record, homes[id], source_of(registered[id])) for id, found in records.items() for record in found
        ]
        self.totals = _totals(records)

    def __repr__(self) -> str:
        lines = ["  ".join(filter(None, (f"{row['id']}", *row["cells"]))) for row in self.rows]
        return "\n".join([self.totals, *lines])

    def _repr_html_(self) -> str:
        chapters = dict.fromkeys(row["chapter"] for row in self.rows)
        options = "".join(f'<option value="{name}">{name}</option>' for name in chapters)
        head = "".join(f'<th scope="col">{name}</th>' for name in HEADERS)
        return (
            f'<div class="ledger"><p class="ledger-totals">{html.escape(self.totals)}</p>'
            f'<p class="ledger-filters" hidden><label>Chapter <select><option value="">all</option>{options}</select>'
            f'</label> <label>Search <input type="search"></label> <span role="status"></span></p>'
            f'<div class="ledger-scroll" tabindex="0" role="region" aria-label="All checks of all claims"><table>'
            f"<thead><tr>{head}</tr></thead><tbody>{''.join(map(_html_row, self.rows))}</tbody></table></div></div>"
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


def _row(record: Mapping[str, Any], page: str, source: str) -> dict[str, Any]:
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
    cells = (record["case"], source, derived, theory, simulated, z, catches)
    return {"id": record["id"], "chapter": record["id"].partition(".")[0], "page": page, "cells": cells}


def _figure(numbers: Any, at: int) -> str:
    return f"{np.ravel(numbers)[at]:.5g}"


def _html_row(row: Mapping[str, Any]) -> str:
    labeled = zip(HEADERS[1:], (*row["cells"], "✓"), strict=True)
    cells = "".join(f'<td data-label="{label}">{html.escape(cell)}</td>' for label, cell in labeled)
    link = f'<a href="{row["page"]}#{row["id"]}">{row["id"]}</a>'
    return f'<tr data-chapter="{row["chapter"]}"><th scope="row">{link}</th>{cells}</tr>'
