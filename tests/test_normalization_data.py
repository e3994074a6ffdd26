"""What ``make data`` stored for chapter 4: complete, trained as one by one, and what its code gives again."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers.data import normalization as data
from helpers.lab import datasets, training


def test_everything_was_trained_with_each_optimizer_and_seed():
    found = data.stored()
    assert found.keys() == {"company", "small", "speed", "shift"}
    for runs in found["company"].values():
        assert {epochs: len(three) for epochs, three in runs.items()} == {"10": 3, "30": 3}
    assert {(size, norm) for size in found["small"] for norm in found["small"][size]} == {
        (str(size), norm) for size in data.SMALL_BATCHES for norm in data.NARROW
    }
    assert {(start, norm) for start in found["speed"] for norm in found["speed"][start]} == {
        (start, norm) for start, (_, _, epochs) in data.STARTS.items() for norm in epochs
    }
    assert found["shift"].keys() == set(data.SHIFTED)
    for by_norm in (*found["small"].values(), *found["speed"].values(), found["shift"]):
        assert all(by_optimizer.keys() == data.OPTIMIZERS.keys() for by_optimizer in by_norm.values())
    for start, by_norm in found["speed"].items():
        for norm, by_optimizer in by_norm.items():
            for name, by_rate in by_optimizer.items():
                assert list(by_rate) == [str(rate) for rate in data.GRID[name]]
                lengths = {len(run["losses"]) for runs in by_rate.values() for run in runs}
                assert lengths == {data.STARTS[start][2][norm]}
    for by_norm in found["small"].values():
        for by_optimizer in by_norm.values():
            for parts in by_optimizer.values():
                assert list(parts) == [str(part) for part in data.RATE_PARTS]
                assert all({e: len(r) for e, r in runs.items()} == {"5": 3, "15": 3} for runs in parts.values())
    assert all(len(runs) == 10 for by_optimizer in found["shift"].values() for runs in by_optimizer.values())


def one_by_one(model, run, batch_size):
    """One epoch, by a plain loop."""
    digits = datasets.digits(torch.float32)
    x, y = digits.x_train.cpu(), digits.y_train.cpu()
    model, order = copy.deepcopy(model), torch.Generator().manual_seed(run.seed)
    optimizer = data.OPTIMIZERS[run.optimizer](model.parameters(), run.rate)
    for batch in torch.randperm(len(x), generator=order).split(batch_size):
        if len(batch) == batch_size:
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model


@pytest.mark.parametrize("norm", data.NORMS)
def test_networks_that_train_together_become_what_each_becomes_alone(norm):
    runs = [data.Run("SGD", 0.1, 0), data.Run("SGD", 0.1, 1), data.Run("SGD", 0.05, 0), data.Run("Adam", 0.002, 5)]
    networks = [data.network(norm, run.seed, hidden=3) for run in runs]
    [together] = data.trained(networks, runs, batch_size=64, epochs=[1])
    for network, run, found in zip(networks, runs, together, strict=True):
        alone = one_by_one(network, run, 64).state_dict()
        hidden = {f"{k}.bias" for k in (0, 3, 6)} | {f"{k}.running_mean" for k in (1, 4, 7)}
        for name, tensor in found.state_dict().items():
            if norm == "batch" and run.optimizer == "Adam" and name in hidden:
                continue  # before batch norm a bias has no gradient: Adam makes steps of its rounding errors
            torch.testing.assert_close(tensor, alone[name], rtol=1e-2, atol=1e-4, msg=f"{run}, {name}")


def test_networks_have_their_layers_and_starts():
    model = data.network("group", 3, hidden=2, he=True)
    kinds = [type(layer) for layer in model]
    assert kinds == [nn.Linear, nn.GroupNorm, nn.ReLU, nn.Linear, nn.GroupNorm, nn.ReLU, nn.Linear]
    assert model[0].weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.05)
    assert not model[0].bias.any()
    default = data.network("none", 3)[0].weight
    assert default.abs().max() <= 1 / 8
    assert torch.equal(default, data.network("batch", 3)[0].weight)
    assert not torch.equal(default, data.network("none", 4)[0].weight)


def test_training_again_gives_the_stored_losses():
    again = data.speed_runs("2 layers, default", "group", epochs=2)
    stored = data.stored()["speed"]["2 layers, default"]["group"]
    for name, by_rate in again.items():
        for rate, runs in by_rate.items():
            for run, kept in zip(runs, stored[name][rate], strict=True):
                assert run["losses"] == pytest.approx(kept["losses"][:2], abs=0.02)


def test_training_again_gives_the_stored_accuracies_in_company():
    runs = [data.Run("momentum", data.RATES["momentum"], seed) for seed in data.SEEDS]
    [stage] = data.trained([data.network("batch", seed) for seed in data.SEEDS], runs, batch_size=32, epochs=[10])
    digits = datasets.digits(torch.float32)
    x, y = digits.x_test.cpu(), digits.y_test.cpu()
    for model, kept in zip(stage, data.stored()["company"]["momentum"]["10"], strict=True):
        # Six images: rounding of float32 differs between processors, and grows in training.
        assert training.accuracy(model, x, y) == pytest.approx(kept["evaluation"], abs=0.0121)
        by_class = data.accuracy_in_batches(model, x, y, torch.argsort(y, stable=True), 32)
        assert by_class == pytest.approx(kept["sorted"], abs=0.0121)


def test_training_mode_normalizes_by_the_batch_and_leaves_the_model_alone():
    model = data.network("batch", 0).eval()
    before = copy.deepcopy(model.state_dict())
    x, y = torch.randn(10, 64, generator=torch.Generator().manual_seed(0)), torch.arange(10)
    order = torch.arange(9, -1, -1)
    expected = [copy.deepcopy(model).train()(x[part]).argmax(1) == y[part] for part in (order[:5], order[5:])]
    found = data.accuracy_in_batches(model, x, y, order, 5)
    assert found == pytest.approx(torch.cat(expected).double().mean().item(), abs=1e-12)
    assert not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_renewed_statistics_are_those_of_the_inputs():
    model, x = data.network("batch", 0), torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    renewed = data.with_statistics_of(model, x)
    entering = model[0](x)
    torch.testing.assert_close(renewed[1].running_mean, entering.mean(0))
    torch.testing.assert_close(renewed[1].running_var, entering.var(0))
    assert not renewed.training
    assert torch.equal(model[1].running_var, torch.ones(64))
    torch.testing.assert_close(data.shifted(x), x / 2 + 0.5)


def test_behind_batch_norm_in_pairs_s2_is_twice_the_variance():
    model = data.network("batch", 0)
    model[1].eps = 1e-12  # else pairs that are nearly alike give less than 1
    found = data.second_layer(model, 2, seed=0, shuffles=1)
    assert found["mean s² / training mode"] == pytest.approx(2, rel=0.005)
    met = data.second_layer(data.network("batch", 0), 64, seed=0, shuffles=1)
    assert met["mean s² / training mode"] == pytest.approx(64 / 63, rel=0.005)


def test_what_the_second_layer_meets_in_training_mode_is_compared_with_evaluation():
    model = data.network("batch", 0)
    x = datasets.digits(torch.float32).x_train.cpu()
    for layer in (model[1], model[4]):
        layer.running_mean.normal_(generator=torch.Generator().manual_seed(0))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))[:1296]
    judging = copy.deepcopy(model).train()[:4]
    met = torch.cat([judging(x[batch]) for batch in order.split(4)])
    expected = (met.var(0) / copy.deepcopy(model).eval()[:4](x).var(0)).log().mean().exp().item()
    found = data.second_layer(model, 4, seed=3, shuffles=1)
    assert found["training mode / evaluation"] == pytest.approx(expected, rel=1e-4)


def test_pure_batches_hold_one_class_each_and_two_make_a_class():
    seen = []

    class Watch(nn.Module):
        def forward(self, x):
            seen.append(x[:, 0].tolist())
            return torch.eye(10)[torch.full((len(x),), 3)]

    labels = torch.arange(36) % 10
    found = data.accuracy_in_pure_batches(Watch(), labels[:, None].float(), labels)
    assert found == pytest.approx(4 / 36)
    assert sorted(seen) == sorted(
        [[float(c)] * 2 for c in range(10)] + [[float(c)] * (2 if c < 6 else 1) for c in range(10)]
    )


def test_epochs_are_counted_to_the_first_below():
    assert data.epochs_to([0.3, 0.1, 0.09, 0.2]) == 3
    assert data.epochs_to([0.3, 0.1]) is None
    assert data.epochs_to([0.3, 0.25], goal=0.3) == 2
