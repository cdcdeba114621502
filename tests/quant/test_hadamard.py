"""Hadamard matrices of all orders that can be built, their fast transform, random rotations."""

import pytest
import torch
from scipy.linalg import hadamard as scipy_hadamard

from featherweight.quant.field import jacobsthal, prime_power
from featherweight.quant.hadamard import (
    hadamard_exists,
    hadamard_matrix,
    hadamard_transform,
    random_hadamard,
    random_orthogonal,
    random_rotation,
)

NAMED = [576, 768, 896, 960, 1152, 1536, 1600, 2048, 2560, 2880, 3072]
OPEN = [92, 116, 184, 188, 232, 236, 260, 268, 292]  # neither Paley nor in the table


def orders(limit):
    return [n for n in range(1, limit + 1) if hadamard_exists(n)]


@pytest.mark.parametrize("n", orders(256))
def test_rows_are_orthogonal_in_integers(n):
    matrix = hadamard_matrix(n)
    assert matrix.dtype == torch.int8
    assert set(matrix.unique().tolist()) <= {-1, 1}
    wide = matrix.double()
    assert torch.equal(wide @ wide.T, n * torch.eye(n, dtype=torch.float64))


def test_random_vectors_find_all_larger_orders_orthogonal():
    """H (H^T v) = n v for a random integer vector, exactly: n^2 work in place of n^3."""
    for n in [*orders(2048)[len(orders(256)) :: 17], *NAMED]:
        matrix = hadamard_matrix(n).double()
        assert torch.equal(matrix.abs(), torch.ones_like(matrix))
        vector = torch.randint(-1000, 1001, (n,)).double()
        assert torch.equal(matrix @ (matrix.T @ vector), n * vector)


def test_orders_that_can_be_built():
    assert orders(300)[:5] == [1, 2, 4, 8, 12]
    assert [n for n in range(4, 301, 4) if not hadamard_exists(n)] == OPEN
    assert all(hadamard_exists(n) for n in NAMED)
    assert hadamard_exists(29568)  # 924 x 32: found without building a matrix of order 14784
    assert not any(hadamard_exists(n) for n in (0, -4, 3, 6, 10))


@pytest.mark.parametrize("n", [0, -1, 3, 6, *OPEN[:2]])
def test_other_orders_are_refused(n):
    with pytest.raises(ValueError, match=r"n must be at least 1|no Hadamard matrix of order"):
        hadamard_matrix(n)


@pytest.mark.parametrize("power", range(8))
def test_powers_of_two_are_sylvesters(power):
    expected = torch.from_numpy(scipy_hadamard(2**power))
    assert torch.equal(hadamard_matrix(2**power).long(), expected.long())
    x = torch.randn(2**power, dtype=torch.float64)
    torch.testing.assert_close(hadamard_transform(hadamard_transform(x)), x)  # an involution


@pytest.mark.parametrize("n", [1, 2, 12, 20, 36, 52, 64, 100, 144, 156, 172, 240, 576])
def test_fast_transform_is_the_product_with_the_matrix(n):
    x = torch.randn(2, 3, n, dtype=torch.float64)
    expected = x @ hadamard_matrix(n).double().T / n**0.5
    found = hadamard_transform(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.norm(dim=-1), x.norm(dim=-1))
    assert hadamard_transform(x.float()).dtype == torch.float32


@pytest.mark.parametrize("draw", [random_hadamard, random_orthogonal, random_rotation])
def test_random_rotations_are_orthogonal_and_seeded(draw):
    one = draw(36, seed=1)
    identity = torch.eye(36, dtype=torch.float64)
    torch.testing.assert_close(one @ one.T, identity)
    assert torch.equal(one, draw(36, seed=1))
    assert not torch.equal(one, draw(36, seed=2))
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(one, draw(36, generator=generator))
    assert not torch.equal(one, draw(36, generator=generator))


def test_sizes_without_a_hadamard_matrix_get_a_haar_rotation():
    assert torch.equal(random_rotation(10, seed=3), random_orthogonal(10, seed=3))
    torch.testing.assert_close(
        random_rotation(12, seed=3).abs(), torch.full((12, 12), 12**-0.5).double()
    )


def test_haar_entries_have_the_moments_of_the_sphere():
    """E sum_j (wR)_j^4 = 3 |w|^4 / (d + 2)."""
    d, generator = 24, torch.Generator().manual_seed(0)
    weight = torch.zeros(d, dtype=torch.float64)
    weight[0] = 2.0
    draws = [random_orthogonal(d, generator=generator) for _ in range(400)]
    mean = torch.stack([(weight @ draw).pow(4).sum() for draw in draws]).mean()
    assert mean.item() == pytest.approx(3 * 16 / (d + 2), rel=0.05)


# Finite fields


@pytest.mark.parametrize(
    ("order", "expected"), [(2, (2, 1)), (49, (7, 2)), (243, (3, 5)), (12, None), (1, None)]
)
def test_prime_powers(order, expected):
    assert prime_power(order) == expected


@pytest.mark.parametrize("q", [3, 5, 7, 13, 31])
def test_characters_of_prime_fields_are_legendre_symbols(q):
    squares = {pow(x, 2, q) for x in range(1, q)}
    expected = [
        [0 if i == j else (1 if (i - j) % q in squares else -1) for j in range(q)] for i in range(q)
    ]
    assert jacobsthal(q).tolist() == expected


@pytest.mark.parametrize("q", [9, 25, 27, 49, 81, 125])
def test_jacobsthal_identities(q):
    """Q Q^T = q I - J, Q J = 0, and Q is symmetric where q = 1 mod 4, else skew."""
    matrix = jacobsthal(q).double()
    ones = torch.ones(q, q, dtype=torch.float64)
    assert torch.equal(matrix @ matrix.T, q * torch.eye(q, dtype=torch.float64) - ones)
    assert not (matrix @ ones).any()
    assert torch.equal(matrix.T, matrix if q % 4 == 1 else -matrix)


@pytest.mark.parametrize("order", [2, 8, 12, 15, 1, 0])
def test_other_field_orders_are_refused(order):
    with pytest.raises(ValueError, match="odd prime power"):
        jacobsthal(order)
