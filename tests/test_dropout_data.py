"""What ``make data`` stored for chapter 5: complete, and what its code gives again."""

import pytest
import torch
from torch import nn

from helpers.data.dropout import (
    DROPPED,
    EPOCHS,
    NORMALIZED_DROPPED,
    NORMALIZED_EPOCHS,
    OPTIMIZERS,
    SEEDS,
    measured,
    measured_shift,
    network,
    normalized_network,
    stored,
    trained,
    with_statistics_of,
)
from helpers.lab import datasets
from tests.zoo import changes, fingerprint


def test_everything_was_trained_with_every_optimizer_and_seed():
    found = stored()
    for kind, dropped, epochs in (
        ("plain", DROPPED, EPOCHS),
        ("normalized", NORMALIZED_DROPPED, NORMALIZED_EPOCHS),
    ):
        assert found[kind].keys() == OPTIMIZERS.keys()
        for of_optimizer in found[kind].values():
            assert list(of_optimizer) == [str(p) for p in dropped]
            for of_p in of_optimizer.values():
                assert list(of_p) == [str(e) for e in epochs]
                assert all(len(values) == len(SEEDS) for of_epoch in of_p.values() for values in of_epoch.values())


@pytest.mark.parametrize(("p", "optimizer", "seed"), [(0.5, "Adam", 1), (0.2, "SGD", 0), (0.0, "Adam", 2)])
def test_training_again_gives_the_stored_figures(p, optimizer, seed):
    ((epoch, model),) = trained(network, p, optimizer, seed, epochs=(20,))
    before = fingerprint(model)
    again = measured(model, seed)
    assert not changes(before, fingerprint(model))
    expected = stored()["plain"][optimizer][str(p)][str(epoch)]
    assert again.keys() == expected.keys()
    for name, value in again.items():
        # On another processor a few images may change sides.
        assert value == pytest.approx(expected[name][seed], abs=0.01), name


def test_training_again_gives_the_stored_shifts():
    ((epoch, model),) = trained(normalized_network, 0.5, "Adam", 0, epochs=(20,))
    before = fingerprint(model)
    again = measured_shift(model, 0)
    assert not changes(before, fingerprint(model))
    expected = stored()["normalized"]["Adam"]["0.5"][str(epoch)]
    assert again.keys() == expected.keys()
    for name, value in again.items():
        assert value == pytest.approx(expected[name][0], abs=0.02), name


def test_what_looks_at_a_network_does_not_change_its_training():
    def weights(look):
        for _, model in trained(network, 0.5, "SGD", 0, epochs=(1, 2)):
            if look:
                measured(model, 0)
        return [parameter.detach().clone() for parameter in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(weights(False), weights(True), strict=True))


def test_networks_drop_behind_their_hidden_layers():
    kinds = [type(layer) for layer in network(0.3)]
    assert kinds == [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]
    kinds = [type(layer) for layer in normalized_network(0.3)]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout] * 3 + [nn.Linear]
    assert {layer.p for layer in [*network(0.3), *normalized_network(0.3)] if isinstance(layer, nn.Dropout)} == {0.3}


def test_statistics_are_those_of_the_images_without_masks():
    model = normalized_network(0.5)
    x = datasets.digits().x_train.cpu()
    again = with_statistics_of(model, x)
    hidden = again[0](x)
    torch.testing.assert_close(again[1].running_mean, hidden.mean(0))
    torch.testing.assert_close(again[1].running_var, hidden.var(0))
    assert not again.training
    assert torch.equal(model[1].running_mean, torch.zeros(64, dtype=torch.float64))
