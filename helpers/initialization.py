"""Chapter *Variance propagation and weight initialization*: how large signals and gradients are, layer after layer.

Throughout, a layer has the preactivations ``z_i = Σ_j w_ij a_j + b_i``, where j runs over ``fan_in`` inputs, and
independent weights of mean zero. Its *weight scale* σ_w² is ``fan_in · Var(w)``, the `scale` of Keras'
``VarianceScaling``; with 2 a ReLU network keeps its second moments, and ``torch.nn.init`` calls the root of it `gain`.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.optimize import brentq
from torch import nn
from torch.nn import functional as F

from helpers.lab import figures
from helpers.lab.checks import (
    require_at_least_one,
    require_not_negative,
    require_positive,
    require_same_device,
)
from helpers.lab.gaussian import Activation, product_expectation, second_moment, slope_moment

# So near to 1, χ cannot be told from 1.
NEAR = 1e-6

ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Tanh)
ACTIVATIONS += (nn.Sigmoid, nn.Hardtanh, nn.Identity)
CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
RESHAPES = (nn.Flatten, nn.Unflatten)


# Closed forms


def preactivation_variance(
    weight_variance: float, second_moment: float, fan_in: int, bias_variance: float = 0.0
) -> float:
    """Return the variance of a preactivation, ``fan_in · Var(w) · E[a²] + Var(b)``.

    Parameters
    ----------
    weight_variance : float
        Var(w) of each weight; weights have mean zero, and are independent of each other and of the inputs.
    second_moment : float
        E[a²], the mean over the inputs. Their means and correlations do not matter.
    fan_in : int
        Number of inputs.
    bias_variance : float
        Of a bias of mean zero.

    Returns
    -------
    float
        Claim ``initialization.preactivation_variance``.

    Raises
    ------
    ValueError
        If a variance or moment is negative, or `fan_in` below 1.
    """
    require_not_negative(weight_variance=weight_variance, second_moment=second_moment, bias_variance=bias_variance)
    require_at_least_one(fan_in=fan_in)
    return fan_in * weight_variance * second_moment + bias_variance


def relu_mean(variance: float) -> float:
    """Return ``E[relu(z)] = √(v / 2π)`` for z ~ N(0, v). Claim ``initialization.relu_second_moment``.

    Raises
    ------
    ValueError
        If `variance` is negative.
    """
    require_not_negative(variance=variance)
    return np.sqrt(variance / (2 * np.pi))


def relu_second_moment(variance: float) -> float:
    """Return ``E[relu(z)²] = v/2`` for z ~ N(0, v). Claim ``initialization.relu_second_moment``.

    Raises
    ------
    ValueError
        If `variance` is negative.
    """
    require_not_negative(variance=variance)
    return variance / 2


def relu_variance(variance: float) -> float:
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
        If a width is below 1.
    """
    require_at_least_one(widths=np.asarray(widths))
    return float(np.prod(1 + 5 / np.asarray(widths, dtype=np.float64)))


def deep_excess_kurtosis(widths: Sequence[int]) -> float:
    """Return the excess kurtosis of a preactivation behind hidden ReLU layers, ``3 (Π(1 + 5/n_l) - 1)``.

    Parameters and errors are those of :func:`norm_fluctuation`. Claim ``initialization.gaussian_preactivation``.
    """
    return 3 * (norm_fluctuation(widths) - 1)


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
    step = 2.0 if first > 0 else 0.5
    near, far = start, start * step
    while growth(far) * first > 0:
        near, far = far, far * step
        if far > 1e9:
            raise ValueError(f"the variance must stay bounded, got growth without end from {start} on")
        if far < 1e-12:
            return 0.0
    return brentq(growth, *sorted((near, far)), xtol=1e-15, rtol=1e-14)


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
        If an argument is negative, or the correlation not between -1 and 1.
    """
    require_not_negative(weight_scale=weight_scale)
    return weight_scale * slope_moment(activation, variance, correlation)


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
        As :func:`correlation_map`.
    """
    if chi(activation, variance, weight_scale=weight_scale) <= 1 + NEAR:
        return 1.0

    def growth(correlation: float) -> float:
        scales = {"weight_scale": weight_scale, "bias_variance": bias_variance}
        return correlation_map(activation, correlation, variance, **scales) - correlation

    gap = 1e-12  # so near to 1 that nothing lies between, if the map is steeper than 1 there
    while growth(1 - gap) >= 0:
        gap *= 2
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
        If the signal dies or grows without bound, or an argument is out of range.
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
        If `variance` is not positive, or σ_b² would be negative: then no network is critical there.
    """
    require_positive(variance=variance)
    weight_scale = 1 / chi(activation, variance, weight_scale=1.0)
    bias_variance = variance - weight_scale * second_moment(activation, variance)
    if bias_variance < -1e-12 * variance:
        raise ValueError(
            f"no network is critical at variance {variance}: its bias variance would be {bias_variance:.3g}"
        )
    return Scales(weight_scale, max(bias_variance, 0.0))


# Your own network


@dataclass(frozen=True)
class LayerReport:
    """Second moments at a layer's output: forward of its values, backward of the gradient by them."""

    name: str
    kind: str
    fan_in: float
    fan_out: float
    forward: float
    predicted_forward: float
    backward: float
    predicted_backward: float


@dataclass(frozen=True, repr=False)
class PropagationReport:
    """What :func:`propagation_report` found; shows itself as a table.

    Parameters
    ----------
    layers : tuple of LayerReport
        From the input to the output.
    limit : float
        A layer goes wrong where a second moment is more than `limit` times larger or smaller than where it started.
    """

    layers: tuple[LayerReport, ...]
    limit: float

    @property
    def first_bad_forward(self) -> str | None:
        """Name of the first layer, from the input on, whose values have left the limits; None if none has."""
        return self._first_bad([(layer.name, layer.forward) for layer in self.layers])

    @property
    def first_bad_backward(self) -> str | None:
        """Name of the first layer, from the output on, whose gradients have left the limits; None if none has."""
        return self._first_bad([(layer.name, layer.backward) for layer in reversed(self.layers)])

    def _first_bad(self, moments: list[tuple[str, float]]) -> str | None:
        start = moments[0][1]
        within = (start / self.limit, start * self.limit)
        if not 0 < start < math.inf:
            return moments[0][0]
        return next((name for name, moment in moments if not within[0] <= moment <= within[1]), None)

    @property
    def verdict(self) -> str:
        """Which layer goes wrong first, in either direction, in one sentence."""
        found = [("values", self.first_bad_forward), ("gradients", self.first_bad_backward)]
        bad = [f"{what} first go wrong at layer {name}" for what, name in found if name is not None]
        return "; ".join(bad) if bad else f"all second moments stay within a factor of {self.limit:g}"

    def _rows(self) -> list[list[str]]:
        head = ["layer", "kind", "fan in", "fan out", "forward", "predicted", "backward", "predicted"]
        rows = [
            [layer.name, layer.kind, f"{layer.fan_in:.4g}", f"{layer.fan_out:.4g}"]
            + [f"{x:.2g}" for x in (layer.forward, layer.predicted_forward, layer.backward, layer.predicted_backward)]
            for layer in self.layers
        ]
        return [head, *rows]

    def __str__(self) -> str:
        rows = self._rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([*lines, self.verdict])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head, *rows = [[html.escape(cell) for cell in row] for row in self._rows()]
        cells = "".join(f'<th scope="col">{cell}</th>' for cell in head)
        body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
        table = f'<table class="claims"><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>'
        return f"{table}<p>{html.escape(self.verdict)}</p>"

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


def propagation_report(
    model: nn.Sequential, inputs: torch.Tensor, *, generator: torch.Generator, limit: float = 100.0
) -> PropagationReport:
    """Measure how signals and gradients propagate through your network, beside what theory predicts.

    Parameters
    ----------
    model : torch.nn.Sequential
        Of linear and convolutional layers, activations that act entry by entry, ``Flatten`` and ``Unflatten``; may be
        nested.
    inputs : torch.Tensor, shape (B, ...)
        A batch of your data, on the device of the model.
    generator : torch.Generator
        Draws the readout whose gradient is propagated: independent N(0, 1) weights of all outputs.
    limit : float
        Above 1; see :class:`PropagationReport`.

    Returns
    -------
    PropagationReport
        For each linear and convolutional layer, mean squares over examples and units of its output and of the gradient
        by it. Predictions start from the inputs' second moment and use of each layer only the mean squares of its
        weights and biases; they hold for independent weights of mean zero and wide layers, and near the borders of an
        image on average.

    Raises
    ------
    ValueError
        If the model holds a layer that is not known, or pads otherwise than with zeros; it is named. If the model has
        no linear or convolutional layer, `limit` is not above 1, or the generator is on another device.
    """
    if not limit > 1:
        raise ValueError(f"limit must be above 1, got {limit}")
    require_same_device(generator, inputs=inputs)
    blocks = _blocks(model)
    with torch.enable_grad():
        outputs, last = _outputs(blocks, inputs)
        readout = torch.randn(last.shape, generator=generator, dtype=last.dtype, device=last.device)
        gradients = torch.autograd.grad((last * readout).sum(), [output for _, output in outputs])
    fans = [_fans(block.layer, shape, output.shape) for block, (shape, output) in zip(blocks, outputs, strict=True)]
    forward, slopes = _predict_forward(blocks, fans, _mean_square(inputs))
    backward = _predict_backward(blocks, fans, slopes)
    layers = [
        LayerReport(
            block.name,
            type(block.layer).__name__,
            *fan,
            _mean_square(output),
            predicted_forward,
            _mean_square(gradient),
            predicted_backward,
        )
        for block, fan, (_, output), gradient, predicted_forward, predicted_backward in zip(
            blocks, fans, outputs, gradients, forward, backward, strict=True
        )
    ]
    return PropagationReport(tuple(layers), limit)


class _Block(NamedTuple):
    """A layer with weights, and what acts between it and the next: reshapes and activations."""

    name: str
    layer: nn.Module
    before: list[nn.Module]
    after: list[nn.Module]

    def activate(self, z: torch.Tensor) -> torch.Tensor:
        for module in self.after:
            if isinstance(module, ACTIVATIONS):
                z = module(z)
        return z


def _blocks(model: nn.Module) -> list[_Block]:
    blocks, before = [], []
    for name, module in model.named_modules(remove_duplicate=False):  # one activation may serve many layers
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            continue
        if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            if getattr(module, "padding_mode", "zeros") != "zeros":
                raise ValueError(f"layer {name} must pad with zeros, got padding_mode {module.padding_mode!r}")
            blocks.append(_Block(name, module, before if not blocks else [], []))
        elif not isinstance(module, ACTIVATIONS + RESHAPES):
            known = "linear and convolutional layers, activations, Flatten and Unflatten"
            raise ValueError(f"layers must be {known}, got {type(module).__name__} at {name or 'the top'}")
        elif blocks:
            blocks[-1].after.append(module)
        elif isinstance(module, RESHAPES):
            before.append(module)
        else:
            raise ValueError(f"the first layer must be linear or convolutional, got {type(module).__name__}")
    if not blocks:
        raise ValueError("model must hold a linear or convolutional layer, got none")
    return blocks


def _outputs(blocks: list[_Block], inputs: torch.Tensor) -> tuple[list[tuple[torch.Size, torch.Tensor]], torch.Tensor]:
    """Return each layer's input shape and output, and what the network returns."""
    x, outputs = inputs, []
    for block in blocks:
        for module in block.before:
            x = module(x)
        shape, x = x.shape, block.layer(x)
        if not x.requires_grad:
            x.requires_grad_()
        outputs.append((shape, x))
        x = x.clone()  # an activation may work in place
        for module in block.after:
            x = module(x)
    return outputs, x


def _fans(layer: nn.Module, input_shape: torch.Size, output_shape: torch.Size) -> tuple[float, float]:
    """Return how many inputs an output has, and how many outputs an input has, on average over an image."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    ones = torch.ones((1, 1, *input_shape[2:]), device=layer.weight.device)
    kernel = torch.ones((1, 1, *layer.kernel_size), device=layer.weight.device)
    convolve = next(function for kind, function in CONVOLUTIONS.items() if isinstance(layer, kind))
    how = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    links = convolve(ones, kernel, **how).sum().item()  # pixels that meet, fewer where the kernel hangs over the border
    fan_in = layer.in_channels / layer.groups * links / math.prod(output_shape[2:])
    return fan_in, layer.out_channels / layer.groups * links / math.prod(input_shape[2:])


def _predict_forward(
    blocks: list[_Block], fans: list[tuple[float, float]], moment: float
) -> tuple[list[float], list[float]]:
    """Return the variances of the outputs, and the mean squared derivatives of what acts on them."""
    variances, slopes = [], []
    for block, (fan_in, _) in zip(blocks, fans, strict=True):
        bias = 0.0 if block.layer.bias is None else block.layer.bias.detach().double().square().mean().item()
        variances.append(fan_in * _weight_moment(block.layer) * moment + bias)
        known = math.isfinite(variances[-1])
        moment = second_moment(block.activate, variances[-1]) if known else math.nan
        slopes.append(chi(block.activate, variances[-1], weight_scale=1.0) if known else math.nan)
    return variances, slopes


def _predict_backward(blocks: list[_Block], fans: list[tuple[float, float]], slopes: list[float]) -> list[float]:
    """Return the second moments of the gradients by the outputs, from a readout of second moment 1."""
    found, arriving = [], 1.0
    for block, (_, fan_out), slope in reversed(list(zip(blocks, fans, slopes, strict=True))):
        found.append(slope * arriving)
        arriving = fan_out * _weight_moment(block.layer) * found[-1]
    return found[::-1]


def _weight_moment(layer: nn.Module) -> float:
    return _mean_square(layer.weight)


def _mean_square(x: torch.Tensor) -> float:
    return x.detach().double().square().mean().item()
