"""Lottery tickets by construction: networks that random sources are shown to contain."""

from featherweight.sparse.tickets.approximate import approximate
from featherweight.sparse.tickets.plant import Planted, Recovery, plant, recovery
from featherweight.sparse.tickets.represent import (
    MissingConnectionError,
    Representation,
    connection_probability,
    lower_bound,
    represent,
    source_widths,
)
from featherweight.sparse.tickets.source import source_for
from featherweight.sparse.tickets.subset_sum import SubsetSums, expected_error, subset_sum
from featherweight.sparse.tickets.targets import circle, helix, piecewise_linear, relu_chain
from featherweight.sparse.tickets.ticket import LayerErrors, Ticket

__all__ = [
    # by masks alone
    "approximate",  # a target network inside a random one, as near as subset sums allow
    "Ticket",  # the masked network, its error and its bound
    "LayerErrors",
    "source_for",  # a random network that is wide enough
    "subset_sum",  # which of these numbers add up to that one
    "SubsetSums",
    "expected_error",  # how near they come
    # by masks and weights
    "represent",  # a target network, exactly, inside a random sparse one
    "Representation",  # the sparse source with its masks
    "MissingConnectionError",  # the random masks left a connection out
    "source_widths",  # widths that suffice
    "lower_bound",  # width that is necessary
    "connection_probability",  # chance that a random hidden layer reaches every input
    # to be looked for
    "plant",  # hide a target in a random network
    "Planted",
    "recovery",  # how much of it was found
    "Recovery",
    "relu_chain",  # targets that are known to solve a problem
    "piecewise_linear",
    "circle",
    "helix",
]
