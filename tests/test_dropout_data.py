"""What ``make data`` stored for chapter 5: complete, and what its code gives again."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from helpers.data.dropout import (
    KINDS,
    SEEDS,
    measured,
    measured_outputs,
    measured_shift,
    network,
    normalized_network,
    stored,
    trained,
    with_statistics_of,
)
from helpers.dropout import masked_outputs
from helpers.lab import datasets
from helpers.lab.runtime import seeded
from tests.zoo import changes, fingerprint


def test_everything_was_trained_with_every_optimizer_and_seed():
    found = stored()
    assert list(found) == list(KINDS)
    for kind, (_, _, optimizers, dropped, epochs) in KINDS.items():
        assert found[kind].keys() == optimizers.keys()
        for of_optimizer in found[kind].values():
            assert list(of_optimizer) == [str(p) for p in dropped]
            for of_p in of_optimizer.values():
                assert list(of_p) == [str(e) for e in epochs]
                assert all(len(values) == len(SEEDS) for of_epoch in of_p.values() for values in of_epoch.values())


def once_more(kind, make, measure, p, optimizer, seed, epochs):
    """Return what a network measures when it is trained again, unharmed, and what is stored."""
    ((epoch, model),) = trained(make, p, optimizer, seed, epochs=(epochs,))
    before = fingerprint(model)
    again = measure(model, seed)
    assert not changes(before, fingerprint(model))
    expected = stored()[kind][optimizer][str(p)][str(epoch)]
    assert again.keys() == expected.keys()
    return again, expected


@pytest.mark.parametrize(("p", "optimizer", "seed"), [(0.5, "Adam", 1), (0.2, "SGD", 0), (0.0, "Adam", 2)])
def test_training_again_gives_the_stored_figures(p, optimizer, seed):
    again, expected = once_more("plain", network, measured, p, optimizer, seed, 20)
    for name, value in again.items():
        # On another processor a few images may change sides.
        assert value == pytest.approx(expected[name][seed], abs=0.01), name


def test_training_again_gives_the_stored_shifts():
    again, expected = once_more("normalized", normalized_network, measured_shift, 0.5, "Adam", 0, 20)
    for name, value in again.items():
        assert value == pytest.approx(expected[name][0], abs=0.02), name


def test_training_again_gives_the_stored_outputs():
    again, expected = once_more("outputs", network, measured_outputs, 0.5, "Adam", 1, 60)
    assert again["units"] == pytest.approx(expected["units"][1], rel=0.02)
    assert again["to_geometric"] == pytest.approx(expected["to_geometric"][1], abs=3e-4)
    assert again["to_arithmetic"] == pytest.approx(expected["to_arithmetic"][1], abs=0.005)


def test_units_that_share_the_work_are_counted_and_divergences_are_those_of_scipy():
    x, y = datasets.digits().x_test.cpu(), datasets.digits().y_test.cpu()
    with seeded("test.dropout_data.untrained"):
        model = network(0.5)
    model[5].p = 0.1
    model.eval()
    found = measured_outputs(model, 3)
    products = (model[6].weight[y] * model[:5](x).detach()).detach().numpy() ** 2
    assert found["units"] == pytest.approx(np.mean(products.sum(1) ** 2 / (products**2).sum(1)), abs=1e-4)
    source = torch.Generator().manual_seed(3)
    masked = masked_outputs(model, x, masks=100, generator=source).softmax(2).numpy()
    whole = model(x).softmax(1).detach().numpy()
    for name, mean in (("arithmetic", masked.mean(0)), ("geometric", stats.gmean(masked))):
        wanted = stats.entropy(whole, mean, axis=1).mean()
        assert found[f"to_{name}"] == pytest.approx(wanted, abs=1e-4)


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
