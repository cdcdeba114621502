"""What is it that training learned, signs or magnitudes? Start a run from either of another's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from featherweight.common import Generator, as_generator, unwrap
from featherweight.sparse.masks import Masks

Signs = Literal["own", "learned", "random"]
Magnitudes = Literal["own", "learned", "shuffled", "random"]
Others = Literal["own", "learned"]


@torch.no_grad()
def couple_(
    model: nn.Module,
    masks: Masks,
    learned: Mapping[str, Tensor],
    *,
    signs: Signs = "own",
    magnitudes: Magnitudes = "own",
    others: Others = "own",
    seed: int | None = None,
    generator: Generator | None = None,
) -> None:
    """Give the kept weights signs and magnitudes of different origin, in place.

    Afterwards kept weights are ``sign * magnitude``, masked weights zero. The same seed draws the
    same signs and the same magnitudes whatever is chosen for the other, so that runs can be
    compared in pairs. With ``signs="own", magnitudes="own"`` only the masks are applied.

    Args:
        model: freshly initialised; changed in place.
        masks: masks to train in next, such as the last ones of the other run.
        learned: weights of the other run by name (a state dict may be passed whole).
        signs: "own" keeps the model's, "learned" takes the other run's (a zero counts as
            positive), "random" tosses a coin for each weight.
        magnitudes: "own" keeps the model's, "learned" takes the other run's, "shuffled" permutes
            the other run's among the kept weights of each layer, "random" draws without
            replacement from the model's own nonzero ones of the same layer: a fresh
            initialisation.
        others: what happens to all parameters and buffers that the masks don't cover, biases and
            batch norms with their statistics among them: "own" leaves them as initialised,
            "learned" copies them from the other run.
        seed, generator: exactly one of the two where something is drawn.

    Raises:
        ValueError: a bad argument, or masks or weights that do not fit; nothing is touched then.

    Source: the sign-alignment experiments of Gadhikar, Jacobs, Zhou & Burkholz 2025,
        arXiv:2504.12801, and of Gadhikar, Nelaturu & Burkholz 2024, arXiv:2406.02773.
    """
    for argument, value, allowed in (
        ("signs", signs, get_args(Signs)),
        ("magnitudes", magnitudes, get_args(Magnitudes)),
        ("others", others, get_args(Others)),
    ):
        if value not in allowed:
            raise ValueError(f"{argument} must be one of {', '.join(allowed)}, got {value!r}")
    weights = masks.weights(model)
    state = unwrap(model).state_dict(keep_vars=True)
    covered = {id(weight) for weight in weights.values()}  # under every name of a tied weight
    rest = {name: tensor for name, tensor in state.items() if id(tensor) not in covered}
    _check_learned(learned, weights, rest if others == "learned" else {})
    drawn = signs == "random" or magnitudes in ("shuffled", "random")
    if drawn or seed is not None or generator is not None:
        generator = as_generator(seed, generator)
    coupled = {
        name: _couple(weight, masks[name], learned[name], signs, magnitudes, generator)
        for name, weight in weights.items()
    }
    for name, weight in weights.items():
        weight.copy_(coupled[name])
    if others == "learned":
        for name, tensor in rest.items():
            tensor.copy_(learned[name])
    masks.apply_(model)


def _check_learned(
    learned: Mapping[str, Tensor], weights: Mapping[str, Tensor], rest: Mapping[str, Tensor]
) -> None:
    for name, tensor in {**weights, **rest}.items():
        if name not in learned:
            raise ValueError(f"learned lacks {name!r}")
        if learned[name].shape != tensor.shape:
            raise ValueError(
                f"learned does not fit: {name!r} has shape {list(learned[name].shape)}, the "
                f"model's {list(tensor.shape)}"
            )


def _couple(
    weight: Tensor,
    mask: Tensor,
    learned: Tensor,
    signs: Signs,
    magnitudes: Magnitudes,
    generator: Generator | None,
) -> Tensor:
    """Return the weight with new signs and magnitudes; masked entries are left to the caller."""
    own, other, kept = weight.detach(), learned.detach().to(weight), mask.to(weight.device)
    # Coins and order are drawn whether they are used or not: one seed, the same draws.
    coins = order = torch.empty(0)
    if generator is not None:
        coins = torch.randint(2, own.shape, generator=generator).to(own).mul_(2).sub_(1)
        order = torch.randperm(own.numel(), generator=generator).view(own.shape).to(own.device)
    sources = {"own": own, "learned": other, "random": coins}
    amounts = {"own": own, "learned": other}
    if magnitudes == "shuffled":
        amounts[magnitudes] = _placed(other[kept], order[kept], kept, own)
    if magnitudes == "random":
        present = own != 0
        if int(present.sum()) < int(kept.sum()):
            raise ValueError(
                f"magnitudes='random' draws from the model's nonzero weights: one layer has "
                f"{int(present.sum())} of them, its mask keeps {int(kept.sum())}"
            )
        amounts[magnitudes] = _placed(own[present], order[present], kept, own)
    return amounts[magnitudes].abs().copysign(sources[signs])


def _placed(values: Tensor, order: Tensor, kept: Tensor, like: Tensor) -> Tensor:
    """Put values, permuted, into the kept entries of a tensor; those left over go nowhere."""
    shuffled = values[order.argsort()][: int(kept.sum())]
    return torch.zeros_like(like).masked_scatter(kept, shuffled)
