"""Recalibration within real trainings, against pooled float64 statistics under the very weights."""

import re
import warnings
from functools import partial

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from callbacks.recalibrated import Lit, copied, examples, fit, is_population, loader, same, seeded, trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from bn_lightning import recalibrate_batch_norm
from bn_lightning.callbacks import FreezeBatchNorm, RecalibrateBatchNorm, recalibrate
from bn_lightning.errors import BatchNormError, RecalibrationError
from bn_lightning.layers import BatchRenorm, FrozenBatchNorm

STATISTICS = ("running_mean", "running_var")
RENORM = partial(BatchRenorm, r_warmup=None, d_warmup=None)


@pytest.fixture(scope="module")
def without():
    return fit()


def test_every_validation_has_population_statistics_and_training_its_own(without):
    callback = RecalibrateBatchNorm()
    states = []

    class Spy(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            states.append(copied(pl_module))

    module, _ = fit(callback, Spy(), val_check_interval=3)
    assert len(module.seen) == 1 + 2 * 2, "the sanity check and two validations an epoch"
    assert [is_population(state) for state in module.seen] == [False, True, True, True, True]
    assert same(module.seen[0], copied(Lit())), "a sanity check is of the network as it is"
    with_it, states = states, []
    plain, _ = fit(Spy(), val_check_interval=3)
    assert all(same(*pair) for pair in zip(with_it, states, strict=True)), "running statistics, too"
    assert module.losses == plain.losses
    assert callback.result.batches == 6
    assert is_population(copied(module)), "a fit that ends with a validation keeps them"


def test_at_the_end_nothing_differs_before_it(without):
    callback = RecalibrateBatchNorm(when="end")
    module, _ = fit(callback)
    plain, _ = without
    assert module.losses == plain.losses
    assert all(same(*pair) for pair in zip(module.seen, plain.seen, strict=True))
    assert same(copied(module), copied(plain), but=STATISTICS)
    assert is_population(copied(module))
    assert not is_population(copied(plain))
    assert callback.result.batches == 6
    assert all(mode.training for mode in module.modules())


def test_checkpoints_hold_them_and_a_resumed_training_is_the_uninterrupted_one(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole, _ = fit(RecalibrateBatchNorm(), saving, module=Lit(RENORM), enable_checkpointing=True, max_epochs=1)
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert same(saved["state_dict"], whole.seen[-1])
    torch.manual_seed(3)
    own = {}

    class Start(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            own.setdefault(trainer.current_epoch, copied(pl_module))

    def on(module, ckpt_path=None, *callbacks):
        fit(*callbacks, Start(), module=module, max_epochs=2, ckpt_path=ckpt_path)
        return own.pop(1)

    resumed = on(Lit(RENORM), tmp_path / "epoch=0.ckpt", RecalibrateBatchNorm())
    uninterrupted = on(Lit(RENORM), None, RecalibrateBatchNorm())
    assert same(resumed, uninterrupted)
    assert not same(resumed, saved["state_dict"])
    assert same(uninterrupted, on(Lit(RENORM))), "BatchRenorm reads running statistics, and finds its own"


def test_frozen_layers_stay():
    class Freeze(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.net[1].eval()

    for when in ("validation", "end"):
        callback = RecalibrateBatchNorm(when)
        module, _ = fit(callback, Freeze())
        assert torch.equal(module.net[1].running_mean, Lit().net[1].running_mean)
        assert "frozen" in callback.result.rows[0].reason
        assert callback.result.rows[1].reason is None
        assert not module.net[1].training
        callback = RecalibrateBatchNorm(when)
        module, _ = fit(callback, module=Lit(FrozenBatchNorm))
        assert "frozen" in callback.result.rows[0].reason


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_layers_that_are_frozen_later_keep_what_was_validated(first):
    pair = [RecalibrateBatchNorm(), FreezeBatchNorm(from_epoch=1, trainable=True)]
    module, _ = fit(*(pair if first else pair[::-1]))
    assert is_population(module.seen[1])
    for key, value in copied(module).items():
        assert not key.endswith(STATISTICS) or torch.equal(value, module.seen[1][key])
    assert module.losses != fit(FreezeBatchNorm(from_epoch=1, trainable=True))[0].losses


def test_two_validations_in_a_row_do_not_take_each_others_for_those_of_training():
    class Again(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                trainer.callbacks[0].on_validation_epoch_start(trainer, pl_module)
                trainer.callbacks[0].on_validation_batch_start(trainer, pl_module, None, 0)

    module, _ = fit(RecalibrateBatchNorm(), Again(), val_check_interval=3, module=Lit(RENORM))
    assert module.losses == fit(val_check_interval=3, module=Lit(RENORM))[0].losses


def test_patterns_and_limits():
    callback = RecalibrateBatchNorm(max_batches=3, exclude=["net.6"])
    fit(callback)
    assert [row.name for row in callback.result.rows] == ["net.1"]
    assert callback.result.batches == 3
    fit(callback, limit_train_batches=2)
    assert callback.result.batches == 2


@pytest.mark.parametrize("shuffle", [True, False])
def test_it_stops_early_where_the_training_loader_shuffles(shuffle, monkeypatch):
    monkeypatch.setattr("bn_lightning.recalibration.random_draw.TOLERANCE", 100.0)
    callback = RecalibrateBatchNorm("end")
    data = DataLoader(examples(90), 2, shuffle=shuffle)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(callback, max_epochs=1).fit(Lit(), data)
    assert callback.result.stopped_early == shuffle
    assert callback.result.batches == (20 if shuffle else len(data))


@pytest.mark.parametrize("when", ["validation", "end"])
def test_both_families_and_fast_dev_run(when):
    class Standalone(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.seen, self.losses = Lit().net, [], []

        forward, configure_optimizers = Lit.forward, Lit.configure_optimizers
        training_step, validation_step = Lit.training_step, Lit.validation_step

    callback = RecalibrateBatchNorm(when)
    fit(callback, module=Standalone(), family=pytorch_lightning, fast_dev_run=True)
    assert callback.result.batches == 1
    module, _ = fit(callback, module=Standalone(), family=pytorch_lightning)
    assert is_population(copied(module))


def test_validate_and_test_of_their_own_change_nothing():
    module, fitter = fit(RecalibrateBatchNorm(), max_epochs=1)
    with torch.no_grad():
        module.net[1].running_mean.fill_(3)
    before = copied(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitter.validate(module, loader(), verbose=False)
    assert same(before, copied(module))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(examples())


class AsDict(Lit):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch["x"], batch["y"]), batch_idx)


class NoForward(Lit):
    forward = pl.LightningModule.forward

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])


def dicts(items):
    return {"x": torch.stack([x for x, _ in items]), "y": torch.stack([y for _, y in items])}


@pytest.mark.parametrize("when", ["validation", "end"])
@pytest.mark.parametrize(
    ("make", "data", "message"),
    [
        pytest.param(Lit, lambda: DataLoader(Stream(), 8), "will be no recalibration.*IterableDataset", id="stream"),
        pytest.param(AsDict, lambda: DataLoader(examples(), 8, collate_fn=dicts), "got a dict.*forward=", id="dict"),
        pytest.param(NoForward, loader, "NotImplementedError.*recalibrate_batch_norm.module", id="no-forward"),
    ],
)  # fmt: skip
def test_what_is_impossible_is_told_and_the_training_stands(make, data, message, when):
    callback, module, twin = RecalibrateBatchNorm(when), make(), make()
    for fitted, callbacks in ((twin, ()), (module, (callback,))):
        torch.manual_seed(3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(*callbacks, max_epochs=1).fit(fitted, data(), DataLoader(examples(8, 5), 8))
    told = [str(entry.message) for entry in caught if "RecalibrateBatchNorm" in str(entry.message)]
    assert len(told) == 1
    assert re.search(message, told[0], re.DOTALL)
    assert callback.result is None
    assert same(copied(module), copied(twin))


def test_a_fit_without_validation_is_told():
    with pytest.raises(UserWarning, match=r"there was no validation in this fit\. Use when='end'"):
        fit(RecalibrateBatchNorm(), max_epochs=1, limit_val_batches=0)


def test_an_interrupt_leaves_the_training_its_statistics():
    class Cut(Lit):
        calls = 0

        def forward(self, x):
            self.calls += not self.training and bool(self.losses)
            if self.calls == 4:
                raise KeyboardInterrupt
            return super().forward(x)

    states = []

    class Spy(pl.Callback):
        def on_validation_start(self, trainer, pl_module):
            states.append(copied(pl_module))

    module = Cut()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(RecalibrateBatchNorm(), Spy(), module=module)
    assert same(copied(module), states[-1])


@pytest.mark.parametrize(
    ("options", "module", "message"),
    [
        pytest.param({"when": "always"}, Lit, "one of 'validation', 'end', got 'always'", id="when"),
        pytest.param({"max_batches": 0}, Lit, "positive whole number, got 0", id="max_batches"),
        pytest.param({"tolerance": "x"}, Lit, "standard error in σ.*got .x.", id="tolerance"),
        pytest.param({"include": ["nett.*"]}, Lit, r"'nett\.\*' matches none", id="pattern"),
        pytest.param({}, partial(Lit, nn.GroupNorm), "has no BatchNorm layer", id="no-bn"),
    ],
)  # fmt: skip
def test_what_could_never_work_is_refused_before_training(options, module, message):
    if message.startswith("has no"):
        module = Lit()
        module.net = nn.Sequential(nn.Flatten(), nn.Linear(75, 2))
    else:
        module = module()
    with pytest.raises(BatchNormError, match=message):
        fit(RecalibrateBatchNorm(**options), module=module)
    assert not module.losses


def test_two_of_them_have_their_own_state():
    module, _ = fit(RecalibrateBatchNorm(), RecalibrateBatchNorm("end"), data=loader(shuffle=True, generator=seeded(4)))
    assert is_population(module.seen[-1], None) is False, "its own loader draws in an order of its own"
    assert isinstance(RecalibrationError("x"), BatchNormError)


def test_no_bar_is_drawn_over_the_trainers(monkeypatch):
    shown = []

    def spied(*arguments, show_progress, **options):
        shown.append(show_progress)
        return recalibrate_batch_norm(*arguments, **options)

    monkeypatch.setattr(recalibrate, "recalibrate_batch_norm", spied)
    for bar in ([], [TQDMProgressBar()], [RichProgressBar()]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fitter = pl.Trainer(max_epochs=1, logger=False, accelerator="cpu", enable_model_summary=False,
                                enable_checkpointing=False, enable_progress_bar=bool(bar),
                                callbacks=[RecalibrateBatchNorm("end"), *bar])  # fmt: skip
            fitter.fit(Lit(), loader())
    assert shown == [True, False, False]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("when", ["validation", "end"])
def test_on_a_gpu(when):
    callback = RecalibrateBatchNorm(when)
    module, _ = fit(callback, accelerator="gpu", devices=1)
    assert callback.result is not None
    assert is_population({key: value.cpu() for key, value in copied(module).items()})
