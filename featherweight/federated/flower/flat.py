"""The floating-point arrays of a record as one vector, and back."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flwr.app import Array, ArrayRecord
from torch import Tensor, cat, from_numpy

from featherweight.federated.wire import Refused


class Flat:
    """One vector for all floating-point arrays of a record; the others are set apart.

    Args:
        arrays: of a model.

    Attributes:
        vector: float32, [length].
        rest: the arrays of integers and booleans, by name.
    """

    def __init__(self, arrays: ArrayRecord) -> None:
        self._arrays = arrays
        self._floats = {k: a.numpy() for k, a in arrays.items() if np.dtype(a.dtype).kind == "f"}
        self.rest = {k: a for k, a in arrays.items() if k not in self._floats}
        flat = [from_numpy(a.astype(np.float32).reshape(-1)) for a in self._floats.values()]
        if not flat:
            raise ValueError("arrays hold no floating-point array")
        self.vector: Tensor = cat(flat)

    @property
    def length(self) -> int:
        """Number of entries of the vector."""
        return len(self.vector)

    def filled(self, vector: Tensor, rest: Mapping[str, Array]) -> ArrayRecord:
        """Return a record of the same form with other values.

        Args:
            vector: in place of the floating-point arrays, [length].
            rest: in place of the others, see `check`.
        """
        parts = vector.numpy()
        new: dict[str, Array] = dict(rest)
        for name, values in self._floats.items():
            part, parts = parts[: values.size], parts[values.size :]
            new[name] = Array(part.reshape(values.shape).astype(values.dtype))
        return ArrayRecord({name: new[name] for name in self._arrays})

    def cast(self, arrays: ArrayRecord) -> ArrayRecord:
        """Return arrays of the same names in this record's dtypes."""
        wanted = {name: array.dtype for name, array in self._arrays.items()}
        changed = {k: array.numpy() for k, array in arrays.items() if array.dtype != wanted[k]}
        for name, values in changed.items():
            whole = np.dtype(wanted[name]).kind != "f"
            changed[name] = np.asarray(np.rint(values) if whole else values, wanted[name])
        return ArrayRecord({**arrays, **{name: Array(values) for name, values in changed.items()}})

    def check(self, rest: Mapping[str, Array]) -> None:
        """Compare the arrays that are not floating-point with this record's.

        Raises:
            Refused: they differ in names, shapes or dtypes.
        """
        if set(rest) != set(self.rest):
            raise Refused(f"it sent {sorted(rest)[:3]}, not {sorted(self.rest)[:3]}")
        for name, ours in self.rest.items():
            theirs, head = rest[name], len(ours.data) - ours.numpy().nbytes
            # the same head of the .npy file: shape and dtype are what they say, nothing is parsed
            same = len(theirs.data) == len(ours.data) and theirs.data[:head] == ours.data[:head]
            if not same or (theirs.dtype, theirs.stype) != (ours.dtype, ours.stype):
                raise Refused(f"array {name} has another shape or dtype")
