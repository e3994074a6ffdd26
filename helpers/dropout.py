"""Chapter *Dropout and the average of 2ⁿ networks*: what random masks do to a network and to its loss.

Throughout, a unit is dropped with probability `p` and kept with probability ``keep = 1 - p``. As in
``torch.nn.Dropout`` dropout is *inverted*: a unit that is kept is divided by `keep` in training, and nothing is done
without masks.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import special, stats
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from helpers.lab import estimates
from helpers.lab.batches import Batch, batches_of
from helpers.lab.checks import require_at_least_one, require_positive, require_same_device
from helpers.lab.estimates import Estimate
from helpers.lab.runtime import seeded
from helpers.lab.tables import Table
from helpers.lab.watch import untouched

Numbers = float | np.ndarray | torch.Tensor

DROPOUTS = nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout
NORMS = nn.modules.batchnorm._NormBase  # batch and instance norm, which see the other examples in training
SELU_FLOOR = -1.7580993408473766  # what SELU tends to at -∞, and what `AlphaDropout` puts where it drops
MOST_LISTED = 24  # units whose masks are all listed
LEAST_MASKS, LEAST_EXAMPLES = 10, 30  # fewer make the report wrong by more than it says
ENOUGH_EXAMPLES = 500  # from which on two standard errors hold what they should
IGNORED = -100  # the label that `F.cross_entropy` leaves out


# Closed forms


def mask_variance(value: Numbers, p: float) -> Numbers:
    """Return the variance of a dropped value, ``Var(value · mask / keep) = p / keep · value²``; its mean is `value`.

    Parameters
    ----------
    value : float, array or tensor
        Before dropout. For a unit that adds up ``w_j x_j``, the variances of the products add up too.
    p : float
        Probability of a drop, in [0, 1).

    Returns
    -------
    float, array or tensor
        Claim ``dropout.mask_moments``.

    Raises
    ------
    ValueError
        If `p` is out of range.
    """
    _require_probability(p)
    return p / (1 - p) * value**2


def alpha_mask_moments(value: Numbers, p: float) -> tuple[Numbers, Numbers]:
    """Return mean and variance over masks of what ``torch.nn.AlphaDropout`` makes of a value.

    Parameters
    ----------
    value, p
        As in :func:`mask_variance`. A dropped value becomes α = -1.758, not 0, and then all are mapped to a·x + b.

    Returns
    -------
    mean, variance
        ``a · keep · value``, which is not `value`, and ``a² p keep (value - α)²``, with
        ``a = (keep + α² p keep)^(-1/2)``. Over values with mean 0 and variance 1, which is what SELU is made for, mean
        and variance come out as 0 and 1. Claim ``dropout.mask_moments``; Klambauer et al. (2017).

    Raises
    ------
    ValueError
        If `p` is out of range.
    """
    _require_probability(p)
    keep = 1 - p
    slope = (keep + SELU_FLOOR**2 * p * keep) ** -0.5
    return slope * keep * value, slope**2 * p * keep * (value - SELU_FLOOR) ** 2


def masked_covariance(
    mean: np.ndarray | torch.Tensor, covariance: np.ndarray | torch.Tensor, p: float, *, inverted: bool = True
) -> np.ndarray | torch.Tensor:
    """Return the covariance of a random vector behind dropout with a mask for each of its entries.

    Parameters
    ----------
    mean : shape (d,)
        Of the vector.
    covariance : shape (d, d)
        Of the vector.
    p : float
        Probability of a drop, in [0, 1).
    inverted : bool
        Whether what is kept is divided by `keep`, as in ``torch.nn.Dropout``.

    Returns
    -------
    shape (d, d)
        ``Cov(x) + p/keep · diag(E[x²])``; if not inverted ``keep²`` times that. Claim ``dropout.covariance``.

    Raises
    ------
    ValueError
        If `p` is out of range.
    """
    _require_probability(p)
    of_entries = mean**2 + covariance.diagonal()
    diagonal = torch.diag(of_entries) if isinstance(of_entries, torch.Tensor) else np.diag(of_entries)
    masked = covariance + p / (1 - p) * diagonal
    return masked if inverted else (1 - p) ** 2 * masked


def relu_gap(mean: float | np.ndarray, std: float | np.ndarray) -> float | np.ndarray:
    """Return ``E[relu(z)] - relu(E[z])`` for z ~ N(mean, std²), which is never negative.

    Parameters
    ----------
    mean, std : float or array
        Of the preactivation, `std` positive.

    Returns
    -------
    float or array
        ``σ ϕ(t) - |μ| Φ(-|t|)`` with ``t = μ/σ``, the same for μ and -μ; it is ``σ ϕ(t) + μ Φ(t) - max(0, μ)``. Claim
        ``dropout.relu_gap``.

    Raises
    ------
    ValueError
        If `std` is not positive.
    """
    require_positive(std=std)
    distance = np.abs(mean) / std
    return std * (stats.norm.pdf(distance) - distance * special.ndtr(-distance))


def second_order_gap(logits: torch.Tensor, weight: torch.Tensor, inputs: torch.Tensor, p: float) -> torch.Tensor:
    """Return by how much dropout before the last layer raises the cross-entropy, to second order in the noise.

    Parameters
    ----------
    logits : shape (B, classes)
        Of the network without masks.
    weight : shape (classes, n)
        Of its last layer.
    inputs : shape (B, n)
        Of its last layer, without masks.
    p : float
        Probability of a drop, in [0, 1).

    Returns
    -------
    torch.Tensor, shape (B,)
        ``½ tr(H Cov(logits))``, with H the second derivative of the cross-entropy, ``diag(s) - ssᵀ``, whatever the
        label: ``½ p/keep Σ_j x_j² (Σ_k s_k w_kj² - (Σ_k s_k w_kj)²)``. Claim ``dropout.second_order``.

    Raises
    ------
    ValueError
        If `p` is out of range.
    """
    _require_probability(p)
    probabilities = logits.softmax(1)
    spread = probabilities @ weight**2 - (probabilities @ weight) ** 2  # (B, n), variance of w_kj over classes
    return p / (1 - p) / 2 * (inputs**2 * spread).sum(1)


def adaptive_penalty(weights: torch.Tensor, inputs: torch.Tensor, p: float) -> torch.Tensor:
    """Return what dropout of the inputs adds to the squared loss of a linear model, in expectation.

    Parameters
    ----------
    weights : shape (d,)
    inputs : shape (N, d)
    p : float
        Probability of a drop, in [0, 1).

    Returns
    -------
    torch.Tensor, shape ()
        ``p/keep Σ_j w_j² Σ_i x_ij²``, beside the sum of squared residuals. Claim ``dropout.adaptive_l2``; Wager et al.
        (2013).

    Raises
    ------
    ValueError
        If `p` is out of range.
    """
    return mask_variance(inputs * weights, p).sum()


def dropout_regression(inputs: torch.Tensor, targets: torch.Tensor, p: float) -> torch.Tensor:
    """Return the weights that minimize the expected squared loss of a linear model under dropout of its inputs.

    Parameters
    ----------
    inputs : shape (N, d)
    targets : shape (N,)
    p : float
        Probability of a drop, in [0, 1).

    Returns
    -------
    torch.Tensor, shape (d,)
        ``(XᵀX + p/keep · diag(XᵀX))⁻¹ Xᵀy``. Claim ``dropout.adaptive_l2``.

    Raises
    ------
    ValueError
        If `p` is out of range.
    """
    _require_probability(p)
    gram = inputs.T @ inputs
    return torch.linalg.solve(gram + p / (1 - p) * torch.diag(gram.diagonal()), inputs.T @ targets)


def variance_shift(mean: Numbers, variance: Numbers, p: float) -> Numbers:
    """Return the variance of a unit behind dropout in training over its variance in testing.

    Parameters
    ----------
    mean, variance : float, array or tensor
        Of the unit over the data, without masks.
    p : float
        Probability of a drop, in [0, 1).

    Returns
    -------
    float, array or tensor
        ``(E[x²]/keep - E[x]²) / Var(x) = 1 + p/keep · E[x²] / Var(x)``. Claim ``dropout.variance_shift``; Li et al.
        (2019) give the reciprocal.

    Raises
    ------
    ValueError
        If `p` is out of range or `variance` not positive.
    """
    require_positive(variance=variance)
    return 1 + mask_variance(mean, p) / variance + p / (1 - p)


def linear_variance_shift(
    weight: torch.Tensor, second_moments: torch.Tensor, variance: torch.Tensor, p: float
) -> torch.Tensor:
    """Return the same ratio for the units of a linear layer behind dropout.

    Parameters
    ----------
    weight : shape (units, n)
    second_moments : shape (n,)
        ``E[x_j²]`` of the layer's inputs over the data, without masks; what they have in common does not matter.
    variance : shape (units,)
        ``Var(wᵀx)`` over the data, without masks.
    p : float
        Probability of a drop, in [0, 1).

    Returns
    -------
    torch.Tensor, shape (units,)
        ``1 + p/keep Σ_j w_j² E[x_j²] / Var(wᵀx)``, for x of one law in training and testing. Claim
        ``dropout.linear_variance_shift``.

    Raises
    ------
    ValueError
        If `p` is out of range or a variance not positive.
    """
    _require_probability(p)
    require_positive(variance=variance)
    return 1 + p / (1 - p) * (weight**2 @ second_moments) / variance


def geometric_mean(log_probabilities: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Return the normalized geometric mean of distributions over classes, as logarithms.

    Parameters
    ----------
    log_probabilities : shape (n, ..., classes)
        Of n networks, or their logits.
    weights : shape (n,), optional
        Of the networks, with sum 1; equal ones if left out.

    Returns
    -------
    torch.Tensor, shape (..., classes)
        Claim ``dropout.geometric_ensemble``.

    Raises
    ------
    ValueError
        If there is not a weight for each network.

    Examples
    --------
    One network is sure and the other is not: the geometric mean believes the one that is sure.

    >>> both = torch.tensor([[0.5, 0.5], [0.99, 0.01]]).log()
    >>> geometric_mean(both).exp(), arithmetic_mean(both).exp()
    (tensor([0.9087, 0.0913]), tensor([0.7450, 0.2550]))
    """
    weights = _weights(log_probabilities, weights)
    return torch.tensordot(weights, log_probabilities, 1).log_softmax(-1)


def arithmetic_mean(log_probabilities: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Return the mean of distributions over classes, as logarithms; see :func:`geometric_mean`.

    Parameters, errors and shapes are those of :func:`geometric_mean`, but logits will not do.
    """
    weights = _weights(log_probabilities, weights)
    return (log_probabilities + weights.log().reshape(-1, *[1] * (log_probabilities.ndim - 1))).logsumexp(0)


# Masks


def all_masks(n: int, *, dtype: torch.dtype = torch.float64, device: torch.device | None = None) -> torch.Tensor:
    """Return all 2ⁿ masks of n units, one a row, with 1 for a unit that is kept.

    Parameters
    ----------
    n : int
        At most 24.
    dtype, device
        Of the masks.

    Returns
    -------
    torch.Tensor, shape (masks, n)

    Raises
    ------
    ValueError
        If `n` is out of range.

    Examples
    --------
    >>> all_masks(2)
    tensor([[0., 0.],
            [0., 1.],
            [1., 0.],
            [1., 1.]], dtype=torch.float64)
    """
    if not 1 <= n <= MOST_LISTED:
        raise ValueError(f"n must lie in [1, {MOST_LISTED}], as there are 2ⁿ masks, got {n}")
    place = torch.arange(n - 1, -1, -1, device=device)
    return (torch.arange(2**n, device=device)[:, None] >> place & 1).to(dtype)


def mask_probabilities(masks: torch.Tensor, p: float) -> torch.Tensor:
    """Return the probability of each mask, ``Π_j keep^r_j p^(1 - r_j)``.

    Parameters
    ----------
    masks : shape (m, n)
        Of zeros and ones.
    p : float
        Probability of a drop, in [0, 1).

    Returns
    -------
    torch.Tensor, shape (m,)

    Raises
    ------
    ValueError
        If `p` is out of range.
    """
    _require_probability(p)
    return (masks * (1 - p) + (1 - masks) * p).prod(1)


def sample_masks(
    shape: Sequence[int], p: float, *, generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Draw masks of inverted dropout: each entry is 0 with probability p, else 1/keep.

    Parameters
    ----------
    shape : sequence of int
    p : float
        Probability of a drop, in [0, 1).
    generator : torch.Generator
        The masks live on its device. (``F.dropout`` takes none.)
    dtype : torch.dtype

    Returns
    -------
    torch.Tensor

    Raises
    ------
    ValueError
        If `p` is out of range.
    """
    _require_probability(p)
    masks = torch.empty(tuple(shape), dtype=dtype, device=generator.device)
    return masks.bernoulli_(1 - p, generator=generator).div_(1 - p)


# Tools


def masked_outputs(
    model: nn.Module,
    inputs: torch.Tensor | Sequence[torch.Tensor] | Mapping[str, torch.Tensor],
    *,
    masks: int,
    generator: torch.Generator,
    rows_at_once: int = 1024,
) -> torch.Tensor:
    """Return what a model with dropout gives under many masks, drawn anew for each example.

    Parameters
    ----------
    model : torch.nn.Module
        It is left as it was.
    inputs : torch.Tensor, tuple, list or mapping of tensors
        A batch, examples along dimension 0.
    masks : int
        How many.
    generator : torch.Generator
        Its draws seed the masks.
    rows_at_once : int
        How many examples the model sees in one pass: several masks share a pass.

    Returns
    -------
    torch.Tensor, shape (masks, B, ...)
        Only what drops is switched to training: layers of dropout, and attention and recurrent layers with a dropout
        of their own. Everything else, batch normalization above all, works as in evaluation. Costs as much as
        evaluating ``masks · B`` examples, and two copies of the model.

    Raises
    ------
    ValueError
        If nothing in the model drops with a positive probability; if it draws at random elsewhere as well, as with
        ``F.dropout`` or the ``dropout_p`` of ``F.scaled_dot_product_attention``; if the examples of a batch are
        coupled, so that they cannot share a pass; if `masks` or `rows_at_once` is below 1; or if `inputs` are on
        another device than `generator`.

    Examples
    --------
    >>> model = nn.Sequential(nn.Dropout(0.75), nn.Linear(3, 2))
    >>> masked_outputs(model, torch.ones(5, 3), masks=7, generator=torch.Generator()).shape
    torch.Size([7, 5, 2])
    """
    require_at_least_one(masks=masks, rows_at_once=rows_at_once)
    _require_where_drawn(generator, inputs, None)
    with _looking_at(model, generator) as droppers:
        batch = Batch.of(inputs)
        whole = _whole_outputs(model, batch, droppers)
        _require_nothing_else_draws(model, batch, droppers)
        _require_not_coupled(model, batch, whole, rows_at_once)
        return _masked_outputs(model, batch, droppers, masks, rows_at_once).reshape(masks, *whole.shape)


@dataclass(frozen=True, eq=False)
class Prediction:
    """One way to predict, and how well it did.

    Parameters
    ----------
    loss : Estimate
        Mean cross-entropy in nats, for infinitely many masks: what few masks add to it is taken off by the jackknife.
        Its standard error is that over examples.
    excess : Estimate
        The same less that of the whole network, paired by example.
    mask_stderr : float
        The part of its standard error that more masks would remove; 0 for the whole network.
    accuracy : Estimate
        Of the most probable class.
    overconfidence : Estimate
        Mean probability of that class minus accuracy: 0 if a classifier means what it says.
    """

    loss: Estimate
    excess: Estimate
    mask_stderr: float
    accuracy: Estimate
    overconfidence: Estimate


@dataclass(frozen=True, eq=False)
class MaskedLosses:
    """The whole network, one masked network, and two means over masked networks, on the same examples.

    Parameters
    ----------
    whole : Prediction
        The network without masks.
    one_mask : Prediction
        A network with one random mask, on average over masks: what training sees.
    geometric, arithmetic : Prediction
        The normalized geometric mean and the mean of the probabilities of all masks.
    masks : int
        How many masks each example had.
    """

    whole: Prediction
    one_mask: Prediction
    geometric: Prediction
    arithmetic: Prediction
    masks: int

    def table(self) -> Table:
        """Return the table that is shown."""
        rows = [
            ["without masks", *_cells(self.whole)],
            ["one mask", *_cells(self.one_mask)],
            ["geometric mean", *_cells(self.geometric)],
            ["arithmetic mean", *_cells(self.arithmetic)],
        ]
        header = ["prediction", "loss", "minus without", "± from masks", "accuracy", "confidence - accuracy"]
        n = int(self.whole.loss.n)
        caption = f"Loss in nats of {n:,d} examples, {self.masks} masks each."
        return Table(header, rows, caption=caption, note=self.verdict)

    @property
    def verdict(self) -> str:
        """Whether the mean of the probabilities has a lower loss than the whole network, by two standard errors."""
        excess = self.arithmetic.excess
        advice = ""
        if excess.n < ENOUGH_EXAMPLES:
            advice = f" With fewer than {ENOUGH_EXAMPLES} examples the errors shown are too small."
        if abs(excess.value) <= 2 * excess.stderr:
            return f"Whether averaging probabilities over masks lowers this loss is not decided.{advice}"
        return f"Averaging probabilities over masks {'lowers' if excess.value < 0 else 'raises'} this loss.{advice}"

    def __repr__(self) -> str:
        return repr(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def _cells(prediction: Prediction) -> list[str]:
    figures = [prediction.loss, prediction.excess, None, prediction.accuracy, prediction.overconfidence]
    cells = ["" if figure is None else repr(figure).partition(" (n")[0] for figure in figures]
    if prediction.mask_stderr > 0:
        cells[2] = f"{prediction.mask_stderr:.1g}"
    return cells


def masked_losses(
    model: nn.Module,
    loss: Any,
    inputs: torch.Tensor | Sequence[torch.Tensor] | Mapping[str, torch.Tensor] | Iterable,
    targets: torch.Tensor | None = None,
    *,
    masks: int = 30,
    generator: torch.Generator,
    rows_at_once: int = 1024,
) -> MaskedLosses:
    """Compare a classifier with dropout with the masked networks inside of it, and with their means.

    Parameters
    ----------
    model : torch.nn.Module
        It is left as it was.
    loss : callable
        ``loss(model(inputs), targets)``, a mean cross-entropy; it is called once a batch, to see whether it is one. For
        logits (n, ..., classes) of sequences it has to flatten them, as in training.
    inputs : torch.Tensor, tuple, list or mapping of tensors, or an iterable of batches such as a ``DataLoader``
        Training examples tell how much of your training loss the masks make; test examples which prediction is best.
        At least 30. Two standard errors of what the arithmetic mean adds held the truth in 92 % of draws of 500 digits,
        and in 78 % of draws of 100: a network's worst errors are rare.
    targets : int64, shape (n,) or (n, ...), optional
        Labels; of sequences and images, one for each token or pixel. -100 is left out. None for an iterable.
    masks : int
        For each example, at least 10.
    generator : torch.Generator
        Its draws seed the masks.
    rows_at_once : int
        How many examples the model sees in one pass.

    Returns
    -------
    MaskedLosses
        Logits are (n, classes), (n, classes, ...) or (n, ..., classes). What few masks do to a loss is taken off, not
        what they do to accuracy and confidence of the means. Costs as much as evaluating ``masks + 2``
        times as many examples, two copies of the model, and memory for ``masks`` times the logits of ``rows_at_once``
        examples.

    Raises
    ------
    ValueError
        As in :func:`masked_outputs`; if there are fewer than 10 masks or 30 examples; if all masks give the same
        outputs; if the outputs are no logits of the targets' classes, or not finite; or if `loss` is not the mean
        cross-entropy, because of class weights, smoothed labels, a label for padding other than -100, a sum or a
        penalty.

    Examples
    --------
    >>> with seeded("an example"):
    ...     model = nn.Sequential(nn.Linear(4, 30), nn.ReLU(), nn.Dropout(0.5), nn.Linear(30, 3))
    ...     x, y = torch.randn(200, 4), torch.randint(3, (200,))
    >>> found = masked_losses(model, F.cross_entropy, x, y, generator=torch.Generator())
    >>> bool(found.one_mask.excess.value > 5 * found.one_mask.excess.stderr)
    True
    """
    require_at_least_one(rows_at_once=rows_at_once)
    if not masks >= LEAST_MASKS:
        raise ValueError(f"masks must be at least {LEAST_MASKS}, got {masks}")
    if not callable(loss):
        raise ValueError(f"loss must be callable, and come before the inputs, got {type(loss).__name__}")
    _require_where_drawn(generator, inputs, targets)
    parts = []
    with _looking_at(model, generator) as droppers:
        for batch in tqdm(_split(inputs, targets, generator.device, rows_at_once), desc="masks", unit="batch"):
            whole = _whole_outputs(model, batch, droppers)
            if not parts:
                _require_nothing_else_draws(model, batch, droppers)
            _require_not_coupled(model, batch, whole, rows_at_once)
            masked = _masked_outputs(model, batch, droppers, masks, rows_at_once).reshape(masks, *whole.shape)
            labels = _labels(batch)
            chances = _log_probabilities(whole, labels, 0)
            if not parts:
                _require_masks_matter(masked)
            if (labels != IGNORED).any():
                _require_cross_entropy(loss, whole, chances, labels)
            parts.append(_Sums.of(chances, _log_probabilities(masked, labels, 1), labels))
    return _Sums.joined(parts).report(masks)


@dataclass(frozen=True, eq=False)
class Removal:
    """How accurate a network is without some of its units.

    Parameters
    ----------
    whole : float
        Accuracy with all of them.
    accuracies : numpy.ndarray, shape (repeats,)
        Accuracy with each set of units removed.
    fraction : float
        Share of the units that were to be removed.
    """

    whole: float
    accuracies: np.ndarray
    fraction: float

    @property
    def mean(self) -> Estimate:
        """Mean over sets of units, for the examples given; its standard error is that of the draws of sets."""
        return estimates.mean(self.accuracies)

    def __repr__(self) -> str:
        spread = self.accuracies.std(ddof=1)
        mean = repr(self.mean).partition(" (n")[0]
        return (
            f"accuracy {self.whole:.3f}; without {self.fraction:.0%} of the units {mean}\n"
            f"(from one set of units to the next ± {spread:.2g}; {len(self.accuracies)} sets)"
        )


def remove_units(
    model: nn.Module,
    inputs: torch.Tensor | Sequence[torch.Tensor] | Mapping[str, torch.Tensor] | Iterable,
    targets: torch.Tensor | None = None,
    *,
    layers: Sequence[str],
    fraction: float = 0.5,
    repeats: int = 20,
    rescale: bool = True,
    generator: torch.Generator,
) -> Removal:
    """Measure how much accuracy a classifier keeps when units are taken out of it, the same for all examples.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation here, and left as it was.
    inputs, targets
        As in :func:`masked_losses`.
    layers : sequence of str
        Names in ``model.named_modules()`` of the layers whose outputs lose units: entries of the last dimension behind
        linear layers, embeddings and layer norms, channels behind convolutions and batch norms; behind other layers,
        such as activations, entries of dimension 1, of outputs with 2 dimensions. Units of different layers are drawn
        apart, so name one layer of those that work on the same units, such as a convolution and its activation.
    fraction : float
        Share of units that each of these layers loses, in [0, 1), rounded down to whole units.
    repeats : int
        How many sets of units are tried, at least 2.
    rescale : bool
        Whether the units that stay are divided by their share, as in training with dropout.
    generator : torch.Generator
        Draws the sets.

    Returns
    -------
    Removal
        Costs ``repeats + 1`` evaluations of the examples and a copy of the model.

    Raises
    ------
    ValueError
        If a layer does not exist, is named twice, is not called, or gives something other than one tensor with an axis
        of units; if `fraction` is out of range or takes no unit of a layer, `repeats` is below 2, or outputs are no
        logits of the targets' classes.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> x, y = torch.ones(10, 2), torch.zeros(10, dtype=torch.int64)
    >>> remove_units(model, x, y, layers=["1"], generator=torch.Generator()).accuracies.shape
    (20,)
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must lie in [0, 1), got {fraction}")
    if not repeats >= 2:
        raise ValueError(f"repeats must be at least 2, got {repeats}")
    modules = dict(model.named_modules())
    if isinstance(layers, str) or len(set(layers)) < len(layers):
        raise ValueError(f"layers must be a list of different names, got {layers!r}")
    for name in layers:
        if name not in modules:
            raise ValueError(f"layers must be names of model.named_modules(), got {name!r}")
    if not layers:
        raise ValueError("layers must name at least one layer, got none")
    _require_where_drawn(generator, inputs, targets)
    remover = _Remover(fraction, rescale, generator)
    hits = torch.zeros(repeats + 1, dtype=torch.float64, device=generator.device)
    count = 0
    with untouched(model), torch.no_grad():
        model.eval()
        for name in layers:
            modules[name].register_forward_hook(remover.hook(name))
        for batch in batches_of(inputs, targets, generator.device):
            labels = _labels(batch)
            count += int((labels != IGNORED).sum())
            for k in tqdm(range(repeats + 1), desc="sets of units", leave=False):
                remover.set = k
                classes = _log_probabilities(batch.predict(model), labels, 0).argmax(-1)
                hits[k] += (classes == labels).sum()  # no class is the label that is left out
            remover.require_called(layers)
    if not count:
        raise ValueError(f"targets must hold a label, got only {IGNORED}")
    accuracies = (hits / count).cpu().numpy()
    return Removal(float(accuracies[0]), accuracies[1:], fraction)


# What drops


@contextmanager
def _looking_at(model: nn.Module, generator: torch.Generator) -> Iterator[list[nn.Module]]:
    """Put a model into evaluation, with masks of its own seed, and hand over what drops; all is put back."""
    droppers = [layer for layer in model.modules() if _drops(layer)]
    if not droppers:
        raise ValueError(
            "model must have a layer of dropout with a positive probability, got none: F.dropout inside of a forward "
            "cannot be reached, nn.Dropout can"
        )
    stream = f"masks {torch.randint(2**62, (), generator=generator, device=generator.device).item()}"
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with untouched(model), seeded(stream), torch.no_grad():
        torch.backends.mha.set_fastpath_enabled(False)  # it would skip the layers of dropout inside of a transformer
        model.eval()
        try:
            yield droppers
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)


def _drops(layer: nn.Module) -> bool:
    if isinstance(layer, DROPOUTS):
        return layer.p > 0
    if isinstance(layer, nn.RNNBase):
        return layer.dropout > 0 and layer.num_layers > 1  # it acts between layers
    return isinstance(layer, nn.MultiheadAttention) and layer.dropout > 0


def _switch(droppers: list[nn.Module], on: bool) -> None:
    for layer in droppers:
        layer.training = on  # not train(), which would switch what is inside as well


def _whole_outputs(model: nn.Module, batch: Batch, droppers: list[nn.Module]) -> torch.Tensor:
    """Return what a model gives without masks."""
    _switch(droppers, False)
    whole = batch.predict(model)
    if not isinstance(whole, torch.Tensor) or not whole.is_floating_point():
        raise ValueError(f"model must return one tensor of logits, got {type(whole).__name__}")
    if whole.ndim == 0 or len(whole) != len(batch):
        raise ValueError(f"model must return a row for each of {len(batch)} examples, got shape {tuple(whole.shape)}")
    if not whole.isfinite().all():
        raise ValueError(
            f"model must return finite numbers, got {int((~whole.isfinite()).sum())} others: to rule out a class, give "
            "it a logit such as -1e4"
        )
    return whole


def _require_not_coupled(model: nn.Module, batch: Batch, whole: torch.Tensor, rows_at_once: int) -> None:
    """Refuse a model, without masks, whose examples cannot share a pass, if masks will."""
    if rows_at_once < 2 * len(batch):
        return
    # The second copy is rolled by one, so that a model that mixes a batch cannot mix equal batches.
    rolled = torch.arange(len(batch), device=whole.device).roll(1)
    rows = torch.cat([rolled, rolled[: (len(batch) + 1) // 2]])
    if not _alike(batch[rows].predict(model), whole[rows]):
        raise ValueError(
            "the examples of a batch must not be coupled, got outputs of one example that change with the others "
            "of its batch"
        )


def _require_nothing_else_draws(model: nn.Module, batch: Batch, droppers: list[nn.Module]) -> None:
    """Refuse a model that is random in training even if all its layers of dropout are switched off."""
    with untouched(model):
        model.train()
        for layer in model.modules():
            if isinstance(layer, NORMS):
                layer.eval()
        _switch(droppers, False)
        # In training a model may return more than one tensor, such as the logits of auxiliary heads.
        once, again = (_floats(batch.predict(model)) for _ in range(2))
    if not all(map(_alike, once, again)):
        raise ValueError(
            "model must draw at random in its layers of dropout only, got other draws in training: F.dropout inside of "
            "a forward and dropout_p of an attention cannot be reached, nn.Dropout and nn.MultiheadAttention can"
        )


def _floats(output: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(output) if isinstance(x, torch.Tensor) and x.is_floating_point()]


def _alike(once: torch.Tensor, again: torch.Tensor) -> bool:
    """Whether outputs are the same but for rounding, which half precision leaves little room to tell."""
    rounding = (1e3 if torch.finfo(once.dtype).bits > 16 else 16) * torch.finfo(once.dtype).eps
    return torch.allclose(once, again, rtol=0, atol=rounding * once.abs().max().item())


def _masked_outputs(
    model: nn.Module, batch: Batch, droppers: list[nn.Module], masks: int, rows_at_once: int
) -> torch.Tensor:
    """Return the outputs under all masks, one mask after the other, shape (masks · B, ...)."""
    _switch(droppers, True)
    together = max(1, rows_at_once // len(batch))
    rows = torch.arange(len(batch), device=batch.tensors[0].device).repeat(masks)
    return torch.cat([batch[some].predict(model) for some in rows.split(together * len(batch))])


def _split(inputs: Any, targets: Any, device: torch.device, size: int) -> Iterator[Batch]:
    for batch in batches_of(inputs, targets, device):
        yield from batch.split(size)


# Labels and probabilities


def _labels(batch: Batch) -> torch.Tensor:
    labels = batch.targets
    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64:
        kind = labels.dtype if isinstance(labels, torch.Tensor) else type(labels).__name__
        raise ValueError(f"targets must be int64 labels, got {kind}")
    return labels


def _log_probabilities(logits: torch.Tensor, labels: torch.Tensor, leading: int) -> torch.Tensor:
    """Return logarithms of probabilities in float64, shape (..., labels, classes), behind `leading` dimensions."""
    if not isinstance(logits, torch.Tensor):
        raise ValueError(f"model must return one tensor of logits, got {type(logits).__name__}")
    shape, wanted = tuple(logits.shape[leading:]), tuple(labels.shape)
    is_last, is_second = shape[:-1] == wanted, shape[:1] + shape[2:] == wanted
    if len(shape) < 2 or not (is_last or is_second):
        raise ValueError(f"outputs must be logits of targets of shape {wanted}, got shape {shape}")
    if is_last and is_second and len(shape) > 2:
        raise ValueError(f"it must be clear which dimension of the logits is that of classes, got shape {shape}")
    found = (logits if is_last else logits.movedim(leading + 1, -1)).double().log_softmax(-1)
    counted = labels[labels != IGNORED]
    if len(counted) and not 0 <= int(counted.min()) <= int(counted.max()) < found.shape[-1]:
        raise ValueError(
            f"targets must be labels from 0 to {found.shape[-1] - 1}, got {int(counted.min())} to {int(counted.max())}"
        )
    return found


def _require_masks_matter(masked: torch.Tensor) -> None:
    if bool((masked == masked[:1]).all()):
        raise ValueError(
            f"masks must change the outputs, got the same from {len(masked)} masks: is the layer of dropout used?"
        )


def _require_cross_entropy(loss: Any, whole: torch.Tensor, chances: torch.Tensor, labels: torch.Tensor) -> None:
    outputs = whole.float() if torch.finfo(whole.dtype).bits < 32 else whole  # half precision would hide a difference
    found = loss(outputs, labels)
    wanted = F.nll_loss(chances.flatten(0, -2), labels.flatten(), ignore_index=IGNORED).item()
    rounding = 1e3 * torch.finfo(outputs.dtype).eps * max(1.0, abs(wanted))
    if isinstance(found, torch.Tensor) and found.ndim == 0 and abs(found.item() - wanted) <= rounding:
        return
    shown = f"{found.item():.6g}" if isinstance(found, torch.Tensor) and found.ndim == 0 else f"{found}"
    raise ValueError(
        f"loss must be the mean cross-entropy, {wanted:.6g} on this batch, without class weights, smoothed labels, a "
        f"sum or a penalty, and with -100 as the label of padding, got {shown}"
    )


# Sums over examples

WAYS = "whole", "one mask", "geometric", "arithmetic"


@dataclass(frozen=True, eq=False)
class _Sums:
    """Of each example, summed over its tokens; `left_out` holds losses of all examples when one mask is left out."""

    losses: dict[str, torch.Tensor]  # way → (B,)
    hits: dict[str, torch.Tensor]
    confidences: dict[str, torch.Tensor]
    left_out: dict[str, torch.Tensor]  # way → (masks,)
    tokens: torch.Tensor  # (B,)

    @staticmethod
    def of(whole: torch.Tensor, masked: torch.Tensor, labels: torch.Tensor) -> "_Sums":
        """Sum up a batch, from log-probabilities (B, ..., classes) and (masks, B, ..., classes)."""
        counted = (labels != IGNORED).double()
        label = labels.clamp(min=0)[..., None]

        def per_example(x: torch.Tensor) -> torch.Tensor:
            return (x * counted).reshape(len(x), -1).sum(1)

        def loss(log_probabilities: torch.Tensor) -> torch.Tensor:
            of_label = label.expand(*log_probabilities.shape[:-1], 1)
            return -log_probabilities.gather(-1, of_label).squeeze(-1)

        means = {"geometric": geometric_mean(masked), "arithmetic": arithmetic_mean(masked)}
        of_masks = loss(masked)  # (masks, B, ...)
        without = {"geometric": _geometric_without_one(masked, loss), "arithmetic": _arithmetic_without_one(of_masks)}
        losses = {"whole": loss(whole), "one mask": of_masks.mean(0)}
        losses |= {way: _jackknife(loss(means[way]), without[way]) for way in means}
        left_out = {way: per_example(x) for way, x in {**without, "one mask": of_masks}.items()}
        ways = {"whole": whole[None], "one mask": masked} | {way: mean[None] for way, mean in means.items()}
        hits = {way: (x.argmax(-1) == labels).double().mean(0) for way, x in ways.items()}
        confidences = {way: x.max(-1).values.exp().mean(0) for way, x in ways.items()}
        by_example = [{way: per_example(x[way]) for way in WAYS} for x in (losses, hits, confidences)]
        return _Sums(*by_example, left_out, counted.reshape(len(counted), -1).sum(1))

    @staticmethod
    def joined(parts: "list[_Sums]") -> "_Sums":
        def together(name: str) -> dict[str, torch.Tensor]:
            return {way: torch.cat([getattr(part, name)[way] for part in parts]) for way in WAYS}

        left_out = {way: sum(part.left_out[way] for part in parts) for way in parts[0].left_out}
        tokens = torch.cat([part.tokens for part in parts])
        return _Sums(together("losses"), together("hits"), together("confidences"), left_out, tokens)

    def mean(self, sums: torch.Tensor) -> Estimate:
        """Return the mean over tokens, with its standard error over examples, whose numbers of tokens may differ."""
        value = sums.sum() / self.tokens.sum()
        return estimates.mean(value + (sums - value * self.tokens) / self.tokens.mean())

    def report(self, masks: int) -> MaskedLosses:
        if not self.tokens.sum() > 0:
            raise ValueError(f"targets must hold a label, got only {IGNORED}")
        if len(self.tokens) < LEAST_EXAMPLES:
            raise ValueError(
                f"there must be at least {LEAST_EXAMPLES} examples, better {ENOUGH_EXAMPLES}, got {len(self.tokens)}"
            )

        def prediction(way: str) -> Prediction:
            return Prediction(
                self.mean(self.losses[way]),
                self.mean(self.losses[way] - self.losses["whole"]),
                self.mask_stderr(way, masks),
                self.mean(self.hits[way]),
                self.mean(self.confidences[way] - self.hits[way]),
            )

        return MaskedLosses(*map(prediction, WAYS), masks)

    def mask_stderr(self, way: str, masks: int) -> float:
        if way == "whole":
            return 0.0
        spread = self.left_out[way].std().item() / self.tokens.sum().item()
        # Leaving one of T out moves a mean by 1/(T - 1) of what that one is off.
        return spread / math.sqrt(masks) if way == "one mask" else spread * (masks - 1) / math.sqrt(masks)


def _jackknife(full: torch.Tensor, without_one: torch.Tensor) -> torch.Tensor:
    """Return what a function of a mean over T masks would be for infinitely many, but for terms of order 1/T²."""
    masks = len(without_one)
    return masks * full - (masks - 1) * without_one.mean(0)


def _geometric_without_one(masked: torch.Tensor, loss: Any) -> torch.Tensor:
    total, rest = masked.sum(0), len(masked) - 1
    return torch.stack([loss(((total - one) / rest).log_softmax(-1)) for one in masked])


def _arithmetic_without_one(of_masks: torch.Tensor) -> torch.Tensor:
    rest = len(of_masks) - 1
    others = [torch.cat([of_masks[:t], of_masks[t + 1 :]]) for t in range(rest + 1)]
    return torch.stack([math.log(rest) - (-x).logsumexp(0) for x in others])


# Units


class _Remover:
    """Draws which units of each layer stay, once for each set, and multiplies by them; set 0 keeps them all."""

    def __init__(self, fraction: float, rescale: bool, generator: torch.Generator) -> None:
        self.fraction, self.rescale, self.generator = fraction, rescale, generator
        self.set, self.factors, self.called = 0, {}, set()

    def hook(self, name: str) -> Any:
        def removed(layer: nn.Module, _: Any, output: Any) -> torch.Tensor:
            axis = _unit_axis(name, layer, output)
            self.called.add(name)
            if self.set == 0:
                return output
            factors = self.of_set(name, output.shape[axis]).to(output.dtype)
            return output * factors.reshape([-1 if d == axis else 1 for d in range(output.ndim)])

        return removed

    def of_set(self, name: str, units: int) -> torch.Tensor:
        key = name, units, self.set
        if key not in self.factors:
            removed = math.floor(self.fraction * units + 1e-9)  # 0.29 of 100 units are 29
            if removed == 0 < self.fraction:
                raise ValueError(f"fraction must take a unit of each layer, got {self.fraction} of {units} of {name!r}")
            order = torch.randperm(units, generator=self.generator, device=self.generator.device)
            kept = torch.ones(units, dtype=torch.float64, device=order.device)
            kept[order[:removed]] = 0
            self.factors[key] = kept * units / (units - removed) if self.rescale else kept
        return self.factors[key]

    def require_called(self, layers: Sequence[str]) -> None:
        for name in layers:
            if name not in self.called:
                raise ValueError(
                    f"layers must be called when the model runs, got {name!r}, which is not: perhaps only its weights "
                    "are used"
                )


UNITS_LAST = nn.Linear, nn.Bilinear, nn.Embedding, nn.LayerNorm, nn.RMSNorm
UNITS_SECOND = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
)


def _unit_axis(name: str, layer: nn.Module, output: Any) -> int:
    if not isinstance(output, torch.Tensor) or output.ndim < 2 or not output.is_floating_point():
        raise ValueError(
            f"a layer must return one tensor with an axis of units, got {type(output).__name__} of {name!r}"
        )
    if isinstance(layer, UNITS_LAST):
        return output.ndim - 1
    if isinstance(layer, UNITS_SECOND) or output.ndim == 2:
        return 1
    raise ValueError(
        f"it must be clear which axis is that of units: name a linear or convolutional layer, got {name!r}, which "
        f"returns shape {tuple(output.shape)}"
    )


# Rules


def _weights(log_probabilities: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    networks = len(log_probabilities)
    if weights is None:
        return torch.full((networks,), 1 / networks, dtype=log_probabilities.dtype, device=log_probabilities.device)
    if weights.shape != (networks,):
        raise ValueError(f"weights must have shape ({networks},), one for each network, got {tuple(weights.shape)}")
    return weights


def _require_where_drawn(generator: torch.Generator, inputs: Any, targets: Any) -> None:
    """Refuse tensors on another device than the masks; batches of a loader are sent there."""
    if isinstance(inputs, torch.Tensor | tuple | list | Mapping):
        for x in Batch.of(inputs, targets).tensors:
            require_same_device(generator, inputs=x)


def _require_probability(p: float) -> None:
    if not 0 <= p < 1:
        raise ValueError(f"p must lie in [0, 1), got {p}")
