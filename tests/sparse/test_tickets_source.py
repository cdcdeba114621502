"""Random sources: their widths and the scales of their weights and biases."""

import math

import pytest
import torch
from torch import nn

from featherweight.sparse.tickets import source_for

TARGET = nn.Sequential(
    nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 2)
).double()


def linears(network):
    return [m for m in network if isinstance(m, nn.Linear)]


def widths(network):
    return [linears(network)[0].in_features, *(m.out_features for m in linears(network))]


def test_widths():
    assert widths(source_for(TARGET, "2L", 10, seed=0)) == [6, 70, 9, 100, 5, 60, 2]
    assert widths(source_for(TARGET, "L+1", 10, seed=0)) == [6, 140, 100, 60, 2]
    odd = source_for(TARGET, "2L", 1, law="looks-linear", seed=0)
    assert widths(odd) == [6, 8, 9, 10, 5, 6, 2]


@pytest.mark.parametrize(("law", "kurtosis"), [("uniform", 9 / 5), ("normal", 3.0)])
def test_weights_have_he_scale_and_biases_its_running_product(law, kurtosis):
    target = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40)).double()
    source = source_for(target, "2L", 100, law=law, bias_factor=0.5, seed=0)
    product = 0.5
    for linear in linears(source):
        sigma = math.sqrt(2 / linear.in_features)
        product *= sigma
        weight = linear.weight.detach()
        assert weight.std().item() == pytest.approx(sigma, rel=0.02)
        assert weight.mean().abs() < 0.02 * sigma
        assert (weight / sigma).pow(4).mean().item() == pytest.approx(kurtosis, rel=0.05)
        assert linear.bias.std().item() == pytest.approx(product, rel=0.35)
    # Golden value: He, 40 -> 4100 -> 40 -> 4100 -> 40.
    assert product == pytest.approx(0.5 * 4 / (40 * 4100), rel=1e-12)


def test_looks_linear_layers_come_in_pairs():
    source = source_for(TARGET, "2L", 10, law="looks-linear", seed=0)
    for first, second in zip(linears(source)[::2], linears(source)[1::2], strict=True):
        half = first.out_features // 2
        u = first.weight.detach()[:half]
        assert torch.equal(first.weight[half:], -u)
        assert torch.equal(first.bias[half:], -first.bias[:half])
        assert torch.equal(second.weight[:, half:], -second.weight[:, :half])
        torch.testing.assert_close(u.T @ u, torch.eye(u.shape[1]).double())
        v = second.weight.detach()[:, :half]
        torch.testing.assert_close(v @ v.T, torch.eye(len(v)).double())


def test_no_biases():
    source = source_for(TARGET, bias_factor=0, seed=0)
    assert all(m.bias is None for m in linears(source))


def test_same_seed_same_source():
    first, again, other = (source_for(TARGET, seed=s) for s in (1, 1, 2))
    drawn = source_for(TARGET, generator=torch.Generator().manual_seed(1))
    for a, b, c, d in zip(*(n.parameters() for n in (first, again, drawn, other)), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        assert not torch.equal(a, d)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"construction": "3L"}, "unknown construction '3L'"),
        ({"law": "cauchy"}, "unknown law for 2L 'cauchy'"),
        ({"law": "looks-linear", "construction": "L+1"}, "unknown law for L"),
        ({"width_factor": 0}, "width_factor"),
        ({"bias_factor": -1.0}, "bias_factor"),
        ({"seed": None}, "seed"),
        ({"target": nn.Sequential(nn.ReLU())}, "target"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        source_for(**({"target": TARGET, "seed": 0} | change))
