"""What ``make data`` stored for chapter 2: complete, and what its code gives again."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from helpers.data import gradient_noise as data
from helpers.gradient_noise import gradient_noise_scale
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


def test_the_noise_scale_weighed_by_curvature_is_that_of_the_whole_hessian(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 3, dtype=torch.float64, generator=generator)
    y = torch.tensor([0, 1, 1, 0, 2, 2, 1, 0, 2])
    monkeypatch.setattr(data, "_data", lambda: (x, y))
    model = nn.Linear(3, 3, dtype=torch.float64)

    def risk(flat):
        return F.cross_entropy(functional_call(model, {"weight": flat[:9].view(3, 3), "bias": flat[9:]}, x), y)

    def gradient(flat, k):
        weights = {"weight": flat[:9].view(3, 3), "bias": flat[9:]}
        return torch.autograd.grad(F.cross_entropy(functional_call(model, weights, x[k : k + 1]), y[k : k + 1]), flat)[
            0
        ]

    flat = torch.cat([model.weight.flatten(), model.bias]).detach().requires_grad_()
    hessian = torch.autograd.functional.hessian(risk, flat)  # (12, 12)
    gradients = torch.stack([gradient(flat, k) for k in range(9)])  # (9, 12)
    mean = gradients.mean(0)
    expected = ((hessian @ gradients.T.cov()).trace() / (mean @ hessian @ mean)).item()
    assert data.curvature_scale(model, 9, "all").value == pytest.approx(expected, rel=1e-9)


def test_examples_needed_have_four_standard_errors_and_an_asymmetry_of_a_quarter():
    gradients = np.random.default_rng(0).exponential(size=(40, 3)) @ np.diag([1.0, 2.0, 0.3])
    clear, balanced = data.examples_needed(torch.from_numpy(gradients @ gradients.T))
    mean, covariance = gradients.mean(0), np.cov(gradients.T, bias=True)
    variance = 4 * mean @ covariance @ mean / clear + 2 * np.trace(covariance @ covariance) / clear**2
    assert 4 * np.sqrt(variance) == pytest.approx(mean @ mean, rel=1e-9)
    lengths = np.square(gradients - mean).sum(1)
    assert stats.skew(lengths) / np.sqrt(balanced) == pytest.approx(0.25, rel=1e-9)


@pytest.mark.parametrize("n", [32, 70])
def test_samples_by_their_products_say_what_their_gradients_say(n):
    generator = torch.Generator().manual_seed(n)
    gradients = 1 + torch.randn(20, 5, dtype=torch.float64, generator=generator)
    drawn = torch.randint(20, (n,), generator=generator)
    model, rows = nn.Linear(5, 1, bias=False, dtype=torch.float64), gradients[drawn]
    whole = gradient_noise_scale(model, lambda outputs, targets: outputs.mean(), rows, rows)
    found = data._ratio(gradients @ gradients.T, drawn).estimate()
    assert found.value == pytest.approx(whole.value, rel=1e-9)
    assert found.stderr == pytest.approx(whole.stderr, rel=0.02)


@pytest.mark.parametrize("seed", data.SEEDS)
def test_samples_are_stored_for_every_epoch_and_multiple(seed):
    found = data.stored()["samples"][seed]
    assert found.keys() == {str(epoch) for epoch in data.SAMPLED_EPOCHS}
    for case in found.values():
        assert case["tries"].keys() == {str(multiple) for multiple in data.MULTIPLES}
        assert all(0 <= tries["right"] <= tries["given"] <= data.SAMPLES for tries in case["tries"].values())


def test_twice_the_examples_needed_give_a_noise_scale_that_is_right_to_two_standard_errors():
    tries = [case["tries"]["2.0"] for run in data.stored()["samples"] for case in run.values()]
    given, right = (sum(counts[key] for counts in tries) for key in ("given", "right"))
    assert given >= 0.9 * len(tries) * data.SAMPLES
    assert right >= 0.85 * given


def test_samples_drawn_again_say_what_is_stored(monkeypatch):
    monkeypatch.setattr(data, "SAMPLED_EPOCHS", (4,))
    monkeypatch.setattr(data, "MULTIPLES", (0.25,))
    stored, again = data.stored()["samples"][1]["4"], data.samples(1)["4"]
    assert again["tries"]["0.25"] == stored["tries"]["0.25"]
    assert again["needed"] == pytest.approx(stored["needed"], rel=0.011)
    assert again["scale"] == pytest.approx(stored["scale"], rel=0.011)
