"""Second moments in many random networks, forward and backward, against building the networks one after another."""

import math
from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.timing import Race, require_equal
from helpers.lab import generator
from helpers.lab.networks import Propagation, propagate

NETWORKS = 200
COMPARED = 50  # so few are drawn in one group, layer by layer
WIDTH = 64
DEPTH = 10
EXAMPLES = 16

Drawn = tuple[nn.Sequential, torch.Tensor]  # a network and a readout of its last activations


def races() -> list[Race]:
    source = generator("benchmark inputs")
    inputs = torch.randn((EXAMPLES, WIDTH), generator=source, device=source.device)
    wanted = one_by_one(inputs, with_the_same_weights(generator("benchmark networks")))
    found = all_at_once(inputs, generator("benchmark networks"), COMPARED)
    require_equal(list(wanted), [x.float() for x in found])
    return [
        Race(
            "random networks",
            "propagate",
            lambda: all_at_once(inputs, source),
            {"loop": lambda: one_by_one(inputs, drawn_anew(source))},
            at_least=5,
        )
    ]


def all_at_once(inputs: torch.Tensor, source: torch.Generator, n_networks: int = NETWORKS) -> Propagation:
    return propagate(inputs, [WIDTH] * DEPTH, n_networks=n_networks, weight_scale=2.0, generator=source)


def one_by_one(inputs: torch.Tensor, networks: Iterator[Drawn]) -> Propagation:
    found = []
    for network, readout in networks:
        a, layers, activations = inputs, [], []
        for layer in network:
            a = layer(a)
            (layers if isinstance(layer, nn.Linear) else activations).append(a)
        gradients = torch.autograd.grad((a @ readout).sum(), layers)
        with torch.no_grad():
            signals = (layers, activations, gradients)
            found.append([torch.stack([x.square().mean() for x in signal]) for signal in signals])
    return Propagation(*(torch.stack(parts) for parts in zip(*found, strict=True)))


def built(device: torch.device) -> nn.Sequential:
    layers = [(nn.Linear(WIDTH, WIDTH, bias=False, device=device), nn.ReLU()) for _ in range(DEPTH)]
    return nn.Sequential(*[module for pair in layers for module in pair])


def drawn_anew(source: torch.Generator) -> Iterator[Drawn]:
    for _ in range(NETWORKS):
        network = built(source.device)
        for layer in network[::2]:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=source)
        yield network, torch.randn(WIDTH, generator=source, device=source.device)


def with_the_same_weights(source: torch.Generator) -> Iterator[Drawn]:
    """Yield the first networks that `propagate` draws: each layer's weights for all of them, then all readouts."""
    shape = (COMPARED, WIDTH, WIDTH)
    weights = [torch.randn(shape, generator=source, device=source.device) for _ in range(DEPTH)]
    readouts = torch.randn((COMPARED, WIDTH), generator=source, device=source.device)
    for r in range(COMPARED):
        network = built(source.device)
        with torch.no_grad():
            for layer, weight in zip(network[::2], weights, strict=True):
                layer.weight.copy_(weight[r].T * math.sqrt(2 / WIDTH))
        yield network, readouts[r]
