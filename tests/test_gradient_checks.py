"""What has no gradients of single examples, or comes in another form, is refused with the reason or treated right."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from helpers.lab.gradients import mean_gradient, per_sample_gradients, per_sample_products, per_sample_squared_norms
from helpers.lab.runtime import generator, seeded
from tests.small_networks import build, examples, looped_gradients, perceptron
from tests.zoo import changes, fingerprint

CALLS = {
    "gradients": per_sample_gradients,
    "mean": mean_gradient,
    "norms": per_sample_squared_norms,
    "products": lambda model, *data, **options: per_sample_products(
        model, *data, direction={name: p.detach() for name, p in model.named_parameters()}, **options
    ),
}
FUNCTIONS = pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=generator("test.gradient_checks.data")).cpu()


def assert_refused(call, message, model, loss, *data, **options):
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        call(model, loss, *data, **options)
    assert changes(before, fingerprint(model)) == []


def assert_right(model, loss, *data, **options):
    """Refuse gradients, norms or a mean that differ from one backward pass an example."""
    rows = looped_gradients(model, loss, *data)
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(per_sample_gradients(model, loss, *data, **options), rows, **close)
    norms = sum(x.flatten(1).square().sum(1) for x in rows.values())
    torch.testing.assert_close(per_sample_squared_norms(model, loss, *data, **options), norms, **close)
    mean = {name: x.mean(0) for name, x in rows.items()}
    torch.testing.assert_close(mean_gradient(model, loss, *data, **options), mean, **close)


# A batch of one is not a share of the batch


def weighted(prediction, y):
    return functional.cross_entropy(prediction, y, weight=torch.tensor([1.0, 9.0, 1.0, 1.0], dtype=prediction.dtype))


def ignoring(prediction, y):
    return functional.cross_entropy(prediction, y, ignore_index=0)


def masked(prediction, y):
    return functional.cross_entropy(prediction[y > 0], y[y > 0])


def weighted_by_target(prediction, y):
    each = functional.cross_entropy(prediction, y, reduction="none")
    return (each * (1 + y)).sum() / (1 + y).sum()


def relative_to_the_largest(prediction, y):
    return functional.cross_entropy(prediction / prediction.abs().max(), y)


def rooted(prediction, y):
    return functional.mse_loss(prediction[:, 0], y.to(prediction)).sqrt()


LABELS = torch.tensor([0, 1, 3, 1, 2, 0, 3])


@FUNCTIONS
@pytest.mark.parametrize("loss", [weighted, ignoring, masked, weighted_by_target, relative_to_the_largest, rooted])
def test_losses_that_depend_on_the_rest_of_the_batch_are_refused(loss, call):
    message = "class weights, ignore_index or padding|a batch of one example must have a gradient|must be finite"
    assert_refused(call, message, build(perceptron), loss, normal(7, 4), LABELS)


def test_class_weights_with_two_examples_are_refused():
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 9.0]))
    data = torch.eye(2), torch.tensor([0, 1])
    with seeded("test.gradient_checks.weights"):
        model = nn.Linear(2, 2)
    assert_refused(per_sample_gradients, "class weights", model, loss, *data)


@FUNCTIONS
@pytest.mark.parametrize("loss", [weighted, ignoring])
def test_rare_classes_outside_of_the_first_comparison_are_found_too(loss, call):
    # The five examples compared one by one have label 1, and 0 and 1 meet in the last chunk only.
    labels = torch.ones(100, dtype=torch.int64)
    labels[[77, 88]] = 0
    labels[78] = 2
    assert_refused(
        call, "for 10 examples its derivatives are not", build(perceptron), loss, normal(100, 4), labels, chunk_size=10
    )


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 9.0, 2.0, 3.0], dtype=torch.float64), reduction="sum"),
        nn.CrossEntropyLoss(ignore_index=0, reduction="sum"),
        lambda prediction, y: functional.cross_entropy(prediction, y, reduction="none") * (1 + y),
    ],
)
def test_sums_over_weighted_examples_are_right(loss):
    assert_right(build(perceptron), loss, normal(7, 4), LABELS, chunk_size=3)


@pytest.mark.parametrize("power", [1, 2, 3])
def test_a_penalty_in_a_mean_is_a_part_of_every_example(power):
    model = build(perceptron)

    def loss(prediction, y):
        return functional.cross_entropy(prediction, y) + 0.1 * sum(p.abs().pow(power).sum() for p in model.parameters())

    data = normal(7, 4), LABELS
    expected = torch.autograd.grad(loss(model(data[0]), data[1]), list(model.parameters()))
    rows = per_sample_gradients(model, loss, *data, chunk_size=3)
    torch.testing.assert_close([x.mean(0) for x in rows.values()], list(expected))
    torch.testing.assert_close(list(mean_gradient(model, loss, *data, chunk_size=3).values()), list(expected))
    norms = per_sample_squared_norms(model, loss, *data, chunk_size=3)
    torch.testing.assert_close(norms, sum(x.flatten(1).square().sum(1) for x in rows.values()))


@FUNCTIONS
@pytest.mark.parametrize("power", [1, 2, 3])
def test_a_penalty_in_a_sum_is_refused(power, call):
    model = build(perceptron)

    def loss(prediction, y):
        penalty = sum(p.abs().pow(power).sum() for p in model.parameters())
        return functional.cross_entropy(prediction, y, reduction="sum") + penalty

    assert_refused(call, "a penalty on the weights in a sum over examples", model, loss, normal(7, 4), LABELS)


class Coupled(nn.Module):
    def __init__(self, couple):
        super().__init__()
        self.first, self.last, self.couple = nn.Linear(4, 6), nn.Linear(6, 4), couple

    def forward(self, x):
        return self.last(self.couple(self.first(x)))


COUPLINGS = {
    "centered": lambda x: x - x.mean(0),
    "divided by the largest": lambda x: x / x.abs().max(),
    "attention over the batch": lambda x: (x @ x.T).softmax(1) @ x,
    "shifted by one": lambda x: x + 0.1 * x.roll(1, 0),
    "normalized by a function": lambda x: functional.batch_norm(x, None, None, training=True) if len(x) > 1 else x,
}


@FUNCTIONS
@pytest.mark.parametrize("couple", COUPLINGS.values(), ids=list(COUPLINGS))
def test_couplings_written_by_hand_are_refused(couple, call):
    model = build(lambda: Coupled(couple))
    assert_refused(call, "others of its batch", model, functional.cross_entropy, normal(7, 4), LABELS)


@FUNCTIONS
def test_a_coupling_of_five_examples_is_refused(call):
    model = build(lambda: Coupled(lambda x: x - x.mean(0) if len(x) >= 5 else x))
    assert_refused(call, "others of its batch", model, functional.cross_entropy, normal(7, 4), LABELS)


@FUNCTIONS
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_small_batches_are_joined_until_five_examples_show_a_coupling(batch_size, call):
    model = build(lambda: Coupled(lambda x: x - x.mean(0) if len(x) >= 5 else x))
    loader = DataLoader(TensorDataset(normal(7, 4), LABELS), batch_size=batch_size)
    assert_refused(call, "others of its batch", model, functional.cross_entropy, loader)


def test_ambiguous_examples_do_not_settle_whether_a_loss_averages():
    # The gradients of the first and of the compared examples vanish, so that their mean is their sum.
    model = build(lambda: nn.Linear(4, 1, bias=False))
    inputs = torch.zeros(9, 4, dtype=torch.float64)
    inputs[[1, 3]] = 1.0
    for loss in (lambda prediction, y: prediction.sum(), lambda prediction, y: prediction.mean()):
        assert_right(model, loss, inputs, inputs, chunk_size=4)


# Random draws


class Noisy(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.first, self.last, self.shape = nn.Linear(4, 6), nn.Linear(6, 4), shape

    def forward(self, x):
        noise = torch.randn(self.shape or (len(x), 6), dtype=x.dtype, device=x.device) if self.training else 0
        return self.last(torch.tanh(self.first(x)) + noise)


@FUNCTIONS
@pytest.mark.parametrize("shape", [(1, 6), (6,), (1, 1)])
def test_draws_that_all_examples_share_are_refused(shape, call):
    model = build(lambda: Noisy(shape))
    assert_refused(call, "draw their own random numbers", model, functional.cross_entropy, normal(7, 4), LABELS)
    assert_right(model.eval(), functional.cross_entropy, normal(7, 4), LABELS)


def dropout(kind):
    return lambda: nn.Sequential(nn.Linear(4, 6), kind(0.5), nn.Linear(6, 4))


@pytest.mark.parametrize("constructor", [dropout(nn.Dropout), dropout(nn.AlphaDropout), lambda: Noisy(None)])
def test_own_draws_are_the_same_in_two_calls_and_for_all_functions(constructor):
    model = build(constructor)
    data = normal(7, 4), LABELS
    rows = per_sample_gradients(model, functional.cross_entropy, *data, chunk_size=3)
    again = per_sample_gradients(model, functional.cross_entropy, *data, chunk_size=3)
    torch.testing.assert_close(again, rows, rtol=0, atol=0)
    mean = mean_gradient(model, functional.cross_entropy, *data, chunk_size=3)
    torch.testing.assert_close(mean, {name: x.mean(0) for name, x in rows.items()})
    still = per_sample_gradients(model.eval(), functional.cross_entropy, *data)
    assert any((rows[name] - still[name]).abs().max() > 0.01 for name in rows)


# Ranges and precision


@FUNCTIONS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_inputs_that_are_not_finite_are_refused(value, call):
    inputs = normal(9, 4)
    inputs[3, 2] = value
    message = r"^inputs must be finite, got NaN or infinity in 1 of \d examples$"
    assert_refused(
        call, message, build(perceptron), functional.cross_entropy, inputs, torch.zeros(9, dtype=torch.int64)
    )


@FUNCTIONS
def test_gradients_that_are_not_finite_are_refused(call):
    def without_slope_at_zero(prediction, y):
        return (prediction * 0).abs().sqrt().sum() + prediction.sum()

    message = "^gradients must be finite, but that of 0.weight is not$"
    assert_refused(call, message, build(perceptron), without_slope_at_zero, normal(7, 4), LABELS)


@FUNCTIONS
@pytest.mark.parametrize("size", [1e3, 3e3, 6e4])
def test_overflow_of_float16_is_called_so(size, call):
    model = build(lambda: nn.Linear(4, 1), torch.float16)
    data = torch.full((6, 4), size, dtype=torch.float16), torch.zeros(6, 1, dtype=torch.float16)
    loss = lambda prediction, y: 100 * (prediction * 1.0).sum()  # noqa: E731
    assert_refused(
        call, "^gradients must fit into float16, up to 65504, but that of weight overflowed", model, loss, *data
    )


def test_float16_whose_squares_overflow_is_right():
    model = build(lambda: nn.Linear(4, 1), torch.float16)
    inputs = torch.full((6, 4), 500.0, dtype=torch.float16)
    norms = per_sample_squared_norms(model, lambda prediction, y: prediction.sum(), inputs, inputs)
    assert norms.tolist() == [4 * 500.0**2 + 1] * 6


# Forms of loss and data


@FUNCTIONS
@pytest.mark.parametrize("loss", [lambda p, y: 1.5, lambda p, y: p.sum().item(), lambda p, y: (p.argmax(1) == y).sum()])
def test_losses_that_are_no_differentiable_tensor_are_refused(loss, call):
    message = "^loss must return a tensor with a gradient, got (float|Tensor)"
    assert_refused(call, message, build(perceptron), loss, normal(7, 4), LABELS)


@FUNCTIONS
def test_losses_without_a_gradient_are_refused(call):
    loss = lambda prediction, y: prediction.detach().sum()  # noqa: E731
    assert_refused(call, "^loss must depend on the trainable parameters", build(perceptron), loss, normal(7, 4), LABELS)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 20])
@FUNCTIONS
def test_a_loader_gives_the_same_as_its_tensors(call, batch_size):
    model, data = build(perceptron), (normal(7, 4), LABELS)
    loader = DataLoader(TensorDataset(*data), batch_size=batch_size)
    expected = call(model, functional.cross_entropy, *data)
    torch.testing.assert_close(call(model, functional.cross_entropy, loader), expected)


@pytest.mark.parametrize(
    "form",
    [
        lambda x, y: [(x[:3], y[:3]), (x[3:], y[3:])].__iter__(),
        lambda x, y: ({"input": x[k : k + 2]} for k in range(0, 7, 2)),
        lambda x, y: (x[k : k + 2] for k in range(0, 7, 2)),
    ],
)
def test_iterables_of_batches_give_the_same_as_tensors(form):
    model, data = build(lambda: nn.Linear(4, 4)), (normal(7, 4), LABELS)

    def loss(prediction, y=None):
        return prediction.square().sum() if y is None else prediction.square().sum() + 0 * y.sum()

    expected = per_sample_squared_norms(model, loss, data[0], data[1])
    torch.testing.assert_close(per_sample_squared_norms(model, loss, form(*data)), expected)


def test_a_model_may_compute_its_own_loss():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = perceptron()

        def forward(self, x, y):
            return {"loss": functional.cross_entropy(self.body(x), y)}

    model, x = build(Own), normal(7, 4)
    rows = looped_gradients(model.body, functional.cross_entropy, x, LABELS)
    inputs = {"x": x, "y": LABELS}
    found = per_sample_gradients(model, lambda output: output["loss"], inputs, chunk_size=3)
    torch.testing.assert_close(list(found.values()), list(rows.values()))
    mean = mean_gradient(model, lambda output: output["loss"], inputs)
    torch.testing.assert_close(list(mean.values()), [x.mean(0) for x in rows.values()])


@FUNCTIONS
def test_forms_that_are_no_data_are_refused(call):
    model, loss = build(perceptron), functional.cross_entropy
    assert_refused(call, "^inputs must be tensors or an iterable of batches, got int$", model, loss, 3)
    assert_refused(call, "^inputs must hold at least one batch, got an empty iterable$", model, loss, iter([]))
    assert_refused(call, "^targets must be None where inputs are an iterable", model, loss, iter([1]), LABELS)
    message = re.escape("got shapes (7, 4), (6, 4) and (7,)")
    assert_refused(call, message, model, loss, (normal(7, 4), normal(6, 4)), LABELS)


def test_directions_of_other_parameters_are_refused():
    model = build(lambda: nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"^direction must have the trainable parameters \{'weight': \(4, 4\)"):
        per_sample_products(model, functional.cross_entropy, *examples(model), direction={"weight": torch.ones(4, 4)})


# What vmap cannot do


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return torch.cat([self.one(row) if row.sum() > 0 else self.other(row) for row in x.split(1)])


class Reentrant(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.body, self.last = nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 5), nn.Tanh()), nn.Linear(5, 4)

    def forward(self, x):
        return self.last(checkpoint(self.body, self.first(x), use_reentrant=True))


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(4, 3), nn.Linear(3, 4)

    def forward(self, x):
        state = None
        for _ in range(3):
            state = self.cell(x, state)
        return self.head(state)


def sparse():
    return nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Linear(8, 4))


@pytest.mark.parametrize("constructor", [Branching, Reentrant, Packed])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_what_vmap_cannot_do_is_right_by_a_loop(constructor, chunk_size):
    assert_right(build(constructor), functional.cross_entropy, normal(7, 4), LABELS, chunk_size=chunk_size)


@FUNCTIONS
@pytest.mark.parametrize("switched_off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("constructor", [Branching, Reentrant])
def test_the_loop_computes_gradients_where_the_reader_has_switched_them_off(constructor, switched_off, call):
    model, data = build(constructor), (normal(7, 4), LABELS)
    expected = call(model, functional.cross_entropy, *data)
    with switched_off():
        found = call(model, functional.cross_entropy, *data)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_sparse_gradients_are_made_dense():
    model, tokens = build(sparse), torch.tensor([[0, 1], [2, 2], [6, 0], [3, 4], [1, 1], [0, 5], [2, 0]])
    dense = copy.deepcopy(model)
    dense[0].sparse = False
    assert_right(dense, functional.cross_entropy, tokens, LABELS)
    found = per_sample_gradients(model, functional.cross_entropy, tokens, LABELS)
    torch.testing.assert_close(found, looped_gradients(dense, functional.cross_entropy, tokens, LABELS))
