"""Where algorithms end on quadratics, against closed forms."""

import pytest
import torch

from featherweight.federated.algorithms import (
    FedAvg,
    FedDyn,
    FedNova,
    FedProx,
    Mime,
    MimeLite,
    Scaffold,
)
from featherweight.federated.local import Sgd
from featherweight.federated.sampling import Everyone, Uniform
from featherweight.federated.simulate import simulate
from tests.federated.quadratics import Quadratics

STEPS = torch.tensor([1, 2, 2, 4, 5])
RATE = 0.1


def run(problem, algorithm, rounds=120, size=None, **options):
    clients = len(problem.a)
    sampler = Everyone(clients) if size is None else Uniform(clients, size, seed=3)
    local = problem.local(**{"steps": STEPS, "learning_rate": RATE, **options})
    simulation = simulate(
        problem.model, problem.population, algorithm, sampler=sampler, local=local
    )
    for _ in simulation.rounds(rounds):
        pass
    return simulation


def test_fedavg_ends_at_the_fixed_point_of_unequal_steps():
    problem = Quadratics.draw()
    expected = problem.balance(problem.contraction(STEPS, RATE))
    torch.testing.assert_close(run(problem, FedAvg()).weights, expected, rtol=0, atol=1e-13)
    assert (expected - problem.optimum).norm() > 0.05


def test_fedavg_with_small_rates_optimises_the_objective_weighted_by_steps():
    problem = Quadratics.draw()
    surrogate = problem.balance(STEPS.double()[:, None, None] * problem.a)
    found = run(problem, FedAvg(), rounds=150, learning_rate=0.02).weights
    assert (found - surrogate).norm() < 0.1 * (surrogate - problem.optimum).norm()


def test_fednova_ends_at_its_fixed_point():
    problem = Quadratics.draw()
    matrices = problem.contraction(STEPS, RATE) / STEPS.double()[:, None, None]
    found = run(problem, FedNova(), rounds=120).weights
    torch.testing.assert_close(found, problem.balance(matrices), rtol=0, atol=1e-13)


@pytest.mark.parametrize("optimizer", [Sgd(momentum=0.8), Sgd(momentum=0.8, nesterov=True)])
def test_fednova_with_small_rates_ends_at_the_optimum(optimizer):
    problem = Quadratics.draw()
    biased = run(problem, FedAvg(), 150, learning_rate=0.02, optimizer=optimizer).weights
    found = run(problem, FedNova(), 150, learning_rate=0.02, optimizer=optimizer).weights
    far = (biased - problem.optimum).norm()
    assert far > 0.05
    assert (found - problem.optimum).norm() < 0.1 * far


@pytest.mark.parametrize("mu", [0.1, 1.0, 2.0])
def test_fedprox_ends_at_its_fixed_point(mu):
    problem = Quadratics.draw()
    identity = torch.eye(4, dtype=torch.float64)
    inner = torch.linalg.solve(problem.a + mu * identity, problem.a)
    expected = problem.balance(problem.contraction(STEPS, RATE, mu) @ inner)
    found = run(problem, FedProx(mu), rounds=150).weights
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_fedprox_with_exact_local_solves_nears_the_optimum_as_mu_grows():
    problem = Quadratics.draw()
    errors = []
    for mu in (0.1, 1.0, 5.0):
        rate = 1 / (1.1 + mu)
        found = run(problem, FedProx(mu), rounds=60, steps=10, learning_rate=rate).weights
        errors.append(float((found - problem.optimum).norm()))
    assert errors[0] > 1.5 * errors[1] > 3 * errors[2]


@pytest.mark.parametrize("option", ["I", "II"])
@pytest.mark.parametrize("size", [None, 2])
def test_scaffold_ends_at_the_optimum_with_the_clients_gradients_as_variates(option, size):
    problem = Quadratics.draw()
    simulation = run(
        problem, Scaffold(option=option), rounds=90 if size is None else 250, size=size
    )
    algorithm, gradients = simulation.algorithm, problem.gradients(problem.optimum)
    torch.testing.assert_close(simulation.weights, problem.optimum, rtol=0, atol=1e-9)
    own = algorithm.own[torch.arange(5)]
    torch.testing.assert_close(own, gradients, rtol=0, atol=1e-8)


@pytest.mark.parametrize("option", ["I", "II"])
def test_scaffolds_server_variate_is_always_the_mean_of_the_clients(option):
    problem = Quadratics.draw()
    sampler = Uniform(5, 2, seed=1)
    simulation = simulate(
        problem.model,
        problem.population,
        Scaffold(option=option),
        sampler=sampler,
        local=problem.local(steps=STEPS),
    )
    for _ in simulation.rounds(30):
        mean = problem.shares @ simulation.algorithm.own[torch.arange(5)]
        torch.testing.assert_close(simulation.algorithm.variate, mean, rtol=0, atol=1e-12)
    assert mean.norm() > 0


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_mime_ends_at_the_optimum(momentum):
    problem = Quadratics.draw()
    found = run(problem, Mime(momentum), rounds=150).weights
    torch.testing.assert_close(found, problem.optimum, rtol=0, atol=1e-10)


def test_mime_lite_does_not():
    problem = Quadratics.draw()
    found = run(problem, MimeLite(0.5), rounds=150).weights
    assert (found - problem.optimum).norm() > 0.03


@pytest.mark.parametrize("size", [None, 2])
def test_feddyn_ends_at_the_optimum_with_minus_the_gradients_as_multipliers(size):
    problem = Quadratics.draw()
    options = {"rounds": 60 if size is None else 200, "steps": 12, "size": size}
    simulation = run(problem, FedDyn(mu=1.0), **options)
    torch.testing.assert_close(simulation.weights, problem.optimum, rtol=0, atol=1e-8)
    own = simulation.algorithm.own[torch.arange(5)]
    gradients = problem.gradients(problem.optimum)
    torch.testing.assert_close(own, -gradients, rtol=0, atol=1e-7)


def test_one_full_step_of_all_clients_is_gradient_descent():
    problem = Quadratics.draw()
    found, x = run(problem, FedAvg(), rounds=20, steps=1).weights, torch.zeros(4).double()
    for _ in range(20):
        x = x - RATE * problem.shares @ problem.gradients(x)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-15)


def test_uniform_weights_optimise_the_plain_mean():
    problem = Quadratics.draw()
    plain = Quadratics(problem.a, problem.c, torch.ones(5, dtype=torch.int64))
    simulation = simulate(
        problem.model,
        problem.population,
        FedAvg(),
        sampler=Everyone(5),
        local=problem.local(steps=1, learning_rate=0.8),
        weighting="uniform",
    )
    for _ in simulation.rounds(60):
        pass
    torch.testing.assert_close(simulation.weights, plain.optimum, rtol=0, atol=1e-12)
