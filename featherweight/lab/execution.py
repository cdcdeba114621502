"""How a run computes its sparse weights, masked or truly sparse, and what that gained."""

from __future__ import annotations

import copy
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from featherweight.common import write_text
from featherweight.lab.data import Batches
from featherweight.lab.errors import BadInput
from featherweight.lab.keep import Kept, Resting
from featherweight.lab.optimizer import make_optimizer
from featherweight.lab.recipe import FitRecipe, Recipe
from featherweight.lab.speed import settings_kept
from featherweight.sparse import FORMS, Evolving, Masks, hold
from featherweight.sparse.execute import backends, footprint, sparsely
from featherweight.sparse.execute.convert import conversions

PRECISIONS = ("highest", "medium")  # of dense float32 products: on AMD they differ by a factor of 2
ROUNDS, BUDGET = 7, 3.0  # turns of all candidates; fewer where they take more seconds in all


@dataclass(frozen=True)
class Execution:
    """What the last level's training step costs, against the best dense one on the same machine.

    Attributes:
        form: "masked" or "sparse".
        layers: backend to the number of layers that have it; empty where masked.
        seconds: of a training step, between two changes of the masks.
        dense_seconds: of a dense training step with the same optimizer, under the faster of
            torch's float32 matmul precisions "highest" and "medium".
        dense_precision: which one that was.
        bytes: weights, gradients, optimizer state and indices, or masks, between two steps.
        dense_bytes: the same of the dense step.
    """

    form: str
    layers: Mapping[str, int]
    seconds: float
    dense_seconds: float
    dense_precision: str
    bytes: int
    dense_bytes: int

    def row(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self)


def refuse(recipe: Recipe, accelerator: Accelerator) -> None:
    """Refuse ``execute.form=sparse`` where it can't be.

    Raises:
        BadInput: says why.
    """
    reason = _reason(recipe, accelerator)
    if recipe.execute.form == "sparse" and reason:
        raise BadInput(f"execute.form: sparse layers {reason}; use masked")


def _reason(recipe: Recipe, accelerator: Accelerator) -> str | None:
    if recipe.sparse.method in FORMS or recipe.fit.optimizer in ("sign-in", "nanoadam"):
        return "can't hold what the method or optimizer keeps for each dense weight"
    if accelerator.device.type != "cpu":
        return f"gain nothing on {accelerator.device.type}"
    if accelerator.num_processes > 1:
        return "are not trained by several processes"
    if recipe.execute.compile:
        return "are exchanged during training, which a compiled model can't follow"
    if recipe.execute.precision != "fp32":
        return f"compute in fp32, not {recipe.execute.precision}"
    return None


@contextmanager
def executed(
    recipe: Recipe,
    model: nn.Module,
    optimizer: Optimizer,
    kept: Kept,
    example: Tensor,
    record: Path,
) -> Iterator[None]:
    """Train a level in the form that the recipe asks for; on exit the model is the dense one again.

    Args:
        recipe: "auto" is sparse where this machine has measured a gain.
        model: masked.
        optimizer: that trains it, wrapped or not.
        kept: `Resting` masks, or a dynamic method in force; what else holds its masks by itself.
        example: a batch of the size that training has.
        record: file that remembers how each layer of the level is computed, so that a resumed
            level computes alike, bit for bit, whatever this machine measures now.

    Raises:
        BadInput: sparse is asked for and a layer can't be.
    """
    if recipe.execute.form == "masked" or not isinstance(kept, (Resting, Evolving)):
        yield
    elif isinstance(kept, Evolving):
        with _evolving(recipe, model, optimizer, kept, example):
            yield
    else:
        with _resting(recipe, model, optimizer, kept.masks, example, record):
            yield


def _evolving(
    recipe: Recipe, model: nn.Module, optimizer: Optimizer, method: Evolving, example: Tensor
) -> AbstractContextManager[object]:
    if recipe.execute.form == "auto" and not _pays(model, method.masks, example):
        return nullcontext()
    return _trained("sparse", model, optimizer, method, example)


def _resting(
    recipe: Recipe,
    model: nn.Module,
    optimizer: Optimizer,
    masks: Masks,
    example: Tensor,
    record: Path,
) -> AbstractContextManager[object]:
    if record.is_file():
        known: dict[str, str] = json.loads(record.read_text("utf-8"))
    else:
        sparse = recipe.execute.form == "sparse" or _pays(model, masks, example)
        known = _backends(model, masks, example) if sparse else {}
        write_text(record, json.dumps(known, indent=1) + "\n")
    return _trained("sparse" if known else "masked", model, optimizer, masks, example, known)


def _backends(model: nn.Module, masks: Masks, example: Tensor) -> dict[str, str]:
    try:
        pairs = conversions(model, masks, example=example)
    except ValueError as error:
        raise BadInput(f"execute.form: {error}") from error
    return {pair.name: pair.sparse.backend for pair in pairs}


def _trained(
    form: str,
    model: nn.Module,
    optimizer: Optimizer,
    held: Masks | Evolving,
    example: Tensor,
    known: Mapping[str, str] | None = None,
) -> AbstractContextManager[object]:
    if form == "masked":
        assert isinstance(held, Masks)
        return hold(model, optimizer, held)
    try:
        return sparsely(model, optimizer, held, backend=known or "auto", example=example)
    except ValueError as error:
        raise BadInput(f"execute.form: {error}") from error


def _pays(model: nn.Module, masks: Masks, example: Tensor) -> bool:
    """Tell whether this machine has measured a gain for a layer; no, where one can't be sparse."""
    try:
        return any(name != "masked" for name in _backends(model, masks, example).values())
    except BadInput:
        return False


def measured(
    recipe: Recipe, accelerator: Accelerator, model: nn.Module, masks: Masks, batches: Batches
) -> Execution | None:
    """Time a training step as it was executed against the best dense one, on copies of the model.

    Args:
        recipe: what ran.
        accelerator: of the run.
        model: masked.
        masks: of its last level.
        batches: a step takes the first of them.

    Returns:
        None where nothing is masked, or training was not that of one process in fp32 on the CPU.
    """
    execute = recipe.execute
    plain = execute.precision == "fp32" and not execute.compile
    alone = accelerator.device.type == "cpu" and accelerator.num_processes == 1
    if masks.density == 1.0 or not (plain and alone):
        return None
    images, labels, _ = next(batches.epoch(0, 0))
    form = execute.form
    if form == "auto":
        fits = _reason(recipe, accelerator) is None and _pays(model, masks, images)
        form = "sparse" if fits else "masked"
    own = _Step(model, recipe.fit, images, labels)
    dense = {name: _Step(model, recipe.fit, images, labels) for name in PRECISIONS}
    with _trained(form, own.model, own.optimizer, masks, images):
        precisions = {"own": execute.matmul_precision, **{name: name for name in dense}}
        times = _alternate({"own": own, **dense}, precisions)
        used = footprint(own.model, own.optimizer).total
        layers = dict(Counter(backends(own.model).values()))
    best = min(dense, key=lambda name: times[name])
    held = 0 if form == "sparse" else sum(4 * mask.numel() for mask in masks.values())
    return Execution(
        form=form,
        layers=layers,
        seconds=times["own"],
        dense_seconds=times[best],
        dense_precision=best,
        bytes=used + held,
        dense_bytes=footprint(dense[best].model, dense[best].optimizer).total,
    )


class _Step:
    """A training step on a copy of a model, with the recipe's optimizer."""

    def __init__(self, model: nn.Module, fit: FitRecipe, images: Tensor, labels: Tensor) -> None:
        self.model = copy.deepcopy(model).train()
        self.optimizer = make_optimizer(self.model, fit)
        self.images, self.labels = images, labels
        self.run()  # the optimizer's state begins with its first step

    def run(self) -> None:
        nn.functional.cross_entropy(self.model(self.images), self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _alternate(steps: Mapping[str, _Step], precisions: Mapping[str, str]) -> dict[str, float]:
    """Return the median seconds of steps that run in turn, each under its matmul precision."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    with settings_kept(), torch.random.fork_rng(devices=[]):
        began = time.perf_counter()
        for turn in range(ROUNDS):
            for name, step in steps.items():
                torch.set_float32_matmul_precision(precisions[name])
                started = time.perf_counter()
                step.run()
                times[name].append(time.perf_counter() - started)
            if turn > 1 and time.perf_counter() - began > BUDGET:
                break
    return {name: median(seconds) for name, seconds in times.items()}
