"""The chapter's closed forms, mean-field maps and random networks, each against something that does not use them.

Closed forms are checked by listing all weights and inputs of small layers; maps by SciPy's adaptive quadrature and by
kernels that are known exactly; networks by a plain loop with the same draws.
"""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, stats
from torch import nn
from torch.nn import functional as F

from helpers.initialization import (
    chi,
    correlation_map,
    deep_excess_kurtosis,
    depth_scale,
    edge_of_chaos,
    fixed_correlation,
    fixed_variance,
    glorot_variance,
    he_variance,
    log_growth,
    norm_fluctuation,
    preactivation_excess_kurtosis,
    preactivation_variance,
    relu_depth_factor,
    relu_mean,
    relu_second_moment,
    relu_variance,
    variance_map,
)
from helpers.lab.gaussian import second_moment
from helpers.lab.networks import preactivations, propagate
from helpers.lab.runtime import generator, rng, seeded
from tests.activations import PLAIN, each_activation, identity, leaky_relu, normal_mean
from tests.statistics import assert_z, moments

by_properties = settings(max_examples=60, deadline=None, database=None)
property_seed = seed(int(rng("test.initialization.properties").integers(2**32)))


def moment_of(values, power, weights=None):
    return np.average(np.asarray(values, dtype=float) ** power, weights=weights)


def excess_kurtosis_of(values):
    """Excess kurtosis of values of mean zero, all equally likely."""
    return moment_of(values, 4) / moment_of(values, 2) ** 2 - 3


# Closed forms


def all_preactivations(weights, inputs, biases=(0.0,)):
    """Return w·a + b for all weights, all rows of inputs, and all biases."""
    return np.array(
        [np.dot(w, a) + b for w in itertools.product(weights, repeat=len(inputs[0])) for a in inputs for b in biases]
    )


@pytest.mark.parametrize("fan_in", [1, 2, 3, 4])
def test_preactivation_variance_equals_enumeration_of_all_weights(fan_in):
    # Inputs with means, and correlated: only their second moment counts.
    weights, biases = [-1.5, 0.2, 1.3], [-0.4, 0.4]
    inputs = rng("test.initialization.inputs").standard_exponential((4, fan_in)) @ np.tri(fan_in) + 0.3
    expected = np.var(all_preactivations(weights, inputs, biases))
    found = preactivation_variance(np.var(weights), moment_of(inputs, 2), fan_in, np.var(biases))
    assert found == pytest.approx(expected, rel=1e-12)


def test_preactivation_variance_has_no_bias_unless_it_is_given():
    assert preactivation_variance(0.5, 3.0, 7) == 10.5


@pytest.mark.parametrize("variance", [0.0, 0.3, 1.0, 7.2])
def test_moments_of_the_relu_equal_quadrature(variance):
    std = math.sqrt(variance)
    mean, second = (normal_mean(lambda z, k=k: max(std * z, 0) ** k) for k in (1, 2))
    assert relu_mean(variance) == pytest.approx(mean, rel=1e-10)
    assert relu_second_moment(variance) == pytest.approx(second, rel=1e-10)
    assert relu_variance(variance) == pytest.approx(second - mean**2, rel=1e-10)


def test_moments_of_the_relu_are_those_of_half_of_a_half_normal_variable():
    half = stats.halfnorm(scale=1.7)
    assert relu_mean(1.7**2) == pytest.approx(half.mean() / 2, rel=1e-12)
    assert relu_second_moment(1.7**2) == pytest.approx(half.moment(2) / 2, rel=1e-12)


@pytest.mark.parametrize(("filters", "published"), [(64, 5.9), (128, 4.2), (256, 2.9), (512, 2.1)])
def test_he_variance_gives_the_ratios_of_he_et_al_to_a_standard_deviation_of_a_hundredth(filters, published):
    assert math.sqrt(he_variance(9 * filters)) / 0.01 == pytest.approx(published, abs=0.05)


def torch_variance(init, layer, **options):
    """Return the variance from which a function of ``torch.nn.init`` draws: it asks for a normal variable's std."""
    with seeded("test.initialization.torch"):
        init(layer.weight, **options)
    return layer.weight.detach().double().square().mean().item()


LAYERS = [nn.Linear(300, 700), nn.Conv2d(30, 70, (3, 5))]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("mode", ["fan_in", "fan_out"])
def test_he_variance_is_that_of_kaiming_normal(layer, mode):
    fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(layer.weight)
    found = torch_variance(nn.init.kaiming_normal_, layer, mode=mode, nonlinearity="relu")
    relative_error = math.sqrt(2 / layer.weight.numel())
    z = (found / he_variance(fan_in if mode == "fan_in" else fan_out) - 1) / relative_error
    assert_z(z)


@pytest.mark.parametrize("layer", LAYERS)
def test_he_variance_bounds_kaiming_uniform(layer):
    fan_in, _ = nn.init._calculate_fan_in_and_fan_out(layer.weight)
    torch_variance(nn.init.kaiming_uniform_, layer, nonlinearity="relu")
    # A uniform variable of variance v lies within √(3v).
    assert layer.weight.abs().max().item() == pytest.approx(math.sqrt(3 * he_variance(fan_in)), rel=1e-3)


@pytest.mark.parametrize("layer", LAYERS)
def test_glorot_variance_is_that_of_xavier_normal_and_bounds_xavier_uniform(layer):
    variance = glorot_variance(*nn.init._calculate_fan_in_and_fan_out(layer.weight))
    z = (torch_variance(nn.init.xavier_normal_, layer) / variance - 1) / math.sqrt(2 / layer.weight.numel())
    assert_z(z)
    torch_variance(nn.init.xavier_uniform_, layer)
    assert layer.weight.abs().max().item() == pytest.approx(math.sqrt(3 * variance), rel=1e-3)


def test_glorot_variance_is_the_harmonic_mean_of_what_both_directions_ask_for():
    assert glorot_variance(200, 300) == pytest.approx(stats.hmean([1 / 200, 1 / 300]), rel=1e-12)


@pytest.mark.parametrize("depth", [0, 1, 5, 30])
def test_relu_depth_factor_repeats_one_layer(depth):
    variance, moment = 0.07, 1.0
    for _ in range(depth):
        moment = relu_second_moment(preactivation_variance(variance, moment, 33))
    assert relu_depth_factor(variance, 33, depth) == pytest.approx(moment, rel=1e-12)


@pytest.mark.parametrize("fan", [1, 10, 4608])
def test_he_variance_keeps_second_moments(fan):
    assert relu_depth_factor(he_variance(fan), fan, 100) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("fan_in", [1, 2, 3])
@pytest.mark.parametrize("weights", [(-1.0, 1.0), (-2.0, 0.0, 0.0, 2.0), (-1.5, -0.2, 0.2, 1.5)])
def test_preactivation_excess_kurtosis_equals_enumeration_of_all_weights_and_inputs(weights, fan_in):
    values = [0.0, 0.4, 2.5]
    expected = excess_kurtosis_of(all_preactivations(weights, list(itertools.product(values, repeat=fan_in))))
    activation_kurtosis = moment_of(values, 4) / moment_of(values, 2) ** 2
    found = preactivation_excess_kurtosis(activation_kurtosis, fan_in, excess_kurtosis_of(weights))
    assert found == pytest.approx(expected, rel=1e-10)


def test_preactivation_excess_kurtosis_is_for_gaussian_weights_unless_told_otherwise():
    # 6 is E[a⁴]/E[a²]² for the ReLU of a normal variable.
    assert normal_mean(lambda z: max(z, 0) ** 4) / normal_mean(lambda z: max(z, 0) ** 2) ** 2 == pytest.approx(6)
    assert preactivation_excess_kurtosis(6.0, 20) == pytest.approx(0.75, rel=1e-12)


def test_a_weight_of_either_sign_and_constant_inputs_give_the_smallest_kurtosis():
    assert preactivation_excess_kurtosis(1.0, 1, -2.0) == -2


def squared_norm_moments(width, power):
    """Return E[(Σ relu(z_i)²)^power] for z ~ N(0, 1): the number of positive z is binomial, their sum chi-square."""
    positive = np.arange(1, width + 1)
    moments = [stats.chi2(k).moment(power) for k in positive]
    return stats.binom(width, 0.5).pmf(positive) @ moments


@pytest.mark.parametrize("widths", [(1,), (2,), (7,), (3, 5), (4, 1, 6)])
def test_norm_fluctuation_equals_moments_of_chi_square_variables(widths):
    # Given |h|² of a layer, the next one's squared norm is that times Σ relu(z_i)².
    expected = math.prod(squared_norm_moments(n, 2) / squared_norm_moments(n, 1) ** 2 for n in widths)
    assert norm_fluctuation(widths) == pytest.approx(expected, rel=1e-10)
    # A preactivation behind is normal with variance |h|², over which E[z⁴] = 3 E|h|⁴.
    assert deep_excess_kurtosis(widths) == pytest.approx(3 * expected - 3, rel=1e-10)


def test_one_hidden_layer_of_normal_variables_has_the_kurtosis_of_independent_inputs():
    assert deep_excess_kurtosis([40]) == pytest.approx(preactivation_excess_kurtosis(6.0, 40), rel=1e-12)


@pytest.mark.parametrize(("fan_in", "width"), [(3, 1), (2, 2), (5, 4), (7, 9)])
def test_log_growth_equals_the_mean_over_all_patterns_of_open_units(fan_in, width):
    # Of z ~ N(0, 2/fan_in) for |h| = 1; the logarithm of a sum of k squares by quadrature over its density.
    logs = [stats.chi2(k, scale=2 / fan_in).expect(np.log) for k in range(1, width + 1)]
    patterns = [sum(pattern) for pattern in itertools.product((0, 1), repeat=width)]
    expected = np.mean([logs[k - 1] for k in patterns if k > 0])
    assert log_growth(fan_in, width) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(("width", "published"), [(5, -0.623), (8, -0.399), (20, -0.137)])
def test_log_growth_of_equal_widths(width, published):
    assert log_growth(width, width) == pytest.approx(published, abs=5e-4)


def test_a_wide_layer_loses_five_over_twice_its_width():
    assert log_growth(100_000, 100_000) == pytest.approx(-2.5e-5, rel=1e-3)


@pytest.mark.parametrize("function", [norm_fluctuation, deep_excess_kurtosis])
def test_fluctuations_take_any_sequence_and_return_a_number(function):
    assert function(np.array([4, 8])) == function((4, 8)) == function([4, 8])
    assert type(function([4, 8])) is float


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (lambda: preactivation_variance(-0.1, 1.0, 3), "weight_variance must not be negative, got -0.1"),
        (lambda: preactivation_variance(0.1, -1.0, 3), "second_moment must not be negative, got -1.0"),
        (lambda: preactivation_variance(0.1, math.nan, 3), "second_moment must not be negative, got nan"),
        (lambda: preactivation_variance(0.1, 1.0, 0), "fan_in must be at least 1, got 0"),
        (lambda: preactivation_variance(0.1, 1.0, 3, -2.0), "bias_variance must not be negative, got -2.0"),
        (lambda: relu_mean(-1.0), "variance must not be negative, got -1.0"),
        (lambda: relu_second_moment(-1.0), "variance must not be negative, got -1.0"),
        (lambda: relu_variance(-1.0), "variance must not be negative, got -1.0"),
        (lambda: relu_depth_factor(-1.0, 3, 2), "weight_variance must not be negative, got -1.0"),
        (lambda: relu_depth_factor(1.0, 0, 2), "fan must be at least 1, got 0"),
        (lambda: relu_depth_factor(1.0, 3, -1), "depth must not be negative, got -1"),
        (lambda: he_variance(0), "fan must be at least 1, got 0"),
        (lambda: glorot_variance(0, 3), "fan_in must be at least 1, got 0"),
        (lambda: glorot_variance(3, 0), "fan_out must be at least 1, got 0"),
        (lambda: preactivation_excess_kurtosis(0.9, 3), "activation_kurtosis must be at least 1, got 0.9"),
        (lambda: preactivation_excess_kurtosis(math.nan, 3), "activation_kurtosis must be at least 1, got nan"),
        (lambda: preactivation_excess_kurtosis(6.0, 3, -2.1), "weight_excess_kurtosis must be at least -2, got -2.1"),
        (lambda: preactivation_excess_kurtosis(6.0, 0), "fan_in must be at least 1, got 0"),
        (lambda: norm_fluctuation([3, 0]), "widths must be at least 1, got [3 0]"),
        (lambda: deep_excess_kurtosis([-3]), "widths must be at least 1, got [-3]"),
        (lambda: log_growth(0, 3), "fan_in must be at least 1, got 0"),
        (lambda: log_growth(3, 0), "width must be at least 1, got 0"),
        (lambda: log_growth(3, 4.5), "width must be whole, got 4.5"),
        (lambda: log_growth(2.5, 4), "fan_in must be whole, got 2.5"),
        (lambda: norm_fluctuation([3, 4.5]), "widths must be whole, got [3.  4.5]"),
        (lambda: norm_fluctuation(64), "widths must be a sequence, one for each layer, got 64"),
    ],
)
def test_closed_forms_refuse_what_is_impossible(call, rule):
    with pytest.raises(ValueError, match=f"^{re.escape(rule)}$"):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: preactivation_variance(0.0, 0.0, 1, 0.0),
        lambda: relu_depth_factor(0.0, 1, 1),
        lambda: relu_mean(0.0),
        lambda: relu_variance(0.0),
    ],
)
def test_closed_forms_take_the_smallest_arguments(call):
    assert call() == 0


# Mean-field maps


CORRELATIONS = [-1.0, -0.999, -0.6, 0.0, 0.3, 0.8, 0.999, 1 - 1e-9, 1.0]


@each_activation
@pytest.mark.parametrize("variance", [0.01, 1.0, 9.0])
def test_chi_equals_adaptive_quadrature(activation, variance):
    _, slope = PLAIN[activation]
    expected = 1.7 * normal_mean(lambda z: slope(math.sqrt(variance) * z) ** 2)
    assert chi(activation, variance, weight_scale=1.7) == pytest.approx(expected, rel=1e-10)


def mean_of_product(function, variance, correlation):
    """Return E[f(z) f(z')], by adaptive quadrature in two dimensions on each side of both kinks."""
    std, rest = math.sqrt(variance), math.sqrt(1 - correlation**2)

    def density(y, x):
        other = correlation * x + rest * y
        return function(std * x) * function(std * other) * math.exp(-(x * x + y * y) / 2) / (2 * math.pi)

    def kink(x):
        return -correlation * x / rest

    parts = [
        integrate.dblquad(density, *side, *bounds, epsabs=1e-9, epsrel=1e-9)[0]
        for side in ((-9, 0), (0, 9))
        for bounds in ((-20, kink), (kink, 20))
    ]
    return sum(parts)


@pytest.mark.parametrize(("activation", "correlation"), [(torch.tanh, 0.4), (F.gelu, -0.3), (leaky_relu, 0.6)])
def test_correlation_map_and_chi_equal_adaptive_quadrature_in_two_dimensions(activation, correlation):
    plain, slope = PLAIN[activation]
    second = normal_mean(lambda z: plain(math.sqrt(1.3) * z) ** 2)
    expected = (1.7 * mean_of_product(plain, 1.3, correlation) + 0.2) / (1.7 * second + 0.2)
    found = correlation_map(activation, correlation, 1.3, weight_scale=1.7, bias_variance=0.2)
    assert found == pytest.approx(expected, abs=1e-8)
    expected = 1.7 * mean_of_product(slope, 1.3, correlation)
    assert chi(activation, 1.3, weight_scale=1.7, correlation=correlation) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("correlation", CORRELATIONS)
def test_maps_of_the_relu_are_the_arc_cosine_kernels_of_cho_and_saul(correlation):
    angle = math.acos(correlation)
    kernel = (math.sin(angle) + correlation * (math.pi - angle)) / math.pi
    assert correlation_map(torch.relu, correlation, 2.3, weight_scale=1.4) == pytest.approx(kernel, abs=1e-12)
    with_bias = (1.4 * 2.3 / 2 * kernel + 0.6) / (1.4 * 2.3 / 2 + 0.6)
    found = correlation_map(torch.relu, correlation, 2.3, weight_scale=1.4, bias_variance=0.6)
    assert found == pytest.approx(with_bias, abs=1e-12)
    slope = 1.4 * (math.pi - angle) / (2 * math.pi)
    assert chi(torch.relu, 2.3, weight_scale=1.4, correlation=correlation) == pytest.approx(slope, abs=1e-12)


@pytest.mark.parametrize("correlation", CORRELATIONS)
@pytest.mark.parametrize("variance", [0.2, 1.0, 6.0])
def test_maps_of_the_error_function_are_arcsines(correlation, variance):
    # Williams (1997); its derivative is 2/√π exp(-z²), a Gaussian integral.
    second = 2 / math.pi * math.asin(2 * variance / (1 + 2 * variance))
    product = 2 / math.pi * math.asin(2 * variance * correlation / (1 + 2 * variance))
    assert second_moment(torch.erf, variance) == pytest.approx(second, rel=1e-11)
    found = correlation_map(torch.erf, correlation, variance, weight_scale=1.8, bias_variance=0.3)
    assert found == pytest.approx((1.8 * product + 0.3) / (1.8 * second + 0.3), abs=1e-11)
    slope = 1.8 * 4 / math.pi / math.sqrt((1 + 2 * variance) ** 2 - (2 * variance * correlation) ** 2)
    assert chi(torch.erf, variance, weight_scale=1.8, correlation=correlation) == pytest.approx(slope, rel=1e-10)


@each_activation
def test_equal_inputs_stay_equal(activation):
    for correlation in (1.0, 1 - 1e-15):
        found = correlation_map(activation, correlation, 1.3, weight_scale=1.7, bias_variance=0.1)
        assert found == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("activation", [torch.tanh, identity])
def test_opposite_inputs_stay_opposite_if_the_activation_is_odd(activation):
    assert correlation_map(activation, -1.0, 1.3, weight_scale=1.7) == pytest.approx(-1, abs=1e-12)
    assert correlation_map(activation, 0.0, 1.3, weight_scale=1.7) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("correlation", CORRELATIONS)
def test_a_linear_network_keeps_correlations(correlation):
    assert correlation_map(identity, correlation, 1.3, weight_scale=0.4) == pytest.approx(correlation, abs=1e-12)
    assert chi(identity, 1.3, weight_scale=0.4, correlation=correlation) == pytest.approx(0.4, rel=1e-12)


@property_seed
@by_properties
@given(st.floats(-1, 1), st.floats(0.01, 5))
def test_chi_is_the_slope_of_the_correlation_map_times_the_ratio_of_variances(correlation, variance):
    # d/dc E[φ(z)φ(z')] = v E[φ'(z)φ'(z')].
    step, scales = 1e-4, {"weight_scale": 1.7, "bias_variance": 0.2}
    correlation *= 1 - 2 * step
    low, high = (correlation_map(torch.tanh, correlation + d, variance, **scales) for d in (-step, step))
    slope = chi(torch.tanh, variance, weight_scale=1.7, correlation=correlation)
    after = variance_map(torch.tanh, variance, **scales)
    assert (high - low) / (2 * step) == pytest.approx(slope * variance / after, rel=1e-4, abs=1e-6)


@each_activation
def test_chi_is_continuous_where_it_changes_to_one_dimension(activation):
    at_one, near = (chi(activation, 1.3, weight_scale=1.7, correlation=c) for c in (1.0, 1 - 1e-14))
    assert near == pytest.approx(at_one, abs=1e-6)


def test_variance_map_scales_and_adds():
    assert variance_map(torch.relu, 3.0, weight_scale=1.5, bias_variance=0.25) == pytest.approx(2.5, rel=1e-12)
    assert variance_map(torch.relu, 3.0, weight_scale=1.5) == pytest.approx(2.25, rel=1e-12)


def test_maps_leave_no_trace_in_autograd_and_work_without_it():
    with torch.no_grad():
        expected = 1.7 * normal_mean(lambda z: math.cosh(math.sqrt(1.3) * z) ** -4)
        assert chi(torch.tanh, 1.3, weight_scale=1.7) == pytest.approx(expected, rel=1e-10)
    assert type(chi(torch.tanh, 1.3, weight_scale=1.7)) is float
    assert type(second_moment(torch.tanh, 1.3)) is float


def test_maps_take_activations_that_work_in_place():
    for activation in (torch.relu_, nn.ReLU(inplace=True)):
        assert second_moment(activation, 2.0) == pytest.approx(1.0, rel=1e-12)
        assert chi(activation, 2.0, weight_scale=1.4) == pytest.approx(0.7, rel=1e-12)
        found = correlation_map(activation, 0.0, 2.0, weight_scale=1.4)
        assert found == pytest.approx(1 / math.pi, rel=1e-12)


# Fixed points


@pytest.mark.parametrize(
    ("activation", "weight_scale", "bias_variance"),
    [(torch.tanh, 1.7, 0.0), (torch.tanh, 0.9, 0.3), (torch.erf, 3.0, 0.1), (F.gelu, 1.5, 0.2), (torch.relu, 1.2, 0.4)],
)
@pytest.mark.parametrize("start", [0.01, 1.0, 30.0])
def test_fixed_variance_is_where_iterations_settle(activation, weight_scale, bias_variance, start):
    scales = {"weight_scale": weight_scale, "bias_variance": bias_variance}
    found = fixed_variance(activation, **scales, start=start)
    assert variance_map(activation, found, **scales) == pytest.approx(found, rel=1e-12)
    variance = start
    for _ in range(400):
        variance = variance_map(activation, variance, **scales)
    assert found == pytest.approx(variance, rel=1e-9)


def test_fixed_variance_of_the_relu_solves_a_linear_equation():
    assert fixed_variance(torch.relu, weight_scale=1.2, bias_variance=0.4) == pytest.approx(1.0, rel=1e-12)
    assert fixed_variance(torch.relu, weight_scale=1.2, bias_variance=0.1) == pytest.approx(0.25, rel=1e-12)
    assert fixed_variance(torch.relu, weight_scale=0.0, bias_variance=3.0) == pytest.approx(3.0, rel=1e-12)


@pytest.mark.parametrize("expected", [1e-9, 1e-3, 1e3, 2.5e8])
def test_fixed_variance_may_be_small_or_large(expected):
    found = fixed_variance(torch.relu, weight_scale=1.2, bias_variance=0.4 * expected)
    assert found == pytest.approx(expected, rel=1e-6 if expected < 1e-6 else 1e-12)


@pytest.mark.parametrize("start", [1e-13, 1e-6, 1.0, 1e6, 1e10, 1e15])
def test_limits_of_the_fixed_variance_hold_only_in_the_direction_of_the_iterations(start):
    scales = {"weight_scale": 1.7}
    found = fixed_variance(torch.tanh, **scales, start=start)
    assert found == pytest.approx(1.7 * normal_mean(lambda z: math.tanh(math.sqrt(found) * z) ** 2), rel=1e-10)
    assert fixed_variance(torch.tanh, weight_scale=0.9, start=start) == 0


@pytest.mark.parametrize("weight_scale", [1.5, 1.8566, 2.0])  # v* of the second is 0.52
@pytest.mark.parametrize("start", [1e-13, 1e-200, 1e10])
def test_a_faint_signal_of_a_tanh_network_grows_to_the_root_that_quadrature_finds(weight_scale, start):
    def growth(variance):
        return weight_scale * normal_mean(lambda z: math.tanh(math.sqrt(variance) * z) ** 2) - variance

    expected = optimize.brentq(growth, 0.1, 2.0, xtol=1e-14)
    assert weight_scale != 1.8566 or round(expected, 4) == 0.52
    assert fixed_variance(torch.tanh, weight_scale=weight_scale, start=start) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("bias_variance", [1e-12, 1e-9, 1e-6, 1e-3])
def test_fixed_correlation_just_above_zero_solves_the_arcsine_law(bias_variance):
    scales = {"weight_scale": 4.0, "bias_variance": bias_variance}
    v = fixed_variance(torch.erf, **scales)

    def miss(c):
        after = (4 * 2 / math.pi * math.asin(2 * v * c / (1 + 2 * v)) + bias_variance) / v
        return after - c

    expected = optimize.brentq(miss, 0.0, 0.9, xtol=1e-16)
    assert 0 < expected < 0.1
    assert fixed_correlation(torch.erf, v, **scales) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("miss", [-1e-6, -1e-9, 1e-9, 1e-6])
def test_fixed_variance_is_not_the_start_if_that_only_comes_near(miss):
    expected = fixed_variance(torch.tanh, weight_scale=1.7, bias_variance=0.3)
    found = fixed_variance(torch.tanh, weight_scale=1.7, bias_variance=0.3, start=expected * (1 + miss))
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("start", [0.3, 1.0, 7.0])
def test_every_variance_is_fixed_by_he_initialization(start):
    assert fixed_variance(torch.relu, weight_scale=2.0, start=start) == pytest.approx(start, rel=1e-12)


def bistable(z):
    """An activation whose variance map has three fixed points, 0 among them."""
    return 3 * torch.tanh(z / 2) ** 3


def test_fixed_variance_is_the_next_one_in_the_direction_of_the_iterations():
    for start in (0.5, 1.0, 2.0, 3.0, 5.0, 20.0):
        variance = start
        for _ in range(300):
            variance = variance_map(bistable, variance, weight_scale=6.0)
        found = fixed_variance(bistable, weight_scale=6.0, start=start)
        assert found == pytest.approx(variance, rel=1e-9, abs=1e-9)
    assert fixed_variance(bistable, weight_scale=6.0, start=0.5) == 0
    assert fixed_variance(bistable, weight_scale=6.0, start=20.0) > 1


@pytest.mark.parametrize(("activation", "weight_scale"), [(torch.tanh, 0.9), (torch.tanh, 1.0), (torch.relu, 1.9)])
def test_fixed_variance_is_zero_if_the_signal_dies(activation, weight_scale):
    assert fixed_variance(activation, weight_scale=weight_scale) == 0


@pytest.mark.parametrize(("weight_scale", "bias_variance"), [(2.1, 0.0), (2.0, 0.1)])
def test_growth_without_end_is_refused(weight_scale, bias_variance):
    rule = "the variance must stay bounded, got growth without end from 1.5 on"
    with pytest.raises(ValueError, match=f"^{rule}$"):
        fixed_variance(torch.relu, weight_scale=weight_scale, bias_variance=bias_variance, start=1.5)


def settle(activation, correlation, variance, layers, **scales):
    """Return the correlations of two inputs in that many layers."""
    found = [correlation]
    for _ in range(layers):
        found.append(correlation_map(activation, found[-1], variance, **scales))
    return np.array(found)


ORDERED = (torch.tanh, 0.9, 0.3)
CHAOTIC = (torch.tanh, 6.0, 0.1)
CHAOTIC_WITHOUT_BIAS = (torch.tanh, 6.0, 0.0)
CHAOTIC_ERF = (torch.erf, 4.0, 0.2)


@pytest.mark.parametrize(("activation", "weight_scale", "bias_variance"), [CHAOTIC, CHAOTIC_ERF, CHAOTIC_WITHOUT_BIAS])
def test_fixed_correlation_in_the_chaotic_phase_is_where_iterations_settle(activation, weight_scale, bias_variance):
    scales = {"weight_scale": weight_scale, "bias_variance": bias_variance}
    variance = fixed_variance(activation, **scales)
    found = fixed_correlation(activation, variance, **scales)
    for start in (0.05, 0.999):
        assert settle(activation, start, variance, 200, **scales)[-1] == pytest.approx(found, abs=1e-8)
    assert correlation_map(activation, found, variance, **scales) == pytest.approx(found, abs=1e-13)
    assert (found < 1e-12) == (bias_variance == 0)
    assert 0 <= found < 0.9


@pytest.mark.parametrize("weight_scale", [1.5, 2.0, 3.0, 4.0, 5.0, 7.0, 9.0])
@pytest.mark.parametrize("activation", [torch.tanh, torch.erf])
def test_fixed_correlation_of_odd_activations_without_bias_is_zero(activation, weight_scale):
    variance = fixed_variance(activation, weight_scale=weight_scale)
    assert fixed_correlation(activation, variance, weight_scale=weight_scale) == pytest.approx(0, abs=1e-12)


def test_fixed_correlation_is_one_in_the_ordered_phase_and_at_its_edge():
    activation, weight_scale, bias_variance = ORDERED
    scales = {"weight_scale": weight_scale, "bias_variance": bias_variance}
    assert fixed_correlation(activation, fixed_variance(activation, **scales), **scales) == 1
    critical = edge_of_chaos(torch.tanh, 0.8)
    assert fixed_correlation(torch.tanh, 0.8, **critical._asdict()) == 1
    assert fixed_correlation(torch.relu, 0.8, weight_scale=2.0) == 1


@pytest.mark.parametrize("excess", [1e-2, 1e-3, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9])
def test_beyond_the_edge_the_fixed_correlation_leaves_one_in_proportion(excess):
    # f(1 - δ) = 1 - χ δ + K δ²/2 with K = σ_w² v E[φ''²], hence δ* = 2 (χ - 1) / K.
    critical = edge_of_chaos(torch.tanh, 0.5)
    scales = {"weight_scale": critical.weight_scale * (1 + excess), "bias_variance": critical.bias_variance}
    variance = fixed_variance(torch.tanh, **scales, start=0.5)
    curvature = normal_mean(
        lambda z: (2 * math.tanh(math.sqrt(variance) * z) / math.cosh(math.sqrt(variance) * z) ** 2) ** 2
    )
    above = chi(torch.tanh, variance, weight_scale=scales["weight_scale"]) - 1
    expected = 2 * above / (scales["weight_scale"] * variance * curvature)
    found = fixed_correlation(torch.tanh, variance, **scales)
    assert 1 - found == pytest.approx(expected, rel=0.02, abs=1e-5)
    assert depth_scale(torch.tanh, **scales) > 0


@pytest.mark.parametrize(("activation", "weight_scale", "bias_variance"), [ORDERED, CHAOTIC, CHAOTIC_ERF])
def test_depth_scale_is_the_measured_rate_of_convergence(activation, weight_scale, bias_variance):
    scales = {"weight_scale": weight_scale, "bias_variance": bias_variance}
    variance = fixed_variance(activation, **scales)
    scale = depth_scale(activation, **scales)
    layers = math.ceil(11 * scale)
    distances = np.abs(
        settle(activation, 0.6, variance, layers, **scales) - fixed_correlation(activation, variance, **scales)
    )
    rate = np.log(distances[-3] / distances[-1]) / 2
    assert 1 / rate == pytest.approx(scale, rel=1e-3)
    assert scale > 0


def test_depth_scale_without_bias_in_the_chaotic_phase_uses_the_slope_at_zero():
    variance = fixed_variance(torch.erf, weight_scale=4.0)
    slope = 4.0 * 4 / math.pi / (1 + 2 * variance)
    assert depth_scale(torch.erf, weight_scale=4.0) == pytest.approx(-1 / math.log(slope), rel=1e-9)


def test_depth_scale_has_no_bias_and_starts_at_one_unless_told():
    slope = 4.0 * 4 / math.pi / (1 + 2 * fixed_variance(torch.erf, weight_scale=4.0, start=1.0))
    assert depth_scale(torch.erf, weight_scale=4.0) == pytest.approx(-1 / math.log(slope), rel=1e-9)
    assert depth_scale(torch.erf, weight_scale=4.0, bias_variance=0.1) != pytest.approx(-1 / math.log(slope), rel=0.01)
    # Signals of a variance below this one die, those above it live.
    watershed = optimize.brentq(lambda v: variance_map(bistable, v, weight_scale=6.0) / v - 1, 0.5, 1.0)

    def with_watershed(variance):
        scale = math.sqrt(variance / watershed)
        return lambda z: scale * bistable(z / scale)

    assert fixed_variance(torch.relu, weight_scale=2.0) == 1.0
    assert depth_scale(with_watershed(0.99), weight_scale=6.0) > 0
    with pytest.raises(ValueError, match=r"^fixed_variance must be positive"):
        depth_scale(with_watershed(1.01), weight_scale=6.0)


def test_depth_scale_is_infinite_at_the_edge_of_chaos():
    assert depth_scale(torch.relu, weight_scale=2.0) == math.inf
    assert depth_scale(torch.tanh, **edge_of_chaos(torch.tanh, 0.5)._asdict()) == math.inf


@pytest.mark.parametrize("missing", [1e-2, 1e-4])
def test_depth_scale_is_finite_just_below_the_edge_of_chaos(missing):
    critical = edge_of_chaos(torch.tanh, 0.5)
    scales = {"weight_scale": critical.weight_scale * (1 - missing), "bias_variance": critical.bias_variance}
    variance = fixed_variance(torch.tanh, **scales, start=0.5)
    slope = scales["weight_scale"] * normal_mean(lambda z: math.cosh(math.sqrt(variance) * z) ** -4)
    assert 0.98 < slope < 1
    assert depth_scale(torch.tanh, **scales, start=0.5) == pytest.approx(-1 / math.log(slope), rel=1e-6)


def test_depth_scale_is_zero_if_weights_are():
    assert depth_scale(torch.tanh, weight_scale=0.0, bias_variance=0.5) == 0


def test_depth_scale_starts_where_it_is_told():
    # Only the start of the variance decides whether this signal dies.
    assert depth_scale(bistable, weight_scale=6.0, start=20.0) > 0
    with pytest.raises(ValueError, match=r"^fixed_variance must be positive and finite, got 0\.0$"):
        depth_scale(bistable, weight_scale=6.0, start=0.5)


@each_activation
@pytest.mark.parametrize("variance", [0.2, 1.5])
def test_edge_of_chaos_has_chi_one_and_the_variance_fixed(activation, variance):
    scales = edge_of_chaos(activation, variance)._asdict()
    assert chi(activation, variance, weight_scale=scales["weight_scale"]) == pytest.approx(1, rel=1e-12)
    assert variance_map(activation, variance, **scales) == pytest.approx(variance, rel=1e-11)
    assert scales["bias_variance"] >= 0


def test_edge_of_chaos_of_the_relu_is_he_initialization():
    for variance in (0.1, 1.0, 50.0):
        weight_scale, bias_variance = edge_of_chaos(torch.relu, variance)
        assert weight_scale == pytest.approx(2, rel=1e-12)
        assert bias_variance == pytest.approx(0, abs=1e-11)


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (lambda: second_moment(torch.tanh, -1.0), "variance must not be negative, got -1.0"),
        (lambda: variance_map(torch.tanh, -1.0, weight_scale=1.0), "variance must not be negative, got -1.0"),
        (lambda: variance_map(torch.tanh, 1.0, weight_scale=-1.0), "weight_scale must not be negative, got -1.0"),
        (
            lambda: variance_map(torch.tanh, 1.0, weight_scale=1.0, bias_variance=-1.0),
            "bias_variance must not be negative, got -1.0",
        ),
        (lambda: fixed_variance(torch.tanh, weight_scale=1.0, start=0.0), "start must be positive and finite, got 0.0"),
        (lambda: chi(torch.tanh, 1.0, weight_scale=-1.0), "weight_scale must not be negative, got -1.0"),
        (lambda: chi(torch.tanh, -1.0, weight_scale=1.0), "variance must not be negative, got -1.0"),
        (
            lambda: chi(torch.tanh, -1.0, weight_scale=1.0, correlation=0.5),
            "variance must not be negative, got -1.0",
        ),
        (
            lambda: chi(torch.tanh, 1.0, weight_scale=1.0, correlation=1.1),
            "correlation must lie between -1 and 1, got 1.1",
        ),
        (
            lambda: correlation_map(torch.tanh, -1.1, 1.0, weight_scale=1.0),
            "correlation must lie between -1 and 1, got -1.1",
        ),
        (
            lambda: correlation_map(torch.tanh, 0.5, 1.0, weight_scale=-1.0),
            "weight_scale must not be negative, got -1.0",
        ),
        (
            lambda: correlation_map(torch.tanh, 0.5, 1.0, weight_scale=1.0, bias_variance=-1.0),
            "bias_variance must not be negative, got -1.0",
        ),
        (
            lambda: correlation_map(torch.tanh, 0.5, 1.0, weight_scale=0.0),
            "next_variance must be positive and finite, got 0.0",
        ),
        (lambda: edge_of_chaos(torch.tanh, 0.0), "variance must be positive and finite, got 0.0"),
        (lambda: depth_scale(torch.tanh, weight_scale=0.9), "fixed_variance must be positive and finite, got 0.0"),
    ],
)
def test_maps_refuse_what_is_impossible(call, rule):
    with pytest.raises(ValueError, match=f"^{re.escape(rule)}$"):
        call()


def test_edge_of_chaos_is_refused_where_no_network_is_critical():
    def steep(z):  # E[φ²] is larger than v E[φ'²]
        return torch.relu(z) + 1

    rule = r"^no network is critical at variance 1\.0: its bias variance would be -3\.6$"
    with pytest.raises(ValueError, match=rule):
        edge_of_chaos(steep, 1.0)
    with pytest.raises(ValueError, match=r"^no network is critical"):
        edge_of_chaos(lambda z: torch.relu(z) + 1e-8, 1.0)
    with pytest.raises(ValueError, match=r"^mean_square_slope must be positive and finite, got 0\.0$"):
        edge_of_chaos(lambda z: 0 * z + 1, 1.0)


def box(z):  # two jumps that cancel in the mean slope at mean 0
    return z * 0 + (z.abs() < 1)


JUMPS = {
    "sign": torch.sign,
    "hardshrink": F.hardshrink,
    "threshold": nn.Threshold(0.5, 0.0),
    "box": box,
    "small jump": lambda z: torch.tanh(z) + 1e-3 * torch.sign(z - 0.3),
}


@pytest.mark.parametrize("activation", JUMPS.values(), ids=JUMPS)
def test_activations_that_jump_are_refused_where_slopes_count(activation):
    rule = r"^the activation must be continuous and autograd's derivative its own, got one with mean slope"
    for call in (
        lambda: chi(activation, 1.6, weight_scale=1.5, correlation=0.4),
        lambda: fixed_correlation(activation, 1.6, weight_scale=1.5, bias_variance=0.1),
        lambda: depth_scale(activation, weight_scale=0.9, bias_variance=0.1),
        lambda: edge_of_chaos(activation, 1.0),
    ):
        with pytest.raises(ValueError, match=rule):
            call()


def test_the_maps_of_an_activation_that_jumps_follow_the_arcsine_law():
    found = correlation_map(torch.sign, 0.6, 1.6, weight_scale=1.5, bias_variance=0.1)
    assert found == pytest.approx((1.5 * 2 / math.pi * math.asin(0.6) + 0.1) / 1.6, abs=1e-10)


def test_activations_without_a_derivative_are_refused():
    rule = "the activation must be differentiable by autograd, got one without a derivative"
    for call in (
        lambda: chi(lambda z: (z > 0).double(), 1.0, weight_scale=1.0),
        lambda: depth_scale(lambda z: (z > 0).double(), weight_scale=1.0, bias_variance=0.1),
        lambda: edge_of_chaos(lambda z: (z > 0).double(), 1.0),
    ):
        with pytest.raises(ValueError, match=f"^{rule}$"):
            call()


@pytest.mark.parametrize(
    "activation", [nn.ReLU6(), nn.Hardtanh(), nn.Hardswish(), nn.Hardsigmoid(), nn.CELU(0.7), nn.PReLU(), F.softshrink]
)
@pytest.mark.parametrize("variance", [1e-4, 1.0, 30.0])
def test_kinks_are_no_jumps(activation, variance):
    assert chi(activation, variance, weight_scale=1.0) >= 0


def test_no_layers_fluctuate_not_at_all():
    assert norm_fluctuation([]) == 1
    assert deep_excess_kurtosis([]) == 0


# Random networks, beside the closed forms and the maps


def batch(*shape, dtype=torch.float64):
    source = generator("test.initialization.batch")
    return torch.randn(shape, generator=source, device=source.device, dtype=dtype)


FANS = {"fan_in": lambda a, b: a, "fan_out": lambda a, b: b, "fan_avg": lambda a, b: (a + b) / 2}


@pytest.mark.parametrize("mode", FANS)
def test_second_moments_of_relu_networks_are_multiplied_by_the_depth_factor_in_both_directions(mode):
    inputs, widths, weight_scale = batch(2, 9), (12, 20, 7, 15), 1.8
    found = propagate(
        inputs, widths, n_networks=20_000, weight_scale=weight_scale, mode=mode, generator=generator(f"test.{mode}")
    )
    fans = list(itertools.pairwise((9, *widths)))
    variances = [weight_scale / FANS[mode](*fan) for fan in fans]
    forward = inputs.square().mean().item() * np.cumprod(
        [relu_depth_factor(variance, fan_in, 1) for variance, (fan_in, _) in zip(variances, fans, strict=True)]
    )
    # From the readout, of second moment 1, back through the last ReLU.
    steps = [
        relu_depth_factor(variance, fan_out, 1) for variance, (_, fan_out) in zip(variances[1:], fans[1:], strict=True)
    ]
    backward = 0.5 * np.cumprod([1, *reversed(steps)])[::-1]
    samples = np.hstack([found.activations, found.gradients, found.preactivations])
    assert_z(moments(samples).mean.z(np.concatenate([forward, backward, 2 * forward])))


def test_fluctuations_of_random_networks_are_those_of_finite_width():
    widths = (20, 12, 30)
    options = {"n_networks": 30_000, "weight_scale": 2.0}
    inputs = batch(1, 4)
    found = propagate(inputs, widths, **options, generator=generator("test.fluctuations"))
    relative = (found.activations / inputs.square().mean()).square()
    expected = [norm_fluctuation(widths[: layer + 1]) for layer in range(3)]
    assert_z(moments(relative).mean.z(expected))


def test_norms_of_random_networks_grow_by_the_log_growth():
    z = preactivations(batch(1, 5), (6, 9), n_networks=40_000, weight_scale=2.0, generator=generator("test.log_growth"))
    norms = [x.detach().relu().square().sum(2).flatten() for x in z]
    alive = (norms[0] > 0) & (norms[1] > 0)
    assert_z(moments((norms[1][alive] / norms[0][alive]).log()).mean.z(log_growth(6, 9)))


def test_kurtosis_of_preactivations_is_that_of_finite_width():
    widths = (20, 12)
    inputs = batch(1, 4)
    last = preactivations(
        inputs, (*widths, 1), n_networks=50_000, weight_scale=2.0, generator=generator("test.kurtosis")
    )[-1]
    fourth = (last.detach().flatten() / (2 * inputs.square().mean()).sqrt()) ** 4
    assert_z(moments(fourth).mean.z(3 + deep_excess_kurtosis(widths)))


def test_wide_networks_follow_the_mean_field():
    scales = {"weight_scale": 1.7, "bias_variance": 0.3}
    inputs = torch.ones(1, 300, dtype=torch.float64) * math.sqrt((0.8 - 0.3) / 1.7)
    source = generator("test.mean_field")
    found = propagate(
        inputs.to(source.device), (300,) * 4, n_networks=60, **scales, activation=torch.tanh, generator=source
    )
    variances = [0.8]
    for _ in range(3):
        variances.append(variance_map(torch.tanh, variances[-1], **scales))
    expected = [second_moment(torch.tanh, variance) for variance in variances]
    # Corrections of order 1/width are far below the standard error of a relative 1e-2.
    np.testing.assert_allclose(found.preactivations.mean(0), variances, rtol=0.05)
    np.testing.assert_allclose(found.activations.mean(0), expected, rtol=0.05)
    slopes = [chi(torch.tanh, variance, weight_scale=scales["weight_scale"]) for variance in variances]
    gradients = found.gradients.mean(0)
    np.testing.assert_allclose(gradients[:-1] / gradients[1:], slopes[:-1], rtol=0.1)
