"""Gradients of single examples, and their norms, against Opacus, BackPACK and a plain loop."""

import copy
import warnings
from collections.abc import Callable

import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad
from opacus import GradSampleModule
from opacus.validators import ModuleValidator
from torch import nn
from torch.nn import functional as F

from benchmarks.noise_scale import Transformer, convolutional_network
from benchmarks.timing import Call, Race, require_equal
from helpers.lab import generator, models, seeded
from helpers.lab.gradients import per_sample_gradients, per_sample_squared_norms

EXAMPLES = 256

Gradients = dict[str, torch.Tensor]
Maker = Callable[[nn.Module, torch.Tensor, torch.Tensor], Call]


def races() -> list[Race]:
    # The hooks of both peers make PyTorch say that no input requires a gradient.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    loop = {"loop": by_loop}
    peers = {"Opacus": by_opacus, "BackPACK": by_backpack}
    # Neither peer has a rule for PyTorch's attention, which reads its weights without calling a layer. Opacus brings
    # one of its own, made of linear layers; BackPACK has no rule for layer normalization.
    networks = {
        "perceptron": (lambda: models.mlp((64, 256, 256, 10)), peers | loop),
        "convolutional network": (convolutional_network, peers | loop),
        "transformer": (Transformer, loop),
        "transformer of Opacus": (lambda: ModuleValidator.fix(Transformer()), {"Opacus": by_opacus} | loop),
    }
    return [race for name, network in networks.items() for race in races_of(name, *network)]


def races_of(name: str, build: Callable[[], nn.Module], makers: dict[str, Maker]) -> list[Race]:
    with seeded(f"benchmark {name}"):
        model = build()
    source = generator("benchmark examples")
    inputs = torch.randn((EXAMPLES, 64), generator=source, device=source.device)
    targets = torch.randint(10, (EXAMPLES,), generator=source, device=source.device)
    model.to(source.device)

    def ours() -> Gradients:
        return per_sample_gradients(model, F.cross_entropy, inputs, targets)

    def norms() -> torch.Tensor:
        return per_sample_squared_norms(model, F.cross_entropy, inputs, targets)

    def norms_of_gradients() -> torch.Tensor:
        return sum(g.flatten(1).square().sum(1) for g in ours().values())

    others = {other: make(model, inputs, targets) for other, make in makers.items()}
    for other in others.values():
        require_equal(other(), ours())
    require_equal(norms_of_gradients(), norms())
    gradients = Race("per-sample gradients", f"gradients, {name}", ours, others, at_least=1)
    if name != "perceptron":
        return [gradients]
    return [gradients, Race("norms", f"norms, {name}", norms, {"gradients": norms_of_gradients}, at_least=10)]


def by_opacus(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> Call:
    own = GradSampleModule(copy.deepcopy(model), loss_reduction="sum")

    def gradients() -> Gradients:
        F.cross_entropy(own(inputs), targets, reduction="sum").backward()
        return {name.removeprefix("_module."): take(p, "grad_sample") for name, p in own.named_parameters()}

    return gradients


def by_backpack(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> Call:
    own = extend(copy.deepcopy(model))
    loss = extend(nn.CrossEntropyLoss(reduction="sum"))

    def gradients() -> Gradients:
        with backpack(BatchGrad()):
            loss(own(inputs), targets).backward()
        return {name: take(p, "grad_batch") for name, p in own.named_parameters()}

    return gradients


def take(parameter: nn.Parameter, where: str) -> torch.Tensor:
    """Take what a peer left on a parameter, so that the memory is free after a call: whoever frees his own only when
    the next call starts gets warm memory for it.
    """
    found = getattr(parameter, where)
    setattr(parameter, where, None)
    parameter.grad = None
    return found


def by_loop(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> Call:
    parameters = dict(model.named_parameters())

    def gradients() -> Gradients:
        rows = [
            torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), list(parameters.values()))
            for x, y in zip(inputs, targets, strict=True)
        ]
        return {name: torch.stack(column) for name, column in zip(parameters, zip(*rows, strict=True), strict=True)}

    return gradients
