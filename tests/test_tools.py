"""The tools for a reader's own network keep their common promises on every model of the zoo.

Each is right, by plain backward passes over one example at a time, or raises a `ValueError` that says why. Each leaves
the model as it was, also after an error, and the model then trains as its twin that no tool has seen. Their one list is
`TOOLS`.
"""

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from helpers.gradient_noise import gradient_noise_scale
from helpers.lab.gradients import (
    flatten,
    mean_gradient,
    per_sample_gradients,
    per_sample_products,
    per_sample_squared_norms,
)
from tests.zoo import (
    ZOO,
    Entry,
    Problem,
    assert_trains_as_if_untouched,
    changes,
    fingerprint,
    gradients_one_by_one,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
N = 6


@dataclass(frozen=True)
class Tool:
    """How a tool is called on a problem, what is right for it, and what it refuses.

    Parameters
    ----------
    call : callable
        From a problem to numbers by name.
    truth : callable
        From an entry and n to the same, without the tool.
    refuses : callable
        Whether it refuses an entry: nothing else may be refused, and nothing of this may be answered.
    n : int
        Examples that it needs.
    prepare : callable
        Makes of an entry one on which the tool has something to find.
    may_say : str
        Regular expression of a refusal that depends on the data: it may be given wherever it is true.
    """

    call: Callable[[Problem], dict[str, torch.Tensor]]
    truth: Callable[[Entry, int], dict[str, torch.Tensor]]
    refuses: Callable[[str, Entry], bool]
    n: int = N
    prepare: Callable[[Entry], Entry] = lambda entry: entry
    may_say: str = ""


def refuses_coupled_examples(name: str, entry: Entry) -> bool:
    return entry.lazy or (entry.couples_examples and name != "summed loss")


# The truth, one example at a time


def rows(entry: Entry, n: int) -> torch.Tensor:
    return flatten(gradients_one_by_one(entry, n))  # (n, P)


def noise_scale_of_rows(entry: Entry, n: int) -> dict[str, torch.Tensor]:
    gradients = rows(entry, n)
    mean = gradients.mean(0)
    trace = (gradients - mean).square().sum() / (n - 1)
    return {"noise scale": trace / (mean.square().sum() - trace / n)}


def one_sided(entry: Entry) -> Entry:
    """Give four of five examples one label, or all far targets: the mean gradient is then large beside the noise."""

    def targets(draws: torch.Generator, n: int) -> torch.Tensor:
        drawn = entry.targets(draws, n)
        if drawn.is_floating_point():
            return drawn + 9
        other = torch.arange(n, device=drawn.device) % 5 == 0
        return other.long().reshape(n, *[1] * (drawn.ndim - 1)).expand_as(drawn)

    return replace(entry, targets=targets)


# The tools


def directions(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.ones_like(p) for name, p in model.named_parameters() if p.requires_grad}


TOOLS = {
    "per_sample_gradients": Tool(
        lambda problem: per_sample_gradients(*problem), gradients_one_by_one, refuses_coupled_examples
    ),
    "per_sample_gradients, in chunks": Tool(
        lambda problem: per_sample_gradients(*problem, chunk_size=4), gradients_one_by_one, refuses_coupled_examples
    ),
    "per_sample_squared_norms": Tool(
        lambda problem: {"squares": per_sample_squared_norms(*problem)},
        lambda entry, n: {"squares": rows(entry, n).square().sum(1)},
        refuses_coupled_examples,
    ),
    "per_sample_products": Tool(
        lambda problem: {"products": per_sample_products(*problem, direction=directions(problem.model))},
        lambda entry, n: {"products": rows(entry, n).sum(1)},
        refuses_coupled_examples,
    ),
    "mean_gradient": Tool(
        lambda problem: mean_gradient(*problem),
        lambda entry, n: {name: g.mean(0) for name, g in gradients_one_by_one(entry, n).items()},
        refuses_coupled_examples,
    ),
    "gradient_noise_scale": Tool(
        lambda problem: {"noise scale": torch.tensor(float(gradient_noise_scale(*problem).value), dtype=torch.float64)},
        noise_scale_of_rows,
        refuses_coupled_examples,
        n=48,
        prepare=one_sided,
        may_say=r"standard errors above zero|must not hang on few",
    ),
}
every_tool = pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
every_entry = pytest.mark.parametrize("name", ZOO)


def run(tool: Tool, problem: Problem) -> dict[str, torch.Tensor] | str:
    """Return what a tool finds, or the text with which it refuses; any other error is a fault."""
    try:
        return tool.call(problem)
    except ValueError as error:
        return str(error)


def assert_no_trace(before: dict[str, Any], model: nn.Module) -> None:
    changed = changes(before, fingerprint(model))
    assert not changed, f"left a trace: {changed}"


def assert_keeps_promises(tool: Tool, name: str) -> None:
    """Refuse a tool that is wrong, refuses without need, does not refuse where it must, or leaves a trace."""
    entry = tool.prepare(ZOO[name])
    problem = entry.problem(tool.n)
    before = fingerprint(problem.model)
    found = run(tool, problem)
    assert_no_trace(before, problem.model)
    assert_trains_as_if_untouched(problem, entry.problem(tool.n))
    if tool.refuses(name, entry):
        assert isinstance(found, str), "a number where the tool cannot be right"
        assert len(found) > 20, f"this says nothing: {found!r}"
        return
    if isinstance(found, str) and tool.may_say and re.search(tool.may_say, found):
        return
    assert not isinstance(found, str), f"refused, though it could be right: {found}"
    if entry.uses_randomness:
        return  # every pass has draws of its own
    expected = tool.truth(entry, tool.n)
    assert found, "a tool that finds nothing is never wrong"
    for key in found:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-8, atol=1e-10)


@every_entry
@every_tool
def test_a_tool_is_right_or_says_why_not_and_leaves_no_trace(tool, name):
    assert_keeps_promises(tool, name)


class Interrupted(Exception):
    """What stops a tool in the middle."""


class Interrupting:
    """A loss that fails at one of its calls."""

    def __init__(self, loss: Callable[..., Any], call: int) -> None:
        self.loss, self.left = loss, call

    def __call__(self, *arguments: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise Interrupted
        return self.loss(*arguments)


def interrupting_layer(call: int) -> Callable[..., None]:
    left = [call]

    def hook(*_: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Interrupted

    return hook


@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if not entry.lazy])
@pytest.mark.parametrize("call", [0, 2, 7])
@every_tool
def test_a_tool_that_fails_in_the_middle_leaves_no_trace(tool, name, call):
    problem = ZOO[name].problem(tool.n)
    last = list(problem.model.modules())[-1]
    last.register_forward_pre_hook(interrupting_layer(call))
    before = fingerprint(problem.model)
    problem = problem._replace(loss=Interrupting(problem.loss, call))
    with contextlib.suppress(Interrupted, ValueError):
        tool.call(problem)
    assert_no_trace(before, problem.model)


# Tools that break a promise are noticed

RIGHT = TOOLS["mean_gradient"]


def breaking(harm: Callable[[Problem], Any]) -> Tool:
    def call(problem: Problem) -> dict[str, torch.Tensor]:
        found = RIGHT.call(problem)
        harm(problem)
        return found

    return replace(RIGHT, call=call)


def backward(problem: Problem) -> None:
    problem.loss(problem.model(problem.inputs), problem.targets).backward()


def slightly_wrong(problem: Problem) -> dict[str, torch.Tensor]:
    return {name: g * (1 + 1e-6) for name, g in RIGHT.call(problem).items()}


def refuse(problem: Problem) -> None:
    raise ValueError("the examples of a batch must not be coupled, got some that might be")


def plain_mean(problem: Problem) -> dict[str, torch.Tensor]:
    """Trusts every loss to be a mean over examples."""
    with torch.random.fork_rng():
        output = problem.model(problem.inputs)
        names, parameters = zip(*problem.model.named_parameters(), strict=True)
        return dict(zip(names, torch.autograd.grad(problem.loss(output, problem.targets), parameters), strict=True))


@pytest.mark.parametrize(
    ("tool", "name", "message"),
    [
        (replace(RIGHT, call=slightly_wrong), "mlp", "not close"),
        (replace(RIGHT, call=lambda problem: {}), "mlp", "finds nothing"),
        (replace(RIGHT, call=refuse), "mlp", "refused, though it could be right"),
        (replace(RIGHT, call=plain_mean), "class weights", "a number where"),
        (breaking(backward), "mlp", "tensor weight of '0'"),
        (breaking(lambda problem: problem.model.eval()), "mlp", "module ''"),
        (breaking(lambda problem: torch.rand(1)), "mlp", "torch's random state"),
        (breaking(lambda problem: problem.model(problem.inputs)), "spectral norm by hooks", "tensor weight_u of '0'"),
    ],
)
def test_a_tool_that_breaks_a_promise_is_noticed(tool, name, message):
    with torch.random.fork_rng(), pytest.raises(AssertionError, match=re.escape(message)):
        assert_keeps_promises(tool, name)


def test_most_of_the_zoo_has_a_noise_scale():
    tool = TOOLS["gradient_noise_scale"]
    answered = [name for name, entry in ZOO.items() if isinstance(run(tool, tool.prepare(entry).problem(tool.n)), dict)]
    assert len(answered) > 0.4 * len(ZOO), answered
