"""Optimizers: how weights move.

Each is a `torch.optim.Optimizer` and behaves as one: parameter groups, state dicts, schedulers,
``GradScaler``, closures, ``torch.compile``, data-parallel and sharded training.
"""

from featherweight.optim.analysis import (
    MaskHistory,
    Relation,
    forgetting,
    relation,
    shift_by_size,
    sign_flips,
    state_bytes,
    touched,
)
from featherweight.optim.during_backward import DuringBackward, update_during_backward
from featherweight.optim.groups import groups
from featherweight.optim.ham import HAM, ham
from featherweight.optim.ham_adamw import HamAdamW
from featherweight.optim.ham_sgd import HamSGD
from featherweight.optim.nanoadam import NanoAdam
from featherweight.optim.registry import OPTIMIZERS
from featherweight.optim.weights import ham_weights, suggest_alpha

__all__ = [
    # HAM: a hyperbolic step after each step
    "ham",  # around any optimizer
    "HAM",
    "HamSGD",  # built in
    "HamAdamW",
    "ham_weights",  # what it acts on
    "suggest_alpha",  # how strong
    # NanoAdam: Adam on the smallest weights, with state for them alone
    "NanoAdam",
    "groups",  # what it trains whole, by module type
    "update_during_backward",  # frees each gradient at once
    "DuringBackward",
    # what training did
    "relation",  # between sizes of weights and of gradients
    "Relation",
    "MaskHistory",  # overlap of selections over time
    "touched",  # weights that moved
    "sign_flips",
    "shift_by_size",
    "forgetting",  # of earlier tasks
    "state_bytes",
    # registry
    "OPTIMIZERS",
]
