"""From a recipe's fit to an optimizer, and where weights start."""

import math

import pytest
import torch
from torch import nn

from featherweight.lab.digits import Task, accuracy, tasks, train
from featherweight.lab.errors import BadInput
from featherweight.lab.optimizer import make_optimizer
from featherweight.lab.parse import build
from featherweight.lab.selective_adam import SelectiveAdam, large_gradients, small_weights
from featherweight.lab.shifted_relu import FLOOR
from featherweight.optim import HamAdamW, HamSGD, NanoAdam


def fit(**changes):
    return build({"fit": changes}).fit


def model():
    return nn.Sequential(nn.Linear(80, 70), nn.BatchNorm1d(70), nn.ReLU(), nn.Linear(70, 10))


def test_ham_acts_on_weights_alone():
    network = model()
    for name, kind in (("ham-sgd", HamSGD), ("ham-adamw", HamAdamW)):
        optimizer = make_optimizer(network, fit(optimizer=name, options={"alpha": 7.0}))
        assert type(optimizer) is kind
        acted = [
            p for group in optimizer.param_groups if group["ham_alpha"] for p in group["params"]
        ]
        assert {id(p) for p in acted} == {id(network[0].weight), id(network[3].weight)}
        assert sum(len(group["params"]) for group in optimizer.param_groups) == 6


def test_nanoadam_trains_norms_biases_and_head_whole():
    network = model()
    optimizer = make_optimizer(network, fit(optimizer="nanoadam", options={"density": 0.2}))
    assert isinstance(optimizer, NanoAdam)
    selected = [g for g in optimizer.param_groups if g["density"] != 1]
    assert [p for group in selected for p in group["params"]] == [network[0].weight]


def test_single_numbers_get_a_rate_of_their_own():
    network = nn.Linear(3, 1)
    optimizer = make_optimizer(network, fit(scalar_rate=0.1))
    assert optimizer.param_groups[1]["params"] == [network.bias]
    assert optimizer.param_groups[1]["rate_factor"] == 0.1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer": "ham-sgd"}, "alpha"),
        ({"optimizer": "ham-sgd", "options": {"alfa": 1}}, "did you mean 'alpha'"),
        ({"optimizer": "sgd", "options": {"alpha": 1}}, "sgd has none"),
        ({"optimizer": "nanoadam", "options": {"lr": 1}}, "unknown option of nanoadam 'lr'"),
    ],
)
def test_options_of_the_optimizer_are_checked_with_the_recipe(changes, said):
    with pytest.raises(BadInput, match=said):
        fit(**changes)


def test_values_out_of_range_and_forms_are_refused():
    with pytest.raises(BadInput, match="density"):
        make_optimizer(model(), fit(optimizer="nanoadam", options={"density": 2.0}))
    with pytest.raises(BadInput, match="form"):
        make_optimizer(model(), fit(optimizer="nanoadam"), formed=True)


@pytest.mark.parametrize("options", [{"init": "risotto", "init_options": {"alfa": 1}}])
def test_options_of_the_initialisation_are_checked(options):
    with pytest.raises(BadInput, match="did you mean 'alpha'"):
        build({"model": options})


def test_selection_by_small_weights_walks_as_nanoadam():
    start = torch.randn(40, 30, dtype=torch.float64)
    ends = []
    for make in (
        lambda p: NanoAdam([p], 1e-2, density=0.2, mask_interval=3, min_size=1),
        lambda p: SelectiveAdam([p], 1e-2, 0.2, 3, small_weights),
    ):
        parameter = nn.Parameter(start.clone())
        optimizer, generator = make(parameter), torch.Generator().manual_seed(0)
        for _ in range(20):
            parameter.grad = torch.randn(40, 30, generator=generator, dtype=torch.float64)
            optimizer.step()
        ends.append(parameter.detach())
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-14)


def test_selection_by_large_gradients_moves_those_alone():
    parameter = nn.Parameter(torch.zeros(10))
    optimizer = SelectiveAdam([parameter], 0.1, 0.2, 100, large_gradients)
    parameter.grad = torch.arange(10.0)
    optimizer.step()
    assert parameter.detach().nonzero().flatten().tolist() == [8, 9]


def test_digits_are_divided_by_class_and_learned():
    some, rest = tasks("train", [range(5), range(5, 10)])
    assert len(some.labels) + len(rest.labels) == 1000
    assert set(rest.labels.tolist()) == {0, 1, 2, 3, 4}
    everything = tasks("train", [range(10)])[0].images
    assert everything.mean().abs() < 1e-2
    assert everything.std() == pytest.approx(1, abs=1e-2)
    network = nn.Linear(64, 5)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    train(network, optimizer, some, 60, seed=0)
    assert accuracy(network, tasks("test", [range(5)])[0]) > 0.9
    assert optimizer.param_groups[0]["lr"] < 1e-4
    assert isinstance(some, Task)


def test_the_floor_of_networks_without_biases_is_that_of_two_half_lines():
    x = torch.linspace(-1, 1, 400_001, dtype=torch.float64)
    y = (x + 0.5).relu()
    left, right = x.clamp(max=0), x.clamp(min=0)
    error = y - sum(side * (side @ y) / (side @ side) for side in (left, right))
    assert math.isclose(float(error.square().mean()), FLOOR, rel_tol=1e-3)
