"""The batches that --data names: as a Trainer would give them, and no other's batches by mistake."""

import types

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bn_lightning.cli import data as data_module
from bn_lightning.cli.data import open_batches
from bn_lightning.errors import BatchNormError


def loader(start=0, number=4):
    return DataLoader(TensorDataset(torch.arange(start, start + number).float()), batch_size=2)


class Data(pl.LightningDataModule):
    def __init__(self, start=0, number=4):
        super().__init__()
        self.save_hyperparameters()
        self.steps = []

    def prepare_data(self):
        self.steps.append("prepare")

    def setup(self, stage):
        self.steps.append(stage)

    def train_dataloader(self):
        assert self.steps == ["prepare", "fit"]
        return loader(self.hparams.start, self.hparams.number)


class WithVal(Data):
    def val_dataloader(self):
        return [loader(100)]


class NoVal(WithVal):
    def val_dataloader(self):
        return []


class Scaled(WithVal):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        assert dataloader_idx == 0
        return [batch[0] + 1]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] * 10]


class Several(Data):
    def val_dataloader(self):
        return [loader(), loader()]


class Named(Data):
    def train_dataloader(self):
        return {"a": loader(), "b": loader()}


class Nothing(Data):
    def train_dataloader(self):
        return None


class Broken(Data):
    def setup(self, stage):
        raise OSError("no such folder\nand more")


class Module(pl.LightningModule):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [-batch[0]]


@pytest.fixture
def opened(monkeypatch):
    """Open what is named in this file."""

    def opened(found, options=None, *, checkpoint=None, network=None):
        monkeypatch.setattr(data_module, "find_callable", lambda name: found)
        train, val = open_batches("my:data", options, checkpoint=checkpoint, network=network or nn.Identity())
        return [values(train), None if val is None else values(val)]

    return opened


def values(batches):
    return [(batch[0] if isinstance(batch, list | tuple) else batch).tolist() for batch in batches]


def test_a_data_module_is_prepared_and_set_up_as_by_a_trainer(opened):
    assert opened(WithVal) == [[[0, 1], [2, 3]], [[100, 101], [102, 103]]]
    assert opened(WithVal, {"start": 7})[0] == [[7, 8], [9, 10]]
    assert opened(Data)[1] is None, "Lightning's own val_dataloader is none"
    assert opened(NoVal)[1] is None


def test_batches_go_through_the_hooks_around_the_transfer(opened):
    assert opened(Scaled) == [[[10, 20], [30, 40]], [[1010, 1020], [1030, 1040]]]
    assert opened(WithVal, network=Module()) == [[[0, -1], [-2, -3]], [[-100, -101], [-102, -103]]]
    assert opened(Scaled, network=Module())[0] == [[10, 20], [30, 40]], "the data module's own come first"


def test_loaders_can_be_gone_through_again(opened, monkeypatch):
    monkeypatch.setattr(data_module, "find_callable", lambda name: WithVal)
    train, _ = open_batches("my:data", None, checkpoint=None, network=nn.Identity())
    assert values(train) == values(train) != []


def test_hyperparameters_come_from_the_checkpoint_unless_given(opened, tmp_path):
    path = str(tmp_path / "last.ckpt")
    torch.save({"state_dict": {}, "datamodule_hyper_parameters": {"start": 20, "number": 2}}, path)
    assert opened(WithVal, checkpoint=path)[0] == [[20, 21]]
    assert opened(WithVal, {"start": 30}, checkpoint=path)[0] == [[30, 31]]
    assert opened(lambda: loader(5, 2), checkpoint=path)[0] == [[5, 6]], "no data module has no such"
    torch.save({"state_dict": {}}, path)
    assert opened(WithVal, checkpoint=path)[0] == [[0, 1], [2, 3]]


def test_a_function_gives_batches_or_two_collections_of_them(opened):
    one, two = torch.tensor([1.0]), torch.tensor([2.0])
    assert opened(lambda: [one, two, one]) == [[[1], [2], [1]], None]
    assert opened(lambda: [one, two]) == [[[1], [2]], None]
    assert opened(lambda: (one, two)) == [[[1], [2]], None], "two batches"
    assert opened(lambda: ((one, two), (two, one))) == [[[1], [2]], None], "two pairs of input and target"
    assert opened(lambda: [[one, two], [two, one]]) == [[[1], [2]], None], "the same as lists"
    assert opened(lambda: ([one], [two])) == [[[1]], [[2]]]
    assert opened(lambda: (loader(), None)) == [[[0, 1], [2, 3]], None]
    assert opened(WithVal, {"start": 3})[0] == opened(lambda start: WithVal(start), {"start": 3})[0]


@pytest.mark.parametrize(
    ("found", "says"),
    [
        pytest.param(Several, "'my:data' has several val dataloaders", id="list"),
        pytest.param(Named, "'my:data' has several train dataloaders", id="dict"),
        pytest.param(Nothing, "'my:data' gives no batches: its train_dataloader() returned None.", id="none"),
        pytest.param(Broken, "'my:data' gives no batches: it fails with OSError: no such folder", id="fails"),
        pytest.param(lambda needed: None, "TypeError: .*needed", id="arguments"),
        pytest.param(lambda: 3, "'my:data' gave a int; expected", id="number"),
        pytest.param(types.SimpleNamespace(), "gave a SimpleNamespace", id="not-callable"),
    ],
)
def test_what_gives_no_batches_is_told_in_one_sentence(opened, found, says):
    with pytest.raises(BatchNormError, match=says.replace("(", r"\(").replace(")", r"\)")) as told:
        opened(found)
    assert "\n" not in str(told.value)
