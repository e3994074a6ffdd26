"""The zoo is what it says, and its fingerprints notice whatever a tool can do to a model."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from helpers.lab.runtime import seeded
from tests.zoo import (
    ZOO,
    apply,
    assert_trains_as_if_untouched,
    changes,
    fingerprint,
    gradient,
    gradients_one_by_one,
    map_inputs,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
N = 6


def entries(chosen=lambda entry: True):
    names = [name for name, entry in ZOO.items() if chosen(entry)]
    return pytest.mark.parametrize("entry", [ZOO[name] for name in names], ids=names)


every_entry = entries()
without_draws = entries(lambda entry: not entry.uses_randomness)
with_shapes = entries(lambda entry: not entry.lazy)
passive = entries(lambda entry: not entry.lazy and not entry.uses_randomness)


# Each entry is what it says


@every_entry
def test_a_problem_is_made_alike_each_time(entry):
    one, other = gradient(entry.problem()), gradient(entry.problem())
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert max(moved.abs().max() for moved in one.values()) > 0.05
    assert len(entry.problem(4).targets) == 4


@every_entry
def test_numbers_have_the_wanted_type(entry):
    found = gradient(entry.problem(dtype=torch.float32))
    assert {g.dtype for g in found.values()} == {torch.float32}
    assert {g.dtype for g in gradient(entry.problem()).values()} == {torch.float64}


@without_draws
def test_examples_are_coupled_where_the_entry_says_so(entry):
    of_batch, of_examples = gradient(entry.problem(N)), gradients_one_by_one(entry, N)
    difference = max((of_examples[name].mean(0) - g).abs().max().item() for name, g in of_batch.items())
    assert difference > 0.1 if entry.couples_examples else difference < 1e-14


@with_shapes
def test_a_pass_draws_where_the_entry_says_so(entry):
    problem = entry.problem()
    before = torch.get_rng_state()
    apply(problem.model, problem.inputs)
    assert torch.equal(torch.get_rng_state(), before) != entry.uses_randomness


@passive
def test_a_pass_changes_buffers_where_the_entry_says_so(entry):
    problem = entry.problem()
    before = fingerprint(problem.model)
    apply(problem.model, problem.inputs)
    assert bool(changes(before, fingerprint(problem.model))) == entry.moves_buffers


@with_shapes
def test_vmap_runs_where_the_entry_says_so(entry):
    problem = entry.problem()
    state = {name: p.detach() for name, p in problem.model.named_parameters()}

    def of_one(inputs, target):
        one = map_inputs(lambda x: x[None], inputs)
        positional, named = ((), one) if isinstance(one, dict) else (one, {})

        def loss(parameters):
            output = torch.func.functional_call(problem.model, parameters, positional, named)
            return problem.loss(output, target[None])

        return torch.func.grad(loss)(state)

    def run():
        return torch.func.vmap(of_one, randomness="different")(problem.inputs, problem.targets)

    if entry.vmap:
        run()
    else:
        with pytest.raises(RuntimeError):
            run()


def test_a_penalty_is_in_the_gradient():
    with_penalty, without = (gradient(ZOO[name].problem()) for name in ("penalty on the weights", "mlp"))
    for name, p in ZOO["mlp"].problem().model.named_parameters():
        torch.testing.assert_close(with_penalty[name] - without[name], 0.2 * p.detach())


# Fingerprints


def batch_normalized():
    with seeded("test.zoo.fingerprint"):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.1))
    model.double()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    return model


def replace_parameter(model):
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def replace_buffer(model):
    model[1].running_mean = model[1].running_mean.clone()


def change_a_bit(model):
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nextafter(model[0].weight[0, 0], torch.tensor(9.0, dtype=torch.float64))


HARMS = {
    "parameter replaced": (replace_parameter, "tensor weight of '0'"),
    "parameter changed by a bit": (change_a_bit, "tensor weight of '0'"),
    "parameter frozen": (lambda model: model[0].bias.requires_grad_(False), "tensor bias of '0'"),
    "gradient changed": (lambda model: model[0].weight.grad.mul_(2), "tensor weight of '0'"),
    "gradient made": (lambda model: model[0](torch.ones(3).double()).sum().backward(), "tensor bias of '0'"),
    "gradient gone": (lambda model: model.zero_grad(), "tensor weight of '0'"),
    "hook of a parameter": (lambda model: model[0].bias.register_hook(lambda g: g), "tensor bias of '0'"),
    "buffer changed": (lambda model: model(torch.ones(2, 3).double()), "tensor running_var of '1'"),
    "buffer replaced": (replace_buffer, "tensor running_mean of '1'"),
    "buffer new": (lambda model: model.register_buffer("mask", torch.ones(1)), "tensor mask of ''"),
    "mode of the model": (lambda model: model.eval(), "module ''"),
    "mode of one module": (lambda model: model[2].eval(), "module '2'"),
    "hook before": (lambda model: model[1].register_forward_pre_hook(lambda *_: None), "_forward_pre_hooks of '1'"),
    "hook behind": (lambda model: model[1].register_forward_hook(lambda *_: None), "_forward_hooks of '1'"),
    "hook backward": (lambda model: model.register_full_backward_hook(lambda *_: None), "_backward_hooks of ''"),
    "forward replaced": (lambda model: setattr(model[0], "forward", lambda x: x), "attributes of '0'"),
    "module replaced": (lambda model: model.__setitem__(2, nn.Dropout(0.1)), "module '2'"),
    "module new": (lambda model: model.append(nn.ReLU()), "module '3'"),
    "torch's draws": (lambda _: torch.rand(1), "torch's random state"),
    "NumPy's draws": (lambda _: np.random.rand(), "NumPy's random state"),  # noqa: NPY002
    "Python's draws": (lambda _: random.random(), "Python's random state"),
}


@pytest.fixture
def leave_the_process_alone():
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002


@pytest.mark.usefixtures("leave_the_process_alone")
@pytest.mark.parametrize("harm", HARMS)
def test_harm_is_noticed(harm):
    do, name = HARMS[harm]
    model = batch_normalized()
    before = fingerprint(model)
    do(model)
    assert name in changes(before, fingerprint(model))


def test_global_settings_are_noticed():
    model = batch_normalized()
    before = fingerprint(model)
    with torch.no_grad():
        assert changes(before, fingerprint(model)) == ["gradients enabled"]
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert changes(before, fingerprint(model)) == ["hooks of all modules"]
    finally:
        handle.remove()


@every_entry
def test_a_model_left_alone_has_no_changes(entry):
    model = entry.problem().model
    assert changes(fingerprint(model), fingerprint(model)) == []


def test_values_that_are_no_numbers_equal_themselves():
    model = batch_normalized()
    nn.init.constant_(model[0].weight, float("nan"))
    assert changes(fingerprint(model), fingerprint(model)) == []


@every_entry
def test_an_untouched_model_trains_as_its_twin(entry):
    assert_trains_as_if_untouched(entry.problem(), entry)


def test_a_model_whose_buffer_or_parameter_was_moved_trains_otherwise():
    entry = ZOO["spectral norm by parametrization"]
    for tensors in (nn.Module.buffers, nn.Module.parameters):
        touched = entry.problem()
        with torch.no_grad():
            for tensor in tensors(touched.model):
                tensor.view(-1)[0] += 1e-6
        with pytest.raises(AssertionError, match="otherwise than without the tool"):
            assert_trains_as_if_untouched(touched, entry)


def test_a_parameter_that_training_no_longer_moves_is_noticed():
    entry = ZOO["PReLU under two names"]
    touched = entry.problem()
    alive = touched.model[1].weight
    touched.model[1].weight = nn.Parameter(alive.detach().clone(), requires_grad=False)
    with pytest.raises(AssertionError, match="otherwise than without the tool"):
        assert_trains_as_if_untouched(touched, entry)


@every_entry
def test_models_can_be_copied_but_for_old_weight_norm(entry):
    model = entry.problem().model
    if entry is ZOO["weight norm by hooks"]:
        with pytest.raises(RuntimeError, match="deepcopy"):
            copy.deepcopy(model)
    else:
        copy.deepcopy(model)
