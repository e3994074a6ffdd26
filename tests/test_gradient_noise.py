"""The chapter's closed forms, samplers and gradients of single examples, each against something that does not use them.

Closed forms are checked by listing every batch of a small population; gradients by one backward pass an example.
Statistical tests allow what a right program exceeds with probability 1e-6, for all entries of a test together.
"""

import copy
import itertools
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from torch import nn
from torch.nn import functional

from helpers.gradient_noise import (
    batch_excess_kurtosis,
    batch_noise,
    batch_skewness,
    expected_squared_norm,
    finite_population_correction,
    finite_population_variance,
    gradient_noise_scale,
    noise_scale,
    sample_batches,
    shuffled_epochs,
    successive_correlation,
    two_batch_noise_scale,
    with_replacement_variance,
)
from helpers.lab.runtime import generator, rng
from tests.small_networks import (
    COUPLED,
    LOSSES,
    build,
    examples,
    far_examples,
    frozen,
    looped_matrix,
    perceptron,
)

FALSE_ALARM = 1e-6
# Skewed, and without symmetry that could hide a wrong constant.
POPULATION = np.array([0.3, 1.1, 2.9, -0.7, 6.4, 0.9, 1.6, 3.3, 11.2, -2.5])
SIZES = [(m, n) for n in (1, 2, 3, 4, 5, 7, 9, 10) for m in range(1, n + 1)]
PROPER_SIZES = [(m, n) for m, n in SIZES if m < n]
by_properties = settings(max_examples=100, deadline=None, database=None)
property_seed = seed(int(rng("test.gradient_noise.properties").integers(2**32)))


def batch_means(population, batch_size):
    """Return the means of all C(N, m) batches, all equally likely."""
    return np.array([np.mean(batch, axis=0) for batch in itertools.combinations(population, batch_size)])


def batch_means_with_replacement(population, batch_size):
    """Return the means of all N^m ordered draws with replacement, all equally likely."""
    return np.array([np.mean(batch, axis=0) for batch in itertools.product(population, repeat=batch_size)])


def moment(values, power):
    return np.mean((values - np.mean(values)) ** power)


def skewness_of(values):
    return moment(values, 3) / moment(values, 2) ** 1.5


def excess_kurtosis_of(values):
    return moment(values, 4) / moment(values, 2) ** 2 - 3


def vectors(n):
    """Return n skewed gradients of three correlated coordinates with different variances."""
    z = rng("test.gradient_noise.vectors").standard_exponential((n, 3))
    return z @ np.array([[1.0, 0.4, 0.0], [0.0, 2.0, -0.7], [0.5, 0.0, 0.3]]) + [0.4, -2.0, 1.0]


# Closed forms


@pytest.mark.parametrize(("batch_size", "population_size"), [sizes for sizes in SIZES if sizes[1] > 1])
def test_finite_population_variance_equals_enumeration_of_all_batches(batch_size, population_size):
    population = POPULATION[:population_size]
    expected = batch_means(population, batch_size).var()
    variance = finite_population_variance(population.var(ddof=1), batch_size, population_size)
    assert variance == pytest.approx(expected, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 5])
def test_finite_population_variance_of_a_covariance_matrix_equals_enumeration(batch_size):
    gradients = vectors(6)
    expected = np.cov(batch_means(gradients, batch_size).T, bias=True)
    found = finite_population_variance(np.cov(gradients.T), batch_size, 6)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_finite_population_variance_of_a_trace_is_the_mean_squared_norm_of_the_noise():
    gradients = vectors(7)
    noise = batch_means(gradients, 3) - gradients.mean(0)
    trace = np.trace(np.cov(gradients.T))
    assert finite_population_variance(trace, 3, 7) == pytest.approx(np.square(noise).sum(1).mean(), rel=1e-12)


@pytest.mark.parametrize("population_size", [1, 2, 7, 10**6])
def test_a_batch_of_all_examples_has_no_noise(population_size):
    assert finite_population_variance(3.7, population_size, population_size) == 0


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
@pytest.mark.parametrize("population_size", [1, 2, 3, 5])
def test_with_replacement_variance_equals_enumeration_of_all_draws(batch_size, population_size):
    population = POPULATION[1 : 1 + population_size]
    divisor_one_less = np.square(population - population.mean()).sum() / max(population_size - 1, 1)
    expected = batch_means_with_replacement(population, batch_size).var()
    variance = with_replacement_variance(divisor_one_less, batch_size, population_size)
    assert variance == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_with_replacement_variance_of_a_covariance_matrix_equals_enumeration():
    gradients = vectors(5)
    expected = np.cov(batch_means_with_replacement(gradients, 4).T, bias=True)
    np.testing.assert_allclose(with_replacement_variance(np.cov(gradients.T), 4, 5), expected, rtol=1e-10)


@pytest.mark.parametrize(("batch_size", "population_size"), [(1, 2), (2, 2), (2, 3), (3, 3), (1, 5), (3, 5), (5, 5)])
def test_finite_population_correction_is_the_ratio_of_two_enumerations(batch_size, population_size):
    population = POPULATION[:population_size]
    expected = batch_means(population, batch_size).var() / batch_means_with_replacement(population, batch_size).var()
    found = finite_population_correction(batch_size, population_size)
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize(
    ("batch_size", "population_size"), [(1, 2), (1, 3), (1, 5), (2, 4), (2, 5), (1, 6), (2, 6), (3, 6)]
)
def test_successive_correlation_equals_enumeration_of_all_epochs(batch_size, population_size):
    # The first and the last whole batch: any two of an epoch have one correlation.
    epochs = np.array(list(itertools.permutations(POPULATION[:population_size])))
    last = (population_size // batch_size - 1) * batch_size
    one, other = epochs[:, :batch_size].mean(1), epochs[:, last : last + batch_size].mean(1)
    found = successive_correlation(batch_size, population_size)
    assert found == pytest.approx(np.corrcoef(one, other)[0, 1], rel=1e-12)


def test_successive_correlation_is_the_same_for_every_coordinate_and_pair_of_coordinates():
    gradients = vectors(6)
    epochs = np.array([gradients[list(order)] for order in itertools.permutations(range(6))])
    one, other = epochs[:, 0:2].mean(1) - gradients.mean(0), epochs[:, 2:4].mean(1) - gradients.mean(0)
    between, within = one.T @ other, one.T @ one
    np.testing.assert_allclose(between, successive_correlation(2, 6) * within, rtol=1e-9)


@pytest.mark.parametrize(("batch_size", "population_size"), [sizes for sizes in PROPER_SIZES if sizes[1] >= 3])
def test_batch_skewness_equals_enumeration_of_all_batches(batch_size, population_size):
    population = POPULATION[:population_size]
    expected = skewness_of(batch_means(population, batch_size))
    found = batch_skewness(skewness_of(population), batch_size, population_size)
    assert found == pytest.approx(expected, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize(("batch_size", "population_size"), [sizes for sizes in PROPER_SIZES if sizes[1] >= 4])
def test_batch_excess_kurtosis_equals_enumeration_of_all_batches(batch_size, population_size):
    population = POPULATION[:population_size]
    expected = excess_kurtosis_of(batch_means(population, batch_size))
    found = batch_excess_kurtosis(excess_kurtosis_of(population), batch_size, population_size)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-10)


@pytest.mark.parametrize("population_size", [3, 7, 50, 60_000])
def test_a_batch_of_one_has_the_skewness_of_the_population(population_size):
    assert batch_skewness(2.7, 1, population_size) == pytest.approx(2.7, rel=1e-12)


@pytest.mark.parametrize("population_size", [4, 7, 50, 60_000])
def test_a_batch_of_one_has_the_excess_kurtosis_of_the_population(population_size):
    assert batch_excess_kurtosis(6.3, 1, population_size) == pytest.approx(6.3, rel=1e-9)


@pytest.mark.parametrize("population_size", [4, 10, 60_000])
def test_half_of_the_population_has_no_skewness(population_size):
    assert batch_skewness(2.7, population_size // 2, population_size) == 0


# What a batch leaves out has the opposite noise times m / (N - m): the same kurtosis and the opposite skewness.


@property_seed
@by_properties
@given(st.integers(3, 5000), st.floats(0, 1), st.floats(-5, 5))
def test_what_a_batch_leaves_out_has_the_opposite_skewness(population_size, position, skewness):
    m = 1 + round(position * (population_size - 2))
    left_out = batch_skewness(skewness, population_size - m, population_size)
    assert batch_skewness(skewness, m, population_size) == pytest.approx(-left_out, rel=1e-9, abs=1e-300)


@property_seed
@by_properties
@given(st.integers(4, 5000), st.floats(0, 1), st.floats(-2, 50))
def test_what_a_batch_leaves_out_has_the_same_excess_kurtosis(population_size, position, kurtosis):
    m = 1 + round(position * (population_size - 2))
    left_out = batch_excess_kurtosis(kurtosis, population_size - m, population_size)
    assert batch_excess_kurtosis(kurtosis, m, population_size) == pytest.approx(left_out, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_moments_of_a_batch_tend_to_those_of_independent_draws(batch_size):
    # Cumulants of a mean of m independent gradients: skewness falls as 1/√m, excess kurtosis as 1/m.
    n = 200_000
    assert batch_skewness(2.0, batch_size, n) == pytest.approx(2 / math.sqrt(batch_size), rel=1e-3)
    assert batch_excess_kurtosis(6.0, batch_size, n) == pytest.approx(6 / batch_size, rel=1e-3)
    assert finite_population_variance(3.0, batch_size, n) == pytest.approx(3 / batch_size, rel=1e-3)
    assert with_replacement_variance(3.0, batch_size, n) == pytest.approx(3 / batch_size, rel=1e-3)


@pytest.mark.parametrize(("batch_size", "population_size"), [(256, 1_281_167), (4, 10**9), (10**5, 10**7)])
def test_excess_kurtosis_of_a_large_population_equals_exact_arithmetic(batch_size, population_size):
    # m N³ does not fit into 64 bits.
    m, n, kurtosis = Fraction(batch_size), Fraction(population_size), Fraction(6)
    # Deviations d with Σ d = 0 and Σ d² = N: sums over two, three and four different examples follow from Σ d = 0,
    # such as Σ d_i² d_j d_k = Σ d_i² d_j (0 - d_i - d_j). r is the chance that a batch holds 1, 2, 3 or 4 given ones.
    second_powers, fourth_powers = n, n * (kurtosis + 3)
    two_two, three_one = second_powers**2 - fourth_powers, -fourth_powers
    two_one_one = -three_one - two_two
    four_ones = -3 * two_one_one
    r = list(itertools.accumulate(((m - k) / (n - k) for k in range(4)), lambda a, b: a * b))
    fourth = r[0] * fourth_powers + r[1] * (4 * three_one + 3 * two_two) + r[2] * 6 * two_one_one + r[3] * four_ones
    second = (r[0] - r[1]) * second_powers
    expected = fourth / second**2 - 3
    found = batch_excess_kurtosis(6.0, batch_size, population_size)
    assert found == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_expected_squared_norm_equals_enumeration_of_all_batches(batch_size):
    gradients = vectors(5)
    expected = np.square(batch_means(gradients, batch_size)).sum(1).mean()
    squared_norm, trace = np.square(gradients.mean(0)).sum(), np.trace(np.cov(gradients.T))
    assert expected_squared_norm(squared_norm, trace, batch_size, 5) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6])
def test_expected_squared_norm_with_replacement_equals_enumeration_of_all_draws(batch_size):
    gradients = vectors(4)
    expected = np.square(batch_means_with_replacement(gradients, batch_size)).sum(1).mean()
    squared_norm, trace = np.square(gradients.mean(0)).sum(), np.trace(np.cov(gradients.T))
    found = expected_squared_norm(squared_norm, trace, batch_size, 4, replacement=True)
    assert found == pytest.approx(expected, rel=1e-12)


def test_at_the_noise_scale_half_of_the_expected_squared_norm_is_noise():
    # tr S/m of a batch of m = noise scale, for a population so large that 1/N is nothing.
    assert noise_scale(24.0, 1.5) == 16
    assert expected_squared_norm(1.5, 24.0, 16, 10**15) == pytest.approx(2 * 1.5, rel=1e-12)


@pytest.mark.parametrize(
    ("function", "smallest"),
    [
        (lambda m, n: finite_population_variance(1.7, m, n), 2),
        (lambda m, n: with_replacement_variance(1.7, m, n), 2),
        (finite_population_correction, 2),
        (successive_correlation, 2),
        (lambda m, n: batch_skewness(1.7, m, n), 3),
        (lambda m, n: batch_excess_kurtosis(1.7, m, n), 4),
        (lambda m, n: expected_squared_norm(2.1, 1.7, m, n), 2),
        (lambda m, n: expected_squared_norm(2.1, 1.7, m, n, replacement=True), 2),
    ],
)
def test_closed_forms_take_arrays_of_sizes(function, smallest):
    m, n = np.array([1, 1, 2, 3]), np.array([smallest, 9, 8, 7])
    np.testing.assert_allclose(function(m, n), [function(*pair) for pair in zip(m, n, strict=True)], rtol=1e-14)
    np.testing.assert_allclose(function(m, 20), [function(one, 20) for one in m], rtol=1e-14)
    np.testing.assert_allclose(function(2, n + 2), [function(2, one + 2) for one in n], rtol=1e-14)


@pytest.mark.parametrize("function", [batch_skewness, batch_excess_kurtosis])
def test_moments_of_several_coordinates_come_as_an_array(function):
    moments = np.array([1.0, 0.3, -0.9])
    np.testing.assert_allclose(function(moments, 3, 10), [function(one, 3, 10) for one in moments], rtol=1e-13)


@pytest.mark.parametrize("function", [finite_population_variance, with_replacement_variance])
def test_variances_of_several_coordinates_may_be_a_tensor(function):
    variances = torch.tensor([1.0, 0.3, 2.5], dtype=torch.float64)
    expected = torch.tensor([function(one, 3, 10) for one in variances.tolist()], dtype=torch.float64)
    torch.testing.assert_close(function(variances, 3, 10), expected, rtol=1e-14, atol=0)


# Samplers


def subset_counts(batches, population_size):
    """Count how often each subset of the population was drawn."""
    subsets = {subset: k for k, subset in enumerate(itertools.combinations(range(population_size), batches.shape[1]))}
    found = [subsets[tuple(batch)] for batch in batches.sort(1).values.tolist()]
    return np.bincount(found, minlength=len(subsets))


# Small batches are drawn by Floyd's algorithm, those with m² > 8 N by shuffles: of at most 64 examples by sorting, of
# more by randperm. Sizes of tests lie on both sides.
FLOYD = [(1, 1), (1, 2), (1, 7), (2, 2), (2, 3), (2, 5), (3, 5), (3, 7), (4, 6), (5, 6), (6, 7), (7, 8)]
SHUFFLE = [(9, 10), (10, 11), (10, 12)]


@pytest.mark.parametrize(("batch_size", "population_size"), FLOYD + SHUFFLE)
def test_all_subsets_are_equally_likely(batch_size, population_size):
    n = 500 * math.comb(population_size, batch_size)
    stream = generator(f"test.sample_batches.{batch_size}.{population_size}")
    counts = subset_counts(sample_batches(n, batch_size, population_size, generator=stream), population_size)
    assert counts.sum() == n
    if len(counts) > 1:
        assert stats.chisquare(counts).pvalue > FALSE_ALARM


@pytest.mark.parametrize("population_size", [64, 65, 80])
def test_every_example_is_equally_likely_to_be_the_one_left_out(population_size):
    stream = generator(f"test.sample_batches.left_out.{population_size}")
    batches = sample_batches(8000, population_size - 1, population_size, generator=stream)
    left_out = math.comb(population_size, 2) - batches.sum(1)
    assert stats.chisquare(np.bincount(left_out.numpy(), minlength=population_size)).pvalue > FALSE_ALARM


@pytest.mark.parametrize(("batch_size", "population_size"), [(1, 3), (2, 3), (9, 10)])
def test_batches_are_independent(batch_size, population_size):
    stream = generator(f"test.sample_batches.independent.{batch_size}.{population_size}")
    batches = sample_batches(4000, batch_size, population_size, generator=stream)
    left_out = torch.tensor([min(set(range(population_size)) - set(batch)) for batch in batches.tolist()])
    pairs = left_out[0::2] * population_size + left_out[1::2]
    table = np.bincount(pairs.numpy(), minlength=population_size**2).reshape(population_size, population_size)
    table = table[table.sum(1) > 0][:, table.sum(0) > 0]
    assert stats.chi2_contingency(table, correction=False).pvalue > FALSE_ALARM


@property_seed
@by_properties
@given(st.integers(1, 20), st.integers(1, 200), st.floats(0, 1))
def test_batches_hold_different_examples_of_the_population(n_batches, population_size, position):
    batch_size = 1 + round(position * (population_size - 1))
    batches = sample_batches(n_batches, batch_size, population_size, generator=generator("test.sample_batches"))
    assert batches.shape == (n_batches, batch_size)
    assert batches.dtype == torch.int64
    assert ((batches >= 0) & (batches < population_size)).all()
    assert all(len(set(batch)) == batch_size for batch in batches.tolist())


@pytest.mark.parametrize(("batch_size", "population_size"), [(20, 60), (64, 10**6), (40, 100)])
def test_batches_of_a_larger_population_hold_all_examples_equally_often(batch_size, population_size):
    batches = sample_batches(2000, batch_size, population_size, generator=generator("test.sample_batches.large"))
    tenths = np.bincount((batches * 10 // population_size).flatten().numpy(), minlength=10)
    assert len(tenths) == 10
    assert (batches.sort(1).values.diff(dim=1) > 0).all()
    # Without replacement the counts vary less than chi-square says, so that only the upper end is tested.
    assert stats.chisquare(tenths).pvalue > FALSE_ALARM


@pytest.mark.parametrize("population_size", [2**15 - 1, 2**15, 2**15 + 1, 2**16 + 1])
def test_all_indices_are_reached_where_integers_need_more_bits(population_size):
    batches = sample_batches(40_000, 6, population_size, generator=generator("test.sample_batches.bits"))
    assert (batches.sort(1).values.diff(dim=1) > 0).all()
    # Each of the lowest and highest 1% is hit 2400 times on average.
    edge = population_size // 100
    for hits in ((batches < edge).sum(), (batches >= population_size - edge).sum()):
        assert stats.binomtest(int(hits), batches.numel(), edge / population_size).pvalue > FALSE_ALARM
    assert batches.min() >= 0
    assert batches.max() < population_size


def test_last_digits_of_examples_of_a_billion_are_equally_likely():
    # Single precision would reach only multiples of 64.
    batches = sample_batches(10_000, 2, 10**9, generator=generator("test.sample_batches.odd"))
    assert stats.chisquare(np.bincount((batches % 64).flatten().numpy(), minlength=64)).pvalue > FALSE_ALARM


@pytest.mark.parametrize("batch_size", [1, 8, 9, 40])
def test_a_batch_may_hold_the_whole_population(batch_size):
    batches = sample_batches(5, batch_size, batch_size, generator=generator("test.sample_batches.all"))
    assert batches.sort(1).values.tolist() == [list(range(batch_size))] * 5


SAMPLERS = {
    "floyd": lambda generator: sample_batches(6, 3, 50, generator=generator),
    "shuffle": lambda generator: sample_batches(6, 40, 50, generator=generator),
    "large shuffle": lambda generator: sample_batches(6, 40, 90, generator=generator),
    "epochs": lambda generator: shuffled_epochs(6, 5, 50, generator=generator),
    "large epochs": lambda generator: shuffled_epochs(6, 5, 90, generator=generator),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_repeat_themselves_for_equal_generators_only(name):
    first, again, other = (SAMPLERS[name](generator(f"test.gradient_noise.{stream}")) for stream in "aab")
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_leave_the_global_generator_alone(name):
    before = torch.random.get_rng_state()
    SAMPLERS[name](generator("test.gradient_noise.global"))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_draw_int64_on_the_device_of_the_generator(name):
    stream = generator("test.gradient_noise.device")
    drawn = SAMPLERS[name](stream)
    assert drawn.dtype == torch.int64
    assert drawn.device == stream.device


class ElsewhereError(Exception):
    """An allocation without a device."""


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_allocate_nothing_on_the_default_device(name, monkeypatch):
    # On a machine without a second device, only the arguments show where a tensor would be made.
    def demanding(function):
        def call(*args, **kwargs):
            if "device" not in kwargs:
                raise ElsewhereError
            return function(*args, **kwargs)

        return call

    for function in ("rand", "randperm", "arange", "empty"):
        monkeypatch.setattr(torch, function, demanding(getattr(torch, function)))
    SAMPLERS[name](generator("test.gradient_noise.device"))


@pytest.mark.parametrize(("batch_size", "population_size"), [(1, 1), (1, 6), (2, 6), (3, 6), (6, 6), (10, 200)])
def test_an_epoch_is_a_permutation_of_all_examples(batch_size, population_size):
    epochs = shuffled_epochs(7, batch_size, population_size, generator=generator("test.shuffled_epochs"))
    assert epochs.shape == (7, population_size // batch_size, batch_size)
    assert epochs.dtype == torch.int64
    assert all(sorted(epoch) == list(range(population_size)) for epoch in epochs.flatten(1).tolist())


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_all_permutations_are_equally_likely(batch_size):
    epochs = shuffled_epochs(12_000, batch_size, 4, generator=generator(f"test.shuffled_epochs.{batch_size}"))
    orders = {order: k for k, order in enumerate(itertools.permutations(range(4)))}
    counts = np.bincount([orders[tuple(epoch)] for epoch in epochs.flatten(1).tolist()], minlength=24)
    assert stats.chisquare(counts).pvalue > FALSE_ALARM


@pytest.mark.parametrize("place", [0, 40, 71])
def test_every_example_is_equally_likely_at_any_place_of_a_long_epoch(place):
    epochs = shuffled_epochs(8000, 8, 72, generator=generator("test.shuffled_epochs.long")).flatten(1)
    assert stats.chisquare(np.bincount(epochs[:, place].numpy(), minlength=72)).pvalue > FALSE_ALARM


def test_epochs_are_independent():
    epochs = shuffled_epochs(8000, 1, 3, generator=generator("test.shuffled_epochs.independent"))
    first = epochs[:, 0, 0]
    counts = np.bincount((3 * first[0::2] + first[1::2]).numpy(), minlength=9)
    assert stats.chisquare(counts).pvalue > FALSE_ALARM


@pytest.mark.parametrize("gradient_shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("batches_shape", [(4,), (5, 2), (3, 2, 4), (2, 1, 3, 1)])
def test_batch_noise_equals_a_loop_over_batches(gradient_shape, batches_shape):
    draws = rng("test.batch_noise")
    gradients, batches = draws.standard_exponential((9, *gradient_shape)), draws.integers(9, size=batches_shape)
    noise = batch_noise(torch.as_tensor(gradients), torch.as_tensor(batches))
    assert noise.shape == (*batches_shape[:-1], *gradient_shape)
    whole = sum(gradients) / 9
    for where in np.ndindex(*batches_shape[:-1]):
        expected = sum(gradients[k] for k in batches[where]) / batches_shape[-1] - whole
        np.testing.assert_allclose(noise[where].numpy(), expected, rtol=1e-12, atol=1e-14)


def test_noises_of_an_epoch_sum_to_zero():
    gradients = torch.as_tensor(vectors(12))
    epochs = shuffled_epochs(3, 4, 12, generator=generator("test.batch_noise.epoch"))
    assert batch_noise(gradients, epochs).sum(1).abs().max() < 1e-13


@pytest.mark.parametrize("training", [True, False])
def test_noise_scale_leaves_the_model_alone(training):
    model = build(lambda: nn.Sequential(nn.Dropout(0.0), frozen(perceptron(), "2.bias"))).train(training)
    for k, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, k) if p.requires_grad else None
    before = copy.deepcopy(model)  # without .grad
    gradient_noise_scale(model, functional.cross_entropy, *far_examples())
    for k, (p, old) in enumerate(zip(model.parameters(), before.parameters(), strict=True)):
        assert torch.equal(p, old)
        assert p.requires_grad == old.requires_grad
        assert (p.grad == k).all() if p.requires_grad else p.grad is None
    assert [module.training for module in model.modules()] == [training] * len(list(model.modules()))


# The noise scale of your own network


def prediction(predictions, targets):
    """Return the prediction itself as loss, so that the gradient of a linear layer without bias is its input."""
    return predictions.sum()


def scale_of_rows(rows, **options):
    """Return the noise scale of gradients that are given as rows."""
    rows = torch.as_tensor(rows, dtype=torch.float64)
    model = nn.Linear(rows.shape[1], 1, bias=False, dtype=torch.float64)
    return gradient_noise_scale(model, prediction, rows, rows, **options)


def scale_by_pairs(rows):
    """Return tr S / |∇L|², both as averages over pairs of different examples, which are unbiased one by one."""
    rows = np.asarray(rows)
    pairs = list(itertools.combinations(range(len(rows)), 2))
    trace = np.mean([np.square(rows[i] - rows[j]).sum() / 2 for i, j in pairs])
    squared_norm = np.mean([rows[i] @ rows[j] for i, j in pairs])
    return trace / squared_norm


def test_noise_scale_equals_averages_over_pairs_of_looped_gradients():
    model = build(perceptron)
    data = far_examples()
    expected = scale_by_pairs(looped_matrix(model, functional.cross_entropy, *data))
    estimate = gradient_noise_scale(model, functional.cross_entropy, *data)
    assert estimate.value == pytest.approx(expected, rel=1e-9)
    assert estimate.n == 40


@pytest.mark.parametrize("n", [2, 3, 10])
def test_noise_scale_of_few_gradients_equals_averages_over_pairs(n):
    rows = 10 + rng("test.noise_scale.few").standard_normal((n, 4))
    assert scale_of_rows(rows).value == pytest.approx(scale_by_pairs(rows), rel=1e-9)


def test_noise_scale_is_that_of_the_loss_of_one_example_whatever_the_reduction():
    model = build(perceptron)
    data = far_examples()
    mean, total, each = (gradient_noise_scale(model, LOSSES[name], *data) for name in list(LOSSES)[:3])
    assert total.value == pytest.approx(mean.value, rel=1e-12)
    assert each.value == pytest.approx(mean.value, rel=1e-12)


@pytest.mark.parametrize("chunk_size", [2, 7, 40, 100])
def test_chunks_make_no_difference_to_the_noise_scale(chunk_size):
    model = build(perceptron)
    data = far_examples()
    whole = gradient_noise_scale(model, functional.cross_entropy, *data)
    parts = gradient_noise_scale(model, functional.cross_entropy, *data, chunk_size=chunk_size)
    assert parts.value == pytest.approx(whole.value, rel=1e-9)
    assert parts.skewness == pytest.approx(whole.skewness, rel=1e-6)
    # The part of second order comes from the pairs of a chunk; here it is small.
    assert parts.stderr == pytest.approx(whole.stderr, rel=0.01)


CHUNKS_NEAR_256 = [{"chunk_size": 256}, {"chunk_size": 255}, {"chunk_size": 257}]


def test_noise_scale_holds_256_gradients_at_once_unless_told_otherwise():
    # The part of second order comes from the pairs of a chunk, and so tells which examples shared one.
    rows = 2 + rng("test.noise_scale.chunks").standard_normal((600, 40))
    stderr, at_256, at_255, at_257 = (scale_of_rows(rows, **k).stderr for k in [{}, *CHUNKS_NEAR_256])
    assert stderr == at_256
    assert stderr not in (at_255, at_257)


def jackknife(rows):
    """Return standard error and skewness of influence values by leaving out one gradient at a time."""
    rows = np.asarray(rows)
    n = len(rows)
    total, squares = rows.sum(0), np.square(rows).sum()
    left_total, left_squares = total - rows, squares - np.square(rows).sum(1)
    m = n - 1
    traces = (left_squares - np.square(left_total).sum(1) / m) / (m - 1)
    norms = np.square(left_total / m).sum(1) - traces / m
    influence = -(traces / norms - (traces / norms).mean())
    return math.sqrt(m / n * np.square(influence).sum()), skewness_of(influence)


def test_standard_error_and_skewness_of_the_noise_scale_equal_the_jackknife():
    # Four coordinates: the part of second order is hidden in the tolerance of order 1/n.
    rows = 2 + rng("test.noise_scale.jackknife").standard_exponential((4000, 4)) * [1.0, 0.5, 2.0, 0.1]
    estimate = scale_of_rows(rows)
    stderr, skewness = jackknife(rows)
    assert estimate.stderr == pytest.approx(stderr, rel=0.005)
    assert estimate.skewness == pytest.approx(skewness, rel=0.02)


VARIANCES, SQUARED_NORM = np.repeat([0.2, 1.8], 150), 2.5  # of 300 coordinates


def many_coordinates(n, repetition):
    """Return Gaussian gradients of 300 coordinates: a third of the variance of |∇L|² is of second order."""
    noise = rng(f"test.noise_scale.many.{repetition}").standard_normal((n, 300)) * np.sqrt(VARIANCES)
    return noise + math.sqrt(SQUARED_NORM / 300)


def relative_error_in_many_coordinates(n):
    """Return the standard deviation of the estimated noise scale of :func:`many_coordinates`, over itself.

    For Gaussian gradients the sample covariance and the sample mean are independent.
    """
    trace, trace_of_square = VARIANCES.sum(), np.square(VARIANCES).sum()
    trace_variance = 2 * trace_of_square / (n - 1)
    norm_variance = 4 * SQUARED_NORM / 300 * trace / n + 2 * trace_of_square / (n * (n - 1))
    return math.sqrt(trace_variance / trace**2 + norm_variance / SQUARED_NORM**2)


def test_standard_error_of_the_noise_scale_has_the_part_of_second_order():
    # |∇L|² fluctuates by 11%, and the standard error over the scale with it, which hardly changes the median.
    estimates = [scale_of_rows(many_coordinates(200, k)) for k in range(60)]
    relative = np.median([estimate.stderr / estimate.value for estimate in estimates])
    assert relative == pytest.approx(relative_error_in_many_coordinates(200), rel=0.06)


def assert_standard(z):
    """Check that z-scores have mean 0 and standard deviation 1, as far as a few hundred can tell."""
    assert abs(z.mean()) < 0.25
    assert 0.85 < z.std(ddof=1) < 1.2


def test_noise_scale_z_scores_are_standard_for_linear_regression():
    # y = x·w + e; at parameters away from w by d, the gradient of the squared error is 2 (x·d - e) x. Its moments are
    # polynomials of degree at most 4 in each of x and e, for which three Gauss–Hermite nodes are exact.
    scales, d, noise_std = np.array([1.0, 0.5, 1.5]), np.array([0.8, -0.6, 0.4]), 0.7
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    grid = np.array(list(itertools.product(nodes, repeat=4)))
    weight = np.array([math.prod(w) for w in itertools.product(weights / weights.sum(), repeat=4)])
    x = grid[:, :3] * scales
    gradients = 2 * (x @ d - noise_std * grid[:, 3])[:, None] * x
    mean = weight @ gradients
    truth = (weight @ np.square(gradients).sum(1) - mean @ mean) / (mean @ mean)

    w = np.array([0.3, 1.2, -0.5])
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    model.weight.data = torch.as_tensor(w + d)[None]
    z = []
    for k in range(400):
        draws = rng(f"test.noise_scale.regression.{k}")
        x = draws.standard_normal((500, 3)) * scales
        y = x @ w + noise_std * draws.standard_normal(500)
        data = torch.as_tensor(x), torch.as_tensor(y)[:, None]
        estimate = gradient_noise_scale(model, functional.mse_loss, *data, chunk_size=500)
        z.append((estimate.value - truth) / estimate.stderr)
    assert_standard(np.array(z))


def test_noise_scale_z_scores_are_standard_in_many_coordinates():
    estimates = [scale_of_rows(many_coordinates(200, k)) for k in range(250)]
    truth = VARIANCES.sum() / SQUARED_NORM
    assert_standard(np.array([(estimate.value - truth) / estimate.stderr for estimate in estimates]))


def two_points(center, n):
    """Return n gradients center ± 1 of one coordinate, half of each."""
    return center + np.tile([1.0, -1.0], n // 2)[:, None]


def center_at(standard_errors, n):
    """Return where |∇L|² of :func:`two_points` is so many standard errors above zero.

    |ḡ|² is c² and tr S is n/(n-1); the products of deviations with ḡ are ±c. There the part of second order, 2/n²
    beside 4 c²/n, is half a percent of the standard error for any n.
    """

    def excess(c):
        return c**2 - 1 / (n - 1) - standard_errors * math.sqrt(4 * c**2 / n)

    return optimize.brentq(excess, 4 / math.sqrt(n), 100)


def test_noise_scale_is_refused_just_below_four_standard_errors():
    with pytest.raises(ValueError, match="too few"):
        scale_of_rows(two_points(center_at(3.95, 200), 200))


def test_noise_scale_is_given_just_above_four_standard_errors():
    rows = two_points(center_at(4.05, 200), 200)
    assert scale_of_rows(rows).value == pytest.approx(scale_by_pairs(rows), rel=1e-9)


@pytest.mark.parametrize(
    ("center", "squared_norm", "error"),
    [
        (0.0, "-0.333", "0.354"),  # √(2/16): only the part of second order is left
        (1.0, "0.667", "0.935"),  # √(4/4 - 2/16): at the sample mean the first part has 4/16 too much
    ],
)
def test_noise_scale_near_the_optimum_is_refused_with_the_figures(center, squared_norm, error):
    # Four gradients center ± 1: tr S is 4/3, of which a quarter is taken off the square of the center.
    message = (
        f"|∇L|² must be 4 standard errors above zero, got {squared_norm} with standard error {error}: "
        "4 examples are too few to tell the gradient from its noise"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        scale_of_rows(two_points(center, 4))


def test_noise_scale_of_vanishing_gradients_is_refused():
    with pytest.raises(ValueError, match=r"^examples must differ in their gradients, got a variance of 0$"):
        scale_of_rows(np.zeros((6, 3)))


def test_part_of_second_order_is_the_mean_over_the_pairs_of_all_chunks():
    # Chunks of 4, 4 and 2 examples have 12 + 12 + 2 ordered pairs. The mean of these rows is 0, and so is `along`.
    rows = np.array([[1.0, 0], [-1, 0], [2, 0], [-2, 0], [0, 3], [0, -3], [1, 1], [-1, -1], [0, 1], [0, -1]])
    pairs = [pair for part in (rows[:4], rows[4:8], rows[8:]) for pair in itertools.permutations(part, 2)]
    error = math.sqrt(2 * np.mean([(a @ b) ** 2 for a, b in pairs]) / 100)
    squared_norm = -np.square(rows).sum() / 9 / 10
    with pytest.raises(ValueError, match=re.escape(f"got {squared_norm:.3g} with standard error {error:.3g}: 10 ex")):
        scale_of_rows(rows, chunk_size=4)


@pytest.mark.parametrize("chunk_size", [2, 5])
def test_chunks_change_the_variance_of_the_noise_scale_by_their_part_of_second_order(chunk_size):
    rows = 3 + rng("test.noise_scale.second_order").standard_normal((12, 6))
    deviations = rows - rows.mean(0)

    def mean_square_of_pairs(size):
        parts = [deviations[start : start + size] for start in range(0, 12, size)]
        return np.mean([(a @ b) ** 2 for part in parts for a, b in itertools.permutations(part, 2)])

    whole, chunked = scale_of_rows(rows), scale_of_rows(rows, chunk_size=chunk_size)
    squared_norm = np.mean([a @ b for a, b in itertools.combinations(rows, 2)])
    difference = (mean_square_of_pairs(12) - mean_square_of_pairs(chunk_size)) * 2 / 12**2
    expected = (scale_by_pairs(rows) / squared_norm) ** 2 * difference
    assert abs(whole.stderr**2 - chunked.stderr**2) == pytest.approx(abs(expected), rel=1e-6)


# Two batch sizes


def squared_norm_of(vector):
    return float(np.square(vector).sum())


def all_pairs_of_batches(gradients, small_batch_size, large_batch_size):
    """Return the squared norms of every small batch beside every large one, as tensors."""
    small = [squared_norm_of(mean) for mean in batch_means(gradients, small_batch_size)]
    large = [squared_norm_of(mean) for mean in batch_means(gradients, large_batch_size)]
    return torch.tensor(list(itertools.product(small, large)), dtype=torch.float64).unbind(1)


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
        np.square(batch_means_with_replacement(gradients, m)).sum(1).repeat(repeats) for m, repeats in ((2, 16), (4, 1))
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
    assert_standard(np.array(z))


def norms_at(standard_errors, n):
    """Return norms for which |∇L|² = 2 E large - E small is so many standard errors above zero.

    Both are center ± 1 together, and their difference is 1 ± 0: |∇L|² is center - 1, its influence values ±1.
    """
    center = 1 + standard_errors / math.sqrt(n - 1)
    large = center + torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(n // 2)
    return large + 1, large


def test_two_batch_noise_scale_is_refused_just_below_four_standard_errors():
    message = "|∇L|² must be 4 standard errors above zero, got 0.401 ± 0.101: measure more batches"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        two_batch_noise_scale(*norms_at(3.99, 100), small_batch_size=1, large_batch_size=2)


def test_two_batch_noise_scale_needs_still_more_where_curvature_rules_its_error():
    # Above four standard errors it is the rule of every estimated function of means that refuses.
    with pytest.raises(ValueError, match="a standard error needs influence values that vary"):
        two_batch_noise_scale(*norms_at(4.01, 100), small_batch_size=1, large_batch_size=2)


def test_two_batch_noise_scale_of_vanishing_gradients_is_refused():
    message = "|∇L|² must be 4 standard errors above zero, got 0 ± 0: measure more batches"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        two_batch_noise_scale(torch.zeros(9), torch.zeros(9), small_batch_size=1, large_batch_size=2)


def test_two_batch_noise_scale_far_from_zero_is_given():
    # tr S = 1 / (1 - 1/2), and |∇L|² = 12 / √99.
    found = two_batch_noise_scale(*norms_at(12, 100), small_batch_size=1, large_batch_size=2)
    assert found.value == pytest.approx(2 * math.sqrt(99) / 12, rel=1e-12)


# Refusals


def sampled(**changes):
    arguments = {"n_batches": 2, "batch_size": 2, "population_size": 6}
    return sample_batches(**{**arguments, **changes}, generator=generator("test.refusal"))


def shuffled(**changes):
    arguments = {"n_epochs": 2, "batch_size": 2, "population_size": 6}
    return shuffled_epochs(**{**arguments, **changes}, generator=generator("test.refusal"))


def two_batches(small=2, large=8, small_shape=(20,), large_shape=(20,)):
    return two_batch_noise_scale(
        torch.ones(small_shape), torch.ones(large_shape), small_batch_size=small, large_batch_size=large
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: finite_population_variance(1.0, 0, 5), "batch_size must be at least 1, got 0"),
        (lambda: finite_population_variance(1.0, 6, 5), "batch_size must not exceed population_size 5, got 6"),
        (
            lambda: finite_population_variance(1.0, np.array([2, 6]), 5),
            "batch_size must not exceed population_size 5, got [2 6]",
        ),
        (
            lambda: finite_population_variance(1.0, 4, np.array([5, 3])),
            "batch_size must not exceed population_size [5 3], got 4",
        ),
        (lambda: with_replacement_variance(1.0, 0, 5), "batch_size must be at least 1, got 0"),
        (lambda: with_replacement_variance(1.0, 5, 0), "population_size must be at least 1, got 0"),
        (lambda: finite_population_correction(0, 5), "batch_size must be at least 1, got 0"),
        (lambda: finite_population_correction(6, 5), "batch_size must not exceed population_size 5, got 6"),
        (
            lambda: finite_population_correction(1, 1),
            "population_size must be at least 2 for batch_size 1, got 1",
        ),
        (
            lambda: finite_population_correction(1, np.array([3, 1])),
            "population_size must be at least 2 for batch_size 1, got [3 1]",
        ),
        (lambda: successive_correlation(0, 5), "batch_size must be at least 1, got 0"),
        (lambda: successive_correlation(3, 5), "population_size must be at least 6 for batch_size 3, got 5"),
        (lambda: successive_correlation(5, 5), "population_size must be at least 10 for batch_size 5, got 5"),
        (lambda: successive_correlation(6, 5), "batch_size must not exceed population_size 5, got 6"),
        (lambda: batch_skewness(1.0, 0, 5), "batch_size must be at least 1, got 0"),
        (lambda: batch_skewness(1.0, 1, 2), "population_size must be at least 3 for batch_size 1, got 2"),
        (lambda: batch_skewness(1.0, 5, 5), "population_size must be at least 6 for batch_size 5, got 5"),
        (lambda: batch_skewness(1.0, 6, 5), "batch_size must not exceed population_size 5, got 6"),
        (lambda: batch_excess_kurtosis(1.0, 0, 5), "batch_size must be at least 1, got 0"),
        (lambda: batch_excess_kurtosis(1.0, 2, 3), "population_size must be at least 4 for batch_size 2, got 3"),
        (lambda: batch_excess_kurtosis(1.0, 5, 5), "population_size must be at least 6 for batch_size 5, got 5"),
        (lambda: batch_excess_kurtosis(1.0, 6, 5), "batch_size must not exceed population_size 5, got 6"),
        (lambda: expected_squared_norm(1.0, 2.0, 0, 5), "batch_size must be at least 1, got 0"),
        (lambda: expected_squared_norm(1.0, 2.0, 6, 5), "batch_size must not exceed population_size 5, got 6"),
        (
            lambda: expected_squared_norm(1.0, 2.0, 6, 0, replacement=True),
            "population_size must be at least 1, got 0",
        ),
        (lambda: noise_scale(0.0, 1.0), "trace must be positive and finite, got 0.0"),
        (lambda: noise_scale(1.0, 0.0), "squared_norm must be positive and finite, got 0.0"),
        (lambda: noise_scale(-1.0, -1.0), "trace must be positive and finite, got -1.0"),
        (lambda: noise_scale(math.nan, 1.0), "trace must be positive and finite, got nan"),
        (lambda: noise_scale(1.0, math.inf), "squared_norm must be positive and finite, got inf"),
        (lambda: sampled(n_batches=0), "n_batches must be at least 1, got 0"),
        (lambda: sampled(batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: sampled(batch_size=7), "batch_size must not exceed population_size 6, got 7"),
        (lambda: shuffled(n_epochs=0), "n_epochs must be at least 1, got 0"),
        (lambda: shuffled(batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: shuffled(batch_size=12), "batch_size must not exceed population_size 6, got 12"),
        (lambda: shuffled(batch_size=4), "batch_size must divide population_size 6, got 4"),
        (
            lambda: batch_noise(torch.ones(5), torch.ones(2, 2, dtype=torch.int64, device="meta")),
            "batches must be on the device of gradients, cpu, got meta",
        ),
        (
            lambda: two_batches(large_shape=(19,)),
            "small and large must have one shape (n,), got (20,), (19,)",
        ),
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
        (lambda: scale_of_rows(np.ones((1, 4))), "inputs must hold at least 2 examples, got 1"),
        (lambda: scale_of_rows(np.ones((0, 4))), "inputs must hold at least 2 examples, got 0"),
    ],
)
def test_refusals_state_the_rule_and_the_value(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


def test_noise_scale_refuses_numbers_of_examples_that_differ():
    inputs, targets = far_examples()
    with pytest.raises(ValueError, match=re.escape("got shapes (40, 4) and (39,)")):
        gradient_noise_scale(build(perceptron), functional.cross_entropy, inputs, targets[:-1], chunk_size=16)


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_noise_scale_refuses_chunks_without_examples(chunk_size):
    with pytest.raises(ValueError, match=f"^chunk_size must be at least 1, got {chunk_size}$"):
        gradient_noise_scale(build(perceptron), functional.cross_entropy, *far_examples(), chunk_size=chunk_size)


def test_noise_scale_refuses_a_model_with_nothing_to_train():
    model = build(perceptron).requires_grad_(False)
    with pytest.raises(ValueError, match=r"^model must have a parameter that requires a gradient, got none$"):
        gradient_noise_scale(model, functional.cross_entropy, *far_examples())


@pytest.mark.parametrize("name", COUPLED)
def test_noise_scale_refuses_batch_statistics_with_the_reason(name):
    constructor, where, kind = COUPLED[name]
    message = (
        f"examples must not be coupled, but {where} normalizes by the statistics of its batch, so that one example "
        f"has no gradient of its own: got {kind}; call model.eval() to use its running statistics, or use GroupNorm "
        "or LayerNorm"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        gradient_noise_scale(build(constructor), functional.cross_entropy, *far_examples())


# What a first round of use found


def test_a_population_too_large_for_32_bits_is_sampled():
    size = 3_000_000_000
    batches = sample_batches(1000, 4, size, generator=generator("test.gradient_noise.huge"))
    assert batches.min() >= 0
    assert 2**31 < batches.max() < size


def test_noise_scale_refuses_chunks_without_pairs():
    model = build(perceptron)
    with pytest.raises(ValueError, match="chunk_size must be at least 2, since pairs of examples are compared, got 1"):
        gradient_noise_scale(model, functional.cross_entropy, *examples(model), chunk_size=1)


def test_noise_scale_refuses_examples_that_are_all_the_same():
    model = build(perceptron)
    inputs, targets = examples(model)
    same = inputs[:1].expand(5, -1), targets[:1].expand(5)
    with pytest.raises(ValueError, match="examples must differ in their gradients, got a variance of"):
        gradient_noise_scale(model, functional.cross_entropy, *same)


def test_two_batches_must_fit_into_the_population():
    norms = torch.tensor([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="batch_size must not exceed population_size 3, got 4"):
        two_batch_noise_scale(norms, norms, small_batch_size=2, large_batch_size=4, population_size=3)
