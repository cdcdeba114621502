"""Hadamard matrices of every size that Sylvester, Paley and Williamson reach, and Haar rotations.

A Hadamard matrix H has entries +1 and -1 and orthogonal rows: ``H @ H.T == n * I``. Sylvester's
doubling gives powers of two; Paley's constructions over GF(q) (R. Paley 1933) give orders q + 1
and 2 (q + 1); Williamson's four circulant blocks (J. Williamson 1944) give 156 and 172; Kronecker
products of any two give the rest.
"""

from __future__ import annotations

from functools import cache, lru_cache, reduce
from math import sqrt

import torch
from torch import Tensor

from featherweight.common import Generator, as_generator
from featherweight.quant.field import jacobsthal, prime_power

# First rows of the circulant blocks A, B, C, D; facts of Sloane's library of Hadamard matrices.
_WILLIAMSON = {
    156: (
        "+++--+-+-----+--++----++--+-----+-+--++",
        "++++---+--++----+-+--+-+----++--+---+++",
        "+++--++-+---+-+--+----+--+-+---+-++--++",
        "+---++-+-+-----+++-++-+++-----+-+-++---",
    ),
    172: (
        "+---++--++++-+-+++-++--++-+++-+-++++--++---",
        "++-++++++----+-+--++-++-++--+-+----++++++-+",
        "+++-+-++--+-+-++++-+----+-++++-+-+--++-+-++",
        "++---++++-+--+--++--------++--+--+-++++---+",
    ),
}
_DENSE = 16  # powers of two are applied in dense factors of this order


def hadamard_matrix(n: int) -> Tensor:
    """Return a Hadamard matrix of order n.

    Args:
        n: the order; :func:`hadamard_exists` tells which can be built.

    Returns:
        H, int8 ``[n, n]`` of +1 and -1 with ``H @ H.T == n * I`` in integers.

    Raises:
        ValueError: n is not positive, or no construction known here reaches it.
    """
    return _product(_factors(n))


def hadamard_exists(n: int) -> bool:
    """Tell whether :func:`hadamard_matrix` can build order n (it needs 1, 2 or a multiple of 4)."""
    return n >= 1 and _plan(n) is not None


def hadamard_transform(x: Tensor) -> Tensor:
    """Multiply the last dimension by ``hadamard_matrix(n).T / sqrt(n)`` without building it.

    The matrix is a Kronecker product of small ones, applied one axis at a time: O(n (K + log n))
    for n = K 2^m, in place of O(n^2).

    Args:
        x: ``[..., n]``, floating.

    Returns:
        ``x @ (H.T / sqrt(n))``, same shape and dtype; norms are kept.

    Raises:
        ValueError: no Hadamard matrix of order n can be built.
    """
    n = x.shape[-1]
    right, out = n, x.reshape(-1, n)
    for order in _grouped(_factors(n)):
        right //= order
        factor = _product(_parts(order)).to(x)
        out = factor @ out.reshape(-1, order, right)
    return out.reshape(x.shape) / sqrt(n)


def random_hadamard(
    n: int,
    *,
    seed: int | None = None,
    generator: Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return an orthogonal ``diag(signs) @ H / sqrt(n)`` with random signs.

    Args:
        n: the order.
        seed: of the signs; or
        generator: a CPU generator that draws them.
        dtype: of the result.

    Returns:
        ``[n, n]``, orthogonal to rounding.

    Raises:
        ValueError: no Hadamard matrix of order n can be built; Haar rotations have any order.
    """
    generator = as_generator(seed, generator)
    signs = 1 - 2 * torch.randint(0, 2, (n, 1), generator=generator)
    return signs.to(dtype) * hadamard_matrix(n).to(dtype) / sqrt(n)


def random_orthogonal(
    n: int,
    *,
    seed: int | None = None,
    generator: Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return an orthogonal matrix drawn uniformly (Haar): QR of a Gaussian, R's diagonal positive.

    Args:
        n: the order.
        seed: of the draw; or
        generator: a CPU generator.
        dtype: of the result; the factorisation runs in float64.

    Returns:
        ``[n, n]``, orthogonal to rounding.
    """
    generator = as_generator(seed, generator)
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    turned: Tensor = q * r.diagonal().sign()
    return turned.to(dtype)


def random_rotation(
    n: int,
    *,
    seed: int | None = None,
    generator: Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return a random Hadamard rotation where order n can be built, else a Haar rotation."""
    draw = random_hadamard if hadamard_exists(n) else random_orthogonal
    return draw(n, seed=seed, generator=generator, dtype=dtype)


# Orders and bases


def _parts(order: int) -> tuple[int, ...]:
    """Split a power of two into twos; any other base order stays whole."""
    return (2,) * (order.bit_length() - 1) if order & (order - 1) == 0 else (order,)


def _product(orders: tuple[int, ...]) -> Tensor:
    one = torch.ones(1, 1, dtype=torch.int8)
    return reduce(torch.kron, (_base(order) for order in orders), one).contiguous()


def _factors(n: int) -> tuple[int, ...]:
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    plan = _plan(n)
    if plan is None:
        raise ValueError(
            f"no Hadamard matrix of order {n} can be built; a Haar rotation has any order"
        )
    return plan


def _grouped(factors: tuple[int, ...]) -> list[int]:
    """Join runs of twos to dense factors: fewer, larger products."""
    grouped: list[int] = []
    for order in factors:
        if order == 2 and grouped and _parts(grouped[-1])[0] == 2 and grouped[-1] < _DENSE:
            grouped[-1] *= 2
        else:
            grouped.append(order)
    return grouped


@cache
def _plan(n: int) -> tuple[int, ...] | None:
    """Factor n into base orders, the smallest base of the odd part first.

    Searching downwards would build huge Paley matrices where a small one times twos does.
    """
    if n in (1, 2):
        return _parts(n)
    if n % 4:
        return None
    order = 4 * (n // (n & -n))
    if order == 4:
        return (2,) * (n.bit_length() - 1)
    while n % order == 0:
        if _is_base(order):
            return (order, *_parts(n // order))
        order *= 2
    return _product_plan(n)


def _product_plan(n: int) -> tuple[int, ...] | None:
    for first in range(12, int(n**0.5) + 1, 4):
        if n % first == 0:
            left, right = _plan(first), _plan(n // first)
            if left and right:
                return left + right
    return None


def _is_base(order: int) -> bool:
    return order in _WILLIAMSON or _paley_one(order) or _paley_two(order)


def _paley_one(order: int) -> bool:
    return (order - 1) % 4 == 3 and prime_power(order - 1) is not None


def _paley_two(order: int) -> bool:
    q = order // 2 - 1
    return order % 2 == 0 and q % 4 == 1 and prime_power(q) is not None


@lru_cache(maxsize=32)
def _base(order: int) -> Tensor:
    if order == 2:
        return torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    if order in _WILLIAMSON:
        return _williamson(_WILLIAMSON[order])
    if _paley_one(order):
        return torch.eye(order, dtype=torch.int8) + _bordered(jacobsthal(order - 1), -1)
    conference = _bordered(jacobsthal(order // 2 - 1), 1)
    off = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    on = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(conference, off) + torch.kron(torch.eye(order // 2, dtype=torch.int8), on)


def _bordered(core: Tensor, sign: int) -> Tensor:
    """Put a zero corner, a row of ones and a column of ``sign`` around a matrix."""
    size = len(core) + 1
    out = torch.zeros(size, size, dtype=torch.int8)
    out[0, 1:], out[1:, 0], out[1:, 1:] = 1, sign, core
    return out


def _williamson(rows: tuple[str, ...]) -> Tensor:
    a, b, c, d = (_circulant([1 if sign == "+" else -1 for sign in row]) for row in rows)
    blocks = ((a, b, c, d), (-b, a, -d, c), (-c, d, a, -b), (-d, -c, b, a))
    return torch.cat([torch.cat(row, dim=1) for row in blocks])


def _circulant(row: list[int]) -> Tensor:
    first = torch.tensor(row, dtype=torch.int8)
    return torch.stack([first.roll(shift) for shift in range(len(row))])
