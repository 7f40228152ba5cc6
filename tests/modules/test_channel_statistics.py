"""The metric against NumPy float64 over all data, alone, in a collection, under the Trainer, and over two processes."""

import os
import subprocess
import sys

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection

from bn_lightning.errors import BatchNormError
from bn_lightning.modules import ChannelStatistics

SIZES = (3, 11)


def batches(dtype=torch.float32, mean=0.0, std=1.0):
    generator = torch.Generator().manual_seed(0)
    sizes = (5, 0, 1, 7)
    made = [mean + std * torch.randn(size, 4, 3, 3, generator=generator, dtype=torch.float64) for size in sizes]
    return [x.clamp(min=0).to(dtype) if mean == 0 else x.to(dtype) for x in made]


def of_numpy(values):
    return {
        "mean": values.mean(),
        "std": values.std(),
        "min": values.min(),
        "max": values.max(),
        "rms": np.sqrt((values**2).mean()),
        "zero_fraction": (values == 0).mean(),
        "nonfinite": 0.0,
        "dead_channels": 0.0,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1e4, 0.1)])
def test_over_unequal_batches(dtype, mean, std):
    metric = ChannelStatistics(4)
    given = batches(dtype, mean, std)
    for x in given:
        metric.update(x)
    everything = np.concatenate([x.double().numpy() for x in given])
    expected = of_numpy(everything)
    for name, value in metric.compute().items():
        np.testing.assert_allclose(value.item(), expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    channels = metric.channels()
    np.testing.assert_allclose(channels.mean.numpy(), everything.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(channels.std.numpy(), everything.std((0, 2, 3)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "statistic", ["mean", "std", "min", "max", "rms", "zero_fraction", "nonfinite", "dead_channels"]
)
def test_one_statistic_is_a_scalar(statistic):
    metric = ChannelStatistics(4, statistic)
    for x in batches():
        forward = metric(x)
    assert forward.shape == ()
    assert forward == ChannelStatistics(4, statistic)(batches()[-1]), "forward gives the batch's own"
    everything = np.concatenate([x.double().numpy() for x in batches()])
    assert metric.compute().item() == pytest.approx(of_numpy(everything)[statistic], rel=1e-6)
    metric.reset()
    assert metric.channels().count.tolist() == [0] * 4


def test_channels_last_axis_and_a_collection():
    x = torch.randn(5, 7, 3)
    collection = MetricCollection(
        {name: ChannelStatistics(3, name, channel_dim=-1) for name in ("mean", "std")} | {"all": ChannelStatistics(7)}
    )
    collection.update(x)
    values = collection.compute()
    np.testing.assert_allclose([values["mean"], values["std"]], [x.mean(), x.std(correction=0)], rtol=1e-5)
    assert values["all_rms"].item() == pytest.approx(x.square().mean().sqrt().item(), rel=1e-5)


def test_what_is_wrong_is_named():
    with pytest.raises(BatchNormError, match="4 channels along axis 1, got shape \\(2, 3\\)"):
        ChannelStatistics(4).update(torch.ones(2, 3))
    with pytest.raises(BatchNormError, match="statistic= is one of mean"):
        ChannelStatistics(4, "median")


def test_it_is_logged_by_the_epoch(tmp_path):
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4)
            self.statistics = ChannelStatistics(4, "mean")
            self.seen = []

        def training_step(self, batch, batch_idx):
            hidden = self.layer(batch)
            self.seen.append(hidden.detach())
            self.statistics(hidden)
            self.log("hidden", self.statistics, on_step=False, on_epoch=True)
            return hidden.square().mean()

        def on_train_epoch_end(self):
            self.logged = self.trainer.callback_metrics["hidden"]
            self.expected, self.seen = torch.cat(self.seen).mean(), []

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    trainer = pl.Trainer(
        max_epochs=2,
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, DataLoader(torch.randn(22, 3), batch_size=8))
    torch.testing.assert_close(trainer.callback_metrics["hidden"].float(), module.expected, rtol=1e-5, atol=1e-6)


def share(rank):
    return 100.0 * rank + torch.randn(SIZES[rank], 3, 2, generator=torch.Generator().manual_seed(rank))


def process(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    metric = ChannelStatistics(3)
    metric.update(share(rank))
    torch.save({name: value.item() for name, value in metric.compute().items()}, os.path.join(folder, f"{rank}.pt"))
    distributed.destroy_process_group()


def test_processes_with_unequal_shares(tmp_path):
    both = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [running.wait(timeout=60) for running in both] == [0, 0]
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one == two
    expected = of_numpy(np.concatenate([share(rank).double().numpy() for rank in range(2)]))
    for name, value in one.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-6, err_msg=name)


if __name__ == "__main__":
    process(int(sys.argv[1]), sys.argv[2])
