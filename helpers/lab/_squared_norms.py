"""Squared norms of the gradients of single examples, one layer at a time: the ground of ``per_sample_squared_norms``.

For each call of a layer, one backward pass gives δ, the derivative of the summed losses by the layer's output. An
example's gradient of the layer's parameters rests on its part of δ and of the layer's inputs alone.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import grad, vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from helpers.lab._problems import Problem, as_matrix, losses_of, plain_attention, replaced, require_finite, wide
from helpers.lab.batches import Batch
from helpers.lab.watch import Call, is_leaf, watch


@dataclass(frozen=True)
class Outer:
    """Gradients of a matrix as sums of outer products over positions, ``Σ_t left_t right_tᵀ``.

    Parameters
    ----------
    left : torch.Tensor, shape (n, T, rows), or of int64, shape (n, T)
        Integers stand for the unit vectors of an embedding.
    right : torch.Tensor, shape (n, T, columns)
    """

    left: torch.Tensor
    right: torch.Tensor

    def dense(self, shape: torch.Size) -> torch.Tensor:
        """Return the matrices, shape (n, rows, columns)."""
        if self.left.is_floating_point():
            return self.left.mT @ self.right
        found = self.right.new_zeros((len(self.right), *shape))
        examples = torch.arange(len(found), device=found.device)[:, None].expand_as(self.left)
        return found.index_put_((examples, self.left), self.right, accumulate=True)


Piece = Outer | torch.Tensor  # a tensor has shape (n, *parameter.shape)


@dataclass(frozen=True)
class Layout:
    """Which dimension of each tensor of a call runs over the examples; None for a tensor that all share."""

    inputs: list[int | None]
    outputs: list[int | None]


class Layerwise:
    """How the squared norms of a problem are had from its layers."""

    def __init__(self, problem: Problem):
        self.problem = problem
        within = {p for layer in problem.model.modules() if is_leaf(layer) for p in layer.parameters()}
        outside = [p for p in problem.parameters if p not in within]
        self.outside = problem.only(outside) if outside else None
        single, several = self._calls(problem.some[:1])[0], self._calls(problem.some)[0]
        self.layouts = _layouts(single, several, len(problem.some))

    @staticmethod
    def of(problem: Problem) -> "Layerwise | None":
        """Return how, or None if it does not reproduce the norms of a few examples from one backward pass each."""
        if problem.random or problem.moving or not problem.sliceable:
            return None
        try:
            found = Layerwise(problem)
            squares = found.squares(problem.some)
        except Exception:  # whatever a layer cannot do; the gradients give the norms
            return None
        expected = sum(as_matrix(wide(x)).square().sum(1) for x in problem.singles)
        return found if problem.close_each(squares, expected) else None

    def squares(self, chunk: Batch) -> torch.Tensor:
        """Return |g_i|² for the examples of a chunk."""
        calls, prediction = self._calls(chunk)
        deltas = self._deltas(calls, prediction, chunk)
        found = torch.zeros(len(chunk), dtype=wide(deltas[0][0]).dtype, device=deltas[0][0].device)
        awaited = Counter(p for call in calls for p in self._own(call.layer))
        pieces: dict[nn.Parameter, list[Piece]] = defaultdict(list)
        for call, layout, delta in zip(calls, self.layouts, deltas, strict=True):
            for parameter, piece in _pieces(call, layout, delta, self._own(call.layer), len(chunk)):
                pieces[parameter].append(piece)
            for parameter in self._own(call.layer):
                awaited[parameter] -= 1
                if not awaited[parameter]:  # reduced as soon as it is complete, so that few gradients are held
                    found += _squared_norms(pieces.pop(parameter), parameter.shape)
        if self.outside is not None:
            found += self.outside.squares(chunk)
        require_finite(["the squared norm"], [found], chunk)
        self.problem.require_separate(chunk, prediction, None)
        return found

    def _own(self, layer: nn.Module) -> list[nn.Parameter]:
        return [p for p in layer.parameters() if p.requires_grad]

    def _calls(self, chunk: Batch) -> tuple[list[Call], Any]:
        """Return the calls of layers with something to train, and the prediction."""
        with watch(self.problem.model, lambda layer: is_leaf(layer) and bool(self._own(layer))) as calls:
            prediction = chunk.predict(self.problem.model)
        return calls, prediction

    def _deltas(self, calls: list[Call], prediction: Any, chunk: Batch) -> list[list[torch.Tensor]]:
        """Return the derivatives of the summed losses by the outputs of each call."""
        total = losses_of(self.problem.loss, prediction, chunk).sum()
        outputs = [x for call in calls for x in call.outputs]
        found = iter(torch.autograd.grad(total, outputs, materialize_grads=True))
        return [[next(found) for _ in call.outputs] for call in calls]


def _layouts(single: list[Call], several: list[Call], n: int) -> list[Layout]:
    """Find the dimensions that are n times as large for a batch of n as for a batch of one."""
    return [
        Layout(
            [_grown(x, y, n) for x, y in zip(one.inputs, other.inputs, strict=True)],
            [_grown(x, y, n) for x, y in zip(one.outputs, other.outputs, strict=True)],
        )
        for one, other in zip(single, several, strict=True)
    ]


def _grown(single: torch.Tensor, several: torch.Tensor, n: int) -> int | None:
    dims = [d for d, (one, all_) in enumerate(zip(single.shape, several.shape, strict=True)) if one != all_]
    if not dims:
        return None
    if len(dims) > 1 or several.shape[dims[0]] != n * single.shape[dims[0]]:
        raise ValueError(f"one dimension must run over examples, got {tuple(single.shape)}, {tuple(several.shape)}")
    return dims[0]


def _pieces(
    call: Call, layout: Layout, deltas: list[torch.Tensor], own: list[nn.Parameter], n: int
) -> Iterator[tuple[nn.Parameter, Piece]]:
    """Yield what one call contributes to the gradients of its layer's parameters."""
    if None in layout.outputs:
        raise ValueError(f"every output must belong to an example, but {call.name} has one that all share")
    if _is_plain(call.layer, nn.Linear):
        weight, bias = call.layer.weight, call.layer.bias
        delta = _positions(deltas[0], layout.outputs[0], n)  # (n, T, fan_out)
        if weight.requires_grad:
            yield weight, Outer(delta, _positions(call.inputs[0], layout.inputs[0], n))
        if bias is not None and bias.requires_grad:
            yield bias, delta.sum(1)
    elif _is_plain(call.layer, nn.Embedding) and call.layer.padding_idx is None:
        indices = call.inputs[0].unsqueeze(-1)
        yield (
            call.layer.weight,
            Outer(_positions(indices, layout.inputs[0], n)[..., 0], _positions(deltas[0], layout.outputs[0], n)),
        )
    else:
        yield from zip(own, _gradients_of_layer(call, layout, deltas, own, n), strict=True)


def _is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a layer has the forward pass of a kind, and its weight as a parameter."""
    return type(layer).forward is kind.forward and isinstance(layer._parameters.get("weight"), nn.Parameter)


def _positions(x: torch.Tensor, dim: int, n: int) -> torch.Tensor:
    """Return a tensor of vectors, examples along `dim`, in the shape (n, positions, length), in float32 at least."""
    rows = x.unflatten(dim, (n, -1)).movedim(dim, 0).flatten(1, -2)
    return wide(rows) if rows.is_floating_point() else rows


def _gradients_of_layer(
    call: Call, layout: Layout, deltas: list[torch.Tensor], own: Sequence[nn.Parameter], n: int
) -> list[torch.Tensor]:
    """Return the gradients of single examples of one layer, by running it again on each example's inputs."""
    leaves, form = tree_flatten(call.arguments)

    def along_deltas(values: list[torch.Tensor], inputs: list, deltas: list[torch.Tensor]) -> torch.Tensor:
        new = iter(inputs)
        args, kwargs = tree_unflatten([next(new) if isinstance(x, torch.Tensor) else x for x in leaves], form)
        with replaced(call.layer, own, values):
            outputs = tree_leaves(call.layer(*args, **kwargs))
        outputs = [x for x in outputs if isinstance(x, torch.Tensor) and x.is_floating_point()]
        return sum((x * delta).sum() for x, delta in zip(outputs, deltas, strict=True))

    parts = [
        [x if dim is None else x.unflatten(dim, (n, -1)) for x, dim in zip(tensors, dims, strict=True)]
        for tensors, dims in ((call.inputs, layout.inputs), (deltas, layout.outputs))
    ]
    gradients = vmap(grad(along_deltas), in_dims=(None, layout.inputs, layout.outputs))
    with plain_attention():
        return [wide(x) for x in gradients([p.detach() for p in own], *parts)]


def _squared_norms(pieces: list[Piece], shape: torch.Size) -> torch.Tensor:
    """Return the squared norms of sums of pieces, shape (n,), in the cheaper of two exact ways."""
    if all(isinstance(piece, Outer) for piece in pieces) and _pairs_are_cheaper(pieces, shape):
        return sum(_over_pairs(one, other) for one in pieces for other in pieces).clamp(min=0)
    total = sum(piece.dense(shape) if isinstance(piece, Outer) else piece for piece in pieces)
    return as_matrix(total).square().sum(1)


def _pairs_are_cheaper(pieces: list[Outer], shape: torch.Size) -> bool:
    positions = sum(piece.right.shape[1] for piece in pieces)
    return positions**2 * sum(shape) <= positions * shape.numel()


def _over_pairs(one: Outer, other: Outer) -> torch.Tensor:
    """Return ``Σ_st (left_s · left'_t) (right_s · right'_t)``, shape (n,)."""
    return (_inner(one.left, other.left) * (one.right @ other.right.mT)).sum((1, 2))


def _inner(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the products of all pairs of positions, shape (n, T, T'); integers stand for unit vectors."""
    if one.is_floating_point() and other.is_floating_point():
        return one @ other.mT
    if other.is_floating_point():
        return _inner(other, one).mT
    if one.is_floating_point():
        return one.gather(2, other[:, None, :].expand(-1, one.shape[1], -1))
    return one[:, :, None] == other[:, None, :]
