"""The ledger shows what the notebooks store, all of it, and refuses a book whose claims are not all checked."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import numpy as np
import pytest
import sympy as sp
import yaml

from helpers.lab.claims import REGISTRY, ClaimError, check_agree, check_bounded, check_exact
from helpers.lab.estimates import Estimate, proportion
from helpers.lab.ledger import HEADERS, Ledger, stored_claims

BOOK = REGISTRY.parent
N = 10**6
s, m = sp.symbols("s m", positive=True)
SETTINGS = [{"s": 2.0, "m": 3}, {"s": 0.5, "m": 8}, {"s": 3.5, "m": 5}]
# In standard errors; the last setting agrees worst.
OFF = np.array([0.5, -1.0, -2.0])


def variance(s, m):
    return s**2 / m


VALUES = np.array([variance(**setting) for setting in SETTINGS])
SPREAD = Estimate(VALUES * (1 + 0.0013 * OFF), VALUES * 0.0013, N, 0)


def number(id="tiny.number", case="", offset=0.4, formula=0.125, **options):
    simulated = Estimate(formula + abs(formula) * 0.001 * offset, abs(formula) * 0.001, N, 0)
    return check_agree(id, simulated, formula=formula, case=case, **options)


def several(id="tiny.several", case="", derived=s**2 / m):
    return check_agree(id, SPREAD, formula=variance, derived=derived, at=SETTINGS, case=case)


def equal(id="tiny.equal", case=""):
    return check_exact(id, [0.25, 0.5], [0.25, 0.5], case=case)


def below(id="tiny.below", case=""):
    # The second entry is the tightest, though the first is nearer to its bound in absolute terms.
    return check_bounded(id, [0.5, 99.0], bound=[1.0, 100.0], attained=(1.0, 1.0), case=case)


def write_book(folder, registry, notebooks):
    """Write claims.yml and notebooks that store these claims, and return the path of claims.yml."""
    for name, claims in notebooks.items():
        cells = [nbformat.v4.new_markdown_cell("# A chapter"), nbformat.v4.new_code_cell("pass")]
        for claim in claims:
            data, metadata = claim._repr_mimebundle_()
            outputs = [
                nbformat.v4.new_output("stream", name="stdout", text="a line\n"),
                nbformat.v4.new_output("display_data", data=data, metadata=metadata),
                nbformat.v4.new_output("execute_result", data={"text/plain": "1"}),
            ]
            cells.append(nbformat.v4.new_code_cell("agree(…)", outputs=outputs))
        path = folder / f"{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    path = folder / "claims.yml"
    path.write_text(yaml.safe_dump(registry, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def ledger_of(folder, *claims, source="A §1"):
    """The ledger of a book of one notebook that checks these claims."""
    registry = {claim.id: {"title": "A title", "source": source} for claim in claims}
    return Ledger(write_book(folder, registry, {"part/tiny": claims}))


class Table(HTMLParser):
    """The links and the texts of a table's body, by rows, and the names of all tags."""

    def __init__(self, source):
        super().__init__()
        self.rows, self.links, self.tags = [], [], []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag == "a":
            self.links.append(attributes["href"])

    def handle_data(self, data):
        if self.rows:
            self.rows[-1][-1] += data


# What it shows


def test_a_row_shows_every_figure_of_a_claim(tmp_path):
    (row,) = ledger_of(tmp_path, several(case="gaussian")).rows
    assert row["id"] == "tiny.several"
    assert row["chapter"] == "tiny"
    cells = dict(zip(HEADERS[1:], row["cells"], strict=False))
    assert cells == {
        "Case": "gaussian",
        "Source": "A §1",
        "Derived": "2.45",
        "Formula or bound": "2.45",
        "Simulated or computed": "2.4436 ± 0.0032",
        "z": "-2.00",
        "Would catch": "1.1 %",
    }


@pytest.mark.parametrize("worst", [0, 1, 2])
def test_of_several_entries_the_worst_is_shown(tmp_path, worst):
    off = np.where(np.arange(3) == worst, -3.0, 1.0)
    simulated = Estimate(VALUES * (1 + 0.001 * off), VALUES * 0.001, N, 0)
    claim = check_agree("tiny.several", simulated, formula=variance, derived=s**2 / m, at=SETTINGS)
    (row,) = ledger_of(tmp_path, claim).rows
    assert row["cells"][2:4] == (f"{VALUES[worst]:.5g}",) * 2
    assert row["cells"][5] == "-3.00"


def test_the_worst_entry_of_a_matrix_is_shown(tmp_path):
    formula = np.array([[1.0, 2.0], [4.0, 8.0]])
    off = np.array([[0.0, 1.0], [3.0, -2.0]])
    claim = check_agree("tiny.matrix", Estimate(formula * (1 + 0.001 * off), formula * 0.001, N, 0), formula=formula)
    (row,) = ledger_of(tmp_path, claim).rows
    assert row["cells"][2:6] == ("", "4", "4.012 ± 0.004", "+3.00")


def test_of_several_bounds_the_tightest_is_shown(tmp_path):
    (row,) = ledger_of(tmp_path, below()).rows
    assert row["cells"] == ("", "A §1", "", "≤ 100", "99", "", "")


def test_an_exact_claim_shows_two_figures(tmp_path):
    (row,) = ledger_of(tmp_path, equal(case="quadrature")).rows
    assert row["cells"] == ("quadrature", "A §1", "", "0.25", "0.25", "", "")


def shown_by_row(cells, kind):
    """What a claim's row holds of its ledger's cells."""
    _, _, derived, theory, simulated, z, catches = cells
    if kind == "agree":
        return f"{derived} = {theory}" if derived else theory, f"≈ {simulated}  z {z}  would catch {catches}"
    return (f"{theory} = {simulated}  equal",) if kind == "exact" else (f"{simulated} {theory}",)


@pytest.mark.parametrize(
    "claim",
    [
        number(),
        number(formula=1.2e-7, offset=-3.3),
        number(formula=-123456.0),
        number(derived=sp.Rational(1, 8)),
        several(),
        several(derived=None),
        equal(),
        below(),
        check_bounded("tiny.below", -3.0, bound=-2.0, control=(1.0, 0.0)),
        # Resolved to twice its size only: 160 %.
        check_agree("tiny.number", Estimate(1.0, 0.2, N, 0), formula=1.0, resolution=2.0),
        # To eight digits 1.23455, which would be rounded up.
        check_exact("tiny.equal", 1.23454996, 1.23454996),
    ],
    ids=lambda claim: claim.row,
)
def test_figures_are_those_of_the_claims_row(tmp_path, claim):
    (row,) = ledger_of(tmp_path, claim).rows
    for text in shown_by_row(row["cells"], claim.kind):
        assert text in claim.row


@pytest.mark.parametrize(
    ("observed", "shown"),
    [(Estimate(0.25, 0.01, N, 0), "0.25 ± 0.01"), (proportion(np.arange(8) < 3), "3 of 8")],
)
def test_a_bound_on_an_estimate_shows_how_sure_it_is(tmp_path, observed, shown):
    claim = check_bounded("tiny.below", observed, bound=0.9, control=(1.0, 0.9))
    (row,) = ledger_of(tmp_path, claim).rows
    assert row["cells"][3:5] == ("≤ 0.9", shown)


def test_claims_without_a_source_are_beyond_the_sources(tmp_path):
    registry = {"tiny.number": {"title": "A title"}, "tiny.equal": {"title": "A title", "source": "B §2, #7"}}
    ledger = Ledger(write_book(tmp_path, registry, {"part/tiny": [number(), equal()]}))
    assert [row["cells"][1] for row in ledger.rows] == ["beyond the sources", "B §2, #7"]


def test_totals_count_claims_checks_and_scores(tmp_path):
    claims = [number(), number(case="again"), several(), equal(), equal(case="again"), equal(case="thrice"), below()]
    assert ledger_of(tmp_path, *claims).totals == (
        "4 claims, 7 checks, all held: 3 simulations against formulas, largest |z| 2.00 of 5; "
        "3 exact comparisons; 1 bounds"
    )


def test_totals_without_a_simulation_have_no_largest_score(tmp_path):
    assert ledger_of(tmp_path, equal()).totals == (
        "1 claims, 1 checks, all held: 0 simulations against formulas; 1 exact comparisons; 0 bounds"
    )


def test_rows_follow_the_registry_and_within_a_claim_the_notebook(tmp_path):
    ids = ["second.b", "first.d", "second.a", "first.c"]
    notebooks = {
        "one/first": [number("first.c"), number("first.d", "x"), equal("first.d", "a")],
        "two/second": [below("second.a"), several("second.b")],
    }
    ledger = Ledger(write_book(tmp_path, {id: {"title": id} for id in ids}, notebooks))
    assert [(row["id"], row["cells"][0]) for row in ledger.rows] == [
        ("second.b", ""),
        ("first.d", "x"),
        ("first.d", "a"),
        ("second.a", ""),
        ("first.c", ""),
    ]


def test_the_text_holds_totals_and_every_row(tmp_path):
    ledger = ledger_of(tmp_path, number(case="digits"), equal())
    assert repr(ledger).splitlines() == [
        ledger.totals,
        "tiny.number  digits  A §1  0.125  0.12505 ± 0.00013  +0.40  0.8 %",
        "tiny.equal  A §1  0.25  0.25",
    ]


def test_the_page_holds_every_cell(tmp_path):
    ledger = ledger_of(tmp_path, several(), number(case="digits"), equal(), below())
    head, *body = Table(ledger._repr_html_()).rows
    assert head == list(HEADERS)
    assert body == [[row["id"], *row["cells"], "✓"] for row in ledger.rows]


def test_rows_link_to_the_place_of_their_claim(tmp_path):
    notebooks = {"one/deeper/first": [number("first.a")], "top": [number("top.a")], "two/first": [number("first.b")]}
    registry = {id: {"title": id} for id in ("first.a", "first.b", "top.a")}
    ledger = Ledger(write_book(tmp_path, registry, notebooks))
    assert Table(ledger._repr_html_()).links == [
        "one/deeper/first.html#first.a",
        "two/first.html#first.b",
        "top.html#top.a",
    ]


def test_chapters_to_filter_by_are_those_of_the_rows(tmp_path):
    claims = [number("tiny.a"), number("other.b"), number("tiny.c")]
    page = ledger_of(tmp_path, *claims)._repr_html_()
    assert re.findall(r'<option value="(.*?)">(.*?)</option>', page) == [
        ("", "all"),
        ("tiny", "tiny"),
        ("other", "other"),
    ]
    assert re.findall(r'<tr data-chapter="(.*?)">', page) == ["tiny", "other", "tiny"]


def test_text_is_escaped_on_the_page(tmp_path):
    case, source = "<b>bold</b> & 'quoted'", 'A <script>alert("§1")</script>'
    ledger = ledger_of(tmp_path, number(case=case), source=source)
    page = ledger._repr_html_()
    table = Table(page)
    assert table.rows[1][1:3] == [case, source]
    assert not {"b", "script"} & set(table.tags)
    assert "<b>" not in page
    assert "<script>" not in page


# What it refuses


def test_a_registered_claim_must_be_checked(tmp_path):
    registry = {id: {"title": id} for id in ("tiny.absent", "tiny.number", "tiny.missing")}
    path = write_book(tmp_path, registry, {"part/tiny": [number()]})
    with pytest.raises(ClaimError, match=r"^registered but checked in no notebook: tiny\.absent, tiny\.missing$"):
        Ledger(path)


def test_a_checked_claim_must_be_registered(tmp_path):
    path = write_book(tmp_path, {"tiny.number": {"title": "A title"}}, {"part/tiny": [number(), equal()]})
    with pytest.raises(ClaimError, match=r"^tiny\.equal is checked in tiny\.ipynb but not registered in claims\.yml$"):
        Ledger(path)


@pytest.mark.parametrize("names", [("one/tiny", "two/other"), ("one/tiny", "two/tiny")])
def test_a_claim_must_be_checked_in_one_notebook_only(tmp_path, names):
    notebooks = {name: [number(case=str(index))] for index, name in enumerate(names)}
    path = write_book(tmp_path, {"tiny.number": {"title": "A title"}}, notebooks)
    first, second = (re.escape(f"{name}.html") for name in names)
    with pytest.raises(ClaimError, match=rf"^tiny\.number is checked in {first} and in {second}$"):
        Ledger(path)


@pytest.mark.parametrize(
    "claim",
    [
        number("tiny.slug", offset=9),
        check_exact("tiny.slug", 1.0, 1.1),
        check_bounded("tiny.slug", 1.1, bound=1.0, attained=(1.0, 1.0)),
    ],
    ids=lambda claim: claim.kind,
)
def test_a_stored_claim_must_have_passed(tmp_path, claim):
    with pytest.raises(ClaimError, match=r"^tiny\.slug failed in tiny\.ipynb: ") as error:
        ledger_of(tmp_path, number(), claim)
    assert str(error.value).endswith(claim.problems[0])


def test_a_book_without_notebooks_checks_nothing(tmp_path):
    with pytest.raises(ClaimError, match=r"^registered but checked in no notebook: tiny\.number$"):
        Ledger(write_book(tmp_path, {"tiny.number": {"title": "A title"}}, {}))


@pytest.mark.parametrize("folder", [".ipynb_checkpoints", "part/.ipynb_checkpoints"])
def test_checkpoints_are_ignored(tmp_path, folder):
    notebooks = {
        "part/tiny": [number()],
        f"{folder}/tiny-checkpoint": [number(), number(offset=9), number("tiny.unregistered")],
    }
    ledger = Ledger(write_book(tmp_path, {"tiny.number": {"title": "A title"}}, notebooks))
    assert [row["page"] for row in ledger.rows] == ["part/tiny.html"]


# The book's own ledger


def notebooks_of_the_book():
    return [path for path in sorted(BOOK.rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts]


def copy_of_the_book(folder):
    for path in [REGISTRY, *notebooks_of_the_book()]:
        copy = folder / path.relative_to(BOOK)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return folder / REGISTRY.name


def stored_ledger():
    cells = json.loads((BOOK / "ledger.ipynb").read_text(encoding="utf-8"))["cells"]
    (output,) = [output for cell in cells for output in cell.get("outputs", [])]
    return "".join(output["data"]["text/plain"])


def change_first_digit(value):
    """Return a number whose first digit that is not 0 is another one: 0.0123 becomes 0.0223."""
    text = repr(value)
    at = re.search("[1-9]", text).start()
    return float(f"{text[:at]}{int(text[at]) % 9 + 1}{text[at + 1 :]}")


def test_the_stored_ledger_is_that_of_the_stored_notebooks():
    assert stored_ledger() == repr(Ledger())


def test_figures_of_the_stored_ledger_are_those_of_the_claims_rows():
    records = [r for path in notebooks_of_the_book() for r in stored_claims(json.loads(path.read_text("utf-8")))]
    by_id = {}
    for record in records:
        by_id.setdefault(record["id"], []).append(record)
    rows = Ledger().rows
    assert len(rows) == len(records)
    for row in rows:
        record = by_id[row["id"]].pop(0)
        for text in shown_by_row(row["cells"], record["kind"]):
            assert text in record["row"]


@pytest.mark.parametrize("figure", ["simulated", "stderr", "z", "formula"])
def test_a_changed_digit_in_a_notebook_makes_the_stored_ledger_stale(tmp_path, figure):
    registry = copy_of_the_book(tmp_path)
    assert stored_ledger() == repr(Ledger(registry))
    path = next(tmp_path.glob("*/*.ipynb"))
    notebook = json.loads(path.read_text(encoding="utf-8"))
    record = next(record for record in stored_claims(notebook) if record["kind"] == "agree")
    numbers = np.array(record[figure], dtype=float)
    numbers.flat[record["shown"]] = change_first_digit(numbers.flat[record["shown"]].item())
    record[figure] = numbers.tolist()
    path.write_text(json.dumps(notebook), encoding="utf-8")
    assert stored_ledger() != repr(Ledger(registry))


def test_a_changed_source_makes_the_stored_ledger_stale(tmp_path):
    registry = copy_of_the_book(tmp_path)
    entries = yaml.safe_load(registry.read_text(encoding="utf-8"))
    next(iter(entries.values()))["source"] = "C §9"
    registry.write_text(yaml.safe_dump(entries, sort_keys=False), encoding="utf-8")
    assert stored_ledger() != repr(Ledger(registry))


def test_the_book_is_found_from_whatever_folder(tmp_path, monkeypatch):
    before = repr(Ledger())
    monkeypatch.chdir(tmp_path)
    assert repr(Ledger()) == before
    assert Path(REGISTRY).is_absolute()
