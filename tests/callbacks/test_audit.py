"""Training with the audit attached is bitwise the training without it, and the audit says what it saw."""

import csv
import re
import warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, Sampler, TensorDataset, WeightedRandomSampler

from bn_lightning.auditing import audit_batch_norm
from bn_lightning.callbacks.audit import BatchNormAudit
from bn_lightning.errors import AuditError, BatchNormError
from bn_lightning.preservation import on_device


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def examples():
    g = seeded(1)
    return TensorDataset(1 + 2 * torch.randn(44, 3, 5, 5, generator=g), torch.randint(0, 2, (44,), generator=g))


class Lit(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(),
            nn.Flatten(),
            nn.Linear(36, 2),
            nn.BatchNorm1d(2),
        )
        self.losses = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x + 0.1 * torch.randn_like(x)), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Standalone(pytorch_lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.losses = Lit().net, []

    forward, training_step, configure_optimizers = Lit.forward, Lit.training_step, Lit.configure_optimizers


class Halves(Sampler):
    """A batch sampler with its own generator."""

    def __init__(self):
        self.generator = seeded(9)

    def __len__(self):
        return 2

    def __iter__(self):
        return iter(torch.randperm(44, generator=self.generator).view(2, 22).tolist())


LOADERS = {
    "shuffle": lambda: DataLoader(examples(), 8, shuffle=True),
    "persistent-workers": lambda: DataLoader(examples(), 8, shuffle=True, num_workers=2, persistent_workers=True),
    "own-generator": lambda: DataLoader(examples(), 8, shuffle=True, generator=seeded(4)),
    "weighted": lambda: DataLoader(
        examples(), 8, sampler=WeightedRandomSampler(torch.arange(1.0, 45.0), 44, generator=seeded(5))
    ),
    "own-batch-sampler": lambda: DataLoader(examples(), batch_sampler=Halves()),
}


def trainer(*callbacks, family=pl, **options):
    options = {"max_epochs": 2, "logger": False, "accelerator": "cpu", **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers, checkpoint folders and the like
        return family.Trainer(
            callbacks=list(callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            **options,
        )


def fit(fitter, module, loader, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="the BatchNorm audit was not possible")
        fitter.fit(module, loader, **options)


def trained(loader, *callbacks):
    """Two fits, the second going on from the first with the very same loader; everything there is to compare."""
    torch.manual_seed(7)
    np.random.seed(7)
    module, seen = Lit(), []
    for _ in range(2):
        fitter = trainer(*callbacks)
        fit(fitter, module, loader)
        tensors = [*module.state_dict().values()]
        tensors += [value for state in fitter.optimizers[0].state.values() for value in state.values()]
        seen.append([tensor.numpy().tobytes() for tensor in tensors])
        seen.append([parameter.grad is None for parameter in module.parameters()])
        seen.append([child.training for child in module.modules()])
        seen.append((torch.get_rng_state().numpy().tobytes(), str(np.random.get_state())))
        seen.append(torch.rand(3).tolist())
    return seen, module.losses


@pytest.mark.parametrize("name", LOADERS)
def test_training_is_bitwise_the_training_without(name):
    callback = BatchNormAudit(max_batches=3)
    with_audit = trained(LOADERS[name](), callback)
    assert callback.report.batches == min(3, len(LOADERS[name]()))
    assert with_audit == trained(LOADERS[name]())


def step(module, batch):
    x, y = batch
    return F.cross_entropy(module(x + 0.1 * torch.randn_like(x)), y)


def test_the_report_is_that_of_the_function_and_is_printed(capsys):
    callback, module = BatchNormAudit(max_batches=4, exclude=["net.6"]), Lit()
    fit(trainer(callback), module, DataLoader(examples(), 8))
    batches = list(DataLoader(examples(), 8))
    expected = audit_batch_norm(module, batches, step=step, max_batches=4, exclude=["net.6"])
    assert callback.report.layers == expected.layers
    assert callback.report.losses == expected.losses
    assert callback.report.losses.source == "training"
    assert [row.name for row in expected.layers] == ["net.1"]
    assert expected.layers[0].count == 4 * 8 * 9
    assert str(callback.report) in capsys.readouterr().out


def test_gaps_are_logged(tmp_path):
    logger, callback = CSVLogger(tmp_path), BatchNormAudit()
    fit(trainer(callback, logger=logger, log_every_n_steps=1), Lit(), LOADERS["shuffle"]())
    with open(f"{logger.log_dir}/metrics.csv") as file:
        row = next(row for row in csv.DictReader(file) if row.get("bn/net.1/gap"))
    gaps = {row.name: row.gap for row in callback.report.layers}
    assert float(row["bn/net.1/gap"]) == pytest.approx(gaps["net.1"])
    assert float(row["bn/net.6/gap"]) == pytest.approx(gaps["net.6"])
    assert int(row["step"]) == 12


def test_tensorboard_gets_the_report_and_a_picture_of_the_gaps(tmp_path):
    logger, callback = TensorBoardLogger(tmp_path), BatchNormAudit(max_batches=3)
    fit(trainer(callback, logger=logger), Lit(), LOADERS["shuffle"]())
    events = EventAccumulator(logger.log_dir, size_guidance={"tensors": 0, "images": 0}).Reload()
    (text,) = events.Tensors("bn/audit/text_summary")
    assert text.tensor_proto.string_val[0].decode() == callback.report.to_markdown()
    (picture,) = events.Images("bn/gap")
    assert picture.encoded_image_string.startswith(b"\x89PNG")
    assert text.step == picture.step == 12


def test_a_folder_gets_the_report_as_a_file(tmp_path):
    logger, callback = CSVLogger(tmp_path), BatchNormAudit(stages=["static"])
    fit(trainer(callback, logger=logger), Lit(), LOADERS["shuffle"]())
    written = (Path(logger.log_dir) / "figures/bn/audit.md").read_text()
    assert written == f"{callback.report.to_markdown()}\n"


def test_both_families_and_fast_dev_run():
    callback = BatchNormAudit(fail_on="info")
    fit(trainer(callback, family=pytorch_lightning, fast_dev_run=True), Standalone(), LOADERS["shuffle"]())
    assert callback.report.batches == 1
    assert callback.report.exit_code("info") == 1, "one step is never enough, and yet a trial run does not fail"


def test_fail_on_raises_after_reporting(capsys):
    callback = BatchNormAudit(fail_on="warning")
    with pytest.raises(
        AuditError, match=r"of severity 'warning' or worse, the first: not-converged in 'net\.\d'.*Fix: "
    ):
        fit(trainer(callback, max_epochs=1), Lit(), LOADERS["shuffle"]())
    assert callback.report is not None
    assert "BatchNorm audit of Lit" in capsys.readouterr().out
    with pytest.raises(AuditError, match="'info', 'warning', 'error', got 'fatal'"):
        BatchNormAudit(fail_on="fatal")


class AsDict(Lit):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch["x"], batch["y"]), batch_idx)


class NoForward(Lit):
    forward = pl.LightningModule.forward

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])


class NoBatchNorm(Lit):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(75, 2))


class Cut(Lit):
    def forward(self, x):
        if self.trainer.global_step == 12:
            raise RuntimeError("cut in the audit")
        return super().forward(x)


def dicts(items):
    return {"x": torch.stack([x for x, _ in items]), "y": torch.stack([y for _, y in items])}


class NoForwardByHand(NoForward):
    """Optimizes by itself, so that there is no way left to run it."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
        optimizer.step()


@pytest.mark.parametrize(
    ("make", "loader", "message"),
    [
        pytest.param(NoForwardByHand, LOADERS["shuffle"], "NotImplementedError.*step=", id="no-forward"),
        pytest.param(Cut, LOADERS["shuffle"], "RuntimeError: cut in the audit", id="raises"),
    ],
)
def test_an_audit_impossible_with_data_warns_and_the_training_stands(make, loader, message):
    callback, module, twin = BatchNormAudit(), make(), make()
    twin.load_state_dict(module.state_dict())
    for fitted, callbacks in ((twin, ()), (module, (callback,))):
        torch.manual_seed(3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(*callbacks).fit(fitted, loader())
    told = [str(entry.message) for entry in caught if "audit was not possible" in str(entry.message)]
    assert len(told) == 1
    assert re.search(message, told[0], re.DOTALL)
    assert callback.report.batches == 0
    missing = {row.what: row.reason for row in callback.report.not_looked}
    assert re.search(message, missing["active stage"], re.DOTALL)
    assert "momentum-convention" not in missing, "the static rules have looked"
    for key, value in module.state_dict().items():
        assert torch.equal(value, twin.state_dict()[key])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(AuditError, match="not possible"):
            trainer(BatchNormAudit(fail_on="error")).fit(make(), loader())


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        pytest.param(NoBatchNorm, {}, "NoBatchNorm has no BatchNorm layer", id="no-bn"),
        pytest.param(Lit, {"include": ["nett.*"]}, r"include pattern 'nett\.\*' matches none", id="typing-error"),
    ],
)
def test_what_could_never_be_audited_is_refused_before_training(make, options, message):
    module = make()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(BatchNormError, match=message):
        fit(trainer(BatchNormAudit(**options)), module, LOADERS["shuffle"]())
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_data_that_cannot_be_gone_through_twice_are_announced_before_training():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(examples())

    class Order(pl.Callback):
        told_before_training = None

        def on_train_batch_start(self, trainer, *_):
            if self.told_before_training is None:
                self.told_before_training = [str(entry.message) for entry in caught]

    order, callback = Order(), BatchNormAudit()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(callback, order).fit(Lit(), DataLoader(Stream(), 8))
    assert any("will run no data through" in told and "Stream" in told for told in order.told_before_training)
    assert sum("BatchNorm audit" in str(entry.message) for entry in caught) == 1, "told once"
    missing = {row.what: row.reason for row in callback.report.not_looked}
    assert "Stream" in missing["active stage"]
    assert "recorded forward pass" not in missing, "of the first training batch"
    small = [finding for finding in callback.report.findings if finding.rule == "small-batch"]
    assert [finding.layer for finding in small] == ["net.6"], "from the settings"
    with pytest.raises(AuditError, match=r"not possible.*Stream"):
        fit(trainer(BatchNormAudit(fail_on="error")), Lit(), DataLoader(Stream(), 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"include": "net.*"}, r"got the bare string 'net\.\*'", id="bare-string"),
        pytest.param({"max_batches": 0}, "positive whole number, got 0", id="max-batches"),
    ],
)
def test_arguments_are_checked_at_once(options, message):
    with pytest.raises(BatchNormError, match=message):
        BatchNormAudit(**options)


def test_the_audit_runs_in_the_precision_of_the_training():
    seen = []

    class Recording(Lit):
        def forward(self, x):
            out = super().forward(x)
            seen.append((self.training, self.net[0](x).dtype))
            return out

    callback, module = BatchNormAudit(max_batches=2), Recording()
    fit(trainer(callback, precision="bf16-mixed", max_epochs=1), module, LOADERS["shuffle"]())
    assert callback.report is not None
    audited = [dtype for training, dtype in seen if not training]
    assert audited[0] == torch.float32  # the recorded pass
    assert set(audited[1:]) == {torch.bfloat16}


def test_an_exception_in_training_is_not_followed_by_an_audit(capsys):
    class Failing(Lit):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("training failed")
            return super().training_step(batch, batch_idx)

    callback, module = BatchNormAudit(), Failing()
    with pytest.raises(RuntimeError, match="training failed"):
        fit(trainer(callback), module, LOADERS["shuffle"]())
    assert callback.report is None
    assert "BatchNorm audit" not in capsys.readouterr().out
    assert not any(child._forward_pre_hooks for child in module.modules())


def test_a_second_fit_forgets_the_first_report():
    callback = BatchNormAudit()
    fit(trainer(callback), Lit(), LOADERS["shuffle"]())
    assert callback.report is not None
    with pytest.raises(ZeroDivisionError):
        fit(trainer(callback, pl_failing()), Lit(), LOADERS["shuffle"]())
    assert callback.report is None


def pl_failing():
    class Failing(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            raise ZeroDivisionError

    return Failing()


def test_averaged_weights_are_what_is_audited():
    callbacks = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging", reason="lightning 2.6 brought it")

    module = Lit()
    callback = BatchNormAudit(max_batches=99)
    torch.manual_seed(0)
    fit(trainer(callback, callbacks.WeightAveraging(use_buffers=False)), module, DataLoader(examples(), 8))
    assert callback.report.layers == audit_batch_norm(module, DataLoader(examples(), 8), step=step).layers
    slugs = {finding.rule for finding in callback.report.findings}
    assert "averaged-weights" in slugs


def test_data_moved_by_the_hooks_of_the_module():
    class Scaled(Lit):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] * 100, batch[1]

    torch.manual_seed(0)
    callback, module = BatchNormAudit(), Scaled()
    loader = DataLoader(examples(), 11, sampler=RandomSampler(examples(), generator=seeded()))
    fit(trainer(callback), module, loader)
    plain = {row.name: row.gap for row in audit_batch_norm(module, DataLoader(examples(), 11)).layers}
    scaled = {row.name: row.gap for row in callback.report.layers}
    assert plain["net.1"] > 1.5 * scaled["net.1"]  # they would be equal, had the batches not been scaled


def test_in_low_precision_the_input_is_converted():
    callback = BatchNormAudit()
    fit(trainer(callback, precision="64-true"), Lit(), LOADERS["shuffle"]())
    assert callback.report.layers[0].gap is not None


def test_a_module_that_cannot_be_moved_comes_back_whole():
    module = Lit()
    module(examples().tensors[0]).sum().backward()
    tensors = [*module.parameters(), *module.buffers()]
    before = [(id(tensor), tensor.data_ptr(), id(tensor.grad), tensor.detach().clone()) for tensor in tensors]
    with pytest.raises(RuntimeError, match="incompatible tensor type"), on_device(module, torch.device("meta")):
        pass
    with on_device(module, torch.device("cpu")):
        assert all(parameter.grad is None for parameter in module.parameters())
    for tensor, (identity, pointer, gradient, value) in zip(tensors, before, strict=True):
        assert (id(tensor), tensor.data_ptr(), id(tensor.grad)) == (identity, pointer, gradient)
        assert torch.equal(tensor, value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("when", ["end", "validation"])
def test_on_a_gpu_the_audit_runs_there_and_the_module_stays_where_lightning_left_it(when):
    from torchmetrics.classification import MulticlassAccuracy

    class Noting(Lit):
        devices = ()

        def __init__(self):
            super().__init__()
            self.accuracy = MulticlassAccuracy(2)

        def forward(self, x):
            self.devices = (*self.devices, x.device.type)
            return super().forward(x)

        def training_step(self, batch, batch_idx):
            self.accuracy(self(batch[0]), batch[1])  # whose state Lightning moves to the CPU with the module
            self.log("accuracy", self.accuracy)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            self(batch[0])

    callback, module = BatchNormAudit(when=when), Noting()
    fit(
        trainer(callback, accelerator="gpu", devices=1),
        module,
        LOADERS["shuffle"](),
        val_dataloaders=LOADERS["shuffle"](),
    )
    assert callback.report.losses.source == "evaluation"
    assert set(module.devices) == {"cuda"}
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}
    assert module.accuracy.tp.device.type == "cpu"
