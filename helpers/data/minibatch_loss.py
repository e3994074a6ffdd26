"""What a batch size costs in training, and what a shared augmentation does: stored trainings for chapter 1.

``make data`` runs them again, in about three minutes on one core, and writes ``minibatch_loss.json``:

- ``steps``: for each optimizer and batch size, the learning rate that `TRIALS` networks like best, and the steps that
  other networks take with it until their risk is below `GOAL`;
- ``milliseconds``: what a step costs and what each of its images adds, in processor time of one core;
- ``correlations``: for each of `SETTINGS`, the mean correlation of gradients of each network after some steps;
- ``worth``: for each of `SETTINGS`, the batches with own augmentations that stand for 256 images which share one;
- ``risks``: for each of `SETTINGS` and each kind of batch, the risk of each run after each of `MARKS` steps.
"""

import json
import math
import time
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F

from helpers.lab import datasets, estimates, models, training
from helpers.lab.estimates import Estimate
from helpers.lab.runtime import device, generator, seeded
from helpers.minibatch_loss import effective_batch_size

BATCH_SIZES = (4, 32, 256)
RATES = {"SGD": (0.05, 0.1, 0.2, 0.4, 0.8, 1.6), "Adam": (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08)}
GOAL, MOST_STEPS = 0.5, 800  # nats; steps after which to give up
TRIALS, RUNS = 8, 24  # networks that choose a rate, and others
LARGE, MARKS, ALONG = 256, (10, 30, 90), (0, 10, 30, 90)
NETWORKS, BATCHES, SIZE = 12, 150, 64  # of correlations along a training

Weights = dict[str, torch.Tensor]


class Setting(NamedTuple):
    """A training that is tried with several kinds of batches."""

    trained: bool  # whether it starts from the trained network, and not from scratch
    optimizer: str
    learning_rate: float


SETTINGS = {
    "trained, Adam .003": Setting(True, "Adam", 0.003),
    "trained, SGD .05": Setting(True, "momentum", 0.05),
    "scratch, Adam .01": Setting(False, "Adam", 0.01),
    "scratch, Adam .003": Setting(False, "Adam", 0.003),
    "scratch, SGD .05": Setting(False, "momentum", 0.05),
}


def random_digits(*shape: int, generator: torch.Generator) -> torch.Tensor:
    """Draw training digits with replacement, as indices of that shape."""
    return torch.randint(len(_digits().x_train), shape, generator=generator, device=generator.device)


def augmented(picked: torch.Tensor, *, sharing: int, generator: torch.Generator) -> torch.Tensor:
    """Return training digits, shifted by up to a pixel and made noisy.

    Parameters
    ----------
    picked : int64, shape (N,)
        Which digits.
    sharing : int
        How many neighbors share a shift and a noise level, uniform in [0, 0.3]; a divisor of N.
    generator : torch.Generator

    Returns
    -------
    torch.Tensor, shape (N, 64)
    """
    groups, where = len(picked) // sharing, generator.device
    shift = torch.randint(-1, 2, (groups, 2), generator=generator, device=where)
    noise_level = 0.3 * torch.rand(groups, dtype=torch.float64, generator=generator, device=where)
    return datasets.augment(
        _digits().x_train[picked],
        shift=shift.repeat_interleave(sharing, 0),
        noise_level=noise_level.repeat_interleave(sharing),
        generator=generator,
    )


def trained_network() -> nn.Sequential:
    """Return the chapter's network: SGD, rate .05, momentum .9, batches of 32, five epochs of augmented digits."""
    digits, draws = _digits(), generator("training")
    with seeded("digits mlp"):
        network = models.mlp().to(device(), torch.float64)
    repeated = torch.arange(len(digits.x_train), device=device()).repeat(8)
    images = augmented(repeated, sharing=1, generator=draws)
    targets = digits.y_train[repeated]
    training.train(network, images, targets, epochs=5, batch_size=32, learning_rate=0.05, momentum=0.9, generator=draws)
    return network


def fresh_networks(count: int, stream: str) -> list[nn.Sequential]:
    """Return untrained digits networks in float64."""
    with seeded(stream):
        return [models.mlp().to(device(), torch.float64) for _ in range(count)]


def steps_to_goal(networks: list[nn.Module], name: str, batch_size: int, learning_rate: float, stream: str) -> list:
    """Train without augmentation, by plain SGD or Adam, until the risk is below `GOAL`.

    Returns
    -------
    list of int or None
        Steps of each network, the first after which its risk is below. None where `MOST_STEPS` do not suffice.
    """
    digits, draws = _digits(), generator(stream)
    weights = _stacked(networks)
    optimizer = _optimizer(name, weights, learning_rate)
    reached: list[int | None] = [None] * len(networks)
    for step in range(1, MOST_STEPS + 1):
        picked = random_digits(len(networks), batch_size, generator=draws)
        _step(weights, optimizer, digits.x_train[picked], digits.y_train[picked])
        risks = _risks(weights, digits.x_train, digits.y_train)
        reached = [step if old is None and risk < GOAL else old for old, risk in zip(reached, risks, strict=True)]
        if None not in reached or any(math.isnan(risk) for risk in risks):
            break
    return reached


def best_steps(name: str, batch_size: int) -> dict[str, Any]:
    """Choose the learning rate with some networks, and count the steps of others."""
    stream, mean_steps = f"half a nat, {name}, {batch_size}", {}
    for rate in RATES[name]:
        tried = steps_to_goal(fresh_networks(TRIALS, f"{stream}, trials"), name, batch_size, rate, f"{stream}, {rate}")
        mean_steps[rate] = sum(math.inf if steps is None else steps for steps in tried) / TRIALS
    best = min(mean_steps, key=mean_steps.get)
    steps = steps_to_goal(fresh_networks(RUNS, f"{stream}, runs"), name, batch_size, best, f"{stream}, runs")
    return {"learning_rate": best, "steps": steps}


def milliseconds(repeats: int = 15) -> dict[str, list[float]]:
    """Measure what a step of SGD costs, and what each image adds to it, in milliseconds of processor time.

    Returns
    -------
    dict
        ``"step"`` and ``"image"``, the quartiles of some repeats, each from batches of 4 and of 256.
    """
    digits, draws = _digits(), generator("milliseconds")
    (network,) = fresh_networks(1, "milliseconds")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)

    def one_step(batch_size: int) -> float:
        start = time.process_time()
        for _ in range(100):
            picked = random_digits(batch_size, generator=draws)
            optimizer.zero_grad()
            F.cross_entropy(network(digits.x_train[picked]), digits.y_train[picked]).backward()
            optimizer.step()
        return 10 * (time.process_time() - start)  # milliseconds for one of 100

    taken = torch.tensor([[one_step(size) for size in (4, 256)] for _ in range(repeats)])
    image = (taken[:, 1] - taken[:, 0]) / (256 - 4)
    parts = {"step": taken[:, 0] - 4 * image, "image": image}
    quartiles = torch.tensor([0.25, 0.5, 0.75])
    return {name: [_rounded(x) for x in values.quantile(quartiles).tolist()] for name, values in parts.items()}


def starts(setting: Setting, count: int) -> list[nn.Module]:
    """Return the networks with which the runs of a setting begin."""
    return [trained_network()] * count if setting.trained else fresh_networks(count, "runs from scratch")


def summed_gradient_variance(
    weights: Weights, batch_size: int, sharing: int, stream: str, n_batches: int = 300
) -> Estimate:
    """Estimate the variance of the batch gradient of one digits network, summed over its coordinates."""
    digits, draws = _digits(), generator(stream)
    picked = random_digits(n_batches, batch_size, generator=draws)
    images = augmented(picked.flatten(), sharing=sharing, generator=draws).reshape(n_batches, batch_size, -1)
    with torch.device("meta"):  # the layers alone: their weights come from outside
        frame = models.mlp()

    def mean_loss(weights: Weights, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(functional_call(frame, weights, (images,)), targets)

    found = vmap(grad(mean_loss), in_dims=(None, 0, 0))(weights, images, digits.y_train[picked])
    flat = torch.cat([g.flatten(1) for g in found.values()], 1)  # (n_batches, parameters)
    return estimates.mean((flat - flat.mean(0)).square().sum(1) * n_batches / (n_batches - 1))


def gradient_correlation(weights: Weights, stream: str) -> float:
    """Estimate the correlation of the gradients of two images that share an augmentation, averaged over coordinates."""
    shared, own = (
        summed_gradient_variance(weights, SIZE, sharing, f"{stream} {sharing}", BATCHES).value for sharing in (SIZE, 1)
    )
    return float((shared / own - 1) / (SIZE - 1))


def correlations(name: str, count: int = NETWORKS, marks: tuple[int, ...] = ALONG) -> list[list[float]]:
    """Return the correlation of gradients after some steps with own augmentations, for each of several networks."""
    found = []

    def measure(weights: Weights) -> None:
        for k in range(count):
            one = {key: weight.detach()[k] for key, weight in weights.items()}
            found.append(_rounded(gradient_correlation(one, f"along {name} {len(found)}")))

    _train(SETTINGS[name], count, LARGE, 1, marks, f"along {name}", measure)
    return [found[i : i + count] for i in range(0, len(found), count)]


def worth(correlation: float) -> int:
    """Return how many images of their own are worth a batch of 256 that share an augmentation."""
    return round(float(effective_batch_size(LARGE, max(correlation, 0))))


def risks(name: str, batch_size: int, sharing: int, stream: str, marks: tuple[int, ...] = MARKS) -> list[list[float]]:
    """Return the risk over augmented digits after some steps, for each of `RUNS` runs."""
    digits, draws, found = _digits(), generator("judge"), []
    judge = torch.arange(len(digits.x_train), device=device()).repeat(2)
    images = augmented(judge, sharing=1, generator=draws)

    def measure(weights: Weights) -> None:
        found.append([_rounded(risk) for risk in _risks(weights, images, digits.y_train[judge])])

    _train(SETTINGS[name], RUNS, batch_size, sharing, marks, f"{name}, {stream}", measure)
    return found


def stored() -> dict[str, Any]:
    """Return what ``make data`` stored."""
    return json.loads((files("helpers.data") / "minibatch_loss.json").read_text(encoding="utf-8"))


@cache
def _digits() -> datasets.Split:
    return datasets.digits()


def _train(setting: Setting, count: int, batch_size: int, sharing: int, marks, stream: str, measure) -> None:
    """Train several networks side by side and measure them after the marked steps."""
    digits, draws = _digits(), generator(stream)
    weights = _stacked(starts(setting, count))
    optimizer = _optimizer(setting.optimizer, weights, setting.learning_rate)
    for step in range(marks[-1] + 1):
        if step in marks:
            measure(weights)
        picked = random_digits(count * batch_size, generator=draws)
        images = augmented(picked, sharing=sharing, generator=draws).reshape(count, batch_size, -1)
        _step(weights, optimizer, images, digits.y_train[picked].reshape(count, batch_size))


def _stacked(networks: list[nn.Module]) -> Weights:
    weights, _ = stack_module_state(networks)
    return {key: weight.detach().clone().requires_grad_() for key, weight in weights.items()}


def _optimizer(name: str, weights: Weights, learning_rate: float) -> torch.optim.Optimizer:
    if name == "Adam":
        return torch.optim.Adam(weights.values(), lr=learning_rate)
    return torch.optim.SGD(weights.values(), lr=learning_rate, momentum=0.9 if name == "momentum" else 0)


def _losses(weights: Weights, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of each of R digits networks, (R,), on images (R, N, 64)."""
    hidden = images
    for layer in (0, 2, 4):
        bias = weights[f"{layer}.bias"][:, None]
        hidden = torch.baddbmm(bias, hidden, weights[f"{layer}.weight"].mT)  # (R, N, fan_out)
        hidden = hidden.relu() if layer < 4 else hidden
    return F.cross_entropy(hidden.transpose(1, 2), targets, reduction="none").mean(1)


@torch.no_grad()
def _risks(weights: Weights, images: torch.Tensor, targets: torch.Tensor) -> list[float]:
    count = len(weights["0.weight"])
    return _losses(weights, *(x.expand(count, *x.shape) for x in (images, targets))).tolist()


def _step(weights: Weights, optimizer: torch.optim.Optimizer, images: torch.Tensor, targets: torch.Tensor) -> None:
    optimizer.zero_grad()  # each network has its own batch and gradient
    _losses(weights, images, targets).sum().backward()
    optimizer.step()


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _trainings(name: str) -> tuple[list[list[float]], dict[str, int], dict[str, list[list[float]]]]:
    """Return the correlations along a setting, the batches that they predict, and the risks with each kind of batch."""
    along = correlations(name)
    foreseen = {f"from {mark}": worth(sum(along[k]) / NETWORKS) for k, mark in enumerate(ALONG[:2])}
    kinds = {"own": (LARGE, 1), "shared": (LARGE, LARGE)} | {kind: (size, 1) for kind, size in foreseen.items()}
    return along, foreseen, {kind: risks(name, size, sharing, kind) for kind, (size, sharing) in kinds.items()}


if __name__ == "__main__":
    trainings = {name: _trainings(name) for name in SETTINGS}
    results = {
        "steps": {f"{name}, {size}": best_steps(name, size) for name in RATES for size in BATCH_SIZES},
        "milliseconds": milliseconds(),
        "correlations": {name: along for name, (along, _, _) in trainings.items()},
        "worth": {name: foreseen for name, (_, foreseen, _) in trainings.items()},
        "risks": {name: found for name, (_, _, found) in trainings.items()},
    }
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
