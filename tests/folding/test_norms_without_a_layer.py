"""Batch norms that belong to no BatchNorm layer are not passed over in silence."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bn_lightning import plan_fold


class LooseNorm(nn.Module):
    """Statistics in a module that is no BatchNorm layer, or in none at all."""

    def __init__(self, owned):
        super().__init__()
        self.owned = owned
        if owned:
            self.register_buffer("running_mean", torch.zeros(4))
            self.register_buffer("running_var", torch.ones(4))

    def forward(self, x):
        if self.owned:
            return F.batch_norm(x, self.running_mean, self.running_var)
        return F.batch_norm(x, x.new_zeros(4), x.new_ones(4))


@pytest.mark.parametrize(("owned", "name"), [(True, "2"), (False, "2: batch_norm")], ids=["owned", "unowned"])
def test_a_batch_norm_without_a_layer_has_its_row(randomize, images, owned, name):
    net = randomize(nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), LooseNorm(owned)))
    rows = plan_fold(net, images).rows
    assert [(row.name, row.reason) for row in rows] == [("1", ""), (name, "functional")]


def test_a_scripted_batch_norm_has_its_row(randomize, images):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and all the same in many a deployed network
        child = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval())
    net = randomize(nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), child))
    assert [(row.name, row.reason) for row in plan_fold(net, images).rows] == [("1", ""), ("2.1", "opaque")]
