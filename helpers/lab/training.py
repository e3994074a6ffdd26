"""Training and evaluating a classifier, as every chapter does it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from helpers.lab.checks import require_same_device


def train(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    momentum: float = 0.9,
    generator: torch.Generator,
) -> list[float]:
    """Train a classifier in place by stochastic gradient descent on the mean cross-entropy of shuffled batches.

    Parameters
    ----------
    model : torch.nn.Module
        Maps (B, ...) to logits (B, classes); on the device of `x`.
    x, y : shape (N, ...), (N,)
        Inputs and int64 labels.
    epochs, batch_size : int
        Passes over the data, and examples per step; the last batch of an epoch may be smaller.
    learning_rate, momentum : float
        Of ``torch.optim.SGD``.
    generator : torch.Generator
        Shuffles the examples; on the device of `x`.

    Returns
    -------
    list of float
        The batch loss before each step, in nats.

    Raises
    ------
    ValueError
        If `batch_size` is not between 1 and N, `epochs` is negative, or `generator` is on another device.
    """
    if not 1 <= batch_size <= len(x):
        raise ValueError(f"batch_size must lie between 1 and the {len(x)} examples, got {batch_size}")
    require_same_device(generator, x=x)
    if epochs < 0:
        raise ValueError(f"epochs must not be negative, got {epochs}")
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=momentum)
    model.train()
    losses = []
    for _ in tqdm(range(epochs), desc="training", unit="epoch"):
        order = torch.randperm(len(x), generator=generator, device=x.device)
        for batch in order.split(batch_size):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses).tolist() if losses else []


@torch.no_grad()
def per_sample_loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of each example in nats, shape (N,), with the model in evaluation mode."""
    with _evaluation(model):
        return F.cross_entropy(model(x), y, reduction="none")


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the fraction of examples whose largest logit is at the label, with the model in evaluation mode."""
    with _evaluation(model):
        return (model(x).argmax(1) == y).double().mean().item()


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}  # a frozen part may differ from the whole
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes.items():
            module.training = was_training
