"""Targets that are exact by construction, and planting them."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from featherweight.sparse.masks import Masks
from featherweight.sparse.tickets import (
    circle,
    helix,
    piecewise_linear,
    plant,
    recovery,
    relu_chain,
)


def line(count=1001):
    return torch.linspace(-1, 1, count, dtype=torch.float64)[:, None]


def plane(count=4000):
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.rand(count, 2, generator=generator).double() - 1


def source(*widths, bias=True):
    modules = []
    for inputs, outputs in itertools.pairwise(widths):
        modules += [nn.Linear(inputs, outputs, bias=bias), nn.ReLU()]
    return nn.Sequential(*modules[:-1]).double()


def test_interpolation_of_a_square():
    """Exact at the knots, and h^2 / 4 off in the middle between them."""
    knots = torch.linspace(-1, 1, 10).double()
    network = piecewise_linear(torch.square, knots)
    assert (network(knots[:, None])[:, 0] - knots**2).abs().max() < 1e-15
    middles = (knots[1:] + knots[:-1]) / 2
    gaps = network(middles[:, None])[:, 0] - middles**2
    torch.testing.assert_close(gaps, torch.full((9,), (2 / 9) ** 2 / 4).double())
    assert (network(line())[:, 0] - line()[:, 0] ** 2).abs().max() < 0.012346


@pytest.mark.parametrize("depth", [2, 3, 6])
def test_interpolation_of_several_outputs_at_uneven_knots(depth):
    knots = torch.tensor([-2.0, -1.9, 0.3, 1.0, 4.0]).double()
    network = piecewise_linear(lambda x: torch.stack([x.sin(), x.exp()], 1), knots, depth)
    assert sum(isinstance(m, nn.Linear) for m in network) == depth
    expected = torch.stack([knots.sin(), knots.exp()], 1)
    torch.testing.assert_close(network(knots[:, None]), expected, rtol=0, atol=1e-12)
    between = torch.lerp(expected[2], expected[3], 0.25)
    place = torch.lerp(knots[2], knots[3], 0.25)[None, None]
    torch.testing.assert_close(network(place)[0], between, rtol=0, atol=1e-12)


def test_relu_chain():
    for depth in (2, 5):
        torch.testing.assert_close(relu_chain(depth)(line()), line().relu())


@pytest.mark.parametrize("depth", [3, 5])
def test_circle_separates_rings(depth):
    points = plane()
    radii = points.square().sum(1)
    network = circle(knots=200, depth=depth)
    bounds = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)
    clear = (radii[:, None] - bounds).abs().amin(1) > 1e-3
    classes = torch.bucketize(radii, bounds)
    assert torch.equal(network(points).argmax(1)[clear], classes[clear])
    assert ((circle()(points).argmax(1) == classes).double().mean()) > 0.95


def test_helix():
    y = math.pi * (5 + 3 * line()[:, 0])
    curve = torch.stack([y * y.cos(), y * y.sin(), y], 1) / (8 * math.pi)
    assert (helix()(line()) - curve).abs().max() < 0.06
    assert (helix(knots=300)(line()) - curve).abs().max() < 6e-4


@pytest.mark.parametrize(
    ("target", "widths", "x"),
    [
        (relu_chain(5), (1, 50, 50, 50, 50, 1), line()),
        (piecewise_linear(torch.square, torch.linspace(-1, 1, 10), 4), (1, 40, 30, 20, 1), line()),
        (circle(), (2, 60, 30, 4), plane()),
        (helix(), (1, 30, 3), line()),
    ],
    ids=["relu", "square", "circle", "helix"],
)
def test_a_planted_ticket_is_its_target(target, widths, x):
    host = source(*widths)
    before = copy.deepcopy(host.state_dict())
    planted = plant(target, host)
    outputs = planted.ticket()(x) / planted.scales
    torch.testing.assert_close(outputs, target(x), rtol=0, atol=1e-12)
    assert (planted.scales > 0).all()
    assert (planted.network(x) / planted.scales - target(x)).abs().max() > 0.1
    assert list(planted.masks) == list(before)
    for name, parameter in planted.network.named_parameters():
        rest = ~planted.masks[name]
        assert torch.equal(parameter[rest], before[name][rest])
        assert torch.equal(host.get_parameter(name), before[name])
    nonzeros = sum(int((p != 0).sum()) for p in target.parameters())
    assert planted.masks.nonzeros == nonzeros


def test_hosts_are_the_neurons_that_look_alike():
    """A target cut out of a source, times a positive factor, is planted where it came from."""
    host = source(3, 20, 2)
    target = source(3, 4, 2)
    chosen = torch.tensor([17, 2, 11, 5])
    factors = torch.tensor([0.5, 3.0, 1.0, 2.0]).double()
    with torch.no_grad():
        target[0].weight.copy_(host[0].weight[chosen] / factors[:, None])
        target[0].bias.copy_(host[0].bias[chosen] / factors)
        target[2].weight.copy_(host[2].weight[:, chosen] * factors)
        target[2].bias.copy_(host[2].bias)
    planted = plant(target, host)
    assert planted.masks["0.bias"].nonzero().flatten().tolist() == sorted(chosen.tolist())
    for name, parameter in planted.network.named_parameters():
        torch.testing.assert_close(parameter, host.get_parameter(name))
    torch.testing.assert_close(planted.scales, torch.ones(2).double())


def test_signs_come_before_nearness():
    target, host = source(2, 1, 1, bias=False), source(2, 2, 1, bias=False)
    with torch.no_grad():
        target[0].weight.copy_(torch.tensor([[1.0, 0.01]]))
        target[2].weight.fill_(1)
        host[0].weight.copy_(torch.tensor([[1.0, -0.01], [3.0, 1.0]]))
        host[2].weight.copy_(torch.tensor([[1.0, 1.0]]))
    planted = plant(target, host)
    assert planted.masks["0.weight"].tolist() == [[False, False], [True, True]]


def test_without_a_neuron_of_the_right_signs():
    host = source(1, 3, 1)
    with torch.no_grad():
        for parameter in host.parameters():
            parameter.copy_(-parameter.abs())
        host[0].bias[2] = 0
        host[0].weight[2] = 0
    target = relu_chain(2)
    planted = plant(target, host)
    x = line(11)
    torch.testing.assert_close(planted.ticket()(x) / planted.scales, target(x))


def test_a_dead_target_neuron_takes_no_entries():
    target = source(2, 3, 1)
    with torch.no_grad():
        target[0].weight[1] = 0
        target[0].bias[1] = 0
    planted = plant(target, source(2, 8, 1))
    assert planted.masks["0.weight"].sum() == 4
    x = plane(50)
    torch.testing.assert_close(planted.ticket()(x) / planted.scales, target(x))


@pytest.mark.parametrize(
    ("host", "message"),
    [
        (source(1, 5, 5, 1), "source must have 2 linear layers, got 3"),
        (source(2, 20, 1), r"source must have \(1, 1\) inputs and outputs"),
        (source(1, 9, 1), "source layer '0' is narrower"),
        (source(1, 20, 1, bias=False), "source layer '0' has no bias"),
        (nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1)), "source"),
    ],
)
def test_hosts_that_do_not_fit_are_refused(host, message):
    with pytest.raises(ValueError, match=message):
        plant(piecewise_linear(torch.square, torch.linspace(-1, 1, 10)), host)


def test_recovery():
    ticket = Masks({"a": torch.tensor([1, 1, 0, 0, 0, 0, 0, 0]).bool(), "b": torch.ones(1).bool()})
    found = {"a": torch.tensor([1, 0, 1, 1, 0, 0, 0, 0]).bool()}
    result = recovery(found, ticket)
    assert (result.precision, result.recall, result.density) == (1 / 3, 1 / 2, 2 / 8)
    assert result.jaccard == 1 / 4
    perfect = recovery(ticket, ticket)
    assert (perfect.precision, perfect.recall, perfect.jaccard) == (1, 1, 1)
    with pytest.raises(ValueError, match="ticket has no mask of 'c'"):
        recovery({"c": torch.ones(1).bool()}, ticket)
    with pytest.raises(ValueError, match="masks keep 0"):
        recovery({"b": torch.zeros(1).bool()}, ticket)
    with pytest.raises(ValueError, match="'a' has shape"):
        recovery({"a": torch.ones(3).bool()}, ticket)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: relu_chain(1), "depth must be at least 2"),
        (lambda: circle(depth=2), "depth must be at least 3"),
        (lambda: circle(bounds=[0.5, 0.2]), "bounds"),
        (lambda: circle(knots=1), "knots"),
        (lambda: helix(knots=1), "knots"),
        (lambda: piecewise_linear(torch.exp, torch.tensor([0.0, 0.0])), "knots"),
        (lambda: piecewise_linear(torch.exp, torch.tensor([0.0])), "knots"),
    ],
)
def test_impossible_targets_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
