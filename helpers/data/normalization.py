"""What normalization does in training, over seeds and optimizers: the trainings that chapter 4 shows.

``make data`` runs them again, in a few minutes on one core, and writes ``normalization.json``:

- ``company``: accuracies of trained batch-norm networks in evaluation and in training mode, by optimizer and epochs;
- ``small``: what training with batches of 2, 4 and 8 gives, by batch size, norm, optimizer, rate and epochs;
- ``speed``: training losses of each epoch, in evaluation mode, by depth and start, norm, optimizer and rate;
- ``shift``: accuracies on shifted test images, by norm and optimizer.

Seeds are those named here whatever ``BOOK_SEED`` is, and all of it runs on the CPU in float32; accuracies
can differ by an image or two on another processor. Networks of one kind train together, as one network with as many
channels.
"""

import copy
import json
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from helpers.lab import datasets, models, training
from helpers.normalization import company, statistics_report

WIDTH, GROUPS = 64, 8
SEEDS = (0, 1, 2)
MANY_SEEDS = tuple(range(10))
OPTIMIZERS = {
    "SGD": lambda parameters, rate: torch.optim.SGD(parameters, lr=rate),
    "momentum": lambda parameters, rate: torch.optim.SGD(parameters, lr=rate, momentum=0.9),
    "Adam": lambda parameters, rate: torch.optim.Adam(parameters, lr=rate),
}
RATES = {"SGD": 0.1, "momentum": 0.05, "Adam": 0.002}
GRID = {
    "SGD": (0.05, 0.1, 0.2, 0.5, 1.0, 2.0),
    "momentum": (0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    "Adam": (0.001, 0.002, 0.005, 0.01, 0.02, 0.05),
}
NORMS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "batch": lambda: nn.BatchNorm1d(WIDTH),
    "layer": lambda: nn.LayerNorm(WIDTH),
    "group": lambda: nn.GroupNorm(GROUPS, WIDTH),
}
EPOCHS = {"company": (10, 30), "small": (5, 15), "shift": 15}
SMALL_BATCHES = (2, 4, 8)
RATE_PARTS = (1.0, 0.3, 0.1)  # of the rate that is scaled from that of m = 32
RENEWED_ON = (16, 32, 64, 128, 256, 512)
SHIFTED = ("none", "batch", "layer", "group")
NARROW = ("batch", "layer", "group")
# Hidden layers, whether they begin with He's variance, and for how many epochs each norm is trained.
STARTS = {
    "2 layers, default": (2, False, {"none": 15, "batch": 15, "layer": 15, "group": 15}),
    "8 layers, default": (8, False, {"none": 45, "batch": 15, "layer": 15, "group": 15}),
    "8 layers, He": (8, True, {"none": 15}),
}


class Run(NamedTuple):
    """One training: the optimizer's name, its learning rate, and the seed of weights and shuffles."""

    optimizer: str
    rate: float
    seed: int


def network(norm: str, seed: int, hidden: int = 2, he: bool = False) -> nn.Sequential:
    """Return an untrained digits network whose hidden layers are linear, a norm of `NORMS`, and ReLU."""
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in models.mlp((WIDTH,) * (hidden + 1) + (10,)):
            layers += [NORMS[norm](), layer] if isinstance(layer, nn.ReLU) else [layer]
            if he and isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def optimizer_of(run: Run, parameters: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
    return OPTIMIZERS[run.optimizer](parameters, run.rate)


def trained(
    networks: list[nn.Sequential], runs: Sequence[Run], *, batch_size: int, epochs: Sequence[int]
) -> Iterator[list[nn.Sequential]]:
    """Train networks of one kind, a run each, and yield them after each of these epochs.

    Shuffled epochs, of which an incomplete last batch is left out; the loss is the cross-entropy.
    """
    (x, y), together = _training_data(), _Stacked(networks)
    optimizers, first = [], 0
    for _, alike in groupby(runs, key=lambda run: run[:2]):  # with one optimizer and rate
        of_group = list(alike)
        optimizers.append(optimizer_of(of_group[0], together.of_networks(first, first + len(of_group))))
        first += len(of_group)
    orders = [torch.Generator().manual_seed(run.seed) for run in runs]
    for before, epoch in pairwise((0, *epochs)):
        for _ in range(epoch - before):
            shuffled = torch.stack([torch.randperm(len(x), generator=order) for order in orders], dim=1)  # (N, R)
            for batch in shuffled[: len(x) - len(x) % batch_size].split(batch_size):
                together.step(x[batch], y[batch])
                for optimizer in optimizers:
                    optimizer.step()
        yield together.apart()


class _Linear(nn.Module):
    """As many linear layers as there are networks, on their channels side by side."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))  # (R, out, in)
        self.bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in layers]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (m, R * in)
        split = x.unflatten(1, (len(self.weight), -1)).transpose(0, 1)  # (R, m, in)
        return torch.baddbmm(self.bias[:, None], split, self.weight.mT).transpose(0, 1).flatten(1)


class _Stacked:
    """Networks as one network: batch norm with all their channels, layer and group norm with all their groups."""

    def __init__(self, networks: list[nn.Sequential]) -> None:
        self.networks, count = networks, len(networks)
        layers = []
        for of_all in zip(*networks, strict=True):
            first = of_all[0]
            if isinstance(first, nn.Linear):
                layers.append(_Linear(of_all))
            elif isinstance(first, nn.BatchNorm1d):
                layers.append(nn.BatchNorm1d(count * WIDTH))
            elif isinstance(first, nn.LayerNorm | nn.GroupNorm):
                groups = first.num_groups if isinstance(first, nn.GroupNorm) else 1
                layers.append(nn.GroupNorm(count * groups, count * WIDTH))
            else:
                layers.append(first)
        self.whole = nn.Sequential(*layers)
        for parameter in self.whole.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def of_networks(self, start: int, end: int) -> list[nn.Parameter]:
        """Return the parameters of some networks, which share memory with those of all, gradients too."""
        found = []
        for parameter in self.whole.parameters():
            part = nn.Parameter(self._part(parameter.detach(), slice(start, end)))
            part.grad = self._part(parameter.grad, slice(start, end))
            found.append(part)
        return found

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Compute the gradients of all networks; x has the shape (m, R, 64) and y (m, R)."""
        for parameter in self.whole.parameters():
            parameter.grad.zero_()
        logits = self.whole(x.flatten(1)).unflatten(1, (len(self.networks), 10))
        F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").div(len(x)).backward()

    @torch.no_grad()
    def apart(self) -> list[nn.Sequential]:
        """Return the networks, copied, as they are now."""
        found = copy.deepcopy(self.networks)
        for k, one in enumerate(found):
            for layer, whole in zip(one, self.whole, strict=True):
                of_all = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
                for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
                    tensor.copy_(of_all[name] if tensor.ndim == 0 else self._part(of_all[name], k))
        return found

    def _part(self, tensor: torch.Tensor, which: int | slice) -> torch.Tensor:
        if len(tensor) == len(self.networks):  # of linear layers
            return tensor[which]
        return tensor.unflatten(0, (len(self.networks), -1))[which]


# What is measured


def accuracy_in_batches(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, order: torch.Tensor, batch_size: int
) -> float:
    """Return the share of right answers in training mode, in batches of this order; the model is left alone."""
    judging, right = copy.deepcopy(model).train(), []
    with torch.no_grad():
        for batch in order.split(batch_size):
            right.append(judging(x[batch]).argmax(1) == y[batch])
    return torch.cat(right).double().mean().item()


def accuracy_in_pure_batches(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the share of right answers in training mode, if each class makes two batches of its own."""
    classes = [(y == label).nonzero().flatten() for label in range(10)]
    right = [accuracy_in_batches(model, x, y, rows, (len(rows) + 1) // 2) * len(rows) for rows in classes]
    return sum(right) / len(y)


def with_statistics_of(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Return a copy with the statistics of these inputs, all in one batch, by ``torch.optim.swa_utils.update_bn``."""
    renewed = copy.deepcopy(model)
    update_bn([x], renewed)
    return renewed.eval()


def in_company(model: nn.Module, seed: int) -> dict[str, float]:
    """Return accuracies on the test images, and the share of them whose label changes in 20 companies."""
    digits = _digits()
    x, y, draws = digits.x_test, digits.y_test, torch.Generator().manual_seed(seed)
    shuffled, by_class = torch.randperm(len(x), generator=draws), torch.argsort(y, stable=True)
    found = {
        "evaluation": training.accuracy(model, x, y),
        "shuffled": accuracy_in_batches(model, x, y, shuffled, 32),
        "sorted": accuracy_in_batches(model, x, y, by_class, 32),
        "sorted, 128": accuracy_in_batches(model, x, y, by_class, 128),
        "one class": accuracy_in_pure_batches(model, x, y),
        "shuffled, 2": accuracy_in_batches(model, x, y, shuffled, 2),
    }
    for batch_size in (32, 8):
        judged = company(model, x, digits.x_train, batch_size=batch_size, generator=draws, examples_per_call=4096)
        found[f"wavering, {batch_size}"] = float(judged.wavering.value)
        found[f"differing, {batch_size}"] = float(judged.differing.value)
    return _rounded(found)


def of_small_batches(model: nn.Module, norm: str, batch_size: int, seed: int) -> dict[str, Any]:
    """Return accuracies of a network that was trained with small batches, and how its statistics are off."""
    digits = _digits()
    found = {"evaluation": training.accuracy(model, digits.x_test, digits.y_test)}
    if norm == "batch":
        x, y = _training_data()
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[
            : len(x) // batch_size * batch_size
        ]
        found["training mode"] = accuracy_in_batches(model, x, y, order, batch_size)
        exact = with_statistics_of(model, x)
        found["exact statistics"] = training.accuracy(exact, digits.x_test, digits.y_test)
        first, second = statistics_report(model, x).layers
        found |= {"ratio, layer 1": float(first.ratio.value), "ratio, layer 2": float(second.ratio.value)}
        found |= second_layer(model, batch_size, seed)
    return _rounded(found)


@torch.no_grad()
def second_layer(model: nn.Module, batch_size: int, seed: int, shuffles: int = 4) -> dict[str, float]:
    """Compare what the second batch norm meets in training mode: s² with the variance, and that with evaluation's.

    Both are geometric means over units.
    """
    (x, _), draws = _training_data(), torch.Generator().manual_seed(seed)
    training_mode, evaluation = copy.deepcopy(model).train(), copy.deepcopy(model).eval()
    met: list[torch.Tensor] = []
    for network in (training_mode, evaluation):
        second = [layer for layer in network if isinstance(layer, nn.BatchNorm1d)][1]
        second.register_forward_pre_hook(lambda _, inputs: met.append(inputs[0]))
    evaluation(x)
    variance = met.pop().var(0)  # (units,)
    for _ in range(shuffles):
        for batch in torch.randperm(len(x), generator=draws)[: len(x) // batch_size * batch_size].split(batch_size):
            training_mode(x[batch])
    batches = torch.stack(met)  # (n, m, units)
    total = batches.flatten(0, 1).var(0)
    return {
        "mean s² / training mode": (batches.var(1).mean(0) / total).log().mean().exp().item(),
        "training mode / evaluation": (total / variance).log().mean().exp().item(),
    }


def shifted(x: torch.Tensor) -> torch.Tensor:
    """Halve the contrast and add a half to the brightness."""
    return 0.5 * x + 0.5


def of_shift(model: nn.Module, norm: str, seed: int) -> dict[str, float]:
    """Return accuracies on clean and shifted test images, and with batch statistics of the latter."""
    digits = _digits()
    x, y, moved = digits.x_test, digits.y_test, shifted(digits.x_test)
    found = {"clean": training.accuracy(model, x, y), "shifted": training.accuracy(model, moved, y)}
    if norm == "batch":
        clean, renewed = with_statistics_of(model, x), with_statistics_of(model, moved)
        found["clean, own statistics"] = training.accuracy(clean, x, y)
        found["shifted, own statistics"] = training.accuracy(renewed, moved, y)
        found["changed labels"] = (clean(x).argmax(1) != renewed(moved).argmax(1)).double().mean().item()
        others, of_others = _training_data()
        others = shifted(others)[torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))]
        for n in RENEWED_ON:
            found[f"renewed on {n}"] = training.accuracy(with_statistics_of(model, others[:n]), moved, y)
        of_two = shifted(_training_data()[0])[of_others < 2]
        found["renewed on two classes"] = training.accuracy(with_statistics_of(model, of_two), moved, y)
    return _rounded(found)


# The trainings


def company_runs(optimizer: str, epochs: Sequence[int] = EPOCHS["company"]) -> dict[str, list[dict[str, float]]]:
    runs = [Run(optimizer, RATES[optimizer], seed) for seed in SEEDS]
    stages = trained([network("batch", seed) for seed in SEEDS], runs, batch_size=32, epochs=epochs)
    return {
        str(epoch): [in_company(model, seed) for model, seed in zip(stage, SEEDS, strict=True)]
        for epoch, stage in zip(epochs, stages, strict=True)
    }


def small_runs(batch_size: int, norm: str, epochs: Sequence[int] = EPOCHS["small"]) -> dict[str, Any]:
    """Rates are parts of those of m = 32 times m/32, for Adam its root. Return runs by optimizer, part and epochs."""
    factor = {"SGD": batch_size / 32, "momentum": batch_size / 32, "Adam": (batch_size / 32) ** 0.5}
    keys = [(name, part, seed) for name in OPTIMIZERS for part in RATE_PARTS for seed in SEEDS]
    runs = [Run(name, RATES[name] * factor[name] * part, seed) for name, part, seed in keys]
    networks = [network(norm, run.seed) for run in runs]
    found: dict[str, Any] = {name: {str(part): {} for part in RATE_PARTS} for name in OPTIMIZERS}
    for epoch, stage in zip(epochs, trained(networks, runs, batch_size=batch_size, epochs=epochs), strict=True):
        for (name, part, seed), model in zip(keys, stage, strict=True):
            measured = of_small_batches(model, norm, batch_size, seed)
            found[name][str(part)].setdefault(str(epoch), []).append(measured)
    return found


def speed_runs(start: str, norm: str, epochs: int | None = None) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return for each optimizer and rate, and each seed, the training loss after each epoch and the test accuracy."""
    hidden, he, epochs_of = STARTS[start]
    runs = [Run(name, rate, seed) for name, rates in GRID.items() for rate in rates for seed in SEEDS]
    networks = [network(norm, run.seed, hidden, he) for run in runs]
    losses: list[list[float]] = [[] for _ in runs]
    stage = networks
    for stage in trained(networks, runs, batch_size=64, epochs=range(1, (epochs or epochs_of[norm]) + 1)):
        for found, model in zip(losses, stage, strict=True):
            found.append(round(training.per_sample_loss(model, *_training_data()).mean().item(), 3))
    found = {name: {str(rate): [] for rate in rates} for name, rates in GRID.items()}
    for run, of_run, model in zip(runs, losses, stage, strict=True):
        test = round(training.accuracy(model, _digits().x_test, _digits().y_test), 4)
        found[run.optimizer][str(run.rate)].append({"losses": of_run, "test": test})
    return found


def shift_runs(norm: str, epochs: int = EPOCHS["shift"]) -> dict[str, list[dict[str, float]]]:
    runs = [Run(name, RATES[name], seed) for name in OPTIMIZERS for seed in MANY_SEEDS]
    networks = [network(norm, run.seed) for run in runs]
    [stage] = trained(networks, runs, batch_size=64, epochs=[epochs])
    found: dict[str, list[dict[str, float]]] = {name: [] for name in OPTIMIZERS}
    for run, model in zip(runs, stage, strict=True):
        found[run.optimizer].append(of_shift(model, norm, run.seed))
    return found


def epochs_to(losses: Sequence[float], goal: float = 0.1) -> int | None:
    """Return the first epoch after which the training loss, in evaluation mode, is below the goal; None if never."""
    return next((epoch for epoch, loss in enumerate(losses, start=1) if loss < goal), None)


def stored() -> dict[str, Any]:
    """Return what ``make data`` stored."""
    return json.loads((files("helpers.data") / "normalization.json").read_text(encoding="utf-8"))


def _digits() -> datasets.Split:
    return datasets.Split(*(part.cpu() for part in datasets.digits(torch.float32)))


def _training_data() -> tuple[torch.Tensor, torch.Tensor]:
    return _digits()[:2]


def _rounded(found: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in found.items()}


if __name__ == "__main__":
    results = {
        "company": {name: company_runs(name) for name in tqdm(OPTIMIZERS)},
        "small": {str(size): {norm: small_runs(size, norm) for norm in tqdm(NARROW)} for size in SMALL_BATCHES},
        "speed": {start: {norm: speed_runs(start, norm) for norm in tqdm(STARTS[start][2])} for start in STARTS},
        "shift": {norm: shift_runs(norm) for norm in tqdm(SHIFTED)},
    }
    path = Path(__file__).with_suffix(".json")
    text = json.dumps(results, indent=1, ensure_ascii=False)
    text = re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda inner: " ".join(inner.group().split()), text)  # a line for each run
    path.write_text(text + "\n", encoding="utf-8")
