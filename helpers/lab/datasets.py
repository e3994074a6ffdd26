"""Real data that ships inside packages, so that no chapter needs a network."""

import json
from importlib.resources import files
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits

from helpers.lab import runtime
from helpers.lab.checks import require_same_device

IMAGE_SIDE = 8


class Split(NamedTuple):
    """Training and test data on :func:`helpers.lab.runtime.device`."""

    x_train: torch.Tensor  # (N, features)
    y_train: torch.Tensor  # (N,)
    x_test: torch.Tensor  # (M, features)
    y_test: torch.Tensor  # (M,)


class Texts(NamedTuple):
    """English prose that the book has written."""

    paragraphs: list[str]  # of its first three chapters, a hundred words each
    paraphrases: list[list[str]]  # pairs of sentences that say the same


def digits(dtype: torch.dtype = torch.float64) -> Split:
    """Return scikit-learn's 8×8 handwritten digits, pixels scaled to [0, 1], 1,297 for training and 500 for testing.

    Parameters
    ----------
    dtype : torch.dtype
        Of the images. Labels are int64.

    Returns
    -------
    Split
        Images of shape (N, 64). Five of every eighteen images, in the order in which they were collected, are for
        testing, so that both parts hold every writer; the split is the same for every ``BOOK_SEED``.
    """
    images, labels = load_digits(return_X_y=True)
    x = torch.as_tensor(images / 16, dtype=dtype, device=runtime.device())
    y = torch.as_tensor(labels, dtype=torch.int64, device=x.device)
    test = torch.arange(len(x), device=x.device) % 18 < 5
    return Split(x[~test], y[~test], x[test], y[test])


def texts() -> Texts:
    """Return twelve passages of the book's own prose, and 48 pairs of sentences that say the same.

    The pairs are about eight subjects, six for each, so that a sentence has near misses among the others.

    Returns
    -------
    Texts
        Stored as they were once: what the book says today may differ.
    """
    stored = (files("helpers.data") / "texts.json").read_text(encoding="utf-8")
    return Texts(**json.loads(stored))


def augment(
    images: torch.Tensor, *, shift: torch.Tensor, noise_level: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Shift digit images by whole pixels, filling with background, and add Gaussian pixel noise.

    Parameters
    ----------
    images : shape (N, 64)
        Flattened 8×8 images.
    shift : int64, shape (N, 2)
        Pixels down and to the right, each between -8 and 8. Give all images of a batch one row to share it.
    noise_level : shape (N,)
        Standard deviation of the noise of each image, in the units of a pixel; the noise itself is never shared.
    generator : torch.Generator
        On the device of `images`.

    Returns
    -------
    torch.Tensor, shape (N, 64)

    Raises
    ------
    ValueError
        If a shape or a device does not fit, a shift moves the image out of its frame, or a noise level is negative.
    """
    if images.ndim != 2 or images.shape[1] != IMAGE_SIDE**2:
        raise ValueError(f"images must have shape (N, {IMAGE_SIDE**2}), got {tuple(images.shape)}")
    require_same_device(generator, images=images)
    n = len(images)
    if shift.shape != (n, 2) or noise_level.shape != (n,):
        raise ValueError(
            f"shift must have shape ({n}, 2) and noise_level ({n},), "
            f"got {tuple(shift.shape)} and {tuple(noise_level.shape)}"
        )
    if (shift.abs() > IMAGE_SIDE).any():
        raise ValueError(f"a shift must lie between -{IMAGE_SIDE} and {IMAGE_SIDE} pixels, got {shift.abs().max()}")
    if (noise_level < 0).any():
        raise ValueError(f"a noise level must not be negative, got {noise_level.min()}")
    pixels = torch.arange(IMAGE_SIDE, device=images.device)
    rows = (pixels - shift[:, :1])[:, :, None]  # (N, 8, 1), where each pixel of the result comes from
    columns = (pixels - shift[:, 1:])[:, None, :]  # (N, 1, 8)
    inside = (rows >= 0) & (rows < IMAGE_SIDE) & (columns >= 0) & (columns < IMAGE_SIDE)  # (N, 8, 8)
    source = torch.where(inside, rows * IMAGE_SIDE + columns, 0).reshape(n, -1)
    shifted = torch.where(inside.reshape(n, -1), images.gather(1, source), 0)
    noise = torch.randn(shifted.shape, generator=generator, dtype=images.dtype, device=images.device)
    return shifted + noise_level[:, None] * noise
