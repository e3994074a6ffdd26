"""A table is aligned as text, well-formed and escaped as HTML, and refuses rows that do not fit."""

import re
from html.parser import HTMLParser

import pytest

from helpers.lab.tables import Html, Table

LINK = Html('<a href="#x"><code>x</code></a>', "chapter.x")


class Cells(HTMLParser):
    """Tag, attributes and text of everything in a piece of HTML, in order; refuses tags that do not close."""

    def __init__(self, markup):
        super().__init__()
        self.found, self.open = [], []
        self.feed(markup)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes), ""))
        self.open.append((tag, len(self.found) - 1))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        tag, attributes, text = self.found[self.open[-1][1]]
        self.found[self.open[-1][1]] = (tag, attributes, text + data)

    def of(self, *tags):
        return [(attributes, text) for tag, attributes, text in self.found if tag in tags]


def test_words_stand_on_the_left_and_numbers_on_the_right():
    table = Table(["Claim", "Title", "Checks"], [[LINK, "L̂ is right", "2"], ["y", "Variance", "10"]])
    assert repr(table) == (
        "Claim      Title       Checks\n"  # the accent of L̂ takes no room of its own
        "chapter.x  L̂ is right       2\n"
        "y          Variance        10"
    )


@pytest.mark.parametrize(
    "number", ["148 ± 8", "+0.40", "-3", "≤ 100", "≈ 2", "≤100", "1.1 %", "3 of 8", "nan", "inf", ""]
)
def test_what_counts_as_a_number(number):
    header, line = repr(Table(["name", "a long head"], [["x", number]])).splitlines()
    assert line == f"x     {number:>11}".rstrip()
    assert header == "name  a long head"


@pytest.mark.parametrize("word", ["two", "a 2", "--1", "≤ x"])
def test_one_word_makes_a_column_of_words(word):
    lines = repr(Table(["name", "a long head"], [["x", word], ["y", "3"]])).splitlines()
    assert lines[1:] == [f"x     {word}", "y     3"]


def test_caption_and_note_are_lines_of_the_text_and_parts_of_the_page():
    table = Table(["a"], [["1"]], caption="Before & after", note="It < grows")
    assert repr(table) == "Before & after\na\n1\nIt < grows"
    page = Cells(table._repr_html_())
    assert page.of("caption", "p") == [({}, "Before & after"), ({}, "It < grows")]
    assert [tag for tag, *_ in page.found][:2] == ["table", "caption"]


def test_without_caption_and_note_there_are_no_empty_ones():
    table = Table(["a"], [["1"]])
    assert repr(table) == "a\n1"
    assert Cells(table._repr_html_()).of("caption", "p") == []


def test_every_cell_of_the_page_has_its_headers():
    page = Cells(Table(["Claim", "Title", "n"], [[LINK, "<b>A & B</b>", "2"]])._repr_html_())
    assert page.of("table") == [({"class": "claims"}, "")]
    assert [attributes for attributes, _ in page.of("th")] == [{"scope": "col"}] * 3 + [{"scope": "row"}]
    assert [text for _, text in page.of("th")] == ["Claim", "Title", "n", ""]
    assert page.of("a", "code") == [({"href": "#x"}, ""), ({}, "x")]
    assert page.of("td") == [({"data-label": "Title"}, "<b>A & B</b>"), ({"data-label": "n"}, "2")]


def test_text_of_headers_and_ids_is_escaped():
    page = Cells(Table(['"<i>"', '<b>"&'], [["1", "2"]], row_ids=['"&'])._repr_html_())
    assert [text for _, text in page.of("th")] == ['"<i>"', '<b>"&', "1"]
    assert page.of("td") == [({"data-label": '<b>"&'}, "2")]
    assert [attributes for attributes, _ in page.of("tr")] == [{}, {"id": '"&'}]


def test_rows_carry_their_ids():
    page = Cells(Table(["a"], [["1"], ["2"]], row_ids=["first", "second"])._repr_html_())
    assert [attributes for attributes, _ in page.of("tr")] == [{}, {"id": "first"}, {"id": "second"}]


def test_a_table_without_rows_shows_its_head():
    assert repr(Table(["name", "value"], [])) == "name  value"
    assert len(Cells(Table(["name", "value"], [])._repr_html_()).of("tr")) == 1


@pytest.mark.parametrize("row", [["1"], ["1", "2", "3"]])
def test_a_row_that_does_not_fit_is_refused(row):
    message = f"a row must have 2 cells, one a column, got {len(row)}: {row}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Table(["a", "b"], [["1", "2"], row])


def test_ids_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"^there must be 2 row_ids, one a row, got 1$"):
        Table(["a"], [["1"], ["2"]], row_ids=["x"])
