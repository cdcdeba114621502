"""Federated learning: how an update travels.

**Codecs** turn vectors into bytes and the messages of a round into one mean. **Algorithms** say
what clients send and what the server makes of it. `simulate` runs them in one process, clients side
by side; `featherweight.federated.flower` runs them on a network. **Partitions** and **samplers**
make the clients, a `Ledger` counts what they cost, `check` says whether a method fits its setting.
"""

from featherweight.federated.algorithms import (
    ALGORITHMS,
    Algorithm,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedDyn,
    Federation,
    FedNova,
    FedProx,
    FedYogi,
    Mime,
    MimeLite,
    Scaffold,
    Summary,
)
from featherweight.federated.clients_report import ClientsReport, evaluate_clients
from featherweight.federated.codecs import (
    CODECS,
    QSGD,
    AdaQuantFL,
    Codec,
    DAdaQuant,
    ErrorFeedback,
    Identity,
    Induced,
    Message,
    RandK,
    RandKSpatial,
    RandKSpatioTemporal,
    RandKTemporal,
    RTopK,
    TopK,
    TopKFeedback,
    Wangni,
    correlation,
)
from featherweight.federated.heterogeneity import (
    Dissimilarity,
    PartitionReport,
    client_gradients,
    dissimilarity,
    partition_report,
)
from featherweight.federated.inbox import Inbox
from featherweight.federated.ledger import Costs, Ledger
from featherweight.federated.local import Adam, Local, Sgd
from featherweight.federated.partition import (
    PARTITIONS,
    Partition,
    check_partition,
    dirichlet,
    iid,
    label_dirichlet,
    labels_per_client,
    load_partition,
    natural,
    partition_hash,
    quantity,
    save_partition,
    shards,
    shuffled,
    zipf,
)
from featherweight.federated.population import Population
from featherweight.federated.privacy import Privacy, noise_multiplier_for
from featherweight.federated.record import RoundRecord
from featherweight.federated.robust import AGGREGATORS
from featherweight.federated.sampling import (
    SAMPLERS,
    BySize,
    Diurnal,
    Everyone,
    Markov,
    OverSelection,
    Poisson,
    Sampler,
    Uniform,
    WithReplacement,
    participation,
)
from featherweight.federated.schedules import (
    exponential,
    inverse_linear,
    inverse_square_root,
    warmup,
)
from featherweight.federated.server import Adaptive, ServerSgd, adagrad, adam, yogi
from featherweight.federated.setting import Finding, Setting, check, require
from featherweight.federated.simulate import simulate
from featherweight.federated.simulation import Simulation
from featherweight.federated.skew import noisy, relabelled
from featherweight.federated.streams import stream
from featherweight.federated.synthetic import Quadratics, quadratics, synthetic
from featherweight.federated.time_model import TimeModel
from featherweight.federated.tuning import Grid, budgets, grid, half_decades, winners
from featherweight.federated.wire import Refused

__all__ = [
    # codecs: vectors to bytes, messages to one mean
    "Codec",
    "Message",
    "Identity",
    "RandK",
    "RandKSpatial",
    "RandKTemporal",
    "RandKSpatioTemporal",
    "TopK",
    "TopKFeedback",
    "ErrorFeedback",
    "RTopK",
    "Wangni",
    "Induced",
    "QSGD",
    "AdaQuantFL",
    "DAdaQuant",
    "correlation",
    "Inbox",
    "Refused",
    # algorithms
    "Algorithm",
    "Federation",
    "Summary",
    "FedAvg",
    "FedAvgM",
    "FedAdagrad",
    "FedAdam",
    "FedYogi",
    "FedProx",
    "Scaffold",
    "Mime",
    "MimeLite",
    "FedNova",
    "FedDyn",
    "Privacy",
    "noise_multiplier_for",
    # simulation
    "simulate",
    "Simulation",
    "Population",
    "Local",
    "Sgd",
    "Adam",
    "RoundRecord",
    "exponential",
    "inverse_linear",
    "inverse_square_root",
    "warmup",
    "stream",
    "ServerSgd",
    "Adaptive",
    "adagrad",
    "adam",
    "yogi",
    # who has which examples
    "Partition",
    "iid",
    "dirichlet",
    "label_dirichlet",
    "shards",
    "labels_per_client",
    "natural",
    "quantity",
    "zipf",
    "shuffled",
    "save_partition",
    "load_partition",
    "partition_hash",
    "check_partition",
    "synthetic",
    "quadratics",
    "Quadratics",
    "noisy",
    "relabelled",
    # who takes part
    "Sampler",
    "Everyone",
    "Uniform",
    "WithReplacement",
    "BySize",
    "Poisson",
    "Diurnal",
    "Markov",
    "OverSelection",
    "participation",
    # what it costs, and whether it is fit
    "Ledger",
    "Costs",
    "TimeModel",
    "Setting",
    "Finding",
    "check",
    "require",
    # how it went
    "evaluate_clients",
    "ClientsReport",
    "partition_report",
    "PartitionReport",
    "client_gradients",
    "dissimilarity",
    "Dissimilarity",
    "grid",
    "Grid",
    "half_decades",
    "budgets",
    "winners",
    # registries
    "CODECS",
    "ALGORITHMS",
    "AGGREGATORS",
    "PARTITIONS",
    "SAMPLERS",
]
