"""Federated training over Flower: the same rounds as `simulate`, between machines.

Needs the extra: ``pip install 'featherweight[flower]'``. Nothing else imports this package.
"""

try:
    import flwr  # noqa: F401
except ImportError as error:
    raise ImportError(
        "featherweight.federated.flower needs flwr: pip install 'featherweight[flower]'"
    ) from error

from featherweight.federated.flower.apps import client_app, server_app
from featherweight.federated.flower.compressed import Compressed
from featherweight.federated.flower.compression import compression
from featherweight.federated.flower.sizes import alone, of_sizes
from featherweight.federated.flower.strategy import FlowerStrategy

__all__ = [
    "Compressed",  # any strategy whose clients send updates through a codec
    "FlowerStrategy",  # the server of a simulation, its clients being Flower's nodes
    "alone",  # the population as one client sees it
    "client_app",  # answers a FlowerStrategy
    "compression",  # mod of any client app that answers Compressed
    "of_sizes",  # the population as a server without data sees it
    "server_app",  # runs a FlowerStrategy
]
