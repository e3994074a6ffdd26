"""Answers in many random companies: batched calls against a loop of forward passes, one a company."""

import torch
from torch import nn

from benchmarks.timing import Race, require_equal
from helpers.lab import generator, seeded
from helpers.normalization import Company, company

INPUTS, COMPANIES, OTHERS = 20, 20, 31
WIDTH = 64


def races() -> list[Race]:
    return [
        race("perceptron", perceptron(), (WIDTH,), at_least=2),
        race("convolutional", convolutional(), (1, 8, 8), at_least=1),
    ]


def race(case: str, model: nn.Module, shape: tuple[int, ...], *, at_least: float) -> Race:
    source = generator(f"benchmark company {case}")
    inputs, others = (torch.randn((n, *shape), generator=source, device=source.device) for n in (INPUTS, 1_000))
    few = others[:OTHERS]  # then every company is the same, up to its order
    require_equal(judged(model, inputs, few, source).mean, loop(model, inputs, few, source).mean(1))
    calls = {"loop": lambda: loop(model, inputs, others, source)}
    return Race(
        "companies",
        f"company, {case}",
        lambda: judged(model, inputs, others, source),
        calls,
        at_least=at_least,
    )


def judged(model: nn.Module, inputs: torch.Tensor, others: torch.Tensor, source: torch.Generator) -> Company:
    return company(model, inputs, others, batch_size=OTHERS + 1, companies=COMPANIES, generator=source)


@torch.no_grad()
def loop(model: nn.Module, inputs: torch.Tensor, others: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    """Return the outputs of each input in each company, (n, companies, classes)."""
    model.train()
    answers = []
    for x in inputs:
        for _ in range(COMPANIES):
            drawn = torch.randperm(len(others), generator=source, device=source.device)[:OTHERS]
            answers.append(model(torch.cat([x[None], others[drawn]]))[0])
    return torch.stack(answers).unflatten(0, (len(inputs), COMPANIES))


def perceptron() -> nn.Module:
    with seeded("benchmark perceptron with batch norm"):
        layers = [layer for _ in range(2) for layer in (nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU())]
        return nn.Sequential(*layers, nn.Linear(WIDTH, 10)).to(generator("benchmark company device").device)


def convolutional() -> nn.Module:
    with seeded("benchmark convolutions with batch norm"):
        layers = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten()
        return nn.Sequential(*layers, nn.Linear(32, 10)).to(generator("benchmark company device").device)
