"""Lottery tickets by construction: networks that random sparse sources are shown to contain."""

from featherweight.sparse.tickets.represent import (
    MissingConnectionError,
    Representation,
    connection_probability,
    lower_bound,
    represent,
    source_widths,
)

__all__ = [
    "represent",  # a target network, exactly, inside a random sparse one
    "Representation",  # the sparse source with its masks
    "MissingConnectionError",  # the random masks left a connection out
    "source_widths",  # widths that suffice
    "lower_bound",  # width that is necessary
    "connection_probability",  # chance that a random hidden layer reaches every input
]
