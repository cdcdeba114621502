"""Codecs: vectors to bytes on clients, the messages of a round to one mean on the server."""

from featherweight.federated.codecs.adaquantfl import (
    AdaQuantFL,
    DAdaQuant,
    best_levels,
    client_levels,
    loss_rule,
)
from featherweight.federated.codecs.codec import Codec, Message
from featherweight.federated.codecs.error_feedback import ErrorFeedback, TopKFeedback
from featherweight.federated.codecs.identity import Identity
from featherweight.federated.codecs.induced import Induced
from featherweight.federated.codecs.qsgd import QSGD
from featherweight.federated.codecs.quantise import formula_bits, full_bits, variance_factor
from featherweight.federated.codecs.r_top_k import RTopK
from featherweight.federated.codecs.rand_k import RandK
from featherweight.federated.codecs.rand_k_spatial import RandKSpatial
from featherweight.federated.codecs.rand_k_temporal import RandKSpatioTemporal, RandKTemporal
from featherweight.federated.codecs.registry import CODECS
from featherweight.federated.codecs.spatial import Correlation, correlation
from featherweight.federated.codecs.top_k import TopK
from featherweight.federated.codecs.wangni import Wangni

__all__ = [
    "Codec",  # what all of them are
    "Message",  # one that has been read
    "Identity",  # all values
    "RandK",  # k random entries
    "RandKSpatial",  # the same messages, decoded together
    "RandKTemporal",  # around what each client sent last
    "RandKSpatioTemporal",
    "TopK",  # the largest entries
    "TopKFeedback",  # what was left out is sent later
    "ErrorFeedback",  # the same for other codecs
    "RTopK",  # random among the largest
    "Wangni",  # kept with the best probabilities
    "Induced",  # half top-k, half rand-k
    "QSGD",  # random rounding to levels
    "AdaQuantFL",  # levels that follow the loss
    "DAdaQuant",  # levels that double on a plateau
    "loss_rule",
    "best_levels",
    "client_levels",
    "formula_bits",  # the paper's count
    "full_bits",
    "variance_factor",
    "Correlation",  # how alike clients are
    "correlation",
    "CODECS",
]
