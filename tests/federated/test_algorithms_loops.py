"""Every algorithm, vectorised, against a plain loop over clients, with mini-batches."""

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from featherweight.federated.algorithms import (
    FedAvg,
    FedDyn,
    FedNova,
    FedProx,
    Mime,
    MimeLite,
    Scaffold,
)
from featherweight.federated.layout import Layout
from featherweight.federated.local import Local, Sgd
from featherweight.federated.sampling import Uniform
from featherweight.federated.simulate import simulate
from featherweight.federated.streams import stream
from featherweight.federated.work import plan
from tests.federated.networks import SIZES, digits_like, network
from tests.oracles import federated_algorithms as oracle

RATE, ROUNDS, CLIENTS = 0.2, 3, len(SIZES)
STEPS = torch.tensor([1, 6, 3, 4, 2, 5])
MODEL, POPULATION = network(dtype=torch.float64), digits_like(dtype=torch.float64)
LAYOUT, SAMPLER = Layout.of(MODEL), Uniform(CLIENTS, 4, seed=2)


def loss_on(indices):
    def loss(y):
        weights = {name: value[0] for name, value in LAYOUT.stacks(y[None]).items()}
        outputs = functional_call(MODEL, weights, (POPULATION.inputs[indices],))
        return cross_entropy(outputs, POPULATION.targets[indices])

    return loss


WHOLE = [loss_on(indices) for indices in POPULATION.clients]


def rounds_of(batch_size):
    """Yield each round's cohort and, client by client, the losses on its batches."""
    for number in range(ROUNDS):
        cohort = SAMPLER.cohort(number)
        batches = {}
        for client in cohort.tolist():
            alone = plan(
                POPULATION,
                torch.tensor([client]),
                STEPS[[client]],
                batch_size=batch_size,
                round=number,
                seed=stream(0, "batches"),
                limit=1,
            )[0]
            found = [alone.batch(step, 1) for step in range(int(STEPS[client]))]
            batches[client] = [
                loss_on(indices[0] if mask is None else indices[0][mask[0]])
                for indices, mask in found
            ]
        yield cohort.tolist(), [batches[client] for client in cohort.tolist()]


def run(algorithm, batch_size, backend="auto", **local):
    work = Local(RATE, steps=STEPS, batch_size=batch_size, **local)
    options = {"sampler": SAMPLER, "local": work, "backend": backend}
    simulation = simulate(MODEL, POPULATION, algorithm, **options)
    for _ in simulation.rounds(ROUNDS):
        pass
    return simulation.weights


def start():
    return LAYOUT.read(MODEL), torch.zeros(LAYOUT.length, dtype=torch.float64)


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["vectorized", "sequential"])
@pytest.mark.parametrize("batch_size", [None, 4])
def test_fedavg_and_fedprox_with_momentum(batch_size, backend):
    for mu, momentum in ((0.0, 0.0), (0.3, 0.8)):
        x, _ = start()
        for cohort, batches in rounds_of(batch_size):
            x = oracle.fedavg(x, batches, [SIZES[i] for i in cohort], RATE, mu, momentum)
        algorithm = FedProx(mu) if mu else FedAvg()
        same(run(algorithm, batch_size, backend, optimizer=Sgd(momentum=momentum)), x)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("mu", [0.0, 0.3])
def test_fednova(mu, momentum):
    if mu and momentum:
        pytest.skip("the paper gives the norm for one of the two")
    x, _ = start()
    for cohort, batches in rounds_of(4):
        x = oracle.fednova(x, batches, [SIZES[i] for i in cohort], RATE, mu, momentum)
    same(run(FedNova(mu), 4, optimizer=Sgd(momentum=momentum)), x)


@pytest.mark.parametrize("option", ["I", "II"])
def test_scaffold(option):
    (x, c), shares = start(), [size / sum(SIZES) for size in SIZES]
    own = [torch.zeros_like(x) for _ in SIZES]
    for cohort, batches in rounds_of(4):
        x, c = oracle.scaffold(x, c, own, cohort, batches, WHOLE, shares, RATE, option)
    same(run(Scaffold(option=option), 4), x)


@pytest.mark.parametrize("lite", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_mime(beta, lite):
    x, m = start()
    for cohort, batches in rounds_of(4):
        weights = [SIZES[i] for i in cohort]
        x, m = oracle.mime(x, m, cohort, batches, WHOLE, weights, RATE, beta, lite)
    same(run((MimeLite if lite else Mime)(beta), 4), x)


def test_feddyn():
    (x, h), shares = start(), [size / sum(SIZES) for size in SIZES]
    gradients = [torch.zeros_like(x) for _ in SIZES]
    for cohort, batches in rounds_of(4):
        x, h = oracle.feddyn(x, h, gradients, cohort, batches, shares, RATE, 0.4)
    same(run(FedDyn(0.4), 4), x)
