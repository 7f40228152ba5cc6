"""Recalibration under Lightning's DDP: two processes with unequal batches get the statistics of all data."""

import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from population_truth import pooled_float64
from torch import nn

SIZES = (3, 7)
STEPS = 6

pytestmark = pytest.mark.slow


def batches(rank):
    generator = torch.Generator().manual_seed(100 + rank)
    return [2.0 * rank + torch.randn(SIZES[rank], 4, generator=generator) for _ in range(STEPS)]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3), nn.BatchNorm1d(3))


def process(rank, folder, fault):
    warnings.simplefilter("ignore")
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader, Dataset

    from bn_lightning.callbacks import RecalibrateBatchNorm

    class Batches(Dataset):
        def __len__(self):
            return STEPS

        def __getitem__(self, index):
            return batches(rank)[index]

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.network, self.seen = network(), []

        def forward(self, x):
            if fault and rank == 1 and not self.network[0].training:
                raise OSError("the disk is gone")
            return self.network(x)

        def training_step(self, batch, batch_idx):
            return self.network(batch).square().sum()

        def validation_step(self, batch, batch_idx):
            if batch_idx == 0:
                self.seen.append({key: value.clone() for key, value in self.network.state_dict().items()})

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    torch.set_num_threads(1)
    validation, end = RecalibrateBatchNorm(), RecalibrateBatchNorm("end")
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        use_distributed_sampler=False,
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[validation, end],
    )
    module = Module()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader(Batches(), batch_size=None), DataLoader(Batches(), batch_size=None))
    found = {
        "seen": module.seen,
        "end": module.network.state_dict(),
        "result": None if end.result is None else end.result.to_dict(),
        "told": [str(entry.message) for entry in caught if "RecalibrateBatchNorm" in str(entry.message)],
    }
    torch.save(found, os.path.join(folder, f"{rank}.pt"))


def run(folder, fault=""):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    both = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder), fault],
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
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_processes_get_the_statistics_of_all_data(tmp_path):
    one, two = run(tmp_path)
    assert one["result"] == two["result"]
    assert one["result"]["batches"] == 2 * STEPS
    assert one["result"]["layers"][0]["count"] == sum(SIZES) * STEPS
    for state, other in zip([*one["seen"], one["end"]], [*two["seen"], two["end"]], strict=True):
        assert all(torch.equal(value, other[key]) for key, value in state.items())
        model = network()
        model.load_state_dict(state)
        for name, (_, mean, var) in pooled_float64(model, batches(0) + batches(1)).items():
            torch.testing.assert_close(state[f"{name}.running_mean"].double(), mean, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(state[f"{name}.running_var"].double(), var, rtol=1e-5, atol=0)


def test_what_one_process_cannot_do_stops_neither(tmp_path):
    one, two = run(tmp_path, "fault")
    assert one["result"] is two["result"] is None
    assert len(one["told"]) == 3
    assert all("process 1 cannot measure population statistics: OSError: the disk" in told for told in one["told"])


if __name__ == "__main__":
    process(int(sys.argv[1]), *sys.argv[2:])
