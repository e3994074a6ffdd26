"""Training and evaluating a classifier."""

import math
import re
from itertools import chain

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers.lab.datasets import digits
from helpers.lab.models import mlp
from helpers.lab.runtime import device, generator, seeded
from helpers.lab.training import accuracy, per_sample_loss, train


def small_problem(n=24):
    source = generator("test.training.data")
    x = torch.randn(n, 5, generator=source, dtype=torch.float64, device=source.device)
    y = torch.randint(0, 3, (n,), generator=source, device=source.device)
    return x, y


def small_model(stream="test.training.model", sizes=(5, 3)):
    with seeded(stream):
        return mlp(sizes).to(device(), torch.float64)


def trained(stream="test.training.order", *, epochs=3, batch_size=7, learning_rate=0.1, **kwargs):
    model = small_model()
    schedule = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
    losses = train(model, *small_problem(), **schedule, generator=generator(stream), **kwargs)
    return losses, nn.utils.parameters_to_vector(model.parameters()).detach()


def softmax_regression_by_hand(weight, bias, x, y):
    """Return the mean cross-entropy of softmax(Wx + b), and its gradients, from the textbook."""
    logits = x @ weight.T + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    loss = -np.log(p[np.arange(len(y)), y]).mean()
    residual = (p - np.eye(3)[y]) / len(y)
    return loss, residual.T @ x, residual.sum(0)


def test_loss_decreases_on_the_digits():
    with seeded("test.training.digits"):
        model = mlp().to(device(), torch.float64)
    split = digits()
    source = generator("test.training.digits")
    losses = train(model, split.x_train, split.y_train, epochs=4, batch_size=64, learning_rate=0.1, generator=source)
    # Ten equally likely classes cost ln 10 = 2.3 nats; chance is right once in ten.
    assert abs(np.mean(losses[:3]) - math.log(10)) < 0.3
    assert np.mean(losses[-10:]) < 1
    assert accuracy(model, split.x_test, split.y_test) > 0.7


def test_training_is_reproducible():
    (first_losses, first_weights), (losses, weights) = trained(), trained()
    assert first_losses == losses
    assert torch.equal(first_weights, weights)


def test_another_generator_shuffles_differently():
    assert trained("test.training.order")[0] != trained("test.training.other")[0]


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_full_batch_steps_equal_gradient_descent_by_hand(momentum):
    x, y = (part.cpu().numpy() for part in small_problem())
    model = small_model()
    weight, bias = (parameter.detach().cpu().numpy().copy() for parameter in model.parameters())
    losses = train(
        model,
        *small_problem(),
        epochs=3,
        batch_size=24,
        learning_rate=0.5,
        momentum=momentum,
        generator=generator("test.training.order"),
    )
    weight_velocity, bias_velocity = np.zeros_like(weight), np.zeros_like(bias)
    for loss in losses:
        expected, weight_gradient, bias_gradient = softmax_regression_by_hand(weight, bias, x, y)
        assert loss == pytest.approx(expected, rel=1e-12)
        weight_velocity = momentum * weight_velocity + weight_gradient
        bias_velocity = momentum * bias_velocity + bias_gradient
        weight -= 0.5 * weight_velocity
        bias -= 0.5 * bias_velocity
    np.testing.assert_allclose(model[0].weight.detach().cpu(), weight, rtol=1e-11)
    np.testing.assert_allclose(model[0].bias.detach().cpu(), bias, rtol=1e-11)


def test_momentum_is_nine_tenths_unless_told_otherwise():
    assert torch.equal(trained()[1], trained(momentum=0.9)[1])
    assert not torch.equal(trained()[1], trained(momentum=0.8)[1])


class Recorder(nn.Module):
    """A model that remembers its batches and whether it was training."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 2, dtype=torch.float64, device=device())
        self.batches, self.modes = [], []

    def forward(self, x):
        self.batches.append(x[:, 0].tolist())
        self.modes.append(self.training)
        return self.linear(x)


def numbered(n):
    x = torch.arange(n, dtype=torch.float64, device=device())[:, None]
    return x, torch.zeros(n, dtype=torch.int64, device=device())


def test_every_epoch_visits_every_example_once_in_a_new_order():
    model = Recorder()
    train(model, *numbered(23), epochs=2, batch_size=5, learning_rate=0.0, generator=generator("test.training.epochs"))
    assert [len(batch) for batch in model.batches] == [5, 5, 5, 5, 3] * 2
    first, second = (list(chain(*batches)) for batches in (model.batches[:5], model.batches[5:]))
    assert sorted(first) == sorted(second) == list(range(23))
    assert first != second  # 23! orders
    assert first != sorted(first)


def test_labels_are_shuffled_with_their_examples():
    # Label and only feature are the same number: a large weight makes the loss 0, wherever they are paired.
    x = torch.tensor([[0.0], [1.0]] * 10, dtype=torch.float64, device=device())
    model = nn.Linear(1, 2, dtype=torch.float64, device=device())
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0], [2000.0]]))
        model.bias.copy_(torch.tensor([0.0, -1000.0]))
    source = generator("test.training.pairs")
    losses = train(model, x, x[:, 0].long(), epochs=2, batch_size=3, learning_rate=0.1, generator=source)
    assert losses == [0.0] * 14


def test_training_is_done_in_training_mode():
    model = Recorder().eval()
    train(model, *numbered(4), epochs=1, batch_size=2, learning_rate=0.1, generator=generator("test.training.mode"))
    assert model.modes == [True, True]


def test_no_epochs_change_nothing():
    losses, weights = trained(epochs=0)
    assert losses == []
    assert torch.equal(weights, nn.utils.parameters_to_vector(small_model().parameters()))


def test_losses_are_plain_numbers():
    assert {type(loss) for loss in trained()[0]} == {float}


@pytest.mark.parametrize("batch_size", [0, -1, 25])
def test_impossible_batch_sizes_are_refused(batch_size):
    message = f"batch_size must lie between 1 and the 24 examples, got {batch_size}"
    with pytest.raises(ValueError, match=re.escape(message)):
        trained(batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [1, 24])
def test_batches_of_one_and_of_all_are_allowed(batch_size):
    assert len(trained(epochs=1, batch_size=batch_size)[0]) == 24 // batch_size


def test_negative_epochs_are_refused():
    with pytest.raises(ValueError, match="epochs must not be negative, got -1"):
        trained(epochs=-1)


# Evaluation


def test_mean_of_per_sample_losses_is_the_cross_entropy():
    x, y = small_problem()
    model = small_model()
    losses = per_sample_loss(model, x, y)
    assert losses.shape == (24,)
    torch.testing.assert_close(losses.mean(), F.cross_entropy(model(x), y).detach())


def test_per_sample_losses_are_negative_log_probabilities():
    x, y = small_problem()
    model = small_model()
    probabilities = model(x).detach().softmax(1)
    torch.testing.assert_close(per_sample_loss(model, x, y), -probabilities[torch.arange(24), y].log())


def test_per_sample_losses_carry_no_gradient():
    assert not per_sample_loss(small_model(), *small_problem()).requires_grad


def test_accuracy_is_the_fraction_of_right_answers():
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0], [1.0, 2.0]])
    assert accuracy(nn.Identity(), logits, torch.tensor([0, 1, 1, 1])) == 0.75


EVALUATIONS = {"loss": per_sample_loss, "accuracy": accuracy}


@pytest.mark.parametrize("evaluate", EVALUATIONS.values(), ids=EVALUATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_mode_as_it_was(evaluate, training):
    model = Recorder().train(training)
    evaluate(model, *numbered(4))
    assert model.modes == [False]
    assert model.training == training


@pytest.mark.parametrize("evaluate", EVALUATIONS.values(), ids=EVALUATIONS)
def test_evaluation_leaves_the_mode_of_every_part_as_it_was(evaluate):
    # A network that is trained with frozen batch normalization has one part in evaluation mode.
    model = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 2)).double().to(device())
    model[0].eval()
    evaluate(model, *numbered(4))
    assert (model.training, model[0].training, model[1].training) == (True, False, True)


@pytest.mark.parametrize("evaluate", EVALUATIONS.values(), ids=EVALUATIONS)
def test_evaluation_restores_the_mode_after_an_error(evaluate):
    model = small_model()
    with pytest.raises(RuntimeError):
        evaluate(model, torch.zeros(2, 99, dtype=torch.float64, device=device()), torch.zeros(2, dtype=torch.int64))
    assert model.training


@pytest.mark.parametrize("evaluate", EVALUATIONS.values(), ids=EVALUATIONS)
def test_evaluation_switches_dropout_off(evaluate):
    model = nn.Sequential(nn.Dropout(0.5), small_model())
    x, y = small_problem()
    first, second = evaluate(model, x, y), evaluate(model, x, y)
    assert torch.equal(torch.as_tensor(first), torch.as_tensor(second))
