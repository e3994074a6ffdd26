"""Data in the forms that people have them: what is inputs, what is targets, and which examples are compared."""

import pytest
import torch
from torch import nn

from helpers.lab.batches import Batch, batches_of

X, Z, Y = torch.arange(6.0).reshape(3, 2), torch.ones(3, 4), torch.tensor([0, 1, 2])
CPU = torch.device("cpu")


@pytest.mark.parametrize(("n", "rows"), [(1, [0]), (3, [0, 5, 10]), (5, [0, 2, 5, 7, 10]), (99, list(range(11)))])
def test_examples_are_spread_from_the_first_to_the_last(n, rows):
    assert Batch.of(torch.arange(11)).spread(n).inputs.tolist() == rows


@pytest.mark.parametrize(
    ("item", "inputs", "targets"),
    [
        ((X, Y), X, Y),
        ([X, Y], X, Y),
        ((X, Z, Y), (X, Z), Y),
        (((X, Z), Y), (X, Z), Y),
        (({"x": X, "z": Z}, Y), {"x": X, "z": Z}, Y),
        ({"x": X, "y": Y}, {"x": X, "y": Y}, None),
        ((X,), X, None),
        (X, X, None),
    ],
)
def test_the_last_member_of_an_item_is_its_targets(item, inputs, targets):
    (batch,) = batches_of(iter([item]), None, CPU)
    torch.testing.assert_close((batch.inputs, batch.targets), (inputs, targets), rtol=0, atol=0)


def test_items_of_an_iterable_are_sent_to_the_device():
    batches = batches_of(iter([(X, Y), ({"x": X}, Y)]), None, torch.device("meta"))
    assert [x.device.type for batch in batches for x in batch.tensors] == ["meta"] * 4


class Sum(nn.Module):
    def forward(self, x, z=0.0):
        return x.sum(1) + 10 * torch.as_tensor(z).sum(-1)


@pytest.mark.parametrize("inputs", [(X, Z), [X, Z], {"z": Z, "x": X}])
def test_models_take_tuples_by_position_and_dictionaries_by_name(inputs):
    assert Batch.of(inputs, Y).predict(Sum()).tolist() == [41.0, 45.0, 49.0]


@pytest.mark.parametrize("data", [(torch.tensor(3.0),), (X, torch.tensor(1)), (X, Y[:2]), (X[:0], Y[:0]), ("text",)])
def test_what_has_no_examples_or_unequal_numbers_is_refused(data):
    with pytest.raises(ValueError, match="must hold the same number of examples, at least 1"):
        Batch.of(*data)
