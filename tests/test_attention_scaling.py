"""Closed forms and samplers of the chapter on attention, against enumeration, quadrature and exact special cases."""

import math
import re
from itertools import product

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats
from torch import nn

from helpers.attention_scaling import (
    cosine_cdf,
    cosine_tail,
    cosine_tail_bound,
    cosine_variance,
    dot_product_variance,
    frozen_participation,
    initial_score_variance,
    mean_jacobian_norm,
    median_jacobian_norm,
    nearly_orthogonal_count,
    norm_mean,
    norm_variance,
    participation,
    sample_cosines,
    sample_scores,
    score_decomposition,
    softmax_jacobian_norm,
)
from helpers.lab.runtime import generator, rng, seeded
from tests.statistics import assert_means, assert_share, moments

DEVICE_CASES = [
    (score_decomposition, lambda at: {"queries": at.normal(2, 5, 3), "keys": at.normal(2, 6, 3)}),
    (softmax_jacobian_norm, lambda at: {"weights": at.normal(4, 5).softmax(-1)}),
    (sample_cosines, lambda at: {"n_samples": 5, "dimension": 3, "generator": at.generator}),
    (sample_scores, lambda at: {"n_samples": 5, "n_keys": 4, "dimension": 3, "generator": at.generator}),
]


# Angles and lengths


def angle_density(cosine, dimension):
    """Density of the cosine with a random direction: the sphere's slice at that height has radius √(1 - cos²)."""
    return (1 - cosine**2) ** ((dimension - 3) / 2)


@pytest.mark.parametrize("dimension", [3, 4, 7, 20])
def test_cosines_have_the_law_of_slices_of_a_sphere(dimension):
    whole = integrate.quad(angle_density, -1, 1, args=(dimension,))[0]
    for cosine in (-0.8, -0.1, 0.3, 0.95):
        below = integrate.quad(angle_density, -1, cosine, args=(dimension,))[0] / whole
        assert cosine_cdf(cosine, dimension) == pytest.approx(below, rel=1e-9)
    beyond = 2 * integrate.quad(angle_density, 0.3, 1, args=(dimension,))[0] / whole
    assert cosine_tail(0.3, dimension) == pytest.approx(beyond, rel=1e-9)
    square = integrate.quad(lambda x: x**2 * angle_density(x, dimension), -1, 1)[0] / whole
    assert cosine_variance(dimension) == pytest.approx(square, rel=1e-9)


def test_in_the_plane_angles_are_uniform():
    assert cosine_cdf(math.cos(1.1), 2) == pytest.approx(1 - 1.1 / math.pi)
    assert cosine_tail(math.cos(1.1), 2) == pytest.approx(2 * 1.1 / math.pi)
    assert cosine_variance(2) == 1 / 2


def test_on_the_line_a_cosine_is_a_sign():
    assert cosine_variance(1) == 1


@pytest.mark.parametrize("dimension", [2, 3, 10, 300])
def test_the_bound_is_above_the_tail_and_has_its_constants(dimension):
    limits = np.linspace(0, 1, 101)
    assert (cosine_tail(limits, dimension) <= cosine_tail_bound(limits, dimension)).all()
    assert cosine_tail_bound(0.3, dimension) == pytest.approx(2 / math.e ** (0.045 * dimension))


@pytest.mark.parametrize(("dimension", "limit", "probability"), [(16, 0.5, 0.5), (3, 0.9, 0.2), (128, 0.3, 0.9)])
def test_the_union_bound_allows_so_many_directions_and_no_more(dimension, limit, probability):
    n = nearly_orthogonal_count(dimension, limit, probability)
    assert n >= 2
    pair = cosine_tail(limit, dimension)
    assert math.comb(n, 2) * pair <= 1 - probability < math.comb(n + 1, 2) * pair


def test_half_is_the_usual_probability_and_one_direction_always_fits():
    assert nearly_orthogonal_count(16, 0.5) == nearly_orthogonal_count(16, 0.5, 0.5)
    assert nearly_orthogonal_count(16, 0.5) != nearly_orthogonal_count(16, 0.5, 0.6)
    assert nearly_orthogonal_count(2, 0.01) == 1


@pytest.mark.parametrize("dimension", [1, 2, 5, 64, 4096])
def test_lengths_have_the_moments_of_a_chi_variable(dimension):
    law = stats.chi(dimension)
    low, high = max(0.0, math.sqrt(dimension) - 12), math.sqrt(dimension) + 12
    mean = integrate.quad(lambda r: r * law.pdf(r), low, high, epsabs=1e-13, limit=200)[0]
    spread = integrate.quad(lambda r: (r - mean) ** 2 * law.pdf(r), low, high, epsabs=1e-13, limit=200)[0]
    assert norm_mean(dimension) == pytest.approx(mean, rel=1e-9)
    assert norm_variance(dimension) == pytest.approx(spread, rel=1e-6)


def test_the_shortest_lengths_are_known():
    assert norm_mean(1) == pytest.approx(math.sqrt(2 / math.pi))
    assert norm_mean(2) == pytest.approx(math.sqrt(math.pi / 2))
    assert norm_variance(1) == pytest.approx(1 - 2 / math.pi)
    assert norm_variance(10**6) == pytest.approx(0.5, abs=1e-6)


# Products


def test_the_variance_of_products_by_enumeration():
    query_values, key_values = (-0.5, 1.9), (0.3, 1.1)  # each with probability 1/2
    for dimension in (1, 2, 3):
        products = [
            np.dot(q, k) for q in product(query_values, repeat=dimension) for k in product(key_values, repeat=dimension)
        ]
        found = dot_product_variance(dimension, np.var(query_values), np.var(key_values), 0.7, 0.7)
        assert found == pytest.approx(np.var(products))
        assert found != pytest.approx(dot_product_variance(dimension, np.var(query_values), np.var(key_values)))


def test_products_are_of_unit_components_unless_told():
    assert dot_product_variance(5) == 5
    assert dot_product_variance(5, 2.0) == 10
    assert dot_product_variance(5, 2.0, 3.0) == 30
    assert dot_product_variance(5, 2.0, 3.0, query_mean=0.5) == 30 + 5 * 0.25 * 3
    assert dot_product_variance(5, 2.0, 3.0, key_mean=0.5) == 30 + 5 * 0.25 * 2


def test_initial_scores_by_enumeration_of_signs():
    """One component, all weights and biases plus or minus their deviation."""
    x, y = np.array([0.6, -1.28062485]), np.array([1.3, 0.55677644])  # mean square 1
    scores = [
        (np.dot(w[:2], x) * 0.4 + w[2] * 0.2) * (np.dot(w[3:5], y) * 0.7 + w[5] * 0.5)
        for w in product((-1.0, 1.0), repeat=6)
    ]
    found = initial_score_variance(0.16, 2, 0.49, 2, query_bias_variance=0.04, key_bias_variance=0.25)
    assert found == pytest.approx(np.mean(np.square(scores)), rel=1e-7)
    assert initial_score_variance(0.16, 2, 0.49, 3) == pytest.approx(0.32 * 1.47)


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_the_decomposition_is_that_of_all_pairs(shape):
    source = generator("test.attention_scaling.decomposition")
    options = {"generator": source, "dtype": torch.float64, "device": source.device}
    queries = 0.7 + torch.randn(*shape, 6, 4, **options).exp()
    keys = torch.randn(*shape, 9, 4, **options).cumsum(-1) - 0.4
    found = score_decomposition(queries, keys)
    scores = (queries[..., :, None, :] * keys[..., None, :, :]).sum(-1)  # (..., 6, 9)
    torch.testing.assert_close(found.total, scores.flatten(-2).var(-1, correction=0))
    torch.testing.assert_close(found.query_mean, scores.mean(-2).var(-1, correction=0))
    torch.testing.assert_close(found.key_mean, scores.mean(-1).var(-1, correction=0))
    inside = scores - scores.mean(-1, keepdim=True) - scores.mean(-2, keepdim=True) + scores.mean((-1, -2), True)
    torch.testing.assert_close(found.covariances, inside.square().mean((-1, -2)))
    assert found.total.shape == shape


# The softmax


def test_the_jacobian_is_the_derivative_of_the_softmax():
    scores = torch.tensor([0.3, -1.2, 0.8, 2.0], dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda x: x.softmax(0))(scores)
    assert softmax_jacobian_norm(scores.softmax(0)) == pytest.approx(torch.linalg.matrix_norm(jacobian, 2).item())


def test_two_equal_weights_have_the_largest_jacobian_and_uniform_ones_one_over_n():
    for n in (2, 3, 8):
        uniform = torch.full((n,), 1 / n, dtype=torch.float64)
        assert softmax_jacobian_norm(uniform) == pytest.approx(1 / n)
    weights = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    assert softmax_jacobian_norm(weights).tolist() == pytest.approx([0.5, 0.0])


def test_two_keys_in_the_plane_have_laplacian_differences():
    """|q| u is Laplacian for d = 2, so that mean and median are elementary."""
    for factor in (1.0, 1 / math.sqrt(2), 0.3):
        c = math.sqrt(2) * factor
        density = lambda x: math.exp(-x / c) / c / (2 * math.cosh(x / 2) ** 2)  # noqa: B023, E731
        assert mean_jacobian_norm(2, factor) == pytest.approx(integrate.quad(density, 0, 200)[0], rel=1e-8)
        middle = c * math.log(2)
        assert median_jacobian_norm(2, factor) == pytest.approx(1 / (2 * math.cosh(middle / 2) ** 2), rel=1e-7)
    assert mean_jacobian_norm(2, 1 / math.sqrt(2)) == pytest.approx(2 * math.log(2) - 1)
    assert median_jacobian_norm(2, 1 / math.sqrt(2)) == pytest.approx(4 / 9)


def of_two_keys(dimension, factor):
    """Mean and distribution function of the difference's size, by SciPy over length and normal variable."""
    law = stats.chi(dimension)

    def norm_at(length):
        spread = math.sqrt(2) * factor * length
        norm = lambda x: stats.norm.pdf(x, scale=spread) / (2 * math.cosh(x / 2) ** 2)  # noqa: E731
        return 2 * integrate.quad(norm, 0, min(80.0, 12 * spread), epsabs=1e-10, limit=200)[0]

    low, high = max(0.0, math.sqrt(dimension) - 8), math.sqrt(dimension) + 8
    mean = integrate.quad(lambda r: norm_at(r) * law.pdf(r), low, high, epsabs=1e-9)[0]
    inside = lambda size: integrate.quad(  # noqa: E731
        lambda r: (2 * stats.norm.cdf(size / (math.sqrt(2) * factor * r)) - 1) * law.pdf(r), low, high, epsabs=1e-9
    )[0]
    return mean, inside


@pytest.mark.parametrize(("dimension", "factor"), [(1, 1.0), (40, 1.0), (300, 0.2)])
def test_mean_and_median_of_two_keys_by_quadrature(dimension, factor):
    mean, inside = of_two_keys(dimension, factor)
    assert mean_jacobian_norm(dimension, factor) == pytest.approx(mean, rel=1e-6)
    median = median_jacobian_norm(dimension, factor)
    size = 2 * math.acosh(math.sqrt(1 / (2 * median)))
    assert inside(size) == pytest.approx(0.5, abs=1e-6)


def test_without_a_factor_the_factor_is_one():
    assert mean_jacobian_norm(7) == mean_jacobian_norm(7, 1.0) != mean_jacobian_norm(7, 0.9)
    assert median_jacobian_norm(7) == median_jacobian_norm(7, 1.0) != median_jacobian_norm(7, 0.9)


def test_the_mean_falls_like_one_over_the_root_and_the_median_like_nothing():
    assert mean_jacobian_norm(10_000) * math.sqrt(10_000 * math.pi) == pytest.approx(1, abs=1e-3)
    assert median_jacobian_norm(10_000) < 1e-30


@pytest.mark.parametrize("variance", [0.04, 0.2499, 0.2501, 0.9, 4.0, 30.0])
def test_participation_of_two_keys_by_quadrature(variance):
    """With a difference x of two scores, Σs² = (1 + tanh²(x/2)) / 2."""
    spread = math.sqrt(2 * variance)
    by_scipy = (
        2
        * integrate.quad(
            lambda x: stats.norm.pdf(x, scale=spread) * (1 + math.tanh(x / 2) ** 2) / 2, 0, 12 * spread, epsabs=1e-12
        )[0]
    )
    assert participation(2, variance) == pytest.approx(by_scipy, rel=1e-9)


@pytest.mark.parametrize(("n_keys", "variance"), [(3, 0.16), (3, 2.0), (4, 0.26), (4, 9.0)])
def test_participation_of_few_keys_by_gauss_hermite(n_keys, variance):
    nodes, weights = special.roots_hermitenorm(60 if n_keys == 3 else 36)
    weights = weights / weights.sum()
    scores = np.stack(np.meshgrid(*[math.sqrt(variance) * nodes] * n_keys), axis=-1)
    mass = np.prod(np.stack(np.meshgrid(*[weights] * n_keys), axis=-1), axis=-1)
    found = (mass * (special.softmax(scores, axis=-1) ** 2).sum(-1)).sum()
    assert participation(n_keys, variance) == pytest.approx(found, rel=2e-3 if variance > 1 else 1e-7)


def test_participation_of_many_keys_by_simulation():
    source = rng("test.attention_scaling.participation")
    for n_keys, variance in ((16, 1.7), (40, 25.0)):
        weights = special.softmax(math.sqrt(variance) * source.standard_normal((60_000, n_keys)), axis=1)
        assert_means((weights**2).sum(1), participation(n_keys, variance))


def test_participation_has_its_ends():
    assert participation(7, 0.0) == pytest.approx(1 / 7, rel=1e-12)
    assert participation(1, 3.0) == pytest.approx(1, rel=1e-12)
    assert participation(9, 1e4) == pytest.approx(1, abs=0.05)
    assert participation(5, 0.25) == pytest.approx(participation(5, 0.25 + 1e-12), rel=1e-10)


def test_the_limit_of_frozen_attention():
    assert frozen_participation(16, 8 * math.log(16)) == pytest.approx(0.5)
    assert frozen_participation(16, 2.01 * math.log(16)) > 0
    assert frozen_participation(16, 1.99 * math.log(16)) == 0
    n = 10**12  # the limit is slow: 1/ln n
    assert participation(n, 8 * math.log(n)) == pytest.approx(0.5, abs=0.03)


# Samplers


def test_cosines_are_those_of_the_same_draws():
    found = sample_cosines(7, 3, generator=generator("test.attention_scaling.cosines"))
    source = generator("test.attention_scaling.cosines")
    first, second = torch.randn(2, 7, 3, generator=source, dtype=torch.float64, device=source.device)
    for value, q, k in zip(found, first, second, strict=True):
        assert value.item() == pytest.approx(float(q @ k / (q.norm() * k.norm())))


def test_cosines_have_their_law():
    found = sample_cosines(400_000, 5, generator=generator("test.attention_scaling.cosines.law"))
    assert_means(found, 0.0)
    assert_means(found.square(), 1 / 5)
    for cosine in (-0.5, 0.2):  # a smallest detectable error of 1 %
        assert_share(found < cosine, float(cosine_cdf(cosine, 5)))


@pytest.mark.parametrize("max_numbers", [1, 24, 30, 10_000])
def test_scores_are_those_of_the_same_draws(max_numbers):
    found = sample_scores(5, 4, 3, generator=generator("test.attention_scaling.scores"), max_numbers=max_numbers)
    source = generator("test.attention_scaling.scores")
    options = {"generator": source, "dtype": torch.float64, "device": source.device}
    size = max(1, max_numbers // 12)
    rows = []
    for start in range(0, 5, size):
        n = min(size, 5 - start)
        queries, keys = torch.randn(n, 3, 1, **options), torch.randn(n, 4, 3, **options)
        rows += [[float((q[:, 0] * k).sum()) for k in of_query] for q, of_query in zip(queries, keys, strict=True)]
    np.testing.assert_allclose(found.cpu(), rows, rtol=1e-12)


def test_scores_have_their_law():
    found = sample_scores(400_000, 2, 4, generator=generator("test.attention_scaling.scores.law"))
    assert_means(found, 0.0)
    assert_means(found.square(), dot_product_variance(4))
    assert_means(found.prod(1), 0.0)
    # Both products have one query, so that their sizes are correlated: E|q|² · 2/π.
    assert_means(found.abs().prod(1), 8 / math.pi)
    kurtosis = moments(found[:, 0]).excess_kurtosis
    assert abs(kurtosis.z(6 / 4)) < 5


def test_samplers_are_double_unless_told():
    source = generator("test.attention_scaling.dtype")
    assert sample_cosines(2, 2, generator=source).dtype == torch.float64
    assert sample_scores(2, 2, 2, generator=source).dtype == torch.float64
    assert sample_cosines(2, 2, generator=source, dtype=torch.float32).dtype == torch.float32
    assert sample_scores(2, 2, 2, generator=source, dtype=torch.float32).dtype == torch.float32


# What PyTorch draws


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_draw_what_the_chapter_says(bias):
    with seeded("test.attention_scaling.linear"):
        layers = [nn.Linear(64, 400, bias=bias) for _ in range(20)]
    weights = torch.cat([layer.weight.flatten() for layer in layers]).detach()
    assert_means(weights.square(), 1 / (3 * 64))
    if bias:
        assert_means(torch.cat([layer.bias for layer in layers]).detach().square(), 1 / (3 * 64))


# Refusals


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (lambda: cosine_variance(0), "dimension must be at least 1, got 0"),
        (lambda: cosine_cdf(1.2, 3), "cosine must lie in [-1, 1], got 1.2"),
        (lambda: cosine_cdf(0.2, 1), "dimension must be at least 2, got 1"),
        (lambda: cosine_tail(-0.1, 3), "limit must lie in [0, 1], got -0.1"),
        (lambda: cosine_tail(0.1, 1), "dimension must be at least 2, got 1"),
        (lambda: cosine_tail_bound(1.1, 3), "limit must lie in [0, 1], got 1.1"),
        (lambda: cosine_tail_bound(0.1, 0), "dimension must be at least 1, got 0"),
        (lambda: nearly_orthogonal_count(8, 0.0), "limit must lie in (0, 1), got 0.0"),
        (lambda: nearly_orthogonal_count(8, 0.5, 1.0), "probability must lie in (0, 1), got 1.0"),
        (lambda: norm_mean(0), "dimension must be at least 1, got 0"),
        (lambda: norm_variance(0), "dimension must be at least 1, got 0"),
        (lambda: dot_product_variance(0), "dimension must be at least 1, got 0"),
        (lambda: dot_product_variance(3, -1.0), "query_variance must not be negative, got -1.0"),
        (lambda: initial_score_variance(-1.0, 3, 1.0, 3), "query_weight_variance must not be negative, got -1.0"),
        (lambda: initial_score_variance(1.0, 0, 1.0, 3), "query_width must be at least 1, got 0"),
        (lambda: initial_score_variance(1.0, 3, 1.0, 3, -1.0), "query_bias_variance must not be negative, got -1.0"),
        (lambda: mean_jacobian_norm(0), "dimension must be at least 1, got 0"),
        (lambda: median_jacobian_norm(3, 0.0), "factor must be positive and finite, got 0.0"),
        (lambda: participation(0, 1.0), "n_keys must be at least 1, got 0"),
        (lambda: participation(3, -1.0), "variance must not be negative, got -1.0"),
        (lambda: frozen_participation(3, 0.0), "variance must be positive and finite, got 0.0"),
        (lambda: softmax_jacobian_norm(torch.ones(2, 0)), "weights must have shape (..., n) with n at least 1"),
        (lambda: score_decomposition(torch.ones(2, 3), torch.ones(2, 4)), "got (2, 3) and (2, 4)"),
        (lambda: score_decomposition(torch.ones(0, 3), torch.ones(2, 3)), "there must be a query and a key, got 0"),
        (lambda: sample_cosines(0, 3, generator=torch.Generator()), "n_samples must be at least 1, got 0"),
        (lambda: sample_scores(3, 0, 3, generator=torch.Generator()), "n_keys must be at least 1, got 0"),
    ],
)
def test_what_is_impossible_is_refused(call, rule):
    with pytest.raises(ValueError, match=re.escape(rule)):
        call()
