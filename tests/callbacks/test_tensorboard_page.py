"""What TensorBoard's own server answers about a log of both monitors, and how large a log gets."""

import json
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from contextlib import suppress
from io import BytesIO
from urllib.error import URLError

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.image import imread
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bn_lightning.callbacks import ActivationMonitor, BatchNormMonitor

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
HEAT_MAPS = [f"activations/heatmap/{stat}" for stat in ("dead_fraction", "mean", "std", "zero_fraction")]


class Module(pl.LightningModule):
    def __init__(self, blocks=1):
        super().__init__()
        layers = [layer for _ in range(blocks) for layer in (nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())]
        self.network = nn.Sequential(*layers, nn.Linear(4, 2))

    def training_step(self, batch, batch_idx):
        return self.network(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(folder, module, *callbacks, batches=12):
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=TensorBoardLogger(folder, name="", version=""),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=list(callbacks),
    )
    x = torch.randn(batches * 8, 4, generator=torch.Generator().manual_seed(0))
    trainer.fit(module, DataLoader(TensorDataset(x), batch_size=8))


class Server:
    """TensorBoard itself, as a process of its own."""

    def __init__(self, folder):
        command = [
            sys.executable,
            "-m",
            "tensorboard.main",
            "--logdir",
            str(folder),
            "--port",
            "0",
            "--load_fast=false",
        ]
        self.output = (folder / "server.txt").open("w+")
        self.process = subprocess.Popen(command, stdout=self.output, stderr=subprocess.STDOUT)
        self.address = ""

    def get(self, path, **query):
        url = f"{self.address}data/plugin/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.read()

    def wait(self, seconds=120):
        """Wait until it serves, and has read the log."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            self.output.seek(0)
            words = [word for word in self.output.read().split() if word.startswith("http://localhost")]
            with suppress(URLError, ConnectionError):
                self.address = words[0] if words else ""
                if words and any(json.loads(self.get("images/tags")).values()):
                    return
            time.sleep(0.3)
        self.output.seek(0)
        pytest.fail(f"TensorBoard did not serve the log: {self.output.read()}")

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.output.close()


@pytest.fixture
def server(tmp_path):
    fit(tmp_path, Module(), ActivationMonitor(gradients=True, histograms=True), BatchNormMonitor(every_n_steps=2))
    server = Server(tmp_path)
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def test_the_server_shows_pictures_scalars_histograms_and_texts(server):
    def tags(plugin):
        ((run, found),) = json.loads(server.get(f"{plugin}/tags")).items()
        return run, sorted(found)

    run, pictures = tags("images")
    bn = [f"bn/heatmap/{stat}" for stat in ("dead", "drift", "noise")]
    gradients = ["gradients/heatmap/rms", "gradients/profile"]
    assert pictures == [*HEAT_MAPS, "activations/profile", *bn, *gradients]
    for tag in pictures:
        images = json.loads(server.get("images/images", tag=tag, run=run, sample=0))
        assert [image["step"] for image in images] == [11], tag
        query = dict(urllib.parse.parse_qsl(images[0]["query"]))
        png = server.get("images/individualImage", **query)
        pixels = imread(BytesIO(png))
        assert min(pixels.shape[:2]) > 150, tag
        assert pixels.std() > 0.01, tag
    _, scalars = tags("scalars")
    assert {"activations/network.1/std", "gradients/network.1/rms", "bn/network.1/drift", "bn/worst_drift"} < set(
        scalars
    )
    values = json.loads(server.get("scalars/scalars", tag="activations/network.1/std", run=run))
    assert [step for _, step, _ in values] == list(range(12))
    assert [value for *_, value in values] == pytest.approx([1.0] * 12, abs=0.05)
    _, histograms = tags("histograms")
    assert histograms == [f"activations/histogram/network.{layer}" for layer in range(4)]
    ((_, _, bins),) = json.loads(server.get("histograms/histograms", tag=histograms[2], run=run))
    assert sum(count for *_, count in bins) == pytest.approx(8 * 4), "one sample of a ReLU"
    assert min(low for low, *_ in bins) == pytest.approx(0.0, abs=1e-6)
    _, texts = tags("text")
    assert {"activations/worst/text_summary", "bn/worst/text_summary"} <= set(texts)
    assert b"network.1" in server.get("text/text", tag="activations/worst/text_summary", run=run)


def test_three_hundred_layers_make_few_tags_and_a_small_log(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitors = ActivationMonitor(gradients=True, first_steps=3), BatchNormMonitor(first_steps=3)
    fit(tmp_path, Module(blocks=100), *monitors, batches=4)
    assert len(monitors[0].history.layers) == 301
    log = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "scalars": 0})
    log.Reload()
    tags = log.Tags()
    assert sum(len(found) for found in tags.values() if isinstance(found, list)) < 50
    drawn = sum(len(log.Images(tag)[0].encoded_image_string) for tag in tags["images"])
    scalars = sum(tag.startswith(("activations/", "gradients/", "bn/")) for tag in tags["scalars"])
    # 100,000 steps: 2,020 samples at the default cadence, and 18 drawings, between which steps grow by half.
    assert 18 * drawn + 2020 * 80 * scalars < 20e6
