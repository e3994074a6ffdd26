"""Activations and what SciPy needs of them, and means under the normal law by its adaptive quadrature."""

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from scipy import integrate, stats
from torch.nn import functional as F


def normal_mean(function: Callable[[float], float], *, breaks: Sequence[float] = (0,)) -> float:
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
