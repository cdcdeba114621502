"""Closed-form counts against published figures, an operator counter, and the matched models."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from featherweight import depth
from featherweight.lab.models.vit import Vit
from tests.depth.factories import FAMILIES, PREFIX, hugging_vit, images, llama, own

TABLE = {  # width, layers, heads; thousand millions: dense, 50 % and 12.5 % by floor and ceil
    "tiny": (192, 12, 3, 1.254, (0.924, 0.927), (0.706, 0.709)),
    "small": (384, 12, 6, 4.599, (3.413, 3.425), (2.586, 2.597)),
    "base": (768, 12, 12, 17.564, (13.09, 13.14), (9.87, 9.91)),
    "large": (1024, 24, 16, 61.555, (45.89, 46.04), (34.49, 34.65)),
}
NEAREST = {"tiny": (9, 7), "small": (9, 7), "base": (9, 7), "large": (18, 13)}
PAPER = {"tiny": 6, "small": 6, "base": 6, "large": 13}  # at 12.5 %: fewer than the nearest


def meta_vit(width, layers, heads):
    with torch.device("meta"):
        return Vit(1000, (3, 224, 224), 16, width, layers, heads)


def routed_on_meta(size, capacity, rounding):
    width, layers, heads, *_ = TABLE[size]
    return depth.route(meta_vit(width, layers, heads), "first-tokens", capacity, rounding=rounding)


@pytest.mark.parametrize("size", sorted(TABLE))
def test_table(size):
    width, layers, heads, dense, half, eighth = TABLE[size]
    assert depth.flops(meta_vit(width, layers, heads), 197).total / 1e9 == pytest.approx(
        dense, abs=6e-4
    )
    for capacity, expected in ((0.5, half), (0.125, eighth)):
        for rounding, figure in zip(("floor", "ceil"), expected, strict=True):
            cost = depth.flops(routed_on_meta(size, capacity, rounding), 197)
            assert cost.total / 1e9 == pytest.approx(figure, abs=6e-3 if figure > 9 else 6e-4)
            assert cost.dense / 1e9 == pytest.approx(dense, abs=6e-4)


@pytest.mark.parametrize(
    ("capacity", "expected"), [(0.5, 3_424_763_904), (0.125, 2_596_835_328), (1.0, 4_598_882_304)]
)
def test_small_to_the_last_unit(capacity, expected):
    d, n = 384, 197
    k = depth.kept_tokens(n, capacity, 1)
    by_hand = sum(6 * (12 * m * d**2 + 2 * m**2 * d) for m in (n, k)) + 196 * 768 * d + d * 1000
    assert by_hand == expected
    assert depth.flops(routed_on_meta("small", capacity, "ceil"), n).total == expected


@pytest.mark.parametrize("size", sorted(TABLE))
def test_models_of_equal_cost(size):
    for capacity, layers in zip((0.5, 0.125), NEAREST[size], strict=True):
        model = routed_on_meta(size, capacity, "ceil")
        iso, total = depth.isoflop(model, 197), depth.flops(model, 197).total
        assert iso.layers == layers
        fewer = depth.flops(depth.fewer_layers(model, layers), 197).total
        assert iso.layers_ratio == fewer / total
        _, count, heads, *_ = TABLE[size]
        narrow = depth.flops(meta_vit(iso.width, count, heads), 197).total
        assert iso.width_ratio == pytest.approx(narrow / total)
        assert 0.93 < iso.width_ratio < 1.07
    published = depth.flops(depth.fewer_layers(model, PAPER[size]), 197).total / total
    assert 0.89 <= published <= 0.97


@pytest.mark.parametrize("family", ["own", "vit", "dinov2", "timm"])
def test_operators_counted(family, monkeypatch):
    """Attention as explicit products, so that torch's counter sees it."""

    def explicit(query, key, value, attn_mask=None, dropout_p=0.0, scale=None, **_):
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return (query @ key.transpose(-2, -1) * scale).softmax(-1) @ value

    monkeypatch.setattr(F, "scaled_dot_product_attention", explicit)
    tokens = 16 + PREFIX[family]
    for convert in (lambda m: m, depth.a_mod, lambda m: depth.tome(m, 3)):
        model = convert(FAMILIES[family]())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images(1))
        assert counter.get_total_flops() == 2 * depth.flops(model, tokens).total


def test_second_passes_and_routers_are_counted():
    plain = depth.flops(depth.a_mod(own(), 0.5), 17)
    assert plain.routing == 0
    again = depth.flops(depth.a_mod(own(), 0.5, score="second-pass"), 17)
    assert again.routing == 2 * 17**2 * 32
    assert again.total == plain.total + again.routing
    assert depth.flops(depth.a_mod(own(), queries=4), 17).routing == 2 * 4 * 17 * 32
    assert depth.flops(depth.route(own(), "cls-row"), 17).routing == 2 * 17 * 32
    learned = depth.flops(depth.mod(own(), 0.5), 17)
    assert learned.routing == 2 * 17 * 32
    assert learned.layers == plain.layers


def test_limits():
    ratios = [depth.flops(depth.a_mod(own(), c), 17).ratio for c in (0.01, 0.2, 0.5, 0.9, 1.0)]
    assert ratios == sorted(ratios)
    assert ratios[-1] == 1.0
    large = depth.route(meta_vit(384, 12, 6), "first-tokens", 1e-9)
    assert depth.flops(large, 197).ratio == pytest.approx(0.5, abs=0.02)


def test_causal_models_pay_the_head_for_each_token():
    model = llama()
    layer = sum(
        m.weight.numel() for m in model.model.layers[0].modules() if isinstance(m, nn.Linear)
    )
    expected = 4 * (10 * layer + 2 * 100 * 32) + 10 * 32 * 50
    assert depth.flops(model, 10).total == expected


@pytest.mark.parametrize(("spread", "kept"), [(False, [0, 1]), (True, [0, 3])])
@pytest.mark.parametrize("make", [own, hugging_vit, llama])
def test_fewer_layers(make, spread, kept):
    model = make()
    small = depth.fewer_layers(model, 2, spread)
    x = torch.randint(3, 50, (2, 5)) if make is llama else images(2)
    small(x)
    blocks, old = depth.find_stack(small).blocks, depth.find_stack(model).blocks
    assert len(blocks) == 2
    assert len(old) == 4
    for block, number in zip(blocks, kept, strict=True):
        for a, b in zip(block.parameters(), old[number].parameters(), strict=True):
            assert torch.equal(a, b)
            assert a is not b
    with pytest.raises(ValueError, match=r"layers must lie in \[1, 4\]"):
        depth.fewer_layers(model, 0)


def test_fewer_layers_of_a_routed_model_is_dense():
    model = depth.a_mod(own(), 0.5)
    small = depth.fewer_layers(model, 4)
    assert not depth.is_routed(small)
    assert torch.equal(small(images()), depth.to_dense(model)(images()))


def test_bad_tokens():
    with pytest.raises(ValueError, match="tokens must be more than the 1 of the prefix"):
        depth.flops(own(), 1)
