"""Two processes that train with statistics of their own."""

import os
import pickle
import socket
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

__all__ = ["FAULTS", "two_processes"]


def process(rank, folder, broadcast, merge):
    """Train under DDP, process 1 on a darker half of the digits; leave the report in a file."""
    warnings.simplefilter("ignore")
    import lightning.pytorch as pl
    from auditing.faults.digits_training import digits
    from auditing.faults.trainings import Digits, train
    from lightning.pytorch.strategies import DDPStrategy
    from torch import distributed

    from bn_lightning import merge_statistics
    from bn_lightning.callbacks import BatchNormAudit

    class Merging(pl.Callback):
        def on_validation_start(self, trainer, pl_module):
            merge_statistics(pl_module)

        on_train_end = on_validation_start

    own = [(x + rank, y) for x, y in digits(20)[rank::2]]
    audit = BatchNormAudit()
    train(
        Digits(),
        *([Merging()] if merge == "merge" else []),
        audit,
        train_batches=own,
        val_batches=own[:3],
        devices=2,
        strategy=DDPStrategy(broadcast_buffers=broadcast == "broadcast"),
        use_distributed_sampler=False,
        max_epochs=3,
    )
    Path(folder, str(rank)).write_bytes(pickle.dumps(audit.report))
    distributed.destroy_process_group()


def two_processes(broadcast="", merge=""):
    """Train in two processes and return both reports."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
        both = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), folder, broadcast, merge],
                env={
                    **os.environ,
                    "PYTHONPATH": path,
                    "LOCAL_RANK": str(rank),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(2)
        ]
        outputs = [running.communicate(timeout=120)[0] for running in both]
        assert [running.returncode for running in both] == [0, 0], "\n".join(outputs)
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(2)]


def rank_divergence():
    """Let each process keep its own buffers, on data of its own."""
    return two_processes()[0]


FAULTS = {"rank-divergence": rank_divergence}


if __name__ == "__main__":
    process(int(sys.argv[1]), *sys.argv[2:])
