"""Federated algorithms: one file each."""

from featherweight.federated.algorithms.base import Algorithm, Federation, Summary
from featherweight.federated.algorithms.fedavg import FedAvg
from featherweight.federated.algorithms.feddyn import FedDyn
from featherweight.federated.algorithms.fednova import FedNova
from featherweight.federated.algorithms.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
from featherweight.federated.algorithms.fedprox import FedProx
from featherweight.federated.algorithms.mime import Mime, MimeLite
from featherweight.federated.algorithms.registry import ALGORITHMS
from featherweight.federated.algorithms.scaffold import Scaffold

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedDyn",
    "FedNova",
    "FedProx",
    "FedYogi",
    "Federation",
    "Mime",
    "MimeLite",
    "Scaffold",
    "Summary",
]
