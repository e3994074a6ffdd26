"""Gradients of single examples: the gradient of every example's loss, their squared norms, their mean.

The gradients here are those of the loss of *one* example. With ``reduction="mean"``, PyTorch's default, the gradient
of a batch loss is their mean: the 1/m is already in it. With ``reduction="sum"`` it is m times that.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.lab.checks import require_at_least_one

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# From so many entries of all gradients on, faster outer products repay looking at every operation, on a CPU.
LARGE_GRADIENTS = 2**23


def per_sample_gradients(
    model: nn.Module, loss: Loss, inputs: torch.Tensor, targets: torch.Tensor, *, chunk_size: int | None = None
) -> dict[str, torch.Tensor]:
    """Return the gradient of the loss of each example with respect to every trainable parameter.

    Parameters
    ----------
    model : torch.nn.Module
        Any model without layers that couple the examples of a batch; in the mode (training or evaluation) in which
        it is. Dropout draws a mask for each example.
    loss : callable
        ``loss(prediction, target)`` for a batch of one, such as ``torch.nn.functional.cross_entropy``: whether it
        averages or sums over the batch makes no difference here, so no 1/m enters these gradients. Their *mean* is
        the gradient of a mean-reduced batch loss, their *sum* that of a sum-reduced one.
    inputs, targets : torch.Tensor, shape (n, ...)
        On the device of the model.
    chunk_size : int, optional
        How many examples to treat at once; fewer need less memory beside the result, which is n times the model.

    Returns
    -------
    dict
        For each parameter's name a tensor of shape (n, \\*parameter.shape), on the device of the model.

    Raises
    ------
    ValueError
        If the model couples examples by batch normalization, has nothing to train, the numbers of inputs and targets
        differ or are 0, or `chunk_size` is below 1.
    """
    _require_examples(inputs, targets)
    if chunk_size is not None:
        require_at_least_one(chunk_size=chunk_size)
    _require_uncoupled(model)
    trainable = {name: p.detach() for name, p in _trainable(model).items()}
    fixed = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    fixed |= dict(model.named_buffers())

    def loss_of_one(parameters: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return loss(functional_call(model, parameters | fixed, (x[None],)), y[None]).sum()

    gradient = vmap(grad(loss_of_one), in_dims=(None, 0, 0), randomness="different", chunk_size=chunk_size)
    size = len(inputs) * sum(p.numel() for p in trainable.values())
    with _OuterProducts() if size >= LARGE_GRADIENTS and inputs.is_cpu else nullcontext():
        return gradient(trainable, inputs, targets)


def flatten(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    """Lay the gradients of all parameters side by side, shape (n, number of parameters)."""
    return torch.cat([gradient.reshape(len(gradient), -1) for gradient in gradients.values()], dim=1)


def per_sample_squared_norms(model: nn.Module, loss: Loss, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the squared norm of each example's gradient without computing the gradients, for linear layers.

    The gradient of a linear layer's weight is the outer product of δ, the derivative by the layer's output, and the
    layer's input a; that of its bias is δ. So the squared norms are sums over layers of ``(|a|² + 1) |δ|²``, and one
    backward pass, which stops at the outputs of the layers, gives all of them (Goodfellow 2015).

    Parameters
    ----------
    model : torch.nn.Module
        All trainable parameters belong to ``torch.nn.Linear`` layers, each applied once to inputs (n, fan_in).
    loss, inputs, targets
        As in :func:`per_sample_gradients`.

    Returns
    -------
    torch.Tensor, shape (n,)
        Claim ``gradient_noise.gradient_norm_trick``.

    Raises
    ------
    ValueError
        If a trainable parameter belongs to another layer or to two, a layer is applied twice, never, or to inputs
        that are not a matrix, or for the reasons of :func:`per_sample_gradients`.
    """
    _require_examples(inputs, targets)
    _require_uncoupled(model)
    layers = _linear_layers(model)
    seen: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    def remember(layer: nn.Module, arguments: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        if layer in seen:
            raise ValueError(f"each linear layer must be applied once, but {layers[layer]} is applied again")
        shape = tuple(arguments[0].shape)
        if len(shape) != 2 or shape[0] != len(inputs):
            raise ValueError(f"{layers[layer]} needs a row for each of {len(inputs)} examples, got inputs {shape}")
        seen[layer] = arguments[0].detach(), output
        return output.clone()  # so that an activation in place leaves `output` alone

    handles = [layer.register_forward_hook(remember) for layer in layers]
    try:
        with torch.enable_grad():
            total = _summed_loss(loss, model(inputs), targets)
    finally:
        for handle in handles:
            handle.remove()
    if missing := [name for layer, name in layers.items() if layer not in seen]:
        raise ValueError(f"each linear layer must be applied once, but {missing[0]} is not applied")
    deltas = torch.autograd.grad(total, [output for _, output in seen.values()], materialize_grads=True)
    squared = torch.zeros(len(inputs), dtype=total.dtype, device=total.device)
    for (layer, (layer_inputs, _)), delta in zip(seen.items(), deltas, strict=True):
        per_delta = torch.zeros_like(squared)
        if layer.weight.requires_grad:
            per_delta += layer_inputs.square().sum(1)
        if layer.bias is not None and layer.bias.requires_grad:
            per_delta += 1
        squared += per_delta * delta.square().sum(1)
    return squared


def mean_gradient(
    model: nn.Module, loss: Loss, inputs: torch.Tensor, targets: torch.Tensor, *, chunk_size: int = 1024
) -> dict[str, torch.Tensor]:
    """Return the mean of the gradients of single examples by ordinary backward passes, chunk by chunk.

    Parameters
    ----------
    model, loss, inputs, targets
        As in :func:`per_sample_gradients`.
    chunk_size : int
        Examples in a backward pass.

    Returns
    -------
    dict
        For each trainable parameter's name a tensor of its shape; ``.grad`` is left alone.

    Raises
    ------
    ValueError
        For the reasons of :func:`per_sample_gradients`.
    """
    _require_examples(inputs, targets)
    require_at_least_one(chunk_size=chunk_size)
    _require_uncoupled(model)
    trainable = _trainable(model)
    total = {name: torch.zeros_like(p) for name, p in trainable.items()}
    for x, y in zip(inputs.split(chunk_size), targets.split(chunk_size), strict=True):
        with torch.enable_grad():
            of_chunk = _summed_loss(loss, model(x), y)
        found = torch.autograd.grad(of_chunk, list(trainable.values()), materialize_grads=True)
        for name, gradient in zip(trainable, found, strict=True):
            total[name] += gradient
    return {name: gradient / len(inputs) for name, gradient in total.items()}


class _OuterProducts(TorchDispatchMode):
    """Multiply a column and a row by broadcasting: the same numbers as by bmm, faster, and in memory that costs less.

    Under vmap, the gradients of the weight of a linear layer are such products; most of their time goes into memory,
    which Linux hands out 4 kB at a time. NumPy asks it for huge pages, PyTorch does not.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.bmm.default and args[0].shape[2] == 1:
            column, row = args
            shape = (*column.shape[:2], row.shape[2])
            memory = np.empty(math.prod(shape) * column.dtype.itemsize, dtype=np.uint8)
            return torch.mul(column, row, out=torch.from_numpy(memory).view(column.dtype).view(shape))
        return func(*args, **(kwargs or {}))


def _linear_layers(model: nn.Module) -> dict[nn.Linear, str]:
    """Return the linear layers with something to train, and their names, if nothing else can be trained."""
    layers = {
        layer: name or "the model"
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and any(p.requires_grad for p in layer.parameters())
    }
    owners: dict[nn.Parameter, list[str]] = {}
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(p, []).append(name)
    own = {p for layer in layers for p in (layer.weight, layer.bias) if isinstance(p, nn.Parameter)}
    for p, names in owners.items():
        if p.requires_grad and p not in own:
            raise ValueError(f"all trainable parameters must belong to linear layers, got one of {names[0]!r}")
        if p.requires_grad and len(names) > 1:
            raise ValueError(f"each parameter must belong to one layer, got one shared by {' and '.join(names)}")
    if not layers:
        raise ValueError("model must have a linear layer to train, got none")
    return layers


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError("model must have a parameter that requires a gradient, got none")
    return found


def _summed_loss(loss: Loss, predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum the losses of single examples, so that it makes no difference whether `loss` averages over a batch."""
    return vmap(lambda p, y: loss(p[None], y[None]).sum())(predictions, targets).sum()


def _require_examples(inputs: torch.Tensor, targets: torch.Tensor) -> None:
    if inputs.ndim == 0 or targets.ndim == 0 or len(inputs) != len(targets) or len(inputs) == 0:
        raise ValueError(
            "inputs and targets must hold the same number of examples, at least 1, "
            f"got shapes {tuple(inputs.shape)} and {tuple(targets.shape)}"
        )


def _require_uncoupled(model: nn.Module) -> None:
    for name, module in model.named_modules():
        batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if batch_norm and (module.training or module.running_mean is None):
            raise ValueError(
                f"examples must not be coupled, but {name or 'the model'} normalizes by the statistics of its batch, "
                f"so that one example has no gradient of its own: got {type(module).__name__}; "
                "call model.eval() to use its running statistics, or use GroupNorm or LayerNorm"
            )
