"""What both monitors cost in a whole Trainer run at their defaults, pictures included.

    python tests/benchmarks/monitors_run.py [--steps 2000] [--threads 2] [--gradients]

Two runs of minutes differ by more than one hundredth on any machine. So there is one run, and in it a clock around all
that the monitors do: their hooks, the taps that measure, and what they log and draw. A tap between samples is counted
with what one costs. The ratio is the whole run against the run less that time.
"""

import argparse
import tempfile
import time
import warnings

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, Dataset
from watching import resnet18, tap_microseconds

from bn_lightning.callbacks import ActivationMonitor, BatchNormMonitor
from bn_lightning.monitoring import ActivationWatch


class Images(Dataset):
    """One batch, as often as asked: loading is not what is measured."""

    def __init__(self, batches):
        self.batches = batches
        generator = torch.Generator().manual_seed(0)
        self.batch = torch.randn(32, 3, 96, 96, generator=generator), torch.randint(10, (32,), generator=generator)

    def __len__(self):
        return self.batches

    def __getitem__(self, index):
        return self.batch


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = resnet18()

    def training_step(self, batch, batch_idx):
        x, target = batch
        return nn.functional.cross_entropy(self.network(x), target)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Clock:
    """Adds up the time inside functions, each without what it calls of the others."""

    def __init__(self):
        self.seconds, self.inner = {}, [0.0]

    def around(self, function, name):
        def timed(*args, **kwargs):
            self.inner.append(0.0)
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.perf_counter() - started
                self.seconds[name] = self.seconds.get(name, 0.0) + taken - self.inner.pop()
                self.inner[-1] += taken

        return timed


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--steps", type=int, default=2000)
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--gradients", action="store_true")
    options = arguments.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    pl.seed_everything(0, verbose=False)
    clock, monitors = Clock(), [ActivationMonitor(gradients=options.gradients), BatchNormMonitor()]
    for monitor in monitors:
        for hook in [name for name in dir(pl.Callback) if name.startswith("on_")]:
            setattr(monitor, hook, clock.around(getattr(monitor, hook), type(monitor).__name__))
        monitor._draw = clock.around(monitor._draw, "pictures and texts")
    ActivationWatch.measure = clock.around(ActivationWatch.measure, "taps at sampled steps")
    ActivationWatch._measure_gradient = clock.around(ActivationWatch._measure_gradient, "taps at sampled steps")
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=TensorBoardLogger(folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=monitors,
        )
        started = time.perf_counter()
        trainer.fit(Module(), DataLoader(Images(options.steps), batch_size=None))
        whole = time.perf_counter() - started
    leaves = len(monitors[0].history.layers)
    spent = dict(clock.seconds)
    spent["taps between samples"] = leaves * options.steps * tap_microseconds() / 1e6
    print(f"\nResNet-18, 32×3×96×96, CPU, {options.threads} threads, {options.steps} steps in {whole:.0f} s")
    for name, seconds in spent.items():
        print(f"{name:40s} {seconds:6.2f} s  {100 * seconds / whole:5.2f} %")
    print(f"{'the run with both monitors, by the rest':40s} {whole / (whole - sum(spent.values())):.4f}")


if __name__ == "__main__":
    main()
