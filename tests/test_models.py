"""The models that chapters share."""

import re
from itertools import pairwise

import pytest
import torch
from torch import nn

from helpers.lab.models import DIGITS_SIZES, mlp
from helpers.lab.runtime import generator, seeded


def test_digits_network_maps_pixels_to_ten_logits():
    assert mlp()(torch.zeros(5, 64)).shape == (5, 10)
    assert sum(weights.numel() for weights in mlp().parameters()) == 2 * (64 * 64 + 64) + 64 * 10 + 10
    assert DIGITS_SIZES == (64, 64, 64, 10)


@pytest.mark.parametrize("sizes", [(3, 2), (3, 7, 2), [4, 1, 1, 5]])
def test_layers_have_the_wanted_widths_with_rectifiers_between(sizes):
    layers = list(mlp(sizes))
    assert [type(layer) for layer in layers] == ([nn.Linear, nn.ReLU] * (len(sizes) - 1))[:-1]
    assert [(layer.in_features, layer.out_features) for layer in layers[::2]] == list(pairwise(sizes))


def test_output_equals_matrix_products():
    model = mlp((3, 4, 2)).double()
    source = generator("test.models")
    x = torch.randn(6, 3, generator=source, dtype=torch.float64, device=source.device).cpu()
    first, second = model[0], model[2]
    hidden = (x @ first.weight.T + first.bias).clamp(min=0)
    torch.testing.assert_close(model(x), hidden @ second.weight.T + second.bias)


def test_logits_may_be_negative():
    # No rectifier follows the last layer.
    model = mlp((3, 4, 2))
    nn.init.zeros_(model[2].weight)
    nn.init.constant_(model[2].bias, -1.0)
    assert (model(torch.zeros(1, 3)) == -1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_model_moves_to_a_dtype(dtype):
    model = mlp().to("cpu", dtype)
    assert {weights.dtype for weights in model.parameters()} == {dtype}
    assert model(torch.zeros(2, 64, dtype=dtype)).dtype == dtype


def test_model_moves_to_a_device():
    # The meta device exists everywhere and refuses to mix with others.
    assert mlp().to("meta")(torch.zeros(2, 64, device="meta")).device.type == "meta"


def test_initial_weights_come_from_the_seeded_stream():
    def weights(stream):
        with seeded(stream):
            return nn.utils.parameters_to_vector(mlp().parameters())

    assert torch.equal(weights("test.models.a"), weights("test.models.a"))
    assert not torch.equal(weights("test.models.a"), weights("test.models.b"))


@pytest.mark.parametrize("sizes", [(), (64,), (64, 0), (0, 10), (64, -3, 10)])
def test_impossible_widths_are_refused(sizes):
    with pytest.raises(ValueError, match=re.escape(f"sizes must hold at least two positive widths, got {sizes}")):
        mlp(sizes)
