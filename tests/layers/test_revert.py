"""Variants become plain layers again, also later and without the report."""

import copy
import io
import pickle

import pytest
import torch
from batch_normed import images, kinds, net
from torch import nn

import bn_lightning as bnl
from bn_lightning.errors import ConversionError
from bn_lightning.layers import GhostBatchNorm
from bn_lightning.layers.registry import VARIANTS

NAMES = sorted(VARIANTS)


@pytest.mark.parametrize("name", NAMES)
def test_revert_needs_no_report_and_survives_copies_and_files(name):
    model = net()
    expected = kinds(model)
    bnl.convert_batch_norm(model, "ghost")
    bnl.convert_batch_norm(model, name)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        report = bnl.revert_batch_norm(same)
        assert kinds(same) == expected
        assert [row.after for row in report.rows] == ["BatchNorm2d", "BatchNorm2d", "BatchNorm1d"]
        assert sorted(same.bn.__dict__) == sorted(net().bn.__dict__)
        net().load_state_dict(same.state_dict())
        assert torch.equal(same.eval()(images()), net().eval()(images()))
        assert all(row.reason.startswith("already plain") for row in bnl.revert_batch_norm(same).rows)


def test_revert_of_what_was_built_as_a_variant():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), GhostBatchNorm(4), nn.BatchNorm2d(4))
    report = bnl.revert_batch_norm(model)
    assert [row.reason for row in report.rows] == [
        "kept: it was built as GhostBatchNorm; say with plain_class= what it is to become",
        "already plain",
    ]
    report = bnl.revert_batch_norm(model, plain_class=nn.SyncBatchNorm, exclude=["2"])
    assert type(model[1]) is nn.SyncBatchNorm
    assert model[1].process_group is None
    assert model.eval()(images()).shape == (6, 4, 8, 8)
    assert report.rows[1].reason == "excluded by pattern"
    report.undo()
    assert type(model[1]) is GhostBatchNorm
    assert model[1].virtual_batch_size == 32
    assert "process_group" not in model[1].__dict__
    with pytest.raises(ConversionError, match="plain_class= takes a plain BatchNorm"):
        bnl.revert_batch_norm(model, plain_class=GhostBatchNorm)


def test_revert_says_that_frozen_parameters_stay_frozen():
    model = net()
    bnl.convert_batch_norm(model, "frozen", trainable=False)
    report = bnl.revert_batch_norm(model)
    assert report.rows[1].reason == "converted: scale and shift are not trainable"


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_lightnings_substitute_and_sync_batch_norm(package):
    layer_sync = pytest.importorskip(f"{package}.plugins.layer_sync")
    plugin, model = layer_sync.TorchSyncBatchNorm(), net().block  # the plugin tears shared layers apart
    model = plugin.apply(model)
    report = bnl.convert_batch_norm(model, "ghost")
    assert kinds(model) == [GhostBatchNorm]
    assert "converted: batch statistics are each process's own from now on" in report.rows[0].reason
    bnl.revert_batch_norm(model)
    assert kinds(model) == [nn.SyncBatchNorm]
    model = plugin.revert(model)
    bnl.convert_batch_norm(model, "ghost", virtual_batch_size=2)
    assert kinds(model) == [GhostBatchNorm]
    model(torch.randn(4, 8, 3, 3))
    bnl.revert_batch_norm(model)
    assert kinds(model) == [layer_sync._BatchNormXd]


def test_domains_are_not_lost_by_another_conversion():
    model = net()
    bnl.convert_batch_norm(model, "domain", num_domains=3)
    for name in ("ghost", "group"):
        report = bnl.convert_batch_norm(model, name)
        assert all("the statistics of its domains would be lost" in row.reason for row in report.rows)
    report = bnl.revert_batch_norm(model)
    assert report.rows[0].reason == "converted: domain 0 of 3 (also registered as again)"
    net().load_state_dict(model.state_dict())
