"""What `featherweight inspect` measures: how signals pass through a model, and by which layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from featherweight.depth import Settings, is_routed, picture, settings_of, to_dense, visited
from featherweight.init import jacobian_spectrum, signal_report
from featherweight.lab.errors import BadInput
from featherweight.lab.models import MODELS
from featherweight.lab.parse import load
from featherweight.lab.recipe import Recipe
from featherweight.lab.setup import make_model, read_data

IMAGES = 8
EXAMPLES = 2  # whose Jacobians are taken


def inspect(name: str, overrides: Sequence[str], seed: int, out: Path) -> list[str]:
    """Measure a model on the first training images of its data, and draw what was found.

    Of a model whose layers skip tokens, also which patches each layer visits; signals and Jacobian
    are those of the dense model.

    Args:
        name: a model, or a recipe, whose model and data are taken.
        overrides: ``key=value`` of the recipe.
        seed: of the weights.
        out: folder for the pictures.

    Returns:
        Paragraphs to print; the last names the pictures.

    Raises:
        BadInput: no such model or recipe, or the data or the pictures' folder is missing.
    """
    recipe = _recipe(name, overrides)
    data = read_data(recipe)
    model = make_model(recipe, data, seed).double()
    mean, std = (values.double().view(1, -1, 1, 1) for values in (data.mean, data.std))
    images = data.train.images[:IMAGES].double()
    images = images / 255 if data.train.images.dtype == torch.uint8 else images
    images = (images - mean) / std
    visits = None
    if is_routed(model):
        if isinstance(settings_of(model), Settings):
            visits = picture(model, images), _visits(model, images)
        to_dense(model)
    signals = signal_report(model, images)
    spectrum = jacobian_spectrum(model, images[:EXAMPLES])
    pictures: dict[str, Callable[[Path], object]] = {
        "signals.png": signals.plot,
        "spectrum.png": spectrum.plot,
    }
    told = [f"{signals}", f"{spectrum}"]
    if visits is not None:
        pictures["visited.png"] = visits[0].savefig
        told.append(visits[1])
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file, draw in pictures.items():
            draw(out / file)
    except OSError as error:
        raise BadInput(f"cannot write {out}: {error.strerror}") from None
    written = ", ".join(str(out / file) for file in pictures)
    return [*told, f"pictures: {written}"]


def _visits(model: nn.Module, images: Tensor) -> str:
    counts = visited(model, images)[:, 0].sum(-1).tolist()
    return f"tokens visited, layer by layer: {', '.join(map(str, counts))}"


def _recipe(name: str, overrides: Sequence[str]) -> Recipe:
    if name in MODELS or ":" in name:
        return load("dense-digits", [f"model.name={name}", *overrides])[0]
    return load(name, overrides)[0]
