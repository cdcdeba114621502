"""Sparse training: which weights exist.

Independent choices: a **criterion** says what a weight is worth, a **density** rule how many each
layer keeps, a **structure** what is kept or removed as one, the **schedule** when and how much is
pruned. **Loops** act between the user's trainings, **dynamic** and gradual methods between
optimizer steps, **forms** train a weight as something else. `Masks` are the data they pass around,
`hold` keeps them in force.
"""

from featherweight.sparse import tickets
from featherweight.sparse.constructions import CONSTRUCTIONS, npb, phew
from featherweight.sparse.coupling import couple_
from featherweight.sparse.criteria import CRITERIA, score
from featherweight.sparse.curvature import Hessian, hessian_trace, largest_eigenvalue
from featherweight.sparse.density import DENSITIES, allocate, kept_counts
from featherweight.sparse.dynamic import DYNAMIC, Evolving, granet, mest_em, mest_ems, rigl, set
from featherweight.sparse.execute import (
    ChwnBatchNorm2d,
    Footprint,
    Gain,
    SparseConv2d,
    SparseLayer,
    SparseLinear,
    Sparsely,
    SparsePattern,
    backends,
    dense_gradients,
    footprint,
    load_optimizer_state,
    machine_gains,
    optimizer_state,
    patterns,
    precision_error,
    sparse_linear,
    sparsely,
    to_dense,
    to_sparse,
    update_pattern,
)
from featherweight.sparse.flow import Health, Repair, health, on_path, repair
from featherweight.sparse.gradual import acdc, gmp, gmp_recoverable
from featherweight.sparse.hold import Hold, hold
from featherweight.sparse.landscape import error_barrier
from featherweight.sparse.loops import (
    LOOPS,
    RESETS,
    STRATEGIES,
    Level,
    Resume,
    cycle_lengths,
    cyclic,
    imp,
    iterate,
    ledger,
    level_counts,
    lrr,
    sculpt,
    signs_from,
    snapshot,
    wr,
)
from featherweight.sparse.masks import Masks, Overlap, SignFlips
from featherweight.sparse.packed import load_packed, save_packed
from featherweight.sparse.prune import magnitude, prune, random
from featherweight.sparse.reparam import (
    FORMS,
    SignInSGD,
    anneal,
    continuous_sparsification,
    edge_popup,
    fold,
    parameter_groups,
    rescale,
    rescale_every,
    sign_in,
    sign_in_groups,
    soft_threshold,
)
from featherweight.sparse.select import select, top_k
from featherweight.sparse.signs import hold_signs, perturb_signs_, train_only_norms_
from featherweight.sparse.structure import Structure, satisfies

__all__ = [
    # masks as data
    "Masks",  # parameter name -> bool tensor: combine, compare, save, load, apply
    "Overlap",  # how far two masks agree
    "SignFlips",  # how many kept weights changed sign
    "save_packed",  # a model as small as its kept weights
    "load_packed",
    # masks before training
    "random",  # random masks with a density rule
    "magnitude",  # the largest weights
    "prune",  # any registered criterion: snip, grasp, synflow, prospr, ...
    "phew",  # random walks over the weights
    "npb",  # nodes and paths in balance
    # keeping them in force
    "hold",  # masked weights stay zero through training
    "Hold",
    # loops around the user's own training
    "imp",  # iterative magnitude pruning
    "wr",  # weight rewinding
    "lrr",  # learning rate rewinding
    "cyclic",  # one mask, learning-rate cycles
    "sculpt",  # cycles, one pruning, one more cycle
    "iterate",  # the driver, every option
    "Level",
    "Resume",
    "level_counts",
    "cycle_lengths",
    "ledger",  # what a loop costs
    "snapshot",
    "signs_from",
    # between optimizer steps
    "set",  # random growth
    "rigl",  # growth by gradient
    "mest_em",
    "mest_ems",
    "granet",
    "gmp",  # gradual magnitude pruning
    "gmp_recoverable",  # the same, masks drawn anew from the dense weights
    "acdc",  # compressed and decompressed phases
    "Evolving",
    # weights in another form
    "sign_in",  # products that can change their sign
    "SignInSGD",  # the same as an optimizer
    "sign_in_groups",
    "rescale",
    "rescale_every",
    "soft_threshold",  # STR: learned thresholds
    "continuous_sparsification",  # soft masks that harden
    "anneal",
    "edge_popup",  # frozen weights, trained scores
    "parameter_groups",  # what an optimizer trains under a form
    "fold",  # back to a plain model
    # truly sparse layers: less time and memory
    "to_sparse",  # masked layers become sparse ones
    "to_dense",  # and dense again, bit for bit
    "sparsely",  # train in the sparse form, with any loop or dynamic method
    "Sparsely",
    "update_pattern",  # kept entries keep value and optimizer state
    "dense_gradients",  # for growth by gradient
    "patterns",  # what a sparse model keeps, as masks
    "optimizer_state",  # as the dense form would have it, for checkpoints
    "load_optimizer_state",
    "backends",  # how each layer is computed
    "footprint",  # bytes that training holds
    "Footprint",
    "machine_gains",  # measured on this machine
    "Gain",
    "precision_error",
    "SparsePattern",
    "SparseLayer",
    "SparseLinear",
    "SparseConv2d",
    "sparse_linear",
    "ChwnBatchNorm2d",
    # experiments
    "couple_",  # signs and magnitudes of another run
    "perturb_signs_",
    "hold_signs",
    "train_only_norms_",
    "error_barrier",  # between two trained states
    "Hessian",  # of the loss, as products with vectors
    "largest_eigenvalue",
    "hessian_trace",
    "tickets",  # constructions: networks found inside random ones
    # pieces
    "score",  # weights -> scores
    "select",  # scores -> masks
    "top_k",
    "Structure",  # 2:4, blocks, channels
    "satisfies",
    "allocate",  # shapes -> densities
    "kept_counts",  # densities -> exact counts
    # does signal pass
    "health",
    "Health",
    "repair",
    "Repair",
    "on_path",
    # registries
    "CONSTRUCTIONS",
    "CRITERIA",
    "DENSITIES",
    "DYNAMIC",
    "FORMS",
    "LOOPS",
    "RESETS",
    "STRATEGIES",
]
