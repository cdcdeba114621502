"""The rotations to choose from, by name: each finds R1 and R2 for a model."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from featherweight.common import Registry
from featherweight.quant.optrot import Report, learn_rotation
from featherweight.quant.optrot_plus import learn_rotation_plus
from featherweight.quant.rotate import Rotation, draw_rotation, rotate

Finder = Callable[[nn.Module, int, int | None, Tensor | None, Report | None], Rotation | None]
"""Takes model, seed, steps (None for the default), calibration ids and progress."""

ROTATIONS: Registry[Finder] = Registry("rotation")
"""How a decoder is rotated before its weights are rounded."""

_OPTROT = "Gadhikar et al. 2025, arXiv:2512.24124"


def hadamard(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Rotate by random-sign Hadamard matrices, fused and in place (QuaRot without online parts).

    Args:
        model: a supported decoder. Where a size has no Hadamard matrix, a Haar rotation is used.
        seed: of the signs.

    Returns:
        The same model: the same function, to rounding.

    Raises:
        ValueError: the model is not supported; nothing was changed.
    """
    return rotate(model, draw_rotation(model, "hadamard", seed=seed))


def haar(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Rotate by uniformly random orthogonal matrices, fused and in place.

    Args:
        model: a supported decoder.
        seed: of the draw.

    Returns:
        The same model: the same function, to rounding.

    Raises:
        ValueError: the model is not supported; nothing was changed.
    """
    return rotate(model, draw_rotation(model, "haar", seed=seed))


@ROTATIONS.register("none", "leave the model as it is: best for rounding to nearest")
def _none(
    model: nn.Module, seed: int, steps: int | None, ids: Tensor | None, report: Report | None
) -> Rotation | None:
    return None


@ROTATIONS.register("haar", "uniformly random", "Chee et al. 2023, arXiv:2307.13304")
def _haar(
    model: nn.Module, seed: int, steps: int | None, ids: Tensor | None, report: Report | None
) -> Rotation | None:
    return draw_rotation(model, "haar", seed=seed)


@ROTATIONS.register(
    "hadamard", "random signs times a Hadamard matrix", "Ashkboos et al. 2024, arXiv:2404.00456"
)
def _hadamard(
    model: nn.Module, seed: int, steps: int | None, ids: Tensor | None, report: Report | None
) -> Rotation | None:
    return draw_rotation(model, "hadamard", seed=seed)


@ROTATIONS.register("optrot", "learned from the weights alone", _OPTROT)
def _optrot(
    model: nn.Module, seed: int, steps: int | None, ids: Tensor | None, report: Report | None
) -> Rotation | None:
    steps = 300 if steps is None else steps
    return learn_rotation(model, steps=steps, seed=seed, progress=report).rotation


@ROTATIONS.register(
    "optrot-plus",
    "learned from weights and inputs (our objective)",
    _OPTROT,
    needs=("calibration",),
)
def _optrot_plus(
    model: nn.Module, seed: int, steps: int | None, ids: Tensor | None, report: Report | None
) -> Rotation | None:
    if ids is None:
        raise ValueError("rotation 'optrot-plus' needs calibration text")
    start = _optrot(model, seed, steps, ids, report)
    return learn_rotation_plus(model, ids, seed=seed, start=start, progress=report).rotation
