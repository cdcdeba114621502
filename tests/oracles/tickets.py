"""What a masked network computes, worked out neuron by neuron."""

import torch
from torch import nn


def forward(network, x):
    """Run a Sequential of Linear and ReLU on one list of floats with plain loops."""
    values = list(x)
    for module in network:
        if isinstance(module, nn.ReLU):
            values = [max(v, 0.0) for v in values]
            continue
        weight = module.weight.tolist()
        bias = module.bias.tolist() if module.bias is not None else [0.0] * len(weight)
        values = [
            sum(w * v for w, v in zip(row, values, strict=True)) + b
            for row, b in zip(weight, bias, strict=True)
        ]
    return values


def effective_layers(network):
    """Return, for each pair of source layers, what it computes of an exact input and a constant.

    Returns:
        A list with, a target layer, (plus, minus, bias): plus[j][i] multiplies relu(x_i),
        minus[j][i] multiplies -relu(-x_i), bias[j] is the constant's.
    """
    linears = [m for m in network if isinstance(m, nn.Linear)]
    found = []
    for first, second in zip(linears[::2], linears[1::2], strict=True):
        outputs, inputs = second.out_features, first.in_features
        plus = [[0.0] * inputs for _ in range(outputs)]
        minus = [[0.0] * inputs for _ in range(outputs)]
        bias = [0.0] * outputs
        for k in range(first.out_features):
            read = first.weight[k].nonzero().flatten().tolist()
            constant = 0.0 if first.bias is None else float(first.bias[k])
            assert len(read) <= 1
            assert not (read and constant)
            for j in range(outputs):
                if read:
                    w = float(first.weight[k, read[0]])
                    table = plus if w > 0 else minus
                    table[j][read[0]] += float(second.weight[j, k]) * w
                else:
                    bias[j] += float(second.weight[j, k]) * max(constant, 0.0)
        found.append(tuple(torch.tensor(t, dtype=torch.float64) for t in (plus, minus, bias)))
    return found
