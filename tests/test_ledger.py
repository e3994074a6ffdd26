"""The ledger shows what the notebooks store, all of it, and refuses a book whose claims are not all checked."""

import itertools
import json
import re
import shutil
from collections import Counter, defaultdict
from html.parser import HTMLParser

import nbformat
import numpy as np
import pytest
import sympy as sp
import yaml

from helpers.lab.claims import ClaimError, check_agree, check_bounded, check_exact
from helpers.lab.estimates import Estimate, proportion
from helpers.lab.ledger import HEADERS, ROOT, Ledger, stored_claims
from helpers.lab.registry import REGISTRY

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


def write_notebook(path, claims):
    """Write a notebook that stores these claims."""
    cells = [nbformat.v4.new_markdown_cell("# A chapter"), nbformat.v4.new_code_cell("pass")]
    for claim in claims:
        data, metadata = claim._repr_mimebundle_()
        outputs = [
            nbformat.v4.new_output("stream", name="stdout", text="a line\n"),
            nbformat.v4.new_output("display_data", data=data, metadata=metadata),
            nbformat.v4.new_output("execute_result", data={"text/plain": "1"}),
        ]
        cells.append(nbformat.v4.new_code_cell("agree(…)", outputs=outputs))
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)


def write_registry(folder, registered):
    """Write the chapters' files for claims by their ids; each is checked once and has a title unless it says more."""
    folder.mkdir(exist_ok=True)
    chapters = defaultdict(dict)
    for id, entry in registered.items():
        chapter, _, slug = id.partition(".")
        chapters[chapter][slug] = {"title": "A title", "checks": 1} | entry
    for chapter, claims in chapters.items():
        text = yaml.safe_dump({"title": "A", "module": "B", "claims": claims}, sort_keys=False, allow_unicode=True)
        (folder / f"{chapter}.yml").write_text(text, encoding="utf-8")


def ledger_of_book(folder, registered, notebooks):
    """The ledger of a book of one part, which stores the claims of its notebooks."""
    for name, claims in notebooks.items():
        write_notebook(folder / "book" / f"{name}.ipynb", claims)
    write_registry(folder / "registry", registered)
    chapters = [{"file": f"book/{name}"} for name in notebooks]
    toc = {"root": "book/index", "parts": [{"caption": "I", "numbered": True, "chapters": chapters}]}
    (folder / "_toc.yml").write_text(yaml.safe_dump(toc), encoding="utf-8")
    return Ledger(folder, folder / "registry")


def ledger_of(folder, *claims, source="A §1"):
    """The ledger of a book of one notebook that checks these claims."""
    counts = Counter(claim.id for claim in claims)
    registered = {id: {"source": source, "checks": count} for id, count in counts.items()}
    return ledger_of_book(folder, registered, {"part/tiny": claims})


def figures(row):
    """What a row shows between the claim's name and whether it held."""
    return tuple(row[1:-1])


class Page(HTMLParser):
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
    assert row[0].text == "tiny.several"
    assert row[-1] == "✓"
    assert dict(zip(HEADERS[1:-1], figures(row), strict=True)) == {
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
    assert figures(row)[2:4] == (f"{VALUES[worst]:.5g}",) * 2
    assert figures(row)[5] == "-3.00"


def test_the_worst_entry_of_a_matrix_is_shown(tmp_path):
    formula = np.array([[1.0, 2.0], [4.0, 8.0]])
    off = np.array([[0.0, 1.0], [3.0, -2.0]])
    claim = check_agree("tiny.matrix", Estimate(formula * (1 + 0.001 * off), formula * 0.001, N, 0), formula=formula)
    (row,) = ledger_of(tmp_path, claim).rows
    assert figures(row)[2:6] == ("", "4", "4.012 ± 0.004", "+3.00")


def test_of_several_bounds_the_tightest_is_shown(tmp_path):
    (row,) = ledger_of(tmp_path, below()).rows
    assert figures(row) == ("", "A §1", "", "≤ 100", "99", "", "")


def test_an_exact_claim_shows_two_figures(tmp_path):
    (row,) = ledger_of(tmp_path, equal(case="quadrature")).rows
    assert figures(row) == ("quadrature", "A §1", "", "0.25", "0.25", "", "")


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
        check_agree("tiny.number", Estimate(1.1, 0.2, N, 0), formula=1.0, resolution=2.0),
        # To eight digits 1.23455, which would be rounded up.
        check_exact("tiny.equal", 1.23454996, 1.23454996),
    ],
    ids=lambda claim: claim.row,
)
def test_figures_are_those_of_the_claims_row(tmp_path, claim):
    (row,) = ledger_of(tmp_path, claim).rows
    for text in shown_by_row(figures(row), claim.kind):
        assert text in claim.row


@pytest.mark.parametrize(
    ("observed", "shown"),
    [(Estimate(0.25, 0.01, N, 0), "0.25 ± 0.01"), (proportion(np.arange(8) < 3), "3 of 8")],
)
def test_a_bound_on_an_estimate_shows_how_sure_it_is(tmp_path, observed, shown):
    claim = check_bounded("tiny.below", observed, bound=0.9, control=(1.0, 0.9))
    (row,) = ledger_of(tmp_path, claim).rows
    assert figures(row)[3:5] == ("≤ 0.9", shown)


def test_claims_without_a_source_are_beyond_the_sources(tmp_path):
    registered = {"tiny.number": {}, "tiny.equal": {"source": "B §2, #7"}}
    ledger = ledger_of_book(tmp_path, registered, {"part/tiny": [number(), equal()]})
    assert [figures(row)[1] for row in ledger.rows] == ["beyond the sources", "B §2, #7"]


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


def test_rows_follow_the_chapters_then_the_registry_then_the_notebook(tmp_path):
    registered = {"first.d": {"checks": 2}, "second.b": {}, "second.a": {}, "first.c": {}}
    notebooks = {
        "two/second": [below("second.a"), several("second.b")],
        "one/first": [number("first.c"), number("first.d", "x"), equal("first.d", "a")],
    }
    ledger = ledger_of_book(tmp_path, registered, notebooks)
    assert [(row[0].text, figures(row)[0]) for row in ledger.rows] == [
        ("second.b", ""),
        ("second.a", ""),
        ("first.d", "x"),
        ("first.d", "a"),
        ("first.c", ""),
    ]
    assert ledger.row_ids == ["second.b.1", "second.a.1", "first.d.1", "first.d.2", "first.c.1"]


def test_the_text_holds_totals_and_every_row(tmp_path):
    ledger = ledger_of(tmp_path, number(case="digits"), equal())
    totals, head, *body = repr(ledger).splitlines()
    assert totals == ledger.totals
    assert re.split(" {2,}", head) == list(HEADERS)
    assert [re.split(" {2,}", line) for line in body] == [
        ["tiny.number", "digits", "A §1", "0.125", "0.12505 ± 0.00013", "+0.40", "0.8 %", "✓"],
        ["tiny.equal", "A §1", "0.25", "0.25", "✓"],
    ]


def test_the_page_states_each_claim_once_and_holds_every_cell(tmp_path):
    ledger = ledger_of(tmp_path, several(), several(case="again"), number(case="digits"), equal(), below())
    head, *body = Page(ledger._repr_html_()).rows
    assert head == ["Check", *HEADERS[3:]]
    wanted = []
    for id, checks in itertools.groupby(ledger.rows, lambda row: row[0].text):
        wanted.append([f"{id} A title A §1"])
        wanted += [[row[1] or f"check {k}", *row[3:]] for k, row in enumerate(checks, 1)]
    assert body == wanted


def test_claims_link_to_their_place_and_checks_to_themselves(tmp_path):
    notebooks = {"one/deeper/first": [number("first.a")], "two/second": [number("second.b"), equal("second.b", "c")]}
    ledger = ledger_of_book(tmp_path, {"first.a": {}, "second.b": {"checks": 2}}, notebooks)
    page = ledger._repr_html_()
    assert Page(page).links == [
        "one/deeper/first.html#first.a",
        "#first.a.1",
        "two/second.html#second.b",
        "#second.b.1",
        "#second.b.2",
    ]
    assert re.findall(r'<tr id="(.*?)"', page) == ["first.a.1", "second.b.1", "second.b.2"]


def test_what_one_can_filter_by_is_what_there_is(tmp_path):
    notebooks = {"one/tiny": [number("tiny.a"), number("tiny.c")], "two/other": [equal("other.b")]}
    ledger = ledger_of_book(tmp_path, {"tiny.a": {}, "tiny.c": {}, "other.b": {}}, notebooks)
    page = ledger._repr_html_()
    options = {
        name: re.findall(r'<option value="(.*?)">', listed)
        for name, listed in re.findall(r'<select name="(\w+)">(.*?)</select>', page)
    }
    assert options["part"] == ["", "I"]
    assert options["chapter"] == ["", "tiny", "other"]
    assert options["kind"] == ["", "agree", "exact", "bounded"]
    assert re.findall(r'<tbody data-part="(.*?)" data-chapter="(.*?)">', page) == [
        ("I", "tiny"),
        ("I", "tiny"),
        ("I", "other"),
    ]
    assert re.findall(r'data-kind="(\w+)"', page) == ["agree", "agree", "exact"]


def test_simulations_can_be_sorted_by_score_and_sharpness(tmp_path):
    page = ledger_of(tmp_path, several(), equal())._repr_html_()
    ((z, catches),) = re.findall(r'data-z="(.*?)" data-catches="(.*?)"', page)
    assert float(z) == pytest.approx(2.0)  # the largest of OFF, without its sign
    assert float(catches) == pytest.approx(several().figures["would_catch"], rel=1e-3)


def test_text_is_escaped_on_the_page(tmp_path):
    case, source = "<b>bold</b> & 'quoted'", 'A <script>alert("§1")</script>'
    ledger = ledger_of(tmp_path, number(case=case), source=source)
    page = ledger._repr_html_()
    table = Page(page)
    assert table.rows[1] == [f"tiny.number A title {source}"]
    assert table.rows[2][0] == case
    assert not {"b", "script"} & set(table.tags)
    assert "<b>" not in page
    assert "<script>" not in page


# What it refuses


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ([number()], "tiny.equal is checked nowhere, but registered with 2 checks"),
        ([number(), equal()], "tiny.equal is checked once, but registered with 2 checks"),
        ([number(), *[equal()] * 3], "tiny.equal is checked 3 times, but registered with 2 checks"),
        ([number(), *[equal()] * 2, below()], "tiny.below is checked once, but registered with no checks"),
    ],
)
def test_every_claim_must_be_checked_as_often_as_registered(tmp_path, claims, message):
    registered = {"tiny.number": {}, "tiny.equal": {"checks": 2}}
    with pytest.raises(ClaimError, match=f"^{re.escape(message)}$"):
        ledger_of_book(tmp_path, registered, {"part/tiny": claims})


@pytest.mark.parametrize("names", [("one/tiny", "two/other"), ("one/tiny", "two/tiny")])
def test_a_claim_must_be_checked_in_one_notebook_only(tmp_path, names):
    notebooks = {name: [number(case=str(index))] for index, name in enumerate(names)}
    first, second = (re.escape(f"{name}.html") for name in names)
    with pytest.raises(ClaimError, match=rf"^tiny\.number is checked in {first} and in {second}$"):
        ledger_of_book(tmp_path, {"tiny.number": {"checks": 2}}, notebooks)


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
    with pytest.raises(ClaimError, match=r"^tiny\.number is checked nowhere, but registered with 1 checks$"):
        ledger_of_book(tmp_path, {"tiny.number": {}}, {})


@pytest.mark.parametrize("folder", [".ipynb_checkpoints", "part/.ipynb_checkpoints"])
def test_checkpoints_are_ignored(tmp_path, folder):
    notebooks = {
        "part/tiny": [number()],
        f"{folder}/tiny-checkpoint": [number(), number(offset=9), number("tiny.unregistered")],
    }
    ledger = ledger_of_book(tmp_path, {"tiny.number": {}}, notebooks)
    assert Page(ledger._repr_html_()).links == ["part/tiny.html#tiny.number", "#tiny.number.1"]


# The book's own ledger


def notebooks_of_the_book():
    return [path for path in sorted((ROOT / "book").rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts]


def copy_of_the_book(folder):
    """Copy what the ledger reads, and return a function that reads the copy."""
    for path in [ROOT / "_toc.yml", *notebooks_of_the_book()]:
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    shutil.copytree(REGISTRY, folder / "registry")
    return lambda: Ledger(folder, folder / "registry")


def stored_ledger():
    cells = json.loads((ROOT / "book/ledger.ipynb").read_text(encoding="utf-8"))["cells"]
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
        record = by_id[row[0].text].pop(0)
        for text in shown_by_row(figures(row), record["kind"]):
            assert text in record["row"]


@pytest.mark.parametrize("figure", ["simulated", "stderr", "z", "formula"])
def test_a_changed_digit_in_a_notebook_makes_the_stored_ledger_stale(tmp_path, figure):
    ledger = copy_of_the_book(tmp_path)
    assert repr(ledger()) == repr(Ledger())
    path = next((tmp_path / "book").glob("*/*.ipynb"))
    notebook = json.loads(path.read_text(encoding="utf-8"))
    record = next(record for record in stored_claims(notebook) if record["kind"] == "agree")
    numbers = np.array(record[figure], dtype=float)
    numbers.flat[record["shown"]] = change_first_digit(numbers.flat[record["shown"]].item())
    record[figure] = numbers.tolist()
    path.write_text(json.dumps(notebook), encoding="utf-8")
    assert repr(ledger()) != repr(Ledger())


def test_a_changed_source_makes_the_stored_ledger_stale(tmp_path):
    ledger = copy_of_the_book(tmp_path)
    path = tmp_path / "registry/minibatch_loss.yml"
    fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    fields["claims"]["unbiased"]["source"] = "C §9"
    path.write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
    assert repr(ledger()) != repr(Ledger())


def test_the_book_is_found_from_whatever_folder(tmp_path, monkeypatch):
    before = repr(Ledger())
    monkeypatch.chdir(tmp_path)
    assert repr(Ledger()) == before
    assert ROOT.is_absolute()
