"""How deep networks learn, under which start and which optimizer: the trainings that chapter 3 shows.

``make data`` runs them again and writes ``initialization.json``: for each start and optimizer, and three seeds, the
mean training loss of each epoch in nats. A run ends with the first epoch whose loss is not finite, which is not stored.
It takes twenty minutes on one core. Seeds are those named here whatever ``BOOK_SEED`` is, and all of it runs on
the CPU, so that what is stored can be computed again anywhere.
"""

import json
import math
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from helpers.initialization import Scales, edge_of_chaos
from helpers.lab import datasets, models

EPOCHS, BATCH_SIZE, WIDTH = 18, 64, 64
SEEDS = (0, 1, 2)
RELU_STARTS = {"1/n": 1.0, "2/n": 2.0, "4/n": 4.0, "default": None}  # thirty hidden layers: the weight scale
TANH_STARTS = {  # forty hidden layers
    "ordered": Scales(0.9, 0.1),
    "edge": edge_of_chaos(torch.tanh, 0.8),
    "chaotic": Scales(3.5, 0.1),
    "Xavier": Scales(1.0, 0.0),  # the other end of the edge, at variance 0
}
OPTIMIZERS = {
    "SGD 0.006": lambda parameters: torch.optim.SGD(parameters, lr=0.006),
    "SGD 0.06": lambda parameters: torch.optim.SGD(parameters, lr=0.06),
    "momentum 0.001": lambda parameters: torch.optim.SGD(parameters, lr=0.001, momentum=0.9),
    "momentum 0.006": lambda parameters: torch.optim.SGD(parameters, lr=0.006, momentum=0.9),
    "Adam 0.001": lambda parameters: torch.optim.Adam(parameters, lr=0.001),
    "Adam 0.0001": lambda parameters: torch.optim.Adam(parameters, lr=0.0001),
}
WITHOUT_FLOOR = {"Adam 0.001, ε = 1e-20": lambda parameters: torch.optim.Adam(parameters, lr=0.001, eps=1e-20)}
SMALL_LOSS = {"Adam 0.001, loss / 2^15": OPTIMIZERS["Adam 0.001"]}
CONTROLS = {"default": WITHOUT_FLOOR, "1/n": WITHOUT_FLOOR, "2/n": SMALL_LOSS}  # of one start alone


def network(start: str, seed: int) -> nn.Sequential:
    """Return an untrained digits network in float64 on the CPU: thirty ReLU layers, or forty tanh layers, of 64 units.

    Parameters
    ----------
    start : str
        Of `RELU_STARTS` or `TANH_STARTS`.
    seed : int
        Draws its weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _tanh_network(TANH_STARTS[start]) if start in TANH_STARTS else _relu_network(RELU_STARTS[start])


def _relu_network(weight_scale: float | None) -> nn.Sequential:
    model = models.mlp((WIDTH,) * 31 + (10,)).double()
    if weight_scale is not None:
        for layer in model[::2]:
            nn.init.normal_(layer.weight, std=math.sqrt(weight_scale / layer.in_features))
            nn.init.zeros_(layer.bias)
    return model


def _tanh_network(scales: Scales) -> nn.Sequential:
    layers = []
    for fan_in, fan_out in pairwise((WIDTH,) * 41 + (10,)):
        layer = nn.Linear(fan_in, fan_out)
        nn.init.normal_(layer.weight, std=math.sqrt(scales.weight_scale / fan_in))
        nn.init.normal_(layer.bias, std=math.sqrt(scales.bias_variance))
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def optimizers_of(start: str) -> dict:
    """Return the optimizers with which a start is trained."""
    return OPTIMIZERS | CONTROLS.get(start, {})


def losses(start: str, optimizer: str, seed: int, epochs: int = EPOCHS) -> list[float]:
    """Train on the digits and return the mean loss of each epoch, to two decimals, as long as it is finite."""
    digits, model = datasets.digits(), network(start, seed)
    x, y = digits.x_train.cpu(), digits.y_train.cpu()
    steps, order = optimizers_of(start)[optimizer](model.parameters()), torch.Generator().manual_seed(seed)
    factor = 2.0**-15 if optimizer in SMALL_LOSS else 1.0
    found = []
    for _ in range(epochs):
        of_epoch = []
        for batch in torch.randperm(len(x), generator=order).split(BATCH_SIZE):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            steps.zero_grad()
            (factor * loss).backward()
            steps.step()
            of_epoch.append(loss.detach())
        mean = torch.stack(of_epoch).mean().item()
        if not math.isfinite(mean):
            break
        found.append(round(mean, 2))
    return found


def stored() -> dict[str, dict[str, list[list[float]]]]:
    """Return what ``make data`` stored: losses of each epoch by start, optimizer and seed."""
    return json.loads((files("helpers.data") / "initialization.json").read_text(encoding="utf-8"))


def _write(results: dict) -> None:
    """A line for each start and optimizer, so that a change can be read."""
    starts = []
    for start, of_start in results.items():
        lines = [f"  {json.dumps(name, ensure_ascii=False)}: {json.dumps(runs)}" for name, runs in of_start.items()]
        starts.append(f' "{start}": {{\n' + ",\n".join(lines) + "\n }")
    text = "{\n" + ",\n".join(starts) + "\n}\n"
    Path(__file__).with_suffix(".json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    _write(
        {
            start: {optimizer: [losses(start, optimizer, seed) for seed in SEEDS] for optimizer in optimizers_of(start)}
            for start in tqdm(RELU_STARTS | TANH_STARTS)
        }
    )
