"""The extension that finishes the pages: which scripts, icons and buttons a built book has."""

import base64
import html
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from fontTools.ttLib import TTFont
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from plotly.offline import get_plotlyjs_version

from helpers.lab.claims import Claim
from helpers.lab.registry import read_chapter

ROOT = Path(__file__).parents[1]
LAYOUT = '{"layout": {"height": 420, "sliders": [{}, {}]}}'
FIGURE = f'<div class="slider-figure"><script type="application/json">{LAYOUT}</script></div>'
ADDRESS = "https://github.com/owner/repository"


CLAIM = '<details class="claim claim-passed"><summary>It holds.</summary></details>'
DEEPER = "Text.\n\n```{dropdown} Going deeper\nMore words.\n```"
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYPj/HwADAgH/p5Z4WQAAAABJRU5ErkJggg=="
DESCRIBED = {"mystnb": {"image": {"alt": "A dot."}, "figure": {"caption": "See the dot.", "name": "fig-dot"}}}
FRONT = """# A book

Let $x>0$, and $y$ too.

```{tip}
Look up.
```

```{stored-figure} a fig-dot
One *dot*.
```
"""
EXERCISE = """```{exercise-start} Easy
:label: easy
```
Do it.
```{exercise-end}
```

```{solution-start} easy
:class: dropdown
```
Done.
```{solution-end}
```"""


def claim(slug, case):
    shown = Claim(f"minibatch_loss.{slug}", case, "exact", f"row {case}", f"Sentence {case}.", {})
    return {"text/html": shown._repr_html_()}


def code_cell(source, *outputs, tag=None):
    shown = [new_output("display_data", output) for output in outputs]
    metadata = {"tags": [tag]} if tag else {}
    return new_code_cell(source, execution_count=1, outputs=shown, metadata=metadata)


def notebook(*cells):
    language = {"language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    return new_notebook(cells=list(cells), metadata=language)


def chapter_with_folds():
    return notebook(
        new_markdown_cell("# Folds\n\n*Prerequisites:* none.\n\nA story begins."),
        code_cell("# Code: a law\na = 1", tag="hide-input"),
        code_cell("# Code: another law\na = 2", tag="hide-input"),
        code_cell("glue(a)", tag="remove-input"),
        code_cell("# Check: the law\nb = 2", {"text/html": CLAIM}, tag="hide-input"),
        code_cell("# Check: the law\nc = 3", {"text/html": CLAIM}, tag="hide-input"),
        code_cell("# Code: figure <1>\nd = 4", {"text/plain": "FIGURE 1"}, tag="hide-input"),
        code_cell("# Code: figure 2\ne = 5", {"text/plain": "FIGURE 2"}, tag="hide-input"),
        code_cell("f = 6", {"text/plain": "OPEN"}),
        code_cell("g = 7", tag="hide-input"),
        new_markdown_cell(DEEPER),
        code_cell("# Check: deep\nh = 8", {"text/plain": "DEEP"}, tag="hide-cell"),
        new_markdown_cell("Text."),
        code_cell("# All\ni = 9", {"text/plain": "ALL"}, tag="hide-cell"),
        new_markdown_cell(EXERCISE),
    )


def build(folder, address=""):
    """Build a book of five pages with the configuration and the extension of ours."""
    for part in ("_ext", "_static", "_templates", "images"):
        shutil.copytree(ROOT / "book" / part, folder / "book" / part)
    shutil.copyfile(ROOT / "book/references.bib", folder / "book/references.bib")
    config = (ROOT / "_config.yml").read_text(encoding="utf-8")
    assert config.count('url: ""') == 1
    (folder / "_config.yml").write_text(config.replace('url: ""', f'url: "{address}"'), encoding="utf-8")
    pages = "".join(f"- file: book/{name}\n" for name in ("a", "b", "folds", "minibatch_loss"))
    (folder / "_toc.yml").write_text(f"format: jb-book\nroot: book/index\nchapters:\n{pages}")
    (folder / "book/index.md").write_text(FRONT, encoding="utf-8")
    title, call = new_markdown_cell("# A chapter"), "answer = f(1)"
    figure = {"text/html": FIGURE, "text/plain": "A figure"}
    picture = code_cell("draw()", {"image/png": PIXEL})
    picture.metadata |= DESCRIBED
    nbformat.write(notebook(title, code_cell(call, figure), picture), folder / "book/a.ipynb")
    nbformat.write(notebook(title, code_cell(call)), folder / "book/b.ipynb")
    nbformat.write(chapter_with_folds(), folder / "book/folds.ipynb")
    claims = code_cell("check()", claim("unbiased", "<a>"), claim("unbiased", "b"), claim("iid_variance", "c"))
    again = code_cell("check_again()", claim("iid_variance", "d"))
    folded = [code_cell(f"# Check: {case}", claim("unbiased", case), tag="hide-input") for case in ("e", "f")]
    nbformat.write(notebook(title, claims, again, *folded), folder / "book/minibatch_loss.ipynb")
    jupyter_book = str(Path(sys.executable).with_name("jupyter-book"))
    command = [jupyter_book, "build", str(folder), "-W", "-n", "--keep-going"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "_build/html"


@pytest.fixture(scope="module")
def private(tmp_path_factory):
    return build(tmp_path_factory.mktemp("private"))


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    return build(tmp_path_factory.mktemp("public"), ADDRESS)


def text_of(html, page):
    return (html / "book" / page).read_text(encoding="utf-8")


def hosts(page):
    return set(re.findall(r'(?:href|src)="(https?://[^/"]+)', page))


def scripts_of(page):
    return re.findall(r'<script ([^>]*src="[^"]*")', page)


def test_only_pages_with_a_slider_figure_load_what_draws_it(private):
    assert "figures/sliders.js" in text_of(private, "a.html")
    assert "figures/sliders.js" not in text_of(private, "b.html")
    for script in ("figures/plotly-basic.min.js", "figures/sliders.js", "mathjax/tex-chtml.js"):
        assert (private / "_static" / script).stat().st_size > 500


def test_the_height_of_a_slider_figure_is_reserved(private):
    assert re.search(
        r'class="slider-figure" style="--plot-height: 420px; --sliders: 2"><script', text_of(private, "a.html")
    )


def formulas():
    sys.path.insert(0, str(ROOT / "book/_ext"))
    return importlib.import_module("formulas")


@pytest.mark.parametrize(
    ("formula", "letters"),
    [
        # Of TeX's letters, in thousandths of an em: x 572, = 778, y 490, and 278 on each side of a relation.
        ("x", 572),
        ("x = y", 572 + 778 + 490 + 2 * 278),
        (r"x \le y", 572 + 778 + 490 + 2 * 278),
        (r"\mathbb E", 667),
        (r"\operatorname{Var}", 750 + 500 + 392),
    ],
)
def test_the_width_of_a_formula_is_that_of_its_letters(formula, letters):
    assert formulas().width_of(formula) == pytest.approx(1.13 * letters / 1000, rel=0.08)


def test_a_formula_reserves_its_width_unless_it_is_unknown():
    inline = r'<span class="math notranslate nohighlight">\({}\)</span>'
    assert re.search(r'nohighlight" style="--width: [\d.]+em">\\\(x', formulas().reserve_widths(inline.format("x")))
    unknown = inline.format(r"\unknowncommand")
    assert formulas().reserve_widths(unknown) == unknown


def test_plotly_is_the_version_that_notebooks_use():
    bundle = (ROOT / "book/_ext/plotly/plotly-basic.min.js").read_text(encoding="utf-8")
    assert f"plotly.js (basic - minified) v{get_plotlyjs_version()}\n" in bundle[:200], (
        "see book/_ext/plotly/README.txt"
    )


@pytest.mark.parametrize("page", ["index.html", "a.html", "b.html", "folds.html"])
def test_a_page_waits_for_one_script_only(private, page):
    (waits,) = [script for script in scripts_of(text_of(private, page)) if "defer" not in script]
    assert "documentation_options.js" in waits


@pytest.mark.parametrize(
    ("script", "pages"),
    [
        ("tex-chtml.js", {"index.html"}),
        ("togglebutton.js", {"folds.html"}),
        ("ledger.js", set()),
        ("_static/search.js", set()),
        ("design-tabs.js", set()),
    ],
)
def test_a_page_loads_only_the_scripts_that_it_needs(private, script, pages):
    loading = {
        page
        for page in ("index.html", "a.html", "b.html", "folds.html")
        if any(script in found for found in scripts_of(text_of(private, page)))
    }
    assert loading == pages


def test_no_page_knows_another_host_or_thebe(private):
    for page in ("index.html", "a.html", "b.html"):
        assert hosts(text_of(private, page)) == set()
        assert not re.search(r'THEBE_JS_URL|src="[^"]*thebe', text_of(private, page))


def test_one_setting_turns_on_colab_binder_and_edits(public):
    chapter = text_of(public, "a.html")
    assert f"{ADDRESS}/edit/main/book/a.ipynb" in chapter
    assert hosts(chapter) >= {"https://colab.research.google.com", "https://mybinder.org"}
    assert f"{ADDRESS}/edit/main/book/index.md" in text_of(public, "index.html")


def test_code_keeps_its_words_and_its_colored_parts(private):
    code = re.search(r"<pre>(.*?)</pre>", text_of(private, "b.html"), re.DOTALL)[1]
    assert re.sub(r"<[^>]*>", "", code).strip() == "answer = f(1)"
    assert '<span class="mi">1</span>' in code
    assert 'class="n"' not in code


def test_no_line_begins_with_the_comma_behind_a_formula(private):
    math = r'<span class="math notranslate nohighlight"[^>]*>'
    page = text_of(private, "index.html")
    assert re.search(
        rf'Let <span class="unbroken">{math}\\\(x&gt;0\\\)</span>,</span> and {math}\\\(y\\\)</span> too', page
    )


def test_icons_of_the_pages_are_there_and_the_others_are_gone(private):
    css = (private / "_static/styles/pydata-sphinx-theme.css").read_text(encoding="utf-8")
    names = set(re.findall(r'<i class="[^"]*\b(fa-[a-z-]+)"', text_of(private, "a.html"))) - {"fa-lg", "fa-solid"}
    font = TTFont(private / "_static/vendor/fontawesome/webfonts/fa-solid-900.woff")
    drawn = set(font.getBestCmap())
    assert len(names) > 3
    for name in names:
        rule = re.search(rf'\.{name}:before[^{{]*\{{content:"\\([0-9a-f]+)"', css)
        assert rule, name
        assert int(rule[1], 16) in drawn
    assert "fa-wheat-awn" not in css
    # The bulb of a tip stands in the style sheet as a character.
    assert 0xF0EB in drawn
    assert "woff2" not in css
    assert len(drawn) < 100


@pytest.fixture(scope="module")
def folds(private):
    """What each fold of the page says and holds, and the page without its folds."""
    page = re.sub(r"</?span[^>]*>", "", text_of(private, "folds.html"))
    fold = re.compile(r'<details class="fold"><summary>(.*?)</summary>(.*?)</details>', re.DOTALL)
    return fold.findall(page), fold.sub("FOLD", page)


def test_a_fold_says_what_it_holds_and_consecutive_ones_are_one(folds):
    labels = [label for label, _ in folds[0]]
    first = "Code: a law · another law · Check: the law · Code: figure &lt;1&gt;"
    assert labels == [first, "Code: figure 2", "Code", "All"]


def test_folded_code_is_complete_and_can_be_copied(folds):
    contents = [content for _, content in folds[0]]
    letters = [re.findall(r"\b([a-z]) = \d", content) for content in contents]
    assert letters == [["a", "a", "b", "c", "d"], ["e"], ["g"], ["i"]]
    assert all('class="highlight-' in content for content in contents)


def test_what_folded_code_shows_stands_behind_it_in_order(folds):
    order = re.findall(r"FOLD|It holds|FIGURE \d|OPEN|DEEP|ALL", folds[1])
    assert order == ["FOLD", *["It holds"] * 2, "FIGURE 1", "FOLD", "FIGURE 2", "OPEN", "FOLD", "DEEP", "FOLD"]
    assert "ALL" in folds[0][-1][1]


def test_a_hidden_cell_behind_a_dropdown_goes_into_it(folds):
    (deeper,) = re.findall(r'<details class="[^"]*sd-dropdown.*?</details>', folds[1], re.DOTALL)
    assert re.search(r"Going deeper.*More words.*# Check: deep\nh = 8.*DEEP", deeper, re.DOTALL)


def test_a_chapter_states_its_reading_times(folds):
    assert "<em>Reading time:</em> 5 minutes for the story, 5 with the code.</p>" in folds[1]


def test_the_header_of_a_solution_only_toggles(folds):
    header = re.search(
        r'class="solution dropdown admonition".*?<p class="admonition-title">(.*?)</p>', folds[1], re.DOTALL
    )
    assert header[1] == "Solution"


@pytest.fixture(scope="module")
def claim_lines(private):
    """Summary and checks of each claim's line."""
    page = text_of(private, "minibatch_loss.html")
    lines = re.findall(r'<details class="claim.*?</details>', page, re.DOTALL)
    return [(line.partition("</summary>")[0], re.findall(r"<li>(.*?)</li>", line)) for line in lines]


def test_the_line_of_a_claim_states_it_and_counts_its_checks(claim_lines):
    titles = {claim.id: html.escape(claim.title) for claim in read_chapter("minibatch_loss").claims}
    unbiased, variance = (titles[f"minibatch_loss.{slug}"] for slug in ("unbiased", "iid_variance"))
    texts = [re.sub(r"<[^>]*>", "", summary) for summary, _ in claim_lines]
    twice, once = f"✓ {unbiased} unbiased · 2 checks", f"✓ {variance} iid_variance"
    assert texts == [twice, once, once, twice]


def test_checks_of_a_claim_in_one_cell_or_one_fold_stand_under_its_line(claim_lines):
    checks = [[re.sub(r"<[^>]*>", "", check) for check in checks] for _, checks in claim_lines]
    escaped = "&lt;a&gt;"
    first = [f"{escaped}: Sentence {escaped}. row {escaped}", "b: Sentence b. row b"]
    last = ["e: Sentence e. row e", "f: Sentence f. row f"]
    assert checks == [first, ["c: Sentence c. row c"], ["d: Sentence d. row d"], last]


def test_the_front_page_shows_a_figure_that_a_notebook_stores(private):
    figure = re.search(r'<figure class="stored-figure.*?</figure>', text_of(private, "index.html"), re.DOTALL)[0]
    assert 'alt="A dot."' in figure
    assert "One <em>dot</em>." in figure
    shown = re.search(r'src="\.\./(_images/[^"]*)"', figure)[1]
    assert (private / shown).read_bytes() == base64.b64decode(PIXEL)


@pytest.mark.parametrize(
    ("page", "description", "title"),
    [
        ("index.html", "Let x&gt;0, and y too.", "Random Variables in Deep Learning"),
        ("folds.html", "A story begins.", "Folds"),
        ("b.html", "Deep learning explained through random variables", "A chapter"),
    ],
)
def test_a_page_says_in_its_head_what_it_is_about(private, page, description, title):
    head = text_of(private, page).partition("</head>")[0]
    found = dict(re.findall(r'<meta (?:name|property)="([\w:]+)" content="([^"]*)"', head))
    assert found["description"].startswith(description)
    assert found["og:description"] == found["description"]
    assert found["og:title"] == title
