import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, Callback, StochasticWeightAveraging
from torch import nn

from bn_lightning import convert_batch_norm
from bn_lightning.callbacks import FreezeBatchNorm
from bn_lightning.errors import ConversionError
from bn_lightning.layers import FrozenBatchNorm, GhostBatchNorm

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",
    "ignore:.*smaller than the logging interval.*",
    "ignore:.*exists and is not empty.*",
    "ignore:.*params to be frozen already exist.*",
)


class Module(pl.LightningModule):
    def __init__(self, momentum=0.9, backbone_in_optimizer=True):
        super().__init__()
        torch.manual_seed(0)
        self.momentum, self.backbone_in_optimizer = momentum, backbone_in_optimizer
        self.backbone = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3),
                                      nn.BatchNorm2d(4), nn.Flatten())  # fmt: skip
        self.head = nn.Sequential(nn.Linear(64, 2), nn.BatchNorm1d(2))
        for bn in (self.backbone[1], self.backbone[4], self.head[1]):
            nn.init.normal_(bn.running_mean), nn.init.normal_(bn.weight, 1), nn.init.normal_(bn.bias)

    def forward(self, x):
        return self.head(self.backbone(x))

    def training_step(self, batch, batch_idx):
        return (self(batch[0]) - 1).square().mean()

    def configure_optimizers(self):
        parameters = [p for p in self.parameters() if self.backbone_in_optimizer or p.requires_grad]
        return torch.optim.SGD(parameters, 0.05, momentum=self.momentum, weight_decay=0.1)


class Recorder(Callback):
    """What every BN holds and is, at the end of each epoch."""

    def __init__(self):
        self.epochs = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append(states(pl_module))


def states(module):
    return {
        name: (type(bn), {key: value.clone() for key, value in bn.state_dict().items()})
        for name, bn in module.named_modules()
        if isinstance(bn, nn.modules.batchnorm._BatchNorm)
    }


def same(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


def loader():
    x = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 + 1
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=8)


def fit(module, *callbacks, epochs=2, ckpt_path=None, **settings):
    recorder = Recorder()
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        callbacks=[*callbacks, recorder], logger=False, accelerator="cpu", max_epochs=epochs, **quiet, **settings
    )
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return trainer, recorder.epochs


def test_nothing_of_a_frozen_layer_moves_and_everything_else_does():
    module, callback = Module(), FreezeBatchNorm()
    before, weights = states(module), module.backbone[0].weight.clone()
    _, epochs = fit(module, callback)
    for epoch in epochs:
        for name, (kind, state) in epoch.items():
            assert kind is FrozenBatchNorm
            assert same(state, before[name][1]), name
    assert not torch.equal(module.backbone[0].weight, weights)
    assert [row.name for row in callback.report.rows] == ["backbone.1", "backbone.4", "head.1"]


def test_afterwards_the_layers_are_what_they_were():
    module = Module()
    before, requires = states(module), [p.requires_grad for p in module.parameters()]
    trainer, _ = fit(module, FreezeBatchNorm())
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks
    for name, (kind, state) in states(module).items():
        assert kind is before[name][0]
        assert same(state, before[name][1])
    assert [p.requires_grad for p in module.parameters()] == requires
    fit(module)  # and they learn again
    assert not same(states(module)["backbone.1"][1], before["backbone.1"][1])


def test_from_an_epoch_on():
    module = Module()
    before = states(module)
    _, epochs = fit(module, FreezeBatchNorm(from_epoch=1), epochs=3)
    assert epochs[0]["backbone.1"][0] is nn.BatchNorm2d
    assert not same(epochs[0]["backbone.1"][1], before["backbone.1"][1])
    for later in epochs[1:]:
        for name in before:
            assert same(later[name][1], epochs[0][name][1])  # SGD's momentum of the first epoch included


def test_the_statistics_alone():
    module = Module()
    before = states(module)
    fit(module, FreezeBatchNorm(trainable=True))
    for name, (_, state) in states(module).items():
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(state[key], before[name][1][key])
        assert not torch.equal(state["weight"], before[name][1]["weight"])


def test_patterns_choose_layers():
    module = Module()
    before = states(module)
    fit(module, FreezeBatchNorm(include=["backbone.*"], exclude=["*.4"]))
    after = states(module)
    assert same(after["backbone.1"][1], before["backbone.1"][1])
    assert not same(after["backbone.4"][1], before["backbone.4"][1])
    assert not same(after["head.1"][1], before["head.1"][1])


@pytest.mark.parametrize("freeze_first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("train_bn", [True, False], ids=["train_bn", "not train_bn"])
def test_beside_backbone_finetuning(train_bn, freeze_first):
    """Which makes BN trainable again in its frozen phase, or leaves it on batch statistics."""
    module = Module(backbone_in_optimizer=False)
    before = states(module)
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, train_bn=train_bn, verbose=False)
    freeze = FreezeBatchNorm(include=["backbone.*"])
    _, epochs = fit(module, *((freeze, finetuning) if freeze_first else (finetuning, freeze)), epochs=3)
    for epoch in epochs:
        for name in ("backbone.1", "backbone.4"):
            assert epoch[name][0] is FrozenBatchNorm
            assert same(epoch[name][1], before[name][1]), name
    assert not same(epochs[-1]["head.1"][1], before["head.1"][1])


def test_without_this_callback_finetuning_moves_them():
    module = Module(backbone_in_optimizer=False)
    before = states(module)
    fit(module, BackboneFinetuning(unfreeze_backbone_at_epoch=1, train_bn=True, verbose=False))
    assert not same(states(module)["backbone.1"][1], before["backbone.1"][1])


def test_an_exception_gives_the_classes_back():
    class Stop(Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("stop")

    module = Module()
    with pytest.raises(RuntimeError, match="stop"):
        fit(module, FreezeBatchNorm(), Stop())
    assert type(module.backbone[1]) is nn.BatchNorm2d


def test_a_resumed_run_is_frozen_at_once(tmp_path):
    module = Module()
    trainer, epochs = fit(module, FreezeBatchNorm(from_epoch=1), epochs=2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = Module()
    nn.init.zeros_(resumed.backbone[1].weight)
    _, later = fit(resumed, FreezeBatchNorm(from_epoch=1), epochs=3, ckpt_path=tmp_path / "last.ckpt")
    assert same(later[-1]["backbone.1"][1], epochs[-1]["backbone.1"][1])


def test_with_gradient_accumulation_and_clipping():
    module = Module()
    before = states(module)
    fit(module, FreezeBatchNorm(), accumulate_grad_batches=2, gradient_clip_val=0.5)
    assert all(same(state, before[name][1]) for name, (_, state) in states(module).items())


def test_under_ddp_whose_reducer_waits_for_every_gradient():
    module = Module()
    try:
        _, epochs = fit(module, FreezeBatchNorm(from_epoch=1), epochs=3, strategy="ddp", devices=1)
    finally:
        torch.distributed.destroy_process_group()
    assert same(epochs[2]["backbone.1"][1], epochs[0]["backbone.1"][1])
    assert not same(epochs[0]["backbone.1"][1], states(Module())["backbone.1"][1])


def test_variants_are_frozen_and_come_back_with_their_settings():
    module = Module()
    module.backbone[1] = GhostBatchNorm(4, virtual_batch_size=2)
    _, epochs = fit(module, FreezeBatchNorm())
    assert epochs[-1]["backbone.1"][0] is FrozenBatchNorm
    assert type(module.backbone[1]) is GhostBatchNorm
    assert module.backbone[1].options() == {"virtual_batch_size": 2}


def test_what_cannot_be_frozen_is_named():
    class Own(nn.BatchNorm2d):
        pass

    module = Module()
    module.backbone[4] = Own(4)
    with pytest.warns(
        UserWarning, match=r"could not freeze 1 of 3 BatchNorm layers \(backbone\.4\)\. The first: .*Own"
    ):
        fit(module, FreezeBatchNorm())


def test_it_says_what_it_froze(caplog):
    with caplog.at_level("INFO"):
        fit(Module(), FreezeBatchNorm(include=["backbone.*"]), epochs=1)
    said = next(record.message for record in caplog.records if "FreezeBatchNorm" in record.message)
    assert said == (
        "FreezeBatchNorm: 2 BatchNorm layers are frozen from epoch 0 on (running statistics, scale and shift): "
        "backbone.1, backbone.4."
    )


def test_bad_settings_are_refused():
    with pytest.raises(ConversionError, match="from_epoch counts epochs from 0, got -1"):
        FreezeBatchNorm(from_epoch=-1)
    with pytest.raises(ValueError, match="matches none"):
        fit(Module(), FreezeBatchNorm(include=["layer9.*"]))
    module = Module()
    module.backbone, module.head = nn.Flatten(), nn.Linear(64, 2)
    with pytest.raises(ConversionError, match="has no BatchNorm layer"):
        fit(module, FreezeBatchNorm())


def test_a_copy_of_the_callback_is_independent():
    one = FreezeBatchNorm()
    assert copy.deepcopy(one)._frozen is not one._frozen


def test_a_fit_that_ends_too_early_says_so():
    with pytest.warns(UserWarning, match=r"FreezeBatchNorm\(from_epoch=5\) has frozen nothing: fit ended in epoch 1"):
        fit(Module(), FreezeBatchNorm(from_epoch=5), epochs=1)


@pytest.mark.filterwarnings("ignore:.*is frozen and keeps its running_.*", "ignore:.*Swapping scheduler.*")
def test_beside_stochastic_weight_averaging_which_resets_batch_norm():
    module = Module()
    before = states(module)
    for name in ("backbone.1", "backbone.4", "head.1"):
        module.get_submodule(name).num_batches_tracked.fill_(7)
        before[name][1]["num_batches_tracked"].fill_(7)
    fit(module, FreezeBatchNorm(), StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1), epochs=3)
    for name, (kind, state) in states(module).items():
        assert kind is before[name][0]
        assert same(state, before[name][1]), name


def test_with_optimizers_that_the_trainer_does_not_step():
    class Manual(Module):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 0.05)

    module = Manual()
    before, weight = states(module), module.backbone[0].weight.clone()
    fit(module, FreezeBatchNorm())
    assert all(same(state, before[name][1]) for name, (_, state) in states(module).items())
    assert not torch.equal(module.backbone[0].weight, weight)
    fit(module)
    assert not same(states(module)["backbone.1"][1], before["backbone.1"][1])


@pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch.*")
def test_a_run_resumed_within_a_frozen_epoch_is_frozen(tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx == 1:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    fit(Module(), FreezeBatchNorm(from_epoch=1), Save(), epochs=2)
    middle = torch.load(tmp_path / "middle.ckpt", weights_only=False)["state_dict"]
    module = Module()
    fit(module, FreezeBatchNorm(from_epoch=1), epochs=2, ckpt_path=tmp_path / "middle.ckpt")
    for key, value in module.state_dict().items():
        if (key.split(".")[1] in ("1", "4") and key.startswith("backbone")) or key.startswith("head.1"):
            assert torch.equal(value, middle[key]), key
    assert not torch.equal(module.backbone[0].weight, middle["backbone.0.weight"])


def test_what_would_fail_later_fails_at_the_start():
    module = Module()
    module.backbone[4] = nn.BatchNorm2d(4, track_running_stats=False)
    before = states(module)
    with pytest.raises(ConversionError, match=r"'backbone\.4' cannot be converted: .* no running statistics to freeze"):
        fit(module, FreezeBatchNorm(from_epoch=1))
    assert all(same(state, before[name][1]) for name, (_, state) in states(module).items())
    with pytest.raises(ConversionError, match="from_epoch counts epochs from 0, got '1'"):
        FreezeBatchNorm(from_epoch="1")


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.LBFGS], ids=lambda c: c.__name__)
def test_with_a_closure_that_makes_the_gradients_within_the_step(optimizer_class):
    class Manual(Module):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)

            def closure():
                optimizer.zero_grad()
                loss = Module.training_step(self, batch, batch_idx)
                self.manual_backward(loss)
                return loss

            optimizer.step(closure)

        def configure_optimizers(self):
            return optimizer_class(self.parameters(), lr=0.01)

    module = Manual()
    before, weight = states(module), module.backbone[0].weight.clone()
    fit(module, FreezeBatchNorm())
    assert all(same(state, before[name][1]) for name, (_, state) in states(module).items())
    assert not torch.equal(module.backbone[0].weight, weight)


@pytest.mark.filterwarnings("ignore:.*is frozen and keeps its running_.*", "ignore:.*Swapping scheduler.*")
def test_averaging_that_began_before_the_freeze_mixes_nothing_earlier_in():
    module = Module()
    average = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    _, epochs = fit(module, FreezeBatchNorm(from_epoch=2), average, epochs=4)
    for name, (_, state) in states(module).items():
        assert same(state, epochs[1][name][1]), name


@pytest.mark.filterwarnings("ignore:.*is frozen and keeps its running_.*", "ignore:.*Swapping scheduler.*")
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_the_epoch_that_weight_averaging_adds_is_none_to_freeze_in(first):
    module = Module()
    callbacks = [FreezeBatchNorm(from_epoch=2), StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)]
    with pytest.warns(UserWarning, match="has frozen nothing"):
        fit(module, *callbacks[:: 1 if first else -1], epochs=2)
    assert not torch.equal(module.backbone[1].running_var, torch.ones(4))


def test_layers_that_were_frozen_before_keep_what_they_were_told():
    module = Module()
    convert_batch_norm(module, "frozen", include=("backbone.1",), trainable=False)
    before = states(module)
    fit(module, FreezeBatchNorm(trainable=True))
    after = states(module)
    assert same(after["backbone.1"][1], before["backbone.1"][1])
    assert not torch.equal(after["backbone.4"][1]["weight"], before["backbone.4"][1]["weight"])
    assert module.backbone[1].options() == {"trainable": False}
