"""From a federated recipe to a simulation, and to the setting it is checked against."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.federated import schedules
from featherweight.federated.algorithms import ALGORITHMS, Algorithm
from featherweight.federated.codecs import CODECS
from featherweight.federated.codecs.codec import Codec
from featherweight.federated.local import Adam, Local, Sgd
from featherweight.federated.population import Population
from featherweight.federated.privacy import Privacy
from featherweight.federated.robust import AGGREGATORS
from featherweight.federated.sampling import SAMPLERS
from featherweight.federated.setting import Finding, Setting, check
from featherweight.federated.simulate import Simulation, simulate
from featherweight.federated.time_model import TimeModel
from featherweight.lab.errors import BadInput
from featherweight.lab.federated_data import Clients
from featherweight.lab.federated_recipe import FederatedRecipe, ScheduleRecipe
from featherweight.lab.recipe import Recipe
from featherweight.lab.setup import make_model

EQUALISING = ("fednova", "scaffold", "feddyn", "mime")
"""Algorithms whose fixed point does not depend on the clients' numbers of local steps."""
REMEMBERING = ("rand-k-temporal", "rand-k-spatio-temporal")
"""Codecs whose server keeps each client's last values; that of others keeps a few numbers."""


def make_simulation(recipe: FederatedRecipe, clients: Clients, seed: int) -> Simulation:
    """Build what the recipe says; nothing is trained yet.

    Args:
        recipe: what to do.
        clients: as of `make_clients`.
        seed: of the run: weights, batches, cohorts and codec have streams of their own in it.

    Raises:
        BadInput: something cannot be built, or does not go together.
    """
    model = make_model(Recipe(model=recipe.model), clients.data, seed)
    model.to(_device(recipe))
    try:
        return simulate(
            model,
            clients.train,
            make_algorithm(recipe),
            sampler=make_sampler(recipe, clients.train, model, seed),
            local=make_local(recipe),
            codec=make_codec(recipe, seed),
            aggregator=_aggregator(recipe),
            privacy=_privacy(recipe),
            weighting=recipe.weighting,
            seed=seed,
            backend=recipe.execute.backend,
            threads=recipe.execute.threads,
        )
    except (ValueError, TypeError) as error:
        raise BadInput(" ".join(str(error).split())) from error


def _device(recipe: FederatedRecipe) -> str:
    found = torch.accelerator.current_accelerator(check_available=True)
    if recipe.execute.device not in ("cpu", found.type if found else ""):
        raise BadInput(f"execute.device: this machine has no {recipe.execute.device}")
    return recipe.execute.device


def make_algorithm(recipe: FederatedRecipe) -> Algorithm:
    """Build the recipe's algorithm."""
    asked = recipe.algorithm
    method = ALGORITHMS[asked.name].method
    options = {name: _tuple(value) for name, value in asked.options.items()}
    default = signature(method).parameters.get("server_rate")
    if default is not None:
        rate = asked.server_rate or float(default.default)
        options["server_rate"] = scheduled(rate, asked.schedule)
    return method(**options)


def make_local(recipe: FederatedRecipe) -> Local:
    """Build the clients' work."""
    asked = recipe.local
    if asked.optimizer == "adam" and (asked.momentum or asked.weight_decay):
        raise ValueError("local: momentum and weight_decay are of sgd, the optimizer is adam")
    sgd = Sgd(momentum=asked.momentum, weight_decay=asked.weight_decay)
    return Local(
        learning_rate=scheduled(asked.learning_rate, asked.schedule),
        epochs=asked.epochs,
        steps=asked.steps,
        batch_size=asked.batch_size,
        optimizer=sgd if asked.optimizer == "sgd" else Adam(),
    )


def scheduled(rate: float, schedule: ScheduleRecipe) -> float | Callable[[int], float]:
    """Return a learning rate that follows a schedule; a plain number where it does not change."""
    found: float | Callable[[int], float] = rate
    if schedule.name == "exponential":
        found = schedules.exponential(rate, schedule.decay, schedule.scale)
    elif schedule.name == "inverse-linear":
        found = schedules.inverse_linear(rate, schedule.scale)
    elif schedule.name == "inverse-sqrt":
        found = schedules.inverse_square_root(rate, schedule.scale)
    return schedules.warmup(found, schedule.warmup) if schedule.warmup else found


def make_sampler(
    recipe: FederatedRecipe, population: Population, model: nn.Module, seed: int
) -> Any:
    """Build the recipe's sampler, with what it asks for."""
    asked = recipe.sampler
    entry = SAMPLERS[asked.name]
    known: dict[str, Callable[[], Any]] = {
        "clients": lambda: len(population),
        "size": lambda: asked.size,
        "sizes": lambda: population.sizes,
        "seconds": lambda: _seconds(recipe, population, model, seed),
    }
    given = {need: known[need]() for need in entry.needs}
    if "seed" in signature(entry.method).parameters:
        given["seed"] = seed
    return entry.method(**given, **asked.options)


def _seconds(
    recipe: FederatedRecipe, population: Population, model: nn.Module, seed: int
) -> Tensor:
    local = make_local(recipe)
    everyone = torch.arange(len(population))
    if recipe.local.epochs is not None:
        examples = recipe.local.epochs * population.sizes
    else:
        batch = recipe.local.batch_size
        sizes = population.sizes if batch is None else population.sizes.clamp(max=batch)
        examples = local.steps_of(0, everyone, population) * sizes
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    spread = recipe.time.spread
    return time_model(recipe).devices(examples, size, size, spread=spread, seed=seed)


def make_codec(recipe: FederatedRecipe, seed: int) -> Codec | None:
    """Build the recipe's codec; None for identity without options, which copies nothing."""
    asked = recipe.codec
    if asked.name == "identity" and not asked.options:
        return None
    method = CODECS[asked.name].method
    seeded: dict[str, Any] = {"seed": seed} if "seed" in signature(method).parameters else {}
    return method(**asked.options, **seeded)


def _aggregator(recipe: FederatedRecipe) -> Any:
    asked = recipe.aggregator
    if asked.name == "mean":
        return None
    method = AGGREGATORS[asked.name].method
    return lambda vectors, weights: method(vectors, weights, **asked.options)


def _privacy(recipe: FederatedRecipe) -> Privacy | None:
    asked = recipe.privacy
    if asked.clip is None:
        return None
    return Privacy(asked.clip, asked.noise_multiplier, quantile=asked.quantile)


def time_model(recipe: FederatedRecipe) -> TimeModel:
    """Return the recipe's devices."""
    asked = recipe.time
    return TimeModel(
        down=asked.down,
        up=asked.up,
        slowdown=asked.slowdown,
        overhead=asked.overhead,
        server=asked.server,
        per_example=asked.per_example,
    )


def findings(recipe: FederatedRecipe, clients: Clients, model: nn.Module) -> list[Finding]:
    """Check a recipe against the setting it names.

    Args:
        recipe: what to do.
        clients: whose numbers of images matter.
        model: looked at for batch normalisation.

    Raises:
        BadInput: the setting refuses it.
    """
    try:
        found = check(setting_of(recipe, clients.train, model))
    except (ValueError, TypeError) as error:
        raise BadInput(" ".join(str(error).split())) from error
    if found and found[0].level == "refused":
        raise BadInput(f"setting: {found[0].text}")
    return found


def setting_of(recipe: FederatedRecipe, population: Population, model: nn.Module) -> Setting:
    """Say what matters of a recipe for its setting."""
    assert recipe.setting.kind is not None  # checked when it was read
    algorithm, codec = make_algorithm(recipe), make_codec(recipe, 0)
    steps = make_local(recipe).steps_of(0, torch.arange(len(population)), population)
    size = len(population) if recipe.sampler.name == "all" else recipe.sampler.size
    traits: dict[str, Any] = {} if codec is None else _traits(codec)
    return Setting(
        kind=recipe.setting.kind,
        clients=len(population),
        cohort=min(size, len(population)),
        sampler=recipe.sampler.name,
        weighting=recipe.weighting,
        algorithm=recipe.algorithm.name,
        client_state=algorithm.stateful,
        corrects_steps=recipe.algorithm.name in EQUALISING,
        codec=recipe.codec.name,
        robust=recipe.aggregator.name != "mean",
        privacy=recipe.privacy.clip is not None,
        unequal_steps=len(steps.unique()) > 1,
        unequal_sizes=len(population.sizes.unique()) > 1,
        batch_norm=any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()),
        split=recipe.evaluate.split,
        tuned_on=recipe.setting.tuned_on,
        **traits,
    )


def _traits(codec: Codec) -> dict[str, Any]:
    return {
        "codec_memory": codec.stateful == "client" or codec.name in REMEMBERING,
        "unbiased": codec.unbiased,
        "asks_loss": type(codec).observe is not Codec.observe,
        "separable": codec.separable,
    }


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
