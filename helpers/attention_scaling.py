"""Chapter *Why divide by √d?*: how large products of vectors are in high dimension, and what a softmax makes of them.

Throughout, ``queries`` and ``keys`` are vectors of `dimension` d, a *score* is a product qᵀk times a factor, and the
*participation* of attention weights s is ``Σ_j s_j²``: one over the number of keys that share the attention.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from scipy import special, stats
from scipy.optimize import brentq
from torch import nn
from tqdm import tqdm

from helpers.lab import estimates
from helpers.lab.attention import AttentionCall, watch_attention
from helpers.lab.batches import Batch, batches_of
from helpers.lab.checks import require_at_least_one, require_between, require_not_negative, require_positive
from helpers.lab.estimates import Estimate
from helpers.lab.tables import Table
from helpers.lab.watch import untouched

Numbers = float | np.ndarray


# Closed forms: angles and lengths


def cosine_variance(dimension: int) -> float:
    """Return the variance of the cosine between a direction and an independent, uniformly random one, ``1/d``.

    Claim ``attention_scaling.cosine_variance``.

    Raises
    ------
    ValueError
        If `dimension` is below 1.
    """
    require_at_least_one(dimension=dimension)
    return 1 / dimension


def cosine_cdf(cosine: Numbers, dimension: int) -> Numbers:
    """Return the probability that a random cosine is at most `cosine`: (1 + cos)/2 is Beta((d-1)/2, (d-1)/2).

    Claim ``attention_scaling.cosine_variance``.

    Raises
    ------
    ValueError
        If a cosine is not in [-1, 1], or `dimension` below 2, where a cosine is a sign.
    """
    require_between(-1, 1, cosine=cosine)
    _require_two(dimension)
    shape = (dimension - 1) / 2
    return stats.beta.cdf((1 + np.asarray(cosine)) / 2, shape, shape)


def cosine_tail(limit: Numbers, dimension: int) -> Numbers:
    """Return ``P(|cos| ≥ limit)`` for two random directions, exactly.

    Claim ``attention_scaling.cosine_variance``.

    Raises
    ------
    ValueError
        If a limit is not in [0, 1], or `dimension` below 2.
    """
    require_between(0, 1, limit=limit)
    _require_two(dimension)
    shape = (dimension - 1) / 2
    return 2 * stats.beta.sf((1 + np.asarray(limit)) / 2, shape, shape)


def cosine_tail_bound(limit: Numbers, dimension: int) -> Numbers:
    """Return ``2 exp(-d limit²/2)``, an upper bound on :func:`cosine_tail`.

    Claim ``attention_scaling.cosine_variance``.

    Raises
    ------
    ValueError
        If a limit is not in [0, 1], or `dimension` below 1.
    """
    require_between(0, 1, limit=limit)
    require_at_least_one(dimension=dimension)
    return 2 * np.exp(-dimension * np.square(limit) / 2)


def nearly_orthogonal_count(dimension: int, limit: float, probability: float = 0.5) -> int:
    """Return how many random directions have all their cosines below a limit, with at least this probability.

    Parameters
    ----------
    dimension : int
    limit : float
        What the size of every cosine must stay below.
    probability : float
        That it does. The union bound over pairs, ``N(N-1)/2 · P(|cos| ≥ limit) ≤ 1 - probability``, is solved for N.

    Returns
    -------
    int
        At least 1. Claim ``attention_scaling.nearly_orthogonal``.

    Raises
    ------
    ValueError
        If `limit` or `probability` is not inside (0, 1), or `dimension` below 2.

    Examples
    --------
    >>> nearly_orthogonal_count(512, 0.25)
    10276
    """
    if not 0 < limit < 1:
        raise ValueError(f"limit must lie in (0, 1), got {limit}")
    if not 0 < probability < 1:
        raise ValueError(f"probability must lie in (0, 1), got {probability}")
    pairs = (1 - probability) / cosine_tail(limit, dimension)
    return math.floor((1 + math.sqrt(1 + 8 * pairs)) / 2)


def norm_mean(dimension: int) -> float:
    """Return the mean length of a vector of d independent standard normal numbers, ``√2 Γ((d+1)/2) / Γ(d/2)``.

    Claim ``attention_scaling.norm``.

    Raises
    ------
    ValueError
        If `dimension` is below 1.
    """
    require_at_least_one(dimension=dimension)
    return math.sqrt(2) * float(special.poch(dimension / 2, 0.5))


def norm_variance(dimension: int) -> float:
    """Return the variance of that length, ``d - E|x|²``, which tends to 1/2. Claim ``attention_scaling.norm``.

    Raises
    ------
    ValueError
        If `dimension` is below 1.
    """
    return dimension - norm_mean(dimension) ** 2


# Closed forms: products


def dot_product_variance(
    dimension: int,
    query_variance: float = 1.0,
    key_variance: float = 1.0,
    query_mean: float = 0.0,
    key_mean: float = 0.0,
) -> float:
    """Return ``Var(qᵀk) = d (σ_q²σ_k² + μ_q²σ_k² + μ_k²σ_q²)``.

    Parameters
    ----------
    dimension : int
    query_variance, key_variance, query_mean, key_mean : float
        Of each component; all components of both vectors are uncorrelated, and queries independent of keys.

    Returns
    -------
    float
        Claim ``attention_scaling.dot_product_variance``.

    Raises
    ------
    ValueError
        If `dimension` is below 1 or a variance negative.
    """
    require_at_least_one(dimension=dimension)
    require_not_negative(query_variance=query_variance, key_variance=key_variance)
    of_means = query_mean**2 * key_variance + key_mean**2 * query_variance
    return dimension * (query_variance * key_variance + of_means)


def initial_score_variance(
    query_weight_variance: float,
    query_width: int,
    key_weight_variance: float,
    key_width: int,
    query_bias_variance: float = 0.0,
    key_bias_variance: float = 0.0,
) -> float:
    """Return the mean square of ``qᵀk/√d_k`` over weights at initialization, for inputs of mean square 1.

    Parameters
    ----------
    query_weight_variance, key_weight_variance : float
        Of the independent weights of mean zero by which queries and keys are made.
    query_width, key_width : int
        How many inputs they have; a layer norm gives them mean square 1.
    query_bias_variance, key_bias_variance : float

    Returns
    -------
    float
        ``(n_q Var(w_q) + Var(b_q)) (n_k Var(w_k) + Var(b_k))``, whatever d_k is, for any two tokens.
        Claim ``attention_scaling.initial_variance``.

    Raises
    ------
    ValueError
        If a variance is negative or a width below 1.

    Examples
    --------
    ``nn.Linear`` draws weights and biases of variance 1/(3n):

    >>> width = 384
    >>> round(initial_score_variance(1 / (3 * width), width, 1 / (3 * width), width), 4)
    0.1111
    """
    require_not_negative(query_weight_variance=query_weight_variance, key_weight_variance=key_weight_variance)
    require_not_negative(query_bias_variance=query_bias_variance, key_bias_variance=key_bias_variance)
    require_at_least_one(query_width=query_width, key_width=key_width)
    of_query = query_width * query_weight_variance + query_bias_variance
    return of_query * (key_width * key_weight_variance + key_bias_variance)


class ScoreDecomposition(NamedTuple):
    """Three parts of the variance of all products qᵀk, and their sum.

    Each is a tensor of the leading shape of queries and keys.
    """

    total: torch.Tensor
    covariances: torch.Tensor  # tr(Σ_q Σ_k): each query has keys of its own
    query_mean: torch.Tensor  # μ_qᵀ Σ_k μ_q: keys that all queries prefer
    key_mean: torch.Tensor  # μ_kᵀ Σ_q μ_k: what a query has with all keys alike, which no softmax sees


def score_decomposition(queries: torch.Tensor, keys: torch.Tensor) -> ScoreDecomposition:
    """Return the variance of qᵀk over all pairs, ``tr(Σ_qΣ_k) + μ_qᵀΣ_kμ_q + μ_kᵀΣ_qμ_k``, and its three parts.

    Parameters
    ----------
    queries, keys : shapes (..., n, d) and (..., m, d)
        Means and covariances are theirs, with divisors n and m.

    Returns
    -------
    ScoreDecomposition
        Of shape (...), exact for any vectors: over all n·m pairs the two members of a pair are independent.
        Claim ``attention_scaling.score_decomposition``.

    Raises
    ------
    ValueError
        If the dimensions of queries and keys differ or there are none.
    """
    if queries.ndim < 2 or keys.ndim < 2 or queries.shape[-1] != keys.shape[-1]:
        raise ValueError(
            "queries and keys must have shapes (..., n, d) and (..., m, d), "
            f"got {tuple(queries.shape)} and {tuple(keys.shape)}"
        )
    if not queries.shape[-2] or not keys.shape[-2]:
        raise ValueError(f"there must be a query and a key, got {queries.shape[-2]} and {keys.shape[-2]}")
    (query_mean, of_queries), (key_mean, of_keys) = _moments(queries), _moments(keys)
    covariances = (of_queries * of_keys).sum((-1, -2))
    by_query_mean = (query_mean @ of_keys @ query_mean.mT)[..., 0, 0]
    by_key_mean = (key_mean @ of_queries @ key_mean.mT)[..., 0, 0]
    return ScoreDecomposition(covariances + by_query_mean + by_key_mean, covariances, by_query_mean, by_key_mean)


def _moments(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean, shape (..., 1, d), and covariance, shape (..., d, d)."""
    mean = vectors.mean(-2, keepdim=True)
    centered = vectors - mean
    return mean, centered.mT @ centered / vectors.shape[-2]


# Closed forms: what the softmax makes of products


def softmax_jacobian_norm(weights: torch.Tensor) -> torch.Tensor:
    """Return the spectral norm of the softmax's Jacobian, ``diag(s) - ssᵀ``.

    Parameters
    ----------
    weights : shape (..., n)
        s, what the softmax gave.

    Returns
    -------
    torch.Tensor, shape (...)
        At most 1/2. Claim ``attention_scaling.softmax_saturation``.

    Raises
    ------
    ValueError
        If there are no weights.
    """
    if weights.ndim < 1 or not weights.shape[-1]:
        raise ValueError(f"weights must have shape (..., n) with n at least 1, got {tuple(weights.shape)}")
    jacobian = torch.diag_embed(weights) - weights[..., :, None] * weights[..., None, :]
    return torch.linalg.eigvalsh(jacobian)[..., -1]


def mean_jacobian_norm(dimension: int, factor: float = 1.0) -> float:
    """Return the mean of ``‖diag(s) - ssᵀ‖`` for two keys and standard normal vectors.

    Parameters
    ----------
    dimension : int
        Of query and keys.
    factor : float
        What the two products qᵀk are multiplied by.

    Returns
    -------
    float
        The norm is ``sech²(x/2)/2``, where the difference x of two scores is, given the query, N(0, 2·factor²·|q|²).
        Without factor it is near ``1/√(πd)`` for large d. Claim ``attention_scaling.softmax_saturation``.

    Raises
    ------
    ValueError
        If `dimension` is below 1 or `factor` not positive.

    Examples
    --------
    >>> round(mean_jacobian_norm(2048), 4), round(median_jacobian_norm(2048), 7)
    (0.0125, 0.0)
    """
    require_at_least_one(dimension=dimension)
    require_positive(factor=factor)
    lengths, weights = _lengths(dimension)
    inner = [_normal_expectation(_two_key_norm, math.sqrt(2) * factor * length) for length in lengths]
    return float(weights @ inner)


def median_jacobian_norm(dimension: int, factor: float = 1.0) -> float:
    """Return the median of what :func:`mean_jacobian_norm` is the mean of; parameters and errors are the same.

    The norm falls with the size of the difference x, so that it is the norm at the median of ``|x|``.
    """
    require_at_least_one(dimension=dimension)
    require_positive(factor=factor)
    lengths, weights = _lengths(dimension)

    def excess(log_size: float) -> float:
        inside = 2 * stats.norm.cdf(math.exp(log_size) / (math.sqrt(2) * factor * lengths)) - 1
        return float(weights @ inside) - 0.5

    middle = math.log(factor * math.sqrt(2 * dimension))
    return float(_two_key_norm(math.exp(brentq(excess, middle - 20, middle + 20, xtol=1e-14))))


def participation(n_keys: int, variance: float) -> float:
    """Return the mean participation ``E Σ s_j²`` of a softmax over independent scores N(0, variance), exactly.

    Parameters
    ----------
    n_keys : int
    variance : float
        τ², of each score.

    Returns
    -------
    float
        ``n ∫₀^∞ t E[e^(2τu) e^(-t e^(τu))] φ(t)^(n-1) dt`` with ``φ(t) = E e^(-t e^(τu))``, u standard normal: from 1/n
        at variance 0 to 1. Claim ``attention_scaling.freezing``.

    Raises
    ------
    ValueError
        If `n_keys` is below 1 or `variance` negative.

    Examples
    --------
    >>> round(participation(16, 1.0), 3), round(participation(16, 32.0), 3)
    (0.132, 0.697)
    """
    require_at_least_one(n_keys=n_keys)
    require_not_negative(variance=variance)
    deviation = math.sqrt(variance)
    # With t = e^x both expectations are functions of x, analytic up to imaginary parts of π/2: a step of 1/4 will do.
    x = np.arange(-9 * deviation - 20 - math.log(n_keys), 9 * deviation + 6, 0.25)
    loss, bump = _narrow(x, deviation) if deviation <= 0.5 else _broad(x, deviation)
    log_survival = np.log1p(-np.minimum(loss, 1 - 1e-16))
    return float(0.25 * n_keys * (bump * np.exp((n_keys - 1) * log_survival)).sum())


def _narrow(x: np.ndarray, deviation: float) -> tuple[np.ndarray, np.ndarray]:
    """Return ``1 - E e^(-e^y)`` and ``E e^(2y) e^(-e^y)``, y ~ N(x, τ²), by the trapezoidal rule over u."""
    u, weights = _normal_grid(deviation)
    y = x[:, None] + deviation * u
    return -np.expm1(-np.exp(y)) @ weights, np.exp(2 * y - np.exp(y)) @ weights


def _broad(x: np.ndarray, deviation: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the same by the trapezoidal rule over y; the first after an integration by parts."""
    y = np.arange(-40, 5, 0.25)
    bump = np.exp(y - np.exp(y))
    z = (x[:, None] - y) / deviation
    return 0.25 * stats.norm.cdf(z) @ bump, 0.25 / deviation * stats.norm.pdf(z) @ (np.exp(y) * bump)


def frozen_participation(n_keys: int, variance: float) -> float:
    """Return the limit of :func:`participation` for many keys, ``1 - √(2 ln n / τ²)``, or 0 below the transition.

    That of the random energy model at fixed ``τ² / ln n`` as n grows. Claim ``attention_scaling.freezing``.

    Raises
    ------
    ValueError
        If `n_keys` is below 1 or `variance` not positive.
    """
    require_at_least_one(n_keys=n_keys)
    require_positive(variance=variance)
    return max(0.0, 1 - math.sqrt(2 * math.log(n_keys) / variance))


def _two_key_norm(difference: Numbers) -> Numbers:
    return 0.5 / np.cosh(np.minimum(np.abs(difference), 700.0) / 2) ** 2


def _lengths(dimension: int) -> tuple[np.ndarray, np.ndarray]:
    """Return nodes and weights for expectations over the length of a standard normal vector."""
    low, high = max(0.0, math.sqrt(dimension) - 9), math.sqrt(dimension) + 9
    nodes, weights = np.polynomial.legendre.leggauss(240)
    lengths = low + (high - low) * (nodes + 1) / 2
    return lengths, weights * (high - low) / 2 * stats.chi.pdf(lengths, dimension)


def _normal_grid(deviation: float) -> tuple[np.ndarray, np.ndarray]:
    """Return nodes and weights for E f(τu), u standard normal, f analytic up to imaginary parts of π/2.

    The trapezoidal rule with step δ is off by about ``exp(-π²/(τδ))`` and ``exp(-2π²/δ²)``, both below 1e-16 here.
    """
    step = 0.5 if deviation <= 0.5 else 0.25 / deviation
    u = np.arange(-math.ceil(9 / step), math.ceil(9 / step) + 1) * step
    return u, step * stats.norm.pdf(u)


def _normal_expectation(function: Callable[[np.ndarray], np.ndarray], deviation: float) -> float:
    u, weights = _normal_grid(deviation)
    return float(weights @ function(deviation * u))


def _require_two(dimension: int) -> None:
    if not dimension >= 2:
        raise ValueError(f"dimension must be at least 2, got {dimension}")


# Samplers


def sample_cosines(
    n_samples: int, dimension: int, *, generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Draw pairs of independent standard normal vectors, and return the cosine of each pair.

    Parameters
    ----------
    n_samples, dimension : int
    generator : torch.Generator
        Results are on its device.
    dtype : torch.dtype

    Returns
    -------
    torch.Tensor, shape (n_samples,)

    Raises
    ------
    ValueError
        If a count is below 1.
    """
    require_at_least_one(n_samples=n_samples, dimension=dimension)
    pairs = torch.randn((2, n_samples, dimension), generator=generator, dtype=dtype, device=generator.device)
    lengths = pairs.square().sum(-1).sqrt()
    return (pairs[0] * pairs[1]).sum(-1) / (lengths[0] * lengths[1])


def sample_scores(
    n_samples: int,
    n_keys: int,
    dimension: int,
    *,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float64,
    max_numbers: int = 2**22,
) -> torch.Tensor:
    """Draw a query and its keys, all standard normal, and return their products.

    Parameters
    ----------
    n_samples, n_keys, dimension : int
    generator : torch.Generator
        Results are on its device.
    dtype : torch.dtype
    max_numbers : int
        No more components of keys are held at a time, unless one sample has more.

    Returns
    -------
    torch.Tensor, shape (n_samples, n_keys)
        ``q_iᵀ k_ij``, without a factor.

    Raises
    ------
    ValueError
        If a count is below 1.
    """
    require_at_least_one(n_samples=n_samples, n_keys=n_keys, dimension=dimension, max_numbers=max_numbers)
    size = max(1, max_numbers // (n_keys * dimension))
    options = {"generator": generator, "dtype": dtype, "device": generator.device}
    scores = torch.empty((n_samples, n_keys), dtype=dtype, device=generator.device)
    for start in range(0, n_samples, size):
        rows = scores[start : start + size]
        queries = torch.randn((len(rows), dimension, 1), **options)
        keys = torch.randn((len(rows), n_keys, dimension), **options)
        rows.copy_((keys @ queries)[..., 0])
    return scores


# The tool: scores of your own network


@dataclass(frozen=True)
class HeadReport:
    """What one head of one call of attention does with its scores, on average over sequences.

    Parameters
    ----------
    name : str
        The module that made the call.
    head : int
    n_keys : float
        How many keys a query sees, on average over queries.
    spread : Estimate
        Standard deviation of a query's scores, the root of the mean variance; its error is over sequences.
    participation : Estimate
        Mean of Σs² over queries; its error is over sequences.
    uniform : float
        What participation would be if attention were spread evenly, the mean of 1/n.
    shares : tuple of float
        Of the variance over all pairs: ``tr(Σ_qΣ_k)``, ``μ_qᵀΣ_kμ_q`` and ``μ_kᵀΣ_qμ_k``. NaN where not all queries of
        a sequence see the same keys, as under a causal mask.
    """

    name: str
    head: int
    n_keys: float
    spread: Estimate
    participation: Estimate
    uniform: float
    shares: tuple[float, float, float]


@dataclass(frozen=True, repr=False)
class ScoreReport:
    """What :func:`score_report` found; shows itself as a table with a row for each call of attention.

    Parameters
    ----------
    heads : tuple of HeadReport
        In the order in which the calls were made, head by head.
    limit : float
        A head counts as frozen if its participation is above it.
    """

    heads: tuple[HeadReport, ...]
    limit: float

    @property
    def frozen(self) -> tuple[HeadReport, ...]:
        """The heads whose participation is above the limit."""
        return tuple(head for head in self.heads if head.participation.value > self.limit)

    @property
    def calls(self) -> list[list[HeadReport]]:
        """The heads of each call."""
        found: list[list[HeadReport]] = []
        for head in self.heads:
            if head.head == 0:
                found.append([])
            found[-1].append(head)
        return found

    @property
    def verdict(self) -> str:
        """Which heads look at one key only, in one sentence."""
        if not self.frozen:
            return f"no head has a participation above {self.limit:g}"
        names = ", ".join(f"{head.name} head {head.head}" for head in self.frozen[:4])
        more = f" and {len(self.frozen) - 4} more" if len(self.frozen) > 4 else ""
        return f"participation is above {self.limit:g} in {names}{more}"

    @property
    def table(self) -> Table:
        """A row for each call: its median head and the head of largest spread; shares of the call's whole variance."""
        header = ["attention", "keys", "spread, median head", "largest", "own match", "query mean", "key mean"]
        return Table([*header, "Σs², median head", "1/n"], [_row(heads) for heads in self.calls], note=self.verdict)

    def __repr__(self) -> str:
        return repr(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


def _row(heads: list[HeadReport]) -> list[str]:
    by_spread = sorted(heads, key=lambda head: head.spread.value)
    by_participation = sorted(heads, key=lambda head: head.participation.value)
    middle, largest = by_spread[(len(heads) - 1) // 2], by_spread[-1]
    shares = np.mean([head.shares for head in heads], axis=0)
    return [
        heads[0].name,
        f"{heads[0].n_keys:.4g}",
        _figures(middle.spread),
        _figures(largest.spread),
        *("" if math.isnan(share) else f"{share:.2f}" for share in shares),
        _figures(by_participation[(len(heads) - 1) // 2].participation),
        f"{np.mean([head.uniform for head in heads]):.2g}",
    ]


def _figures(estimate: Estimate) -> str:
    return repr(estimate).partition(" (n")[0]


def score_report(
    model: nn.Module,
    inputs: torch.Tensor | Sequence | Mapping | Iterable,
    *,
    limit: float = 0.9,
    min_keys: int = 8,
    max_scores: int = 2**22,
) -> ScoreReport:
    """Measure the scores of every head of attention in a model: how far they spread, why, and what the softmax does.

    Parameters
    ----------
    model : torch.nn.Module
        Runs as it is, in training or evaluation mode, and is left as it was. Attention is seen if it calls
        ``F.scaled_dot_product_attention``, is ``nn.MultiheadAttention`` (or a layer of torch's with one inside), or
        multiplies what a softmax along the last of at least three dimensions gave.
    inputs : torch.Tensor, tuple, dict or iterable of batches
        Sequences along dimension 0, at least two, as in :func:`helpers.lab.batches.batches_of`.
    limit : float
        Participation above which a head counts as frozen.
    min_keys : int
        Queries that see fewer keys do not count.
    max_scores : int
        No more scores are held at a time, unless one row of all heads has more; attention written out by hand holds
        all of its scores anyway.

    Returns
    -------
    ScoreReport
        Costs a forward pass and one more product of queries and keys for each head.

    Notes
    -----
    Standard errors take whole sequences as independent; tokens of one sequence are not. In attention among the tokens
    of one sequence, padding is a token that no query sees; it counts neither as a key nor as a query.

    Raises
    ------
    ValueError
        If no attention is seen, there are fewer than two sequences, a sequence has no query that sees `min_keys` keys,
        a score is not finite, the model calls attention differently for another batch, or the first dimension of a
        call is no multiple of the number of sequences.

    Examples
    --------
    >>> layer = nn.MultiheadAttention(8, 2, batch_first=True)
    >>> class Model(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = layer
    ...     def forward(self, x):
    ...         return self.layer(x, x, x)[0]
    >>> report = score_report(Model(), torch.randn(20, 10, 8))
    >>> [(head.name, head.head, head.n_keys) for head in report.heads]
    [('layer', 0, 10.0), ('layer', 1, 10.0)]
    """
    require_between(0, 1, limit=limit)
    require_at_least_one(min_keys=min_keys, max_scores=max_scores)
    found: list[list[_Sequences]] = []
    with untouched(model), torch.no_grad():
        for batch in batches_of(inputs, None, _device(model)):
            calls = _measured(model, batch, min_keys, max_scores)
            if found and [call.key for call in calls] != [call[0].key for call in found]:
                raise ValueError("each batch must go through the same calls of attention, got different ones")
            found = [[*old, new] for old, new in zip(found or [[]] * len(calls), calls, strict=True)]
    if not found:
        raise ValueError("model must call attention in a form that can be seen, got none")
    return ScoreReport(tuple(head for call in found for head in _heads(call)), limit)


class _Sequences(NamedTuple):
    """What one call did with each sequence of a batch: tensors of shape (B, heads), the last of (B, heads, 3)."""

    name: str
    n_keys: torch.Tensor
    variance: torch.Tensor
    participation: torch.Tensor
    uniform: torch.Tensor
    parts: torch.Tensor

    @property
    def key(self) -> tuple[str, int]:
        return self.name, self.variance.shape[1]


def _measured(model: nn.Module, batch: Batch, min_keys: int, max_scores: int) -> list[_Sequences]:
    calls: list[_Sequences] = []
    with watch_attention(model, lambda call: calls.append(_sequences(call, len(batch), min_keys, max_scores))):
        batch.predict(model)
    return calls


def _sequences(call: AttentionCall, n: int, min_keys: int, max_scores: int) -> _Sequences:
    """Return the statistics of a call, sequence by sequence, a block of rows at a time."""
    if call.shape[0] % n:
        raise ValueError(
            f"the first dimension of attention at {call.name} must be a multiple of the {n} sequences, got {call.shape}"
        )
    padding = _padding(call, max_scores)
    of_rows, counts, sums = [], 0, 0.0
    for start, scores in call.blocks(max_scores):
        seen = torch.isfinite(scores)
        if (torch.isnan(scores) | (scores == torch.inf)).any():
            raise ValueError(f"scores must be finite or hidden, got NaN or infinity at {call.name}")
        kept = (seen.sum(-1) >= min_keys) & ~padding[..., start : start + scores.shape[2]]
        of_rows.append(torch.stack([kept.double(), *_of_rows(scores, seen)]))
        counted = seen & kept[..., None]
        counts = counts + counted.sum(-2)  # (B, heads, keys)
        sums = sums + torch.where(counted, scores, 0.0).double().sum(-2)
    kept, *figures = torch.cat(of_rows, dim=-1)  # (B, heads, queries) each
    if not kept.any(-1).all():
        raise ValueError(
            f"each sequence must have a query that sees at least {min_keys} keys, got fewer at {call.name}; "
            "give longer sequences or a smaller min_keys"
        )
    parts = _parts(kept, *figures[1:3], counts, sums)
    n_keys, _, variance, participation = (_mean(figure, kept) for figure in figures)
    uniform = _mean(1 / figures[0].clamp(min=1), kept)
    # Windows of one sequence come one after another in the first dimension, and count alike.
    shaped = [x.unflatten(0, (n, -1)).mean(1) for x in (n_keys, variance, participation, uniform, parts)]
    return _Sequences(call.name, *shaped)


def _padding(call: AttentionCall, max_scores: int) -> torch.Tensor:
    """Return which queries are tokens that no query sees, in attention among the tokens of one sequence."""
    batch, heads, queries, keys = call.shape
    device = call.keys.device if call.scores is None else call.scores.device
    seen = torch.zeros((batch, heads, keys), dtype=torch.bool, device=device)
    if queries != keys or not (call.masks or call.scores is not None):
        return seen.new_zeros((batch, heads, queries))
    for _, scores in call.blocks(max_scores):
        seen = seen | torch.isfinite(scores).any(-2)
    return ~seen


def _of_rows(scores: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return for each row how many keys are seen, mean and variance of their scores, and the participation."""
    n = seen.sum(-1).double()
    mean = torch.where(seen, scores, 0.0).double().sum(-1) / n
    deviations = torch.where(seen, scores - mean[..., None], 0.0)
    participation = scores.double().softmax(-1).square().sum(-1)
    return tuple(x.nan_to_num(0.0) for x in (n, mean, deviations.square().sum(-1) / n, participation))


def _mean(figure: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return (figure * kept).sum(-1) / kept.sum(-1)


def _parts(
    kept: torch.Tensor, means: torch.Tensor, variances: torch.Tensor, counts: torch.Tensor, sums: torch.Tensor
) -> torch.Tensor:
    """Return the parts of :func:`score_decomposition` from rows and columns, shape (B, heads, 3).

    Means of rows differ by μ_kᵀΣ_qμ_k, means of columns by μ_qᵀΣ_kμ_q: it is a two-way analysis of variance.
    """
    n_rows = kept.sum(-1, keepdim=True)
    columns = (counts == n_rows).double()
    same_keys = ((counts == n_rows) | (counts == 0)).all(-1)
    of_rows = _mean((means - _mean(means, kept)[..., None]).square(), kept)
    column_means = sums / n_rows
    of_columns = _mean((column_means - _mean(column_means, columns)[..., None]).square(), columns)
    parts = torch.stack([_mean(variances, kept) - of_columns, of_columns, of_rows], dim=-1)
    return torch.where(same_keys[..., None], parts, torch.nan)


def _heads(batches: list[_Sequences]) -> list[HeadReport]:
    """Return the report of each head of one call, over the sequences of all batches."""
    n_keys, variance, participation, uniform, parts = (
        torch.cat([getattr(batch, name) for batch in batches]) for name in _Sequences._fields[1:]
    )
    if len(variance) < 2:
        raise ValueError(f"inputs must hold at least two sequences, got {len(variance)}")
    whole = parts.mean(0)  # (heads, 3)
    shares = whole / whole.sum(-1, keepdim=True)
    return [
        HeadReport(
            batches[0].name,
            head,
            n_keys[:, head].mean().item(),
            _root(estimates.mean(variance[:, head])),
            estimates.mean(participation[:, head]),
            uniform[:, head].mean().item(),
            tuple(shares[head].tolist()),
        )
        for head in range(variance.shape[1])
    ]


def _root(variance: Estimate) -> Estimate:
    """Return the estimate of a standard deviation from that of a variance."""
    root = np.sqrt(variance.value)
    stderr = variance.stderr / (2 * root) if root > 0 else variance.stderr
    return Estimate(root, stderr, variance.n, variance.skewness)


def _device(model: nn.Module) -> torch.device:
    tensor = next(chain(model.parameters(), model.buffers()), None)
    return torch.empty(0).device if tensor is None else tensor.device


# The tool: scores at the start of training


@dataclass(frozen=True)
class ScoreScale:
    """How large scores of one call of attention are over random weights.

    Parameters
    ----------
    name : str
        The module that makes the call.
    measured : Estimate
        Mean square of the scores that the softmax takes, over initializations.
    predicted : float
        The mean over the same initializations of what independent weights of mean zero and the same mean square would
        give; NaN where queries and keys do not come right out of a linear map.
    """

    name: str
    measured: Estimate
    predicted: float


@dataclass(frozen=True, repr=False)
class ScoreScaleReport:
    """What :func:`initial_score_scale` found; shows itself as a table."""

    calls: tuple[ScoreScale, ...]

    @property
    def table(self) -> Table:
        """A row for each call of attention; unit scores are those of independent components of variance 1."""
        rows = [
            [call.name, _figures(call.measured), "" if math.isnan(call.predicted) else f"{call.predicted:.3g}"]
            for call in self.calls
        ]
        return Table(["attention", "mean square of scores", "predicted"], rows)

    def __repr__(self) -> str:
        return repr(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


def initial_score_scale(
    model: nn.Module,
    inputs: torch.Tensor | Sequence | Mapping | Iterable,
    *,
    n_draws: int = 30,
    initialize: Callable[[nn.Module], object] | None = None,
    max_scores: int = 2**22,
) -> ScoreScaleReport:
    """Measure how large the scores of attention are when training begins, over many initializations of a copy.

    Parameters
    ----------
    model : torch.nn.Module
        Is left as it was. Attention is seen as by :func:`score_report`.
    inputs : torch.Tensor, tuple, dict or iterable of batches
        As in :func:`score_report`; of an iterable the first batch.
    n_draws : int
        Number of initializations, at least two; fewer than ten give a poor standard error.
    initialize : callable, optional
        Draws the parameters of the copy, which it is given, anew from torch's global generator. Otherwise each module
        draws its own by its ``reset_parameters`` or ``_reset_parameters``.
    max_scores : int
        No more scores are held at a time, as in :func:`score_report`.

    Returns
    -------
    ScoreScaleReport
        Predictions are those of :func:`initial_score_variance`, with the mean squares of weights and inputs measured.
        Costs `n_draws` forward passes, a copy of the model and the outputs of its linear maps.

    Raises
    ------
    ValueError
        If a module has parameters and no way to draw them, no attention is seen, a score is not finite, or `n_draws`
        is below two.

    Examples
    --------
    >>> class Model(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.norm, self.attention = nn.LayerNorm(32), nn.MultiheadAttention(32, 2, batch_first=True)
    ...     def forward(self, x):
    ...         x = self.norm(x)
    ...         return self.attention(x, x, x)[0]
    >>> (scale,) = initial_score_scale(Model(), torch.randn(4, 9, 32)).calls
    >>> round(scale.predicted, 2)
    0.25
    """
    if not n_draws >= 2:
        raise ValueError(f"n_draws must be at least 2, got {n_draws}")
    require_at_least_one(max_scores=max_scores)
    draws: list[list[tuple[str, float, float]]] = []
    with untouched(model), torch.no_grad():
        batch = next(batches_of(inputs, None, _device(model)))
        network = copy.deepcopy(model)
        for _ in tqdm(range(n_draws), desc="initializations", leave=False):
            (initialize or _initialize)(network)
            draws.append(_scales(network, batch, max_scores))
    if not draws[0]:
        raise ValueError("model must call attention in a form that can be seen, got none")
    options = {"dtype": torch.float64, "device": _device(model)}
    calls = []
    for name, squares, predicted in (zip(*found, strict=True) for found in zip(*draws, strict=True)):
        measured = estimates.mean(torch.tensor(squares, **options))
        calls.append(ScoreScale(name[0], measured, float(np.mean(predicted))))
    return ScoreScaleReport(tuple(calls))


def _initialize(model: nn.Module) -> None:
    """Draw all parameters anew; modules after those inside them, whose draws they overrule."""
    for name, module in reversed(list(model.named_modules())):
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if reset is not None:
            reset()
        elif next(module.parameters(recurse=False), None) is not None:
            raise ValueError(
                f"each module with parameters must have reset_parameters, got {name or 'the model'} of type "
                f"{type(module).__name__} without: pass your own as initialize"
            )


def _scales(model: nn.Module, batch: Batch, max_scores: int) -> list[tuple[str, float, float]]:
    """Return for each call its name, the mean square of its scores and what is predicted."""
    found = []

    def see(call: AttentionCall) -> None:
        total, n = 0.0, 0
        for _, scores in call.blocks(max_scores):
            seen = torch.isfinite(scores)
            if (torch.isnan(scores) | (scores == torch.inf)).any():
                raise ValueError(f"scores must be finite or hidden, got NaN or infinity at {call.name}")
            total, n = total + scores[seen].double().square().sum().item(), n + seen.sum().item()
        predicted = math.nan
        if call.moments is not None:
            predicted = call.factor**2 * call.queries.shape[-1] * math.prod(call.moments)
        found.append((call.name, total / n if n else math.nan, predicted))

    with watch_attention(model, see, trace_weights=True):
        batch.predict(model)
    return found
