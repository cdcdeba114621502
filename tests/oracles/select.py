"""Selection by plain sorting."""


def slow_top_k(values, keep, support=None):
    """Return a list of bools: the ``keep`` largest, earlier ones first among equals."""
    allowed = [i for i in range(len(values)) if support is None or support[i]]
    chosen = sorted(allowed, key=lambda i: (-values[i], i))[:keep]
    return [i in chosen for i in range(len(values))]
