"""Expectations under normal laws, against SciPy's adaptive quadrature, closed forms and probabilities."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import nn

from helpers.lab import runtime
from helpers.lab.gaussian import expectation, mean_slopes, product_expectation, second_moment, slope_moment
from tests.activations import PLAIN, each_activation, normal_mean


@each_activation
@pytest.mark.parametrize("variance", [0.0, 0.01, 1.0, 9.0])
def test_second_moment_equals_adaptive_quadrature(activation, variance):
    plain, _ = PLAIN[activation]
    expected = normal_mean(lambda z: plain(math.sqrt(variance) * z) ** 2)
    assert second_moment(activation, variance) == pytest.approx(expected, rel=1e-10)


@each_activation
@pytest.mark.parametrize("variance", [0.01, 1.0, 9.0])
def test_slope_moment_equals_adaptive_quadrature(activation, variance):
    _, slope = PLAIN[activation]
    expected = normal_mean(lambda z: slope(math.sqrt(variance) * z) ** 2)
    assert slope_moment(activation, variance) == pytest.approx(expected, rel=1e-10)


@each_activation
@pytest.mark.parametrize("variance", [0.01, 1.0, 9.0])
def test_mean_slopes_of_continuous_functions_are_the_same_twice(activation, variance):
    _, slope = PLAIN[activation]
    std = math.sqrt(variance)
    expected = normal_mean(lambda z: slope(std * (z + 0.37)), breaks=(-0.37,))
    assert mean_slopes(activation, variance) == pytest.approx((expected, expected), rel=1e-10)


def test_mean_slope_by_values_counts_jumps():
    by_values, by_autograd = mean_slopes(lambda z: 3 * torch.sign(z - 0.5) + z, 4.0)
    # A jump of 6 at z = 0.5, where z ~ N(0.74, 4).
    assert by_values == pytest.approx(1 + 6 * stats.norm.pdf(0.5, loc=0.74, scale=2), rel=1e-10)
    assert by_autograd == pytest.approx(1, rel=1e-12)


def test_powers_have_the_moments_of_normal_variables():
    assert expectation(torch.ones_like, 2.3) == pytest.approx(1, rel=1e-12)
    assert expectation(lambda z: z**4, 2.3) == pytest.approx(3 * 2.3**2, rel=1e-12)
    assert product_expectation(lambda z: z, 2.3, -0.4) == pytest.approx(-0.4 * 2.3, rel=1e-12)
    # Isserlis: E[z²z'²] = v² (1 + 2c²).
    assert product_expectation(torch.square, 2.3, 0.4) == pytest.approx(2.3**2 * 1.32, rel=1e-12)
    assert slope_moment(torch.square, 2.3, 0.4) == pytest.approx(4 * 0.4 * 2.3, rel=1e-12)


def test_quadrature_stays_on_the_cpu_wherever_the_book_computes(monkeypatch):
    monkeypatch.setattr(runtime, "device", lambda: torch.device("meta"))
    assert second_moment(torch.relu, 3.0) == pytest.approx(1.5, rel=1e-12)
    assert slope_moment(torch.relu, 3.0, 0.0) == pytest.approx(0.25, rel=1e-12)


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (lambda: expectation(torch.tanh, -1.0), "variance must not be negative, got -1.0"),
        (lambda: second_moment(torch.tanh, math.nan), "variance must not be negative, got nan"),
        (lambda: slope_moment(torch.tanh, -1.0), "variance must not be negative, got -1.0"),
        (
            lambda: slope_moment(lambda z: (z > 0).double(), 1.0),
            "the activation must be differentiable by autograd, got one without a derivative",
        ),
        (lambda: slope_moment(torch.tanh, 1.0, 1.1), "correlation must lie between -1 and 1, got 1.1"),
        (lambda: product_expectation(torch.tanh, -1.0, 0.5), "variance must not be negative, got -1.0"),
        (lambda: product_expectation(torch.tanh, 1.0, -1.1), "correlation must lie between -1 and 1, got -1.1"),
    ],
)
def test_expectations_refuse_what_is_impossible(call, rule):
    with pytest.raises(ValueError, match=f"^{re.escape(rule)}$"):
        call()


# Kinks away from 0

# PyTorch rounds two constants of derivatives to single precision, also for tensors in double precision: the 1/6 of
# hardsigmoid, whose squared slope is 6e-8 too large, and the alpha of celu. SciPy is given the same two numbers.
SIXTH, ALPHA = float(np.float32(1 / 6)), float(np.float32(0.7))

KINKED = {
    nn.Hardtanh(): (lambda z: min(max(z, -1), 1), lambda z: float(-1 < z < 1), (-1, 1)),
    nn.ReLU6(): (lambda z: min(max(z, 0), 6), lambda z: float(0 < z < 6), (0, 6)),
    nn.Hardshrink(0.5): (lambda z: z * (abs(z) > 0.5), lambda z: float(abs(z) > 0.5), (-0.5, 0.5)),
    nn.Softshrink(0.3): (
        lambda z: math.copysign(max(abs(z) - 0.3, 0), z),
        lambda z: float(abs(z) > 0.3),
        (-0.3, 0.3),
    ),
    nn.Threshold(0.1, 2.0): (lambda z: z if z > 0.1 else 2.0, lambda z: float(z > 0.1), (0.1,)),
    nn.Hardsigmoid(): (lambda z: min(max(z / 6 + 0.5, 0), 1), lambda z: (abs(z) < 3) * SIXTH, (-3, 3)),
    nn.Hardswish(): (
        lambda z: z * min(max(z / 6 + 0.5, 0), 1),
        lambda z: 0.0 if z < -3 else 1.0 if z > 3 else z / 3 + 0.5,
        (-3, 3),
    ),
    nn.CELU(0.7): (
        lambda z: z if z > 0 else 0.7 * math.expm1(z / 0.7),
        lambda z: 1.0 if z > 0 else 0.7 / ALPHA * math.exp(z / ALPHA),
        (0,),
    ),
    nn.PReLU(init=0.25): (lambda z: z if z > 0 else 0.25 * z, lambda z: 1.0 if z > 0 else 0.25, (0,)),
}
each_kinked = pytest.mark.parametrize("activation", KINKED, ids=str)


@each_kinked
@pytest.mark.parametrize("variance", [0.09, 1.0, 17.0])
def test_kinks_are_found_wherever_they_are(activation, variance):
    plain, slope, kinks = KINKED[activation]
    std = math.sqrt(variance)
    breaks = sorted({kink / std for kink in kinks if abs(kink) < 11 * std})
    second = normal_mean(lambda z: plain(std * z) ** 2, breaks=breaks)
    squared_slope = normal_mean(lambda z: slope(std * z) ** 2, breaks=breaks)
    assert second_moment(activation, variance) == pytest.approx(second, rel=1e-9)
    assert slope_moment(activation, variance) == pytest.approx(squared_slope, rel=1e-9, abs=1e-15)


def test_single_precision_in_derivatives_of_torch_costs_less_than_seven_digits():
    # Without the kink at ±3, E[φ'²] of hardsigmoid is 1/36, and of celu (z < 0) that of exp(z/α).
    assert 5.9e-8 < slope_moment(nn.Hardsigmoid(), 0.04) * 36 - 1 < 6.0e-8
    exact = 0.5 + normal_mean(lambda z: (z < 0) * math.exp(2 * z / 0.7))
    assert abs(slope_moment(nn.CELU(0.7), 1.0) / exact - 1) < 2e-8


def test_slope_of_a_hard_tanh_is_the_error_function():
    assert slope_moment(nn.Hardtanh(), 1.0) == pytest.approx(math.erf(1 / math.sqrt(2)), rel=1e-13)
    assert slope_moment(nn.Hardtanh(-0.3, 2.0), 4.0) == pytest.approx(
        stats.norm.cdf(1) - stats.norm.cdf(-0.15), rel=1e-12
    )


@pytest.mark.parametrize("kink", [-4.3, -1.0, -1e-6, 1e-3, 0.5, 0.739, 1.0, 2.0, 3.7])
def test_a_jump_of_a_function_of_ones_own_is_found(kink):
    assert expectation(lambda z: (z > kink).double(), 1.0) == pytest.approx(stats.norm.sf(kink), abs=1e-12)


def both_within(low, high, correlation):
    """Return P(low < x, y < high) of two standard normal variables, by one integral over x."""
    rest = math.sqrt(1 - correlation**2)

    def given(x):
        return stats.norm.cdf((high - correlation * x) / rest) - stats.norm.cdf((low - correlation * x) / rest)

    ends = sorted({low, high, *np.clip([low / correlation, high / correlation, 0.0], low, high)})
    parts = [
        integrate.quad(lambda x: given(x) * stats.norm.pdf(x), *pair, epsabs=1e-12, limit=400)[0]
        for pair in itertools.pairwise(ends)
    ]
    return sum(parts)


@pytest.mark.parametrize("correlation", [-0.97, -0.3, 0.05, 0.6, 0.99])
@pytest.mark.parametrize(("low", "high", "variance"), [(-1.0, 1.0, 1.0), (-0.4, 1.5, 2.3), (0.2, 1.0, 0.8)])
def test_slopes_at_two_variables_equal_the_probability_of_a_square(low, high, variance, correlation):
    expected = both_within(low / math.sqrt(variance), high / math.sqrt(variance), correlation)
    assert slope_moment(nn.Hardtanh(low, high), variance, correlation) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("correlation", [-0.999, -0.2, 0.0, 0.7, 1 - 1e-9])
def test_signs_follow_the_arcsine_law(correlation):
    expected = 2 / math.pi * math.asin(correlation)
    assert product_expectation(torch.sign, 2.3, correlation) == pytest.approx(expected, abs=1e-11)


def scaled(low, high):
    nodes, weights = np.polynomial.legendre.leggauss(40)
    return low + (nodes + 1) * (high - low) / 2, weights * (high - low) / 2


@pytest.mark.parametrize("correlation", [-0.7, 0.4, 0.95])
@pytest.mark.parametrize("activation", [nn.Hardtanh(), nn.Softshrink(0.3), nn.Hardswish()], ids=str)
def test_products_of_kinked_functions_equal_adaptive_quadrature(activation, correlation):
    plain, _, kinks = KINKED[next(known for known in KINKED if str(known) == str(activation))]
    rest = math.sqrt(1 - correlation**2)

    def given(x):
        inner = [(kink - correlation * x) / rest for kink in kinks]
        ends = [-9, *sorted(y for y in inner if -9 < y < 9), 9]
        value = sum(
            np.dot(w, [plain(correlation * x + rest * y) * stats.norm._pdf(y) for y in at])
            for at, w in (scaled(*pair) for pair in itertools.pairwise(ends))
        )
        return value * plain(x) * stats.norm._pdf(x)

    ends = [-9, *kinks, 9]
    expected = sum(integrate.quad(given, *pair, epsabs=1e-8)[0] for pair in itertools.pairwise(ends))
    assert product_expectation(activation, 1.0, correlation) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("variance", [1e-12, 1e4, 1e10])
def test_extreme_variances_are_resolved(variance):
    # Stein's lemma for erf: E[erf(z)²] = (2/π) asin(2v / (1 + 2v)).
    expected = 2 / math.pi * math.asin(2 * variance / (1 + 2 * variance))
    assert second_moment(torch.erf, variance) == pytest.approx(expected, rel=1e-10)
    product = 2 / math.pi * math.asin(2 * variance * 0.3 / (1 + 2 * variance))
    assert product_expectation(torch.erf, variance, 0.3) == pytest.approx(product, rel=1e-9)
    slope = 4 / math.pi / math.sqrt((1 + 2 * variance) ** 2 - (2 * variance * 0.3) ** 2)
    assert slope_moment(torch.erf, variance, 0.3) == pytest.approx(slope, rel=1e-6)


def test_a_narrow_spike_is_seen_where_a_breakpoint_names_it():
    def spike(z):
        return torch.exp(-(((z - 1.7) / 1e-5) ** 2))

    expected = 1e-5 * math.sqrt(math.pi) * stats.norm.pdf(1.7)
    assert expectation(spike, 1.0) < 0.5 * expected
    assert expectation(spike, 1.0, breakpoints=[1.7]) == pytest.approx(expected, rel=1e-6)


def test_modules_in_single_precision_on_any_mode_are_left_alone():
    activation = nn.PReLU(init=0.3)
    with torch.inference_mode():
        assert slope_moment(activation, 2.0) == pytest.approx((1 + np.float32(0.3) ** 2) / 2, rel=1e-7)
    assert activation.weight.dtype is torch.float32
    assert activation.weight.grad is None


def test_an_activation_that_gives_its_own_parameter_has_no_slope():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.level = nn.Parameter(torch.tensor(2.0))

        def forward(self, z):
            return self.level.expand_as(z)

    assert slope_moment(Constant(), 2.0) == 0
    assert second_moment(Constant(), 2.0) == pytest.approx(4, rel=1e-12)


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (torch.exp, "the density must damp the function, got one that grows too fast for variance 50.0"),
        (lambda z: torch.exp(-z), "the density must damp the function, got one that grows too fast for variance 50.0"),
        (torch.log, "the function must be finite, got nan"),
        (
            lambda z: torch.sin(1e9 * z).sign(),
            "the function must be smooth but for a few kinks, got one that thousands of panels miss",
        ),
    ],
)
def test_functions_that_quadrature_cannot_take_are_refused(function, rule):
    with pytest.raises(ValueError, match=f"^{re.escape(rule)}$"):
        expectation(function, 50.0)
