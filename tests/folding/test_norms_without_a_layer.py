"""Batch norms that belong to no BatchNorm layer are not passed over in silence."""

import warnings

import torch
import torch.nn.functional as F
from torch import nn

from bn_lightning import fold_batch_norm, plan_fold


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


def test_a_batch_norm_without_a_layer_has_its_row(randomize, images):
    net = randomize(nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), LooseNorm(owned=False)))
    rows = plan_fold(net, images).rows
    assert [(row.name, row.reason) for row in rows] == [("1", ""), ("2: batch_norm", "functional")]


def test_a_module_that_holds_its_statistics_is_a_batch_norm(randomize, images):
    net = randomize(nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), LooseNorm(owned=True)))
    net[2].running_mean.fill_(0.5)
    with torch.no_grad():
        expected = net(images)
        assert [row.action for row in fold_batch_norm(net, images).report.rows] == ["folded-backward"] * 2
        torch.testing.assert_close(net(images), expected)


def test_one_without_a_weight_takes_nothing_up(randomize, images):
    net = randomize(nn.Sequential(nn.ReLU(), LooseNorm(owned=True), nn.Identity(), nn.BatchNorm2d(4), nn.Tanh()))
    rows = {row.name: row for row in plan_fold(net, images[:, :4]).rows}
    assert rows["3"].reason == "subclass"
    assert "LooseNorm '1' has no weight to fold into" in rows["3"].detail


class StandardizedConv(nn.Conv2d):
    """Weight standardization as timm has it."""

    def forward(self, x):
        weight = F.batch_norm(self.weight.reshape(1, 4, -1), None, None, training=True, momentum=0.0)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias)


def test_a_standardized_weight_is_no_batch_norm_of_the_network(randomize, images):
    (row,) = plan_fold(randomize(nn.Sequential(StandardizedConv(6, 4, 3), nn.BatchNorm2d(4))), images).rows
    assert (row.name, row.reason) == ("1", "parametrized")


def test_a_scripted_batch_norm_has_its_row(randomize, images):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and all the same in many a deployed network
        child = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval())
    net = randomize(nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), child))
    assert [(row.name, row.reason) for row in plan_fold(net, images).rows] == [("1", ""), ("2.1", "opaque")]
