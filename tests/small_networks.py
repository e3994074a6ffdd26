"""Small networks of many kinds, data for them, and their gradients by one plain backward pass an example."""

import copy

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from helpers.lab.runtime import rng, seeded


class Tied(nn.Module):
    """Has two layers that share a weight."""

    def __init__(self, one=nn.Linear):
        super().__init__()
        self.one, self.other = one(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight

    def forward(self, x):
        return self.other(torch.tanh(self.one(x)))


class TiedToEmbedding(Tied):
    """Shares its weight with an embedding that it does not apply."""

    def __init__(self):
        super().__init__(nn.Embedding)

    def forward(self, x):
        return self.other(x)


class Embedded(nn.Module):
    """Averages the embeddings of a sentence of integers."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(7, 3), nn.Linear(3, 4)

    def forward(self, x):
        return self.head(self.words(x).mean(1))


class Tokens(Embedded):
    """Applies a linear layer to every word of a sentence, so that its gradient is a sum of outer products."""

    def __init__(self):
        super().__init__()
        self.each = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.each(self.words(x))).mean(1))


class Buffered(nn.Module):
    """Standardizes its inputs by fixed statistics, which are buffers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("center", torch.linspace(-1, 1, 4))
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        return self.head((x - self.center).square())


class PartlyUsed(nn.Module):
    """Has a parameter that no output depends on."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.ones(2, 3))
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        return self.head(x)


class Scaled(nn.Module):
    """Has a trainable temperature, a parameter without dimensions."""

    def __init__(self):
        super().__init__()
        self.head, self.scale = nn.Linear(4, 4), nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.scale * self.head(x)


def perceptron(activation=nn.ReLU, bias=True):
    return nn.Sequential(
        nn.Linear(4, 6, bias=bias), activation(), nn.Linear(6, 5, bias=bias), activation(), nn.Linear(5, 4, bias=bias)
    )


def frozen(model, *names):
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def convolutional():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4))


def trained_batch_norm():
    """Return a network whose running statistics are those of other data."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))
    model(3 * torch.randn(50, 4) + 1)
    return model.eval()


MODELS = {
    "perceptron": perceptron,
    "perceptron in evaluation mode": lambda: perceptron().eval(),
    "one layer": lambda: nn.Linear(4, 4),
    "convolution and group norm": convolutional,
    "layer norm": lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 4)),
    "tied weights": Tied,
    "embedding": Embedded,
    "layer applied to every word": Tokens,
    "frozen parameters": lambda: frozen(perceptron(), "0.weight", "2.bias"),
    "buffers": Buffered,
    "unused parameter": PartlyUsed,
    "dropout in evaluation mode": lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4)).eval(),
    "batch norm in evaluation mode": trained_batch_norm,
}

LOSSES = {
    "cross entropy": functional.cross_entropy,
    "cross entropy, summed": nn.CrossEntropyLoss(reduction="sum"),
    "cross entropy, not reduced": nn.CrossEntropyLoss(reduction="none"),
    "squared error": functional.mse_loss,
    "squared error, summed": nn.MSELoss(reduction="sum"),
    "squared error, not reduced": nn.MSELoss(reduction="none"),
}


def build(constructor, dtype=torch.float64):
    with seeded("test.gradient_noise.model"):
        return constructor().to(dtype)


def build_named(name, dtype=torch.float64):
    return build(MODELS[name], dtype)


def examples(model, loss="cross entropy", n=7):
    """Return inputs and targets of the kinds that model and loss take."""
    draws = rng("test.gradient_noise.examples")
    dtype = next(model.parameters()).dtype
    modules = list(model.modules())
    if isinstance(model, Embedded):
        inputs = torch.as_tensor(draws.integers(7, size=(n, 5)))
    elif any(isinstance(module, nn.Conv2d) for module in modules):
        inputs = torch.as_tensor(draws.standard_normal((n, 1, 4, 4))).to(dtype)
    else:
        inputs = torch.as_tensor(draws.standard_normal((n, 4))).to(dtype)
    if loss.startswith("cross entropy"):
        return inputs, torch.as_tensor(draws.integers(4, size=n))
    return inputs, torch.as_tensor(draws.standard_normal((n, 4))).to(dtype)


def looped_gradients(model, loss, inputs, targets):
    """Return the gradients of single examples by one backward pass each, on a copy of the model."""
    model = copy.deepcopy(model)
    rows = {name: [] for name, p in model.named_parameters() if p.requires_grad}
    for x, y in zip(inputs, targets, strict=True):
        model.zero_grad()
        loss(model(x.unsqueeze(0)), y.unsqueeze(0)).sum().backward()
        for name in rows:
            p = model.get_parameter(name)
            rows[name].append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
    return {name: torch.stack(gradients) for name, gradients in rows.items()}


def looped_matrix(model, loss, inputs, targets):
    """Return :func:`looped_gradients` as an array of one row an example, in the order of ``model.parameters()``."""
    looped = looped_gradients(model, loss, inputs, targets)
    rows = [torch.nn.utils.parameters_to_vector([g[k] for g in looped.values()]) for k in range(len(inputs))]
    return torch.stack(rows).numpy()


def assert_same(found, expected, **tolerance):
    assert list(found) == list(expected)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], **{"rtol": 1e-10, "atol": 1e-12, **tolerance})


def far_examples():
    """Return examples of one class only, whose gradients nearly agree, so that their noise scale is small.

    They lie about two points, so that no few of them own the variance.
    """
    draws, center = rng("test.gradient_noise.far"), 1 + 0.1 * np.tile([1, -1], 20)
    inputs = 0.02 * draws.standard_normal((40, 4)) + center[:, None]
    return torch.as_tensor(inputs), torch.zeros(40, dtype=torch.int64)


def gradient_of_mean_loss(model, loss, inputs, targets):
    """Return the gradient of the mean loss by one backward pass for all examples, on a copy of the model."""
    model = copy.deepcopy(model)
    losses = [loss(model(inputs)[k : k + 1], targets[k : k + 1]).sum() for k in range(len(inputs))]
    (sum(losses) / len(inputs)).backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }


COUPLED = {
    "in training mode": (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "1", "BatchNorm1d"),
    "in training mode without parameters": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False)),
        "1",
        "BatchNorm1d",
    ),
    "without running statistics": (
        lambda: nn.Sequential(
            nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4, affine=False, track_running_stats=False))
        ).eval(),
        "1.0",
        "BatchNorm1d",
    ),
    "alone": (lambda: nn.BatchNorm1d(4), "the model", "BatchNorm1d"),
    "of images": (
        lambda: nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(4, 4)),
        "1",
        "BatchNorm2d",
    ),
}
