"""Strong tickets by construction: legal, within their bound, and as precise as they should be."""

import copy
import itertools

import pytest
import torch
from torch import nn

from featherweight.sparse.masks import Masks
from featherweight.sparse.tickets import approximate, source_for
from tests.oracles.tickets import effective_layers, forward

CASES = [("2L", "uniform"), ("2L", "normal"), ("2L", "looks-linear"), ("L+1", "uniform")]


def mlp(*sizes, seed=0, bias=True, dtype=torch.float64):
    """A network with all parameters uniform in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    modules = []
    for inputs, outputs in itertools.pairwise(sizes):
        linear = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
        for parameter in linear.parameters():
            draws = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(2 * draws - 1)
        modules += [linear, nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def cube(count, size, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(count, size, generator=generator).double() - 1


def build(sizes=(3, 5, 4, 2), construction="2L", rho=24, seed=0, law="uniform", **options):
    target = mlp(*sizes, seed=seed)
    source = source_for(target, construction, rho, law=law, seed=100 + seed)
    return target, source, approximate(target, source, construction, **options)


@pytest.mark.parametrize(("construction", "law"), CASES)
def test_a_ticket_is_the_source_masked_and_nothing_else(construction, law):
    target, source, ticket = build(construction=construction, law=law)
    before = copy.deepcopy(source.state_dict())
    assert list(ticket.masks) == [name for name, _ in source.named_parameters()]
    for name, parameter in ticket.network.named_parameters():
        mask = ticket.masks[name]
        assert torch.equal(parameter[mask], before[name][mask])
        assert not parameter[~mask].any()
        assert not torch.signbit(parameter[~mask]).any()
        assert torch.equal(source.get_parameter(name), before[name])
    x = cube(5, 3)
    rows = [forward(ticket.network, row) for row in x.tolist()]
    outputs = torch.tensor(rows, dtype=torch.float64)
    expected = (ticket.scale * outputs - target(x)).abs().max()
    assert ticket.error(x) == pytest.approx(float(expected.detach()), rel=1e-9)


@pytest.mark.parametrize(("construction", "law"), CASES)
@pytest.mark.parametrize("rho", [12, 28])
def test_error_is_within_the_bound(construction, law, rho):
    """Also where the width is far too small and the error large."""
    for seed in range(5):
        _, _, ticket = build((4, 5, 3), construction, rho, seed, law)
        for radius in (1.0, 3.0):
            x = radius * cube(2000, 4, seed)
            error = ticket.error(x)
            assert error <= ticket.bound(x) + 1e-12
            assert ticket.bound(x) <= ticket.bound(radius=radius) + 1e-12
    assert ticket.bound(x) < 1000 * error


def test_errors_and_bound_by_hand():
    """Oracle: plain sums over the masked network, and the recursion in plain numbers."""
    target, _, ticket = build((3, 4, 2), rho=14)
    target.requires_grad_(False)
    ticket.network.requires_grad_(False)
    x = cube(500, 3)
    values, error, before = x, 0.0, 1.0
    linears = [m for m in target if isinstance(m, nn.Linear)]
    built = zip(linears, effective_layers(ticket.network), ticket.layers, strict=True)
    for index, (linear, (plus, minus, bias), layer) in enumerate(built):
        parts = [plus] if index else [plus, minus]
        scale = before / layer.gain
        weights = torch.stack([(scale * part - linear.weight).abs() for part in parts]).amax(0)
        biases = (bias / layer.gain - linear.bias).abs()
        torch.testing.assert_close(weights, layer.errors[:, :-1], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(biases, layer.errors[:, -1], rtol=1e-9, atol=1e-12)
        sizes = values.abs().amax(0)
        error = max(
            sum(float(w * (s + error)) for w, s in zip(weights[j], sizes, strict=True))
            + float(biases[j])
            + sum(abs(float(w)) for w in linear.weight[j]) * error
            for j in range(linear.out_features)
        )
        values, before = linear(values).relu(), layer.gain
    assert ticket.bound(x) == pytest.approx(error, rel=1e-9)
    assert ticket.scale == 1 / before


def test_first_stages_read_one_input_and_constants_none():
    _, _, ticket = build()
    for index in (0, 4, 8):
        first, second = ticket.network[index], ticket.network[index + 2]
        reads = (first.weight != 0).sum(1)
        constant = first.bias != 0
        assert reads.max() == 1
        assert not reads[constant].any()
        assert (first.bias[constant] > 0).all()
        assert constant.any()
        assert not second.bias.any()
        if index:  # the inputs are not negative: negative weights would be useless
            assert (first.weight >= 0).all()
        unread = ~(second.weight != 0).any(0)
        assert not first.weight[unread].any()
        assert not first.bias[unread].any()


def test_hardly_any_neuron_is_wasted():
    """Each is given an input for which its weight is useful: half of random weights are not."""
    _, _, ticket = build((8, 10, 8), rho=20)
    for index in (0, 4):
        first = ticket.network[index]
        used = first.weight.any(1) | (first.bias != 0)
        assert used.double().mean() > 0.9


def test_neurons_with_negative_biases_are_no_constants():
    target = mlp(3, 4, 2)
    source = source_for(target, "2L", 20, seed=0)
    with torch.no_grad():
        for first in source[::4]:
            first.bias[8:] = -first.bias[8:].abs()
            first.bias[:8] = first.bias[:8].abs()
    ticket = approximate(target, source)
    x = cube(300, 3)
    assert all((ticket.network[k].bias >= 0).all() for k in (0, 4))
    assert 1e-3 < ticket.error(x) <= ticket.bound(x)


def test_negative_inputs_have_their_own_sums():
    """A linear target needs both: at -x the ticket is -1 times what it is at x."""
    target = mlp(2, 3, bias=False)
    source = source_for(target, "2L", 40, bias_factor=0, seed=0)
    ticket = approximate(target, source)
    x = cube(50, 2)
    outputs = ticket.scale * ticket.network(x)
    torch.testing.assert_close(outputs, -ticket.scale * ticket.network(-x), rtol=0, atol=2e-3)
    half = approximate(target, source, nonnegative=True)
    assert half.error(x.abs()) < 1e-3
    assert half.error(-x.abs()) > 0.1
    assert half.layers[0].problems == 6
    assert ticket.layers[0].problems == 12


@pytest.mark.parametrize(("construction", "narrow", "wide"), [("2L", 12, 36), ("L+1", 12, 30)])
def test_wider_sources_are_better(construction, narrow, wide):
    def median(rho):
        tickets = [build((3, 4, 2), construction, rho, seed)[2] for seed in range(5)]
        return sorted(ticket.error(cube(500, 3)) for ticket in tickets)[2]

    errors = [median(rho) for rho in (narrow, (narrow + wide) // 2, wide)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.01
    assert errors[0] > 20 * errors[2]


@pytest.mark.parametrize("construction", ["2L", "L+1"])
def test_scales_of_the_source_do_not_matter(construction):
    """Weights times s_l and biases times s_1 ... s_l: the same masks, the factor divided by all."""
    target, source, ticket = build(construction=construction)
    product = 1.0
    for index, linear in enumerate(m for m in source if isinstance(m, nn.Linear)):
        scale = 2.0 ** (index - 4)
        product *= scale
        linear.weight.data.mul_(scale)
        linear.bias.data.mul_(product)
    scaled = approximate(target, source, construction)
    assert scaled.masks == ticket.masks
    assert scaled.scale == pytest.approx(ticket.scale / product, rel=1e-12)
    assert scaled.error(cube(100, 3)) == pytest.approx(ticket.error(cube(100, 3)), rel=1e-6)


def test_a_target_that_is_a_sub_sum_is_met_exactly():
    target = mlp(1, 1, bias=False)
    with torch.no_grad():
        target[0].weight.fill_(0.7)
    source = source_for(target, "2L", 15, bias_factor=0, seed=0)
    # All of the reach is one sub-sum: that of every useful candidate.
    ticket = approximate(target, source, nonnegative=True, headroom=1.0)
    useful = (source[0].weight[:, 0] > 0) & (source[2].weight[0] > 0)
    assert torch.equal(ticket.masks["2.weight"][0], useful)
    assert ticket.error(cube(20, 1).abs()) < 1e-14


def test_tickets_of_zero_bias_networks_are_homogeneous():
    target = mlp(3, 4, 2, bias=False)
    source = source_for(target, "2L", 30, bias_factor=0, seed=0)
    ticket = approximate(target, source)
    assert all(name.endswith("weight") for name in ticket.masks)
    x = cube(100, 3)
    torch.testing.assert_close(ticket.network(3 * x), 3 * ticket.network(x))
    assert ticket.error(x) < 0.02
    with pytest.raises(ValueError, match="target has biases but source layer '0'"):
        approximate(mlp(3, 4, 2), source)


@pytest.mark.parametrize(("construction", "wide"), [("2L", 110), ("L+1", 90)])
def test_sparse_sources(construction, wide):
    """Width makes up for missing edges; with few inputs some neurons have no useful one at all."""
    target = mlp(3, 4, 2)

    def error(rho, density, seed):
        source = source_for(target, construction, rho, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        support = {
            name: torch.rand(p.shape, generator=generator) < density
            for name, p in source.named_parameters()
            if p.dim() == 2
        }
        ticket = approximate(target, source, construction, support=support)
        assert Masks({n: ticket.masks[n] for n in support}) <= Masks(support)
        return ticket.error(cube(300, 3))

    dense, thin, widened = (
        sorted(error(rho, density, seed) for seed in range(3))[1]
        for rho, density in ((26, 1.0), (26, 0.4), (wide, 0.4))
    )
    assert thin > 100 * dense
    assert widened < 10 * dense


def test_tolerance_makes_small_tickets():
    _, _, precise = build(rho=40)
    _, _, small = build(rho=40, tolerance=0.01)
    assert small.masks.nonzeros < 0.6 * precise.masks.nonzeros
    assert max(float(layer.errors.max()) for layer in small.layers) <= 0.01
    assert small.error(cube(300, 3)) <= small.bound()


def test_zero_weights_cost_nothing_and_need_nothing():
    target = mlp(3, 4, 2)
    with torch.no_grad():
        target[0].weight[:, 1] = 0
        target[2].weight[0] = 0
        target[2].bias.zero_()
    source = source_for(target, "2L", 30, seed=0)
    ticket = approximate(target, source)
    assert [layer.problems for layer in ticket.layers] == [2 * 8 + 4, 4]
    assert not ticket.network[0].weight[:, 1].any()
    assert ticket.error(cube(200, 3)) < 0.01
    with torch.no_grad():
        target[2].weight.zero_()
    nothing = approximate(target, source)
    assert nothing.masks.nonzeros == 0
    assert nothing.error(cube(200, 3)) == 0


def test_single_precision_models_and_wider_sources_than_needed():
    target = mlp(3, 4, 2, dtype=torch.float32)
    source = source_for(mlp(3, 6, 2, dtype=torch.float32), "2L", 40, seed=0)
    assert source[0].weight.dtype == torch.float32
    ticket = approximate(target, source)
    assert not ticket.masks["2.weight"][4:].any()
    assert ticket.error(cube(200, 3)) < 2e-3


def test_the_same_call_gives_the_same_ticket_and_keeps_its_own_target():
    target, source, ticket = build()
    assert approximate(target, source).masks == ticket.masks
    x = cube(50, 3)
    error = ticket.error(x)
    with torch.no_grad():
        target[0].weight.zero_()
    assert ticket.error(x) == error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"construction": "3L"}, "unknown construction '3L'"),
        ({"headroom": 0.0}, "headroom"),
        ({"headroom": 1.5}, "headroom"),
        ({"tolerance": -0.1}, "tolerance"),
        ({"exact": 0}, "exact"),
        ({"construction": "L+1"}, "source must have 3 linear layers"),
        ({"target": mlp(2, 4, 2)}, r"source must have \(2, 2\) inputs and outputs"),
        ({"target": mlp(3, 9, 2)}, "source layer '2' must have 9 or more neurons, got 4"),
        ({"target": nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))}, "target"),
        ({"source": nn.Sequential(nn.ReLU())}, "source"),
        ({"support": {"0.weight": torch.ones(2, 2).bool()}}, "0.weight"),
        ({"support": {"7.weight": torch.ones(2, 2).bool()}}, "7.weight"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    target = mlp(3, 4, 2)
    source = source_for(target, "2L", 4, seed=0)
    with pytest.raises(ValueError, match=message):
        approximate(**({"target": target, "source": source} | change))


def test_the_constant_needs_a_neuron_of_its_own():
    target = mlp(3, 4, 2)
    source = source_for(mlp(3, 3, 2), "L+1", 1, seed=0)
    assert source[2].out_features == 4
    with pytest.raises(ValueError, match="source layer '2' must have 5 or more neurons, got 4"):
        approximate(target, source, "L+1")
