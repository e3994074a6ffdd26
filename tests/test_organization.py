"""Tests are found and shared out as the README says: all by a plain pytest, those of one chapter by make."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ByFunction

ROOT = Path(__file__).parents[1]


def test_a_plain_pytest_finds_all_tests():
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout[-3000:]
    found = {line.partition("::")[0] for line in process.stdout.splitlines() if "::" in line}
    assert found == {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")}


def scope(nodeid):
    return ByFunction._split_scope(None, nodeid)


def test_a_notebook_stays_with_one_worker_and_test_functions_are_shared_out():
    assert scope("book/a/x.ipynb::Cell 0") == scope("book/a/x.ipynb::Cell 7") == "book/a/x.ipynb"
    assert scope("tests/test_x.py::test_a") != scope("tests/test_x.py::test_b")
    assert scope("tests/test_x.py::test_a[1]") == scope("tests/test_x.py::test_a[x::y]")


def made(*arguments):
    """Return what make would run; under `make test` it would else take this for a part of that run."""
    variables = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    command = ["make", "--dry-run", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("path", sorted((ROOT / "book").glob("*/*.ipynb")), ids=lambda path: path.stem)
def test_make_test_looks_at_one_chapter(path):
    commands = made("test", f"CHAPTER={path.stem}")
    assert f" {path.relative_to(ROOT)} " in commands
    assert f" tests/test_{path.stem}.py " in commands
    assert " tests/test_book.py" in commands
    assert f"tests/browser -k {path.stem}\n" in commands
    assert "test_datasets" not in commands


def test_make_test_refuses_a_chapter_that_does_not_exist():
    assert 'test -n "" ||' in made("test", "CHAPTER=nothing")
    assert 'test -n "" ||' not in made("test", "CHAPTER=minibatch_loss")
