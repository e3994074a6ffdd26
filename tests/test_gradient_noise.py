"""The chapter's closed forms, samplers and gradients of single examples, each against something that does not use them.

Closed forms are checked by listing every batch of a small population; gradients by one backward pass an example.
Statistical tests allow what a right program exceeds with probability 1e-6, for all entries of a test together.
"""

import itertools
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from scipy import stats

from helpers import gradient_noise
from helpers.gradient_noise import (
    batch_excess_kurtosis,
    batch_noise,
    batch_skewness,
    expected_squared_norm,
    finite_population_correction,
    finite_population_variance,
    noise_scale,
    sample_batches,
    shuffled_epochs,
    successive_correlation,
    with_replacement_variance,
)
from helpers.lab.runtime import generator, rng
from tests.enumeration import batch_means, batch_means_with_replacement, vectors
from tests.statistics import FALSE_ALARM, assert_counts, assert_z, limit_of_z

# Skewed, and without symmetry that could hide a wrong constant.
POPULATION = np.array([0.3, 1.1, 2.9, -0.7, 6.4, 0.9, 1.6, 3.3, 11.2, -2.5])
SIZES = [(m, n) for n in (1, 2, 3, 4, 5, 7, 9, 10) for m in range(1, n + 1)]
PROPER_SIZES = [(m, n) for m, n in SIZES if m < n]
by_properties = settings(max_examples=100, deadline=None, database=None)
property_seed = seed(int(rng("test.gradient_noise.properties").integers(2**32)))


def moment(values, power):
    return np.mean((values - np.mean(values)) ** power)


def skewness_of(values):
    return moment(values, 3) / moment(values, 2) ** 1.5


def excess_kurtosis_of(values):
    return moment(values, 4) / moment(values, 2) ** 2 - 3


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
        assert_counts(counts)


def floyd_by_loop(n_batches, batch_size, population_size, chunk, stream):
    """Draw batches one by one by Floyd's algorithm, from the same random numbers."""
    batches = []
    for start in range(0, n_batches, chunk):
        count = min(chunk, n_batches - start)
        last = range(population_size - batch_size, population_size)
        if population_size < 2**16:
            rows = [torch.randint(k + 1, (count,), generator=stream).tolist() for k in last]
        else:
            uniform = torch.empty(count, dtype=torch.float64)
            rows = [uniform.uniform_(0, k + 1, generator=stream).long().tolist() for k in last]
        for column in zip(*rows, strict=True):
            chosen = []
            for k, drawn in zip(last, column, strict=True):
                chosen.append(k if drawn in chosen else drawn)
            batches.append(chosen)
    return batches


# Sixteen-bit, 32-bit and 64-bit indices; draws of 32 random bits up to 2¹⁶ examples, in double precision from then on.
@pytest.mark.parametrize(
    ("batch_size", "population_size"),
    [
        *((1, 1), (1, 9), (2, 2), (5, 6), (8, 8), (7, 9)),
        *((6, 2**15 - 1), (6, 2**15), (6, 2**16 - 1), (6, 2**16), (5, 2**31 - 1), (5, 2**31)),
    ],
)
def test_small_batches_equal_a_slow_loop_over_the_same_draws(batch_size, population_size, monkeypatch):
    monkeypatch.setattr(gradient_noise, "FLOYD_CHUNK", 40)
    streams = [generator("test.sample_batches.loop") for _ in range(2)]
    found = sample_batches(100, batch_size, population_size, generator=streams[0])
    assert found.tolist() == floyd_by_loop(100, batch_size, population_size, 40, streams[1])


# m² = 8 N is the last that Floyd's algorithm draws; of one example fewer, batches come from shuffles.
@pytest.mark.parametrize(("batch_size", "population_size"), [(8, 8), (12, 18), (20, 50)])
def test_batches_are_small_up_to_the_square_root_of_eight_times_the_population(batch_size, population_size):
    for size, by_floyd in ((population_size, True), (population_size - 1, False)):
        if size < batch_size:
            continue
        streams = [generator("test.sample_batches.threshold") for _ in range(2)]
        found = sample_batches(20, batch_size, size, generator=streams[0]).tolist()
        assert (found == floyd_by_loop(20, batch_size, size, 2**14, streams[1])) == by_floyd


# With counts of n = 600,000 batches, an error of 1 % of an inclusion probability of m/N is caught 999 times in 1,000:
# its z-score is 0.01 √(n p/(1 - p)), at least 9.5 where the limit for 20 examples is 5.5.
@pytest.mark.parametrize(("batch_size", "population_size"), [(12, 20), (13, 20)])
def test_every_example_is_in_as_many_batches_to_one_percent(batch_size, population_size):
    stream = generator(f"test.sample_batches.law.{batch_size}")
    batches = sample_batches(600_000, batch_size, population_size, generator=stream)
    p = batch_size / population_size
    counts = np.bincount(batches.flatten().numpy(), minlength=population_size)
    z = (counts - 600_000 * p) / math.sqrt(600_000 * p * (1 - p))
    assert 0.01 * math.sqrt(600_000 * p / (1 - p)) > limit_of_z(population_size) + 3.09
    assert_z(z)


# An error of 1 % of the probability of one place is 0.01 √(n/5) standard errors, 10 for n = 5 million.
def test_the_last_example_is_as_often_at_every_place_of_an_epoch_to_one_percent():
    n, counts = 5_000_000, np.zeros(6)
    stream = generator("test.shuffled_epochs.law")
    for _ in range(10):
        epochs = shuffled_epochs(n // 10, 1, 6, generator=stream).flatten(1)
        counts += (epochs == 5).sum(0).numpy()
    assert 0.01 * math.sqrt(n / 5) > limit_of_z(6) + 3.09
    assert_z((counts - n / 6) / math.sqrt(n * 5 / 36))


@pytest.mark.parametrize("population_size", [64, 65, 80])
def test_every_example_is_equally_likely_to_be_the_one_left_out(population_size):
    stream = generator(f"test.sample_batches.left_out.{population_size}")
    batches = sample_batches(8000, population_size - 1, population_size, generator=stream)
    left_out = math.comb(population_size, 2) - batches.sum(1)
    assert_counts(np.bincount(left_out.numpy(), minlength=population_size))


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
    assert_counts(tenths)


@pytest.mark.parametrize("population_size", [2**15 - 1, 2**15, 2**15 + 1, 2**16 + 1])
def test_all_indices_are_reached_where_integers_need_more_bits(population_size):
    batches = sample_batches(40_000, 6, population_size, generator=generator("test.sample_batches.bits"))
    assert (batches.sort(1).values.diff(dim=1) > 0).all()
    # Each of the lowest and highest 1% is hit 2400 times on average.
    edge = population_size // 100
    for hits in ((batches < edge).sum(), (batches >= population_size - edge).sum()):
        assert stats.binomtest(int(hits), batches.numel(), edge / population_size).pvalue > FALSE_ALARM / 2
    assert batches.min() >= 0
    assert batches.max() < population_size


def test_the_last_example_of_a_large_population_is_drawn_as_often_as_any():
    batches = sample_batches(4_000_000, 1, 2**16, generator=generator("test.sample_batches.last"))
    # 61 times on average
    assert stats.binomtest(int((batches == 2**16 - 1).sum()), batches.numel(), 2**-16).pvalue > FALSE_ALARM


def test_last_digits_of_examples_of_a_billion_are_equally_likely():
    # Single precision would reach only multiples of 64.
    batches = sample_batches(10_000, 2, 10**9, generator=generator("test.sample_batches.odd"))
    assert_counts(np.bincount((batches % 64).flatten().numpy(), minlength=64))


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
    assert_counts(counts)


@pytest.mark.parametrize("place", [0, 40, 71])
def test_every_example_is_equally_likely_at_any_place_of_a_long_epoch(place):
    epochs = shuffled_epochs(8000, 8, 72, generator=generator("test.shuffled_epochs.long")).flatten(1)
    assert_counts(np.bincount(epochs[:, place].numpy(), minlength=72))


def test_epochs_are_independent():
    epochs = shuffled_epochs(8000, 1, 3, generator=generator("test.shuffled_epochs.independent"))
    first = epochs[:, 0, 0]
    counts = np.bincount((3 * first[0::2] + first[1::2]).numpy(), minlength=9)
    assert_counts(counts)


# Rows of 16 entries and more are added up without a copy.
@pytest.mark.parametrize("gradient_shape", [(), (3,), (2, 3), (15,), (16,), (4, 5)])
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


@pytest.mark.parametrize("entries", [3, 16])
def test_batch_noise_keeps_the_precision_and_the_graph_of_the_gradients(entries):
    gradients = torch.ones(5, entries, requires_grad=True)
    noise = batch_noise(gradients, torch.tensor([[0, 1], [3, 3]]))
    assert noise.dtype == torch.float32
    noise[1].sum().backward()
    expected = torch.full((5, entries), -1 / 5) + torch.eye(5)[3][:, None]
    torch.testing.assert_close(gradients.grad, expected)


def test_noises_of_an_epoch_sum_to_zero():
    gradients = torch.as_tensor(vectors(12))
    epochs = shuffled_epochs(3, 4, 12, generator=generator("test.batch_noise.epoch"))
    assert batch_noise(gradients, epochs).sum(1).abs().max() < 1e-13


# Refusals


def sampled(**changes):
    arguments = {"n_batches": 2, "batch_size": 2, "population_size": 6}
    return sample_batches(**{**arguments, **changes}, generator=generator("test.refusal"))


def shuffled(**changes):
    arguments = {"n_epochs": 2, "batch_size": 2, "population_size": 6}
    return shuffled_epochs(**{**arguments, **changes}, generator=generator("test.refusal"))


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
    ],
)
def test_refusals_state_the_rule_and_the_value(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


# What a first round of use found


def test_a_population_too_large_for_32_bits_is_sampled():
    size = 3_000_000_000
    batches = sample_batches(1000, 4, size, generator=generator("test.gradient_noise.huge"))
    assert batches.min() >= 0
    assert 2**31 < batches.max() < size
