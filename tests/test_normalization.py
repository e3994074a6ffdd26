"""Closed forms and samplers of chapter 4, against enumeration, quadrature and libraries."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats
from torch import nn

from helpers import normalization as norm
from helpers.lab.runtime import generator, rng
from tests.statistics import assert_law, assert_means, assert_refuses, assert_share

VALUES, PROBABILITIES = np.array([-1.0, 0.5, 3.0]), np.array([0.5, 0.3, 0.2])
MEAN = float(PROBABILITIES @ VALUES)
VARIANCE = float(PROBABILITIES @ (VALUES - MEAN) ** 2)
KURTOSIS = float(PROBABILITIES @ (VALUES - MEAN) ** 4) / VARIANCE**2 - 3


def enumerated(m):
    """All batches of m values of a law on three points, and their probabilities."""
    batches = np.array(list(itertools.product(VALUES, repeat=m)))
    chances = np.array(list(itertools.product(PROBABILITIES, repeat=m))).prod(1)
    return batches, chances


def spread(values, chances):
    mean = chances @ values
    return chances @ (values - mean) ** 2


@pytest.mark.parametrize("m", [2, 3, 5])
def test_moments_of_batch_statistics_by_enumeration(m):
    batches, chances = enumerated(m)
    assert norm.batch_mean_variance(VARIANCE, m) == pytest.approx(spread(batches.mean(1), chances), rel=1e-12)
    assert norm.biased_variance_mean(VARIANCE, m) == pytest.approx(chances @ batches.var(1), rel=1e-12)
    unbiased = batches.var(1, ddof=1)
    assert chances @ unbiased == pytest.approx(VARIANCE, rel=1e-12)
    found = norm.sample_variance_variance(VARIANCE, m, KURTOSIS)
    assert found == pytest.approx(spread(unbiased, chances), rel=1e-12)


@pytest.mark.parametrize("m", [2, 3, 5])
def test_an_example_pulls_the_mean_of_its_batch_by_enumeration(m):
    others, chances = enumerated(m - 1)
    x = 4.2
    means = (others.sum(1) + x) / m
    assert norm.pulled_mean(x, MEAN, m) == pytest.approx(chances @ means, rel=1e-12)
    assert norm.pulled_variance(VARIANCE, m) == pytest.approx(spread(means, chances), rel=1e-12)


def test_arrays_of_batch_sizes_are_taken_entry_by_entry():
    m = np.array([2, 3, 5])
    for function, arguments in (
        (norm.batch_mean_variance, (1.7,)),
        (norm.biased_variance_mean, (1.7,)),
        (norm.pulled_variance, (1.7,)),
        (norm.pulled_mean, (0.3, 1.1)),
        (norm.coverage, (0.2, 1.3)),
    ):
        np.testing.assert_allclose(function(*arguments, m), [function(*arguments, int(k)) for k in m], rtol=1e-14)


@pytest.mark.parametrize(("tolerance", "std", "m"), [(0.3, 1.7, 5), (0.11, 0.4, 12)])
def test_coverage_is_that_of_a_normal_mean(tolerance, std, m):
    law = stats.norm(scale=std / math.sqrt(m))
    assert norm.coverage(tolerance, std, m) == pytest.approx(law.cdf(tolerance) - law.cdf(-tolerance), rel=1e-12)
    assert norm.coverage(0.0, std, m) == 0


# The mean of rectified values


@pytest.mark.parametrize("t", [0.02, 0.3, 0.9, 2.5])
def test_the_law_of_a_rectified_mean_in_small_batches(t):
    half = stats.halfnorm
    assert norm.rectified_mean_cdf(t, 1) == pytest.approx(0.5 + 0.5 * half.cdf(t), abs=1e-9)
    two = integrate.quad(lambda y: half.pdf(y) * half.cdf(2 * t - y), 0, 2 * t, epsabs=1e-13)[0]
    assert norm.rectified_mean_cdf(t, 2) == pytest.approx(0.25 + 0.5 * half.cdf(2 * t) + 0.25 * two, abs=1e-9)


def test_the_law_of_a_rectified_mean_by_convolution_on_a_grid():
    m, step = 8, 2e-3
    edges = np.arange(0, 12, step)
    mass = np.diff(stats.halfnorm.cdf(edges)) / 2
    mass[0] += 0.5
    # Values in a cell count as its middle, but for those at 0: the error is of second order in the step.
    total = mass
    for _ in range(m - 1):
        total = np.convolve(total, mass)[: len(edges)]
    law = norm.LAWS["rectified"]
    for t in (law.mean - 0.2 * law.variance**0.5, law.mean, law.mean + 0.2 * law.variance**0.5):
        middle = t * m - m * step / 4  # half of the values on average are not moved
        found = np.interp(middle / step + 0.5, np.arange(1, len(total) + 1), np.cumsum(total))
        assert norm.rectified_mean_cdf(t, m) == pytest.approx(found, abs=1e-3)


def test_the_law_of_a_rectified_mean_at_the_tolerance_of_the_chapter():
    law = norm.LAWS["rectified"]
    ends = [norm.rectified_mean_cdf(law.mean + sign * 0.2 * law.variance**0.5, 8) for sign in (-1, 1)]
    assert ends[1] - ends[0] == pytest.approx(0.4189, abs=5e-4)  # 0.4189 ± 0.0002 was simulated with other code
    draws = rng("test.normalization.rectified").standard_normal((400_000, 8)).clip(0).mean(1)
    for sign, end in zip((-1, 1), ends, strict=True):
        assert_share(draws <= law.mean + sign * 0.2 * law.variance**0.5, end)


def test_the_law_of_a_rectified_mean_has_an_atom_at_0():
    assert norm.rectified_mean_cdf(-1e-9, 3) == 0
    assert norm.rectified_mean_cdf(0.0, 3) == 0.125
    assert norm.rectified_mean_cdf(1e-4, 3) == pytest.approx(0.125, abs=1e-3)
    assert norm.rectified_mean_cdf(9.0, 3) == pytest.approx(1, abs=1e-9)


def test_the_mean_of_many_rectified_values_is_never_far_from_theirs():
    for m in (512, 5_000):
        assert norm.rectified_mean_cdf(1.5, m) == pytest.approx(1, abs=2e-9)
        assert norm.rectified_mean_cdf(0.1, m) == pytest.approx(0, abs=2e-9)


@pytest.mark.parametrize("m", [16, 32, 128])
def test_the_law_of_a_rectified_mean_by_its_characteristic_function(m):
    law = norm.LAWS["rectified"]
    t = law.mean + np.array([-0.3, -0.1, 0.0, 0.1, 0.3]) * law.variance**0.5
    frequencies = np.linspace(0, 60, 60_001)[1:]  # of (X - mean), by the inversion of Gil-Pelaez
    erfcx = special.wofz(frequencies / math.sqrt(2))
    characteristic = ((1 + erfcx) / 2) ** m
    for at in t:
        values = (np.exp(-1j * frequencies * m * at) * characteristic).imag / frequencies
        start = (m * law.mean) - m * at  # the limit at frequency 0
        found = 0.5 - (integrate.simpson(np.r_[start, values], x=np.r_[0, frequencies])) / math.pi
        atom = 0.5**m  # its part of the integral decays slowly, and is known
        rest = integrate.simpson(np.r_[-m * at, -np.sin(frequencies * m * at) / frequencies], x=np.r_[0, frequencies])
        found += (rest / math.pi + 0.5) * atom
        assert norm.rectified_mean_cdf(at, m) == pytest.approx(found, abs=1e-6)


# What a layer returns


@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_normalized_values_have_the_variance_that_eps_leaves(eps):
    x = torch.randn((7, 1), generator=generator("test.normalization.eps"), dtype=torch.float64)
    layer = nn.BatchNorm1d(1, eps=eps).double()
    out = layer(x).detach().numpy()
    assert out.mean() == pytest.approx(0, abs=1e-12)
    assert out.var() == pytest.approx(norm.normalized_variance(x.numpy().var(), eps), rel=1e-12)
    assert layer.running_var.item() == pytest.approx(0.9 + 0.1 * x.numpy().var(ddof=1), rel=1e-12)


@pytest.mark.parametrize("m", [2, 3, 10])
def test_one_outlier_attains_the_largest_output(m):
    batch = torch.zeros(1, m, dtype=torch.float64)
    batch[0, 1] = 1e6
    found = norm.normalized(batch)
    assert found.max().item() == pytest.approx(norm.largest_output(m), rel=1e-12)
    assert found.max().item() == pytest.approx(math.sqrt(m - 1), rel=1e-12)


@pytest.mark.parametrize(("momentum", "m"), [(0.5, 3), (0.1, 8), (1.0, 4)])
def test_a_running_mean_is_a_weighted_sum_of_batch_means(momentum, m):
    weights = momentum * (1 - momentum) ** np.arange(2_000)
    assert norm.running_mean_variance(1.7, m, momentum) == pytest.approx(1.7 / m * (weights @ weights), rel=1e-12)


@pytest.mark.parametrize(("momentum", "population", "m"), [(0.5, 4, 2), (0.3, 6, 2), (0.1, 6, 3), (0.7, 4, 4)])
def test_a_running_mean_over_shuffled_epochs_by_enumeration(momentum, population, m):
    values = np.array([0.3, -1.2, 2.0, 0.9, -0.4, 1.5])[:population]
    batches = population // m
    shuffles = np.array(list(itertools.permutations(values))).reshape(-1, batches, m).mean(2)
    covariance = np.atleast_2d(np.cov(shuffles.T, ddof=0))  # of the batch means of one epoch
    weights = momentum * (1 - momentum) ** np.arange(400 * batches).reshape(-1, batches)[:, ::-1]
    expected = sum(w @ covariance @ w for w in weights)
    found = norm.running_mean_variance(values.var(ddof=1), m, momentum, population)
    assert found == pytest.approx(expected, rel=1e-10, abs=1e-15)


# The law of an output


@pytest.mark.parametrize("u", [-0.9, -0.2, 0.4, 0.8])
def test_outputs_of_small_batches_have_known_laws(u):
    arcsine, uniform = 0.5 + math.asin(u) / math.pi, (1 + u) / 2
    semicircle = 0.5 + (u * math.sqrt(1 - u * u) + math.asin(u)) / math.pi
    for m, expected in ((3, arcsine), (4, uniform), (5, semicircle)):
        assert norm.output_cdf(u * math.sqrt(m - 1), m) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("m", [3, 6, 9])
def test_the_law_of_an_output_of_simulated_batches(m):
    x = rng(f"test.normalization.output {m}").standard_normal((200_000, m))
    outputs = (x[:, 0] - x.mean(1)) / x.std(1)
    assert_law(outputs, lambda t: norm.output_cdf(t, m))
    assert_means(outputs[:, None] ** 4, [norm.output_fourth_moment(m)])


def test_the_fourth_moment_of_an_output_by_quadrature():
    for m in (5, 8, 30):  # a coordinate of a random direction in m - 1 dimensions
        shape = (m - 4) / 2
        moments = [
            integrate.quad(lambda u, k=k, s=shape: u**k * (1 - u * u) ** s, -1, 1, epsabs=1e-13)[0] for k in (4, 0)
        ]
        assert norm.output_fourth_moment(m) == pytest.approx((m - 1) ** 2 * moments[0] / moments[1], rel=1e-9)


def test_the_fourth_moment_of_two_and_three_is_that_of_every_law():
    for m, law in ((2, 1.0), (3, 1.5)):
        batch = rng("test.normalization.any law").exponential(size=(50, m))
        outputs = (batch - batch.mean(1, keepdims=True)) / batch.std(1, keepdims=True)
        assert (outputs**4).mean(1) == pytest.approx(law, rel=1e-9)
        assert norm.output_fourth_moment(m) == pytest.approx(law, rel=1e-12)


# What an output is on average


@pytest.mark.parametrize("x", [-2.0, 0.3, 1.4])
def test_in_pairs_the_mean_output_is_the_rank(x):
    assert norm.expected_output(x, 2) == pytest.approx(2 * stats.norm.cdf(x) - 1, rel=1e-10)


@pytest.mark.parametrize("x", [0.4, 2.5])
def test_the_mean_output_in_batches_of_three_by_quadrature(x):
    nodes, weights = np.polynomial.legendre.leggauss(1_000)
    a, w = 8 * nodes, 8 * weights * stats.norm.pdf(8 * nodes)
    first, second = np.meshgrid(a, a)
    batch = np.stack([np.full_like(first, x), first, second])
    outputs = (x - batch.mean(0)) / batch.std(0)
    assert norm.expected_output(x, 3) == pytest.approx(w @ outputs @ w, abs=2e-4)
    found = norm.output_variance(x, 3) + norm.expected_output(x, 3) ** 2
    assert found == pytest.approx(w @ outputs**2 @ w, abs=2e-4)


def moment_by_mean_and_spread(x, m, k):
    """E[x̂^k | x] by quadrature over the others' mean, and the sum Q of their squared deviations, a chi-square."""
    n = m - 1
    nodes, weights = np.polynomial.legendre.leggauss(400)

    def of_mean(a):
        def of_root(root):
            batch_variance = (root**2 + n * (x - a) ** 2 / m) / m
            outputs = n * (x - a) / m / np.sqrt(batch_variance)
            return outputs**k * 2 * root * stats.chi2.pdf(root**2, n - 1)

        top = math.sqrt(n - 1 + 60 + 12 * math.sqrt(n - 1))
        return top / 2 * weights @ of_root(top / 2 * (nodes + 1)) * stats.norm.pdf(a, scale=1 / math.sqrt(n))

    width = 9 / math.sqrt(n)
    ends = sorted({-width, width, min(max(x, -width), width)})
    return sum(
        (high - low) / 2 * w * of_mean((high + low) / 2 + (high - low) / 2 * t)
        for low, high in itertools.pairwise(ends)
        for t, w in zip(*np.polynomial.legendre.leggauss(60), strict=True)
    )


@pytest.mark.parametrize(("x", "m"), [(0.7, 4), (3.0, 4), (1.9, 9), (-4.0, 32), (0.2, 128)])
def test_mean_and_noise_of_an_output_by_quadrature_over_mean_and_spread_of_the_others(x, m):
    mean, second = (moment_by_mean_and_spread(x, m, k) for k in (1, 2))
    assert norm.expected_output(x, m) == pytest.approx(mean, rel=1e-5)
    assert norm.output_variance(x, m) == pytest.approx(second - mean**2, rel=1e-3)


@pytest.mark.parametrize(("m", "expected"), [(4, 1.61), (32, 3.28), (128, 3.79)])
def test_four_deviations_away(m, expected):
    assert norm.expected_output(4.0, m) == pytest.approx(expected, abs=0.005)  # measured with other code


@pytest.mark.parametrize("x", [0.0, -0.7, 2.0])
def test_in_pairs_the_noise_of_an_output_is_that_of_a_sign(x):
    assert norm.output_variance(x, 2) == pytest.approx(1 - (2 * stats.norm.cdf(x) - 1) ** 2, rel=1e-8)


def test_near_the_mean_the_noise_of_an_output_is_that_of_the_mean_of_a_large_batch():
    assert norm.output_variance(0.0, 10_000) == pytest.approx(1e-4, rel=5e-4)
    assert norm.output_variance(1.0, 10_000) == pytest.approx(1.5e-4, rel=5e-4)  # and half of x² for its unit


# Samplers


@pytest.mark.parametrize("name", norm.LAWS)
def test_moments_of_the_laws_by_quadrature(name):
    law = norm.LAWS[name]
    density = {"normal": stats.norm.pdf, "rectified": stats.norm.pdf, "exponential": stats.expon.pdf}[name]
    low = -40 if name == "normal" else 0

    def moment(k, about):
        inside = integrate.quad(lambda x: (x - about) ** k * density(x), low, 40, points=[0], epsabs=1e-13)[0]
        return inside + (0.5 * (-about) ** k if name == "rectified" else 0)

    assert law.mean == pytest.approx(moment(1, 0), abs=1e-9)
    assert law.variance == pytest.approx(moment(2, law.mean), rel=1e-9)
    assert law.excess_kurtosis == pytest.approx(moment(4, law.mean) / law.variance**2 - 3, abs=1e-8)


@pytest.mark.parametrize("name", ["normal", "exponential"])
def test_activations_have_their_law(name):
    draws = norm.activations(name, 50_000, 4, generator=generator(f"test.normalization.{name}"))
    assert draws.shape == (50_000, 4)
    assert draws.dtype == torch.float64
    assert_law(draws, norm.LAWS[name].cdf)
    single = norm.activations(name, 2, 3, generator=generator("test.normalization.single"), dtype=torch.float32)
    assert single.dtype == torch.float32


def test_distribution_functions_are_those_of_scipy():
    at = np.array([-0.5, 0.3, 2.0])
    np.testing.assert_allclose(norm.LAWS["normal"].cdf(at), stats.norm.cdf(at), rtol=1e-12)
    np.testing.assert_allclose(norm.LAWS["exponential"].cdf(at), stats.expon.cdf(at), rtol=1e-12)


def test_rectified_activations_are_those_of_the_normal_law():
    stream = "test.normalization.rectified draws"
    drawn = norm.activations("normal", 1_000, 3, generator=generator(stream))
    rectified = norm.activations("rectified", 1_000, 3, generator=generator(stream))
    assert torch.equal(rectified, torch.where(drawn > 0, drawn, 0.0))
    law = norm.LAWS["rectified"]
    np.testing.assert_allclose(law.cdf(np.array([-0.1, 0.0, 1.0])), [0, 0.5, stats.norm.cdf(1)], rtol=1e-12)


def test_exponential_activations_are_logarithms_of_uniform_numbers():
    stream = "test.normalization.exponential draws"
    source = generator(stream)
    uniform = torch.rand((1_000, 3), generator=source, dtype=torch.float64, device=source.device)
    found = norm.activations("exponential", 1_000, 3, generator=generator(stream))
    np.testing.assert_allclose(found.cpu(), -np.log(1 - uniform.cpu().numpy()), rtol=1e-9)
    np.testing.assert_allclose(norm.LAWS["exponential"].cdf(np.array([-1.0, 2.0])), [0, 1 - math.exp(-2)], rtol=1e-12)


def test_many_batches_are_normalized_as_one_by_one():
    batches = norm.activations("exponential", 20, 5, generator=generator("test.normalization.batches"))
    layer = nn.BatchNorm1d(1, eps=0.2, affine=False, track_running_stats=False)
    one_by_one = torch.stack([layer(batch[:, None])[:, 0] for batch in batches])
    torch.testing.assert_close(norm.normalized(batches, eps=0.2), one_by_one, rtol=1e-12, atol=1e-12)
    plain = (batches - batches.mean(1, keepdim=True)) / batches.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(norm.normalized(batches), plain, rtol=1e-12, atol=1e-12)
    assert norm.normalized(torch.ones(1, 4)).abs().max() == 0
    torch.testing.assert_close(norm.normalized(1e-8 * batches), plain, rtol=1e-9, atol=1e-12)


# Refusals


@pytest.mark.parametrize(
    ("call", "rule", "value"),
    [
        (lambda: norm.batch_mean_variance(-1.0, 3), "variance must not be negative", -1.0),
        (lambda: norm.batch_mean_variance(1.0, 0), "batch_size must be at least 1", 0),
        (lambda: norm.sample_variance_variance(1.0, 1, 0.0), "batch_size must lie in [2, inf]", 1),
        (lambda: norm.sample_variance_variance(1.0, 3, -2.1), "excess_kurtosis must lie in [-2, inf]", -2.1),
        (lambda: norm.coverage(-0.1, 1.0, 3), "tolerance must not be negative", -0.1),
        (lambda: norm.coverage(0.1, 0.0, 3), "std must be positive and finite", 0.0),
        (lambda: norm.rectified_mean_cdf(math.nan, 3), "threshold must be finite", "nan"),
        (lambda: norm.normalized_variance(0.0, 0.1), "batch_variance must be positive", 0.0),
        (lambda: norm.normalized_variance(1.0, -0.1), "eps must not be negative", -0.1),
        (lambda: norm.largest_output(1), "batch_size must lie in [2, inf]", 1),
        (lambda: norm.running_mean_variance(1.0, 2, 0.0), "momentum must lie in (0, 1]", 0.0),
        (lambda: norm.running_mean_variance(1.0, 2, 1.01), "momentum must lie in (0, 1]", 1.01),
        (lambda: norm.running_mean_variance(1.0, 4, 0.1, 6), "batch_size must divide population_size 6", 4),
        (lambda: norm.running_mean_variance(1.0, 8, 0.1, 4), "batch_size must divide population_size 4", 8),
        (lambda: norm.output_cdf(0.3, 2), "batch_size must lie in [3, inf]", 2),
        (lambda: norm.output_fourth_moment(1), "batch_size must lie in [2, inf]", 1),
        (lambda: norm.expected_output(1.0, 1), "batch_size must lie in [2, inf]", 1),
        (lambda: norm.expected_output(math.inf, 3), "x must be finite", "inf"),
        (lambda: norm.coverage(0.1, 1.0, 0), "batch_size must be at least 1", 0),
        (lambda: norm.pulled_mean(0.1, 1.0, 0), "batch_size must be at least 1", 0),
        (lambda: norm.rectified_mean_cdf(0.1, 0), "batch_size must be at least 1", 0),
        (lambda: norm.normalized(torch.zeros(2, 3, 4)), "batches must have shape (n_batches, batch_size)", "(2, 3, 4)"),
        (lambda: norm.output_variance(1.0, 1), "batch_size must lie in [2, inf]", 1),
        (lambda: norm.output_variance(math.inf, 4), "x must be finite", math.inf),
        (
            lambda: norm.activations("uniform", 2, 2, generator=torch.Generator()),
            "law must be one of normal, rectified, exponential",
            "'uniform'",
        ),
        (lambda: norm.normalized(torch.ones(3, 1)), "batch_size at least 2", "(3, 1)"),
        (lambda: norm.normalized(torch.ones(3, 2), eps=-0.1), "eps must not be negative", -0.1),
    ],
)
def test_numbers_out_of_range_are_refused(call, rule, value):
    assert_refuses(call, rule, value)


DEVICE_CASES = [
    (norm.activations, lambda at: {"law": "exponential", "n_batches": 5, "batch_size": 3, "generator": at.generator}),
    (norm.activations, lambda at: {"law": "rectified", "n_batches": 5, "batch_size": 3, "generator": at.generator}),
    (norm.normalized, lambda at: {"batches": at.normal(5, 3)}),
]
