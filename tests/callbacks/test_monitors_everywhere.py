"""Both monitors beside torch.compile, activation checkpointing, accumulation, autocast and a resumed run."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from bn_lightning.callbacks import ActivationMonitor, BatchNormMonitor

BATCH, STEPS = 8, 6

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning",  # torch's own reading of it, in the compiler
    "ignore:.*torch.jit:DeprecationWarning",
    "ignore:.*does not have many workers.*",
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Body(nn.Sequential):
    """torch.compile skips the forward pass of torch's own Sequential where that is what is compiled."""

    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x


class Module(pl.LightningModule):
    """Keeps what the first layer is given, from which all before BatchNorm's own weights can be computed."""

    def __init__(self, checkpointed=False):
        super().__init__()
        self.body = Body(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.head = nn.Linear(6, 3)
        self.checkpointed, self.losses, self.seen = checkpointed, [], []

    def forward(self, x):
        x = checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)
        return self.head(x)

    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()

    def on_train_batch_start(self, batch, batch_idx):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.trainer.precision == "bf16-mixed"):
            self.seen.append(nn.functional.linear(batch[0], *self.body[0].parameters()).double().numpy())

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].detach().clone())

    def validation_step(self, batch, batch_idx):
        self(1e6 * batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Compiled(Module):
    def configure_model(self):
        self.body.compile(backend="aot_eager", fullgraph=True)


def loader(seed=0):
    x = 3 + torch.randn(STEPS * BATCH, 4, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x), batch_size=BATCH)


def fit(tmp_path, module, *callbacks, ckpt_path=None, **options):
    pl.seed_everything(0, verbose=False)
    for layer in (module.body[0], module.head):
        layer.reset_parameters()
    defaults = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "log_every_n_steps": 1}
    trainer = pl.Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        **{**defaults, **options},
    )
    trainer.fit(module, loader(), loader(1), ckpt_path=ckpt_path)
    return trainer


def monitors():
    return ActivationMonitor(every_n_steps=2, first_steps=1, gradients=True), BatchNormMonitor(every_n_steps=1)


CASES = pytest.mark.parametrize(
    ("make", "options", "micro"),
    [
        pytest.param(Module, {}, 1, id="plain"),
        pytest.param(Compiled, {}, 1, id="compiled"),
        pytest.param(lambda: Module(checkpointed=True), {}, 1, id="checkpointed"),
        pytest.param(Module, {"accumulate_grad_batches": 2}, 2, id="accumulated"),
        pytest.param(Module, {"precision": "bf16-mixed"}, 1, id="bf16"),
    ],
)


@CASES
def test_statistics_are_those_of_the_data(tmp_path, make, options, micro):
    module, (activations, running) = make(), monitors()
    fit(tmp_path, module, activations, running, **options)
    steps = range(0, STEPS // micro, 2)
    assert activations.history.steps == list(steps)
    row = activations.history.layers.index("body.0")
    for column, step in enumerate(steps):
        values = np.concatenate(module.seen[step * micro : (step + 1) * micro])
        expected = {"count": values.size, "mean": values.mean(), "std": values.std(), "max": values.max()}
        for stat, value in expected.items():
            np.testing.assert_allclose(activations.history.values(stat)[row, column], value, rtol=1e-5, err_msg=stat)
    recovered = running.snapshot.channels("body.1")
    batch_means = [values.mean(0) for values in module.seen[-micro:]]
    weights = [0.9, 1.0] if micro == 2 else [1.0]  # the running average weighs the later micro-batch more
    tolerance = 1e-4 if "precision" not in options else 2e-2
    np.testing.assert_allclose(recovered.batch_mean, np.average(batch_means, axis=0, weights=weights), rtol=tolerance)
    updates = 2 if module.checkpointed else micro  # what recomputes a BatchNorm moves its statistics again
    assert running.snapshot.rows[0].updates == updates
    assert [alert.rule for alert in activations.alert_log + running.alert_log] == []


@CASES
def test_training_is_bitwise_unchanged(tmp_path, make, options, micro):
    found = []
    for callbacks in ((), monitors()):
        torch.compiler.reset()
        module = make()
        fit(tmp_path, module, *callbacks, **options)
        found.append([*module.losses, *module.state_dict().values(), torch.get_rng_state()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_lightning_module_that_is_compiled_as_a_whole(tmp_path):
    activations, running = monitors()
    fit(tmp_path, torch.compile(Module(), backend="aot_eager"), activations, running)
    assert activations.history.values("count").tolist() == [[48.0] * 3, [48.0] * 3, [48.0] * 3, [24.0] * 3]
    assert running.snapshot.rows[0].updates == 1


def test_both_heat_maps_go_on_in_a_resumed_run(tmp_path):
    whole = monitors()
    fit(tmp_path, Module(), *whole, max_epochs=2)
    trainer = fit(tmp_path, Module(), *monitors(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = monitors()
    fit(tmp_path, Module(), *resumed, max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    for one, other in zip(whole, resumed, strict=True):
        assert one.history.steps == other.history.steps
        for stat in one.history.maps:
            torch.testing.assert_close(one.history.values(stat), other.history.values(stat), equal_nan=True)
    assert whole[0].gradient_history.steps == resumed[0].gradient_history.steps


def test_a_checkpoint_in_the_middle_holds_the_sample_that_is_not_logged_yet(tmp_path):
    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    fit(tmp_path, Module(), *monitors(), Saves())
    saved = torch.load(tmp_path / "middle.ckpt")["callbacks"]
    (state,) = [state for key, state in saved.items() if "ActivationMonitor" in key]
    assert state["history"]["steps"] == [0, 2]


@pytest.mark.parametrize("logger", [False, True], ids=["no logger", "logger"])
def test_a_checkpoint_that_was_trained_to_its_end_is_resumed_without_a_word(tmp_path, logger, capsys):
    trainer = fit(tmp_path, Module(), *monitors())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    capsys.readouterr()
    before = sorted(tmp_path.glob("*.jsonl"))
    again = monitors()
    logger = CSVLogger(tmp_path, name="", version="log") if logger else False
    fit(tmp_path, Module(), *again, ckpt_path=tmp_path / "end.ckpt", logger=logger)
    assert "worst" not in capsys.readouterr().out
    assert sorted(tmp_path.glob("*.jsonl")) == before
    assert again[0].history.steps == [0, 2, 4]


def test_another_default_device_does_not_matter(tmp_path):
    activations, running = monitors()
    fit(tmp_path, Module(), activations, running, DefaultDevice(), limit_val_batches=0)
    assert activations.history.steps == [0, 2, 4]
    assert running.snapshot.rows[0].updates == 1
    assert list(tmp_path.glob("*.jsonl"))


class DefaultDevice(pl.Callback):
    """From the first batch on, a tensor made without a device has no values."""

    def on_train_start(self, trainer, pl_module):
        torch.set_default_device("meta")

    def on_fit_end(self, trainer, pl_module):
        torch.set_default_device(None)

    def on_exception(self, trainer, pl_module, exception):
        torch.set_default_device(None)


class SubmoduleCompiled(Module):
    def configure_model(self):
        if not hasattr(self.body, "_orig_mod"):
            self.body = torch.compile(self.body, backend="aot_eager")

    def on_train_batch_start(self, batch, batch_idx): ...


def test_names_are_those_without_torch_compile(tmp_path):
    activations = ActivationMonitor(include=["body.0", "body.1"])
    running = BatchNormMonitor(include=["body.1"])
    fit(tmp_path, SubmoduleCompiled(), activations, running)
    assert activations.history.layers == ["body.0", "body.1"]
    assert activations.history.values("count").tolist() == [[48.0] * 6] * 2
    assert [row.layer for row in running.snapshot.rows] == ["body.1"]


class EndsItsEpochs(Module):
    """Ends each epoch with its third batch, and runs itself at the end of it."""

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 2 else None

    def on_train_epoch_end(self):
        self(torch.full((1000, 4), 1e6))


def test_an_epoch_that_a_hook_ends_leaves_no_tap_measuring(tmp_path):
    activations, running = ActivationMonitor(), BatchNormMonitor()
    fit(tmp_path, EndsItsEpochs(), activations, running, max_epochs=2)
    assert activations.history.values("max").max() < 1e5
    assert activations.history.values("count")[0].sum() == 4 * 48


class RunsNothingAtLast(Module):
    """Its last step runs nothing."""

    def on_train_batch_start(self, batch, batch_idx): ...

    def on_train_batch_end(self, outputs, batch, batch_idx): ...

    def training_step(self, batch, batch_idx):
        return None if batch_idx == STEPS - 1 else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`.*")
def test_a_last_sample_of_nothing_is_no_error(tmp_path):
    activations, running = ActivationMonitor(gradients=True), BatchNormMonitor()
    logger = CSVLogger(tmp_path, name="", version="log")
    fit(tmp_path, RunsNothingAtLast(), activations, running, logger=logger)
    assert (tmp_path / "log" / "figures" / "activations" / "heatmap" / "std.png").exists()


class Differentiates(Module):
    """Per-sample gradients by torch.func in every step, and a penalty on the gradient by the input."""

    def on_train_batch_start(self, batch, batch_idx): ...

    def training_step(self, batch, batch_idx):
        x = batch[0].requires_grad_()
        parameters = dict(self.head.named_parameters())

        def loss(parameters, row):
            return torch.func.functional_call(self.head, parameters, (row,)).square().sum()

        hidden = self.body(x)
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, hidden.detach())
        (slope,) = torch.autograd.grad(self.head(hidden).sum(), x, create_graph=True)
        return slope.square().mean() + 0 * each["weight"].mean()


def test_torch_func_and_double_backward_train_on_and_are_told(tmp_path):
    found = []
    for callbacks in ((), monitors()):
        module = Differentiates()
        fit(tmp_path, module, *callbacks, limit_val_batches=0)
        found.append([*module.losses, *module.state_dict().values()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    activations = callbacks[0]
    assert "torch.func" in activations.snapshot.rows["head"].reason
    rows = activations.snapshot.gradients.rows
    assert (rows["head"].count, rows["head"].reason) == (0, "gradients with create_graph=True are not counted")
