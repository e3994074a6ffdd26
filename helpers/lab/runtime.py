"""Where randomness and the compute device come from; nothing else in the book seeds or picks a device.

Two environment variables steer a run: ``BOOK_SEED`` (default 0) and ``BOOK_DEVICE`` (default ``auto``).
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

DEVICE_RULE = "BOOK_DEVICE must be auto, cpu, cuda or cuda:<index>"


def device() -> torch.device:
    """Return the device that ``BOOK_DEVICE`` asks for.

    Returns
    -------
    torch.device
        ``auto`` is CUDA where there is one and the CPU elsewhere; ``cpu``, ``cuda`` and ``cuda:1`` are taken literally.

    Raises
    ------
    ValueError
        If the name is another one, if no such CUDA device exists, or for MPS, which lacks float64.
    """
    name = os.environ.get("BOOK_DEVICE", "auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("mps"):
        raise ValueError(f"{DEVICE_RULE}; MPS lacks float64, in which every claim is computed, got {name!r}")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (":" in name and not (kind == "cuda" and index.isdecimal())):
        raise ValueError(f"{DEVICE_RULE}, got {name!r}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{DEVICE_RULE}; this machine has {torch.cuda.device_count()} CUDA devices, got {name!r}")
    return torch.device(name)


def generator(stream: str) -> torch.Generator:
    """Return a fresh torch generator on :func:`device` for a named stream of random numbers.

    Parameters
    ----------
    stream : str
        Name of the simulation. Streams of different names are independent, so that a new simulation never shifts
        the draws of another.

    Returns
    -------
    torch.Generator
        Seeded by (``BOOK_SEED``, `stream`); the same pair gives the same draws.

    Raises
    ------
    ValueError
        If ``BOOK_SEED`` is not an integer or `stream` is empty.
    """
    return torch.Generator(device()).manual_seed(_seed(stream))


def rng(stream: str) -> np.random.Generator:
    """Return a fresh NumPy generator for a named stream; see :func:`generator`."""
    return np.random.default_rng(_seed(stream))


@contextmanager
def seeded(stream: str) -> Iterator[None]:
    """Seed torch's global generators inside a ``with`` block, for code that takes no generator.

    They are those of the CPU and of CUDA. The constructors of ``torch.nn`` modules draw their initial weights from
    them. Their states are put back when the block ends.

    Parameters
    ----------
    stream : str
        As in :func:`generator`.
    """
    cuda_devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=cuda_devices):
        # torch.manual_seed puts off seeding each kind of device that is not there, and formats the stack for it: 5 ms.
        torch.default_generator.manual_seed(_seed(stream))
        if cuda_devices:
            torch.cuda.manual_seed_all(_seed(stream))
        yield


def _seed(stream: str) -> int:
    """Hash (``BOOK_SEED``, stream) to 63 bits, so that neighboring seeds and names have unrelated draws."""
    text = os.environ.get("BOOK_SEED", "0")
    try:
        book_seed = int(text)
    except ValueError:
        raise ValueError(f"BOOK_SEED must be an integer, got {text!r}") from None
    if not stream:
        raise ValueError(f"a stream must have a name, got {stream!r}")
    digest = hashlib.blake2b(f"{book_seed}:{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
