"""What every room needs: registries, randomness, the walk over prunable weights, atomic files.

Any room may import this module; it imports none of them.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

Method = TypeVar("Method")
Generator = torch.Generator


@dataclass(frozen=True)
class Entry(Generic[Method]):
    """One registered method: the row that recipes, the command line, docs and tests read.

    Attributes:
        name: what users type.
        method: the function or class itself.
        summary: one line for a list.
        paper: authors, year, arXiv id; empty where the method has no paper.
        needs: names of the extra arguments the method asks its caller for.
        defaults: what a caller that serves many methods should do unless told otherwise.
    """

    name: str
    method: Method
    summary: str
    paper: str = ""
    needs: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)


class Registry(Mapping[str, Entry[Method]]):
    """An ordered, append-only table of the methods of one kind.

    Args:
        kind: what the entries are, as said in error messages ("density rule").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry[Method]] = {}

    def register(
        self,
        name: str,
        summary: str,
        paper: str = "",
        needs: Sequence[str] = (),
        defaults: Mapping[str, Any] | None = None,
    ) -> Callable[[Method], Method]:
        """Return a decorator that adds a method under ``name``.

        Raises:
            ValueError: the name is taken.
        """

        def add(method: Method) -> Method:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered already")
            entry = Entry(name, method, summary, paper, tuple(needs), dict(defaults or {}))
            self._entries[name] = entry
            return method

        return add

    def __getitem__(self, name: str) -> Entry[Method]:
        try:
            return self._entries[name]
        except KeyError:
            raise ValueError(unknown(self.kind, name, self._entries)) from None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def unknown(kind: str, name: object, allowed: Iterable[str]) -> str:
    """Say in one line that ``name`` is no ``kind``, which names there are, and which is nearest."""
    names = list(allowed)
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {kind} {name!r}: {hint}one of {', '.join(names)}"


def as_generator(seed: int | None = None, generator: Generator | None = None) -> Generator:
    """Return the CPU generator that a sampler draws from.

    All sampling happens on the CPU, so that one seed means one result on every device.

    Args:
        seed: starts a new generator.
        generator: used as it is, and advanced.

    Raises:
        ValueError: none or both were given, or the generator lives on another device.
    """
    if (seed is None) == (generator is None):
        raise ValueError("give exactly one of seed= and generator=")
    if generator is None:
        return torch.Generator().manual_seed(int(seed or 0))
    if generator.device.type != "cpu":
        raise ValueError(f"generator must live on the CPU, got one on {generator.device}")
    return generator


def kept_density(density: float | None = None, sparsity: float | None = None) -> float:
    """Return the kept fraction from whichever of the two names the user gave.

    Raises:
        ValueError: none or both were given, or the density is outside (0, 1].
    """
    if (density is None) == (sparsity is None):
        raise ValueError("give exactly one of density= and sparsity=")
    kept = float(density) if density is not None else 1.0 - float(sparsity or 0.0)
    if not 0.0 < kept <= 1.0:
        raise ValueError(f"density must lie in (0, 1], got {kept:g}")
    return kept


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's own module from inside ``torch.compile`` and data-parallel wrappers."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Tell whether a parameter name fits any of the shell-style patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


PRUNABLE_MODULES: tuple[type[nn.Module], ...] = (nn.Linear, nn.modules.conv._ConvNd)


def prunable_weights(
    model: nn.Module,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> dict[str, nn.Parameter]:
    """Find the weights that sparsity methods act on, in the order the model registers them.

    By default every weight of ``nn.Linear`` and of the convolutions of ``torch.nn``, the first
    layer, shortcuts and the classifier included; biases, norms and embeddings are left out, and so
    is a weight that is tied to an embedding. A weight tied between layers appears once.

    Args:
        model: any module, also compiled or wrapped for data-parallel training.
        include: shell-style patterns of parameter names that replace the default choice.
        exclude: shell-style patterns of names to leave out of either choice.

    Returns:
        Parameter name (of the unwrapped model) to parameter.

    Raises:
        ValueError: nothing is left, a pattern fits no parameter, or a weight is parametrised or
            not yet materialised.
    """
    model = unwrap(model)
    if include is None:
        candidates = _default_weights(model)
    else:
        candidates = {n: p for n, p in model.named_parameters() if matches(n, _patterns(include))}
    excluded = _patterns(exclude)
    for pattern in [*_patterns(include or ()), *excluded]:
        if not any(fnmatch.fnmatchcase(name, pattern) for name, _ in model.named_parameters()):
            raise ValueError(f"pattern {pattern!r} fits no parameter of {type(model).__name__}")
    weights = {n: p for n, p in candidates.items() if not matches(n, excluded)}
    if not weights:
        raise ValueError(
            f"{type(model).__name__} has no prunable weight: no Linear or convolution that "
            "include= and exclude= let through"
        )
    return weights


def _patterns(patterns: Iterable[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _default_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    embeddings = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    }
    weights: dict[str, nn.Parameter] = {}
    seen = set(embeddings)
    for prefix, module in model.named_modules():
        if not isinstance(module, PRUNABLE_MODULES):
            continue
        name = f"{prefix}.weight" if prefix else "weight"
        weight = module._parameters.get("weight")
        if weight is None:
            raise ValueError(f"{name} is parametrised; fold it first or choose names by include=")
        if isinstance(weight, nn.parameter.UninitializedParameter):
            raise ValueError(f"{name} is not materialised yet; run the model once first")
        if id(weight) not in seen:
            seen.add(id(weight))
            weights[name] = weight
    return weights


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary name in the same folder; on success it replaces ``path`` in one step.

    On any error the temporary file is removed and ``path`` stays as it was. The data is flushed to
    the disk before the rename, so that a power cut leaves the old file or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one atomic step."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def cpu_state(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Copy the tensors of a state dict to contiguous CPU tensors that share no memory."""
    return {
        name: value.detach().to("cpu", copy=True).contiguous()
        for name, value in tensors.items()
        if isinstance(value, Tensor)
    }
