"""The noise scale from squared norms of batches of two sizes, given or gathered during training."""

import copy
import itertools
import math
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from helpers.gradient_noise import NoiseScaleAccumulator, two_batch_noise_scale
from helpers.lab.runtime import rng, seeded
from tests.enumeration import batch_means, batch_means_with_replacement, vectors
from tests.statistics import assert_refuses, assert_standard

# Two batch sizes


def squared_norm_of(vector):
    return float(np.square(vector).sum())


def all_pairs_of_batches(gradients, small_batch_size, large_batch_size):
    """Return the squared norms of every small batch beside every large one, as tensors, often enough to be given."""
    small = [squared_norm_of(mean) for mean in batch_means(gradients, small_batch_size)]
    large = [squared_norm_of(mean) for mean in batch_means(gradients, large_batch_size)]
    return torch.tensor(list(itertools.product(small, large)), dtype=torch.float64).repeat(500, 1).unbind(1)


@pytest.mark.parametrize(("small", "large"), [(1, 2), (2, 3), (1, 5), (2, 6)])
def test_two_batch_noise_scale_of_all_batches_is_that_of_the_population(small, large):
    gradients = vectors(6)
    trace, squared_norm = np.trace(np.cov(gradients.T)), squared_norm_of(gradients.mean(0))
    estimate = two_batch_noise_scale(
        *all_pairs_of_batches(gradients, small, large),
        small_batch_size=small,
        large_batch_size=large,
        population_size=6,
    )
    assert estimate.value == pytest.approx(trace / squared_norm, rel=1e-10)


@pytest.mark.parametrize(("small", "large"), [(1, 2), (2, 3), (1, 5)])
def test_two_batch_noise_scale_without_the_population_size_has_too_small_a_norm(small, large):
    gradients = vectors(6)
    trace, squared_norm = np.trace(np.cov(gradients.T)), squared_norm_of(gradients.mean(0))
    estimate = two_batch_noise_scale(
        *all_pairs_of_batches(gradients, small, large), small_batch_size=small, large_batch_size=large
    )
    assert estimate.value == pytest.approx(trace / (squared_norm - trace / 6), rel=1e-10)


def test_two_batch_noise_scale_of_all_draws_with_replacement_is_that_of_the_population():
    # Independent draws have the covariance with divisor N.
    gradients = vectors(4)
    small, large = (
        np.tile(np.square(batch_means_with_replacement(gradients, m)).sum(1).repeat(repeats), 100)
        for m, repeats in ((2, 16), (4, 1))
    )
    estimate = two_batch_noise_scale(
        torch.as_tensor(small), torch.as_tensor(large), small_batch_size=2, large_batch_size=4
    )
    expected = np.trace(np.cov(gradients.T, bias=True)) / squared_norm_of(gradients.mean(0))
    assert estimate.value == pytest.approx(expected, rel=1e-10)


def gaussian_norms(stream, n, batch_size, trace=5.0, squared_norm=4.0, coordinates=5):
    noise = rng(stream).standard_normal((n, coordinates)) * math.sqrt(trace / coordinates / batch_size)
    return torch.as_tensor(np.square(noise + math.sqrt(squared_norm / coordinates)).sum(1))


@pytest.mark.parametrize("population_size", [None, 40])
def test_standard_error_of_the_two_batch_noise_scale_equals_the_jackknife(population_size):
    n, b, large_size = 3000, 2, 10
    small, large = gaussian_norms("test.two_batch.small", n, b), gaussian_norms("test.two_batch.large", n, large_size)
    left_small, left_large = (small.sum() - small) / (n - 1), (large.sum() - large) / (n - 1)
    traces = (left_small - left_large) * b * large_size / (large_size - b)
    norms = (large_size * left_large - b * left_small) / (large_size - b)
    norms = norms + (traces / population_size if population_size else 0)
    left_out = traces / norms
    expected = math.sqrt((n - 1) / n * (left_out - left_out.mean()).square().sum())
    estimate = two_batch_noise_scale(
        small, large, small_batch_size=b, large_batch_size=large_size, population_size=population_size
    )
    assert estimate.stderr == pytest.approx(expected, rel=0.01)
    assert estimate.n == n


def test_two_batch_noise_scale_z_scores_are_standard():
    z = []
    for k in range(200):
        small, large = (gaussian_norms(f"test.two_batch.z.{m}.{k}", 1000, m) for m in (2, 10))
        estimate = two_batch_noise_scale(small, large, small_batch_size=2, large_batch_size=10)
        z.append((estimate.value - 5 / 4) / estimate.stderr)
    assert_standard(z)


def norms_at(trace_errors, norm_errors, n=100):
    """Return norms of batches of 1 and 2 whose E small - E large and |∇L|² are so many standard errors above zero.

    Both are some center and ± 1, over one half each.
    """
    noise = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64).repeat(n // 4, 1)
    differences = trace_errors / math.sqrt(n - 1) + noise[:, 0]  # their standard error is 1/√(n - 1)
    squared_norms = norm_errors / math.sqrt(n - 1) + noise[:, 1]
    large = squared_norms + differences  # |∇L|² = 2 large - small
    return large + differences, large


def scale_at(*standard_errors):
    return two_batch_noise_scale(*norms_at(*standard_errors), small_batch_size=1, large_batch_size=2)


def test_two_batch_noise_scale_is_refused_just_below_four_standard_errors_of_the_norm():
    message = (
        "|∇L|² must be 4 standard errors above zero, got 0.401 with standard error 0.101: 100 pairs of batches are too "
        "few to tell the gradient from its noise, about 110 would do; the noise scale is at least "
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        scale_at(30, 3.99)


def test_two_batch_noise_scale_is_given_just_above_four_standard_errors_of_the_norm():
    assert scale_at(30, 4.01).value == pytest.approx(2 * 30 / 4.01, rel=1e-9)


SWAPPED = "the mean of small must exceed that of large by 4 standard errors, since small batches are noisier"


@pytest.mark.parametrize("trace_errors", [3.99, 0.1, -30.0])
def test_small_batches_that_are_not_noisier_are_refused(trace_errors):
    difference = f"a difference of {trace_errors / math.sqrt(99):.3g} ± 0.1"
    message = assert_refuses(lambda: scale_at(trace_errors, 30), SWAPPED, difference)
    assert message.endswith("are the arguments exchanged, the norms not squared, or the batches too few?")


def test_small_batches_that_are_just_noisier_are_not_refused():
    assert scale_at(4.01, 30).value == pytest.approx(2 * 4.01 / 30, rel=1e-9)


@pytest.mark.parametrize("population_size", [None, 40])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_exchanged_arguments_are_refused(population_size, power):
    small, large = (gaussian_norms(f"test.two_batch.exchanged.{m}", 400, m) ** power for m in (2, 10))
    sizes = {"small_batch_size": 2, "large_batch_size": 10, "population_size": population_size}
    with pytest.raises(ValueError, match=SWAPPED):
        two_batch_noise_scale(large, small, **sizes)


def test_two_batch_noise_scale_takes_single_precision_and_a_graph():
    small, large = (gaussian_norms(f"test.two_batch.single.{m}", 400, m) for m in (2, 10))
    sizes = {"small_batch_size": 2, "large_batch_size": 10}
    expected = two_batch_noise_scale(small, large, **sizes)
    found = two_batch_noise_scale(small.float().requires_grad_(), large.float().requires_grad_(), **sizes)
    assert found.value == pytest.approx(expected.value, rel=1e-5)


def two_batches(small=2, large=8, small_shape=(20,), large_shape=(20,), population_size=None, value=1.0):
    return two_batch_noise_scale(
        torch.full(small_shape, value),
        torch.ones(large_shape),
        small_batch_size=small,
        large_batch_size=large,
        population_size=population_size,
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: two_batches(large_shape=(19,)), "small and large must have one shape (n,), got (20,), (19,)"),
        (
            lambda: two_batches(small_shape=(20, 1), large_shape=(20, 1)),
            "small and large must have one shape (n,), got (20, 1), (20, 1)",
        ),
        (
            lambda: two_batches(small_shape=(), large_shape=()),
            "small and large must have one shape (n,), got (), ()",
        ),
        (lambda: two_batches(small=0), "small_batch_size must be at least 1, got 0"),
        (lambda: two_batches(small=8), "small_batch_size must be below 8, got 8"),
        (lambda: two_batches(small=9), "small_batch_size must be below 8, got 9"),
        (lambda: two_batches(population_size=7), "batch_size must not exceed population_size 7, got 8"),
        (
            lambda: two_batches(small_shape=(3,), large_shape=(3,)),
            "a standard error needs at least 4 pairs of batches, got 3",
        ),
        (lambda: two_batches(value=math.nan), "squared norms must be finite, got 20 NaN or infinite"),
        (lambda: two_batches(value=math.inf), "squared norms must be finite, got 20 NaN or infinite"),
    ],
)
def test_refusals_state_the_rule_and_the_value(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


# During training

STEPS, MICRO_BATCHES, SIZE = 40, 3, 2


def micro_batch_gradients(name, dtype=np.float64):
    """Return skewed gradients of micro-batches, shape (steps, micro-batches, P)."""
    draws = rng(f"test.accumulator.{name}").standard_exponential((STEPS, MICRO_BATCHES, SIZE, 5))
    return (draws.mean(2) + 0.5).astype(dtype)


def expected_parts(gradients):
    """Return tr S and |∇L|² of each step: products of different micro-batches are unbiased for |∇L|²."""
    pairs = list(itertools.permutations(range(MICRO_BATCHES), 2))
    norms = np.array([np.mean([step[i] @ step[j] for i, j in pairs]) for step in gradients])
    variances = np.array([np.var(step, axis=0, ddof=1).sum() for step in gradients])
    return SIZE * variances, norms


def fed(gradients, **options):
    accumulator = NoiseScaleAccumulator(**options)
    for step in gradients:
        for own in step:
            accumulator.update([torch.as_tensor(own[:2]), torch.as_tensor(own[2:])], SIZE)
        accumulator.end_step()
    return accumulator


@pytest.mark.parametrize("population_size", [None, 50])
def test_the_accumulator_compares_micro_batches_of_a_step_with_each_other(population_size):
    gradients = micro_batch_gradients("compared")
    traces, norms = expected_parts(gradients)
    norms = norms + (traces / population_size if population_size else 0)
    found = fed(gradients, population_size=population_size).estimate()
    ratio = traces.mean() / norms.mean()
    error = np.std(traces - ratio * norms, ddof=1) / math.sqrt(STEPS) / norms.mean()
    assert found.value == pytest.approx(ratio, rel=1e-9)
    assert found.stderr == pytest.approx(error, rel=1e-9)
    assert found.n == STEPS


def test_the_accumulator_gives_the_two_batch_noise_scale():
    gradients = micro_batch_gradients("compared")
    small = torch.as_tensor(np.square(gradients).sum(2).mean(1))
    large = torch.as_tensor(np.square(gradients.mean(1)).sum(1))
    expected = two_batch_noise_scale(small, large, small_batch_size=SIZE, large_batch_size=SIZE * MICRO_BATCHES)
    found = fed(gradients).estimate()
    assert found.value == pytest.approx(expected.value, rel=1e-9)
    assert found.stderr == pytest.approx(expected.stderr, rel=1e-9)


@pytest.mark.parametrize("factor", [1.0, 1 / MICRO_BATCHES])
def test_the_accumulator_reads_gradients_that_add_up_in_a_model(factor):
    # At one point, so that gradients of all steps are known beforehand; a step of the optimizer would move it.
    with seeded("test.accumulator.model"):
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    frozen = copy.deepcopy(model)
    x = torch.as_tensor(rng("test.accumulator.inputs").standard_normal((STEPS, MICRO_BATCHES, SIZE, 4)))
    accumulator, gradients = NoiseScaleAccumulator(), []
    for step in x:
        for part in step:
            (factor * functional.mse_loss(model(part), 3 + part[:, :1])).backward()
            accumulator.update(model, SIZE)
            own = torch.autograd.grad(functional.mse_loss(frozen(part), 3 + part[:, :1]), frozen.parameters())
            gradients.append(torch.cat([g.flatten() for g in own]).numpy())
        accumulator.end_step()
        model.zero_grad()
    expected = fed(np.array(gradients).reshape(STEPS, MICRO_BATCHES, -1)).estimate()
    found = accumulator.estimate()
    assert found.value == pytest.approx(expected.value, rel=1e-8)
    assert found.stderr == pytest.approx(expected.stderr, rel=1e-8)


def test_the_accumulator_leaves_out_gradients_of_frozen_parameters():
    model, accumulator = nn.Linear(2, 1), NoiseScaleAccumulator()
    model.bias.requires_grad_(False)
    weights = [[own[:2] for own in step] for step in micro_batch_gradients("frozen")]
    for step in weights:
        total = torch.zeros(1, 2)
        for own in step:
            total = total + torch.as_tensor(own, dtype=torch.float32)
            model.weight.grad, model.bias.grad = total.clone(), torch.tensor([7.0])
            accumulator.update(model, SIZE)
        accumulator.end_step()
    assert accumulator.interval() == pytest.approx(fed(weights).interval(), rel=1e-3)


def test_the_accumulator_leaves_gradients_alone():
    model = nn.Linear(2, 1)
    model(torch.ones(3, 2)).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    NoiseScaleAccumulator().update(model, 3)
    assert all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), before, strict=True))


def test_the_accumulator_adds_up_half_precision_in_single():
    gradients = micro_batch_gradients("half")
    halves = [[own.astype(np.float32) for own in step] for step in gradients]
    accumulator = NoiseScaleAccumulator()
    for step in halves:
        for own in step:
            accumulator.update([torch.as_tensor(own).bfloat16()], SIZE)
        accumulator.end_step()
    rounded = [[torch.as_tensor(own).bfloat16().double().numpy() for own in step] for step in halves]
    assert accumulator.estimate().value == pytest.approx(fed(rounded).estimate().value, rel=1e-4)


@pytest.mark.parametrize("level", [0.95, 0.5])
def test_the_accumulator_has_an_interval(level):
    accumulator = fed(micro_batch_gradients("compared"))
    low, high = accumulator.interval(level)
    estimate = accumulator.estimate()
    assert low < estimate.value < high
    assert (high - low) / estimate.stderr == pytest.approx({0.95: 3.92, 0.5: 1.35}[level], rel=0.15)


def test_the_interval_of_the_accumulator_is_at_95_percent_unless_told_otherwise():
    accumulator = fed(micro_batch_gradients("compared"))
    assert accumulator.interval() == accumulator.interval(0.95)


def with_one(value=1.0):
    accumulator = NoiseScaleAccumulator()
    accumulator.update([torch.full((3,), value)], 4)
    return accumulator


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: with_one().update([torch.ones(3)], 5), "batch_size must be 4, as before in this step, got 5"),
        (lambda: with_one().update([torch.ones(3)], 0), "batch_size must be at least 1, got 0"),
        (lambda: with_one().end_step(), "a step must have at least 2 micro-batches, got 1"),
        (lambda: NoiseScaleAccumulator().end_step(), "a step must have at least 2 micro-batches, got 0"),
        (lambda: with_one(math.nan), "gradients must be finite, got a squared norm of nan in torch.float32"),
        (lambda: with_one(1e30), "gradients must be finite, got a squared norm of inf in torch.float32"),
        (
            lambda: NoiseScaleAccumulator().update(nn.Linear(2, 1), 4),
            "there must be a gradient, got none: call update after the backward pass",
        ),
        (
            lambda: NoiseScaleAccumulator().update([], 4),
            "there must be a gradient, got none: call update after the backward pass",
        ),
        (lambda: fed(micro_batch_gradients("few")[:3]).estimate(), "a standard error needs at least 4 steps, got 3"),
        (lambda: NoiseScaleAccumulator().interval(), "a standard error needs at least 4 steps, got 0"),
        (lambda: NoiseScaleAccumulator(population_size=0), "population_size must be at least 1, got 0"),
    ],
)
def test_the_accumulator_refuses_with_the_rule_and_the_value(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()
