"""Limits in which one algorithm is another, and server optimizers against torch's."""

import pytest
import torch
from torch import nn

from featherweight.federated.algorithms import (
    ALGORITHMS,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedDyn,
    FedNova,
    FedProx,
    FedYogi,
    Mime,
    MimeLite,
    Scaffold,
)
from featherweight.federated.local import Adam, Local, Sgd
from featherweight.federated.sampling import Uniform
from featherweight.federated.server import Adaptive, ServerSgd, adagrad, adam, yogi
from featherweight.federated.simulate import simulate
from tests.federated.networks import digits_like, network
from tests.oracles import federated_algorithms as oracle


def run(algorithm, rounds=3, **local):
    options = {"steps": 4, "batch_size": 5, "learning_rate": 0.2, **local}
    simulation = simulate(
        network(), digits_like(), algorithm, sampler=Uniform(6, 3), local=Local(**options)
    )
    for _ in simulation.rounds(rounds):
        pass
    return simulation.weights


@pytest.mark.parametrize(
    "same",
    [FedProx(mu=0.0), FedAvgM(momentum=0.0), MimeLite(momentum=0.0)],
    ids=lambda algorithm: type(algorithm).__name__,
)
def test_equals_fedavg_bit_for_bit(same):
    assert torch.equal(run(same), run(FedAvg()))


def test_scaffold_with_zero_variates_equals_fedavg_bit_for_bit():
    uniform = {"rounds": 1}
    assert torch.equal(run(Scaffold(), **uniform), run(FedAvg(), **uniform))
    assert not torch.equal(run(Scaffold()), run(FedAvg()))


def test_fednova_with_equal_steps_equals_fedavg():
    torch.testing.assert_close(run(FedNova()), run(FedAvg()), rtol=1e-5, atol=1e-6)
    with_momentum = {"optimizer": Sgd(momentum=0.7)}
    expected = run(FedAvg(), **with_momentum)
    torch.testing.assert_close(run(FedNova(), **with_momentum), expected, rtol=1e-5, atol=1e-6)


def test_mime_with_one_step_equals_mime_lite_whose_batch_is_all_data():
    one = {"steps": 1, "batch_size": None}
    torch.testing.assert_close(run(Mime(0.5), **one), run(MimeLite(0.5), **one))


@pytest.mark.parametrize("make", [FedAdagrad, FedAdam, FedYogi])
def test_adaptive_servers_with_a_large_epsilon_and_no_memory_equal_fedavg(make):
    large = 1e6
    options = {} if make is FedAdagrad else {"betas": (0.0, 0.0), "bias_correction": "none"}
    found = run(make(server_rate=large, epsilon=large, **options))
    torch.testing.assert_close(found, run(FedAvg()), rtol=1e-5, atol=1e-5)


def test_feddyn_with_a_tiny_mu_takes_fedavgs_local_steps():
    start, moved = network(), run(FedAvg(), rounds=1)
    before = nn.utils.parameters_to_vector(start.parameters())
    # the server adds the mean multiplier over mu: half of the cohort's mean, 3 of 6 clients
    share = run(FedDyn(mu=1e-6), rounds=1) - moved
    ratio = share.norm() / (moved - before).norm()
    assert 0.2 < ratio < 0.8


TORCH = {
    "sgd": (lambda: ServerSgd(0.3), lambda p: torch.optim.SGD(p, 0.3)),
    "momentum": (lambda: ServerSgd(0.3, 0.8), lambda p: torch.optim.SGD(p, 0.3, momentum=0.8)),
    "adam": (
        lambda: Adaptive(adam, 0.1, (0.9, 0.99), 1e-3, 0.0, "adam"),
        lambda p: torch.optim.Adam(p, 0.1, (0.9, 0.99), 1e-3),
    ),
    "adagrad": (
        lambda: Adaptive(adagrad, 0.1, (0.0, 0.0), 1e-3, 0.04),
        lambda p: torch.optim.Adagrad(p, 0.1, eps=1e-3, initial_accumulator_value=0.04),
    ),
}


@pytest.mark.parametrize("name", TORCH)
def test_server_optimizer_is_torchs(name):
    make, peer = TORCH[name]
    mine, place = make(), torch.zeros(7, dtype=torch.float64)
    theirs = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    optimizer = peer([theirs])
    for round in range(6):
        update = torch.randn(7, dtype=torch.float64)
        place = mine.step(place, update, round)
        theirs.grad = -update
        optimizer.step()
    torch.testing.assert_close(place, theirs.detach(), rtol=1e-12, atol=1e-14)


SLOW = {
    "yogi": (Adaptive(yogi, 0.1, (0.9, 0.95), 0.01, 0.3), oracle.yogi, ((0.9, 0.95), 0.01, 0.3)),
    "keras": (
        Adaptive(adam, 0.1, (0.9, 0.95), 0.01, 0.0, "keras"),
        oracle.keras_adam,
        ((0.9, 0.95), 0.01),
    ),
}


@pytest.mark.parametrize("name", SLOW)
def test_server_optimizer_is_the_papers(name):
    mine, slow, options = SLOW[name]
    updates = [0.5, -0.2, 1.5, 0.01, 0.0, -0.7]
    place, path = torch.zeros(1, dtype=torch.float64), []
    for round, update in enumerate(updates):
        place = mine.step(place, torch.tensor([update], dtype=torch.float64), round)
        path.append(float(place))
    assert path == pytest.approx(slow(updates, 0.1, *options), rel=1e-12)


CLIENTS = {
    "momentum": (Sgd(momentum=0.9), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
    "all of SGD": (
        Sgd(momentum=0.9, nesterov=True, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    ),
    "adam": (Adam((0.8, 0.9), 1e-4), lambda p: torch.optim.Adam(p, 0.1, (0.8, 0.9), 1e-4)),
}


@pytest.mark.parametrize("name", CLIENTS)
def test_client_optimizer_is_torchs_and_stops_for_clients_that_are_done(name):
    mine, peer = CLIENTS[name]
    weights = torch.randn(3, 5, dtype=torch.float64)
    theirs = [row.clone().requires_grad_() for row in weights]
    optimizers = [peer([row]) for row in theirs]
    state = mine.start(weights)
    for rows in (3, 3, 2, 1, 1):
        gradient = torch.randn(rows, 5, dtype=torch.float64)
        mine.step_(weights[:rows], gradient.clone(), state, 0.1)
        for row, optimizer, own in zip(theirs, optimizers, gradient, strict=False):
            row.grad = own
            optimizer.step()
    torch.testing.assert_close(weights, torch.stack(theirs).detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_registered_algorithm_learns(name):
    options = ALGORITHMS[name].defaults
    algorithm = ALGORITHMS[name].method(**options)
    simulation = simulate(
        network(),
        digits_like(),
        algorithm,
        sampler=Uniform(6, 4),
        local=Local(steps=4, learning_rate=0.1),
    )
    losses = [record.train_loss for record in simulation.rounds(12)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: FedAvg(0.0), "server_rate"),
        (lambda: FedAvg(float("inf")), "server_rate"),
        (lambda: FedAvgM(momentum=1.0), "momentum"),
        (lambda: FedAdam(epsilon=0.0), "epsilon"),
        (lambda: FedAdam(betas=(0.9, 1.0)), "betas"),
        (lambda: FedAdam(bias_correction="tf"), "bias_correction 'tf'"),
        (lambda: FedYogi(initial=-1.0), "initial"),
        (lambda: FedProx(-1.0), "mu"),
        (lambda: FedNova(-1.0), "mu"),
        (lambda: FedDyn(0.0), "mu"),
        (lambda: Scaffold(option="III"), "option 'III'"),
        (lambda: Mime(1.0), "momentum"),
    ],
)
def test_refuses_a_bad_argument(make, named):
    with pytest.raises(ValueError, match=named):
        make()


@pytest.mark.parametrize("make", [Scaffold, FedNova, Mime])
def test_refuses_client_optimizers_that_its_formulas_do_not_hold_for(make):
    with pytest.raises(ValueError, match=r"optimizer=Sgd\(\), got Adam"):
        run(make(), optimizer=Adam())
    if make is not FedNova:
        with pytest.raises(ValueError, match=r"without momentum, got 0\.9"):
            run(make(), optimizer=Sgd(momentum=0.9))
