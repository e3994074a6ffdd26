"""The correlation within batches: its value by loops, its intervals by their coverage, what is refused.

Coverage is counted over independent repetitions. "At least 93 %" of nominal 95 % is refused if an interval that covers
exactly 93 % would be seen so seldom once in two million runs; for the 4,000 repetitions of the hardest case that
notices 91 %, and for 800 repetitions 88 %.
"""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from scipy import stats

from helpers.lab.estimates import Estimate
from helpers.lab.runtime import generator, rng
from helpers.minibatch_loss import (
    correlation_interval,
    effective_batch_interval,
    effective_batch_size,
    equicorrelated_losses,
    intraclass_correlation,
    required_batch_size,
)
from tests.statistics import assert_share, assert_standard

TOOLS = [intraclass_correlation, correlation_interval, effective_batch_interval]
tools = pytest.mark.parametrize("tool", TOOLS)


def correlated_losses(n_batches, batch_size, stream, marginal="gaussian", correlation=0.3):
    return equicorrelated_losses(
        n_batches,
        batch_size,
        mean=1.5,
        std=0.7,
        correlation=correlation,
        marginal=marginal,
        generator=generator(stream),
    ).cpu()


def uneven_losses(stream, n_batches=70, correlation=0.3):
    """Return batches of one to nine losses."""
    sizes = rng(stream).integers(1, 10, n_batches)
    whole = correlated_losses(n_batches, 9, stream, correlation=correlation)
    return [batch[:size] for batch, size in zip(whole, sizes, strict=True)]


def anova_by_loops(batches):
    """Return the two mean squares, and what the sizes amount to."""
    batches = [[float(loss) for loss in batch] for batch in batches]
    n, total = len(batches), sum(map(len, batches))
    means = [sum(batch) / len(batch) for batch in batches]
    grand_mean = sum(map(sum, batches)) / total
    between = sum(len(batch) * (mean - grand_mean) ** 2 for batch, mean in zip(batches, means, strict=True)) / (n - 1)
    within = sum((loss - mean) ** 2 for batch, mean in zip(batches, means, strict=True) for loss in batch)
    size = (total - sum(len(batch) ** 2 for batch in batches) / total) / (n - 1)
    return between, within / (total - n), size


def correlation_by_loops(batches):
    between, within, size = anova_by_loops(batches)
    return (between - within) / (between + (size - 1) * within)


def interval_by_loops(batches):
    """Return the interval, by leaving out one batch after the other."""
    between, within, size = anova_by_loops(batches)
    n, total = len(batches), sum(map(len, batches))
    log_ratio = math.log(between / within)
    left_out = []
    for i in range(n):
        b, w, left_size = anova_by_loops(batches[:i] + batches[i + 1 :])
        left_out.append(math.log(1 + size / left_size * (b / w - 1)))
    influence = (n - 1) * (np.mean(left_out) - np.array(left_out))
    z = stats.norm.ppf(0.975)
    skewness, kurtosis = stats.skew(influence), stats.kurtosis(influence)
    wider = 1 + (skewness**2 * (z**4 + 2 * z**2 - 3) / 18 - kurtosis * (z**2 - 3) / 12) / n
    stderr = max(influence.std(ddof=1) / math.sqrt(n), math.sqrt(2 / (n - 1) + 2 / (total - n)))
    center = log_ratio + (n - 1) * (log_ratio - np.mean(left_out))
    ends = [center + sign * stats.t.ppf(0.975, n - 1) * stderr * wider for sign in (-1, 1)]
    return [(math.exp(end) - 1) / (math.exp(end) + size - 1) for end in ends]


# Values


@pytest.mark.parametrize("marginal", ["gaussian", "exponential"])
@pytest.mark.parametrize("batch_size", [2, 3, 7])
def test_value_and_interval_equal_analysis_of_variance_by_loops(batch_size, marginal):
    losses = correlated_losses(65, batch_size, f"test.icc.loops.{batch_size}.{marginal}", marginal)
    low, high = interval_by_loops(losses.tolist())
    value = correlation_by_loops(losses)
    estimate = intraclass_correlation(losses)
    assert isinstance(estimate, Estimate)
    assert estimate.value == pytest.approx(value, rel=1e-11)
    assert correlation_interval(losses) == pytest.approx((low, high), rel=1e-9)
    assert estimate.stderr == pytest.approx(max(high - value, value - low) / stats.norm.ppf(0.975), rel=1e-9)
    assert estimate.n == 65


def test_batches_may_differ_in_size_and_hold_one_loss():
    losses = uneven_losses("test.icc.uneven")
    assert min(map(len, losses)) == 1
    assert intraclass_correlation(losses).value == pytest.approx(correlation_by_loops(losses), rel=1e-11)
    assert correlation_interval(losses) == pytest.approx(interval_by_loops(losses), rel=1e-9)


def test_what_unequal_sizes_amount_to_makes_the_mean_squares_unbiased():
    # E[B] = W-part + m σ²ρ. With sizes m_i, B is a quadratic form whose expectation is a trace.
    sizes = np.array([1, 2, 2, 5, 9])
    batch_of = np.repeat(np.arange(5), sizes)
    shared = (batch_of[:, None] == batch_of[None, :]) * 1.0
    projection = shared / sizes[batch_of][:, None] - 1 / sizes.sum()
    per_batch = np.trace(projection @ shared) / 4
    assert anova_by_loops([[0.0] * size for size in sizes])[2] == pytest.approx(per_batch, rel=1e-12)


@tools
def test_all_forms_of_losses_give_the_same(tool):
    losses = correlated_losses(60, 3, "test.icc.forms")
    forms = [losses.numpy(), list(losses), losses.tolist(), iter(losses), losses.clone().requires_grad_()]
    for form in forms:
        found, expected = tool(form), tool(losses)
        if tool is intraclass_correlation:
            found, expected = found.value, expected.value
        assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_losses_of_low_precision_are_computed_in_float64(dtype):
    losses = (1000 * correlated_losses(100, 3, "test.icc.dtype")).to(dtype)
    expected = correlation_by_loops(losses.double())
    assert intraclass_correlation(losses).value == pytest.approx(expected, rel=1e-11)


def test_unit_and_offset_of_the_losses_do_not_matter():
    losses = correlated_losses(100, 3, "test.icc.unit")
    shifted = 1e-3 * losses + 100.0
    np.testing.assert_allclose(correlation_interval(shifted), correlation_interval(losses), rtol=1e-7)


def test_correlation_may_be_negative():
    losses = correlated_losses(300, 3, "test.icc.negative", correlation=-0.4)
    assert intraclass_correlation(losses).value == pytest.approx(correlation_by_loops(losses), rel=1e-11)
    low, high = correlation_interval(losses)
    assert -0.5 < low < high < 0


@pytest.mark.parametrize(
    ("losses", "expected"),
    [([[0, 0, 0], [1, 1, 1]] * 30, 1), ([[0, 2, 7]] * 60, -1 / 2), ([[0, 1], [1, 0]] * 30, -1)],
)
def test_both_ends_of_the_range_are_reached(losses, expected):
    estimate = intraclass_correlation(losses)
    assert (estimate.value, estimate.stderr, estimate.skewness) == pytest.approx((expected, 0, 0), abs=1e-12)
    assert correlation_interval(losses) == pytest.approx((expected, expected), abs=1e-12)
    worth = effective_batch_size(len(losses[0]), expected)
    assert effective_batch_interval(losses) == pytest.approx((worth, worth))


# The effective batch


def test_effective_batch_interval_is_the_effective_batch_size_at_the_interval_of_the_correlation():
    losses = correlated_losses(80, 5, "test.icc.worth")
    low, high = correlation_interval(losses)
    expected = effective_batch_size(5, high), effective_batch_size(5, low)
    assert effective_batch_interval(losses) == pytest.approx(expected, rel=1e-12)
    assert effective_batch_interval(losses, 5) == pytest.approx(expected, rel=1e-12)
    larger = effective_batch_size(300, high), effective_batch_size(300, low)
    assert effective_batch_interval(losses, batch_size=300) == pytest.approx(larger, rel=1e-12)
    assert effective_batch_interval(losses, batch_size=math.inf) == pytest.approx((1 / high, 1 / low), rel=1e-12)


def test_effective_batch_of_uneven_losses_is_that_of_the_size_that_they_amount_to():
    losses = uneven_losses("test.icc.uneven")
    size = anova_by_loops(losses)[2]
    low, high = correlation_interval(losses)
    expected = effective_batch_size(size, high), effective_batch_size(size, low)
    assert effective_batch_interval(losses) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("batch_size", "infinite"), [(None, False), (math.inf, True)])
def test_upper_end_is_infinite_where_no_correlation_is_possible_and_the_batch_has_no_limit(batch_size, infinite):
    losses = correlated_losses(100, 4, "test.icc.none", correlation=0.0)
    assert correlation_interval(losses)[0] < 0
    low, high = effective_batch_interval(losses, batch_size)
    assert math.isinf(high) == infinite
    assert 1 < low < high


def test_upper_end_is_infinite_where_the_lowest_correlation_is_impossible_for_so_large_a_batch():
    losses = correlated_losses(100, 4, "test.icc.none", correlation=0.0)
    limit = 1 - 1 / correlation_interval(losses)[0]  # of the batch that could share so negative a correlation
    assert math.isfinite(effective_batch_interval(losses, 0.999 * limit)[1])
    assert math.isinf(effective_batch_interval(losses, 1.001 * limit)[1])


# Calibration


def covers(stream, repetitions, n_batches, batch_size, marginal, correlation):
    """Return for each repetition whether the interval covers the correlation; ± 2 standard errors contain it."""
    whole = correlated_losses(repetitions * n_batches, batch_size, stream, marginal, correlation)
    intervals = np.array([correlation_interval(losses) for losses in whole.split(n_batches)])
    return (intervals[:, 0] <= correlation) & (correlation <= intervals[:, 1])


CASES = [
    (60, 64, "exponential", 0.2, 4000),  # the hardest, with the smallest number of batches that is accepted
    *((*size, marginal, correlation, 400) for size, marginal, correlation in itertools.product(
        [(60, 2), (60, 64), (120, 8)], ["gaussian", "exponential"], [0.0, 0.05, 0.2]
    )),
]  # fmt: skip


@pytest.mark.parametrize(("n_batches", "batch_size", "marginal", "correlation", "repetitions"), CASES)
def test_intervals_cover_at_least_93_percent(n_batches, batch_size, marginal, correlation, repetitions):
    stream = f"test.icc.coverage.{n_batches}.{batch_size}.{marginal}.{correlation}.{repetitions}"
    assert_share(covers(stream, repetitions, n_batches, batch_size, marginal, correlation), (0.93, 1.0))


@pytest.mark.parametrize("correlation", [0.0, 0.2])
@pytest.mark.parametrize("marginal", ["gaussian", "exponential"])
def test_two_standard_errors_contain_the_interval(marginal, correlation):
    for losses in correlated_losses(3000, 8, "test.icc.contained", marginal, correlation).split(60):
        estimate, (low, high) = intraclass_correlation(losses), correlation_interval(losses)
        assert max(high - estimate.value, estimate.value - low) < 2 * estimate.stderr < 2 / 1.95 * (high - low)


def test_intervals_of_uneven_batches_cover_at_least_93_percent():
    correlation, hits = 0.2, []
    for repetition in range(400):
        low, high = correlation_interval(uneven_losses(f"test.icc.uneven.{repetition}", 60, correlation))
        hits.append(low <= correlation <= high)
    assert_share(hits, (0.93, 1.0))


@pytest.mark.parametrize("correlation", [0.0, 0.3])
def test_standard_error_of_many_batches_is_that_of_the_normal_law(correlation):
    # The jackknife's own relative error is about √(3.5/n): 2 % at n = 10,000. The longer arm adds 3 %.
    m, n = 8, 10_000
    losses = correlated_losses(n, m, f"test.icc.normal.{correlation}", correlation=correlation)
    expected = math.sqrt(2 / (m * (m - 1) * n)) * (1 - correlation) * (1 + (m - 1) * correlation)
    assert 1 <= intraclass_correlation(losses).stderr / expected < 1.15


def test_z_scores_at_many_batches_are_standard():
    # 250 repetitions of 10,000 batches: the bias of z, of the order of skewness / (2 √n) = 0.02 here, stays below half
    # of the standard error 0.06 of its mean, and the standard error is 3 % too large by its longer arm.
    losses = correlated_losses(250 * 10_000, 3, "test.icc.z")
    estimates = [intraclass_correlation(part) for part in losses.split(10_000)]
    assert_standard([(estimate.value - 0.3) / estimate.stderr for estimate in estimates])


# Refusals


@tools
@pytest.mark.parametrize("n", [0, 2, 59])
def test_fewer_than_60_batches_are_refused(tool, n):
    message = f"a correlation within batches needs at least 60 batches, got {n}"
    with pytest.raises(ValueError, match=f"^{message}$"):
        tool(correlated_losses(60, 64, "test.icc.few")[:n])


@tools
def test_60_batches_are_accepted(tool):
    tool(correlated_losses(60, 2, "test.icc.few"))


@tools
@pytest.mark.parametrize("shape", [(), (70,), (70, 0), (70, 2, 2)])
def test_what_is_not_a_matrix_of_batches_is_refused(tool, shape):
    message = (
        "losses must have shape (n_batches, batch_size), or be a sequence of batches of shape (batch_size,), "
        f"got shape {shape}"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        tool(torch.zeros(shape))


@pytest.mark.parametrize("odd", [torch.zeros(0), torch.zeros(2, 2), 3.0])
def test_a_batch_that_is_not_one_row_of_losses_is_refused(odd):
    with pytest.raises(ValueError, match=re.escape(f"got shape {tuple(np.shape(odd))}")):
        intraclass_correlation([*correlated_losses(60, 3, "test.icc.few"), odd])


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="losses must hold batches, got none"):
        intraclass_correlation([])


def test_batches_of_one_loss_are_refused():
    with pytest.raises(ValueError, match="needs batches of at least 2 losses, got one loss in each"):
        intraclass_correlation(correlated_losses(60, 1, "test.icc.one"))


def as_objects(batches):
    """Return a NumPy array of arrays, as ragged batches end up in."""
    held = np.empty(len(batches), dtype=object)
    held[:] = [batch.numpy() for batch in batches]
    return held


@pytest.mark.parametrize("form", [torch.nested.nested_tensor, as_objects], ids=["nested", "objects"])
def test_batches_of_several_sizes_come_in_any_container(form):
    losses = correlated_losses(60, 5, "test.icc.forms")
    batches = [batch[: 3 + k % 3] for k, batch in enumerate(losses)]
    found, expected = intraclass_correlation(form(batches)), intraclass_correlation(batches)
    assert (found.value, found.stderr) == (expected.value, expected.stderr)


def test_complex_losses_are_refused():
    with pytest.raises(ValueError, match="losses must be real, got complex numbers"):
        intraclass_correlation(np.full((60, 3), 1 + 1j))


@tools
@pytest.mark.parametrize("form", [lambda masked: masked, list], ids=["matrix", "sequence"])
def test_masked_losses_are_refused(tool, form):
    losses = correlated_losses(60, 3, "test.icc.masked").numpy()
    masked = np.ma.masked_greater(losses, np.median(losses))
    with pytest.raises(ValueError, match=r"losses must not be masked arrays, .* got a (MaskedArray|list)"):
        tool(form(masked))


@pytest.mark.parametrize("value", [0.03, -0.002])
@pytest.mark.parametrize(
    "tool",
    [lambda rho: effective_batch_size(32, rho), lambda rho: required_batch_size(0.8, 0.3, rho)],
    ids=["effective", "required"],
)
def test_an_estimate_in_place_of_a_correlation_is_refused(tool, value):
    estimate = Estimate(value=value, stderr=0.005, n=100, skewness=0.1)
    with pytest.raises(ValueError, match=r"pass the estimate's \.value, or max\(estimate\.value, 0\) for a negative"):
        tool(estimate)
    assert tool(max(estimate.value, 0)) > 1


@pytest.mark.parametrize("position", [(0, 0), (2, 1)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_refused(position, value):
    losses = correlated_losses(60, 3, "test.icc.finite")
    losses[position] = value
    with pytest.raises(ValueError, match="losses must be finite, got 1 NaN or infinite values"):
        intraclass_correlation(losses)
    with pytest.raises(ValueError, match="losses must be finite, got 1 NaN or infinite values"):
        intraclass_correlation(list(losses))


def test_losses_that_do_not_vary_are_refused():
    with pytest.raises(ValueError, match="losses must vary, got the same value in all 60 batches"):
        intraclass_correlation(torch.full((60, 3), 2.0))


@pytest.mark.parametrize("losses", [[[0.0, 0, 0]] * 40 + [[0.0, 1, 2]] + [[0.0, 0, 0]] * 19])
def test_variation_that_rests_on_one_batch_is_refused(losses):
    with pytest.raises(ValueError, match="vary within and between at least 2 batches, got batch 40 without which"):
        intraclass_correlation(losses)


@pytest.mark.parametrize("batch_size", [0, 0.9, -math.inf, math.nan])
def test_an_impossible_batch_size_is_refused(batch_size):
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {batch_size}"):
        effective_batch_interval(correlated_losses(60, 3, "test.icc.few"), batch_size)
