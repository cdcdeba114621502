"""How a data set is divided among clients.

A partitioner is a function of the targets that returns one tensor of example indices a client. All
are deterministic in ``seed``, give no example twice and, unless they say otherwise, leave none out.
"""

from featherweight.federated.partition.base import PARTITIONS, Partition
from featherweight.federated.partition.file import (
    check_partition,
    load_partition,
    partition_hash,
    save_partition,
)
from featherweight.federated.partition.label_skew import (
    dirichlet,
    label_dirichlet,
    labels_per_client,
    shards,
)
from featherweight.federated.partition.natural import natural
from featherweight.federated.partition.quantity import iid, quantity, zipf
from featherweight.federated.partition.twin import shuffled

__all__ = [
    "PARTITIONS",
    "Partition",
    "check_partition",
    "dirichlet",
    "iid",
    "label_dirichlet",
    "labels_per_client",
    "load_partition",
    "natural",
    "partition_hash",
    "quantity",
    "save_partition",
    "shards",
    "shuffled",
    "zipf",
]
