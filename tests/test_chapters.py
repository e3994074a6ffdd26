"""A chapter is four files and its lines in _toc.yml: everything else that the book says of it is made from them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

from helpers.lab.claims import check_exact
from helpers.lab.ledger import ROOT, Ledger
from tests import book_promises

PART = "IV · Differentiating through randomness"
ADDRESS = "https://github.com/owner/repository"
PAGE = "book/differentiation/dummy"
FILES = {
    "helpers/dummy.py": '''"""What the dummy holds."""


def half(x: float) -> float:
    """Return x/2."""
    return x / 2
''',
    "helpers/registry/dummy.yml": "title: A dummy, of all things\nmodule: halves\nclaims:\n"
    "  half: {title: Half of 1 is 0.5, source: 'A §6, B §1.1', checks: 1}\n",
    "tests/test_dummy.py": "",
}


def write_dummy(root):
    """Add a chapter by its four files and its two lines in _toc.yml, and by nothing else."""
    for name, text in FILES.items():
        (root / name).write_text(text, encoding="utf-8")
    data, metadata = check_exact("dummy.half", 0.5, 0.5)._repr_mimebundle_()
    output = new_output("display_data", data=data, metadata=metadata)
    write_notebook(
        root / f"{PAGE}.ipynb",
        new_markdown_cell("# A dummy, of all things\n\n```{prf:theorem}\n:label: dummy.half\nIt is 0.5.\n```"),
        new_code_cell('exact("dummy.half", 0.5, half(1))', execution_count=1, outputs=[output]),
    )
    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    _, first, *_, package = toc["parts"]
    assert (first["caption"][:4], package["caption"]) == ("I · ", "The package")
    # Behind the first part, so that it moves the numbers of the chapters that follow.
    toc["parts"].insert(2, {"caption": PART, "numbered": True, "chapters": [{"file": PAGE}]})
    package["chapters"][0]["sections"].append({"file": "book/api/dummy"})
    (root / "_toc.yml").write_text(yaml.safe_dump(toc, sort_keys=False, allow_unicode=True), encoding="utf-8")


def write_notebook(path, *cells):
    path.parent.mkdir(exist_ok=True)
    language = {"language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=list(cells), metadata=language), path)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The book with one chapter more."""
    root = tmp_path_factory.mktemp("book")
    for folder in ("book", "helpers"):
        shutil.copytree(
            ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        )
    (root / "tests").mkdir()
    for name in ("_config.yml", "_toc.yml", *(path.relative_to(ROOT) for path in ROOT.glob("tests/test_*.py"))):
        shutil.copy(ROOT / name, root / name)
    write_dummy(root)
    return root


@pytest.fixture(scope="module")
def built(copy):
    """The pages of that book, with no more of the other notebooks than their titles, which is faster."""
    root = copy.with_name(f"{copy.name}-short")
    shutil.copytree(copy, root)
    for path, cells in book_promises.notebooks(root):
        if path.stem != "dummy":
            write_notebook(path, new_markdown_cell(book_promises.source(cells[0]).splitlines()[0]))
    config = (root / "_config.yml").read_text(encoding="utf-8")
    (root / "_config.yml").write_text(config.replace('url: ""', f'url: "{ADDRESS}"'), encoding="utf-8")
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", str(root), "-n"]
    # Without -W: other pages refer to what the shortened notebooks no longer have.
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not re.findall(r".*dummy.*WARNING.*|.*WARNING.*dummy.*", done.stderr)
    return root / "_build/html/book"


def rows(built, page):
    """The rows of a page's first table, as text, and with the pages that they link to."""
    table = re.search(r"<table.*?</table>", (built / page).read_text(encoding="utf-8"), flags=re.DOTALL).group()
    found = []
    for row in re.findall(r"<tr.*?</tr>", table, flags=re.DOTALL):
        cells = re.findall(r"<t[hd].*?</t[hd]>", row, flags=re.DOTALL)
        links = re.findall(r'href="([^"#]+)', row)
        found.append(([re.sub("<[^>]+>", "", cell).strip() for cell in cells], links))
    return found


def row(built, page, start):
    (found,) = [(cells, links) for cells, links in rows(built, page) if cells[0] == start]
    return found


def test_such_a_book_keeps_every_promise_about_its_chapters(copy):
    for promise in (
        book_promises.missing_pages,
        book_promises.incomplete_chapters,
        book_promises.unmatched_claims,
        book_promises.unmapped_sources,
        book_promises.undocumented_modules,
    ):
        assert promise(copy) == []


def items(built):
    """What stands on the front page behind the parts' captions, and which pages it leads to."""
    found = re.findall(r"<li>(?!<p><strong>)(.*?)</li>", (built / "index.html").read_text(encoding="utf-8"), re.DOTALL)
    return {re.sub("<[^>]+>", "", item).strip(): re.findall(r'href="([^"#]+)', item) for item in found}


def test_the_front_page_lists_it_with_its_number(built):
    assert items(built)["3 A dummy, of all things"] == ["differentiation/dummy.html"]


def test_the_front_page_names_each_part_with_its_question_and_no_chapter_to_come(built):
    page = re.sub("<[^>]+>", "", (built / "index.html").read_text(encoding="utf-8"))
    plan = yaml.safe_load((ROOT / "book/to_come.yml").read_text(encoding="utf-8"))
    for part in plan:
        assert re.search(rf"{re.escape(part)}\.\s+\w", page), part
    assert "Gradient estimators" not in page


def test_the_rows_of_its_sources_lead_to_it(built):
    cells, links = row(built, "source_map.html", "A §6")
    assert cells[3:] == ["3 A dummy, of all things, Gradient estimators", "in part"]
    assert links == ["differentiation/dummy.html"]
    cells, links = row(built, "source_map.html", "B §1.1")
    assert cells[3:] == ["1 The loss is a random variable, 3 A dummy, of all things", "ready"]
    assert links == ["training_loop/minibatch_loss.html", "differentiation/dummy.html"]
    others = [cells for cells, links in rows(built, "source_map.html") if "differentiation/dummy.html" not in links]
    assert len(others) == len(rows(built, "source_map.html")) - 2


def test_the_reference_has_a_row_and_a_page_for_its_module(built):
    cells, links = row(built, "api.html", "helpers.dummy")
    assert cells == ["helpers.dummy", "chapter 3: halves"]
    assert links == ["api/dummy.html"]
    page = (built / "api/dummy.html").read_text(encoding="utf-8")
    assert "Chapter 3" in page
    assert 'id="helpers.dummy.half"' in page


def test_pages_that_are_made_offer_no_edit(built):
    offer = f"{ADDRESS}/edit/main/book/"
    assert f"{offer}api/lab.md" in (built / "api/lab.html").read_text(encoding="utf-8")
    assert offer not in (built / "api/dummy.html").read_text(encoding="utf-8")


def test_the_ledger_has_its_checks_in_its_place(copy):
    book = Ledger().row_ids
    before = [id for id in book if id.partition(".")[0] in ("minibatch_loss", "gradient_noise")]
    ledger = Ledger(copy, copy / "helpers/registry")
    assert ledger.row_ids == [*before, "dummy.half.1", *book[len(before) :]]
    (link,) = [row[0].markup for row in ledger.rows if row[0].text == "dummy.half"]
    assert link == '<a href="differentiation/dummy.html#dummy.half">dummy.half</a>'


def test_the_chapters_behind_it_have_other_numbers(built):
    number, title = "4", "Variance propagation and weight initialization"
    assert f"{number} {title}" in items(built)
    assert row(built, "source_map.html", "A §2")[0][3] == f"{number} {title}"
    assert row(built, "api.html", "helpers.initialization")[0][1].startswith(f"chapter {number}: ")
    assert f"Chapter {number}" in (built / "api/initialization.html").read_text(encoding="utf-8")
    notation = [(cells[-1], links) for cells, links in rows(built, "notation.html") if links]
    assert (number, ["signal_propagation/initialization.html"]) in notation
    chapters = len(list((ROOT / "helpers/registry").glob("*.yml"))) + 1  # and the dummy, which has no symbols
    assert {cell for cell, _ in notation} == {str(k) for k in range(1, chapters + 1)} - {"3"}
