"""Gradients of single examples, their norms and their mean, each against one plain backward pass an example."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from helpers.lab import _problems as problems
from helpers.lab.gradients import flatten, mean_gradient, per_sample_gradients, per_sample_squared_norms
from helpers.lab.runtime import seeded
from tests.small_networks import (
    COUPLED,
    LOSSES,
    MODELS,
    PartlyUsed,
    Scaled,
    assert_same,
    build,
    build_named,
    convolutional,
    examples,
    far_examples,
    frozen,
    gradient_of_mean_loss,
    looped_gradients,
    looped_matrix,
    perceptron,
)


@pytest.mark.parametrize("name", MODELS)
def test_per_sample_gradients_equal_one_backward_pass_an_example(name):
    model = build_named(name)
    data = examples(model)
    found = per_sample_gradients(model, functional.cross_entropy, *data)
    assert_same(found, looped_gradients(model, functional.cross_entropy, *data))


@pytest.mark.parametrize("switched_off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("tool", [per_sample_gradients, mean_gradient])
def test_gradients_are_computed_where_the_reader_has_switched_them_off(tool, switched_off):
    model = perceptron()
    data = examples(model)
    expected = tool(model, functional.cross_entropy, *data)
    with switched_off():
        found = tool(model, functional.cross_entropy, *data)
    assert_same(found, expected)


@pytest.mark.parametrize("switched_off", [torch.no_grad, torch.inference_mode])
def test_squared_norms_are_computed_where_the_reader_has_switched_gradients_off(switched_off):
    model = perceptron()
    data = examples(model)
    expected = per_sample_squared_norms(model, functional.cross_entropy, *data)
    with switched_off():
        found = per_sample_squared_norms(model, functional.cross_entropy, *data)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("name", MODELS)
def test_large_per_sample_gradients_equal_one_backward_pass_an_example(name, chunk_size, monkeypatch):
    # Large gradients are multiplied in another way; here all are large.
    monkeypatch.setattr(problems, "LARGE_GRADIENTS", 1)
    model = build_named(name)
    data = examples(model)
    found = per_sample_gradients(model, functional.cross_entropy, *data, chunk_size=chunk_size)
    assert_same(found, looped_gradients(model, functional.cross_entropy, *data))


def test_large_per_sample_gradients_of_single_precision_stay_single(monkeypatch):
    monkeypatch.setattr(problems, "LARGE_GRADIENTS", 1)
    model = build(perceptron, torch.float32)
    data = examples(model)
    found = per_sample_gradients(model, functional.cross_entropy, *data)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert_same(found, looped_gradients(model, functional.cross_entropy, *data), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_per_sample_gradients_are_those_of_the_loss_of_one_example(name):
    model = build(perceptron)
    data = examples(model, name)
    assert_same(per_sample_gradients(model, LOSSES[name], *data), looped_gradients(model, LOSSES[name], *data))


def test_reduction_makes_no_difference_to_per_sample_gradients():
    model = build(perceptron)
    data = examples(model)
    mean, total, each = (per_sample_gradients(model, LOSSES[name], *data) for name in list(LOSSES)[:3])
    assert_same(total, mean)
    assert_same(each, mean)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_mean_and_sum_of_per_sample_gradients_belong_to_mean_and_sum_of_the_losses(reduction):
    model = build(perceptron)
    inputs, targets = examples(model)
    functional.cross_entropy(model(inputs), targets, reduction=reduction).backward()
    rows = per_sample_gradients(model, functional.cross_entropy, inputs, targets)
    reduced = {name: getattr(row, reduction)(0) for name, row in rows.items()}
    assert_same(reduced, {name: p.grad for name, p in model.named_parameters()})


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 6, 7, 100])
def test_chunks_make_no_difference_to_per_sample_gradients(chunk_size):
    # 7 examples: 1 and 7 divide them, 2, 3 and 6 do not.
    model = build(convolutional)
    data = examples(model)
    found = per_sample_gradients(model, functional.cross_entropy, *data, chunk_size=chunk_size)
    assert_same(found, looped_gradients(model, functional.cross_entropy, *data))


def recorded_chunks(monkeypatch, method):
    """Return a list that fills with the sizes of the chunks that a method of the problem treats."""
    sizes = []
    original = getattr(problems.Problem, method)

    def recording(problem, chunk):
        sizes.append(len(chunk))
        return original(problem, chunk)

    monkeypatch.setattr(problems.Problem, method, recording)
    return sizes


@pytest.mark.parametrize(("chunk_size", "sizes"), [(None, [7]), (1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (99, [7])])
def test_per_sample_gradients_treat_a_chunk_at_once(chunk_size, sizes, monkeypatch):
    found = recorded_chunks(monkeypatch, "rows")
    model = build(perceptron)
    per_sample_gradients(model, functional.cross_entropy, *examples(model), chunk_size=chunk_size)
    assert found == sizes


@pytest.mark.parametrize(("limit", "largest"), [(3, 3), (2.99, 2), (0.5, 1)])
def test_a_chunk_has_as_many_examples_as_fit(limit, largest, monkeypatch):
    model = build(lambda: nn.Linear(4, 4))
    inputs, targets = examples(model)
    # For an example, its gradient; and what backward passes need, which is the input for the weight and 2 x for x².
    per_example = 8 * (4 * 4 + 4 + 4 + 4)
    monkeypatch.setattr(problems, "CHUNK_BYTES", per_example * limit)
    found = recorded_chunks(monkeypatch, "rows")
    per_sample_gradients(model, lambda prediction, y: prediction.square().sum(), inputs, targets)
    assert max(found) == largest


def test_one_example_has_a_per_sample_gradient():
    model = build(perceptron)
    data = examples(model, n=1)
    found = per_sample_gradients(model, functional.cross_entropy, *data)
    assert_same(found, looped_gradients(model, functional.cross_entropy, *data))


def identical_inputs_through_dropout(training, chunk_size):
    model = build(lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(60, 1, bias=False)))
    model.train(training)
    inputs = torch.ones(8, 60, dtype=torch.float64)
    with seeded("test.gradient_noise.dropout"):
        found = per_sample_gradients(model, functional.l1_loss, inputs, inputs[:, :1] + 100, chunk_size=chunk_size)
    return found["1.weight"][:, 0]  # (8, 60), ∓ the mask


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_dropout_draws_a_mask_for_each_example(chunk_size):
    # Two masks of 60 coins are equal with probability 2⁻⁶⁰.
    masks = -identical_inputs_through_dropout(True, chunk_size)
    assert set(masks.flatten().tolist()) == {0.0, 2.0}
    assert len({tuple(mask) for mask in masks.tolist()}) == 8


def test_dropout_in_evaluation_mode_draws_no_mask():
    assert (identical_inputs_through_dropout(False, None) == -1).all()


CALLS = {
    "per_sample_gradients": per_sample_gradients,
    "mean_gradient": mean_gradient,
    "per_sample_squared_norms": per_sample_squared_norms,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_gradients_leave_the_model_alone(call, training):
    model = build(lambda: nn.Sequential(nn.Dropout(0.0), frozen(perceptron(), "2.bias"))).train(training)
    for k, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, k) if p.requires_grad else None
    before = copy.deepcopy(model)  # without .grad
    CALLS[call](model, functional.cross_entropy, *far_examples())
    for k, (p, old) in enumerate(zip(model.parameters(), before.parameters(), strict=True)):
        assert torch.equal(p, old)
        assert p.requires_grad == old.requires_grad
        assert (p.grad == k).all() if p.requires_grad else p.grad is None
    assert [module.training for module in model.modules()] == [training] * len(list(model.modules()))


@pytest.mark.parametrize("call", ["per_sample_gradients", "mean_gradient", "per_sample_squared_norms"])
def test_gradients_are_found_where_gradients_are_switched_off(call):
    model = build(perceptron)
    data = far_examples()
    expected = CALLS[call](model, functional.cross_entropy, *data)
    with torch.no_grad():
        found = CALLS[call](model, functional.cross_entropy, *data)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("call", ["per_sample_gradients", "mean_gradient", "per_sample_squared_norms"])
def test_gradients_carry_no_graph(call):
    # A graph would keep the activations of all examples in memory.
    found = CALLS[call](build(perceptron), functional.cross_entropy, *far_examples())
    assert not any(g.requires_grad for g in (found.values() if isinstance(found, dict) else [found]))


@pytest.mark.parametrize("name", ["perceptron", "frozen parameters", "tied weights", "convolution and group norm"])
def test_flatten_keeps_the_order_of_the_parameters(name):
    model = build_named(name)
    data = examples(model)
    found = flatten(per_sample_gradients(model, functional.cross_entropy, *data))
    np.testing.assert_allclose(found, looped_matrix(model, functional.cross_entropy, *data), rtol=1e-9, atol=1e-12)


def test_flatten_lays_rows_side_by_side():
    parts = {"b": torch.arange(12).reshape(2, 3, 2), "a": torch.tensor([[100], [101]])}
    assert flatten(parts).tolist() == [[0, 1, 2, 3, 4, 5, 100], [6, 7, 8, 9, 10, 11, 101]]


def test_flatten_takes_a_parameter_without_dimensions():
    model = build(Scaled)
    data = examples(model)
    found = flatten(per_sample_gradients(model, functional.cross_entropy, *data))
    np.testing.assert_allclose(found, looped_matrix(model, functional.cross_entropy, *data), rtol=1e-9, atol=1e-12)


# Mean gradient


@pytest.mark.parametrize("name", MODELS)
def test_mean_gradient_equals_that_of_the_mean_loss(name):
    model = build_named(name)
    data = examples(model)
    found = mean_gradient(model, functional.cross_entropy, *data)
    assert_same(found, gradient_of_mean_loss(model, functional.cross_entropy, *data))


@pytest.mark.parametrize("name", LOSSES)
def test_mean_gradient_is_the_mean_of_per_sample_gradients_whatever_the_reduction(name):
    model = build(perceptron)
    data = examples(model, name)
    rows = looped_gradients(model, LOSSES[name], *data)
    assert_same(mean_gradient(model, LOSSES[name], *data), {key: row.mean(0) for key, row in rows.items()})


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 6, 7, 100])
def test_chunks_make_no_difference_to_the_mean_gradient(chunk_size):
    model = build(convolutional)
    data = examples(model)
    found = mean_gradient(model, functional.cross_entropy, *data, chunk_size=chunk_size)
    assert_same(found, gradient_of_mean_loss(model, functional.cross_entropy, *data))


def test_mean_gradient_treats_1024_examples_at_once_at_most_unless_told_otherwise(monkeypatch):
    sizes = recorded_chunks(monkeypatch, "summed")
    model = build(lambda: nn.Linear(4, 4))
    mean_gradient(model, functional.cross_entropy, *examples(model, n=2500))
    assert sizes == [1024, 1024, 452]


def test_mean_gradient_of_an_unused_parameter_is_zero():
    model = build(PartlyUsed)
    found = mean_gradient(model, functional.cross_entropy, *examples(model))
    assert torch.equal(found["unused"], torch.zeros(2, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("function", "oracle"), [(per_sample_gradients, looped_gradients), (mean_gradient, gradient_of_mean_loss)]
)
def test_gradients_of_single_precision_stay_single(function, oracle):
    model = build(perceptron, torch.float32)
    data = examples(model)
    found = function(model, functional.cross_entropy, *data)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert_same(found, oracle(model, functional.cross_entropy, *data), rtol=1e-4, atol=1e-6)


# Refusals


@pytest.mark.parametrize(
    ("inputs", "targets"), [((7, 4), (6,)), ((6, 4), (7,)), ((0, 4), (0,)), ((), (7,)), ((7, 4), ()), ((), ())]
)
@pytest.mark.parametrize("call", ["per_sample_gradients", "mean_gradient", "per_sample_squared_norms"])
def test_gradients_refuse_numbers_of_examples_that_differ_or_are_zero(call, inputs, targets):
    message = f"inputs and targets must hold the same number of examples, at least 1, got shapes {inputs} and {targets}"
    arguments = torch.ones(inputs, dtype=torch.float64), torch.ones(targets, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        CALLS[call](build(perceptron), functional.cross_entropy, *arguments)


@pytest.mark.parametrize("chunk_size", [0, -1])
@pytest.mark.parametrize("call", ["per_sample_gradients", "mean_gradient"])
def test_gradients_refuse_chunks_without_examples(call, chunk_size):
    with pytest.raises(ValueError, match=f"^chunk_size must be at least 1, got {chunk_size}$"):
        CALLS[call](build(perceptron), functional.cross_entropy, *far_examples(), chunk_size=chunk_size)


@pytest.mark.parametrize("call", ["per_sample_gradients", "mean_gradient"])
def test_gradients_refuse_a_model_with_nothing_to_train(call):
    model = build(perceptron).requires_grad_(False)
    with pytest.raises(ValueError, match=r"^model must have a parameter that requires a gradient, got none$"):
        CALLS[call](model, functional.cross_entropy, *far_examples())


@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("call", CALLS)
def test_batch_statistics_are_refused_with_the_reason(call, name):
    constructor, where, kind = COUPLED[name]
    message = (
        f"examples must not be coupled, but {where} normalizes by the statistics of its batch, so that one example "
        f"has no gradient of its own: got {kind}; call model.eval() to use its running statistics, or use GroupNorm "
        "or LayerNorm"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        CALLS[call](build(constructor), functional.cross_entropy, *far_examples())
