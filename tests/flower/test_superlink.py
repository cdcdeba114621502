"""The recipe on a real SuperLink with two SuperNodes, one of which is killed while it trains."""

import json
import os
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("flwr")

from featherweight.lab.federated_data import make_clients
from featherweight.lab.federated_parse import load
from featherweight.lab.federated_setup import make_simulation
from featherweight.lab.flower import write_app

from .network import Network

if not os.environ.get("FEATHERWEIGHT_FLOWER"):
    pytest.skip("takes a minute or two: make flower", allow_module_level=True)

ROUNDS = 2
SLOW = """\
import pathlib
import time

import featherweight.federated.flower.client as client

train = client.Client.train


def slow(self):
    flag = pathlib.Path({flag!r})
    if self.ask.client == 1 and self.ask.round == 1 and not flag.exists():
        flag.touch()
        time.sleep(600)
    return train(self)


slow.__name__ = "train"
client.Client.train = slow
from featherweight.lab.flower import client

app = client()
"""


def make_recipe():
    words = ["partition.clients=2", "sampler.size=2", f"rounds={ROUNDS}", "evaluate.every=1"]
    return load("federated-rand-k-spatial-digits", words)[0]


def test_a_node_killed_in_mid_round_comes_back_and_the_weights_are_the_simulator_s(tmp_path):
    recipe, out, flag = make_recipe(), tmp_path / "out", tmp_path / "flag"
    app = write_app(tmp_path / "app", recipe, seed=3, out=str(out), timeout=20.0, patience=90.0)
    (app / "federated_app" / "client.py").write_text(SLOW.format(flag=str(flag)))
    with Network(tmp_path / "network") as network:
        network.node(0)
        victim = network.node(1)
        killer = threading.Thread(target=_kill, args=(network, victim, flag))
        killer.start()
        printed = network.run(app, timeout=400)
        killer.join()
        logs = printed + network.logs()
    assert flag.exists(), logs
    assert (out / "result.json").is_file(), logs
    result = json.loads((out / "result.json").read_text())
    assert result["refused"] == [{}] * ROUNDS
    simulation = make_simulation(recipe, make_clients(recipe, 3), 3)
    records = list(simulation.rounds(ROUNDS))
    assert result["bytes_up"] == sum(int(record.bytes_up.sum()) for record in records)
    found = load_file(out / "model.safetensors")
    for name, value in simulation.model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def _kill(network, victim, flag):
    end = time.monotonic() + 200
    while not flag.exists() and time.monotonic() < end:
        time.sleep(0.1)
    network.kill(victim)
    network.node(1)
