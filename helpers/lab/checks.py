"""Rules for arguments that several chapters share; each raises a ValueError that names the rule and the value.

One policy for all of them: an argument is a number or an array (NumPy or torch, on any device), every entry must keep
the rule, and none may be NaN or infinite.
"""

import numpy as np
import torch

Numbers = float | np.ndarray | torch.Tensor


def require_positive(**numbers: Numbers) -> None:
    """Refuse numbers, or arrays of numbers, that are not positive and finite."""
    for name, number in numbers.items():
        entries = _entries(number)
        if not (np.isfinite(entries) & (entries > 0)).all():
            raise ValueError(f"{name} must be positive and finite, got {number}")


def require_not_negative(**numbers: Numbers) -> None:
    """Refuse numbers, or arrays of numbers, that are negative or not finite."""
    for name, number in numbers.items():
        entries = _entries(number)
        if not (entries >= 0).all():
            raise ValueError(f"{name} must not be negative, got {number}")
        if np.isinf(entries).any():
            raise ValueError(f"{name} must be finite, got {number}")


def require_at_least_one(**counts: Numbers) -> None:
    """Refuse counts, or arrays of counts, that are below 1 or not finite."""
    for name, count in counts.items():
        entries = _entries(count)
        if not (entries >= 1).all():
            raise ValueError(f"{name} must be at least 1, got {count}")
        if np.isinf(entries).any():
            raise ValueError(f"{name} must be finite, got {count}")


def require_between(low: float, high: float, **numbers: Numbers) -> None:
    """Refuse numbers, or arrays of numbers, outside the closed interval from `low` to `high`."""
    for name, number in numbers.items():
        entries = _entries(number)
        if not ((entries >= low) & (entries <= high)).all():
            raise ValueError(f"{name} must lie in [{low}, {high}], got {number}")


def require_same_device(generator: torch.Generator, **tensors: torch.Tensor) -> None:
    """Refuse a generator that draws on another device than the tensors live on."""
    for name, tensor in tensors.items():
        if generator.device != tensor.device:
            raise ValueError(
                f"generator must be on the device of {name}, {tensor.device}, got a generator on {generator.device}"
            )


def _entries(numbers: Numbers) -> np.ndarray:
    if isinstance(numbers, torch.Tensor):
        numbers = numbers.detach().cpu()
    return np.asarray(numbers, dtype=np.float64)
