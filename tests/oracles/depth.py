"""Routed layers one token at a time, attention received by its gradient, merging by loops."""

import math

import torch
from torch.nn import functional as F


def choose(scores, count, prefix=0, valid=None):
    """Pick, again and again, the best token that is left; the first of equals."""
    chosen = []
    for sample, row in enumerate(scores.tolist()):
        if valid is not None:
            row = [s if ok else -math.inf for s, ok in zip(row, valid[sample], strict=True)]
        row = [math.inf if place < prefix else s for place, s in enumerate(row)]
        left = list(range(len(row)))
        picked = []
        for _ in range(count):
            best = left[0]
            for place in left:
                if row[place] > row[best]:
                    best = place
            picked.append(best)
            left.remove(best)
        chosen.append(sorted(picked))
    return torch.tensor(chosen)


def received(query, key, scale, weights=None):
    """Mean attention each token receives, from the gradient of the output to the values.

    For o = A V, the derivative of the sum of a channel of o to the value of token j in that channel
    is the sum of column j of A. It holds for any attention that is differentiable.
    """
    value = torch.zeros_like(query, requires_grad=True)
    out = F.scaled_dot_product_attention(query.detach(), key.detach(), value, scale=scale)
    (grad,) = torch.autograd.grad(out[..., 0].sum(), value)
    return grad[..., 0].mean(1) / query.shape[2]


def vit_block(block, tokens):
    """One block of the library's own vision transformer on tokens [N, D], token by token."""
    attention, heads = block.attention, block.attention.heads
    normed = block.norm1(tokens)
    query, key, value = attention.qkv(normed).chunk(3, -1)
    size = tokens.shape[1] // heads
    mixed = torch.zeros_like(tokens)
    received = torch.zeros(len(tokens))
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        for i in range(len(tokens)):
            logits = torch.stack([query[i, part] @ k for k in key[:, part]]) / size**0.5
            weights = logits.exp() / logits.exp().sum()
            received += weights / (heads * len(tokens))
            mixed[i, part] = sum(w * v for w, v in zip(weights, value[:, part], strict=True))
    out = tokens + attention.projection(mixed)
    return out + block.mlp(block.norm2(out)), received


def vit(model, images, routed, count, prefix=1):
    """The library's vision transformer with routed layers, a sample and a token at a time."""
    logits, visited = [], []
    for image in images:
        patches = model.patches(image[None]).flatten(2).transpose(1, 2)[0]
        x = torch.cat([model.token[0], patches]) + model.positions[0]
        score, own = None, {}
        for layer, block in enumerate(model.blocks):
            if layer in routed:
                index = choose(score[None], count, prefix)[0]
                update, _ = vit_block(block, x[index])
                x = torch.stack([update[index.tolist().index(i)] if i in index else x[i]
                                 for i in range(len(x))])  # fmt: skip
                own[layer] = index.tolist()
            else:
                x, score = vit_block(block, x)
        logits.append(model.classifier(model.norm(x)[0]))
        visited.append(own)
    return torch.stack(logits), visited


def merge(x, size, keys, count, prefix):
    """Merge pairs of one sample with lists; returns tokens and sizes in the order they had."""
    unit = [k / k.norm() for k in keys]
    even = [i for i in range(0, len(x), 2) if i >= prefix]
    odd = [i for i in range(1, len(x), 2) if i >= prefix]
    found = []
    for i in even:
        best = max(odd, key=lambda j: float(unit[i] @ unit[j]))
        found.append((float(unit[i] @ unit[best]), i, best))
    found.sort(key=lambda row: -row[0])
    groups = {i: [i] for i in range(len(x))}
    for _, source, target in found[:count]:
        groups[target].append(source)
        del groups[source]
    tokens, sizes = [], []
    for members in groups.values():
        total = sum(size[i] for i in members)
        tokens.append(sum(size[i] * x[i] for i in members) / total)
        sizes.append(total)
    return torch.stack(tokens), torch.stack(sizes)
