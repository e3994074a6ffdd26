"""Chapter *The stochastic gradient and its noise*: what a batch gradient adds to the gradient of the training risk.

Throughout, ``population_size`` (N) examples have the gradients g_1 … g_N, whose mean is the gradient ∇L of the training
risk. A batch holds ``batch_size`` (m) of them, without replacement unless said otherwise; its noise ξ is the mean of
its gradients minus ∇L. S, with entries S_k² on its diagonal, is the covariance of g_1 … g_N with divisor N - 1.

The gradients here are those of the loss of *one* example. With ``reduction="mean"``, PyTorch's default, the gradient
of a batch loss is their mean: the 1/m is already in it. With ``reduction="sum"`` it is m times that.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from helpers.lab._problems import Loss
from helpers.lab.checks import require_at_least_one, require_positive
from helpers.lab.estimates import Estimate, function_of
from helpers.lab.gradients import gradient_chunks

# A ratio is reported only if its denominator, the squared gradient norm, is this many standard errors above zero:
# nearer to zero the ratio's error is not normal.
STANDARD_ERRORS_ABOVE_ZERO = 4

# Up to here sorting a row of random keys is faster than a call of randperm.
SMALL_POPULATION = 64
# Batches that Floyd's algorithm draws at once: enough to amortize a call, few enough for the cache.
FLOYD_CHUNK = 2**14


# Closed forms


def finite_population_variance(variance: float, batch_size: int, population_size: int) -> float:
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


def with_replacement_variance(variance: float, batch_size: int, population_size: int) -> float:
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


def finite_population_correction(batch_size: int, population_size: int) -> float:
    """Return the noise variance without replacement over that with replacement, ``1 - (m-1)/(N-1)``.

    Raises
    ------
    ValueError
        If not ``1 <= batch_size <= population_size``, or `population_size` is 1.
    """
    _require_sizes(batch_size, population_size, smallest=2)
    return 1 - (np.asarray(batch_size) - 1) / (np.asarray(population_size) - 1)


def successive_correlation(batch_size: int, population_size: int) -> float:
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


def batch_skewness(skewness: float, batch_size: int, population_size: int) -> float:
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


def batch_excess_kurtosis(excess_kurtosis: float, batch_size: int, population_size: int) -> float:
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
    squared_norm: float, trace: float, batch_size: int, population_size: int, *, replacement: bool = False
) -> float:
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
    return gradients[batches].mean(batches.ndim - 1) - gradients.mean(0)


# The noise scale of your own network


def gradient_noise_scale(
    model: nn.Module, loss: Loss, inputs: torch.Tensor, targets: torch.Tensor, *, chunk_size: int = 256
) -> Estimate:
    """Estimate the gradient-noise scale of your network, with a standard error, from a sample of your data.

    At a batch size of the noise scale, half of the expected squared norm of a batch gradient is noise; much smaller
    batches waste steps, much larger ones examples.

    Parameters
    ----------
    model, loss
        As in :func:`~helpers.lab.gradients.per_sample_gradients`; whether `loss` averages or sums over a batch makes
        no difference.
    inputs, targets : torch.Tensor, shape (n, ...)
        Independent examples, n of at least 2; a few times the noise scale to be found.
    chunk_size : int
        Per-sample gradients held at once, at least 2.

    Returns
    -------
    Estimate
        ``tr S / |∇L|²`` in examples, both unbiased: ``tr S`` has divisor n - 1, and ``tr S / n``, the noise in the
        sample's own mean, is taken off ``|ḡ|²``. The standard error is of first order, with the part of second order
        in ``|ḡ|²``, ``2 tr(S²)/n²``. Source: McCandlish et al. (2018), Appendix A.

    Raises
    ------
    ValueError
        If the gradient cannot be told from noise: ``|∇L|²`` is not four standard errors above zero; then more
        examples are needed. If all examples have the same gradient, or `chunk_size` is below 2. Also for the reasons
        of :func:`~helpers.lab.gradients.per_sample_gradients`.
    """
    n = len(inputs)
    if n < 2:
        raise ValueError(f"inputs must hold at least 2 examples, got {n}")
    require_at_least_one(chunk_size=chunk_size)
    if chunk_size < 2:
        raise ValueError(f"chunk_size must be at least 2, since pairs of examples are compared, got {chunk_size}")
    mean = sum(rows.sum(0) for rows in gradient_chunks(model, loss, inputs, targets, chunk_size=chunk_size)) / n  # (P,)
    deviations, along, overlap = _compare(gradient_chunks(model, loss, inputs, targets, chunk_size=chunk_size), mean)
    trace = deviations.sum() / (n - 1)
    if not trace > torch.finfo(trace.dtype).eps * mean.square().sum():
        raise ValueError(f"examples must differ in their gradients, got a variance of {trace:.3g}")
    squared_norm = mean.square().sum() - trace / n
    second_order = 2 * overlap / n**2
    _require_signal(squared_norm, _variance_of_mean(2 * along, second_order).sqrt(), n)
    scale = trace / squared_norm
    influence = (deviations - deviations.mean() - scale * 2 * along) / squared_norm
    variance = _variance_of_mean(influence, second_order * (scale / squared_norm).square())
    skewness = influence.pow(3).mean() / influence.square().mean().pow(1.5)
    return Estimate(scale.item(), variance.sqrt().item(), n, skewness.item())


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
        Squared norms of mean-reduced batch gradients at the same parameters; different rows independent.
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
        If the shapes differ, not ``1 <= b < B <= N``, ``|∇L|²`` is not four standard errors above zero, or so few
        that the ratio's error is not of first order (see :func:`helpers.lab.estimates.function_of`).
    """
    if small.shape != large.shape or small.ndim != 1:
        raise ValueError(f"small and large must have one shape (n,), got {tuple(small.shape)}, {tuple(large.shape)}")
    require_at_least_one(small_batch_size=small_batch_size)
    if not small_batch_size < large_batch_size:
        raise ValueError(f"small_batch_size must be below {large_batch_size}, got {small_batch_size}")
    if population_size is not None:
        _require_sizes(large_batch_size, population_size)

    def trace(norms: torch.Tensor) -> torch.Tensor:
        return (norms[0] - norms[1]) / (1 / small_batch_size - 1 / large_batch_size)

    def squared_norm(norms: torch.Tensor) -> torch.Tensor:
        weighted = large_batch_size * norms[1] - small_batch_size * norms[0]
        missing = 0 if population_size is None else trace(norms) / population_size
        return weighted / (large_batch_size - small_batch_size) + missing

    rows = torch.stack([small, large], dim=1)  # (n, 2)
    found = function_of(squared_norm, rows)
    if not found.value > STANDARD_ERRORS_ABOVE_ZERO * found.stderr:
        raise ValueError(
            f"|∇L|² must be {STANDARD_ERRORS_ABOVE_ZERO} standard errors above zero, got {found.value:.3g} "
            f"± {found.stderr:.3g}: measure more batches"
        )
    return function_of(lambda norms: trace(norms) / squared_norm(norms), rows)


def _compare(chunks: Iterator[torch.Tensor], mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compare the deviations d_i = g_i - ḡ with themselves, with ḡ and with each other.

    Returns
    -------
    deviations, along : torch.Tensor, shape (n,)
        |d_i|² and d_i · ḡ.
    overlap : torch.Tensor
        The mean of (d_i · d_j)² over the pairs within a chunk, which estimates tr(S²).
    """
    deviations, along, overlaps, pairs = [], [], 0.0, 0
    for rows in chunks:
        centered = rows - mean
        deviations.append(centered.square().sum(1))
        along.append(centered @ mean)
        products = (centered @ centered.T).square()
        overlaps += products.sum() - products.diagonal().sum()
        pairs += len(rows) * (len(rows) - 1)
    return torch.cat(deviations), torch.cat(along), overlaps / pairs


def _variance_of_mean(influence: torch.Tensor, second_order: torch.Tensor) -> torch.Tensor:
    """Return the variance of an estimate to first order, from its influences, plus its part of second order.

    For ``|ḡ|²`` the two are 4 ∇Lᵀ S ∇L / n and 2 tr(S²)/n². With ḡ in place of ∇L in the influences, the first comes
    out too large by twice the second.
    """
    return torch.maximum(influence.square().mean() / len(influence) - second_order, second_order)


def _require_signal(squared_norm: torch.Tensor, error: torch.Tensor, n: int) -> None:
    if not squared_norm > STANDARD_ERRORS_ABOVE_ZERO * error:
        raise ValueError(
            f"|∇L|² must be {STANDARD_ERRORS_ABOVE_ZERO} standard errors above zero, got {squared_norm:.3g} with "
            f"standard error {error:.3g}: {n} examples are too few to tell the gradient from its noise"
        )


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
    uniform = torch.empty(n_batches, dtype=torch.float64, device=generator.device)
    for j, drawn in enumerate(batches):
        last = population_size - batch_size + j
        drawn.copy_(uniform.uniform_(0, last + 1, generator=generator))
        if j:
            nearest = (batches[:j] ^ drawn).amin(0)  # 0 if one of the earlier is the same; far faster than == and any
            drawn.masked_fill_(nearest.logical_not(), last)
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
