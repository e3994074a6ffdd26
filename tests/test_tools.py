"""The tools for a reader's own network keep their common promises on every model of the zoo.

Each is right, by plain backward passes over one example at a time, or raises a `ValueError` that says why. Each leaves
the model as it was, also after an error, and the model then trains as its twin that no tool has seen. Their one list is
`TOOLS`.
"""

import contextlib
import copy
import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from helpers.attention_scaling import score_report
from helpers.dropout import masked_losses, remove_units
from helpers.gradient_noise import gradient_noise_scale, noise_scale_report
from helpers.initialization import propagation_report
from helpers.lab.gradients import (
    flatten,
    gradient_chunks,
    mean_gradient,
    per_sample_gradients,
    per_sample_products,
    per_sample_squared_norms,
)
from helpers.lab.runtime import generator
from helpers.lab.watch import is_leaf
from helpers.normalization import company, statistics_report
from tests.zoo import (
    ZOO,
    Entry,
    Problem,
    apply,
    assert_trains_as_if_untouched,
    changes,
    examples,
    fingerprint,
    gradients_one_by_one,
    map_inputs,
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
    undecided : dict of str to str
        Entries whose data do not suffice, and a part of the refusal that says so; there and nowhere else it is given.
    """

    call: Callable[[Problem], dict[str, torch.Tensor]]
    truth: Callable[[Entry, int], dict[str, torch.Tensor]]
    refuses: Callable[[str, Entry], bool]
    n: int = N
    prepare: Callable[[Entry], Entry] = lambda entry: entry
    undecided: dict[str, str] = field(default_factory=dict)


def refuses_coupled_examples(name: str, entry: Entry) -> bool:
    return entry.lazy or (entry.couples_examples and name != "summed loss")


def has_batch_norm(entry: Entry) -> bool:
    layers = entry.problem(2).model.modules()
    return any(isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) for layer in layers)


# The truth, one example at a time


def rows(entry: Entry, n: int) -> torch.Tensor:
    return flatten(gradients_one_by_one(entry, n))  # (n, P)


def noise_and_signal(entry: Entry, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tr S and |∇L|², both unbiased."""
    gradients = rows(entry, n)
    mean = gradients.mean(0)
    trace = (gradients - mean).square().sum() / (n - 1)
    return trace, mean.square().sum() - trace / n


def noise_scale_of_rows(entry: Entry, n: int) -> dict[str, torch.Tensor]:
    trace, squared_norm = noise_and_signal(entry, n)
    return {"noise scale": trace / squared_norm}


def mean_squares_by_hooks(entry: Entry, n: int) -> dict[str, torch.Tensor]:
    """Return the mean square of what each layer with parameters gave, in the order of the calls."""
    problem, found = entry.problem(n), {}

    def record(name: str, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        found[f"{len(found)}: {name}"] = first.detach().square().mean()

    for name, layer in problem.model.named_modules():
        if is_leaf(layer) and "parametrizations" not in name and list(layer.parameters()):
            layer.register_forward_hook(lambda _, __, output, name=name: record(name or "the model", output))
    apply(problem.model, problem.inputs)
    return found


def logits_in_company(entry: Entry, n: int) -> dict[str, torch.Tensor]:
    """Return what each example of the first half gets in a batch with the second, by plain forward passes."""
    problem, found = entry.problem(n), []
    for layer in problem.model.eval().modules():
        layer.train(isinstance(layer, nn.BatchNorm2d))
    for k in range(n // 2):
        batch = torch.cat([problem.inputs[k : k + 1], problem.inputs[n // 2 :]])
        found.append(problem.model(batch)[0].detach())
    return {"mean outputs": torch.stack(found)}


def variances_by_hooks(entry: Entry, n: int) -> dict[str, torch.Tensor]:
    """Return running over measured variance of each layer of batch normalization, by geometric means over units."""
    problem, found = entry.problem(n), {}

    def record(name: str, layer: nn.Module, inputs: torch.Tensor) -> None:
        values = inputs.detach().transpose(0, 1).flatten(2)  # (C, examples, positions)
        variance = values.flatten(1).var(1)
        away = (values - values.mean((1, 2), keepdim=True)).square()
        away = away / away.mean((1, 2), keepdim=True)
        # log s² lies low by half the relative variance of s², here over batches of one example.
        low = (away - 1).sum(2).square().mean(1) / (n - 1) / away[0, 0].numel() ** 2 / 2
        found[name] = (layer.running_var.log() - variance.log() - low).mean().exp()

    for name, layer in problem.model.eval().named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(lambda layer, inputs, name=name: record(name, layer, inputs[0]))
    apply(problem.model, problem.inputs)
    return found


@functools.cache  # the truth is kept by entry
def one_sided(entry: Entry) -> Entry:
    """Give four of five examples one label, or all far targets: the mean gradient is then large beside the noise."""

    def targets(draws: torch.Generator, n: int) -> torch.Tensor:
        drawn = entry.targets(draws, n)
        if drawn.is_floating_point():
            return drawn + 9
        other = torch.arange(n, device=drawn.device) % 5 == 0
        return other.long().reshape(n, *[1] * (drawn.ndim - 1)).expand_as(drawn)

    return replace(entry, targets=targets)


def drops(entry: Entry) -> bool:
    kinds = nn.Dropout, nn.Dropout2d, nn.LSTM
    layers = [] if entry.lazy else entry.problem(2).model.modules()
    return any(
        isinstance(layer, kinds) and (getattr(layer, "p", 0) or getattr(layer, "dropout", 0)) for layer in layers
    )


def loss_without_masks(entry: Entry, n: int) -> dict[str, torch.Tensor]:
    problem = entry.problem(n)
    return {"loss": problem.loss(apply(problem.model.eval(), problem.inputs), problem.targets).detach()}


def is_classification(name: str, entry: Entry) -> bool:
    return not entry.lazy and name not in ("linear regression", "dictionary as output")


def first_layer(model: nn.Module) -> tuple[str, nn.Module]:
    kinds = nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d
    kinds += nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
    return next((name, layer) for name, layer in model.named_modules() if isinstance(layer, kinds))


def accuracies_without_units(entry: Entry, n: int) -> dict[str, torch.Tensor]:
    """Return the accuracy without half of the first layer's units, three times, by a hook of our own."""
    problem, source, found = entry.problem(n), generator("test.tools.units"), []
    _, layer = first_layer(problem.model.eval())
    axis = -1 if isinstance(layer, nn.Linear | nn.Embedding) else 1
    kept = []

    def remove(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        moved = output.movedim(axis, -1)
        if not kept:
            order, units = torch.randperm(moved.shape[-1], generator=source), moved.shape[-1]
            kept.append(torch.isin(torch.arange(units), order[units // 2 :]).double() * units / (units - units // 2))
        return (moved * kept[0]).movedim(-1, axis)

    layer.register_forward_hook(remove)
    for _ in range(3):
        kept.clear()
        logits = apply(problem.model, problem.inputs)
        classes = logits.argmax(-1 if logits.shape[:-1] == problem.targets.shape else 1)
        found.append((classes == problem.targets).double().mean())
    return {"accuracies": torch.stack(found)}


# The tools


def directions(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a vector without symmetry, in the form of a model's parameters."""
    return {
        name: torch.linspace(-1, 2, p.numel(), dtype=p.dtype).reshape(p.shape)
        for name, p in model.named_parameters()
        if p.requires_grad and not is_lazy(p)
    }


def products_of_rows(entry: Entry, n: int) -> dict[str, torch.Tensor]:
    vector = directions(entry.problem(n).model)
    return {
        "products": sum(g.flatten(1) @ vector[name].flatten() for name, g in gradients_one_by_one(entry, n).items())
    }


def mean_squares_reported(problem: Problem) -> dict[str, torch.Tensor]:
    report = propagation_report(problem.model, problem.inputs, generator=generator("test.tools.readout"))
    assert all(math.isfinite(layer.backward) for layer in report.layers)
    forward = [torch.tensor(layer.forward, dtype=torch.float64) for layer in report.layers]
    return {f"{k}: {layer.name}": found for k, (layer, found) in enumerate(zip(report.layers, forward, strict=True))}


def noise_reported(problem: Problem) -> dict[str, torch.Tensor]:
    name, _, *parts = noise_scale_report(*problem).rows[0]
    assert name == "the model"
    return {"tr S and |∇L|²": torch.tensor([float(part) for part in parts[:2]], dtype=torch.float64)}


def company_judged(problem: Problem) -> dict[str, torch.Tensor]:
    judged, others = (examples(problem.inputs, rows) for rows in (slice(N // 2), slice(N // 2, N)))
    source = generator("test.tools.company")
    found = company(problem.model, judged, others, batch_size=N // 2 + 1, companies=3, generator=source)
    return {"mean outputs": found.mean}


def variances_reported(problem: Problem) -> dict[str, torch.Tensor]:
    layers = statistics_report(problem.model, problem.inputs).layers
    return {layer.name: torch.tensor(float(layer.ratio.value), dtype=torch.float64) for layer in layers}


def attends(entry: Entry) -> bool:
    return not entry.lazy and any(isinstance(m, nn.MultiheadAttention) for m in entry.problem(1).model.modules())


def participation_reported(problem: Problem) -> dict[str, torch.Tensor]:
    report = score_report(problem.model, problem.inputs, min_keys=1)
    found = [
        torch.tensor([float(head.participation.value) for head in call], dtype=torch.float64) for call in report.calls
    ]
    return {
        f"{k}: {call[0].name}": of_heads for k, (call, of_heads) in enumerate(zip(report.calls, found, strict=True))
    }


def participation_by_weights(entry: Entry, n: int) -> dict[str, torch.Tensor]:
    """Return the mean of Σs² for each head, from the weights that each layer returns if it is asked for them."""
    problem, found = entry.problem(n), {}

    def ask(layer: nn.Module, arguments: tuple, options: dict, output: Any, name: str) -> None:
        asked = options | {"need_weights": True, "average_attn_weights": False}
        weights = nn.MultiheadAttention.forward(layer, *arguments, **asked)[1]  # (n, heads, queries, keys)
        found[f"{len(found)}: {name}"] = weights.detach().square().sum(-1).mean((0, 2))

    for name, layer in problem.model.named_modules():
        if isinstance(layer, nn.MultiheadAttention):
            layer.register_forward_hook(functools.partial(ask, name=name), with_kwargs=True)
    apply(problem.model, problem.inputs)
    return found


UNCLEAR, FEW = "must be 4 standard errors above zero", "tr S must not hang on few of the examples"
# At 48 examples, even one-sided ones, these have a mean gradient that drowns in noise, or noise that a few make.
WITHOUT_NOISE_SCALE = {
    **dict.fromkeys(
        (
            "mlp",
            "resnet, evaluation",
            "circular convolution",
            "dropout, training",
            "dropout, evaluation",
            "frozen layers",
            "weight norm by hooks",
            "weight norm by parametrization",
            "in place",
            "activation in place",
            "dictionary as output",
            "checkpoint",
            "own derivative",
            "subclass of Linear that halves",
            "layer norm",
            "RMS norm",
            "summed loss",
            "penalty on the weights",
        ),
        UNCLEAR,
    ),
    **dict.fromkeys(("post-LN transformer", "equalized learning rate", "embedding with padding"), FEW),
}


def loss_reported(problem: Problem) -> dict[str, torch.Tensor]:
    found = masked_losses(*problem, masks=10, generator=generator("test.tools.masks"))
    return {"loss": torch.tensor(float(found.whole.loss.value), dtype=torch.float64)}


def accuracies_reported(problem: Problem) -> dict[str, torch.Tensor]:
    model, _, inputs, targets = problem
    layers = [first_layer(model)[0]]
    source = generator("test.tools.units")
    found = remove_units(model, inputs, targets, layers=layers, repeats=3, generator=source)
    return {"accuracies": torch.from_numpy(found.accuracies)}


TOOLS = {
    "per_sample_gradients": Tool(
        lambda problem: per_sample_gradients(*problem), gradients_one_by_one, refuses_coupled_examples
    ),
    "per_sample_gradients, in chunks": Tool(
        lambda problem: per_sample_gradients(*problem, chunk_size=4), gradients_one_by_one, refuses_coupled_examples
    ),
    "gradient_chunks": Tool(
        lambda problem: {"rows": torch.cat(list(gradient_chunks(*problem, chunk_size=4)))},
        lambda entry, n: {"rows": rows(entry, n)},
        refuses_coupled_examples,
    ),
    "per_sample_squared_norms": Tool(
        lambda problem: {"squares": per_sample_squared_norms(*problem, chunk_size=4)},
        lambda entry, n: {"squares": rows(entry, n).square().sum(1)},
        refuses_coupled_examples,
    ),
    "per_sample_products": Tool(
        lambda problem: {"products": per_sample_products(*problem, direction=directions(problem.model), chunk_size=4)},
        products_of_rows,
        refuses_coupled_examples,
    ),
    "mean_gradient": Tool(
        lambda problem: mean_gradient(*problem, chunk_size=4),
        lambda entry, n: {name: g.mean(0) for name, g in gradients_one_by_one(entry, n).items()},
        refuses_coupled_examples,
    ),
    "gradient_noise_scale": Tool(
        lambda problem: {"noise scale": torch.tensor(float(gradient_noise_scale(*problem).value), dtype=torch.float64)},
        noise_scale_of_rows,
        refuses_coupled_examples,
        n=48,
        prepare=one_sided,
        undecided=WITHOUT_NOISE_SCALE,
    ),
    "noise_scale_report": Tool(
        noise_reported,
        lambda entry, n: {  # as printed, with three digits
            "tr S and |∇L|²": torch.tensor(
                [float(f"{part.item():.3g}") for part in noise_and_signal(entry, n)], dtype=torch.float64
            )
        },
        refuses_coupled_examples,
    ),
    "score_report": Tool(participation_reported, participation_by_weights, lambda name, entry: not attends(entry)),
    "propagation_report": Tool(mean_squares_reported, mean_squares_by_hooks, lambda name, entry: entry.lazy),
    "company": Tool(company_judged, logits_in_company, lambda name, entry: not has_batch_norm(entry)),
    "statistics_report": Tool(
        variances_reported, variances_by_hooks, lambda name, entry: not has_batch_norm(entry), n=32
    ),
    "masked_losses": Tool(loss_reported, loss_without_masks, lambda name, entry: not drops(entry), n=30),
    "remove_units": Tool(
        accuracies_reported, accuracies_without_units, lambda name, entry: not is_classification(name, entry)
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
    assert_trains_as_if_untouched(problem, entry, tool.n)
    if tool.refuses(name, entry):
        assert isinstance(found, str), "a number where the tool cannot be right"
        assert len(found) > 20, f"this says nothing: {found!r}"
        return
    if name in tool.undecided:
        assert isinstance(found, str), "a number though the data do not suffice: take it from the list"
        assert tool.undecided[name] in found
        return
    assert not isinstance(found, str), f"refused, though it could be right: {found}"
    if entry.uses_randomness:
        return  # every pass has draws of its own
    expected = tool.truth(entry, tool.n)
    assert found, "a tool that finds nothing is never wrong"
    for key in found:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-9, atol=1e-12)


@every_entry
@every_tool
def test_a_tool_is_right_or_says_why_not_and_leaves_no_trace(tool, name):
    assert_keeps_promises(tool, name)


HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def in_double(problem: Problem) -> Problem:
    """Return a problem with the same parameters and data, rounded as they are."""
    inputs = map_inputs(lambda x: x.double() if x.is_floating_point() else x, problem.inputs)
    targets = problem.targets.double() if problem.targets.is_floating_point() else problem.targets
    return problem._replace(model=copy.deepcopy(problem.model).double(), inputs=inputs, targets=targets)


@HALF
@pytest.mark.parametrize(
    "name", ["linear regression", "pre-LN transformer", "GRU", "transposed convolution, 2d", "u-shaped", "group norm"]
)
def test_half_precision_has_the_noise_scale_of_the_same_parameters_in_double(name, dtype):
    problem = one_sided(ZOO[name]).problem(48, dtype=dtype)
    found, expected = gradient_noise_scale(*problem), gradient_noise_scale(*in_double(problem))
    rounding = 4 * torch.finfo(dtype).eps * (1 + 1 / expected.value)  # of tr S, in units of |∇L|² too
    assert found.value == pytest.approx(expected.value, rel=rounding)
    assert found.stderr == pytest.approx(expected.stderr, rel=4 * rounding)


@HALF
@pytest.mark.parametrize("name", ["mlp", "LSTM", "group norm", "post-LN transformer"])
def test_half_precision_has_the_gradients_of_the_same_parameters_in_double(name, dtype):
    problem = ZOO[name].problem(dtype=dtype)
    double = in_double(problem)
    rounding = 8 * torch.finfo(dtype).eps  # of some layers
    exact = flatten(per_sample_gradients(*double))
    found = flatten(per_sample_gradients(*problem)).double()
    assert ((found - exact).norm(dim=1) <= rounding * exact.norm(dim=1)).all()
    mean = flatten({name: g[None].double() for name, g in mean_gradient(*problem).items()})[0]
    assert (mean - exact.mean(0)).norm() <= rounding * exact.norm(dim=1).mean()
    squares = per_sample_squared_norms(*problem)
    assert squares.dtype == torch.float32
    assert squares.tolist() == pytest.approx(exact.square().sum(1).tolist(), rel=rounding)
    along = per_sample_products(*problem, direction=directions(problem.model))
    vector = flatten({name: v[None] for name, v in directions(double.model).items()})[0]
    assert ((along - exact @ vector).abs() <= rounding * exact.norm(dim=1) * vector.norm()).all()


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


# One of each kind of what may be left behind: buffers, draws, hooks, shared and frozen parameters.
INTERRUPTED = [
    "resnet, training",
    "pre-LN transformer",
    "GRU",
    "dropout, training",
    "frozen layers",
    "PReLU under two names",
    "spectral norm by hooks",
    "spectral norm by parametrization",
]
assert set(INTERRUPTED) <= set(ZOO)


@pytest.mark.parametrize("name", INTERRUPTED)
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
        (replace(RIGHT, undecided={"mlp": UNCLEAR}), "mlp", "a number though"),
        (replace(RIGHT, call=refuse, undecided={"mlp": UNCLEAR}), "mlp", UNCLEAR),
        (breaking(backward), "mlp", "tensor weight of '0'"),
        (breaking(lambda problem: problem.model.eval()), "mlp", "module ''"),
        (breaking(lambda problem: torch.rand(1)), "mlp", "torch's random state"),
        (breaking(lambda problem: problem.model(problem.inputs)), "spectral norm by hooks", "tensor weight_u of '0'"),
    ],
)
def test_a_tool_that_breaks_a_promise_is_noticed(tool, name, message):
    with torch.random.fork_rng(), pytest.raises(AssertionError, match=re.escape(message)):
        assert_keeps_promises(tool, name)
