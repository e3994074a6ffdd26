"""The book keeps its promises, and each promise would notice a book that breaks it."""

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from helpers.lab import ledger
from tests import book_promises

ROOT = Path(__file__).parents[1]
CHAPTER = "book/part/chapter.ipynb"


@pytest.mark.parametrize("promise", book_promises.PROMISES, ids=lambda promise: promise.__name__)
def test_the_book_keeps_its_promise(promise):
    assert promise(ROOT) == []


# A small book that keeps all promises, and ways to break it.


def markdown_cell(text, id="prose"):
    return {"cell_type": "markdown", "id": id, "metadata": {}, "source": text}


def code_cell(code, count, outputs=(), id="code", **metadata):
    return {
        "cell_type": "code",
        "id": id,
        "metadata": metadata,
        "execution_count": count,
        "outputs": list(outputs),
        "source": code,
    }


def claim_output(id="chapter.claim", passed=True, case=""):
    claim = {"id": id, "case": case, "passed": passed}
    return {"output_type": "display_data", "data": {}, "metadata": {"claim": claim}}


def picture_output(drawn="<Figure size 300x200>\nx | y: line", *, says=None, size=(300, 200), ink=128):
    """A figure as a notebook stores it: what it draws, and a picture that says so, or something else."""
    picture, file, words = Image.new("L", size), io.BytesIO(), PngInfo()
    picture.putpixel((3, 4), ink)
    words.add_text("Description", drawn if says is None else says)
    picture.save(file, format="png", pnginfo=words)
    data = {"text/plain": drawn, "image/png": base64.b64encode(file.getvalue()).decode("ascii")}
    return {"output_type": "display_data", "data": data, "metadata": {}}


FIGURE = picture_output()
DESCRIBED = {"image": {"alt": "A line."}, "figure": {"caption": "See the line.", "name": "fig-line"}}
GLUED = {"output_type": "display_data", "data": {}, "metadata": {"scrapbook": {"name": "number"}}}
PROSE = """\
# A chapter

{prf:ref}`chapter.claim` {numref}`fig-line` {term}`batches <batch>` {term}`Batch` {cite:t}`one, two` {doc}`../page`
{chapter}`chapter` {ref}`here <a-label>` {glue:text}`chapter.ipynb::number:s`
```{prf:theorem}
:label: chapter.claim
```
```{image} ../images/a.svg
:alt: A picture.
```
"""


def chapter_cells():
    return [
        markdown_cell(PROSE),
        code_cell("from helpers.lab import device", 1, [claim_output(), GLUED], id="first"),
        code_cell("", None, id="empty"),
        code_cell("draw()", 2, [FIGURE], id="figure", mystnb=DESCRIBED),
    ]


@pytest.fixture
def root(tmp_path):
    files = {
        "_toc.yml": "root: book/page\nparts:\n"
        "- {caption: I, numbered: true, chapters: [file: book/part/chapter]}\n"
        "- chapters: [file: book/source_map, file: book/errata, file: book/toolbox]\n"
        "- chapters: [file: book/api/lab, file: book/api/chapter]\n",
        "book/page.md": "(a-label)=\n```{glossary}\nbatch\n  批量. Some examples.\n```\n",
        "book/references.bib": "@book{one,\n}\n@article{two,\n}\n",
        "helpers/registry/chapter.yml": "title: A chapter\nmodule: nothing\nclaims:\n"
        "  claim: {title: A, source: 'A §1, #123', erratum: wrong, checks: 1}\n",
        "book/source_map.md": "```{sources}\nA §1 | subject | #123, #124\nB §2 | another |\n```\n",
        "book/to_come.yml": "I: {}\nII:\n  later: {title: Later, source: B §2}\n",
        "book/toolbox.md": "**Why?** {py:func}`~helpers.chapter.answer` says.\n",
        "book/api/lab.md": "```{eval-rst}\n.. automodule:: helpers.lab.runtime\n   :members:\n```\n",
        "helpers/lab/__init__.py": "__all__ = ['device']\n",
        "tests/test_chapter.py": "",
        "book/errata.md": "(wrong)=\n",
        "helpers/lab/runtime.py": "import torch\ntorch.manual_seed(0)\ntorch.device('cpu')\n",
        "helpers/chapter.py": "import torch\n",
        "pyproject.toml": '[project]\ndependencies = ["numpy>=2"]\n'
        '[project.optional-dependencies]\nbook = ["sphinx<8"]\nconstraints = ["uv"]\n',
        "constraints.txt": "numpy==2.1\nsphinx==7.4 ; python_version < '4'\nuv==0.1\n",
        "environment.yml": "dependencies:\n- python=3.11\n- pip\n- pip:\n  - --constraint constraints.txt\n"
        "  - --editable .[book]\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    write_chapter(tmp_path, chapter_cells())
    return tmp_path


def write_chapter(root, cells, name=CHAPTER):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(json.dumps({"cells": cells}), encoding="utf-8")


def replace(root, name, old, new):
    text = (root / name).read_text(encoding="utf-8")
    assert old in text
    (root / name).write_text(text.replace(old, new), encoding="utf-8")


def the_problem(promise, root):
    (problem,) = promise(root)
    return problem


@pytest.mark.parametrize("promise", book_promises.PROMISES, ids=lambda promise: promise.__name__)
def test_a_good_book_has_no_problems(root, promise):
    assert promise(root) == []


def test_a_page_that_does_not_exist_is_noticed(root):
    (root / "book/errata.md").unlink()
    assert the_problem(book_promises.missing_pages, root) == "_toc.yml: book/errata does not exist"


@pytest.mark.parametrize("name", ["book/part/other.ipynb", "book/other.md"])
def test_a_page_that_is_not_listed_is_noticed(root, name):
    write_chapter(root, [], name)
    assert the_problem(book_promises.missing_pages, root) == f"{name} is not in _toc.yml"


def test_checkpoints_are_not_pages(root):
    write_chapter(root, [code_cell("x", None)], "book/part/.ipynb_checkpoints/chapter-checkpoint.ipynb")
    assert [problem for promise in book_promises.PROMISES for problem in promise(root)] == []


def test_a_claim_that_is_not_shown_is_noticed(root):
    replace(root, "helpers/registry/chapter.yml", "  claim:", "  other: {title: B, checks: 2}\n  claim:")
    problem = the_problem(book_promises.unmatched_claims, root)
    assert problem == "chapter.other is checked nowhere, but registered with 2 checks"


def test_a_check_too_many_is_noticed(root):
    write_chapter(root, [*chapter_cells(), code_cell("x", 3, [claim_output(case="again")], id="last")])
    problem = the_problem(book_promises.unmatched_claims, root)
    assert problem == "chapter.claim is checked 2 times, but registered with 1 checks"


def test_a_claim_that_is_not_registered_is_noticed(root):
    write_chapter(root, [*chapter_cells(), code_cell("x", 3, [claim_output("chapter.new")], id="last")])
    problem = the_problem(book_promises.unmatched_claims, root)
    assert problem == f"{CHAPTER} [3] (last): chapter.new is not registered"


def test_a_failed_claim_is_noticed(root):
    replace(root, "helpers/registry/chapter.yml", "checks: 1", "checks: 2")
    write_chapter(root, [*chapter_cells(), code_cell("x", 3, [claim_output(passed=False)], id="last")])
    problem = the_problem(book_promises.unmatched_claims, root)
    assert problem == f"{CHAPTER} [3] (last): chapter.claim is stored as failed"


def test_two_checks_of_one_name_are_noticed(root):
    write_chapter(root, [*chapter_cells(), code_cell("x", 3, [claim_output(), claim_output(case="b")], id="last")])
    problem = the_problem(book_promises.repeated_cases, root)
    assert problem == f"{CHAPTER}: 2 checks of chapter.claim have the case ''"


def test_a_claim_in_two_notebooks_is_noticed(root):
    replace(root, "helpers/registry/chapter.yml", "checks: 1", "checks: 2")
    write_chapter(root, chapter_cells(), "book/part/twin.ipynb")
    problem = the_problem(book_promises.unmatched_claims, root)
    assert problem == f"chapter.claim is shown in more than one notebook: {CHAPTER}, book/part/twin.ipynb"


@pytest.mark.parametrize(("count", "shown", "place"), [(None, "None", "[ ]"), (1, "1", "[1]"), (7, "7", "[7]")])
def test_a_cell_that_was_not_executed_in_its_turn_is_noticed(root, count, shown, place):
    write_chapter(root, [*chapter_cells(), code_cell("x", count, id="last")])
    problem = the_problem(book_promises.unexecuted_cells, root)
    assert problem == f"{CHAPTER} {place} (last): execution count {shown}, wanted 3"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"output_type": "error", "ename": "KeyError"}, "stores the error KeyError"),
        ({"output_type": "stream", "name": "stderr", "text": "!"}, "stores text on stderr"),
    ],
)
def test_stored_errors_and_stderr_are_noticed(root, output, message):
    write_chapter(root, [*chapter_cells(), code_cell("x", 3, [output], id="last")])
    assert the_problem(book_promises.unexecuted_cells, root) == f"{CHAPTER} [3] (last): {message}"


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"figure": {"caption": "See."}}, "a figure without alt text"),
        ({"image": {"alt": "  "}, "figure": {"caption": "See."}}, "a figure without alt text"),
        ({"image": {"alt": "A line."}}, "a figure without a caption"),
    ],
)
def test_a_figure_without_a_description_is_noticed(root, described, message):
    write_chapter(root, [*chapter_cells(), code_cell("x", 3, [FIGURE], id="last", mystnb=described)])
    assert the_problem(book_promises.undescribed_figures, root) == f"{CHAPTER} [3] (last): {message}"


def without_picture(output):
    return {**output, "data": {"text/plain": output["data"]["text/plain"]}}


def broken(output):
    return {**output, "data": output["data"] | {"image/png": output["data"]["image/png"][:60]}}


def bound_output(seen):
    claim = {
        "id": "chapter.claim",
        "case": "",
        "passed": True,
        "kind": "bounded",
        "bound": 2.0,
        "shown": 0,
        "seen": seen,
    }
    return {"output_type": "display_data", "data": {}, "metadata": {"claim": claim}}


def write_ledger(root, *outputs):
    """Store a ledger that shows these checks."""
    rows = (
        ledger._html_check(f"chapter.claim.{k}", output["metadata"]["claim"]) for k, output in enumerate(outputs, 1)
    )
    page = {"output_type": "display_data", "data": {"text/html": list(rows)}, "metadata": {}}
    write_chapter(root, [code_cell("Ledger()", 1, [page])], "book/ledger.ipynb")


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        ([bound_output("1 in 100")], ""),
        ([bound_output("2 in 100")], f"1 checks are not those of {CHAPTER}"),
        ([], f"1 checks are not those of {CHAPTER}"),
        ([bound_output("1 in 100"), bound_output("1 in 100")], "1 checks are in no notebook"),
    ],
)
def test_a_stale_ledger_is_noticed_with_the_notebook_that_it_lacks(root, shown, message):
    write_chapter(root, [code_cell("x", 1, [bound_output("1 in 100")])])
    write_ledger(root, *shown)
    expected = [f"book/ledger.ipynb: {message}"] if message else []
    assert book_promises.stale_ledger(root) == expected


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([], "a caption without a figure"),
        ([without_picture(FIGURE)], "a figure without its picture"),
        ([FIGURE, without_picture(FIGURE)], "a figure without its picture"),
        ([broken(FIGURE)], "a picture that cannot be read"),
        ([picture_output(ink=0)], "a blank picture of 300 by 200 pixels"),
        ([picture_output(size=(300, 99))], "a blank picture of 300 by 99 pixels"),
        ([picture_output("a picture")], "a picture that does not say what it draws"),
        ([picture_output("<Figure size 300x200 with 1 Axes>")], "a picture that does not say what it draws"),
        ([picture_output(says="another")], "a picture of another figure: it draws 'another', not '<Figure size"),
    ],
)
def test_a_picture_that_is_not_the_figures_is_noticed(root, outputs, message):
    write_chapter(root, [*chapter_cells(), code_cell("x", 3, outputs, id="last", mystnb=DESCRIBED)])
    problem = the_problem(book_promises.unfaithful_pictures, root)
    assert problem.startswith(f"{CHAPTER} [3] (last): {message}")


def test_a_plotly_figure_without_its_html_form_is_noticed(root):
    output = {"output_type": "display_data", "data": {"application/vnd.plotly.v1+json": {}}, "metadata": {}}
    write_chapter(root, [*chapter_cells(), code_cell("x", 3, [output], id="last")])
    problem = the_problem(book_promises.figures_without_a_page, root)
    assert problem == f"{CHAPTER} [3] (last): a Plotly figure without its HTML form"


@pytest.mark.parametrize("text", ["```{image} a.svg\n:width: 100%\n```", "![](a.svg)"])
def test_an_image_without_alt_text_is_noticed(root, text):
    write_chapter(root, [*chapter_cells(), markdown_cell(text, id="last")])
    problem = the_problem(book_promises.undescribed_figures, root)
    assert problem == f"{CHAPTER} text behind [2] (last): the image a.svg has no alt text"


@pytest.mark.parametrize(
    "reference",
    [
        "{prf:ref}`chapter.other`",
        "{numref}`fig-other`",
        "{ref}`there <b-label>`",
        "{term}`batches <bach>`",
        "{cite:t}`one, three`",
        "{doc}`../pages`",
        "{chapter}`chapters`",
        "{glue:text}`chapter.ipynb::numbers:s`",
        "{glue:text}`other.ipynb::number:s`",
    ],
)
def test_a_reference_to_nothing_is_noticed(root, reference):
    write_chapter(root, [*chapter_cells(), markdown_cell(reference, id="last")])
    problem = the_problem(book_promises.unresolved_references, root)
    assert problem == f"{CHAPTER} text behind [2] (last): {reference} refers to nothing"


def test_a_reference_on_a_page_names_the_page(root):
    replace(root, "book/page.md", "(a-label)=", "(a-label)=\n{term}`bach`\n")
    assert the_problem(book_promises.unresolved_references, root) == "book/page.md: {term}`bach` refers to nothing"


@pytest.mark.parametrize(("old", "new"), [("A §1", "A §12"), ("#123", "#1234"), ("#123", "#12")])
def test_a_source_that_is_not_mapped_is_noticed(root, old, new):
    replace(root, "book/source_map.md", old, new)
    problem = the_problem(book_promises.unmapped_sources, root)
    assert problem == f"chapter.claim has the source {old}, which no row of source_map.md names"


def test_the_source_of_a_chapter_to_come_is_mapped_too(root):
    replace(root, "book/to_come.yml", "source: B §2", "source: 'B §2, B §3'")
    problem = the_problem(book_promises.unmapped_sources, root)
    assert problem == "later has the source B §3, which no row of source_map.md names"


def test_a_row_of_the_source_map_without_a_chapter_is_noticed(root):
    replace(root, "book/source_map.md", "B §2 |", "B §2 | another |\nC §3 | lost | #99\nB §2 |")
    problem = the_problem(book_promises.unmapped_sources, root)
    assert problem == "no chapter has the sources of a row of source_map.md: #99, C §3"


@pytest.mark.parametrize("file", ["helpers/chapter.py", "helpers/registry/chapter.yml", "tests/test_chapter.py"])
def test_a_chapter_without_one_of_its_files_is_noticed(root, file):
    (root / file).unlink()
    problem = the_problem(book_promises.incomplete_chapters, root)
    assert problem == f"chapter has no {file.replace('test_chapter', 'test_chapter*')}"


def test_tests_of_a_chapter_may_be_several_files(root):
    (root / "tests/test_chapter.py").rename(root / "tests/test_chapter_samplers.py")
    assert book_promises.incomplete_chapters(root) == []


def test_a_chapter_without_a_notebook_is_noticed(root):
    (root / CHAPTER).unlink()
    assert the_problem(book_promises.incomplete_chapters, root) == f"chapter has no {CHAPTER}"


def test_a_chapter_without_a_page_in_the_reference_is_noticed(root):
    replace(root, "_toc.yml", ", file: book/api/chapter", "")
    problem = the_problem(book_promises.incomplete_chapters, root)
    assert problem == "chapter has no line book/api/chapter in _toc.yml"


def test_a_registered_chapter_outside_of_the_book_is_noticed(root):
    text = (root / "helpers/registry/chapter.yml").read_text(encoding="utf-8")
    (root / "helpers/registry/other.yml").write_text(text, encoding="utf-8")
    problem = the_problem(book_promises.incomplete_chapters, root)
    assert problem == "other is registered, but no chapter of _toc.yml"


def test_a_chapter_with_another_title_is_noticed(root):
    replace(root, "helpers/registry/chapter.yml", "title: A chapter", "title: A chapter of mine")
    problem = the_problem(book_promises.incomplete_chapters, root)
    assert problem == "book/part/chapter.ipynb does not begin with its registered title: # A chapter of mine"


@pytest.mark.parametrize("name", ["helpers.chapters.answer", "helpers.lab.answer", "helpers.chapter"])
def test_a_chapter_without_a_place_in_the_toolbox_is_noticed(root, name):
    replace(root, "book/toolbox.md", "helpers.chapter.answer", name)
    problem = the_problem(book_promises.chapters_without_a_tool, root)
    assert problem == "toolbox.md names nothing of helpers.chapter"


def test_a_module_of_the_bench_without_a_place_in_the_reference_is_noticed(root):
    (root / "helpers/lab/runtimes.py").write_text("", encoding="utf-8")
    problem = the_problem(book_promises.undocumented_modules, root)
    assert problem == "helpers.lab.runtimes is on no page of book/api"


def test_the_bench_offers_what_notebooks_import(root):
    replace(root, "helpers/lab/__init__.py", "'device'", "'device', 'rng'")
    problem = the_problem(book_promises.names_of_the_bench, root)
    assert problem == "helpers.lab offers rng, which no notebook uses"
    replace(root, "helpers/lab/__init__.py", "'device', 'rng'", "")
    problem = the_problem(book_promises.names_of_the_bench, root)
    assert problem == "a notebook imports device, which helpers.lab does not offer"


def test_an_erratum_that_does_not_exist_is_noticed(root):
    replace(root, "book/errata.md", "(wrong)=", "(right)=")
    assert "has the erratum wrong" in the_problem(book_promises.missing_errata, root)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("torch.manual_seed(0)", "uses torch.manual_seed"),
        ("import time", "imports time"),
        ("x.to('cuda:1')", "names the device 'cuda:1'"),
    ],
)
def test_seeds_clocks_and_devices_are_noticed_in_notebooks_and_helpers(root, code, found):
    write_chapter(root, [*chapter_cells(), code_cell(code, 3, id="last")])
    assert the_problem(book_promises.hidden_state, root) == f"{CHAPTER} [3] (last): {found}"
    write_chapter(root, chapter_cells())
    (root / "helpers/chapter.py").write_text(code, encoding="utf-8")
    assert the_problem(book_promises.hidden_state, root) == f"helpers/chapter.py: {found}"


def test_what_one_cell_imports_another_may_not_use_in_secret(root):
    cells = code_cell("from scipy import stats as s", 3), code_cell("s.norm.rvs(3)", 4, id="last")
    write_chapter(root, [*chapter_cells(), *cells])
    found = the_problem(book_promises.hidden_state, root)
    assert found == f"{CHAPTER} [4] (last): draws by s.norm.rvs without rng(…) as random_state"


@pytest.mark.parametrize("code", ["rng('a')", "seeded('a')", "generator('a')"])
def test_a_stream_that_two_simulations_share_is_noticed(root, code):
    write_chapter(root, [*chapter_cells(), code_cell("generator('a')", 3), code_cell("generator('b')", 4)])
    assert book_promises.shared_streams(root) == []
    write_chapter(root, [*chapter_cells(), code_cell("generator('a')", 3), code_cell(code, 4)])
    assert the_problem(book_promises.shared_streams, root) == f"{CHAPTER}: 2 simulations draw from the stream 'a'"


def test_a_stream_of_a_helper_is_not_a_notebooks(root):
    (root / "helpers/chapter.py").write_text("def f():\n    return rng('a')\n", encoding="utf-8")
    assert book_promises.shared_streams(root) == []
    write_chapter(root, [*chapter_cells(), code_cell("generator('a')", 3)])
    assert the_problem(book_promises.shared_streams, root) == f"{CHAPTER}: 2 simulations draw from the stream 'a'"


def lines(count):
    return "x\n" * count


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([markdown_cell("word " * 3_001)], "3001 words, at most 3000"),
        ([code_cell(lines(16), 1)], "16 visible lines in the section '', at most 15"),
        (
            [cell for k in range(11) for cell in (markdown_cell(f"## {k}"), code_cell(lines(14), k))],
            "154 visible lines of code, at most 150",
        ),
    ],
)
def test_a_long_story_is_noticed(root, cells, message):
    write_chapter(root, cells)
    assert the_problem(book_promises.long_stories, root) == f"{CHAPTER}: {message}"


def test_a_story_may_be_as_long_as_its_limits(root):
    sections = [cell for k in range(10) for cell in (markdown_cell(f"## {k}"), code_cell(lines(15), k))]
    write_chapter(root, [markdown_cell("word " * 3_000), *sections])
    assert book_promises.long_stories(root) == []


@pytest.mark.parametrize("tag", ["hide-input", "hide-cell"])
def test_a_fold_that_does_not_say_what_it_holds_is_noticed(root, tag):
    write_chapter(root, [code_cell("# Code: figure 1\ndraw()", 1, tags=[tag]), code_cell("draw()", 2, tags=[tag])])
    problem = the_problem(book_promises.unlabeled_folds, root)
    assert problem == f"{CHAPTER} [2] (code): a folded cell must begin with a comment that says what it holds"


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("constraints.txt", "numpy==2.1", "numpy==1.9", "constraints.txt: numpy==1.9 is outside"),
        ("constraints.txt", "numpy==2.1", "numpy==2.1+cpu", "constraints.txt: numpy==2.1+cpu is not one exact version"),
        ("constraints.txt", "numpy==2.1", "numpy>=2.1", "constraints.txt: numpy>=2.1 is not one exact version"),
        ("constraints.txt", "numpy==2.1\n", "", "constraints.txt: numpy of pyproject.toml has no line"),
        ("pyproject.toml", "sphinx<8", "sphinx<7", "constraints.txt: sphinx==7.4"),
        ("environment.yml", "- pip\n", "- pip\n- numpy\n", "environment.yml: conda should install python and pip"),
        ("environment.yml", ".[book]", ".", "environment.yml: pip should get"),
        ("environment.yml", "  - --constraint constraints.txt\n", "", "environment.yml: pip should get"),
    ],
)
def test_packages_that_disagree_are_noticed(root, name, old, new, message):
    replace(root, name, old, new)
    assert the_problem(book_promises.disagreeing_packages, root).startswith(message)
