"""From dense to sparse during one training: gradual pruning, and alternating phases.

The methods are rows of `featherweight.sparse.DYNAMIC`, run by the same driver as dynamic sparse
training.
"""

from featherweight.sparse.gradual.acdc import Phase, acdc, acdc_phases
from featherweight.sparse.gradual.gmp import gmp, gmp_recoverable

__all__ = [
    "Phase",
    "acdc",
    "acdc_phases",
    "gmp",
    "gmp_recoverable",
]
