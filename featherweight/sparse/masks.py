"""Masks are data: which weights exist, as an ordered mapping of names to bool tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from featherweight.common import atomic_path, prunable_weights, unwrap

FORMAT = "featherweight-masks"
VERSION = 1


class Masks(Mapping[str, Tensor]):
    """Which entries of which parameters are kept (``True``).

    The mapping never changes; operations return new masks. Names are those of the unwrapped model
    (no ``module.`` or ``_orig_mod.`` prefix).

    Args:
        tensors: parameter name to bool tensor of the parameter's shape.

    Raises:
        ValueError: no tensor at all.
        TypeError: a value is not a bool tensor.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        if not tensors:
            raise ValueError("masks need at least one tensor, got none")
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.bool:
                kind = getattr(tensor, "dtype", type(tensor).__name__)
                raise TypeError(f"mask of {name!r} must be a bool tensor, got {kind}")
        self._tensors = dict(tensors)

    @classmethod
    def dense(
        cls,
        model: nn.Module,
        include: Iterable[str] | None = None,
        exclude: Iterable[str] = (),
    ) -> Masks:
        """Keep every prunable weight of a model.

        Args:
            model: any module; see `featherweight.common.prunable_weights` for the default choice
                (weights of all Linear and convolution layers, tied ones once).
            include: shell-style name patterns that replace the default choice.
            exclude: shell-style name patterns to leave out.
        """
        weights = prunable_weights(model, include, exclude)
        return cls({n: torch.ones_like(w, dtype=torch.bool) for n, w in weights.items()})

    @classmethod
    def nonzero(
        cls,
        model: nn.Module,
        include: Iterable[str] | None = None,
        exclude: Iterable[str] = (),
    ) -> Masks:
        """Keep what is not zero in a model that is sparse already."""
        weights = prunable_weights(model, include, exclude)
        return cls({n: w.detach() != 0 for n, w in weights.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return (
            f"Masks({len(self)} tensors, {self.nonzeros:,} of {self.numel:,} kept, "
            f"density {self.density:.4g})"
        )

    def __str__(self) -> str:
        return self.table()

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Masks)
            and list(self) == list(other)
            and all(torch.equal(mask, other[name]) for name, mask in self.items())
        )

    __hash__ = None  # type: ignore[assignment]

    def __and__(self, other: Masks) -> Masks:
        return self._combine(other, torch.logical_and)

    def __or__(self, other: Masks) -> Masks:
        return self._combine(other, torch.logical_or)

    def __sub__(self, other: Masks) -> Masks:
        return self._combine(other, lambda a, b: a & ~b)

    def __xor__(self, other: Masks) -> Masks:
        return self._combine(other, torch.logical_xor)

    def __invert__(self) -> Masks:
        return Masks({name: ~mask for name, mask in self.items()})

    def __le__(self, other: Masks) -> bool:
        """Tell whether everything kept here is kept in ``other`` too."""
        return (self - other).nonzeros == 0

    def __ge__(self, other: Masks) -> bool:
        return other <= self

    def _combine(self, other: Masks, operation: Callable[[Tensor, Tensor], Tensor]) -> Masks:
        self.check(other)
        return Masks({n: operation(mask, other[n].to(mask.device)) for n, mask in self.items()})

    @property
    def numel(self) -> int:
        """Number of entries, kept or not."""
        return sum(mask.numel() for mask in self.values())

    @property
    def nonzeros(self) -> int:
        """Number of kept entries."""
        return sum(self.counts().values())

    @property
    def density(self) -> float:
        """Kept fraction, in [0, 1]."""
        return self.nonzeros / self.numel

    def counts(self) -> dict[str, int]:
        """Return the number of kept entries of each tensor."""
        return {name: int(mask.count_nonzero()) for name, mask in self.items()}

    def densities(self) -> dict[str, float]:
        """Return the kept fraction of each tensor."""
        return {name: count / self[name].numel() for name, count in self.counts().items()}

    def to(self, device: torch.device | str) -> Masks:
        """Return the masks on another device."""
        return Masks({name: mask.to(device) for name, mask in self.items()})

    def check(self, other: Mapping[str, Tensor] | nn.Module) -> None:
        """Refuse tensors that these masks do not fit.

        Args:
            other: masks, weights or a state dict (whose names must be the same, in any order), or
                a model (which may have more parameters).

        Raises:
            ValueError: names the first difference.
        """
        if isinstance(other, nn.Module):
            shapes = {n: p.shape for n, p in unwrap(other).named_parameters()}
        else:
            shapes = {n: t.shape for n, t in other.items()}
            extra = [name for name in shapes if name not in self]
            if extra:
                raise ValueError(f"masks do not fit: they lack {extra[0]!r}")
        for name, mask in self.items():
            if name not in shapes:
                raise ValueError(f"masks do not fit: {name!r} is only in the masks")
            if shapes[name] != mask.shape:
                raise ValueError(
                    f"masks do not fit: {name!r} has shape {list(mask.shape)} in the masks and "
                    f"{list(shapes[name])} there"
                )

    def weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters of a model that these masks belong to.

        Raises:
            ValueError: the masks are of another model; names the first difference.
        """
        self.check(model)
        parameters = dict(unwrap(model).named_parameters())
        return {name: parameters[name] for name in self}

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Set the masked weights of a model to exact zero, in place.

        Raises:
            ValueError: the masks are of another model; nothing is touched then.
        """
        for name, weight in self.weights(model).items():
            weight.masked_fill_(~self[name].to(weight.device), 0)

    def overlap(self, other: Masks) -> Overlap:
        """Compare with other masks of the same shape: per tensor, what both and either keep."""
        both, either = (self & other).counts(), (self | other).counts()
        return Overlap(both, either)

    def sign_flips(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> SignFlips:
        """Count the kept weights whose sign differs between two sets of weights.

        The sign of a masked weight means nothing, so masked entries are not counted. A zero has no
        sign: going from a zero to a nonzero counts as a flip.

        Args:
            before, after: weights by name (a state dict may be passed whole).

        Source: Gadhikar & Burkholz 2024, arXiv:2402.19262.
        """
        flipped = {
            name: int(((before[name].sign() != after[name].sign()) & mask).sum())
            for name, mask in self.items()
        }
        return SignFlips(flipped, self.counts())

    def table(self) -> str:
        """Lay the masks out as text: one row a tensor and a total."""
        rows = [("parameter", "shape", "kept", "of", "density")]
        for name, count in self.counts().items():
            size = self[name].numel()
            shape = "x".join(map(str, self[name].shape))
            rows.append((name, shape, f"{count:,}", f"{size:,}", f"{count / size:.4g}"))
        rows.append(("total", "", f"{self.nonzeros:,}", f"{self.numel:,}", f"{self.density:.4g}"))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        return "\n".join(
            "  ".join(
                c.ljust(w) if i < 2 else c.rjust(w)
                for i, (c, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )

    def save(self, path: str | Path) -> None:
        """Write the masks bit-packed to a safetensors file, in one atomic step.

        The file holds one bit an entry, the names and shapes, and a format version.
        """
        shapes = {name: list(mask.shape) for name, mask in self.items()}
        # One metadata key: safetensors writes several in random order, so that equal masks would
        # make unequal files.
        header = json.dumps({"format": FORMAT, "version": VERSION, "shapes": shapes})
        with atomic_path(Path(path)) as temporary:
            packed = {name: pack_bits(mask) for name, mask in self.items()}
            save_file(packed, temporary, {"featherweight": header})

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> Masks:
        """Read masks that `save` wrote.

        Args:
            path: the file.
            model: where given, masks that do not fit it are refused.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, of another kind or a newer version, or does not fit
                the model.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no mask file at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("featherweight", "{}"))
                packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise ValueError(f"{path} is no mask file")
        if header.get("version") != VERSION:
            version = header.get("version")
            raise ValueError(f"{path} has mask format version {version}, this reads {VERSION}")
        masks = cls(_unpack(path, packed, header.get("shapes")))
        if model is not None:
            masks.weights(model)
        return masks


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a bool tensor of any shape into uint8, eight entries a byte, first entry highest."""
    flat = mask.detach().flatten().to("cpu", torch.uint8)
    flat = nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)
    return (flat * weights).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: Iterable[int]) -> Tensor:
    """Undo `pack_bits`.

    Args:
        packed: uint8 [ceil(N / 8)].
        shape: the mask's shape, N entries in all.

    Raises:
        ValueError: the number of bytes does not fit the shape, or a padding bit is set.
    """
    size = torch.Size(shape)
    if packed.dtype != torch.uint8 or packed.shape != ((size.numel() + 7) // 8,):
        raise ValueError(f"{list(packed.shape)} bytes do not hold a mask of shape {list(size)}")
    shifts = torch.tensor([7, 6, 5, 4, 3, 2, 1, 0], dtype=torch.uint8)
    bits = ((packed[:, None] >> shifts) & 1).bool().flatten()
    if bits[size.numel() :].any():
        raise ValueError(f"padding bits of a mask of shape {list(size)} are set")
    return bits[: size.numel()].view(size)


def _unpack(path: Path, packed: Mapping[str, Tensor], table: Any) -> dict[str, Tensor]:
    try:
        if set(table) != set(packed):
            raise ValueError(
                f"its names and shapes disagree: {sorted(set(table) ^ set(packed))[0]!r}"
            )
        return {name: unpack_bits(packed[name], shape) for name, shape in table.items()}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


@dataclass(frozen=True)
class Overlap:
    """How far two sets of masks agree.

    Attributes:
        both: entries that both keep, by tensor.
        either: entries that at least one keeps, by tensor.
    """

    both: dict[str, int]
    either: dict[str, int]

    @property
    def jaccard(self) -> float:
        """Size of the intersection over the union; 1 where both are empty."""
        union = sum(self.either.values())
        return sum(self.both.values()) / union if union else 1.0

    def by_layer(self) -> dict[str, float]:
        """Return the Jaccard index of each tensor."""
        return {n: self.both[n] / e if e else 1.0 for n, e in self.either.items()}

    def __str__(self) -> str:
        width = max(map(len, self.either))
        rows = [
            f"{name:<{width}}  {self.both[name]:>11,} of {either:>11,}  {jaccard:.4f}"
            for (name, either), jaccard in zip(
                self.either.items(), self.by_layer().values(), strict=True
            )
        ]
        return "\n".join([*rows, f"{'total':<{width}}  Jaccard index {self.jaccard:.4f}"])


@dataclass(frozen=True)
class SignFlips:
    """How many kept weights changed their sign.

    Attributes:
        flipped: changed signs, by tensor.
        kept: kept entries, by tensor.
    """

    flipped: dict[str, int]
    kept: dict[str, int]

    @property
    def fraction(self) -> float:
        """Changed signs over kept entries; 0 where nothing is kept."""
        kept = sum(self.kept.values())
        return sum(self.flipped.values()) / kept if kept else 0.0

    def by_layer(self) -> dict[str, float]:
        """Return the fraction of each tensor."""
        return {n: self.flipped[n] / kept if kept else 0.0 for n, kept in self.kept.items()}
