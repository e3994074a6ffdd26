"""What a network's layers took and gave, and that the network is as before: against the same computed by hand."""

import copy
import doctest
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from helpers.lab import watch as module
from helpers.lab.runtime import generator, seeded
from helpers.lab.watch import is_leaf, output_gradients, untouched, watch

CPU = {"dtype": torch.float64}


def build(constructor):
    with seeded("test.watch.model"):
        return constructor().to(torch.float64)


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=generator("test.watch.data")).cpu()


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_examples_in_docstrings():
    assert doctest.testmod(module).failed == 0
    assert doctest.testmod(module).attempted > 0


# Calls


def test_calls_come_in_the_order_of_execution_with_what_layers_took_and_gave():
    class Crossed(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(3, 2), nn.Linear(4, 3)

        def forward(self, x):
            return self.last(self.first(x))

    model, x = build(Crossed), normal(5, 4)
    with watch(model) as calls:
        model(x)
    hidden = functional.linear(x, model.first.weight, model.first.bias)
    assert [call.name for call in calls] == ["first", "last"]
    assert [call.layer for call in calls] == [model.first, model.last]
    assert_equal(calls[0].inputs, (x,))
    assert_equal(calls[1].inputs, (hidden.detach(),))
    assert_equal(calls[0].output, hidden)


def test_the_model_itself_may_be_a_layer():
    model = build(lambda: nn.Linear(2, 2))
    with watch(model) as calls:
        model(normal(3, 2))
    assert [call.name for call in calls] == ["the model"]


@pytest.mark.parametrize("inplace", [False, True])
def test_activations_in_place_leave_inputs_and_outputs_of_calls_alone(inplace):
    model, x = build(lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace), nn.Linear(3, 2))), normal(5, 4)
    with watch(model) as calls:
        model(x)
    before = functional.linear(x, model[0].weight, model[0].bias)
    assert (before < 0).any()
    assert_equal(calls[0].output, before)
    assert_equal(calls[1].inputs, (before.detach(),))
    assert_equal(calls[1].output, before.relu())


def test_inputs_written_over_later_keep_the_values_that_the_layer_saw():
    class Overwritten(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2).requires_grad_(False)

        def forward(self, x):
            x = x + 1
            y = self.layer(x)
            x.zero_()
            return y

    model, x = build(Overwritten), normal(3, 2)
    with watch(model) as calls:
        model(x)
    assert_equal(calls[0].inputs, (x + 1,))


def test_a_layer_called_twice_has_two_calls():
    layer = nn.Linear(3, 3)
    model = build(lambda: nn.Sequential(layer, nn.Tanh(), layer))
    with watch(model) as calls:
        model(normal(2, 3))
    assert [call.name for call in calls] == ["0", "1", "0"]


class Nested(nn.Module):
    """Calls itself for the entries behind the first."""

    def forward(self, x):
        return x[:1] + (self(x[1:]).sum() if len(x) > 1 else 0)


def test_calls_of_a_layer_within_its_own_call_keep_their_inputs():
    model, x = Nested(), normal(3)
    with watch(model) as calls:
        model(x)
    assert_equal([call.inputs[0] for call in calls], [x[2:], x[1:], x])


class Wrapped(nn.Module):
    """Takes and returns its tensors inside of other things."""

    def forward(self, data, *, scale):
        return {"out": (data["x"] * scale, 7), "index": data["index"]}


class Wrapping(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Wrapped()

    def forward(self, x):
        found = self.layer({"x": x, "index": torch.arange(3)}, scale=torch.tensor(2.0))
        assert found["out"][1] == 7
        return found["out"][0].sum() + found["index"].sum()


def test_tensors_in_dictionaries_tuples_and_keywords_are_found():
    model, x = Wrapping(), normal(3).requires_grad_()
    with watch(model) as calls:
        result = model(x)
    assert_equal(calls[0].inputs, (x.detach(), torch.arange(3), torch.tensor(2.0)))
    assert_equal(calls[0].outputs, (2 * x,))
    assert_equal(output_gradients(result, calls), [torch.ones(3, **CPU)])
    assert_equal(torch.autograd.grad(result, x)[0], torch.full((3,), 2.0, **CPU))


def test_a_recurrent_layer_gives_all_its_outputs():
    model, x = build(lambda: nn.LSTM(3, 2, batch_first=True)), normal(4, 5, 3)
    with watch(model) as calls:
        outputs, (hidden, cell) = model(x)
    assert_equal(calls[0].outputs, (outputs, hidden, cell))


def test_layers_that_return_no_floating_point_tensor_are_left_out():
    class Index(nn.Module):
        def forward(self, x):
            return x.argmax(1)

    model = nn.Sequential(nn.Identity(), Index())
    with watch(model) as calls:
        model(normal(2, 2))
    assert [call.name for call in calls] == ["0"]


def test_a_predicate_selects_layers():
    model = build(lambda: nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), nn.Linear(2, 2)))
    with watch(model, lambda layer: isinstance(layer, nn.Sequential)) as calls:
        model(normal(3, 2))
    assert [call.name for call in calls] == ["0", "the model"]


def test_leaves_are_layers_without_layers_inside():
    attention = nn.MultiheadAttention(4, 2)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    assert [is_leaf(layer) for layer in (nn.Linear(2, 2), attention, normed)] == [True] * 3
    assert not is_leaf(nn.Sequential(nn.Linear(2, 2)))


def test_parametrized_layers_are_one_layer_each():
    model = build(lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), nn.Linear(2, 2)))
    with watch(model) as calls:
        model(normal(3, 2))
    assert [call.name for call in calls] == ["0", "1"]


# Gradients of outputs


def test_gradients_of_outputs_equal_those_by_hand():
    model, x = build(lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 2))), normal(5, 4)
    with watch(model) as calls:
        result = model(x).square().sum()
    delta = 2 * calls[2].output
    hidden = delta @ model[2].weight
    assert_equal(output_gradients(result, calls), [hidden * (calls[0].output > 0), hidden, delta])


def test_gradients_of_outputs_can_be_asked_for_twice():
    model = build(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh()))
    with watch(model) as calls:
        result = model(normal(5, 4)).square().sum()
    assert_equal(output_gradients(result, calls), output_gradients(result, calls))


def test_gradients_of_outputs_of_frozen_layers():
    model, x = build(lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))).requires_grad_(False), normal(5, 4)
    with watch(model) as calls:
        result = model(x).sum()
    assert_equal(output_gradients(result, calls), [model[1].weight.sum(0).expand(5, 3), torch.ones(5, 2, **CPU)])


def test_outputs_under_no_grad_have_gradient_zero():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            with torch.no_grad():
                x = self.body(x)
            return self.head(x)

    model = build(Frozen)
    with watch(model) as calls:
        result = model(normal(3, 2)).sum()
    assert_equal(output_gradients(result, calls), [torch.zeros(3, 2, **CPU), torch.ones(3, 2, **CPU)])


def test_outputs_that_do_not_matter_have_gradient_zero():
    model = build(lambda: nn.Linear(2, 2))
    with watch(model) as calls:
        model(normal(3, 2))
    assert_equal(output_gradients(torch.tensor(1.0), calls), [torch.zeros(3, 2, **CPU)])


def test_gradients_of_parameters_are_the_same_when_watched():
    model, x = build(lambda: nn.Sequential(nn.Linear(4, 3), nn.ELU(inplace=True), nn.Linear(3, 2))), normal(5, 4)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    with watch(model):
        result = model(x).square().sum()
    assert_equal(torch.autograd.grad(result, list(model.parameters())), expected)


# Nothing left behind


def hooks(model):
    return [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in model.modules()]


def test_no_hook_is_left_behind():
    model = build(lambda: nn.Sequential(nn.Linear(2, 2), nn.Tanh()))
    model[1].register_forward_hook(lambda *arguments: None)
    with watch(model):
        assert hooks(model) == [0, 2, 3]
    assert hooks(model) == [0, 0, 1]
    with pytest.raises(RuntimeError, match="shapes"), watch(model):
        model(normal(3, 5))
    assert hooks(model) == [0, 0, 1]


class State:
    """All that there is to a model, to be compared."""

    def __init__(self, model):
        self.tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.values = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        self.pointers = {name: tensor.data_ptr() for name, tensor in self.tensors.items()}
        self.grads = {name: tensor.grad for name, tensor in self.tensors.items()}
        self.flags = {name: tensor.requires_grad for name, tensor in self.tensors.items()}
        self.modes = [layer.training for layer in model.modules()]
        self.hooks = hooks(model)
        self.attributes = [sorted(vars(layer)) for layer in model.modules()]
        self.random = torch.get_rng_state()


def assert_unchanged(model, before):
    after = State(model)
    assert list(after.tensors) == list(before.tensors)
    assert all(after.tensors[name] is tensor for name, tensor in before.tensors.items())
    assert all(after.grads[name] is grad for name, grad in before.grads.items())
    torch.testing.assert_close(after.values, before.values, rtol=0, atol=0)
    same = [name for name in vars(before) if name not in ("tensors", "grads", "values", "random")]
    assert {name: vars(after)[name] for name in same} == {name: vars(before)[name] for name in same}
    assert torch.equal(after.random, before.random)


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen, self.calls = [], 0

    def forward(self, x):
        self.seen.append(x)
        self.last, self.calls = x, self.calls + 1
        return x


def eventful():
    """Return a model to which a lot happens in training."""
    return nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
        nn.BatchNorm1d(4),
        nn.Dropout(0.5),
        Remembering(),
        nn.Linear(4, 2),
    )


def everything(model):
    model(normal(6, 4)).sum().backward()
    model.eval()
    model[4].weight.data.add_(1)
    model[1].weight.data = torch.full((4,), 7.0, **CPU)
    model[4].bias.requires_grad_(False)
    model[0].parametrizations.weight.original = nn.Parameter(torch.zeros(4, 4, **CPU))
    model[1].running_mean = None
    model[3].register_forward_hook(lambda *arguments: None)
    model[2].p = 0.9


@pytest.mark.parametrize("fails", [False, True])
def test_an_untouched_model_is_as_before(fails):
    model = build(eventful)
    for p in model[4].parameters():
        p.grad = torch.ones_like(p)
    before, dropout = State(model), model[2].p
    with pytest.raises(ZeroDivisionError) if fails else nullcontext(), untouched(model):
        everything(model)
        if fails:
            raise ZeroDivisionError
    assert_unchanged(model, before)
    assert (model[4].weight.grad == 1).all()
    assert (model[2].p, model[3].seen, model[3].calls) == (dropout, [], 0)


def test_an_untouched_model_can_be_copied_and_trained():
    model, twin = build(eventful), build(eventful)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, twin)]
    for steps in range(3):
        with untouched(model):
            everything(model)
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            with seeded(f"test.watch.step{steps}"):
                m(normal(6, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            m[3].__dict__.update(seen=[], last=None)
    assert_equal(dict(copy.deepcopy(model).state_dict()), dict(twin.state_dict()))


def test_the_global_random_states_of_python_numpy_and_torch_are_put_back():
    def draws():
        return random.random(), np.random.random(), torch.rand(1).item()  # noqa: NPY002

    with untouched(nn.Linear(2, 2)):
        expected = draws()
    assert draws() == expected


def test_the_class_of_a_module_is_put_back():
    model = build(lambda: nn.Sequential(nn.Linear(2, 2)))
    with untouched(model):
        nn.utils.parametrize.register_parametrization(model[0], "bias", nn.Identity())
        assert type(model[0]) is not nn.Linear
    assert type(model[0]) is nn.Linear


def test_hooks_of_the_reader_can_be_removed_afterwards():
    model = build(lambda: nn.Linear(2, 2))
    handle = model.register_forward_hook(lambda *arguments: None)
    with untouched(model):
        model.register_forward_pre_hook(lambda *arguments: None)
    handle.remove()
    assert hooks(model) == [0]


def test_a_graph_from_before_still_has_its_backward_pass():
    model = build(lambda: nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)))
    result = model(normal(3, 2)).sum()
    with untouched(model):
        model(normal(3, 2)).sum().backward()
    result.backward()
    assert model[0].weight.grad is not None


def test_shared_parameters_stay_shared():
    activation = nn.PReLU()
    model = build(lambda: nn.Sequential(nn.Linear(4, 4), activation, nn.Linear(4, 4), activation))
    with untouched(model):
        torch.func.functional_call(model, dict(model.named_parameters()), (normal(3, 4),))
    assert model[1].weight is model[3].weight is next(p for n, p in model.named_parameters() if n == "1.weight")


def test_gradients_are_none_inside():
    model = build(lambda: nn.Linear(2, 2))
    model.weight.grad = torch.ones(2, 2, **CPU)
    with untouched(model):
        assert model.weight.grad is None
    assert (model.weight.grad == 1).all()


def test_lazy_layers_are_refused_until_they_have_parameters():
    model = nn.Sequential(nn.LazyLinear(3))
    message = r"^layers must have their parameters, but 0.weight has no shape yet: call the model once$"
    with pytest.raises(ValueError, match=message), untouched(model):
        pass
    model(torch.ones(2, 4))
    with untouched(model):
        model(torch.ones(2, 4))
