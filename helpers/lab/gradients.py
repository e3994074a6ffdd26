"""Gradients of single examples: the gradient of every example's loss, their squared norms, their mean.

The gradients here are those of the loss of *one* example. With ``reduction="mean"``, PyTorch's default, the gradient
of a batch loss is their mean: the 1/m is already in it. With ``reduction="sum"`` it is m times that.

Every function first takes a few examples and compares: the gradient of their batch loss by a plain backward pass must
be the mean, or the sum, of the gradients by one backward pass each. Later batches compare the derivatives of the loss
by the predictions. What does not fit is refused with the likely cause.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn

from helpers.lab._problems import COMPARED, Gradients, Loss, Problem, require_uncoupled, side_by_side, trainable_of
from helpers.lab._squared_norms import Layerwise
from helpers.lab.batches import Batch, batches_of
from helpers.lab.checks import require_at_least_one
from helpers.lab.watch import untouched


def per_sample_gradients(
    model: nn.Module, loss: Loss, inputs: Any, targets: Any = None, *, chunk_size: int | None = None
) -> Gradients:
    """Return the gradient of the loss of each example with respect to every trainable parameter.

    Parameters
    ----------
    model : torch.nn.Module
        Any model, in the mode (training or evaluation) in which it is. It is left as it was.
    loss : callable
        ``loss(prediction, target)``, your own, such as ``torch.nn.functional.cross_entropy``: whether it averages or
        sums over the batch makes no difference here, so no 1/m enters these gradients. Their *mean* is the gradient of
        a mean-reduced batch loss, their *sum* that of a sum-reduced one.
    inputs, targets : torch.Tensor, shape (n, ...), or tuples or dictionaries of such
        On the device of the model. A tuple is handed to the model as ``model(*inputs)``, a dictionary as
        ``model(**inputs)``. Without `targets`, the loss gets the prediction alone. `inputs` may also be a
        ``DataLoader`` or another iterable of batches ``(inputs, targets)``, which are sent to the model's device.
    chunk_size : int, optional
        How many examples to treat at once, which bounds the memory beside the result; by default as many as have
        gradients and activations of 256 MiB, at most 1024.

    Returns
    -------
    dict
        For each parameter's name a tensor of shape (n, \\*parameter.shape), on the device of the model: n times the
        model in memory.

    Raises
    ------
    ValueError
        If the gradient of a batch loss is not the mean or sum of these: the model couples examples by batch
        normalization or by hand, they share random draws, class weights, ``ignore_index`` or padding make the loss
        divide by something that depends on the batch, or a sum-reduced loss has a penalty on the weights. If there is
        nothing to train, a lazy layer has no parameters yet, the numbers of inputs and targets differ or are 0,
        `chunk_size` is below 1, the loss is no tensor, or gradients are not finite.

    Notes
    -----
    Costs a few times a backward pass of the batch where ``torch.func.vmap`` can run model and loss; one backward pass
    an example otherwise (recurrent layers, checkpoints, own ``autograd.Function``, control flow by data). Dropout in
    training draws for each example; as the random state is put back, all functions of this module draw the same for
    the same data and `chunk_size`.

    Examples
    --------
    >>> model = nn.Linear(2, 1, bias=False)
    >>> x, y = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 1)
    >>> found = per_sample_gradients(model, lambda prediction, y: (prediction - y).sum(), x, y)
    >>> found["weight"]
    tensor([[[1., 2.]],
    <BLANKLINE>
            [[3., 4.]]])
    """
    with _session(model, loss, inputs, targets, chunk_size, whole=True) as (problem, (batch,)):
        if problem.chunk_size >= len(batch):
            return dict(zip(problem.names, problem.rows(batch), strict=True))
        result = [p.new_empty((len(batch), *p.shape)) for p in problem.parameters]
        start = 0
        for chunk in batch.split(problem.chunk_size):
            for whole, part in zip(result, problem.rows(chunk), strict=True):
                whole[start : start + len(chunk)] = part
            start += len(chunk)
        return dict(zip(problem.names, result, strict=True))


def gradient_chunks(
    model: nn.Module, loss: Loss, inputs: Any, targets: Any = None, *, chunk_size: int | None = None
) -> Iterator[torch.Tensor]:
    """Yield the gradients of single examples chunk by chunk, flat, so that memory is bounded.

    Parameters
    ----------
    model, loss, inputs, targets, chunk_size
        As in :func:`per_sample_gradients`.

    Yields
    ------
    torch.Tensor, shape (chunk_size, number of parameters)
        In the order of the examples. Until the last one, ``.grad`` of the model is None and the random state is not
        the caller's.

    Raises
    ------
    ValueError
        For the reasons of :func:`per_sample_gradients`.
    """
    with _session(model, loss, inputs, targets, chunk_size) as (problem, chunks):
        for chunk in chunks:
            yield side_by_side(problem.rows(chunk))


def flatten(gradients: Gradients) -> torch.Tensor:
    """Lay the gradients of all parameters side by side, shape (n, number of parameters)."""
    return side_by_side(list(gradients.values()))


def per_sample_squared_norms(
    model: nn.Module, loss: Loss, inputs: Any, targets: Any = None, *, chunk_size: int | None = None
) -> torch.Tensor:
    """Return the squared norm of each example's gradient, where possible without computing the gradients.

    The gradient of a linear layer's weight is the outer product of δ, the derivative by the layer's output, and the
    layer's input a; that of its bias is δ. So the squared norms are sums over layers of ``(|a|² + 1) |δ|²``, and one
    backward pass, which stops at the outputs of the layers, gives all of them (Goodfellow 2015). Where a weight meets
    a sequence, or is used twice, as in an embedding tied to the output layer, its gradient is a sum of such products,
    whose squared norm is the sum of ``(a_s · a_t) (δ_s · δ_t)`` over pairs of positions. Of other layers, such as
    convolutions, normalization and attention, each example's gradient is computed and reduced one layer at a time.

    Parameters
    ----------
    model, loss, inputs, targets, chunk_size
        As in :func:`per_sample_gradients`.

    Returns
    -------
    torch.Tensor, shape (n,)
        In float32 at least. Claim ``gradient_noise.gradient_norm_trick``.

    Raises
    ------
    ValueError
        For the reasons of :func:`per_sample_gradients`.

    Notes
    -----
    Costs little more than a backward pass for linear layers on vectors. No layer is trusted because of its type: the
    norms of a few examples are compared with those of one backward pass each, and where they differ (parameters used
    outside of their layers, a penalty on the weights), all norms are taken from gradients, at the cost of
    :func:`per_sample_gradients` and the memory of one chunk. So they are with dropout in training.

    Examples
    --------
    >>> model = nn.Linear(2, 1, bias=False)
    >>> x, y = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 1)
    >>> per_sample_squared_norms(model, lambda prediction, y: (prediction - y).sum(), x, y)
    tensor([ 5., 25.])
    """
    with _session(model, loss, inputs, targets, chunk_size) as (problem, chunks):
        norms = Layerwise.of(problem)
        squares = problem.squares if norms is None else norms.squares
        return torch.cat([squares(chunk) for chunk in chunks])


def mean_gradient(
    model: nn.Module, loss: Loss, inputs: Any, targets: Any = None, *, chunk_size: int | None = None
) -> Gradients:
    """Return the mean of the gradients of single examples by ordinary backward passes, chunk by chunk.

    Parameters
    ----------
    model, loss, inputs, targets
        As in :func:`per_sample_gradients`.
    chunk_size : int, optional
        Examples in a backward pass; by default as many as have activations of 256 MiB, at most 1024.

    Returns
    -------
    dict
        For each trainable parameter's name a tensor of its shape, summed in float32 at least.

    Raises
    ------
    ValueError
        For the reasons of :func:`per_sample_gradients`.

    Notes
    -----
    Costs a backward pass, and memory of two models beside the chunk. With dropout in training, and with a loss that
    reads more than one row of the prediction for an example, as much as :func:`per_sample_gradients`.
    """
    n, total = 0, None
    with _session(model, loss, inputs, targets, chunk_size, rows=False) as (problem, chunks):
        for chunk in chunks:
            parts = problem.summed(chunk)
            total = parts if total is None else [whole + part for whole, part in zip(total, parts, strict=True)]
            n += len(chunk)
        means = [(whole / n).to(p.dtype) for whole, p in zip(total, problem.parameters, strict=True)]
        return dict(zip(problem.names, means, strict=True))


def gradient_sums(
    model: nn.Module, loss: Loss, inputs: Any, targets: Any = None, *, chunk_size: int
) -> Iterator[tuple[Gradients, int]]:
    """Yield the sum of the gradients of the examples of each chunk, and their number, by ordinary backward passes.

    Parameters
    ----------
    model, loss, inputs, targets
        As in :func:`per_sample_gradients`.
    chunk_size : int
        Examples in a chunk; the last one of each batch may hold fewer.

    Yields
    ------
    dict, int
        For each trainable parameter's name a tensor of its shape, in float32 at least. Until the last one, ``.grad`` of
        the model is None and the random state is not the caller's.

    Raises
    ------
    ValueError
        For the reasons of :func:`per_sample_gradients`.
    """
    with _session(model, loss, inputs, targets, chunk_size, rows=False) as (problem, chunks):
        for chunk in chunks:
            yield dict(zip(problem.names, problem.summed(chunk), strict=True)), len(chunk)


def per_sample_products(
    model: nn.Module,
    loss: Loss,
    inputs: Any,
    targets: Any = None,
    *,
    direction: Gradients,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """Return the product of each example's gradient with a given vector, ``g_i · v``.

    Parameters
    ----------
    model, loss, inputs, targets, chunk_size
        As in :func:`per_sample_gradients`.
    direction : dict
        v: for each trainable parameter's name a tensor of its shape, such as :func:`mean_gradient` returns.

    Returns
    -------
    torch.Tensor, shape (n,)
        In float32 at least.

    Raises
    ------
    ValueError
        If `direction` does not fit the model, or for the reasons of :func:`per_sample_gradients`.

    Notes
    -----
    g_i · v is the derivative of the loss of example i along v: one forward pass with derivatives gives all of them, at
    about two forward passes and without any gradient. Where a layer has no such pass, from the gradients.
    """
    with _session(model, loss, inputs, targets, chunk_size) as (problem, chunks):
        vector = _vector(problem, direction)
        along = problem.derivatives if problem.has_derivatives(vector) else problem.products
        return torch.cat([along(chunk, vector) for chunk in chunks])


# Private parts


@contextmanager
def _session(
    model: nn.Module,
    loss: Loss,
    inputs: Any,
    targets: Any,
    chunk_size: int | None,
    *,
    whole: bool = False,
    rows: bool = True,
) -> Iterator[tuple[Problem, Iterator[Batch]]]:
    """Settle how gradients are found, and hand over the data in chunks, or as a whole; the model is as before then."""
    if chunk_size is not None:
        require_at_least_one(chunk_size=chunk_size)
    with torch.inference_mode(False), torch.enable_grad(), untouched(model):
        trainable = trainable_of(model)
        batches = batches_of(inputs, targets, next(iter(trainable.values())).device)
        first = _some(batches)
        require_uncoupled(model)
        problem = Problem(model, loss, trainable)
        problem.settle(_joined(first).spread(COMPARED))
        problem.chunk_size = chunk_size or problem.default_chunk_size(rows=rows)
        stream = chain(first, batches)
        yield problem, [_joined(list(stream))] if whole else _in_chunks(stream, problem.chunk_size)


def _some(batches: Iterator[Batch]) -> list[Batch]:
    """Take batches until there are a few examples to compare."""
    taken = [next(batches)]
    while sum(map(len, taken)) < COMPARED and (more := next(batches, None)) is not None:
        taken.append(more)
    return taken


def _in_chunks(batches: Iterator[Batch], size: int) -> Iterator[Batch]:
    for batch in batches:
        yield from batch.split(size)


def _joined(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    columns = zip(*(batch.tensors for batch in batches), strict=True)
    return batches[0].with_tensors([torch.cat(column) for column in columns])


def _vector(problem: Problem, direction: Gradients) -> list[torch.Tensor]:
    shapes = {name: tuple(p.shape) for name, p in zip(problem.names, problem.parameters, strict=True)}
    got = {name: tuple(part.shape) for name, part in direction.items()}
    if got != shapes:
        raise ValueError(f"direction must have the trainable parameters {shapes}, got {got}")
    return [direction[name].detach() for name in problem.names]
