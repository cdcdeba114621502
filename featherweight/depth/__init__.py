"""Which layers a token visits: Mixture-of-Depths, A-MoD, and what to compare them with.

A **router** says what a token is worth to a layer, a **gate** by what its update is multiplied, a
**capacity** how many tokens are processed. Models are converted in place, without renaming a
parameter, and `to_dense` undoes it.
"""

from featherweight.depth.anatomy import Stack, find_stack, prefix_tokens
from featherweight.depth.convert import (
    a_mod,
    given_scores,
    is_routed,
    mod,
    route,
    settings_of,
    to_dense,
)
from featherweight.depth.cost import Cost, IsoFlop, fewer_layers, flops, isoflop
from featherweight.depth.gates import GATES, auxiliary_loss
from featherweight.depth.importance import (
    Correlation,
    attention_scores,
    correlation,
    token_importance,
)
from featherweight.depth.merge import merge, tome
from featherweight.depth.options import Settings
from featherweight.depth.pictures import picture, visited
from featherweight.depth.received import SOURCES, Attention
from featherweight.depth.routers import ROUTERS
from featherweight.depth.rows import choose_tokens, kept_tokens, put_rows, routed, take_rows
from featherweight.depth.saved import load

__all__ = [
    # converting a model
    "a_mod",  # by the attention a token received
    "mod",  # by a learned score
    "route",  # any router
    "to_dense",  # and back
    "load",  # what save_pretrained wrote
    "is_routed",
    "settings_of",
    "Settings",
    "given_scores",  # route by scores of your own
    "auxiliary_loss",  # so that a causal model can generate
    # a baseline that merges tokens instead
    "tome",
    "merge",
    # what it costs, and what else costs as much
    "flops",
    "Cost",
    "isoflop",
    "IsoFlop",
    "fewer_layers",
    # what it looks at
    "visited",  # tokens by layer
    "picture",
    "attention_scores",  # of a dense model
    "token_importance",  # leave one out
    "correlation",
    "Correlation",
    # pieces
    "routed",  # gather, block, scatter
    "choose_tokens",
    "kept_tokens",
    "take_rows",
    "put_rows",
    "find_stack",
    "Stack",
    "prefix_tokens",
    "Attention",
    # registries
    "ROUTERS",
    "GATES",
    "SOURCES",
]
