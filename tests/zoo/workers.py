"""Processes that measure one network after the other; one that hangs, dies or has grown is replaced."""

import multiprocessing
import resource
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from queue import SimpleQueue

import torch
from zoo.architectures import Architecture
from zoo.rows import FoldingRow, PeerRow

__all__ = ["MEASURES", "measured"]

MEASURES: dict[str, type[FoldingRow] | type[PeerRow]] = {"folding": FoldingRow, "inductor": PeerRow}
# The allocator keeps what large networks took; two such processes and a third network would not fit.
_MOST_GIB = 5.0
# A network that asks for more crashes alone, and takes nobody's process with it. The largest takes 15.6.
_LIMIT_GIB = 18


def measured(
    kind: str, architectures: Iterable[Architecture], *, workers: int, timeout: float, go_on: Callable[[], bool]
) -> Iterator[FoldingRow | PeerRow]:
    """Yield the rows as they come in, and start no further network once ``go_on`` says no."""
    waiting = iter(architectures)
    idle: SimpleQueue[_Worker] = SimpleQueue()
    team = [_Worker(kind, timeout) for _ in range(workers)]
    for worker in team:
        idle.put(worker)

    def work(architecture: Architecture) -> FoldingRow | PeerRow:
        worker = idle.get()
        try:
            return worker.measure(architecture)
        finally:
            idle.put(worker)

    running: set[Future[FoldingRow | PeerRow]] = set()
    try:
        with ThreadPoolExecutor(workers) as threads:
            while True:
                while len(running) < workers and go_on():
                    architecture = next(waiting, None)
                    if architecture is None:
                        break
                    running.add(threads.submit(work, architecture))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
    finally:
        for worker in team:
            worker.stop()


class _Worker:
    """A process and the way to talk to it; it is started at the first network."""

    def __init__(self, kind: str, timeout: float) -> None:
        self.kind, self.timeout = kind, timeout
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None

    def measure(self, architecture: Architecture) -> FoldingRow | PeerRow:
        row = MEASURES[self.kind](architecture.name)
        try:
            connection = self._started()
            connection.send(architecture)
            if connection.poll(self.timeout):
                row, peak = connection.recv()
                if peak > _MOST_GIB:
                    self.stop()
                return row
            crash = f"took longer than {self.timeout:g} s"
        except (EOFError, OSError):
            assert self._process is not None
            self._process.join(10)
            crash = f"the process died with exit code {self._process.exitcode}"
        self.stop()
        return replace(row, crash=crash)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = None

    def _started(self) -> Connection:
        if self._process is None or self._connection is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(self.kind, theirs), daemon=True)
            self._process.start()
            theirs.close()  # or its end would not be noticed
            self._connection.recv()  # "ready": what it imports first is not the network's time
        return self._connection


def _serve(kind: str, connection: Connection) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with suppress(ValueError, OSError):  # not every system has such a limit, or lets it be set
        resource.setrlimit(resource.RLIMIT_DATA, (_LIMIT_GIB * 2**30,) * 2)
    if kind == "folding":
        from zoo.measure import measure_folding as measure
    else:  # imports the compiler: seconds
        from zoo.inductor import measure_inductor as measure
    with suppress(EOFError, KeyboardInterrupt):
        connection.send("ready")
        while True:
            row = measure(connection.recv())
            connection.send((row, _peak_gib()))


def _peak_gib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
