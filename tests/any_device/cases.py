"""A call of every public tensor function of ``helpers``, with arguments that are made on a given device.

A function has a row for each of its ways to make tensors. ``Place`` makes the arguments. Here stand the rows of the
bench; a chapter's stand in its own test module, as ``DEVICE_CASES`` and ``DEVICE_CASES_BY_VALUES``.
"""

from importlib import import_module
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from helpers import gradient_noise, initialization
from helpers.lab import (
    attention,
    batches,
    checks,
    claims,
    datasets,
    estimates,
    gaussian,
    gradients,
    models,
    pretrained,
    runtime,
    training,
    watch,
)
from helpers.lab import networks as random_networks

MAP = {"activation": torch.tanh, "weight_scale": 1.7}
ID = "any.device"


def problem(at, n=6):
    return {"model": at.model(), "loss": cross_entropy, "inputs": at.normal(n, 3), "targets": at.integers(2, n)}


def direction(at):
    return {"0.weight": at.normal(4, 3), "0.bias": at.normal(4), "2.weight": at.normal(2, 4), "2.bias": at.normal(2)}


def one_sided_problem(at):
    """With one label and inputs that differ little, a linear layer's gradient is large beside its noise."""
    model = nn.Sequential(nn.Linear(3, 2, dtype=torch.float64, device=at.device))
    alike = 3 + 0.1 * at.normal(600, 3)
    labels = torch.zeros(600, dtype=torch.int64, device=at.device)
    return {"model": model, "loss": cross_entropy, "inputs": alike, "targets": labels}


def squared_norms(at):
    return {
        "small": 9 + 0.01 * at.normal(50),
        "large": 5 + 0.01 * at.normal(50),
        "small_batch_size": 1,
        "large_batch_size": 2,
    }


def images(at):
    return {
        "images": at.normal(4, 64),
        "shift": at.integers(9, 4, 2),
        "noise_level": at.normal(4).abs(),
        "generator": at.generator,
    }


def classification(at):
    return {"model": at.model(), "x": at.normal(6, 3), "y": at.integers(2, 6)}


def schedule(at):
    return classification(at) | {"epochs": 2, "batch_size": 4, "learning_rate": 0.1, "generator": at.generator}


def networks(at, **options):
    return {
        "inputs": at.normal(4, 3),
        "widths": (5, 2),
        "n_networks": 6,
        "weight_scale": 2.0,
        "generator": at.generator,
    } | options


def network(at):
    return {"model": at.model(), "inputs": at.normal(6, 3), "generator": at.generator}


def convolutional_network(at):
    options = {"dtype": torch.float64, "device": at.device}
    layers = nn.Conv2d(2, 3, 3, padding=1, **options), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2, **options)
    return {"model": nn.Sequential(*layers), "inputs": at.normal(6, 2, 4, 4), "generator": at.generator}


def samples(at):
    return {"samples": 3 + at.normal(400, 2)}


def agreement(at):
    simulated = estimates.Estimate([1.001, 2.001], 0.001, 1000, 0.0)
    return {"id": ID, "simulated": simulated, "formula": 1 + torch.arange(2.0, device=at.device)}


def equal(at):
    number = at.normal(3).abs() + 1
    return {"id": ID, "formula": number, "computed": number.clone(), "scale": number}


def bound(at):
    number = at.normal(3).abs() + 1
    return {
        "id": ID,
        "observed": number,
        "bound": number + 1,
        "attained": (number, number),
        "control": (number + 1, number),
    }


# Run on the other device, where tensors have no values.
ELSEWHERE = [
    (  # a small batch, by Floyd's algorithm
        gradient_noise.sample_batches,
        lambda at: {"n_batches": 5, "batch_size": 3, "population_size": 20, "generator": at.generator},
    ),
    (  # a large one, by a shuffle of a few examples
        gradient_noise.sample_batches,
        lambda at: {"n_batches": 5, "batch_size": 18, "population_size": 20, "generator": at.generator},
    ),
    (  # and of many
        gradient_noise.sample_batches,
        lambda at: {"n_batches": 5, "batch_size": 180, "population_size": 200, "generator": at.generator},
    ),
    (
        gradient_noise.shuffled_epochs,
        lambda at: {"n_epochs": 5, "batch_size": 4, "population_size": 20, "generator": at.generator},
    ),
    (gradient_noise.batch_noise, lambda at: {"gradients": at.normal(20, 3), "batches": at.integers(20, 5, 4)}),
    (gradient_noise.batch_noise, lambda at: {"gradients": at.normal(20, 16), "batches": at.integers(20, 5, 4)}),
    (gradients.flatten, lambda at: {"gradients": {"weight": at.normal(6, 4, 3), "bias": at.normal(6, 4)}}),
    (random_networks.preactivations, networks),
    (random_networks.preactivations, lambda at: networks(at, bias_variance=0.1, mode="fan_avg")),
    (random_networks.propagate, networks),
    (random_networks.propagate, lambda at: networks(at, bias_variance=0.1, activation=torch.tanh)),
    (checks.require_same_device, lambda at: {"generator": at.generator, "x": at.normal(3)}),
    (datasets.digits, lambda at: {}),
    (pretrained.tokenize, lambda at: {"texts": ["one", "one two"]}),
    (training.train, schedule),
    (training.per_sample_loss, classification),
    (training.accuracy, classification),
]

# Decide by values, or hand them to NumPy: run on the CPU, where every new tensor must be told its device.
BY_VALUES = [
    (gradients.per_sample_gradients, problem),
    (gradients.per_sample_gradients, lambda at: problem(at) | {"chunk_size": 4}),
    (gradients.per_sample_squared_norms, problem),
    (gradients.mean_gradient, lambda at: problem(at) | {"chunk_size": 4}),
    (gradients.per_sample_products, lambda at: problem(at) | {"direction": direction(at)}),
    (gradient_noise.gradient_noise_scale, one_sided_problem),
    (gradient_noise.noise_scale_interval, one_sided_problem),
    (gradient_noise.noise_scale_report, one_sided_problem),
    (gradient_noise.two_batch_noise_scale, squared_norms),
    (gradient_noise.two_batch_noise_scale, lambda at: squared_norms(at) | {"population_size": 100}),
    (checks.require_positive, lambda at: {"x": at.normal(3).abs() + 1}),
    (checks.require_not_negative, lambda at: {"x": at.normal(3).abs()}),
    (checks.require_at_least_one, lambda at: {"x": at.normal(3).abs() + 1}),
    (checks.require_between, lambda at: {"low": -9, "high": 9, "x": at.normal(3)}),
    (initialization.propagation_report, network),
    (initialization.propagation_report, convolutional_network),
    (datasets.augment, images),
    (estimates.mean, samples),
    (estimates.proportion, lambda at: {"events": at.normal(20, 2) > 0}),
    (estimates.variance, samples),
    (estimates.covariance, samples),
    (estimates.function_of, lambda at: samples(at) | {"function": lambda means: means[0] / means[1]}),
    (claims.agree, agreement),
    (claims.check_agree, agreement),
    (claims.exact, equal),
    (claims.check_exact, equal),
    (claims.bounded, bound),
    (claims.check_bounded, bound),
]

# Numbers, found on the CPU wherever the book computes.
NUMBERS = [
    (gaussian.expectation, lambda at: {"function": torch.tanh, "variance": 1.2}),
    (gaussian.product_expectation, lambda at: {"function": torch.tanh, "variance": 1.2, "correlation": 0.3}),
    (gaussian.second_moment, lambda at: {"activation": torch.tanh, "variance": 1.2}),
    (gaussian.mean_slopes, lambda at: {"activation": torch.tanh, "variance": 1.2}),
    (gaussian.slope_moment, lambda at: {"activation": torch.tanh, "variance": 1.2}),
    (gaussian.slope_moment, lambda at: {"activation": torch.tanh, "variance": 1.2, "correlation": 0.3}),
    (initialization.variance_map, lambda at: MAP | {"variance": 1.2}),
    (initialization.fixed_variance, lambda at: MAP | {"bias_variance": 0.1}),
    (initialization.chi, lambda at: MAP | {"variance": 1.2}),
    (initialization.chi, lambda at: MAP | {"variance": 1.2, "correlation": 0.3}),
    (initialization.correlation_map, lambda at: MAP | {"variance": 1.2, "correlation": 0.3}),
    (initialization.fixed_correlation, lambda at: MAP | {"variance": 1.2}),
    (initialization.depth_scale, lambda at: MAP | {"bias_variance": 0.1}),
    (initialization.edge_of_chaos, lambda at: {"activation": torch.tanh, "variance": 1.2}),
]

# Build a model, on the CPU, whose parameters then move.
MODELS = [(models.mlp, {"sizes": (3, 4, 2)}, lambda at: at.normal(5, 3).float())]

# Not run: they say what the device is, or make a model without values first.
CHOOSE_THE_DEVICE = [runtime.device, runtime.generator, pretrained.minilm]
# Not run by themselves, as generators and contexts: the gradients above run them.
WITHIN_OTHERS = [
    attention.watch_attention,
    batches.batches_of,
    gradients.gradient_chunks,
    gradients.gradient_sums,
    watch.is_leaf,
    watch.output_gradients,
    watch.untouched,
    watch.watch,
]


def in_test_modules(name):
    """Return the rows of all test modules that have a list of this name."""
    modules = sorted(path for path in Path(__file__).parents[1].glob("test_*.py") if f"\n{name} = " in path.read_text())
    return [row for path in modules for row in getattr(import_module(f"tests.{path.stem}"), name)]


ELSEWHERE += in_test_modules("DEVICE_CASES")
BY_VALUES += in_test_modules("DEVICE_CASES_BY_VALUES")
