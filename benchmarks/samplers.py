"""The samplers of the chapters, against the bare cost of drawing the random numbers that they need.

What a sampler should return is written down here a second time, as its definition says, from the bare numbers.
"""

import math
from collections.abc import Callable

import torch

from benchmarks.timing import Race, require_equal
from helpers import gradient_noise, minibatch_loss
from helpers.lab import generator

SHAPE = (10_000, 64)
COLUMN = (10_000, 1)
DTYPE = torch.float32
MEAN, STD = 1.3, 0.7
DATA = {"slope": 0.8, "true_slope": 1.1, "intercept": 0.2, "feature_std": 1.2, "shift_std": 0.4, "label_std": 0.5}
ALPHA = 1.5

POPULATION = 1297  # training examples of the digits, a prime
EPOCH_POPULATION = 1280  # batches must divide it
BATCH = 32
EPOCHS = 500

Draw = Callable[[torch.Generator], object]


def races() -> list[Race]:
    return [
        *races_of_losses(),
        race("shared_shift_gradients", shared_shift, normals(SHAPE, SHAPE, COLUMN), shared_shift_by_definition),
        race_of_stable_losses(),
        race_of_batches(),
        race_of_noise(),
        race("shuffled_epochs", epochs, permutations, lambda orders: torch.stack(orders).reshape(EPOCHS, -1, BATCH)),
    ]


def race(case: str, sampler: Draw, bare: Draw, definition: Callable[..., torch.Tensor] | None = None) -> Race:
    """Set up a race, after comparing the sampler with its definition applied to the bare numbers."""
    if definition is not None:
        require_equal(sampler(generator(case)), definition(bare(generator(case))))
    source = generator(case)
    return Race("samplers", case, lambda: sampler(source), {"bare": lambda: bare(source)}, at_most=2)


def normals(*shapes: tuple[int, int]) -> Draw:
    return lambda source: [torch.randn(shape, generator=source, dtype=DTYPE, device=source.device) for shape in shapes]


def uniforms(*shapes: tuple[int, int]) -> Draw:
    return lambda source: [torch.rand(shape, generator=source, dtype=DTYPE, device=source.device) for shape in shapes]


# Chapter "The loss is a random variable"


def races_of_losses() -> list[Race]:
    """Independent and equicorrelated losses, of both marginals and both signs of the correlation."""
    found = []
    for marginal, draw in {"gaussian": normals, "exponential": uniforms}.items():
        for correlation in (None, 0.3, -0.01):
            shapes = (SHAPE, COLUMN) if correlation and correlation > 0 else (SHAPE,)
            name = "iid_losses" if correlation is None else f"equicorrelated_losses {correlation:+}"
            sampler, definition = losses(marginal, correlation), losses_by_definition(marginal, correlation)
            found.append(race(f"{name} {marginal}", sampler, draw(*shapes), definition))
    return found


def losses(marginal: str, correlation: float | None) -> Draw:
    law = {"mean": MEAN, "std": STD, "marginal": marginal, "dtype": DTYPE}
    if correlation is None:
        return lambda source: minibatch_loss.iid_losses(*SHAPE, **law, generator=source)
    law["correlation"] = correlation
    return lambda source: minibatch_loss.equicorrelated_losses(*SHAPE, **law, generator=source)


def losses_by_definition(marginal: str, correlation: float | None) -> Callable[..., torch.Tensor]:
    def definition(drawn: list[torch.Tensor]) -> torch.Tensor:
        own, *shared = drawn if marginal == "gaussian" else [-torch.log1p(-uniform) - 1 for uniform in drawn]
        if correlation is None:
            return MEAN + STD * own
        if shared:
            return MEAN + STD * (math.sqrt(1 - correlation) * own + math.sqrt(correlation) * shared[0])
        kept = math.sqrt((1 + (SHAPE[1] - 1) * correlation) / (1 - correlation))
        return MEAN + STD * math.sqrt(1 - correlation) * (own - (1 - kept) * own.mean(1, keepdim=True))

    return definition


def shared_shift(source: torch.Generator) -> torch.Tensor:
    return minibatch_loss.shared_shift_gradients(*SHAPE, **DATA, generator=source, dtype=DTYPE)


def shared_shift_by_definition(drawn: list[torch.Tensor]) -> torch.Tensor:
    clean, noise, shift = (
        std * z for std, z in zip((DATA["feature_std"], DATA["label_std"], DATA["shift_std"]), drawn, strict=True)
    )
    x, y = clean + shift, DATA["true_slope"] * clean + noise
    residual = DATA["slope"] * x + DATA["intercept"] - y
    return torch.stack([residual * x, residual], dim=-1)


def race_of_stable_losses() -> Race:
    """Two uniform numbers each are what the definition needs; the sampler takes them from integers of 64 bits."""

    def stable(source: torch.Generator) -> torch.Tensor:
        return minibatch_loss.stable_losses(*SHAPE, alpha=ALPHA, generator=source, dtype=DTYPE)

    require_equal(stable(generator("stable_losses")), stable_by_definition(generator("stable_losses")))
    return race("stable_losses", stable, uniforms(SHAPE, SHAPE))


def stable_by_definition(source: torch.Generator) -> torch.Tensor:
    parts = [torch.empty(0, dtype=torch.float64)]
    for entries in torch.empty(math.prod(SHAPE)).split(minibatch_loss.CACHED):
        bits = torch.empty(len(entries), dtype=torch.int64).random_(-(2**63), None, generator=source)
        angle, uniform = bits.view(torch.int32).to(DTYPE).mul_(2.0**-32).view(2, -1)
        waiting_time = -torch.log((2 * uniform.abs()).clamp(max=1 - torch.finfo(DTYPE).eps / 2).double())
        angle = (math.pi * angle).double()
        tail = (torch.cos((1 - ALPHA) * angle) / waiting_time) ** ((1 - ALPHA) / ALPHA)
        parts.append(torch.sin(ALPHA * angle) / torch.cos(angle) ** (1 / ALPHA) * tail)
    return torch.cat(parts).reshape(SHAPE).to(DTYPE)


# Chapter "The stochastic gradient and its noise"


def race_of_batches() -> Race:
    """Batches have no definition by bare numbers, but no example twice."""

    def batches(source: torch.Generator) -> torch.Tensor:
        return gradient_noise.sample_batches(SHAPE[0], BATCH, POPULATION, generator=source)

    def bare(source: torch.Generator) -> torch.Tensor:
        return torch.randint(POPULATION, (SHAPE[0], BATCH), generator=source, device=source.device)

    ordered = batches(generator("sample_batches")).sort(1).values
    if ordered.min() < 0 or ordered.max() >= POPULATION or (ordered.diff(dim=1) == 0).any():
        raise AssertionError("a batch holds an example twice, or one that is not in the population")
    return race("sample_batches", batches, bare)


def race_of_noise() -> Race:
    """The noise of 300 batches of 32 out of 256 long gradients, against one matrix product that gives it."""
    source = generator("batch_noise")
    gradients = torch.randn((256, 20_000), generator=source, device=source.device)
    drawn = gradient_noise.sample_batches(300, BATCH, 256, generator=source)
    weights = torch.zeros((300, 256), device=source.device).scatter_(1, drawn, 1 / BATCH) - 1 / 256

    def ours() -> torch.Tensor:
        return gradient_noise.batch_noise(gradients, drawn)

    def product() -> torch.Tensor:
        return weights @ gradients

    require_equal(ours(), product())
    return Race("samplers", "batch_noise", ours, {"product": product}, at_most=2)


def epochs(source: torch.Generator) -> torch.Tensor:
    return gradient_noise.shuffled_epochs(EPOCHS, BATCH, EPOCH_POPULATION, generator=source)


def permutations(source: torch.Generator) -> list[torch.Tensor]:
    return [torch.randperm(EPOCH_POPULATION, generator=source, device=source.device) for _ in range(EPOCHS)]
