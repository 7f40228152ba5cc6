"""Decay groups against a list made by hand: every weight of a layer that is no norm, and nothing else."""

import pytest
import timm
import torch
from torch import nn

from bn_lightning.layers import convert_batch_norm
from bn_lightning.modules import decay_groups
from bn_lightning.networks import ResidualNetwork


class Kinds(nn.Module):
    """Norms whose parameters have one axis and several, a shared layer, a bare scalar and a table."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norms = nn.ModuleList(
            [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm([4, 2, 2]), nn.RMSNorm([4, 2]), nn.InstanceNorm2d(4)]
        )
        self.head = nn.Linear(4, 2)
        self.shared = self.head
        self.scale = nn.Parameter(torch.ones(()))
        self.table = nn.Parameter(torch.ones(3, 2))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def domains():
    network = ResidualNetwork(widths=(4,), blocks=1)
    convert_batch_norm(network, "domain", num_domains=2)
    return network


@pytest.mark.parametrize(
    ("network", "decayed"),
    [
        pytest.param(Kinds, {"conv.weight", "head.weight", "table"}, id="every kind of norm"),
        pytest.param(
            domains,
            {"stem.0.weight", "stages.0.0.conv1.weight", "stages.0.0.conv2.weight", "head.weight"},
            id="a row a domain",
        ),
    ],
)
def test_against_a_list(network, decayed):
    network = network()
    names = {id(parameter): name for name, parameter in network.named_parameters() if parameter.requires_grad}
    weights, others = decay_groups(network, 0.3)
    assert (weights["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert [names[id(parameter)] for parameter in weights["params"]] == [n for n in names.values() if n in decayed]
    assert [names[id(parameter)] for parameter in others["params"]] == [n for n in names.values() if n not in decayed]


def test_of_a_zoo_network_convolutions_and_linear_layers_decay():
    network = timm.create_model("test_efficientnet", num_classes=4)
    expected = [m.weight for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    weights, others = decay_groups(network, 0.1)
    assert set(map(id, weights["params"])) == set(map(id, expected))
    assert len(weights["params"]) + len(others["params"]) == len(list(network.parameters()))


def test_without_decay_there_is_none():
    assert [group["weight_decay"] for group in decay_groups(nn.Linear(2, 2), 0.0)] == [0.0, 0.0]
