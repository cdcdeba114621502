"""Build a model by name from a seed."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from featherweight.common import unknown
from featherweight.lab.models.base import MODELS, Builder, Shape, check_positive
from featherweight.lab.models.external import from_function


def build(name: str, *, classes: int, shape: Shape, seed: int, **options: Any) -> nn.Module:
    """Build a classifier on the CPU, its weights drawn from ``seed`` alone.

    Args:
        name: a name in ``MODELS``, or ``package.module:function``, a function of your own that is
            called with ``classes=``, ``shape=`` and the options and returns the model.
        classes: number of outputs.
        shape: channels, height and width of the images.
        seed: of the weights; torch's global generators are left as they were.
        options: of the model, as its builder names them.

    Returns:
        A module from images [B, C, H, W] to logits [B, classes], in training mode.

    Raises:
        ValueError: the name or an option is unknown, a value is out of range, or the function
            cannot be imported or fails.
        TypeError: the function returns no module.
    """
    check_positive(classes=classes)
    if len(shape) != 3:
        raise ValueError(f"shape must be (channels, height, width), got {tuple(shape)}")
    check_positive(channels=shape[0], height=shape[1], width=shape[2])
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would touch the GPUs' too
        if ":" in name:
            return from_function(name, classes, shape, **options)
        builder = MODELS[name].method
        _check_options(name, builder, options)
        return builder(classes, shape, **options)


def option_names(builder: Builder) -> tuple[str, ...]:
    """Return the names of a builder's options: its parameters after classes and shape."""
    return tuple(inspect.signature(builder).parameters)[2:]


def _check_options(name: str, builder: Builder, options: dict[str, Any]) -> None:
    allowed = option_names(builder)
    for option in options:
        if option not in allowed:
            raise ValueError(unknown(f"option of model {name!r},", option, allowed))
