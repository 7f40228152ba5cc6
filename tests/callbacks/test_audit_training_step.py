"""The audit reads losses from ``training_step``, and nothing of that reaches what trains, logs or is deployed."""

import csv
import re
import signal
import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy

from bn_lightning.auditing import audit_batch_norm
from bn_lightning.callbacks import BatchNormAudit, RecalibrateBatchNorm


class Noisy(Dataset):
    """Draws on every generator there is, as augmentation does."""

    def __init__(self, number=40):
        g = torch.Generator().manual_seed(3)
        self.x, self.y = 1 + 2 * torch.randn(number, 3, 5, 5, generator=g), torch.randint(0, 3, (number,), generator=g)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index] + 0.1 * torch.randn(3, 5, 5) + 0.1 * np.random.rand(), self.y[index]


class Head(pl.LightningModule):
    """A LightningModule inside of another."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(36, 3)

    def forward(self, x):
        self.log("inner", x.mean())
        return self.linear(x)


class Busy(pl.LightningModule):
    """Does in training_step whatever people do there."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), Head())
        self.teacher = nn.Linear(75, 3).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(4, 3))
        self.accuracy = MulticlassAccuracy(3)
        self.seen, self.steps, self.places = [], 0, []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.places.append(batch_idx)
        logits = self(x)
        loss = F.cross_entropy(logits, y) + 0.1 * (self.teacher(x.flatten(1)) - logits.detach()).square().mean()
        with torch.no_grad():
            self.teacher.weight.mul_(0.9).add_(0.01)
            self.queue[batch_idx % 4] += logits.mean(0)
        self.accuracy(logits, y)
        self.log("train", loss, prog_bar=True)
        self.log_dict({"accuracy": self.accuracy}, on_epoch=True, on_step=False)
        if self.logger is not None:
            self.logger.log_metrics({"by hand": loss.item()}, step=self.global_step)
            self.logger.experiment.log_metrics({"by experiment": loss.item()}, step=self.global_step)
        self.print("a line")
        assert self.trainer.optimizers[0] is self.optimizers().optimizer
        self.steps += 1
        self.seen.append(loss.item())
        return {"loss": loss, "logits": logits}

    def validation_step(self, batch, batch_idx):
        self.log("val", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.AdamW([*self.net.parameters()], lr=1e-2)


def trainer(*callbacks, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers, checkpoint folders and the like
        return pl.Trainer(
            callbacks=list(callbacks),
            **{
                "max_epochs": 2,
                "logger": False,
                "accelerator": "cpu",
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "enable_checkpointing": False,
                **options,
            },
        )


def loader(number=40, shuffle=True, **options):
    return DataLoader(Noisy(number), 8, shuffle=shuffle, **options)


def fit(module, *callbacks, validation=True, **options):
    """Train, with every warning of the audit an error; return the trainer."""
    fitter = trainer(*callbacks, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="the BatchNorm audit")
        fitter.fit(module, loader(), loader(16, shuffle=False) if validation else None)
    return fitter


def everything(*callbacks, **options):
    torch.manual_seed(7)
    np.random.seed(7)
    module = Busy()
    fitter = fit(module, *callbacks, **options)
    tensors = [*module.state_dict().values(), *module.accuracy.metric_state.values()]
    tensors += [value for state in fitter.optimizers[0].state.values() for value in state.values()]
    return {
        "tensors": [tensor.numpy().tobytes() for tensor in tensors],
        "gradients": [parameter.grad is None for parameter in module.parameters()],
        "modes": [child.training for child in module.modules()],
        "metrics": {key: float(value) for key, value in fitter.callback_metrics.items()},
        "shown": {key: float(value) for key, value in fitter.progress_bar_metrics.items()},
        "attributes": (module.steps, module.seen, module.places, module.accuracy._update_count),
        "random": (torch.rand(2).tolist(), np.random.rand(2).tolist()),
    }


@pytest.mark.parametrize("when", ["end", "validation"])
@pytest.mark.parametrize("options", [{}, {"val_check_interval": 2, "accumulate_grad_batches": 2}], ids=["plain", "odd"])
def test_training_is_bitwise_the_training_without(when, options, capsys):
    callback = BatchNormAudit(when=when, max_batches=3)
    with_audit = everything(callback, **options)
    assert callback.report.losses.source == "evaluation"
    assert callback.report.losses.batches == 2
    assert capsys.readouterr().out.count("a line") == 10
    assert with_audit == everything(**options)


def test_nothing_reaches_the_loggers_but_the_audits_own(tmp_path):
    def rows(*callbacks):
        torch.manual_seed(7)
        np.random.seed(7)
        logger = CSVLogger(tmp_path)
        fit(Busy(), *callbacks, logger=logger, log_every_n_steps=1)
        with open(f"{logger.log_dir}/metrics.csv") as file:
            return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]

    own, found = {}, []
    for row in rows(BatchNormAudit(when="validation")):
        audit = {key: value for key, value in row.items() if key.startswith("bn/")}
        own.setdefault(int(row["step"]), set()).update(audit)
        rest = {key: value for key, value in row.items() if key not in audit}
        found += [rest] if len(rest) > 1 else []
    keys = {"bn/net.1/gap"} | {
        f"bn/loss/{reading}"
        for reading in ("full_training", "batch_statistics", "recalibrated", "deployed", "evaluation_statistics")
    }
    assert {step: logged for step, logged in own.items() if logged} == {4: keys, 9: keys, 10: keys}
    assert found == rows()


def test_the_losses_are_those_of_the_function_on_the_validation_batches():
    class Plain(Busy):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

        def forward(self, x):
            return self.net[4:5](self.net[:4](x)) @ self.net[5].linear.weight.T

    torch.manual_seed(0)
    module, callback = Plain(), BatchNormAudit(max_batches=4)
    fixed = torch.utils.data.TensorDataset(Noisy().x, Noisy().y)
    other = torch.utils.data.TensorDataset(Noisy(20).x * 1.5, Noisy(20).y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(callback).fit(module, DataLoader(fixed, 8), DataLoader(other, 8))
    expected = audit_batch_norm(
        module,
        DataLoader(fixed, 8),
        val_batches=DataLoader(other, 8),
        step=lambda model, batch: model.training_step(batch, 0),
        max_batches=4,
    )
    assert callback.report.losses == expected.losses
    assert callback.report.losses.batches == 3
    assert callback.report.layers == expected.layers


def test_batches_have_their_own_index():
    class Alternating(Busy):
        indices = ()

        def training_step(self, batch, batch_idx):
            Alternating.indices = (*Alternating.indices, batch_idx)
            return super().training_step(batch, batch_idx)

    module, callback = Alternating(), BatchNormAudit(max_batches=3)
    fit(module, callback, validation=False, max_epochs=1)
    audited = Alternating.indices[5:]
    assert len(audited) >= 12
    assert audited == (0, 1, 2) * (len(audited) // 3)


class Bare(Busy):
    def training_step(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])


class Anything(Busy):
    def training_step(self, *args):
        assert len(args) == 2
        return super().training_step(*args)


class Further(Busy):
    def training_step(self, batch, batch_idx, dataloader_idx=0, other=None):
        assert other is None
        return super().training_step(batch, batch_idx)


class Skipping(Busy):
    def training_step(self, batch, batch_idx):
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


class AsDict(Busy):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch["x"], batch["y"]), batch_idx)

    def validation_step(self, batch, batch_idx):
        super().validation_step((batch["x"], batch["y"]), batch_idx)

    forward = pl.LightningModule.forward


def dicts(items):
    return {"x": torch.stack([x for x, _ in items]), "y": torch.stack([y for _, y in items])}


@pytest.mark.parametrize("make", [Bare, Anything, Further, Skipping], ids=lambda make: make.__name__)
def test_steps_of_every_signature(make):
    callback = BatchNormAudit()
    fit(make(), callback, max_epochs=1)
    assert callback.report.losses.batches == (1 if make is Skipping else 2)


@pytest.mark.parametrize("collect", [lambda inner: [inner], lambda inner: {"a": inner}], ids=["list", "dict"])
@pytest.mark.parametrize("stages", [None, ["static", "passive", "active"]])
def test_a_loader_in_a_collection_gives_batches_in_the_same(collect, stages):
    """The Trainer wraps the batches of ``[loader]`` for training_step, and those of validation not."""

    class Collected(Busy):
        def training_step(self, batch, batch_idx):
            assert type(batch) is type(collect(0))
            (inner,) = batch if isinstance(batch, list) else batch.values()
            return super().training_step(inner, batch_idx)

    recalibrate, callback = RecalibrateBatchNorm(when="end"), BatchNormAudit(stages=stages)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="the BatchNorm audit|RecalibrateBatchNorm")
        trainer(recalibrate, callback, max_epochs=1).fit(Collected(), collect(loader()), loader(16, shuffle=False))
    assert callback.report.layers[0].gap is not None
    assert callback.report.losses.batches == 2
    assert recalibrate.result is not None


def test_a_module_of_dicts_without_forward():
    class Step(AsDict):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch["x"]), batch["y"])

        def validation_step(self, batch, batch_idx):
            self.net(batch["x"])

    callback = BatchNormAudit()
    data = loader(collate_fn=dicts), loader(16, shuffle=False, collate_fn=dicts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(callback, max_epochs=1).fit(Step(), *data)
    assert callback.report.losses.source == "evaluation"
    assert callback.report.batches == 5


def reasons(report):
    return {row.what: row.reason for row in report.not_looked}


class ByHand(Busy):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


class Stepping(Busy):
    """Takes an optimizer step of its own, which Lightning does not forbid."""

    def training_step(self, batch, batch_idx):
        self.trainer.optimizers[0].step()
        return super().training_step(batch, batch_idx)


class OnlyInTraining(Busy):
    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 5:
            raise KeyError("a thing of the loop")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(ByHand, "automatic_optimization=False.*step=", id="manual-optimization"),
        pytest.param(Stepping, "an optimizer was to step.*step=", id="steps"),
        pytest.param(OnlyInTraining, "training_step failed: KeyError: 'a thing of the loop'", id="fails"),
    ],
)
def test_without_a_loss_the_rest_is_done_and_the_reason_told(make, reason):
    callback, module = BatchNormAudit(), make()
    optimizers = []

    class Spy(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            optimizers.append({key: value.clone() for key, value in pl_module.state_dict().items()})

    fit(module, Spy(), callback, max_epochs=1)
    report = callback.report
    assert report.losses is None
    assert re.search(reason, reasons(report)["loss readings"])
    assert "evaluation inputs" not in reasons(report)
    assert report.layers[0].gap is not None
    assert report.batches == 5
    assert all(torch.equal(value, optimizers[0][key]) for key, value in module.state_dict().items())


def test_a_step_of_ones_own_reads_the_loss_of_manual_optimization():
    callback = BatchNormAudit(step=lambda module, batch: F.cross_entropy(module(batch[0]), batch[1]))
    fit(ByHand(), callback, max_epochs=1)
    assert callback.report.losses.batches == 2
    assert "loss readings" not in reasons(callback.report)


@pytest.mark.parametrize(
    ("validation", "reason"),
    [
        pytest.param(lambda: None, "validates on no data", id="none"),
        pytest.param(
            lambda: [loader(16, shuffle=False), loader(16, shuffle=False)], "2 validation DataLoaders", id="several"
        ),
        pytest.param(
            lambda: DataLoader(Noisy(16), 8, collate_fn=lambda items: (*torch.utils.data.default_collate(items), 1)),
            r"validation batches are \(Tensor, Tensor, int\) where training batches are \(Tensor, Tensor\)",
            id="other-structure",
        ),
    ],
)
def test_losses_are_read_on_training_batches_where_validation_has_none_that_fit(validation, reason):
    class Lenient(Busy):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self(batch[0])

    callback = BatchNormAudit()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(callback, max_epochs=1).fit(Lenient(), loader(), validation())
    assert callback.report.losses.source == "training"
    assert re.search(reason, reasons(callback.report)["evaluation inputs"])


def test_an_interrupt_in_the_audit_passes_and_leaves_everything_as_it_was():
    class Interrupted(Busy):
        armed = False

        def training_step(self, batch, batch_idx):
            if self.armed and batch_idx == 1:
                raise KeyboardInterrupt
            return super().training_step(batch, batch_idx)

    class Arm(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            pl_module.armed = True
            self.state = {key: value.clone() for key, value in pl_module.state_dict().items()}

    module, arm = Interrupted(), Arm()
    fitter = trainer(arm, BatchNormAudit())
    handler = signal.getsignal(signal.SIGINT)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(SystemExit):
                fitter.fit(module, loader())
    finally:
        signal.signal(signal.SIGINT, handler)  # which Lightning ignores from then on
    assert all(torch.equal(value, arm.state[key]) for key, value in module.state_dict().items())
    assert "log" not in vars(module)
    assert "step" not in vars(fitter.optimizers[0])
