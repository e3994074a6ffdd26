"""What ``make data`` stored for chapter 2: complete, and what its code gives again."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers.data import gradient_noise as data
from helpers.lab import datasets

CHECKPOINTS = [(seed, str(epoch)) for seed in data.SEEDS for epoch in data.CHECKPOINTS]


@pytest.fixture(autouse=True)
def as_stored(monkeypatch):
    monkeypatch.setenv("BOOK_SEED", "0")


@pytest.fixture(scope="module")
def first():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BOOK_SEED", "0")
        return data.checkpoints(0)


def test_noise_scales_are_stored_for_every_optimizer_seed_and_epoch():
    found = data.stored()["scales"]
    assert found.keys() == data.OPTIMIZERS.keys()
    for runs in found.values():
        assert [len(run) for run in runs] == [len(data.EPOCHS)] * len(data.SEEDS)
        assert all(scale > 0 for run in runs for scale in run)


@pytest.mark.parametrize(("seed", "epoch"), CHECKPOINTS)
def test_every_batch_size_halved_the_risk_in_every_run_at_a_rate_within_the_grid(seed, epoch):
    runs = data.stored()["halving"][seed][epoch]["runs"]
    assert runs.keys() == {str(size) for size in data.BATCH_SIZES}
    for run in runs.values():
        assert len(run["steps"]) == data.RUNS
        assert all(1 <= steps < data.MOST_STEPS for steps in run["steps"])
        # The best rate is not at an end of the grid, where a better one might lie beyond.
        assert min(data.LEARNING_RATES) < run["learning_rate"] < max(data.LEARNING_RATES)


@pytest.mark.parametrize(("optimizer", "seed"), [("momentum", 0), ("plain SGD", 1), ("Adam", 2)])
def test_training_again_gives_the_stored_noise_scales(optimizer, seed):
    again = data.scales_in_training(optimizer, seed, epochs=(0, 1))
    # The last of three stored digits may round the other way on another processor.
    assert again == pytest.approx(data.stored()["scales"][optimizer][seed][:2], rel=0.011)


@pytest.mark.parametrize(("epoch", "batch_size", "run"), [(1, 8, 0), (1, 512, 3), (4, 32, 7)])
def test_halving_the_risk_again_takes_the_stored_steps(first, epoch, batch_size, run):
    stored = data.stored()["halving"][0][str(epoch)]["runs"][str(batch_size)]
    stream = f"halve 0, {epoch}, {batch_size}, run {run}"
    steps, _ = data.steps_to_halve(first[epoch], batch_size, stored["learning_rate"], stream)
    assert steps == stored["steps"][run]


def test_the_stored_scale_is_that_of_looped_gradients(first):
    digits, model = datasets.digits(), first[1]
    rows = []
    for x, y in zip(digits.x_train.split(1), digits.y_train.split(1), strict=True):
        parts = torch.autograd.grad(F.cross_entropy(model(x), y), tuple(model.parameters()))
        rows.append(torch.cat([part.flatten() for part in parts]))
    gradients = torch.stack(rows)
    scale = (gradients.var(0).sum() / gradients.mean(0).square().sum()).item()
    assert data.true_scale(model) == pytest.approx(scale, rel=1e-9)
    assert data.stored()["halving"][0]["1"]["scale"] == pytest.approx(scale, rel=0.005)


def test_the_best_rate_is_chosen_by_trials_and_counted_with_other_shuffles(monkeypatch):
    asked = []

    def steps(model, batch_size, rate, shuffle, most=data.MOST_STEPS):
        asked.append(shuffle)
        return {0.1: 40, 0.2: 30}.get(rate), model

    monkeypatch.setattr(data, "steps_to_halve", steps)
    found = data.best_steps(nn.Linear(1, 1), 8, "here")
    assert found == {"learning_rate": 0.2, "steps": [30] * data.RUNS}
    assert len(asked) == len(set(asked))


def test_a_run_that_takes_too_long_or_diverges_has_no_number(first):
    assert data.steps_to_halve(first[1], 8, 1e-6, "slow", most=5)[0] is None
    assert data.steps_to_halve(first[1], 8, 1e6, "wild")[0] is None
