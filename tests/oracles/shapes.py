"""Weight shapes of the networks whose allocations have published golden values."""


def _residual(widths, blocks, stem_in=3):
    shapes = [(widths[0], stem_in, 3, 3)]
    inputs = widths[0]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            shapes += [(width, inputs, 3, 3), (width, width, 3, 3)]
            if block == 0 and stage > 0:
                shapes.append((width, inputs, 1, 1))
            inputs = width
    return [*shapes, (10, inputs)]


def _vgg():
    widths = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    shapes = [(out, into, 3, 3) for out, into in zip(widths, [3, *widths[:-1]], strict=True)]
    return [*shapes, (10, 512)]


def shapes(net):
    """Return name to shape, in forward order, classifier last."""
    nets = {
        "resnet20": _residual([16, 32, 64], 3),
        "resnet18": _residual([64, 128, 256, 512], 2),
        "vgg16": _vgg(),
    }
    return {f"layer{i}": shape for i, shape in enumerate(nets[net])}
