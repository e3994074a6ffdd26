"""The report on a network: what it measured against plain passes, what it predicted against averages and theory."""

import copy
import dataclasses
import math
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from helpers.initialization import (
    LayerReport,
    PropagationReport,
    chi,
    he_variance,
    propagation_report,
    variance_map,
)
from helpers.lab.runtime import generator, seeded
from helpers.lab.watch import is_leaf
from tests.statistics import assert_z, moments
from tests.zoo import ZOO, apply, changes, fingerprint


def batch(*shape, dtype=torch.float64):
    source = generator("test.report.batch")
    return torch.randn(shape, generator=source, device=source.device, dtype=dtype)


def drawn(shape, source):
    return torch.randn(shape, generator=source, device=source.device, dtype=torch.float64)


def report(model, inputs, **options):
    return propagation_report(model, inputs, generator=generator("test.report"), **options)


def double(model, stream="test.report.model"):
    """Return a model in double precision, with normal weights and biases drawn anew."""
    source = generator(stream)
    model = model.double().to(source.device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=source)
    return model


def test_report_of_a_linear_network_equals_matrix_products():
    model = double(nn.Sequential(nn.Linear(3, 5), nn.Identity(), nn.Linear(5, 2, bias=False)))
    inputs = batch(6, 3)
    found = report(model, inputs)
    first, second = model[0], model[2]
    z = inputs @ first.weight.T + first.bias
    source = generator("test.report")
    readout = drawn((6, 2), source)
    assert [(layer.name, layer.kind) for layer in found.layers] == [("0", "Linear"), ("2", "Linear")]
    assert [(layer.fan_in, layer.fan_out) for layer in found.layers] == [(3, 5), (5, 2)]
    w, v, b = (x.square().mean().item() for x in (first.weight, second.weight, first.bias))
    moment = 3 * w * inputs.square().mean().item() + b
    expected = {
        "forward": [z.square().mean().item(), (z @ second.weight.T).square().mean().item()],
        "backward": [(readout @ second.weight).square().mean().item(), readout.square().mean().item()],
        "predicted_forward": [moment, 5 * v * moment],
        "predicted_backward": [2 * v, 1],
    }
    for name, values in expected.items():
        assert [getattr(layer, name) for layer in found.layers] == pytest.approx(values, rel=1e-10)


def test_readout_is_of_the_shape_of_the_last_activations():
    model = double(nn.Sequential(nn.Linear(3, 5), nn.ReLU()))
    inputs = batch(6, 3)
    source = generator("test.report")
    readout = drawn((6, 5), source)
    [layer] = report(model, inputs).layers
    expected = (readout * (model[0](inputs) > 0)).square().mean().item()
    assert layer.backward == pytest.approx(expected, rel=1e-12)
    assert layer.predicted_backward == pytest.approx(0.5, rel=1e-12)


CONVOLUTIONS = [
    (nn.Conv1d(4, 6, 3), (4, 9)),
    (nn.Conv1d(4, 6, 5, stride=2, padding=3, groups=2), (4, 9)),
    (nn.Conv1d(2, 3, 2, dilation=3, padding=1, stride=3), (2, 10)),
    (nn.Conv1d(2, 3, 5, padding="same", dilation=2), (2, 7)),
    (nn.Conv2d(3, 4, 3, padding=1), (3, 5, 4)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2), groups=2), (4, 6, 5)),
    (nn.Conv2d(4, 4, 3, padding=2, groups=4), (4, 3, 4)),
    (nn.Conv1d(2, 3, 3, padding=1, stride=2, padding_mode="circular"), (2, 7)),
    (nn.Conv2d(4, 6, 3, padding=(1, 0), groups=2, padding_mode="circular"), (4, 5, 4)),
    (nn.Conv3d(2, 4, (2, 3, 1), stride=(1, 2, 1), padding=(1, 1, 0), dilation=(2, 1, 1), groups=2), (2, 4, 5, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS, ids=str)
def test_fans_of_convolutions_count_links(layer, shape):
    model = double(nn.Sequential(copy.deepcopy(layer)))
    [found] = report(model, batch(2, *shape)).layers
    links = torch.autograd.functional.jacobian(lambda x: model(x[None])[0], batch(*shape))
    n_outputs = links.numel() // math.prod(shape)
    n_links = torch.count_nonzero(links).item()
    assert found.kind == type(layer).__name__
    assert found.fan_in == pytest.approx(n_links / n_outputs, rel=1e-6)
    assert found.fan_out == pytest.approx(n_links / math.prod(shape), rel=1e-6)


def test_fan_in_of_a_convolution_without_a_border_is_that_of_torch():
    layer = nn.Conv2d(3, 8, (3, 2))
    [found] = report(nn.Sequential(layer), batch(2, 3, 6, 7).float()).layers
    assert found.fan_in == nn.init._calculate_fan_in_and_fan_out(layer.weight)[0]


def test_predictions_equal_averages_over_initializations():
    # Inputs of size 1, so that the border of the image is nothing special.
    inputs = batch(3, 2, 5, 4).sign()
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 10),
        nn.ReLU(),
        nn.Linear(10, 6, bias=False),
        nn.ReLU(),
    )
    source = generator("test.report.predictions")
    differences = []
    for repetition in range(300):
        double(model, f"test.report.predictions.{repetition}")
        layers = propagation_report(model, inputs, generator=source).layers
        for layer in layers:
            assert layer.predicted_forward > 0
        differences.append(
            [(layer.forward - layer.predicted_forward, layer.backward - layer.predicted_backward) for layer in layers]
        )
    assert_z(moments(differences).mean.z(0.0))


def test_predictions_of_other_activations_follow_the_mean_field():
    model = double(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.GELU(), nn.Tanh()))
    inputs = batch(6, 3)
    first, second = report(model, inputs).layers
    w, v = (model[k].weight.square().mean().item() for k in (0, 2))
    b, c = (model[k].bias.square().mean().item() for k in (0, 2))
    variance = 3 * w * inputs.square().mean().item() + b
    assert first.predicted_forward == pytest.approx(variance, rel=1e-10)
    after = variance_map(torch.tanh, variance, weight_scale=5 * v, bias_variance=c)
    assert second.predicted_forward == pytest.approx(after, rel=1e-10)
    slope = chi(lambda z: torch.tanh(F.gelu(z)), after, weight_scale=1.0)
    assert second.predicted_backward == pytest.approx(slope, rel=1e-10)
    expected = slope * chi(torch.tanh, variance, weight_scale=4 * v)
    assert first.predicted_backward == pytest.approx(expected, rel=1e-10)


def values_of(found):
    return [
        (layer.forward, layer.backward, layer.predicted_forward, layer.predicted_backward) for layer in found.layers
    ]


def small_model(**options):
    return double(nn.Sequential(nn.Linear(3, 5), nn.ReLU(**options), nn.Linear(5, 4), nn.ReLU(**options)))


def test_nested_models_are_reported_as_flat_ones():
    flat = small_model()
    nested = nn.Sequential(
        OrderedDict(body=nn.Sequential(nn.Sequential(flat[0], flat[1])), head=nn.Sequential(flat[2], flat[3]))
    )
    inputs = batch(6, 3)
    assert values_of(report(nested, inputs)) == values_of(report(flat, inputs))
    assert [layer.name for layer in report(nested, inputs).layers] == ["body.0.0", "head.0"]


def test_one_activation_may_serve_many_layers():
    model, inputs, relu = small_model(), batch(6, 3), nn.ReLU()
    shared = nn.Sequential(model[0], relu, model[2], relu)
    assert values_of(report(shared, inputs)) == values_of(report(model, inputs))


def test_one_linear_layer_may_serve_twice():
    layer, inputs = nn.Linear(3, 3), batch(6, 3).float()
    apart = nn.Sequential(layer, nn.Tanh(), copy.deepcopy(layer), nn.Tanh())
    assert values_of(report(nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh()), inputs)) == values_of(
        report(apart, inputs)
    )


def test_activations_in_place_are_reported_as_others():
    inputs = batch(6, 3)
    assert values_of(report(small_model(inplace=True), inputs)) == values_of(report(small_model(), inputs))


@pytest.mark.parametrize("frozen", [[0], [2], [0, 2]])
def test_frozen_parameters_are_reported_as_others(frozen):
    model, inputs = small_model(), batch(6, 3)
    expected = values_of(report(model, inputs))
    for k in frozen:
        model[k].requires_grad_(False)
    assert values_of(report(model, inputs)) == expected


def test_report_works_without_autograd():
    inputs = batch(6, 3)
    with torch.no_grad():
        found = report(small_model(), inputs)
    assert values_of(found) == values_of(report(small_model(), inputs))


def test_images_may_be_flattened_and_unflattened():
    model = double(
        nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Unflatten(1, (2, 4)), nn.Tanh(), nn.Conv1d(2, 3, 2))
    )
    inputs = batch(6, 3, 4)
    first, second = report(model, inputs).layers
    assert (first.name, first.fan_in, second.name, second.fan_in) == ("1", 12, "4", 4)
    assert first.forward == pytest.approx(model[:2](inputs).square().mean().item(), rel=1e-12)
    assert second.forward == pytest.approx(model(inputs).square().mean().item(), rel=1e-12)


def test_report_changes_neither_model_nor_inputs_nor_the_global_generator():
    model, inputs = small_model(inplace=True), batch(6, 3)
    model(inputs).sum().backward()
    state = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    copied, before = inputs.clone(), torch.random.get_rng_state()
    report(model, inputs)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(inputs, copied)
    assert not inputs.requires_grad
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("limit", [1.0, 0.5, math.nan])
def test_report_needs_a_limit_above_one(limit):
    with pytest.raises(ValueError, match=f"^limit must be above 1, got {limit}$"):
        report(small_model(), batch(6, 3), limit=limit)
    assert report(small_model(), batch(6, 3), limit=1.1).limit == 1.1


def made_up(forward, backward, limit=100.0):
    layers = [
        LayerReport(f"layer{k}", "Linear", 3.0, 4.0, one, 1.0, other, 2.0, weight_scale=1.5)
        for k, (one, other) in enumerate(zip(forward, backward, strict=True))
    ]
    return PropagationReport(tuple(layers), limit)


FINE = [1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("moments", "first", "first_backward"),
    [
        (FINE, None, None),
        ([1.0, 100.0, 0.01, 1.0], None, "layer1"),
        ([2.0, 200.0, 201.0, 2.0], "layer2", "layer0"),
        ([2.0, 0.02, 0.0199, 2.0], "layer2", "layer0"),
        ([1.0, 20.0, 400.0, 8000.0], "layer2", "layer0"),
        ([8000.0, 400.0, 20.0, 1.0], "layer2", "layer0"),
        ([1.0, math.nan, 1.0, 1.0], "layer1", "layer1"),
        ([1.0, math.inf, math.nan, 1.0], "layer1", "layer2"),
        ([math.nan] * 4, "layer0", "layer3"),
        ([math.inf] * 4, "layer0", "layer3"),
        ([0.0] * 4, "layer0", "layer3"),
        ([1.0, 1.0, 0.0, 0.0], "layer2", "layer3"),
    ],
)
def test_the_first_layer_beyond_the_limits_is_named(moments, first, first_backward):
    forward, backward = made_up(moments, FINE), made_up(FINE, moments)
    assert (forward.first_bad_forward, forward.first_bad_backward) == (first, None)
    assert (backward.first_bad_forward, backward.first_bad_backward) == (None, first_backward)
    if first is not None:
        assert forward.verdict == f"values first go wrong at layer {first}"
        assert backward.verdict == f"gradients first go wrong at layer {first_backward}"


def test_the_size_of_the_head_is_no_alarm_for_gradients_unless_it_is_none():
    assert made_up(FINE, [1.0, 1.0, 1.0, 1e6]).first_bad_backward is None
    assert made_up(FINE, [1.0, 1.0, 1.0, 0.0]).first_bad_backward == "layer3"


def test_the_size_of_the_head_is_no_alarm_for_values_unless_it_is_none():
    assert made_up([1.0, 1.0, 1.0, 1e-6], FINE).first_bad_forward is None
    assert made_up([1.0, 1.0, 1.0, 1e6], FINE).first_bad_forward is None
    for nothing in (0.0, math.inf, math.nan):
        assert made_up([1.0, 1.0, 1.0, nothing], FINE).first_bad_forward == "layer3"
    assert made_up([1.0, 200.0, 1.0, 0.0], FINE).first_bad_forward == "layer1"


def test_the_verdict_says_if_the_first_layer_was_not_judged():
    fine = "all second moments stay within a factor of 100"
    not_judged = fine + "; the weights of the first layer, layer0, were not judged"
    assert made_up(FINE, FINE).verdict == fine
    assert made_up(FINE[:2], FINE[:2]).verdict == not_judged  # no layer in between to compare it with
    first, *others = made_up(FINE, FINE).layers
    unknown = dataclasses.replace(first, weight_scale=math.nan)
    assert PropagationReport((unknown, *others), 100.0).verdict == not_judged


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_the_verdict_says_that_steps_of_a_recurrent_layer_were_not_seen(kind):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.reader, self.head = nn.Linear(3, 4), kind(4, 8, batch_first=True), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.reader(self.stem(x))[0][:, -1])

    with seeded("test.report.recurrent"):
        model = Reader()
    found = report(model, batch(5, 60, 3).float())
    assert found.first_bad_forward is found.first_bad_backward is None
    assert found.verdict.endswith("; what happens within reader, from step to step, was not seen")


def test_verdict_speaks_of_both_directions():
    both = made_up([1.0, 9.0, 9.0], [1.0, 10.0, 10.0], limit=8.0)
    assert both.verdict == "values first go wrong at layer layer1; gradients first go wrong at layer layer0"
    assert made_up(FINE, FINE, limit=8.0).verdict == "all second moments stay within a factor of 8"


def deep_model(std, depth=12, width=50):
    model = nn.Sequential(*[module for _ in range(depth) for module in (nn.Linear(width, width), nn.ReLU())])
    source = generator("test.report.deep")
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.normal_(0, std, generator=source)
            layer.bias.zero_()
    return model


@pytest.mark.parametrize(("factor", "wrong"), [(0.1, True), (0.5, False), (4.0, True)])
def test_report_tells_exploding_and_vanishing_signals_from_kept_ones(factor, wrong):
    # Second moments change by 2 `factor` a layer.
    found = report(
        deep_model(math.sqrt(2 * factor / 50) if wrong else math.sqrt(he_variance(50))), batch(40, 50).float()
    )
    assert (found.first_bad_forward is not None) == wrong
    assert (found.first_bad_backward is not None) == wrong
    assert found.limit == 100


def test_report_of_a_network_that_overflows_names_the_layer():
    model = deep_model(1e7)
    found = report(model, batch(4, 50).float())
    assert found.first_bad_forward == "2"
    assert not math.isfinite(found.layers[-1].forward)
    assert found.first_bad_backward is not None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_report_of_a_network_that_has_diverged_names_the_layer(value):
    model = deep_model(math.sqrt(he_variance(50)), depth=4)
    with torch.no_grad():
        model[2].weight[0, 0] = value
    found = report(model, batch(4, 50).float())
    assert found.first_bad_forward == "2"
    assert math.isnan(found.layers[-1].predicted_forward)
    assert math.isnan(found.layers[-1].predicted_backward)
    assert math.isfinite(found.layers[0].predicted_forward)
    assert "nan" in str(found)


BAD_INPUTS = [
    (torch.full((6, 3), math.nan), "inputs must be finite, got nan"),
    (torch.tensor([[1.0, -math.inf, 2.0]]), "inputs must be finite, got -inf"),
    (torch.ones(0, 3), "inputs must hold at least one example, got shape (0, 3)"),
    (torch.tensor(1.0), "inputs must hold at least one example, got shape ()"),
    (
        torch.ones(3),
        "inputs must be a batch, with examples along dimension 0, got an input of shape (3,) at layer 0",
    ),
]


@pytest.mark.parametrize(("inputs", "rule"), BAD_INPUTS)
def test_inputs_that_are_no_batch_of_numbers_are_refused(inputs, rule):
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4))
    before = fingerprint(model)
    with pytest.raises(ValueError, match=f"^{re.escape(rule)}$"):
        report(model, inputs)
    assert not changes(before, fingerprint(model))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Conv1d(3, 4, 3), (3, 16)), (nn.Conv2d(3, 4, 3), (3, 16, 16)), (nn.Conv3d(3, 4, 3), (3, 5, 5, 5))],
)
def test_an_image_without_a_batch_is_refused(layer, shape):
    rule = f"inputs must be a batch, with examples along dimension 0, got an input of shape {shape} at layer 0"
    with pytest.raises(ValueError, match=f"^{re.escape(rule)}$"):
        report(nn.Sequential(layer), torch.ones(shape))


@pytest.mark.parametrize("model", [nn.Sequential(), nn.Flatten(), nn.Sequential(nn.ReLU(), nn.Dropout(0.5))], ids=str)
def test_a_model_without_parameters_is_refused(model):
    with pytest.raises(ValueError, match=r"^model must call a layer with parameters, got none$"):
        report(model, batch(6, 3))


def test_a_model_that_returns_no_floating_point_tensor_is_refused():
    class Labels(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x):
            return self.layer(x).argmax(1)

    rule = "model must return floating-point tensors, alone or in tuples, lists or dicts, got none"
    with pytest.raises(ValueError, match=f"^{rule}$"):
        report(Labels(), torch.ones(6, 3))


def test_the_weight_scale_of_a_layer_counts_its_inputs():
    model = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Conv1d(7, 2, 1))
    layer, _ = report(nn.Sequential(*model[:2], nn.Unflatten(1, (7, 1)), model[2]), torch.ones(5, 3)).layers
    assert layer.weight_scale == pytest.approx(3 * model[0].weight.double().square().mean().item(), rel=1e-6)


def test_where_a_chain_ends_gradients_are_predicted_from_those_of_its_last_layer():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 4))
    first, last, _, _ = report(model, torch.ones(8, 3)).layers
    assert math.isnan(last.predicted_backward)
    # A normal variable is positive half of the time.
    expected = 0.5 * 6 * model[2].weight.double().square().mean().item() * last.backward
    assert first.predicted_backward == pytest.approx(expected, rel=1e-6)


class Ramp(nn.Module):
    """Multiplies each entry by a number that depends on where it stands."""

    def forward(self, x):
        return x * torch.linspace(0.1, 3, x.numel(), dtype=x.dtype).reshape(x.shape)


def test_a_layer_that_treats_entries_differently_is_no_function_of_one_variable():
    model = nn.Sequential(nn.Linear(3, 5), Ramp(), nn.Linear(5, 4, bias=False))
    inputs = torch.ones(8, 3)
    before = model[:2](inputs).double().square().mean().item()
    found = report(model, inputs).layers[1]
    expected = 5 * model[2].weight.double().square().mean().item() * before
    assert found.predicted_forward == pytest.approx(expected, rel=1e-6)


class Changed(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.layer, self.change = nn.Linear(3, 4), change

    def forward(self, x):
        return self.change(self.layer(x))


@pytest.mark.parametrize("change", [lambda y: 2 * y, torch.Tensor.detach], ids=["doubled", "detached"])
def test_no_gradient_is_predicted_if_the_last_layer_does_not_give_the_output(change):
    (layer,) = report(Changed(change), torch.ones(6, 3)).layers
    assert math.isnan(layer.predicted_backward)


def test_lazy_layers_are_refused_until_they_have_a_shape():
    problem = ZOO["lazy"].problem()
    with pytest.raises(ValueError, match="call the model once"):
        report(problem.model, problem.inputs)
    apply(problem.model, problem.inputs)
    assert len(report(problem.model, problem.inputs).layers) > 0


# Any model: each measured figure is that of a plain pass, and the model is as it was

WITHOUT_LAZY = {name: entry for name, entry in ZOO.items() if not entry.lazy}


def floating(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def plain_pass(model, inputs):
    """Return the mean squares of the outputs of layers with parameters and of the gradients by them, by hooks alone."""
    outputs = []

    def keep(_, __, output):
        output = tree_map(lambda x: x.detach().requires_grad_() if floating(x) and not x.requires_grad else x, output)
        outputs.append(next(x for x in tree_leaves(output) if floating(x)))
        return tree_map(lambda x: x.clone() if floating(x) else x, output)  # a layer behind may work in place

    layers = [module for module in model.modules() if is_leaf(module) and any(True for _ in module.parameters())]
    handles = [layer.register_forward_hook(keep) for layer in layers]
    result = apply(model, inputs)
    for handle in handles:
        handle.remove()
    source = generator("test.report")
    total = sum((x * drawn(x.shape, source)).sum() for x in tree_leaves(result) if floating(x))
    gradients = torch.autograd.grad(total, outputs, materialize_grads=True)
    return [[x.square().mean().item() for x in tensors] for tensors in (outputs, gradients)]


@pytest.mark.parametrize("name", WITHOUT_LAZY)
def test_every_model_of_the_zoo_is_measured_and_left_alone(name):
    problem, twin = WITHOUT_LAZY[name].problem(), WITHOUT_LAZY[name].problem()
    before = fingerprint(problem.model)
    found = report(problem.model, problem.inputs)
    assert not changes(before, fingerprint(problem.model))
    assert all(math.isfinite(layer.forward) and math.isfinite(layer.backward) for layer in found.layers)
    forward, backward = plain_pass(twin.model, twin.inputs)
    assert [layer.forward for layer in found.layers] == pytest.approx(forward, rel=1e-9, abs=1e-300)
    assert [layer.backward for layer in found.layers] == pytest.approx(backward, rel=1e-9, abs=1e-300)


def test_what_a_layer_did_decides_and_not_its_type():
    for name in ("subclass of Linear that halves", "equalized learning rate"):
        problem = ZOO[name].problem()
        found = report(problem.model, problem.inputs)
        odd = [layer for layer in found.layers if layer.kind != "Linear"]
        assert odd
        assert all(math.isnan(layer.predicted_forward) and math.isnan(layer.predicted_backward) for layer in odd)
        assert all(math.isnan(layer.fan_in) for layer in odd)


def test_predictions_begin_anew_behind_what_theory_does_not_cover():
    model = double(nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)))
    inputs = batch(6, 3)
    first, norm, second, last = report(model, inputs).layers
    with torch.no_grad():
        behind = model[:2](inputs)
    w, b = model[2].weight.square().mean().item(), model[2].bias.square().mean().item()
    assert second.predicted_forward == pytest.approx(5 * w * behind.square().mean().item() + b, rel=1e-10)
    assert last.predicted_backward == pytest.approx(1, rel=1e-12)
    assert math.isfinite(second.predicted_backward)
    assert math.isnan(first.predicted_backward)
    assert math.isnan(norm.predicted_forward)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.branch, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.branch(x))


def test_a_skip_connection_breaks_the_chain_backward_though_the_values_match():
    model, inputs = double(Residual()), batch(6, 3)
    stem, branch, head = report(model, inputs).layers
    assert math.isnan(stem.predicted_backward)  # its gradient comes by two ways
    w, b = model.head.weight.square().mean().item(), model.head.bias.square().mean().item()
    with torch.no_grad():
        stream = model.stem(inputs) + model.branch(model.stem(inputs))
    assert head.predicted_forward == pytest.approx(4 * w * stream.square().mean().item() + b, rel=1e-10)
    assert math.isfinite(branch.predicted_forward)


class Functional(nn.Module):
    """What `nn.Sequential` does with layers and an activation between them, which is called as a function."""

    def __init__(self, layers, function):
        super().__init__()
        self.layers, self.function = nn.ModuleList(layers), function

    def forward(self, x):
        *first, last = self.layers
        for layer in first:
            x = self.function(layer(x))
        return last(x)


@pytest.mark.parametrize(
    ("function", "module"),
    [
        (torch.relu, nn.ReLU()),
        (torch.Tensor.relu_, nn.ReLU()),
        (F.relu, nn.ReLU()),
        (torch.tanh, nn.Tanh()),
        (F.gelu, nn.GELU()),
        (lambda z: F.gelu(z, approximate="tanh"), nn.GELU("tanh")),
        (F.silu, nn.SiLU()),
        (torch.sigmoid, nn.Sigmoid()),
        (F.leaky_relu, nn.LeakyReLU()),
        (F.elu, nn.ELU()),
        (F.softplus, nn.Softplus()),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_functions_of_the_usual_names_are_chained_as_their_modules_are(function, module, dtype):
    model = double(nn.Sequential(nn.Linear(3, 5), module, nn.Linear(5, 4), module, nn.Linear(4, 2))).to(dtype)
    inputs = batch(6, 3).to(dtype)
    expected = values_of(report(model, inputs))
    found = values_of(report(Functional(model[::2], function), inputs))
    assert np.array(found) == pytest.approx(np.array(expected), rel=1e-6)
    assert np.isfinite(found).all()


def test_a_function_before_images_are_flattened_is_chained_too():
    class Images(nn.Module):
        def __init__(self, convolution, linear):
            super().__init__()
            self.convolution, self.linear = convolution, linear

        def forward(self, x):
            return self.linear(F.relu(self.convolution(x)).flatten(1))

    model = double(nn.Sequential(nn.Conv1d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)))
    inputs = batch(6, 2, 5)
    found = values_of(report(Images(model[0], model[3]), inputs))
    assert np.array(found) == pytest.approx(np.array(values_of(report(model, inputs))), rel=1e-12)


@pytest.mark.parametrize("function", [lambda z: F.leaky_relu(z, 0.3), lambda z: z.relu() * 2, torch.sin])
def test_other_functions_are_not_guessed(function):
    model = double(Functional([nn.Linear(3, 5), nn.Linear(5, 4)], function))
    first, second = report(model, batch(6, 3)).layers
    assert math.isfinite(second.predicted_forward)
    assert math.isnan(first.predicted_backward)
    problem = ZOO["in place"].problem()
    assert math.isnan(report(problem.model, problem.inputs).layers[0].predicted_backward)


def test_a_function_whose_result_goes_two_ways_breaks_the_chain():
    class TwoWays(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.branch, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = torch.relu(self.stem(x))
            return self.head(x + self.branch(x))

    stem, branch, _ = report(double(TwoWays()), batch(6, 3)).layers
    assert math.isnan(stem.predicted_backward)
    assert math.isfinite(branch.predicted_forward)


@pytest.mark.parametrize("n_classes", [2, 10, 100])
def test_a_default_head_behind_a_kaiming_stack_rings_no_alarm(n_classes):
    with seeded("test.report.head"):
        layers = [module for _ in range(6) for module in (nn.Linear(256, 256), nn.ReLU())]
        model = nn.Sequential(*layers, nn.Linear(256, n_classes))
        for layer in model[:-1:2]:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    found = report(model, batch(64, 256).float())
    assert found.verdict == "all second moments stay within a factor of 100"


@pytest.mark.parametrize("bad", [1, 2, 4])
@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_a_single_bad_layer_rings_the_alarm(bad, factor):
    model = deep_model(math.sqrt(he_variance(50)), depth=6)
    with torch.no_grad():
        model[2 * bad].weight *= factor
    found = report(model, batch(40, 50).float())
    assert found.first_bad_forward == str(2 * bad)
    assert found.first_bad_backward == str(2 * bad - 2)


@pytest.mark.parametrize("depth", [4, 6])
@pytest.mark.parametrize(("factor", "wrong"), [(1e-3, True), (0.11, False), (9.0, False), (1e3, True)])
def test_a_bad_first_layer_rings_the_alarm_though_it_scales_all_values_alike(depth, factor, wrong):
    model = deep_model(math.sqrt(he_variance(50)), depth=depth)
    with torch.no_grad():
        model[0].weight *= factor
    found = report(model, batch(40, 50).float())
    scale = 50 * model[0].weight.double().square().mean().item()
    assert found.layers[0].weight_scale == pytest.approx(scale, rel=1e-6)
    assert found.first_bad_forward == ("0" if wrong else None)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_a_first_convolution_is_compared_with_convolutions(factor):
    with seeded("test.report.convolutions"):
        layers = [module for _ in range(4) for module in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 36, 10))
        for layer in model[:-2:2]:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    images = batch(6, 8, 6, 6).float()
    assert report(model, images).first_bad_forward is None
    with torch.no_grad():
        model[0].weight *= factor
    assert report(model, images).first_bad_forward == "0"


@pytest.mark.parametrize(
    ("activation", "nonlinearity", "head"), [(nn.ReLU, "relu", 1), (nn.Tanh, "tanh", 10), (nn.ReLU, "relu", 1000)]
)
@pytest.mark.parametrize("factor", [1e-4, 1.0])
def test_heads_of_any_size_ring_no_alarm_for_gradients(activation, nonlinearity, head, factor):
    with seeded("test.report.heads"):
        layers = [module for _ in range(5) for module in (nn.Linear(100, 100), activation())]
        model = nn.Sequential(*layers, nn.Linear(100, head))
        for layer in model[:-1:2]:
            nn.init.normal_(layer.weight, std=nn.init.calculate_gain(nonlinearity) / 10)
        with torch.no_grad():
            model[-1].weight *= factor
    assert report(model, batch(50, 100).float()).first_bad_backward is None


class Centered(nn.Conv1d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2), keepdim=True)
        return F.conv1d(x, weight, self.bias)


class Bounded(nn.Linear):
    def forward(self, x):
        return super().forward(x).clamp(-1, 1)


def hooked():
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda _, __, output: 2 * output)
    return layer


@pytest.mark.parametrize("odd", [Centered(4, 4, 1), Bounded(4, 4), hooked()], ids=["centered", "bounded", "hooked"])
def test_layers_that_only_look_like_their_type_are_measured_and_not_predicted(odd):
    model = double(nn.Sequential(odd, nn.Tanh()))
    inputs = batch(6, 4, 1) if isinstance(odd, nn.Conv1d) else batch(6, 4)
    [found] = report(model, inputs).layers
    assert found.forward == pytest.approx(model[0](inputs).square().mean().item(), rel=1e-12)
    theory = found.fan_in, found.fan_out, found.predicted_forward, found.predicted_backward, found.weight_scale
    assert all(map(math.isnan, theory))


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x, y):
        return self.layer(x + y)


@pytest.mark.parametrize(
    ("inputs", "rule"),
    [
        ({"x": torch.ones(2, 3), "y": torch.full((2, 3), math.nan)}, "inputs['y'] must be finite, got nan"),
        ((torch.full((2, 3), math.inf), torch.ones(2, 3)), "inputs[0] must be finite, got inf"),
        ([torch.ones(2, 3), torch.ones(0, 3)], "inputs must hold at least one example, got shape (0, 3)"),
        ((torch.ones(3), torch.ones(3)), "examples along dimension 0, got an input of shape (3,) at layer layer"),
        (iter([]), "inputs must hold at least one batch, got an empty iterable"),
        (5, "inputs must be tensors or an iterable of batches, got int"),
        ([], "inputs must hold at least one tensor, got []"),
        (np.ones((2, 3)), "inputs must be tensors or an iterable of batches, got an array of shape (2, 3)"),
    ],
)
def test_inputs_of_other_forms_out_of_range_are_refused(inputs, rule):
    with pytest.raises(ValueError, match=f"{re.escape(rule)}$"):
        report(Sum(), inputs)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), nn.Linear(4, 3)

    def forward(self, x, mask):
        return self.head(self.layer(x, src_mask=mask))


def test_masks_may_hold_minus_infinity():
    model, x, mask = double(Masked()), batch(6, 7, 4), nn.Transformer.generate_square_subsequent_mask(7).double()
    mask = mask.to(x.device)
    expected = np.array(values_of(report(model, {"x": x, "mask": mask < 0})))
    for inputs in ({"x": x, "mask": mask}, (x, mask)):
        assert np.array(values_of(report(model, inputs))) == pytest.approx(expected, rel=1e-12, nan_ok=True)


def test_masks_with_other_numbers_are_refused_with_advice():
    mask = torch.tensor([[0.5, -math.inf], [0.5, 0.5]])
    rule = r"^inputs\['mask'\] must be finite, got -inf; a mask must hold 0 and -inf alone, or be boolean$"
    with pytest.raises(ValueError, match=rule):
        report(Masked(), {"x": torch.ones(3, 2, 4), "mask": mask})


def test_the_first_batch_of_a_loader_is_taken_and_no_random_state_moves():
    model, inputs = small_model(), batch(6, 3)
    data = torch.utils.data.TensorDataset(inputs.cpu(), torch.zeros(6))
    expected, before = values_of(report(model, inputs[:4])), torch.get_rng_state()
    for loader in (torch.utils.data.DataLoader(data, batch_size=4), [[inputs[:4]], [inputs]].__iter__()):
        assert values_of(report(model, loader)) == expected
    report(model, torch.utils.data.DataLoader(data, batch_size=4, shuffle=True))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("form", [list, lambda pair: dict(zip("xy", pair, strict=True))], ids=["list", "mapping"])
def test_lists_and_mappings_are_arguments_as_tuples_are(form):
    model, pair = double(Sum()), (batch(4, 3), batch(4, 3))
    assert values_of(report(model, form(pair))) == values_of(report(model, pair))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_and_predicted(dtype):
    model, inputs = small_model(), batch(6, 3)
    expected = report(model, inputs).layers
    found = report(model.to(dtype), inputs.to(dtype)).layers
    rounding = 20 * torch.finfo(dtype).eps  # of two layers, squared
    assert [x.forward for x in found] == pytest.approx([x.forward for x in expected], rel=rounding)
    assert all(layer.backward > 0 for layer in found)
    for name in ("fan_in", "fan_out", "weight_scale", "predicted_forward", "predicted_backward"):
        assert [getattr(x, name) for x in found] == pytest.approx([getattr(x, name) for x in expected], rel=rounding)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, "autocast"])
def test_a_bad_first_layer_rings_the_alarm_in_any_precision(precision):
    model, inputs = deep_model(math.sqrt(he_variance(50)), depth=4), batch(40, 50).float()
    with torch.no_grad():
        model[0].weight *= 30
    dtype = torch.float32 if precision == "autocast" else precision
    with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=precision == "autocast"):
        found = report(model.to(dtype), inputs.to(dtype))
    assert found.verdict == "values first go wrong at layer 0"
    assert [layer.fan_in for layer in found.layers] == [50] * 4
    assert all(math.isfinite(layer.predicted_backward) for layer in found.layers)


def test_in_half_precision_too_what_a_layer_did_decides():
    problem = ZOO["subclass of Linear that halves"].problem()
    layers = report(problem.model.bfloat16(), problem.inputs.bfloat16()).layers
    assert [math.isnan(layer.fan_in) for layer in layers] == [layer.kind != "Linear" for layer in layers]


def test_predictions_begin_anew_behind_dropout_in_training():
    model = double(nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5), nn.Linear(50, 4)))
    inputs = batch(6, 3)
    with seeded("test.report.dropout"):
        state = torch.get_rng_state()
        first, second = report(model, inputs).layers
        torch.set_rng_state(state)
        with torch.no_grad():
            dropped = model[:2](inputs)
    w, b = model[2].weight.square().mean().item(), model[2].bias.square().mean().item()
    assert second.predicted_forward == pytest.approx(50 * w * dropped.square().mean().item() + b, rel=1e-10)
    assert math.isnan(first.predicted_backward)


def test_report_prints_a_table():
    layers = (
        LayerReport("body.0", "Conv2d", 27.0, 12.3456, 1234.5, 0.0123, 1e-9, 2.0),
        LayerReport("norm", "LayerNorm", math.nan, math.nan, 1.0, math.nan, 1.0, math.nan),
        LayerReport("7", "Linear", 3.0, 4.0, 1200.0, 5.0, 1.0, 1.0),
    )
    found = PropagationReport(layers, 100.0)
    assert found.table.header == ["layer", "kind", "fan in", "fan out", "forward", "predicted", "backward", "predicted"]
    assert found.table.rows == [
        ["body.0", "Conv2d", "27", "12.35", "1.2e+03", "0.012", "1e-09", "2"],
        ["norm", "LayerNorm", "", "", "1", "", "1", ""],
        ["7", "Linear", "3", "4", "1.2e+03", "5", "1", "1"],
    ]
    assert repr(found).endswith("\n" + found.verdict)
    assert found._repr_html_() == found.table._repr_html_()


def test_figure_shows_what_was_measured_beside_what_was_predicted():
    found = report(small_model(), batch(6, 3))
    figure = found.figure()
    try:
        assert isinstance(figure, Figure)
        for ax, way in zip(figure.axes, ("forward", "backward"), strict=True):
            lines = {line.get_label(): line for line in ax.lines}
            assert set(lines) == {"predicted", "measured"}
            assert ax.get_yscale() == "log"
            assert ax.get_ylabel() == f"second moment, {way}"
            for label, name in (("measured", way), ("predicted", f"predicted_{way}")):
                x, y = lines[label].get_data()
                np.testing.assert_array_equal(x, [1, 2])
                np.testing.assert_array_equal(y, [getattr(layer, name) for layer in found.layers])
    finally:
        plt.close(figure)
