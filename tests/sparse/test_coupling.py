"""Coupling: the algebra of signs and magnitudes of two runs, entry by entry."""

import copy
from itertools import product
from math import sqrt

import pytest
import torch

from featherweight import sparse
from featherweight.sparse import Masks
from featherweight.sparse.coupling import couple_
from tests.models import ConvNet, mlp, train_steps


def other_run(seed=5):
    model = mlp(seed=seed)
    train_steps(model, torch.optim.SGD(model.parameters(), 0.3), 20)
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def coupled(**options):
    """Return own start, learned weights, masks, and the model's state after coupling."""
    model, learned = mlp(), other_run()
    masks = sparse.random(model, 0.4, seed=0)
    own = copy.deepcopy(model.state_dict())
    couple_(model, masks, learned, **options)
    return own, learned, masks, model.state_dict()


def multiset(values):
    return values.abs().sort().values


SIGNS = ["own", "learned", "random"]
MAGNITUDES = ["own", "learned", "shuffled", "random"]


@pytest.mark.parametrize(("signs", "magnitudes"), list(product(SIGNS, MAGNITUDES)))
def test_every_pair(signs, magnitudes):
    own, learned, masks, after = coupled(signs=signs, magnitudes=magnitudes, seed=1)
    for name, mask in masks.items():
        found = after[name]
        assert not found[~mask].any()
        sources = {"own": own[name], "learned": learned[name]}
        if signs in sources:
            assert torch.equal(found[mask].sign(), sources[signs][mask].sign())
        if magnitudes in sources:
            assert torch.equal(found[mask].abs(), sources[magnitudes][mask].abs())
        if magnitudes == "shuffled":
            assert torch.equal(multiset(found[mask]), multiset(learned[name][mask]))
            assert not torch.equal(found[mask].abs(), learned[name][mask].abs())
        if magnitudes == "random":
            available = own[name].abs().flatten().tolist()
            for value in found[mask].abs().tolist():
                available.remove(value)  # each used at most once
            assert not torch.equal(found[mask].abs(), own[name][mask].abs())


def test_both_learned_are_the_learned_weights_bitwise():
    _, learned, masks, after = coupled(signs="learned", magnitudes="learned")
    assert all(torch.equal(after[name], learned[name] * mask) for name, mask in masks.items())


def test_both_own_only_mask():
    own, _, masks, after = coupled()
    assert all(torch.equal(after[name], own[name] * mask) for name, mask in masks.items())


def test_random_signs_are_fair_coins():
    model = torch.nn.Linear(200, 200)
    masks = Masks.dense(model)
    couple_(model, masks, model.state_dict(), signs="random", seed=0)
    positive = int((model.weight > 0).sum())
    assert abs(positive - 20000) < 5 * sqrt(40000) / 2


def test_random_magnitudes_are_a_sample_of_the_own():
    """The kept ones are drawn from the whole layer, not from the kept places."""
    model = torch.nn.Linear(100, 100)
    with torch.no_grad():
        model.weight.copy_(torch.arange(1, 10001).view(100, 100))
    masks = Masks({"weight": torch.arange(10000).view(100, 100) < 1000})
    couple_(model, masks, model.state_dict(), magnitudes="random", seed=0)
    drawn = model.weight[masks["weight"]].abs()
    assert len(drawn.unique()) == 1000
    assert abs(drawn.mean() - 5000.5) < 5 * 2887 / sqrt(1000)


def test_random_magnitudes_of_a_masked_model_are_its_nonzero_ones():
    model = mlp()
    masks = sparse.random(model, 0.4, seed=0)
    masks.apply_(model)
    before = {n: w.detach().clone() for n, w in masks.weights(model).items()}
    couple_(model, masks, before, magnitudes="random", seed=0)
    for name, weight in masks.weights(model).items():
        kept = masks[name]
        assert (weight[kept] != 0).all()
        assert torch.equal(multiset(weight[kept]), multiset(before[name][kept]))


def test_too_few_magnitudes_are_refused_before_anything_changes():
    model = mlp()
    with torch.no_grad():
        model[6].weight.zero_()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"has 0 of them, its mask keeps 96"):
        couple_(model, Masks.dense(model), other_run(), magnitudes="random", seed=0)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_seeds_pair_the_draws():
    """One seed draws the same signs whatever the magnitudes, and the other way round."""
    with_learned = coupled(signs="random", magnitudes="learned", seed=3)[3]
    with_own = coupled(signs="random", magnitudes="own", seed=3)[3]
    shuffled = [coupled(signs=s, magnitudes="shuffled", seed=3)[3] for s in SIGNS]
    for name in ("0.weight", "3.weight", "6.weight"):
        assert torch.equal(with_learned[name].sign(), with_own[name].sign())
        assert torch.equal(shuffled[0][name].abs(), shuffled[1][name].abs())
        assert torch.equal(shuffled[0][name].abs(), shuffled[2][name].abs())
    again, different = (coupled(signs="random", seed=s)[3]["0.weight"] for s in (3, 4))
    assert torch.equal(again, with_own["0.weight"])
    assert not torch.equal(again, different)
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(coupled(signs="random", generator=generator)[3]["0.weight"], again)


@pytest.mark.parametrize("others", ["own", "learned"])
def test_what_the_masks_do_not_cover(others):
    own, learned, masks, after = coupled(signs="learned", others=others)
    source = own if others == "own" else learned
    rest = [name for name in after if name not in masks]
    assert "1.running_mean" in rest
    assert all(torch.equal(after[name], source[name]) for name in rest)


def test_a_tied_weight_is_covered_under_both_names():
    model = ConvNet()
    learned = {n: torch.full_like(t, 7) for n, t in ConvNet().state_dict().items()}
    masks = Masks.dense(model)
    own = model.head.weight.detach().clone()
    couple_(model, masks, learned, others="learned")
    assert torch.equal(model.head.weight, own)
    assert model.twin.weight is model.head.weight
    assert (model.words.weight == 7).all()


def test_learned_zeros_count_as_positive():
    model = torch.nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.0, 2.0, -3.0]]))
    learned = {"weight": torch.tensor([[0.0, -1.0, 1.0]])}
    couple_(model, Masks.dense(model), learned, signs="learned")
    assert torch.equal(model.weight, torch.tensor([[1.0, -2.0, 3.0]]))


def test_dtypes_of_the_model_stay():
    model = mlp().double()
    couple_(model, Masks.dense(model), other_run(), signs="learned", magnitudes="shuffled", seed=0)
    assert all(p.dtype == torch.float64 for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"signs": "lerned"}, "signs must be one of own, learned, random, got 'lerned'"),
        ({"signs": "shuffled"}, "signs must be one of"),
        ({"magnitudes": "same"}, "magnitudes must be one of own, learned, shuffled, random"),
        ({"others": "random"}, "others must be one of own, learned"),
        ({"signs": "random"}, "exactly one of seed= and generator="),
        ({"magnitudes": "shuffled"}, "exactly one of seed= and generator="),
        ({"seed": 0, "generator": torch.Generator()}, "exactly one of seed= and generator="),
    ],
)
def test_bad_arguments(options, message):
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    masks = sparse.random(model, 0.4, seed=0)
    with pytest.raises(ValueError, match=message):
        couple_(model, masks, other_run(), **options)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_weights_that_do_not_fit():
    model, learned = mlp(), other_run()
    masks = sparse.random(model, 0.4, seed=0)
    before = copy.deepcopy(model.state_dict())
    only_weights = {name: learned[name] for name in masks}
    for given, options, message in (
        ({n: t for n, t in learned.items() if n != "3.weight"}, {}, r"learned lacks '3.weight'"),
        (mlp(8).state_dict(), {}, r"learned does not fit: '0.weight' has shape"),
        (only_weights, {"others": "learned"}, r"learned lacks '0.bias'"),
    ):
        with pytest.raises(ValueError, match=message):
            couple_(model, masks, given, signs="learned", **options)
    with pytest.raises(ValueError, match="masks do not fit"):
        couple_(mlp(8), masks, learned)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    couple_(model, masks, only_weights, signs="learned")  # enough without the others


def test_the_control_with_the_layer_ratios_alone():
    """The last row of the papers' tables: random masks as dense in each layer as the learned."""
    model = mlp(60)
    train_steps(model, torch.optim.SGD(model.parameters(), 0.3), 20)
    learned = sparse.magnitude(model, 0.1)
    control = sparse.random(model, learned.density, learned, seed=0)
    assert control.counts() == learned.counts()
    assert control != learned
