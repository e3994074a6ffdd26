"""Per-example gradients, norms, means and products of the zoo: refusals by their reason, shared draws, low precision.

That they are right, on every model, is among the promises of tests/test_tools.py.
"""

import pytest
import torch
from torch.nn.parameter import is_lazy

from helpers.lab.gradients import (
    gradient_chunks,
    mean_gradient,
    per_sample_gradients,
    per_sample_products,
    per_sample_squared_norms,
)
from tests.zoo import ZOO, changes, fingerprint, gradients_one_by_one

REFUSED = {
    "resnet, training": "normalizes by the statistics of its batch",
    "lazy": "0.weight has no shape yet: call the model once",
    "class weights": "class weights, ignore_index or padding",
    "ignored class": "class weights, ignore_index or padding",
    "contrastive loss": "compares its examples",
    "centered by the batch": r"x - x.mean\(0\)",
}
RANDOM = [name for name in ZOO if ZOO[name].uses_randomness]


def direction(gradients):
    """Return a vector without symmetry, in the form of a model's parameters."""
    return {
        name: torch.linspace(-1, 2, rows[0].numel(), dtype=rows.dtype).reshape(rows.shape[1:])
        for name, rows in gradients.items()
    }


def products(gradients, vector):
    return sum(rows.flatten(1) @ vector[name].flatten() for name, rows in gradients.items())


CALLS = {
    "gradients": per_sample_gradients,
    "norms": per_sample_squared_norms,
    "mean": mean_gradient,
    "products": lambda *problem, **options: per_sample_products(
        *problem,
        **options,
        direction=direction(
            {k: p[None] for k, p in problem[0].named_parameters() if p.requires_grad and not is_lazy(p)}
        ),
    ),
    "chunks": lambda *problem, **options: torch.cat(list(gradient_chunks(*problem, **options))),
}
EXPECTED = {
    "gradients": lambda rows: rows,
    "norms": lambda rows: sum(x.flatten(1).square().sum(1) for x in rows.values()),
    "mean": lambda rows: {name: x.mean(0) for name, x in rows.items()},
    "products": lambda rows: products(rows, direction(rows)),
    "chunks": lambda rows: torch.cat([x.flatten(1) for x in rows.values()], 1),
}


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("what", CALLS)
def test_what_has_no_gradient_of_an_example_is_refused_with_the_reason_and_unharmed(what, name):
    problem = ZOO[name].problem()
    before = fingerprint(problem.model)
    with pytest.raises(ValueError, match=REFUSED[name]):
        CALLS[what](*problem)
    assert changes(before, fingerprint(problem.model)) == []


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("name", RANDOM)
def test_all_functions_make_the_same_draws(name, chunk_size):
    problem = ZOO[name].problem()
    before = fingerprint(problem.model)
    rows = per_sample_gradients(*problem, chunk_size=chunk_size)
    assert len({tuple(row.flatten().tolist()) for row in rows["0.weight"]}) == len(rows["0.weight"])
    for what, call in CALLS.items():
        assert_equal(call(*problem, chunk_size=chunk_size), EXPECTED[what](rows))
    assert changes(before, fingerprint(problem.model)) == []


@pytest.mark.parametrize("name", ["mlp", "post-LN transformer", "grouped convolution", "LSTM", "layer norm"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_lower_precision_gives_the_same_to_its_digits(name, dtype, rtol):
    rows = gradients_one_by_one(ZOO[name])
    norms = EXPECTED["norms"](rows)
    problem = ZOO[name].problem(dtype=dtype)
    found = per_sample_squared_norms(*problem)
    assert found.dtype == torch.float32
    assert ((found - norms).abs() <= rtol * norms).all()
    gradients = per_sample_gradients(*problem)
    assert {x.dtype for x in gradients.values()} == {dtype}
