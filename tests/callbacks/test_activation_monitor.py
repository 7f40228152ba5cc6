"""ActivationMonitor under the Trainer: what it logs, what it leaves alone, and that it cleans up."""

from functools import partial
from itertools import count

import lightning.pytorch as pl
import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bn_lightning.callbacks.activation_monitor import ActivationMonitor
from bn_lightning.errors import BatchNormError
from bn_lightning.functional.fused import FusedStatistics
from bn_lightning.monitoring import GrowingInterval, observe_activations

LAYERS = ("network.0", "network.1", "network.2", "network.4")
BATCH = 6


class Module(pl.LightningModule):
    """A convolution, BN, ReLU, dropout and a linear layer; keeps its losses and its training batches."""

    def __init__(self, fail_at=None, error=RuntimeError):
        super().__init__()
        self.error = error
        self.network = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Dropout(0.2),
            nn.Flatten(),
            nn.Linear(64, 3),
        )
        self.criterion = nn.CrossEntropyLoss()
        self.fail_at, self.losses, self.seen = fail_at, [], []

    def training_step(self, batch, batch_idx):
        if batch_idx == self.fail_at:
            raise self.error("stop here")
        x, target = batch
        weights = {name: tensor.detach().clone() for name, tensor in self.network.state_dict().items()}
        self.seen.append((weights, x))
        loss = self.criterion(self.network(x), target)
        self.losses.append(loss.detach())
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.network(1e6 * batch[0])  # would be seen in any statistic

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def loader(batches=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batches * BATCH, 1, 6, 6, generator=generator)
    target = torch.randint(3, (batches * BATCH,), generator=generator)
    return DataLoader(TensorDataset(x, target), batch_size=BATCH)


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


def recomputed(module, samples):
    """Each layer's outputs over the given samples, without any hook: layer name to one float64 array."""
    outputs = {}
    for weights, x in samples:
        network = Module().network
        network.load_state_dict(weights)
        for index, layer in enumerate(network.train()):
            if index == 3:
                break  # what follows dropout is random
            x = layer(x)
            outputs.setdefault(f"network.{index}", []).append(x.detach().double().numpy().copy())
    return {name: np.concatenate(values) for name, values in outputs.items()}


def read_log(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    log.Reload()
    return log


@pytest.fixture
def events(tmp_path):
    return TensorBoardLogger(tmp_path, name="", version="")


def test_tensorboard_holds_the_values_of_a_recomputation_without_hooks(tmp_path, events):
    monitor = ActivationMonitor(every_n_steps=3, first_steps=2)
    _, module = fit(tmp_path, monitor, logger=events)
    log = read_log(tmp_path)
    due = [0, 1, 3, 6]
    for layer in LAYERS[:3]:
        for stat in ("mean", "std", "zero_fraction"):
            scalars = log.Scalars(f"activations/{layer}/{stat}")
            assert [scalar.step for scalar in scalars] == due
            for scalar in scalars:
                values = recomputed(module, [module.seen[scalar.step]])[layer]
                expected = {"mean": values.mean(), "std": values.std(), "zero_fraction": (values == 0).mean()}[stat]
                np.testing.assert_allclose(scalar.value, expected, rtol=1e-5, atol=1e-6, err_msg=f"{layer} {stat}")
    assert {scalar.step for scalar in log.Scalars("loss")} >= set(due)
    assert [scalar.value for scalar in log.Scalars("activations/nonfinite")] == [0.0] * 4
    assert monitor.history.steps == due
    assert not any("network.3" in tag or "criterion" in tag for tag in log.Tags()["scalars"])


def test_tensorboard_holds_one_readable_picture_a_statistic(tmp_path, events):
    from io import BytesIO

    from matplotlib.image import imread

    monitor = ActivationMonitor(every_n_steps=3, first_steps=2)
    fit(tmp_path, monitor, logger=events)
    log = read_log(tmp_path)
    heat_maps = [f"activations/heatmap/{stat}" for stat in ("dead_fraction", "mean", "std", "zero_fraction")]
    assert sorted(log.Tags()["images"]) == [*heat_maps, "activations/profile"]
    for tag in log.Tags()["images"]:
        (picture,) = log.Images(tag)
        pixels = imread(BytesIO(picture.encoded_image_string))
        assert (picture.step, pixels.shape[:2]) == (6, (picture.height, picture.width))
        assert 800 <= pixels.shape[1] <= 1400
        assert len(np.unique(pixels[..., :3].reshape(-1, 3), axis=0)) > 50  # something is drawn


def test_pictures_are_redrawn_as_the_run_grows(tmp_path, events, monkeypatch):
    monkeypatch.setattr("bn_lightning.callbacks.monitor._FIRST_PICTURE", 2)
    monkeypatch.setattr("bn_lightning.monitoring.cadence._WAIT_BY_COST", 0)
    clock = count(0, 10_000)  # hours between two looks
    monkeypatch.setattr(
        "bn_lightning.callbacks.monitor.GrowingInterval", partial(GrowingInterval, clock=clock.__next__)
    )
    fit(tmp_path, ActivationMonitor(every_n_steps=1), logger=events)
    assert [picture.step for picture in read_log(tmp_path).Images("activations/heatmap/std")] == [2, 3, 5, 7]


class AtEpochEnd(pl.Callback):
    """What a checkpoint at the end of each epoch would hold of a monitor."""

    def __init__(self, monitor):
        self.monitor, self.steps = monitor, []

    def on_train_epoch_end(self, trainer, pl_module):
        self.steps.append(self.monitor.state_dict()["history"]["steps"])


def test_micro_batches_of_one_optimizer_step_are_one_sample(tmp_path, events):
    monitor = ActivationMonitor(every_n_steps=2, first_steps=0)
    options = {"batches": 8, "accumulate_grad_batches": 3, "max_epochs": 2, "logger": events}
    _, module = fit(tmp_path, monitor, at_epoch_end := AtEpochEnd(monitor), **options)
    # Epochs of 3, 3 and 2 micro-batches: steps 0 … 5.
    assert monitor.history.steps == [0, 2, 4]
    assert at_epoch_end.steps == [[0, 2], [0, 2, 4]]
    assert [scalar.step for scalar in read_log(tmp_path).Scalars("activations/max_abs")] == [0, 2, 4]
    micro_batches = {0: module.seen[0:3], 2: module.seen[6:8], 4: module.seen[11:14]}
    for column, step in enumerate(monitor.history.steps):
        for layer, values in recomputed(module, micro_batches[step]).items():
            row = monitor.history.layers.index(layer)
            assert int(monitor.history.values("count")[row, column]) == values.size
            np.testing.assert_allclose(monitor.history.values("std")[row, column], values.std(), rtol=1e-5)


class StopsAt(pl.Callback):
    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        trainer.should_stop = trainer.should_stop or batch_idx == self.batch


def counts(monitor):
    return monitor.history.values("count")[0].long().tolist()


def test_a_stop_in_the_middle_of_an_accumulation_keeps_its_sample(tmp_path):
    monitor = ActivationMonitor(every_n_steps=1)
    fit(tmp_path, StopsAt(4), monitor, accumulate_grad_batches=3)
    assert monitor.history.steps == [0, 1]
    assert counts(monitor) == [3 * BATCH * 4 * 16, 2 * BATCH * 4 * 16]


class StopsAccumulating(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.accumulate_grad_batches = 1


def test_a_step_that_nobody_announced_is_still_its_own_sample(tmp_path):
    monitor = ActivationMonitor(every_n_steps=1)
    # At the end of the first batch, of four still, the monitor runs before the other callback.
    fit(tmp_path, monitor, StopsAccumulating(), batches=4, accumulate_grad_batches=4)
    assert monitor.history.steps == [0, 1, 2, 3]
    assert counts(monitor) == [BATCH * 4 * 16] * 4


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 2}, {"accumulate_grad_batches": 3}], ids=str)
def test_validation_is_never_counted(tmp_path, options):
    monitor = ActivationMonitor(every_n_steps=1)
    fit(tmp_path, monitor, num_sanity_val_steps=2, **options)
    assert float(monitor.history.values("max").max()) < 1e3


def test_training_is_bitwise_unchanged(tmp_path, events):
    def state(*callbacks, **options):
        _, module = fit(tmp_path, *callbacks, max_epochs=2, **options)
        return [*module.losses, *module.state_dict().values(), torch.get_rng_state()]

    plain = state()
    watched = state(ActivationMonitor(every_n_steps=2), logger=events)
    assert all(torch.equal(one, other) for one, other in zip(plain, watched, strict=True))


def no_hooks(module):
    return not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())


def test_taps_are_gone_after_fit_and_the_results_stay(tmp_path):
    monitor = ActivationMonitor()
    _, module = fit(tmp_path, monitor)
    assert no_hooks(module)
    assert "network.2" in str(monitor.table())
    assert "exact zeros" in monitor.figure("zero_fraction").get_suptitle()


@pytest.mark.filterwarnings("ignore:.*Detected KeyboardInterrupt.*")
@pytest.mark.parametrize(("error", "raised"), [(RuntimeError, RuntimeError), (KeyboardInterrupt, SystemExit)])
def test_taps_are_gone_after_an_exception_and_an_interrupt(tmp_path, error, raised):
    monitor, module = ActivationMonitor(gradients=True), Module(fail_at=3, error=error)
    with pytest.raises(raised):
        fit(tmp_path, monitor, module=module)
    assert no_hooks(module)
    assert "at optimizer step 2" in str(monitor.table())
    assert monitor.history.steps == [0, 1, 2]


def test_fitting_again_continues(tmp_path):
    monitor, module = ActivationMonitor(every_n_steps=4, first_steps=0), Module()
    trainer, _ = fit(tmp_path, monitor, module=module)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(), loader(2))
    assert monitor.history.steps == [0, 4, 8, 12]
    assert no_hooks(module)


def test_another_run_begins_anew(tmp_path):
    monitor = ActivationMonitor(every_n_steps=4, first_steps=0)
    for batches in (8, 3, 1):
        fit(tmp_path, monitor, batches=batches)
    assert monitor.history.steps == [0]
    assert int(monitor.history.values("count")[0, 0]) == BATCH * 4 * 16


def test_a_resumed_run_continues_its_heat_map(tmp_path):
    whole = ActivationMonitor(every_n_steps=3, first_steps=2)
    fit(tmp_path, whole, max_epochs=2)
    trainer, _ = fit(tmp_path, ActivationMonitor(every_n_steps=3, first_steps=2))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = ActivationMonitor(every_n_steps=3, first_steps=2)
    fit(tmp_path, resumed, max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.history.steps == whole.history.steps == [0, 1, 3, 6, 9, 12, 15]
    before = resumed.history.steps.index(9)  # dropout's random numbers differ after it
    one, other = (monitor.history.values("std")[:, :before] for monitor in (resumed, whole))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"logger": False}, id="logger=False"),
        pytest.param({"fast_dev_run": True}, id="fast_dev_run"),
    ],
)
def test_without_a_log_the_results_are_still_there(tmp_path, options):
    monitor = ActivationMonitor()
    fit(tmp_path, monitor, **options)
    steps = monitor.history.last_step
    assert str(monitor.table()).startswith(f"activations of 5 layers at optimizer step {steps}, in order of execution")
    assert monitor.figure().axes


def test_other_loggers_get_the_scalars(tmp_path):
    fit(tmp_path, ActivationMonitor(), logger=CSVLogger(tmp_path))
    written = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "activations/network.1/std" in written.splitlines()[0]


def test_many_layers_log_the_summary_only(tmp_path, events, monkeypatch):
    monkeypatch.setattr("bn_lightning.callbacks.activation_monitor.MOST_LAYERS_AS_SCALARS", 3)
    fit(tmp_path, ActivationMonitor(), logger=events)
    tags = {tag for tag in read_log(tmp_path).Tags()["scalars"] if tag.startswith("activations/")}
    assert tags == {f"activations/{name}" for name in ("nonfinite", "dead_channels", "max_abs", "saturation")}


@pytest.mark.filterwarnings("ignore:nonfinite in 'network.1' and 3 other layers at optimizer step 0")
def test_nonfinite_values_and_dead_channels_are_logged(tmp_path, events):
    module = Module()
    module.network[1].weight.data.zero_()
    module.network[1].bias.data.copy_(torch.tensor([-1.0, -1.0, 1.0, torch.inf]))
    fit(tmp_path, ActivationMonitor(), module=module, logger=events, limit_train_batches=1)
    log = read_log(tmp_path)
    per_channel = BATCH * 4 * 4
    # BN, ReLU and Flatten put the infinities out; dropout turns some into NaN; the linear layer has nothing else.
    assert log.Scalars("activations/nonfinite")[0].value == per_channel * 3 + BATCH * 3
    assert log.Scalars("activations/dead_channels")[0].value >= 2
    assert not np.isfinite(log.Scalars("activations/max_abs")[0].value)


def test_include_and_exclude_pick_layers(tmp_path):
    monitor = ActivationMonitor(include=["network.*"], exclude=["*.4", "*.5"])
    fit(tmp_path, monitor)
    assert monitor.history.layers == ["network.0", "network.1", "network.2"]


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_bare_string_is_refused_at_once(option):
    with pytest.raises(BatchNormError, match=f"{option}= takes a list"):
        ActivationMonitor(**{option: "network.*"})


def test_a_network_without_layers_trains_on(tmp_path, events):
    class Bare(Module):
        def __init__(self):
            super().__init__()
            self.network = self.criterion = nn.Identity()
            self.weight = nn.Parameter(torch.ones(1))

        def training_step(self, batch, batch_idx):
            return (self.weight * batch[0]).mean()

        def validation_step(self, batch, batch_idx): ...

    monitor = ActivationMonitor()
    fit(tmp_path, monitor, module=Bare(), logger=events)
    assert "there is no layer to watch" in str(monitor.table())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_torch_jit_layer_does_not_stop_the_fit(tmp_path, events):
    module = Module()
    module.network[4] = torch.jit.script(nn.Flatten())
    monitor = ActivationMonitor()
    fit(tmp_path, monitor, module=module, logger=events)
    assert "compiled by torch.jit" in str(monitor.table())
    assert monitor.history.steps == list(range(8))


def test_a_pattern_that_matches_nothing_raises_at_the_start(tmp_path):
    with pytest.raises(BatchNormError, match="backbone"):
        fit(tmp_path, ActivationMonitor(include=["backbone.*"]))


def test_before_the_first_sample_the_error_says_so():
    for ask in (ActivationMonitor().table, ActivationMonitor().figure):
        with pytest.raises(BatchNormError, match="nothing was sampled"):
            ask()


def test_two_monitors_keep_apart(tmp_path):
    one, two = ActivationMonitor(include=["network.0"]), ActivationMonitor(include=["network.1"])
    fit(tmp_path, one, two)
    assert (one.history.layers, two.history.layers) == (["network.0"], ["network.1"])


def test_the_standalone_family_takes_it_too(tmp_path):
    class Standalone(pytorch_lightning.LightningModule):
        training_step, validation_step = Module.training_step, Module.validation_step
        configure_optimizers = Module.configure_optimizers

        def __init__(self):
            super().__init__()
            self.network, self.criterion = Module().network, nn.CrossEntropyLoss()
            self.fail_at, self.losses, self.seen = None, [], []

    monitor = ActivationMonitor()
    fit(tmp_path, monitor, module=Standalone(), family=pytorch_lightning)
    assert monitor.history.steps == list(range(8))


def test_observing_inside_inference_mode_works(tmp_path):
    class Observes(Module):
        def test_step(self, batch, batch_idx):
            with observe_activations(self.network) as activations:
                self.network(batch[0])
            self.rows = activations.to_dict()

    module = Observes()
    trainer, _ = fit(tmp_path, module=module)
    trainer.test(module, loader(1), verbose=False)
    assert module.rows["0"]["count"] == BATCH * 4 * 16


@pytest.mark.parametrize(
    ("long", "many", "fused"),
    [pytest.param(8, 8, True, id="long"), pytest.param(9, 8, False, id="short"), pytest.param(8, 9, False, id="few")],
)
def test_one_compiled_pass_where_samples_pay_for_it(tmp_path, monkeypatch, caplog, long, many, fused):
    monkeypatch.setattr("bn_lightning.callbacks.activation_monitor._LONG", long)
    monkeypatch.setattr("bn_lightning.callbacks.activation_monitor._MANY", many)
    monitor = ActivationMonitor()
    fit(tmp_path, monitor)
    assert isinstance(monitor._watch.statistics, FusedStatistics) == fused
    assert ("compiles its pass over activations" in caplog.text) == fused


def test_a_compiled_pass_that_fails_is_told(tmp_path, monkeypatch, caplog):
    class Fails(FusedStatistics):
        def __init__(self):
            super().__init__()
            self.reason = "no compiler"

    monkeypatch.setattr("bn_lightning.callbacks.activation_monitor.FusedStatistics", Fails)
    monkeypatch.setattr("bn_lightning.callbacks.activation_monitor._LONG", 1)
    monkeypatch.setattr("bn_lightning.callbacks.activation_monitor._MANY", 1)
    monitor = ActivationMonitor()
    fit(tmp_path, monitor)
    assert "took the eager way: no compiler" in caplog.text
    assert monitor.history.steps == list(range(8))
