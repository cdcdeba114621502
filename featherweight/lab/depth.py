"""The depth section of a recipe at work: weights of a dense run, conversion, loss and resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from featherweight.depth import (
    Settings,
    auxiliary_loss,
    fewer_layers,
    is_routed,
    route,
    settings_of,
)
from featherweight.depth import tome as merge_tokens
from featherweight.depth.convert import ledger_of
from featherweight.lab.data.seeding import derive_seed
from featherweight.lab.errors import BadInput
from featherweight.lab.fit import Loss
from featherweight.lab.recipe import FEWER, ROUTED, Recipe
from featherweight.lab.start import last_level


def convert(recipe: Recipe, model: nn.Module, classes: int, seed: int) -> nn.Module:
    """Give a model the weights of a dense run, and route it, as the recipe says.

    Args:
        recipe: what to do.
        model: dense, on the CPU; changed in place.
        classes: number of outputs.
        seed: of the run.

    Returns:
        The model, or a new one with fewer layers.

    Raises:
        BadInput: the other run isn't finished or of another model, or the model can't be routed.
    """
    asked = recipe.depth
    try:
        if asked.from_run is not None:
            file = last_level(asked.from_run, seed) / "model.safetensors"
            take_weights(model, load_file(file), classes)
        if asked.method in ROUTED:
            options: dict[str, Any] = {"seed": derive_seed(seed, "routing"), **asked.options}
            return route(model, asked.method, asked.capacity, asked.layers, **options)
        if asked.method == "tome":
            return merge_tokens(model, **asked.options)
        return fewer_layers(model, **asked.options) if asked.method == FEWER else model
    except (ValueError, TypeError, OSError) as error:
        raise BadInput(f"depth: {' '.join(str(error).split())}") from error


def take_weights(model: nn.Module, state: Mapping[str, Tensor], classes: int) -> None:
    """Load another run's weights in place; an output layer for other classes stays as it was.

    Raises:
        ValueError: the state is of another model.
    """
    own = model.state_dict()
    if odd := sorted(own.keys() ^ state.keys()):
        raise ValueError(f"from_run holds another model: {odd[0]} is in one of them alone")
    heads = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == classes
        for part in ("weight", "bias")
    }
    for name, value in state.items():
        if value.shape != own[name].shape and name not in heads:
            shapes = f"{tuple(value.shape)} and {tuple(own[name].shape)}"
            raise ValueError(f"from_run holds another model: {name} is {shapes}")
    fitting = {name: value for name, value in state.items() if value.shape == own[name].shape}
    model.load_state_dict(own | fitting)


@dataclass(frozen=True)
class RoutedLoss(Loss):
    """What training minimises, and how badly routers predict their own choice.

    Attributes:
        model: routed with an auxiliary loss.
        auxiliary: weight of that loss.
    """

    model: nn.Module | None = None
    auxiliary: float = 0.0

    def __call__(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the sum over the images of a batch."""
        total = super().__call__(images, logits, labels)
        assert self.model is not None
        return total + self.auxiliary * len(labels) * auxiliary_loss(self.model)


def with_auxiliary(loss: Loss, recipe: Recipe, model: nn.Module) -> Loss:
    """Return the loss with the routers' own added, where the recipe asks for one."""
    if recipe.depth.options.get("auxiliary", "none") == "none":
        return loss
    return RoutedLoss(**vars(loss), model=model, auxiliary=recipe.depth.auxiliary)


def restart_choices(model: nn.Module, steps: int) -> None:
    """Let random choices of tokens go on as after so many training steps of the level."""
    if is_routed(model) and isinstance(settings_of(model), Settings):
        ledger_of(model).step = steps
