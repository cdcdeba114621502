"""Bytes on the wire of Flower: what a SuperNode sends and receives, dense against codecs.

A SuperLink and two SuperNodes on loopback, each node behind a proxy that counts all bytes of its
connections: HTTP, Flower's own messages and heartbeats included. Beside them what our messages are.
"""

import asyncio
import contextlib
import json
import tempfile
import threading
from pathlib import Path

from featherweight.lab.federated_parse import load
from tests.flower.network import Network, free_port

ROUNDS = 3
CODECS = {
    "dense float32": ["codec.name=identity", "codec.options={}"],
    "Rand-k, 1 %": ["codec.name=rand-k", "codec.options={k: 0.01}"],
    "Rand-k-Spatial, 1 %": ["codec.name=rand-k-spatial", "codec.options={k: 0.01}"],
    "AdaQuantFL, from 2 levels": ["codec.name=adaquantfl", "codec.options={levels: 2}"],
}


def measure() -> str:
    from featherweight.lab.flower import write_app

    rows = [
        "| codec | our messages up | wire up | wire down | |",
        "| --- | --- | --- | --- | --- |",
    ]
    unit = "kB a node and round"
    for name, words in CODECS.items():
        recipe = load(
            "federated-rand-k-spatial-digits",
            [
                *("partition.clients=2", "sampler.size=2", f"rounds={ROUNDS}"),
                *("model.options.width=4096", *words),
            ],
        )[0]
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            app = write_app(Path(folder) / "app", recipe, out=str(out), timeout=120.0)
            up, down = _count(Path(folder) / "network", app)
            ours = json.loads((out / "result.json").read_text())["bytes_up"]
        shares = [f"{count / 2 / ROUNDS / 1e3:,.1f}" for count in (ours, up, down)]
        rows.append(f"| {name} | {' | '.join(shares)} | {unit} |")
    return "\n".join(rows)


def _count(folder, app):
    """Run an app; return the bytes that both nodes sent and received."""
    with Network(folder) as network, _Proxy(network.port) as proxy:
        for partition in range(2):
            network.node(partition, proxy.port)
        network.run(app, timeout=300)
        return proxy.up, proxy.down


class _Proxy:
    """Hands bytes on between nodes and the SuperLink, and counts them."""

    def __init__(self, target):
        self.target, self.port, self.up, self.down = target, free_port(), 0, 0

    def __enter__(self):
        ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(ready,), daemon=True)
        self._thread.start()
        ready.wait()
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _serve(self, ready):
        async def main():
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            server = await asyncio.start_server(self._connect, "127.0.0.1", self.port)
            ready.set()
            await self._stop.wait()
            server.close()

        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(main())

    async def _connect(self, reader, writer):
        there, back = await asyncio.open_connection("127.0.0.1", self.target)
        ways = self._hand_on(reader, back, "up"), self._hand_on(there, writer, "down")
        with contextlib.suppress(asyncio.CancelledError):  # at the end, with the loop
            await asyncio.gather(*ways)

    async def _hand_on(self, reader, writer, way):
        with contextlib.suppress(OSError, asyncio.CancelledError):
            while data := await reader.read(1 << 16):
                setattr(self, way, getattr(self, way) + len(data))
                writer.write(data)
                await writer.drain()
        writer.close()
