"""Signal flow: dead units, paths, and repair that keeps the number of edges."""

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from featherweight import sparse
from featherweight.lab import models
from featherweight.sparse import Masks, health, on_path, repair
from tests.models import ConvNet, mlp


def chain(*matrices):
    """Return a bias-free ReLU network and masks, from 0/1 matrices."""
    layers: list[nn.Module] = []
    for matrix in matrices:
        layers += [nn.Linear(len(matrix[0]), len(matrix), bias=False), nn.ReLU()]
    model = nn.Sequential(*layers)
    return model, Masks({f"{2 * i}.weight": torch.tensor(m).bool() for i, m in enumerate(matrices)})


def test_health_counts_by_hand():
    # the second hidden unit has no input, the third leads nowhere, the last input is unused
    model, masks = chain([[1, 0], [0, 0], [1, 0]], [[1, 1, 0]])
    found = health(masks, model, torch.ones(1, 2))
    assert found.no_input == {"0.weight": 1}
    assert found.no_output == {"0.weight": 1, "2.weight": 1}
    assert found.stranded == {"0.weight": 1, "2.weight": 1}
    assert found.empty == ()
    assert not found.ok
    assert "0.weight: 1 units without a kept in-edge" in str(found)


def test_an_empty_layer_strands_everything():
    model, masks = chain([[1, 1]], [[0]], [[1]])
    found = health(masks, model, torch.ones(1, 2))
    assert found.empty == ("2.weight",)
    assert found.stranded == {"0.weight": 2, "4.weight": 1}


def test_dense_is_healthy():
    model = ConvNet()
    found = health(Masks.dense(model), model, torch.ones(2, 3, 8, 8))
    assert found.ok
    assert str(found) == "healthy"


@given(st.data())
def test_paths_against_brute_force(data):
    widths = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    bits = [
        [[data.draw(st.integers(0, 1)) for _ in range(into)] for _ in range(out)]
        for into, out in itertools.pairwise(widths)
    ]
    model, masks = chain(*bits)
    live = on_path(masks, model, torch.ones(1, widths[0]))
    reach = _reachable(bits, list(range(widths[0])))
    back = _reachable(
        [list(map(list, zip(*m, strict=True))) for m in bits[::-1]], list(range(widths[-1]))
    )
    back = back[::-1]
    for i, matrix in enumerate(bits):
        expected = [
            [bool(bit) and c in reach[i] and r in back[i + 1] for c, bit in enumerate(row)]
            for r, row in enumerate(matrix)
        ]
        assert live[f"{2 * i}.weight"].tolist() == expected


def _reachable(matrices, start):
    sets = [set(start)]
    for matrix in matrices:
        sets.append({r for r, row in enumerate(matrix) if any(row[c] for c in sets[-1])})
    return sets


def test_on_path_leaves_the_model_as_found():
    model = ConvNet().train()
    model.stem.weight.grad = torch.ones_like(model.stem.weight)
    model.head.weight.requires_grad_(False)
    before, grad = copy.deepcopy(model.state_dict()), model.stem.weight.grad
    masks, inputs = sparse.random(model, 0.2, seed=0), torch.randn(2, 3, 8, 8)
    random_state = torch.get_rng_state()
    on_path(masks, model, inputs)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.training
    assert model.norm.training
    assert model.stem.weight.grad is grad
    assert not model.head.weight.requires_grad
    assert model.norm.weight.requires_grad
    assert torch.equal(torch.get_rng_state(), random_state)


def test_residual_sums_are_unions_and_pooling_loses_no_path():
    """At a 2x2 image, max pooling over equal values would hide kernel corners."""
    model = models.build("vgg16", classes=3, shape=(3, 32, 32), seed=0, width=8)
    dense = Masks.dense(model)
    live = on_path(dense, model, torch.ones(1, 3, 32, 32))
    for name, mask in dense.items():
        assert torch.equal(live[name], mask), name
    resnet = models.build("resnet20", classes=3, shape=(3, 32, 32), seed=0)
    masks = dict(Masks.dense(resnet))
    masks["layer1.0.conv1.weight"] = torch.zeros_like(masks["layer1.0.conv1.weight"])
    live = on_path(Masks(masks), resnet, torch.ones(1, 3, 32, 32))
    assert live["layer1.0.conv2.weight"].sum() == 0
    assert live["layer1.1.conv1.weight"].all()  # the shortcut carries the signal past the hole


@pytest.mark.parametrize("density", [0.04, 0.06, 0.2])
@pytest.mark.parametrize("make", [mlp, ConvNet])
def test_repair_keeps_the_count_and_leaves_no_dead_unit(make, density):
    model = make() if make is ConvNet else make(width=60)
    density = max(density, 0.12) if make is ConvNet else density
    for seed in range(4):
        masks = sparse.random(model, density, "global", seed=seed)
        fixed = repair(masks, model, seed=seed)
        assert fixed.masks.nonzeros == masks.nonzeros
        found = health(fixed.masks, model)
        assert (found.no_input, found.no_output, found.empty) == ({}, {}, ())
        damage = health(masks, model)
        assert fixed.units == sum(damage.no_input.values()) + sum(damage.no_output.values())
        again = repair(fixed.masks, model, seed=seed + 1)
        assert again.masks == fixed.masks
        assert again.units == 0


def test_repair_at_the_smallest_possible_number_of_edges():
    """As many edges as the wider side has units: only a union of stars is left."""
    model = nn.Linear(7, 5)
    for seed in range(20):
        masks = sparse.random(model, 7 / 35, "global", seed=seed)
        fixed = repair(masks, model, seed=seed).masks
        assert fixed.nonzeros == 7
        assert fixed["weight"].any(0).all()
        assert fixed["weight"].any(1).all()


def test_repair_borrows_edges_from_other_layers():
    model = mlp(24)
    masks = dict(Masks.dense(model))
    masks["2.weight" if "2.weight" in masks else "3.weight"] = torch.zeros(24, 24).bool()
    fixed = repair(Masks(masks), model, seed=0)
    assert fixed.moved == {"3.weight": 24}
    assert fixed.masks.nonzeros == Masks(masks).nonzeros
    assert health(fixed.masks, model, torch.ones(2, 16)).ok


def test_repair_refuses_too_few_edges():
    model = mlp(24)
    with pytest.raises(ValueError, match=r"4 kept entries are too few: the units need 72"):
        repair(sparse.random(model, 4 / (24 * 16 + 24 * 24 + 24 * 4), seed=0), model, seed=0)


def test_repair_of_transposed_and_grouped_convolutions():
    model = nn.Sequential(nn.ConvTranspose2d(6, 9, 3, groups=3), nn.Conv2d(9, 6, 3, groups=3))
    masks = sparse.random(model, 0.12, "global", seed=1)
    fixed = repair(masks, model, seed=0).masks
    assert fixed.nonzeros == masks.nonzeros
    first = fixed["0.weight"].reshape(3, 2, 3, 9)  # groups, inputs, outputs, kernel
    assert first.any(3).any(2).all()
    assert first.any(3).any(1).all()
    assert health(fixed, model).ok
