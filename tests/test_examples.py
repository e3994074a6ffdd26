"""The examples in docstrings run and print what they say; every tool for the reader's own network has one."""

import doctest
import importlib
import pkgutil

import pytest

import helpers

MODULES = [importlib.import_module(name) for _, name, _ in pkgutil.walk_packages(helpers.__path__, "helpers.")]
EXAMPLES = {
    test.name: test
    for module in MODULES
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs={"__name__": "example"})
    if test.examples
}
# What a reader calls on their own network.
TOOLS = [
    "helpers.gradient_noise.NoiseScaleAccumulator",
    "helpers.gradient_noise.gradient_noise_scale",
    "helpers.gradient_noise.noise_scale_interval",
    "helpers.gradient_noise.noise_scale_report",
    "helpers.gradient_noise.two_batch_noise_scale",
    "helpers.minibatch_loss.correlation_interval",
    "helpers.minibatch_loss.effective_batch_interval",
    "helpers.minibatch_loss.intraclass_correlation",
]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_prints_what_it_says(name):
    report = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(EXAMPLES[name], out=report.append)
    assert not runner.failures, "".join(report)


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_has_an_example(name):
    assert name in EXAMPLES, f"{name} is for the reader's own network, and its docstring has no tested example"
