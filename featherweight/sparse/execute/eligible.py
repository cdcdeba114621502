"""Which layers of a masked model can be made sparse, and why not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from featherweight.common import PRUNABLE_MODULES, matches
from featherweight.sparse.execute.conv import SparseConv2d
from featherweight.sparse.execute.linear import SparseLinear
from featherweight.sparse.execute.state import weight_name

LAYERS: Mapping[type[nn.Module], type[SparseLinear] | type[SparseConv2d]] = {
    nn.Linear: SparseLinear,
    nn.Conv2d: SparseConv2d,
}
"""Type of a dense layer, subclasses left out, to its sparse form."""


def masked_layers(
    model: nn.Module, masks: Mapping[str, Tensor] | None, exclude: Iterable[str]
) -> dict[str, Tensor]:
    """Return the layers to make sparse: module name to mask.

    Args:
        model: eager.
        masks: by parameter name; None: the zeros of the weights are the mask.
        exclude: shell-style patterns of parameter names to leave out.

    Raises:
        ValueError: masks do not fit, or a masked layer can't be made sparse.
    """
    owners, excluded = _owners(model), [exclude] if isinstance(exclude, str) else list(exclude)
    chosen = {}
    wished = _zeros(model) if masks is None else dict(masks)
    for name, mask in wished.items():
        if matches(name, excluded):
            continue
        module = _owner(model, name)
        weight = module.weight
        if not isinstance(weight, Tensor) or weight.shape != mask.shape:
            shape = list(getattr(weight, "shape", []))
            raise ValueError(
                f"masks do not fit: {name!r} has shape {shape}, got {list(mask.shape)}"
            )
        if bool(mask.all()):
            continue
        if reason := _reason(module, owners):
            raise ValueError(f"{name!r} can't be made sparse: {reason}; or exclude=[{name!r}]")
        chosen[name.rpartition(".")[0]] = mask.to(weight.device)
    return chosen


def _zeros(model: nn.Module) -> dict[str, Tensor]:
    return {
        weight_name(name): module.weight.detach() != 0  # type: ignore[operator]
        for name, module in model.named_modules()
        if isinstance(module, PRUNABLE_MODULES)
        and not isinstance(module.weight, nn.parameter.UninitializedParameter)
    }


def _owner(model: nn.Module, name: str) -> nn.Module:
    path, _, last = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"masks do not fit: the model has no {name!r}") from None
    if last != "weight" or not isinstance(module, PRUNABLE_MODULES):
        raise ValueError(f"{name!r} can't be made sparse: no weight of a Linear or convolution")
    return module


def _owners(model: nn.Module) -> dict[int, int]:
    """Count in how many modules each parameter is."""
    counts: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return counts


def _reason(module: nn.Module, owners: Mapping[int, int]) -> str | None:
    weight = module._parameters.get("weight")
    if weight is None:
        return "it is parametrised, or pruned by torch.nn.utils.prune; fold it first"
    if type(module) not in LAYERS:
        return f"it belongs to {type(module).__name__}, only Linear and Conv2d themselves can be"
    if owners[id(weight)] > 1:
        return "it is tied to another module's parameter"
    if hasattr(weight, "placements"):
        return "it is sharded"
    return LAYERS[type(module)].supports(module)  # type: ignore[arg-type]
