"""Leave-one-out importance by explicit deletion, correlations by scipy, scores, pictures."""

import copy

import pytest
import torch
from torch.nn import functional as F

from featherweight import depth
from tests.depth.factories import FAMILIES, PREFIX, hugging_vit, images, logits, own
from tests.oracles import depth as oracle


def test_importance_is_that_of_deleting_rows():
    model, x, labels = own(), images(2), torch.tensor([1, 4])

    def loss(output):
        return F.cross_entropy(output, labels, reduction="none")

    found = depth.token_importance(model, x, loss)
    assert found.shape == (2, 16)
    tokens = model.patches(x).flatten(2).transpose(1, 2)
    tokens = torch.cat([model.token.expand(2, -1, -1), tokens], 1) + model.positions
    before = loss(model(x))
    for patch in range(16):
        rest = torch.cat([tokens[:, : patch + 1], tokens[:, patch + 2 :]], 1)
        after = loss(model.classifier(model.norm(model.blocks(rest))[:, 0]))
        assert torch.allclose(found[:, patch], after - before, atol=1e-5)
    assert not model.blocks[0]._forward_pre_hooks


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_importance_and_scores_in_every_family(family):
    model, x = FAMILIES[family](), images(2)
    before = logits(model(x))
    importance = depth.token_importance(model, x, lambda out: logits(out).logsumexp(-1))
    scores = depth.attention_scores(model, x)
    tokens = 16 + PREFIX[family]
    assert importance.shape == (2, 16)
    assert scores.shape == (4, 2, tokens)
    assert torch.allclose(scores.sum(-1), torch.ones(4, 2), atol=1e-5)
    assert torch.equal(logits(model(x)), before)
    assert not depth.is_routed(model)


def test_scores_are_those_that_route():
    model, x = own(), images(2)
    scores = depth.attention_scores(model, x)
    masks = depth.visited(depth.a_mod(model, 0.5, layers=[1]), x)
    chosen = oracle.choose(scores[0], 9, 1)
    assert torch.equal(masks[1].nonzero()[:, 1].view(2, 9), chosen)
    tokens = model.patches(x).flatten(2).transpose(1, 2)
    tokens = torch.cat([model.token.expand(2, -1, -1), tokens], 1) + model.positions
    depth.to_dense(model)
    assert torch.allclose(oracle.vit_block(model.blocks[0], tokens[0])[1], scores[0, 0], atol=1e-6)


def test_routed_models_are_refused():
    model = depth.a_mod(own())
    for call in (
        lambda: depth.attention_scores(model, images()),
        lambda: depth.token_importance(model, images(), logits),
    ):
        with pytest.raises(ValueError, match="measured on the dense one"):
            call()


def test_a_failing_loss_leaves_no_hook():
    model = own()
    with pytest.raises(ZeroDivisionError):
        depth.token_importance(model, images(), lambda _: 1 / 0)
    assert not model.blocks[0]._forward_pre_hooks


@pytest.mark.parametrize("rank", [True, False])
def test_correlation_is_scipys(rank):
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 6, (5, 40), generator=generator).double()  # with ties
    b = 0.3 * a + torch.randn(5, 40, generator=generator)
    found = depth.correlation(a, b, rank=rank)
    test = stats.spearmanr if rank else stats.pearsonr
    each = [test(x, y).statistic for x, y in zip(a, b, strict=True)]
    assert found.each.tolist() == pytest.approx(each)
    assert found.mean == pytest.approx(sum(each) / 5)
    pooled = test(a.flatten(), b.flatten())
    assert found.pooled == pytest.approx(pooled.statistic)
    weak = depth.correlation(a, b.flip(0), rank=rank)
    expected = test(a.flatten(), b.flip(0).flatten()).pvalue
    assert weak.p_value == pytest.approx(expected, rel=0.05)


def test_correlation_of_equal_and_constant_measures():
    a = torch.rand(3, 10)
    same = depth.correlation(a, 2 * a + 1)
    assert same.mean == pytest.approx(1.0)
    assert same.p_value < 1e-12
    assert depth.correlation(a, torch.ones(3, 10)).pooled != same.pooled
    with pytest.raises(ValueError, match="N >= 4"):
        depth.correlation(a, a[:, :3])


def test_picture_darkens_what_was_skipped():
    model = depth.a_mod(hugging_vit(), 0.5)
    x = images(3)
    figure = depth.picture(model, x, limit=2)
    masks = depth.visited(model, x[:2])
    axes = figure.axes
    assert len(axes) == 2 * 3
    assert [a.get_title() for a in axes[:3]] == ["image", "layer 1", "layer 3"]
    shown, routed = (torch.tensor(axes[i].images[0].get_array().data) for i in (3, 5))
    light = masks[3, 1, 1:].view(4, 4).repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert torch.allclose(routed[light], shown[light])
    assert torch.allclose(routed[~light], 0.25 * shown[~light])


def test_picture_needs_a_grid_that_fits():
    model = depth.a_mod(own(), 0.5)
    with pytest.raises(ValueError, match="grid must hold 16 patches, got 3 x 4"):
        depth.picture(model, images(1), grid=(3, 4))
    with pytest.raises(ValueError, match="isn't routed"):
        depth.picture(copy.deepcopy(depth.to_dense(model)), images(1))
