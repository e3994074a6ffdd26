"""Look into a network while it runs, and leave it as it was.

:func:`untouched` puts a model back, whatever happened to it; :func:`watch` hands over what its layers took and gave.
"""

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a layer.

    Parameters
    ----------
    name : str
        The layer's name in ``model.named_modules()``; "the model" if it is the model itself.
    layer : torch.nn.Module
    inputs : tuple of torch.Tensor
        Its tensor arguments in the order given, nested or by keyword too; copies without a graph, taken before the
        call, so that a layer that works in place leaves them alone.
    outputs : tuple of torch.Tensor
        The floating-point tensors that it returned, in order. The network went on with copies of them, so they keep
        their values, and they are part of its graph.
    arguments : tuple
        All that it was given, by position and by keyword, with `inputs` in place of its tensors.
    """

    name: str
    layer: nn.Module
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]
    arguments: tuple[tuple, dict[str, Any]]

    @property
    def output(self) -> torch.Tensor:
        """Return what the layer returned; of several tensors, the first."""
        return self.outputs[0]


@contextmanager
def watch(model: nn.Module, select: Callable[[nn.Module], bool] | None = None) -> Iterator[list[Call]]:
    """Hand over each call of a model's layers within the ``with`` block.

    Parameters
    ----------
    model : torch.nn.Module
    select : callable, optional
        Which of its modules to watch; otherwise its leaf layers, see :func:`is_leaf`.

    Yields
    ------
    list of Call
        Fills up in the order in which calls end; a layer that is called twice has two. With gradients switched on, the
        gradient of a later result with respect to any output can be asked for, behind frozen layers too. Calls that
        return no floating-point tensor are left out. Costs a copy of each layer's inputs and outputs.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True))
    >>> with watch(model) as calls:
    ...     result = model(torch.ones(5, 2)).sum()
    >>> [(call.name, tuple(call.output.shape)) for call in calls]
    [('0', (5, 3)), ('1', (5, 3))]
    >>> [tuple(gradient.shape) for gradient in output_gradients(result, calls)]
    [(5, 3), (5, 3)]
    """
    calls: list[Call] = []
    handles = []
    for name, layer in model.named_modules():
        if (select or is_leaf)(layer) and not _is_parametrization(name):
            handles += _record(name or "the model", layer, calls)
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def output_gradients(result: torch.Tensor, calls: Sequence[Call]) -> list[torch.Tensor]:
    """Return the gradient of a number with respect to the output of each call.

    Parameters
    ----------
    result : torch.Tensor, shape ()
        Computed from the outputs; its graph is kept.
    calls : sequence of Call

    Returns
    -------
    list of torch.Tensor
        Of the shapes of the outputs, zero where `result` does not depend on one.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 1), nn.Softplus())
    >>> with watch(model) as calls:
    ...     result = model(torch.ones(3, 2)).sum()
    >>> before, after = output_gradients(result, calls)
    >>> after.squeeze(1)
    tensor([1., 1., 1.])
    >>> torch.allclose(before, calls[0].output.sigmoid())
    True
    """
    outputs = [call.output for call in calls]
    asked = [output for output in outputs if output.requires_grad]
    if not asked or not result.requires_grad:
        return [torch.zeros_like(output) for output in outputs]
    found = iter(torch.autograd.grad(result, asked, retain_graph=True, materialize_grads=True))
    return [next(found) if output.requires_grad else torch.zeros_like(output) for output in outputs]


def is_leaf(layer: nn.Module) -> bool:
    """Return whether a module has no layers inside.

    What makes a weight from other parameters (``torch.nn.utils.parametrize``) is no layer. ``MultiheadAttention`` is a
    leaf, since it reads the weights inside without calling the layers that hold them.
    """
    inside = [name for name, _ in layer.named_children() if name != "parametrizations"]
    return not inside or isinstance(layer, nn.MultiheadAttention)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put a model back at the end of the ``with`` block, also after an error.

    Put back are values and identity of parameters and buffers, ``requires_grad``, ``.grad`` (which is None inside),
    training modes, hooks, all other attributes of its modules, and the global random states of Python, NumPy and torch,
    on the CPU and on the model's CUDA devices. Costs a copy of the model.

    Parameters
    ----------
    model : torch.nn.Module

    Raises
    ------
    ValueError
        If a lazy layer has no parameters yet.

    Examples
    --------
    >>> model = nn.BatchNorm1d(2)
    >>> with untouched(model):
    ...     out = model.train()(torch.ones(4, 2))
    >>> model.running_mean
    tensor([0., 0.])
    """
    _require_built(model)
    modules = [(module, _Attributes(module)) for module in model.modules()]
    tensors = [_Values(tensor) for tensor in {*model.parameters(), *model.buffers()}]
    devices = {values.tensor.device.index for values in tensors if values.tensor.is_cuda}
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=sorted(devices)):
        try:
            model.zero_grad()
            yield
        finally:
            for module, attributes in modules:
                attributes.put_back(module)
            for values in tensors:
                values.put_back()
            random.setstate(of_python)
            np.random.set_state(of_numpy)  # noqa: NPY002


class _Attributes:
    """The attributes of a module, with the contents of its dictionaries, lists and sets (hooks and parameters too)."""

    def __init__(self, module: nn.Module):
        self.kind = type(module)
        self.values = dict(vars(module))
        self.contents = {name: value.copy() for name, value in self.values.items() if type(value) in _CONTAINERS}

    def put_back(self, module: nn.Module) -> None:
        module.__class__ = self.kind
        vars(module).clear()
        vars(module).update(self.values)
        for name, content in self.contents.items():
            _refill(self.values[name], content)


def _refill(container: dict | set | list, content: dict | set | list) -> None:
    container.clear()  # the container itself stays: handles of hooks refer to it
    container.extend(content) if isinstance(container, list) else container.update(content)


_CONTAINERS = dict, OrderedDict, set, list


class _Values:
    """The values, storage and flags of a parameter or buffer."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self.storage, self.copy = tensor, tensor.data, tensor.detach().clone()
        self.requires_grad, self.grad = tensor.requires_grad, tensor.grad if tensor.is_leaf else None

    @torch.no_grad()
    def put_back(self) -> None:
        if self.tensor.data_ptr() != self.storage.data_ptr() or self.tensor.shape != self.storage.shape:
            self.tensor.data = self.storage
        if not torch.equal(self.tensor, self.copy):  # writing would disturb a graph that still needs the old values
            self.tensor.copy_(self.copy)
        if self.tensor.is_leaf:
            self.tensor.requires_grad_(self.requires_grad).grad = self.grad


def _record(name: str, layer: nn.Module, calls: list[Call]) -> list[Any]:
    """Have the calls of a layer appended, and return the handles of the hooks that do it."""
    started = []  # the arguments of calls that have begun: a layer may call itself

    def before(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        copy = partial(tree_map, lambda x: x.detach().clone() if isinstance(x, torch.Tensor) else x)
        started.append((copy(args), copy(kwargs)))

    def after(layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        arguments = started.pop()
        inputs = tuple(x for x in tree_leaves(arguments) if isinstance(x, torch.Tensor))
        output = tree_map(_differentiable, output)
        outputs = tuple(x for x in tree_leaves(output) if _is_floating(x))
        if outputs:
            calls.append(Call(name, layer, inputs, outputs, arguments))
        return tree_map(lambda x: x.clone() if _is_floating(x) else x, output)

    return [
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(after, with_kwargs=True),
    ]


def _differentiable(x: Any) -> Any:
    if _is_floating(x) and torch.is_grad_enabled() and not x.requires_grad:
        return x.detach().requires_grad_()
    return x


def _is_floating(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())


def _is_parametrization(name: str) -> bool:
    return "parametrizations" in name.split(".")


def _require_built(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"layers must have their parameters, but {name} has no shape yet: call the model once")
