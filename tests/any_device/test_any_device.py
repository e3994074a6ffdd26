"""Every public tensor function of ``helpers`` would run on a GPU, tested without one.

`make test` runs this folder in a process of its own.
"""

import importlib
import inspect
import pkgutil
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError

import helpers
from helpers.gradient_noise import batch_noise
from helpers.lab import runtime
from helpers.lab.datasets import Split, augment
from helpers.lab.models import mlp
from helpers.lab.training import train
from helpers.minibatch_loss import iid_losses, iid_variance
from tests.any_device.another_device import (
    LooksAtValues,
    OtherGenerator,
    WrongDevice,
    elsewhere,
    on_the_cpu,
    run_by_values,
    run_elsewhere,
    run_model_elsewhere,
)
from tests.any_device.cases import BY_VALUES, CHOOSE_THE_DEVICE, ELSEWHERE, MODELS, NUMBERS, WITHIN_OTHERS

# FakeTensorMode itself calls it.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def name(value):
    return getattr(value, "__name__", "")


def annotations(function):
    """Return the annotation of each argument and of the result, which has the name ``return``."""
    signature = inspect.signature(function)
    arguments = {argument: p.annotation for argument, p in signature.parameters.items()}
    return arguments | {"return": signature.return_annotation}


def names_torch(annotation):
    """Whether a type, or a field of it, is PyTorch's."""
    return "torch" in f"{annotation} {getattr(annotation, '__annotations__', {})}"


def handles_tensors(function):
    """Whether the signature names a type of PyTorch; what has no annotation might be anything."""
    return any(names_torch(a) or a is inspect.Parameter.empty for a in annotations(function).values())


def public_functions():
    for module in pkgutil.walk_packages(helpers.__path__, "helpers."):
        if "._" in module.name or module.name.startswith("helpers.data"):  # private; trainings with tests of their own
            continue
        for name, function in vars(importlib.import_module(module.name)).items():
            own = getattr(function, "__module__", None) == module.name and not name.startswith("_")
            if own and callable(function) and not inspect.isclass(function):
                yield function


def is_sampler_given_tensors(function):
    others = [str(a) for argument, a in annotations(function).items() if argument not in ("generator", "return")]
    return "generator" in annotations(function) and any("Tensor" in a or "Module" in a for a in others)


SAMPLERS_GIVEN_TENSORS = [row for row in ELSEWHERE + BY_VALUES if is_sampler_given_tensors(row[0])]


# The table


def test_every_public_tensor_function_of_the_helpers_has_a_case():
    wanted = {function for function in public_functions() if handles_tensors(function)}
    assert {row[0] for row in ELSEWHERE + BY_VALUES + NUMBERS + MODELS} | set(
        CHOOSE_THE_DEVICE + WITHIN_OTHERS
    ) == wanted


def test_tensor_functions_are_recognised_by_their_signature():
    def unannotated(x):
        return x

    def bundled(n: int) -> Split:
        return n

    assert all(handles_tensors(function) for function in (iid_losses, mlp, unannotated, bundled))
    assert not handles_tensors(iid_variance)


@pytest.mark.parametrize(("function", "arguments"), ELSEWHERE, ids=name)
def test_runs_on_another_device_and_returns_its_results_there(function, arguments):
    run_elsewhere(function, arguments)


@pytest.mark.parametrize(("function", "arguments"), BY_VALUES, ids=name)
def test_tells_every_tensor_its_device(function, arguments):
    run_by_values(function, arguments)


@pytest.mark.parametrize(("function", "arguments"), BY_VALUES, ids=name)
def test_is_excused_from_the_other_device_because_it_looks_at_values(function, arguments):
    with pytest.raises((LooksAtValues, RuntimeError), match=r"looks at values|numpy|aten.equal"):
        run_elsewhere(function, arguments)


@pytest.mark.parametrize(("function", "arguments"), NUMBERS, ids=name)
def test_numbers_are_found_on_the_cpu_wherever_the_book_computes(function, arguments, monkeypatch):
    expected = function(**arguments(on_the_cpu()))
    monkeypatch.setattr(runtime, "device", lambda: torch.device("meta"))
    assert run_by_values(function, arguments) == expected


@pytest.mark.parametrize(("build", "options", "inputs"), MODELS, ids=name)
def test_model_runs_where_its_parameters_are(build, options, inputs):
    run_model_elsewhere(build(**options), inputs)


# Devices that do not match


def test_samplers_given_tensors_are_found():
    assert {augment, train} <= {function for function, _ in SAMPLERS_GIVEN_TENSORS}


@pytest.mark.parametrize(("function", "arguments"), SAMPLERS_GIVEN_TENSORS, ids=name)
def test_generator_of_the_cpu_is_refused_for_tensors_elsewhere(function, arguments):
    rule = r"generator must be on the device of \w+, other:0, got a generator on cpu"
    with elsewhere() as place, pytest.raises(ValueError, match=rule):
        function(**arguments(place) | {"generator": torch.Generator()})


@pytest.mark.parametrize(("function", "arguments"), SAMPLERS_GIVEN_TENSORS, ids=name)
def test_generator_of_another_device_is_refused_for_tensors_on_the_cpu(function, arguments):
    rule = r"generator must be on the device of \w+, cpu, got a generator on other:0"
    with pytest.raises(ValueError, match=rule):
        function(**arguments(on_the_cpu()) | {"generator": OtherGenerator()})


def test_batches_on_another_device_than_the_gradients_are_refused():
    batches = torch.zeros(5, 4, dtype=torch.int64)
    rule = "batches must be on the device of gradients, other:0, got cpu"
    with elsewhere() as place, pytest.raises(ValueError, match=re.escape(rule)):
        batch_noise(place.normal(20, 3), batches)


# The proof: functions that get it wrong, on the CPU unnoticed


class HidesATensor(nn.Linear):
    """A layer with a tensor that is neither parameter nor buffer, so that it stays where it was made."""

    def __init__(self):
        super().__init__(3, 2)
        self.offset = torch.ones(2)

    def forward(self, x):
        return super().forward(x) + self.offset


def forgets_the_device(x, generator):
    return x + torch.zeros(3, dtype=x.dtype)


def counts_on_the_cpu(x, generator):
    return x[torch.arange(3)]


def leaves_the_device_to_the_generator(x, generator):
    return x + torch.randn(3, generator=generator, dtype=x.dtype)


def shuffles_on_the_cpu(x, generator):
    return x[torch.randperm(3, generator=generator)]


def draws_from_a_generator_of_its_own(x, generator):
    return x + torch.randn(3, generator=torch.Generator(), dtype=x.dtype, device=x.device)


def converts_a_list(x, generator):
    return x + torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype)


def converts_numpy(x, generator):
    return x + torch.from_numpy(np.ones(3))


def returns_a_copy_on_the_cpu(x, generator):
    return {"square": [x.square().cpu()]}


def mixes_devices(x, generator):
    return x + x.cpu()


WRONG = [
    forgets_the_device,
    counts_on_the_cpu,
    leaves_the_device_to_the_generator,
    shuffles_on_the_cpu,
    draws_from_a_generator_of_its_own,
    converts_a_list,
    converts_numpy,
    returns_a_copy_on_the_cpu,
    mixes_devices,
]


def right(x, generator):
    where = {"generator": generator, "device": x.device}
    order = torch.randperm(len(x), **where)
    noise = torch.randn(x.shape, dtype=x.dtype, **where)
    return x[order] + noise + torch.as_tensor(x) + torch.zeros_like(x), x.mean().item(), x.cpu().sum().item()


def vector(at):
    return {"x": at.normal(3), "generator": at.generator}


@pytest.mark.parametrize("function", WRONG)
def test_wrong_function_works_on_the_cpu(function):
    function(**vector(on_the_cpu()))


@pytest.mark.parametrize("function", WRONG)
def test_wrong_function_is_caught_on_another_device(function):
    with pytest.raises((WrongDevice, FakeTensorDeviceMismatchError)):
        run_elsewhere(function, vector)


@pytest.mark.parametrize("function", WRONG)
def test_wrong_function_is_caught_by_values(function):
    with pytest.raises(WrongDevice):
        run_by_values(function, vector)


def test_wrong_model_is_caught():
    assert HidesATensor()(torch.zeros(5, 3)).shape == (5, 2)
    with pytest.raises(AssertionError, match="convert all Tensors to FakeTensors"):
        run_model_elsewhere(HidesATensor(), lambda at: at.normal(5, 3).float())


@pytest.mark.parametrize("run", [run_elsewhere, run_by_values])
def test_right_function_passes(run):
    run(right, vector)
