"""Chapter *Variance propagation and weight initialization*: how large signals and gradients are, layer after layer.

Throughout, a layer has the preactivations ``z_i = Σ_j w_ij a_j + b_i``, where j runs over ``fan_in`` inputs, and
independent weights of mean zero. Its *weight scale* σ_w² is ``fan_in · Var(w)``, the `scale` of Keras'
``VarianceScaling``; with 2 a ReLU network keeps its second moments, and ``torch.nn.init`` calls the root of it `gain`.
"""

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import special, stats
from scipy.optimize import brentq
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves

from helpers.lab import figures
from helpers.lab.batches import batches_of
from helpers.lab.checks import (
    require_at_least_one,
    require_not_negative,
    require_positive,
    require_same_device,
)
from helpers.lab.gaussian import Activation, mean_slopes, product_expectation, second_moment, slope_moment
from helpers.lab.tables import Table
from helpers.lab.watch import Call, output_gradients, untouched, watch

# So near to 1, χ cannot be told from 1.
NEAR = 1e-6

CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
CONVOLUTIONAL = tuple(CONVOLUTIONS)
RECURRENT = "RNN", "LSTM", "GRU"
# What networks call as a function between layers; it takes part in predictions where values and gradients agree.
FUNCTIONS = (
    nn.ReLU(),
    nn.Tanh(),
    nn.GELU(),
    nn.GELU(approximate="tanh"),
    nn.SiLU(),
    nn.Sigmoid(),
    nn.LeakyReLU(),
    nn.ELU(),
    nn.Softplus(),
)


# Closed forms


def preactivation_variance(
    weight_variance: float, second_moment: float | np.ndarray, fan_in: int, bias_variance: float = 0.0
) -> float | np.ndarray:
    """Return the variance of a preactivation, ``fan_in · Var(w) · E[a²] + Var(b)``.

    Parameters
    ----------
    weight_variance : float
        Var(w) of each weight; weights have mean zero, and are independent of each other and of the inputs.
    second_moment : float or array
        E[a²], the mean over the inputs. Their means and correlations do not matter.
    fan_in : int
        Number of inputs.
    bias_variance : float
        Of a bias of mean zero.

    Returns
    -------
    float or array
        Claim ``initialization.preactivation_variance``.

    Raises
    ------
    ValueError
        If a variance or moment is negative, or `fan_in` below 1.
    """
    require_not_negative(weight_variance=weight_variance, second_moment=second_moment, bias_variance=bias_variance)
    require_at_least_one(fan_in=fan_in)
    return fan_in * weight_variance * second_moment + bias_variance


def relu_mean(variance: float | np.ndarray) -> float | np.ndarray:
    """Return ``E[relu(z)] = √(v / 2π)`` for z ~ N(0, v). Claim ``initialization.relu_second_moment``.

    Raises
    ------
    ValueError
        If `variance` is negative.
    """
    require_not_negative(variance=variance)
    return np.sqrt(variance / (2 * np.pi))


def relu_second_moment(variance: float | np.ndarray) -> float | np.ndarray:
    """Return ``E[relu(z)²] = v/2`` for z ~ N(0, v). Claim ``initialization.relu_second_moment``.

    Raises
    ------
    ValueError
        If `variance` is negative.
    """
    require_not_negative(variance=variance)
    return variance / 2


def relu_variance(variance: float | np.ndarray) -> float | np.ndarray:
    """Return ``Var(relu(z)) = v (1/2 - 1/2π)`` for z ~ N(0, v). Claim ``initialization.relu_second_moment``.

    Raises
    ------
    ValueError
        If `variance` is negative.
    """
    require_not_negative(variance=variance)
    return variance * (1 / 2 - 1 / (2 * np.pi))


def relu_depth_factor(weight_variance: float, fan: int, depth: int) -> float:
    """Return by what `depth` ReLU layers multiply a second moment, ``(fan · Var(w) / 2)^depth``.

    Parameters
    ----------
    weight_variance : float
        Var(w) of each weight.
    fan : int
        fan_in for activations, which go forward; fan_out for gradients by preactivations, which go backward.
    depth : int
        Number of layers.

    Returns
    -------
    float
        Claims ``initialization.he`` and ``initialization.backward``.

    Raises
    ------
    ValueError
        If `weight_variance` or `depth` is negative, or `fan` below 1.
    """
    require_not_negative(weight_variance=weight_variance, depth=depth)
    require_at_least_one(fan=fan)
    return (fan * weight_variance / 2) ** depth


def he_variance(fan: int) -> float:
    """Return the variance of weights that keeps second moments in a ReLU network, ``2 / fan``.

    With fan_in it keeps those of activations, with fan_out those of gradients. Claims ``initialization.he`` and
    ``initialization.backward``; He et al. (2015).

    Raises
    ------
    ValueError
        If `fan` is below 1.
    """
    require_at_least_one(fan=fan)
    return 2 / fan


def glorot_variance(fan_in: int, fan_out: int) -> float:
    """Return the variance of weights that is a compromise between both directions, ``2 / (fan_in + fan_out)``.

    In a linear network, forward asks for 1/fan_in and backward for 1/fan_out. Claim ``initialization.backward``; Glorot
    and Bengio (2010).

    Raises
    ------
    ValueError
        If a fan is below 1.
    """
    require_at_least_one(fan_in=fan_in, fan_out=fan_out)
    return 2 / (fan_in + fan_out)


def preactivation_excess_kurtosis(
    activation_kurtosis: float, fan_in: int, weight_excess_kurtosis: float = 0.0
) -> float:
    """Return the excess kurtosis of a preactivation over weights and independent inputs.

    Parameters
    ----------
    activation_kurtosis : float
        ``E[a⁴] / E[a²]²`` of an input, at least 1; about zero, not about the mean. It is 6 for the ReLU of a normal
        variable.
    fan_in : int
        Number of inputs.
    weight_excess_kurtosis : float
        0 for Gaussian weights, -1.2 for uniform ones.

    Returns
    -------
    float
        ``((3 + κ_w) E[a⁴]/E[a²]² - 3) / fan_in``. Claim ``initialization.gaussian_preactivation``.

    Raises
    ------
    ValueError
        If a kurtosis is impossible, or `fan_in` below 1.
    """
    if not activation_kurtosis >= 1:
        raise ValueError(f"activation_kurtosis must be at least 1, got {activation_kurtosis}")
    if not weight_excess_kurtosis >= -2:
        raise ValueError(f"weight_excess_kurtosis must be at least -2, got {weight_excess_kurtosis}")
    require_at_least_one(fan_in=fan_in)
    return ((3 + weight_excess_kurtosis) * activation_kurtosis - 3) / fan_in


def norm_fluctuation(widths: Sequence[int]) -> float:
    """Return ``E|h|⁴ / (E|h|²)² = Π(1 + 5/n_l)`` of the last hidden activations of a ReLU network.

    Parameters
    ----------
    widths : sequence of int
        n_1 … n_L, the widths of the hidden layers; the input's does not matter.

    Returns
    -------
    float
        Over Gaussian weights, without biases, for a fixed input. Claim ``initialization.finite_width``; Hanin and
        Nica (2020).

    Raises
    ------
    ValueError
        If `widths` is no sequence, or a width is not a whole number from 1 on.

    Examples
    --------
    Thirty layers of 64 units: the mean square of the squared norm is ten times its squared mean.

    >>> round(norm_fluctuation([64] * 30), 1)
    9.6
    """
    widths = np.asarray(widths)
    if widths.ndim != 1:
        raise ValueError(f"widths must be a sequence, one for each layer, got {widths}")
    _require_whole(widths=widths)
    return float(np.prod(1 + 5 / widths))


def deep_excess_kurtosis(widths: Sequence[int]) -> float:
    """Return the excess kurtosis of a preactivation behind hidden ReLU layers, ``3 (Π(1 + 5/n_l) - 1)``.

    Parameters and errors are those of :func:`norm_fluctuation`. Claim ``initialization.gaussian_preactivation``.
    """
    return 3 * (norm_fluctuation(widths) - 1)


def log_growth(fan_in: int, width: int) -> float:
    """Return the mean of ``ln(|h_l|² / |h_{l-1}|²)`` in a ReLU layer: how much a typical network loses.

    Parameters
    ----------
    fan_in : int
        n_{l-1}, number of inputs; their values do not matter.
    width : int
        n_l, number of units. Each is open with probability 1/2, and of k open units the sum of squares is
        ``2 |h_{l-1}|² / fan_in`` times a chi-square variable.

    Returns
    -------
    float
        ``Σ_k Bin(width, ½)(k) [ψ(k/2) + ln(4 / fan_in)] / (1 - 2^-width)``, over Gaussian weights of He's variance,
        without biases, and over layers in which some unit is open. Near ``-5 / (2 width)`` for wide layers of equal
        width. Claim ``initialization.log_growth``.

    Raises
    ------
    ValueError
        If a count is not a whole number from 1 on.

    Examples
    --------
    Behind thirty layers of 64 units a typical network has a third of the mean over all networks:

    >>> round(math.exp(30 * log_growth(64, 64)), 2)
    0.3
    """
    _require_whole(fan_in=fan_in, width=width)
    open_units = np.arange(1, width + 1)
    probabilities = stats.binom.pmf(open_units, width, 0.5) / (1 - 0.5**width)
    return float(probabilities @ (special.digamma(open_units / 2) + math.log(4 / fan_in)))


def _require_whole(**counts: int | np.ndarray) -> None:
    require_at_least_one(**counts)
    for name, count in counts.items():
        if (np.asarray(count) % 1).any():
            raise ValueError(f"{name} must be whole, got {count}")


# Mean-field maps: networks of infinite width, whose preactivations are normal


def variance_map(activation: Activation, variance: float, *, weight_scale: float, bias_variance: float = 0.0) -> float:
    """Return the variance of the next layer's preactivations, ``v' = σ_w² E[φ(z)²] + σ_b²`` with z ~ N(0, v).

    Parameters
    ----------
    activation, variance
        As in :func:`~helpers.lab.gaussian.second_moment`.
    weight_scale : float
        σ_w², fan_in times the variance of a weight.
    bias_variance : float
        σ_b².

    Returns
    -------
    float
        Claim ``initialization.mean_field``; Poole et al. (2016).

    Raises
    ------
    ValueError
        If an argument is negative.
    """
    require_not_negative(weight_scale=weight_scale, bias_variance=bias_variance)
    return weight_scale * second_moment(activation, variance) + bias_variance


def fixed_variance(
    activation: Activation, *, weight_scale: float, bias_variance: float = 0.0, start: float = 1.0
) -> float:
    """Return the variance v* at which :func:`variance_map` settles.

    The map grows with v, so that its iterates rise or fall towards the next fixed point; that one is returned.

    Parameters
    ----------
    activation, weight_scale, bias_variance
        As in :func:`variance_map`.
    start : float
        Variance of the first layer.

    Returns
    -------
    float
        0 if the signal dies.

    Raises
    ------
    ValueError
        If the variance grows without bound, or an argument is out of range.
    """
    require_positive(start=start)

    def growth(variance: float) -> float:
        return variance_map(activation, variance, weight_scale=weight_scale, bias_variance=bias_variance) - variance

    first = growth(start)
    if abs(first) < 1e-14 * start:
        return start
    rises = first > 0
    near, far = start, start * 2.0 if rises else start * 0.5
    while growth(far) * math.copysign(1, first) > 0:
        near, far = far, far * (far / near)
        if rises and far > max(1e9, 1e9 * start):
            raise ValueError(f"the variance must stay bounded, got growth without end from {start} on")
        if not rises and far < min(1e-12, 1e-12 * start):
            return 0.0
    return brentq(growth, *sorted((near, far)), xtol=sys.float_info.min, rtol=1e-14)


def chi(activation: Activation, variance: float, *, weight_scale: float, correlation: float = 1.0) -> float:
    """Return ``χ_c = σ_w² E[φ'(z) φ'(z')]`` for jointly normal z, z' with variance v and correlation c.

    At c = 1 it is the factor by which a layer multiplies the second moment of gradients, and a small difference
    between two inputs. Below 1 the network is ordered, above 1 chaotic.

    Parameters
    ----------
    activation, variance, weight_scale
        As in :func:`variance_map`.
    correlation : float
        Between the preactivations of two inputs.

    Returns
    -------
    float
        Claim ``initialization.mean_field``; Schoenholz et al. (2017).

    Raises
    ------
    ValueError
        If an argument is negative, or the correlation not between -1 and 1; if the activation jumps, since no slope
        says what becomes of a difference across a jump, or has no derivative.
    """
    require_not_negative(weight_scale=weight_scale)
    slope = slope_moment(activation, variance, correlation)
    _require_continuous(activation, variance)
    return weight_scale * slope


def _require_continuous(activation: Activation, variance: float) -> None:
    if variance == 0:
        return
    by_values, by_autograd = mean_slopes(activation, variance)
    size = math.sqrt(second_moment(activation, variance) / variance)
    if abs(by_values - by_autograd) > 1e-5 * (size + abs(by_autograd)):
        raise ValueError(
            f"the activation must be continuous and autograd's derivative its own, got one with mean slope "
            f"{by_autograd:.3g} by autograd and {by_values:.3g} by its values"
        )


def correlation_map(
    activation: Activation,
    correlation: float,
    variance: float,
    *,
    weight_scale: float,
    bias_variance: float = 0.0,
) -> float:
    """Return the correlation of the next layer's preactivations for two inputs, ``(σ_w² E[φ(z)φ(z')] + σ_b²) / v'``.

    Parameters
    ----------
    activation, variance, weight_scale, bias_variance
        As in :func:`variance_map`; both inputs have preactivations of variance v.
    correlation : float
        Of z and z', the preactivations of the two inputs in this layer.

    Returns
    -------
    float
        Claim ``initialization.mean_field``; Poole et al. (2016).

    Raises
    ------
    ValueError
        If an argument is negative, the correlation not between -1 and 1, or the next layer's variance zero.
    """
    require_not_negative(weight_scale=weight_scale, bias_variance=bias_variance)
    covariance = weight_scale * product_expectation(activation, variance, correlation) + bias_variance
    after = variance_map(activation, variance, weight_scale=weight_scale, bias_variance=bias_variance)
    require_positive(next_variance=after)
    return covariance / after


def fixed_correlation(
    activation: Activation, variance: float, *, weight_scale: float, bias_variance: float = 0.0
) -> float:
    """Return the correlation c* at which :func:`correlation_map` settles at a fixed variance, for inputs that differ.

    Parameters
    ----------
    activation, variance, weight_scale, bias_variance
        As in :func:`correlation_map`, `variance` being a fixed point of :func:`variance_map`.

    Returns
    -------
    float
        1 in the ordered phase and at its edge; below 1 in the chaotic phase.

    Raises
    ------
    ValueError
        As :func:`correlation_map` and :func:`chi`: an activation that jumps is refused.
    """
    if chi(activation, variance, weight_scale=weight_scale) <= 1 + NEAR:
        return 1.0

    def growth(correlation: float) -> float:
        scales = {"weight_scale": weight_scale, "bias_variance": bias_variance}
        return correlation_map(activation, correlation, variance, **scales) - correlation

    gap = 1e-12
    while growth(1 - gap) >= -2e-14:  # beyond rounding, the map must lie below 1 - gap if it is steeper than 1 there
        gap *= 2
        if gap >= 1:
            return 1.0
    return 0.0 if growth(0.0) <= 0 else brentq(growth, 0.0, 1 - gap, xtol=1e-15)


def depth_scale(
    activation: Activation, *, weight_scale: float, bias_variance: float = 0.0, start: float = 1.0
) -> float:
    """Return over how many layers the correlation of two inputs approaches c* by a factor e, ``-1 / ln χ_{c*}``.

    Parameters
    ----------
    activation, weight_scale, bias_variance, start
        As in :func:`fixed_variance`.

    Returns
    -------
    float
        In layers; infinite at the edge of chaos, 0 if one layer is enough. Claim ``initialization.mean_field``;
        Schoenholz et al. (2017).

    Raises
    ------
    ValueError
        If the signal dies or grows without bound, the activation jumps, or an argument is out of range.

    Examples
    --------
    >>> round(depth_scale(torch.tanh, weight_scale=1.2, bias_variance=0.1), 2)
    3.93
    >>> depth_scale(torch.relu, weight_scale=2.0)
    inf
    """
    scales = {"weight_scale": weight_scale, "bias_variance": bias_variance}
    variance = fixed_variance(activation, **scales, start=start)
    require_positive(fixed_variance=variance)
    correlation = fixed_correlation(activation, variance, **scales)
    slope = chi(activation, variance, weight_scale=weight_scale, correlation=correlation)
    if slope == 0:
        return 0.0
    return math.inf if abs(slope - 1) <= NEAR else -1 / math.log(slope)


class Scales(NamedTuple):
    """Weight scale σ_w² and bias variance σ_b² of a network."""

    weight_scale: float
    bias_variance: float


def edge_of_chaos(activation: Activation, variance: float) -> Scales:
    """Return the scales at which `variance` is a fixed point and χ = 1.

    Parameters
    ----------
    activation, variance
        As in :func:`~helpers.lab.gaussian.second_moment`; `variance` is v*.

    Returns
    -------
    Scales
        ``σ_w² = 1 / E[φ'(z)²]`` and ``σ_b² = v* - σ_w² E[φ(z)²]``. Where :func:`variance_map` is steeper than 1
        there, as for GELU at small variances, v* repels: networks leave it.

    Raises
    ------
    ValueError
        If `variance` is not positive; if the activation is flat almost everywhere, jumps or has no derivative, or σ_b²
        would be negative: then no network is critical there.

    Examples
    --------
    >>> weight_scale, bias_variance = edge_of_chaos(torch.tanh, 0.5)
    >>> round(weight_scale, 4), round(bias_variance, 4)
    (1.688, 0.038)
    """
    require_positive(variance=variance)
    slope = chi(activation, variance, weight_scale=1.0)
    require_positive(mean_square_slope=slope)
    weight_scale = 1 / slope
    bias_variance = variance - weight_scale * second_moment(activation, variance)
    if bias_variance < -1e-12 * variance:
        raise ValueError(
            f"no network is critical at variance {variance}: its bias variance would be {bias_variance:.3g}"
        )
    return Scales(weight_scale, max(bias_variance, 0.0))


# Your own network


@dataclass(frozen=True)
class LayerReport:
    """Second moments at a layer's output: forward of its values, backward of the gradient by them.

    What theory does not reach is NaN: fans, predictions and weight scale of layers that do not multiply their inputs by
    a weight. The weight scale is fan_in times the mean square of the weights.
    """

    name: str
    kind: str
    fan_in: float
    fan_out: float
    forward: float
    predicted_forward: float
    backward: float
    predicted_backward: float
    weight_scale: float = math.nan


@dataclass(frozen=True, repr=False)
class PropagationReport:
    """What :func:`propagation_report` found; shows itself as a table.

    Parameters
    ----------
    layers : tuple of LayerReport
        In the order in which they ran.
    limit : float
        A layer goes wrong where a second moment is more than `limit` times larger or smaller than where the stack of
        layers begins: forward at its first layer, backward at the last layer before the head. The head, the last layer,
        is not part of the stack, since its size sets the scale of all gradients alike; it goes wrong, in either
        direction, only if it is 0 or not finite. The first layer, which sets the scale of all values alike, goes wrong
        too if its weight scale is more than `limit` times larger or smaller than the median of the layers between it
        and the head; where there is no such scale or median, the verdict says that it was not judged.
    """

    layers: tuple[LayerReport, ...]
    limit: float

    @property
    def first_bad_forward(self) -> str | None:
        """Name of the first layer, from the input on, whose values have left the limits; None if none has."""
        odd = self._size_of_first()
        if odd < 1 / self.limit or odd > self.limit:
            return self.layers[0].name
        *stack, head = [(layer.name, layer.forward) for layer in self.layers]
        return (self._first_bad(stack) if stack else None) or self._dead(head)

    @property
    def first_bad_backward(self) -> str | None:
        """Name of the first layer, from the output on, whose gradients have left the limits; None if none has."""
        head, *stack = [(layer.name, layer.backward) for layer in reversed(self.layers)]
        return self._dead(head) or (self._first_bad(stack) if stack else None)

    def _size_of_first(self) -> float:
        """Return its weight scale over the median of those between it and the head, NaN where there is none."""
        scales = [layer.weight_scale for layer in self.layers[1:-1] if math.isfinite(layer.weight_scale)]
        return self.layers[0].weight_scale / np.median(scales) if scales and np.median(scales) > 0 else math.nan

    def _dead(self, layer: tuple[str, float]) -> str | None:
        name, moment = layer
        return None if 0 < moment < math.inf else name

    def _first_bad(self, moments: list[tuple[str, float]]) -> str | None:
        name, start = moments[0]
        if not 0 < start < math.inf:
            return name
        low, high = start / self.limit, start * self.limit
        return next((name for name, moment in moments if not low <= moment <= high), None)

    @property
    def verdict(self) -> str:
        """Which layer goes wrong first, in either direction, and what was not judged, in one sentence."""
        found = [("values", self.first_bad_forward), ("gradients", self.first_bad_backward)]
        said = [f"{what} first go wrong at layer {name}" for what, name in found if name is not None]
        said = said or [f"all second moments stay within a factor of {self.limit:g}"]
        if self.first_bad_forward is None and math.isnan(self._size_of_first()):
            said.append(f"the weights of the first layer, {self.layers[0].name}, were not judged")
        recurrent = [layer.name for layer in self.layers if layer.kind in RECURRENT]
        said += [f"what happens within {name}, from step to step, was not seen" for name in recurrent]
        return "; ".join(said)

    @property
    def table(self) -> Table:
        """Everything measured beside everything predicted, a row for each layer; empty where theory does not reach."""
        header = ["layer", "kind", "fan in", "fan out", "forward", "predicted", "backward", "predicted"]
        return Table(header, [_row(layer) for layer in self.layers], note=self.verdict)

    def __repr__(self) -> str:
        return repr(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def figure(self) -> Figure:
        """Draw measured second moments as dots beside the predicted lines, forward and backward."""
        figure, panels = figures.axes(columns=2)
        depth = np.arange(1, len(self.layers) + 1)
        for ax, way in zip(panels, ("forward", "backward"), strict=True):
            predicted = [getattr(layer, f"predicted_{way}") for layer in self.layers]
            figures.theory(ax, depth, predicted, label="predicted")
            ax.plot(depth, [getattr(layer, way) for layer in self.layers], "o", color=figures.DATA, label="measured")
            ax.set(yscale="log", xlabel="layer", ylabel=f"second moment, {way}")
            ax.legend()
        return figure


def _row(layer: LayerReport) -> list[str]:
    theory = layer.fan_in, layer.fan_out, layer.predicted_forward, layer.predicted_backward
    fan_in, fan_out, forward, backward = (None if math.isnan(x) else x for x in theory)
    fans = ["" if x is None else f"{x:.4g}" for x in (fan_in, fan_out)]
    moments = ["" if x is None else f"{x:.2g}" for x in (layer.forward, forward, layer.backward, backward)]
    return [layer.name, layer.kind, *fans, *moments]


def propagation_report(
    model: nn.Module,
    inputs: torch.Tensor | Sequence[torch.Tensor] | Mapping[str, torch.Tensor] | Iterable,
    *,
    generator: torch.Generator,
    limit: float = 100.0,
) -> PropagationReport:
    """Measure how signals and gradients propagate through your network, beside what theory predicts.

    Parameters
    ----------
    model : torch.nn.Module
        Any; it is left as it was.
    inputs : torch.Tensor, tuple, list or mapping of tensors, or an iterable of batches such as a ``DataLoader``
        A batch of your data, examples along dimension 0, on the device of the model: ``model(x)``, ``model(*inputs)``
        or ``model(**inputs)``, so without targets. Of any other iterable, the first batch, ``(inputs, targets)`` or
        inputs alone. Finite, but for additive masks beside other inputs, of entries 0 and -inf.
    generator : torch.Generator
        Draws the readout whose gradient is propagated: independent N(0, 1) weights of all outputs.
    limit : float
        Above 1; see :class:`PropagationReport`.

    Returns
    -------
    PropagationReport
        For each call of a layer with parameters, mean squares over examples and units of its output and of the gradient
        by it. Costs two passes forward and two backward, a copy of the model, memory for the inputs and outputs of all
        layers, and for each prediction two quadratures, of about a millisecond, or ten at kinks other than at 0.

        Predictions are made for layers that did what ``F.linear`` or a convolution does with their weight; subclasses
        that do something else are only measured. They use of each layer only the mean squares of its weights and
        biases, and hold for independent weights of mean zero and wide layers; near the borders of an image on average.
        As long as each layer's input is the output of the one before, or of functions that act on it entry by entry,
        predictions are chained, forward from the inputs' second moment and backward from the readout's. Such a
        function is a module (``nn.ReLU``) or, between two layers, the function of one that is in `FUNCTIONS`, with its
        default arguments (``F.relu``, ``torch.tanh``); others break the chain. Where it breaks, as at a normalization
        layer, attention or a sum of branches, it begins anew: forward at the measured second moment of the next
        layer's input, backward at the measured gradient of the chain's last layer.

        Dropout in training draws one mask, from the global random state as in your training; the figures are those
        of this mask, and predictions begin anew behind it. In half precision, and under autocast, predictions are made
        where doing again what a layer did gives exactly the same.

        A recurrent layer is one call: its figures are means over all steps, which hide a gradient that dies from
        step to step. The verdict says so.

    Raises
    ------
    ValueError
        If inputs hold no example, lack the batch dimension or, masks aside, are not finite; if the model calls no layer
        with parameters, has lazy ones, or returns no floating-point tensor; if `limit` is not above 1, or the generator
        is on another device.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 10))
    >>> report = propagation_report(model, torch.ones(8, 50), generator=torch.Generator())
    >>> [layer.name for layer in report.layers]
    ['0', '2']
    """
    if not limit > 1:
        raise ValueError(f"limit must be above 1, got {limit}")
    with untouched(nn.Identity()):  # a loader that shuffles draws from the global random state
        inputs = _first_batch(inputs, generator.device)
    _require_batch(inputs, generator)
    with untouched(model), torch.inference_mode(False), torch.enable_grad():
        calls, output, readout = _run(model, inputs, generator)
        gradients = output_gradients(_read(output, readout), calls)
        links = [_link(call, gradient) for call, gradient in zip(calls, gradients, strict=True)]
        calls, links, gradients = _with_functions(list(zip(calls, links, gradients, strict=True)))
        predicted = _predictions(calls, links, gradients, output, readout)
    layers = [
        LayerReport(
            call.name,
            type(call.layer).__name__,
            *(link.fans or (math.nan, math.nan)),
            _mean_square(call.output),
            forward,
            _mean_square(gradient),
            backward,
            link.fans[0] * _mean_square(call.layer.weight) if link.fans else math.nan,
        )
        for call, link, gradient, (forward, backward) in zip(calls, links, gradients, predicted, strict=True)
        if _has_parameters(call.layer)
    ]
    if not layers:
        raise ValueError("model must call a layer with parameters, got none")
    return PropagationReport(tuple(layers), limit)


# What a call did, as far as theory knows it


class _Link(NamedTuple):
    """A call that multiplied by a weight has fans, one that acted entry by entry a function, any other has neither."""

    fans: tuple[float, float] | None = None
    function: Activation | None = None
    input_gradient: torch.Tensor | None = None  # what it hands on to the layer before


_Step = tuple[Call, _Link, torch.Tensor]  # a call, what it did, and the gradient by its output


def _first_batch(inputs: torch.Tensor | Sequence | Mapping | Iterable, device: torch.device) -> Any:
    if isinstance(inputs, np.ndarray):
        raise ValueError(f"inputs must be tensors or an iterable of batches, got an array of shape {inputs.shape}")
    if not isinstance(inputs, torch.Tensor | tuple | list | Mapping):
        inputs = next(batches_of(inputs, None, device)).inputs
    return dict(inputs) if isinstance(inputs, Mapping) else inputs


def _run(
    model: nn.Module, inputs: torch.Tensor | tuple | list | dict, generator: torch.Generator
) -> tuple[list[Call], list[torch.Tensor], list[torch.Tensor]]:
    """Return the calls of all layers, the floating-point tensors that the model returned, and a readout of them."""
    with watch(model) as calls:
        if isinstance(inputs, dict):
            output = model(**inputs)
        else:
            output = model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)
    outputs = [x for x in tree_leaves(output) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    if calls and not outputs:
        raise ValueError("model must return floating-point tensors, alone or in tuples, lists or dicts, got none")
    for call in calls:
        dimensions = len(getattr(call.layer, "kernel_size", ())) + 2 if isinstance(call.layer, CONVOLUTIONAL) else 2
        if isinstance(call.layer, (nn.Linear, *CONVOLUTIONAL)) and call.inputs[0].ndim < dimensions:
            raise ValueError(
                f"inputs must be a batch, with examples along dimension 0, got an input of shape "
                f"{tuple(call.inputs[0].shape)} at layer {call.name}"
            )
    return calls, outputs, [torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device) for x in outputs]


def _read(outputs: list[torch.Tensor], readout: list[torch.Tensor]) -> torch.Tensor:
    return sum((output * weights).sum() for output, weights in zip(outputs, readout, strict=True))


def _link(call: Call, gradient: torch.Tensor) -> _Link:
    """Find out what a call did, by doing it again."""
    if len(call.inputs) != 1 or len(call.outputs) != 1 or not call.inputs[0].is_floating_point():
        return _Link()
    x = call.inputs[0].clone().requires_grad_()
    product = _product(call.layer, x)
    if product is not None:
        if not _same(product, call.output):
            return _Link()
        back = torch.autograd.grad(product, x, gradient)[0]
        return _Link(_fans(call.layer, x.shape, product.shape), None, back)
    if x.numel() == call.output.numel() and _same(x.flatten(), call.output.flatten()):
        return _Link(None, nn.Identity(), gradient.reshape(x.shape))
    return _entry_by_entry(call, x, gradient)


def _product(layer: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    if isinstance(layer, nn.Linear):
        return F.linear(x, layer.weight, layer.bias)
    for kind, convolve in CONVOLUTIONS.items():
        if isinstance(layer, kind):
            x, padding = _padded(layer, x)
            return convolve(x, layer.weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups)
    return None


def _padded(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, str | tuple[int, ...]]:
    """Return the input of a convolution, padded unless with zeros, and what padding is left to do."""
    if layer.padding_mode == "zeros" or isinstance(layer.padding, str):
        return x, layer.padding
    sides = [side for width in reversed(layer.padding) for side in (width, width)]
    return F.pad(x, sides, mode=layer.padding_mode), (0,) * len(layer.padding)


def _entry_by_entry(call: Call, x: torch.Tensor, gradient: torch.Tensor) -> _Link:
    """Return the layer as a function if it gives the same for all entries in one row, in reverse."""
    try:
        row = call.layer(x.flatten().flip(0).clone())
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):  # a layer that needs its dimensions
        return _Link()
    if not isinstance(row, torch.Tensor) or row.shape != (x.numel(),) or call.output.shape != x.shape:
        return _Link()
    if not row.requires_grad or not _same(row.flip(0).reshape(x.shape), call.output):
        return _Link()
    back = torch.autograd.grad(row, x, gradient.flatten().flip(0))[0]
    return _Link(None, call.layer, back)


def _with_functions(steps: list[_Step]) -> tuple[list[Call], list[_Link], list[torch.Tensor]]:
    """Insert functions that acted between two layers without being layers, and take the steps apart."""
    found = steps[:1]
    for before, after in pairwise(steps):
        found += [] if _hands_on(before, after) else _function_between(before, after)
        found.append(after)
    return tuple(map(list, zip(*found, strict=True))) if found else ([], [], [])


def _function_between(before: _Step, after: _Step) -> list[_Step]:
    """Return the function, as if it were a layer, in a list; none if it is none of `FUNCTIONS`."""
    call, link = before[0], after[1]
    x, behind = call.output.detach(), after[0].inputs[0]
    if link.input_gradient is None or behind.numel() != x.numel() or behind.dtype != x.dtype:
        return []
    gradient = link.input_gradient.reshape(x.shape)
    for function in FUNCTIONS:
        between = Call("", function, (x,), (function(x),), ((x,), {}))
        if _hands_on((between, _Link(), gradient), after):
            step = between, _entry_by_entry(between, x.clone().requires_grad_(), gradient), gradient
            return [step] if _hands_on(before, step) else []
    return []


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors have the same entries, but for rounding; in half precision, exactly the same."""
    rounding = 1e3 * torch.finfo(expected.dtype).eps
    rounding = rounding if rounding < 1e-2 else 0.0
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    finite = expected.detach()[torch.isfinite(expected)].abs()
    size = finite.max().item() if finite.numel() else 0.0
    return torch.allclose(found, expected, rtol=0.0, atol=rounding * size, equal_nan=True)


# Predictions


def _predictions(
    calls: list[Call],
    links: list[_Link],
    gradients: list[torch.Tensor],
    outputs: list[torch.Tensor],
    readout: list[torch.Tensor],
) -> list[tuple[float, float]]:
    """Return for each call the second moments of its output and of the gradient by it, NaN where there is no theory."""
    chained = [False] + [_hands_on(*pair) for pair in pairwise(zip(calls, links, gradients, strict=True))]
    forward = [math.nan] * len(calls)
    for k, link in enumerate(links):
        if link.fans:
            forward[k] = _predict_forward(k, calls, links, chained, forward)
    last_is_output = len(outputs) == 1 and bool(calls) and _same(calls[-1].output.flatten(), outputs[0].flatten())
    last_is_output = last_is_output and _same(gradients[-1].flatten(), readout[0].flatten())
    backward = [math.nan] * len(calls)
    for k in reversed(range(len(calls))):
        if links[k].fans:
            functions, behind = _followers(k, links, chained)
            if behind < len(calls) and chained[behind] and links[behind].fans:
                after = backward[behind]
                after = _mean_square(gradients[behind]) if math.isnan(after) else after
                arriving = links[behind].fans[1] * _mean_square(calls[behind].layer.weight) * after
            else:
                arriving = 1.0 if behind == len(calls) and last_is_output else math.nan
            backward[k] = _moment(slope_moment, functions, forward[k], without=1.0) * arriving
    return list(zip(forward, backward, strict=True))


def _hands_on(first: _Step, second: _Step) -> bool:
    """Whether the second call took what the first gave, and nothing else did: the gradient says so."""
    (before, _, gradient), (after, link, _) = first, second
    if link.input_gradient is None or after.inputs[0].numel() != before.output.numel():
        return False
    values = _same(after.inputs[0].flatten(), before.output.detach().flatten())
    return values and _same(link.input_gradient.flatten(), gradient.flatten())


def _followers(k: int, links: list[_Link], chained: list[bool]) -> tuple[list[Activation], int]:
    """Return the functions that act on what call k gave, and the number of the call behind them."""
    behind = k + 1
    while behind < len(links) and chained[behind] and links[behind].function is not None:
        behind += 1
    return [link.function for link in links[k + 1 : behind]], behind


def _predict_forward(k: int, calls: list[Call], links: list[_Link], chained: list[bool], forward: list[float]) -> float:
    """Return the second moment behind a layer: chained to the layer before, or else from its measured input."""
    first = k
    while chained[first] and links[first - 1].function is not None:
        first -= 1
    if chained[first] and links[first - 1].fans:
        moment = _moment(second_moment, [link.function for link in links[first:k]], forward[first - 1])
    else:
        moment = _mean_square(calls[k].inputs[0])
    layer = calls[k].layer
    bias = 0.0 if layer.bias is None else _mean_square(layer.bias)
    return links[k].fans[0] * _mean_square(layer.weight) * moment + bias


def _moment(
    of: Callable[[Activation, float], float], functions: list[Activation], variance: float, without: float | None = None
) -> float:
    """Return a moment behind functions of a normal variable, NaN where there is none; `without` any function."""
    functions = [function for function in functions if not isinstance(function, nn.Identity)]
    if not math.isfinite(variance):
        return math.nan
    if not functions:
        return variance if without is None else without
    try:
        return of(nn.Sequential(*functions), variance)
    except ValueError:  # too rough or too steep for quadrature
        return math.nan


def _has_parameters(layer: nn.Module) -> bool:
    return next(layer.parameters(), None) is not None


def _fans(layer: nn.Module, input_shape: torch.Size, output_shape: torch.Size) -> tuple[float, float]:
    """Return how many inputs an output has, and how many outputs an input has, on average over an image."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    ones, padding = _padded(layer, torch.ones((1, 1, *input_shape[2:]), device=layer.weight.device))
    kernel = torch.ones((1, 1, *layer.kernel_size), device=layer.weight.device)
    convolve = next(function for kind, function in CONVOLUTIONS.items() if isinstance(layer, kind))
    how = {"stride": layer.stride, "padding": padding, "dilation": layer.dilation}
    links = convolve(ones, kernel, **how).sum().item()  # pixels that meet, fewer where the kernel hangs over the border
    fan_in = layer.in_channels / layer.groups * links / math.prod(output_shape[2:])
    return fan_in, layer.out_channels / layer.groups * links / math.prod(input_shape[2:])


def _mean_square(x: torch.Tensor) -> float:
    return x.detach().double().square().mean().item()


# Rules


def _require_batch(inputs: torch.Tensor | tuple | list | dict, generator: torch.Generator) -> None:
    leaves = [(keystr(path), leaf) for path, leaf in tree_flatten_with_path(inputs)[0]]
    tensors = [(f"inputs{path}", leaf) for path, leaf in leaves if isinstance(leaf, torch.Tensor)]
    if not tensors:
        raise ValueError(f"inputs must hold at least one tensor, got {inputs}")
    for name, x in tensors:
        require_same_device(generator, inputs=x)
        if x.ndim == 0 or x.numel() == 0:
            raise ValueError(f"inputs must hold at least one example, got shape {tuple(x.shape)}")
        if x.is_floating_point() and not torch.isfinite(x).all() and not (len(tensors) > 1 and _is_mask(x)):
            advice = "; a mask must hold 0 and -inf alone, or be boolean" if "mask" in name else ""
            raise ValueError(f"{name} must be finite, got {x[~torch.isfinite(x)][0].item()}{advice}")


def _is_mask(x: torch.Tensor) -> bool:
    """Whether it is added to scores of attention, such as that of ``Transformer.generate_square_subsequent_mask``."""
    return bool(((x == 0) | (x == -math.inf)).all())
