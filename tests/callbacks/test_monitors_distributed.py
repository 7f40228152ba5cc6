"""Both monitors under Lightning's DDP: two processes with unequal batches, against NumPy over all of the data."""

import os
import socket
import subprocess
import sys
import warnings

import numpy as np
import torch

SIZES = (3, 7)
STEPS = 6


def batches(rank):
    generator = torch.Generator().manual_seed(100 + rank)
    return [10.0 * rank + torch.randn(SIZES[rank], 4, generator=generator) for _ in range(STEPS)]


def process(rank, folder):
    warnings.simplefilter("ignore")
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger
    from torch import nn
    from torch.utils.data import DataLoader, Dataset

    from bn_lightning.callbacks import ActivationMonitor, BatchNormMonitor

    class Batches(Dataset):
        def __len__(self):
            return STEPS

        def __getitem__(self, index):
            return batches(rank)[index]

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 1))

        def training_step(self, batch, batch_idx):
            return self.network(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    monitor = ActivationMonitor(every_n_steps=2, first_steps=1, gradients=True, histograms=True)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        use_distributed_sampler=False,
        max_epochs=1,
        logger=CSVLogger(folder, name="", version="log"),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[monitor, BatchNormMonitor(every_n_steps=2)],
    )
    trainer.fit(Module(), DataLoader(Batches(), batch_size=None))
    stats = ("count", "mean", "std", "min", "max", "zero_fraction")
    found = {
        "steps": monitor.history.steps,
        "layers": monitor.history.layers,
        "values": {stat: monitor.history.values(stat) for stat in stats},
        "gradients": monitor.gradient_history.values("count"),
        "histogram": monitor.snapshot.histograms["network.0"].sum().item(),
    }
    torch.save(found, os.path.join(folder, f"{rank}.pt"))


def test_two_processes_of_ddp(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path)],
            env={**os.environ, "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [running.communicate(timeout=120)[0] for running in both]
    assert [running.returncode for running in both] == [0, 0], "\n".join(outputs)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one["steps"] == two["steps"] == [0, 2, 4]
    row = one["layers"].index("network.0")
    for column, step in enumerate(one["steps"]):
        x = np.concatenate([batches(rank)[step].double().numpy() for rank in range(2)])
        expected = {"count": x.size, "mean": x.mean(), "std": x.std(), "min": x.min(), "max": x.max()}
        for stat, value in expected.items():
            np.testing.assert_allclose(one["values"][stat][row, column], value, rtol=1e-6, err_msg=f"{stat} {step}")
    for stat, values in one["values"].items():
        np.testing.assert_array_equal(values, two["values"][stat], err_msg=stat)
    assert one["gradients"][1:, 0].tolist() == [50, 50, 50, 10]
    assert one["histogram"] == 40
    metrics = (tmp_path / "log" / "metrics.csv").read_text().splitlines()
    column = metrics[0].split(",").index("activations/nonfinite")
    assert [line.split(",")[column] for line in metrics[1:] if line.split(",")[column]] == ["0.0"] * 3


if __name__ == "__main__":
    process(int(sys.argv[1]), sys.argv[2])
