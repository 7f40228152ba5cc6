"""``BN_LIGHTNING`` adds callbacks to a Trainer of either family, and nothing without it."""

import importlib
import pickle
import subprocess
import sys
from importlib.metadata import entry_points

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from torch import nn
from torch.utils.data import DataLoader

from bn_lightning import autoload
from bn_lightning.autoload import callbacks_of, from_environment
from bn_lightning.callbacks import ActivationMonitor, BatchNormAudit, BatchNormMonitor, FoldBatchNorm
from bn_lightning.errors import BatchNormError

FAMILIES = {"lightning": pl, "pytorch_lightning": pytorch_lightning}
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*log_every_n_steps.*")
EVERYTHING = "monitor;activations:every_n_steps=2,first_steps=3;audit:max_batches=2"


def module(family):
    class Net(family.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

    torch.manual_seed(0)
    return Net()


def data():
    generator = torch.Generator().manual_seed(1)
    return DataLoader([(torch.randn(1, 4, 4, generator=generator), i % 3) for i in range(24)], 8, shuffle=True)


def trainer(family, folder, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"max_epochs": 2, "enable_checkpointing": False, **quiet, **options}
    return family.Trainer(accelerator="cpu", default_root_dir=folder, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_callbacks_are_added_and_training_is_bit_for_bit_the_same(name, tmp_path, monkeypatch):
    family, weights = FAMILIES[name], []
    for asked in ("", EVERYTHING):
        monkeypatch.setenv("BN_LIGHTNING", asked)
        torch.manual_seed(3)
        fitted, network = trainer(family, tmp_path), module(family)
        torch.manual_seed(3)
        fitted.fit(network, data())
        weights.append([*network.state_dict().values(), torch.random.get_rng_state()])
        ours = [callback for callback in fitted.callbacks if "FromEnvironment" in type(callback).__name__]
        assert len(ours) == (3 if asked else 0)
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))
    running, activations, audit = ours
    assert (activations.cadence.every_n_steps, audit.max_batches) == (2, 2)
    assert len(audit.report.layers) == len(running.snapshot.rows) == 1
    assert activations.table().rows


def test_both_families_ask_here():
    for group in ("lightning.pytorch.callbacks_factory", "pytorch_lightning.callbacks_factory"):
        (factory,) = (each for each in entry_points(group=group) if each.name == "bn_lightning")
        assert factory.load() is from_environment


def test_without_the_variable_nothing_is_added_and_nothing_is_imported(monkeypatch):
    for value in ("", "  "):
        monkeypatch.setenv("BN_LIGHTNING", value)
        assert from_environment() == []
    monkeypatch.delenv("BN_LIGHTNING")
    assert from_environment() == []
    code = (
        "import sys; from bn_lightning.autoload import from_environment as f; assert f() == []; "
        "print([name for name in sys.modules if name.split('.')[0] in ('torch', 'lightning', 'yaml', 'bn_lightning')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['bn_lightning', 'bn_lightning.errors', 'bn_lightning.autoload']"


@pytest.mark.parametrize("by", ["trainer", "module"])
def test_it_steps_aside_for_a_callback_of_the_projects_own(by, tmp_path, monkeypatch):
    monkeypatch.setenv("BN_LIGHTNING", "audit;monitor")
    own, network = BatchNormAudit(max_batches=1), module(pl)
    if by == "module":
        network.configure_callbacks = lambda: [own]
    fitted = trainer(pl, tmp_path, callbacks=[own] if by == "trainer" else [])
    fitted.fit(network, data())
    kinds = sorted(type(callback).__name__ for callback in fitted.callbacks)
    assert kinds == ["BatchNormAudit", "BatchNormMonitorFromEnvironment"]
    assert own.report.batches == 1


def test_two_of_a_kind_from_the_variable_both_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("BN_LIGHTNING", "monitor:include=['net.1'];monitor:exclude=[nothing]")
    with pytest.raises(BatchNormError, match="nothing"):  # the second is there, and finds that its pattern is wrong
        trainer(pl, tmp_path).fit(module(pl), data())


@pytest.mark.parametrize("name", FAMILIES)
def test_one_list_for_several_trainers(name, tmp_path, monkeypatch):
    """Lightning puts what comes from entry points into the very list it is given."""
    monkeypatch.setenv("BN_LIGHTNING", "monitor;activations")
    family, keys = FAMILIES[name], []
    mine = [family.Callback()]
    trainers = [trainer(family, tmp_path, callbacks=mine)]
    for _ in range(2):
        trainers.append(trainer(family, tmp_path, callbacks=mine))
        trainers[-1].fit(module(family), data())
        trainers[-1].save_checkpoint(tmp_path / "last.ckpt")
        keys.append(set(torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]))
        assert [type(callback).__name__.removesuffix("FromEnvironment") for callback in trainers[-1].callbacks] == [
            "Callback", "BatchNormMonitor", "ActivationMonitor"
        ]  # fmt: skip
    assert keys[0] == keys[1], "a run that resumes finds what another run has saved"
    trainers[0].fit(module(family), data())
    assert len(trainers[0].callbacks) == 3


def test_its_state_is_its_own_and_a_run_resumes_with_and_without_it(tmp_path, monkeypatch):
    assert callbacks_of("monitor")[0].state_key != BatchNormMonitor().state_key
    assert callbacks_of("activations")[0].state_key != ActivationMonitor().state_key
    monkeypatch.setenv("BN_LIGHTNING", "monitor:every_n_steps=1")
    first = trainer(pl, tmp_path)
    first.fit(module(pl), data())
    first.save_checkpoint(tmp_path / "last.ckpt")
    second = trainer(pl, tmp_path, max_epochs=3)
    second.fit(module(pl), data(), ckpt_path=tmp_path / "last.ckpt")
    (monitor,) = second.callbacks
    assert [int(step) for step in monitor.history.steps] == list(range(9))
    monkeypatch.delenv("BN_LIGHTNING")
    with pytest.warns(UserWarning, match="BatchNormMonitorFromEnvironment"):  # Lightning's own, of a callback missing
        trainer(pl, tmp_path, max_epochs=3).fit(module(pl), data(), ckpt_path=tmp_path / "last.ckpt")


def test_a_callback_goes_to_another_process():
    (fold,) = callbacks_of("fold:stages=[test],standalone=affine")
    there = pickle.loads(pickle.dumps(fold))
    assert type(there) is type(fold) is autoload.FoldBatchNormFromEnvironment
    assert isinstance(there, FoldBatchNorm)
    assert there.stages == ("test",)
    with pytest.raises(AttributeError):
        _ = autoload.SomethingFromEnvironment


def test_values_are_yaml_and_separators_in_brackets_are_no_separators():
    (convert, freeze, recalibrate, activations) = callbacks_of(
        "convert:variant=ghost,options={virtual_batch_size: 8}; freeze:include=['*.bn1', \"a;b\"],trainable=true;"
        "recalibrate:tolerance=null,when=end ;activations:alerts=false;"
    )
    assert callbacks_of("audit:step=torch.relu")[0].step is torch.relu
    assert convert.options == {"virtual_batch_size": 8}
    assert (freeze.include, freeze.trainable) == (("*.bn1", "a;b"), True)
    assert (recalibrate.tolerance, recalibrate.when) == (None, "end")
    assert activations.cadence.every_n_steps == 50


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("montior", r"asks for 'montior' \(did you mean 'monitor'\?\); expected one of activations, audit, convert"),
        ("audit:max_batch=3", r"the option 'max_batch=3' \(did you mean 'max_batches'\?\); expected option=value"),
        ("monitor:every=3", r"gives 'monitor' the option 'every=3'; .* include, .*every_n_steps"),
        ("monitor:every_n_steps", r"the option 'every_n_steps'; expected option=value"),
        ("freeze:include=*.bn1", r"quoted, as in include=\['\*\.bn1'\]"),
        ("audit:max_batches=0", r"asks for 'audit:max_batches=0': max_batches must be a positive"),
        ("audit:max_batches=many", r"gives 'audit' 'max_batches=many'; expected int, got 'many'\.$"),
        ("activations:gradients=maybe", r"gives 'activations' 'gradients=maybe'; expected bool, got 'maybe'\.$"),
        ("monitor:include=bn1", r"'include=bn1'; expected list\[str\] \| None, got 'bn1': write \[bn1\]\.$"),
        ("audit:step=nowhere.step", r"gives 'audit' 'step=nowhere.step'; expected .*Callable"),
        ("convert", r"asks for 'convert': TypeError: missing a required argument: 'variant'$"),
    ],
)
def test_what_is_wrong_is_told_when_the_trainer_is_made(asked, said, tmp_path, monkeypatch):
    monkeypatch.setenv("BN_LIGHTNING", asked)
    with pytest.raises(BatchNormError, match=f"^BN_LIGHTNING .*{said}") as raised:
        trainer(pl, tmp_path)
    assert "\n" not in str(raised.value)


def test_every_callback_has_a_name():
    callbacks = importlib.import_module("bn_lightning.callbacks")
    assert set(autoload._NAMES.values()) == {name for name in callbacks.__all__ if name != "BatchNormCallback"}
