import pytest
import torch

pytest.importorskip("flwr")

from featherweight.federated.algorithms import (
    FedAdam,
    FedAvg,
    FedDyn,
    FedNova,
    FedProx,
    Mime,
    MimeLite,
    Scaffold,
)
from featherweight.federated.codecs import CODECS
from featherweight.federated.flower import FlowerStrategy, client_app
from featherweight.federated.local import Local
from featherweight.federated.privacy import Privacy
from featherweight.federated.sampling import SAMPLERS

from .loop import LoopGrid
from .population import CLIENTS, make_simulation

ALGORITHMS = {
    "fedavg": lambda: FedAvg(0.7),
    "fedadam": lambda: FedAdam(0.05),
    "fedprox": lambda: FedProx(0.3),
    "scaffold-i": lambda: Scaffold(option="I"),
    "scaffold-ii": lambda: Scaffold(),
    "feddyn": lambda: FedDyn(0.2),
    "fednova": lambda: FedNova(0.1),
    "mime": lambda: Mime(0.5),
    "mime-no-momentum": lambda: Mime(),
    "mime-lite": lambda: MimeLite(0.9),
}
CODEC_OPTIONS = {
    "identity": {},
    "rand-k": {"k": 0.3},
    "rand-k-spatial": {"k": 0.3},
    "rand-k-temporal": {"k": 0.3},
    "top-k-feedback": {"k": 0.2},
    "qsgd": {"levels": 4},
    "adaquantfl": {"levels": 2},
}


def make_codec(name):
    return CODECS[name].method(**CODEC_OPTIONS[name], **({} if name == "identity" else {"seed": 2}))


def on_flower(make, rounds, partitions=range(CLIENTS), tamper=None, **options):
    """Run on nodes that share nothing but the options; return the strategy and the grid."""
    grid = LoopGrid(client_app(lambda context: make()), partitions, tamper)
    strategy = FlowerStrategy(make(), **{"patience": 0.0, **options})
    strategy.start(grid, strategy.arrays(), num_rounds=rounds, timeout=0.0)
    return strategy, grid


def assert_same(strategy, simulation, rounds):
    records = list(simulation.rounds(rounds))
    torch.testing.assert_close(
        strategy.simulation.weights, simulation.weights, rtol=2e-5, atol=2e-6
    )
    torch.testing.assert_close(strategy.simulation._buffers, simulation._buffers)
    for ours, theirs in zip(strategy.records, records, strict=True):
        assert ours.round == theirs.round
        assert ours.cohort.tolist() == theirs.cohort.tolist()
        assert ours.examples.tolist() == theirs.examples.tolist()
        assert ours.steps.tolist() == theirs.steps.tolist()
        assert not ours.refused
        torch.testing.assert_close(ours.client_losses, theirs.client_losses)
        torch.testing.assert_close(ours.start_losses, theirs.start_losses)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithms_give_the_simulator_s_weights(name):
    strategy, _ = on_flower(lambda: make_simulation(ALGORITHMS[name]()), 4)
    assert_same(strategy, make_simulation(ALGORITHMS[name]()), 4)


@pytest.mark.parametrize("name", CODEC_OPTIONS)
def test_codecs_give_the_simulator_s_weights_and_bytes(name):
    def make():
        return make_simulation(codec=make_codec(name))

    strategy, _ = on_flower(make, 5)
    simulation = make()
    assert_same(strategy, simulation, 5)
    # rounding may turn a stochastic level, and so the length of an entropy code
    for ours, theirs in zip(strategy.records, make().rounds(5), strict=True):
        assert ours.bytes_up.tolist() == pytest.approx(theirs.bytes_up.tolist(), abs=8)


def test_scaffold_through_a_codec_with_feedback_keeps_both_states_at_the_client():
    def make():
        return make_simulation(Scaffold(), codec=make_codec("top-k-feedback"), size=3)

    strategy, _ = on_flower(make, 8)
    assert_same(strategy, make(), 8)
    own = strategy.simulation.algorithm.own.state_dict()
    assert len(own["clients"]) == 0  # the server has no client's variate


def test_batch_norm_s_statistics_travel():
    def make():
        return make_simulation(batch_norm=True, local=Local(learning_rate=0.1, steps=3))

    strategy, _ = on_flower(make, 3)
    assert_same(strategy, make(), 3)
    assert float(strategy.simulation._buffers.abs().sum()) > 0


def test_aggregators_see_each_vector_by_itself():
    def make():
        return make_simulation(aggregator="median", codec=make_codec("qsgd"))

    assert_same(on_flower(make, 3)[0], make(), 3)


def test_privacy_clips_and_adds_the_simulator_s_noise():
    def make():
        return make_simulation(
            privacy=Privacy(0.05, 0.5, quantile=0.5, count_noise=2.0),
            sampler=SAMPLERS["poisson"].method(clients=CLIENTS, size=3, seed=4),
            weighting="uniform",
        )

    strategy, _ = on_flower(make, 4)
    simulation = make()
    assert_same(strategy, simulation, 4)
    assert strategy.simulation._mechanism.clip == pytest.approx(simulation._mechanism.clip)


def test_a_client_drawn_twice_counts_twice():
    def make():
        sampler = SAMPLERS["with-replacement"].method(clients=CLIENTS, size=5, seed=4)
        return make_simulation(sampler=sampler, weighting="unbiased")

    assert_same(on_flower(make, 3)[0], make(), 3)


def test_half_precision_down_halves_the_bytes_and_stays_close():
    half = CODECS["identity"].method(values="float16")
    make = make_simulation
    grid = LoopGrid(client_app(lambda context: make(), half), range(CLIENTS))
    strategy = FlowerStrategy(make(), down=half, patience=0.0)
    strategy.start(grid, strategy.arrays(), num_rounds=3)
    simulation = make()
    records = list(simulation.rounds(3))
    assert int(strategy.records[0].bytes_down[0]) == 32 + int(records[0].bytes_down[0]) // 2
    torch.testing.assert_close(strategy.simulation.weights, simulation.weights, rtol=0, atol=5e-3)
    assert not torch.equal(strategy.simulation.weights, simulation.weights)


def test_the_state_of_the_server_goes_over_to_a_new_strategy():
    def make():
        return make_simulation(FedAdam(0.05), codec=make_codec("adaquantfl"))

    whole, _ = on_flower(make, 6)
    first, grid = on_flower(make, 2)
    again = FlowerStrategy(make(), patience=0.0)
    again.simulation.load_state_dict(first.simulation.state_dict())
    again.start(LoopGrid(grid.app, range(CLIENTS)), again.arrays(), num_rounds=4)
    assert [record.round for record in again.records] == [2, 3, 4, 5]
    assert torch.equal(again.simulation.weights, whole.simulation.weights)


def test_what_cannot_be_divided_is_refused():
    class Own(FedAvg):
        downlink = 2

    with pytest.raises(ValueError, match="Own can't run on Flower"):
        FlowerStrategy(make_simulation(Own()))
    with pytest.raises(ValueError, match="down must keep no state, got top-k-feedback"):
        FlowerStrategy(make_simulation(), down=make_codec("top-k-feedback"))
    with pytest.raises(ValueError, match="attempts must be at least 1, got 0"):
        FlowerStrategy(make_simulation(), attempts=0)
