"""What the monitors do about what they notice: warn, log, stop, and dump the samples before."""

import json
import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bn_lightning.callbacks import ActivationMonitor, BatchNormMonitor
from bn_lightning.errors import BatchNormError


class Module(pl.LightningModule):
    """Overflows from a batch on; its gradients are lost in sigmoids if asked."""

    def __init__(self, spoil_at=None, vanishing=False):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
        if vanishing:
            deep = [layer for _ in range(12) for layer in (nn.Linear(6, 6), nn.Sigmoid())]
            self.network = nn.Sequential(nn.Linear(4, 6), *deep, nn.Linear(6, 2))
        self.spoil_at = math.inf if spoil_at is None else spoil_at

    def training_step(self, batch, batch_idx):
        (x,) = batch
        hidden = self.network[0](x)
        if batch_idx >= self.spoil_at:
            hidden = hidden * math.inf
        loss = self.network[1:](hidden).square().mean()
        return loss if loss.isfinite() else 0 * self.network[0].weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(tmp_path, monitor, module, logger=False, batches=12):
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[monitor],
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    x = torch.randn(batches * 8, 4, generator=torch.Generator().manual_seed(0))
    trainer.fit(module, DataLoader(TensorDataset(x), batch_size=8))
    return trainer


MONITORS = pytest.mark.parametrize(
    ("kind", "rule", "layer"),
    [
        pytest.param(ActivationMonitor, "nonfinite", "network.1", id="activations"),
        pytest.param(BatchNormMonitor, "nonfinite-statistics", "network.1", id="batch norm"),
    ],
)


@MONITORS
def test_an_alert_is_a_warning_once_and_a_text(tmp_path, kind, rule, layer):
    monitor = kind()
    logger = CSVLogger(tmp_path, name="", version="log")
    with pytest.warns(UserWarning, match=f"^{rule} in '{layer}'.*at optimizer step 5") as caught:
        trainer = fit(tmp_path, monitor, Module(spoil_at=5), logger)
    assert sum(str(each.message).startswith(rule) for each in caught) == 1
    assert [(alert.rule, alert.layer, alert.step) for alert in monitor.alert_log] == [(rule, layer, 5)]
    text = (tmp_path / "log" / "figures" / monitor._kind / "alerts.md").read_text()
    assert rule in text
    assert trainer.global_step == 12


@MONITORS
def test_logged_only(tmp_path, kind, rule, layer):
    monitor = kind(on_alert="log")
    fit(tmp_path, monitor, Module(spoil_at=5))  # a warning would be an error
    assert [(alert.rule, alert.layer) for alert in monitor.alert_log] == [(rule, layer)]


@MONITORS
def test_a_stop_comes_at_the_next_cadence(tmp_path, kind, rule, layer):
    monitor = kind(on_alert="stop")
    with pytest.warns(UserWarning, match=rule):
        trainer = fit(tmp_path, monitor, Module(spoil_at=5))
    assert trainer.global_step == 7  # read at step 5, logged at step 6


def test_nonfinite_statistics_are_told_in_any_case(tmp_path):
    for alerts in (False, ["drift"], ["drift", "nonfinite-statistics"]):
        monitor = BatchNormMonitor(alerts=alerts, on_alert="log")
        fit(tmp_path, monitor, Module(spoil_at=5))
        assert [alert.rule for alert in monitor.alert_log] == ["nonfinite-statistics"]


def test_no_alerts_if_none_are_wanted(tmp_path):
    monitor = ActivationMonitor(alerts=False)
    fit(tmp_path, monitor, Module(spoil_at=5))
    assert monitor.alert_log == []
    monitor = ActivationMonitor(alerts=["dead"])
    fit(tmp_path, monitor, Module(spoil_at=5))
    assert monitor.alert_log == []


def test_the_samples_before_the_first_nonfinite_one_are_dumped(tmp_path):
    monitor = ActivationMonitor(first_steps=50)
    with pytest.warns(UserWarning, match="nonfinite in 'network.1'"):
        fit(tmp_path, monitor, Module(spoil_at=25), CSVLogger(tmp_path, name="", version="log"), batches=28)
    lines = (tmp_path / "log" / "figures" / "activations" / "before.md").read_text().splitlines()
    steps = [line.split("|")[1].strip() for line in lines if line.startswith("|")][2:]
    assert steps == [str(step) for step in range(6, 26)]
    assert "the last 20 samples of network.1" in lines[0]


def test_gradients_have_alerts_of_their_own(tmp_path):
    monitor = ActivationMonitor(gradients=True)
    with pytest.warns(UserWarning, match=r"vanishing-gradient in 'network\.0'"):
        fit(tmp_path, monitor, Module(vanishing=True))
    assert "vanishing-gradient" in {alert.rule for alert in monitor.alert_log}


def test_tensorboard_gets_alerts_and_the_worst_layers_as_text(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.warns(UserWarning, match="nonfinite"):
        fit(tmp_path, ActivationMonitor(), Module(spoil_at=5), TensorBoardLogger(tmp_path, name="", version="log"))
    log = EventAccumulator(str(tmp_path / "log"), size_guidance={"tensors": 0})
    log.Reload()
    texts = {tag: log.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in log.Tags()["tensors"]}
    assert set(texts) == {f"activations/{name}/text_summary" for name in ("alerts", "worst", "before")}
    assert "network.1" in texts["activations/alerts/text_summary"]
    assert texts["activations/worst/text_summary"].count("\n| ") >= 4  # a table


class Dies(Module):
    """Raises in the step after the one that spoiled it, or in that very step."""

    def __init__(self, spoil_at, later):
        super().__init__(spoil_at)
        self.later = later

    def training_step(self, batch, batch_idx):
        if self.later and batch_idx > self.spoil_at:
            raise KeyError("a fault of the user's own")
        loss = super().training_step(batch, batch_idx)
        if not self.later and batch_idx >= self.spoil_at:
            raise KeyError("a fault of the user's own")
        return loss


@MONITORS
@pytest.mark.parametrize("later", [False, True], ids=["in the step itself", "in the next"])
def test_what_a_training_died_of_is_told(tmp_path, kind, rule, layer, later):
    monitor = kind()
    with (
        pytest.warns(UserWarning, match=f"^{rule} in '{layer}'.*at optimizer step 5"),
        pytest.raises(KeyError, match="a fault of the user's own"),
    ):
        fit(tmp_path, monitor, Dies(5, later), CSVLogger(tmp_path, name="", version="log"))
    assert [(alert.rule, alert.step) for alert in monitor.alert_log] == [(rule, 5)]
    folder = tmp_path / "log" / "figures" / monitor._kind
    assert layer in (folder / "worst.md").read_text()
    assert list((folder / "heatmap").glob("*.png"))


@MONITORS
def test_the_trainings_own_exception_is_the_one_that_is_seen(tmp_path, kind, rule, layer, monkeypatch):
    monkeypatch.setattr(kind, "_finish", lambda self, trainer: 1 / 0)
    with (
        pytest.warns(UserWarning, match=f"{kind.__name__} could not log its last sample: division by zero"),
        pytest.raises(KeyError, match="a fault of the user's own"),
    ):
        fit(tmp_path, kind(), Dies(5, later=True))


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"barebones": True}], ids=str)
def test_who_asks_for_no_output_gets_no_file(tmp_path, options):
    x = torch.randn(16, 4)
    monitors = [ActivationMonitor(gradients=True), BatchNormMonitor()]
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=[*monitors], default_root_dir=tmp_path, **options)
    trainer.fit(Module(), DataLoader(TensorDataset(x), batch_size=8))
    assert not list(tmp_path.iterdir())
    assert all(monitor.history.steps for monitor in monitors)


def test_gradients_have_their_file_and_table(tmp_path, capsys):
    monitor = ActivationMonitor(gradients=True)
    fit(tmp_path, monitor, Module())
    lines = (tmp_path / "gradients-of-activations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(12))
    assert "gradients: the 4 worst of 4 layers" in capsys.readouterr().out
    without = ActivationMonitor()
    fit(tmp_path, without, Module())
    with pytest.raises(BatchNormError, match="gradients=True"):
        without.figure("rms", gradients=True)


@pytest.mark.parametrize("kind", [ActivationMonitor, BatchNormMonitor])
def test_without_a_logger_the_history_is_a_file(tmp_path, kind):
    for name in ("", "-1"):  # a second fit does not write over it
        monitor = kind()
        fit(tmp_path, monitor, Module())
        lines = (tmp_path / f"{monitor._kind}{name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == monitor.history.steps
    assert list(json.loads(lines[0])["layers"]) == [
        name for name in ("network.0", "network.1", "network.2", "network.3") if name in monitor.history.layers
    ]


@MONITORS
def test_the_worst_layers_are_printed_at_the_end(tmp_path, kind, rule, layer, capsys):
    fit(tmp_path, kind(on_alert="log"), Module(spoil_at=5))
    printed = capsys.readouterr().out
    assert printed.index("worst") < printed.index(layer)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        pytest.param(lambda: ActivationMonitor(alerts=["drift"]), "no alert of ActivationMonitor", id="of another"),
        pytest.param(lambda: BatchNormMonitor(alerts=["dead"]), "no alert of BatchNormMonitor", id="of another, BN"),
        pytest.param(lambda: ActivationMonitor(alerts=["nonfinit"]), "nonfinit", id="unknown"),
        pytest.param(lambda: ActivationMonitor(alerts="nonfinite"), "list of names", id="a bare string"),
        pytest.param(lambda: ActivationMonitor(alerts=["vanishing-gradient"]), "gradients=True", id="no gradients"),
        pytest.param(lambda: ActivationMonitor(on_alert="raise"), "'warn', 'log', 'stop'", id="on_alert"),
        pytest.param(lambda: ActivationMonitor(alerts=None), "list of names, got None", id="no alerts"),
        pytest.param(lambda: BatchNormMonitor(alerts=["drfit"]), "did you mean 'drift'", id="misspelt"),
        pytest.param(lambda: BatchNormMonitor(every_n_steps="5"), "every_n_steps .* whole number, got '5'", id="text"),
        pytest.param(lambda: ActivationMonitor(first_steps=2.5), "first_steps .* whole number, got 2.5", id="fraction"),
        pytest.param(lambda: ActivationMonitor(include=[1]), "include= .* strings, got 1", id="pattern"),
        pytest.param(lambda: ActivationMonitor(exclude=3), "exclude= .* strings, got 3", id="patterns"),
    ],
)
def test_wrong_options_are_refused(make, words):
    with pytest.raises(BatchNormError, match=words):
        make()
