"""Attention received: every source against the gradient of attention, and its invariances."""

import pytest
import torch

from featherweight import depth
from featherweight.depth import received
from featherweight.depth.received import auto, eager, some_queries, striped
from tests.oracles import depth as oracle

EXACT = sorted(depth.SOURCES)


def call(tokens=37, batch=2, heads=3, size=8, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(batch, heads, tokens, size, generator=generator) for _ in range(3)]
    return depth.Attention(*parts, scale=size**-0.5, **options)


@pytest.mark.parametrize("source", EXACT)
@pytest.mark.parametrize("tokens", [1, 37, 300])
def test_sources_agree_with_the_gradient(source, tokens):
    own = call(tokens)
    output, means, _ = depth.SOURCES[source].method(own)
    expected = oracle.received(own.query, own.key, own.scale)
    assert torch.allclose(means.mean(1), expected, atol=2e-7)
    assert torch.allclose(output, own.fused(), atol=2e-6)
    assert torch.allclose(means.sum(-1), torch.ones(2, 3), atol=1e-5)
    assert (means >= 0).all()


@pytest.mark.parametrize("source", EXACT)
def test_padding_is_neither_query_nor_key(source):
    own = call(20, batch=1)
    valid = torch.ones(1, 20, dtype=torch.bool)
    valid[0, 14:] = False
    padded = depth.Attention(
        own.query, own.key, own.value, valid[:, None, None], own.scale, valid=valid
    )
    short = depth.Attention(
        own.query[:, :, :14], own.key[:, :, :14], own.value[:, :, :14], scale=own.scale
    )
    output, means, _ = depth.SOURCES[source].method(padded)
    expected_output, expected, _ = eager(short)
    assert torch.allclose(means[..., :14], expected, atol=1e-6)
    assert (means[..., 14:] == 0).all()
    assert torch.allclose(output[:, :, :14], expected_output, atol=1e-6)


@pytest.mark.parametrize("source", EXACT)
def test_a_float_mask_says_the_same_as_a_bool_one(source):
    own = call(20)
    allowed = torch.rand(2, 1, 20, 20, generator=torch.Generator().manual_seed(1)) > 0.3
    allowed |= torch.eye(20, dtype=torch.bool)
    bias = torch.zeros(2, 1, 20, 20).masked_fill(~allowed, torch.finfo(torch.float32).min)
    both = [
        depth.SOURCES[source].method(
            depth.Attention(own.query, own.key, own.value, mask, own.scale)
        )
        for mask in (allowed, bias)
    ]
    assert torch.allclose(both[0][1], both[1][1], atol=1e-7)
    assert torch.allclose(both[0][0], both[1][0], atol=1e-6)


@pytest.mark.parametrize("source", EXACT)
def test_sample_by_sample_is_the_same(source, monkeypatch):
    own = call(40)
    allowed = torch.rand(2, 1, 40, 40, generator=torch.Generator().manual_seed(1)) > 0.3
    allowed |= torch.eye(40, dtype=torch.bool)
    valid = torch.arange(40) < torch.tensor([[40], [33]])
    masked = depth.Attention(own.query, own.key, own.value, allowed, own.scale, valid=valid)
    for whole in (own, masked):
        with torch.no_grad():
            expected, means, _ = eager(whole)
            monkeypatch.setattr(received, "CACHED", 0)
            assert len(whole.samples()) == 2
            output, found, _ = depth.SOURCES[source].method(whole)
        monkeypatch.undo()
        assert torch.allclose(output, expected, atol=1e-6)
        assert torch.allclose(found, means, atol=1e-7)


def test_striped_attention_passes_gradients():
    grads = []
    for source in (eager, striped):
        own = call(300)
        parts = [part.requires_grad_() for part in (own.query, own.key, own.value)]
        output, _, _ = source(own)
        grads.append(torch.autograd.grad(output.square().sum(), parts))
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_uniform_attention_scores_all_alike():
    own = call(16)
    flat = depth.Attention(torch.zeros_like(own.query), own.key, own.value, scale=1.0)
    means = eager(flat)[1]
    assert torch.allclose(means, torch.full_like(means, 1 / 16))
    assert depth.choose_tokens(means.mean(1), 4).tolist() == [[0, 1, 2, 3]] * 2


def test_scores_ignore_a_constant_of_each_query():
    own = call(12)
    shifts = torch.randn(2, 1, 12, 1).expand(2, 1, 12, 12)
    shifted = depth.Attention(own.query, own.key, own.value, shifts, own.scale)
    assert torch.allclose(eager(shifted)[1], eager(own)[1], atol=1e-6)


def test_a_planted_set_is_found():
    planted = [3, 7, 11]
    direction = torch.randn(8)
    key = torch.zeros(1, 2, 16, 8)
    key[:, :, planted] = direction
    query = direction.expand(1, 2, 16, 8)
    means = eager(depth.Attention(query, key, key, scale=1.0))[1]
    assert depth.choose_tokens(means.mean(1), 3).tolist() == [planted]


def test_rows_average_the_queries_asked_for():
    own = call(20)
    rows = torch.tensor([0, 5, 6])
    means = some_queries(depth.Attention(own.query, own.key, own.value, scale=own.scale, rows=rows))
    full = (own.query @ own.key.transpose(-1, -2) * own.scale).softmax(-1)
    assert torch.allclose(means[1], full[:, :, rows].mean(2), atol=1e-7)


def test_random_rows_are_unbiased():
    own = call(20)
    exact = eager(own)[1]
    draws = [
        some_queries(depth.Attention(own.query, own.key, own.value, scale=own.scale, rows=rows))[1]
        for rows in torch.arange(20).split(5)
    ]
    assert torch.allclose(torch.stack(draws).mean(0), exact, atol=1e-6)


def test_auto_keeps_no_map_in_training():
    own = call(300)
    query = own.query.requires_grad_()
    training = depth.Attention(query, own.key, own.value, scale=own.scale)
    _, means, attention = auto(training)
    assert attention is None
    assert not means.requires_grad
    with torch.no_grad():
        assert auto(call(10))[2] is not None
        assert auto(call(300))[2] is None


def test_dropout_leaves_the_scores_alone():
    own = call(30)
    dropped = depth.Attention(own.query, own.key, own.value, scale=own.scale, dropout=0.5)
    for source in (eager, striped):
        output, means, _ = source(dropped)
        assert torch.allclose(means, eager(own)[1], atol=1e-6)
        assert not torch.allclose(output, own.fused(), atol=1e-3)
