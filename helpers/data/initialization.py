"""How deep networks learn, under which start and which optimizer: the trainings that chapter 3 shows.

``make data`` runs them again, in about ten minutes on one core, and writes ``initialization.json``: for each start and
optimizer, and three seeds, the mean training loss of each epoch in nats. A run ends with the first epoch whose loss is
not finite, which is not stored.
"""

import json
import math
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from helpers.initialization import Scales, edge_of_chaos
from helpers.lab import datasets, models
from helpers.lab.runtime import device, generator, seeded

EPOCHS, BATCH_SIZE, WIDTH = 18, 64, 64
SEEDS = (0, 1, 2)
RELU_STARTS = {"1/n": 1.0, "2/n": 2.0, "4/n": 4.0, "default": None}  # thirty hidden layers: the weight scale
TANH_STARTS = {  # forty hidden layers
    "ordered": Scales(0.9, 0.1),
    "edge": edge_of_chaos(torch.tanh, 0.8),
    "chaotic": Scales(3.5, 0.1),
}
SGD, ADAM = torch.optim.SGD, torch.optim.Adam
OPTIMIZERS = {
    "SGD 0.006": lambda parameters: SGD(parameters, lr=0.006),
    "SGD 0.06": lambda parameters: SGD(parameters, lr=0.06),
    "momentum 0.001": lambda parameters: SGD(parameters, lr=0.001, momentum=0.9),
    "momentum 0.006": lambda parameters: SGD(parameters, lr=0.006, momentum=0.9),
    "Adam 0.001": lambda parameters: ADAM(parameters, lr=0.001),
    "Adam 0.0001": lambda parameters: ADAM(parameters, lr=0.0001),
    "Adam 0.001, ε = 1e-20": lambda parameters: ADAM(parameters, lr=0.001, eps=1e-20),
}


def network(start: str, seed: int) -> nn.Sequential:
    """Return an untrained digits network: thirty ReLU layers, or forty tanh layers, of 64 units, in float64."""
    with seeded(f"{start}, seed {seed}"):
        if start in TANH_STARTS:
            return _tanh_network(TANH_STARTS[start])
        model = models.mlp((WIDTH,) * 31 + (10,)).to(device(), torch.float64)
        weight_scale = RELU_STARTS[start]
        if weight_scale is not None:
            for layer in model[::2]:
                nn.init.normal_(layer.weight, std=math.sqrt(weight_scale / layer.in_features))
                nn.init.zeros_(layer.bias)
        return model


def _tanh_network(scales: Scales) -> nn.Sequential:
    layers = []
    for fan_in, fan_out in pairwise((WIDTH,) * 41 + (10,)):
        layer = nn.Linear(fan_in, fan_out, dtype=torch.float64, device=device())
        nn.init.normal_(layer.weight, std=math.sqrt(scales.weight_scale / fan_in))
        nn.init.normal_(layer.bias, std=math.sqrt(scales.bias_variance))
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def losses(start: str, optimizer: str, seed: int, epochs: int = EPOCHS) -> list[float]:
    """Train on the digits and return the mean loss of each epoch, as far as it is finite."""
    digits, model = datasets.digits(), network(start, seed)
    steps, order = OPTIMIZERS[optimizer](model.parameters()), generator(f"{start}, order {seed}")
    found = []
    for _ in range(epochs):
        of_epoch = []
        for batch in torch.randperm(len(digits.x_train), generator=order, device=device()).split(BATCH_SIZE):
            loss = F.cross_entropy(model(digits.x_train[batch]), digits.y_train[batch])
            steps.zero_grad()
            loss.backward()
            steps.step()
            of_epoch.append(loss.detach())
        mean = torch.stack(of_epoch).mean().item()
        if not math.isfinite(mean):
            break
        found.append(round(mean, 3))
    return found


def stored() -> dict[str, dict[str, list[list[float]]]]:
    """Return what ``make data`` stored: losses of each epoch by start, optimizer and seed."""
    return json.loads((files("helpers.data") / "initialization.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    results = {
        start: {optimizer: [losses(start, optimizer, seed) for seed in SEEDS] for optimizer in OPTIMIZERS}
        for start in RELU_STARTS | TANH_STARTS
    }
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
