"""Expectations under normal laws: of any function of one variable, and of products over two correlated ones.

They are numbers, found by quadrature in float64 on the CPU, wherever the book's simulations run.
"""

import functools
import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch

from helpers.lab.checks import require_not_negative

Activation = Callable[[torch.Tensor], torch.Tensor]

# Quadrature for normal variables: beyond this radius nothing is left of their density.
RADIUS = 10.0
POINTS = 96


def expectation(function: Activation, variance: float) -> float:
    """Return ``E[f(z)]`` for z ~ N(0, v).

    Parameters
    ----------
    function : callable
        Acts on tensors entry by entry, such as ``torch.tanh``; smooth, but for a kink at 0.
    variance : float
        v.

    Raises
    ------
    ValueError
        If `variance` is negative.
    """
    z, weights = _normal_nodes(variance)
    return (weights @ function(z)).item()


def product_expectation(function: Activation, variance: float, correlation: float) -> float:
    """Return ``E[f(z) f(z')]`` for jointly normal z, z' with variance v and correlation c.

    Parameters
    ----------
    function, variance
        As in :func:`expectation`.
    correlation : float
        c.

    Raises
    ------
    ValueError
        If `variance` is negative, or the correlation not between -1 and 1.
    """
    pair, weights = _normal_pair_nodes(variance, correlation)
    return (weights * function(pair).prod(0)).sum().item()


def second_moment(activation: Activation, variance: float) -> float:
    """Return ``E[φ(z)²]`` for z ~ N(0, v); arguments and errors are those of :func:`expectation`."""
    return expectation(lambda z: activation(z).square(), variance)


def slope_moment(activation: Activation, variance: float, correlation: float = 1.0) -> float:
    """Return ``E[φ'(z) φ'(z')]`` for jointly normal z, z' with variance v and correlation c, by default ``E[φ'(z)²]``.

    Parameters
    ----------
    activation, variance, correlation
        As in :func:`product_expectation`.

    Raises
    ------
    ValueError
        If `variance` is negative, or the correlation not between -1 and 1.
    """
    if correlation == 1:
        return expectation(lambda z: _derivative(activation, z).square(), variance)
    return product_expectation(lambda z: _derivative(activation, z), variance, correlation)


_gauss_legendre = functools.cache(np.polynomial.legendre.leggauss)


def _legendre(low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    nodes, weights = _gauss_legendre(POINTS)
    return low + (nodes + 1) * (high - low) / 2, weights * (high - low) / 2


def _normal_nodes(variance: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return nodes and weights for the mean over N(0, variance), each side of 0 apart: a kink there does no harm."""
    require_not_negative(variance=variance)
    r, weights = _legendre(0.0, RADIUS)
    weights = weights * np.exp(-(r**2) / 2) / math.sqrt(2 * math.pi)
    z = math.sqrt(variance) * np.concatenate([-r, r])
    return _tensor(z), _tensor(np.concatenate([weights, weights]))


def _normal_pair_nodes(variance: float, correlation: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return nodes (2, points) and weights for the mean over two normal variables with one variance.

    In polar coordinates, since the lines on which one of the two is 0, where a kink may be, are rays then.
    """
    require_not_negative(variance=variance)
    if not -1 <= correlation <= 1:
        raise ValueError(f"correlation must lie between -1 and 1, got {correlation}")
    between = math.acos(correlation)
    ends = [-math.pi / 2, between - math.pi / 2, math.pi / 2, between + math.pi / 2, 3 * math.pi / 2]
    sectors = [_legendre(low, high) for low, high in pairwise(ends)]
    angle, of_angle = (np.concatenate(parts) for parts in zip(*sectors, strict=True))
    r, of_r = _legendre(0.0, RADIUS)
    of_r = of_r * r * np.exp(-(r**2) / 2) / (2 * math.pi)
    directions = np.stack([np.cos(angle), np.cos(angle - between)])  # (2, angles)
    pair = math.sqrt(variance) * directions[:, None, :] * r[:, None]  # (2, radii, angles)
    return _tensor(pair), _tensor(of_r[:, None] * of_angle)


def _tensor(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(x, device="cpu")


def _derivative(activation: Activation, z: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        z = z.clone().requires_grad_()
        return torch.autograd.grad(activation(z.clone()).sum(), z, materialize_grads=True)[0]
