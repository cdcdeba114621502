"""Costs against counts by hand: operations of layers, dense and masked; bytes of packed files."""

import pytest
import torch
from torch import nn

from featherweight.lab import cost
from featherweight.lab.models import build
from featherweight.sparse import Masks, random
from tests.models import ConvNet


def masks_of(model: nn.Module, density: float) -> Masks:
    return Masks.dense(model) if density == 1 else random(model, density, "uniform", seed=0)


class TestFlops:
    @pytest.mark.parametrize("density", [1.0, 0.3, 0.01])
    def test_mlp(self, density):
        model = build("mlp", classes=10, shape=(1, 8, 8), seed=0, width=30)
        masks = masks_of(model, density)
        weights = 64 * 30 + 30 * 30 + 30 * 10
        assert cost.flops(model, masks, torch.zeros(1, 1, 8, 8)) == (
            2 * masks.nonzeros,
            2 * weights,
        )

    @pytest.mark.parametrize(
        ("layer", "positions"),
        [
            (nn.Conv2d(4, 6, 3), 8 * 8),
            (nn.Conv2d(4, 6, 3, padding=1, stride=2), 5 * 5),
            (nn.Conv2d(4, 6, 3, padding=2, dilation=2), 10 * 10),
            (nn.Conv2d(4, 6, (1, 5), bias=False), 10 * 6),
            (nn.Conv2d(4, 8, 3, groups=2), 8 * 8),
            (nn.Conv2d(4, 4, 3, groups=4), 8 * 8),
        ],
    )
    @pytest.mark.parametrize("density", [1.0, 0.25])
    def test_convolution_uses_each_weight_once_a_position(self, layer, positions, density):
        model = nn.Sequential(layer)
        masks = masks_of(model, density)
        expected = 2 * masks.nonzeros * positions, 2 * layer.weight.numel() * positions
        assert cost.flops(model, masks, torch.zeros(1, 4, 10, 10)) == expected

    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize("density", [1.0, 0.25])
    def test_transposed_convolution_uses_each_weight_once_a_pixel_taken_in(self, groups, density):
        model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=groups))
        masks = masks_of(model, density)
        found = cost.flops(model, masks, torch.zeros(1, 4, 5, 7))
        assert found == (2 * masks.nonzeros * 35, 2 * model[0].weight.numel() * 35)

    @pytest.mark.parametrize("density", [1.0, 0.1])
    def test_vision_transformer_counts_attention_in_full(self, density):
        width, depth, heads, tokens = 24, 2, 2, 1 + 16
        options = {"width": width, "depth": depth, "heads": heads, "patch": 2}
        model = build("vit", classes=10, shape=(1, 8, 8), seed=0, **options)
        masks = masks_of(model, density)
        products = 2 * 2 * tokens * tokens * width  # q k^T and (q k^T) v
        seen = {"patches.weight": 16, "classifier.weight": 1}  # the rest sees every token
        linear = sum(2 * n * seen.get(name, tokens) for name, n in masks.counts().items())
        full = sum(2 * m.numel() * seen.get(name, tokens) for name, m in masks.items())
        found = cost.flops(model, masks, torch.zeros(1, 1, 8, 8))
        assert found == (linear + depth * products, full + depth * products)

    def test_what_has_no_mask_counts_in_full(self):
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
        masks = random(model, 0.2, "uniform", seed=0, exclude=["2.*"])
        found = cost.flops(model, masks, torch.zeros(1, 6))
        assert found == (2 * masks.nonzeros + 2 * 20, 2 * 30 + 2 * 20)

    def test_a_tied_weight_counts_as_often_as_it_is_used(self):
        model = ConvNet()
        dense = Masks.dense(model)
        lighter = Masks(dict(dense) | {"head.weight": torch.zeros(5, 8, dtype=torch.bool)})
        image = torch.zeros(1, 3, 8, 8)
        full, _ = cost.flops(model, dense, image)
        assert full - cost.flops(model, lighter, image)[0] == 2 * 2 * 40

    def test_the_model_is_left_as_it_was(self):
        model = build("mlp", classes=10, shape=(1, 8, 8), seed=0, width=8)
        model[2].eval()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        modes = [module.training for module in model.modules()]
        cost.flops(model, Masks.dense(model), torch.ones(1, 1, 8, 8))
        assert [module.training for module in model.modules()] == modes
        assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
        assert not any(module._forward_hooks for module in model.modules())

    def test_hooks_go_even_if_the_model_fails(self):
        model = nn.Sequential(nn.Linear(6, 5))
        with pytest.raises(RuntimeError, match="shapes"):
            cost.flops(model, Masks.dense(model), torch.zeros(1, 7))
        assert model.training
        assert not model[0]._forward_hooks
