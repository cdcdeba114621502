"""Token merging against lists, and in every family."""

import pytest
import torch

from featherweight import depth
from tests.depth.factories import FAMILIES, PREFIX, images, logits, own
from tests.oracles import depth as oracle


@pytest.mark.parametrize("prefix", [0, 1, 2, 3])
@pytest.mark.parametrize("count", [1, 3, 6])
def test_merging_is_that_of_lists(prefix, count):
    generator = torch.Generator().manual_seed(prefix)
    x = torch.randn(2, 15, 4, generator=generator)
    keys = torch.randn(2, 15, 3, generator=generator)
    size = torch.rand(2, 15, generator=generator) + 0.5
    tokens, sizes = depth.merge(x, size, keys, count, prefix)
    for b in range(2):
        expected, expected_size = oracle.merge(x[b], size[b], keys[b], count, prefix)
        assert torch.allclose(tokens[b], expected, atol=1e-5)
        assert torch.allclose(sizes[b], expected_size, atol=1e-5)


def test_merging_conserves_the_weighted_sum_and_the_prefix():
    x, size = torch.randn(2, 12, 4), torch.rand(2, 12) + 0.5
    tokens, sizes = depth.merge(x, size, torch.randn(2, 12, 4), 4, prefix=2)
    assert torch.allclose(
        (tokens * sizes[..., None]).sum(1), (x * size[..., None]).sum(1), atol=1e-5
    )
    assert torch.allclose(sizes.sum(1), size.sum(1))
    assert torch.allclose(tokens[:, :2], x[:, :2], atol=1e-6)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_merging_none_is_dense_and_merging_shortens(family):
    model, x = FAMILIES[family](), images()
    names, expected = list(model.state_dict()), logits(model(x))
    depth.tome(model, 0)
    assert torch.allclose(logits(model(x)), expected, atol=1e-5)
    depth.to_dense(model)
    depth.tome(model, 3)
    lengths = []
    blocks = depth.find_stack(model).blocks
    for block in blocks:
        block.register_forward_hook(
            lambda _m, _i, out: lengths.append((out[0] if isinstance(out, tuple) else out).shape[1])
        )
    assert not torch.allclose(logits(model(x)), expected, atol=1e-3)
    tokens = 16 + PREFIX[family]
    assert lengths == [tokens - 3, tokens - 6, tokens - 9, tokens - 12]
    assert list(model.state_dict()) == names
    depth.to_dense(model)
    assert torch.equal(logits(model(x)), expected)


def test_equal_tokens_merge_without_loss():
    """With proportional attention a token that stands for two is two equal tokens."""
    x = images(1).repeat_interleave(1, 0)
    model = own(layers=2)
    model.positions.data[:, 1:] = model.positions.data[:, 1:2]  # all patches at one place
    patches = x.unfold(2, 4, 4).unfold(3, 4, 4)
    x = patches[:, :, :1, :1].expand_as(patches).permute(0, 1, 2, 4, 3, 5).reshape(x.shape)
    expected = model(x)
    depth.tome(model, 5)
    assert torch.allclose(model(x), expected, atol=1e-5)
    depth.to_dense(model)
    depth.tome(model, 5, proportional=False)
    assert not torch.allclose(model(x), expected, atol=1e-4)


@pytest.mark.parametrize("merged", [-1, 1.5, True, "4"])
def test_bad_counts(merged):
    with pytest.raises(ValueError, match="merged must be a whole number"):
        depth.tome(own(), merged)


def test_at_most_half_of_the_patches_merge():
    model = depth.tome(own(), 100)
    assert depth.settings_of(model).counts(17, 4, 1) == [17, 9, 5, 3, 2]
    assert model(images()).isfinite().all()
    with pytest.raises(ValueError, match="merges tokens"):
        depth.visited(model, images())
