"""Truly sparse layers: fewer weights take less time and less memory, on ordinary CPUs.

A masked model computes with dense weights that hold zeros. `to_sparse` turns its layers into ones
that store, train and multiply by the kept weights alone; `to_dense` brings back the same model.
Each layer has a **backend**, the way it is computed, chosen by what this machine has measured.
"""

from featherweight.sparse.execute.chwn_norm import ChwnBatchNorm2d
from featherweight.sparse.execute.conv import CONV_BACKENDS, ConvBackend, SparseConv2d
from featherweight.sparse.execute.convert import backends, to_dense, to_sparse
from featherweight.sparse.execute.layer import SparseLayer
from featherweight.sparse.execute.linear import BACKENDS, Backend, SparseLinear, sparse_linear
from featherweight.sparse.execute.pattern import SparsePattern
from featherweight.sparse.execute.probe import Gain, machine_gains, precision_error
from featherweight.sparse.execute.sparsely import Sparsely, sparsely
from featherweight.sparse.execute.state import (
    Footprint,
    footprint,
    load_optimizer_state,
    optimizer_state,
    patterns,
)
from featherweight.sparse.execute.update import dense_gradients, update_pattern

__all__ = [
    # between the two forms
    "to_sparse",  # masked layers become sparse ones
    "to_dense",  # and dense again, bit for bit
    "sparsely",  # train in the sparse form, with any loop or dynamic method
    "Sparsely",  # its handle
    "optimizer_state",  # as the dense form would have it, for checkpoints
    "load_optimizer_state",
    # new patterns
    "update_pattern",  # kept entries keep value and optimizer state
    "dense_gradients",  # for growth by gradient
    "patterns",  # what a sparse model keeps, as masks
    # layers
    "SparsePattern",  # where the kept entries are
    "SparseLayer",  # what sparse layers share
    "SparseLinear",
    "sparse_linear",  # the same as a function
    "BACKENDS",  # ways to compute it, by name
    "Backend",
    "SparseConv2d",
    "CONV_BACKENDS",
    "ConvBackend",
    "ChwnBatchNorm2d",  # a batch norm between sparse convolutions
    "backends",  # which one each layer of a model has
    # what it gains
    "footprint",  # bytes of weights, gradients, optimizer state, indices
    "Footprint",
    "machine_gains",  # measured on this machine
    "Gain",
    "precision_error",  # of torch's float32 matmul precision "medium"
]
