"""A residual perceptron in plain NumPy: states and their Jacobians from explicit matrices.

Gadhikar and Burkholz 2022, arXiv:2210.02411.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Block:
    """relu(alpha * second @ relu(first @ x) + skip @ x)."""

    first: np.ndarray
    second: np.ndarray
    skip: np.ndarray
    alpha: float = 1.0


def run(stem: np.ndarray, blocks: list[Block], x: np.ndarray):
    """Return the last state of one input [n] and its Jacobian by that input."""
    state, jacobian = _relu(stem @ x, stem)
    for block in blocks:
        hidden, slope = _relu(block.first @ state, block.first @ jacobian)
        total = block.alpha * block.second @ hidden + block.skip @ state
        state, jacobian = _relu(total, block.alpha * block.second @ slope + block.skip @ jacobian)
    return state, jacobian


def _relu(value, slope):
    open_ = value > 0
    return np.where(open_, value, 0.0), slope * open_[:, None]


def literal_identity_block(rotation: np.ndarray, alpha: float) -> Block:
    """Return a type B block as the compact text of the paper reads: LL of U = M - 1 / alpha.

    This is no isometry: the identity must be taken from the diagonal blocks alone.
    """
    half = len(rotation)
    u = rotation - np.eye(half) / alpha
    second = np.block([[u, -u], [-u, u]])
    return Block(np.eye(2 * half), second, np.eye(2 * half), alpha)
