"""Expectations under normal laws, against SciPy's adaptive quadrature."""

import itertools
import math
import re

import pytest
import torch
from scipy import integrate, stats
from torch.nn import functional as F

from helpers.lab import runtime
from helpers.lab.gaussian import expectation, product_expectation, second_moment, slope_moment


def normal_mean(function, *, breaks=(0,)):
    """Return the mean of a function of a standard normal variable, by adaptive quadrature."""
    ends = [-12, *breaks, 12]
    parts = [
        integrate.quad(lambda z: function(z) * stats.norm._pdf(z), *pair, epsabs=1e-13, epsrel=1e-12)[0]
        for pair in itertools.pairwise(ends)
    ]
    return sum(parts)


def leaky_relu(z):
    return F.leaky_relu(z, 0.2)


def identity(z):
    return z


def smooth_gelu(z):
    return z / 2 * (1 + math.erf(z / math.sqrt(2)))


def slope_of_gelu(z):
    return (1 + math.erf(z / math.sqrt(2))) / 2 + z * math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)


# Each activation, and for SciPy the same and its derivative.
PLAIN = {
    torch.relu: (lambda z: max(z, 0.0), lambda z: float(z > 0)),
    torch.tanh: (math.tanh, lambda z: 1 / math.cosh(z) ** 2),
    F.gelu: (smooth_gelu, slope_of_gelu),
    leaky_relu: (lambda z: max(z, 0.2 * z), lambda z: 1.0 if z > 0 else 0.2),
    identity: (lambda z: z, lambda z: 1.0),
    torch.erf: (math.erf, lambda z: 2 / math.sqrt(math.pi) * math.exp(-(z**2))),
}
each_activation = pytest.mark.parametrize("activation", PLAIN, ids=lambda f: f.__name__)


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
        (lambda: slope_moment(torch.tanh, 1.0, 1.1), "correlation must lie between -1 and 1, got 1.1"),
        (lambda: product_expectation(torch.tanh, -1.0, 0.5), "variance must not be negative, got -1.0"),
        (lambda: product_expectation(torch.tanh, 1.0, -1.1), "correlation must lie between -1 and 1, got -1.1"),
    ],
)
def test_expectations_refuse_what_is_impossible(call, rule):
    with pytest.raises(ValueError, match=f"^{re.escape(rule)}$"):
        call()
