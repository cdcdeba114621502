"""Node-path balancing of one layer: the objective, all solutions tried, and a linear program."""

from itertools import product

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import lil_array


def most_paths(paths, room, count):
    """Sum of path numbers that ``count`` entries reach at most."""
    total = 0.0
    for i in sorted(range(len(paths)), key=lambda i: -paths[i]):
        taken = min(count, sum(row[i] for row in room))
        total += taken * paths[i]
        count -= taken
    return total or 1.0


def objective(table, paths, room, count, alpha, beta):
    """Value of a table ``[output][input]`` of kernel counts (one group)."""
    ins, outs = range(len(paths)), range(len(room))
    used = sum(any(table[o][i] for o in outs) for i in ins) + sum(any(table[o]) for o in outs)
    reached = sum(paths[i] * table[o][i] for o in outs for i in ins)
    kernels = sum(table[o][i] > 0 for o in outs for i in ins)
    return (
        alpha * used / (len(paths) + len(room))
        + (1 - alpha) * reached / most_paths(paths, room, count)
        + beta * kernels / count
    )


def brute_force(paths, room, count, alpha, beta):
    """Best value over all tables."""
    cells = [range(limit + 1) for row in room for limit in row]
    width = len(paths)
    best = -np.inf
    for flat in product(*cells):
        if sum(flat) == count:
            table = [flat[k : k + width] for k in range(0, len(flat), width)]
            best = max(best, objective(table, paths, room, count, alpha, beta))
    return best


def linear_program(paths, room, count, alpha, beta):
    """Best value of the relaxation: first entries of kernels, further ones, used units."""
    outs, ins = len(room), len(paths)
    cells = outs * ins
    unit = alpha / (outs + ins)
    path = (1 - alpha) * np.tile(paths, outs) / most_paths(paths, room, count)
    gain = np.concatenate([path + beta / count, path, np.full(ins + outs, unit)])
    limits = np.array(room).ravel()
    upper = np.concatenate([np.minimum(limits, 1), np.maximum(limits - 1, 0), np.ones(ins + outs)])
    used = lil_array((ins + outs, 2 * cells + ins + outs))
    for o, i in product(range(outs), range(ins)):
        for cell in (o * ins + i, cells + o * ins + i):
            used[i, cell] = used[ins + o, cell] = -1
    for row in range(ins + outs):
        used[row, 2 * cells + row] = 1
    total = np.concatenate([np.ones(2 * cells), np.zeros(ins + outs)])[None]
    bounds = np.stack([np.zeros_like(upper), upper], 1)
    solved = linprog(-gain, used.tocsr(), np.zeros(ins + outs), total, [count], bounds, "highs")
    assert solved.status == 0
    return -solved.fun
