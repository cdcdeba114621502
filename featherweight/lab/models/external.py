"""Models from elsewhere: a function of your own, or a Hugging Face image classifier on the disk."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from featherweight.lab.models.base import MODELS, Builder, Shape


def from_function(name: str, classes: int, shape: Shape, **options: Any) -> nn.Module:
    """Call ``package.module:function`` with classes, shape and the options.

    Args:
        name: where the function is; its module must be importable.
        classes: number of outputs.
        shape: channels, height and width of the images.
        options: passed on by name.

    Raises:
        ValueError: the module or the function is not there, does not take these arguments, or
            raises.
        TypeError: it returns no module.
    """
    function = _find(name)
    arguments = {"classes": classes, "shape": shape, **options}
    try:
        inspect.signature(function).bind(**arguments)
        model = function(**arguments)
    except Exception as error:
        raise ValueError(f"model {name!r}: {_one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise TypeError(f"model {name!r} returned a {type(model).__name__}, not an nn.Module")
    return model


def _find(name: str) -> Builder:
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's code
        raise ValueError(
            f"model {name!r}: cannot import {module_name!r} ({_one_line(error)}); "
            "is its folder on PYTHONPATH?"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"model {name!r}: {module_name} has no function {function_name!r}")
    return function  # type: ignore[no-any-return]


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


class Logits(nn.Module):
    """Makes a Hugging Face image classifier a module from images to logits.

    Args:
        model: the classifier, kept as the attribute ``model`` (for ``model.save_pretrained``).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] to logits [B, classes]."""
        logits: Tensor = self.model(pixel_values=x).logits
        return logits


@MODELS.register("hf", "any Hugging Face image classifier, from a local folder (option path)")
def hugging_face(classes: int, shape: Shape, path: str = "") -> nn.Module:
    """Load a classifier that ``save_pretrained`` wrote, with a fresh head where classes differ.

    Only safetensors are read, in float32; nothing is downloaded.

    Args:
        classes: number of outputs.
        shape: channels, height and width of the images.
        path: the folder.

    Raises:
        ImportError: transformers is not installed.
        ValueError: the folder is missing or cannot be read, or it wants other channels.
    """
    if not path or not Path(path).is_dir():
        raise ValueError(f"option path of model 'hf' must be an existing folder, got {path!r}")
    try:
        from transformers import AutoModelForImageClassification
    except ImportError as error:
        raise ImportError(
            "model 'hf' needs transformers: pip install 'featherweight[hf]'"
        ) from error
    try:
        model = AutoModelForImageClassification.from_pretrained(
            path,
            num_labels=classes,
            ignore_mismatched_sizes=True,
            local_files_only=True,
            use_safetensors=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"model 'hf' cannot read {path!r}: {_one_line(error)}") from error
    channels = getattr(model.config, "num_channels", shape[0])
    if channels != shape[0]:
        raise ValueError(
            f"model 'hf' at {path!r} wants {channels} channels, images have {shape[0]}"
        )
    return Logits(model.float()).train()
