"""Constructors for networks that take a norm_layer."""

import pickle

import pytest
import torch
from batch_normed import images, layers
from torch import nn

import bn_lightning as bnl
from bn_lightning.errors import ConversionError
from bn_lightning.layers import GhostBatchNorm
from bn_lightning.layers.registry import VARIANTS

NAMES = sorted(VARIANTS)


class Mine(GhostBatchNorm):
    pass


@pytest.mark.parametrize("variant", [*NAMES, "group", Mine], ids=str)
def test_a_constructor_for_networks_that_take_one(variant):
    options = {"num_groups": 2} if variant == "group" else {}
    build = pickle.loads(pickle.dumps(bnl.batch_norm_layer(variant, **options)))
    layer = build(4, 1e-3, 0.2, True, True, dtype=torch.float64)
    expected = Mine if variant is Mine else VARIANTS.get(variant, nn.GroupNorm)
    assert type(layer) is expected
    assert layer.eps == 1e-3
    assert layer.weight.dtype == torch.float64
    with pytest.raises(ConversionError, match="has no option 'nothing'"):
        bnl.batch_norm_layer(variant, nothing=1)


def test_the_constructor_in_torchvision():
    models = pytest.importorskip("torchvision.models")
    for build in (models.resnet18, models.mobilenet_v3_small):
        model = build(norm_layer=bnl.batch_norm_layer("ghost", virtual_batch_size=2))
        assert {type(layer).__name__ for layer in layers(model)} == {"GhostBatchNorm"}
        build().load_state_dict(model.state_dict())
        assert model(images(4).repeat(1, 1, 8, 8)).isfinite().all()
    assert {layer.num_groups for layer in layers(models.resnet18(norm_layer=bnl.batch_norm_layer("group")))} == {32}
