"""The examples in docstrings run and print what they say; every function of the toolbox has one."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import helpers

MODULES = [importlib.import_module(name) for _, name, _ in pkgutil.walk_packages(helpers.__path__, "helpers.")]
EXAMPLES = {
    test.name: test
    for module in MODULES
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs={"__name__": "example"})
    if test.examples
}
TOOLBOX = Path(__file__).parents[1] / "book" / "toolbox.md"
TOOLS = re.findall(r"{py:(?:func|class)}`~?([\w.]+)`", TOOLBOX.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_prints_what_it_says(name):
    report = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(EXAMPLES[name], out=report.append)
    assert not runner.failures, "".join(report)


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_has_an_example(name):
    assert name in EXAMPLES, f"{name} is in the toolbox, and its docstring has no tested example"
