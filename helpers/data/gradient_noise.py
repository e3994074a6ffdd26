"""What the noise scale of the digits network does in training, and what a batch size costs: trainings for chapter 2.

``make data`` runs them again, in about six minutes on one core, and writes ``gradient_noise.json``:

- ``scales``: for each optimizer and seed the noise scale after each of `EPOCHS`, over all training images;
- ``halving``: for each seed and each of `CHECKPOINTS` the noise scale and the training risk there, the noise scale
  weighed by curvature, with its standard error, the noise scale where the risk has halved, and for each batch size the
  learning rate and the steps of plain SGD that halve the risk;
- ``samples``: for each seed and each of `SAMPLED_EPOCHS` the noise scale, the numbers of examples from which on it
  should be given, and for multiples of the larger one how many of `SAMPLES` samples gave it, how many of those were
  right to two standard errors, and of the others how often the 95 % interval was.
"""

import copy
import json
import math
from functools import cache
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from helpers import gradient_noise
from helpers.gradient_noise import noise_scale
from helpers.lab import datasets, models, training
from helpers.lab.estimates import Estimate, mean
from helpers.lab.gradients import flatten, mean_gradient, per_sample_gradients, per_sample_squared_norms
from helpers.lab.runtime import device, generator, seeded

SEEDS = (0, 1, 2)
BATCH_SIZE = 32
EPOCHS = (0, 1, 2, 4, 8, 16, 24, 72)
OPTIMIZERS = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "plain SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.001),
}
CHECKPOINTS = (1, 4, 8)
BATCH_SIZES = (512, 128, 32, 8)
LEARNING_RATES = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8)
TRIALS, RUNS = 3, 8  # shuffles with which a learning rate is chosen, and others with which steps are counted
MOST_STEPS = 1_000
CURVED = 200  # examples from which the noise is weighed by curvature
SAMPLED_EPOCHS = (4, 16)
MULTIPLES = (0.25, 0.5, 1.0, 2.0)
SAMPLES = 50


def network(seed: int) -> nn.Sequential:
    """Return an untrained digits network in float64."""
    with seeded(f"noisy network {seed}"):
        return models.mlp().to(device(), torch.float64)


def true_scale(model: nn.Module) -> float:
    """Return the noise scale over all training images."""
    data = model, F.cross_entropy, *_data()
    squares = per_sample_squared_norms(*data)
    signal, n = sum(part.square().sum().item() for part in mean_gradient(*data).values()), len(squares)
    return noise_scale((squares.sum().item() - n * signal) / (n - 1), signal)


def curvature_scale(model: nn.Module, n: int, stream: str) -> Estimate:
    """Estimate the noise scale weighed by curvature, ``tr(HS) / ∇Lᵀ H ∇L``, from n examples.

    The denominator is computed over all training images, with H the Hessian of the training risk there; the numerator
    is the mean of ``cᵢᵀ H cᵢ N/(N-1)``, with cᵢ the gradient of an example minus ∇L. Source: McCandlish et al. (2018).
    """
    (x, y), parameters = _data(), list(model.parameters())
    gradient = torch.cat(
        [g.flatten() for g in torch.autograd.grad(_loss(model), parameters, create_graph=True)]
    )  # (P,)

    def curvature_along(direction: torch.Tensor) -> float:
        product = torch.autograd.grad(gradient @ direction, parameters, retain_graph=True)
        return (torch.cat([part.flatten() for part in product]) @ direction).item()

    signal = gradient.detach()
    drawn = torch.randperm(len(x), generator=generator(stream), device=device())[:n]
    apart = flatten(per_sample_gradients(model, F.cross_entropy, x[drawn], y[drawn])) - signal  # (n, P)
    costs = torch.tensor([curvature_along(one) for one in apart], dtype=torch.float64)
    return mean(costs / curvature_along(signal) * len(x) / (len(x) - 1))


def scales_in_training(optimizer: str, seed: int, epochs: tuple[int, ...] = EPOCHS) -> list[float]:
    """Train with batches of 32 and return the noise scale after each of these epochs, rounded to three digits."""
    (x, y), model = _data(), network(seed)
    steps, order = OPTIMIZERS[optimizer](model.parameters()), generator(f"noisy order {seed}")
    found = []
    for before, epoch in pairwise((0, *epochs)):
        for _ in range(epoch - before):
            for batch in torch.randperm(len(x), generator=order, device=device()).split(BATCH_SIZE):
                _step(model, steps, x[batch], y[batch])
        found.append(_rounded(true_scale(model)))
    return found


def checkpoints(seed: int, epochs: tuple[int, ...] = CHECKPOINTS) -> dict[int, nn.Module]:
    """Train by SGD with momentum .9, learning rate .05 and batches of 32; return the network after these epochs."""
    model, order, found = network(seed), generator(f"checkpoint order {seed}"), {}
    for before, epoch in pairwise((0, *epochs)):
        more = epoch - before
        training.train(model, *_data(), epochs=more, batch_size=BATCH_SIZE, learning_rate=0.05, generator=order)
        found[epoch] = copy.deepcopy(model)
    return found


def steps_to_halve(
    model: nn.Module, batch_size: int, learning_rate: float, shuffle: str, most: int = MOST_STEPS
) -> tuple[int | None, nn.Module]:
    """Count the steps of plain SGD until the training risk is half of what it was, and return the network there.

    Parameters
    ----------
    model : torch.nn.Module
        The network at the checkpoint; a copy is trained.
    batch_size, learning_rate : int, float
        Of plain SGD over shuffled epochs; an incomplete last batch is left out.
    shuffle : str
        The stream that shuffles the images.
    most : int
        Steps after which to give up.

    Returns
    -------
    int or None
        To within 5 %: the risk is looked at after each of the first 20 steps, then after every twentieth part more.
    torch.nn.Module
    """
    (x, y), model, order = _data(), copy.deepcopy(model), generator(shuffle)
    goal, sgd = _risk(model) / 2, torch.optim.SGD(model.parameters(), lr=learning_rate)
    n, step = len(x), 0
    while True:
        shuffled = torch.randperm(n, generator=order, device=device())
        for batch in shuffled[: n - n % batch_size].split(batch_size):
            _step(model, sgd, x[batch], y[batch])
            step += 1
            if step % max(1, step // 20) == 0 and (risk := _risk(model)) <= goal:
                return step, model
            if step >= most or not math.isfinite(risk):
                return None, model


def best_steps(model: nn.Module, batch_size: int, stream: str) -> dict[str, Any]:
    """Choose the learning rate by trial runs, and count the steps with other shuffles."""
    best, chosen = MOST_STEPS, LEARNING_RATES[0]
    for rate in reversed(LEARNING_RATES):  # large ones first, since they are quick to halve the risk, or to fail
        trials = []
        for k in range(TRIALS):  # a rate is given up when it can no longer be the best
            left = TRIALS * best - sum(trials)
            steps, _ = steps_to_halve(model, batch_size, rate, f"{stream}, rate {rate}, {k}", min(left, MOST_STEPS))
            if steps is None:
                break
            trials.append(steps)
        else:
            if sum(trials) < TRIALS * best:
                best, chosen = sum(trials) / TRIALS, rate
    runs = [steps_to_halve(model, batch_size, chosen, f"{stream}, run {k}")[0] for k in range(RUNS)]
    return {"learning_rate": chosen, "steps": runs}


def halving(seed: int) -> dict[str, Any]:
    """Return what halving the risk takes from each checkpoint, by batch size."""
    found = {}
    for epoch, model in checkpoints(seed).items():
        stream = f"halve {seed}, {epoch}"
        runs = {str(size): best_steps(model, size, f"{stream}, {size}") for size in BATCH_SIZES}
        largest = runs[str(BATCH_SIZES[0])]["learning_rate"]
        _, there = steps_to_halve(model, BATCH_SIZES[0], largest, f"{stream}, {BATCH_SIZES[0]}, run 0")
        weighed = curvature_scale(model, CURVED, f"{stream}, curvature")
        found[str(epoch)] = {
            "risk": _rounded(_risk(model)),
            "scale": _rounded(true_scale(model)),
            "curvature_scale": [_rounded(weighed.value), _rounded(weighed.stderr)],
            "scale_after": _rounded(true_scale(there)),
            "runs": runs,
        }
    return found


def examples_needed(products: torch.Tensor) -> tuple[float, float]:
    """Return the n at which a noise scale is just given, for gradients drawn with replacement.

    Parameters
    ----------
    products : torch.Tensor, shape (N, N)
        Of the gradients with each other.

    Returns
    -------
    clear : float
        ``|∇L|²`` is four standard errors above zero: its variance is ``4 ∇Lᵀ S ∇L / n + 2 tr(S²)/n²``.
    balanced : float
        The skewness of the error of tr S is 0.25; it falls as ``1/√n``.
    """
    along, signal = products.mean(0), products.mean().item()  # g_i · ∇L, (N,)
    centered = products - along - along[:, None] + signal
    first, second = 4 * (along - signal).square().mean().item(), 2 * centered.square().mean().item()
    aim = (signal / gradient_noise.STANDARD_ERRORS_ABOVE_ZERO) ** 2  # = first / n + second / n²
    clear = (first + math.sqrt(first**2 + 4 * aim * second)) / (2 * aim)
    lengths = centered.diagonal()
    skewness = ((lengths - lengths.mean()) / lengths.std(correction=0)).pow(3).mean().item()
    return clear, (skewness / gradient_noise.MOST_ASYMMETRY) ** 2


def samples(seed: int) -> dict[str, Any]:
    """Return how often samples of several sizes give a noise scale, and how often they are right."""
    found = {}
    for epoch, model in checkpoints(seed, SAMPLED_EPOCHS).items():
        gradients = flatten(per_sample_gradients(model, F.cross_entropy, *_data(), chunk_size=256))  # (N, P)
        products, scale = gradients @ gradients.T, true_scale(model)
        needed = examples_needed(products)
        tries = {}
        for multiple in MULTIPLES:
            n, stream = round(multiple * max(needed)), f"samples {seed}, {epoch}, {multiple}"
            tries[str(multiple)] = _tries(products, n, scale, stream)
        found[str(epoch)] = {"scale": _rounded(scale), "needed": [_rounded(n) for n in needed], "tries": tries}
    return found


def _tries(products: torch.Tensor, n: int, scale: float, stream: str) -> dict[str, int]:
    """Count what samples of n of the gradients with these products, shape (N, N), say of a known noise scale."""
    counts, source = {"given": 0, "right": 0, "covered": 0}, generator(stream)
    for _ in range(SAMPLES):
        drawn = torch.randint(len(products), (n,), generator=source, device=products.device)
        ratio = _ratio(products, drawn)
        try:
            estimate = ratio.estimate()
        except ValueError:
            low, high = ratio.interval(0.95)
            counts["covered"] += int(low <= scale <= high)
        else:
            counts["given"] += 1
            counts["right"] += int(abs(estimate.value - scale) < 2 * estimate.stderr)
    return counts


def _ratio(products: torch.Tensor, drawn: torch.Tensor) -> gradient_noise._Ratio:
    """Return what :func:`helpers.gradient_noise.gradient_noise_scale` makes of the gradients that were drawn.

    It needs them only through their products, which are at hand: no sample goes through the network again.
    """
    n, size = len(drawn), max(1, len(drawn) // gradient_noise.MOST_GROUPS)
    groups = drawn[: n // size * size].view(-1, size)  # (k, size)
    times = products.new_zeros(len(groups), len(products))  # how often each gradient is in each group
    times.scatter_add_(1, groups, torch.ones_like(groups, dtype=times.dtype))
    gram = times @ products @ times.T  # (k, k)
    centered = gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()
    trace_of_square = gradient_noise._trace_of_square(centered) / size**2
    whole = torch.bincount(drawn, minlength=len(products)).to(products.dtype)
    along = products @ whole / n  # (N,)
    squared_norm = (whole @ along).item() / n
    pairs = torch.stack([products.diagonal()[drawn], along[drawn]], dim=1)  # (n, 2)
    return gradient_noise._ratio_of(pairs, squared_norm, trace_of_square)


def stored() -> dict[str, Any]:
    """Return what ``make data`` stored."""
    return json.loads((files("helpers.data") / "gradient_noise.json").read_text(encoding="utf-8"))


@cache
def _data() -> tuple[torch.Tensor, torch.Tensor]:
    digits = datasets.digits()
    return digits.x_train, digits.y_train


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def _loss(model: nn.Module) -> torch.Tensor:
    x, y = _data()
    return F.cross_entropy(model(x), y)


def _risk(model: nn.Module) -> float:
    return training.per_sample_loss(model, *_data()).mean().item()


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


if __name__ == "__main__":
    results = {
        "scales": {name: [scales_in_training(name, seed) for seed in SEEDS] for name in OPTIMIZERS},
        "halving": [halving(seed) for seed in SEEDS],
        "samples": [samples(seed) for seed in SEEDS],
    }
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
