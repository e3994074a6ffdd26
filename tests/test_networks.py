"""Random networks, against a plain loop of modules with the same draws."""

import itertools
import math
import re

import pytest
import torch
from torch import nn

from helpers.lab import networks
from helpers.lab.networks import preactivations, propagate
from helpers.lab.runtime import generator

SCALES = {"weight_scale": 1.7, "bias_variance": 0.3}
WIDTHS = (5, 3, 4)


def batch(*shape, dtype=torch.float64):
    source = generator("test.networks.batch")
    return torch.randn(shape, generator=source, device=source.device, dtype=dtype)


def drawn(shape, source, dtype=torch.float64):
    """Normal numbers as the helpers draw them: in single precision."""
    return torch.randn(shape, generator=source, device=source.device).to(dtype)


def fan_of(mode, fan_in, fan_out):
    return {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[mode]


def plain_networks(inputs, widths, n_networks, *, weight_scale, bias_variance, mode, source):
    """Return modules with the weights that a group draws, layer by layer the weights of all networks, then biases."""
    networks = [[] for _ in range(n_networks)]
    for fan_in, fan_out in itertools.pairwise((inputs.shape[1], *widths)):
        weights = drawn((n_networks, fan_in, fan_out), source, inputs.dtype)
        weights *= math.sqrt(weight_scale / fan_of(mode, fan_in, fan_out))
        biases = torch.zeros(n_networks, fan_out, dtype=inputs.dtype)
        if bias_variance:
            biases = drawn((n_networks, fan_out), source, inputs.dtype) * math.sqrt(bias_variance)
        for network, weight, bias in zip(networks, weights, biases, strict=True):
            layer = nn.Linear(fan_in, fan_out, dtype=inputs.dtype)
            layer.weight.data, layer.bias.data = weight.T, bias
            network.append(layer)
    return networks


def run_plainly(network, inputs, activation):
    """Return the preactivations of each layer, and the last activations."""
    a, layers = inputs, []
    for layer in network:
        layers.append(layer(a))
        a = activation(layers[-1])
    return layers, a


each_mode = pytest.mark.parametrize("mode", ["fan_in", "fan_out", "fan_avg"])
each_bias = pytest.mark.parametrize("bias_variance", [0.0, 0.3])


@each_mode
@each_bias
@pytest.mark.parametrize("activation", [torch.relu, torch.tanh])
def test_preactivations_equal_a_loop_of_networks_with_the_same_draws(mode, bias_variance, activation):
    inputs, scales = batch(6, 2), {"weight_scale": 1.7, "bias_variance": bias_variance, "mode": mode}
    source = generator("test.preactivations")
    found = preactivations(inputs, WIDTHS, n_networks=7, **scales, activation=activation, generator=source)
    networks = plain_networks(inputs, WIDTHS, 7, **scales, source=generator("test.preactivations"))
    expected = [torch.stack(z) for z in zip(*(run_plainly(n, inputs, activation)[0] for n in networks), strict=True)]
    assert [z.shape for z in found] == [(7, 6, width) for width in WIDTHS]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@each_mode
@each_bias
@pytest.mark.parametrize("activation", [torch.relu, torch.tanh])
def test_propagate_equals_a_loop_of_networks_with_the_same_draws(mode, bias_variance, activation):
    inputs, scales = batch(6, 2), {"weight_scale": 1.7, "bias_variance": bias_variance, "mode": mode}
    found = propagate(
        inputs, WIDTHS, n_networks=7, **scales, activation=activation, generator=generator("test.propagate")
    )
    source = generator("test.propagate")
    networks = plain_networks(inputs, WIDTHS, 7, **scales, source=source)
    readouts = drawn((7, WIDTHS[-1]), source, inputs.dtype)
    expected = []
    for network, readout in zip(networks, readouts, strict=True):
        layers, last = run_plainly(network, inputs, activation)
        gradients = torch.autograd.grad((last @ readout).sum(), layers)
        signals = layers, map(activation, layers), gradients
        expected.append(torch.stack([torch.stack([x.square().mean() for x in signal]) for signal in signals]))
    torch.testing.assert_close(torch.stack(found), torch.stack(expected, dim=1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("function", [preactivations, propagate])
def test_networks_are_relu_by_fan_in_without_biases_unless_told(function):
    given = {"weight_scale": 1.7, "bias_variance": 0.0, "mode": "fan_in", "activation": torch.relu}
    found, expected = (
        function(batch(6, 2), WIDTHS, n_networks=3, **options, generator=generator("test.defaults"))
        for options in ({"weight_scale": 1.7}, given)
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for other in ({"bias_variance": 0.3}, {"mode": "fan_out"}, {"activation": torch.tanh}):
        changed = function(batch(6, 2), WIDTHS, n_networks=3, **(given | other), generator=generator("test.defaults"))
        assert not torch.equal(changed[-1], expected[-1])


def test_gradients_of_propagate_equal_finite_differences():
    inputs, step = batch(3, 2), 1e-6
    found = propagate(
        inputs, WIDTHS, n_networks=1, **SCALES, activation=torch.tanh, generator=generator("test.propagate")
    )
    source = generator("test.propagate")
    [network] = plain_networks(inputs, WIDTHS, 1, **SCALES, mode="fan_in", source=source)
    readout = drawn((WIDTHS[-1],), source, inputs.dtype)

    @torch.no_grad()
    def readout_from(layer, z):
        a = torch.tanh(z)
        for later in network[layer + 1 :]:
            a = torch.tanh(later(a))
        return (a @ readout).sum()

    with torch.no_grad():
        layers, _ = run_plainly(network, inputs, torch.tanh)
    for layer, z in enumerate(layers):
        steps = step * torch.eye(z.numel(), dtype=z.dtype).reshape(-1, *z.shape)
        slopes = [(readout_from(layer, z + d) - readout_from(layer, z - d)) / (2 * step) for d in steps]
        assert found.gradients[0, layer].item() == pytest.approx(torch.stack(slopes).square().mean().item(), rel=1e-7)


def test_preactivations_are_connected_by_autograd():
    first, _, last = preactivations(batch(6, 2), WIDTHS, n_networks=7, **SCALES, generator=generator("test.connected"))
    (gradient,) = torch.autograd.grad(last.sum(), first)
    assert gradient.abs().sum() > 0


def test_gradients_reach_the_inputs():
    inputs = batch(6, 2).requires_grad_()
    layers = preactivations(inputs, WIDTHS, n_networks=7, **SCALES, generator=generator("test.connected"))
    (gradient,) = torch.autograd.grad(layers[-1].sum(), inputs)
    assert gradient.shape == (6, 2)
    found = propagate(inputs, WIDTHS, n_networks=7, **SCALES, generator=generator("test.connected"))
    assert not any(x.requires_grad for x in found)


def test_propagate_works_without_autograd():
    arguments = {"inputs": batch(6, 2), "widths": WIDTHS, "n_networks": 7, **SCALES}
    expected = propagate(**arguments, generator=generator("test.no_grad"))
    with torch.no_grad():
        found = propagate(**arguments, generator=generator("test.no_grad"))
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not any(x.requires_grad for x in found)


def test_networks_take_the_dtype_of_the_inputs_and_measure_in_double_precision():
    inputs = batch(6, 2)
    layers = preactivations(inputs.float(), WIDTHS, n_networks=7, **SCALES, generator=generator("test.dtype"))
    assert {z.dtype for z in layers} == {torch.float32}
    found = propagate(inputs.float(), WIDTHS, n_networks=7, **SCALES, generator=generator("test.dtype"))
    assert {x.dtype for x in found} == {torch.float64}
    expected = torch.stack([z.detach().double().square().mean((1, 2)) for z in layers], dim=1)
    torch.testing.assert_close(found.preactivations, expected, rtol=1e-14, atol=0)


def test_squares_beyond_single_precision_are_measured():
    found = propagate(
        batch(6, 2, dtype=torch.float32) * 1e25,
        WIDTHS,
        n_networks=7,
        weight_scale=1.0,
        generator=generator("test.dtype"),
    )
    assert torch.isfinite(found.preactivations).all()


@pytest.mark.parametrize(("at_once", "sizes"), [(1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (8, [7])])
def test_groups_are_drawn_one_after_another(at_once, sizes, monkeypatch):
    inputs = batch(6, 2)
    numbers = 6 * (5 + 3 + 4)  # preactivations of a network
    source = generator("test.groups")
    parts = [propagate(inputs, WIDTHS, n_networks=size, **SCALES, generator=source) for size in sizes]
    monkeypatch.setattr(networks, "WEIGHTS_AT_ONCE", at_once * numbers)
    found = propagate(inputs, WIDTHS, n_networks=7, **SCALES, generator=generator("test.groups"))
    for signal, expected in zip(found, map(torch.cat, zip(*parts, strict=True)), strict=True):
        assert signal.shape == (7, 3)
        torch.testing.assert_close(signal, expected, rtol=1e-12, atol=0)


# A network has 2·5 + 5·3 + 3·4 = 37 weights, and 5 + 3 + 4 preactivations for an example.
@pytest.mark.parametrize("n_examples", [1, 3, 4, 6])
@pytest.mark.parametrize(("held", "less", "sizes"), [(0, 0, [1] * 4), (2, 1, [1] * 4), (2, 0, [2, 2]), (3, 0, [3, 1])])
def test_groups_are_as_large_as_memory_allows(n_examples, held, less, sizes, monkeypatch):
    found, original = [], networks.preactivations

    def spy(*args, n_networks, **options):
        found.append(n_networks)
        return original(*args, n_networks=n_networks, **options)

    monkeypatch.setattr(networks, "WEIGHTS_AT_ONCE", held * max(37, 12 * n_examples) - less)
    monkeypatch.setattr(networks, "preactivations", spy)
    propagate(batch(n_examples, 2), WIDTHS, n_networks=4, **SCALES, generator=generator("test.groups"))
    assert found == sizes


def test_networks_repeat_themselves_for_equal_generators_only():
    first, again, other = (
        propagate(batch(6, 2), WIDTHS, n_networks=7, **SCALES, generator=generator(f"test.networks.{name}"))
        for name in "aab"
    )
    assert torch.equal(torch.stack(first), torch.stack(again))
    assert not (torch.stack(first) == torch.stack(other)).any()


def test_networks_leave_the_global_generator_and_the_inputs_alone():
    inputs, before = batch(6, 2), torch.random.get_rng_state()
    copied = inputs.clone()
    propagate(inputs, WIDTHS, n_networks=7, **SCALES, generator=generator("test.networks"))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(inputs, copied)
    assert not inputs.requires_grad


def test_a_network_without_weights_has_only_biases():
    found = propagate(
        batch(6, 2), WIDTHS, n_networks=7, weight_scale=0.0, bias_variance=0.5, generator=generator("test.networks")
    )
    assert (found.preactivations > 0).all()
    assert (found.gradients[:, :-1] == 0).all()


NETWORK_ERRORS = [
    ({"inputs": torch.ones(3)}, "inputs must have shape (B, n_0), got (3,)"),
    ({"inputs": torch.ones(2, 3, 4)}, "inputs must have shape (B, n_0), got (2, 3, 4)"),
    ({"widths": ()}, "widths must name at least one layer, got ()"),
    ({"widths": (3, 0)}, "widths must be at least 1, got [3 0]"),
    ({"n_networks": 0}, "n_networks must be at least 1, got 0"),
    ({"weight_scale": -1.0}, "weight_scale must not be negative, got -1.0"),
    ({"bias_variance": -1.0}, "bias_variance must not be negative, got -1.0"),
    ({"mode": "fan"}, "mode must be one of fan_in, fan_out, fan_avg, got 'fan'"),
]


@pytest.mark.parametrize("function", [preactivations, propagate])
@pytest.mark.parametrize(("wrong", "rule"), NETWORK_ERRORS)
def test_networks_refuse_what_is_impossible(function, wrong, rule):
    arguments = {"inputs": torch.ones(2, 3), "widths": (4, 5), "n_networks": 2, "weight_scale": 1.0} | wrong
    with pytest.raises(ValueError, match=f"^{re.escape(rule)}$"):
        function(**arguments, generator=torch.Generator())
