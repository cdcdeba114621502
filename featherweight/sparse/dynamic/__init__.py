"""Masks that change between optimizer steps, with the user's own training loop.

A method is a `Rule`: when masks change and to what, a function of weights, gradients and masks.
`Evolving` runs it on any torch optimizer, counts steps, and saves and restores its state. Methods
that lower the density over time are in `featherweight.sparse.gradual`.
"""

from featherweight.sparse.dynamic.evolving import Evolving, Moment, Rule
from featherweight.sparse.dynamic.exchange import drop, exchange, grow, rewire
from featherweight.sparse.dynamic.granet import granet
from featherweight.sparse.dynamic.mest import mest_em, mest_ems
from featherweight.sparse.dynamic.registry import DYNAMIC
from featherweight.sparse.dynamic.rigl import rigl
from featherweight.sparse.dynamic.schedules import (
    SCHEDULES,
    constant,
    cosine,
    cubic,
    exponential,
    linear,
    polynomial,
    stairs,
)
from featherweight.sparse.dynamic.set import set

__all__ = [
    "DYNAMIC",
    "SCHEDULES",
    "Evolving",
    "Moment",
    "Rule",
    "constant",
    "cosine",
    "cubic",
    "drop",
    "exchange",
    "exponential",
    "granet",
    "grow",
    "linear",
    "mest_em",
    "mest_ems",
    "polynomial",
    "rewire",
    "rigl",
    "set",
    "stairs",
]
