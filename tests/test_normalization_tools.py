"""`company` and `statistics_report` of chapter 4: the same as loops of forward passes, calibrated, and safe."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.optim.swa_utils import update_bn

from helpers import normalization as norm
from helpers.lab import datasets, training
from helpers.lab.runtime import device, generator, seeded
from tests.statistics import assert_counts, assert_refuses, assert_share


def mlp(width=8, inputs=4, classes=3):
    with seeded("test.normalization.mlp"):
        layers = nn.Linear(inputs, width), nn.BatchNorm1d(width, eps=0.03), nn.ReLU(), nn.Dropout(0.5)
        nn.init.normal_(layers[1].weight), nn.init.normal_(layers[1].bias)
        return nn.Sequential(*layers, nn.Linear(width, classes)).to(device(), torch.float64)


def convolutional():
    with seeded("test.normalization.convolutional"):
        layers = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, affine=False), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)
        return nn.Sequential(*layers).to(device(), torch.float64)


def volumes():
    with seeded("test.normalization.volumes"):
        layers = nn.Conv3d(1, 3, 2), nn.BatchNorm3d(3), nn.Flatten(), nn.Linear(3, 3)
        return nn.Sequential(*layers).to(device(), torch.float64)


class Tokens(nn.Module):
    """Normalizes all tokens of all examples as rows."""

    def __init__(self):
        super().__init__()
        with seeded("test.normalization.tokens"):
            self.layer, self.norm, self.head = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x):  # (B, T, 4)
        rows = self.norm(self.layer(x).flatten(0, 1))
        return self.head(rows.unflatten(0, x.shape[:2]).mean(1))


class Coupled(nn.Module):
    """Batch norm, and a mean over the batch besides: companies cannot go through it together."""

    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x):
        return self.body(x * x.mean(0))


class AlmostAlone(Coupled):
    def forward(self, x):
        return self.body(x * (1 + 1e-6 * x.mean(0)))


class OwnNorm(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x) / 2


def own_norm():
    with seeded("test.normalization.own"):
        return nn.Sequential(nn.Linear(4, 5), OwnNorm(5), nn.Linear(5, 3)).to(device(), torch.float64)


def batch_of(*shape, stream="test.normalization.data"):
    return torch.randn(shape, generator=generator(stream), dtype=torch.float64, device=device())


MODELS = {
    "perceptron": (mlp, (4,), True),
    "convolutional": (convolutional, (2, 6, 6), True),
    "tokens": (lambda: Tokens().to(device(), torch.float64), (5, 4), True),
    "volumes": (volumes, (1, 2, 2, 2), True),
    "almost alone": (lambda: AlmostAlone().to(device(), torch.float64), (4,), False),
    "coupled": (lambda: Coupled().to(device(), torch.float64), (4,), False),
    "subclass": (own_norm, (4,), False),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_size", [2, 5])
def test_companies_get_what_single_forward_passes_give(name, batch_size):
    build, shape, together = MODELS[name]
    model, inputs, others = build(), batch_of(3, *shape), batch_of(11, *shape, stream="test.normalization.others")
    seen = []
    model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].clone()))
    found = norm.company(
        model, inputs, others, batch_size=batch_size, companies=4, generator=generator("test.normalization.company")
    )
    batches = torch.cat(seen)[-12 * batch_size :].unflatten(0, (12, batch_size))  # before them, what was tried
    alone = build()
    labels = alone.eval()(inputs).argmax(1)
    for layer in alone.modules():
        layer.train(isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d))
    with torch.no_grad():
        logits = torch.stack([alone(batch)[0] for batch in batches]).unflatten(0, (3, 4))
    torch.testing.assert_close(batches[:, 0], inputs.repeat_interleave(4, 0))
    torch.testing.assert_close(found.mean, logits.mean(1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.std, logits.std(1), rtol=1e-9, atol=1e-12)
    assert torch.equal(found.labels, labels)
    assert not found.mean.requires_grad
    assert torch.equal(found.agreements, (logits.argmax(2) == labels[:, None]).sum(1))
    calls = [len(rows) for rows in seen]
    assert (max(calls) > 2 * batch_size) == together


def test_company_is_drawn_without_replacement_and_from_all():
    model, seen = mlp(), []
    inputs, others = batch_of(40, 4), torch.arange(10.0, dtype=torch.float64, device=device())[:, None].expand(10, 4)
    model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].clone()))
    source = generator("test.normalization.drawn")
    norm.company(model, inputs, others, batch_size=4, companies=50, generator=source, examples_per_call=16_000)
    drawn = seen[-1].unflatten(0, (2_000, 4))[:, 1:, 0].long().cpu()
    assert all(len(set(row)) == 3 for row in drawn.tolist())
    assert_counts(torch.bincount(drawn.flatten(), minlength=10))


def test_each_input_has_companies_of_its_own():
    model, seen = mlp(), []
    others = torch.arange(1_000.0, dtype=torch.float64, device=device())[:, None].expand(1_000, 4)
    model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].clone()))
    source = generator("test.normalization.own companies")
    norm.company(model, batch_of(30, 4), others, batch_size=6, companies=20, generator=source, examples_per_call=3_600)
    drawn = seen[-1].unflatten(0, (600, 6))[:, 1:, 0].long().cpu()
    assert len({frozenset(row) for row in drawn.tolist()}) == 600


def test_all_others_may_be_in_one_company():
    found = norm.company(
        mlp(), batch_of(3, 4), batch_of(5, 4), batch_size=6, companies=3, generator=generator("test.normalization.all")
    )
    assert found.std.max() < 1e-12


def test_memory_is_bounded_and_the_default_is_1024_examples():
    for options, most in (({}, 1_024), ({"examples_per_call": 20}, 20), ({"examples_per_call": 1}, 4)):
        model, seen = mlp(), []
        model.register_forward_pre_hook(lambda _, arguments, seen=seen: seen.append(len(arguments[0])))
        source = generator("test.normalization.memory")
        found = norm.company(model, batch_of(30, 4), batch_of(9, 4), batch_size=4, generator=source, **options)
        assert max(seen) == most
        assert found.companies == 20


def test_forms_of_data_give_the_same():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, x, y):
            return self.body(x + y)

    x, other = batch_of(5, 4), batch_of(8, 4, stream="test.normalization.others")

    def judged(model, inputs, others):
        source = generator("test.normalization.forms")
        return norm.company(model, inputs, others, batch_size=3, companies=6, generator=source).mean

    expected = judged(mlp(), x, other)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(other.cpu(), torch.zeros(8)), batch_size=3)
    torch.testing.assert_close(judged(mlp(), x, loader), expected)
    two = Two().to(device(), torch.float64)
    torch.testing.assert_close(judged(two, (x, 0 * x), (other, 0 * other)), expected)
    torch.testing.assert_close(judged(two, {"x": x, "y": 0 * x}, {"x": other, "y": 0 * other}), expected)


def test_a_list_is_a_list_of_batches_where_the_inputs_are_none():
    x, other = batch_of(5, 4), batch_of(40, 4, stream="test.normalization.others")

    def judged(others):
        return norm.company(
            mlp(), x, others, batch_size=25, companies=6, generator=generator("test.normalization.list")
        )

    expected = judged(other).mean
    torch.testing.assert_close(judged(list(other.split(10))).mean, expected)
    torch.testing.assert_close(judged([(part, torch.zeros(len(part))) for part in other.split(10)]).mean, expected)
    whole, parts = (norm.statistics_report(mlp(), data) for data in (loader_of(other, 1), list(other.split(1))))
    assert whole == parts


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x, mask):
        return self.body(x * mask)


def test_mappings_are_read_by_their_keys():
    x, mask = batch_of(5, 4), torch.ones(5, 4, dtype=torch.float64, device=device())
    other, seen = batch_of(30, 4, stream="test.normalization.others"), torch.ones(30, 4, dtype=torch.float64)
    seen = seen.to(x) * 0.5

    def judged(others):
        model, source = Masked().to(device(), torch.float64), generator("test.normalization.keys")
        return norm.company(model, {"x": x, "mask": mask}, others, batch_size=5, generator=source)

    expected = judged({"x": other, "mask": seen})
    assert torch.equal(judged({"mask": seen, "x": other}).mean, expected.mean)
    assert torch.equal(judged({"labels": torch.zeros(30).to(x), "x": other, "mask": seen}).mean, expected.mean)
    assert_refuses(lambda: judged({"x": other}), "others must have the keys of inputs", "none called mask")
    assert_refuses(lambda: judged(other), "others must have the form of inputs", "Tensor with 1")


# What the result says


def made(agreements, companies=20):
    agreements = torch.tensor(agreements)
    zeros = torch.zeros(len(agreements), 2, dtype=torch.float64)
    return norm.Company(agreements * 0 + 1, agreements, companies, 32, zeros, zeros + 0.25)


def test_limits_are_those_of_clopper_and_pearson():
    low, high = made([0, 3, 19, 20]).limits()
    for k, agreed in enumerate((0, 3, 19, 20)):
        expected = stats.binomtest(agreed, 20).proportion_ci(0.95, method="exact")
        assert (low[k], high[k]) == pytest.approx((expected.low, expected.high), abs=1e-12)
    narrow = made([7]).limits(0.5)
    assert narrow[1] - narrow[0] < 0.3


def test_the_result_prints_the_share_that_wavers():
    found = made([20, 19, 20, 3])
    text = (
        "22.5% ± 20.9% of answers differ from those of evaluation mode;\n2 of 4 inputs change their label in at least"
    )
    text += " one of 20 companies of 31"
    assert repr(found) == text
    assert found.table.rows[0] == ["3", "1", "3 of 20", "0.03 to 0.38", "0.25"]
    assert [row[0] for row in found.table.rows] == ["3", "1", "0", "2"]
    many = made([20] * 200)
    assert [row[0] for row in many.table.rows] == [str(k) for k in range(10)]
    spread = torch.tensor([[0.1, 0.7]], dtype=torch.float64)  # a mean square of 0.25
    spread = spread.expand(3, 2)
    assert norm.Company(torch.ones(3), torch.ones(3), 20, 32, spread, spread).table.rows[0][-1] == "0.5"
    assert found._repr_html_() == found.table._repr_html_()
    assert found.table.note == text
    assert found.wavering.value == 0.5
    assert found.differing.value == pytest.approx((0 + 1 + 0 + 17) / 80)
    assert found.differing.stderr == pytest.approx(np.std([0, 0.05, 0, 0.85], ddof=1) / 2)


def trained_network():
    digits = datasets.digits()
    with seeded("test.normalization.digits"):
        model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
        model = model.to(device(), torch.float64)
    options = {"epochs": 2, "batch_size": 32, "learning_rate": 0.05}
    x, y = digits.x_train[:1280], digits.y_train[:1280]
    training.train(model, x, y, **options, generator=generator("test.normalization.digits order"))
    return model, digits


def test_limits_cover_the_share_of_all_companies_on_digits():
    model, digits = trained_network()
    source = generator("test.normalization.coverage")
    repeats = [
        norm.company(model, digits.x_test[:40], digits.x_train, batch_size=4, generator=source, examples_per_call=8_000)
        for _ in range(60)
    ]
    truth = torch.stack([found.agreements for found in repeats]).double().mean(0).cpu().numpy() / 20
    wavering = (truth > 0.02) & (truth < 0.98)
    assert wavering.sum() > 10
    hits = [(low <= truth) & (truth <= high) for low, high in (found.limits() for found in repeats)]
    assert_share(np.array(hits)[:, wavering], (0.94, 1.0))


# Statistics


def loader_of(x, size):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x.cpu(), torch.zeros(len(x))), batch_size=size)


def log_variance(entering, size):
    """Of each unit, (C,); to log s² half of its relative variance, over batches of this size, is added."""
    by_unit = entering.transpose(0, 1).flatten(2)  # (C, examples, positions)
    away = (by_unit - by_unit.flatten(1).mean(1)[:, None, None]).square()
    variance, biased = (by_unit.flatten(1).var(1, correction=k) for k in (1, 0))
    sums = torch.stack([(x / biased[:, None, None] - 1).flatten(1).sum(1) for x in away.split(size, 1)])
    relative = len(sums) / (len(sums) - 1) * sums.square().sum(0) / by_unit[0].numel() ** 2
    return variance.log() + relative / 2


def test_statistics_are_those_of_all_data_in_one_batch_however_sorted():
    model = convolutional()
    x = batch_of(96, 2, 6, 6).exp()
    with torch.no_grad():
        model[1].running_mean.copy_(torch.tensor([0.3, -0.2, 1.0]))
        model[1].running_var.copy_(torch.tensor([0.5, 2.0, 1.5]))
        entering = model[0](x).transpose(0, 1).flatten(1)
    variance = entering.var(1)
    shift = ((model[1].running_mean - entering.mean(1)).abs() / variance.sqrt()).max().item()
    sorted_x = x[x.sum((1, 2, 3)).argsort()]
    for data in (loader_of(x, 3), loader_of(sorted_x, 3), x):
        [found] = norm.statistics_report(model, data).layers
        assert (found.name, found.kind) == ("1", "BatchNorm2d")
        rows = data.dataset.tensors[0].to(x) if isinstance(data, torch.utils.data.DataLoader) else data
        expected = (model[1].running_var.log() - log_variance(model[0](rows).detach(), 3)).exp()
        assert found.ratio.value == pytest.approx(expected.log().mean().exp().item(), rel=1e-9)
        assert (found.lowest, found.highest) == pytest.approx((expected.min().item(), expected.max().item()), rel=1e-9)
        assert found.shift.value == pytest.approx(shift, rel=1e-9)
        assert (found.units, found.left_out) == (3, 0)
    assert found.ratio.n == found.shift.n == 32


def test_a_ragged_loader_counts_examples_and_not_batches():
    layer = nn.BatchNorm1d(2).to(device(), torch.float64)
    x = batch_of(100, 2) * 3 + 1
    [found] = norm.statistics_report(layer, loader_of(x, 3)).layers  # the last batch holds one
    assert found.ratio.value == pytest.approx((-log_variance(x[:, :, None], 3)).mean().exp().item(), rel=1e-9)
    assert found.ratio.n == 34


def test_deeper_layers_are_measured_in_evaluation_mode():
    with seeded("test.normalization.two norms"):
        model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3), nn.BatchNorm1d(3)).to(device(), torch.float64)
    model[0].running_var.fill_(9.0)
    x = batch_of(60, 4)
    entering = copy.deepcopy(model).eval()[:2](x).detach()
    _, second = norm.statistics_report(model.train(), x).layers
    expected = (-log_variance(entering[:, :, None], 2)).mean().exp().item()
    assert second.ratio.value == pytest.approx(expected, rel=1e-9)


def test_a_layer_used_twice_is_measured_over_both_calls_and_dead_units_are_left_out():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.unused = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(x), self.norm(2 * x)

    x = batch_of(60, 3)
    x[:, 1] = 0
    report = norm.statistics_report(Twice().to(device(), torch.float64), x)
    [found] = report.layers
    both = torch.stack([x, 2 * x], 2)[:, [0, 2]]  # two values for each example
    assert found.ratio.value == pytest.approx((-log_variance(both, 2)).mean().exp().item(), rel=1e-9)
    assert (found.units, found.left_out) == (2, 1)
    assert "Units that do not vary: 1 of 3 in norm. Never called: unused." in report.table.note
    assert_refuses(
        lambda: norm.statistics_report(Twice(), torch.zeros(60, 3)), "unit whose values vary", "none at norm"
    )


def test_standard_errors_cover_at_five_hundred_digits():
    model, digits = trained_network()
    entering = model[0](digits.x_train).detach()  # the population; its first layer's statistics are made exact
    layer = nn.BatchNorm1d(64).to(entering)
    layer.running_mean.copy_(entering.mean(0))
    layer.running_var.copy_(entering.var(0, correction=0))
    source, hits, noise = generator("test.normalization.standard errors"), [], []
    for _ in range(200):
        drawn = torch.randint(len(entering), (500,), generator=source, device=source.device)
        [found] = norm.statistics_report(layer, entering[drawn]).layers
        hits.append(abs(found.ratio.value - 1) <= 2 * found.ratio.stderr)
        noise.append(found.shift.value > 5 * found.shift.stderr)
    assert_share(hits, (0.92, 0.97))
    assert_share(noise, (0.0, 0.02))


def test_standard_errors_are_those_of_batches_by_numerical_derivatives():
    """Each batch gets a little more weight in turn; the spread of what that changes is the standard error."""
    layer = nn.BatchNorm1d(2).to(device(), torch.float64)
    layer.running_mean.copy_(torch.tensor([0.4, -1.0]))
    layer.running_var.copy_(torch.tensor([0.5, 3.0]))
    sizes = [1 + k % 4 for k in range(34)]
    n_values = sum(sizes)
    batches = list((batch_of(n_values, 2).exp() + 100).split(sizes))

    def weighted(b, weight):
        weights = torch.cat(
            [torch.full((size,), 1.0 + weight * (k == b), dtype=torch.float64) for k, size in enumerate(sizes)]
        ).to(device())
        values, weights = torch.cat(batches), weights[:, None].double()
        mean = (weights * values).sum(0) / weights.sum()
        variance = (weights * (values - mean).square()).sum(0) / weights.sum() * n_values / (n_values - 1)
        return (layer.running_var / variance).log().mean().exp().item(), mean / torch.cat(batches).std(0)

    step, n = 1e-5, len(sizes)
    found_ratios = torch.tensor([(weighted(b, step)[0] - weighted(b, -step)[0]) / (2 * step) for b in range(n)])
    [found] = norm.statistics_report(layer, [(batch, torch.zeros(len(batch))) for batch in batches]).layers
    plain = weighted(-1, 0.0)[0]  # the report is below it, by what log s² lies low
    influence = n * found_ratios.double() * float(found.ratio.value) / plain
    assert found.ratio.stderr == pytest.approx(influence.std().item() / n**0.5, rel=1e-4)
    assert found.ratio.skewness == pytest.approx(stats.skew(influence.numpy()), abs=1e-4)
    unit = int(((layer.running_mean - torch.cat(batches).mean(0)).abs() / torch.cat(batches).std(0)).argmax())
    shifts = torch.tensor([((weighted(b, step)[1] - weighted(b, -step)[1]) / (2 * step))[unit] for b in range(n)])
    assert found.shift.stderr == pytest.approx((n * shifts).std().item() / n**0.5, rel=1e-3)
    away = n * shifts.numpy() * torch.sign(torch.cat(batches).mean(0) - layer.running_mean)[unit].item()
    assert found.shift.skewness == pytest.approx(stats.skew(away), abs=1e-3)


def test_reports_print_a_row_for_each_layer():
    made, shift = norm.Estimate(2.1312, 0.0213, 40, 0.0), norm.Estimate(0.123, 0.04, 40, 0.0)
    layer = norm.LayerStatistics("a.0", "BatchNorm1d", made, 1.2345, 3.0, shift, 5, 0)
    report = norm.StatisticsReport((layer,))
    assert report.table.rows == [["a.0", "BatchNorm1d", "2.131 ± 0.021", "1.23 to 3", "0.12 ± 0.04"]]
    assert repr(report).splitlines()[-1] == report.table.note
    assert report._repr_html_() == report.table._repr_html_()


def test_values_far_from_zero_in_single_precision_and_units_without_running_variance():
    layer = nn.BatchNorm1d(2).to(device())
    layer.running_mean.fill_(1e4)
    layer.running_var[1] = 0
    x = (1e4 + 2 * batch_of(600, 2)).float()
    [found] = norm.statistics_report(layer, x).layers
    assert found.ratio.value == pytest.approx(1 / x[:, 0].double().var().item(), rel=0.01)
    assert (found.units, found.left_out) == (1, 1)


def test_update_bn_of_a_sorted_loader_misses_what_lies_between_its_batches_and_the_report_says_so():
    x = torch.repeat_interleave(torch.arange(40.0), 5)[:, None] / 10 + 0.1 * batch_of(200, 1).float().cpu()
    layer = nn.BatchNorm1d(1)
    update_bn(x.split(5), layer)
    [found] = norm.statistics_report(layer, x).layers
    assert found.ratio.value < 0.05


# Refusals


def judge(model, inputs=None, others=None, **options):
    inputs = batch_of(3, 4) if inputs is None else inputs
    others = batch_of(5, 4) if others is None else others
    options = {"batch_size": 3, "generator": generator("test.normalization.refused")} | options
    return norm.company(model, inputs, others, **options)


class Dictionary(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x):
        return {"hidden": x, "logits": self.body(x)}


def plain(layer):
    return nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 3)).to(device(), torch.float64)


@pytest.mark.parametrize(
    ("call", "rule", "value"),
    [
        (lambda: judge(plain(nn.LayerNorm(4))), "model must have a layer of batch normalization", "none"),
        (lambda: judge(plain(nn.SyncBatchNorm(4))), "normalize by the batch of one process", "SyncBatchNorm at 1"),
        (
            lambda: judge(plain(nn.BatchNorm1d(4, track_running_stats=False))),
            "layers must have running statistics",
            "track_running_stats=False at 1",
        ),
        (lambda: judge(mlp(), batch_size=1), "batch_size must lie in [2, inf]", 1),
        (lambda: judge(mlp(), companies=1), "companies must lie in [2, inf]", 1),
        (lambda: judge(mlp(), examples_per_call=0), "examples_per_call must be at least 1", 0),
        (lambda: judge(mlp(), batch_size=7), "others must hold at least 6 examples", 5),
        (lambda: judge(Dictionary()), "must return one tensor of shape (examples, classes)", "shapes [(3, 4), (3, 3)]"),
        (
            lambda: judge(nn.Sequential(mlp(), nn.Unflatten(1, (3, 1)))),
            "one tensor of shape (examples",
            "shapes [(3, 3, 1)]",
        ),
        (lambda: judge(mlp(classes=1)), "must return at least 2 classes", "1: of one logit z"),
        (lambda: judge(mlp(), math.nan * batch_of(3, 4)), "must return numbers for inputs and others", "NaN"),
        (lambda: judge(mlp(), others=batch_of(5, 4).float()), "others must have the dtype of inputs", "torch.float32"),
        (lambda: judge(mlp()).limits(1.2), "confidence must lie in [0, 1]", 1.2),
        (lambda: norm.statistics_report(mlp(), batch_of(29, 4)), "loader must hold at least 30 batches", 29),
        (
            lambda: norm.statistics_report(mlp(), math.nan * batch_of(60, 4)),
            "values and running statistics must be finite",
            "others at 1",
        ),
        (lambda: norm.statistics_report(plain(nn.Tanh()), batch_of(40, 4)), "a layer of batch normalization", "none"),
    ],
)
def test_what_cannot_be_judged_is_refused(call, rule, value):
    assert_refuses(call, rule, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_judged_too(dtype):
    model = mlp().to(dtype)
    found = judge(model, batch_of(3, 4).to(dtype), batch_of(5, 4).to(dtype))
    expected = judge(mlp())
    torch.testing.assert_close(found.mean.double(), expected.mean, rtol=0.1, atol=0.1)
    assert found.mean.dtype == torch.float32
    [layer] = norm.statistics_report(model, batch_of(60, 4).to(dtype)).layers
    assert layer.ratio.value > 0


def network(at):
    options = {"dtype": torch.float64, "device": at.device}
    layer = nn.BatchNorm1d(4, affine=False, track_running_stats=False)  # whose counter the other device cannot make
    layer.affine = layer.track_running_stats = True
    layer.weight, layer.bias = (nn.Parameter(at.normal(4)) for _ in range(2))
    layer.running_mean, layer.running_var = at.normal(4), at.normal(4).abs() + 1
    layer.num_batches_tracked = at.integers(9)
    return nn.Sequential(nn.Linear(3, 4, **options), layer, nn.ReLU(), nn.Linear(4, 2, **options))


def judged(at):
    return {
        "model": network(at),
        "inputs": at.normal(4, 3),
        "others": at.normal(9, 3),
        "batch_size": 10,  # so that companies are drawn by PyTorch alone
        "generator": at.generator,
    }


DEVICE_CASES_BY_VALUES = [
    (norm.company, judged),
    (norm.statistics_report, lambda at: {"model": network(at), "loader": at.normal(60, 3)}),
]
