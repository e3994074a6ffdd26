"""Statistics of the attention of a long sequence in bounded memory, against holding all of its scores."""

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.timing import Race, require_equal
from helpers import attention_scaling
from helpers.lab import generator

SEQUENCES, LENGTH, WIDTH, HEADS = 2, 2048, 64, 4
SAMPLES, KEYS, DIMENSION = 2_000, 16, 128


class Layer(nn.Module):
    """Attention among the tokens of a sequence, called directly."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        queries, keys = self.heads(x)
        return F.scaled_dot_product_attention(queries, keys, keys)


def races() -> list[Race]:
    source = generator("benchmark of attention")
    model = Layer().to(source.device)
    inputs = torch.randn((SEQUENCES, LENGTH, WIDTH), generator=source, device=source.device)
    require_equal(in_blocks(model, inputs), all_at_once(model, inputs))
    return [
        Race(
            "attention",
            f"scores of {LENGTH:,} tokens, {HEADS} heads",
            lambda: in_blocks(model, inputs),
            {"all scores": lambda: all_at_once(model, inputs)},
            at_most=2,
        ),
        Race(
            "samplers",
            "sample_scores",
            lambda: scores(source),
            {"bare": lambda: torch.randn((SAMPLES, KEYS + 1, DIMENSION), generator=source, device=source.device)},
            at_most=2,
        ),
        Race(
            "samplers",
            "sample_cosines",
            lambda: cosines(source),
            {"bare": lambda: torch.randn((2, 10_000, DIMENSION), generator=source, device=source.device)},
            at_most=2,
        ),
    ]


def in_blocks(model: Layer, inputs: torch.Tensor) -> torch.Tensor:
    """Return variance of scores and participation of each head."""
    heads = attention_scaling.score_report(model, inputs, max_scores=2**20).heads
    return torch.tensor([[float(head.spread.value) ** 2, float(head.participation.value)] for head in heads])


@torch.no_grad()
def all_at_once(model: Layer, inputs: torch.Tensor) -> torch.Tensor:
    queries, keys = model.heads(inputs)
    F.scaled_dot_product_attention(queries, keys, keys)  # the report runs the model too
    scores = queries @ keys.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5
    variance = scores.var(-1, correction=0).mean((0, 2))
    return torch.stack([variance, scores.softmax(-1).square().sum(-1).mean((0, 2))], dim=-1).cpu()


def scores(source: torch.Generator) -> torch.Tensor:
    return attention_scaling.sample_scores(SAMPLES, KEYS, DIMENSION, generator=source, dtype=torch.float32)


def cosines(source: torch.Generator) -> torch.Tensor:
    return attention_scaling.sample_cosines(10_000, DIMENSION, generator=source, dtype=torch.float32)
