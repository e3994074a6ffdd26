"""Estimates: their values against NumPy and SciPy, their standard errors against the spread over many repetitions."""

import math
import re

import numpy as np
import pytest
import torch
from scipy import stats

from helpers.lab.estimates import (
    Covariance,
    Estimate,
    Proportion,
    covariance,
    function_of,
    mean,
    proportion,
    stack,
    variance,
)
from helpers.lab.runtime import generator, rng
from tests.statistics import assert_standard

# z = (estimate - truth) / stderr has a bias of about -γ / (2 √n), γ being the skewness of the influence values. Sample
# size n and number of repetitions R are chosen so that it is at most a quarter of the standard error 1/√R of the mean
# z: √(R/n) <= 1/(2 |γ|). The largest γ are those of squared deviations: 10.6 of an exponential variable, 2.8 of a
# normal, 1.5 of a Bernoulli and 0.6 of a uniform one. A shift by a quarter makes the false-alarm rate 4e-6 instead of
# 1e-6.
LAWS = {
    # name: (draw, mean, variance)
    "normal": (lambda shape, rng: rng.normal(1.5, 0.7, shape), 1.5, 0.49),
    "exponential": (lambda shape, rng: rng.exponential(2.0, shape), 2.0, 4.0),
    "uniform": (lambda shape, rng: rng.uniform(1.0, 4.0, shape), 2.5, 0.75),
    "bernoulli": (lambda shape, rng: (rng.random(shape) < 0.2) * 1.0, 0.2, 0.16),
}
PAIR = np.array([[1.0, 0.6], [0.6, 1.0]])  # correlation matrix of (X, 0.6 X + 0.8 Y)
laws = pytest.mark.parametrize("law", LAWS)


def sizes(law, n, repetitions):
    """Return n and R: a thirteenth of R/n for the exponential law, four times as much for the two of small γ."""
    if law in ("uniform", "bernoulli"):
        return n // 4, repetitions
    return (n * 7 // 2, repetitions * 3 // 10) if law == "exponential" else (n, repetitions)


def z_scores(estimates, truth):
    values = np.array([estimate.value for estimate in estimates])
    return (values - truth) / np.array([estimate.stderr for estimate in estimates])


def columns(law, stream):
    """Yield 1000 repetitions of a law, one a column, a part at a time to save memory."""
    n, repetitions = sizes(law, 40_000, 1000)
    source = rng(f"test.estimates.{stream}.{law}")
    for _ in range(20):
        yield LAWS[law][0]((n, repetitions // 20), source)


def pairs(law, stream, n, repetitions):
    """Yield samples of (X, 0.6 X + 0.8 Y), X and Y being independent."""
    source = rng(f"test.estimates.{stream}.{law}")
    for _ in range(repetitions):
        x, y = LAWS[law][0]((2, n), source)
        yield np.stack([x, 0.6 * x + 0.8 * y], axis=1)


# Calibration


@laws
def test_z_scores_of_means_and_variances_are_standard(law):
    means, variances = zip(*((mean(part), variance(part)) for part in columns(law, "moments")), strict=True)
    assert_standard(z_scores(means, LAWS[law][1]).flatten())
    assert_standard(z_scores(variances, LAWS[law][2]).flatten())


@pytest.mark.parametrize("p", [0.2, 0.5, 0.97])
def test_z_scores_of_proportions_are_standard(p):
    source = rng(f"test.estimates.proportion.{p}")
    estimates = [proportion(source.random((40_000, 50)) < p) for _ in range(20)]
    assert_standard(z_scores(estimates, p).flatten())


@laws
def test_z_scores_of_covariances_are_standard(law):
    # Fewer than 1000 repetitions: each costs a call of its own.
    estimates = [covariance(samples) for samples in pairs(law, "covariance", *sizes(law, 16_000, 400))]
    z = z_scores(estimates, LAWS[law][2] * PAIR)
    assert_standard(np.stack([z[:, 0, 0], z[:, 0, 1], z[:, 1, 1]], axis=1))


@laws
def test_z_scores_of_functions_of_means_are_standard(law):
    mu = LAWS[law][1]

    def ratio_and_product(m):
        return torch.stack([m[0] / m[1], m[0].log() * m[1]])

    # Here no |γ| exceeds 2.
    estimates = [function_of(ratio_and_product, samples) for samples in pairs(law, "function", 8000, 200)]
    assert_standard(z_scores(estimates, [1 / 1.4, math.log(mu) * 1.4 * mu]))


# Values


def skewed_samples(shape):
    return rng("test.estimates.samples").gamma(1.5, 2.0, shape)


def test_mean_and_its_standard_error_equal_scipys():
    samples = skewed_samples((200, 3))
    estimate = mean(samples)
    np.testing.assert_allclose(estimate.value, samples.mean(0), rtol=1e-13)
    np.testing.assert_allclose(estimate.stderr, stats.sem(samples), rtol=1e-12)
    np.testing.assert_allclose(estimate.skewness, stats.skew(samples), rtol=1e-10)
    np.testing.assert_array_equal(estimate.n, 200)


def test_variance_equals_numpys():
    samples = skewed_samples((200, 3))
    np.testing.assert_allclose(variance(samples).value, np.var(samples, axis=0, ddof=1), rtol=1e-12)


@pytest.mark.parametrize("n", [60, 5000])
def test_standard_error_of_variance_equals_the_published_formula(n):
    # σ⁴ is estimated with divisor n, as the fourth moment is.
    samples = skewed_samples(n)
    m2, m4 = stats.moment(samples, 2), stats.moment(samples, 4)
    expected = math.sqrt((m4 - (n - 3) / (n - 1) * m2**2) / n)
    assert variance(samples).stderr == pytest.approx(expected, rel=1e-12)


def test_skewness_of_variance_is_that_of_squared_deviations():
    samples = skewed_samples(300)
    squares = (samples - samples.mean()) ** 2
    assert variance(samples).skewness == pytest.approx(stats.skew(squares), rel=1e-10)


def test_covariance_equals_numpys():
    samples = skewed_samples((500, 3)) @ np.array([[1.0, 0.4, 0.2], [0.0, 1.0, -0.7], [0.0, 0.0, 1.0]])
    np.testing.assert_allclose(covariance(samples).value, np.cov(samples, rowvar=False), rtol=1e-11)


def test_covariance_has_variances_on_its_diagonal():
    samples = skewed_samples((500, 3))
    matrix, entries = covariance(samples), variance(samples)
    for name in ("value", "stderr", "skewness", "n"):
        np.testing.assert_allclose(np.diagonal(getattr(matrix, name)), getattr(entries, name), rtol=1e-12)


def test_standard_error_of_covariance_equals_the_published_formula():
    # Var(s_xy) = (m22 - s_xy²) / n + (s_xx s_yy + s_xy²) / (n (n-1)), with the moments' plug-in values.
    samples = skewed_samples((400, 2))
    n = len(samples)
    x, y = (samples - samples.mean(0)).T
    m11, m22 = np.mean(x * y), np.mean(x**2 * y**2)
    expected = math.sqrt((m22 - m11**2) / n + (np.mean(x**2) * np.mean(y**2) + m11**2) / (n * (n - 1)))
    assert covariance(samples).stderr[0, 1] == pytest.approx(expected, rel=1e-11)


def test_covariance_and_its_errors_are_symmetric():
    estimate = covariance(skewed_samples((500, 3)))
    for name in ("value", "stderr", "skewness"):
        np.testing.assert_allclose(getattr(estimate, name), getattr(estimate, name).T, rtol=1e-13)


def test_covariance_of_constant_columns_is_refused_as_degenerate():
    samples = skewed_samples((500, 2)) * [1.0, 0.0]
    with pytest.raises(ValueError, match="a standard error needs influence values that vary"):
        covariance(samples)


def test_proportion_equals_a_mean_of_zeros_and_ones():
    events = rng("test.estimates.samples").random((500, 3)) < 0.2
    estimate, reference = proportion(events), mean(events * 1.0)
    np.testing.assert_allclose(estimate.value, reference.value, rtol=1e-13)
    np.testing.assert_allclose(estimate.stderr, reference.stderr * math.sqrt(499 / 500), rtol=1e-12)
    np.testing.assert_allclose(estimate.skewness, reference.skewness, rtol=1e-10)
    np.testing.assert_array_equal(estimate.successes, events.sum(0))


@pytest.mark.parametrize(("events", "p"), [([False] * 10, 0.0), ([True] * 10, 1.0)])
def test_proportion_of_events_that_never_or_always_happen_has_no_spread(events, p):
    estimate = proportion(np.array(events))
    assert (estimate.value, estimate.stderr, estimate.skewness, estimate.successes) == (p, 0, 0, 10 * p)


def test_function_of_a_linear_function_is_the_mean():
    samples = skewed_samples((300, 2))
    weights = torch.tensor([2.0, -0.5], dtype=torch.float64)
    estimate, reference = function_of(lambda m: weights @ m, samples), mean(samples @ weights.numpy())
    for name in ("value", "stderr", "skewness"):
        np.testing.assert_allclose(getattr(estimate, name), getattr(reference, name), rtol=1e-10)


def test_function_of_moments_gives_the_error_of_a_standard_deviation():
    # sd = √(E X² - (E X)²) has influence values ((x - μ)² - σ²) / (2σ), derived by hand.
    x = skewed_samples(4000)
    estimate = function_of(lambda m: (m[1] - m[0] ** 2).sqrt(), np.stack([x, x**2], axis=1))
    influence = ((x - x.mean()) ** 2 - x.var()) / (2 * x.std())
    assert estimate.value == pytest.approx(x.std(), rel=1e-11)
    assert estimate.stderr == pytest.approx(influence.std() / math.sqrt(len(x) - 1), rel=1e-9)
    assert estimate.skewness == pytest.approx(stats.skew(influence), rel=1e-8)


def test_function_of_keeps_the_shape_of_the_function():
    samples = skewed_samples((300, 3))
    estimate = function_of(lambda m: torch.outer(m, m), samples)
    means = samples.mean(0)
    np.testing.assert_allclose(estimate.value, np.outer(means, means), rtol=1e-12)
    assert estimate.stderr.shape == estimate.skewness.shape == estimate.n.shape == (3, 3)


def test_constant_samples_have_no_error():
    estimate = mean(np.full(10, 3.0))
    assert (estimate.value, estimate.stderr, estimate.skewness) == (3, 0, 0)


def test_asymmetry_is_the_skewness_of_the_estimates_error():
    assert Estimate(1.0, 0.1, 400, 5.0).asymmetry == 0.25


# Printing and comparing


@pytest.mark.parametrize(
    ("value", "stderr", "shown"),
    [
        (148.3, 7.9, "148 ± 8"),
        (148.3, 3.549, "148.3 ± 3.5"),  # two digits below 3.55
        (148.3, 3.551, "148 ± 4"),
        (148.3, 0.96, "148.3 ± 1.0"),
        (148.3, 99.6, "150 ± 100"),
        (148.3, 1.0, "148.3 ± 1.0"),
        (0.13719, 0.01234, "0.137 ± 0.012"),
        (-0.0004, 0.0042, "-0.000 ± 0.004"),
        (0.0, 0.0042, "0.000 ± 0.004"),
        (12345.0, 80.0, "12,340 ± 80"),
        (12345.0, 2345.0, "12,300 ± 2,300"),
        (1.5, 240.0, "0 ± 240"),
        (0.000482, 0.000021, "0.000482 ± 0.000021"),  # 1e-4 is still written out, 1e-5 is not
        (0.0000482, 0.0000021, "(4.82 ± 0.21)e-05"),
        (3.0, 0.0, "3 ± 0"),
        (1.4824e10, 8.1e7, "(1.482 ± 0.008)e+10"),
        (-1.4824e-7, 8.1e-9, "(-1.48 ± 0.08)e-07"),
        (0.0, 2.3e-9, "(0.0 ± 2.3)e-09"),
        (999_999.0, 7.0, "999,999 ± 7"),
        (1_000_000.0, 7.0, "(1.000000 ± 0.000007)e+06"),
    ],
)
def test_an_estimate_prints_its_value_to_the_digits_that_its_error_leaves(value, stderr, shown):
    assert repr(Estimate(value, stderr, 4000, 0.0)) == f"{shown} (n = 4,000)"


def test_arrays_of_estimates_print_entry_by_entry():
    pair = Estimate([[1.0, 2.0]], [[0.1, 0.2]], [[30, 1200]], 0.0)
    assert repr(pair) == "[[1.00 ± 0.10, 2.00 ± 0.20]] (n = 30 to 1,200)"
    assert repr(Covariance(np.eye(1), 0.5, 10, 0.0)) == "[[1.0 ± 0.5]] (n = 10)"


def test_long_arrays_of_estimates_are_cut_short_in_print():
    assert repr(Estimate(np.arange(100.0), 0.1, 10, 0.0)).count("±") == 6


def test_estimates_are_equal_if_all_their_figures_are():
    figures = {"value": [1.0, 2.0], "stderr": 0.1, "n": 10, "skewness": 0.3}
    assert Estimate(**figures) == Estimate(**figures)
    for name, other in {"value": [1.0, 2.5], "stderr": 0.2, "n": 11, "skewness": 0.4}.items():
        assert Estimate(**figures) != Estimate(**{**figures, name: other})
    assert Estimate(**figures) != Estimate(1.0, 0.1, 10, 0.3)
    assert Estimate(0.5, 0.1, 10, 0.3) != Proportion(0.5, 0.1, 10, 0.3)
    assert Estimate(0.5, 0.1, 10, 0.3) != 0.5


# Inputs

ESTIMATORS = {
    "mean": mean,
    "variance": variance,
    "covariance": covariance,
    "function_of": lambda samples: function_of(lambda m: m[0] / m[1], samples),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_torch_and_numpy_inputs_give_the_same_estimate(name):
    samples = skewed_samples((300, 2))
    from_numpy, from_torch = ESTIMATORS[name](samples), ESTIMATORS[name](torch.tensor(samples))
    for field in ("value", "stderr", "skewness"):
        np.testing.assert_allclose(getattr(from_numpy, field), getattr(from_torch, field), rtol=1e-13)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_single_precision_inputs_are_computed_in_double(name):
    single = skewed_samples((300, 2)).astype(np.float32)
    expected, estimate = ESTIMATORS[name](single.astype(np.float64)), ESTIMATORS[name](torch.tensor(single))
    for field in ("value", "stderr", "skewness"):
        assert getattr(estimate, field).dtype == np.float64
        np.testing.assert_allclose(getattr(estimate, field), getattr(expected, field), rtol=1e-13)


def test_integers_are_samples_too():
    assert mean(np.array([1, 2, 4, 9])).value == 4


def test_torch_and_numpy_events_give_the_same_proportion():
    events = torch.rand(300, generator=generator("test.estimates.events"), dtype=torch.float64).cpu() < 0.3
    assert proportion(events).stderr == proportion(events.numpy()).stderr


def test_further_dimensions_are_kept():
    samples = skewed_samples((100, 2, 3))
    np.testing.assert_allclose(mean(samples).value, samples.mean(0))
    assert variance(samples).stderr.shape == (2, 3)
    assert proportion(samples > 1).value.shape == (2, 3)


def test_estimators_leave_their_samples_alone():
    samples = skewed_samples((300, 2))
    copy = samples.copy()
    for estimator in ESTIMATORS.values():
        estimator(samples)
    np.testing.assert_array_equal(samples, copy)


# Stacking


def test_stack_puts_settings_along_a_new_leading_axis():
    parts = [mean(skewed_samples((50, 2)) * factor) for factor in (1, 2, 3)]
    stacked = stack(parts)
    assert stacked.value.shape == (3, 2)
    for field in ("value", "stderr", "n", "skewness"):
        for row, part in zip(getattr(stacked, field), parts, strict=True):
            np.testing.assert_array_equal(row, getattr(part, field))


@pytest.mark.parametrize(
    ("estimates", "kind"),
    [
        ([Estimate(1, 0.1, 10, 0)] * 2, Estimate),
        ([Proportion(0.5, 0.1, 10, 0)] * 2, Proportion),
        ([Covariance(np.eye(2), 0.1, 10, 0)] * 2, Covariance),
    ],
)
def test_stack_keeps_the_kind(estimates, kind):
    assert type(stack(estimates)) is kind


def test_stack_keeps_sample_sizes_apart():
    np.testing.assert_array_equal(stack([Estimate(1, 0.1, 10, 0), Estimate(1, 0.1, 20, 0)]).n, [10, 20])


def test_stack_refuses_different_kinds():
    with pytest.raises(ValueError, match=re.escape("must be of one kind, got ['Estimate', 'Proportion']")):
        stack([Estimate(1, 0.1, 10, 0), Proportion(0.5, 0.1, 10, 0)])


def test_stack_refuses_different_shapes():
    with pytest.raises(ValueError, match=re.escape("must have one shape, got [(), (2,)]")):
        stack([Estimate(1, 0.1, 10, 0), Estimate([1, 2], 0.1, 10, 0)])


def test_stack_refuses_nothing():
    with pytest.raises(ValueError, match=re.escape("must be of one kind, got []")):
        stack([])


# Scales


def test_scale_of_an_estimate_is_the_absolute_value():
    np.testing.assert_array_equal(Estimate.natural_scale(np.array([-2.0, 3.0])), [2, 3])


def test_scale_of_a_proportion_is_the_smaller_probability():
    np.testing.assert_allclose(Proportion.natural_scale(np.array([0.1, 0.5, 0.8])), [0.1, 0.5, 0.2])


def test_scale_of_a_covariance_is_the_product_of_standard_deviations():
    scale = Covariance.natural_scale(np.array([[4.0, -1.0], [-1.0, 9.0]]))
    np.testing.assert_allclose(scale, [[4, 6], [6, 9]])


def test_scale_of_stacked_covariances_is_taken_matrix_by_matrix():
    matrices = np.array([[[4.0, -1.0], [-1.0, 9.0]], [[1.0, 0.0], [0.0, 16.0]]])
    np.testing.assert_allclose(Covariance.natural_scale(matrices), [[[4, 6], [6, 9]], [[1, 4], [4, 16]]])


# Refusals


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_samples_that_are_not_finite_are_refused(name, value):
    samples = skewed_samples((300, 2))
    samples[17, 1] = value
    with pytest.raises(ValueError, match="samples must be finite, got 1 NaN or infinite values"):
        ESTIMATORS[name](samples)


@pytest.mark.parametrize("estimator", [*ESTIMATORS.values(), lambda samples: proportion(samples > 0)])
@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_samples_are_refused(estimator, n):
    with pytest.raises(ValueError, match=re.escape(f"dimension 0 must hold at least 2 samples, got shape ({n}, 2)")):
        estimator(skewed_samples((n, 2)))


@pytest.mark.parametrize("estimator", [mean, variance, covariance, lambda samples: proportion(samples > 0)])
def test_a_single_number_is_refused(estimator):
    with pytest.raises(ValueError, match=re.escape("dimension 0 must hold at least 2 samples, got shape ()")):
        estimator(np.array(3.0))


def test_two_samples_are_enough_for_a_mean():
    estimate = mean(np.array([1.0, 3.0]))
    assert (estimate.value, estimate.stderr, estimate.n) == (2, 1, 2)


@pytest.mark.parametrize("shape", [(300,), (300, 2, 2)])
def test_covariance_refuses_what_is_not_a_matrix(shape):
    with pytest.raises(ValueError, match=re.escape(f"samples must have shape (n, d), got {shape}")):
        covariance(skewed_samples(shape))


@pytest.mark.parametrize("shape", [(300,), (300, 2, 2)])
def test_function_of_refuses_what_is_not_a_matrix(shape):
    with pytest.raises(ValueError, match=re.escape(f"samples must have shape (n, k), got {shape}")):
        function_of(torch.sum, skewed_samples(shape))


@pytest.mark.parametrize("events", [np.array([0, 1, 1]), np.array([0.0, 1.0]), torch.tensor([0, 1])])
def test_proportion_refuses_events_that_are_not_boolean(events):
    with pytest.raises(ValueError, match="events must be boolean, got torch"):
        proportion(events)


@pytest.mark.parametrize("n", [100, 2000, 50_000])
def test_variance_of_a_fair_coin_is_refused(n):
    # Its error is a multiple of a squared normal variable. False alarm: 6e-7, see LINEAR_OVER_QUADRATIC.
    coin = rng(f"test.estimates.coin.{n}").random(n) < 0.5
    with pytest.raises(ValueError, match="a standard error needs influence values that vary"):
        variance(coin * 1.0)


@pytest.mark.parametrize(("ones", "refused"), [(8, False), (9, True)])
def test_variance_of_a_coin_is_refused_where_its_quadratic_term_over_n_minus_1_asks_for_it(ones, refused):
    # With pq the variance, the linear term is pq(1 - 4pq) and the quadratic one 2(pq)²: at n = 45 the limit is
    # pq = 1/(4 + 100/44) = 0.1594. It lies between 8 and 9 ones, pq = 0.1462 and 0.16; with n for n - 1 it would not.
    coin = np.repeat([1.0, 0.0], [ones, 45 - ones])
    if not refused:
        variance(coin)
        return
    with pytest.raises(ValueError, match=re.escape("n - 1 = 0.0582, got 0.0576 with n = 45")):
        variance(coin)


def test_a_refusal_names_the_figures_of_the_worst_entry():
    # The first column is right, but so small that its figures are the smallest.
    coins = np.stack([np.repeat([0.01, 0.0], [8, 37]), np.repeat([1.0, 0.0], [9, 36])], axis=1)
    with pytest.raises(ValueError, match=re.escape("n - 1 = 0.0582, got 0.0576 with n = 45")):
        variance(coins)


def test_variance_of_one_fair_coin_among_others_is_refused():
    coins = rng("test.estimates.coins").random((5000, 3)) < [0.2, 0.5, 0.3]
    with pytest.raises(ValueError, match="a standard error needs influence values that vary"):
        variance(coins * 1.0)


def test_function_of_refuses_a_maximum():
    # (E X)² at E X = 0: the gradient vanishes and curvature rules.
    centered = rng("test.estimates.maximum").normal(0, 1, (5000, 1))
    with pytest.raises(ValueError, match="the estimate is degenerate, or n too small"):
        function_of(lambda m: m[0] ** 2, centered)


@pytest.mark.parametrize(("center", "refused"), [(0.497, True), (0.498, False)])
def test_a_square_is_refused_where_its_curvature_over_n_minus_1_asks_for_it(center, refused):
    # Of 102 samples μ ± 1, the square of the mean has the linear term (2μ)² and the quadratic one (f'')² / 2 = 2: the
    # limit is μ = √(25/101) = 0.4975.
    samples = center + np.repeat([[1.0], [-1.0]], 51, axis=0)
    if not refused:
        function_of(lambda m: m[0] ** 2, samples)
        return
    with pytest.raises(ValueError, match=re.escape("n - 1 = 0.99, got 0.988 with n = 102")):
        function_of(lambda m: m[0] ** 2, samples)


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ({"value": math.nan}, "value must be finite, got nan"),
        ({"value": math.inf}, "value must be finite, got inf"),
        ({"stderr": math.nan}, "stderr must be finite, got nan"),
        ({"n": math.inf}, "n must be finite, got inf"),
        ({"skewness": math.nan}, "skewness must be finite, got nan"),
        ({"stderr": -0.1}, "stderr must not be negative, got -0.1"),
        ({"n": 1}, "n must be at least 2, got 1"),
        ({"value": [1, 2], "stderr": [0.1] * 3}, "stderr must be a scalar or have the shape of value (2,), got (3,)"),
        ({"value": [1, 2], "n": [[10, 10]]}, "n must be a scalar or have the shape of value (2,), got (1, 2)"),
        ({"skewness": [0, 0]}, "skewness must be a scalar or have the shape of value (), got (2,)"),
    ],
)
def test_impossible_estimates_are_refused(figures, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Estimate(**{"value": 1.0, "stderr": 0.1, "n": 10, "skewness": 0.0, **figures})


def test_scalar_figures_are_spread_over_the_shape_of_the_value():
    estimate = Estimate([[1, 2, 3]], 0.1, 10, 0.0)
    assert estimate.stderr.shape == estimate.n.shape == estimate.skewness.shape == (1, 3)
