"""Where weights start: isometric and other initialisations, and measures of what they do.

Initialisations work in place, take a ``seed`` or a ``generator``, and return a `Report` of what
they did to each layer. They read the structure of the model from one forward pass, and treat all of
it or refuse it before anything is touched.
"""

from featherweight.init.balanced import balanced_
from featherweight.init.fixup import fixup_, scalar_groups
from featherweight.init.he_nonzero_bias import he_nonzero_bias_
from featherweight.init.isometry import IsometryReport, isometry_report
from featherweight.init.looks_linear import looks_linear_, looks_linear_nonzero_bias_
from featherweight.init.matrices import delta, haar, interleave, looks_linear_matrix
from featherweight.init.orthogonal_delta import orthogonal_delta_
from featherweight.init.plan import Report, Row
from featherweight.init.registry import INITS
from featherweight.init.risotto import risotto_
from featherweight.init.signal import Signal, SignalReport, signal_report
from featherweight.init.skipinit import skipinit_
from featherweight.init.spectrum import Spectrum, jacobian_spectrum
from featherweight.init.theory import (
    BlockScales,
    bias_scales,
    expected_square_norm,
    expected_square_norm_with_biases,
    relu_cosine,
    similarity_by_depth,
)

__all__ = [
    # exact isometries
    "risotto_",  # residual networks
    "looks_linear_",  # plain networks
    "looks_linear_nonzero_bias_",  # plain networks, random biases
    "orthogonal_delta_",  # each layer for itself
    # independent weights
    "he_nonzero_bias_",  # biases as large as the signal
    "balanced_",  # He, branch and skip weighted
    "fixup_",  # silent branches
    "scalar_groups",  # Fixup's learning rates
    "skipinit_",  # branches times zero
    # what was done
    "Report",
    "Row",
    # measures
    "jacobian_spectrum",  # singular values, input to state
    "Spectrum",
    "isometry_report",  # of every state
    "IsometryReport",
    "signal_report",  # norms, cosines, gradients by depth
    "SignalReport",
    "Signal",
    # closed forms
    "relu_cosine",
    "similarity_by_depth",
    "expected_square_norm",
    "expected_square_norm_with_biases",
    "BlockScales",
    "bias_scales",
    # matrices
    "haar",
    "looks_linear_matrix",  # [[U, -U], [-U, U]]
    "delta",  # a convolution that acts on pixels
    "interleave",  # pairs as neighbours
    # registry
    "INITS",
]
