"""From a recipe to the things a run works on: data, batches, model."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from featherweight.init import INITS
from featherweight.lab.data import Batches, Data
from featherweight.lab.data import load as load_data
from featherweight.lab.data.seeding import derive_seed
from featherweight.lab.depth import convert
from featherweight.lab.errors import BadInput
from featherweight.lab.models import build as build_model
from featherweight.lab.recipe import Recipe


def read_data(recipe: Recipe) -> Data:
    """Load the recipe's data.

    Raises:
        BadInput: it is missing, damaged, or asked for in an impossible way.
    """
    try:
        return load_data(
            recipe.data.name,
            recipe.data.path,
            validation=recipe.data.validation,
            limit=recipe.data.limit,
            seed=recipe.data.split_seed,
        )
    except (ValueError, OSError) as error:
        raise BadInput(f"data: {error}") from error


def make_model(recipe: Recipe, data: Data, seed: int) -> nn.Module:
    """Build the recipe's model for the data, its weights drawn from the run's seed.

    With `recipe.depth` the weights may come from another run, and layers skip tokens.

    Raises:
        BadInput: the model can't be built as the recipe says.
    """
    drawn = derive_seed(seed, "initialisation")
    try:
        model = build_model(
            recipe.model.name,
            classes=data.classes,
            shape=data.shape,
            seed=drawn,
            **recipe.model.options,
        )
        if recipe.model.init is not None:
            start, example = (
                INITS[recipe.model.init].method,
                {"example": torch.zeros(2, *data.shape)},
            )
            takes_example = "example" in signature(start).parameters
            options = recipe.model.init_options | (example if takes_example else {})
            start(model, seed=drawn, **options)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:  # Runtime: no memory
        raise BadInput(f"model: {' '.join(str(error).split())}") from error
    return convert(recipe, model, data.classes, seed)


def make_batches(
    recipe: Recipe, data: Data, seed: int, accelerator: Accelerator
) -> dict[str, Batches]:
    """Serve the training, validation (if any) and test images of this rank.

    Raises:
        BadInput: there are too few images or too small batches for the number of ranks.
    """
    size, world = recipe.fit.batch_size, accelerator.num_processes
    if size < world:
        raise BadInput(f"fit.batch_size: {size} images are too few for {world} ranks")
    common: dict[str, Any] = {
        "mean": data.mean,
        "std": data.std,
        "seed": seed,
        "device": accelerator.device,
        "rank": accelerator.process_index,
        "world": world,
    }
    # Batch norm cannot train on a single image.
    crumb = 0 < len(data.train) % size < 2 * world
    if crumb and len(data.train) < size:
        raise BadInput(f"data: {len(data.train)} training images are too few to train on")
    augment = recipe.data.augment
    batches = {
        "train": Batches(
            data.train, batch_size=size, augment=augment, shuffle=True, drop_last=crumb, **common
        )
    }
    for name, split in {"validation": data.validation, "test": data.test}.items():
        if len(split):
            batches[name] = Batches(
                split, batch_size=max(size, 500), augment="none", shuffle=False, **common
            )
    return batches
