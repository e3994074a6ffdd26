"""The registry says which claims there are and where chapters stand; it refuses files with too much or too little."""

import re

import pytest

from helpers.lab.registry import (
    BEYOND,
    Chapter,
    Place,
    RegisteredClaim,
    miscounted,
    places,
    read_chapter,
    read_chapters,
)

GOOD = """\
title: A chapter
module: what it holds
claims:
  first: {title: A = B, source: "A §1, B §2.1,#123", erratum: errata-first, checks: 3}
  second: {title: C > D, checks: 1}
"""


def test_a_file_is_a_chapter(tmp_path):
    (tmp_path / "tiny.yml").write_text(GOOD, encoding="utf-8")
    (tmp_path / "notes.txt").write_text("no chapter", encoding="utf-8")
    first = RegisteredClaim("tiny.first", "A = B", 3, "A §1, B §2.1,#123", "errata-first")
    second = RegisteredClaim("tiny.second", "C > D", 1, BEYOND, "")
    chapter = Chapter("tiny", "A chapter", "what it holds", (first, second))
    assert read_chapter("tiny", tmp_path) == chapter
    assert read_chapters(tmp_path) == {"tiny": chapter}
    assert [claim.sources for claim in chapter.claims] == [["A §1", "B §2.1", "#123"], []]


def test_chapters_are_sorted_by_name(tmp_path):
    for name in ("c", "a", "b"):
        (tmp_path / f"{name}.yml").write_text(GOOD, encoding="utf-8")
    assert list(read_chapters(tmp_path)) == ["a", "b", "c"]


def test_an_unknown_chapter_is_refused(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.yml").write_text(GOOD, encoding="utf-8")
    with pytest.raises(ValueError, match=r"^a chapter must be one of one, two, got 'three'$"):
        read_chapter("three", tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "module: what it holds\n",
            "",
            "tiny.yml must say ['claims', 'module', 'title'], missing ['module'], unknown []",
        ),
        ("module:", "modul:", "missing ['module'], unknown ['modul']"),
        (", checks: 1", "", "second in tiny.yml must say ['checks', 'title'], missing ['checks'], unknown []"),
        ("erratum:", "errata:", "first in tiny.yml must say ['checks', 'title'], missing [], unknown ['errata']"),
        ("checks: 1", "checks: 0", "how many checks tiny.second has, at least 1, got 0"),
        ("checks: 1", "checks: some", "how many checks tiny.second has, at least 1, got 'some'"),
    ],
)
def test_a_file_that_says_too_little_or_too_much_is_refused(tmp_path, old, new, message):
    assert GOOD.count(old) == 1
    (tmp_path / "tiny.yml").write_text(GOOD.replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        read_chapters(tmp_path)


def test_chapters_stand_in_numbered_parts_and_are_counted_through(tmp_path):
    toc = tmp_path / "_toc.yml"
    toc.write_text(
        "root: book/index\nparts:\n"
        "- chapters: [{file: book/how_to_read}]\n"
        "- {caption: I, numbered: true, chapters: [{file: book/x/b}, {file: book/x/a}]}\n"
        "- {caption: II, numbered: true, chapters: [{file: book/y/c}]}\n"
        "- {caption: Reference, chapters: [{file: book/ledger}]}\n",
        encoding="utf-8",
    )
    found = places(toc)
    assert found == [Place("I", 1, "book/x/b"), Place("I", 2, "book/x/a"), Place("II", 3, "book/y/c")]
    assert [place.chapter for place in found] == ["b", "a", "c"]


def test_a_book_without_parts_has_no_chapters(tmp_path):
    (tmp_path / "_toc.yml").write_text("root: book/index\nchapters: [{file: book/a}]\n", encoding="utf-8")
    assert places(tmp_path / "_toc.yml") == []


def test_claims_are_checked_as_often_as_registered():
    claims = [RegisteredClaim("x.a", "A", 2), RegisteredClaim("x.b", "B", 1), RegisteredClaim("x.c", "C", 1)]
    assert miscounted(claims, ["x.b", "x.a", "x.c", "x.a"]) == []
    assert miscounted(claims, ["x.a", "x.c", "x.c", "x.c", "x.d"]) == [
        "x.a is checked once, but registered with 2 checks",
        "x.b is checked nowhere, but registered with 1 checks",
        "x.c is checked 3 times, but registered with 1 checks",
        "x.d is checked once, but registered with no checks",
    ]
