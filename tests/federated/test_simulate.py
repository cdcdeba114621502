import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from featherweight.federated.algorithms import (
    ALGORITHMS,
    FedAdam,
    FedAvg,
    FedDyn,
    FedNova,
    Mime,
    MimeLite,
    Scaffold,
)
from featherweight.federated.algorithms.base import ClientVectors
from featherweight.federated.codecs.identity import Identity
from featherweight.federated.local import Local, Sgd
from featherweight.federated.privacy import Privacy
from featherweight.federated.sampling import BySize, Everyone, Poisson, Uniform, WithReplacement
from featherweight.federated.simulate import simulate
from featherweight.federated.wire import HEADER_BYTES
from tests.federated.networks import SIZES, digits_like, network

LOCAL = Local(0.1, epochs=2, batch_size=4)


def federation(algorithm=None, model=None, population=None, local=LOCAL, sampler=None, **options):
    return simulate(
        network() if model is None else model,
        digits_like() if population is None else population,
        FedAvg() if algorithm is None else algorithm,
        sampler=Uniform(len(SIZES), 4, seed=1) if sampler is None else sampler,
        local=local,
        **options,
    )


def after(simulation, rounds=3):
    for _ in simulation.rounds(rounds):
        pass
    return simulation.weights


def test_record_tells_steps_examples_and_losses_exactly():
    simulation = federation(sampler=Everyone(6))
    (record,) = simulation.rounds(1)
    sizes = torch.tensor(SIZES)
    assert record.round == 0
    assert simulation.round == 1
    assert record.cohort.tolist() == list(range(6))
    assert record.examples.tolist() == (2 * sizes).tolist()
    assert record.steps.tolist() == [2 * -(-size // 4) for size in SIZES]
    assert record.train_loss == pytest.approx(float(record.client_losses.mean()))
    assert record.client_rate == 0.1
    assert not record.refused
    population, model = digits_like(), network()
    one = federation(sampler=Everyone(6), local=Local(0.1, steps=1))
    (record,) = one.rounds(1)
    for client, loss in enumerate(record.start_losses.tolist()):
        inputs, targets = population.client(client)
        expected = nn.functional.cross_entropy(model(inputs), targets)
        assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(record.start_losses, record.client_losses)


VECTORS = [
    (FedAvg(), 1, 1),
    (FedAdam(), 1, 1),
    (FedNova(), 1, 1),
    (FedDyn(), 1, 1),
    (Scaffold(), 2, 2),
    (Mime(), 2, 2),
    (Mime(0.9), 2, 3),
    (MimeLite(), 2, 2),
    (MimeLite(0.0), 1, 1),
]


@pytest.mark.parametrize(("algorithm", "up", "down"), VECTORS)
def test_bytes_are_those_of_the_vectors_that_travel(algorithm, up, down):
    vector = 4 * sum(weight.numel() for weight in network().parameters())
    (record,) = federation(algorithm).rounds(1)
    assert record.bytes_up.tolist() == [up * vector] * 4
    assert record.bytes_down.tolist() == [down * vector] * 4
    assert (algorithm.uplink, algorithm.downlink) == (up, down)
    (record,) = federation(algorithm, codec=Identity()).rounds(1)
    assert record.bytes_up.tolist() == [up * (vector + HEADER_BYTES)] * 4


def test_gradients_over_all_examples_and_anchors_are_counted():
    sizes = torch.tensor(SIZES)
    for algorithm, passes in ((Mime(), 5), (MimeLite(), 3), (Scaffold(option="I"), 3)):
        (record,) = federation(algorithm, sampler=Everyone(6)).rounds(1)
        assert record.examples.tolist() == (passes * sizes).tolist()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_identity_codec_changes_nothing(name):
    make = ALGORITHMS[name].method
    plain, coded = (after(federation(make(), codec=codec)) for codec in (None, Identity()))
    torch.testing.assert_close(coded, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("options", [{"side_by_side": 2}, {"backend": "sequential"}])
def test_how_clients_are_grouped_changes_nothing(name, options):
    make = ALGORITHMS[name].method
    plain = after(federation(make()))
    torch.testing.assert_close(after(federation(make(), **options)), plain, rtol=1e-4, atol=1e-5)


def test_two_algorithms_see_the_same_cohorts_and_batches():
    first, second = federation(FedAvg()), federation(FedAdam())
    for mine, theirs in zip(first.rounds(4), second.rounds(4), strict=True):
        assert torch.equal(mine.cohort, theirs.cohort)
        assert torch.equal(mine.examples, theirs.examples)
    assert torch.equal(after(federation(), 1), after(federation(), 1))
    assert not torch.equal(after(federation(seed=1), 1), after(federation(), 1))


def with_dropout():
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.4), nn.Linear(8, 3))


CHOICES = {
    **{name: {"algorithm": ALGORITHMS[name].method()} for name in ALGORITHMS},
    "codec": {"codec": Identity()},
    "dropout": {"model": with_dropout()},
    "momentum": {"local": Local(0.1, steps=3, optimizer=Sgd(momentum=0.9))},
    "privacy": {
        "privacy": Privacy(1.0, 0.3, quantile=0.5, count_noise=1.0),
        "weighting": "uniform",
        "sampler": Poisson(6, 3.0),
    },
    "norms": {"model": nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))},
}


@pytest.mark.parametrize("name", CHOICES)
def test_resumes_exactly(name):
    options = CHOICES[name]
    local = Local(0.1, steps=3, batch_size=None if name == "norms" else 4)
    options = {"local": local, "population": digits_like((4, 8, 5, 12, 5, 2)), **options}
    whole = federation(**options)
    after(whole, 3)
    kept = copy.deepcopy(whole.state_dict())
    expected = [after(whole, 1) for _ in range(3)]
    resumed = federation(**options)
    resumed.load_state_dict(kept)
    assert resumed.round == 3
    for weights in expected:
        assert torch.equal(after(resumed, 1), weights)
    assert torch.equal(resumed.state_dict()["buffers"], whole.state_dict()["buffers"])


SCRIPT = """
import sys, torch
sys.path.insert(0, {root!r})
from featherweight.federated.algorithms import Scaffold
from tests.federated.test_simulate import after, federation
simulation = federation(Scaffold())
simulation.load_state_dict(torch.load({path!r}, weights_only=True))
torch.save(after(simulation), {path!r})
"""


def test_a_fresh_process_resumes_exactly_and_loads_no_compiler(tmp_path):
    simulation, path = federation(Scaffold()), str(tmp_path / "state.pt")
    after(simulation)
    torch.save(simulation.state_dict(), path)
    import tests

    root = str(tests.__path__[0]).removesuffix("tests")
    check = "\nassert 'torch._dynamo' not in sys.modules"
    script = SCRIPT.format(root=root, path=path) + check
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    assert torch.equal(torch.load(path, weights_only=True), after(simulation))


def test_refuses_the_state_of_another():
    state = federation().state_dict()
    with pytest.raises(ValueError, match="seed 1, got"):
        federation(seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="state must be of 21 weights"):
        federation(model=nn.Linear(6, 3)).load_state_dict(state)


def test_leaves_arguments_generator_and_threads_as_they_were():
    model, algorithm, before = with_dropout(), Scaffold(), torch.get_rng_state()
    start, threads = copy.deepcopy(model.state_dict()), torch.get_num_threads()
    simulation = federation(algorithm, model)
    assert (after(simulation) - nn.utils.parameters_to_vector(model.parameters())).norm() > 0
    assert all(torch.equal(start[name], value) for name, value in model.state_dict().items())
    assert vars(algorithm) == vars(Scaffold()) | {"server": algorithm.server}
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    found = nn.utils.parameters_to_vector(simulation.model.parameters())
    assert torch.equal(found.detach(), simulation.weights)


def test_a_client_that_diverges_is_left_out_and_named():
    population = digits_like()
    population.inputs[population.clients[2]] = torch.inf
    with_it = federation(population=population, sampler=Everyone(6))
    (record,) = with_it.rounds(1)
    assert record.refused == {2: "its update is not finite"}
    assert record.train_loss != record.train_loss
    without = digits_like()
    clients = tuple(indices for i, indices in enumerate(without.clients) if i != 2)
    others = federation(
        population=type(without)(without.inputs, without.targets, clients),
        sampler=Everyone(5),
        local=Local(0.1, epochs=2),
    )
    again = federation(population=population, sampler=Everyone(6), local=Local(0.1, epochs=2))
    torch.testing.assert_close(after(again, 2), after(others, 2), rtol=1e-5, atol=1e-6)


def test_what_a_refused_client_would_have_added_to_the_servers_variate_is_left_out():
    population = digits_like()
    population.inputs[population.clients[2]] = torch.inf
    simulation = federation(Scaffold(), population=population, sampler=Everyone(6))
    after(simulation, 2)
    shares = torch.tensor(SIZES) / sum(SIZES)
    own = simulation.algorithm.own[torch.arange(6)]
    torch.testing.assert_close(simulation.algorithm.variate, shares @ own)
    assert own[2].abs().max() == 0 < own[1].abs().max()


def test_dropout_draws_anew_in_each_round():
    local = Local(1e-9, steps=1)
    simulation = federation(model=with_dropout(), local=local, sampler=Everyone(6))
    first, second = simulation.rounds(2)
    assert (first.start_losses - second.start_losses).abs().max() > 1e-3


@pytest.mark.parametrize("algorithm", [FedAvg(), Scaffold(), Mime()])
def test_a_round_without_clients_changes_nothing(algorithm):
    class Nobody:
        def cohort(self, round):
            return torch.empty(0, dtype=torch.int64)

    simulation = federation(algorithm, sampler=Nobody())
    before = simulation.weights
    (record,) = simulation.rounds(1)
    assert torch.equal(simulation.weights, before)
    assert len(record.cohort) == len(record.bytes_up) == 0
    assert record.train_loss != record.train_loss


class Fixed:
    def __init__(self, *ids):
        self.ids = ids

    def cohort(self, round):
        return torch.tensor(self.ids)


def test_a_client_drawn_twice_counts_twice_and_trains_once():
    simulation = federation(sampler=Fixed(1, 3, 1), weighting="uniform")
    (record,) = simulation.rounds(1)
    assert record.cohort.tolist() == [1, 3]
    alone = [after(federation(sampler=Fixed(client)), 1) for client in (1, 3)]
    expected = (2 * alone[0] + alone[1]) / 3
    torch.testing.assert_close(simulation.weights, expected)
    with pytest.raises(ValueError, match="names a client twice; Scaffold needs"):
        after(federation(Scaffold(), sampler=Fixed(1, 3, 1)), 1)


def mean_over_cohorts(cohorts, weighting):
    start = federation().weights
    moves = [
        after(federation(sampler=Fixed(*cohort), weighting=weighting), 1) - start
        for cohort in cohorts
    ]
    return torch.stack(moves).double().mean(0)


def test_unbiased_weighting_is_and_algorithm_1_is_not():
    everyone = mean_over_cohorts([range(6)], "examples")
    pairs = [(i, j) for i in range(6) for j in range(i)]
    unbiased = mean_over_cohorts(pairs, "unbiased")
    ratio = mean_over_cohorts(pairs, "examples")
    torch.testing.assert_close(unbiased, everyone, rtol=1e-4, atol=1e-6)
    assert (ratio - everyone).norm() > 0.01 * everyone.norm()


def test_sampling_by_size_with_uniform_weights_is_unbiased():
    everyone = mean_over_cohorts([range(6)], "examples")
    draws = [(i,) for i in range(6) for _ in range(SIZES[i])]
    torch.testing.assert_close(mean_over_cohorts(draws, "uniform"), everyone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sampler", [WithReplacement(6, 9), BySize(torch.tensor(SIZES), 9)])
def test_samplers_with_replacement_run(sampler):
    assert after(federation(sampler=sampler, weighting="uniform")).isfinite().all()


def test_weights_may_be_a_function():
    by_function = federation(weighting=lambda ids: torch.tensor(SIZES)[ids].double())
    assert torch.equal(after(by_function), after(federation()))
    with pytest.raises(ValueError, match="one finite weight above 0"):
        federation(weighting=lambda ids: torch.zeros(6))


def test_norms_statistics_are_averaged_and_counted():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    sizes = (4, 8, 4, 8, 4, 4)
    options = {"population": digits_like(sizes), "model": model, "local": Local(0.1, steps=1)}
    simulation = federation(sampler=Everyone(6), **options)
    (record,) = simulation.rounds(1)
    means = []
    for client in range(6):
        own = copy.deepcopy(model).train()
        own(digits_like(sizes).client(client)[0])
        means.append(own[1].running_mean)
    expected = torch.tensor(sizes).float() @ torch.stack(means) / sum(sizes)
    torch.testing.assert_close(simulation.model[1].running_mean, expected)
    vectors = sum(weight.numel() for weight in model.parameters()) + 8
    assert record.bytes_up.tolist() == record.bytes_down.tolist() == [4 * vectors] * 6


def test_evaluates_in_evaluation_mode_when_asked():
    seen = []

    def evaluate(model):
        seen.append(model.training)
        return {"weight": next(model.parameters()).sum().item()}

    simulation = federation(evaluate=evaluate, evaluate_every=2)
    metrics = [record.metrics for record in simulation.rounds(4)]
    assert [bool(found) for found in metrics] == [False, True, False, True]
    assert seen == [False, False]
    assert metrics[3]["weight"] == pytest.approx(float(simulation.weights[:48].sum()))


def test_rates_follow_their_schedules():
    local = Local(lambda round: 0.1 / (1 + round), steps=1)
    simulation = federation(FedAvg(lambda round: 1.0 + round), local=local)
    records = list(simulation.rounds(3))
    assert [record.server_rate for record in records] == [1.0, 2.0, 3.0]
    assert [record.client_rate for record in records] == [0.1, 0.05, pytest.approx(0.1 / 3)]


def test_ten_thousand_clients_vectors_take_memory_only_where_written():
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("resident memory is read from /proc")
    before = int(statm.read_text().split()[1])
    vectors = ClientVectors(10_000, 50_000, torch.zeros(0))
    vectors.add(torch.tensor([3, 9_999]), torch.ones(2, 50_000))
    assert vectors[torch.tensor([0, 3])].sum(1).tolist() == [0.0, 50_000.0]
    pages = int(statm.read_text().split()[1]) - before
    assert pages * 4096 < 64 * 2**20  # of 2 GB
    state = vectors.state_dict()
    assert state["clients"].tolist() == [3, 9_999]
    other = ClientVectors(10_000, 50_000, torch.zeros(0))
    other.add(torch.tensor([5]), torch.ones(1, 50_000))
    other.load_state_dict(state)
    assert other[torch.tensor([5, 3])].sum(1).tolist() == [0.0, 50_000.0]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"weighting": "size"}, "unknown weighting 'size'"),
        ({"evaluate_every": 0}, "evaluate_every"),
        ({"threads": 0}, "threads"),
        ({"side_by_side": 0}, "side_by_side"),
        ({"privacy": Privacy(1.0, 1.0)}, "needs a sampler .* got Uniform"),
        ({"privacy": Privacy(1.0, 1.0), "sampler": Poisson(6, 3)}, "weighting='uniform'"),
        ({"algorithm": Scaffold(), "privacy": Privacy(1.0, 1.0)}, "Scaffold learns more"),
    ],
)
def test_refuses_what_does_not_go_together(options, named):
    with pytest.raises(ValueError, match=named):
        federation(**options)


def test_refuses_unknown_clients_when_they_are_drawn():
    with pytest.raises(ValueError, match=r"round 0: ids must lie in \[0, 6\), got 2 to 6"):
        after(federation(sampler=Fixed(2, 6)), 1)
