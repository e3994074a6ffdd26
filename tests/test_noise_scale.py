"""The noise scale of a network, against pairs of gradients, the jackknife and enumeration; its coverage; its refusals.

The law of the estimate is tested on gradients that are given as rows: a network that has them is linear without bias,
and its loss the prediction itself.
"""

import copy
import itertools
import math
import re

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from helpers import gradient_noise
from helpers.gradient_noise import gradient_noise_scale, noise_scale_interval, noise_scale_report
from helpers.lab.runtime import rng
from tests.small_networks import (
    COUPLED,
    LOSSES,
    build,
    examples,
    far_examples,
    frozen,
    looped_gradients,
    looped_matrix,
    perceptron,
)
from tests.statistics import assert_refuses, assert_share
from tests.zoo import ZOO, changes, fingerprint, gradients_one_by_one


def prediction(predictions, targets):
    """Return the mean prediction as loss, so that the gradient of a linear layer without bias is its input."""
    return predictions.mean()


def linear(rows):
    """Return a problem whose gradients are these rows."""
    rows = torch.as_tensor(rows, dtype=torch.float64)
    return nn.Linear(rows.shape[1], 1, bias=False, dtype=torch.float64), prediction, rows, rows


def scale_of_rows(rows, **options):
    return gradient_noise_scale(*linear(rows), **options)


def ratio_of_rows(rows, most=32):
    """Return what :func:`gradient_noise_scale` makes of gradients, without a network."""
    rows = torch.as_tensor(rows, dtype=torch.float64)
    mean = rows.mean(0)
    groups = gradient_noise._Groups(max(1, len(rows) // most), most)
    for piece in rows.split(groups.size):
        groups.add(piece.sum(0), len(piece))
    products = torch.stack([rows.square().sum(1), rows @ mean], dim=1)
    return gradient_noise._ratio_of(products, mean.square().sum().item(), groups.trace_of_square())


def parts_by_pairs(rows):
    """Return tr S and |∇L|² as averages over pairs of different examples, which are unbiased one by one."""
    rows = np.asarray(rows)
    pairs = list(itertools.combinations(range(len(rows)), 2))
    trace = np.mean([np.square(rows[i] - rows[j]).sum() / 2 for i, j in pairs])
    return trace, np.mean([rows[i] @ rows[j] for i, j in pairs])


def scale_by_pairs(rows):
    trace, squared_norm = parts_by_pairs(rows)
    return trace / squared_norm


# The value


def test_noise_scale_equals_averages_over_pairs_of_looped_gradients():
    model = build(perceptron)
    data = far_examples()
    expected = scale_by_pairs(looped_matrix(model, functional.cross_entropy, *data))
    estimate = gradient_noise_scale(model, functional.cross_entropy, *data)
    assert estimate.value == pytest.approx(expected, rel=1e-9)
    assert estimate.n == 40


@pytest.mark.parametrize("n", [4, 5, 10])
def test_noise_scale_of_few_gradients_equals_averages_over_pairs(n):
    rows = 10 + rng("test.noise_scale.few").standard_normal((n, 4))
    ratio = ratio_of_rows(rows)
    assert ratio.trace / ratio.squared_norm == pytest.approx(scale_by_pairs(rows), rel=1e-9)


def test_noise_scale_is_that_of_the_loss_of_one_example_whatever_the_reduction():
    model = build(perceptron)
    data = far_examples()
    mean, total = (gradient_noise_scale(model, LOSSES[name], *data) for name in list(LOSSES)[:2])
    assert total.value == pytest.approx(mean.value, rel=1e-12)


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 40, 100])
def test_chunks_make_no_difference_to_the_noise_scale(chunk_size):
    model = build(perceptron)
    data = far_examples()
    whole = gradient_noise_scale(model, functional.cross_entropy, *data)
    parts = gradient_noise_scale(model, functional.cross_entropy, *data, chunk_size=chunk_size)
    assert parts.value == pytest.approx(whole.value, rel=1e-9)
    assert parts.skewness == pytest.approx(whole.skewness, rel=1e-6)
    assert parts.stderr == pytest.approx(whole.stderr, rel=1e-6)  # one example in a piece either way


@pytest.mark.parametrize("batch_size", [1, 3, 16, 40])
@pytest.mark.parametrize("shuffle", [False, True])
def test_noise_scale_of_a_data_loader_is_that_of_its_examples(batch_size, shuffle):
    # Each pass over a shuffled loader has an order of its own.
    model = build(perceptron)
    data = far_examples()
    whole = gradient_noise_scale(model, functional.cross_entropy, *data)
    draws = torch.Generator().manual_seed(1)
    loader = DataLoader(TensorDataset(*data), batch_size=batch_size, shuffle=shuffle, generator=draws)
    found = gradient_noise_scale(model, functional.cross_entropy, loader)
    assert found.value == pytest.approx(whole.value, rel=1e-9)
    assert found.stderr == pytest.approx(whole.stderr, rel=0.02)  # tr(S²) comes from other groups
    assert found.n == 40


@pytest.mark.parametrize("make", [iter, lambda batches: (batch for batch in batches), enumerate])
def test_noise_scale_refuses_batches_that_can_be_gone_through_only_once(make):
    model = build(perceptron)
    batches = make(DataLoader(TensorDataset(*far_examples()), batch_size=8))
    rule = "inputs must have a length and allow a second pass, as a DataLoader does"
    assert_refuses(lambda: gradient_noise_scale(model, functional.cross_entropy, batches), rule, type(batches).__name__)


def test_noise_scale_of_single_precision_is_that_of_double():
    model = build(perceptron)
    inputs, targets = far_examples()
    double = gradient_noise_scale(model, functional.cross_entropy, inputs, targets)
    single = gradient_noise_scale(model.float(), functional.cross_entropy, inputs.float(), targets)
    assert single.value == pytest.approx(double.value, rel=1e-4)
    assert single.stderr == pytest.approx(double.stderr, rel=1e-4)


@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if not entry.lazy])
def test_noise_scale_of_any_network_is_right_or_refused_and_leaves_it_as_it_was(name):
    entry = ZOO[name]
    problem = entry.problem(6)
    before = fingerprint(problem.model)
    if entry.couples_examples and name != "summed loss":
        with pytest.raises(ValueError, match=r"example"):
            gradient_noise._whole(*problem, None)
    else:
        found = gradient_noise._whole(*problem, None)
        if not entry.uses_randomness:
            single = gradients_one_by_one(entry, 6)
            trace, squared_norm = parts_by_pairs(torch.cat([row.flatten(1) for row in single.values()], dim=1))
            assert found.trace == pytest.approx(trace, rel=1e-8)
            assert found.squared_norm == pytest.approx(squared_norm, rel=1e-7, abs=1e-9 * trace)
    assert not changes(before, fingerprint(problem.model))


# The standard error


def quadruples(rows):
    """Return the mean of ((x1 - x2)·(x3 - x4))²/4 over all choices of four."""
    rows = np.asarray(rows)
    found = [
        ((rows[i] - rows[j]) @ (rows[k] - rows[m])) ** 2 / 4
        for i, j, k, m in itertools.permutations(range(len(rows)), 4)
    ]
    return np.mean(found)


@pytest.mark.parametrize("k", [4, 5, 8])
def test_trace_of_the_square_is_the_mean_over_all_choices_of_four(k):
    rows = 3 + rng("test.noise_scale.four").standard_exponential((k, 6))
    gram = torch.as_tensor(rows @ rows.T)
    assert gradient_noise._trace_of_square(gram) == pytest.approx(quadruples(rows), rel=1e-9)


@pytest.mark.parametrize(
    ("n", "size", "most", "groups", "of_group"),
    [
        (9, 1, 16, 9, 1),
        (12, 2, 8, 6, 2),
        (17, 2, 8, 8, 2),  # the ninth piece is short
        (18, 2, 8, 4, 4),  # the ninth piece makes pairs of the eight, and has no partner
        (20, 2, 8, 5, 4),
        (32, 1, 8, 8, 4),  # twice made pairs of
        (33, 1, 8, 4, 8),
        (12, 2, 9, 6, 2),  # at most eight
    ],
)
def test_groups_hold_equally_many_examples(n, size, most, groups, of_group):
    rows = rng("test.noise_scale.groups").standard_exponential((n, 5))
    collected = gradient_noise._Groups(size, most)
    for piece in torch.as_tensor(rows).split(size):
        collected.add(piece.sum(0), len(piece))
    means = rows[: groups * of_group].reshape(groups, of_group, -1).mean(1)
    assert collected.trace_of_square() == pytest.approx(quadruples(means) * of_group**2, rel=1e-9)


@pytest.mark.parametrize(("entries", "most"), [(2**26, 32), (200, 20), (1, 8)])
def test_there_are_fewer_groups_where_gradients_are_long(entries, most, monkeypatch):
    made, groups = [], gradient_noise._Groups
    monkeypatch.setattr(gradient_noise, "GROUP_ENTRIES", entries)
    monkeypatch.setattr(gradient_noise, "_Groups", lambda size, most: made.append((size, most)) or groups(size, most))
    scale_of_rows(5 + rng("test.groups.long").normal(size=(640, 10)))
    assert made == [(640 // most, most)]


def test_groups_are_pieces_of_at_most_a_chunk(monkeypatch):
    made, groups = [], gradient_noise._Groups
    monkeypatch.setattr(gradient_noise, "_Groups", lambda size, most: made.append(size) or groups(size, most))
    scale_of_rows(5 + rng("test.groups.chunk").normal(size=(640, 10)), chunk_size=3)
    assert made == [3]


def test_trace_of_the_square_of_some_columns_is_that_of_their_gradients():
    rows = rng("test.noise_scale.columns").standard_exponential((7, 6))
    collected = gradient_noise._Groups(1, 32)
    for row in torch.as_tensor(rows):
        collected.add(row.clone(), 1)
    assert collected.trace_of_square(slice(2, 5)) == pytest.approx(quadruples(rows[:, 2:5]), rel=1e-9)


def jackknife(rows):
    """Return standard error and skewness of T - B G over G, leaving out one gradient at a time; B stays the ratio."""
    rows = np.asarray(rows)
    n = len(rows)
    left_out = np.array([parts_by_sums(np.delete(rows, i, axis=0)) for i in range(n)])  # (n, 2)
    trace, squared_norm = parts_by_sums(rows)
    influence = -((left_out - left_out.mean(0)) @ [1, -trace / squared_norm]) / squared_norm
    skewness = np.mean(influence**3) / np.mean(influence**2) ** 1.5
    return math.sqrt((n - 1) / n * np.square(influence).sum()), skewness


def parts_by_sums(rows):
    n, mean = len(rows), rows.mean(0)
    trace = np.square(rows - mean).sum() / (n - 1)
    return trace, mean @ mean - trace / n


def test_standard_error_and_skewness_of_the_noise_scale_are_those_of_the_jackknife():
    # But for the part of second order, which the jackknife has twice.
    rows = 1 + rng("test.noise_scale.jackknife").standard_normal((100, 20)) * np.linspace(0.5, 1.5, 20)
    ratio = ratio_of_rows(rows)
    estimate, (stderr, skewness) = ratio.estimate(), jackknife(rows)
    second = ratio.second_order * (estimate.value / ratio.squared_norm) ** 2
    assert estimate.stderr == pytest.approx(math.sqrt(stderr**2 - second), rel=1e-9)
    assert estimate.skewness == pytest.approx(skewness, rel=1e-9)


def test_the_network_and_its_gradients_give_the_same_standard_error():
    rows = 1 + rng("test.noise_scale.same").standard_normal((100, 20))
    found, expected = scale_of_rows(rows), ratio_of_rows(rows).estimate()
    for name in ("value", "stderr", "n", "skewness"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-9)


VARIANCES, SQUARED_NORM = np.repeat([0.2, 1.8], 150), 2.5  # of 300 coordinates


def many_coordinates(n, repetition):
    """Return Gaussian gradients of 300 coordinates: a third of the variance of |∇L|² is of second order."""
    noise = rng(f"test.noise_scale.many.{repetition}").standard_normal((n, 300)) * np.sqrt(VARIANCES)
    return noise + math.sqrt(SQUARED_NORM / 300)


def test_variance_of_the_squared_norm_has_its_part_of_second_order_once():
    # For Gaussian gradients Var |ḡ|² = 4 ∇Lᵀ S ∇L/n + 2 tr(S²)/(n(n-1)), of which the second part is a third.
    n, repetitions = 200, 60
    second = 2 * np.square(VARIANCES).sum() / (n * (n - 1))
    truth = 4 * SQUARED_NORM / 300 * VARIANCES.sum() / n + second
    found = np.array([ratio_of_rows(many_coordinates(n, k)).covariance[2] for k in range(repetitions)])
    error = found.std(ddof=1) / math.sqrt(repetitions)
    assert abs(found.mean() - truth) < 4.9 * error  # a false alarm in a million
    assert second > 10 * error  # were it there twice, or missing, it would be seen


def test_noise_scale_z_scores_are_standard_in_many_coordinates():
    truth = VARIANCES.sum() / SQUARED_NORM
    estimates = [ratio_of_rows(many_coordinates(200, k)).estimate() for k in range(250)]
    # On the log scale, where the error of a ratio is nearly normal.
    z = [math.log(estimate.value / truth) * estimate.value / estimate.stderr for estimate in estimates]
    assert abs(np.mean(z)) * math.sqrt(250) < 6.5  # ratio bias of order 1/n: 0.1 standard errors
    assert 0.8 < np.std(z, ddof=1) < 1.2  # beyond ±4.9 of its standard error √(1/500) = 0.045


def exponential(mean, scale=1.0):
    return lambda draws, n: scale * (draws.standard_exponential((n, len(mean))) - 1) + mean


def normal(mean):
    return lambda draws, n: draws.standard_normal((n, len(mean))) + mean


# Gradients, tr S and |∇L|².
LAWS = {
    "normal, 4 coordinates": (normal(np.full(4, 0.5)), 4.0, 1.0),
    "normal, 300 coordinates": (normal(np.full(300, math.sqrt(2.5 / 300))), 300.0, 2.5),
    "exponential, 4 coordinates": (exponential(np.full(4, 1.0)), 4.0, 4.0),
    "exponential, 30 coordinates": (exponential(np.full(30, math.sqrt(2.5 / 30))), 30.0, 2.5),
    "exponential to the left": (exponential(np.full(30, math.sqrt(2.5 / 30)), -1.0), 30.0, 2.5),
}


def of_log_normal_length(mean, sigma):
    """Return a law of gradients with a length of mean 1, and its tr S and |∇L|²; the direction is nearly normal."""

    def draw(draws, n):
        length = np.exp(sigma * draws.standard_normal((n, 1)) - sigma**2 / 2)
        return length * (mean + draws.standard_normal((n, len(mean))))

    second_moment = math.exp(sigma**2) * (mean @ mean + len(mean))
    return draw, second_moment - mean @ mean, mean @ mean


HEAVY = {
    "log-normal length": of_log_normal_length(np.full(4, 1.0), 1.0),
    "very skewed length": of_log_normal_length(np.full(4, 1.0), 1.5),
    "log-normal length, 30 coordinates": of_log_normal_length(np.full(30, math.sqrt(5 / 30)), 1.0),
    "slightly skewed length": of_log_normal_length(np.full(4, 1.0), 0.5),
}


@pytest.mark.parametrize("n", [10, 20, 40, 200])
@pytest.mark.parametrize("name", LAWS | HEAVY)
def test_intervals_cover_the_noise_scale_from_ten_examples_on(name, n):
    draw, trace, squared_norm = (LAWS | HEAVY)[name]
    draws = rng(f"test.noise_scale.coverage.{name}.{n}")
    hits = []
    for _ in range(300):
        ratio = ratio_of_rows(draw(draws, n))
        try:
            low, high = ratio.interval(0.95)
        except ValueError:  # |∇L|² is measured significantly below zero
            low = high = math.inf
        hits.append(low <= trace / squared_norm <= high)
    assert_share(hits, (0.90, 1.0))


def is_right_or_refused(ratio, truth):
    try:
        estimate = ratio.estimate()
    except ValueError:
        return True
    return abs(estimate.value - truth) <= 2 * estimate.stderr


@pytest.mark.parametrize("n", [80, 200, 800])
@pytest.mark.parametrize("name", LAWS | HEAVY)
def test_two_standard_errors_cover_the_noise_scale_or_it_is_refused(name, n):
    draw, trace, squared_norm = (LAWS | HEAVY)[name]
    draws = rng(f"test.noise_scale.two_errors.{name}.{n}")
    hits = [is_right_or_refused(ratio_of_rows(draw(draws, n)), trace / squared_norm) for _ in range(200)]
    assert_share(hits, (0.92, 1.0))


@pytest.mark.parametrize("name", LAWS)
def test_two_hundred_normal_or_exponential_gradients_are_seldom_refused(name):
    draw, _, _ = LAWS[name]
    draws = rng(f"test.noise_scale.answered.{name}")
    ratios = [ratio_of_rows(draw(draws, 200)) for _ in range(100)]
    few = name == "exponential, 4 coordinates"  # their lengths are the most skewed
    assert_share([ratio.is_clear and ratio.is_balanced for ratio in ratios], (0.4 if few else 0.95, 1.0))


def test_a_network_for_linear_regression_has_the_noise_scale_of_its_law():
    # y = x·w + e; at parameters away from w by d, the gradient of the squared error is 2 (x·d - e) x. Its moments are
    # polynomials of degree at most 4 in each of x and e, for which three Gauss-Hermite nodes are exact.
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
    draws = rng("test.noise_scale.regression")
    x = draws.standard_normal((100_000, 3)) * scales
    y = x @ w + noise_std * draws.standard_normal(100_000)
    estimate = gradient_noise_scale(model, functional.mse_loss, torch.as_tensor(x), torch.as_tensor(y)[:, None])
    assert abs(estimate.value - truth) < 4.9 * estimate.stderr
    assert estimate.stderr < 0.02 * truth  # so that an error of 18 % is noticed


# The interval


@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("squared_norm", [2.0, 0.5])
def test_the_interval_holds_what_lies_within_its_standard_errors(squared_norm, level):
    # Var T = 1.3, Cov(T, G) = -0.2, Var G = 0.4, from influence values in all four directions.
    root = np.linalg.cholesky([[1.3, -0.2], [-0.2, 0.4]])
    influence = torch.as_tensor(np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]]) @ root.T * math.sqrt(3))
    ratio = gradient_noise._Ratio(5.0, squared_norm, influence, 0.0, "examples")
    assert ratio.covariance == pytest.approx((1.3, -0.2, 0.4))
    grid = np.linspace(0, 200, 2_000_001)
    spread = np.sqrt(1.3 + 2 * grid * 0.2 + grid**2 * 0.4)
    inside = grid[np.abs(5.0 - squared_norm * grid) <= stats.norm.isf((1 - level) / 2) * spread]
    low, high = ratio.interval(level)
    assert low == pytest.approx(inside.min(), abs=2e-4)
    assert min(high, 200) == pytest.approx(inside.max(), abs=2e-4)


def two_points(center, n):
    """Return n gradients center ± 1 of one coordinate, half of each."""
    return center + np.tile([1.0, -1.0], n // 2)[:, None]


def test_the_interval_is_one_sided_where_the_gradient_may_vanish():
    low, high = noise_scale_interval(*linear(two_points(0.1, 40)))
    assert 0 < low < 40
    assert high == math.inf


def test_the_interval_is_two_sided_where_it_cannot():
    rows = two_points(3.0, 40)
    low, high = noise_scale_interval(*linear(rows))
    assert low < scale_by_pairs(rows) < high < 1


def test_the_interval_is_at_95_percent_unless_told_otherwise():
    rows = linear(two_points(1.0, 40))
    assert noise_scale_interval(*rows) == noise_scale_interval(*rows, level=0.95)
    assert noise_scale_interval(*rows) != noise_scale_interval(*rows, level=0.94)


@pytest.mark.parametrize("level", [0.0, 1.0, -0.5, 95.0, math.nan])
def test_the_interval_refuses_levels_that_are_no_probability(level):
    assert_refuses(lambda: noise_scale_interval(*linear(two_points(1.0, 40)), level=level), "level must lie", level)


# Refusals


def excess(c, standard_errors, n):
    """Return by how much |∇L|² of :func:`two_points` exceeds so many of its standard errors."""
    ratio = ratio_of_rows(two_points(c, n))
    return ratio.squared_norm - standard_errors * math.sqrt(ratio.covariance[2])


@pytest.mark.parametrize("n", [40, 200])
def test_noise_scale_is_refused_just_below_four_standard_errors_and_given_just_above(n):
    below, above = (optimize.brentq(excess, 0.1, 50, args=(errors, n)) for errors in (3.999, 4.001))
    with pytest.raises(ValueError, match=f"{n} examples are too few"):
        scale_of_rows(two_points(below, n))
    rows = two_points(above, n)
    assert scale_of_rows(rows).value == pytest.approx(scale_by_pairs(rows), rel=1e-9)


def in_type(rows, dtype):
    """Return a problem whose gradients are these rows, computed in half precision; they are exact in bfloat16."""
    model, loss, inputs, _ = linear(rows)
    return model.to(dtype), loss, inputs.to(dtype), inputs.to(dtype)


# tr S is 1.005, and |∇L|² close to center²: 100 eps of it is 0.78 center² in bfloat16, and 0.098 center² in float16.
@pytest.mark.parametrize(
    ("dtype", "inside", "outside"), [(torch.bfloat16, 1.125, 1.1875), (torch.float16, 3.1875, 3.25)]
)
def test_noise_scale_is_given_above_rounding_errors_and_refused_below(dtype, inside, outside):
    expected = scale_by_pairs(two_points(inside, 200))
    assert gradient_noise_scale(*in_type(two_points(inside, 200), dtype)).value == pytest.approx(expected, rel=0.02)
    rows = two_points(outside, 200)
    name = str(dtype).removeprefix("torch.")
    rounding = 100 * torch.finfo(dtype).eps * outside**2
    rule = f"tr S must exceed the rounding errors of {name}, {rounding:.3g}"
    for call in (gradient_noise_scale, noise_scale_interval):
        assert_refuses(lambda call=call: call(*in_type(rows, dtype)), rule, "1.01: compute in float32")
    assert gradient_noise_scale(*in_type(rows, torch.float32)).value == pytest.approx(scale_by_pairs(rows), rel=1e-4)
    row = noise_scale_report(*in_type(rows, dtype)).rows[0]
    assert row[2:] == [f"below {rounding:.2g}", f"{outside**2:.3g}", "", ""]


def test_autocast_counts_as_the_type_that_it_computes_in():
    problem = in_type(two_points(1.1875, 200), torch.float32)
    assert gradient_noise_scale(*problem).value < 0.78
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="rounding errors of bfloat16"):
        gradient_noise_scale(*problem)


def few_large(size, n=200):
    """Return n gradients of one coordinate, 5 ± 1, of which two are 5 + size and own the more of the variance."""
    rows = two_points(5.0, n)
    rows[:2] = 5 + size
    return rows


@pytest.mark.parametrize("n", [40, 200])
def test_noise_scale_is_given_up_to_an_asymmetry_of_a_quarter_and_refused_beyond(n):
    def beyond(size, limit):
        return ratio_of_rows(few_large(size, n)).asymmetry - limit

    inside, outside = (few_large(optimize.brentq(beyond, 1.0, 3.0, args=(limit,)), n) for limit in (0.249, 0.251))
    assert scale_of_rows(inside).value == pytest.approx(scale_by_pairs(inside), rel=1e-9)
    assert noise_scale_interval(*linear(inside))[1] < math.inf
    with pytest.raises(ValueError, match=r"^tr S must not hang on few of the examples"):
        scale_of_rows(outside)
    assert noise_scale_interval(*linear(outside))[1] == math.inf


def test_asymmetry_is_the_skewness_of_the_jackknife_of_the_trace_over_the_root_of_n():
    rows = rng("test.noise_scale.asymmetry").standard_exponential((50, 3))
    left_out = [np.delete(rows, i, axis=0).var(0, ddof=1).sum() for i in range(50)]
    assert ratio_of_rows(rows).asymmetry == pytest.approx(abs(stats.skew(left_out)) / math.sqrt(50), rel=1e-9)


def test_a_refusal_for_few_large_gradients_states_the_figures_and_the_number_needed_at_least():
    rows = few_large(4.0)
    ratio = ratio_of_rows(rows)
    low, high = ratio.interval(0.95)
    needed = 200 * (ratio.asymmetry / 0.25) ** 2  # skewness over √n falls as 1/√n, if no larger ones appear
    message = (
        "tr S must not hang on few of the examples: the skewness of its error must be at most 0.25, got "
        f"{ratio.asymmetry:.2g} with 200; at least {math.ceil(needed / 100) * 100:,} would be needed; the noise scale "
        f"is at least {low:.3g}, with 97.5 % confidence"
    )
    assert 1000 < needed < 10_000
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        scale_of_rows(rows)
    assert 0 < low < high == math.inf
    row = noise_scale_report(*linear(rows)).rows[0]
    assert row[4:] == ["", f"at least {low:.3g}"]


def test_a_refusal_states_the_figures_the_number_that_would_do_and_a_bound():
    rows = two_points(0.5, 40)
    ratio = ratio_of_rows(rows)
    error, (low, _) = math.sqrt(ratio.covariance[2]), ratio.interval(0.95)
    message = (
        f"|∇L|² must be 4 standard errors above zero, got {ratio.squared_norm:.3g} with standard error {error:.3g}: "
        "40 examples are too few to tell the gradient from its noise, about 330 would do; the noise scale is at least "
        f"{low:.3g}, with 97.5 % confidence"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        scale_of_rows(rows)


def test_the_number_that_would_do_does():
    # |∇L|² and its variance, first/n + second/n², as measured from 60 examples.
    rows = 0.12 + rng("test.noise_scale.needed").standard_normal((60, 40))
    with pytest.raises(ValueError, match="would do") as refusal:
        ratio_of_rows(rows).estimate()
    needed = int(re.search(r"about ([\d,]+) would do", str(refusal.value))[1].replace(",", ""))
    ratio = ratio_of_rows(rows)
    first, second = 60 * (ratio.covariance[2] - ratio.second_order), 60**2 * ratio.second_order
    for n, enough in ((needed, True), (0.85 * needed, False)):
        assert (ratio.squared_norm >= 4 * math.sqrt(first / n + second / n**2)) == enough


def test_a_gradient_measured_as_nothing_needs_at_least_a_number_of_examples():
    with pytest.raises(ValueError, match=r"at least [0-9,]+ would be needed"):
        ratio_of_rows(two_points(0.05, 40)).estimate()


def ratio_of(trace, squared_norm, error, second_order=0.0):
    """Return a ratio with these parts, whose trace is known and whose squared norm has this standard error."""
    influence = torch.zeros(4, 2, dtype=torch.float64)
    influence[:, 1] = error * 3**0.5 * torch.tensor([1.0, -1.0, 1.0, -1.0])
    return gradient_noise._Ratio(trace, squared_norm, influence, second_order, "steps")


@pytest.mark.parametrize("squared_norm", [-0.2, 0.2])
def test_a_gradient_measured_within_a_standard_error_of_nothing_has_a_bound(squared_norm):
    ratio = ratio_of(5.0, squared_norm, 0.3)
    assert ratio.covariance[2] == pytest.approx(0.09)
    low, high = ratio.interval(0.95)
    assert math.isinf(high)
    with pytest.raises(ValueError, match=rf"the noise scale is at least {low:.3g}, with 97.5 % confidence$"):
        ratio.estimate()


def test_the_variance_of_the_squared_norm_is_at_least_its_part_of_second_order():
    assert ratio_of(5.0, 2.0, 0.3, second_order=0.05).covariance[2] == pytest.approx(0.05)
    assert ratio_of(5.0, 2.0, 0.3, second_order=0.04).covariance[2] == pytest.approx(0.05)


def test_a_gradient_measured_far_below_zero_has_no_number():
    ratio = gradient_noise._Ratio(5.0, -9.0, 1e-3 * torch.eye(5, 2, dtype=torch.float64), 0.0, "steps")
    with pytest.raises(ValueError, match=r"as it is measured below zero, no number can be given$"):
        ratio.estimate()
    with pytest.raises(ValueError, match=r"must not be negative, got -9 .* is population_size missing\?$"):
        ratio.interval(0.95)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_noise_scale_refuses_fewer_than_four_examples(n):
    assert_refuses(lambda: scale_of_rows(np.eye(4)[:n]), "inputs must hold at least 4 examples", n)


def test_noise_scale_of_vanishing_gradients_is_refused():
    assert_refuses(
        lambda: scale_of_rows(np.zeros((6, 3))), "examples must differ in their gradients", "a variance of 0"
    )


def test_noise_scale_refuses_examples_that_are_all_the_same():
    model = build(perceptron)
    inputs, targets = examples(model)
    same = inputs[:1].expand(5, -1), targets[:1].expand(5)
    with pytest.raises(ValueError, match="examples must differ in their gradients, got a variance of"):
        gradient_noise_scale(model, functional.cross_entropy, *same)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_noise_scale_refuses_examples_that_are_all_the_same_in_half_precision(dtype):
    model = build(perceptron, dtype)
    inputs, targets = examples(model)
    same = inputs[:1].expand(7, -1), targets[:1].expand(7)
    with pytest.raises(ValueError, match=r"must differ in their gradients|must exceed the rounding errors"):
        gradient_noise_scale(model, functional.cross_entropy, *same)


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


def weighted(predictions, targets):
    return functional.cross_entropy(predictions, targets, weight=predictions.new_tensor([1.0, 9.0, 2.0, 1.0]))


def ignoring(predictions, targets):
    return functional.cross_entropy(predictions, targets, ignore_index=0)


def centered(predictions, targets):
    return functional.cross_entropy(predictions - predictions.mean(0), targets)


@pytest.mark.parametrize("loss", [weighted, ignoring, centered])
@pytest.mark.parametrize("call", [gradient_noise_scale, noise_scale_interval, noise_scale_report])
def test_losses_that_are_no_mean_over_examples_are_refused(call, loss):
    model = build(perceptron)
    inputs, targets = examples(model, n=24)
    with pytest.raises(ValueError, match=r"loss of a batch|gradient of a batch loss"):
        call(model, loss, inputs, targets)


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


# The report


def test_the_report_has_a_row_for_the_model_and_each_layer():
    model = build(lambda: frozen(perceptron(), "2.weight"))
    data = far_examples()
    table = noise_scale_report(model, functional.cross_entropy, *data)
    gradients = looped_gradients(model, functional.cross_entropy, *data)
    rows = {name: row.flatten(1) for name, row in gradients.items()}
    layers = {"the model": list(rows), "0": ["0.weight", "0.bias"], "2": ["2.bias"], "4": ["4.weight", "4.bias"]}
    assert [row[0] for row in table.rows] == list(layers)
    for row in table.rows:
        own = torch.cat([rows[name] for name in layers[row[0]]], dim=1)
        trace, squared_norm = parts_by_pairs(own)
        ratio = ratio_of_rows(own)
        low, high = ratio.interval(0.95)
        assert row[1:4] == [f"{own.shape[1]:,}", f"{trace:.3g}", f"{squared_norm:.3g}"]
        assert row[4] == (repr(ratio.estimate()).split(" (")[0] if ratio.is_clear else "")
        assert row[5] == (f"{low:.3g} to {high:.3g}" if math.isfinite(high) else f"at least {low:.3g}")
    assert table.note == "From 40 examples."


def test_the_report_leaves_out_a_noise_scale_that_hangs_on_few_examples():
    rows = 1 + 0.1 * rng("test.report.few").normal(size=(200, 3))
    rows[0] = [4.0, 1.0, 1.0]
    ratio = ratio_of_rows(rows)
    assert ratio.is_clear
    assert not ratio.is_balanced
    assert noise_scale_report(*linear(rows)).rows[0][4] == ""


def test_the_report_of_a_model_that_is_one_layer_calls_its_parameters_its_own():
    table = noise_scale_report(*linear(two_points(3.0, 40)))
    assert [row[0] for row in table.rows] == ["the model", "its own"]
    assert table.rows[0][1:] == table.rows[1][1:]


def test_the_report_leaves_the_noise_scale_of_a_layer_without_noise_empty():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.shift = nn.Linear(4, 4), nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return self.layer(x) + self.shift

    def loss(predictions, targets):
        return predictions.sum(1).mean()

    model = build(Shifted)
    inputs, targets = far_examples()
    rows = {row[0]: row for row in noise_scale_report(model, loss, inputs, targets).rows}
    assert rows["its own"] == ["its own", "1", "0", "16", "", ""]


def test_the_report_says_at_least_where_the_gradient_may_vanish():
    table = noise_scale_report(*linear(two_points(0.1, 40)))
    assert table.rows[0][4] == ""
    assert table.rows[0][5].startswith("at least ")
