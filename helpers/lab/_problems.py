"""How the gradients of single examples are found for a model and a loss: the ground of ``helpers.lab.gradients``."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from helpers.lab.batches import Batch

Loss = Callable[..., torch.Tensor]
Gradients = dict[str, torch.Tensor]

# From so many entries of all gradients on, faster outer products repay looking at every operation, on a CPU.
LARGE_GRADIENTS = 2**23
# Bytes that gradients and activations of a chunk may take, and examples that it may hold, unless the reader says
# otherwise.
CHUNK_BYTES, LARGEST_CHUNK = 2**28, 1024
# Examples compared one by one at the start: few, since each costs a backward pass of its own; a prime, so that other
# dimensions are seldom taken for that of the examples.
COMPARED = 5
# Copies of an example that show whether random draws are shared: by chance, own draws all agree with at most 2^-31.
COPIES = 32

LOSS_COUPLES = (
    "the loss divides by something that depends on the batch, or compares its examples, as with class weights, "
    "ignore_index or padding; sum over the batch instead (reduction='sum')"
)
MODEL_COUPLES = (
    "the model computes one example's output from others of its batch, as batch normalization and x - x.mean(0) do"
)
PENALTY = (
    "the loss has a part that is no share of an example, such as a penalty on the weights in a sum over examples; "
    "take the mean over examples, or leave the penalty out"
)


class Problem:
    """A model and a loss, and how the gradients of single examples are found."""

    def __init__(self, model: nn.Module, loss: Loss, trainable: dict[str, nn.Parameter]):
        self.model, self.loss = model, loss
        self.names, self.parameters = list(trainable), list(trainable.values())
        self.moving: list[tuple[torch.Tensor, torch.Tensor]] = []  # buffers that a forward pass moves, and their values
        self.fixed: list[nn.Parameter] = []  # that could be trained, but whose gradients are not asked for
        self.sliceable = self.random = False
        self.averages = self.sums = True  # what the loss may do over a batch, as long as nothing speaks against it

    # What is settled once

    def settle(self, some: Batch) -> None:
        """Find out how gradients can be had, and that the examples' gradients make up those of their batch."""
        self.random = self._observe(some)
        if self.random:
            _require_own_draws(self, some)
        self.some = some
        with _evaluating(self.model) if self.random else nullcontext():
            whole, prediction = self.plain(some)
            require_finite(self.names, whole, some)
            self.singles = self._one_by_one(some, prediction)
            require_finite(self.names, self.singles, some)
            self._compare(some, whole, self.singles)

    def _observe(self, some: Batch) -> bool:
        """Note which buffers a pass moves and how much it stores, and return whether it draws random numbers."""
        before = [(buffer, buffer.detach().clone()) for buffer in self.model.buffers()]
        own = {x.data_ptr() for x in (*self.model.parameters(), *self.model.buffers())}
        stored = 0

        def count(x: torch.Tensor) -> torch.Tensor:
            nonlocal stored
            stored += 0 if x.data_ptr() in own else x.nbytes
            return x

        device = self.parameters[0].device
        states = _random_state(device)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            _total(self.loss, some.predict(self.model), some)
        drew = not all(map(torch.equal, states, _random_state(device)))
        _set_random_state(states, device)
        self.bytes_of_activations = stored / len(some)
        self.moving = [(buffer, old) for buffer, old in before if not torch.equal(buffer, old)]
        return drew

    def _one_by_one(self, some: Batch, prediction: Any) -> list[torch.Tensor]:
        """Return the gradients of batches of one, stacked; and note whether predictions have a row for each."""
        if len(some) == 1:
            self.sliceable = False
            return [gradient[None] for gradient in self.plain(some)[0]]
        try:
            found = [self.plain(one) for one in some.split(1)]
        except Exception as error:
            raise ValueError(f"a batch of one example must have a gradient, got {error!r}") from error
        self.sliceable = _has_rows(prediction, found[0][1], len(some))
        return [torch.stack(column) for column in zip(*(gradients for gradients, _ in found), strict=True)]

    def _compare(self, some: Batch, whole: list[torch.Tensor], singles: list[torch.Tensor]) -> None:
        """Settle whether the loss averages or sums over a batch; refuse what does neither."""
        mean, scales = [x.mean(0) for x in singles], [as_matrix(x).norm(dim=1).mean() for x in singles]
        kinds = self._agreement(whole, mean, scales, len(some))
        if not any(kinds):
            raise ValueError(
                "the gradient of a batch loss must be the mean or the sum of the gradients of its examples as batches "
                f"of one, but that of {len(some)} examples is neither: {self._why(some)}"
            )
        self.averages, self.sums = kinds

    def _agreement(self, whole: Sequence, mean: Sequence, scales: Sequence, n: int) -> tuple[bool, bool]:
        """Return whether the derivatives of a batch loss are the mean, and whether they are the sum."""
        total, larger = [n * x for x in mean], [n * scale for scale in scales]
        return self.close(whole, mean, scales), self.close(whole, total, larger)

    def _why(self, some: Batch) -> str:
        """Return the likely cause: the loss of a batch, the model, or what the loss adds beside both."""
        if not self.sliceable:
            return f"{MODEL_COUPLES}; or {LOSS_COUPLES}"
        self.rewind()
        prediction = some.predict(self.model)
        if not any(self.agreement(some, prediction)):
            return LOSS_COUPLES
        apart = _gradients_of(self.parameters, lambda: losses_of(self.loss, prediction, some).sum())
        scales = [as_matrix(x).norm(dim=1).sum() for x in self.singles]
        return PENALTY if self.close(apart, [x.sum(0) for x in self.singles], scales) else MODEL_COUPLES

    @cached_property
    def vectorized(self) -> bool:
        """Whether vmap gives the gradients that one backward pass an example gives; found out when it is needed."""
        if self.moving:
            return False
        states = _random_state(self.parameters[0].device)
        try:
            with _evaluating(self.model) if self.random else nullcontext():
                found, _ = self._vectorized(self.some)
            if self.random:
                self._vectorized(self.some)  # in training it may do something else that vmap cannot do
        except Exception:  # whatever vmap cannot do; the loop has just done it
            return False
        finally:
            _set_random_state(states, self.parameters[0].device)
        return self.close(found, self.singles, [x.norm() for x in self.singles])

    def has_derivatives(self, vector: list[torch.Tensor]) -> bool:
        """Return whether derivatives along a vector come out right without gradients."""
        if self.random or self.moving or not self.sliceable:
            return False
        try:
            found = self.derivatives(self.some, vector)
        except Exception:  # a layer without derivatives in forward mode; the gradients do it
            return False
        expected = _products(self.singles, vector)
        size = _length([x.norm() for x in self.singles]) * _length([x.norm() for x in vector])
        return self.close([found], [expected], [size])

    def default_chunk_size(self, *, rows: bool) -> int:
        per_example = self.bytes_of_activations
        if rows or self.random or not self.sliceable:
            per_example += sum(p.nbytes for p in self.parameters)
        return int(min(max(CHUNK_BYTES // max(per_example, 1), 1), LARGEST_CHUNK))

    def only(self, parameters: Sequence[nn.Parameter]) -> "Problem":
        """Return the same problem for the gradients of some of the parameters."""
        part = copy.copy(self)
        kept = [k for k, p in enumerate(self.parameters) if any(p is q for q in parameters)]
        part.names, part.parameters, part.singles = (
            [column[k] for k in kept] for column in (self.names, self.parameters, self.singles)
        )
        part.fixed = [p for k, p in enumerate(self.parameters) if k not in kept]
        return part

    # Gradients

    def rows(self, chunk: Batch) -> list[torch.Tensor]:
        """Return the gradients of the examples of a chunk, shape (n, ...) for each parameter."""
        find = self._vectorized if self.vectorized else self._looped
        found, prediction = find(chunk)
        require_finite(self.names, found, chunk)
        self.require_separate(chunk, prediction, found)
        return found

    def summed(self, chunk: Batch) -> list[torch.Tensor]:
        """Return the sum of the gradients of a chunk, in float32 at least."""
        if self.random or not self.sliceable:
            return [wide(x).sum(0) for x in self.rows(chunk)]
        found, prediction = self.plain(chunk)
        require_finite(self.names, found, chunk)
        self.require_separate(chunk, prediction, None)
        factor = 1 if self.sums else len(chunk)
        return [wide(x) * factor for x in found]

    def squares(self, chunk: Batch) -> torch.Tensor:
        """Return |g_i|² from the gradients."""
        return sum(as_matrix(wide(x)).square().sum(1) for x in self.rows(chunk))

    def products(self, chunk: Batch, vector: list[torch.Tensor]) -> torch.Tensor:
        """Return g_i · v from the gradients."""
        return _products(self.rows(chunk), vector)

    def derivatives(self, chunk: Batch, vector: list[torch.Tensor]) -> torch.Tensor:
        """Return g_i · v as derivatives of the losses along v."""

        def losses(*parameters: torch.Tensor) -> tuple[torch.Tensor, Any]:
            with replaced(self.model, self.parameters, parameters):
                prediction = chunk.predict(self.model)
                return losses_of(self.loss, prediction, chunk), prediction

        now = tuple(p.detach() for p in self.parameters)
        with plain_attention():
            _, found, prediction = jvp(losses, now, tuple(vector), has_aux=True)
        if not torch.isfinite(found).all():
            _require_finite_inputs(chunk)
        self.require_separate(chunk, prediction, None)  # before the rest, as it knows why a loss is 0/0
        require_finite(["the product with direction"], [found], chunk)
        return wide(found.detach())

    def plain(self, batch: Batch) -> tuple[list[torch.Tensor], Any]:
        """Return the gradient of a batch loss by an ordinary backward pass, and the prediction."""
        kept = []

        def run() -> torch.Tensor:
            self.rewind()
            kept[:] = [batch.predict(self.model)]
            return _total(self.loss, kept[0], batch)

        return _gradients_of(self.parameters, run), tree_map(_detached, kept[0])

    def rewind(self) -> None:
        """Put back the buffers that a forward pass moves, so that every pass finds the same model."""
        with torch.no_grad():
            for buffer, value in self.moving:
                buffer.copy_(value)

    def _looped(self, chunk: Batch) -> tuple[list[torch.Tensor], Any]:
        result = [p.new_empty((len(chunk), *p.shape)) for p in self.parameters]
        predictions = []
        for k, one in enumerate(chunk.split(1)):
            gradients, prediction = self.plain(one)
            predictions.append(prediction)
            for row, gradient in zip(result, gradients, strict=True):
                row[k] = gradient
        return result, _stacked(predictions) if self.sliceable else None

    def _vectorized(self, chunk: Batch) -> tuple[list[torch.Tensor], Any]:
        kept: list[Any] = []  # leaves and form of a prediction for one example

        def loss_of_one(parameters: list[torch.Tensor], *tensors: torch.Tensor) -> tuple[torch.Tensor, Any]:
            one = chunk.with_tensors([x[None] for x in tensors])
            values = [*parameters, *(p.detach() for p in self.fixed)]
            with replaced(self.model, [*self.parameters, *self.fixed], values):
                prediction = one.predict(self.model)
                total = _total(self.loss, prediction, one)
            kept[:] = tree_flatten(prediction)
            return total, [x.detach() for x in kept[0] if isinstance(x, torch.Tensor)]

        now = [p.detach() for p in self.parameters]
        dims = (None, *[0] * len(chunk.tensors))
        gradient = vmap(grad(loss_of_one, has_aux=True), in_dims=dims, randomness="different")
        size = len(chunk) * sum(p.numel() for p in self.parameters)
        outer_products = _OuterProducts() if size >= LARGE_GRADIENTS and now[0].is_cpu else nullcontext()
        with plain_attention(), outer_products:
            found, leaves = gradient(now, *chunk.tensors)
        if not self.sliceable:
            return found, None
        rows = iter(leaves)  # (n, 1, ...)
        return found, tree_unflatten([next(rows)[:, 0] if isinstance(x, torch.Tensor) else x for x in kept[0]], kept[1])

    # Checks

    def require_separate(self, chunk: Batch, prediction: Any, rows: list[torch.Tensor] | None) -> None:
        """Refuse a chunk whose loss is not the mean, or the sum, of the losses of its examples."""
        if len(chunk) == 1 or len(self.some) == 1:
            return
        if self.sliceable:
            kinds = self.agreement(chunk, prediction)
        elif self.random:  # a second pass would draw others
            return
        else:
            scales = [as_matrix(x).norm(dim=1).mean() for x in rows]
            kinds = self._agreement(self.plain(chunk)[0], [x.mean(0) for x in rows], scales, len(chunk))
        averages, sums = self.averages and kinds[0], self.sums and kinds[1]
        if not averages and not sums:
            raise ValueError(self._refusal(chunk))
        self.averages, self.sums = averages, sums

    def _refusal(self, chunk: Batch) -> str:
        kind = "mean" if self.averages else "sum"
        return (
            f"the loss of a batch must be the {kind} of the losses of its examples as batches of one, but for "
            f"{len(chunk)} examples its derivatives are not: {LOSS_COUPLES}"
        )

    def close(self, found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], scales: Sequence) -> bool:
        """Return whether two computations of the same tensors agree to rounding.

        Rounding errors of a network are some multiple of ``eps`` of the terms that it adds, of size `scales` for each
        tensor; what is wrong is wrong by a visible part of them. The line is drawn halfway between, in digits, at √eps.
        A tensor that ought to vanish, such as the gradient of a bias before a softmax, is the rounding error of larger
        ones: ``eps^(3/4)`` of all of them together is allowed as well.
        """
        eps = _precision(self.parameters[0])
        everything = _length(scales)
        pairs = zip(found, expected, scales, strict=True)
        return all((wide(x) - wide(y)).norm() <= eps**0.5 * s + eps**0.75 * everything for x, y, s in pairs)

    def close_each(self, found: torch.Tensor, expected: torch.Tensor) -> bool:
        """Return whether entries agree to rounding, each for itself, by the rule of :meth:`close`."""
        eps = _precision(self.parameters[0])
        return bool(((found - expected).abs() <= eps**0.5 * expected + eps**0.75 * expected.max()).all())

    def agreement(self, chunk: Batch, prediction: Any) -> tuple[bool, bool]:
        """Return whether the loss averages, and whether it sums, over a chunk, by its derivatives by predictions."""
        leaves, form = tree_flatten(prediction)
        leaves = [x.detach().requires_grad_() if _is_floating(x) else x for x in leaves]
        asked = [x for x in leaves if _is_floating(x)]
        prediction = tree_unflatten(leaves, form)
        together = _derivatives(_total(self.loss, prediction, chunk), asked)
        mean = [x / len(chunk) for x in _derivatives(losses_of(self.loss, prediction, chunk).sum(), asked)]
        return self._agreement(together, mean, [wide(x).norm() for x in mean], len(chunk))


# Private parts


def losses_of(loss: Loss, prediction: Any, batch: Batch) -> torch.Tensor:
    """Return the loss of each example as a batch of one, shape (n,), from rows of the prediction."""
    leaves, form = tree_flatten(prediction)
    where = [k for k, x in enumerate(leaves) if isinstance(x, torch.Tensor)]

    def loss_of_one(rows: list[torch.Tensor], tensors: list[torch.Tensor]) -> torch.Tensor:
        one = list(leaves)
        for k, row in zip(where, rows, strict=True):
            one[k] = row[None]
        return _total(loss, tree_unflatten(one, form), batch.with_tensors([x[None] for x in tensors]))

    rows = [leaves[k] for k in where]
    try:
        return vmap(loss_of_one)(rows, batch.tensors)
    except Exception:  # whatever vmap cannot do, such as control flow by data
        picked = ([[x[k] for x in tensors] for tensors in (rows, batch.tensors)] for k in range(len(batch)))
        return torch.stack([loss_of_one(*one) for one in picked])


def _total(loss: Loss, prediction: Any, batch: Batch) -> torch.Tensor:
    found = loss(prediction) if batch.targets is None else loss(prediction, batch.targets)
    if not _is_floating(found):
        raise ValueError(f"loss must return a tensor with a gradient, got {type(found).__name__} {found!r}")
    return found.sum()


def _gradients_of(parameters: Sequence[torch.Tensor], run: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    """Return the gradient of what `run` returns; the parameters' .grad is None and may be used."""
    total = run()
    if not total.requires_grad:
        raise ValueError("loss must depend on the trainable parameters, got a number without a gradient")
    try:
        found = torch.autograd.grad(total, parameters, materialize_grads=True)
    except RuntimeError as error:
        if "heckpoint" not in str(error):
            raise
        run().backward()  # a reentrant checkpoint knows nothing else
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        for p in parameters:
            p.grad = None
    return [x.to_dense() if x.is_sparse else x for x in found]


def _derivatives(total: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    if not total.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    return list(torch.autograd.grad(total, leaves, materialize_grads=True))


@contextmanager
def replaced(model: nn.Module, parameters: Sequence[nn.Parameter], values: Sequence[torch.Tensor]) -> Iterator[None]:
    """Give parameters other values wherever they occur in a model, under however many names, and put them back."""
    new = dict(zip(parameters, values, strict=True))
    places = [(m._parameters, name, p) for m in model.modules() for name, p in m._parameters.items() if p in new]
    try:
        for where, name, p in places:
            where[name] = new[p]
        yield
    finally:
        for where, name, p in places:
            where[name] = p


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _random_state(device: torch.device) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(states: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def _has_rows(prediction: Any, of_one: Any, n: int) -> bool:
    """Return whether every tensor of a prediction has a row for each example."""
    pairs = zip(tree_leaves(prediction), tree_leaves(of_one), strict=True)
    tensors = [(x, y) for x, y in pairs if isinstance(x, torch.Tensor)]
    fits = [x.ndim > 0 and y.shape[:1] == (1,) and x.shape == (n, *y.shape[1:]) for x, y in tensors]
    return bool(fits) and all(fits)


def _is_floating(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, torch.Tensor) else x


def _stacked(predictions: list[Any]) -> Any:
    """Join predictions for batches of one."""
    columns = zip(*map(tree_leaves, predictions), strict=True)
    leaves = [torch.cat(column) if isinstance(column[0], torch.Tensor) else column[0] for column in columns]
    return tree_unflatten(leaves, tree_flatten(predictions[0])[1])


def plain_attention() -> AbstractContextManager:
    """Compute attention by matrix products: the fused kernels know neither vmap nor derivatives in forward mode."""
    return sdpa_kernel(SDPBackend.MATH)


def as_matrix(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor of n rows as a matrix."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


def wide(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float32 at least, for sums."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _length(norms: Sequence) -> float:
    return math.hypot(*(float(x) for x in norms))


def _precision(tensor: torch.Tensor) -> float:
    """Return the relative precision that a model computes in, which its parameters' type may overstate."""
    eps = torch.finfo(tensor.dtype).eps
    if torch.is_autocast_enabled(tensor.device.type):
        eps = max(eps, torch.finfo(torch.get_autocast_dtype(tensor.device.type)).eps)
    if tensor.is_cuda and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32):
        eps = max(eps, 2.0**-10)  # TF32 has ten bits
    return eps


def _products(rows: Sequence[torch.Tensor], vector: Sequence[torch.Tensor]) -> torch.Tensor:
    return sum(as_matrix(wide(x)) @ wide(v).flatten().to(wide(x)) for x, v in zip(rows, vector, strict=True))


def side_by_side(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Lay gradients of shape (n, ...) side by side, shape (n, number of parameters)."""
    return torch.cat([as_matrix(x) for x in rows], dim=1)


def _require_own_draws(problem: "Problem", some: Batch) -> None:
    """Refuse random draws that all examples of a batch share."""
    same = some[torch.zeros(COPIES, dtype=torch.int64, device=some.tensors[0].device)]
    with torch.no_grad():
        passes = []
        for _ in range(2):
            problem.rewind()
            passes.append([x for x in tree_leaves(same.predict(problem.model)) if _is_floating(x)])
    if all(torch.equal(x, y) for x, y in zip(*passes, strict=True)):
        return
    rows = [x for found in passes for x in found if x.ndim and len(x) == COPIES]
    if rows and all(torch.equal(x, x[:1].expand_as(x)) for x in rows):
        raise ValueError(
            "examples must draw their own random numbers, but all of a batch share theirs, so that their gradients "
            "are not independent: call model.eval()"
        )


def require_finite(names: Sequence[str], gradients: Sequence[torch.Tensor], batch: Batch) -> None:
    """Refuse gradients that are not finite, and say why."""
    for name, gradient in zip(names, gradients, strict=True):
        # One pass: a sum in float32 at least is finite where its terms are.
        if torch.isfinite(gradient.sum(dtype=torch.promote_types(gradient.dtype, torch.float32))):
            continue
        _require_finite_inputs(batch)
        if gradient.dtype == torch.float16:
            raise ValueError(
                f"gradients must fit into float16, up to {torch.finfo(torch.float16).max:g}, but that of {name} "
                "overflowed: use bfloat16 or float32"
            )
        raise ValueError(f"gradients must be finite, but that of {name} is not")


def _require_finite_inputs(batch: Batch) -> None:
    for x in batch.tensors:
        if _is_floating(x) and (bad := ~torch.isfinite(as_matrix(x)).all(1)).any():
            raise ValueError(f"inputs must be finite, got NaN or infinity in {int(bad.sum())} of {len(x)} examples")


def trainable_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return a model's trainable parameters by their first names."""
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError("model must have a parameter that requires a gradient, got none")
    return found


def require_uncoupled(model: nn.Module) -> None:
    """Refuse layers that normalize by the statistics of a batch."""
    for name, module in model.named_modules():
        batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if batch_norm and (module.training or module.running_mean is None):
            raise ValueError(
                f"examples must not be coupled, but {name or 'the model'} normalizes by the statistics of its batch, "
                f"so that one example has no gradient of its own: got {type(module).__name__}; "
                "call model.eval() to use its running statistics, or use GroupNorm or LayerNorm"
            )


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
