"""The density of edge-popup, lowered level by level."""

import pytest
import torch
from torch import nn

from featherweight.sparse.reparam import (
    clamp_scores_,
    edge_popup,
    edge_popup_anneal,
    edge_popup_densities,
    masks,
    score_parameters,
    set_density_,
)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))


@pytest.mark.parametrize(("density", "levels", "start"), [(0.05, 5, 1.0), (0.01, 10, 0.6)])
def test_densities_fall_by_one_factor_and_end_exactly(density, levels, start):
    values = edge_popup_densities(density, levels, start)
    assert len(values) == levels
    assert values[-1] == density
    ratios = [b / a for a, b in zip([start, *values], values, strict=False)]
    assert ratios == pytest.approx([(density / start) ** (1 / levels)] * levels)
    assert all(0 < ratio < 1 for ratio in ratios)


def test_golden_densities():
    assert edge_popup_densities(0.0625, 4) == pytest.approx([0.5, 0.25, 0.125, 0.0625])
    assert edge_popup_densities(0.3, 1) == [0.3]
    assert edge_popup_densities(0.6, 3, start=0.6) == pytest.approx([0.6] * 3)


def test_levels_set_the_density_and_keep_the_scores():
    model = network()
    edge_popup(model, 0.5, seed=0)
    before = [scores.detach().clone() for scores in score_parameters(model)]
    last = None
    for density in edge_popup_anneal(model, 0.1, levels=4):
        chosen = masks(model)
        assert chosen.counts() == {
            "0.weight": round(density * 200),
            "2.weight": round(density * 100),
        }
        if last is not None:  # nothing was trained: the best stay
            assert chosen <= last
        last = chosen
    assert density == 0.1
    assert all(torch.equal(a, b) for a, b in zip(before, score_parameters(model), strict=True))


def test_what_was_masked_can_come_back():
    model = network()
    edge_popup(model, 0.5, seed=0)
    before = masks(model)
    set_density_(model, 0.1)
    set_density_(model, 0.5)
    assert masks(model) == before


def test_a_support_lowers_the_start():
    model = network()
    generator = torch.Generator().manual_seed(0)
    support = {
        name: torch.rand(model.get_parameter(name).shape, generator=generator) < 0.3
        for name in ("0.weight", "2.weight")
    }
    edge_popup(model, 0.05, support=support, seed=0)
    start = min(float(mask.double().mean()) for mask in support.values())
    values = list(edge_popup_anneal(model, 0.05, levels=3))
    assert values == pytest.approx(edge_popup_densities(0.05, 3, start))


def test_bad_levels_change_nothing():
    model = network()
    with pytest.raises(ValueError, match="not under edge_popup"):
        next(edge_popup_anneal(model, 0.1, 2))
    edge_popup(model, 0.5, seed=0)
    before = masks(model)
    for density in (0.001, 0.0, 1.5, float("nan"), {"0.weight": 0.5}):
        with pytest.raises(ValueError, match="density"):
            set_density_(model, density)
    with pytest.raises(ValueError, match="keeps 0 of 100"):
        next(edge_popup_anneal(model, 0.004, 5))  # which the last level could not keep
    with pytest.raises(ValueError, match="density <= start"):
        next(edge_popup_anneal(model, 0.5, 2, start=0.2))
    assert masks(model) == before
    for arguments in ((0.5, 0), (0.0, 2), (0.5, 2, 1.5), (float("nan"), 2)):
        with pytest.raises(ValueError, match="levels"):
            edge_popup_densities(*arguments)


def test_clamped_scores():
    model = network()
    edge_popup(model, 0.5, seed=0)
    before = [scores.detach().clone() for scores in score_parameters(model)]
    clamp_scores_(model)
    for old, new in zip(before, score_parameters(model), strict=True):
        assert torch.equal(new, old.relu())
        assert (old < 0).any()
