"""Slow, plain versions: the whole Hessian, and the loss on a line written out by hand."""

import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy


def whole_hessian(model, batches, names, kept=None, objective=cross_entropy):
    """Return the Hessian [D, D] of the mean loss over all examples, model in its own mode.

    Coordinates are the entries of the named parameters in order, those of ``kept`` alone where
    it has a mask of that name.
    """
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    indices = []
    for name in names:
        mask = None if kept is None else kept.get(name)
        for i in range(parameters[name].numel()):
            if mask is None or mask.flatten()[i]:
                indices.append((name, i))
    start = torch.stack([parameters[name].flatten()[i] for name, i in indices])

    def loss(vector):
        changed = {name: parameters[name].flatten().clone() for name in names}
        for value, (name, i) in zip(vector, indices, strict=True):
            changed[name][i] = value
        shaped = {name: changed[name].view_as(parameters[name]) for name in names}
        total, examples = 0.0, 0
        for inputs, targets in batches:
            fresh = {name: b.clone() for name, b in buffers.items()}
            output = functional_call(model, {**parameters, **fresh, **shaped}, (inputs,))
            total = total + objective(output, targets) * len(inputs)
            examples += len(inputs)
        return total / examples

    return torch.autograd.functional.hessian(loss, start)


def losses_on_a_line(network, first, second, alphas, loss):
    """Return the loss of a fresh network at each mix of two states of floats."""
    found = []
    for alpha in alphas:
        model = network()
        mixed = {n: (1 - alpha) * first[n].double() + alpha * second[n].double() for n in first}
        model.load_state_dict({n: t.to(first[n].dtype) for n, t in mixed.items()})
        found.append(loss(model.eval()))
    return found


def statistics_of(inputs):
    """Return mean and unbiased variance of each column, one number at a time."""
    rows, columns = inputs.shape
    means = [sum(float(inputs[r, c]) for r in range(rows)) / rows for c in range(columns)]
    variances = [
        sum((float(inputs[r, c]) - means[c]) ** 2 for r in range(rows)) / (rows - 1)
        for c in range(columns)
    ]
    return torch.tensor(means), torch.tensor(variances)
