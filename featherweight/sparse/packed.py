"""Sparse models as small files: the values of kept weights, one bit an entry, the rest as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from featherweight.common import atomic_path, cpu_state
from featherweight.sparse.masks import Masks, pack_bits, unpack_bits

FORMAT = "featherweight-packed"


def save_packed(path: str | Path, state: Mapping[str, Tensor], masks: Masks) -> int:
    """Write a state dict, of masked parameters only the kept entries, in one atomic step.

    The file is a safetensors file with ``NAME.values`` (kept entries in memory order) and
    ``NAME.mask`` (bits as in mask files) for a masked parameter.

    Args:
        path: file to write.
        state: state dict; masked entries are taken to be zeros.
        masks: which parameters are packed, and what they keep.

    Returns:
        Size of the file in bytes.

    Raises:
        ValueError: the masks do not fit the state dict.
    """
    path = Path(path)
    masks.check({name: state[name] for name in masks if name in state})
    tensors: dict[str, Tensor] = {}
    for name, tensor in cpu_state(state).items():
        if name in masks:
            mask = masks[name].cpu()
            tensors[f"{name}.values"] = tensor[mask]
            tensors[f"{name}.mask"] = pack_bits(mask)
        else:
            tensors[name] = tensor
    header = {
        "format": FORMAT,
        "version": 1,
        "shapes": {n: list(m.shape) for n, m in masks.items()},
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {"featherweight": json.dumps(header)})
    return path.stat().st_size


def load_packed(path: str | Path) -> tuple[dict[str, Tensor], Masks]:
    """Read a file that `save_packed` wrote.

    Args:
        path: the file.

    Returns:
        The whole state dict, for ``load_state_dict``, and the masks.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no packed file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("featherweight", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None
    if not isinstance(header, dict) or (header.get("format"), header.get("version")) != (FORMAT, 1):
        raise ValueError(f"{path} is no packed model of a format this reads")
    masks = {}
    for name, shape in header["shapes"].items():
        try:
            masks[name] = unpack_bits(tensors.pop(f"{name}.mask"), shape)
            values = tensors.pop(f"{name}.values")
            tensors[name] = torch.zeros(shape, dtype=values.dtype).masked_scatter(
                masks[name], values
            )
            if values.numel() != int(masks[name].sum()):
                raise ValueError("values and mask differ in number")
        except (KeyError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is damaged at {name!r}: {error}") from None
    return tensors, Masks(masks)
