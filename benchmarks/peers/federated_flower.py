"""The workload of `benchmarks.federated` under Flower's Ray simulation, for Flower's Python to run.

``federated_flower.py COHORT ROUNDS`` prints the seconds of each round as JSON.
"""

import json
import logging
import os
import random
import sys
import tempfile
import time
from itertools import pairwise

os.environ.update(
    FLWR_TELEMETRY_ENABLED="0",
    FLWR_DISABLE_UPDATE_CHECK="1",
    RAY_USAGE_STATS_ENABLED="0",
    FLWR_HOME=tempfile.mkdtemp(),
    OMP_NUM_THREADS="1",
)

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import nn

CLIENTS, EXAMPLES, STEPS = 100, 32, 5

client = ClientApp()


def network():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


@client.train()
def train(message, context):
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(int(context.node_config["partition-id"]))
    inputs = torch.randn(EXAMPLES, 64, generator=generator)
    targets = torch.randint(10, (EXAMPLES,), generator=generator)
    model = network()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(STEPS):
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    metrics = MetricRecord({"num-examples": EXAMPLES})
    arrays = ArrayRecord(model.state_dict())
    return Message(content=RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def main(cohort, rounds):
    logging.disable(logging.INFO)
    random.seed(0)
    times = []
    server = ServerApp()

    @server.main()
    def serve(grid, context):
        strategy = FedAvg(
            fraction_train=cohort / CLIENTS, fraction_evaluate=0.0, min_available_nodes=CLIENTS
        )
        strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(network().state_dict()),
            num_rounds=rounds + 1,
            evaluate_fn=lambda number, arrays: times.append(time.perf_counter()),
        )

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    options = {**resources, "init_args": {"num_cpus": 2, "include_dashboard": False}}
    run_simulation(server, client, CLIENTS, backend_name="ray", backend_config=options)
    rounds_alone = times[1:]  # the first is the evaluation before any round
    print(json.dumps([b - a for a, b in pairwise(rounds_alone)]))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
