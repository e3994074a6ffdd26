"""Expectations under normal laws: of any function of one variable, and of products over two correlated ones.

They are numbers, found by quadrature in float64 on the CPU, wherever the book's simulations run. Panels are cut
until nothing changes, so that kinks and jumps of the function are found and do no harm, wherever they are. The time
goes into calls of the function, so that all panels of one round share a call; a smooth function needs two.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from helpers.lab.checks import require_not_negative

Activation = Callable[[torch.Tensor], torch.Tensor]
Integrand = Callable[[np.ndarray], np.ndarray]


def _lobatto(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the n nodes in [-1, 1], both ends among them, and weights of Lobatto's rule, exact up to degree 2n - 3."""
    legendre = np.polynomial.Legendre.basis(n - 1)
    nodes = np.array([-1.0, *legendre.deriv().roots(), 1.0])
    nodes = (nodes - nodes[::-1]) / 2  # symmetric to the last digit
    return nodes, 2 / (n * (n - 1) * legendre(nodes) ** 2)


# Only a rule with nodes at the ends of a panel notices a jump close to an end; at a known jump it must have none.
LOBATTO = _lobatto(16)
HIGHEST = np.polynomial.legendre.legvander(LOBATTO[0], 15)[:, -2:]
GAUSS = np.polynomial.legendre.leggauss(16)
# The nodes at the ends lie so far inside, as a part of the panel: a jump exactly at the end does no harm.
INSIDE = 1e-14

# Beyond this radius, in standard deviations, nothing is left of a normal density.
RADIUS = 10.0
# Panels begin at this multiple of 2^j: kinks at round numbers lie inside a panel, where they are noticed.
OFFSET = 0.739
STEP = 1.3

ACCURACY = 1e-6  # of the whole, for functions that compute in float32
ROUNDS = (2, 16) + (256,) * 7  # into how many parts panels are cut, one round after another
ROUNDS_OF_ANGLES = (2,) * 50  # where each node is a costly integral over radii
SMOOTH_AFTER = 2  # what needs more rounds than that has a kink
MAX_PANELS = 4096
MAX_DEGREE = 200  # of Hermite polynomials that the nodes resolve


def expectation(function: Activation, variance: float, *, breakpoints: Sequence[float] = ()) -> float:
    """Return ``E[f(z)]`` for z ~ N(0, v).

    Parameters
    ----------
    function : callable
        Acts on tensors entry by entry, such as ``torch.tanh``; kinks and jumps are found. A module is copied, to the
        CPU and to float64.
    variance : float
        v.
    breakpoints : sequence of float
        Values of z around which f has a feature of less than a hundredth of their size, such as a narrow spike, which
        no node might meet.

    Returns
    -------
    float
        With a relative error of about 1e-13 of E|f|, or that of f itself.

    Raises
    ------
    ValueError
        If `variance` is negative or not finite; if f is not finite, so rough that panels do not resolve it, or grows
        so fast that the density does not damp it.

    Examples
    --------
    >>> round(expectation(nn.ReLU6(), 4.0), 6)
    0.79712
    """
    require_not_negative(variance=variance)
    return _integrate(_one_normal(_prepared(function), variance), _radii(variance, breakpoints)).value


def product_expectation(
    function: Activation, variance: float, correlation: float, *, breakpoints: Sequence[float] = ()
) -> float:
    """Return ``E[f(z) f(z')]`` for jointly normal z, z' with variance v and correlation c.

    Parameters
    ----------
    function, variance, breakpoints
        As in :func:`expectation`.
    correlation : float
        c.

    Returns
    -------
    float
        With an error of about 1e-12 of E[f²].

    Raises
    ------
    ValueError
        As :func:`expectation`, or if the correlation is not between -1 and 1.
    """
    require_not_negative(variance=variance)
    if not -1 <= correlation <= 1:
        raise ValueError(f"correlation must lie between -1 and 1, got {correlation}")
    function = _prepared(function)
    if abs(correlation) == 1:
        return expectation(lambda z: function(z) * function(correlation * z), variance, breakpoints=breakpoints)
    mean = _integrate(_one_normal(function, variance), _radii(variance, breakpoints))
    value = _by_hermite_polynomials(function, variance, correlation, mean)
    if value is not None:
        return value
    kinks = np.concatenate([mean.kinks, _in_deviations(variance, breakpoints)])
    between = math.acos(correlation)
    integrand = _two_normals(function, variance, between, kinks)
    tolerance = 1e-12 if len(kinks) else 1e-14  # as exact as kinks are known
    edges = _angles(variance, between, kinks)
    return _integrate(integrand, edges, scale=mean.magnitude**2, tolerance=tolerance, rounds=ROUNDS_OF_ANGLES).value


def second_moment(activation: Activation, variance: float) -> float:
    """Return ``E[φ(z)²]`` for z ~ N(0, v); arguments and errors are those of :func:`expectation`.

    Examples
    --------
    >>> round(second_moment(torch.relu, 3.0), 6)
    1.5
    """
    activation = _prepared(activation)
    return expectation(lambda z: activation(z).square(), variance)


def slope_moment(activation: Activation, variance: float, correlation: float = 1.0) -> float:
    """Return ``E[φ'(z) φ'(z')]`` for jointly normal z, z' with variance v and correlation c, by default ``E[φ'(z)²]``.

    Parameters
    ----------
    activation, variance, correlation
        As in :func:`product_expectation`. Derivatives are those of autograd; a jump of φ adds nothing.

    Raises
    ------
    ValueError
        As :func:`product_expectation`, or if autograd has no derivative, as for a comparison.
    """
    activation = _prepared(activation)
    return product_expectation(lambda z: _derivative(activation, z), variance, correlation)


def mean_slopes(activation: Activation, variance: float) -> tuple[float, float]:
    """Return ``E[φ'(z)]`` twice, by the values of φ, as ``E[(z - s) φ(z)] / v``, and by autograd; z ~ N(s, v).

    They are the same if φ is continuous (Stein's rule). The first counts jumps too, and the mean s is not 0, so that
    those of opposite signs at both sides of 0 do not cancel.

    Parameters
    ----------
    activation, variance
        As in :func:`second_moment`; `variance` above 0.

    Raises
    ------
    ValueError
        As :func:`slope_moment`.

    Examples
    --------
    >>> by_values, by_autograd = mean_slopes(torch.sign, 1.0)
    >>> round(by_values, 3), by_autograd
    (0.745, 0.0)
    """
    activation = _prepared(activation)
    shift = 0.37 * math.sqrt(variance)
    by_values = expectation(lambda z: z * activation(z + shift), variance) / variance
    return by_values, expectation(lambda z: _derivative(activation, z + shift), variance)


def _prepared(function: Activation) -> Activation:
    """Return a function that computes where quadrature does, without touching the caller's module."""
    if isinstance(function, nn.Module):
        with torch.inference_mode(False):
            return copy.deepcopy(function).to("cpu", torch.float64)
    return function


def _derivative(activation: Activation, z: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        z = z.clone().requires_grad_()
        values = activation(z.clone())
        if not values.requires_grad:
            raise ValueError("the activation must be differentiable by autograd, got one without a derivative")
        return torch.autograd.grad(values.sum(), z, materialize_grads=True)[0]


class _Integral(NamedTuple):
    """An integral, that of the absolute value, and where the integrand has kinks.

    Between `edges`, among them the kinks, a rule of 16 nodes resolves the integrand.
    """

    value: float
    magnitude: float
    kinks: np.ndarray
    edges: np.ndarray


# One normal variable, and two: by polynomials, or in polar coordinates, in units of their standard deviation


def _one_normal(function: Activation, variance: float) -> Integrand:
    def integrand(r: np.ndarray) -> np.ndarray:
        return _values(function, math.sqrt(variance) * r) * np.exp(-(r**2) / 2) / math.sqrt(2 * math.pi)

    sizes = np.abs(integrand(np.linspace(-RADIUS, RADIUS, 41)))
    if max(sizes[0], sizes[-1]) > 1e-12 * sizes.max():
        raise ValueError(f"the density must damp the function, got one that grows too fast for variance {variance}")
    return integrand


def _by_hermite_polynomials(function: Activation, variance: float, correlation: float, mean: _Integral) -> float | None:
    """Return ``E[f(z) f(z')]`` by Mehler's formula, ``Σ_k c^k E[f(z) h_k(z/√v)]²``; None where the sum is too long.

    The h_k are Hermite polynomials, orthonormal under N(0, 1), and what is left of the sum is less than c^(k+1) times
    what is left of the one for c = 1, which is E[f²].
    """
    r, weights = (x.flatten() for x in _on_panels(GAUSS, mean.edges[:-1], mean.edges[1:]))
    root = np.sqrt(weights * np.exp(-(r**2) / 2) / math.sqrt(2 * math.pi))
    values = _values(function, math.sqrt(variance) * r) * root
    rest = second = values @ values
    before, polynomial = np.zeros_like(r), root  # h_0, h_1, … times the root of the density
    product, power = 0.0, 1.0
    for k in range(MAX_DEGREE):
        coefficient = polynomial @ values
        product += power * coefficient**2
        rest -= coefficient**2
        power *= correlation
        if abs(power * rest) <= 1e-15 * second:
            return float(product + power * rest)
        before, polynomial = polynomial, (r * polynomial - math.sqrt(k) * before) / math.sqrt(k + 1)
    return None


def _two_normals(function: Activation, variance: float, between: float, kinks: np.ndarray) -> Integrand:
    """Return the integral over radii as a function of the angle, each radius in pieces between the kinks on its way."""
    std, pieces = math.sqrt(variance), _dyadic(variance, RADIUS)

    def integrand(angle: np.ndarray) -> np.ndarray:
        directions = np.stack([np.cos(angle), np.cos(angle - between)])  # (2, ...)
        with np.errstate(divide="ignore"):
            hits = np.concatenate(list(kinks / directions[..., None]), axis=-1)  # (..., 2 kinks)
        fixed = np.broadcast_to(pieces, (*angle.shape, len(pieces)))
        edges = np.sort(np.concatenate([fixed, hits.clip(0, RADIUS)], axis=-1), axis=-1)
        r, weights = _on_panels(GAUSS, edges[..., :-1], edges[..., 1:])  # (..., pieces, nodes)
        pair = _values(function, std * directions[..., None, None] * r)
        return (pair.prod(0) * weights * r * np.exp(-(r**2) / 2)).sum((-2, -1)) / (2 * math.pi)

    return integrand


def _values(function: Activation, z: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        values = function(torch.tensor(z, device="cpu")).detach().cpu().numpy()
    if not np.isfinite(values).all():
        raise ValueError(f"the function must be finite, got {values[~np.isfinite(values)][0]}")
    return values


# Where panels begin


def _dyadic(variance: float, end: float) -> np.ndarray:
    """Return 0, then ends that double, up to `end`: activations change at scales of 1, or of z itself.

    Where the density changes faster, they advance by equal steps.
    """
    start = OFFSET / max(1.0, math.sqrt(variance))
    doubling = start * 2.0 ** np.arange(math.ceil(math.log2(STEP / start)) + 1)
    steps = np.arange(doubling[-1], end, STEP)
    return np.concatenate([[0.0], doubling[doubling < end], steps[1:], [end]])


def _in_deviations(variance: float, points: Sequence[float]) -> np.ndarray:
    return np.asarray(points, dtype=float) / math.sqrt(variance) if variance > 0 else np.empty(0)


def _radii(variance: float, breakpoints: Sequence[float]) -> np.ndarray:
    """Return ends of panels from -RADIUS to RADIUS; around each breakpoint they double too, as around 0."""
    around = np.append(0.0, 2.0 ** np.arange(-30, 0))
    points = _in_deviations(variance, breakpoints)[:, None]
    dyadic = _dyadic(variance, RADIUS)
    narrow = np.concatenate([points - np.abs(points) * around, points + np.abs(points) * around], axis=None)
    return np.unique(np.concatenate([-dyadic, dyadic, narrow]).clip(-RADIUS, RADIUS))


def _angles(variance: float, between: float, kinks: np.ndarray) -> np.ndarray:
    """Return ends of panels over one turn: the rays where z or z' is 0, finely around them, and where kinks cross."""
    rays = np.array([-math.pi / 2, between - math.pi / 2, math.pi / 2, between + math.pi / 2])
    near = _dyadic(variance, RADIUS)
    near = near[near < 0.5]
    fine = np.concatenate([rays[:, None] - near, rays[:, None] + near], axis=None)
    first, second = (x.flatten() for x in np.meshgrid(kinks, kinks))
    crossings = np.arctan2(second - first * math.cos(between), first * math.sin(between))
    angles = np.concatenate([rays, fine, crossings, crossings + math.pi])
    turn = np.mod(angles + math.pi / 2, 2 * math.pi) - math.pi / 2
    return np.unique(np.append(turn, [-math.pi / 2, 3 * math.pi / 2]))


# Adaptive quadrature


def _on_panels(rule: tuple[np.ndarray, np.ndarray], low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return nodes and weights of a rule on each panel, shape (..., nodes)."""
    nodes, weights = rule
    half = (high - low)[..., None] / 2
    return low[..., None] + half * (1 + nodes * (1 - INSIDE)), half * weights


def _integrate(
    integrand: Integrand,
    edges: np.ndarray,
    *,
    scale: float | None = None,
    tolerance: float = 1e-14,
    rounds: Sequence[int] = ROUNDS,
) -> _Integral:
    """Integrate over panels, each cut until its parts agree with it to within `tolerance`.

    It is in units of `scale`, the integral of the absolute value unless given.
    """
    ends = np.linspace(edges[:-1], edges[1:], rounds[0] + 1)
    whole, *parts = _measured(integrand, np.insert(ends[:-1], 0, ends[0], 0), np.insert(ends[1:], 0, ends[-1], 0))
    parts, magnitude = np.stack(parts), whole[:, 3].sum()
    limit = tolerance * (magnitude if scale is None else scale)
    value, kinked, resolved = 0.0, [], [edges]
    for number in range(len(rounds)):
        if number:
            ends = np.linspace(whole[:, 0], whole[:, 1], rounds[number] + 1)
            parts = _measured(integrand, ends[:-1], ends[1:])  # (parts, panels, 5)
        errors = np.abs(whole[:, 2] - parts[..., 2].sum(0))
        bad = errors > limit
        doubtful = bad & (parts[..., 4] > limit)
        value += parts[~doubtful, 2].sum()
        if number < SMOOTH_AFTER:
            resolved.append(ends[:, bad].flatten())
        else:
            kinked.append(np.stack([*whole[:, :2].T, errors])[:, bad | (number > SMOOTH_AFTER)])
        whole = parts[doubtful]
        if not len(whole) or len(whole) > MAX_PANELS:
            break
    if errors[bad].sum() > ACCURACY * limit / tolerance:
        raise ValueError("the function must be smooth but for a few kinks, got one that thousands of panels miss")
    kinks = _kinks(kinked)
    edges = np.unique(np.concatenate([*resolved, kinks]))
    return _Integral(float(value + whole[:, 2].sum()), float(magnitude), kinks, edges)


def _measured(integrand: Integrand, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return of each panel its ends, the integral, that of the absolute value, and how far to doubt it, (..., 5).

    Doubtful is what the two highest polynomials that the nodes can tell apart contribute: nearly nothing, if smooth.
    """
    nodes, weights = _on_panels(LOBATTO, low, high)
    values = integrand(nodes) * weights
    doubt = np.abs(values @ HIGHEST).max(-1)
    return np.stack([low, high, values.sum(-1), np.abs(values).sum(-1), doubt], axis=-1)


def _kinks(kinked: list[np.ndarray]) -> np.ndarray:
    """Return one point for each panel that was still rough after `SMOOTH_AFTER` rounds.

    Parameters
    ----------
    kinked : list of numpy.ndarray, shapes (3, panels)
        Ends of the panels of each round from then on, and their errors.

    Returns
    -------
    numpy.ndarray
        The middle of the worst among the smallest panels inside.
    """
    kinks = []
    for low, high in kinked[0][:2].T if kinked else ():
        inside = [ends[:, (ends[0] >= low) & (ends[1] <= high)] for ends in kinked]
        smallest = [ends for ends in inside if ends.size][-1]
        kinks.append(smallest[:2, smallest[2].argmax()].mean())
    return np.array(kinks)
