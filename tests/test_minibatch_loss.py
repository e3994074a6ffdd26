"""The chapter's closed forms, samplers and estimators, each against something that does not use them.

Statistical tests allow what a right program exceeds with probability 1e-6, for all entries of a test together.
"""

import inspect
import itertools
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, stats

from helpers import minibatch_loss
from helpers.lab.runtime import generator, rng
from helpers.minibatch_loss import (
    berry_esseen_bound,
    effective_batch_size,
    equicorrelated_losses,
    equicorrelated_variance,
    exponential_batch_cdf,
    exponential_distance,
    iid_losses,
    iid_variance,
    required_batch_size,
    shared_shift_gradients,
    shared_shift_moments,
    smallest_correlation,
    stable_losses,
    stable_spread,
    two_point_distance,
    variance_floor,
)
from tests.statistics import assert_law, assert_means, assert_z

MEAN, STD, BATCH_SIZE = 1.5, 0.7, 4
CORRELATIONS = (-1 / 3, -0.15, 0.0, 0.35, 1.0)  # from the smallest that four losses can share
GRADIENTS = {
    "slope": 1.7,
    "true_slope": 0.6,
    "intercept": -0.8,
    "feature_std": 1.3,
    "shift_std": 0.45,
    "label_std": 0.9,
}
SOURCES = {"mean": MEAN, "std": STD}
DEFAULTS = {"marginal": "gaussian", "dtype": torch.float64}
by_properties = settings(max_examples=100, deadline=None, database=None)
property_seed = seed(int(rng("test.minibatch_loss.properties").integers(2**32)))


def equicorrelation_matrix(batch_size, correlation, std=1.0):
    """Write the covariance matrix entry by entry."""
    return np.array(
        [[std * std if i == j else correlation * std * std for j in range(batch_size)] for i in range(batch_size)]
    )


def variance_by_quadrature(std, batch_size, correlation):
    """Return 1ᵀ Σ 1 / m²."""
    return equicorrelation_matrix(batch_size, correlation, std).sum() / batch_size**2


def standardized_power(n_batches, marginal, correlation, power):
    """Draw batches and return ((Z - L)/σ)^power."""
    losses = equicorrelated_losses(
        n_batches,
        BATCH_SIZE,
        **SOURCES,
        correlation=correlation,
        marginal=marginal,
        generator=generator(f"test.equicorrelated.{marginal}.{correlation}"),
    )
    return ((losses - MEAN) / STD) ** power


# Variance of the batch loss


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_iid_variance_equals_enumeration_of_all_batches(batch_size):
    values, probabilities = (0.3, 1.1, 2.9), (0.2, 0.5, 0.3)
    first = np.dot(probabilities, values)
    std = math.sqrt(np.dot(probabilities, np.square(values)) - first**2)
    weights = [math.prod(batch) for batch in itertools.product(probabilities, repeat=batch_size)]
    means = [sum(batch) / batch_size for batch in itertools.product(values, repeat=batch_size)]
    variance = np.dot(weights, np.square(means)) - np.dot(weights, means) ** 2
    assert iid_variance(std, batch_size) == pytest.approx(variance, rel=1e-12)


def test_iid_variance_takes_an_array_of_batch_sizes():
    np.testing.assert_allclose(iid_variance(3.0, np.array([1, 2, 4])), [9, 4.5, 2.25], rtol=1e-15)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize("position", [0.0, 0.2, 0.7, 1.0])
def test_equicorrelated_variance_equals_matrix_quadrature(batch_size, position):
    smallest = -1 / (batch_size - 1) if batch_size > 1 else -1
    correlation = smallest + position * (1 - smallest)
    expected = variance_by_quadrature(STD, batch_size, correlation)
    assert equicorrelated_variance(STD, batch_size, correlation) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_equicorrelated_variance_takes_arrays_of_batch_sizes_and_correlations():
    variance = equicorrelated_variance(STD, np.array([2, 5]), np.array([0.3, -0.1]))
    expected = [variance_by_quadrature(STD, 2, 0.3), variance_by_quadrature(STD, 5, -0.1)]
    np.testing.assert_allclose(variance, expected, rtol=1e-12)


@property_seed
@by_properties
@given(st.integers(1, 1000), st.floats(0.01, 100), st.floats(0, 1), st.floats(0, 1))
def test_equicorrelated_variance_is_not_negative_and_grows_with_the_correlation(batch_size, std, one, other):
    smallest = float(smallest_correlation(batch_size))
    low, high = sorted(min(smallest + position * (1 - smallest), 1.0) for position in (one, other))
    assert 0 <= equicorrelated_variance(std, batch_size, low) <= equicorrelated_variance(std, batch_size, high)


def test_variance_is_not_negative_at_a_correlation_that_rounding_moved_below_the_smallest():
    assert equicorrelated_variance(1.0, 8, np.nextafter(-1 / 7, -1)) >= 0


@pytest.mark.parametrize("correlation", [0.0, 0.03, 0.4, 1.0])
def test_variance_floor_is_what_doubling_the_batch_extrapolates_to(correlation):
    # The variance is floor + constant / m, so that the constant cancels between m and 2m.
    limit = 2 * variance_by_quadrature(STD, 40, correlation) - variance_by_quadrature(STD, 20, correlation)
    assert variance_floor(STD, correlation) == pytest.approx(limit, rel=1e-12, abs=1e-15)


# Correlations and equivalent batch sizes


@pytest.mark.parametrize("batch_size", [2, 3, 8, 50])
def test_smallest_correlation_is_where_the_matrix_loses_its_positive_eigenvalues(batch_size):
    at = equicorrelation_matrix(batch_size, float(smallest_correlation(batch_size)))
    below = equicorrelation_matrix(batch_size, float(smallest_correlation(batch_size)) - 1e-6)
    assert abs(np.linalg.eigvalsh(at)[0]) < 1e-12
    assert np.linalg.eigvalsh(below)[0] < -1e-7


def test_smallest_correlation_of_one_loss_is_minus_one():
    np.testing.assert_array_equal(smallest_correlation(np.array([1, 2])), [-1, -1])


@pytest.mark.parametrize("batch_size", [1, 2, 7])
@pytest.mark.parametrize("correlation", [-0.1, 0.0, 0.25, 1.0])
def test_effective_batch_size_gives_independent_losses_the_same_variance(batch_size, correlation):
    variance = variance_by_quadrature(STD, batch_size, correlation)
    assert effective_batch_size(batch_size, correlation) == pytest.approx(STD * STD / variance, rel=1e-12)


def test_effective_batch_size_is_infinite_where_the_variance_vanishes():
    batch_sizes = np.arange(2, 200)
    assert np.isinf(effective_batch_size(batch_sizes, smallest_correlation(batch_sizes))).all()


@property_seed
@by_properties
@given(st.integers(1, 10**6), st.floats(1e-9, 1))
def test_effective_batch_size_lies_between_one_and_both_its_bounds(batch_size, correlation):
    rounding = 1 + 1e-12
    assert effective_batch_size(batch_size, correlation) * rounding >= 1
    assert effective_batch_size(batch_size, correlation) <= min(batch_size, 1 / correlation) * rounding


@property_seed
@by_properties
@given(st.integers(2, 1000), st.floats(0.001, 0.999))
def test_negative_correlation_is_worth_more_than_the_batch(batch_size, position):
    assert effective_batch_size(batch_size, float(smallest_correlation(batch_size)) * position) > batch_size


@pytest.mark.parametrize(
    ("std", "standard_error", "correlation"),
    [
        ("1", "0.1", "0"),  # exactly 100, which floating point makes 99.99999999999999
        ("1", "0.3", "0"),  # 11.1
        ("3", "0.1", "0"),  # exactly 900
        ("0.5", "0.025", "0"),  # exactly 400, which floating point makes 399.99999999999994
        ("0.7", "0.1", "0"),  # exactly 49
        ("0.6", "0.2", "0"),  # exactly 9, which floating point makes 8.999999999999998
        ("0.3", "0.1", "0"),  # exactly 9
        ("1.1", "0.1", "0"),  # exactly 121, which floating point makes 121.00000000000001
        ("2", "0.5", "0.0625"),  # the floor itself is 0.5
        ("2", "0.75", "0.05"),
        ("2", "0.45", "0.0501"),
        ("1", "0.5", "0.2"),  # exactly 16
        ("1", "0.999", "0.9"),
        ("2", "2", "1"),
        ("2", "2.5", "0.5"),
        ("2", "2.5", "1"),
    ],
)
def test_required_batch_size_equals_a_search_in_exact_arithmetic(std, standard_error, correlation):
    sigma, target, rho = Fraction(std), Fraction(standard_error), Fraction(correlation)
    found = next(
        (m for m in range(1, 3000) if sigma**2 * (m + m * (m - 1) * rho) / m**2 <= target**2),
        None,
    )
    if found is None:
        with pytest.raises(ValueError, match="standard_error must exceed the floor"):
            required_batch_size(float(std), float(standard_error), float(correlation))
    else:
        assert required_batch_size(float(std), float(standard_error), float(correlation)) == found


@pytest.mark.parametrize("correlation", [0.1, 0.15, 0.3, 0.6, 0.9])
def test_no_batch_is_large_enough_for_the_floor_itself(correlation):
    # Rounding of the root must not turn an impossible wish into a batch of 10¹⁶ losses.
    with pytest.raises(ValueError, match="standard_error must exceed the floor"):
        required_batch_size(1.0, math.sqrt(correlation), correlation)


def test_required_batch_size_assumes_independent_losses_unless_told_otherwise():
    assert required_batch_size(2.0, 0.5) == 16


@property_seed
@by_properties
@given(st.floats(0.1, 10), st.floats(0, 0.9), st.floats(1e-4, 0.99))
def test_required_batch_size_is_minimal(std, correlation, fraction):
    target = std**2 * (correlation + fraction * (1 - correlation))
    m = required_batch_size(std, math.sqrt(target), correlation)
    reached, one_less = (std**2 * (k + k * (k - 1) * correlation) / k**2 for k in (m, max(m - 1, 1)))
    assert reached <= target * (1 + 1e-9)
    assert m == 1 or one_less > target * (1 - 1e-9)


# Samplers of losses


@pytest.mark.parametrize(
    ("marginal", "law"), [("gaussian", stats.norm(MEAN, STD)), ("exponential", stats.expon(MEAN - STD, STD))]
)
def test_iid_losses_have_the_named_law(marginal, law):
    # 250,000 losses notice a distance of 0.9 % between distribution functions.
    losses = iid_losses(62_500, 4, **SOURCES, marginal=marginal, generator=generator(f"test.iid.{marginal}"))
    assert losses.shape == (62_500, 4)
    assert_law(losses.flatten(), law.cdf)


@pytest.mark.parametrize(("marginal", "n"), [("gaussian", 400_000), ("exponential", 1_600_000)])
def test_iid_losses_have_the_wanted_spread(marginal, n):
    # The mean square has a standard error of √2 or √8 over √n, 0.22 %: an error of 1 % in the spread is 9 of them.
    losses = iid_losses(n, 1, **SOURCES, marginal=marginal, generator=generator(f"test.iid.spread.{marginal}"))
    assert_means(((losses - MEAN) / STD) ** 2, 1.0)


def standardized_draws(marginal, source, *shapes):
    """Return what the samplers draw, as nested lists of numbers."""
    if marginal == "gaussian":
        return [torch.randn(shape, generator=source, dtype=torch.float64).tolist() for shape in shapes]
    uniforms = [torch.rand(shape, generator=source, dtype=torch.float64).tolist() for shape in shapes]
    return [[[-math.log1p(-u) - 1 for u in row] for row in rows] for rows in uniforms]


@pytest.mark.parametrize("marginal", ["gaussian", "exponential"])
def test_iid_losses_equal_a_loop_over_the_same_draws(marginal):
    losses = iid_losses(7, 3, **SOURCES, marginal=marginal, generator=torch.Generator().manual_seed(7))
    (draws,) = standardized_draws(marginal, torch.Generator().manual_seed(7), (7, 3))
    expected = [[MEAN + STD * z for z in row] for row in draws]
    np.testing.assert_allclose(losses, expected, rtol=1e-12)


@pytest.mark.parametrize("marginal", ["gaussian", "exponential"])
@pytest.mark.parametrize("correlation", CORRELATIONS)
def test_equicorrelated_losses_equal_a_loop_over_the_same_draws(marginal, correlation):
    law = {**SOURCES, "correlation": correlation, "marginal": marginal}
    losses = equicorrelated_losses(7, BATCH_SIZE, **law, generator=torch.Generator().manual_seed(7))
    shapes = [(7, BATCH_SIZE)] + [(7, 1)] * (correlation >= 0)
    own, *shared = standardized_draws(marginal, torch.Generator().manual_seed(7), *shapes)
    rows = []
    for i in range(7):
        if shared:
            parts = [math.sqrt(correlation) * shared[0][i][0]] * BATCH_SIZE
        else:
            kept = math.sqrt(max((1 + (BATCH_SIZE - 1) * correlation) / (1 - correlation), 0))
            parts = [-math.sqrt(1 - correlation) * (1 - kept) * sum(own[i]) / BATCH_SIZE] * BATCH_SIZE
        rows.append(
            [MEAN + STD * (math.sqrt(1 - correlation) * z + part) for z, part in zip(own[i], parts, strict=True)]
        )
    np.testing.assert_allclose(losses, rows, rtol=1e-11)


@pytest.mark.parametrize("batch_size", [2, 5])
@pytest.mark.parametrize("position", [0.0, 0.4, 0.9, 1.0])
def test_equicorrelated_losses_are_linear_in_their_draws_with_the_wanted_matrix(monkeypatch, batch_size, position):
    # Unit vectors in place of the draws give the rows of A; A Aᵀ is the covariance, without any sampling error.
    smallest = -1 / (batch_size - 1)
    correlation = smallest + position * (1 - smallest)
    units = iter(torch.eye(batch_size + 1, dtype=torch.float64).split([batch_size, 1], dim=1))
    monkeypatch.setattr(minibatch_loss, "_standardized", lambda *args: next(units).clone())
    rows = equicorrelated_losses(
        batch_size + 1, batch_size, **SOURCES, correlation=correlation, generator=torch.Generator()
    )
    covariance = (rows - MEAN).T @ (rows - MEAN)
    np.testing.assert_allclose(covariance, equicorrelation_matrix(batch_size, correlation, STD), atol=1e-12)


def test_exponential_losses_at_mean_equal_to_std_are_unshifted():
    losses = iid_losses(1000, 4, mean=0.7, std=0.7, marginal="exponential", generator=generator("test.iid.unshifted"))
    assert losses.min() >= -1e-15


def test_iid_losses_are_gaussian_float64_unless_told_otherwise():
    draws = [iid_losses(5, 3, **SOURCES, generator=generator("test.iid.defaults"), **k) for k in ({}, DEFAULTS)]
    torch.testing.assert_close(*draws, rtol=0, atol=0)


def test_iid_losses_are_uncorrelated_within_and_between_batches():
    losses = iid_losses(200_000, 3, **SOURCES, generator=generator("test.iid.pairs"))
    z = (losses - MEAN) / STD
    pairs = torch.stack([z[:, 0] * z[:, 1], z[:, 0] * z[:, 2], z[:, 1] * z[:, 2]], dim=1)
    neighbors = z[0::2] * z[1::2]
    assert_means(pairs, 0.0)
    assert_means(neighbors, 0.0)


# That they are right for each draw is tested above, by loops and unit vectors; these see the whole, with normal draws.


@pytest.mark.parametrize("correlation", CORRELATIONS)
def test_equicorrelated_losses_have_the_wanted_variance_and_correlation_matrix(correlation):
    z = standardized_power(100_000, "gaussian", correlation, 1)
    products = z[:, :, None] * z[:, None, :]
    assert_means(products, equicorrelation_matrix(BATCH_SIZE, correlation))


@pytest.mark.parametrize("correlation", CORRELATIONS)
def test_different_batches_are_independent(correlation):
    z = standardized_power(100_000, "gaussian", correlation, 1)
    assert_means(z[0::2] * z[1::2], 0.0)


@pytest.mark.parametrize("correlation", [0.0, 0.35, 1.0])
def test_gaussian_losses_stay_gaussian_when_correlated(correlation):
    # One loss of each batch, so that the sample is independent.
    z = standardized_power(50_000, "gaussian", correlation, 1)[:, 0]
    assert_law(z.numpy(), stats.norm.cdf)


@pytest.mark.parametrize("marginal", ["gaussian", "exponential"])
@pytest.mark.parametrize("batch_size", [2, 5, 50])
def test_batch_loss_is_constant_at_the_smallest_correlation(marginal, batch_size):
    losses = equicorrelated_losses(
        1000,
        batch_size,
        **SOURCES,
        correlation=-1 / (batch_size - 1),
        marginal=marginal,
        generator=generator("test.equicorrelated.constant"),
    )
    # Rounding of 1 - ρ(m-1) enters through its root, hence 1e-7.
    torch.testing.assert_close(losses.mean(1), torch.full((1000,), MEAN, dtype=torch.float64), rtol=0, atol=1e-7)
    assert losses.std(1).min() > 0


def test_losses_can_be_drawn_at_a_correlation_that_rounding_moved_below_the_smallest():
    losses = correlated_losses(100, 8, "test.equicorrelated.rounded", correlation=np.nextafter(-1 / 7, -1))
    torch.testing.assert_close(losses.mean(1), torch.full((100,), MEAN, dtype=torch.float64), rtol=0, atol=1e-7)


def test_losses_of_a_batch_are_identical_at_correlation_one():
    losses = equicorrelated_losses(100, 5, **SOURCES, correlation=1, generator=generator("test.equicorrelated.one"))
    assert (losses == losses[:, :1]).all()
    assert len(losses[:, 0].unique()) == 100


@pytest.mark.parametrize("correlation", [-1.0, -0.4, 0.6])
def test_a_batch_of_one_loss_has_the_wanted_variance_at_any_correlation(correlation):
    losses = equicorrelated_losses(
        50_000, 1, **SOURCES, correlation=correlation, generator=generator(f"test.equicorrelated.single.{correlation}")
    )
    assert_means((losses - MEAN) ** 2, STD**2)


def test_equicorrelated_losses_are_gaussian_float64_unless_told_otherwise():
    draws = [
        equicorrelated_losses(
            5, 3, **SOURCES, correlation=0.2, generator=generator("test.equicorrelated.defaults"), **k
        )
        for k in ({}, DEFAULTS)
    ]
    torch.testing.assert_close(*draws, rtol=0, atol=0)


SAMPLERS = {
    "iid": lambda generator, **kwargs: iid_losses(6, 3, **SOURCES, generator=generator, **kwargs),
    "positive": lambda generator, **kwargs: equicorrelated_losses(
        6, 3, **SOURCES, correlation=0.3, generator=generator, **kwargs
    ),
    "negative": lambda generator, **kwargs: equicorrelated_losses(
        6, 3, **SOURCES, correlation=-0.3, generator=generator, **kwargs
    ),
    "gradients": lambda generator, **kwargs: shared_shift_gradients(6, 3, **GRADIENTS, generator=generator, **kwargs),
    "stable": lambda generator, **kwargs: stable_losses(6, 3, alpha=1.5, generator=generator, **kwargs),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_repeat_themselves_for_equal_generators_only(name):
    sample = SAMPLERS[name]
    first, again, other = (sample(generator(f"test.sampler.{stream}")) for stream in "aab")
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_have_the_wanted_dtype_and_shape(name):
    double, single = (SAMPLERS[name](generator("test.sampler.dtype"), **k) for k in ({}, {"dtype": torch.float32}))
    assert double.shape[:2] == single.shape[:2] == (6, 3)
    assert (double.dtype, single.dtype) == (torch.float64, torch.float32)


def correlated_losses(n_batches, batch_size, stream, marginal="gaussian", correlation=0.3):
    return equicorrelated_losses(
        n_batches, batch_size, **SOURCES, correlation=correlation, marginal=marginal, generator=generator(stream)
    )


# Gradients that share a random shift


def test_shared_shift_gradients_equal_automatic_differentiation():
    gradients = shared_shift_gradients(50, 4, **GRADIENTS, generator=generator("test.gradients.autograd"))
    same = generator("test.gradients.autograd")
    clean, label_noise, shift = (
        torch.randn(50, columns, generator=same, dtype=torch.float64, device=same.device) for columns in (4, 4, 1)
    )
    u = GRADIENTS["feature_std"] * clean
    y = GRADIENTS["true_slope"] * u + GRADIENTS["label_std"] * label_noise
    x = u + GRADIENTS["shift_std"] * shift

    def loss(parameters, x, y):
        return (parameters[0] * x + parameters[1] - y) ** 2 / 2

    parameters = torch.tensor([GRADIENTS["slope"], GRADIENTS["intercept"]], dtype=torch.float64, device=x.device)
    per_example = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    expected = per_example(parameters, x.flatten(), y.flatten()).reshape(50, 4, 2)
    torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-12)


def gradients_by_quadrature(slope, true_slope, intercept, feature_std, shift_std, label_std):
    """Return mean, variance and within-batch covariance of both coordinates by Gauss–Hermite quadrature.

    Two examples of a batch depend on five standard normal variables. Products of two gradients have degree at most
    four in each, for which three nodes are exact.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    grid = np.array(list(itertools.product(nodes, repeat=5)))
    weight = np.array([math.prod(point) for point in itertools.product(weights / weights.sum(), repeat=5)])
    shift = shift_std * grid[:, 4]

    def gradient(feature, noise):
        u = feature_std * feature
        residual = slope * (u + shift) + intercept - (true_slope * u + label_std * noise)
        return np.stack([residual * (u + shift), residual])

    one, two = gradient(grid[:, 0], grid[:, 1]), gradient(grid[:, 2], grid[:, 3])
    mean = one @ weight
    return mean, one**2 @ weight - mean**2, (one * two) @ weight - mean**2


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"slope": 0.6},  # the model has the true slope
        {"slope": -2.3, "intercept": 1.9},
        {"true_slope": 2.9, "feature_std": 0.4, "shift_std": 2.1, "label_std": 0.3},
    ],
)
def test_shared_shift_moments_equal_gauss_hermite_quadrature(changes):
    setting = {**GRADIENTS, **changes}
    variance, correlation = shared_shift_moments(**setting)
    _, expected_variance, expected_covariance = gradients_by_quadrature(**setting)
    np.testing.assert_allclose(variance, expected_variance, rtol=1e-11)
    np.testing.assert_allclose(correlation, expected_covariance / expected_variance, rtol=1e-10)


def test_shared_shift_gradients_have_these_moments():
    mean, _, _ = gradients_by_quadrature(**GRADIENTS)
    variance, correlation = shared_shift_moments(**GRADIENTS)
    gradients = shared_shift_gradients(1_500_000, 2, **GRADIENTS, generator=generator("test.gradients.moments"))
    centered = gradients - torch.as_tensor(mean)
    assert_means(centered.flatten(1), 0.0)
    assert_means(centered.square().mean(1), variance)
    assert_means(centered.prod(1), correlation * variance)


def test_shared_shift_gradients_of_different_batches_are_independent():
    mean, _, _ = gradients_by_quadrature(**GRADIENTS)
    gradients = shared_shift_gradients(1_000_000, 2, **GRADIENTS, generator=generator("test.gradients.independent"))
    centered = gradients - torch.as_tensor(mean)
    assert_means((centered[0::2] * centered[1::2]).flatten(1), 0.0)


# Laws of the batch loss


@pytest.mark.parametrize("batch_size", [1, 2, 5, 30])
def test_exponential_batch_cdf_equals_integrated_density(batch_size):
    z = np.array([-0.9, -0.2, 0.0, 0.8, 2.5])

    def density(total):
        return total ** (batch_size - 1) * math.exp(-total) / math.factorial(batch_size - 1)

    ends = [max(batch_size + point * math.sqrt(batch_size), 0) for point in z]
    expected = [integrate.quad(density, 0, end, epsabs=1e-12)[0] for end in ends]
    np.testing.assert_allclose(exponential_batch_cdf(z, batch_size), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("batch_size", [2, 3, 10])
def test_exponential_batch_cdf_equals_convolution_with_one_more_exponential(batch_size):
    # Sums of one loss fewer come from counting a Poisson process, a different law altogether.
    z = 0.7
    total = batch_size + z * math.sqrt(batch_size)

    def integrand(last):
        return math.exp(-last) * stats.poisson.sf(batch_size - 2, total - last)

    expected, _ = integrate.quad(integrand, 0, total, epsabs=1e-12)
    assert exponential_batch_cdf(z, batch_size) == pytest.approx(expected, abs=1e-10)


def test_exponential_batch_cdf_is_zero_below_the_smallest_possible_loss():
    np.testing.assert_array_equal(exponential_batch_cdf([-2.0, -2.5, -40.0], 4), 0.0)


def test_exponential_batch_cdf_is_the_law_of_sampled_batch_losses():
    losses = iid_losses(50_000, 5, **SOURCES, marginal="exponential", generator=generator("test.clt.law"))
    z = (losses.mean(1) - MEAN) / (STD / math.sqrt(5))
    assert_law(z.numpy(), lambda points: exponential_batch_cdf(points, 5))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 10, 100])
def test_exponential_distance_equals_a_finer_search(batch_size):
    def gap(z):
        total = np.maximum(batch_size + z * math.sqrt(batch_size), 0)
        return np.abs(stats.poisson.sf(batch_size - 1, total) - stats.norm.cdf(z))

    edge = -math.sqrt(batch_size)
    grid = np.linspace(min(-4, edge), 6, 4001)
    best = grid[gap(grid).argmax()]
    found = optimize.minimize_scalar(lambda z: -gap(z), bounds=(best - 0.01, best + 0.01), method="bounded")
    assert exponential_distance(batch_size) == pytest.approx(max(-found.fun, gap(edge)), abs=1e-6)


def test_exponential_distance_of_one_loss_is_the_normal_mass_below_the_smallest_loss():
    assert exponential_distance(1) == pytest.approx(stats.norm.cdf(-1), rel=1e-14)


def test_exponential_distance_tends_to_the_edgeworth_term():
    # The first Edgeworth term at z = 0 is skewness / (6 √(2π m)); the next is of order 1/m.
    m = 10_000
    assert exponential_distance(m) * math.sqrt(m) == pytest.approx(2 / (6 * math.sqrt(2 * math.pi)), rel=0.01)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6])
@pytest.mark.parametrize("probability", [0.03, 0.3, 0.5, 0.9, 0.99])
def test_two_point_distance_equals_enumeration_and_a_grid(probability, batch_size):
    outcomes = list(itertools.product([0, 1], repeat=batch_size))
    weights = np.array([math.prod(probability if one else 1 - probability for one in batch) for batch in outcomes])
    spread = math.sqrt(probability * (1 - probability) / batch_size)
    jumps = np.array([(sum(batch) / batch_size - probability) / spread for batch in outcomes])
    z = np.concatenate([jumps - 1e-9, jumps + 1e-9, np.linspace(-8, 8, 2001)])
    law = (jumps[None, :] <= z[:, None]) @ weights
    assert two_point_distance(probability, batch_size) == pytest.approx(np.abs(law - stats.norm.cdf(z)).max(), abs=1e-8)


@pytest.mark.parametrize("batch_size", [1, 4, 25])
@pytest.mark.parametrize("probability", [0.03, 0.3, 0.5])
def test_two_point_distance_is_symmetric(probability, batch_size):
    mirrored = two_point_distance(1 - probability, batch_size)
    assert two_point_distance(probability, batch_size) == pytest.approx(mirrored, rel=1e-12)


def test_two_point_distance_reaches_esseens_constant():
    # Esseen (1956): no Berry–Esseen constant is below (√10 + 3) / (6 √(2π)) = 0.4097, the limit at this law.
    p, m = (4 - math.sqrt(10)) / 2, 100_000
    ratio = (p**2 + (1 - p) ** 2) / math.sqrt(p * (1 - p))
    constant = two_point_distance(p, m) * math.sqrt(m) / ratio
    assert (math.sqrt(10) + 3) / (6 * math.sqrt(2 * math.pi)) == pytest.approx(0.4097, abs=5e-5)
    assert constant == pytest.approx((math.sqrt(10) + 3) / (6 * math.sqrt(2 * math.pi)), rel=2e-3)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("constant", [0.4748, 0.5])
def test_berry_esseen_bound_of_an_enumerated_law(batch_size, constant):
    values, probabilities = np.array([0.3, 1.1, 2.9]), np.array([0.2, 0.5, 0.3])
    deviations = values - probabilities @ values
    third, second = probabilities @ np.abs(deviations) ** 3, probabilities @ deviations**2
    expected = constant * third * second**-1.5 * batch_size**-0.5
    bound = berry_esseen_bound(third, math.sqrt(second), batch_size, constant)
    assert bound == pytest.approx(expected, rel=1e-12)


def test_berry_esseen_constant_is_shevtsovas():
    # A fair coin at ±½ has E|Z - L|³ = σ³, so that the bound for one toss is the constant.
    assert berry_esseen_bound(0.125, 0.5, 1) == 0.4748


def test_berry_esseen_bound_takes_an_array_of_batch_sizes():
    np.testing.assert_allclose(berry_esseen_bound(16.0, 2.0, np.array([1, 4]), 0.5), [1, 0.5], rtol=1e-15)


def test_berry_esseen_bound_accepts_a_fair_coin_whose_moments_are_rounded():
    assert berry_esseen_bound(0.1**3, 0.1, 1) == pytest.approx(0.4748, rel=1e-12)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 20, 300])
@pytest.mark.parametrize("probability", [0.05, 0.2, 0.4189, 0.5])
def test_berry_esseen_bound_holds_for_two_point_laws(probability, batch_size):
    q = 1 - probability
    third = probability * q * (probability**2 + q**2)
    assert two_point_distance(probability, batch_size) <= berry_esseen_bound(
        third, math.sqrt(probability * q), batch_size
    )


# Stable laws


# 250,000 losses notice a distance of 0.9 % between distribution functions.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("alpha", "law"), [(2, stats.norm(0, math.sqrt(2))), (1, stats.cauchy())])
def test_stable_losses_are_normal_at_two_and_cauchy_at_one(alpha, law, dtype):
    source = generator(f"test.stable.{alpha}.{dtype}")
    assert_law(stable_losses(62_500, 4, alpha=alpha, generator=source, dtype=dtype).flatten(), law.cdf)


@pytest.mark.parametrize("alpha", [0.7, 1.3, 1.8])
def test_stable_losses_have_scipys_distribution(alpha):
    # Nine points, because scipy integrates numerically for every one.
    points = np.array([-3.0, -1.2, -0.5, -0.15, 0.0, 0.15, 0.5, 1.2, 3.0])
    probabilities = stats.levy_stable.cdf(points, alpha, 0)
    losses = stable_losses(62_500, 4, alpha=alpha, generator=generator(f"test.stable.{alpha}")).flatten()
    found = np.searchsorted(losses.sort().values.numpy(), points) / losses.numel()
    assert_z((found - probabilities) / np.sqrt(probabilities * (1 - probabilities) / losses.numel()))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize(("dtype", "kind", "rtol"), [(torch.float64, np.int64, 1e-12), (torch.float32, np.int32, 2e-5)])
def test_stable_losses_equal_a_loop_over_the_same_draws(monkeypatch, alpha, dtype, kind, rtol):
    # In parts of eight entries; single precision halves each integer of 64 bits.
    monkeypatch.setattr(minibatch_loss, "CACHED", 8)
    losses = stable_losses(4, 5, alpha=alpha, generator=torch.Generator().manual_seed(11), dtype=dtype).flatten()
    source, width = torch.Generator().manual_seed(11), 8 * np.dtype(kind).itemsize
    expected = []
    for size in (8, 8, 4):
        raw = torch.empty(2 * size * width // 64, dtype=torch.int64).random_(-(2**63), None, generator=source)
        bits = raw.numpy().view(kind).tolist()
        for k, j in zip(bits[:size], bits[size:], strict=True):
            angle, waiting_time = math.pi * k / 2**width, -math.log(2 * abs(j) / 2**width)
            power = (math.cos((1 - alpha) * angle) / waiting_time) ** ((1 - alpha) / alpha)
            expected.append(math.sin(alpha * angle) / math.cos(angle) ** (1 / alpha) * power)
    np.testing.assert_allclose(losses, expected, rtol=rtol)


@pytest.mark.parametrize("alpha", [0.3, 0.7, 1, 1.3, 1.8, 2])
def test_stable_losses_have_the_characteristic_function(alpha):
    losses = stable_losses(100_000, 4, alpha=alpha, generator=generator(f"test.stable.cf.{alpha}")).reshape(-1, 1)
    t = torch.tensor([0.2, 0.7, 1.5, 3.0], dtype=torch.float64)
    assert_means(torch.cos(losses * t), torch.exp(-(t**alpha)))
    assert_means(torch.sin(losses * t), 0.0)


def test_stable_losses_of_a_batch_are_independent():
    losses = stable_losses(100_000, 2, alpha=1.3, generator=generator("test.stable.independent"))
    above = (losses.abs() > 1).double()
    centered = above - above.mean()
    assert_means(centered[:, 0] * centered[:, 1], 0.0)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 32), (torch.float64, 64)])
@pytest.mark.parametrize("alpha", [0.7, 1, 1.3, 2])
def test_stable_losses_are_finite_at_the_extreme_draws(monkeypatch, alpha, dtype, width):
    # Rounded, the angles at both ends are ±π/2 and have a negative cosine; a waiting time may round to 0 or infinity.
    ends = [-(2 ** (width - 1)), 2 ** (width - 1) - 1, 0, 1]
    bits = torch.tensor(list(itertools.product(ends, ends))).T.to(torch.int64 if width == 64 else torch.int32)
    words = bits.contiguous().view(-1).view(torch.int64)
    monkeypatch.setattr(torch.Tensor, "random_", lambda tensor, *args, **kwargs: tensor.copy_(words))
    assert stable_losses(1, 16, alpha=alpha, generator=torch.Generator(), dtype=dtype).isfinite().all()


@pytest.mark.parametrize(
    ("alpha", "expected"), [(2, [1, 0.5, 0.1]), (1, [1, 1, 1]), (0.5, [1, 4, 100]), (4 / 3, [1, 4**-0.25, 10**-0.5])]
)
def test_stable_spread_at_known_exponents(alpha, expected):
    np.testing.assert_allclose(stable_spread(alpha, np.array([1, 4, 100])), expected, rtol=1e-12)


@pytest.mark.parametrize("alpha", [0.6, 1.0, 1.6, 2.0])
def test_stable_spread_solves_the_stability_equation(alpha):
    # The mean of m has the characteristic function exp(-m |t/m|^α), the law narrowed by s has exp(-|s t|^α).
    s = stable_spread(alpha, 9)
    assert 9 * (1 / 9) ** alpha == pytest.approx(s**alpha, rel=1e-12)


# Refusals


def losses_with(**changes):
    return iid_losses(**{"n_batches": 2, "batch_size": 2, **SOURCES, "generator": generator("test.refusal"), **changes})


def correlated_with(**changes):
    arguments = {"n_batches": 2, "batch_size": 8, **SOURCES, "correlation": 0.1, "generator": generator("test.refusal")}
    return equicorrelated_losses(**{**arguments, **changes})


def gradients_with(**changes):
    arguments = {"n_batches": 2, "batch_size": 2, **GRADIENTS, "generator": generator("test.refusal")}
    return shared_shift_gradients(**{**arguments, **changes})


def stable_with(**changes):
    arguments = {"n_batches": 2, "batch_size": 2, "alpha": 1.5, "generator": generator("test.refusal")}
    return stable_losses(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: iid_variance(0.0, 4), "std must be positive and finite, got 0.0"),
        (lambda: iid_variance(-1.0, 4), "std must be positive and finite, got -1.0"),
        (lambda: iid_variance(math.nan, 4), "std must be positive and finite, got nan"),
        (lambda: iid_variance(math.inf, 4), "std must be positive and finite, got inf"),
        (lambda: iid_variance(1.0, 0), "batch_size must be at least 1, got 0"),
        (lambda: iid_variance(1.0, np.array([2, 0])), "batch_size must be at least 1, got [2 0]"),
        (lambda: equicorrelated_variance(0.0, 4, 0.1), "std must be positive and finite, got 0.0"),
        (lambda: equicorrelated_variance(1.0, 0, 0.1), "batch_size must be at least 1, got 0"),
        (
            lambda: equicorrelated_variance(1.0, 8, -0.5),
            "correlation must lie in [-1/(batch_size-1), 1] = [-0.143, 1], got -0.5",
        ),
        (
            lambda: equicorrelated_variance(1.0, 8, -0.15),
            "correlation must lie in [-1/(batch_size-1), 1] = [-0.143, 1], got -0.15",
        ),
        (
            lambda: equicorrelated_variance(1.0, 8, 1.001),
            "correlation must lie in [-1/(batch_size-1), 1] = [-0.143, 1], got 1.001",
        ),
        (
            lambda: equicorrelated_variance(1.0, 1, -1.001),
            "correlation must lie in [-1/(batch_size-1), 1] = [-1.000, 1], got -1.001",
        ),
        (
            lambda: equicorrelated_variance(1.0, 8, math.nan),
            "correlation must lie in [-1/(batch_size-1), 1] = [-0.143, 1], got nan",
        ),
        (
            lambda: equicorrelated_variance(1.0, np.array([2, 8, 3]), -0.3),
            "correlation must lie in [-1/(batch_size-1), 1] = [-0.143, 1], got -0.3",
        ),
        (lambda: variance_floor(0.0, 0.5), "std must be positive and finite, got 0.0"),
        (lambda: variance_floor(1.0, -0.01), "correlation must lie in [0, 1], got -0.01"),
        (lambda: variance_floor(1.0, 1.01), "correlation must lie in [0, 1], got 1.01"),
        (lambda: variance_floor(1.0, math.nan), "correlation must lie in [0, 1], got nan"),
        (lambda: smallest_correlation(0), "batch_size must be at least 1, got 0"),
        (lambda: effective_batch_size(0, 0.1), "batch_size must be at least 1, got 0"),
        (
            lambda: effective_batch_size(8, -0.5),
            "correlation must lie in [-1/(batch_size-1), 1] = [-0.143, 1], got -0.5",
        ),
        (lambda: required_batch_size(0.0, 0.1), "std must be positive and finite, got 0.0"),
        (lambda: required_batch_size(1.0, 0.0), "standard_error must be positive and finite, got 0.0"),
        (lambda: required_batch_size(1.0, 0.1, -0.1), "correlation must lie in [0, 1], got -0.1"),
        (
            lambda: required_batch_size(2.0, 0.5, 0.25),
            "standard_error must exceed the floor std * sqrt(correlation) = 1, which no batch size gets below, got 0.5",
        ),
        (
            lambda: required_batch_size(2.0, 1.0, 0.25),
            "standard_error must exceed the floor std * sqrt(correlation) = 1, which no batch size gets below, got 1",
        ),
        (lambda: losses_with(std=0.0), "std must be positive and finite, got 0.0"),
        (lambda: losses_with(n_batches=0), "n_batches must be at least 1, got 0"),
        (lambda: losses_with(batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: losses_with(marginal="uniform"), "marginal must be 'gaussian' or 'exponential', got 'uniform'"),
        (lambda: correlated_with(std=-2.0), "std must be positive and finite, got -2.0"),
        (lambda: correlated_with(n_batches=0), "n_batches must be at least 1, got 0"),
        (lambda: correlated_with(batch_size=0), "batch_size must be at least 1, got 0"),
        (
            lambda: correlated_with(correlation=-0.5),
            "correlation must lie in [-1/(batch_size-1), 1] = [-0.143, 1], got -0.5",
        ),
        (
            lambda: correlated_with(correlation=1.5),
            "correlation must lie in [-1/(batch_size-1), 1] = [-0.143, 1], got 1.5",
        ),
        (lambda: correlated_with(marginal="cauchy"), "marginal must be 'gaussian' or 'exponential', got 'cauchy'"),
        (lambda: gradients_with(feature_std=0.0), "feature_std must be positive and finite, got 0.0"),
        (lambda: gradients_with(shift_std=0.0), "shift_std must be positive and finite, got 0.0"),
        (lambda: gradients_with(label_std=0.0), "label_std must be positive and finite, got 0.0"),
        (lambda: gradients_with(n_batches=0), "n_batches must be at least 1, got 0"),
        (lambda: gradients_with(batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: shared_shift_moments(**{**GRADIENTS, "feature_std": 0.0}), "feature_std must be positive and finite"),
        (lambda: shared_shift_moments(**{**GRADIENTS, "shift_std": 0.0}), "shift_std must be positive and finite"),
        (lambda: shared_shift_moments(**{**GRADIENTS, "label_std": 0.0}), "label_std must be positive and finite"),
        (lambda: exponential_batch_cdf(0.5, 0), "batch_size must be at least 1, got 0"),
        (lambda: exponential_distance(0), "batch_size must be at least 1, got 0"),
        (lambda: two_point_distance(0.5, 0), "batch_size must be at least 1, got 0"),
        (lambda: two_point_distance(0.0, 5), "probability must lie strictly between 0 and 1, got 0.0"),
        (lambda: two_point_distance(1.0, 5), "probability must lie strictly between 0 and 1, got 1.0"),
        (lambda: two_point_distance(1.2, 5), "probability must lie strictly between 0 and 1, got 1.2"),
        (lambda: berry_esseen_bound(0.0, 1.0, 4), "third_absolute_moment must be positive and finite, got 0.0"),
        (lambda: berry_esseen_bound(1.0, 0.0, 4), "std must be positive and finite, got 0.0"),
        (lambda: berry_esseen_bound(9.0, 2.0, 0), "batch_size must be at least 1, got 0"),
        (lambda: berry_esseen_bound(7.9, 2.0, 4), "E|Z-L|³ cannot be below std³ = 8, got 7.9"),
        (lambda: stable_with(alpha=0.0), "alpha must lie in (0, 2], got 0.0"),
        (lambda: stable_with(alpha=2.1), "alpha must lie in (0, 2], got 2.1"),
        (lambda: stable_with(alpha=math.nan), "alpha must lie in (0, 2], got nan"),
        (lambda: stable_with(n_batches=0), "n_batches must be at least 1, got 0"),
        (lambda: stable_with(batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: stable_spread(0.0, 4), "alpha must lie in (0, 2], got 0.0"),
        (lambda: stable_spread(2.1, 4), "alpha must lie in (0, 2], got 2.1"),
        (lambda: stable_spread(1.5, 0), "batch_size must be at least 1, got 0"),
    ],
)
def test_refusals_state_the_rule_and_the_value(call, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        call()


@pytest.mark.parametrize("alpha", [0.001, 2])
def test_the_whole_range_of_alpha_is_allowed(alpha):
    assert stable_spread(alpha, 1) == 1


def test_one_batch_of_one_loss_is_allowed():
    assert losses_with(n_batches=1, batch_size=1).shape == (1, 1)


def test_module_states_the_published_constant():
    assert minibatch_loss.BERRY_ESSEEN_CONSTANT == 0.4748


# On another device, each way to make tensors: run there, or with a look at values on the CPU

DEVICE_LOSSES = {"n_batches": 5, "batch_size": 4, "mean": 1.5, "std": 0.7}
DEVICE_SHIFT = dict.fromkeys(inspect.signature(minibatch_loss.shared_shift_moments).parameters, 0.7)
DEVICE_CASES = [
    (minibatch_loss.iid_losses, lambda at: DEVICE_LOSSES | {"generator": at.generator}),
    (minibatch_loss.iid_losses, lambda at: DEVICE_LOSSES | {"marginal": "exponential", "generator": at.generator}),
    (minibatch_loss.equicorrelated_losses, lambda at: DEVICE_LOSSES | {"correlation": 0.4, "generator": at.generator}),
    (minibatch_loss.equicorrelated_losses, lambda at: DEVICE_LOSSES | {"correlation": -0.2, "generator": at.generator}),
    (
        minibatch_loss.shared_shift_gradients,
        lambda at: DEVICE_SHIFT | {"n_batches": 5, "batch_size": 4, "generator": at.generator},
    ),
    (
        minibatch_loss.stable_losses,
        lambda at: {"n_batches": 5, "batch_size": 4, "alpha": 1.5, "generator": at.generator},
    ),
]
DEVICE_CASES_BY_VALUES = [
    (minibatch_loss.intraclass_correlation, lambda at: {"losses": at.normal(100, 4)}),
    (minibatch_loss.correlation_interval, lambda at: {"losses": at.normal(100, 4)}),
    (minibatch_loss.effective_batch_interval, lambda at: {"losses": list(at.normal(100, 4))}),
]
