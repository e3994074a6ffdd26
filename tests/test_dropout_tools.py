"""The chapter's tools against plain loops, against all masks of a small network, and on layers that drop in secret."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from helpers.data import dropout as trainings
from helpers.dropout import _unit_axis, masked_losses, masked_outputs, remove_units
from helpers.lab import datasets
from helpers.lab.estimates import Estimate
from helpers.lab.runtime import generator, seeded
from tests.statistics import assert_refuses, assert_share, assert_z
from tests.zoo import changes, fingerprint

CLASSES = 3


def classifier(*layers, stream="classifier"):
    with seeded(f"test.dropout_tools.{stream}"):
        for layer in layers:
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        return nn.Sequential(*layers).double()


def small(p=0.5, units=8):
    """Two classes apart far enough that masks matter; dropout before the last layer only."""
    model = classifier(nn.Linear(4, units), nn.ReLU(), nn.Dropout(p), nn.Linear(units, CLASSES))
    with torch.no_grad():
        model[3].weight *= 4
    return model


def examples(n, *shape, stream="examples"):
    draws = generator(f"test.dropout_tools.{stream}")
    x = torch.randn((n, *shape), generator=draws, dtype=torch.float64, device=draws.device)
    return x, torch.randint(CLASSES, (n,), generator=draws, device=draws.device)


def draws(stream="draws"):
    return generator(f"test.dropout_tools.masks {stream}")


def all_outputs(model, x, p=0.5):
    """Logits under all masks of the small network, shape (masks, n, classes), and their probabilities."""
    with torch.no_grad():
        hidden = model[1](model[0](x))
        masks = list(itertools.product((0, 1), repeat=hidden.shape[1]))
        outputs = [model[3](hidden * torch.tensor(mask, dtype=torch.float64) / (1 - p)) for mask in masks]
    chances = [math.prod(1 - p if kept else p for kept in mask) for mask in masks]
    return torch.stack(outputs), torch.tensor(chances, dtype=torch.float64)


# Many masks


@pytest.mark.parametrize("rows_at_once", [1, 7, 40, 1024])
def test_outputs_are_those_of_masks(rows_at_once):
    x = torch.eye(6, dtype=torch.float64) + 1
    with seeded("test.dropout_tools.dropper"):
        model = nn.Sequential(nn.Dropout(0.75))
    found = masked_outputs(model, x, masks=50, generator=draws(f"rows {rows_at_once}"), rows_at_once=rows_at_once)
    assert found.shape == (50, 6, 6)
    kept = found != 0
    torch.testing.assert_close(found, torch.where(kept, 4 * x, 0.0))
    assert_share(kept.flatten(), 0.25)
    assert len({tuple(mask.flatten().tolist()) for mask in kept}) == 50  # each mask is drawn anew
    assert len({tuple(row.tolist()) for row in kept[:, 0]}) > 10
    assert not torch.equal(kept[:, 0], kept[:, 1])  # and for each example


def test_masks_are_those_of_the_generator_and_nothing_else():
    model, (x, _) = small(), examples(5, 4)
    first = masked_outputs(model, x, masks=3, generator=draws("reproducible"))
    torch.rand(1)
    assert torch.equal(first, masked_outputs(model, x, masks=3, generator=draws("reproducible")))
    source = draws("twice")
    a, b = (masked_outputs(model, x, masks=3, generator=source) for _ in range(2))
    assert not torch.equal(a, b)


class Encoder(nn.Module):
    """A transformer layer, whose fast path in evaluation knows no dropout."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.4, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.layer(x)[:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.4, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0][:, -1])


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.layers = kind(4, 5, num_layers=2, dropout=0.4, batch_first=True)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(self.layers(x)[0][:, -1])


SECRETIVE = {
    "transformer layer": (Encoder, (5, 4)),
    "attention": (Attention, (5, 4)),
    "LSTM": (Recurrent, (5, 4)),
    "dropout of channels": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Dropout2d(0.4), nn.Flatten(), nn.Linear(16, CLASSES)),
        (2, 4, 4),
    ),
    "dropout of sequences": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.Dropout1d(0.4), nn.Flatten(), nn.Linear(8, CLASSES)),
        (2, 4),
    ),
    "dropout of volumes": (
        lambda: nn.Sequential(nn.Conv3d(2, 4, 3), nn.Dropout3d(0.4), nn.Flatten(), nn.Linear(4, CLASSES)),
        (2, 3, 3, 3),
    ),
    "GRU": (lambda: Recurrent(nn.GRU), (5, 4)),
    "alpha dropout": (lambda: nn.Sequential(nn.Linear(4, 9), nn.SELU(), nn.AlphaDropout(0.4), nn.Linear(9, 3)), (4,)),
    "alpha dropout of channels": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.FeatureAlphaDropout(0.4), nn.Flatten(), nn.Linear(16, CLASSES)),
        (2, 4, 4),
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SECRETIVE)
def test_whatever_drops_is_switched_on_and_nothing_else_changes(name, training):
    build, shape = SECRETIVE[name]
    with seeded("test.dropout_tools.secretive"):
        model = build().double().train(training)
    x, y = examples(30, *shape)
    before, fast_path = fingerprint(model), torch.backends.mha.get_fastpath_enabled()
    found = masked_outputs(model, x, masks=20, generator=draws(name))
    assert not changes(before, fingerprint(model))
    assert torch.backends.mha.get_fastpath_enabled() == fast_path
    assert (found.std(0) > 0).all()
    losses = masked_losses(model, F.cross_entropy, x, y, generator=draws(f"losses {name}"))
    assert not changes(before, fingerprint(model))
    with torch.no_grad():
        whole = F.cross_entropy(model.eval()(x), y)
    assert losses.whole.loss.value == pytest.approx(whole.item())


def test_batch_normalization_works_as_in_evaluation():
    model = classifier(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, CLASSES)).train()
    with seeded("test.dropout_tools.statistics"):
        nn.init.normal_(model[1].running_mean)
    (x, _), before = examples(9, 4), fingerprint(model)
    many = masked_outputs(model, x, masks=4_000, generator=draws("normalized"))
    with torch.no_grad():
        model.eval()
        whole = model(x)
    assert_z((many.mean(0) - whole) / (many.std(0) / math.sqrt(4_000)))
    model.train()
    assert not changes(before, fingerprint(model))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.layer(F.dropout(x, 0.5, self.training))


class AlsoFunctional(nn.Module):
    """A layer of dropout, and dropout that no layer does: as a function, or inside of an attention."""

    def __init__(self, kind):
        super().__init__()
        self.drop, self.layer, self.kind = nn.Dropout(0.5), nn.Linear(4, CLASSES), kind

    def forward(self, x):
        if self.kind == "function":
            x = F.dropout(x, 0.3, self.training)
        elif self.kind == "always":
            x = F.dropout(x, 0.3)
        elif self.kind == "attention":
            p = 0.3 if self.training else 0.0
            x = F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], dropout_p=p)[:, 0]
        return self.layer(self.drop(x))


class FromTheFirst(nn.Module):
    """Compares all examples of a batch with its first."""

    def __init__(self):
        super().__init__()
        self.drop, self.layer = nn.Dropout(0.5), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.layer(self.drop(x - x[:1]))


class Centered(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop, self.layer = nn.Dropout(0.5), nn.Linear(4, CLASSES)

    def forward(self, x):
        x = self.drop(x)
        return self.layer(x - x.mean(0))


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(4, 3),
        nn.Sequential(nn.Dropout(0.0), nn.Linear(4, 3)),
        Functional(),
        nn.LSTM(4, 3, 2),
        nn.GRU(4, 3, 1, dropout=0.3),  # drops between layers only, and has one
    ],
    ids=["no dropout", "p of 0", "functional", "recurrent, p of 0", "one recurrent layer"],
)
@pytest.mark.filterwarnings("ignore:dropout option adds dropout:UserWarning")
def test_a_model_in_which_nothing_drops_is_refused(model):
    x, y = examples(5, 4)
    assert_refuses(
        lambda: masked_outputs(model.double(), x, masks=3, generator=draws("refused")),
        "with a positive probability",
        "none",
    )
    assert_refuses(
        lambda: masked_losses(model.double(), F.cross_entropy, x, y, generator=draws("refused too")), "dropout", "none"
    )


@pytest.mark.parametrize("kind", ["function", "always", "attention"])
def test_dropout_beside_its_layers_is_refused(kind):
    (x, y), model = examples(5, 4), AlsoFunctional(kind).double()
    before = fingerprint(model)
    calls = [
        lambda: masked_outputs(model, x, masks=3, generator=draws("beside")),
        lambda: masked_losses(model, F.cross_entropy, x, y, generator=draws("beside too")),
    ]
    for call in calls:
        assert_refuses(call, "draw at random in its layers of dropout only", "other draws in training")
    assert not changes(before, fingerprint(model))
    assert masked_outputs(AlsoFunctional("").double(), x, masks=3, generator=draws("layer")).shape == (3, 5, 3)


def test_auxiliary_outputs_in_training_are_no_obstacle():
    class Auxiliary(AlsoFunctional):
        def forward(self, x):
            return (super().forward(x), x) if self.training else super().forward(x)

    x, _ = examples(5, 4)
    assert masked_outputs(Auxiliary("").double(), x, masks=3, generator=draws("auxiliary")).shape == (3, 5, 3)
    assert_refuses(
        lambda: masked_outputs(Auxiliary("function").double(), x, masks=3, generator=draws("auxiliary too")),
        "draw at random in its layers of dropout only",
        "other draws in training",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_hides_neither_another_loss_nor_coupling(dtype):
    x, y = examples(40, 4)
    half, x = small().to(dtype), x.to(dtype)
    double = masked_losses(small(), F.cross_entropy, x.double(), y, masks=10, generator=draws("half"))
    found = masked_losses(half, F.cross_entropy, x, y, masks=10, generator=draws("half"))
    assert found.whole.loss.value == pytest.approx(double.whole.loss.value, rel=0.02)
    smoothed = nn.CrossEntropyLoss(label_smoothing=0.1)
    with pytest.raises(ValueError, match="loss must be the mean cross-entropy"):
        masked_losses(half, smoothed, x, y, masks=10, generator=draws("smoothed half"))
    with pytest.raises(ValueError, match="must not be coupled"):
        masked_outputs(FromTheFirst().to(dtype), x, masks=3, generator=draws("coupled half"))


def test_other_arguments_that_cannot_be_right_are_refused():
    x, y = examples(5, 4)
    model = small()
    for name in ("masks", "rows_at_once"):
        arguments = {"masks": 2, "rows_at_once": 10} | {name: 0}
        assert_refuses(
            lambda arguments=arguments: masked_outputs(model, x, generator=draws("zero"), **arguments),
            f"{name} must be at least 1",
            0,
        )
    assert_refuses(
        lambda: masked_losses(model, F.cross_entropy, x, y, masks=9, generator=draws("nine")),
        "masks must be at least 10",
        9,
    )
    for coupled in (Centered(), FromTheFirst()):
        assert_refuses(
            lambda coupled=coupled: masked_outputs(coupled.double(), x, masks=3, generator=draws("coupled")),
            "must not be coupled",
            "outputs of one example",
        )
    with pytest.raises(ValueError, match="must not be coupled"):
        masked_outputs(Centered().double(), x, masks=3, generator=draws("two"), rows_at_once=10)
    assert masked_outputs(Centered().double(), x, masks=3, generator=draws("single"), rows_at_once=9).shape == (3, 5, 3)


# Losses


def entropy_by_hand(log_probabilities, labels):
    return -log_probabilities[..., np.arange(len(labels)), labels]


def normalized(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def jackknifed(of, masks):
    """Return a function of the mean over masks, its jackknife for infinitely many, and its values without one each."""
    full = of(list(range(masks)))
    without = np.stack([of([s for s in range(masks) if s != t]) for t in range(masks)])
    return masks * full - (masks - 1) * without.mean(0), without


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_losses_are_those_of_plain_loops(dtype):
    model, (x, labels) = small().to(dtype), examples(31, 4)
    x = x.to(dtype)
    masked = masked_outputs(model, x, masks=10, generator=draws("by hand")).double().numpy()
    found = masked_losses(model, F.cross_entropy, x, labels, masks=10, generator=draws("by hand"))
    y, n = labels.numpy(), len(labels)
    whole, logs = normalized(model.eval()(x).detach().double().numpy()), normalized(masked)

    def geometric(some):
        return normalized(np.mean(logs[some], axis=0))

    def arithmetic(some):
        return np.log(np.mean(np.exp(logs[some]), axis=0))

    ways = {"whole": (whole, entropy_by_hand(whole, y), None)}
    each = entropy_by_hand(logs, y)
    ways["one_mask"] = (None, each.mean(0), each.mean(1).std(ddof=1) / math.sqrt(10))
    for name, mean in (("geometric", geometric), ("arithmetic", arithmetic)):
        loss, without = jackknifed(lambda some, mean=mean: entropy_by_hand(mean(some), y), 10)
        of_masks = math.sqrt(9 / 10 * np.sum((without.mean(1) - without.mean()) ** 2))
        ways[name] = (mean(list(range(10))), loss, of_masks)
    for name, (chances, loss, mask_stderr) in ways.items():
        prediction = getattr(found, name)
        assert prediction.loss.value == pytest.approx(loss.mean())
        assert prediction.loss.stderr == pytest.approx(loss.std(ddof=1) / math.sqrt(n))
        excess = loss - ways["whole"][1]
        assert prediction.excess.value == pytest.approx(excess.mean())
        assert prediction.excess.stderr == pytest.approx(excess.std(ddof=1) / math.sqrt(n), abs=1e-12)
        assert prediction.mask_stderr == pytest.approx(mask_stderr or 0)
        hits = (logs.argmax(-1) == y).mean(0) if chances is None else chances.argmax(-1) == y
        confidences = np.exp(logs.max(-1)).mean(0) if chances is None else np.exp(chances.max(-1))
        assert prediction.accuracy.value == pytest.approx(hits.mean())
        assert prediction.overconfidence.value == pytest.approx((confidences - hits).mean())
        assert prediction.overconfidence.stderr == pytest.approx((confidences - hits).std(ddof=1) / math.sqrt(n))
    assert found.masks == 10
    shown = repr(found)
    assert shown.startswith("Loss in nats of 31 examples, 10 masks each.")
    cells = [f"{getattr(found, name).mask_stderr:.1g}" for name in ("one_mask", "geometric", "arithmetic")]
    assert [row[3] for row in found.table().rows] == ["", *cells]
    for words in ("without masks", "one mask", "geometric mean", "arithmetic mean", "confidence - accuracy"):
        assert words in shown
    assert "<table" in found._repr_html_()


def test_thirty_masks_are_the_default():
    model, (x, y) = small(), examples(30, 4)
    assert masked_losses(model, F.cross_entropy, x, y, generator=draws("default")).masks == 30
    assert masked_losses(model, F.cross_entropy, x, y, masks=10, generator=draws("least")).masks == 10


def test_interval_of_masks_covers_the_loss_of_all_masks():
    """On the examples given, for 20 masks each: what the jackknife leaves of their bias is little beside the error."""
    model, (x, y) = small(p=0.6), examples(60, 4)
    outputs, chances = all_outputs(model, x, 0.6)
    logs = outputs.log_softmax(-1)
    truth = {
        "one_mask": torch.tensordot(chances, logs, 1),
        "geometric": torch.tensordot(chances, logs, 1).log_softmax(-1),
        "arithmetic": torch.tensordot(chances, logs.exp(), 1).log(),
    }
    source, errors = draws("coverage"), {name: [] for name in truth}
    for _ in range(250):
        found = masked_losses(model, F.cross_entropy, x, y, masks=20, generator=source, rows_at_once=20)
        for name, log_probabilities in truth.items():
            prediction = getattr(found, name)
            exact = F.nll_loss(log_probabilities, y).item()
            errors[name].append((prediction.loss.value - exact) / prediction.mask_stderr)
    for name, z in errors.items():
        assert_share(np.abs(z) < 2, (0.92, 0.97))
        assert abs(np.mean(z)) < 0.35, name  # one standard error of this mean is 0.07


def test_few_masks_alone_make_the_arithmetic_mean_look_worse_than_it_is():
    """The reason for the jackknife: without it 10 masks are off by several of their standard errors."""
    model, (x, y) = small(p=0.6), examples(60, 4)
    outputs, chances = all_outputs(model, x, 0.6)
    exact = F.nll_loss(torch.tensordot(chances, outputs.softmax(-1), 1).log(), y).item()
    masked = masked_outputs(model, x, masks=10, generator=draws("plain mean"))
    plain = F.nll_loss(masked.softmax(-1).mean(0).log(), y).item()
    found = masked_losses(model, F.cross_entropy, x, y, masks=10, generator=draws("plain mean"))
    assert plain - exact > 3 * abs(found.arithmetic.loss.value - exact)


def language_model(stream="language model"):
    return classifier(nn.Embedding(7, 6), nn.Dropout(0.4), nn.Linear(6, CLASSES), stream=stream)


def padded(n=30, length=5):
    source = draws("tokens")
    tokens = torch.randint(7, (n, length), generator=source, device=source.device)
    labels = torch.randint(CLASSES, (n, length), generator=source, device=source.device)
    lengths = torch.randint(1, length + 1, (n, 1), generator=source, device=source.device)
    return tokens, labels.masked_fill(torch.arange(length, device=source.device) >= lengths, -100)


def of_tokens(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def test_padding_does_not_count():
    model, (tokens, labels) = language_model(), padded()
    found = masked_losses(model, of_tokens, tokens, labels, masks=10, generator=draws("padding"))
    with torch.no_grad():
        logits = model.eval()(tokens)
    wanted = of_tokens(logits, labels).item()
    assert found.whole.loss.value == pytest.approx(wanted)
    counted = labels != -100
    hits = (logits.argmax(-1) == labels)[counted].double().mean().item()
    assert found.whole.accuracy.value == pytest.approx(hits)
    per_token = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    influence = (per_token.sum(1) - wanted * counted.sum(1)) / counted.sum(1).double().mean()
    assert found.whole.loss.stderr == pytest.approx(influence.std().item() / math.sqrt(len(tokens)))


def test_classes_may_stand_second_or_last():
    class Second(nn.Sequential):
        def forward(self, x):
            return super().forward(x).transpose(1, 2)

    model, (tokens, labels) = language_model(), padded()
    second = Second(*model)
    last = masked_losses(model, of_tokens, tokens, labels, masks=10, generator=draws("order"))
    other = masked_losses(second, F.cross_entropy, tokens, labels, masks=10, generator=draws("order"))
    assert other.arithmetic.loss == last.arithmetic.loss


def test_where_classes_stand_must_be_clear():
    model, (tokens, labels) = language_model(), padded(length=CLASSES)
    assert_refuses(
        lambda: masked_losses(model, of_tokens, tokens, labels, generator=draws("unclear")),
        "which dimension of the logits is that of classes",
        "shape (30, 3, 3)",
    )


def test_a_loader_is_as_good_as_its_tensors():
    model, (x, y) = small(), examples(50, 4)
    loader = DataLoader(TensorDataset(x, y), batch_size=16)
    found = masked_losses(model, F.cross_entropy, loader, masks=200, generator=draws("loader"))
    whole = masked_losses(model, F.cross_entropy, x, y, masks=200, generator=draws("tensors"))
    assert found.whole.loss.value == pytest.approx(whole.whole.loss.value)
    assert found.whole.excess.n == 50
    for name in ("one_mask", "geometric", "arithmetic"):
        a, b = getattr(found, name), getattr(whole, name)
        assert_z((a.loss.value - b.loss.value) / math.hypot(a.mask_stderr, b.mask_stderr))


def test_single_precision_is_near_double():
    model, (x, y) = small(), examples(50, 4)
    double = masked_losses(model, F.cross_entropy, x, y, masks=10, generator=draws("precision"))
    found = masked_losses(model.float(), F.cross_entropy, x.float(), y, masks=10, generator=draws("precision"))
    assert found.whole.loss.value == pytest.approx(double.whole.loss.value, rel=1e-5)


class Tuple(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop, self.layer = nn.Dropout(0.5), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.layer(self.drop(x)), x


def unused():
    model = small()
    nn.init.zeros_(model[3].weight)
    return model


WEIGHTS = torch.tensor([1.0, 9.0, 3.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": nn.CrossEntropyLoss(weight=WEIGHTS)}, r"must be the mean cross-entropy, \d\S+ on .*, got \d"),
        ({"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}, r"must be the mean cross-entropy, .*, got \d"),
        ({"loss": nn.CrossEntropyLoss(reduction="sum")}, r"must be the mean cross-entropy, .*, got \d"),
        ({"loss": nn.CrossEntropyLoss(reduction="none")}, r"must be the mean cross-entropy, .*, got tensor"),
        ({"targets": torch.zeros(20, dtype=torch.float64)}, "targets must be int64 labels, got torch.float64"),
        ({"targets": None}, "targets must be int64 labels, got NoneType"),
        ({"targets": torch.full((20,), 3)}, "targets must be labels from 0 to 2, got 3 to 3"),
        ({"targets": torch.full((20,), -100)}, "targets must hold a label, got only -100"),
        ({"targets": torch.zeros(20, 2, dtype=torch.int64)}, r"targets of shape \(20, 2\), got shape \(20, 3\)"),
        ({"model": Tuple().double()}, "one tensor of logits, got tuple"),
        ({"model": unused()}, "masks must change the outputs, got the same from 30 masks"),
    ],
)
def test_what_is_no_classification_is_refused(change, message):
    x, y = examples(20, 4)
    arguments = {"model": small(), "loss": F.cross_entropy, "inputs": x, "targets": y} | change
    before = fingerprint(arguments["model"])
    with pytest.raises(ValueError, match=message):
        masked_losses(**arguments, generator=draws("refusals"))
    assert not changes(before, fingerprint(arguments["model"]))


def test_few_examples_are_too_few():
    x, y = examples(29, 4)
    assert_refuses(
        lambda: masked_losses(small(), F.cross_entropy, x, y, generator=draws("few")), "at least 30 examples", 29
    )


def test_padding_with_another_label_is_noticed_in_a_later_batch():
    model, (tokens, labels) = language_model(), padded(60)
    other = torch.where(labels == -100, 0, labels)
    other[:30] = 1  # the first batch has no padding

    def without_padding(logits, targets):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=0)

    loader = DataLoader(TensorDataset(tokens, other), batch_size=30)
    with pytest.raises(ValueError, match="with -100 as the label of padding"):
        masked_losses(model, without_padding, loader, generator=draws("later"))


def test_a_verdict_needs_two_standard_errors():
    model, (x, _) = small(), examples(600, 4)
    sure = model.eval()(x).argmax(1)
    wrong = (sure + 1) % CLASSES
    for labels, verb in ((sure, "raises"), (wrong, "lowers")):
        found = masked_losses(model, F.cross_entropy, x, labels, masks=10, generator=draws(f"verdict {verb}"))
        assert found.verdict == f"Averaging probabilities over masks {verb} this loss."
        assert repr(found).endswith(found.verdict)
    few = masked_losses(model, F.cross_entropy, x[:499], sure[:499], masks=10, generator=draws("few"))
    assert few.verdict.endswith("With fewer than 500 examples the errors shown are too small.")
    excess = Estimate(0.02, 0.0101, 500, 0.0)
    undecided = replace(found, arithmetic=replace(found.arithmetic, excess=excess)).verdict
    assert undecided == "Whether averaging probabilities over masks lowers this loss is not decided."


def test_what_many_masks_share_is_as_many_rows_as_wanted():
    rows, model, (x, y) = [], small(), examples(30, 4)
    model[0].register_forward_pre_hook(lambda layer, args: rows.append(len(args[0])))
    masked_outputs(model, x, masks=50, generator=draws("passes"), rows_at_once=100)
    assert rows == [30, 30, 30, 45, *[90] * 16, 60]  # whole, twice in training, coupled, masks
    for rows_at_once in (1, 7, 40):
        rows.clear()
        masked_losses(model, F.cross_entropy, x, y, masks=10, generator=draws("rows"), rows_at_once=rows_at_once)
        assert max(rows) == min(rows_at_once, 30)


def test_masks_that_rarely_differ_are_enough():
    (x, y), refused = examples(30, 4), []
    for k in range(12):
        model = small(p=0.0005)
        outputs = masked_outputs(model, x, masks=10, generator=draws(f"rare {k}"))
        refused.append(bool((outputs == outputs[:1]).all()))
        if refused[-1]:
            with pytest.raises(ValueError, match="masks must change the outputs"):
                masked_losses(model, F.cross_entropy, x, y, masks=10, generator=draws(f"rare {k}"))
        else:
            masked_losses(model, F.cross_entropy, x, y, masks=10, generator=draws(f"rare {k}"))
    assert 0 < sum(refused) < 12


def test_a_loss_near_zero_in_single_precision_is_no_other_loss():
    model, (x, _) = small().float(), examples(500, 4)
    with torch.no_grad():
        model[3].weight *= 50
        y = model.eval()(x.float()).argmax(1)
    found = masked_losses(model, F.cross_entropy, x.float(), y, masks=10, generator=draws("near zero"))
    assert found.whole.loss.value < 0.1


def test_the_fast_path_stays_off_if_it_was():
    (x, y), model = examples(30, 5, 4), Encoder().double()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        masked_losses(model, F.cross_entropy, x, y, masks=10, generator=draws("off"))
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.fixture(scope="module")
def digits_network():
    """A network of the chapter, and what masks do to its loss on each of 500 test images, from 2,000 of them."""
    ((_, model),) = trainings.trained(trainings.network, 0.5, "Adam", 0, epochs=(60,))
    digits = datasets.digits()
    x, y = digits.x_test.cpu(), digits.y_test.cpu()
    chances = masked_outputs(model, x, masks=2_000, generator=torch.Generator().manual_seed(1)).softmax(2).mean(0)
    with torch.no_grad():
        excess = F.nll_loss(chances.log(), y) - F.cross_entropy(model.eval()(x), y)
    return model, x, y, excess.item()


@pytest.mark.parametrize(("n", "share"), [(500, (0.86, 0.97)), (100, (0.7, 0.9))])
def test_interval_over_examples_covers_from_500_digits_on(digits_network, n, share):
    """What the arithmetic mean adds is decided by few images, so that 100 of them are too few."""
    model, x, y, truth = digits_network
    source, found = torch.Generator().manual_seed(2), []
    for _ in range(100):
        rows = torch.randint(500, (n,), generator=source)
        excess = masked_losses(model, F.cross_entropy, x[rows], y[rows], masks=20, generator=source).arithmetic.excess
        found.append(abs(excess.value - truth) < 2 * excess.stderr)
    assert_share(np.array(found), share)


# Without some of the units


def trained_classifier():
    """Labels are the largest of three of the inputs, which a layer of 12 units learns to tell."""
    x, _ = examples(400, 4, stream="learned")
    y = x[:, :CLASSES].argmax(1)
    model = classifier(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, CLASSES), stream="learns")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, x, y


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 0.99])
def test_accuracy_without_units_is_that_of_a_plain_loop(rescale, fraction):
    model, x, y = trained_classifier()
    before = fingerprint(model)
    found = remove_units(
        model, x, y, layers=["1"], fraction=fraction, repeats=7, rescale=rescale, generator=draws("removed")
    )
    assert not changes(before, fingerprint(model))
    source, expected = draws("removed"), []
    removed = math.floor(12 * fraction)
    with torch.no_grad():
        hidden = model[1](model[0](x))
        for _ in range(7):
            kept = torch.ones(12, dtype=torch.float64)
            kept[torch.randperm(12, generator=source)[:removed]] = 0
            kept *= 12 / (12 - removed) if rescale else 1
            expected.append((model[2](hidden * kept).argmax(1) == y).double().mean().item())
        whole = (model(x).argmax(1) == y).double().mean().item()
    assert found.whole == pytest.approx(whole)
    np.testing.assert_allclose(found.accuracies, expected)
    assert found.mean.value == pytest.approx(np.mean(expected))
    assert f"without {fraction:.0%} of the units" in repr(found)
    assert f"± {np.std(expected, ddof=1):.2g}; 7 sets)" in repr(found)


def test_units_are_removed_in_evaluation_without_a_graph():
    model = classifier(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, CLASSES)).train()
    graphs = []
    model[3].register_forward_hook(lambda layer, args, output: graphs.append(output.requires_grad))
    with seeded("test.dropout_tools.removed statistics"):
        nn.init.normal_(model[1].running_mean, std=2)
    x, y = examples(200, 4)
    found = [remove_units(model, x, y, layers=["0"], generator=draws("in evaluation")) for _ in range(2)]
    np.testing.assert_array_equal(found[0].accuracies, found[1].accuracies)
    assert not any(graphs)
    assert model.training
    with torch.no_grad():
        whole = (model.eval()(x).argmax(1) == y).double().mean().item()
    assert found[0].whole == pytest.approx(whole)


def test_layers_of_one_width_lose_units_of_their_own():
    gone = {0: [], 2: []}
    layers = nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, CLASSES)
    model = classifier(*layers, stream="two layers")
    for k, sets in gone.items():
        model[k + 1].register_forward_pre_hook(
            lambda layer, args, sets=sets: sets.append((args[0] == 0).all(0).tolist())
        )
    x, y = examples(5, 4)
    remove_units(model, x, y, layers=["0", "2"], repeats=5, generator=draws("two layers"))
    assert all(sum(removed) == 6 for sets in gone.values() for removed in sets[1:])
    assert gone[0][1:] != gone[2][1:]


AXES = [  # of units, in the outputs of a layer with 2, 3 and 4 dimensions; None: refused
    *[(kind, (1, 2, 3)) for kind in (nn.Linear(4, 4), nn.Bilinear(4, 4, 4), nn.Embedding(4, 4))],
    *[(kind, (1, 2, 3)) for kind in (nn.LayerNorm(4), nn.RMSNorm(4))],
    *[(kind, (1, 1, 1)) for kind in (nn.Conv1d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv3d(4, 4, 1))],
    *[(kind(4, 4, 1), (1, 1, 1)) for kind in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)],
    *[(kind(4), (1, 1, 1)) for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)],
    *[(kind(4), (1, 1, 1)) for kind in (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)],
    (nn.GroupNorm(2, 4), (1, 1, 1)),
    *[(kind(), (1, 1, 1)) for kind in (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)],
    *[(kind(), (1, None, None)) for kind in (nn.ReLU, nn.Dropout)],
]


@pytest.mark.parametrize(("layer", "axes"), AXES, ids=lambda value: type(value).__name__)
def test_the_axis_of_units_is_that_of_the_layer(layer, axes):
    for ndim, axis in zip((2, 3, 4), axes, strict=True):
        output = torch.zeros((4,) * ndim)
        if axis is None:
            assert_refuses(lambda output=output: _unit_axis("it", layer, output), "which axis is that of units", "'it'")
        else:
            assert _unit_axis("it", layer, output) == axis
    assert_refuses(lambda: _unit_axis("it", layer, torch.zeros(4)), "with an axis of units", "Tensor of 'it'")


def test_a_share_that_is_a_whole_number_of_units_is_removed_exactly():
    removed = []
    model = nn.Sequential(nn.Linear(4, 100), nn.Identity(), nn.Linear(100, CLASSES)).double()
    model[1].register_forward_hook(lambda layer, args, output: removed.append(int((output == 0).all(0).sum())))
    x, y = examples(5, 4)
    remove_units(model, x, y, layers=["0"], fraction=0.29, repeats=2, generator=draws("whole number"))
    assert removed == [0, 29, 29]


def test_half_the_units_twenty_sets_and_rescaling_are_the_defaults():
    model, x, y = trained_classifier()
    found = remove_units(model, x, y, layers=["1"], generator=draws("defaults"))
    written = remove_units(
        model, x, y, layers=["1"], fraction=0.5, repeats=20, rescale=True, generator=draws("defaults")
    )
    assert len(found.accuracies) == 20
    np.testing.assert_array_equal(found.accuracies, written.accuracies)
    other = remove_units(model, x, y, layers=["1"], rescale=False, generator=draws("defaults"))
    assert not np.array_equal(found.accuracies, other.accuracies)


def test_a_loader_loses_the_same_units_in_each_batch():
    model, x, y = trained_classifier()
    loader = DataLoader(TensorDataset(x, y), batch_size=150)
    found = remove_units(model, loader, layers=["0", "1"], generator=draws("batches"))
    at_once = remove_units(model, x, y, layers=["0", "1"], generator=draws("batches"))
    np.testing.assert_allclose(found.accuracies, at_once.accuracies)


def test_of_a_convolution_whole_channels_are_removed():
    seen = []
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Flatten(), nn.Linear(24, CLASSES)).double()
    x, y = examples(5, 2, 4, 4)
    handle = model[1].register_forward_hook(lambda layer, args, output: seen.append(output.unflatten(1, (6, 4))))
    remove_units(model, x, y, layers=["0"], repeats=3, generator=draws("channels"))
    handle.remove()
    for output in seen[1:]:
        gone = (output == 0).all(2)
        assert gone.sum(1).tolist() == [3] * 5
        assert (gone == gone[0]).all()


def test_units_of_sequences_stand_last():
    seen = []
    model, (tokens, labels) = language_model(), padded()
    model[1].register_forward_hook(lambda layer, args, output: seen.append(output))
    found = remove_units(model, tokens, labels, layers=["0"], repeats=2, generator=draws("sequences"))
    assert ((seen[1] == 0).all((0, 1))).sum() == 3
    counted = labels != -100
    whole = (model.eval()(tokens).argmax(-1) == labels)[counted].double().mean().item()
    assert found.whole == pytest.approx(whole)


@pytest.mark.parametrize(
    ("change", "rule", "value"),
    [
        ({"fraction": 1.0}, "fraction must lie in [0, 1)", 1.0),
        ({"fraction": -0.1}, "fraction must lie in [0, 1)", -0.1),
        ({"repeats": 1}, "repeats must be at least 2", 1),
        ({"layers": ["9"]}, "names of model.named_modules()", "'9'"),
        ({"layers": []}, "at least one layer", "none"),
        ({"layers": "1"}, "a list of different names", "'1'"),
        ({"layers": ["1", "0", "1"]}, "a list of different names", "['1', '0', '1']"),
        ({"fraction": 0.1}, "must take a unit of each layer", "0.1 of 8 of '1'"),
        ({"targets": torch.zeros(5)}, "int64 labels", "torch.float32"),
    ],
)
def test_removals_that_make_no_sense_are_refused(change, rule, value):
    x, y = examples(5, 4)
    arguments = {"model": small(), "inputs": x, "targets": y, "layers": ["1"]} | change
    before = fingerprint(arguments["model"])
    assert_refuses(lambda: remove_units(**arguments, generator=draws("senseless")), rule, value)
    assert not changes(before, fingerprint(arguments["model"]))


def test_a_layer_without_an_axis_of_units_is_refused():
    x, y = examples(5, 5, 4)
    attention = Attention().double()
    for name, rule in (("attention", "one tensor with an axis of units"), ("attention.out_proj", "must be called")):
        assert_refuses(
            lambda name=name: remove_units(attention, x, y, layers=[name], generator=draws("axis")),
            rule,
            "tuple" if name == "attention" else f"{name!r}, which is not",
        )
    tokens, labels = padded()
    assert_refuses(
        lambda: remove_units(language_model(), tokens, labels, layers=["1"], generator=draws("three")),
        "which axis is that of units",
        "'1', which returns shape (30, 5, 6)",
    )


def test_labels_that_are_all_left_out_are_refused():
    x, _ = examples(5, 4)
    assert_refuses(
        lambda: remove_units(small(), x, torch.full((5,), -100), layers=["1"], generator=draws("left out")),
        "targets must hold a label",
        "only -100",
    )


# Devices


def dropping(at):
    where = {"device": at.device, "dtype": torch.float64}
    return nn.Sequential(nn.Linear(3, 8, **where), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2, **where))


DEVICE_CASES_BY_VALUES = [
    (
        masked_outputs,
        lambda at: {"model": dropping(at), "inputs": at.normal(6, 3), "masks": 4, "generator": at.generator},
    ),
    (
        masked_losses,
        lambda at: {
            "model": dropping(at),
            "loss": F.cross_entropy,
            "inputs": at.normal(30, 3),
            "targets": at.integers(2, 30),
            "masks": 10,
            "generator": at.generator,
        },
    ),
    (
        remove_units,
        lambda at: {
            "model": dropping(at),
            "inputs": at.normal(6, 3),
            "targets": at.integers(2, 6),
            "layers": ["1"],
            "repeats": 3,
            "generator": at.generator,
        },
    ),
]
