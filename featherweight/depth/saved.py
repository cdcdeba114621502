"""Read back what ``save_pretrained`` wrote of a routed model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from featherweight.depth.convert import CONFIG, route


def load(model_class: Any, folder: str | Path, **options: Any) -> nn.Module:
    """Load a routed Hugging Face model from a folder that ``save_pretrained`` wrote.

    The folder is that of a dense model whose configuration also holds the settings of the routing;
    ``model_class.from_pretrained`` reads it as such. This routes it again and reads the weights of
    learned routers.

    Args:
        model_class: class with ``from_pretrained``, such as ``AutoModelForImageClassification``.
        folder: what ``save_pretrained`` wrote.
        **options: for ``from_pretrained``.

    Returns:
        The routed model, in evaluation mode.

    Raises:
        ValueError: the folder holds a model that isn't routed.
    """
    model: nn.Module = model_class.from_pretrained(folder, **options)
    settings = getattr(getattr(model, "config", None), CONFIG, None)
    if settings is None:
        raise ValueError(f"{folder} holds no routed model: its config.json has no {CONFIG}")
    route(model, **settings)
    added = [name for name in model.state_dict() if _is_added(model, name)]
    if added:
        model.load_state_dict(_read(Path(folder), added), strict=False)
    return model.eval()


def _is_added(model: nn.Module, name: str) -> bool:
    blocks = {path for path, module in model.named_modules() if hasattr(module, "depth_added")}
    return any(
        name.startswith(f"{path}.{part}.") for path in blocks for part in ("router", "predictor")
    )


def _read(folder: Path, names: list[str]) -> dict[str, Tensor]:
    """Read tensors by the end of their names: transformers may write another path to the blocks."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            stored = list(tensors.keys())
            for name in names:
                end = re.search(r"\.\d+\.(router|predictor)\..*", name)
                for key in (key for key in stored if end and key.endswith(end[0])):
                    found[name] = tensors.get_tensor(key)
    if missing := sorted(set(names) - set(found)):
        raise ValueError(f"{folder} lacks the router weights {', '.join(missing)}")
    return found
