import tomllib

import pytest
import torch

pytest.importorskip("flwr")

from safetensors.torch import load_file

from featherweight.lab.errors import BadInput
from featherweight.lab.federated_data import make_clients
from featherweight.lab.federated_parse import load, to_yaml
from featherweight.lab.federated_setup import make_simulation
from featherweight.lab.flower import client, server, simulate_with_flower, write_app

from .loop import LoopGrid, context_of


def make_recipe(*words):
    given = ["partition.clients=4", "sampler.size=3", "rounds=3", "evaluate.every=2"]
    return load("federated-rand-k-spatial-digits", [*given, *words])[0]


def run(recipe, **config):
    config = {"recipe": to_yaml(recipe), "seed": 1, **config}
    done = []
    grid = LoopGrid(client(config), range(4))
    server(config, done.append)(grid, context_of(0))
    return done[0]


def simulated(recipe, rounds):
    simulation = make_simulation(recipe, make_clients(recipe, 1), 1)
    records = list(simulation.rounds(rounds))
    return simulation, records


def test_a_recipe_gives_the_simulator_s_weights_and_leaves_its_results(tmp_path):
    recipe = make_recipe()
    strategy = run(recipe, out=str(tmp_path))
    simulation, records = simulated(recipe, 3)
    torch.testing.assert_close(strategy.simulation.weights, simulation.weights)
    assert [r.bytes_up.tolist() for r in strategy.records] == [r.bytes_up.tolist() for r in records]
    found = load_file(tmp_path / "model.safetensors")
    for name, value in simulation.model.state_dict().items():
        torch.testing.assert_close(found[name], value)


def test_a_server_that_starts_again_goes_on_from_its_checkpoint(tmp_path):
    recipe = make_recipe("algorithm.name=fedadam")
    run(recipe, out=str(tmp_path))
    (tmp_path / "checkpoints" / "00000003.safetensors").unlink()
    strategy = run(recipe, out=str(tmp_path))
    assert [record.round for record in strategy.records] == [2]
    torch.testing.assert_close(strategy.simulation.weights, simulated(recipe, 3)[0].weights)


def test_a_server_whose_clients_keep_a_state_does_not_go_on(tmp_path):
    recipe = make_recipe("codec.name=top-k-feedback")
    run(recipe, out=str(tmp_path))
    with pytest.raises(BadInput, match="clients keep a state"):
        run(recipe, out=str(tmp_path))


def test_the_app_s_folder_says_what_the_recipe_says(tmp_path):
    recipe = make_recipe()
    folder = write_app(tmp_path / "app", recipe, seed=4)
    config = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    assert config["seed"] == 4
    assert config["recipe"] == to_yaml(recipe)
    with pytest.raises(BadInput, match="config: 'sead' is not one of seed"):
        write_app(tmp_path / "app", recipe, sead=4)


@pytest.mark.filterwarnings("default")  # Ray's own
def test_flower_s_simulation_gives_the_simulator_s_weights(monkeypatch):
    pytest.importorskip("ray")
    for name in ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.setenv(name, "0")
    recipe = make_recipe("rounds=2")
    strategy = simulate_with_flower(recipe, 1)
    simulation, _ = simulated(recipe, 2)
    assert [record.refused for record in strategy.records] == [{}, {}]
    torch.testing.assert_close(strategy.simulation.weights, simulation.weights)
