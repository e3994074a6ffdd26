"""How long a chapter is: what counts as story, as visible code, and as neither."""

import pytest

from helpers.lab.reading import Length, length_of


def text(source):
    return {"cell_type": "markdown", "source": source, "metadata": {}}


def code(source, *tags, output=()):
    outputs = [{"output_type": "display_data", "data": dict.fromkeys(output, "")}] if output else []
    return {"cell_type": "code", "source": source, "metadata": {"tags": list(tags)}, "outputs": outputs}


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("Two words.", 2),
        ("A single letter does not count", 5),
        ("Formulas $x+very+long$ and {term}`batches <batch>` do not.", 4),
        ("Above.\n\n```{dropdown} Answer\nHidden words.\n```\nBelow.", 2),
        ("Above.\n\n````{dropdown} Deeper\n```{note}\nHidden.\n```\n````\nBelow.", 2),
    ],
)
def test_words_of_the_story_are_counted(source, words):
    assert length_of([text(source)]).words == words


def test_visible_lines_are_counted_by_section_without_empty_ones():
    cells = [code("a\nb"), text("## One"), code("c\n\nd"), text("### Part"), code("e"), text("## Two"), code("f")]
    assert length_of(cells).visible == {"": 2, "One": 3, "Two": 1}


@pytest.mark.parametrize(("tag", "lines"), [("hide-input", 2), ("hide-cell", 2), ("remove-input", 0)])
def test_folded_code_is_not_visible_and_removed_code_is_not_there(tag, lines):
    found = length_of([code("a\nb", tag)])
    assert (found.visible, found.code) == ({}, lines)


def test_exercises_are_left_out_up_to_the_next_section():
    cells = [text("## Exercises\n\nDo it."), code("a"), text("Solved."), text("## Claims"), code("b")]
    found = length_of(cells)
    assert (found.words, found.visible, found.code) == (1, {"Claims": 1}, 1)


@pytest.mark.parametrize(
    ("forms", "figures"),
    [(("image/png", "text/plain"), 1), (("application/vnd.plotly.v1+json", "text/html"), 1), (("text/html",), 0)],
)
def test_figures_are_counted(forms, figures):
    assert length_of([code("draw()", output=forms)]).figures == figures


@pytest.mark.parametrize(
    ("words", "figures", "code", "story", "workbench"),
    [(3000, 0, 0, 15, 15), (3000, 7, 0, 20, 20), (3000, 8, 0, 25, 25), (3000, 0, 500, 15, 65), (10, 0, 0, 5, 5)],
)
def test_minutes_are_given_in_steps_of_five(words, figures, code, story, workbench):
    length = Length(words, figures, {}, code)
    assert (length.story, length.workbench) == (story, workbench)
