"""Chapter *The stochastic gradient and its noise*: what a batch gradient adds to the gradient of the training risk.

Throughout, ``population_size`` (N) examples have the gradients g_1 … g_N, whose mean is the gradient ∇L of the training
risk. A batch holds ``batch_size`` (m) of them, without replacement unless said otherwise; its noise ξ is the mean of
its gradients minus ∇L. S, with entries S_k² on its diagonal, is the covariance of g_1 … g_N with divisor N - 1.

The gradients here are those of the loss of *one* example. With ``reduction="mean"``, PyTorch's default, the gradient
of a batch loss is their mean: the 1/m is already in it. With ``reduction="sum"`` it is m times that.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from helpers.lab.batches import Batch, batches_of
from helpers.lab.checks import require_at_least_one, require_positive
from helpers.lab.estimates import Estimate
from helpers.lab.gradients import (
    Gradients,
    Loss,
    gradient_chunks,
    gradient_sums,
    per_sample_products,
    per_sample_squared_norms,
)
from helpers.lab.tables import Table

# A ratio is reported only if its denominator, the squared gradient norm, is this many standard errors above zero:
# nearer to zero the ratio's error is not normal.
STANDARD_ERRORS_ABOVE_ZERO = 4
# Nor is it normal where few examples own the variance: then the skewness of the error of tr S is larger than this.
# Measured for lengths that are log-normal (σ = 1) or Pareto (3), 200 and 800 gradients: ± 2 standard errors covered the
# truth 64 to 81 times in 100, and with this limit what was given was wrong at most 7 times in 100.
MOST_ASYMMETRY = 0.25
# Four gradients are the fewest from which tr(S²) can be estimated without bias.
SMALLEST_SAMPLE = 4
# tr(S²) is estimated from the means of groups of examples, to about 2/(number of groups). They are held in memory.
MOST_GROUPS, FEWEST_GROUPS, GROUP_ENTRIES = 32, 8, 2**26
# Examples of small batches that are treated together.
EXAMPLES_AT_ONCE = 1024

# Up to here sorting a row of random keys is faster than a call of randperm.
SMALL_POPULATION = 64
# Batches that Floyd's algorithm draws at once: enough to amortize a call, few enough for the cache.
FLOYD_CHUNK = 2**14
# Entries of a gradient from which on adding up rows is faster than copying them first.
LONG_GRADIENTS = 16


# Closed forms


def finite_population_variance(
    variance: float | np.ndarray, batch_size: int | np.ndarray, population_size: int | np.ndarray
) -> float | np.ndarray:
    """Return the variance of the noise of a batch drawn without replacement, ``S² (1/m - 1/N)``.

    Parameters
    ----------
    variance : float or array
        S² of one coordinate, or the whole covariance S, with divisor N - 1; or tr S, for E|ξ|².
    batch_size, population_size : int or array of int
        m and N.

    Returns
    -------
    float or array
        Zero for a batch that holds all examples. Claim ``gradient_noise.finite_population``.

    Raises
    ------
    ValueError
        If not ``1 <= batch_size <= population_size``.
    """
    _require_sizes(batch_size, population_size)
    return variance * (1 / np.asarray(batch_size) - 1 / np.asarray(population_size))


def with_replacement_variance(
    variance: float | np.ndarray, batch_size: int | np.ndarray, population_size: int | np.ndarray
) -> float | np.ndarray:
    """Return the variance of the noise of a batch drawn with replacement, ``(N-1)/N · S²/m``.

    Parameters
    ----------
    variance : float or array
        As in :func:`finite_population_variance`.
    batch_size, population_size : int or array of int
        m, which may exceed N, and N.

    Returns
    -------
    float or array
        Claim ``gradient_noise.with_replacement``.

    Raises
    ------
    ValueError
        If a size is below 1.
    """
    require_at_least_one(batch_size=batch_size, population_size=population_size)
    return variance * (1 - 1 / np.asarray(population_size)) / batch_size


def finite_population_correction(batch_size: int | np.ndarray, population_size: int | np.ndarray) -> float | np.ndarray:
    """Return the noise variance without replacement over that with replacement, ``1 - (m-1)/(N-1)``.

    Raises
    ------
    ValueError
        If not ``1 <= batch_size <= population_size``, or `population_size` is 1.
    """
    _require_sizes(batch_size, population_size, smallest=2)
    return 1 - (np.asarray(batch_size) - 1) / (np.asarray(population_size) - 1)


def successive_correlation(batch_size: int | np.ndarray, population_size: int | np.ndarray) -> float | np.ndarray:
    """Return the correlation of the noises of two batches of one shuffled epoch at fixed parameters, ``-m/(N-m)``.

    Parameters
    ----------
    batch_size, population_size : int or array of int
        m and N, with 2 m <= N: an epoch of one batch has no second.

    Returns
    -------
    float or array
        The same for every coordinate and any two batches of the epoch. Claim ``gradient_noise.epoch_sum``.

    Raises
    ------
    ValueError
        If `batch_size` is below 1 or `population_size` below twice `batch_size`.
    """
    _require_sizes(batch_size, population_size, smallest=2 * np.asarray(batch_size))
    return -np.asarray(batch_size) / (np.asarray(population_size) - batch_size)


def batch_skewness(skewness: float | np.ndarray, batch_size: int, population_size: int) -> float | np.ndarray:
    """Return the skewness of a batch gradient without replacement, from that of the population.

    Parameters
    ----------
    skewness : float or array
        Of g_1 … g_N in one coordinate: the third central moment over the 3/2 power of the second, divisors N.
    batch_size, population_size : int
        m < N, and N of at least 3.

    Returns
    -------
    float or array
        ``γ · (N-2m)/(N-2) · √((N-1)/(m(N-m)))``, near ``γ/√m`` for small m/N and 0 for half of the population.
        Claim ``gradient_noise.clt``.

    Raises
    ------
    ValueError
        If not ``1 <= batch_size < population_size``, or N is below 3.
    """
    _require_sizes(batch_size, population_size, smallest=np.maximum(np.asarray(batch_size) + 1, 3))
    m, n = _as_floats(batch_size, population_size)
    return skewness * (n - 2 * m) / (n - 2) * np.sqrt((n - 1) / (m * (n - m)))


def batch_excess_kurtosis(
    excess_kurtosis: float | np.ndarray, batch_size: int, population_size: int
) -> float | np.ndarray:
    """Return the excess kurtosis of a batch gradient without replacement, from that of the population.

    Parameters
    ----------
    excess_kurtosis : float or array
        Of g_1 … g_N in one coordinate: the fourth central moment over the squared second, divisors N, minus 3.
    batch_size, population_size : int
        m < N, and N of at least 4.

    Returns
    -------
    float or array
        Near ``κ/m`` for small m/N. Claim ``gradient_noise.clt``.

    Raises
    ------
    ValueError
        If not ``1 <= batch_size < population_size``, or N is below 4.
    """
    _require_sizes(batch_size, population_size, smallest=np.maximum(np.asarray(batch_size) + 1, 4))
    m, n = _as_floats(batch_size, population_size)
    fourth = (n**2 - 6 * m * n + n + 6 * m**2) * (excess_kurtosis + 3) + 3 * n * (n - m - 1) * (m - 1)
    return (n - 1) * fourth / (m * (n - m) * (n - 2) * (n - 3)) - 3


def expected_squared_norm(
    squared_norm: float,
    trace: float,
    batch_size: int | np.ndarray,
    population_size: int | np.ndarray,
    *,
    replacement: bool = False,
) -> float | np.ndarray:
    """Return the mean squared norm of a batch gradient, ``|∇L|² + E|ξ|²``.

    Parameters
    ----------
    squared_norm : float
        ``|∇L|²``.
    trace : float
        ``tr S``, with divisor N - 1.
    batch_size, population_size : int or array of int
        m and N.
    replacement : bool
        Whether an example may be drawn twice.

    Returns
    -------
    float or array
        ``|∇L|² + tr S (1/m - 1/N)``, with replacement ``|∇L|² + (N-1)/N · tr S/m``. Claim
        ``gradient_noise.noise_scale``.

    Raises
    ------
    ValueError
        If a size is out of range.
    """
    noise = with_replacement_variance if replacement else finite_population_variance
    return squared_norm + noise(trace, batch_size, population_size)


def noise_scale(trace: float, squared_norm: float) -> float:
    """Return the gradient-noise scale ``tr S / |∇L|²``: the batch size at which noise is as large as the gradient.

    Parameters
    ----------
    trace : float
        ``tr S``, the summed variances of the gradients of single examples.
    squared_norm : float
        ``|∇L|²``.

    Returns
    -------
    float
        In examples. Claim ``gradient_noise.noise_scale``; McCandlish et al. (2018) call it B_simple.

    Raises
    ------
    ValueError
        If an argument is not positive.
    """
    require_positive(trace=trace, squared_norm=squared_norm)
    return trace / squared_norm


# Samplers


def sample_batches(
    n_batches: int, batch_size: int, population_size: int, *, generator: torch.Generator
) -> torch.Tensor:
    """Draw independent batches without replacement: each batch is one of the C(N, m) subsets, all equally likely.

    Parameters
    ----------
    n_batches, batch_size, population_size : int
        m examples of N in each batch.
    generator : torch.Generator
        Also sets the device.

    Returns
    -------
    torch.Tensor, int64, shape (n_batches, batch_size)
        Which examples, counted from 0. The *set* is uniformly random; the order within a small batch is not.

    Raises
    ------
    ValueError
        If `n_batches` is below 1, or not ``1 <= batch_size <= population_size``.
    """
    require_at_least_one(n_batches=n_batches)
    _require_sizes(batch_size, population_size)
    if batch_size**2 > 8 * population_size:  # Floyd compares all pairs of a batch; a shuffle has no pairs
        return _shuffles(n_batches, population_size, generator)[:, :batch_size]
    batches = torch.empty((batch_size, n_batches), dtype=torch.int64, device=generator.device)
    for some in batches.split(FLOYD_CHUNK, dim=1):
        some.copy_(_floyd(some.shape[1], batch_size, population_size, generator))
    return batches.T


def shuffled_epochs(
    n_epochs: int, batch_size: int, population_size: int, *, generator: torch.Generator
) -> torch.Tensor:
    """Draw independent epochs, each a random partition of all examples into batches.

    Parameters
    ----------
    n_epochs, batch_size, population_size : int
        m must divide N.
    generator : torch.Generator
        Also sets the device.

    Returns
    -------
    torch.Tensor, int64, shape (n_epochs, n_batches, batch_size)
        With ``n_batches = population_size / batch_size``.

    Raises
    ------
    ValueError
        If `n_epochs` is below 1, not ``1 <= batch_size <= population_size``, or m does not divide N.
    """
    require_at_least_one(n_epochs=n_epochs)
    _require_sizes(batch_size, population_size)
    if population_size % batch_size:
        raise ValueError(f"batch_size must divide population_size {population_size}, got {batch_size}")
    return _shuffles(n_epochs, population_size, generator).reshape(n_epochs, -1, batch_size)


def batch_noise(gradients: torch.Tensor, batches: torch.Tensor) -> torch.Tensor:
    """Return the noise of batch gradients, their mean over the batch minus the mean over all examples.

    Parameters
    ----------
    gradients : torch.Tensor, shape (N, ...)
        One row an example.
    batches : torch.Tensor, int64, shape (..., m)
        Which examples each batch holds.

    Returns
    -------
    torch.Tensor, shape (n_batches..., ...)

    Raises
    ------
    ValueError
        If the tensors are on different devices.
    """
    if gradients.device != batches.device:
        raise ValueError(f"batches must be on the device of gradients, {gradients.device}, got {batches.device}")
    rows = gradients.flatten(1) if gradients.ndim > 1 else gradients[:, None]  # (N, P)
    if rows.shape[1] < LONG_GRADIENTS:
        means = gradients[batches].mean(batches.ndim - 1)
    else:  # adds up without a copy of the rows
        means = functional.embedding_bag(batches.reshape(-1, batches.shape[-1]), rows, mode="mean")
    return means.reshape(batches.shape[:-1] + gradients.shape[1:]) - gradients.mean(0)


# Estimators


def two_batch_noise_scale(
    small: torch.Tensor,
    large: torch.Tensor,
    *,
    small_batch_size: int,
    large_batch_size: int,
    population_size: int | None = None,
) -> Estimate:
    """Estimate the gradient-noise scale from squared norms of batch gradients of two sizes.

    Data-parallel training has both for free: the gradient of one worker, and the mean over all workers.

    Parameters
    ----------
    small, large : torch.Tensor, shape (n,)
        *Squared* norms of mean-reduced batch gradients at the same parameters; different rows independent.
    small_batch_size, large_batch_size : int
        Their sizes b < B.
    population_size : int, optional
        N, if batches are drawn without replacement from N examples; otherwise ``|∇L|²`` is low by ``tr S/N``.

    Returns
    -------
    Estimate
        The ratio of ``tr S = (E small - E large) / (1/b - 1/B)`` and ``|∇L|² = (B E large - b E small) / (B - b)
        [+ tr S/N]``. Averaging the ratios of single rows instead is biased, often badly. Claim
        ``gradient_noise.noise_scale``; McCandlish et al. (2018), Appendix A.

    Raises
    ------
    ValueError
        If the shapes differ, n is below 4, a norm is NaN or infinite, not ``1 <= b < B <= N``, ``E small`` does not
        exceed ``E large`` by four standard errors, ``|∇L|²`` is not four standard errors above zero, or few rows own
        tr S, so that the skewness of its error exceeds 0.25.

    Examples
    --------
    >>> g = torch.Generator().manual_seed(0)
    >>> def squared_norms(batch_size):  # |∇L|² = 4, tr S = 200
    ...     noise = torch.randn(1000, 50, generator=g) * (4 / batch_size) ** 0.5
    ...     return (noise + (4 / 50) ** 0.5).square().sum(1)
    >>> two_batch_noise_scale(squared_norms(8), squared_norms(64), small_batch_size=8, large_batch_size=64)
    48.9 ± 1.0 (n = 1,000)
    """
    if small.shape != large.shape or small.ndim != 1:
        raise ValueError(f"small and large must have one shape (n,), got {tuple(small.shape)}, {tuple(large.shape)}")
    require_at_least_one(small_batch_size=small_batch_size)
    if not small_batch_size < large_batch_size:
        raise ValueError(f"small_batch_size must be below {large_batch_size}, got {small_batch_size}")
    if population_size is not None:
        _require_sizes(large_batch_size, population_size)
    small, large = (norms.detach().cpu().double() for norms in (small, large))
    _require_noise(small - large)
    traces = (small - large) / (1 / small_batch_size - 1 / large_batch_size)
    return _of_rows(traces, large - traces / large_batch_size, population_size, "pairs of batches").estimate()


class NoiseScaleAccumulator:
    """Estimate the gradient-noise scale during training with gradient accumulation, from gradients that are there.

    The gradient of a micro-batch is the small batch, the mean over the micro-batches of a step the large one. Each
    step gives one unbiased pair of ``tr S`` and ``|∇L|²``; the noise scale is the ratio of their means. It is that of
    the steps seen, on average: where gradients drift, use a new accumulator now and then. Memory: one gradient, and
    two numbers a step.

    Parameters
    ----------
    population_size : int, optional
        N, if batches are drawn without replacement from N examples, as a shuffled ``DataLoader`` does; otherwise
        ``|∇L|²`` is low by ``tr S/N``.

    Examples
    --------
    >>> model, accumulator = nn.Linear(3, 1), NoiseScaleAccumulator()
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    >>> g = torch.Generator().manual_seed(0)
    >>> for step in range(100):
    ...     for micro_batch in torch.randn(4, 8, 3, generator=g):
    ...         loss = (model(micro_batch) - 5).square().mean() / 4
    ...         loss.backward()
    ...         accumulator.update(model, batch_size=8)
    ...     accumulator.end_step()  # before gradients are cleared
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> accumulator.estimate().n
    array(100.)
    """

    def __init__(self, *, population_size: int | None = None) -> None:
        if population_size is not None:
            require_at_least_one(population_size=population_size)
        self._population_size = population_size
        self._pairs: list[tuple[float, float]] = []  # tr S and |∇L|² of each step
        self._forget_step()

    def update(self, gradients: nn.Module | Iterable[torch.Tensor], batch_size: int) -> None:
        """Take in one micro-batch, after its backward pass.

        Parameters
        ----------
        gradients : torch.nn.Module or iterable of torch.Tensor
            A model whose ``.grad`` *accumulate* over the micro-batches of a step; or the gradients of this micro-batch
            alone. The loss is a mean over the micro-batch; a constant factor, such as one over their number, makes no
            difference.
        batch_size : int
            Examples in the micro-batch, the same for all of a step.

        Raises
        ------
        ValueError
            If a gradient is NaN or infinite, the model has none, or `batch_size` differs from before in this step.
        """
        require_at_least_one(batch_size=batch_size)
        if self._batch_size not in (None, batch_size):
            raise ValueError(f"batch_size must be {self._batch_size}, as before in this step, got {batch_size}")
        total = _flat_gradient(gradients)  # (P,)
        if isinstance(gradients, nn.Module):
            own = total if self._total is None else total - self._total
        else:
            own, total = total, total if self._total is None else self._total + total
        square = own.square().sum().item()
        if not math.isfinite(square):
            raise ValueError(f"gradients must be finite, got a squared norm of {square} in {own.dtype}")
        self._batch_size, self._total = batch_size, total
        self._squares.append(square)

    def end_step(self) -> None:
        """Close a step, before its gradients are cleared.

        Raises
        ------
        ValueError
            If the step has fewer than 2 micro-batches.
        """
        count, size = len(self._squares), self._batch_size
        if count < 2:
            raise ValueError(f"a step must have at least 2 micro-batches, got {count}")
        large = self._total.square().sum().item() / count**2
        trace = (sum(self._squares) / count - large) / (1 / size - 1 / (count * size))
        self._pairs.append((trace, large - trace / (count * size)))
        self._forget_step()

    def estimate(self) -> Estimate:
        """Return the noise scale, with n the number of steps.

        Raises
        ------
        ValueError
            If there are fewer than 4 steps, ``|∇L|²`` is not four standard errors above zero, or few steps own tr S.
        """
        return self._ratio().estimate()

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return a confidence interval for the noise scale, as :func:`noise_scale_interval`."""
        return self._ratio().interval(level)

    def _ratio(self) -> "_Ratio":
        rows = torch.from_numpy(np.array(self._pairs, dtype=np.float64).reshape(-1, 2))
        return _of_rows(*rows.unbind(1), self._population_size, "steps")

    def _forget_step(self) -> None:
        self._batch_size: int | None = None
        self._total: torch.Tensor | None = None
        self._squares: list[float] = []


def _flat_gradient(gradients: nn.Module | Iterable[torch.Tensor]) -> torch.Tensor:
    """Lay gradients side by side in a copy, in single precision at least."""
    if isinstance(gradients, nn.Module):
        gradients = [p.grad for p in gradients.parameters() if p.requires_grad and p.grad is not None]
    parts = [g.detach().flatten().to(torch.promote_types(g.dtype, torch.float32)) for g in gradients]
    if not parts:
        raise ValueError("there must be a gradient, got none: call update after the backward pass")
    return torch.cat(parts)


# The noise scale of your own network


def gradient_noise_scale(
    model: nn.Module, loss: Loss, inputs: Any, targets: Any = None, *, chunk_size: int | None = None
) -> Estimate:
    """Estimate the gradient-noise scale of your network, with a standard error, from a sample of your data.

    At a batch size of the noise scale, half of the expected squared norm of a batch gradient is noise; much smaller
    batches waste steps, much larger ones examples.

    Parameters
    ----------
    model, loss, inputs, targets
        As in :func:`helpers.lab.gradients.per_sample_gradients`: tensors of n independent examples, or a
        ``DataLoader``, which is gone through twice.
    chunk_size : int, optional
        As there; examples treated at once.

    Returns
    -------
    Estimate
        B = ``tr S / |∇L|²`` in examples, both unbiased: ``tr S`` has divisor n - 1, and ``tr S / n``, the noise in the
        sample's own mean, is taken off ``|ḡ|²``. The standard error is that of the jackknife, corrected for the part
        of second order in ``|ḡ|²``, ``2 tr(S²)/n²``. Source: McCandlish et al. (2018), Appendix A.

    Raises
    ------
    ValueError
        If ``|∇L|²`` is not four standard errors above zero, or few examples own tr S, so that the skewness of its
        error exceeds 0.25; the message says how many examples are needed. If all examples have the same gradient, or
        there are fewer than 4. If tr S does not exceed rounding errors, 100 eps ``|∇L|²`` for the type that gradients
        are computed in, which refuses noise scales below 0.8 in bfloat16 and below 0.1 in float16. Also for the
        reasons of :func:`helpers.lab.gradients.per_sample_gradients`.

    Notes
    -----
    *How many examples.* The variance of ``|ḡ|²`` is ``4 ∇Lᵀ S ∇L / n + 2 tr(S²)/n²``, and four standard errors must
    stay below ``|∇L|²``. If a part ρ of tr S lies along ∇L and its other directions count as many as r equal ones,
    that takes about ``64 ρ B`` examples or ``5.7 B/√r``, whichever is more: 64 B where gradients differ only in
    length, a few B where they differ in a hundred directions. See :func:`noise_scale_interval` for fewer.

    *Trust.* Measured for normal, exponential, log-normal (σ = 0.5 to 1.5) and Pareto lengths (3 and 5) of gradients, 20
    to 800 examples, 400 samples each: ± 2 standard errors covered the truth or the answer was refused 91 to 100 times
    in 100. From 200 normal or exponential gradients on, where little is refused, they covered it 93 to 96 times in 100.
    Of sample sizes that are mostly refused, those given are the lucky ones, and cover less. No sample shows examples
    that it does not hold: where one label in 200 is wrong and its gradient 20 times as large, samples without one
    look faultless.

    *Cost.* About three backward passes over the sample, whatever the number of parameters; where a layer has no squared
    norms without gradients, those of a chunk. Memory: the activations of a chunk, and up to 32 gradients.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> model, x = nn.Linear(30, 1), torch.randn(400, 30)
    >>> y = x.sum(1, keepdim=True) + torch.randn(400, 1)
    >>> gradient_noise_scale(model, nn.functional.mse_loss, x, y)
    32.2 ± 2.4 (n = 400)
    """
    return _whole(model, loss, inputs, targets, chunk_size).estimate()


def noise_scale_interval(
    model: nn.Module,
    loss: Loss,
    inputs: Any,
    targets: Any = None,
    *,
    level: float = 0.95,
    chunk_size: int | None = None,
) -> tuple[float, float]:
    """Return a confidence interval for the gradient-noise scale, however few examples there are.

    Parameters
    ----------
    model, loss, inputs, targets, chunk_size
        As in :func:`gradient_noise_scale`.
    level : float
        Probability with which the interval covers the noise scale, for large n. At 95 %, for the laws under *Trust* in
        :func:`gradient_noise_scale`, it was measured as 91 to 98 % where lengths are normal or exponential, and 93 to
        100 % where they are log-normal or Pareto; as 87 % for the digits of chapter 2, from samples of a quarter or a
        half of the examples that a noise scale takes.

    Returns
    -------
    low, high : float
        The B for which ``tr S - B |∇L|²``, as estimated, is zero to within its standard errors (Fieller 1954). `high`
        is infinite if ``|∇L|²`` may be zero, or few examples own tr S, which is then mostly estimated too small.

    Raises
    ------
    ValueError
        If `level` is not between 0 and 1, or for other reasons of :func:`gradient_noise_scale`.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> model, x = nn.Linear(3, 1), torch.randn(16, 3)
    >>> y = x.sum(1, keepdim=True) + torch.randn(16, 1)
    >>> low, high = noise_scale_interval(model, nn.functional.mse_loss, x, y)
    >>> print(f"{low:.1f} to {high:.1f}")
    2.1 to inf
    """
    return _whole(model, loss, inputs, targets, chunk_size).interval(level)


def noise_scale_report(
    model: nn.Module, loss: Loss, inputs: Any, targets: Any = None, *, chunk_size: int | None = None
) -> Table:
    """Show the gradient-noise scale of a network and of each of its layers.

    Parameters
    ----------
    model, loss, inputs, targets, chunk_size
        As in :func:`gradient_noise_scale`.

    Returns
    -------
    Table
        Rows: the whole model, then each module with trainable parameters of its own. Columns: its number of
        parameters, tr S, ``|∇L|²``, the noise scale and its 95 % interval. A noise scale that
        :func:`gradient_noise_scale` would refuse has only the interval.

    Raises
    ------
    ValueError
        For the reasons of :func:`gradient_noise_scale`, except that no noise scale is refused for too few examples.

    Notes
    -----
    Computes all gradients, a chunk at a time: several times the cost of :func:`gradient_noise_scale`.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> model, x = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)), torch.randn(400, 3)
    >>> noise_scale_report(model, nn.functional.mse_loss, x, 2 + x[:, :1])
    layer      parameters  tr S  |∇L|²  noise scale  95 % interval
    the model          11  13.1   19.1  0.69 ± 0.04  0.606 to 0.77
    0                   8  1.89  0.559  3.37 ± 0.22   2.99 to 3.85
    2                   3  11.2   18.5  0.60 ± 0.04  0.53 to 0.683
    From 400 examples.
    """
    mean, groups = _mean_and_groups(model, loss, inputs, targets, chunk_size)
    columns = {"the model": slice(None)} | _columns(mean)
    direction = _flat(mean)
    found: dict[str, list[torch.Tensor]] = {layer: [] for layer in columns}
    for rows in gradient_chunks(model, loss, inputs, targets, chunk_size=chunk_size):
        rows = rows.to(direction.dtype)
        for layer, part in columns.items():
            own = rows[:, part]  # (n, p)
            found[layer].append(torch.stack([own.square().sum(1), own @ direction[part]], dim=1))
    dtype = _computed_in(model)
    lines = [
        _line(layer, direction[part], torch.cat(found[layer]).cpu().double(), groups.trace_of_square(part), dtype)
        for layer, part in columns.items()
    ]
    header = ["layer", "parameters", "tr S", "|∇L|²", "noise scale", "95 % interval"]
    return Table(header, lines, note=f"From {len(torch.cat(found['the model'])):,} examples.")


def _line(
    layer: str, mean: torch.Tensor, products: torch.Tensor, trace_of_square: float, dtype: torch.dtype
) -> list[str]:
    """Return a row of the report; without noise there is no noise scale."""
    squared_norm, parameters = mean.square().sum().item(), f"{len(mean):,}"
    trace = _trace(products, squared_norm)
    if trace <= (rounding := _rounding(squared_norm, dtype)):
        told = "0" if trace <= _rounding(squared_norm, mean.dtype) else f"below {rounding:.2g}"
        return [layer, parameters, told, f"{squared_norm:.3g}", "", ""]
    ratio = _ratio_of(products, squared_norm, trace_of_square)
    low, high = ratio.interval(0.95)
    told = repr(ratio.estimate()).split(" (")[0] if ratio.is_clear and ratio.is_balanced else ""
    interval = f"{low:.3g} to {high:.3g}" if math.isfinite(high) else f"at least {low:.3g}"
    return [layer, parameters, f"{ratio.trace:.3g}", f"{ratio.squared_norm:.3g}", told, interval]


# What the tool adds up


def _whole(model: nn.Module, loss: Loss, inputs: Any, targets: Any, chunk_size: int | None) -> "_Ratio":
    """Go through the data twice: for the mean gradient, and for each gradient's length and product with the mean."""
    mean, groups = _mean_and_groups(model, loss, inputs, targets, chunk_size)
    direction = _flat(mean)
    data = _joined(batches_of(inputs, targets, direction.device))
    products = torch.cat([_norms_and_products(model, loss, batch, mean, chunk_size) for batch in data])
    squared_norm = direction.square().sum().item()
    dtype = _computed_in(model)
    variance, rounding = _trace(products, squared_norm), _rounding(squared_norm, dtype)
    if variance <= _rounding(squared_norm, direction.dtype):
        raise ValueError(f"examples must differ in their gradients, got a variance of {variance:.3g}")
    if variance <= rounding:
        raise ValueError(
            f"tr S must exceed the rounding errors of {str(dtype).removeprefix('torch.')}, {rounding:.3g}, got "
            f"{variance:.3g}: compute in float32"
        )
    return _ratio_of(products, squared_norm, groups.trace_of_square())


def _mean_and_groups(
    model: nn.Module, loss: Loss, inputs: Any, targets: Any, chunk_size: int | None
) -> tuple[Gradients, "_Groups"]:
    """Return the mean gradient, in single precision at least, and sums over groups of examples."""
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    most = min(MOST_GROUPS, max(GROUP_ENTRIES // max(parameters, 1), FEWEST_GROUPS))
    size = _piece_size(model, inputs, targets, most)
    groups = _Groups(min(size, chunk_size or size), most)
    n, total = 0, {}
    for sums, examples in gradient_sums(model, loss, inputs, targets, chunk_size=groups.size):
        total = {name: total.get(name, 0) + part for name, part in sums.items()}
        groups.add(_flat(sums), examples)
        n += examples
    if n < SMALLEST_SAMPLE:
        raise ValueError(f"inputs must hold at least {SMALLEST_SAMPLE} examples, got {n}")
    return {name: part / n for name, part in total.items()}, groups


def _piece_size(model: nn.Module, inputs: Any, targets: Any, most: int) -> int:
    """Return how many examples of a batch go through the network together, so that there are enough groups."""
    if isinstance(inputs, Iterator) or not isinstance(inputs, torch.Tensor | Sized):
        raise ValueError(
            f"inputs must have a length and allow a second pass, as a DataLoader does, got {type(inputs).__name__}"
        )
    first = next(batches_of(inputs, targets, next(model.parameters()).device))
    n_batches = 1 if isinstance(inputs, torch.Tensor | tuple | list | Mapping) else len(inputs)
    return max(1, min(len(first), len(first) * n_batches // most))


class _Groups:
    """Sums of gradients over groups of equally many examples, of which there are at most an even number.

    When there would be more, pairs of groups become one.
    """

    def __init__(self, size: int, most: int) -> None:
        self.size, self.most = size, most // 2 * 2  # examples in a piece; groups
        self.sums: list[torch.Tensor] = []
        self.pieces, self.filled = 1, 1  # of a group; of the last group so far

    def add(self, total: torch.Tensor, n: int) -> None:
        """Take in a sum over n examples; left out if a batch has ended before the piece was full."""
        if n < self.size:
            return
        if self.sums and self.filled < self.pieces:
            self.sums[-1] += total
            self.filled += 1
            return
        if len(self.sums) == self.most:
            self.sums = [one.add_(other) for one, other in zip(self.sums[::2], self.sums[1::2], strict=True)]
            self.pieces *= 2
        self.sums.append(total)
        self.filled = 1

    def trace_of_square(self, part: slice = slice(None)) -> float:
        """Estimate tr(S²) from the products of group means, each of which has the covariance S over their size."""
        full = self.sums if self.filled == self.pieces else self.sums[:-1]
        rows = torch.stack([total[part] for total in full])  # (k, P)
        centered = rows - rows.mean(0)
        return _trace_of_square(centered @ centered.T) / (self.pieces * self.size) ** 2


def _trace_of_square(gram: torch.Tensor) -> float:
    """Return the mean of ``((x1 - x2)·(x3 - x4))² / 4`` over all choices of four of k vectors, from their products.

    It is unbiased for tr(S²), whatever their mean (Song et al. 2012, with linear kernels).
    """
    k = len(gram)
    products = gram.to(torch.float64)
    products = products - products.diagonal().diag()
    rows = products.sum(0)
    four = products.square().sum() + rows.sum().square() / ((k - 1) * (k - 2)) - 2 * rows.square().sum() / (k - 2)
    return max(four.item() / (k * (k - 3)), 0.0)


def _norms_and_products(
    model: nn.Module, loss: Loss, batch: Batch, mean: Gradients, chunk_size: int | None
) -> torch.Tensor:
    """Return |g_i|² and g_i · ḡ, shape (n, 2)."""
    data = model, loss, batch.inputs, batch.targets
    squares = per_sample_squared_norms(*data, chunk_size=chunk_size)
    along = per_sample_products(*data, direction=mean, chunk_size=chunk_size)
    return torch.stack([squares, along], dim=1).cpu().double()


def _joined(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Join small batches, since each call on one compares gradients first."""
    held: list[Batch] = []
    for batch in batches:
        held.append(batch)
        if sum(map(len, held)) >= EXAMPLES_AT_ONCE:
            yield _cat(held)
            held = []
    if held:
        yield _cat(held)


def _cat(batches: list[Batch]) -> Batch:
    columns = zip(*(batch.tensors for batch in batches), strict=True)
    return batches[0].with_tensors([torch.cat(column) for column in columns])


def _columns(mean: Gradients) -> dict[str, slice]:
    """Return which entries of the flat gradient belong to each module."""
    sizes: dict[str, int] = {}
    for name, gradient in mean.items():
        layer = name.rpartition(".")[0] or "its own"
        sizes[layer] = sizes.get(layer, 0) + gradient.numel()
    ends = itertools.accumulate(sizes.values())
    return {layer: slice(end - size, end) for (layer, size), end in zip(sizes.items(), ends, strict=True)}


def _flat(gradients: Gradients) -> torch.Tensor:
    return torch.cat([_wide(gradient).flatten() for gradient in gradients.values()])


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def _trace(products: torch.Tensor, squared_norm: float) -> float:
    n = len(products)
    return (products[:, 0].sum().item() - n * squared_norm) / (n - 1)


def _rounding(squared_norm: float, dtype: torch.dtype) -> float:
    """Return what tr S must exceed so that rounding errors, of a few eps times |∇L|², are a few percent of it."""
    return 100 * torch.finfo(dtype).eps * squared_norm


def _computed_in(model: nn.Module) -> torch.dtype:
    """Return the least precise type in which gradients are computed."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    dtypes = {p.dtype for p in trainable}
    if torch.is_autocast_enabled(trainable[0].device.type):
        dtypes.add(torch.get_autocast_dtype(trainable[0].device.type))
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _ratio_of(products: torch.Tensor, squared_norm: float, trace_of_square: float) -> "_Ratio":
    """Return tr S over |∇L|² from |g_i|² and g_i · ḡ, shape (n, 2), and |ḡ|².

    The influence values are those of the jackknife: without g_i, the sum of the others has the squared length
    ``n²|ḡ|² - 2n g_i·ḡ + |g_i|²``.
    """
    n, squares = len(products), products[:, 0]
    trace = _trace(products, squared_norm)
    without = n**2 * squared_norm - 2 * n * products[:, 1] + squares  # (n,)
    traces = (squares.sum() - squares - without / (n - 1)) / (n - 2)
    norms = without / (n - 1) ** 2 - traces / (n - 1)
    rows = torch.stack([traces, norms], dim=1)
    influence = (n - 1) * (rows.mean(0) - rows)
    return _Ratio(trace, squared_norm - trace / n, influence, 2 * trace_of_square / n**2, "examples")


# The ratio of tr S and |∇L|²


def _require_noise(differences: torch.Tensor) -> None:
    """Refuse small batches whose squared norms do not exceed those of large ones."""
    _require_replicates(differences, "pairs of batches")
    mean, error = differences.mean(), differences.std() / math.sqrt(len(differences))
    if not mean > STANDARD_ERRORS_ABOVE_ZERO * error:
        raise ValueError(
            f"the mean of small must exceed that of large by {STANDARD_ERRORS_ABOVE_ZERO} standard errors, since small "
            f"batches are noisier, got a difference of {mean:.3g} ± {error:.2g}: are the arguments exchanged, the "
            "norms not squared, or the batches too few?"
        )


def _require_replicates(rows: torch.Tensor, unit: str) -> None:
    if len(rows) < SMALLEST_SAMPLE:
        raise ValueError(f"a standard error needs at least {SMALLEST_SAMPLE} {unit}, got {len(rows)}")
    if not torch.isfinite(rows).all():
        raise ValueError(f"squared norms must be finite, got {int((~torch.isfinite(rows)).sum())} NaN or infinite")


@dataclass(frozen=True)
class _Ratio:
    """tr S over |∇L|², from an unbiased estimate of either.

    Parameters
    ----------
    trace, squared_norm : float
        T and G, the estimates of tr S and |∇L|².
    influence : torch.Tensor, shape (n, 2)
        Centered values of which T and G are, to first order, the means: one row for each replicate.
    second_order : float
        The part of Var G that is of second order in 1/n. From the influence values it comes out twice too large.
    unit : str
        What the replicates are.
    """

    trace: float
    squared_norm: float
    influence: torch.Tensor
    second_order: float
    unit: str

    @property
    def n(self) -> int:
        return len(self.influence)

    @property
    def covariance(self) -> tuple[float, float, float]:
        """Var T, Cov(T, G) and Var G."""
        n = self.n
        (tt, tg), (_, gg) = (self.influence.T @ self.influence / (n * (n - 1))).tolist()
        return tt, tg, max(gg - self.second_order, self.second_order)

    @property
    def is_clear(self) -> bool:
        """Whether G is so many standard errors above zero that the error of the ratio may be nearly normal."""
        return self.squared_norm > STANDARD_ERRORS_ABOVE_ZERO * math.sqrt(self.covariance[2])

    @property
    def asymmetry(self) -> float:
        """Size of the skewness of T's own error."""
        influence = self.influence[:, 0]
        spread = influence.square().mean().item()
        return abs(influence.pow(3).mean().item()) / (spread**1.5 * math.sqrt(self.n)) if spread > 0 else 0.0

    @property
    def is_balanced(self) -> bool:
        """Whether T hangs on so many replicates that its error is nearly normal."""
        return self.asymmetry <= MOST_ASYMMETRY

    def estimate(self) -> Estimate:
        """Return the ratio, if its error is nearly normal."""
        tt, tg, gg = self.covariance
        if not self.is_clear:
            raise ValueError(self._refusal(math.sqrt(gg)))
        if not self.is_balanced:
            raise ValueError(self._refusal_of_few())
        ratio = self.trace / self.squared_norm
        variance = (tt - 2 * ratio * tg + ratio**2 * gg) / self.squared_norm**2
        influence = self.influence[:, 0] - ratio * self.influence[:, 1]
        spread = influence.square().mean().item()
        skewness = influence.pow(3).mean().item() / spread**1.5 if spread > 0 else 0.0
        return Estimate(ratio, math.sqrt(max(variance, 0.0)), self.n, skewness)

    def interval(self, level: float) -> tuple[float, float]:
        """Return the B >= 0 for which T - B G is within c of its standard errors from zero (Fieller 1954).

        They satisfy ``(G² - c² Var G) B² - 2 (TG - c² Cov(T, G)) B + (T² - c² Var T) <= 0``. Where few replicates own
        the variance, T is mostly too small, and no upper end is given.
        """
        if not 0 < level < 1:
            raise ValueError(f"level must lie in (0, 1), got {level}")
        t, g, c2 = self.trace, self.squared_norm, NormalDist().inv_cdf((1 + level) / 2) ** 2
        tt, tg, gg = self.covariance
        a, b, c = g**2 - c2 * gg, t * g - c2 * tg, t**2 - c2 * tt
        if a > 0 and g < 0:
            raise ValueError(
                f"|∇L|² must not be negative, got {g:.3g} with standard error {math.sqrt(gg):.3g}: "
                "is population_size missing?"
            )
        root = math.sqrt(max(b**2 - a * c, 0.0))
        low = max(c / (b + root), 0.0) if c > 0 else 0.0  # the smaller root for a > 0, the positive one for a < 0
        return low, (b + root) / a if a > 0 and self.is_balanced else math.inf

    def _refusal(self, error: float) -> str:
        bound = self._lower_bound() if self.squared_norm > -error else ""
        return (
            f"|∇L|² must be {STANDARD_ERRORS_ABOVE_ZERO} standard errors above zero, got {self.squared_norm:.3g} with "
            f"standard error {error:.3g}: {self.n:,} {self.unit} are too few to tell the gradient from its noise, "
            f"{self._needed(error)}{bound}"
        )

    def _refusal_of_few(self) -> str:
        needed = _two_digits_up(self.n * (self.asymmetry / MOST_ASYMMETRY) ** 2)
        return (
            f"tr S must not hang on few of the {self.unit}: the skewness of its error must be at most "
            f"{MOST_ASYMMETRY}, got {self.asymmetry:.2g} with {self.n:,}; at least {needed:,} would be needed"
            f"{self._lower_bound()}"
        )

    def _lower_bound(self) -> str:
        low, _ = self.interval(0.95)
        return f"; the noise scale is at least {low:.3g}, with 97.5 % confidence" if low > 0 else ""

    def _needed(self, error: float) -> str:
        """Say how many replicates would do: Var G falls as ``first/n + second/n²``."""
        known = self.squared_norm > error  # else what it may be at most
        aim = (self.squared_norm if known else self.squared_norm + 2 * error) / STANDARD_ERRORS_ABOVE_ZERO
        if not aim > 0:
            return "and as it is measured below zero, no number can be given"
        first, second = self.n * (error**2 - self.second_order), self.n**2 * self.second_order
        needed = (first + math.sqrt(first**2 + 4 * aim**2 * second)) / (2 * aim**2)
        needed = _two_digits_up(needed)
        return f"about {needed:,} would do" if known else f"at least {needed:,} would be needed"


def _two_digits_up(count: float) -> int:
    unit = 10 ** max(math.floor(math.log10(max(count, 1.0))) - 1, 0)
    return math.ceil(count / unit) * unit


def _of_rows(traces: torch.Tensor, norms: torch.Tensor, population_size: int | None, unit: str) -> _Ratio:
    """Return the ratio of means of paired estimates of tr S and |∇L|², shape (n,)."""
    _require_replicates(traces + norms, unit)
    if population_size is not None:
        norms = norms + traces / population_size
    rows = torch.stack([traces, norms], dim=1)  # (n, 2)
    mean = rows.mean(0)
    return _Ratio(*mean.tolist(), rows - mean, 0.0, unit)


def _shuffles(n: int, population_size: int, generator: torch.Generator) -> torch.Tensor:
    where = {"generator": generator, "device": generator.device}
    if population_size <= SMALL_POPULATION:  # sorting random keys, many rows at once; two keys are never equal
        return torch.rand((n, population_size), dtype=torch.float64, **where).argsort(1)
    return torch.stack([torch.randperm(population_size, **where) for _ in range(n)])


def _floyd(n_batches: int, batch_size: int, population_size: int, generator: torch.Generator) -> torch.Tensor:
    """Draw batches, shape (m, n_batches), by Floyd's algorithm (Bentley and Floyd 1987), for all batches at once.

    Draw from the first N-m+1, N-m+2, … N examples in turn, and take the last of them if the one drawn is in the batch
    already.
    """
    # The smallest type that holds N: comparing pairs is a matter of memory traffic.
    fits = next(x for x in (torch.int16, torch.int32, torch.int64) if population_size <= torch.iinfo(x).max)
    batches = torch.empty((batch_size, n_batches), dtype=fits, device=generator.device)
    first = population_size - batch_size
    for last, drawn in enumerate(batches, start=first):
        if population_size < 2**16:  # 32 random bits modulo last + 1: no example is likelier by more than N/2³²
            drawn.random_(0, last + 1, generator=generator)
        else:
            drawn.copy_(torch.empty_like(drawn, dtype=torch.float64).uniform_(0, last + 1, generator=generator))
    rows = batches.numpy() if batches.is_cpu else batches  # NumPy compares in a third of the time of PyTorch
    for j in range(1, batch_size):
        rows[j][(rows[:j] == rows[j]).any(0)] = first + j
    return batches


def _as_floats(*sizes: int) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(size, dtype=np.float64) for size in sizes)  # m N³ does not fit into an integer


def _require_sizes(batch_size: int, population_size: int, *, smallest: int = 1) -> None:
    require_at_least_one(batch_size=batch_size)
    if not (np.asarray(batch_size) <= np.asarray(population_size)).all():
        raise ValueError(f"batch_size must not exceed population_size {population_size}, got {batch_size}")
    if not (np.asarray(population_size) >= smallest).all():
        raise ValueError(
            f"population_size must be at least {smallest} for batch_size {batch_size}, got {population_size}"
        )
