"""Recalibration beside Lightning's own weight averaging, whichever of the two comes first."""

import pytest
import torch
from callbacks.recalibrated import copied, fit, is_population, loader, same
from lightning.pytorch import callbacks as lightnings
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging

from bn_lightning.callbacks import RecalibrateBatchNorm

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
WeightAveraging = getattr(lightnings, "WeightAveraging", None)
needs_weight_averaging = pytest.mark.skipif(WeightAveraging is None, reason="lightning 2.6 brought it")
ORDERS = pytest.mark.parametrize("first", [True, False], ids=["first", "last"])


def ordered(callback, other, first):
    return (callback, other) if first else (other, callback)


@needs_weight_averaging
@ORDERS
@pytest.mark.parametrize("use_buffers", [True, False], ids=["buffers", "weights-only"])
def test_what_weight_averaging_validates_and_saves_is_recalibrated(first, use_buffers, tmp_path):
    def averaged(*callbacks):
        return fit(*callbacks, enable_checkpointing=True, val_check_interval=3)

    averaging = WeightAveraging(use_buffers=use_buffers)
    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, save_on_train_epoch_end=False)
    module, fitter = averaged(*ordered(RecalibrateBatchNorm(), averaging, first), saving)
    plain, _ = averaged(WeightAveraging(use_buffers=use_buffers), ModelCheckpoint(tmp_path / "plain"))
    assert module.losses == plain.losses
    for state, without in zip(module.seen[1:], plain.seen[1:], strict=True):
        assert same(state, without, but=STATISTICS), "the averaged weights"
        assert is_population(state)
        assert not is_population(without)
    for step, state in zip((3, 6, 9, 12), module.seen[1:], strict=True):
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert same(saved["state_dict"], state)
        assert not is_population(saved["current_model_state"])
    assert is_population(copied(module)), "the average, moved into the network at the end"
    fitter.save_checkpoint(tmp_path / "after.ckpt")
    assert is_population(torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"])


@needs_weight_averaging
@ORDERS
def test_training_goes_on_with_its_own(first):
    from lightning.pytorch import Callback

    states = []

    class Spy(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            states.append(copied(pl_module))

    fit(*ordered(RecalibrateBatchNorm(), WeightAveraging(), first), Spy(), val_check_interval=2)
    with_it, states = states, []
    fit(WeightAveraging(), Spy(), val_check_interval=2)
    assert all(same(*pair) for pair in zip(with_it, states, strict=True))


@needs_weight_averaging
@ORDERS
@pytest.mark.parametrize("use_buffers", [True, False], ids=["buffers", "weights-only"])
def test_at_the_end_weight_averaging_has_them_in_network_and_checkpoint(first, use_buffers, tmp_path):
    class PerEpoch(WeightAveraging):
        def should_update(self, step_idx=None, epoch_idx=None):
            return epoch_idx is not None

    module, fitter = fit(*ordered(RecalibrateBatchNorm("end"), PerEpoch(use_buffers=use_buffers), first))
    assert is_population(copied(module))
    fitter.save_checkpoint(tmp_path / "after.ckpt")
    assert same(torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"], copied(module))


@ORDERS
@pytest.mark.parametrize("when", ["validation", "end"])
def test_after_stochastic_weight_averaging(first, when):
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    module, _ = fit(*ordered(RecalibrateBatchNorm(when), swa, first), max_epochs=3)
    plain, _ = fit(StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1), max_epochs=3)
    assert module.losses == plain.losses
    assert same(copied(module), copied(plain), but=STATISTICS)
    assert is_population(copied(module))
    assert not is_population(copied(plain))


@ORDERS
def test_an_average_that_gets_no_epoch_of_its_own(first):
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    module, _ = fit(*ordered(RecalibrateBatchNorm("end"), swa, first), max_epochs=-1, max_steps=18)
    assert is_population(copied(module))


@ORDERS
def test_early_stopping_before_the_average(first):
    stopping = EarlyStopping("val", mode="max", patience=1, min_delta=1e6)
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=8)
    module, _ = fit(*ordered(RecalibrateBatchNorm("end"), swa, first), stopping, max_epochs=9, data=loader())
    assert len(module.seen) == 3
    assert is_population(copied(module))
