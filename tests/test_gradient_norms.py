"""Squared norms of the gradients of single examples, against one plain backward pass an example."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from helpers.lab.gradients import flatten, per_sample_gradients, per_sample_squared_norms
from tests.small_networks import (
    LOSSES,
    MODELS,
    Embedded,
    PartlyUsed,
    Tied,
    TiedToEmbedding,
    build,
    convolutional,
    examples,
    frozen,
    looped_matrix,
    perceptron,
    trained_batch_norm,
)


class NormedInput(nn.Module):
    """Ends in something other than a linear layer, and starts with a normalization without parameters."""

    def __init__(self):
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 4)

    def forward(self, x):
        return torch.sin(self.layer(self.norm(x))) * 2


class Branches(nn.Module):
    """Applies two layers to one input and a third to their product, in another order than it defines them."""

    def __init__(self):
        super().__init__()
        self.last, self.one, self.other = nn.Linear(6, 4), nn.Linear(4, 6), nn.Linear(4, 6)

    def forward(self, x):
        return self.last(self.other(x) * self.one(x))


LINEAR_MODELS = {
    "relu": perceptron,
    "no biases": lambda: perceptron(bias=False),
    "one layer": lambda: nn.Linear(4, 4),
    "relu in place": lambda: perceptron(lambda: nn.ReLU(inplace=True)),
    "relu in place at the end": lambda: nn.Sequential(perceptron(), nn.ReLU(inplace=True)),
    "gelu": lambda: perceptron(nn.GELU),
    "tanh": lambda: perceptron(nn.Tanh),
    "no linear last layer": NormedInput,
    "branches": Branches,
    "frozen weight": lambda: frozen(perceptron(), "2.weight"),
    "frozen bias": lambda: frozen(perceptron(), "2.bias"),
    "frozen weight of the first layer": lambda: frozen(perceptron(), "0.weight"),
    "only one bias trained": lambda: frozen(perceptron(), "0.weight", "2.weight", "2.bias", "4.weight", "4.bias"),
    "frozen layer": lambda: frozen(perceptron(), "2.weight", "2.bias"),
    "frozen convolution": lambda: frozen(convolutional(), "0.weight", "0.bias", "1.weight", "1.bias"),
    "batch norm without parameters": lambda: nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False), nn.ReLU(), nn.Linear(6, 4)
    ).eval(),
    "subclass of linear": lambda: nn.Sequential(nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4)),
}


def squared_norms_by_loops(model, loss, inputs, targets):
    return torch.as_tensor(np.square(looped_matrix(model, loss, inputs, targets)).sum(1))


@pytest.mark.parametrize("name", LINEAR_MODELS)
def test_squared_norms_equal_those_of_looped_gradients(name):
    model = build(LINEAR_MODELS[name])
    data = examples(model)
    found = per_sample_squared_norms(model, functional.cross_entropy, *data)
    expected = squared_norms_by_loops(model, functional.cross_entropy, *data)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_squared_norms_are_those_of_the_loss_of_one_example(name):
    model = build(perceptron)
    data = examples(model, name)
    found = per_sample_squared_norms(model, LOSSES[name], *data)
    rows = flatten(per_sample_gradients(model, LOSSES[name], *data))
    torch.testing.assert_close(found, rows.square().sum(1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("n", [1, 2])
def test_squared_norms_of_few_examples(n):
    model = build(perceptron)
    data = examples(model, n=n)
    found = per_sample_squared_norms(model, functional.cross_entropy, *data)
    expected = squared_norms_by_loops(model, functional.cross_entropy, *data)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_squared_norms_of_single_precision_stay_single():
    model = build(perceptron, torch.float32)
    data = examples(model)
    found = per_sample_squared_norms(model, functional.cross_entropy, *data)
    assert found.dtype == torch.float32
    expected = squared_norms_by_loops(model, functional.cross_entropy, *data)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_squared_norms_leave_no_hooks():
    model = build(perceptron)
    per_sample_squared_norms(model, functional.cross_entropy, *examples(model))
    assert hooks(model) == 0


def test_squared_norms_leave_no_hooks_after_an_error_of_the_model():
    model = build(perceptron)
    inputs, targets = examples(model)
    with pytest.raises(RuntimeError, match="shapes"):
        per_sample_squared_norms(model, functional.cross_entropy, inputs[:, :2], targets)
    assert hooks(model) == 0


def test_squared_norms_leave_no_hooks_after_an_error_of_the_loss():
    def broken(predictions, targets):
        raise ZeroDivisionError

    model = build(perceptron)
    with pytest.raises(ZeroDivisionError):
        per_sample_squared_norms(model, broken, *examples(model))
    assert hooks(model) == 0


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.layer = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(torch.relu(self.layer(self.first(x))))


class Never(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.idle, self.also_idle = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.head(x)


def test_a_frozen_layer_may_be_applied_twice_and_to_anything():
    model = build(lambda: nn.Sequential(frozen(Twice(), "layer.weight", "layer.bias"), nn.Linear(4, 4)))
    data = examples(model)
    found = per_sample_squared_norms(model, functional.cross_entropy, *data)
    expected = squared_norms_by_loops(model, functional.cross_entropy, *data)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_frozen_parameters_may_be_shared_and_belong_to_other_layers():
    model = build(lambda: frozen(TiedToEmbedding(), "one.weight"))
    data = examples(model)
    found = per_sample_squared_norms(model, functional.cross_entropy, *data)
    expected = squared_norms_by_loops(model, functional.cross_entropy, *data)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


class Context(nn.Module):
    """Adds one layer's image of a constant row, which all examples share."""

    def __init__(self):
        super().__init__()
        self.head, self.context = nn.Linear(4, 4), nn.Linear(3, 4)
        self.register_buffer("row", torch.tensor([[1.0, -2.0, 0.5]]))

    def forward(self, x):
        return self.head(x) + self.context(self.row)


class LowRank(nn.Linear):
    """Adds a matrix of rank one to its weight, as a subclass with parameters of its own."""

    def __init__(self):
        super().__init__(4, 4)
        self.down, self.up = nn.Parameter(torch.randn(1, 4)), nn.Parameter(torch.randn(4, 1))

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up.T


def reparametrized():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 4))


class SideBranch(nn.Module):
    """Computes something that its output does not need."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        self.unused(x)
        return self.used(x)


def test_a_layer_whose_output_is_not_used_adds_nothing_to_the_squared_norms():
    model = build(SideBranch)
    data = examples(model)
    norms = per_sample_squared_norms(model, functional.cross_entropy, *data)
    looped = looped_matrix(model, functional.cross_entropy, *data)
    np.testing.assert_allclose(norms, np.square(looped).sum(1), rtol=1e-9)


GENERAL_MODELS = {
    "convolution and group norm": convolutional,
    "frozen convolution": lambda: frozen(convolutional(), "0.weight", "0.bias"),
    "layer norm": MODELS["layer norm"],
    "parameter of no layer": PartlyUsed,
    "embedding": Embedded,
    "every word": MODELS["layer applied to every word"],
    "batch norm in evaluation": trained_batch_norm,
    "tied": Tied,
    "tied to an embedding that is not used": TiedToEmbedding,
    "used twice": Twice,
    "the same layer twice": lambda: nn.Sequential(*[nn.Linear(4, 4)] * 2),
    "never used": Never,
    "context that all share": Context,
    "parametrized": reparametrized,
    "low rank": lambda: nn.Sequential(LowRank()),
}


@pytest.mark.parametrize("name", GENERAL_MODELS)
def test_squared_norms_of_any_model_equal_those_of_looped_gradients(name):
    model = build(GENERAL_MODELS[name])
    data = examples(model)
    found = per_sample_squared_norms(model, functional.cross_entropy, *data, chunk_size=4)
    expected = squared_norms_by_loops(model, functional.cross_entropy, *data)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15)
    assert hooks(model) == 0


@pytest.mark.parametrize("shape", [(3, 5, 4), (7, 2, 3, 4), (5, 5, 4), (1, 5, 4)])
def test_squared_norms_of_sequences_equal_those_of_looped_gradients(shape):
    model = build(perceptron)
    inputs = torch.sin(torch.arange(torch.Size(shape).numel(), dtype=torch.float64)).reshape(shape)
    found = per_sample_squared_norms(model, functional.mse_loss, inputs, inputs.cos())
    expected = squared_norms_by_loops(model, functional.mse_loss, inputs, inputs.cos())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
