"""What ``make data`` stored for chapter 1: complete, and what its code gives again."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from helpers.data import minibatch_loss as data
from helpers.lab import datasets, generator

STEPS = [f"{name}, {size}" for name in data.RATES for size in data.BATCH_SIZES]
KINDS = {"own", "shared", "from 0", "from 10"}


@pytest.fixture(autouse=True)
def as_stored(monkeypatch):
    monkeypatch.setenv("BOOK_SEED", "0")


@pytest.mark.parametrize("key", STEPS)
def test_every_run_reaches_the_goal_at_a_rate_within_the_grid(key):
    found = data.stored()["steps"][key]
    rates = data.RATES[key.split(",")[0]]
    assert len(found["steps"]) == data.RUNS
    assert all(1 <= steps <= data.MOST_STEPS for steps in found["steps"])
    # The best rate is not at an end of the grid, where a better one might lie beyond.
    assert min(rates) < found["learning_rate"] < max(rates)


def test_correlations_and_risks_are_stored_for_every_setting():
    stored = data.stored()
    for key in ("correlations", "worth", "risks"):
        assert stored[key].keys() == data.SETTINGS.keys()
    for name in data.SETTINGS:
        assert [len(row) for row in stored["correlations"][name]] == [data.NETWORKS] * len(data.ALONG)
        assert stored["risks"][name].keys() == KINDS
        for rows in stored["risks"][name].values():
            assert [len(row) for row in rows] == [data.RUNS] * len(data.MARKS)


@pytest.mark.parametrize("name", data.SETTINGS)
def test_the_stored_worth_of_a_batch_is_that_of_the_mean_correlation(name):
    stored = data.stored()
    for k, mark in enumerate(data.ALONG[:2]):
        rho = np.mean(stored["correlations"][name][k])
        assert stored["worth"][name][f"from {mark}"] == round(256 / (1 + 255 * rho))


def test_the_stored_milliseconds_are_ordered_quartiles():
    for low, middle, high in data.stored()["milliseconds"].values():
        assert 0 < low <= middle <= high


@pytest.mark.parametrize(("name", "batch_size"), [("SGD", 256), ("Adam", 32)])
def test_training_again_takes_the_stored_steps(name, batch_size):
    found = data.stored()["steps"][f"{name}, {batch_size}"]
    stream = f"half a nat, {name}, {batch_size}, runs"
    networks = data.fresh_networks(data.RUNS, stream)
    again = data.steps_to_goal(networks, name, batch_size, found["learning_rate"], stream)
    assert again == found["steps"]


@pytest.mark.parametrize(("name", "kind"), [("trained, SGD .05", "own"), ("scratch, Adam .01", "shared")])
def test_training_again_gives_the_stored_risks(name, kind):
    sharing = data.LARGE if kind == "shared" else 1
    (again,) = data.risks(name, data.LARGE, sharing, kind, marks=data.MARKS[:1])
    assert again == pytest.approx(data.stored()["risks"][name][kind][0], rel=2e-3)


@pytest.mark.parametrize("name", ["trained, Adam .003", "scratch, Adam .01"])
def test_measuring_again_gives_the_stored_correlations(name):
    (again,) = data.correlations(name, count=1, marks=(0,))
    assert again == pytest.approx(data.stored()["correlations"][name][0][:1], rel=2e-3)


def test_networks_side_by_side_have_the_losses_and_gradients_of_each_alone():
    networks, digits = data.fresh_networks(3, "test.side by side"), datasets.digits()
    picked = data.random_digits(3, 5, generator=generator("test.side by side digits"))
    weights = data._stacked(networks)
    losses = data._losses(weights, digits.x_train[picked], digits.y_train[picked])
    losses.sum().backward()
    for k, network in enumerate(networks):
        alone = F.cross_entropy(network(digits.x_train[picked[k]]), digits.y_train[picked[k]])
        alone.backward()
        torch.testing.assert_close(losses[k], alone)
        for name, parameter in network.named_parameters():
            torch.testing.assert_close(weights[name].grad[k], parameter.grad)


def test_neighbors_share_shift_and_noise_level_and_others_do_not():
    copies = torch.zeros(4000, dtype=torch.int64, device=datasets.digits().x_train.device)  # of one digit
    for sharing in (4, 1):
        images = data.augmented(copies, sharing=sharing, generator=generator(f"test.sharing {sharing}"))
        spread = images.std(1).reshape(-1, 4)  # it grows with the noise level
        ratio = float(spread.mean(1).var() / spread.var(1).mean())
        assert (ratio > 1) if sharing == 4 else (ratio < 0.5)  # 1/4 for independent images


def test_summed_gradient_variance_is_that_of_a_loop_over_the_same_batches():
    (network,), digits = data.fresh_networks(1, "test.summed network"), datasets.digits()
    weights = {name: p.detach() for name, p in network.named_parameters()}
    found = data.summed_gradient_variance(weights, 6, 3, "test.summed", 5)
    draws = generator("test.summed")
    picked = data.random_digits(5, 6, generator=draws)
    images = data.augmented(picked.flatten(), sharing=3, generator=draws).reshape(5, 6, -1)
    rows = []
    for batch, rows_of in zip(images, picked, strict=True):
        network.zero_grad()
        F.cross_entropy(network(batch), digits.y_train[rows_of]).backward()
        rows.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    expected = torch.stack(rows).var(0).sum().item()
    assert float(found.value) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("correlation", "expected"), [(0.0, 256), (0.0203, 41), (-0.001, 256), (1.0, 1)])
def test_worth_of_a_batch(correlation, expected):
    assert data.worth(correlation) == expected
