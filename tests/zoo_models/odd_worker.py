"""What stands in for a worker's process: it dies or hangs when a network's name says so."""

import os
import time
from multiprocessing.connection import Connection

from zoo.architectures import Architecture
from zoo.rows import FoldingRow

__all__ = ["serve"]


def serve(_: str, connection: Connection) -> None:
    connection.send("ready")
    while True:
        connection.send((_dies_or_hangs(connection.recv()), 0.1))


def _dies_or_hangs(architecture: Architecture) -> FoldingRow:
    if architecture.name == "dies":
        os._exit(3)
    if architecture.name == "hangs":
        time.sleep(600)
    return FoldingRow(architecture.name)
