"""A zoo of small models, on which each tool for a reader's own network is right or says why not, and harms none.

`ZOO` holds every entry by its name. An entry makes the same problem each time: model, loss, inputs and targets in
float64, with a mean over examples as loss unless it says otherwise. `fingerprint` records what a tool must leave alone.
"""

import copy
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from helpers.lab.runtime import generator, seeded

N_CLASSES, VOCABULARY, LENGTH = 3, 7, 5
Inputs = torch.Tensor | tuple[torch.Tensor, ...] | dict[str, torch.Tensor]


class Problem(NamedTuple):
    """What a tool is given; a tuple of inputs is handed to the model as ``*inputs``, a dictionary as ``**inputs``."""

    model: nn.Module
    loss: Callable[[Any, torch.Tensor], torch.Tensor]
    inputs: Inputs
    targets: torch.Tensor


@dataclass(frozen=True)
class Entry:
    """How to make a problem, and what is peculiar to it.

    Parameters
    ----------
    build : callable
        Makes the model, with draws from torch's global generator.
    inputs, targets : callable
        Make data of n examples on dimension 0 from ``(generator, n)``.
    loss : callable
        ``loss(model(inputs), targets)``, or ``loss(model)(…)`` if it `penalizes` the weights of the model.
    training : bool
        Mode of the model.
    couples_examples : bool
        The loss of a batch is not the mean of the losses of its examples as batches of one.
    uses_randomness : bool
        A forward pass draws from torch's global generator.
    moves_buffers : bool
        A forward pass changes a buffer.
    vmap : bool
        ``torch.func.vmap`` can run the model.
    penalizes : bool
        The loss reads the weights of the model.
    lazy : bool
        The parameters have no shape before the first forward pass.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator, int], Inputs]
    targets: Callable[[torch.Generator, int], torch.Tensor]
    loss: Callable[..., Any] = F.cross_entropy
    training: bool = True
    couples_examples: bool = False
    uses_randomness: bool = False
    moves_buffers: bool = False
    vmap: bool = True
    penalizes: bool = False
    lazy: bool = False

    def problem(self, n: int = 6, *, dtype: torch.dtype = torch.float64) -> Problem:
        """Return the problem with n examples: each call makes a new model with the same parameters."""
        draws = generator("test.zoo.data")
        with seeded("test.zoo.model"):
            model = self.build().to(dtype).train(self.training)
        inputs = map_inputs(lambda x: x.to(dtype) if x.is_floating_point() else x, self.inputs(draws, n))
        targets = self.targets(draws, n)
        targets = targets.to(dtype) if targets.is_floating_point() else targets
        return Problem(model, self.loss(model) if self.penalizes else self.loss, inputs, targets)


# Data


def map_inputs(function: Callable[[torch.Tensor], torch.Tensor], inputs: Inputs) -> Inputs:
    if isinstance(inputs, dict):
        return {name: function(x) for name, x in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(function(x) for x in inputs)
    return function(inputs)


def normal(*shape: int) -> Callable[[torch.Generator, int], torch.Tensor]:
    return lambda draws, n: torch.randn(n, *shape, generator=draws, dtype=torch.float64, device=draws.device)


def integers(high: int, *shape: int) -> Callable[[torch.Generator, int], torch.Tensor]:
    return lambda draws, n: torch.randint(high, (n, *shape), generator=draws, device=draws.device)


def examples(inputs: Inputs, rows: slice) -> Inputs:
    """Return some of the examples."""
    return map_inputs(lambda x: x[rows], inputs)


def apply(model: nn.Module, inputs: Inputs) -> Any:
    """Return what a model makes of inputs of any form."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


labels, tokens = integers(N_CLASSES), integers(VOCABULARY, LENGTH)
vectors, sequences = normal(4), normal(LENGTH, 4)


# Losses


def each_token(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def of_dictionary(output: dict[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output["logits"], targets)


def summed(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, targets, reduction="sum")


def class_weighted(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, targets, weight=torch.tensor([1.0, 9.0, 3.0]).to(logits))


def ignoring_a_class(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, targets, ignore_index=1)


def penalized(model: nn.Module) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, targets) + 0.1 * sum(p.square().sum() for p in model.parameters())

    return loss


def contrastive(embeddings: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Tell each example from the others of its batch."""
    similarity = embeddings @ embeddings.T
    return F.cross_entropy(similarity, torch.arange(len(similarity), device=similarity.device))


# Models with a forward of their own


class ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))
        for norm in self.norms:
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.norms[0](self.first(x)))
        return F.relu(x + self.norms[1](self.second(hidden)))


class TransformerBlock(nn.Module):
    def __init__(self, width: int, *, norm_first: bool) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(width, 6), nn.GELU(), nn.Linear(6, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[-2], device=x.device, dtype=x.dtype)
        return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.norm_first:
            x = x + self.attend(self.norms[0](x))
            return x + self.feed_forward(self.norms[1](x))
        x = self.norms[0](x + self.attend(x))
        return self.norms[1](x + self.feed_forward(x))


class LanguageModel(nn.Module):
    """Predicts the next token; the output layer has the weights of the embedding."""

    def __init__(self, *, norm_first: bool, width: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Parameter(0.1 * torch.randn(LENGTH, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, norm_first=norm_first) for _ in range(2)))
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embedding(tokens) + self.positions))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = kind(4, 3, num_layers=2, batch_first=True, dropout=dropout)
        self.head = nn.Linear(3, N_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x)[0][..., -1, :])


class UShaped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU())
        self.bottom = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.head = nn.Conv2d(6, N_CLASSES, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skipped = self.down(x)
        return self.head(torch.cat([skipped, self.up(self.bottom(skipped))], dim=-3))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, N_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        hidden += 0.5
        hidden.mul_(2.0).relu_()
        return self.second(hidden)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(VOCABULARY, 3), nn.Linear(4, 3)
        self.head = nn.Linear(3, N_CLASSES)

    def forward(self, tokens: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.embedding(tokens).mean(-2) + self.linear(features)))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.head = nn.Linear(5, N_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False))


class Cube(torch.autograd.Function):
    """Knows its own derivative, and nothing of vmap."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class OwnDerivative(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, N_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(Cube.apply(self.first(x)))


class Half(nn.Linear):
    """Is a Linear by type, and does not multiply by its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight / 2, self.bias)


class EqualizedLinear(nn.Linear):
    """Has weights of variance 1, and multiplies by √(2 / fan_in) of them."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__(fan_in, fan_out)
        nn.init.normal_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight * (2 / self.in_features) ** 0.5, self.bias)


class Shared(nn.Module):
    """Applies one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, N_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Bag(nn.Module):
    """Averages the embeddings of all tokens but the padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4, padding_idx=0)
        self.head = nn.Linear(4, N_CLASSES)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        kept = (tokens != self.embedding.padding_idx).unsqueeze(-1)
        return self.head(self.embedding(tokens).sum(-2) / (1 + kept.sum(-2)))


class DictionaryOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.head = nn.Linear(5, N_CLASSES)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.tanh(self.body(x))
        return {"hidden": hidden, "logits": self.head(hidden)}


class Centered(nn.Module):
    """Batch normalization of its own, without a layer that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 5), nn.Linear(5, N_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.layer(x)
        return self.head(torch.tanh(hidden - hidden.mean(0)))


class UnusedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, N_CLASSES), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


# Models made of torch's own layers


def mlp(linear: Callable[[int, int], nn.Module] = nn.Linear, middle: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(linear(4, 5), middle or nn.ReLU(), linear(5, N_CLASSES))


def resnet() -> nn.Sequential:
    blocks = ResidualBlock(3), ResidualBlock(3)
    return nn.Sequential(nn.Conv2d(2, 3, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, N_CLASSES))


def convolutional(*layers: nn.Module, flat: int) -> Callable[[], nn.Sequential]:
    """Return what copies the layers, draws their parameters anew and puts a linear layer behind them."""

    def build() -> nn.Sequential:
        model = nn.Sequential(*copy.deepcopy(layers), nn.Flatten(), nn.Linear(flat, N_CLASSES))
        for layer in model.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        return model

    return build


def frozen() -> nn.Sequential:
    model = mlp()
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def shared_prelu() -> nn.Sequential:
    activation = nn.PReLU()
    return nn.Sequential(nn.Linear(4, 4), activation, nn.Linear(4, 4), activation, nn.Linear(4, N_CLASSES))


def lazy() -> nn.Sequential:
    return nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(N_CLASSES))


def wrapped(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Sequential]:
    return lambda: mlp(lambda fan_in, fan_out: wrap(nn.Linear(fan_in, fan_out)))


def normalized(norm: Callable[[], nn.Module]) -> Callable[[], nn.Sequential]:
    def build() -> nn.Sequential:
        layers = nn.Conv2d(2, 4, 3), norm(), nn.ReLU(), nn.Flatten(), nn.Linear(64, N_CLASSES)
        return nn.Sequential(*layers)

    return build


images = normal(2, 6, 6)

ZOO: dict[str, Entry] = {
    "mlp": Entry(mlp, vectors, labels),
    "linear regression": Entry(lambda: nn.Linear(4, 2), vectors, normal(2), F.mse_loss),
    "resnet, training": Entry(resnet, images, labels, couples_examples=True, moves_buffers=True, vmap=False),
    "resnet, evaluation": Entry(resnet, images, labels, training=False),
    "pre-LN transformer": Entry(lambda: LanguageModel(norm_first=True), tokens, tokens, each_token),
    "post-LN transformer": Entry(lambda: LanguageModel(norm_first=False), tokens, tokens, each_token),
    "transformer, evaluation": Entry(
        lambda: LanguageModel(norm_first=True), tokens, tokens, each_token, training=False
    ),
    "GRU": Entry(lambda: Recurrent(nn.GRU), sequences, labels, vmap=False),
    "LSTM": Entry(lambda: Recurrent(nn.LSTM), sequences, labels, vmap=False),
    "strided convolution, 1d": Entry(
        convolutional(nn.Conv1d(2, 4, 3, stride=2, padding=1), nn.ReLU(), flat=16), normal(2, 8), labels
    ),
    "grouped convolution": Entry(
        convolutional(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2), flat=24), images, labels
    ),
    "depthwise convolution": Entry(
        convolutional(nn.Conv2d(2, 4, 3, groups=2, dilation=2), nn.ReLU(), nn.Conv2d(4, 3, 1), flat=12), images, labels
    ),
    "circular convolution": Entry(
        convolutional(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.ReLU(), flat=108), images, labels
    ),
    "convolution, 3d": Entry(convolutional(nn.Conv3d(2, 3, 2), nn.Tanh(), flat=24), normal(2, 3, 3, 3), labels),
    "transposed convolution, 1d": Entry(
        convolutional(nn.ConvTranspose1d(2, 3, 3, stride=2), nn.Tanh(), flat=27), normal(2, 4), labels
    ),
    "transposed convolution, 2d": Entry(
        convolutional(nn.ConvTranspose2d(2, 4, 3, stride=2, groups=2), nn.Tanh(), flat=196), normal(2, 3, 3), labels
    ),
    "transposed convolution, 3d": Entry(
        convolutional(nn.ConvTranspose3d(2, 2, 2), nn.Tanh(), flat=54), normal(2, 2, 2, 2), labels
    ),
    "u-shaped": Entry(UShaped, normal(2, 4, 4), integers(N_CLASSES, 4, 4)),
    "dropout, training": Entry(lambda: mlp(middle=nn.Dropout(0.5)), vectors, labels, uses_randomness=True),
    "dropout, evaluation": Entry(lambda: mlp(middle=nn.Dropout(0.5)), vectors, labels, training=False),
    "dropout of channels, evaluation": Entry(
        convolutional(nn.Conv2d(2, 4, 3), nn.Dropout2d(0.4), nn.ReLU(), flat=64), images, labels, training=False
    ),
    "LSTM with dropout, evaluation": Entry(
        lambda: Recurrent(nn.LSTM, dropout=0.4), sequences, labels, training=False, vmap=False
    ),
    "frozen layers": Entry(frozen, vectors, labels),
    "layer used twice": Entry(Shared, vectors, labels),
    "unused layer": Entry(UnusedLayer, vectors, labels),
    "PReLU under two names": Entry(shared_prelu, vectors, labels),
    "weight norm by hooks": Entry(wrapped(weight_norm), vectors, labels),
    "weight norm by parametrization": Entry(wrapped(parametrizations.weight_norm), vectors, labels),
    "spectral norm by hooks": Entry(wrapped(spectral_norm), vectors, labels, moves_buffers=True),
    "spectral norm by parametrization": Entry(
        wrapped(parametrizations.spectral_norm), vectors, labels, moves_buffers=True
    ),
    "spectral norm, evaluation": Entry(wrapped(parametrizations.spectral_norm), vectors, labels, training=False),
    "lazy": Entry(lazy, vectors, labels, lazy=True),
    "in place": Entry(InPlace, vectors, labels),
    "activation in place": Entry(lambda: mlp(middle=nn.ReLU(inplace=True)), vectors, labels),
    "tuple of inputs": Entry(TwoInputs, lambda draws, n: (tokens(draws, n), vectors(draws, n)), labels),
    "dictionary of inputs": Entry(
        TwoInputs, lambda draws, n: {"features": vectors(draws, n), "tokens": tokens(draws, n)}, labels
    ),
    "dictionary as output": Entry(DictionaryOutput, vectors, labels, of_dictionary),
    "checkpoint": Entry(Checkpointed, vectors, labels, vmap=False),
    "own derivative": Entry(OwnDerivative, vectors, labels, vmap=False),
    "subclass of Linear that halves": Entry(lambda: mlp(Half), vectors, labels),
    "equalized learning rate": Entry(lambda: mlp(EqualizedLinear), vectors, labels),
    "embedding with padding": Entry(Bag, tokens, labels),
    "layer norm": Entry(lambda: mlp(middle=nn.LayerNorm(5)), vectors, labels),
    "RMS norm": Entry(lambda: mlp(middle=nn.RMSNorm(5)), vectors, labels),
    "group norm": Entry(normalized(lambda: nn.GroupNorm(2, 4)), images, labels),
    "instance norm": Entry(normalized(lambda: nn.InstanceNorm2d(4, affine=True)), images, labels),
    "instance norm with running statistics": Entry(
        normalized(lambda: nn.InstanceNorm2d(4, track_running_stats=True)),
        images,
        labels,
        moves_buffers=True,
        vmap=False,
    ),
    # What looks like a mean over examples, and is none.
    "summed loss": Entry(mlp, vectors, labels, summed, couples_examples=True),
    "class weights": Entry(mlp, vectors, labels, class_weighted, couples_examples=True),
    "ignored class": Entry(mlp, vectors, labels, ignoring_a_class, couples_examples=True),
    "contrastive loss": Entry(lambda: nn.Linear(4, 3), vectors, labels, contrastive, couples_examples=True),
    "centered by the batch": Entry(Centered, vectors, labels, couples_examples=True),
    # Of every example's loss, it is a part.
    "penalty on the weights": Entry(mlp, vectors, labels, penalized, penalizes=True),
}


# Truth


def gradient(problem: Problem) -> dict[str, torch.Tensor]:
    """Return by one plain backward pass the gradient of the loss of all examples, for each trainable parameter.

    It changes the model's ``.grad`` and whatever a forward pass changes: give it a problem of its own.
    """
    problem.model.zero_grad()
    with seeded("test.zoo.pass"):
        problem.loss(apply(problem.model, problem.inputs), problem.targets).backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in problem.model.named_parameters()
        if p.requires_grad
    }


@functools.cache  # the same for all tools
def gradients_one_by_one(entry: Entry, n: int = 6) -> dict[str, torch.Tensor]:
    """Return the gradients of batches of one example, stacked, each by a backward pass through a fresh model."""
    found = []
    problem = entry.problem(n)
    for i in range(n):
        if entry.moves_buffers:  # nothing else outlives a pass
            problem = entry.problem(n)
        one = slice(i, i + 1)
        found.append(gradient(problem._replace(inputs=examples(problem.inputs, one), targets=problem.targets[one])))
    return {name: torch.stack([gradients[name] for gradients in found]) for name in found[0]}


# Leave no trace

HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks")]


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Return all that a tool must leave as it was, by name: compare two with :func:`changes`.

    Parameters and buffers (which they are, their values, ``.grad``, ``requires_grad``, their hooks), the modes, hooks,
    attributes and modules under each of their names, the random states of torch, NumPy and Python, and torch's global
    settings.
    """
    found: dict[str, Any] = _global_state()
    for path, module in model.named_modules(remove_duplicate=False):
        found[f"module {path!r}"] = (id(module), type(module), module.training)
        found[f"attributes of {path!r}"] = sorted(vars(module))
        for hooks in HOOKS:
            found[f"{hooks} of {path!r}"] = [(key, id(hook)) for key, hook in getattr(module, hooks).items()]
        for name, tensor in (module._parameters | module._buffers).items():
            found[f"tensor {name} of {path!r}"] = _of_tensor(tensor)
    return found


def _of_tensor(tensor: torch.Tensor | None) -> tuple[Any, ...]:
    if tensor is None:
        return ()
    hooks = [tuple(getattr(tensor, name) or ()) for name in ("_backward_hooks", "_post_accumulate_grad_hooks")]
    identity = id(tensor), type(tensor), id(tensor.grad), tensor.requires_grad, tensor.is_leaf, hooks
    return (*identity, _values(tensor), _values(tensor.grad))


def _values(tensor: torch.Tensor | None) -> bytes | None:
    """Return the values to the last bit, so that NaN equals itself; a lazy parameter has none."""
    if tensor is None or isinstance(tensor, nn.parameter.UninitializedTensorMixin):
        return None
    return str(tuple(tensor.shape)).encode() + tensor.detach().cpu().contiguous().numpy().tobytes()


def _global_state() -> dict[str, Any]:
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    hooks = {name: value for name, value in vars(torch.nn.modules.module).items() if name.startswith("_global_")}
    return {
        "torch's random state": _values(torch.get_rng_state()),
        "CUDA's random states": [_values(state) for state in on_cuda],
        "NumPy's random state": str(np.random.get_state()),  # noqa: NPY002
        "Python's random state": random.getstate(),
        "gradients enabled": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "hooks of all modules": {name: list(value) for name, value in hooks.items() if isinstance(value, dict)},
    }


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the names of what differs, is gone or is new."""
    missing = object()
    return [name for name in sorted(before | after) if before.get(name, missing) != after.get(name, missing)]


def train(problem: Problem, steps: int = 2) -> dict[str, torch.Tensor]:
    """Return parameters and buffers after some steps of gradient descent, with the same draws each time."""
    for _ in range(steps):
        moves = gradient(problem)
        with torch.no_grad():
            for name, parameter in problem.model.named_parameters():
                if name in moves:
                    parameter -= 0.1 * moves[name]
    return problem.model.state_dict()


@functools.cache
def trained(entry: Entry, n: int) -> dict[str, torch.Tensor]:
    """Return parameters and buffers of a model that no tool has seen, after some steps of training."""
    return train(entry.problem(n))


def assert_trains_as_if_untouched(problem: Problem, entry: Entry, n: int = 6) -> None:
    """Refuse a model that training moves otherwise than the same model that no tool has seen."""
    found, expected = train(problem), trained(entry, n)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), f"training moves {name} otherwise than without the tool"
