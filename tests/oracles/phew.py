"""PHEW one walk at a time, on networks written down as tables of units."""


class Net:
    """Layers by name, with what their outputs lead to.

    Args:
        layers: name to a nested list ``weights[output][input] = list of kernel entries``.
        readers: name to the names that read its outputs, "end" being the network's output.
        first: names that read the network's input.
        copies: name to the number of its inputs that each unit before it has (a flattened image).
    """

    def __init__(self, layers, readers, first, copies=None):
        self.layers, self.readers, self.first = layers, readers, first
        self.copies = copies or {}
        self.sources = {name: [] for name in layers}
        for name in first:
            self.sources[name].append("start")
        for name, later in readers.items():
            for reader in later:
                if reader != "end":
                    self.sources[reader].append(name)

    def inputs(self):
        return [(n, i) for n in self.layers if n in self.first for i in range(self._fan(n)[1])]

    def outputs(self):
        return [
            (n, o) for n in self.layers if "end" in self.readers[n] for o in range(self._fan(n)[0])
        ]

    def _fan(self, name):
        return len(self.layers[name]), len(self.layers[name][0])

    def walk(self, name, unit, forward, random):
        """Return the entries (name, output, input, position) of one walk."""
        passed = []
        while name not in ("end", "start"):
            outs, ins = self._fan(name)
            kernel = range(len(self.layers[name][0][0]))
            choices = [
                (o, i, k)
                for o in (range(outs) if forward else [unit])
                for i in ([unit] if forward else range(ins))
                for k in kernel
            ]
            mass = [abs(self.layers[name][o][i][k]) for o, i, k in choices]
            out, into, position = random.choices(choices, mass)[0]
            passed.append((name, out, into, position))
            unit = out if forward else into // self.copies.get(name, 1)
            name = random.choice(self.readers[name] if forward else self.sources[name])
            if forward:
                unit = unit * (copies := self.copies.get(name, 1)) + random.randrange(copies)
        return passed


def phew(net, keep, random):
    """Return the set of entries of walks taken in turn from inputs and outputs.

    A walk that would bring too many is passed over; nothing is ever taken back.
    """
    kept, number = set(), 0
    while len(kept) < keep:
        starts = net.outputs() if number % 2 else net.inputs()
        name, unit = starts[number // 2 % len(starts)]
        new = set(net.walk(name, unit, number % 2 == 0, random)) - kept
        if len(kept) + len(new) <= keep:
            kept |= new
        number += 1
    return kept
