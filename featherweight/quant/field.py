"""Quadratic characters of finite fields, for Paley's constructions of Hadamard matrices."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor


def prime_power(order: int) -> tuple[int, int] | None:
    """Return ``(p, k)`` with ``p**k == order`` and p prime, or None."""
    if order < 2:
        return None
    prime = next((p for p in range(2, int(order**0.5) + 1) if order % p == 0), order)
    exponent = 0
    while order % prime == 0:
        order, exponent = order // prime, exponent + 1
    return (prime, exponent) if order == 1 else None


def jacobsthal(order: int) -> Tensor:
    """Return the matrix of quadratic characters of all differences of field elements.

    Args:
        order: an odd prime power q.

    Returns:
        Q in {-1, 0, 1}, int8 ``[q, q]``: ``Q[i, j]`` is 1 where ``i - j`` is a square of GF(q), -1
        where it is none, 0 on the diagonal.

    Raises:
        ValueError: the order is no odd prime power.
    """
    decomposed = prime_power(order)
    if decomposed is None or order % 2 == 0:
        raise ValueError(f"order must be an odd prime power, got {order}")
    prime, degree = decomposed
    character = torch.zeros(order, dtype=torch.int8)
    for exponent, element in enumerate(_powers_of_generator(prime, degree)):
        character[_number(element, prime)] = 1 - 2 * (exponent % 2)
    digits = torch.arange(order)[:, None] // prime ** torch.arange(degree) % prime
    differences = (digits[:, None] - digits[None]) % prime  # [q, q, degree]
    return character[(differences * prime ** torch.arange(degree)).sum(-1)]


def _number(digits: tuple[int, ...], prime: int) -> int:
    return sum(digit * prime**place for place, digit in enumerate(digits))


def _powers_of_generator(prime: int, degree: int) -> list[tuple[int, ...]]:
    """List all nonzero field elements as powers of one: squares are those at even places.

    The field is GF(p)[x] modulo the first polynomial whose root x runs through all elements.
    """
    for coefficients in itertools.product(range(prime), repeat=degree):
        powers = list(_orbit(coefficients, prime))
        if len(powers) == prime**degree - 1:
            return powers
    raise AssertionError("every finite field has a generator")  # pragma: no cover


def _orbit(coefficients: tuple[int, ...], prime: int) -> Iterator[tuple[int, ...]]:
    """Yield 1, x, x^2, ... until 1 returns, where ``x^degree = sum coefficients[i] x^i``."""
    one = (1,) + (0,) * (len(coefficients) - 1)
    element, seen = one, set[tuple[int, ...]]()
    while element not in seen and any(element):
        yield element
        seen.add(element)
        top, shifted = element[-1], (0, *element[:-1])
        element = tuple((s + top * c) % prime for s, c in zip(shifted, coefficients, strict=True))
