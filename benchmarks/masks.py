"""Many masks in batched calls against a loop of forward passes, and all masks listed against a loop over them."""

import itertools
import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.timing import Race, require_equal
from helpers.dropout import all_masks, arithmetic_mean, mask_probabilities, masked_losses, masked_outputs
from helpers.lab import generator, seeded

EXAMPLES, MASKS = 32, 100
WIDTH, CLASSES, P = 64, 10, 0.4
UNITS = 10  # of the softmax regression whose masks are listed

Drop = Callable[[int], nn.Module]  # a layer behind so many units
SHAPES = {"perceptron": (WIDTH,), "convolutional": (1, 8, 8)}


def races() -> list[Race]:
    return [drawn("perceptron", at_least=1), drawn("convolutional", at_least=1), compared(), listed()]


def drawn(case: str, *, at_least: float) -> Race:
    source = generator(f"benchmark masks {case}")
    x = torch.randn((EXAMPLES, *SHAPES[case]), generator=source, device=source.device)
    masks = {units: sampled(units, source) for units in (WIDTH, 128)}
    found, wanted = (network(case, lambda units: InOrder(masks[units])) for _ in range(2))  # two readers of each list
    require_equal(masked_outputs(found, x, masks=MASKS, generator=source), one_by_one(wanted, x))
    model = network(case, lambda units: nn.Dropout(P))
    return Race(
        "many masks",
        f"masked_outputs, {case}",
        lambda: masked_outputs(model, x, masks=MASKS, generator=source),
        {"loop": lambda: one_by_one(model, x)},
        at_least=at_least,
    )


def compared() -> Race:
    """`masked_losses`, which jackknifes two means over masks, against the loss of the plain mean alone."""
    source = generator("benchmark masked losses")
    x = torch.randn((EXAMPLES, WIDTH), generator=source, device=source.device)
    y = torch.randint(CLASSES, (EXAMPLES,), generator=source, device=source.device)
    model = network("perceptron", lambda units: nn.Dropout(P))
    masks = sampled(WIDTH, source)
    found, wanted = (network("perceptron", lambda units: InOrder(masks)) for _ in range(2))
    one_mask = masked_losses(found, F.cross_entropy, x, y, masks=MASKS, generator=source).one_mask.loss.value
    chances = one_by_one(wanted, x).log_softmax(-1)
    require_equal(float(one_mask), F.nll_loss(chances.flatten(0, 1), y.repeat(MASKS)).item())
    return Race(
        "losses of masks",
        "masked_losses, perceptron",
        lambda: masked_losses(model, F.cross_entropy, x, y, masks=MASKS, generator=source),
        {"loop": lambda: F.nll_loss(arithmetic_mean(one_by_one(model, x).log_softmax(-1)), y)},
        at_most=2,
    )


def listed() -> Race:
    source = generator("benchmark list of masks")
    x = torch.randn((EXAMPLES, UNITS), generator=source, device=source.device)
    layer = network("softmax regression", nn.Identity)
    require_equal(mean_over_list(layer, x), mean_in_a_loop(layer, x))
    return Race(
        "all masks",
        f"all_masks, {UNITS} units",
        lambda: mean_over_list(layer, x),
        {"loop": lambda: mean_in_a_loop(layer, x)},
        at_least=5,
    )


class InOrder(nn.Dropout):
    """Takes the next of listed masks for each row, so that it does not matter how many rows come at once."""

    def __init__(self, masks: torch.Tensor) -> None:
        super().__init__(P)
        self.masks, self.taken = masks, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        rows = self.masks[self.taken : self.taken + len(x)]
        self.taken += len(x)
        return x * rows


def sampled(units: int, source: torch.Generator) -> torch.Tensor:
    kept = torch.rand((MASKS * EXAMPLES, units), generator=source, device=source.device) > P
    return kept / (1 - P)


@torch.no_grad()
def one_by_one(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return the outputs under each mask, (masks, examples, classes)."""
    model.train()
    return torch.stack([model(x) for _ in range(MASKS)])


@torch.no_grad()
def mean_over_list(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    masks = all_masks(UNITS, dtype=x.dtype, device=x.device)
    logs = layer(masks[:, None] * x / (1 - P)).log_softmax(-1)  # (masks, examples, classes)
    return arithmetic_mean(logs, mask_probabilities(masks, P))


@torch.no_grad()
def mean_in_a_loop(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    mean = torch.zeros((EXAMPLES, CLASSES), device=x.device)
    for mask in itertools.product((0.0, 1.0), repeat=UNITS):
        chance = math.prod(1 - P if kept else P for kept in mask)
        mean += chance * layer(x * torch.tensor(mask, device=x.device) / (1 - P)).softmax(-1)
    return mean.log()


def network(case: str, drop: Drop) -> nn.Module:
    with seeded(f"benchmark network {case}"):
        if case == "softmax regression":
            layers = [nn.Linear(UNITS, CLASSES)]
        elif case == "perceptron":
            hidden = [layer for _ in range(2) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU(), drop(WIDTH))]
            layers = [*hidden, nn.Linear(WIDTH, CLASSES)]
        else:
            layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True), nn.Flatten()]
            layers += [nn.Linear(72, 128), nn.ReLU(), drop(128), nn.Linear(128, CLASSES)]
        return nn.Sequential(*layers).to(generator("benchmark device").device)
