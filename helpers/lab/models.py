"""PyTorch models that several chapters share. They live wherever ``.to(device, dtype)`` puts them."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

DIGITS_SIZES = (64, 64, 64, 10)


def mlp(sizes: Sequence[int] = DIGITS_SIZES) -> nn.Sequential:
    """Return a multilayer perceptron with ReLU between its linear layers; by default the book's digits network.

    Parameters
    ----------
    sizes : sequence of int
        Widths from input to output, at least two. The default maps 64 pixels by two hidden layers of 64 to 10 logits.

    Returns
    -------
    torch.nn.Sequential
        With PyTorch's default initial weights, drawn from the global generator
        (see :func:`helpers.lab.runtime.seeded`).

    Raises
    ------
    ValueError
        If there are fewer than two widths or one is not positive.
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"sizes must hold at least two positive widths, got {tuple(sizes)}")
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
