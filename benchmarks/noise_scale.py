"""The noise scale of a network, with its standard error, against a loop over examples that gives the value alone."""

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.timing import Race
from helpers.gradient_noise import gradient_noise_scale
from helpers.lab import generator, models, seeded


def races() -> list[Race]:
    networks = {
        "perceptron of 85,000 parameters": (lambda: models.mlp((64, 256, 256, 10)), 2048),
        "perceptron of 301,000 parameters": (lambda: models.mlp((64, 512, 512, 10)), 1024),
        "convolutional network": (convolutional_network, 1024),
        "transformer": (Transformer, 512),
    }
    return [race(name, *network) for name, network in networks.items()]


def convolutional_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(576, 10),
    )


class Transformer(nn.Module):
    """Reads the eight rows of an image as words."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 32), nn.Linear(32, 10)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.embed(images.unflatten(1, (8, 8)))).mean(1))


def race(case: str, build: object, n: int) -> Race:
    with seeded(f"benchmark {case}"):
        model = build()
    source = generator(f"benchmark {case}")
    model.to(source.device)
    inputs = 1 + torch.randn((n, 64), generator=source, device=source.device)
    targets = torch.zeros(n, dtype=torch.int64, device=source.device)  # of one class, so that no estimate is refused

    def ours() -> float:
        return gradient_noise_scale(model, F.cross_entropy, inputs, targets).value.item()

    def loop() -> float:
        total, squares = 0.0, 0.0
        for x, y in zip(inputs, targets, strict=True):
            parts = torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), list(model.parameters()))
            gradient = torch.cat([part.flatten() for part in parts])
            total, squares = total + gradient, squares + gradient.square().sum()
        trace = (squares - total.square().sum() / n) / (n - 1)
        return (trace / ((total / n).square().sum() - trace / n)).item()

    found, wanted = ours(), loop()
    if abs(found - wanted) > 1e-2 * wanted:
        raise AssertionError(f"the noise scale of the {case} is {wanted}, got {found}")
    return Race("noise scale", case, ours, {"loop": loop}, at_most=1.5)
