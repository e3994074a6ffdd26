"""Rules for arguments that several chapters share; each raises a ValueError that names the rule and the value."""

import math

import numpy as np
import torch


def require_positive(**numbers: float) -> None:
    """Refuse numbers that are not positive and finite."""
    for name, number in numbers.items():
        if not (math.isfinite(number) and number > 0):
            raise ValueError(f"{name} must be positive and finite, got {number}")


def require_at_least_one(**counts: int) -> None:
    """Refuse counts, or arrays of counts, that are below 1."""
    for name, count in counts.items():
        if not (np.asarray(count) >= 1).all():
            raise ValueError(f"{name} must be at least 1, got {count}")


def require_same_device(generator: torch.Generator, **tensors: torch.Tensor) -> None:
    """Refuse a generator that draws on another device than the tensors live on."""
    for name, tensor in tensors.items():
        if generator.device != tensor.device:
            raise ValueError(
                f"generator must be on the device of {name}, {tensor.device}, got a generator on {generator.device}"
            )
