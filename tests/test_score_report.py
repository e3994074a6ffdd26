"""What attention did inside a model, against its weights and scores written out; reports on real and odd models."""

import math
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers.attention_scaling import (
    HeadReport,
    ScoreReport,
    initial_score_scale,
    initial_score_variance,
    score_decomposition,
    score_report,
)
from helpers.lab.attention import watch_attention
from helpers.lab.estimates import Estimate
from helpers.lab.runtime import device, generator, seeded
from tests.statistics import assert_share, assert_z
from tests.zoo import changes, fingerprint

WIDTH, HEADS, LENGTH, N = 8, 2, 11, 5


DEVICE_CASES_BY_VALUES = [
    (score_report, lambda at: {"model": on_device(at), "inputs": at.normal(N, LENGTH, WIDTH)}),
    (initial_score_scale, lambda at: {"model": on_device(at), "inputs": at.normal(N, LENGTH, WIDTH), "n_draws": 2}),
]


def on_device(at):
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True, dtype=torch.float64, device=at.device)


def normal(*shape, stream="test.score_report.inputs", dtype=torch.float64):
    source = generator(stream)
    return torch.randn(shape, generator=source, dtype=dtype, device=source.device)


class Attention(nn.Module):
    """Queries and keys by linear maps, and one of three ways to go on."""

    def __init__(self, form, *, causal=False):
        super().__init__()
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)
        self.form, self.causal = form, causal

    def heads(self, x):
        return (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key))

    def forward(self, x, padding=None):
        queries, keys = self.heads(x)
        if self.form == "direct":
            mask = None if padding is None else ~padding[:, None, None, :]
            return F.scaled_dot_product_attention(queries, keys, keys, attn_mask=mask, is_causal=self.causal)
        scores = queries @ keys.transpose(-1, -2) / math.sqrt(WIDTH / HEADS)
        if self.causal:
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, torch.finfo(x.dtype).min)
        if padding is not None:
            scores = scores.masked_fill(padding[:, None, None, :], -torch.inf)
        return self.dropout(self.weights(scores)) @ keys

    def weights(self, scores):
        if self.form == "method":
            return scores.softmax(-1)
        if self.form == "float":
            return F.softmax(scores, dim=3, dtype=torch.float32).to(scores.dtype)
        return torch.softmax(scores, dim=-1)


class Einsum(Attention):
    def forward(self, x, padding=None):
        queries, keys = self.heads(x)
        weights = (torch.einsum("bhid,bhjd->bhij", queries, keys) / math.sqrt(WIDTH / HEADS)).softmax(-1)
        return torch.einsum("bhij,bhjd->bhid", weights, keys)


class Multi(nn.Module):
    """torch's own layer, with the parameters of an `Attention`."""

    def __init__(self, like, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)
        with torch.no_grad():
            for part, layer in enumerate((like.query, like.key)):
                self.attention.in_proj_weight[part * WIDTH : (part + 1) * WIDTH] = layer.weight
                self.attention.in_proj_bias[part * WIDTH : (part + 1) * WIDTH] = layer.bias
        self.causal = like.causal

    def forward(self, x, padding=None):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype, device=x.device)
        return self.attention(
            x, x, x, key_padding_mask=padding, attn_mask=mask if self.causal else None, is_causal=self.causal
        )[0]


def models(causal=False):
    with seeded("test.score_report.model"):
        direct = Attention("direct", causal=causal)
    found = {"direct": direct, "multi-head": Multi(direct)}
    for form in ("function", "method", "float"):
        found[form] = Attention(form, causal=causal)
    if not causal:
        found["einsum"] = Einsum("function")
    for model in found.values():
        if not isinstance(model, Multi):
            model.load_state_dict(direct.state_dict())
    return {name: model.to(device(), torch.float64) for name, model in found.items()}


FORMS = ("direct", "multi-head", "function", "method", "float", "einsum")
PADDING = torch.arange(LENGTH) >= torch.tensor([11, 9, 10, 11, 8])[:, None]  # (N, LENGTH)


def truth(causal=False, padding=None, min_keys=8):
    """For each sequence and head, from scores written out: variance, participation and three parts, row by row."""
    x, model = normal(N, LENGTH, WIDTH), models(causal)["direct"]
    figures = []
    for n, one in enumerate(x):
        queries, keys = (part[0] for part in model.heads(one[None]))  # (heads, T, d)
        for head in range(HEADS):
            rows, kept_keys = [], None
            for i in range(LENGTH):
                seen = torch.ones(LENGTH, dtype=torch.bool, device=x.device)
                if causal:
                    seen[i + 1 :] = False
                if padding is not None:
                    seen &= ~padding[n].to(x.device)
                    if padding[n, i]:
                        continue
                if seen.sum() < min_keys:
                    continue
                scores = (keys[head][seen] @ queries[head, i]).detach() / math.sqrt(WIDTH / HEADS)
                rows.append((i, scores.var(correction=0), scores.softmax(0).square().sum(), 1 / len(scores)))
                kept_keys = seen
            where = [row[0] for row in rows]
            parts = score_decomposition(queries[head][where], keys[head][kept_keys])
            parts = torch.stack(parts[1:]) / (WIDTH / HEADS)
            mean = torch.tensor([[float(v) for v in row[1:]] for row in rows], dtype=torch.float64).mean(0)
            figures.append((*mean.tolist(), *parts.tolist()))
    return np.array(figures).reshape(N, HEADS, 6)


def assert_reports(report, wanted, *, shares=True, rtol=1e-9):
    assert [head.head for head in report.heads] == list(range(HEADS))
    for head in report.heads:
        variance, participation, uniform, *parts = wanted[:, head.head].mean(0)
        assert head.spread.value == pytest.approx(math.sqrt(variance), rel=rtol)
        assert head.participation.value == pytest.approx(participation, rel=rtol)
        assert head.uniform == pytest.approx(uniform)
        each = wanted[:, head.head, 1]
        assert head.participation.stderr == pytest.approx(each.std(ddof=1) / math.sqrt(N), rel=max(rtol, 1e-6))
        of_variance = wanted[:, head.head, 0].std(ddof=1) / math.sqrt(N)
        assert head.spread.stderr == pytest.approx(of_variance / (2 * math.sqrt(variance)), rel=max(rtol, 1e-6))
        if shares:
            assert head.shares == pytest.approx(np.array(parts) / sum(parts), rel=1e3 * rtol)
        else:
            assert all(math.isnan(share) for share in head.shares)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("max_scores", [1, 4 * N * HEADS * LENGTH, 2**22])
def test_every_form_of_attention_is_measured_alike(form, training, max_scores):
    model = models()[form].train(training)
    report = score_report(model, normal(N, LENGTH, WIDTH), max_scores=max_scores)
    assert_reports(report, truth())
    assert {head.n_keys for head in report.heads} == {LENGTH}
    assert report.heads[0].name == ("attention" if form == "multi-head" else "the model")


@pytest.mark.parametrize("form", FORMS[:-1])
def test_padding_counts_neither_as_key_nor_as_query(form):
    padding = PADDING.to(device())
    report = score_report(models()[form], (normal(N, LENGTH, WIDTH), padding))
    assert_reports(report, truth(padding=PADDING))
    assert report.heads[0].n_keys == pytest.approx(9.8)


@pytest.mark.parametrize("form", FORMS[:-1])
def test_causal_rows_are_measured_but_not_decomposed(form):
    report = score_report(models(causal=True)[form], normal(N, LENGTH, WIDTH))
    assert_reports(report, truth(causal=True), shares=False)
    assert report.heads[0].n_keys == pytest.approx(np.mean([8, 9, 10, 11]))


@pytest.mark.parametrize("form", FORMS[:-1])
def test_causal_and_padded(form):
    report = score_report(models(causal=True)[form], (normal(N, LENGTH, WIDTH), PADDING.to(device())), min_keys=2)
    assert_reports(report, truth(causal=True, padding=PADDING, min_keys=2), shares=False)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_an_encoder_layer_is_seen_in_each_of_its_modes(grad, training):
    with seeded("test.score_report.encoder"):
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True).double().to(device()).train(training)
        encoder = nn.TransformerEncoder(layer, 2).train(training)
    own = layer.self_attn
    x = normal(N, LENGTH, WIDTH)
    _, weights = own(x, x, x, average_attn_weights=False)  # (N, heads, T, T)
    with torch.set_grad_enabled(grad):
        report = score_report(layer, x)
        names = [head.name for head in score_report(encoder, x).heads]
    wanted = (weights if not training else own.eval()(x, x, x, average_attn_weights=False)[1]).square().sum(-1)
    for head in report.heads:
        assert head.participation.value == pytest.approx(wanted[:, head.head].mean().item())
    assert names == ["layers.0.self_attn"] * HEADS + ["layers.1.self_attn"] * HEADS


def weights_of(call):
    return torch.cat([scores for _, scores in call.blocks(40)], dim=2).softmax(-1)


@pytest.mark.parametrize(
    "options",
    [
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"kdim": 5, "vdim": 3},
        {"bias": False},
        {"add_bias_kv": True, "add_zero_attn": True, "kdim": 5, "vdim": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("mask", ["none", "boolean", "of each head"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_each_option_of_multi_head_attention_is_seen_as_its_weights(options, mask, batch_first):
    with seeded("test.score_report.options"):
        layer = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, dtype=torch.float64, **options)
        layer = layer.to(device())
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
    query = normal(N, LENGTH, WIDTH)
    key = normal(N, 7, options.get("kdim", WIDTH), stream="test.score_report.keys")
    value = normal(N, 7, options.get("vdim", WIDTH), stream="test.score_report.values")
    given = (query, key, value) if batch_first else tuple(x.transpose(0, 1) for x in (query, key, value))
    hidden = torch.arange(7, device=key.device) >= torch.tensor([7, 5, 6, 7, 3], device=key.device)[:, None]
    masks = {
        "none": {},
        "boolean": {"attn_mask": torch.eye(LENGTH, 7, device=key.device).bool(), "key_padding_mask": hidden},
        "of each head": {"attn_mask": normal(N * HEADS, LENGTH, 7, stream="test.score_report.mask")},
    }[mask]
    calls = []
    with watch_attention(layer, calls.append):
        _, wanted = layer(*given, average_attn_weights=False, **masks)
    (call,) = calls
    torch.testing.assert_close(weights_of(call), wanted)


def test_one_sequence_without_a_batch_is_seen():
    with seeded("test.score_report.unbatched"):
        layer = nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64).to(device())
    x = normal(LENGTH, WIDTH)
    hidden = torch.arange(LENGTH, device=x.device) > 8
    calls = []
    with watch_attention(layer, calls.append):
        _, wanted = layer(x, x, x, key_padding_mask=hidden, average_attn_weights=False)
    torch.testing.assert_close(weights_of(calls[0])[0], wanted)


@pytest.mark.parametrize("causal", [True, False])
def test_direct_calls_have_their_scale_their_groups_and_their_mask(causal):
    query, key = normal(2, 4, 6, 3), normal(2, 2, 9, 3, stream="test.score_report.keys")
    value = torch.eye(9, dtype=query.dtype, device=query.device).expand(2, 2, 9, 9)  # so that weights come out
    mask = None if causal else normal(2, 1, 6, 9, stream="test.score_report.mask")
    calls = []
    with watch_attention(nn.Identity(), calls.append):
        wanted = F.scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale=0.3, enable_gqa=True)
    assert calls[0].factor == 0.3
    torch.testing.assert_close(weights_of(calls[0]), wanted)


@pytest.mark.parametrize("shape", [(6, 3), (2, 6, 3), (2, 4, 5, 6, 3)])
def test_missing_dimensions_are_single_and_more_are_heads(shape):
    x = normal(*shape)
    value = torch.eye(6, dtype=x.dtype, device=x.device).expand(*shape[:-1], 6)
    calls = []
    with watch_attention(nn.Identity(), calls.append):
        wanted = F.scaled_dot_product_attention(x, x, value)
    found = weights_of(calls[0])
    assert found.ndim == 4
    torch.testing.assert_close(found.reshape(wanted.shape), wanted)


def test_windows_of_a_sequence_are_averaged():
    class Windows(nn.Module):
        def forward(self, x):
            parts = x.unflatten(1, (2, LENGTH)).flatten(0, 1)[:, None]  # (2N, 1, T, d)
            return F.scaled_dot_product_attention(parts, parts, parts)

    x = normal(N, 2 * LENGTH, WIDTH)
    (head,) = score_report(Windows(), x).heads
    weights = (x.unflatten(1, (2, LENGTH)) @ x.unflatten(1, (2, LENGTH)).mT / math.sqrt(WIDTH)).softmax(-1)
    each = weights.square().sum(-1).mean((1, 2))
    assert head.participation.value == pytest.approx(each.mean().item())
    assert head.participation.n == N


def test_a_softmax_that_is_no_attention_is_left_alone():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = models()["function"], nn.Linear(4, 3, dtype=torch.float64, device=device())

        def forward(self, x):
            return self.head(self.attention(x)).softmax(-1)

    assert len(score_report(Classifier(), normal(N, LENGTH, WIDTH)).heads) == HEADS


def test_batches_of_a_loader_are_joined():
    x = normal(N, LENGTH, WIDTH)
    whole = score_report(models()["direct"], x)
    data = torch.utils.data.TensorDataset(x, torch.zeros(N))
    joined = score_report(models()["direct"], torch.utils.data.DataLoader(data, batch_size=2))
    for one, other in zip(whole.heads, joined.heads, strict=True):
        assert one.spread.value == pytest.approx(other.spread.value)
        assert one.participation.stderr == pytest.approx(other.participation.stderr)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["direct", "multi-head", "function"])
def test_single_and_half_precision(form, dtype):
    model = models()[form].to(dtype)
    found = score_report(model, normal(N, LENGTH, WIDTH).to(dtype))
    rtol = 3e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    wanted = truth()
    for head in found.heads:
        variance, participation = wanted[:, head.head, :2].mean(0)
        assert head.spread.value == pytest.approx(math.sqrt(variance), rel=rtol)
        assert head.participation.value == pytest.approx(participation, rel=rtol)


def test_no_block_of_scores_is_larger_than_allowed(monkeypatch):
    sizes = []
    shape = (2, 3, 40, 40)
    query = normal(*shape[:3], 4)
    calls = []
    with watch_attention(nn.Identity(), calls.append):
        F.scaled_dot_product_attention(query, query, query)
    for bound in (1, 240, 500, 10**6):
        sizes = [scores.numel() for _, scores in calls[0].blocks(bound)]
        assert max(sizes) <= max(bound, 240)
        assert sum(sizes) == math.prod(shape)


# Errors are over sequences


def test_intervals_cover_over_sequences_whose_tokens_are_alike():
    """A sequence has a scale of its own, skewed: its tokens are no independent witnesses."""
    source = generator("test.score_report.coverage")

    class Products(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], scale=1.0)

    def sequences(n):
        scale = torch.rand((n, 1, 1), generator=source, dtype=torch.float64, device=source.device) ** 2
        return scale * torch.randn((n, 9, 3), generator=source, dtype=torch.float64, device=source.device)

    (exact,) = score_report(Products(), sequences(60_000)).heads
    hits = {"participation": [], "spread": []}
    for _ in range(400):
        (head,) = score_report(Products(), sequences(24)).heads
        for name, found in hits.items():
            estimate, wanted = getattr(head, name), getattr(exact, name)
            found.append(abs(estimate.value - wanted.value) <= 2 * estimate.stderr)
    assert_share(hits["participation"], (0.90, 1.0))
    assert_share(hits["spread"], (0.85, 1.0))


# The start of training


class Normed(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), attention

    def forward(self, x):
        x = self.norm(x)
        return self.attention(x, x, x)[0] if isinstance(self.attention, nn.MultiheadAttention) else self.attention(x)


class OfTwo(nn.Module):
    """Queries of one width and keys of another, layer-normed."""

    def __init__(self, width, key_width):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, kdim=key_width, vdim=key_width, batch_first=True)

    def forward(self, x, y):
        return self.attention(F.layer_norm(x, x.shape[-1:]), F.layer_norm(y, y.shape[-1:]), y)[0]


@pytest.mark.parametrize(
    ("build", "sizes", "expected"),
    [
        (lambda: Normed(nn.MultiheadAttention(8, 2, batch_first=True)), (8,), 1 / 4),
        (lambda: OfTwo(8, 24), (8, 24), 2 * 24 / (8 + 24)),
        (lambda: Normed(Attention("direct")), (8,), (1 + 1 / 8) ** 2 / 9),
        (lambda: Normed(Attention("function")), (8,), (1 + 1 / 8) ** 2 / 9),
    ],
    ids=["multi-head", "two widths", "linear", "by hand"],
)
def test_default_initial_scores(build, sizes, expected):
    inputs = tuple(normal(3, 9, size, stream=f"test.score_report.width {size}") for size in sizes)
    with seeded("test.score_report.initial"):
        model = build().double().to(device())
        (call,) = initial_score_scale(model, inputs, n_draws=400).calls
    assert_z((call.measured.value - expected) / call.measured.stderr)
    assert call.measured.stderr < 0.06 * expected
    by_hand = isinstance(getattr(model, "attention", None), Attention) and model.attention.form == "function"
    assert math.isnan(call.predicted) == by_hand
    if not by_hand:
        assert call.predicted == pytest.approx(expected, rel=0.05)


def test_the_formula_has_the_default_values():
    d = 8
    assert initial_score_variance(1 / (2 * d), d, 1 / (2 * d), d) == pytest.approx(1 / 4)
    third = 1 / (3 * d)
    assert initial_score_variance(third, d, third, d, third, third) == pytest.approx((1 + 1 / d) ** 2 / 9)


def test_predictions_are_made_of_the_weights_that_were_used():
    class Halved(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight / 2, None)

    model = Normed(Attention("direct")).double().to(device())
    model.attention.query = Halved(WIDTH, WIDTH, dtype=torch.float64, device=device())
    with seeded("test.score_report.halved"):
        (call,) = initial_score_scale(model, normal(3, 9, WIDTH), n_draws=200).calls
    assert call.predicted == pytest.approx((1 / 12) * (1 + 1 / 8) / 3, rel=0.08)
    assert_z((call.measured.value - call.predicted) / call.measured.stderr)


def test_tied_or_rotated_queries_have_no_prediction():
    class Tied(Attention):
        def forward(self, x):
            queries, _ = self.heads(x)
            return F.scaled_dot_product_attention(queries, queries, queries)

    class Rotated(Attention):
        def forward(self, x):
            queries, keys = self.heads(x)
            return F.scaled_dot_product_attention(queries.flip(-1), keys, keys)

    for kind in (Tied, Rotated):
        model = kind("direct").double().to(device())
        (call,) = initial_score_scale(model, normal(3, 9, WIDTH), n_draws=3).calls
        assert math.isnan(call.predicted)
        assert call.measured.value > 0


def test_ones_own_initialization_is_used():
    def small(model):
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)

    with seeded("test.score_report.own"):
        model = Attention("direct").double().to(device())
        x = F.layer_norm(normal(3, 9, WIDTH), (WIDTH,))
        (call,) = initial_score_scale(model, x, n_draws=300, initialize=small).calls
    assert_z((call.measured.value - 0.09**2) / call.measured.stderr)


def test_thirty_draws_unless_told():
    (call,) = initial_score_scale(models()["direct"], normal(3, 9, WIDTH)).calls
    assert call.measured.n == 30


# No trace


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tool", [score_report, initial_score_scale])
def test_the_model_is_left_as_it_was(tool, form):
    model = models()[form].train()
    before = fingerprint(model)
    tool(model, normal(N, LENGTH, WIDTH))
    assert changes(before, fingerprint(model)) == []
    with pytest.raises(ValueError, match="finite"):
        tool(model, torch.full((N, LENGTH, WIDTH), torch.nan, dtype=torch.float64, device=device()))
    assert changes(before, fingerprint(model)) == []


# How it is shown


def head(name="a", number=0, spread=1.0, participation=0.2, shares=(0.5, 0.3, 0.2)):
    return HeadReport(
        name, number, 9.0, Estimate(spread, 0.1, 5, 0.0), Estimate(participation, 0.01, 5, 0.0), 1 / 9, shares
    )


def test_a_report_shows_a_row_for_each_call_and_names_frozen_heads():
    heads = (head(), head(number=1, spread=9.0, participation=0.95), head(number=2, spread=2.0), head("b"))
    report = ScoreReport(heads, limit=0.9)
    assert [len(call) for call in report.calls] == [3, 1]
    assert [row[:4] for row in report.table.rows] == [
        ["a", "9", "2.00 ± 0.10", "9.00 ± 0.10"],
        ["b", "9", "1.00 ± 0.10", "1.00 ± 0.10"],
    ]
    assert report.table.rows[0][4:] == ["0.50", "0.30", "0.20", "0.200 ± 0.010", "0.11"]
    assert report.verdict == "participation is above 0.9 in a head 1"
    assert repr(report).endswith(report.verdict)
    assert "participation is above" in report._repr_html_()
    assert ScoreReport((head(participation=0.9),), 0.9).verdict == "no head has a participation above 0.9"
    many = ScoreReport(tuple(head(number=k, participation=0.99) for k in range(6)), 0.9)
    assert many.verdict.endswith("a head 3 and 2 more")
    unknown = ScoreReport((head(shares=(math.nan,) * 3),), 0.9)
    assert unknown.table.rows[0][4:7] == ["", "", ""]


def test_the_limit_is_nine_tenths_unless_told():
    assert score_report(models()["direct"], normal(N, LENGTH, WIDTH)).limit == 0.9


# Refusals


def without_reset():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.offset = nn.Parameter(torch.zeros(WIDTH, dtype=torch.float64, device=device()))

        def forward(self, x):
            return x + self.offset

    return nn.Sequential(Positions(), models()["direct"])


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (lambda x: score_report(nn.Linear(WIDTH, 2).double().to(device()), x), "must call attention in a form"),
        (lambda x: initial_score_scale(nn.Linear(WIDTH, 2).double().to(device()), x), "must call attention in a form"),
        (lambda x: score_report(models()["direct"], x[:1]), "inputs must hold at least two sequences, got 1"),
        (lambda x: score_report(models()["direct"], x[:, :7]), "a query that sees at least 8 keys, got fewer at"),
        (lambda x: score_report(models()["direct"], x, limit=1.1), "limit must lie in [0, 1], got 1.1"),
        (lambda x: score_report(models()["direct"], x, min_keys=0), "min_keys must be at least 1, got 0"),
        (lambda x: score_report(models()["direct"], x, max_scores=0), "max_scores must be at least 1, got 0"),
        (lambda x: initial_score_scale(models()["direct"], x, n_draws=1), "n_draws must be at least 2, got 1"),
        (lambda x: initial_score_scale(without_reset(), x), "got 0 of type Positions without: pass your own"),
        (lambda x: score_report(Folded(), x), "must be a multiple of the 5 sequences, got (1, 1, 55, 55)"),
        (lambda x: score_report(Changing(), iter([x, x])), "each batch must go through the same calls of attention"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, rule):
    with pytest.raises(ValueError, match=re.escape(rule)):
        call(normal(N, LENGTH, WIDTH))


class Folded(nn.Module):
    """Forgets where one sequence ends."""

    def forward(self, x):
        x = x.flatten(0, 1)[None]
        return F.scaled_dot_product_attention(x, x, x)


class Changing(nn.Module):
    def __init__(self):
        super().__init__()
        self.n = 0

    def forward(self, x):
        self.n += 1
        for _ in range(self.n):
            x = F.scaled_dot_product_attention(x, x, x)
        return x


def test_eight_keys_are_enough():
    assert score_report(models()["direct"], normal(N, 8, WIDTH)).heads[0].n_keys == 8
