"""Where a run starts: the masks that are made before training, and weights from another run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from featherweight.lab.data import Batches, Data, Split
from featherweight.lab.data.seeding import derive_generator
from featherweight.lab.errors import BadInput
from featherweight.lab.recipe import START_METHODS, Recipe, SparseRecipe
from featherweight.sparse import CONSTRUCTIONS, CRITERIA, Masks, couple_, prune, random, repair

ScoringBatches = Sequence[tuple[Tensor, Tensor]]
PER_CLASS = 10
BATCHES = 4


def scoring_batches(data: Data, seed: int, device: torch.device | str) -> ScoringBatches:
    """Draw the images that criteria score weights on: balanced over the classes, not augmented.

    Args:
        data: its training split is used.
        seed: of the run.
        device: where the images go.

    Returns:
        4 batches of 10 images a class, as images and labels; a class with fewer than 40 images
        gives some of them more than once.
    """
    generator = derive_generator(seed, "scoring")
    labels = data.train.labels
    rows = []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        order = members[torch.randperm(len(members), generator=generator)]
        rows.append(order[torch.arange(PER_CLASS * BATCHES) % len(order)].view(BATCHES, PER_CLASS))
    chosen = torch.cat(rows, dim=1)
    split = Split(data.train.images[chosen.flatten()], labels[chosen.flatten()])
    served = Batches(
        split,
        data.mean,
        data.std,
        batch_size=chosen.shape[1],
        seed=seed,
        augment="none",
        shuffle=False,
        device=device,
    )
    return [(images, found) for images, found, _ in served.epoch("scoring", 0)]


def start_masks(
    recipe: Recipe, model: nn.Module, seed: int, batches: Callable[[], ScoringBatches]
) -> Masks:
    """Make the masks that no level of the run leaves.

    Args:
        recipe: what to do.
        model: freshly initialised, on its device; not changed.
        seed: of the run.
        batches: called where a criterion looks at data.

    Raises:
        BadInput: the recipe does not fit the model.
    """
    sparse = recipe.sparse
    try:
        if sparse.method == "dense" and sparse.density < 1:
            raise ValueError(f"method dense keeps every weight, density is {sparse.density:g}")
        if sparse.method == "dense" and sparse.masks_from is not None:
            return Masks.load(last_level(sparse.masks_from, seed) / "masks.safetensors", model)
        support = _support(sparse, model, seed, batches)
        if sparse.method in START_METHODS:
            return _main_masks(sparse, sparse.method, model, seed, support, batches)
        if sparse.method == "cyclic" and sparse.density < 1:
            return _main_masks(sparse, "random", model, seed, support, batches)
        return Masks.dense(model, **_names(sparse)) if support is None else support
    except (ValueError, TypeError, OSError) as error:
        raise BadInput(f"sparse: {error}") from error


def last_level(folder: str, seed: int) -> Path:
    """Return the folder of the last level of a finished run with the same seed.

    Raises:
        ValueError: the run is not finished.
    """
    run = Path(folder) / f"seed-{seed}"
    if not (run / "result.json").is_file():
        raise ValueError(f"{run} is no finished run")
    return max(run.glob("level-*"))


def couple(recipe: Recipe, model: nn.Module, masks: Masks, seed: int) -> None:
    """Give the weights inside the masks the signs or magnitudes of another run, in place.

    Raises:
        BadInput: the other run is not finished, or of another model.
    """
    coupling = recipe.sparse.couple
    if coupling.run is None:
        return
    try:
        learned = load_file(last_level(coupling.run, seed) / "model.safetensors")
        couple_(
            model,
            masks,
            learned,
            signs=coupling.signs,
            magnitudes=coupling.magnitudes,
            generator=derive_generator(seed, "couple"),
        )
    except (ValueError, OSError) as error:
        raise BadInput(f"sparse.couple: {error}") from error


def _support(
    sparse: SparseRecipe, model: nn.Module, seed: int, batches: Callable[[], ScoringBatches]
) -> Masks | None:
    support = sparse.support
    if support.density == 1.0:
        return None
    generator = derive_generator(seed, "support")
    if support.method == "random":
        return random(
            model, support.density, support.allocation, generator=generator, **_names(sparse)
        )
    given = {"generator": generator, **_names(sparse)}
    return _make(support.method, model, support.density, support.allocation, batches, given)


def _main_masks(
    sparse: SparseRecipe,
    method: str,
    model: nn.Module,
    seed: int,
    support: Masks | None,
    batches: Callable[[], ScoringBatches],
) -> Masks:
    generator = derive_generator(seed, "masks")
    allocation = sparse.allocation or ("erk" if sparse.method in ("cyclic", "npb") else "global")
    given: dict[str, Any] = {"generator": generator, "support": support, **_names(sparse)}
    if method == "random":
        given |= {"sampling": sparse.sampling, "legacy": sparse.legacy}
        given |= {} if sparse.structure is None else {"structure": sparse.structure}
        masks = random(model, sparse.density, allocation, **given)
    else:
        given |= {"iterations": sparse.iterations, "structure": sparse.structure, **sparse.options}
        masks = _make(method, model, sparse.density, allocation, batches, given)
    return repair(masks, model, generator=generator).masks if sparse.repair else masks


def _make(
    method: str,
    model: nn.Module,
    density: float,
    allocation: str,
    batches: Callable[[], ScoringBatches],
    given: dict[str, Any],
) -> Masks:
    """Build masks by a construction, or score and prune; both with what they ask for."""
    if method in CONSTRUCTIONS:
        build = CONSTRUCTIONS[method].method
        takes = inspect.signature(build).parameters
        given["allocation"] = allocation
        if "inputs" in takes:  # an image, to see where units lead
            given["inputs"] = batches()[0][0][:1]
        for name in ("structure", "iterations"):
            if given.get(name) is not None:
                raise ValueError(f"{method} takes no {name}")
        known = {name: value for name, value in given.items() if name in takes}
        return build(model, density, **known)
    takes = inspect.signature(CRITERIA[method].method).parameters
    if "generator" not in takes:
        given.pop("generator")
    if "batches" in takes:
        given["batches"] = batches()
    return prune(model, method, density, allocation, **given)


def _names(sparse: SparseRecipe) -> dict[str, Any]:
    return {"include": sparse.include, "exclude": sparse.exclude}
