"""Training with every callback attached is bitwise the training without, and an exception changes nothing."""

import hashlib
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bn_lightning.callbacks import ActivationMonitor, BatchNormAudit, BatchNormMonitor, FoldBatchNorm
from bn_lightning.modules import ImageClassifier


class Net(nn.Module):
    """Has what depends on random state and on modes: dropout, BN, a frozen BN."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3)
        self.bn2 = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(self.drop(x))).relu()
        return self.head(self.drop(x.mean((2, 3))))


LOADERS = {
    "plain": {"shuffle": True},
    "persistent-workers": {"shuffle": True, "num_workers": 1, "persistent_workers": True},
    "own-generator": {"shuffle": True, "generator": True},
}


class Losses(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(outputs["loss"].item())


class Raise(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 2:
            raise KeyError("a fault of the user's own")


def loaders(kind):
    options = dict(LOADERS[kind])
    if options.pop("generator", False):
        options["generator"] = torch.Generator().manual_seed(5)
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(70, 1, 8, 8, generator=generator), torch.randint(0, 4, (70,), generator=generator))
    return DataLoader(data, 16, **options), DataLoader(data, 32)


def quiet_trainer(tmp_path, callbacks):
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )


def train(tmp_path, kind, callbacks):
    pl.seed_everything(1, verbose=False)
    module = ImageClassifier(Net(), num_classes=4)
    module.model.bn2.eval()
    losses = Losses()
    trainer = quiet_trainer(tmp_path, [losses, *callbacks])
    training, validation = loaders(kind)
    trainer.fit(module, training, validation)
    trainer.test(module, validation, verbose=False)
    # A second fit goes on where the first one and the test left everything.
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, training, validation)
    return module, trainer, losses.seen


def fingerprint(module, trainer):
    state = module.state_dict()
    optimizer = trainer.optimizers[0].state_dict()["state"]
    return {
        "weights": {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in state.items()},
        "momentum": [entry["momentum_buffer"].tolist() for entry in optimizer.values()],
        "rng": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
        "modes": [m.training for m in module.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()],
    }


@pytest.mark.parametrize("kind", list(LOADERS))
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*in eval mode.*")
def test_with_all_callbacks_bit_for_bit(tmp_path, kind):
    bare, bare_trainer, bare_losses = train(tmp_path, kind, [])
    monitor, running = ActivationMonitor(every_n_steps=2, first_steps=1), BatchNormMonitor(every_n_steps=2)
    audit, fold = BatchNormAudit(max_batches=3), FoldBatchNorm()
    callbacks = [monitor, running, audit, fold]
    watched, watched_trainer, losses = train(tmp_path, kind, callbacks)
    assert losses == bare_losses
    assert fingerprint(watched, watched_trainer) == fingerprint(bare, bare_trainer)
    # They did run.
    assert running.snapshot.rows[0].updates == 1
    assert "model.bn1" in str(monitor.table())
    assert {row.name for row in audit.report.layers} == {"model.bn1", "model.bn2"}
    assert fold.report is not None


def test_an_exception_in_training_leaves_the_model_as_it_was(tmp_path):
    """With the callbacks or without them, the model is the same when a user's own code raises."""

    def train_until_it_raises(callbacks):
        pl.seed_everything(1, verbose=False)
        module = ImageClassifier(Net(), num_classes=4)
        trainer = quiet_trainer(tmp_path, [*callbacks, Raise()])
        with pytest.raises(KeyError):
            trainer.fit(module, *loaders("plain"))
        return fingerprint(module, trainer)

    callbacks = [ActivationMonitor(first_steps=5), BatchNormMonitor(), BatchNormAudit(), FoldBatchNorm()]
    assert train_until_it_raises(callbacks) == train_until_it_raises([])
