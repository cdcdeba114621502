"""A federated recipe on Flower: apps for its simulation and for a SuperLink with SuperNodes.

The recipe travels as text in the run's configuration, so that server and clients build the same
simulation of it, each by itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from flwr.app import Context, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from safetensors.torch import save_file

from featherweight.common import atomic_path, cpu_state, write_text
from featherweight.federated.clients_report import evaluate_clients
from featherweight.federated.flower import FlowerStrategy, client_app, server_app
from featherweight.federated.record import RoundRecord
from featherweight.federated.simulate import Simulation
from featherweight.lab import federated_checkpoint as checkpoint
from featherweight.lab.errors import BadInput
from featherweight.lab.federated_checkpoint import FederatedCheckpoint
from featherweight.lab.federated_data import Clients, make_clients
from featherweight.lab.federated_parse import build, to_yaml
from featherweight.lab.federated_recipe import FederatedRecipe
from featherweight.lab.federated_setup import make_simulation
from featherweight.lab.recipe_form import read_yaml

DEFAULTS: Mapping[str, Any] = {"seed": 0, "out": "", "timeout": 600.0, "patience": 60.0}
"""What ``flwr run --run-config`` can set: the seed; the folder of checkpoints and results, empty
for none; seconds for a round's replies, then for those that are asked for anew."""

PYPROJECT = """\
[project]
name = "featherweight-federated"
version = "1.0.0"
dependencies = []

[tool.flwr.app]
publisher = "featherweight"
fab-include = ["federated_app/**/*.py"]

[tool.flwr.app.components]
serverapp = "federated_app.server:app"
clientapp = "federated_app.client:app"

[tool.flwr.app.config]
"""


def write_app(folder: Path, recipe: FederatedRecipe, **config: Any) -> Path:
    """Write the folder that ``flwr run`` takes.

    Every machine needs featherweight installed beside flwr, and the data where the recipe says.

    Args:
        folder: to be made.
        recipe: what to do.
        config: other values than those of `DEFAULTS`.

    Raises:
        BadInput: there is no such value.
        OSError: the folder can't be written.
    """
    if unknown := sorted(set(config) - set(DEFAULTS)):
        raise BadInput(f"config: {unknown[0]!r} is not one of {', '.join(DEFAULTS)}")
    package = folder / "federated_app"
    package.mkdir(parents=True, exist_ok=True)
    values = {**DEFAULTS, **config, "recipe": to_yaml(recipe)}
    # a JSON string is a TOML string, and so are its numbers
    lines = [f"{name} = {json.dumps(value)}\n" for name, value in values.items()]
    write_text(folder / "pyproject.toml", PYPROJECT + "".join(lines))
    write_text(package / "__init__.py", "")
    for side in ("server", "client"):
        text = f"from featherweight.lab.flower import {side}\n\napp = {side}()\n"
        write_text(package / f"{side}.py", text)
    return folder


def client(config: Mapping[str, Any] | None = None) -> ClientApp:
    """Return the client app of a recipe.

    Args:
        config: with "recipe" and "seed"; None: the run's configuration.
    """
    return client_app(lambda context: _prepared(*_key(config or context.run_config))[2])


def server(
    config: Mapping[str, Any] | None = None,
    finish: Callable[[FlowerStrategy], None] = lambda _: None,
) -> ServerApp:
    """Return the server app of a recipe.

    With "out", it keeps a checkpoint of every round there, goes on from the newest, and leaves the
    model and the results there.

    Args:
        config: with "recipe" and the names of `DEFAULTS`; None: the run's configuration.
        finish: called with the strategy at the end.
    """
    held: dict[str, Any] = {}

    def make(context: Context) -> FlowerStrategy:
        held.update(DEFAULTS, **(config or context.run_config))
        recipe, clients, simulation = _prepared(*_key(held))
        patience, save = float(held["patience"]), partial(_save, held)
        strategy = FlowerStrategy(simulation, patience=patience, on_round=save)
        held.update(recipe=recipe, clients=clients, strategy=strategy)
        _resume(held, simulation)
        return strategy

    def end(context: Context, strategy: FlowerStrategy) -> None:
        _write(held)
        finish(strategy)

    return server_app(
        make,
        lambda context, strategy: held["recipe"].rounds - strategy.simulation.round,
        timeout=lambda context: float(held["timeout"]),
        evaluate=lambda strategy: _judged(held),
        finish=end,
    )


def simulate_with_flower(recipe: FederatedRecipe, seed: int = 0) -> FlowerStrategy:
    """Run a recipe in Flower's own simulation, which needs ``flwr[simulation]``.

    Args:
        recipe: what to do.
        seed: of the run.

    Returns:
        The strategy, with the simulation and the records of its rounds.
    """
    from flwr.simulation import run_simulation

    config = {"recipe": to_yaml(recipe), "seed": seed}
    done: list[FlowerStrategy] = []
    nodes = len(_prepared(*_key(config))[1].train)
    run_simulation(
        server(config, done.append),
        client(config),
        nodes,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": os.cpu_count() or 1, "include_dashboard": False},
        },
    )
    return done[0]


def _key(config: Mapping[str, Any]) -> tuple[str, int]:
    return str(config["recipe"]), int(config["seed"])


@lru_cache(maxsize=1)
def _prepared(text: str, seed: int) -> tuple[FederatedRecipe, Clients, Simulation]:
    recipe = build(read_yaml(text))
    clients = make_clients(recipe, seed)
    return recipe, clients, make_simulation(recipe, clients, seed)


def _judged(held: Mapping[str, Any]) -> MetricRecord | None:
    recipe, simulation = held["recipe"], held["strategy"].simulation
    if simulation.round % recipe.evaluate.every and simulation.round < recipe.rounds:
        return None
    report = evaluate_clients(simulation.model, held["clients"].validation)
    return MetricRecord({f"validation-{k}": float(v) for k, v in report.row().items()})


def _save(held: Mapping[str, Any], record: RoundRecord) -> None:
    if held["out"]:
        state = {"simulation": held["strategy"].simulation.state_dict()}
        checkpoint.save(_folder(held), FederatedCheckpoint(record.round + 1, state, {}))


def _resume(held: Mapping[str, Any], simulation: Simulation) -> None:
    if not held["out"]:
        return
    last, _ = checkpoint.newest(_folder(held))
    if last is None:
        return
    codec = simulation.options.codec
    if simulation.algorithm.stateful or (codec is not None and codec.stateful == "client"):
        raise BadInput(
            "out: clients keep a state, which ended with the run that made the checkpoint; start "
            "over in another folder"
        )
    simulation.load_state_dict(last.state["simulation"])


def _write(held: Mapping[str, Any]) -> None:
    if not held["out"]:
        return
    simulation, records = held["strategy"].simulation, held["strategy"].records
    with atomic_path(_folder(held).parent / "model.safetensors") as temporary:
        save_file(cpu_state(simulation.model.state_dict()), temporary)
    result = {
        "rounds": simulation.round,
        "test": evaluate_clients(simulation.model, held["clients"].test).row(),
        "bytes_up": sum(int(record.bytes_up.sum()) for record in records),
        "bytes_down": sum(int(record.bytes_down.sum()) for record in records),
        "refused": [{str(k): v for k, v in record.refused.items()} for record in records],
    }
    write_text(_folder(held).parent / "result.json", json.dumps(result, indent=1) + "\n")


def _folder(held: Mapping[str, Any]) -> Path:
    return Path(held["out"]).expanduser() / "checkpoints"
