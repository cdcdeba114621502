"""Fixup, SkipInit, balanced He: exactly what their papers draw, and what they ask of a model."""

import math

import pytest
import torch
from torch import nn

from featherweight import init
from featherweight.init import INITS
from featherweight.lab.models import build
from featherweight.lab.models.residual import Variant
from featherweight.lab.models.residual_mlp import ResidualMlp
from tests.init.networks import UserBlock, basic_net, framed, perceptron


def residual_mlp(blocks, shortcut="B", norm="none", scale="none", width=64):
    return ResidualMlp(20, 4, width, blocks, Variant(shortcut, norm, scale)).double()


def test_fixup_draws_what_the_paper_says():
    model = build(
        "resnet18", classes=10, shape=(3, 32, 32), seed=0, width=32, shortcut="C", norm="fixup"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    init.fixup_(model, seed=0)
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            fan_out = block.conv1.out_channels * 9
            expected = math.sqrt(2 / fan_out) * 8 ** (-1 / 2)
            assert block.conv1.weight.std().item() == pytest.approx(expected, rel=0.05)
            projection = block.downsample[0].weight
            assert projection.std().item() == pytest.approx((2 / len(projection)) ** 0.5, rel=0.1)
            assert not block.conv2.weight.any()
            assert block.scalars.branch.scale.item() == 1
            assert not any(shift.bias.any() for shift in (*block.scalars.before, block.bn1))
    bound = (3 * 9) ** -0.5  # torch's default, uniform
    assert 0.9 * bound < model.conv1.weight.abs().max() <= bound
    assert not model.fc.weight.any()
    assert not model.fc.bias.any()


def test_fixup_scales_bottlenecks_by_the_fourth_root_of_the_blocks():
    model = build("resnet50", classes=10, shape=(3, 32, 32), seed=0, width=32, norm="fixup")
    init.fixup_(model, seed=0)
    block = model.layer3[2]
    for conv, taps in ((block.conv1, 1), (block.conv2, 9)):
        expected = math.sqrt(2 / (conv.out_channels * taps)) * 16 ** (-1 / 4)
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.05)
    assert not block.conv3.weight.any()


@pytest.mark.parametrize(
    ("method", "norm", "scale"), [("fixup", "fixup", "none"), ("skipinit", "none", "branch")]
)
def test_blocks_with_identity_skips_start_as_the_identity(method, norm, scale):
    model = residual_mlp(6, norm=norm, scale=scale)
    INITS[method].method(model, seed=0)
    state = torch.rand(5, 64, dtype=torch.float64)
    assert torch.equal(model.blocks(state), state)
    if method == "skipinit":
        first = model.blocks[0]
        assert first.linear2.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.1)
        assert first.scalars.branch.scale.item() == 0
        assert not first.linear1.bias.any()


def test_fixup_names_what_a_model_lacks_or_treats_the_weights_alone():
    cases = [
        (residual_mlp(2), "fixup needs a multiplier on the branch of block 'blocks.0'"),
        (residual_mlp(2, scale="branch"), "a scalar bias before layer 'blocks.0.linear1'"),
    ]
    for model, message in cases:
        before = [p.clone() for p in model.parameters()]
        with pytest.raises(ValueError, match=message):
            init.fixup_(model, seed=0)
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    init.fixup_(cases[0][0], weights_only=True, seed=0)
    assert not cases[0][0].blocks[1].linear2.weight.any()
    assert not cases[0][0].classifier.weight.any()


@pytest.mark.parametrize("missing", ["before.0", "before.1", "after", "norm1", "shift"])
def test_fixup_notices_each_missing_scalar(missing):
    model = residual_mlp(2, norm="fixup", shortcut="C")
    init.fixup_(model, seed=0)
    block = model.blocks[1]
    owner = {"norm1": block, "shift": model}.get(missing, block.scalars)
    parent, _, name = missing.rpartition(".")
    setattr(owner.get_submodule(parent) if parent else owner, name, nn.Identity())
    with pytest.raises(ValueError, match="fixup needs a scalar bias"):
        init.fixup_(model, seed=0)


def test_methods_for_networks_without_norms_refuse_norms():
    model = framed(UserBlock(8, 8))
    for method in (init.fixup_, init.skipinit_):
        with pytest.raises(ValueError, match="is for models without norms, this one has '1'"):
            method(model, seed=0)
    plain = perceptron(4, 8, 8, 2)
    for method in (init.fixup_, init.skipinit_, init.balanced_):
        with pytest.raises(ValueError, match="is for residual networks, this one has no block"):
            method(plain, seed=0)
    with pytest.raises(ValueError, match="skipinit needs a multiplier on the branch of block"):
        init.skipinit_(residual_mlp(2), seed=0)


def test_balanced_weighs_the_two_ways_by_multipliers_or_in_the_weights():
    weighed = residual_mlp(2, "C", scale="both", width=200)
    absorbed = residual_mlp(2, "C", width=200)
    for model in (weighed, absorbed):
        init.balanced_(model, alpha=0.6, seed=0)
    block = weighed.blocks[1]
    assert block.scalars.branch.scale.item() == pytest.approx(0.6)
    assert block.scalars.skip.scale.item() == pytest.approx(0.8)
    assert block.linear2.weight.std().item() == pytest.approx(0.1, rel=0.03)
    assert absorbed.blocks[1].linear2.weight.std().item() == pytest.approx(0.06, rel=0.03)
    assert absorbed.blocks[1].shortcut.weight.std().item() == pytest.approx(0.08, rel=0.03)
    x = torch.randn(3, 20, dtype=torch.float64)
    assert torch.allclose(weighed(x), absorbed(x), rtol=1e-10)
    with pytest.raises(ValueError, match="has an identity skip without a multiplier"):
        init.balanced_(residual_mlp(2, scale="branch"), seed=0)
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got 2"):
        init.balanced_(weighed, alpha=2.0, seed=0)


def test_single_numbers_get_their_own_learning_rate():
    model = residual_mlp(2, norm="fixup")
    others, scalars = init.scalar_groups(model, lr=0.1)
    assert (others["lr"], scalars["lr"]) == (0.1, pytest.approx(0.01))
    assert {p.numel() for p in scalars["params"]} == {1}
    assert len(scalars["params"]) == 2 * 5 + 2  # a block: three biases, one behind, one factor
    assert len(others["params"]) + len(scalars["params"]) == len(list(model.parameters()))
    torch.optim.SGD([others, scalars], lr=1.0)


HOSTS = {
    "risotto": lambda: basic_net(2, "C"),
    "looks-linear": lambda: perceptron(4, 8, 8, 2),
    "looks-linear-nonzero-bias": lambda: perceptron(4, 8, 8, 2),
    "orthogonal-delta": lambda: basic_net(2, "B", norm="batch"),
    "he-nonzero-bias": lambda: basic_net(2, "C", norm="batch"),
    "fixup": lambda: residual_mlp(2, norm="fixup"),
    "skipinit": lambda: basic_net(2, "B"),
    "balanced": lambda: basic_net(2, "C", norm="batch"),
}


@pytest.mark.parametrize("name", INITS)
def test_every_registered_method_works_in_place_from_a_seed_and_reports(name):
    entry = INITS[name]
    assert entry.paper
    models = [HOSTS[name]() for _ in range(3)]
    places = [p.data_ptr() for p in models[0].parameters()]
    reports = [
        entry.method(model, seed=seed) for model, seed in zip(models, (5, 5, 6), strict=True)
    ]
    assert [p.data_ptr() for p in models[0].parameters()] == places
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])
    assert reports[0].method == name
    assert str(reports[0]).splitlines()[1].split() == ["layer", "shape", "what", "remark"]
    named = dict(models[0].named_modules()) | dict(models[0].named_parameters())
    assert {row.name for row in reports[0]} <= set(named)
    layers = [n for n, m in named.items() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert set(layers) <= {row.name for row in reports[0]}
    assert all(p.requires_grad and p.grad is None for p in models[0].parameters())


@pytest.mark.parametrize("name", INITS)
def test_every_registered_method_wants_exactly_one_source_of_randomness(name):
    model = HOSTS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for options in ({}, {"seed": 0, "generator": torch.Generator()}):
        with pytest.raises(ValueError, match="exactly one of seed= and generator="):
            INITS[name].method(model, **options)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
