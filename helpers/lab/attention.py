"""See what attention does inside a network: the scores that its softmax takes, a few rows at a time.

:func:`watch_attention` hears of three forms: ``scaled_dot_product_attention`` called directly, the function behind
``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer``, and a softmax along the last dimension whose result is
multiplied by something, as written out by hand.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

# A score below this is hidden: masks put -inf there, the lowest number of a type, or -10,000.
HIDDEN = -5_000.0

SOFTMAXES = {torch.softmax, F.softmax, torch.Tensor.softmax}
PRODUCTS = {torch.matmul, torch.bmm, torch.einsum, torch.functional.einsum}
PRODUCTS |= {torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.bmm}


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of attention: what its softmax takes, a row for each query.

    Parameters
    ----------
    name : str
        The module that made the call, as in ``model.named_modules()``.
    shape : tuple of int
        (B, heads, queries, keys).
    queries, keys : torch.Tensor or None
        Shapes (B, heads, n, d_k); None where attention was written out by hand.
    factor : float
        What products of the two are multiplied by; NaN where it was written out by hand.
    masks : tuple of torch.Tensor
        What is added to scores, or, if boolean, which of them are seen; each broadcasts to `shape`.
    causal : bool
        Whether a query sees no later key.
    moments : (float, float) or None
        What the mean square of a component of queries and of keys would be on average over independent weights of mean
        zero with the mean square of those used; None where they do not come right out of a linear map.
    """

    name: str
    shape: tuple[int, int, int, int]
    queries: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    factor: float = float("nan")
    masks: tuple[torch.Tensor, ...] = ()
    causal: bool = False
    moments: tuple[float, float] | None = None
    scores: torch.Tensor | None = None

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return the scores of some queries, as the softmax takes them, in float32 at least.

        Parameters
        ----------
        start, stop : int
            Which queries.

        Returns
        -------
        torch.Tensor, shape (B, heads, queries, keys)
            Minus infinity where a query does not see a key.
        """
        if self.scores is not None:
            scores = _wide(self.scores[..., start:stop, :])
        else:
            scores = self.factor * _wide(self.queries[..., start:stop, :]) @ _wide(self.keys).transpose(-1, -2)
        for mask in self.masks:
            part = mask[..., start:stop, :] if mask.ndim > 1 and mask.shape[-2] > 1 else mask
            scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part
        if self.causal:
            query = torch.arange(start, min(stop, self.shape[2]), device=scores.device)[:, None]
            scores = scores.masked_fill(torch.arange(self.shape[3], device=scores.device) > query, -torch.inf)
        return scores.masked_fill(scores <= HIDDEN, -torch.inf)

    def blocks(self, max_scores: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the scores of all queries, a block of rows at a time, and the first row's number.

        Parameters
        ----------
        max_scores : int
            No block holds more scores, unless one row of all heads does.
        """
        batch, heads, queries, keys = self.shape
        step = max(1, max_scores // max(1, batch * heads * keys))
        for start in range(0, queries, step):
            yield start, self.rows(start, start + step)


@contextmanager
def watch_attention(
    model: nn.Module, see: Callable[[AttentionCall], None], *, trace_weights: bool = False
) -> Iterator[None]:
    """Hand over each call of attention that a model makes within the ``with`` block, while it runs.

    Parameters
    ----------
    model : torch.nn.Module
    see : callable
        Is given each call at once, without a graph, so that nothing need be kept.
    trace_weights : bool
        Whether to find out by which weights queries and keys were made, for `AttentionCall.moments`. It keeps the
        outputs of all linear maps until the block ends.

    Raises
    ------
    ValueError
        If a call has no dimension of its own for queries and keys.

    Examples
    --------
    >>> layer = nn.MultiheadAttention(8, 2, batch_first=True)
    >>> x = torch.ones(3, 5, 8)
    >>> with watch_attention(layer, lambda call: print(call.name, call.shape)):
    ...     _ = layer(x, x, x)
    the model (3, 2, 5, 5)
    """
    running: list[str] = []
    handles = []
    for name, module in model.named_modules():
        handles += _announce(name or "the model", module, running)
    try:
        with _Listening(running, see, trace_weights):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _announce(name: str, module: nn.Module, running: list[str]) -> list[Any]:
    """Have the modules that are running listed, innermost last, and return the handles of the hooks that do it."""
    return [
        module.register_forward_pre_hook(lambda *_: running.append(name)),
        module.register_forward_hook(lambda *_: running.pop() and None, always_call=True),
    ]


class _Listening(TorchFunctionMode):
    def __init__(self, running: list[str], see: Callable[[AttentionCall], None], trace_weights: bool) -> None:
        super().__init__()
        self.running, self.see, self.trace_weights = running, see, trace_weights
        self.softmaxes = WeakTensorKeyDictionary()  # what came out of a softmax, to what went in
        self.made: dict[int, tuple[torch.Tensor, float]] = {}  # by storage: output of a linear map, and its moment

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._tell(_direct(*args, **kwargs))
        elif func is F.multi_head_attention_forward:
            self._tell(_multi_head(*args, trace_weights=self.trace_weights, **kwargs))
        elif func in PRODUCTS:
            self._find_softmax(args)
        result = func(*args, **kwargs)
        if func in SOFTMAXES:
            self._remember(result, *args, **kwargs)
        elif func is F.linear and self.trace_weights:
            self.made[result.untyped_storage().data_ptr()] = result, _moment(*args, **kwargs)
        elif isinstance(result, torch.Tensor) and args and isinstance(args[0], torch.Tensor):
            self._follow(args[0], result)
        return result

    @torch.no_grad()
    def _tell(self, found: dict[str, Any]) -> None:
        if self.trace_weights and "moments" not in found and "queries" in found:
            found["moments"] = self._origin(found["queries"], found["keys"])
        self.see(AttentionCall(self.running[-1] if self.running else "the model", **found))

    def _origin(self, queries: torch.Tensor, keys: torch.Tensor) -> tuple[float, float] | None:
        """Return the moments of both, if each lies where a linear map has put it and the two are not the same."""
        at = [part.untyped_storage().data_ptr() for part in (queries, keys)]
        same = queries.data_ptr() == keys.data_ptr()
        return None if same or any(key not in self.made for key in at) else tuple(self.made[key][1] for key in at)

    def _remember(self, result: torch.Tensor, input: torch.Tensor, dim: int | None = None, *_: Any, **__: Any) -> None:
        if input.ndim >= 3 and dim in (-1, input.ndim - 1):
            self.softmaxes[result] = input.detach()

    def _follow(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Dropout or another type makes a new tensor of what a softmax gave."""
        if before.shape == after.shape and before in self.softmaxes:
            self.softmaxes[after] = self.softmaxes[before]

    def _find_softmax(self, args: Sequence[Any]) -> None:
        for x in args:
            if isinstance(x, torch.Tensor) and x in self.softmaxes:
                self._tell(_by_hand(self.softmaxes.pop(x)))


def _direct(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> dict[str, Any]:
    """Return what a call of ``scaled_dot_product_attention`` says of its scores."""
    queries, keys = _four_dimensions(query), _four_dimensions(key)
    if enable_gqa:
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    masks = () if attn_mask is None else (_four_dimensions(attn_mask) if attn_mask.ndim > 2 else attn_mask,)
    shape = *queries.shape[:3], keys.shape[2]
    return {
        "shape": shape,
        "queries": queries,
        "keys": keys,
        "factor": factor,
        "masks": masks,
        "causal": is_causal,
    }


def _multi_head(*args: Any, trace_weights: bool, **kwargs: Any) -> dict[str, Any]:
    """Return what a call of ``multi_head_attention_forward`` says of its scores, from its arguments."""
    bound = MULTI_HEAD.bind(*args, **kwargs)
    bound.apply_defaults()
    call = bound.arguments
    query, key = (x if x.ndim == 3 else x.unsqueeze(1) for x in (call["query"], call["key"]))  # (n, B, width)
    if call["use_separate_proj_weight"]:
        weights = call["q_proj_weight"], call["k_proj_weight"]
    else:
        weights = call["in_proj_weight"].chunk(3)[:2]
    biases = (None, None) if call["in_proj_bias"] is None else call["in_proj_bias"].chunk(3)[:2]
    queries, keys = F.linear(query, weights[0], biases[0]), F.linear(key, weights[1], biases[1])
    if call["bias_k"] is not None:
        keys = torch.cat([keys, call["bias_k"].expand(1, *keys.shape[1:])])
    queries, keys = (x.unflatten(-1, (call["num_heads"], -1)).permute(1, 2, 0, 3) for x in (queries, keys))
    if call["static_k"] is not None:
        keys = call["static_k"].unflatten(0, (-1, call["num_heads"]))
    if call["add_zero_attn"]:
        keys = F.pad(keys, (0, 0, 0, 1))
    found = {
        "shape": (*queries.shape[:3], keys.shape[2]),
        "queries": queries,
        "keys": keys,
        "factor": queries.shape[-1] ** -0.5,
        "masks": _masks_of_multi_head(call["key_padding_mask"], call["attn_mask"], call["num_heads"], keys.shape[2]),
    }
    if trace_weights:
        alone = call["bias_k"] is None and call["static_k"] is None and not call["add_zero_attn"]
        moments = _moment(query, weights[0], biases[0]), _moment(key, weights[1], biases[1])
        found["moments"] = moments if alone else None
    return found


MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)


def _masks_of_multi_head(
    padding: torch.Tensor | None, mask: torch.Tensor | None, n_heads: int, n_keys: int
) -> tuple[torch.Tensor, ...]:
    """Return masks as ``scaled_dot_product_attention`` takes them: a boolean one of the module says what is hidden."""
    found = []
    if padding is not None:
        found.append(padding[:, None, None, :] if padding.ndim == 2 else padding[None, None, None, :])
    if mask is not None:
        found.append(mask.unflatten(0, (-1, n_heads)) if mask.ndim == 3 else mask)
    added = [n_keys - part.shape[-1] for part in found]  # keys that the module adds are seen by all
    found = [F.pad(part, (0, more)) if more else part for part, more in zip(found, added, strict=True)]
    return tuple(~part if part.dtype == torch.bool else part for part in found)


def _by_hand(scores: torch.Tensor) -> dict[str, Any]:
    scores = _four_dimensions(scores)
    return {"shape": tuple(scores.shape), "scores": scores}


def _four_dimensions(x: torch.Tensor) -> torch.Tensor:
    """Return (B, heads, n, ·); dimensions between are heads, and one that is missing is a single one."""
    if x.ndim < 2:
        raise ValueError(f"attention must have a dimension for tokens and one for their components, got {x.ndim}")
    while x.ndim < 4:
        x = x[None] if x.ndim == 2 else x[:, None]
    return x if x.ndim == 4 else x.flatten(1, -3)


def _moment(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> float:
    """Return what the mean square behind a linear map would be, on average over independent weights of mean zero."""
    of_bias = 0.0 if bias is None else _mean_square(bias)
    return weight.shape[1] * _mean_square(weight) * _mean_square(input) + of_bias


def _mean_square(x: torch.Tensor) -> float:
    return x.detach().double().square().mean().item()


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.detach().float() if x.dtype in (torch.float16, torch.bfloat16) else x.detach()
