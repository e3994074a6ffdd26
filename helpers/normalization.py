"""Chapter *Normalization*: statistics of a batch as estimates, and what an example sees that is itself in the batch.

Throughout, m values X_1 … X_m of one unit, one for each example of a batch, are independent with mean μ, variance σ²
and excess kurtosis κ. Batch normalization returns ``x̂ = (x - X̄) / √(σ̂² + eps)``, with the mean X̄ of the batch and its
variance σ̂² of divisor m; s² is the variance of divisor m - 1.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import integrate, special, stats
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten
from tqdm import tqdm

from helpers.gradient_noise import sample_batches
from helpers.lab import estimates
from helpers.lab.batches import Batch, batches_of
from helpers.lab.checks import (
    require_at_least_one,
    require_between,
    require_not_negative,
    require_positive,
    require_same_device,
)
from helpers.lab.estimates import Estimate, Proportion
from helpers.lab.tables import Table
from helpers.lab.watch import untouched, watch

FEWEST_BATCHES = 30  # from which a standard error is made

Numbers = float | np.ndarray

# Closed forms


def batch_mean_variance(variance: Numbers, batch_size: int | np.ndarray) -> Numbers:
    """Return the variance of a batch mean, ``σ²/m``.

    Parameters
    ----------
    variance : float or array
        σ² of one value.
    batch_size : int or array
        m, of independent values.

    Returns
    -------
    float or array
        Claim ``normalization.batch_mean``.

    Raises
    ------
    ValueError
        If `variance` is negative, or `batch_size` below 1.
    """
    require_not_negative(variance=variance)
    require_at_least_one(batch_size=batch_size)
    return variance / batch_size


def biased_variance_mean(variance: Numbers, batch_size: int | np.ndarray) -> Numbers:
    """Return the mean of the variance by which PyTorch normalizes, ``E[σ̂²] = (m - 1)/m · σ²``.

    Parameters and errors are those of :func:`batch_mean_variance`. Claim ``normalization.batch_variance``.
    """
    return variance - batch_mean_variance(variance, batch_size)


def sample_variance_variance(variance: Numbers, batch_size: int | np.ndarray, excess_kurtosis: Numbers) -> Numbers:
    """Return the variance of the variance that PyTorch stores, ``Var(s²) = σ⁴ (2/(m - 1) + κ/m)``.

    Parameters
    ----------
    variance : float or array
        σ² of one value.
    batch_size : int or array
        m, at least 2.
    excess_kurtosis : float or array
        κ of one value, at least -2: 0 for a normal law, 6 for an exponential one.

    Returns
    -------
    float or array
        Claim ``normalization.batch_variance``.

    Raises
    ------
    ValueError
        If `variance` is negative, `excess_kurtosis` below -2, or `batch_size` below 2.

    Examples
    --------
    In batches of 32 the relative error of a variance is 25 % for normal values, and 50 % for exponential ones:

    >>> [round(sample_variance_variance(1.0, 32, kurtosis) ** 0.5, 2) for kurtosis in (0, 6)]
    [0.25, 0.5]
    """
    require_not_negative(variance=variance)
    require_between(2, math.inf, batch_size=batch_size)
    require_between(-2, math.inf, excess_kurtosis=excess_kurtosis)
    return variance**2 * (2 / (batch_size - 1) + excess_kurtosis / batch_size)


def coverage(tolerance: Numbers, std: Numbers, batch_size: int | np.ndarray) -> Numbers:
    """Return ``P(|X̄ - μ| ≤ ε) = 2Φ(ε√m/σ) - 1`` for normal values; for others it is the limit of large batches.

    Parameters
    ----------
    tolerance : float or array
        ε, in the units of a value.
    std : float or array
        σ of one value.
    batch_size : int or array
        m.

    Returns
    -------
    float or array
        Claim ``normalization.coverage``.

    Raises
    ------
    ValueError
        If `tolerance` is negative, `std` not positive, or `batch_size` below 1.

    Examples
    --------
    The mean of 32 values lies within a fifth of their standard deviation three times in four:

    >>> print(round(coverage(0.2, 1.0, 32), 2))
    0.74
    """
    require_not_negative(tolerance=tolerance)
    require_positive(std=std)
    require_at_least_one(batch_size=batch_size)
    return 2 * special.ndtr(tolerance * np.sqrt(batch_size) / std) - 1


def rectified_mean_cdf(threshold: float, batch_size: int) -> float:
    """Return ``P(X̄ ≤ t)`` for the mean of m rectified standard normal values, exactly at any m.

    Parameters
    ----------
    threshold : float
        t.
    batch_size : int
        m.

    Returns
    -------
    float
        To nine digits. The Laplace transform of a rectified value is ``(1 + erfcx(λ/√2))/2``; that of the sum's
        distribution function, its m-th power over λ, is inverted by Euler summation (Abate and Whitt, 1995). At t = 0
        it is ``2^-m``, the probability that no value is positive. Claim ``normalization.coverage``.

    Raises
    ------
    ValueError
        If `batch_size` is below 1 or `threshold` not finite.
    """
    require_at_least_one(batch_size=batch_size)
    if not math.isfinite(threshold):
        raise ValueError(f"threshold must be finite, got {threshold}")
    if threshold < 0:
        return 0.0
    if threshold == 0:
        return 0.5**batch_size
    damping, terms, averaged = 24.0, 40 + 4 * math.isqrt(batch_size), 14
    total = threshold * batch_size  # of the sum
    frequencies = (damping + 2j * math.pi * np.arange(terms + averaged + 1)) / (2 * total)
    transform = ((1 + special.wofz(1j * frequencies / math.sqrt(2))) / 2) ** batch_size / frequencies
    alternating = transform.real * (-1.0) ** np.arange(terms + averaged + 1)
    alternating[0] /= 2
    sums = np.cumsum(alternating)[terms:]
    weights = stats.binom.pmf(np.arange(averaged + 1), averaged, 0.5)  # Euler's
    return float(math.exp(damping / 2) / total * (weights @ sums))


def normalized_variance(batch_variance: Numbers, eps: Numbers) -> Numbers:
    """Return the variance of a batch's normalized values, ``σ̂²/(σ̂² + eps)``; their mean is 0.

    Parameters
    ----------
    batch_variance : float or array
        σ̂², with divisor m.
    eps : float or array
        What the layer adds to it, 1e-5 in PyTorch.

    Returns
    -------
    float or array
        With divisor m. Claim ``normalization.output_moments``.

    Raises
    ------
    ValueError
        If `batch_variance` is not positive, or `eps` negative.
    """
    require_positive(batch_variance=batch_variance)
    require_not_negative(eps=eps)
    return batch_variance / (batch_variance + eps)


def largest_output(batch_size: int | np.ndarray) -> Numbers:
    """Return what no normalized value exceeds, ``√(m - 1)``; one outlier among equal values attains it.

    Claim ``normalization.bounded_output``.

    Raises
    ------
    ValueError
        If `batch_size` is below 2.
    """
    require_between(2, math.inf, batch_size=batch_size)
    return np.sqrt(batch_size - 1)


def running_mean_variance(
    variance: float, batch_size: int, momentum: float, population_size: int | None = None
) -> float:
    """Return the variance of a running mean, ``α/(2 - α) · σ²/m``, or less at the end of a shuffled epoch.

    Parameters
    ----------
    variance : float
        σ² of one value; of a population, its S² with divisor N - 1.
    batch_size : int
        m.
    momentum : float
        α, PyTorch's `momentum`, in (0, 1]: the running mean becomes (1 - α) times itself plus α times the batch mean.
    population_size : int, optional
        N, if batches come from shuffled epochs over N examples, of which m is a divisor; independent batches else.

    Returns
    -------
    float
        After many batches, and after many whole epochs. Within an epoch batch means have covariance -S²/N, which takes
        away ``S²/N · (1 - q)/(1 + q)`` with ``q = (1 - α)^(N/m)``. Claim ``normalization.running_average``.

    Raises
    ------
    ValueError
        If `momentum` is not in (0, 1], `variance` negative, or `batch_size` below 1 or no divisor of `population_size`.

    Examples
    --------
    With PyTorch's momentum of 0.1 a running mean is worth 19 batches:

    >>> round(running_mean_variance(1.0, 32, 0.1) * 32, 4)
    0.0526
    """
    if not 0 < momentum <= 1:
        raise ValueError(f"momentum must lie in (0, 1], got {momentum}")
    independent = momentum / (2 - momentum) * batch_mean_variance(variance, batch_size)
    if population_size is None:
        return independent
    if population_size < batch_size or population_size % batch_size:
        raise ValueError(f"batch_size must divide population_size {population_size}, got {batch_size}")
    kept = (1 - momentum) ** (population_size // batch_size)
    return independent - variance / population_size * (1 - kept) / (1 + kept)


def pulled_mean(x: Numbers, mean: Numbers, batch_size: int | np.ndarray) -> Numbers:
    """Return ``E[X̄ | x] = μ + (x - μ)/m``: an example pulls the mean of its batch towards itself.

    Parameters
    ----------
    x : float or array
        The value of one example.
    mean : float or array
        μ, of the others.
    batch_size : int or array
        m, the example included.

    Returns
    -------
    float or array
        Claim ``normalization.self_pull``.

    Raises
    ------
    ValueError
        If `batch_size` is below 1.
    """
    require_at_least_one(batch_size=batch_size)
    return mean + (x - mean) / batch_size


def pulled_variance(variance: Numbers, batch_size: int | np.ndarray) -> Numbers:
    """Return ``Var(X̄ | x) = (m - 1)σ²/m²``: the one example of the batch that is known does not fluctuate.

    Parameters and errors are those of :func:`batch_mean_variance`. Claim ``normalization.self_pull``.
    """
    return biased_variance_mean(variance, batch_size) / batch_size


def output_cdf(output: Numbers, batch_size: int) -> Numbers:
    """Return ``P(x̂ ≤ output)`` for normal values: ``(1 + x̂/√(m - 1))/2`` has the law Beta((m - 2)/2, (m - 2)/2).

    Parameters
    ----------
    output : float or array
        A normalized value, of a layer with eps = 0.
    batch_size : int
        m, at least 3. For m = 2 the output is 1 or -1.

    Returns
    -------
    float or array
        Claim ``normalization.output_law``.

    Raises
    ------
    ValueError
        If `batch_size` is below 3.

    Examples
    --------
    In batches of four it is uniform between -√3 and √3:

    >>> print(output_cdf(0.5 * 3**0.5, 4).round(6))
    0.75
    """
    require_between(3, math.inf, batch_size=batch_size)
    half = (batch_size - 2) / 2
    return stats.beta.cdf((1 + output / largest_output(batch_size)) / 2, half, half)


def output_fourth_moment(batch_size: int | np.ndarray) -> Numbers:
    """Return ``E[x̂⁴] = 3 (m - 1)/(m + 1)`` for normal values; at m = 2 and 3 it is 1 and 3/2 whatever their law.

    Claim ``normalization.output_law``.

    Raises
    ------
    ValueError
        If `batch_size` is below 2.
    """
    require_between(2, math.inf, batch_size=batch_size)
    return 3 * (batch_size - 1) / (batch_size + 1)


def expected_output(x: float, batch_size: int) -> float:
    """Return ``E[x̂ | x]``, what batch normalization makes of a value on average over its company, for normal values.

    Parameters
    ----------
    x : float
        The value of one example, in standard deviations from the mean.
    batch_size : int
        m; the m - 1 others are independent and standard normal.

    Returns
    -------
    float
        With eps = 0, ``(m-1) x √(2/π) ∫₀¹ ((1-v²)/(1+(m-1)v²))^((m-2)/2) exp(-(m-1)x²v²/2) dv`` by quadrature. At m = 2
        it is ``2Φ(x) - 1``, and 2F(x) - 1 for values of any continuous law F. Claim ``normalization.expected_output``.

    Raises
    ------
    ValueError
        If `batch_size` is below 2 or `x` not finite.

    Examples
    --------
    Four standard deviations from the mean, in batches of 2, 4, 32 and 128:

    >>> [round(expected_output(4.0, m), 2) for m in (2, 4, 32, 128)]
    [1.0, 1.61, 3.28, 3.79]
    """
    require_between(2, math.inf, batch_size=batch_size)
    if not math.isfinite(x):
        raise ValueError(f"x must be finite, got {x}")
    others, power = batch_size - 1, (batch_size - 2) / 2

    def integrand(v: float) -> float:
        return ((1 - v * v) / (1 + others * v * v)) ** power * math.exp(-others * x * x * v * v / 2)

    width = 1 / math.sqrt(others * (1 + power + x * x))  # of the peak at 0
    ends = [0.0, *(min(k * width, 1.0) for k in (1, 3, 9)), 1.0]
    parts = [integrate.quad(integrand, *pair, epsabs=1e-14)[0] for pair in pairwise(ends)]
    return others * x * math.sqrt(2 / math.pi) * sum(parts)


def output_variance(x: float, batch_size: int) -> float:
    """Return ``Var(x̂ | x)``, the noise that its company gives to a normalized value, for normal values.

    Parameters
    ----------
    x : float
        The value of one example, in standard deviations from the mean.
    batch_size : int
        m; the m - 1 others are independent and standard normal.

    Returns
    -------
    float
        With eps = 0. The second moment is
        ``(m-1) ∫₀¹ (1 + (m-1)x²u²) (u²/(1+(m-1)(1-u²)))^((m-2)/2) exp(-(m-1)x²(1-u²)/2) du``, by quadrature. Near the
        mean the variance is about 1/m. Claim ``normalization.expected_output``.

    Raises
    ------
    ValueError
        If `batch_size` is below 2 or `x` not finite.

    Examples
    --------
    In batches of 32, at the mean and two standard deviations from it:

    >>> [round(output_variance(x, 32), 3) for x in (0.0, 2.0)]
    [0.034, 0.073]
    """
    mean = expected_output(x, batch_size)
    others, power = batch_size - 1, (batch_size - 2) / 2

    def integrand(u: float) -> float:
        away = others * (1 - u * u)
        return (1 + others * x * x * u * u) * (u * u / (1 + away)) ** power * math.exp(-x * x * away / 2)

    width = 1 / (others * (1 + power + x * x))  # of the peak at u = 1
    ends = [0.0, *(1 - min(k * width, 1.0) for k in (81, 9, 1)), 1.0]
    parts = [integrate.quad(integrand, *pair, epsabs=1e-14)[0] for pair in pairwise(ends)]
    return others * sum(parts) - mean**2


# Samplers


class Law(NamedTuple):
    """A law of activations: its moments, and its distribution function."""

    mean: float
    variance: float
    excess_kurtosis: float
    cdf: Callable[[Numbers], Numbers]


_RECTIFIED_MEAN = 1 / math.sqrt(2 * math.pi)
_RECTIFIED_VARIANCE = 1 / 2 - 1 / (2 * math.pi)
_RECTIFIED_FOURTH = 3 / 2 - 5 * _RECTIFIED_MEAN**2 - 3 * _RECTIFIED_MEAN**4  # central

LAWS = {
    "normal": Law(0.0, 1.0, 0.0, special.ndtr),
    "rectified": Law(
        _RECTIFIED_MEAN,
        _RECTIFIED_VARIANCE,
        _RECTIFIED_FOURTH / _RECTIFIED_VARIANCE**2 - 3,
        lambda x: np.where(np.asarray(x) < 0, 0.0, special.ndtr(x)),
    ),
    "exponential": Law(1.0, 1.0, 6.0, lambda x: -np.expm1(-np.maximum(x, 0.0))),
}


def activations(
    law: str, n_batches: int, batch_size: int, *, generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Draw batches of independent values of one unit.

    Parameters
    ----------
    law : {"normal", "rectified", "exponential"}
        Standard normal; what a ReLU leaves of it; exponential of mean 1. Their moments are in `LAWS`.
    n_batches, batch_size : int
    generator : torch.Generator
        Its device is that of the result.
    dtype : torch.dtype

    Returns
    -------
    torch.Tensor, shape (n_batches, batch_size)

    Raises
    ------
    ValueError
        If the law is another one.
    """
    if law not in LAWS:
        raise ValueError(f"law must be one of {', '.join(LAWS)}, got {law!r}")
    how = {"generator": generator, "dtype": dtype, "device": generator.device}
    if law == "exponential":
        return torch.rand((n_batches, batch_size), **how).neg_().log1p_().neg_()
    drawn = torch.randn((n_batches, batch_size), **how)
    return drawn.relu_() if law == "rectified" else drawn


def normalized(batches: torch.Tensor, *, eps: float = 0.0) -> torch.Tensor:
    """Normalize many batches of one unit in one call of ``torch.nn.functional.batch_norm``, each as a channel.

    Parameters
    ----------
    batches : shape (n_batches, batch_size)
    eps : float
        What is added to each batch's variance.

    Returns
    -------
    torch.Tensor, shape (n_batches, batch_size)
        0 where all values of a batch are equal.

    Raises
    ------
    ValueError
        If batches hold fewer than two examples, or `eps` is negative.

    Examples
    --------
    >>> normalized(torch.tensor([[1.0, 3.0], [0.0, 100.0]]))
    tensor([[-1.,  1.],
            [-1.,  1.]])
    """
    if batches.ndim != 2 or batches.shape[1] < 2:
        raise ValueError(
            f"batches must have shape (n_batches, batch_size), batch_size at least 2, got {tuple(batches.shape)}"
        )
    require_not_negative(eps=eps)
    eps = max(eps, torch.finfo(batches.dtype).tiny)  # PyTorch refuses 0
    return F.batch_norm(batches.T, None, None, training=True, eps=eps).T


# The tools


@dataclass(frozen=True, eq=False, repr=False)
class Company:
    """What a network with batch normalization answers in many companies; :func:`company` makes it.

    Parameters
    ----------
    labels : torch.Tensor, shape (n,)
        The class of the largest output in evaluation mode.
    agreements : torch.Tensor, shape (n,)
        In how many companies the batch-normalized answer was the same.
    companies, batch_size : int
    mean, std : torch.Tensor, shape (n, classes)
        Of the outputs over the companies; the standard deviation has the divisor `companies` - 1.
    """

    labels: torch.Tensor
    agreements: torch.Tensor
    companies: int
    batch_size: int
    mean: torch.Tensor
    std: torch.Tensor

    @property
    def differing(self) -> Estimate:
        """The share of answers whose label differs from that of evaluation mode; its error is that of the inputs."""
        return estimates.mean(1 - self.agreements.double() / self.companies)

    @property
    def wavering(self) -> Proportion:
        """The share of inputs whose label differs in at least one company; it grows with the number of companies."""
        return estimates.proportion(self.agreements < self.companies)

    def limits(self, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Return Clopper–Pearson limits for each input: in which share of all companies its label is the same.

        Parameters
        ----------
        confidence : float
            The share of all inputs whose limits hold the truth, at least. Over companies they are exact, since those of
            an input are drawn independently.

        Returns
        -------
        pair of arrays, shape (n,)
        """
        require_between(0, 1, confidence=confidence)
        agreed = self.agreements.cpu().numpy()
        found = stats.beta.ppf((1 - confidence) / 2, agreed, self.companies - agreed + 1)
        high = stats.beta.isf((1 - confidence) / 2, agreed + 1, self.companies - agreed)
        return np.where(agreed == 0, 0.0, found), np.where(agreed == self.companies, 1.0, high)

    @property
    def table(self) -> Table:
        """The ten inputs that waver most."""
        low, high = self.limits()
        header = ["input", "label", "same label in", "95 % limits", "std of outputs"]
        least = torch.argsort(self.agreements, stable=True)[:10].tolist()
        spread = self.std.square().mean(1).sqrt()
        rows = [
            [
                str(k),
                str(self.labels[k].item()),
                f"{self.agreements[k].item()} of {self.companies}",
                f"{low[k]:.2f} to {high[k]:.2f}",
                f"{spread[k].item():.2g}",
            ]
            for k in least
        ]
        return Table(header, rows, note=self._verdict)

    @property
    def _verdict(self) -> str:
        share, n = self.differing, len(self.agreements)
        ever = int((self.agreements < self.companies).sum())
        return (
            f"{share.value:.1%} ± {share.stderr:.1%} of answers differ from those of evaluation mode;\n{ever:,} of "
            f"{n:,} inputs change their label in at least one of {self.companies} companies of {self.batch_size - 1}"
        )

    def __repr__(self) -> str:
        return self._verdict

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


def company(
    model: nn.Module,
    inputs: torch.Tensor | tuple | list | Mapping,
    others: torch.Tensor | tuple | list | Mapping | Iterable,
    *,
    batch_size: int,
    companies: int = 20,
    generator: torch.Generator,
    examples_per_call: int = 1024,
) -> Company:
    """Measure how far your network's answers depend on the rest of the batch, as when ``model.eval()`` is forgotten.

    Parameters
    ----------
    model : torch.nn.Module
        With batch normalization, and one output of shape (examples, classes). It is left as it was. Only its
        layers of ``torch.nn``'s batch normalization are put into training mode, also those that you keep frozen:
        dropout is off.
    inputs : torch.Tensor, tuple, list or mapping of tensors
        The n examples to be judged: ``model(x)``, ``model(*inputs)`` or ``model(**inputs)``.
    others : the same, or an iterable of batches such as a ``DataLoader``
        The examples from which company is drawn, in the form of `inputs`, or batches of such a form, with or without
        targets. They are held in memory, and should not hold the inputs. Of mappings, the keys of `inputs` count.
    batch_size : int
        m: each input is judged in batches with m - 1 others, drawn without replacement.
    companies : int
        How many batches for each input; each input has companies of its own.
    generator : torch.Generator
        Draws the companies; on the device of the model.
    examples_per_call : int
        Bounds memory. As many companies as fit go through the network together, if that gives what single forward
        passes give, which is tried first; else one at a time.

    Returns
    -------
    Company
        Costs ``n · companies · m`` forward passes of one example. Compare networks by `differing`, since `wavering`
        grows with the number of companies. Limits hold for a single input from 2 companies on; 20 tell a share of 0.9
        from one of 0.5, 100 a share of 0.9 from one of 0.75.

    Raises
    ------
    ValueError
        If the model has no batch normalization, or such without running statistics, or synchronized over processes; if
        its output is not one tensor of shape (examples, classes) with two classes at least, or holds NaN; if
        `batch_size` or `companies` is below 2, or there are fewer than m - 1 others; if others have another form or
        dtype than inputs; or if the generator is on another device.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    >>> source = torch.Generator().manual_seed(0)
    >>> inputs, others = torch.randn(50, 4, generator=source), torch.randn(200, 4, generator=source)
    >>> found = company(model, inputs, others, batch_size=8, generator=source)
    >>> found.agreements.shape, found.std.shape
    (torch.Size([50]), torch.Size([50, 3]))
    """
    require_between(2, math.inf, batch_size=batch_size, companies=companies)
    require_at_least_one(examples_per_call=examples_per_call)
    judged = Batch.of(inputs)
    require_same_device(generator, inputs=judged.tensors[0])
    _require_batch_norm(model)
    with untouched(model), torch.no_grad():
        crowd = _joined(_batches_like(judged, others, generator.device))
        if len(crowd) < batch_size - 1:
            raise ValueError(f"others must hold at least {batch_size - 1} examples, got {len(crowd)}")
        model.eval()
        labels = torch.cat([_logits(model, part).argmax(1) for part in judged.split(examples_per_call)])
        for layer in _batch_norms(model).values():
            layer.train()
        pairs = torch.arange(len(judged), device=generator.device).repeat_interleave(companies)
        together = max(1, examples_per_call // batch_size)
        if together > 1 and not _can_be_grouped(model, judged, crowd, batch_size, generator):
            together = 1
        answers = []
        for part in tqdm(pairs.split(together), desc="companies", unit="call"):
            batch = _in_company(judged, crowd, part, batch_size, generator)
            with _grouped(model, len(part)):
                answers.append(_logits(model, batch)[::batch_size])
        logits = torch.cat(answers).unflatten(0, (len(judged), companies))  # (n, companies, classes)
    agreements = (logits.argmax(2) == labels[:, None]).sum(1)
    return Company(labels, agreements, companies, batch_size, logits.mean(1), logits.std(1))


@dataclass(frozen=True)
class LayerStatistics:
    """The running statistics of one batch-normalization layer beside those of its inputs.

    Parameters
    ----------
    name, kind : str
    ratio : Estimate
        Running variance over measured variance, the geometric mean over units.
    lowest, highest : float
        The smallest and the largest such ratio of a unit.
    shift : Estimate
        The largest difference between running and measured mean of a unit, in measured standard deviations.
    units, left_out : int
        Of how many units this is made, and how many were left out because they do not vary.
    """

    name: str
    kind: str
    ratio: Estimate
    lowest: float
    highest: float
    shift: Estimate
    units: int
    left_out: int


@dataclass(frozen=True, repr=False)
class StatisticsReport:
    """What :func:`statistics_report` found, a row for each batch-normalization layer.

    Parameters
    ----------
    layers : tuple of LayerStatistics
    unused : tuple of str
        The names of layers that were not called.
    """

    layers: tuple[LayerStatistics, ...]
    unused: tuple[str, ...] = ()

    @property
    def table(self) -> Table:
        header = ["layer", "kind", "running / measured variance", "of single units", "largest shift of a mean"]
        rows = [
            [
                layer.name,
                layer.kind,
                _short(layer.ratio),
                f"{layer.lowest:.3g} to {layer.highest:.3g}",
                _short(layer.shift),
            ]
            for layer in self.layers
        ]
        return Table(header, rows, note=self._note)

    @property
    def _note(self) -> str:
        note = (
            "Variances: geometric mean over units, and its range. Shifts: the largest of all units, in standard "
            "deviations; without any shift it rarely exceeds 5 standard errors."
        )
        left_out = [
            f"{layer.left_out} of {layer.units + layer.left_out} in {layer.name}"
            for layer in self.layers
            if layer.left_out
        ]
        note += f" Units that do not vary: {', '.join(left_out)}." if left_out else ""
        return note + (f" Never called: {', '.join(self.unused)}." if self.unused else "")

    def __repr__(self) -> str:
        return repr(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


def _short(estimate: Estimate) -> str:
    return repr(estimate).partition(" (")[0]


def statistics_report(model: nn.Module, loader: torch.Tensor | tuple | list | Mapping | Iterable) -> StatisticsReport:
    """Compare the running statistics of your network with those of the data that it meets in evaluation mode.

    Parameters
    ----------
    model : torch.nn.Module
        With batch normalization; it is left as it was.
    loader : an iterable of batches such as a ``DataLoader``, or torch.Tensor, tuple, list or mapping of tensors
        At least 30 batches, ``(inputs, targets)`` or inputs alone; of tensors, at least 30 examples. Statistics that
        are to be trusted take some 500 examples.

    Returns
    -------
    StatisticsReport
        Means and variances of what enters each layer, over examples, positions and calls, pooled by the law of total
        variance, so that a sorted loader gives what a shuffled one gives. Standard errors are those of independent
        batches, for the population from which they come: from 500 examples in 30 or more batches on, two of them hold
        the truth in 93 to 97 of 100 cases. Costs one forward pass in evaluation mode, and two numbers for each batch
        and unit. Read it from the top: behind a layer that is off, others are.

    Raises
    ------
    ValueError
        If the model has no batch normalization, or such without running statistics or synchronized over processes, or
        with statistics that are not finite; if there are fewer than 30 batches, values that are not finite, or no unit
        whose values vary.

    Examples
    --------
    A layer that was never trained has the running variance 1; its inputs have 4:

    >>> layer = nn.BatchNorm1d(3)
    >>> data = 2 * torch.randn(900, 3, generator=torch.Generator().manual_seed(0))
    >>> [found] = statistics_report(layer, data).layers
    >>> print(found.ratio.value.round(1))
    0.2
    """
    _require_batch_norm(model)
    layers = _batch_norms(model)
    sums: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    device = next(iter(layers.values())).running_mean.device
    with untouched(model), torch.no_grad():
        model.eval()
        for batch in _at_least_thirty(model, loader, device):
            with watch(model, lambda layer: isinstance(layer, _BatchNorm)) as calls:
                batch.predict(model)
            for name in layers:
                values = [_by_unit(call.inputs[0]) for call in calls if call.name == name]
                if values:
                    sums[name].append(_sums(torch.cat(values, 1), layers[name].running_mean.double()))
    used = [name for name in layers if sums[name]]
    compared = tuple(_compared(name, layers[name], sums[name]) for name in used)
    return StatisticsReport(compared, tuple(name for name in layers if name not in used))


# How companies are judged together


def _batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    return {name or "the model": layer for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)}


def _require_batch_norm(model: nn.Module) -> None:
    layers = _batch_norms(model)
    if not layers:
        raise ValueError("model must have a layer of batch normalization, got none")
    for name, layer in layers.items():
        if isinstance(layer, nn.SyncBatchNorm):
            raise ValueError(f"layers must normalize by the batch of one process, got SyncBatchNorm at {name}")
        if layer.running_mean is None:
            raise ValueError(f"layers must have running statistics, got track_running_stats=False at {name}")


def _batches_like(judged: Batch, others: Any, device: torch.device) -> list[Batch]:
    """Return batches in the form of the judged inputs; a list is one such form, or a list of batches."""
    alone = isinstance(judged.inputs, tuple | list) and all(isinstance(x, torch.Tensor) for x in others)
    if isinstance(others, tuple | list) and not alone:
        others = iter(others)
    found = []
    for batch in batches_of(others, None, device):
        inputs = batch.inputs
        if isinstance(judged.inputs, dict) and isinstance(inputs, dict):
            if missing := sorted(judged.inputs.keys() - inputs.keys()):
                raise ValueError(f"others must have the keys of inputs, got none called {', '.join(missing)}")
            inputs = {key: inputs[key] for key in judged.inputs}
        elif isinstance(judged.inputs, list) and isinstance(inputs, tuple):
            inputs = list(inputs)
        found.append(Batch.of(inputs))
        if found[-1].form != judged.form:
            forms = [
                f"{type(batch.inputs).__name__} with {len(batch.tensors)} tensors" for batch in (judged, found[-1])
            ]
            raise ValueError("others must have the form of inputs, {}, got {}".format(*forms))
    for mine, other in zip(judged.tensors, found[0].tensors, strict=True):
        if mine.dtype != other.dtype:
            raise ValueError(f"others must have the dtype of inputs, {mine.dtype}, got {other.dtype}")
    return found


def _joined(batches: Sequence[Batch]) -> Batch:
    return batches[0].with_tensors([torch.cat(leaf) for leaf in zip(*(x.tensors for x in batches), strict=True)])


def _logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    leaves, _ = tree_flatten(batch.predict(model))
    if len(leaves) != 1 or not isinstance(leaves[0], torch.Tensor) or leaves[0].ndim != 2:
        shapes = [tuple(x.shape) for x in leaves if isinstance(x, torch.Tensor)]
        raise ValueError(f"model must return one tensor of shape (examples, classes), got shapes {shapes}")
    if leaves[0].shape[1] < 2:
        raise ValueError("model must return at least 2 classes, got 1: of one logit z, give it torch.cat([-z, z], 1)")
    if leaves[0].isnan().any():
        raise ValueError("model must return numbers for inputs and others, got NaN")
    return leaves[0].to(torch.promote_types(leaves[0].dtype, torch.float32))


def _in_company(judged: Batch, crowd: Batch, which: torch.Tensor, batch_size: int, generator: torch.Generator) -> Batch:
    """Return a batch of batches, one after the other, each of one judged example and others drawn at random."""
    drawn = sample_batches(len(which), batch_size - 1, len(crowd), generator=generator)  # (k, m - 1)
    parts = zip(judged[which].tensors, crowd[drawn.flatten()].tensors, strict=True)
    return judged.with_tensors(
        [torch.cat([one[:, None], other.unflatten(0, drawn.shape)], 1).flatten(0, 1) for one, other in parts]
    )


@contextmanager
def _grouped(model: nn.Module, groups: int) -> Iterator[None]:
    """Let each batch-normalization layer normalize by the statistics of so many groups of its rows, one by one."""
    layers = _batch_norms(model).values() if groups > 1 else ()
    for layer in layers:
        layer.forward = partial(_normalize_groups, layer, groups)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _normalize_groups(layer: _BatchNorm, groups: int, x: torch.Tensor) -> torch.Tensor:
    rows = x.unflatten(0, (groups, -1)).transpose(0, 1).flatten(1, 2)  # (m, groups * C, ...): each group has channels
    weight, bias = (None if p is None else p.repeat(groups) for p in (layer.weight, layer.bias))
    normal = F.batch_norm(rows, None, None, weight, bias, training=True, eps=layer.eps)
    return normal.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)


def _can_be_grouped(model: nn.Module, judged: Batch, crowd: Batch, batch_size: int, generator: torch.Generator) -> bool:
    """Whether two companies that go through the network together get the answers that each gets alone."""
    plain = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
    if not all(type(layer) in plain for layer in _batch_norms(model).values()):
        return False
    state = generator.get_state()
    two = torch.tensor([0, len(judged) - 1], device=generator.device)
    batch = _in_company(judged, crowd, two, batch_size, generator)
    generator.set_state(state)
    alone = torch.cat([_logits(model, part) for part in batch.split(batch_size)])
    try:
        with _grouped(model, 2):
            together = _logits(model, batch)
    except RuntimeError:  # a layer that cannot be given twice the rows
        return False
    rounding = 1e4 * torch.finfo(alone.dtype).eps * alone.abs().max().item()
    return together.shape == alone.shape and torch.allclose(together, alone, rtol=0.0, atol=rounding)


# How statistics are measured


def _at_least_thirty(model: nn.Module, loader: Any, device: torch.device) -> Iterator[Batch]:
    if isinstance(loader, tuple | list) and not _fits(model, loader):
        loader = iter(loader)  # a list of batches
    if isinstance(loader, torch.Tensor | tuple | list | Mapping):
        whole = Batch.of(loader)
        batches = whole.split(max(1, len(whole) // FEWEST_BATCHES))
    else:
        batches = batches_of(loader, None, device)
    count = 0
    for batch in batches:
        count += 1
        yield batch
    if count < FEWEST_BATCHES:
        raise ValueError(f"loader must hold at least {FEWEST_BATCHES} batches, or as many examples, got {count}")


def _fits(model: nn.Module, inputs: Sequence[Any]) -> bool:
    """Whether these can be what the model takes in one call."""
    if not all(isinstance(x, torch.Tensor) for x in inputs):
        return False
    try:
        inspect.signature(model.forward).bind(*inputs)
    except TypeError:
        return False
    return True


def _by_unit(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1).flatten(1).double()  # (C, examples and positions)


def _sums(values: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return number, sum and sum of squares of each unit's values, seen from a reference near their mean, (3, C)."""
    away = values - reference[:, None]
    return torch.stack([torch.full_like(reference, values.shape[1]), away.sum(1), away.square().sum(1)])


def _compared(name: str, layer: _BatchNorm, sums: list[torch.Tensor]) -> LayerStatistics:
    counts, firsts, seconds = torch.stack(sums).unbind(1)  # (batches, C) each
    total = counts.sum(0)
    mean = firsts.sum(0) / total  # the reference is the running mean
    variance = (seconds.sum(0) - total * mean.square()) / (total - 1)
    running = layer.running_var.double()
    if not (torch.isfinite(running).all() and torch.isfinite(variance).all()):
        raise ValueError(f"values and running statistics must be finite, got others at {name}")
    alive = (variance > 0) & (running > 0)
    if not alive.any():
        raise ValueError(f"a layer must have a unit whose values vary, got none at {name}")
    squares = seconds - 2 * mean * firsts + counts * mean.square()  # about the mean
    # What each batch contributes to the errors of log variance and of mean over standard deviation.
    biased = (variance * (total - 1) / total)[alive]
    of_variance = (squares[:, alive] / biased - counts[:, alive]) * len(sums) / total[alive]
    of_mean = (firsts - counts * mean)[:, alive] / variance[alive].sqrt() * len(sums) / total[alive]
    # The mean of log s² is below log σ² by half the relative variance of s².
    log_variance = variance[alive].log() + of_variance.square().sum(0) / len(sums) / (len(sums) - 1) / 2
    ratios = (running[alive].log() - log_variance).exp()
    ratio = ratios.log().mean().exp().item()
    shifts = mean[alive] / variance[alive].sqrt()
    largest = shifts.abs().argmax()
    return LayerStatistics(
        name,
        type(layer).__name__,
        _with_errors(ratio, -ratio * of_variance.mean(1)),
        ratios.min().item(),
        ratios.max().item(),
        _with_errors(shifts[largest].abs().item(), shifts[largest].sign() * of_mean[:, largest]),
        len(ratios),
        len(running) - len(ratios),
    )


def _with_errors(value: float, influence: torch.Tensor) -> Estimate:
    """Return an estimate that is, but for a constant, the mean of these influences of batches."""
    mean = estimates.mean(influence)
    return Estimate(value, mean.stderr, len(influence), mean.skewness)
