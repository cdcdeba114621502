"""Rounds per second of the federated simulator, against pfl-research and Flower's Ray simulation.

MLP 64-32-10 (2,410 weights), 100 clients of 32 examples, FedAvg with 5 full-batch steps, 10 or 100
clients a round, no evaluation; one thread an operation. The peers run in environments of their own:
`FEATHERWEIGHT_PFL_PYTHON` and `FEATHERWEIGHT_FLOWER_PYTHON` name their Python; without, they are
left out. All take turns, so that whatever else the machine does disturbs all of them; figures are
medians over all rounds of all turns, and the fastest round.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch
from torch import nn

from featherweight.federated.algorithms import FedAvg, Mime, Scaffold
from featherweight.federated.local import Local
from featherweight.federated.population import Population
from featherweight.federated.sampling import Uniform
from featherweight.federated.simulate import simulate

CLIENTS, EXAMPLES, STEPS, TURNS = 100, 32, 5, 3
ROUNDS = {"featherweight": {10: 300, 100: 60}, "pfl": {10: 60, 100: 8}, "flower": {10: 25, 100: 6}}
PEERS = {"pfl": "FEATHERWEIGHT_PFL_PYTHON", "flower": "FEATHERWEIGHT_FLOWER_PYTHON"}


def measure() -> str:
    head = ["| simulator | clients a round | rounds/s, median | fastest | featherweight / it |"]
    return "\n".join([*head, "|---|---|---|---|---|", *_rows(10), *_rows(100)])


def _rows(cohort):
    runs = {
        "featherweight, FedAvg": lambda: own(FedAvg(), cohort),
        "featherweight, FedAvg, any layers (vmap)": lambda: own(FedAvg(), cohort, Opaque()),
        "featherweight, SCAFFOLD": lambda: own(Scaffold(), cohort),
        "featherweight, Mime": lambda: own(Mime(), cohort),
    }
    for name, variable in PEERS.items():
        if variable in os.environ:
            runs[name] = lambda name=name, variable=variable: peer(name, variable, cohort)
    seconds = {name: [] for name in runs}
    for _ in range(TURNS):
        for name, run in runs.items():
            seconds[name] += run()
    base = median(seconds["featherweight, FedAvg"])
    return [
        f"| {name} | {cohort} | {1 / median(found):.1f} | {1 / min(found):.1f} | "
        f"{median(found) / base:.1f} |"
        for name, found in seconds.items()
    ]


def network():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


class Opaque(nn.Module):
    """The network as a module whose insides the simulator does not know."""

    def __init__(self):
        super().__init__()
        self.layers = network()

    def forward(self, inputs):
        """Return the logits."""
        return self.layers(inputs)


def own(algorithm, cohort, model=None):
    torch.manual_seed(0)
    count = CLIENTS * EXAMPLES
    targets = torch.randint(10, (count,))
    clients = torch.arange(count).split(EXAMPLES)
    population = Population(torch.randn(count, 64), targets, clients)
    sampler, local = Uniform(CLIENTS, cohort), Local(0.1, steps=STEPS)
    simulation = simulate(model or network(), population, algorithm, sampler=sampler, local=local)
    rounds = ROUNDS["featherweight"][cohort]
    return [record.seconds for record in simulation.rounds(rounds + 1)][1:]


def peer(name, variable, cohort):
    script = Path(__file__).resolve().parent / "peers" / f"federated_{name}.py"
    command = [os.environ[variable], str(script), str(cohort), str(ROUNDS[name][cohort])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        done.check_returncode()
    return json.loads(done.stdout.splitlines()[-1])
