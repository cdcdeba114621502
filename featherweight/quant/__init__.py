"""Quantisation: how many bits a weight takes.

A causal language model of transformers is rotated, its weights are rounded, and a directory is
written that stock loaders read. Functions that take a model change it *in place* and return it;
whatever can't be treated is refused before anything is touched.
"""

from featherweight.quant.architecture import MODEL_TYPES
from featherweight.quant.calibrate import collect, transport
from featherweight.quant.cayley import Angle, Clipped
from featherweight.quant.evaluate import (
    Divergence,
    Outliers,
    divergence,
    layer_errors,
    outliers,
    perplexity,
    trace_ratio,
)
from featherweight.quant.export.directory import load, save
from featherweight.quant.export.layouts import FORMATS, Layout
from featherweight.quant.gptq import Gptq, Outcome, gptq_matrix, ldl_diagonal
from featherweight.quant.grid import Grid, Quantized
from featherweight.quant.hadamard import (
    hadamard_exists,
    hadamard_matrix,
    hadamard_transform,
    random_hadamard,
    random_orthogonal,
)
from featherweight.quant.int4 import Int4Linear, int4_decoding
from featherweight.quant.matrix import QuantizedMatrix
from featherweight.quant.objective import OBJECTIVES
from featherweight.quant.optrot import Learned, Progress, learn_rotation, optrot
from featherweight.quant.optrot_plus import learn_rotation_plus, optrot_plus
from featherweight.quant.pipeline import Plan, Result, best_rotation, quantize_directory
from featherweight.quant.plots import plot_errors, plot_outliers
from featherweight.quant.quantize import (
    QUANTIZERS,
    Layer,
    QuantizedLinear,
    gptq,
    quantized_layers,
    quantized_matrices,
    rtn,
)
from featherweight.quant.rotate import Rotation, draw_rotation, fold, rotate
from featherweight.quant.rotations import ROTATIONS, haar, hadamard
from featherweight.quant.rtn import round_to_nearest
from featherweight.quant.simulate import quantized_activations, quantized_cache, round_tokens

__all__ = [
    # from directory to directory
    "quantize_directory",  # all of it, by one call
    "Plan",  # what to do
    "Result",  # what was done
    "best_rotation",  # tries some, keeps the least KL
    "load",  # safetensors alone
    "save",  # whole or not at all
    "FORMATS",
    "Layout",
    # rotations of a model
    "hadamard",
    "haar",
    "optrot",  # learned from weights
    "optrot_plus",  # and from inputs
    "learn_rotation",  # without fusing it
    "learn_rotation_plus",
    "Learned",
    "Progress",
    "Angle",  # step rules
    "Clipped",
    "rotate",  # fuses any rotation
    "fold",  # gains alone
    "Rotation",
    "draw_rotation",
    "ROTATIONS",
    "OBJECTIVES",
    "MODEL_TYPES",  # what is supported
    # quantisers of a model
    "rtn",
    "gptq",
    "Gptq",  # options
    "Layer",  # what watch= is told
    "QuantizedLinear",
    "quantized_layers",
    "quantized_matrices",  # also of experts, one by one
    "QuantizedMatrix",
    "QUANTIZERS",
    # of a matrix
    "Grid",
    "Quantized",
    "round_to_nearest",
    "gptq_matrix",
    "Outcome",
    "ldl_diagonal",
    # what inputs look like
    "collect",
    "transport",  # under a rotation
    "trace_ratio",
    # what it cost
    "perplexity",
    "divergence",
    "Divergence",
    "layer_errors",
    "outliers",
    "Outliers",
    "plot_outliers",
    "plot_errors",
    # 4-bit decoding on a CPU
    "int4_decoding",
    "Int4Linear",
    # activations, simulated
    "quantized_activations",
    "quantized_cache",
    "round_tokens",
    # orthogonal matrices
    "hadamard_matrix",
    "hadamard_exists",
    "hadamard_transform",
    "random_hadamard",
    "random_orthogonal",
]
