"""The structure of a residual or plain ReLU network, read from what a forward pass ran.

A network is a first layer, then residual blocks ``relu(a * branch(x) + skip(x))`` and plain layers
``relu(layer(x))`` in any order, then a linear head. Anything else is refused by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from featherweight.common import unwrap
from featherweight.init.trace import Node, Trace, trace

AFFINE = ("conv", "linear")
LINE = (*AFFINE, "norm", "relu", "shift", "scale", "pool", "maxpool", "reshape", "identity")
BETWEEN = ("reshape", "pool", "maxpool", "identity", "shift")


@dataclass(frozen=True)
class Path:
    """Layers one after the other, with a ReLU between two and none at the end.

    Attributes:
        nodes: the recorded calls, in the order of execution.
    """

    nodes: tuple[Node, ...]

    def owners(self, *kinds: str) -> tuple[str, ...]:
        """Name the modules or parameters of the calls of these kinds."""
        return tuple(node.owner for node in self.nodes if node.kind in kinds)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the linear layers and convolutions."""
        return self.owners(*AFFINE)

    @property
    def norms(self) -> tuple[str, ...]:
        """Names of the norms."""
        return self.owners("norm")

    @property
    def outer_scales(self) -> tuple[str, ...]:
        """Names of the multipliers that act on the end of the path, behind its last layer."""
        last = max((i for i, n in enumerate(self.nodes) if n.kind in (*AFFINE, "relu")), default=-1)
        return tuple(node.owner for node in self.nodes[last + 1 :] if node.kind == "scale")


@dataclass(frozen=True)
class Plain:
    """A layer with a ReLU behind it, or the head, which has none."""

    path: Path
    state: Node

    @property
    def name(self) -> str:
        """Name of the layer."""
        return self.path.layers[0]


@dataclass(frozen=True)
class Block:
    """A residual block.

    Attributes:
        branch: one or more layers.
        skip: one layer (a projection, type C) or none (the identity, type B).
        state: the ReLU behind the sum.
    """

    branch: Path
    skip: Path
    state: Node

    @property
    def name(self) -> str:
        """What the names of its layers have in common, or else the name of the first."""
        parts = [name.split(".") for name in (*self.branch.layers, *self.skip.layers)]
        common = 0
        while len({tuple(part[: common + 1]) for part in parts}) == 1 and common < len(parts[0]):
            common += 1
        return ".".join(parts[0][:common]) if len(parts) > 1 and common else parts[0][0]


@dataclass(frozen=True)
class Network:
    """First layer, body and head of a model, as it runs.

    Attributes:
        model: unwrapped.
        stem: the first layer.
        body: blocks and plain layers.
        head: the last layer; its ``state`` is the output.
        between: what lies before each part of the body and before the head (pooling, reshaping).
    """

    model: nn.Module
    stem: Plain
    body: tuple[Plain | Block, ...]
    head: Plain
    between: tuple[tuple[Node, ...], ...]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The residual blocks."""
        return tuple(part for part in self.body if isinstance(part, Block))

    @property
    def paths(self) -> tuple[Path, ...]:
        """All paths, in the order of execution; of a block the branch, then the skip."""
        body = [
            path
            for part in self.body
            for path in ((part.path,) if isinstance(part, Plain) else (part.branch, part.skip))
        ]
        return (self.stem.path, *body, self.head.path)

    @property
    def states(self) -> tuple[tuple[str, Node], ...]:
        """Name and node of the state behind the first layer and behind each part of the body."""
        return tuple((part.name, part.state) for part in (self.stem, *self.body))


def read(model: nn.Module, example: Tensor | None = None) -> Network:
    """Read the structure of a model from one forward pass.

    Args:
        model: wrapped or not; left as it is.
        example: inputs [B, ...]; None: zeros of a shape guessed from the first layer.

    Raises:
        ValueError: the model is built otherwise; the layer and the reason are named.
    """
    return structure(unwrap(model), trace(model, example))


def structure(model: nn.Module, traced: Trace) -> Network:
    """Read the structure of a traced model; see `read`."""
    head, node = _last_layer(traced.output)
    parts: list[Plain | Block] = []
    between: list[tuple[Node, ...]] = []
    while True:
        passed, node = _walk(node, BETWEEN)
        between.append(passed)
        if node.kind == "input":
            break
        part, node = _part(node)
        parts.append(part)
    parts.reverse()
    between.reverse()
    if not parts or isinstance(parts[0], Block):
        raise ValueError(f"{head.name!r}: the model must begin with a layer and a ReLU")
    network = Network(model, parts[0], tuple(parts[1:]), head, tuple(between[1:]))
    _check(network, between[0])
    return network


def _walk(node: Node, kinds: Iterable[str]) -> tuple[tuple[Node, ...], Node]:
    """Go back while the calls are of these kinds; return them in order and what lies before."""
    passed = []
    while node.kind in kinds:
        passed.append(node)
        node = node.inputs[0]
    return tuple(reversed(passed)), node


def _last_layer(output: Node) -> tuple[Plain, Node]:
    behind, node = _walk(output, ("scale", "shift", "identity", "reshape"))
    if node.kind not in AFFINE:
        raise ValueError(f"{node.near}: the model must end in a linear layer, not in {node.kind!r}")
    return Plain(Path((node, *behind)), output), node.inputs[0]


def _part(state: Node) -> tuple[Plain | Block, Node]:
    """Read the block or layer that ends in a ReLU; return it and what lies before it."""
    if state.kind == "add":
        raise ValueError(
            f"{state.near}: a residual sum without a ReLU right behind it (pre-activation order)"
        )
    if state.kind in AFFINE:
        raise ValueError(f"{state.near} is not followed by a ReLU")
    if state.kind != "relu":
        raise ValueError(f"{state.near}: {state.kind!r} behind it can't be treated")
    behind, node = _walk(state.inputs[0], ("norm", "shift", "scale", "identity"))
    if node.kind in AFFINE:
        return Plain(Path((node, *behind)), state), node.inputs[0]
    if node.kind != "add":
        raise ValueError(f"{node.near}: {node.kind!r} before a ReLU can't be treated")
    if any(passed.kind in ("norm", "scale") for passed in behind):
        raise ValueError(f"{node.near}: a norm or factor between residual sum and ReLU")
    return _block(node, state)


def _block(total: Node, state: Node) -> tuple[Block, Node]:
    lines = [_line(node) for node in total.inputs]
    if total.inputs[0].shape != total.inputs[1].shape:
        raise ValueError(f"{total.near}: the residual sum broadcasts")
    fork = next((node for node in lines[0] if node in set(lines[1])), None)
    if fork is None:
        raise ValueError(f"{total.near}: what is added does not come from one state by two ways")
    paths = [Path(tuple(reversed(line[: line.index(fork)]))) for line in lines]
    branch, skip = sorted(paths, key=_order)
    block = Block(branch, skip, state)
    _check_branch(block)
    return block, fork


def _line(node: Node) -> list[Node]:
    """Go back as long as there is one input; the last node of the list may have more."""
    line = [node]
    while line[-1].kind in LINE:
        line.append(line[-1].inputs[0])
    return line


def _order(path: Path) -> tuple[int, int]:
    """Sort a branch before its skip: it has more layers, or runs first."""
    return -len(path.layers), min((n.index for n in path.nodes if n.kind in AFFINE), default=0)


def _check_branch(block: Block) -> None:
    order = _kinds(block.branch)
    if not block.branch.layers:
        raise ValueError(f"{block.state.near}: a sum of two states with no layer between them")
    if order[0] not in AFFINE:
        raise ValueError(
            f"block {block.name!r} begins with {order[0]!r}, not a layer (pre-activation order)"
        )
    places = [kind for kind in order if kind != "norm"]
    if len(places) % 2 == 0 or any(
        kind not in (("relu",) if place % 2 else AFFINE) for place, kind in enumerate(places)
    ):
        way = " > ".join(places)
        raise ValueError(f"block {block.name!r}: no ReLU between each two layers alone: {way}")
    skip = [kind for kind in _kinds(block.skip) if kind != "norm"]
    if len(skip) > 1 or any(kind not in AFFINE for kind in skip):
        way = " > ".join(skip)
        raise ValueError(f"block {block.name!r}: the skip must be nothing or one layer, not {way}")


def _kinds(path: Path) -> list[str]:
    return [node.kind for node in path.nodes if node.kind not in ("identity", "shift", "scale")]


def _check(network: Network, before: Sequence[Node]) -> None:
    """Refuse what comes before the first layer, and a layer that runs twice."""
    for node in before:
        if node.kind not in ("reshape", "identity"):
            raise ValueError(f"{node.kind!r} before the first layer can't be treated")
    for node in (node for nodes in network.between for node in nodes):
        given = node.inputs[0].shape
        flat = node.kind == "reshape" and len(node.shape) == 2
        if node.shape[0] != given[0] or not (flat or node.shape[:2] == given[:2]):
            raise ValueError(f"{node.near}: {node.kind!r} behind it mixes channels")
    names = Counter(name for path in network.paths for name in path.owners(*AFFINE, "norm"))
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ValueError(f"layer {twice[0]!r} runs more than once (tied weights)")
