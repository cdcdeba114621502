"""The workload of `benchmarks.federated` under pfl-research, for that library's Python to run.

``federated_pfl.py COHORT ROUNDS`` prints the seconds of each round as JSON.
"""

import json
import sys
import time

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import nn

CLIENTS, EXAMPLES, STEPS = 100, 32, 5


class Network(nn.Module):
    """The network, with the methods that the library asks for."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def loss(self, inputs, targets, eval=False):
        """Return the mean loss."""
        return nn.functional.cross_entropy(self.layers(inputs), targets)

    def metrics(self, inputs, targets):
        """Return no metrics."""
        return {}


class Clock(TrainingProcessCallback):
    """Notes the time after each round."""

    def __init__(self):
        self.times = []

    def after_central_iteration(self, *args, **kwargs):
        """Note the time, and let training go on."""
        self.times.append(time.perf_counter())
        return False, Metrics()


def main(cohort, rounds):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    users = {
        user: Dataset([torch.randn(EXAMPLES, 64), torch.randint(10, (EXAMPLES,))], user_id=user)
        for user in map(str, range(CLIENTS))
    }
    data = FederatedDataset(users.__getitem__, get_user_sampler("random", list(users)))
    network, clock = Network(), Clock()
    model = PyTorchModel(network, torch.optim.SGD, torch.optim.SGD(network.parameters(), 1.0))
    algorithm = NNAlgorithmParams(
        central_num_iterations=rounds + 1,
        evaluation_frequency=10**6,
        train_cohort_size=cohort,
        val_cohort_size=0,
    )
    local = NNTrainHyperParams(
        local_num_epochs=STEPS, local_learning_rate=0.1, local_batch_size=None
    )
    backend = SimulatedBackend(training_data=data, val_data=data)
    FederatedAveraging().run(
        algorithm, backend, model, local, callbacks=[clock], send_metrics_to_platform=False
    )
    print(json.dumps(np.diff(clock.times).tolist()))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
