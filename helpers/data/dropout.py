"""What dropout does to digits networks under three optimizers: the trainings that chapter 5 shows.

``make data`` runs them again and writes ``dropout.json``: for each kind of network, optimizer, probability of a drop
and number of epochs, and three seeds, what :func:`measured`, :func:`measured_shift` and :func:`measured_outputs` say.
It takes a quarter of an hour on one core. Seeds are those named here whatever ``BOOK_SEED`` is, and all of it runs on
the CPU, so that what is stored can be computed again anywhere.
"""

import json
from collections.abc import Callable, Iterator
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from helpers.dropout import (
    arithmetic_mean,
    geometric_mean,
    linear_variance_shift,
    masked_losses,
    masked_outputs,
    remove_units,
)
from helpers.lab import datasets, training

SEEDS = (0, 1, 2)
EPOCHS = (20, 60, 180)  # a network is looked at after each of them
DROPPED = (0.0, 0.2, 0.5, 0.8)
WIDTHS = (64, 64, 64, 10)
NORMALIZED_EPOCHS = (20, 60)
NORMALIZED_DROPPED = (0.2, 0.5, 0.7)
NORMALIZED_WIDTHS = (64, 64, 64, 64, 10)
OPTIMIZERS = {  # and batch size
    "SGD": (lambda parameters: torch.optim.SGD(parameters, lr=0.1), 64),
    "momentum": (lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9), 32),
    "Adam": (lambda parameters: torch.optim.Adam(parameters, lr=0.002), 64),
}

SHARE_DROPPED = (0.0, 0.5)  # of the networks whose outputs are looked at once more
OTHER_STEPS = {  # for p = 0.8 only: is it momentum, or the size of a step?
    "SGD, rate 0.5": (lambda parameters: torch.optim.SGD(parameters, lr=0.5), 32),
    "momentum, rate 0.01": (lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9), 32),
    "momentum, batches of 128": (lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9), 128),
}

Build = Callable[[float], nn.Sequential]


def network(p: float) -> nn.Sequential:
    """Return an untrained digits network with dropout behind each of its two hidden layers."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(WIDTHS):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU(), nn.Dropout(p)]
    return nn.Sequential(*layers[:-2]).double()


def normalized_network(p: float) -> nn.Sequential:
    """Return one whose three hidden layers normalize by the batch, with dropout behind each of them."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(NORMALIZED_WIDTHS):
        layers += [nn.Linear(fan_in, fan_out), nn.BatchNorm1d(fan_out), nn.ReLU(), nn.Dropout(p)]
    return nn.Sequential(*layers[:-3]).double()


def trained(
    build: Build, p: float, optimizer: str, seed: int, epochs: tuple[int, ...]
) -> Iterator[tuple[int, nn.Sequential]]:
    """Train on the digits, and hand over the network with the number of epochs after some of them."""
    digits = datasets.digits()
    x, y = digits.x_train.cpu(), digits.y_train.cpu()
    make, batch_size = (OPTIMIZERS | OTHER_STEPS)[optimizer]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(p)
        steps, order = make(model.parameters()), torch.Generator().manual_seed(seed)
        for epoch in range(1, max(epochs) + 1):
            for batch in torch.randperm(len(x), generator=order).split(batch_size):
                loss = F.cross_entropy(model(x[batch]), y[batch])
                steps.zero_grad()
                loss.backward()
                steps.step()
            if epoch in epochs:
                yield epoch, model


def measured(model: nn.Sequential, seed: int) -> dict[str, float]:
    """Return losses in nats, accuracies and overconfidence of a network, with and without masks.

    ``removed`` is its accuracy without half the units of both hidden layers. ``noise`` is what masks of p = 1/2 before
    the last layer add to the variance of the logits, over their variance over the training images.
    """
    digits, source = datasets.digits(), torch.Generator().manual_seed(seed)
    x, y = digits.x_train.cpu(), digits.y_train.cpu()
    x_test, y_test = digits.x_test.cpu(), digits.y_test.cpu()
    was_training = model.training
    model.eval()
    found = _without_masks(model, x, y, x_test, y_test)
    hidden = model[:5](x).detach()
    if model[2].p > 0 and hidden.any():  # dead units do not change under a mask
        on_train = masked_losses(model, F.cross_entropy, x, y, masks=10, generator=source)
        on_test = masked_losses(model, F.cross_entropy, x_test, y_test, masks=100, generator=source)
        found |= {
            "train_masked": on_train.one_mask.loss.value,
            "test_masked": on_test.one_mask.loss.value,
            "geometric": on_test.geometric.loss.value,
            "arithmetic": on_test.arithmetic.loss.value,
            "accuracy_masked": on_test.one_mask.accuracy.value,
            "accuracy_arithmetic": on_test.arithmetic.accuracy.value,
            "overconfidence_arithmetic": on_test.arithmetic.overconfidence.value,
        }
    removal = remove_units(model, x_test, y_test, layers=["1", "4"], generator=source)
    found["removed"] = removal.mean.value
    of_masks = hidden.square().mean(0) @ model[6].weight.detach().square().T  # (classes,)
    found["noise"] = of_masks.sum() / model[6](hidden).detach().var(0).sum()
    model.train(was_training)
    return {name: round(float(value), 4) for name, value in found.items()}


@torch.no_grad()
def _without_masks(
    model: nn.Sequential, x: torch.Tensor, y: torch.Tensor, x_test: torch.Tensor, y_test: torch.Tensor
) -> dict[str, float]:
    on_train = training.per_sample_loss(model, x, y).mean().item()
    on_test = training.per_sample_loss(model, x_test, y_test).mean().item()
    accuracy = training.accuracy(model, x_test, y_test)
    confidence = model(x_test).softmax(1).max(1).values.mean().item()
    losses = {"train_masked": on_train, "train_whole": on_train, "test_masked": on_test, "test_whole": on_test}
    accuracies = {"accuracy": accuracy, "accuracy_masked": accuracy, "accuracy_arithmetic": accuracy}
    over = {"overconfidence": confidence - accuracy, "overconfidence_arithmetic": confidence - accuracy}
    return losses | {"geometric": on_test, "arithmetic": on_test} | accuracies | over


@torch.no_grad()
def measured_outputs(model: nn.Sequential, seed: int) -> dict[str, float]:
    """Return how far means of 100 masked networks are from the whole one, and how many units share the work.

    ``to_geometric`` and ``to_arithmetic`` are mean Kullback-Leibler divergences in nats from the predictions without
    masks, over the test images. ``units`` is ``(Σ_j v_j²)² / Σ_j v_j⁴``, for ``v_j = w_kj x_j`` of the label k and of
    the units x_j before the last layer, the mean over test images: n if n units add equally much to its logit.
    """
    digits, source = datasets.digits(), torch.Generator().manual_seed(seed)
    x, y = digits.x_test.cpu(), digits.y_test.cpu()
    was_training = model.training
    model.eval()
    found = {}
    if model[2].p > 0:
        whole = model(x).log_softmax(1)
        masked = masked_outputs(model, x, masks=100, generator=source).log_softmax(2)
        for name, mean in (("geometric", geometric_mean(masked)), ("arithmetic", arithmetic_mean(masked))):
            found[f"to_{name}"] = F.kl_div(mean, whole, log_target=True, reduction="batchmean")
    squares = (model[6].weight[y] * model[:5](x)).square()
    found["units"] = (squares.sum(1) ** 2 / squares.square().sum(1)).mean()
    model.train(was_training)
    return {name: round(float(value), 4) for name, value in found.items()}


@torch.no_grad()
def measured_shift(model: nn.Sequential, seed: int) -> dict[str, float]:
    """Return variances in training over those in testing, medians over units, beside what theory says.

    For the second and third layer: ``measured`` with masks and all training images as one batch, ``running`` as batch
    normalization has stored it, ``predicted``. Then losses and accuracies on test images with the stored statistics,
    and ``again`` with those of the training images without masks.
    """
    digits = datasets.digits()
    x, x_test = digits.x_train.cpu(), digits.x_test.cpu()
    y_test = digits.y_test.cpu()
    was_training = model.training
    model.eval()
    found = {}
    with torch.random.fork_rng(devices=[]):
        copy = _copied(model).train()
        torch.manual_seed(seed)
        in_training = [copy[:5](x), copy[:9](x)]
    for layer, linear, noisy in ((2, 4, in_training[0]), (3, 8, in_training[1])):
        inputs = model[:linear](x)
        variance = model[linear](inputs).var(0)
        found[f"measured_{layer}"] = (noisy.var(0) / variance).median()
        found[f"running_{layer}"] = (model[linear + 1].running_var / variance).median()
        ratio = linear_variance_shift(model[linear].weight, inputs.square().mean(0), variance, model[3].p)
        found[f"predicted_{layer}"] = ratio.median()
    found["loss"] = training.per_sample_loss(model, x_test, y_test).mean()
    found["accuracy"] = training.accuracy(model, x_test, y_test)
    again = with_statistics_of(model, x)
    found["loss_again"] = training.per_sample_loss(again, x_test, y_test).mean()
    found["accuracy_again"] = training.accuracy(again, x_test, y_test)
    model.train(was_training)
    return {name: round(float(value), 4) for name, value in found.items()}


@torch.no_grad()
def with_statistics_of(model: nn.Sequential, x: torch.Tensor) -> nn.Sequential:
    """Return a copy whose batch normalization has the statistics of these inputs, without masks."""
    copy = _copied(model).eval()
    for layer in copy:
        if isinstance(layer, nn.BatchNorm1d):
            layer.reset_running_stats()
            layer.momentum = None  # the plain mean over batches, here of one batch
            layer.train()
    copy(x)
    return copy.eval()


def _copied(model: nn.Sequential) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        copy = normalized_network(model[3].p)
    copy.load_state_dict(model.state_dict())
    return copy


Found = dict[str, list[float]]  # what was measured → one value a seed


def stored() -> dict[str, dict[str, dict[str, dict[str, Found]]]]:
    """Return what ``make data`` stored: kind → optimizer → p → epochs → measurement → seeds.

    Kinds are "plain" and "normalized" networks, the "outputs" of plain ones, and "other steps" for p = 0.8.
    """
    return json.loads((files("helpers.data") / "dropout.json").read_text(encoding="utf-8"))


def _runs(build: Build, of: Callable, p: float, optimizer: str, epochs: tuple[int, ...]) -> dict[str, Found]:
    seeds = [{e: of(model, seed) for e, model in trained(build, p, optimizer, seed, epochs)} for seed in SEEDS]
    return _by_epoch(seeds)


def _by_epoch(seeds: list[dict[int, dict[str, float]]]) -> dict[str, Found]:
    return {str(e): {name: [found[e][name] for found in seeds] for name in seeds[0][e]} for e in seeds[0]}


def _write(results: dict) -> None:
    """A line for each optimizer, p and number of epochs, so that a change can be read."""
    kinds = []
    for kind, of_kind in results.items():
        optimizers = []
        for optimizer, of_optimizer in of_kind.items():
            dropped = [
                f'   "{p}": {{\n'
                + ",\n".join(f'    "{e}": {json.dumps(found)}' for e, found in of_p.items())
                + "\n   }"
                for p, of_p in of_optimizer.items()
            ]
            optimizers.append(f'  "{optimizer}": {{\n' + ",\n".join(dropped) + "\n  }")
        kinds.append(f' "{kind}": {{\n' + ",\n".join(optimizers) + "\n }")
    Path(__file__).with_suffix(".json").write_text("{\n" + ",\n".join(kinds) + "\n}\n", encoding="utf-8")


KINDS = {
    "plain": (network, measured, OPTIMIZERS, DROPPED, EPOCHS),
    "normalized": (normalized_network, measured_shift, OPTIMIZERS, NORMALIZED_DROPPED, NORMALIZED_EPOCHS),
    "outputs": (network, measured_outputs, OPTIMIZERS, SHARE_DROPPED, (60, 180)),
    "other steps": (network, measured, OTHER_STEPS, (0.8,), (60,)),
}


def _trained_and_measured(kind: str) -> dict[str, dict[str, dict[str, Found]]]:
    build, of, optimizers, dropped, epochs = KINDS[kind]
    return {
        optimizer: {str(p): _runs(build, of, p, optimizer, epochs) for p in dropped}
        for optimizer in tqdm(optimizers, desc=kind)
    }


if __name__ == "__main__":
    _write({kind: _trained_and_measured(kind) for kind in KINDS})
