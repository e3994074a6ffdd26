"""The chapter's closed forms and masks, each against something that does not use them.

Expectations over masks are sums over all of them, made here by itertools; integrals are SciPy's adaptive quadrature;
and what a layer of dropout does is read off the layers of PyTorch.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import nn
from torch.nn import functional as F

from helpers.dropout import (
    SELU_FLOOR,
    adaptive_penalty,
    all_masks,
    alpha_mask_moments,
    arithmetic_mean,
    dropout_regression,
    geometric_mean,
    linear_variance_shift,
    mask_probabilities,
    mask_variance,
    masked_covariance,
    relu_gap,
    sample_masks,
    second_order_gap,
    variance_shift,
)
from helpers.lab.runtime import generator, rng, seeded
from tests.statistics import assert_refuses, assert_z

P = 0.3, 0.62


def listed(n, p):
    """Yield the factors of all masks of inverted dropout, and their probabilities."""
    for mask in itertools.product((0, 1), repeat=n):
        yield np.array(mask) / (1 - p), math.prod(1 - p if kept else p for kept in mask)


def mean_over_masks(function, n, p):
    return sum(probability * function(factors) for factors, probability in listed(n, p))


def drawn(*shape, stream):
    return rng(f"test.dropout.{stream}").standard_normal(shape)


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


# Moments


@pytest.mark.parametrize("p", P)
def test_variance_of_a_masked_value(p):
    for value in (1.7, -0.4):
        outcomes, chances = np.array([0, value / (1 - p)]), np.array([p, 1 - p])
        mean = chances @ outcomes
        assert mean == pytest.approx(value)
        assert mask_variance(value, p) == pytest.approx(chances @ (outcomes - mean) ** 2)


def test_variances_of_arrays_and_tensors_and_without_a_drop():
    x = drawn(4, 3, stream="variance")
    np.testing.assert_allclose(mask_variance(x, 0.3), 0.3 / 0.7 * x * x)
    torch.testing.assert_close(mask_variance(tensor(x), 0.3), tensor(0.3 / 0.7 * x * x))
    assert mask_variance(2.0, 0.0) == 0


@pytest.mark.parametrize("p", P)
def test_a_preactivation_adds_up_the_variances_of_its_products(p):
    weights, x = drawn(5, stream="weights"), drawn(5, stream="inputs")
    mean = mean_over_masks(lambda f: weights @ (f * x), 5, p)
    second = mean_over_masks(lambda f: (weights @ (f * x)) ** 2, 5, p)
    assert mean == pytest.approx(weights @ x)
    assert mask_variance(weights * x, p).sum() == pytest.approx(second - mean**2)


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("value", [1.7, -0.4, 0.0])
def test_alpha_dropout_has_the_moments_of_its_two_outcomes(p, value):
    with seeded("test.dropout.alpha"):
        outcomes = nn.AlphaDropout(p)(torch.full((200,), value, dtype=torch.float64)).unique()
    low, high = outcomes.tolist()
    mean, variance = alpha_mask_moments(value, p)
    assert mean == pytest.approx(p * low + (1 - p) * high)
    assert variance == pytest.approx(p * (1 - p) * (high - low) ** 2)


def test_alpha_dropout_puts_where_it_drops_what_selu_tends_to():
    assert pytest.approx(nn.SELU()(torch.tensor(-1e4, dtype=torch.float64)).item(), rel=1e-12) == SELU_FLOOR


@pytest.mark.parametrize("p", P)
def test_alpha_dropout_keeps_mean_0_and_variance_1(p):
    def moment(function):
        return integrate.quad(lambda u: stats.norm.pdf(u) * function(*alpha_mask_moments(u, p)), -12, 12)[0]

    assert moment(lambda mean, variance: mean) == pytest.approx(0, abs=1e-10)
    assert moment(lambda mean, variance: mean**2 + variance) == pytest.approx(1)


POINTS = drawn(4, 3, stream="points") + np.array([0.5, -1.0, 2.0])  # four vectors of three correlated entries
CHANCES = np.array([0.1, 0.4, 0.3, 0.2])
MEAN = CHANCES @ POINTS
COVARIANCE = (POINTS - MEAN).T @ np.diag(CHANCES) @ (POINTS - MEAN)


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("inverted", [True, False])
def test_covariance_of_a_masked_vector(p, inverted):
    scale = 1 if inverted else 1 - p
    mean, second = np.zeros(3), np.zeros((3, 3))
    for x, chance in zip(POINTS, CHANCES, strict=True):
        for factors, probability in listed(3, p):
            masked = scale * factors * x
            mean += chance * probability * masked
            second += chance * probability * np.outer(masked, masked)
    found = masked_covariance(MEAN, COVARIANCE, p, inverted=inverted)
    np.testing.assert_allclose(found, second - np.outer(mean, mean), atol=1e-14)
    as_tensor = masked_covariance(tensor(MEAN), tensor(COVARIANCE), p, inverted=inverted)
    torch.testing.assert_close(as_tensor, tensor(found))


def test_covariance_is_that_of_inverted_dropout_unless_told():
    np.testing.assert_array_equal(
        masked_covariance(MEAN, COVARIANCE, 0.3), masked_covariance(MEAN, COVARIANCE, 0.3, inverted=True)
    )
    assert not np.allclose(
        masked_covariance(MEAN, COVARIANCE, 0.3, inverted=False), masked_covariance(MEAN, COVARIANCE, 0.3)
    )


# Gaps


@pytest.mark.parametrize("mean", [-2.3, -0.4, 0.0, 0.7, 3.1])
@pytest.mark.parametrize("std", [0.6, 1.9])
def test_gap_of_a_relu(mean, std):
    def integrand(u):
        return stats.norm.pdf(u) * max(0.0, mean + std * u)

    kink = float(np.clip(-mean / std, -12, 12))
    expected = integrate.quad(integrand, -12, 12, points=[kink], epsabs=1e-13)[0] - max(0.0, mean)
    assert relu_gap(mean, std) == pytest.approx(expected, abs=1e-11)


def test_gap_of_a_relu_far_from_its_kink_keeps_its_digits():
    tail = integrate.quad(lambda u: stats.norm.pdf(u) * (u - 7), 7, 30, epsabs=0, epsrel=1e-11)[0]
    assert relu_gap(7.0, 1.0) == pytest.approx(tail, rel=1e-6)
    assert relu_gap(-7.0, 1.0) == pytest.approx(tail, rel=1e-6)
    np.testing.assert_allclose(relu_gap(np.array([0.7, -0.7]), np.array([1.9, 1.9])), relu_gap(0.7, 1.9))


WEIGHT, BIAS = tensor(drawn(3, 5, stream="last layer")), tensor([0.2, -0.5, 0.9])
HIDDEN = tensor(np.abs(drawn(2, 5, stream="hidden")))
LOGITS = HIDDEN @ WEIGHT.T + BIAS


@pytest.mark.parametrize("p", P)
def test_gap_of_the_cross_entropy_by_its_second_derivative(p):
    found = second_order_gap(LOGITS, WEIGHT, HIDDEN, p)
    for hidden, logits, gap in zip(HIDDEN, LOGITS, found, strict=True):
        for label in range(3):
            curvature = torch.func.hessian(lambda z, label=label: F.cross_entropy(z, torch.tensor(label)))(logits)
            covariance = np.zeros((3, 3))
            for factors, probability in listed(5, p):
                noise = (WEIGHT @ (hidden * tensor(factors - 1))).numpy()
                covariance += probability * np.outer(noise, noise)
            assert gap.item() == pytest.approx(np.trace(curvature.numpy() @ covariance) / 2)


def test_gap_of_the_cross_entropy_is_right_for_small_noise():
    ratios = []
    for size in (0.1, 0.01):
        hidden, weight = HIDDEN[:1], size * WEIGHT
        logits = hidden @ weight.T + BIAS

        def loss(factors, hidden=hidden, weight=weight):
            masked = (hidden * tensor(factors)) @ weight.T + BIAS
            return F.cross_entropy(masked, torch.tensor([1])).item()

        gap = mean_over_masks(loss, 5, 0.3) - F.cross_entropy(logits, torch.tensor([1])).item()
        ratios.append(gap / second_order_gap(logits, weight, hidden, 0.3).item())
    assert abs(ratios[0] - 1) < 0.06
    assert abs(ratios[1] - 1) < 0.3 * abs(ratios[0] - 1)  # the rest is of the third order at least


# Regression

INPUTS, TARGETS = drawn(7, 3, stream="regression"), drawn(7, stream="targets")


@pytest.mark.parametrize("p", P)
def test_dropout_adds_its_penalty_to_the_squared_loss(p):
    weights = np.array([0.7, -1.2, 0.4])
    expected = mean_over_masks(lambda f: np.sum((TARGETS - (INPUTS * f) @ weights) ** 2), 3, p)
    plain = np.sum((TARGETS - INPUTS @ weights) ** 2)
    # With a mask for each row: rows are independent, so that their expectations add up.
    assert adaptive_penalty(tensor(weights), tensor(INPUTS), p).item() == pytest.approx(expected - plain)


@pytest.mark.parametrize("p", P)
def test_regression_under_dropout_is_least_squares_over_all_masks(p):
    rows, wanted = [], []
    for factors, probability in listed(3, p):
        rows.append(math.sqrt(probability) * INPUTS * factors)
        wanted.append(math.sqrt(probability) * TARGETS)
    best = np.linalg.lstsq(np.concatenate(rows), np.concatenate(wanted), rcond=None)[0]
    np.testing.assert_allclose(dropout_regression(tensor(INPUTS), tensor(TARGETS), p), best)


# Shifts


@pytest.mark.parametrize("p", P)
def test_shift_of_a_variance_behind_dropout(p):
    x, chances = np.array([-1.0, 0.5, 2.0]), np.array([0.2, 0.5, 0.3])
    mean, variance = chances @ x, chances @ (x - chances @ x) ** 2
    second = sum(
        c * probability * (f[0] * v) ** 2 for v, c in zip(x, chances, strict=True) for f, probability in listed(1, p)
    )
    assert variance_shift(mean, variance, p) == pytest.approx((second - mean**2) / variance)
    torch.testing.assert_close(
        variance_shift(tensor([mean]), tensor([variance]), p), tensor([(second - mean**2) / variance])
    )


@pytest.mark.parametrize("p", P)
def test_shift_of_a_variance_behind_a_linear_layer(p):
    weight = drawn(2, 3, stream="linear layer")
    outputs = weight @ np.array([f * x for x in POINTS for f, _ in listed(3, p)]).T  # (2, points and masks)
    chances = np.array([chance * probability for chance in CHANCES for _, probability in listed(3, p)])
    in_training = outputs**2 @ chances - (outputs @ chances) ** 2
    in_testing = np.einsum("ui,ij,uj->u", weight, COVARIANCE, weight)
    found = linear_variance_shift(tensor(weight), tensor(CHANCES @ POINTS**2), tensor(in_testing), p)
    np.testing.assert_allclose(found, in_training / in_testing)


# Means of networks


def test_means_of_distributions():
    chances = rng("test.dropout.distributions").dirichlet([1.0, 2.0, 0.5], (4, 2))  # (networks, examples, classes)
    weights = np.array([0.1, 0.2, 0.3, 0.4])
    logs = tensor(np.log(chances))
    for given, w in ((tensor(weights), weights), (None, np.full(4, 0.25))):
        products = np.prod(chances ** w[:, None, None], axis=0)
        geometric = products / products.sum(1, keepdims=True)
        torch.testing.assert_close(geometric_mean(logs, given).exp(), tensor(geometric))
        torch.testing.assert_close(arithmetic_mean(logs, given).exp(), tensor(np.tensordot(w, chances, 1)))


def test_a_network_without_weight_does_not_count():
    logs = tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    torch.testing.assert_close(arithmetic_mean(logs, tensor([1.0, 0.0])), logs[0])
    torch.testing.assert_close(geometric_mean(logs, tensor([0.0, 1.0])), logs[1])


@pytest.mark.parametrize("p", P)
def test_weight_scaling_is_the_geometric_mean_of_all_softmax_regressions(p):
    logs, chances = [], []
    for factors, probability in listed(5, p):
        logs.append(((HIDDEN * tensor(factors)) @ WEIGHT.T + BIAS).log_softmax(1))
        chances.append(probability)
    torch.testing.assert_close(geometric_mean(torch.stack(logs), tensor(chances)), LOGITS.log_softmax(1))
    assert (geometric_mean(torch.stack(logs)) - LOGITS.log_softmax(1)).abs().max() > 0.05


# Masks


@pytest.mark.parametrize("n", [1, 2, 5])
def test_all_masks_are_listed(n):
    assert all_masks(n).tolist() == [list(map(float, mask)) for mask in itertools.product((0, 1), repeat=n)]
    assert all_masks(n).dtype == torch.float64
    assert all_masks(n, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("p", P)
def test_probabilities_of_masks(p):
    found = mask_probabilities(all_masks(4), p)
    expected = [probability for _, probability in listed(4, p)]
    torch.testing.assert_close(found, tensor(expected))
    assert found.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("p", [0.2, 0.62])
def test_sampled_masks_keep_as_often_as_they_should(p):
    """Two standard errors are 0.2 % of a share of one half."""
    masks = sample_masks((1_000_000, 2), p, generator=generator(f"test.dropout.masks {p}"))
    kept = 1 / (1 - p)
    assert set(masks.unique().tolist()) == {0.0, kept}
    is_kept = (masks > 0).double()
    error = math.sqrt(p * (1 - p) / len(masks))
    assert_z((is_kept.mean(0) - (1 - p)) / error)
    both = is_kept.prod(1).mean() - (1 - p) ** 2  # columns are independent
    assert_z(both / math.sqrt((1 - p) ** 2 * (1 - (1 - p) ** 2) / len(masks)))
    neighbors = (is_kept[1:, 0] * is_kept[:-1, 0]).mean() - (1 - p) ** 2
    assert_z(neighbors / (2 * math.sqrt((1 - p) ** 2 * (1 - (1 - p) ** 2) / len(masks))))


def test_sampled_masks_are_reproducible_and_of_the_wanted_type():
    twice = [sample_masks((3, 4), 0.4, generator=generator("test.dropout.twice")) for _ in range(2)]
    assert torch.equal(*twice)
    assert twice[0].dtype == torch.float64
    masks = sample_masks((2,), 0.0, generator=generator("test.dropout.none"), dtype=torch.float32)
    assert masks.tolist() == [1.0, 1.0]
    assert masks.dtype == torch.float32


# Refusals

RULE = "p must lie in [0, 1)"


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.2, math.nan])
def test_an_impossible_probability_is_refused(p):
    x = torch.ones(1, 2, dtype=torch.float64)
    calls = [
        lambda: mask_variance(1.0, p),
        lambda: alpha_mask_moments(1.0, p),
        lambda: masked_covariance(MEAN, COVARIANCE, p),
        lambda: second_order_gap(x, torch.eye(2, dtype=torch.float64), x, p),
        lambda: adaptive_penalty(x[0], x, p),
        lambda: dropout_regression(x, x[:, 0], p),
        lambda: variance_shift(1.0, 1.0, p),
        lambda: linear_variance_shift(x, x[0], x[0, :1], p),
        lambda: mask_probabilities(x, p),
        lambda: sample_masks((2,), p, generator=torch.Generator()),
    ]
    for call in calls:
        assert_refuses(call, RULE, p)


def test_other_impossible_arguments_are_refused():
    assert_refuses(lambda: relu_gap(1.0, 0.0), "std must be positive", 0.0)
    assert_refuses(lambda: variance_shift(1.0, 0.0, 0.5), "variance must be positive", 0.0)
    one = torch.ones(1, 1)
    assert_refuses(
        lambda: linear_variance_shift(one, one[0], 0 * one[0], 0.5), "variance must be positive", "tensor([0.])"
    )
    for n in (0, 25):
        assert_refuses(lambda n=n: all_masks(n), "n must lie in [1, 24]", n)
    assert len(all_masks(16)) == 65_536
    logs = torch.zeros(3, 2)
    for mean in (geometric_mean, arithmetic_mean):
        assert_refuses(lambda mean=mean: mean(logs, torch.ones(2)), "weights must have shape (3,)", "(2,)")


# Devices

CASE = {"p": 0.3}
DEVICE_CASES = [
    (mask_variance, lambda at: CASE | {"value": at.normal(4)}),
    (alpha_mask_moments, lambda at: CASE | {"value": at.normal(4)}),
    (masked_covariance, lambda at: CASE | {"mean": at.normal(3), "covariance": at.normal(3, 3)}),
    (
        second_order_gap,
        lambda at: CASE | {"logits": at.normal(5, 3), "weight": at.normal(3, 4), "inputs": at.normal(5, 4)},
    ),
    (adaptive_penalty, lambda at: CASE | {"weights": at.normal(3), "inputs": at.normal(5, 3)}),
    (dropout_regression, lambda at: CASE | {"inputs": at.normal(5, 3), "targets": at.normal(5)}),
    (geometric_mean, lambda at: {"log_probabilities": at.normal(4, 5, 3)}),
    (geometric_mean, lambda at: {"log_probabilities": at.normal(4, 5, 3), "weights": at.normal(4)}),
    (arithmetic_mean, lambda at: {"log_probabilities": at.normal(4, 5, 3)}),
    (all_masks, lambda at: {"n": 3, "device": at.device}),
    (mask_probabilities, lambda at: CASE | {"masks": at.normal(4, 3)}),
    (sample_masks, lambda at: CASE | {"shape": (4, 3), "generator": at.generator}),
]
DEVICE_CASES_BY_VALUES = [
    (variance_shift, lambda at: CASE | {"mean": at.normal(3), "variance": at.normal(3).abs() + 1}),
    (
        linear_variance_shift,
        lambda at: (
            CASE | {"weight": at.normal(4, 3), "second_moments": at.normal(3).abs(), "variance": at.normal(4).abs() + 1}
        ),
    ),
]
