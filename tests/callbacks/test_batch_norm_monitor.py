"""BatchNormMonitor under the Trainer: what it logs, what it leaves alone, what it does about nonfinite statistics."""

import math

import lightning.pytorch as pl
import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bn_lightning.callbacks import BatchNormMonitor, FreezeBatchNorm
from bn_lightning.errors import BatchNormError

BATCH = 6


class Module(pl.LightningModule):
    def __init__(self, spoil_at=None):
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.BatchNorm2d(4, momentum=0.3),
            nn.Flatten(),
            nn.Linear(64, 3),
        )
        self.spoil_at, self.seen, self.losses, self.validation = spoil_at, [], [], []

    def training_step(self, batch, batch_idx):
        x, target = batch
        if batch_idx == self.spoil_at:
            x = torch.full_like(x, math.inf)
        before = self.network[1].running_mean.clone(), self.network[3].running_mean.clone()
        hidden = self.network[0](x)
        values = hidden.detach().double().numpy()
        self.seen.append((values.mean((0, 2, 3)), before))
        loss = nn.functional.cross_entropy(self.network[1:](hidden), target)
        if batch_idx == self.spoil_at:
            loss = 0 * sum(parameter.sum() for parameter in self.parameters())
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch, batch_idx):
        self.validation.append(self.network(1e3 * batch[0]).detach())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def loader(batches=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = 1 + torch.randn(batches * BATCH, 1, 6, 6, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(3, (len(x),), generator=generator)), batch_size=BATCH)


def fit(tmp_path, *callbacks, module=None, family=pl, ckpt_path=None, batches=8, **options):
    pl.seed_everything(3, verbose=False)
    module = module or Module()
    defaults = {
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "accelerator": "cpu",
        "default_root_dir": tmp_path,
    }
    trainer = family.Trainer(callbacks=list(callbacks), **{**defaults, **options})
    trainer.fit(module, loader(batches), loader(2, seed=1), ckpt_path=ckpt_path)
    return trainer, module


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_is_logged_is_of_the_data(tmp_path, accumulate):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitor = BatchNormMonitor(every_n_steps=4, first_steps=1)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    _, module = fit(tmp_path, monitor, logger=logger, batches=8 * accumulate, accumulate_grad_batches=accumulate)
    log = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    log.Reload()
    # Steps 0, 4, and 7 at the end; each reading has the steps since the last.
    assert [scalar.step for scalar in log.Scalars("bn/network.1/dead")] == [0, 4, 7]
    noise = log.Scalars("bn/network.1/noise")
    assert [scalar.step for scalar in noise] == [4, 7], "one step has no spread"
    means = [mean for mean, _ in module.seen]
    if accumulate == 2:
        means = [(0.9 * one + other) / 1.9 for one, other in zip(means[::2], means[1::2], strict=True)]
    sigma = np.sqrt(module.network[1].running_var.double().numpy() + 1e-5)
    last = np.stack(means[5:])
    assert noise[-1].value == pytest.approx(np.sqrt(((last.std(0, ddof=1) / sigma) ** 2).mean()), rel=1e-3)
    running = module.network[1].running_mean.double().numpy()
    drift = np.sqrt((((last.mean(0) - running) / sigma) ** 2).mean())
    assert log.Scalars("bn/network.1/drift")[-1].value == pytest.approx(drift, rel=1e-3)
    assert monitor.snapshot.rows[0].updates == accumulate
    assert [scalar.value for scalar in log.Scalars("bn/nonfinite")] == [0.0] * 3
    tags = log.Tags()["scalars"]
    assert not [tag for tag in tags if "restored" in tag]
    assert "bn/worst_drift" in tags


def test_an_optimizer_step_ends_with_the_epoch(tmp_path):
    """Five batches by two: the last step of an epoch has one."""
    monitor = BatchNormMonitor()
    fit(tmp_path, monitor, batches=5, accumulate_grad_batches=2, max_epochs=2)
    recent = monitor.snapshot.recent["network.1"]
    assert [(each.step, each.updates) for each in recent] == [(0, 2), (1, 2), (2, 1), (3, 2), (4, 2), (5, 1)]


def test_accumulation_that_changes_behind_a_step(tmp_path):
    class Changes(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 3:  # Lightning counts this batch as a step, after the monitor has heard of it
                trainer.accumulate_grad_batches = 2

    monitor = BatchNormMonitor()
    fit(tmp_path, monitor, Changes(), accumulate_grad_batches=3)
    assert [each.updates for each in monitor.snapshot.recent["network.1"]] == [3, 1, 2, 2]


def test_the_recent_steps_are_those_of_the_fit(tmp_path):
    monitor = BatchNormMonitor()
    fit(tmp_path, monitor, max_epochs=3)
    recent = monitor.snapshot.recent["network.1"]
    assert [each.step for each in recent] == list(range(4, 24))
    assert {each.updates for each in recent} == {1}


@pytest.mark.parametrize("logger", [False, True])
def test_the_table_is_there_with_and_without_a_logger(tmp_path, logger):
    monitor = BatchNormMonitor()
    with pytest.raises(BatchNormError, match="nothing was read yet"):
        monitor.table()
    fit(tmp_path, monitor, logger=CSVLogger(tmp_path, name="", version="") if logger else False)
    assert [row[0] for row in monitor.table().rows] == ["network.1", "network.3"]
    assert not logger or "bn/worst_drift" in (tmp_path / "metrics.csv").read_text()


def test_the_standalone_family_takes_it_too(tmp_path):
    class Standalone(pytorch_lightning.LightningModule):
        training_step, validation_step = Module.training_step, Module.validation_step
        configure_optimizers = Module.configure_optimizers

        def __init__(self):
            super().__init__()
            self.network = Module().network
            self.spoil_at, self.seen, self.losses, self.validation = None, [], [], []

    monitor = BatchNormMonitor()
    fit(tmp_path, monitor, module=Standalone(), family=pytorch_lightning)
    assert monitor.snapshot.step == 7


@pytest.mark.parametrize("when", ["fast_dev_run", "limit"])
def test_short_runs(tmp_path, when):
    monitor = BatchNormMonitor()
    options = {"fast_dev_run": True} if when == "fast_dev_run" else {"limit_train_batches": 1}
    fit(tmp_path, monitor, **options)
    assert monitor.snapshot.step == 0


def test_a_nonfinite_statistic_is_told_once(tmp_path):
    monitor = BatchNormMonitor(every_n_steps=1)
    with pytest.warns(UserWarning, match=r"in 'network\.1' and 1 other layer .* after optimizer step 3\.") as caught:
        _, module = fit(tmp_path, monitor, module=Module(spoil_at=3))
    assert len([each for each in caught if "NaN or infinite" in str(each.message)]) == 1
    assert [(alert.rule, alert.step) for alert in monitor.alert_log] == [("nonfinite-statistics", 3)]
    assert not module.validation[-1].isfinite().all()
    assert monitor.snapshot.rows[0].nonfinite


def test_raise_stops_the_fit_and_names_the_layer(tmp_path):
    with pytest.raises(BatchNormError, match=r"in 'network\.1' .* were NaN or infinite"):
        fit(tmp_path, BatchNormMonitor(every_n_steps=1, on_nonfinite="raise"), module=Module(spoil_at=3))


@pytest.mark.filterwarnings("ignore:nonfinite-statistics")
def test_restore_makes_the_next_validation_finite(tmp_path):
    monitor = BatchNormMonitor(on_nonfinite="restore")
    _, module = fit(tmp_path, monitor, module=Module(spoil_at=3))
    assert module.validation[-1].isfinite().all()
    rows = monitor.snapshot.rows
    assert [(row.restored, row.first_spoiled, row.nonfinite) for row in rows] == [(1, 3, 0), (1, 3, 0)]
    assert monitor.snapshot.totals()["restored"] == 2


@pytest.mark.filterwarnings("ignore:nonfinite-statistics")
def test_restore_comes_before_the_validation_of_an_epoch_that_ends_in_a_partial_step(tmp_path):
    _, module = fit(
        tmp_path,
        BatchNormMonitor(on_nonfinite="restore"),
        module=Module(spoil_at=4),
        batches=5,
        accumulate_grad_batches=2,
    )
    assert module.validation[-1].isfinite().all()


def test_restore_changes_nothing_where_nothing_is_wrong(tmp_path):
    results = []
    for callbacks in ([], [BatchNormMonitor(on_nonfinite="restore", every_n_steps=1)]):
        _, module = fit(tmp_path, *callbacks)
        results.append([*module.state_dict().values(), *module.losses, *module.validation])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_frozen_layers_have_no_drift(tmp_path):
    monitor = BatchNormMonitor(include=["network.1"])
    fit(tmp_path, FreezeBatchNorm(include=["network.1"]), monitor)
    (row,) = monitor.snapshot.rows
    assert (row.updates, row.drift, row.noise) == (0.0, None, None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"on_nonfinite": "stop"}, "on_nonfinite must be one of 'warn', 'restore', 'raise', got 'stop'"),
        ({"every_n_steps": 0}, "every_n_steps"),
        ({"include": "network.1"}, "include"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(BatchNormError, match=words):
        BatchNormMonitor(**options)


def test_a_network_without_batch_norm_is_refused(tmp_path):
    module = Module()
    module.network[1] = module.network[3] = nn.Identity()
    with pytest.raises(BatchNormError, match="has no BatchNorm layer"):
        fit(tmp_path, BatchNormMonitor(), module=module)


def test_two_monitors_and_a_second_fit(tmp_path):
    monitors = [BatchNormMonitor(include=["network.1"]), BatchNormMonitor(include=["network.3"])]
    trainer, module = fit(tmp_path, *monitors)
    assert [monitor.snapshot.rows[0].layer for monitor in monitors] == ["network.1", "network.3"]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(), loader(2, seed=1))
    assert monitors[0].snapshot.step == 15
