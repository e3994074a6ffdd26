"""Data for a network in the forms that people have them: tensors, tuples, dictionaries, a ``DataLoader``."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


@dataclass(frozen=True)
class Batch:
    """Examples: what a model takes and what its loss compares with.

    Parameters
    ----------
    leaves : list
        Tensors of shape (n, ...), and whatever else there is in inputs and targets.
    form : torch.utils._pytree.TreeSpec
        How they make up inputs and targets.
    """

    leaves: list[Any]
    form: TreeSpec

    @staticmethod
    def of(inputs: Any, targets: Any = None) -> "Batch":
        """Return the batch of inputs and targets, on dimension 0 of every tensor in them.

        Raises
        ------
        ValueError
            If the tensors hold different numbers of examples, or none.
        """
        inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
        batch = Batch(*tree_flatten((inputs, targets)))
        tensors = batch.tensors
        if not tensors or min(x.ndim for x in tensors) == 0 or len({len(x) for x in tensors}) > 1 or not len(batch):
            shapes = [tuple(x.shape) for x in tensors]
            raise ValueError(
                "inputs and targets must hold the same number of examples, at least 1, "
                f"got shapes {', '.join(map(str, shapes[:-1]))} and {shapes[-1] if shapes else 'no tensor'}"
            )
        return batch

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [x for x in self.leaves if isinstance(x, torch.Tensor)]

    @property
    def inputs(self) -> Any:
        return tree_unflatten(self.leaves, self.form)[0]

    @property
    def targets(self) -> Any:
        return tree_unflatten(self.leaves, self.form)[1]

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, rows: slice | torch.Tensor) -> "Batch":
        return replace(self, leaves=[x[rows] if isinstance(x, torch.Tensor) else x for x in self.leaves])

    def to(self, device: torch.device) -> "Batch":
        return replace(self, leaves=[x.to(device) if isinstance(x, torch.Tensor) else x for x in self.leaves])

    def with_tensors(self, tensors: Iterable[torch.Tensor]) -> "Batch":
        """Return the same with other tensors, in the order of ``tensors``."""
        new = iter(tensors)
        return replace(self, leaves=[next(new) if isinstance(x, torch.Tensor) else x for x in self.leaves])

    def split(self, size: int) -> "Iterator[Batch]":
        """Yield the examples in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def spread(self, n: int) -> "Batch":
        """Return n of the examples, evenly spaced from first to last; all if there are no more."""
        if n >= len(self):
            return self
        return self[torch.linspace(0, len(self) - 1, n, device=self.tensors[0].device).long()]

    def predict(self, model: nn.Module) -> Any:
        """Return ``model(inputs)``; of a tuple or list, ``model(*inputs)``; of a dictionary, ``model(**inputs)``."""
        inputs = self.inputs
        if isinstance(inputs, dict):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def batches_of(inputs: Any, targets: Any, device: torch.device) -> Iterator[Batch]:
    """Yield batches of what a reader has.

    Parameters
    ----------
    inputs : torch.Tensor, tuple, list or mapping of tensors, or an iterable of batches such as a ``DataLoader``
        Of an iterable, each batch is ``(inputs, targets)``; of more than two members, the last is the targets; a
        mapping or a tensor is inputs without targets.
    targets : torch.Tensor, tuple or mapping of tensors, optional
        None for an iterable.
    device : torch.device
        Where batches of an iterable are sent, as they come from a ``DataLoader`` on the CPU.

    Raises
    ------
    ValueError
        If the numbers of examples in one batch differ or are 0, an iterable is empty or comes with targets.
    """
    if isinstance(inputs, torch.Tensor | tuple | list | Mapping):
        yield Batch.of(inputs, targets)
        return
    if not isinstance(inputs, Iterable):
        raise ValueError(f"inputs must be tensors or an iterable of batches, got {type(inputs).__name__}")
    if targets is not None:
        raise ValueError("targets must be None where inputs are an iterable, whose batches hold them")
    batches = iter(inputs)
    try:
        first = next(batches)
    except StopIteration:
        raise ValueError("inputs must hold at least one batch, got an empty iterable") from None
    for batch in chain([first], batches):
        yield _of_item(batch).to(device)


def _of_item(item: Any) -> Batch:
    if isinstance(item, tuple | list) and len(item) > 1:
        *inputs, targets = item
        return Batch.of(inputs[0] if len(inputs) == 1 else tuple(inputs), targets)
    return Batch.of(item[0] if isinstance(item, tuple | list) else item)
