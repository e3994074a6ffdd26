"""What ``make data`` stored for chapter 3: complete, and what its code gives again."""

import math

import pytest
import torch
from torch import nn

from helpers.data.initialization import EPOCHS, RELU_STARTS, SEEDS, TANH_STARTS, losses, network, optimizers_of, stored

SCALES = {"1/n": (1.0, 0.0), "2/n": (2.0, 0.0), "4/n": (4.0, 0.0), "default": (1 / 3, 1 / 3 / 64)} | TANH_STARTS


def test_every_start_was_trained_with_every_optimizer_and_seed():
    found = stored()
    assert found.keys() == (RELU_STARTS | TANH_STARTS).keys()
    for start, runs in found.items():
        assert runs.keys() == optimizers_of(start).keys()
        for histories in runs.values():
            assert len(histories) == len(SEEDS)
            assert all(len(history) == EPOCHS or (start == "4/n" and not history) for history in histories)


@pytest.mark.parametrize(
    ("start", "optimizer", "seed"),
    [
        ("2/n", "momentum 0.001", 0),
        ("1/n", "Adam 0.001", 1),
        ("4/n", "SGD 0.006", 2),
        ("edge", "Adam 0.0001", 2),
        ("chaotic", "SGD 0.006", 0),
        ("Xavier", "momentum 0.006", 1),
        ("2/n", "Adam 0.001, loss / 2^15", 0),
    ],
)
def test_training_again_gives_the_stored_losses(start, optimizer, seed):
    again = losses(start, optimizer, seed, epochs=2)
    # The last stored digit may round the other way on another processor.
    assert again == pytest.approx(stored()[start][optimizer][seed][:2], abs=0.011)


def test_with_a_smaller_epsilon_adam_leaves_the_default_start():
    again = losses("default", "Adam 0.001, ε = 1e-20", 0, epochs=6)
    assert again == pytest.approx(stored()["default"]["Adam 0.001, ε = 1e-20"][0][:6], abs=0.05)


@pytest.mark.parametrize("start", SCALES)
def test_networks_have_the_scales_of_their_start(start):
    layers = [layer for layer in network(start, 0) if isinstance(layer, nn.Linear)]
    weight_scale, bias_variance = SCALES[start]
    weights = torch.cat([layer.weight.flatten() * math.sqrt(layer.in_features) for layer in layers]).detach()
    biases = torch.cat([layer.bias for layer in layers]).detach()
    # Five standard errors of a Gaussian's variance, which is above that of uniform numbers.
    assert weights.square().mean().item() == pytest.approx(weight_scale, rel=5 * math.sqrt(2 / len(weights)))
    assert biases.square().mean().item() == pytest.approx(bias_variance, rel=5 * math.sqrt(2 / len(biases)))


def test_networks_leave_the_random_state_as_it_was():
    before = torch.get_rng_state()
    network("2/n", 3)
    assert torch.equal(torch.get_rng_state(), before)
