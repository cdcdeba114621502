"""The papers' headline claims as objects that can be run: one file a paper.

A claim says which runs test it and turns them into a verdict by statistics. What does not hold at
the size run is printed as such.
"""

from featherweight.lab.claims import (  # noqa: F401  (register)
    a_mod,
    adaquantfl,
    cyclic_sculpt,
    field_guide_federated,
    ham,
    masks_signs_lrr,
    nanoadam,
    nonzero_biases,
    optrot,
    random_pruning,
    risotto,
    sign_in,
    sparsified_mean_estimation,
)
from featherweight.lab.claims.claim import CLAIMS, Claim, Outcome
from featherweight.lab.statistics import Verdict, interval, judge

__all__ = ["CLAIMS", "Claim", "Outcome", "Verdict", "interval", "judge"]
