import warnings

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

import bn_lightning as bnl
from bn_lightning.callbacks import ActivationMonitor, ConvertBatchNorm
from bn_lightning.errors import ConversionError
from bn_lightning.layers import BatchRenorm, GhostBatchNorm

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",
    "ignore:.*smaller than the logging interval.*",
    "ignore:.*You defined a `validation_step`.*",
    "ignore:.*sampler has shuffling.*",
)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(),
        nn.Linear(4 * 16, 2),
    )  # fmt: skip


def module_class(base):
    class Module(base):
        def __init__(self, late=None):
            super().__init__()
            self.network, self.late, self.head = network(), late, nn.Identity()

        def setup(self, stage):
            if self.late == "setup":
                self.head = nn.BatchNorm1d(2)

        def configure_model(self):
            if self.late == "configure_model":
                self.head = nn.BatchNorm1d(2)

        def forward(self, x):
            return self.head(self.network(x))

        def training_step(self, batch, batch_idx):
            return self(batch[0]).square().mean()

        def validation_step(self, batch, batch_idx):
            self.log("loss", self(batch[0]).square().mean())

        test_step = validation_step

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    return Module


Module = module_class(pl.LightningModule)


def loader():
    x = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=8)


def trainer(*callbacks, family=pl, **settings):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "max_epochs": 1,
    }
    return family.Trainer(callbacks=list(callbacks), **{**quiet, **settings})


@pytest.mark.parametrize("family", [pl, pytorch_lightning], ids=["lightning", "pytorch_lightning"])
def test_the_layers_are_converted_before_training_and_stay_so(family, capsys):
    module, callback = (
        module_class(family.LightningModule)(),
        ConvertBatchNorm("ghost", options={"virtual_batch_size": 4}),
    )
    run = trainer(callback, family=family)
    run.fit(module, loader())
    layers = [module.network[1], module.network[4]]
    assert [type(layer) for layer in layers] == [GhostBatchNorm] * 2
    assert all(layer.virtual_batch_size == 4 and layer.num_batches_tracked == 4 for layer in layers)
    assert capsys.readouterr().out.count("BatchNorm2d   GhostBatchNorm   converted") == 2
    run.validate(module, loader(), verbose=False)
    assert "GhostBatchNorm" not in capsys.readouterr().out  # nothing new to say
    callback.report.undo()


def test_it_trains_as_a_network_converted_by_hand():
    by_callback, by_hand = Module(), Module()
    options = {"virtual_batch_size": 4}
    trainer(ConvertBatchNorm("ghost", options=options)).fit(by_callback, loader())
    bnl.convert_batch_norm(by_hand, "ghost", **options)
    trainer().fit(by_hand, loader())
    for ours, theirs in zip(by_callback.state_dict().values(), by_hand.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    plain = Module()
    trainer().fit(plain, loader())
    assert not torch.equal(plain.network[0].weight, by_hand.network[0].weight)


def test_a_checkpoint_resumes_and_loads_into_a_plain_network(tmp_path):
    module = Module()
    run = trainer(ConvertBatchNorm("renorm"))
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    resumed = Module()
    trainer(ConvertBatchNorm("renorm"), max_epochs=2).fit(resumed, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert isinstance(resumed.network[1], BatchRenorm)
    assert resumed.network[1].num_batches_tracked == 8
    plain = Module()
    plain.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"], strict=True)
    assert torch.equal(plain.network[1].running_mean, module.network[1].running_mean)


@pytest.mark.parametrize("late", ["setup", "configure_model"])
def test_layers_that_appear_later_are_named(late):
    module = Module(late)
    with pytest.warns(
        UserWarning, match=r"came before 1 BatchNorm layers were made, .*: head\. Call .*configure_model"
    ):
        trainer(ConvertBatchNorm("ghost")).fit(module, loader())
    assert type(module.head) is nn.BatchNorm1d
    with pytest.warns(UserWarning, match="not converted: head"):
        trainer(ConvertBatchNorm("ghost")).test(Module(late), loader(), verbose=False)


def test_a_module_whose_layers_all_appear_later_is_refused():
    module = Module("configure_model")
    module.network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(ConversionError, match=r"found no BatchNorm layer in setup, and now there are 1: head\. Call"):
        trainer(ConvertBatchNorm("ghost")).fit(module, loader())


def test_a_module_without_batch_norm_is_refused():
    module = Module()
    module.network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(ConversionError, match="Module has no BatchNorm layer"):
        trainer(ConvertBatchNorm("ghost")).fit(module, loader())


class Synchronizing(SingleDeviceStrategy):
    """Does at the same moment what DDP does for ``sync_batchnorm=True``, which needs a GPU."""

    def setup(self, trainer):
        self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        super().setup(trainer)


@pytest.mark.parametrize("callback", [ConvertBatchNorm("ghost"), ActivationMonitor()], ids=lambda c: type(c).__name__)
def test_variants_taken_out_by_sync_batchnorm_stop_training(callback):
    module = Module()
    bnl.convert_batch_norm(module, "ghost", include=("network.1",))
    run = trainer(callback, strategy=Synchronizing("cpu"))
    with pytest.raises(
        ConversionError, match=r"replaced before training.*'network.1' was GhostBatchNorm and is SyncBatch"
    ):
        run.fit(module, loader())


def test_plain_layers_may_become_sync_batch_norm():
    module, callback = Module(), ConvertBatchNorm("ghost", include=["network.1"])
    with pytest.raises(ConversionError, match=r"^1 BatchNorm variants were replaced"):
        trainer(callback, strategy=Synchronizing("cpu")).fit(module, loader())


def test_unknown_names_and_patterns_are_refused_in_setup():
    with pytest.raises(ConversionError, match="did you mean 'ghost'"):
        trainer(ConvertBatchNorm("gost")).fit(Module(), loader())
    with pytest.raises(ValueError, match=r"include pattern 'layer9\.\*' matches none"):
        trainer(ConvertBatchNorm("ghost", include=["layer9.*"])).fit(Module(), loader())
    with pytest.raises(ValueError, match="bare string"):
        ConvertBatchNorm("ghost", include="network.*")


def test_the_way_back_stays_open_after_a_test_and_is_left_open():
    module, callback = Module(), ConvertBatchNorm("group", options={"num_groups": 2})
    run = trainer(callback)
    run.fit(module, loader())
    run.test(module, loader(), verbose=False)
    run.fit(module, loader())
    assert type(module.network[1]) is nn.GroupNorm
    callback.report.undo()
    assert type(module.network[1]) is nn.BatchNorm2d
    run.test(module, loader(), verbose=False)
    assert type(module.network[1]) is nn.BatchNorm2d  # the user's word stands until the next fit
    other = Module()
    run.test(other, loader(), verbose=False)
    assert type(other.network[1]) is nn.GroupNorm


def test_layers_that_have_to_be_kept_are_named():
    with pytest.warns(
        UserWarning, match=r"left 2 of 2 .* as they are: network\.1, network\.4\. The first, .*num_groups=1 w"
    ):
        trainer(ConvertBatchNorm("group", options={"num_groups": 3})).fit(Module(), loader())


def test_what_can_be_refused_at_once_is():
    with pytest.raises(ConversionError, match="did you mean 'ghost'"):
        ConvertBatchNorm("GhostBatchNorm")
    with pytest.raises(ConversionError, match="virtual_batch_size counts"):
        ConvertBatchNorm("ghost", options={"virtual_batch_size": 0})


def test_conversions_one_after_the_other_are_no_replacement(tmp_path):
    module = Module()
    bnl.convert_batch_norm(module, "ghost")
    trainer(ActivationMonitor(), ConvertBatchNorm("renorm"), default_root_dir=tmp_path).fit(module, loader())
    assert isinstance(module.network[1], BatchRenorm)


def test_a_module_that_was_converted_to_group_norm_is_converted_already():
    module = Module()
    trainer(ConvertBatchNorm("group", options={"num_groups": 2})).fit(module, loader())
    callback = ConvertBatchNorm("group", options={"num_groups": 2})
    trainer(callback).test(module, loader(), verbose=False)
    assert [row.reason.split()[0] for row in callback.report.rows] == ["already", "already"]


def test_layers_that_appear_later_and_are_not_wanted_are_not_named():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*came before.*")
        trainer(ConvertBatchNorm("ghost", include=["network.*"])).fit(Module("setup"), loader())


def test_several_conversions_are_taken_back_together():
    module, callback = Module(), ConvertBatchNorm("ghost")
    run = trainer(callback, max_epochs=2)
    run.fit(module, loader())
    bnl.revert_batch_norm(module, include=("network.4",))
    run = trainer(callback)
    run.fit(module, loader())
    assert [row.changed for row in callback.report.rows] == [False, True]
    callback.undo()
    assert [type(module.network[index]) for index in (1, 4)] == [nn.BatchNorm2d] * 2
    callback.undo()  # nothing left
