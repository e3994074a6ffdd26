"""A device that is not the CPU, on a machine that has no other, and modes that refuse what would fail on a GPU.

PyTorch keeps a slot, PrivateUse1, for devices that others build. Filled from Python, and under FakeTensorMode, it gives
tensors that have a shape, a dtype and a device, and no values: operations on them check devices as a GPU does. Code
that must look at values runs on the CPU instead, where every new tensor must be told its device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from helpers.lab import runtime

_setup_privateuseone_for_python_backend("other")
CPU, OTHER = torch.device("cpu"), torch.device("other", 0)
CONVERSIONS = (torch.tensor, torch.as_tensor, torch.asarray)  # of anything but a tensor, they make a new one


class WrongDevice(AssertionError):
    """What would fail, or end up on the CPU, if the arguments were on a GPU."""


class LooksAtValues(Exception):
    """A tensor without values was asked for one that decides how to go on."""


class OtherGenerator(torch.Generator):
    """A generator of the other device, which has none of its own: one of the CPU that says otherwise."""

    device = OTHER


@dataclass(frozen=True)
class Place:
    """Where a call makes its arguments."""

    device: torch.device
    generator: torch.Generator

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64, device=self.device)

    def integers(self, n: int, *shape: int) -> torch.Tensor:
        return torch.randint(n, shape, generator=self.generator, device=self.device)

    def model(self) -> nn.Module:
        options = {"dtype": torch.float64, "device": self.device}
        return nn.Sequential(nn.Linear(3, 4, **options), nn.ReLU(), nn.Linear(4, 2, **options))


Arguments = Callable[[Place], dict[str, Any]]


def on_the_cpu() -> Place:
    return Place(CPU, torch.Generator().manual_seed(0))


@contextmanager
def elsewhere() -> Iterator[Place]:
    """Yield the other device; ``helpers.lab.runtime.device`` returns it too."""
    place = Place(OTHER, OtherGenerator())
    # With a ShapeEnv, a mask may select an unknown number of rows.
    with (
        FakeTensorMode(shape_env=ShapeEnv()),
        OnlyHere(place),
        mock.patch.object(runtime, "device", return_value=place.device),
    ):
        yield place


def run_elsewhere(function: Callable[..., Any], arguments: Arguments) -> Any:
    """Call a function on the other device, which its results must not leave."""
    with elsewhere() as place:
        result = function(**arguments(place))
        for tensor in tensors_in(result):
            if tensor.device != place.device:
                raise WrongDevice(f"a result is on {tensor.device}, not on {place.device}")
    return result


def run_by_values(function: Callable[..., Any], arguments: Arguments) -> Any:
    """Call a function on the CPU, where every tensor that it makes must be told its device."""
    place = on_the_cpu()
    # The mode does not hear of from_numpy, which cannot be told a device at all.
    unheard = WrongDevice("from_numpy makes a tensor without an explicit device")
    with ExplicitDevice(place.generator), mock.patch.object(torch, "from_numpy", side_effect=unheard):
        result = function(**arguments(place))
    if any(is_copy(tensor) for tensor in tensors_in(result)):
        raise WrongDevice("a result is a copy on the CPU")
    return result


def run_model_elsewhere(model: nn.Module, inputs: Callable[[Place], torch.Tensor]) -> Any:
    """Apply a model whose parameters and buffers, and nothing else, have been moved to the other device."""

    def moved(place: Place) -> dict[str, Any]:
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        state = {name: torch.empty(t.shape, dtype=t.dtype, device=place.device) for name, t in state.items()}
        return {"module": model, "parameter_and_buffer_dicts": state, "args": inputs(place)}

    return run_elsewhere(torch.func.functional_call, moved)


class OnlyHere(TorchDispatchMode):
    """Refuse tensors that are made on another device, or drawn from another device's generator."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if generator is not None and generator._cdata != self.place.generator._cdata:  # it arrives in a new wrapper
            raise WrongDevice(f"{func} draws on {self.place.device} from a generator of another device")
        if func is torch.ops.aten._local_scalar_dense.default:  # .item(), .tolist(), bool(t)
            if args[0].dtype.is_floating_point:
                return 0.5  # some figure, to be reported; a decision would ask for a bool
            raise LooksAtValues(f"looks at values of {args[0].dtype}")
        result = func(*args, **kwargs)
        if not tensors_in((args, kwargs)):
            for tensor in tensors_in(result):
                if tensor.device != self.place.device:
                    raise WrongDevice(f"{func} makes a tensor on {tensor.device}, not on {self.place.device}")
        return result


class ExplicitDevice(TorchFunctionMode):
    """On the CPU, refuse what a GPU would not forgive.

    That is a new tensor that is not told its device (a generator alone does not tell it), a generator other than the
    one that was given, NumPy's view of a tensor without ``.cpu()``, and an operation on a tensor and such a copy.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", func)
        given = tensors_in((args, kwargs))
        if func in CONVERSIONS:  # a list of tensors is not a tensor
            given = [data for data in [*args, *kwargs.values()][:1] if torch.is_tensor(data)]
        if kwargs.get("generator") not in (None, self.generator):
            raise WrongDevice(f"{name} draws from another generator than the one that was given")
        copies = [tensor for tensor in given if is_copy(tensor)]
        if len(copies) < len(given) and any(tensor.ndim for tensor in copies):
            raise WrongDevice(f"{name} is given a copy on the CPU and a tensor that may be elsewhere")
        if func in (torch.Tensor.numpy, torch.Tensor.__array__) and not copies:
            raise WrongDevice("NumPy sees only the CPU: a tensor must be copied there by .cpu() first")
        result = func(*args, **kwargs)
        made = tensors_in(result)
        if made and not given and kwargs.get("device") is None:
            raise WrongDevice(f"{name} makes a tensor without an explicit device")
        if func is torch.Tensor.cpu:
            result = result.clone()  # on the CPU it would be the tensor itself
            result.is_copy_on_the_cpu = True
        elif copies:
            for tensor in made:
                tensor.is_copy_on_the_cpu = len(copies) == len(given)
        return result


def is_copy(tensor: torch.Tensor) -> bool:
    return getattr(tensor, "is_copy_on_the_cpu", False)


def tensors_in(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
