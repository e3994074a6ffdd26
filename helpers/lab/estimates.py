"""What a simulation knows: a value, its standard error, and how far the normal approximation can be trusted.

Every function takes samples along dimension 0, as a torch tensor on any device or a NumPy array, computes in float64
where the samples are, and returns an :class:`Estimate`. All standard errors come from influence values: the estimate
is, to first order, the mean of one number per sample.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

# A first-order standard error is refused unless the linear part of the estimate's variance is this many times the
# quadratic one. The ratio is n - 1 for the variance of normal samples. At a degenerate point, the variance of a fair
# coin, it is twice the square of a standard normal draw: it exceeds 50 with probability 6e-7.
LINEAR_OVER_QUADRATIC = 50


@dataclass(frozen=True, eq=False, repr=False)
class Estimate:
    """An estimated number, or array of numbers, with standard errors.

    It prints as value ± standard error, the latter with two digits if they are below 36 and else with one, the value
    to the same decimal: the rule of the Particle Data Group. Two estimates are equal if all their figures are.

    Parameters
    ----------
    value, stderr : array_like, shape (...)
        The estimate and its standard error, in the units of the quantity.
    n : array_like of int
        Number of independent samples behind each entry.
    skewness : array_like
        Skewness of the influence values. The estimate itself has skewness ``skewness / sqrt(n)``.

    Raises
    ------
    ValueError
        If a figure is NaN or infinite, a standard error negative, n below 2, or a shape does not fit `value`.

    Examples
    --------
    >>> Estimate(value=148.3, stderr=7.9, n=4000, skewness=0.1)
    148 ± 8 (n = 4,000)
    >>> Estimate(value=[0.1372, -2.5], stderr=[0.0123, 0.04], n=400, skewness=0.1)
    [0.137 ± 0.012, -2.50 ± 0.04] (n = 400)
    """

    value: np.ndarray
    stderr: np.ndarray
    n: np.ndarray
    skewness: np.ndarray

    def __post_init__(self) -> None:
        shape = np.shape(self.value)
        for name in ("value", "stderr", "n", "skewness"):
            figures = np.asarray(getattr(self, name), dtype=np.float64)
            if not np.isfinite(figures).all():
                raise ValueError(f"{name} must be finite, got {figures}")
            if figures.ndim and figures.shape != shape:
                raise ValueError(f"{name} must be a scalar or have the shape of value {shape}, got {figures.shape}")
            if figures.shape != shape:
                figures = np.broadcast_to(figures, shape)
            object.__setattr__(self, name, figures)
        if (self.stderr < 0).any():
            raise ValueError(f"stderr must not be negative, got {self.stderr}")
        if (self.n < 2).any():
            raise ValueError(f"n must be at least 2, got {self.n}")

    def __repr__(self) -> str:
        entries = [_rounded(*pair) for pair in zip(self.value.flat, self.stderr.flat, strict=True)]
        figures = np.array(entries, dtype=object).reshape(self.value.shape)
        shown = np.array2string(figures, separator=", ", threshold=12, formatter={"object": str})
        low, high = (f"{n:,.0f}" for n in (self.n.min(initial=math.inf), self.n.max(initial=0)))
        return f"{shown} (n = {low if low == high else f'{low} to {high}'})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and all(
            np.array_equal(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)
        )

    @property
    def asymmetry(self) -> np.ndarray:
        """Skewness of the estimate's own error, ``skewness / sqrt(n)``."""
        return self.skewness / np.sqrt(self.n)

    @staticmethod
    def natural_scale(formula: np.ndarray) -> np.ndarray:
        """What an error is a fraction of, unless a claim says otherwise: ``|formula|``."""
        return np.abs(formula)


class Proportion(Estimate):
    """An estimated probability; its errors are measured against ``min(p, 1 - p)``."""

    @property
    def successes(self) -> np.ndarray:
        """How often the event happened."""
        return np.rint(self.value * self.n)

    @staticmethod
    def natural_scale(formula: np.ndarray) -> np.ndarray:
        """What an error is a fraction of: ``min(p, 1 - p)``."""
        return np.minimum(formula, 1 - formula)


class Covariance(Estimate):
    """An estimated covariance matrix; errors of entry (i, j) are measured against ``sqrt(C_ii C_jj)``."""

    @staticmethod
    def natural_scale(formula: np.ndarray) -> np.ndarray:
        """What an error is a fraction of: ``sqrt(C_ii C_jj)``."""
        std = np.sqrt(np.diagonal(formula, axis1=-2, axis2=-1))
        return std[..., :, None] * std[..., None, :]


def mean(samples: torch.Tensor | np.ndarray) -> Estimate:
    """Estimate an expectation by the sample mean.

    Parameters
    ----------
    samples : shape (n, ...)
        Independent samples.

    Returns
    -------
    Estimate
        Of shape (...), with standard error ``s / sqrt(n)``, ``s²`` having divisor n - 1.

    Raises
    ------
    ValueError
        If a sample is NaN or infinite, or n is below 2.
    """
    samples = _as_samples(samples)
    value = samples.mean(0)
    return _from_influence(Estimate, value, samples - value)


def proportion(events: torch.Tensor | np.ndarray) -> Proportion:
    """Estimate probabilities by relative frequencies.

    Parameters
    ----------
    events : bool, shape (n, ...)
        Whether the event happened in each of n independent trials.

    Returns
    -------
    Proportion
        With standard error ``sqrt(p(1-p)/n)``; where the event happened never or always this is 0, which
        :func:`helpers.lab.claims.agree` refuses and :func:`helpers.lab.claims.bounded` does not need.

    Raises
    ------
    ValueError
        If `events` is not boolean, or n is below 2.
    """
    events = torch.as_tensor(events)
    if events.dtype != torch.bool:
        raise ValueError(f"events must be boolean, got {events.dtype}")
    n = _sample_size(events)
    p = events.sum(0, dtype=torch.float64).cpu().numpy() / n
    spread = np.sqrt(p * (1 - p))
    skewness = np.divide(1 - 2 * p, spread, out=np.zeros_like(p), where=spread > 0)
    return Proportion(p, spread / np.sqrt(n), n, skewness)


def variance(samples: torch.Tensor | np.ndarray) -> Estimate:
    """Estimate a variance, with the standard error that the fourth moment gives.

    Parameters
    ----------
    samples : shape (n, ...)
        Independent samples, of any distribution with a fourth moment.

    Returns
    -------
    Estimate
        The unbiased sample variance; its standard error is ``sqrt((m4 - (n-3)/(n-1) s⁴) / n)``.

    Raises
    ------
    ValueError
        If a sample is NaN or infinite, n is below 2, or the squared deviations hardly vary, as for a fair coin,
        where the estimate's error is not normal.
    """
    samples = _as_samples(samples)
    squares = (samples - samples.mean(0)).square()
    return _second_moments(Estimate, squares, quadratic=2 * squares.mean(0).square())


def covariance(samples: torch.Tensor | np.ndarray) -> Covariance:
    """Estimate a covariance matrix, with standard errors from the fourth moments.

    Parameters
    ----------
    samples : shape (n, d)
        Independent samples of a vector.

    Returns
    -------
    Covariance
        The unbiased sample covariance, shape (d, d).

    Raises
    ------
    ValueError
        If `samples` is not a matrix, a sample is NaN or infinite, n is below 2, or products hardly vary.
    """
    samples = _as_samples(samples)
    if samples.ndim != 2:
        raise ValueError(f"samples must have shape (n, d), got {tuple(samples.shape)}")
    centered = samples - samples.mean(0)
    products = centered[:, :, None] * centered[:, None, :]  # (n, d, d)
    c = products.mean(0)
    quadratic = c.diagonal()[:, None] * c.diagonal()[None, :] + c.square()
    return _second_moments(Covariance, products, quadratic)


def function_of(function: Callable[[torch.Tensor], torch.Tensor], samples: torch.Tensor | np.ndarray) -> Estimate:
    """Estimate a smooth function of expectations by the delta method.

    Parameters
    ----------
    function : callable
        Maps the k expectations, a float64 tensor of shape (k,), to a scalar or an array; differentiable by torch.
    samples : shape (n, k)
        Independent samples of the k quantities whose expectations `function` takes.

    Returns
    -------
    Estimate
        ``function(mean)``, whose influence values are ``gradient · (sample - mean)``.

    Raises
    ------
    ValueError
        If `samples` is not a matrix, a sample is NaN or infinite, n is below 2, or the gradient vanishes or is so
        small at the mean that curvature rules the error.
    """
    samples = _as_samples(samples)
    if samples.ndim != 2:
        raise ValueError(f"samples must have shape (n, k), got {tuple(samples.shape)}")
    center = samples.mean(0)
    value = function(center)
    gradient = torch.func.jacrev(function)(center)  # (..., k)
    hessian = torch.func.hessian(function)(center)  # (..., k, k)
    centered = samples - center
    influence = torch.tensordot(centered, gradient, dims=([1], [gradient.ndim - 1]))  # (n, ...)
    curvature = hessian @ (centered.T @ centered / len(samples))
    quadratic = (curvature @ curvature).diagonal(dim1=-2, dim2=-1).sum(-1) / 2
    _refuse_degenerate(influence.square().mean(0), quadratic, len(samples))
    return _from_influence(Estimate, value, influence)


def stack(estimates: Sequence[Estimate]) -> Estimate:
    """Stack estimates of one kind and shape along a new leading axis, one entry per setting."""
    kinds = {type(estimate) for estimate in estimates}
    if len(kinds) != 1:
        raise ValueError(f"estimates to stack must be of one kind, got {sorted(kind.__name__ for kind in kinds)}")
    shapes = {estimate.value.shape for estimate in estimates}
    if len(shapes) != 1:
        raise ValueError(f"estimates to stack must have one shape, got {sorted(shapes)}")
    return kinds.pop()(
        *(np.stack([getattr(estimate, field.name) for estimate in estimates]) for field in fields(Estimate))
    )


def _rounded(value: float, stderr: float) -> str:
    """Write value ± standard error with the digits that the standard error leaves, and a common power of ten."""
    if stderr == 0:
        return f"{value:g} ± 0"
    exponent = math.floor(math.log10(max(abs(value), stderr)))
    if not -5 < exponent < 6:
        return f"({_rounded(value / 10.0**exponent, stderr / 10.0**exponent)})e{exponent:+03d}"
    leading = math.floor(math.log10(stderr))
    decimals = (1 if stderr < 3.55 * 10.0**leading else 0) - leading
    figures = (round(figure, decimals) for figure in (value, stderr))
    return " ± ".join(f"{figure:,.{max(decimals, 0)}f}" for figure in figures)


def _as_samples(samples: torch.Tensor | np.ndarray) -> torch.Tensor:
    samples = torch.as_tensor(samples).to(torch.float64)
    _sample_size(samples)
    if not torch.isfinite(samples).all():
        raise ValueError(f"samples must be finite, got {int((~torch.isfinite(samples)).sum())} NaN or infinite values")
    return samples


def _sample_size(samples: torch.Tensor) -> int:
    if samples.ndim == 0 or len(samples) < 2:
        raise ValueError(f"dimension 0 must hold at least 2 samples, got shape {tuple(samples.shape)}")
    return len(samples)


def _from_influence(
    kind: type[Estimate], value: torch.Tensor, influence: torch.Tensor, variance: torch.Tensor | None = None
) -> Estimate:
    """Build an estimate from its centered influence values (n, ...); `variance` is that of the estimate, if known."""
    n = len(influence)
    second, third = influence.square().mean(0), influence.pow(3).mean(0)
    if variance is None:
        variance = second / (n - 1)
    skewness = torch.where(second > 0, third / second.pow(1.5), 0.0)
    return kind(*(figures.cpu().numpy() for figures in (value, variance.sqrt())), n, skewness.cpu().numpy())


def _second_moments(kind: type[Estimate], products: torch.Tensor, quadratic: torch.Tensor) -> Estimate:
    """Estimate second central moments from products of deviations (n, ...)."""
    n = len(products)
    biased = products.mean(0)
    influence = products - biased
    linear = influence.square().mean(0)
    _refuse_degenerate(linear, quadratic, n)
    return _from_influence(kind, biased * n / (n - 1), influence, variance=(linear + quadratic / (n - 1)) / n)


def _refuse_degenerate(linear: torch.Tensor, quadratic: torch.Tensor, n: int) -> None:
    """Refuse a standard error at a point where the estimate is not, to first order, a mean of influence values."""
    wanted = LINEAR_OVER_QUADRATIC * quadratic / (n - 1)
    if (linear <= wanted).any() and (quadratic > 0).any():
        worst = (linear - wanted).argmin()
        raise ValueError(
            "a standard error needs influence values that vary: their variance must exceed "
            f"{LINEAR_OVER_QUADRATIC} x the quadratic term over n - 1 = {wanted.flatten()[worst]:.3g}, "
            f"got {linear.flatten()[worst]:.3g} with n = {n}; the estimate is degenerate, or n too small"
        )
