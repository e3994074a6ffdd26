"""The assertions that statistical tests rest on refuse what is wrong, pass what is right, and keep their rates."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from helpers.lab.runtime import generator, rng
from tests.statistics import (
    FALSE_ALARM,
    assert_counts,
    assert_law,
    assert_means,
    assert_refuses,
    assert_share,
    assert_standard,
    assert_z,
    limit_of_z,
    moments,
    worst_z,
)

# z-scores


@pytest.mark.parametrize("entries", [1, 7, 400])
def test_the_limit_is_exceeded_once_in_a_million_families(entries):
    one_entry = 2 * stats.norm.sf(limit_of_z(entries))
    assert entries * one_entry == pytest.approx(1e-6, rel=1e-9)


def test_independent_families_exceed_a_limit_at_the_stated_rate():
    z = rng("test.statistics.families").standard_normal((20_000, 8))
    beyond = np.abs(z).max(1) > limit_of_z(8, false_alarm=0.01)
    assert_share(beyond, 1 - (1 - 0.01 / 8) ** 8)


def test_the_worst_z_keeps_its_sign_and_is_returned():
    assert worst_z([[1.0, -3.5], [2.0, 3.0]]) == -3.5
    assert assert_z(torch.tensor([0.5, -1.5])) == -1.5


@pytest.mark.parametrize("entries", [1, 10])
def test_z_scores_are_refused_just_beyond_the_limit(entries):
    z = np.zeros(entries)
    z[-1] = -0.999 * limit_of_z(entries)
    assert_z(z)
    z[-1] = -1.001 * limit_of_z(entries)
    with pytest.raises(AssertionError, match=f"worst z -[45]\\.\\d\\d of {entries}, beyond"):
        assert_z(z)


def test_z_scores_share_the_false_alarm_rate_that_is_asked_for():
    assert_z([3.2], false_alarm=1e-3)
    with pytest.raises(AssertionError, match="beyond"):
        assert_z([3.3], false_alarm=1e-3)


@pytest.mark.parametrize("z", [[math.nan], [9.0, math.nan], [math.inf]])
def test_z_scores_that_are_no_numbers_are_refused(z):
    with pytest.raises(AssertionError, match="worst z"):
        assert_z(z)


def test_no_z_scores_are_refused():
    with pytest.raises(AssertionError, match="nothing would be tested"):
        assert_z([])


# Moments

LAWS = {"normal": stats.norm(2.0, 3.0), "exponential": stats.expon(1.0, 0.5), "uniform": stats.uniform(-1.0, 3.0)}


@pytest.mark.parametrize("law", LAWS)
def test_moments_are_those_of_scipy(law):
    samples = LAWS[law].rvs((500, 2), random_state=rng(f"test.statistics.moments.{law}"))
    found = moments(torch.as_tensor(samples))
    np.testing.assert_allclose(found.mean.value, samples.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.variance.value, samples.var(0, ddof=1), rtol=1e-14)
    np.testing.assert_allclose(found.skewness.value, stats.skew(samples), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.excess_kurtosis.value, stats.kurtosis(samples), rtol=1e-10, atol=1e-12)


def weighted_moments(x, weights):
    """Return the moments of a distribution that puts these weights on these points."""
    mean = (weights * x).sum() / weights.sum()
    central = [(weights * (x - mean) ** power).sum() / weights.sum() for power in (2, 3, 4)]
    return mean, central[0], central[1] / central[0] ** 1.5, central[2] / central[0] ** 2 - 3


@pytest.mark.parametrize("law", LAWS)
def test_standard_errors_of_moments_are_those_of_the_infinitesimal_jackknife(law):
    n = 300
    x = torch.as_tensor(LAWS[law].rvs(n, random_state=rng(f"test.statistics.jackknife.{law}")))
    weights = torch.ones(n, dtype=torch.float64, requires_grad=True)
    for found, moment in zip(moments(x), weighted_moments(x, weights), strict=True):
        (influence,) = torch.autograd.grad(n * moment, weights, retain_graph=True)
        assert found.stderr == pytest.approx((influence.std() / math.sqrt(n)).item(), rel=1e-9)


@pytest.mark.parametrize("law", LAWS)
def test_moments_agree_with_their_law(law):
    samples = LAWS[law].rvs((400_000, 1), random_state=rng(f"test.statistics.law.{law}"))
    found, expected = moments(samples), LAWS[law].stats("mvsk")
    assert_z([moment.z(value) for moment, value in zip(found, expected, strict=True)])


def test_means_agree_with_their_law_and_shifted_ones_do_not():
    samples = torch.randn(1_000_000, 2, generator=generator("test.statistics.means")) + 5.0
    assert abs(assert_means(samples, [5.0, 5.0])) < limit_of_z(2)
    with pytest.raises(AssertionError, match="of 2, beyond"):
        assert_means(samples, [5.0, 5.02])


def test_samples_too_few_for_their_skewness_are_refused():
    # |γ|c³/(3√n) ≤ ln 2 with γ = 2 and c = 4.892: n ≥ 12,684.
    samples = rng("test.statistics.skewed").standard_exponential(20_000)
    assert_means(samples, 1.0)
    with pytest.raises(AssertionError, match=r"8000 samples are too few for their skewness: 1\d{4} would do"):
        assert_means(samples[:8000], 1.0)


# z-scores of many repetitions


def test_standard_z_scores_pass():
    assert_standard(rng("test.statistics.standard").standard_normal((2000, 3)))


@pytest.mark.parametrize(("shift", "scale"), [(0.2, 1.0), (0.0, 1.2), (0.0, 0.8)])
def test_z_scores_with_another_mean_or_variance_are_refused(shift, scale):
    z = rng("test.statistics.standard").standard_normal((2000, 3))
    z[:, 1] = shift + scale * z[:, 1]
    with pytest.raises(AssertionError, match=r"worst z|variances"):
        assert_standard(z)


# Shares


def hits(count, trials):
    return np.arange(trials) < count


@pytest.mark.parametrize(("trials", "probability"), [(50, 0.5), (1000, 0.954), (10_000, 1e-4)])
def test_shares_have_exact_binomial_limits(trials, probability):
    probabilities = stats.binom.pmf(np.arange(trials + 1), trials, probability)
    lower, upper = np.cumsum(probabilities), np.cumsum(probabilities[::-1])[::-1]
    allowed = (lower >= FALSE_ALARM / 2) & (upper >= FALSE_ALARM / 2)
    for count in np.flatnonzero(allowed)[[0, -1]]:
        assert assert_share(hits(count, trials), probability) == count / trials
    for count in np.flatnonzero(~allowed):
        if probabilities[max(count - 1, 0) : count + 2].max() > 1e-9:
            with pytest.raises(AssertionError, match=f"{count} hits in {trials} trials are too (few|many)"):
                assert_share(hits(count, trials), probability)


def test_a_share_may_have_a_range():
    for count in (930, 965, 1000):
        assert_share(hits(count, 1000), (0.93, 1.0))
    with pytest.raises(AssertionError, match=r"880 hits in 1000 trials are too few for a probability of 0\.93 to 1"):
        assert_share(hits(880, 1000), (0.93, 1.0))


@pytest.mark.parametrize(("count", "probability"), [(1, 0.0), (9, 1.0)])
def test_what_cannot_happen_is_refused_once_it_does(count, probability):
    with pytest.raises(AssertionError, match="hits in 10 trials"):
        assert_share(hits(count, 10), probability)


@pytest.mark.parametrize("trials", [[], [0.3], [2]])
def test_trials_are_hits_or_not(trials):
    with pytest.raises(AssertionError, match=r"nothing would be tested|a trial is a hit or not"):
        assert_share(trials, 0.5)


# Laws and counts


def test_samples_of_a_law_pass_and_a_shifted_law_is_refused():
    samples = rng("test.statistics.kolmogorov").standard_normal(40_000)
    assert assert_law(samples, stats.norm.cdf) >= FALSE_ALARM
    with pytest.raises(AssertionError, match="not this law"):
        assert_law(samples, stats.norm(4.3 / 200 / stats.norm.pdf(0)).cdf)


def test_counts_pass_and_one_cell_too_full_is_refused():
    counts = rng("test.statistics.counts").multinomial(100_000, [0.1] * 10)
    assert assert_counts(counts) == pytest.approx(stats.chisquare(counts).pvalue)
    assert_counts(counts[:2], [counts[:2].sum() / 2] * 2)
    counts[3] += 1000
    with pytest.raises(AssertionError, match="not what is expected"):
        assert_counts(counts * [1] * 10)


def test_counts_too_small_for_their_law_are_refused():
    with pytest.raises(AssertionError, match=r"at least 20 must be expected in each cell, got 19\.0"):
        assert_counts([19, 19])
    assert_counts([20, 20])


# Refusals


def refuse(message):
    def call():
        raise ValueError(message)

    return call


def test_a_refusal_with_its_rule_and_value_passes():
    assert_refuses(refuse("n must be at least 2, got 1"), "n must be at least 2", 1)
    assert_refuses(refuse("x must lie in [0, 1], got 1.5: clip it"), "must lie in [0, 1]", 1.5)
    message = "shape must be (n,), got (2, 2)"
    assert assert_refuses(refuse(message), "shape must be (n,)", (2, 2)) == message


@pytest.mark.parametrize(
    ("message", "rule", "value"),
    [
        ("m must be at least 2, got 1", "n must be at least 2", 1),  # another rule
        ("n must be at least 2, got 10", "n must be at least 2", 1),  # another value
        ("n must be at least 2, got 1.5", "n must be at least 2", 1),
        ("n must be at least 2, got -1", "n must be at least 2", 1),
        ("n must be at least 2", "n must be at least 2", 1),  # no value
        ("got 1, n must be at least 2", "n must be at least 2", 1),
        ("n must be at least 2, got 1", " ", 1),  # no rule is asked for
    ],
)
def test_a_refusal_for_another_reason_does_not_pass(message, rule, value):
    with pytest.raises(AssertionError):
        assert_refuses(refuse(message), rule, value)


def test_what_is_not_refused_or_fails_otherwise_does_not_pass():
    with pytest.raises(AssertionError, match="nothing was refused"):
        assert_refuses(lambda: 3, "n must be at least 2", 1)
    with pytest.raises(ZeroDivisionError):
        assert_refuses(lambda: 1 / 0, "n must be at least 2", 1)
