"""The extension that finishes the pages: which scripts, icons and buttons a built book has."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from fontTools.ttLib import TTFont
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).parents[1]
FIGURE = '<div class="slider-figure"><script type="application/json">{}</script></div>'
ADDRESS = "https://github.com/owner/repository"


def notebook(*outputs):
    cell = new_code_cell("answer = f(1)", execution_count=1, outputs=[new_output("display_data", x) for x in outputs])
    language = {"language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    return new_notebook(cells=[new_markdown_cell("# A chapter"), cell], metadata=language)


def build(folder, address=""):
    """Build a book of three pages with the configuration and the extension of ours."""
    for part in ("_ext", "_static", "_templates", "images"):
        shutil.copytree(ROOT / "book" / part, folder / "book" / part)
    shutil.copyfile(ROOT / "book/references.bib", folder / "book/references.bib")
    config = (ROOT / "_config.yml").read_text(encoding="utf-8")
    assert config.count('url: ""') == 1
    (folder / "_config.yml").write_text(config.replace('url: ""', f'url: "{address}"'), encoding="utf-8")
    (folder / "_toc.yml").write_text("format: jb-book\nroot: book/index\nchapters:\n- file: book/a\n- file: book/b\n")
    (folder / "book/index.md").write_text("# A book\n\nLet $x>0$, and $y$ too.\n\n```{tip}\nLook up.\n```\n")
    nbformat.write(notebook({"text/html": FIGURE, "text/plain": "A figure"}), folder / "book/a.ipynb")
    nbformat.write(notebook(), folder / "book/b.ipynb")
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


def test_only_pages_with_a_slider_figure_load_plotly(private):
    assert re.search(r'<script defer="defer" src="[^"]*plotly.min.js', text_of(private, "a.html"))
    assert "plotly" not in text_of(private, "b.html")
    for script in ("plotly/plotly.min.js", "sliders/sliders.js", "mathjax/tex-chtml.js"):
        assert (private / "_static" / script).stat().st_size > 500


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
    math = r'<span class="math notranslate nohighlight">'
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
