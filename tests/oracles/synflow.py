"""SynFlow by walking every path from an input to an output."""

import itertools
import math


def slow_synflow(matrices):
    """Return the total flow, and of every weight the flow of the paths through it.

    Args:
        matrices: nested lists, one for each layer, rows are outputs.
    """
    widths = [len(matrices[0][0]), *(len(matrix) for matrix in matrices)]
    flows = [[[0.0] * len(row) for row in matrix] for matrix in matrices]
    total = 0.0
    for path in itertools.product(*map(range, widths)):
        steps = list(zip(path[1:], path[:-1], strict=True))
        product = math.prod(abs(m[j][i]) for m, (j, i) in zip(matrices, steps, strict=True))
        total += product
        for flow, (j, i) in zip(flows, steps, strict=True):
            flow[j][i] += product
    return total, flows
