"""Every knob by what it builds, and by what runs in which order."""

import pytest
import torch
from torch import nn

from bn_lightning.errors import BatchNormError
from bn_lightning.layers.registry import VARIANTS
from bn_lightning.networks.activations import ACTIVATIONS, Maxout, build_activation
from bn_lightning.networks.layer_builder import LayerBuilder

NORMS = ["batch", *VARIANTS, "group"]


def options_of(norm):
    return {"group": {"num_groups": 2}, "ghost": {"virtual_batch_size": 2}}.get(norm)


def calls_of(module, x):
    """Name the modules without children in the order in which they run."""
    seen = []
    hooks = [
        child.register_forward_hook(lambda *_, name=name: seen.append(name))
        for name, child in module.named_modules()
        if not list(child.children())
    ]
    module(x)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize(
    ("knobs", "order"),
    [
        pytest.param({}, ["norm", "activation"], id="before"),
        pytest.param({"norm_place": "after"}, ["activation", "norm"], id="after"),
        pytest.param({"norm": None}, ["activation"], id="no norm"),
        pytest.param({"activation": "none"}, ["norm"], id="no activation"),
        pytest.param({"norm": None, "activation": "none"}, [], id="neither"),
        pytest.param({"norm_place": "after", "activation": "maxout"}, ["activation", "norm"], id="maxout"),
    ],
)
def test_the_order_of_calls_and_who_has_a_bias(kind, knobs, order):
    build = LayerBuilder(**knobs)
    block = build.linear_block(3, 4) if kind == "linear" else build.conv_block(3, 4)
    x = torch.randn(5, 3) if kind == "linear" else torch.randn(5, 3, 6, 6)
    assert calls_of(block, x) == [kind, *order]
    assert (block[0].bias is None) == (order[:1] == ["norm"]), "a bias right before a norm does nothing"
    assert block(x).shape == (5, 4, *x.shape[2:])


def test_dropout_is_last_of_a_linear_block():
    block = LayerBuilder(dropout=0.25).linear_block(3, 4)
    assert calls_of(block, torch.randn(5, 3)) == ["linear", "norm", "activation", "dropout"]
    assert block.dropout.p == 0.25


def test_without_a_bias_there_is_none_anywhere():
    build = LayerBuilder(norm=None, bias=False)
    layers = [build.linear_block(3, 4), build.conv_block(3, 4), build.head(3, 4)]
    assert [name for layer in layers for name, _ in layer.named_parameters() if "bias" in name] == []


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("affine", [True, "scale", "shift", False])
def test_scale_and_shift(norm, affine):
    knobs = {"norm": norm, "norm_options": options_of(norm), "affine": affine}
    if (norm, affine) == ("group", "shift"):
        with pytest.raises(BatchNormError, match="shift without a scale"):
            LayerBuilder(**knobs)
        return
    block = LayerBuilder(**knobs).linear_block(3, 4)
    learned = {True: {"weight", "bias"}, "scale": {"weight"}, "shift": {"bias"}, False: set()}[affine]
    found = {name for name, parameter in block.norm.named_parameters() if parameter is not None}
    assert {name for name in found if "." not in name and "_" not in name} == learned
    assert bool(found) == bool(learned)
    x = torch.randn(8, 3)
    for mode in (True, False):
        block.train(mode)(x).sum().backward()
    for parameter in block.parameters():
        assert parameter.grad is not None


@pytest.mark.parametrize("norm", NORMS)
def test_the_class_of_a_norm_and_its_options(norm):
    own = {} if norm == "group" else {"momentum": 0.25}
    knobs = {"norm": norm, "norm_options": {**(options_of(norm) or {}), "eps": 1e-3, **own}}
    build = LayerBuilder(**knobs)
    flat, image = build.linear_block(3, 4).norm, build.conv_block(3, 4).norm
    expected = {"batch": (nn.BatchNorm1d, nn.BatchNorm2d), "group": (nn.GroupNorm, nn.GroupNorm)}
    assert (type(flat), type(image)) == expected.get(norm, (VARIANTS.get(norm),) * 2)
    for layer in (flat, image):
        assert layer.eps == 1e-3
        assert layer.momentum == 0.25 if own else layer.num_groups == 2
    if norm == "ghost":
        assert flat.virtual_batch_size == 2


FORMULAS = {
    "relu": lambda x: x.clamp(min=0),
    "prelu": lambda x: torch.where(x > 0, x, 0.25 * x),
    "elu": lambda x: torch.where(x > 0, x, x.exp() - 1),
    "maxout": lambda x: torch.stack([torch.maximum(x[:, 0], x[:, 1]), torch.maximum(x[:, 2], x[:, 3])], 1),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "tanh": lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
    "none": lambda x: x,
    "rrelu": lambda x: torch.where(x > 0, x, 11 / 48 * x),  # evaluation: the mean of 1/8 and 1/3
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_against_their_formulas(name):
    x = torch.randn(7, 4, 3, generator=torch.Generator().manual_seed(0))
    layer = build_activation(name, 4).eval()
    torch.testing.assert_close(layer(x.clone()), FORMULAS[name](x))
    given = x.clone()
    build_activation(name, 4, inplace=False)(given)
    assert torch.equal(given, x)


def test_prelu_has_a_slope_a_channel_and_maxout_twice_the_width():
    build = LayerBuilder(activation="maxout")
    block = build.conv_block(3, 4)
    assert (block.conv.out_channels, block.norm.num_features) == (8, 8)
    assert LayerBuilder(activation="maxout", norm_place="after").conv_block(3, 4).norm.num_features == 4
    assert LayerBuilder(activation="prelu").conv_block(3, 4).activation.weight.shape == (4,)
    x = torch.randn(2, 6, 4, 4)
    for channel, largest in enumerate(Maxout(3)(x).unbind(1)):
        assert torch.equal(largest, x[:, 3 * channel : 3 * channel + 3].max(1).values)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"norm": "gost"}, r"no norm='gost' \(did you mean 'ghost'\?\); there are 'batch', .*'group', None"),
        ({"norm_place": "behind"}, "no norm_place='behind'.*'before', 'after'"),
        ({"affine": "bias"}, "no affine='bias'; there are True, False, 'scale', 'shift'"),
        ({"activation": "rely"}, "no activation is called 'rely' .*did you mean 'relu'"),
        ({"init": "glorott"}, "did you mean 'glorot'.*lsuv_"),
        ({"init": "lsuv"}, r"needs data.*init='orthogonal', then call bn_lightning.networks.lsuv_\(network, images\)"),
        ({"dropout": 1.0}, "0 ≤ dropout < 1, got 1.0"),
        ({"norm": None, "norm_options": {"eps": 1.0}}, "are for a norm="),
        ({"norm_options": {"virtual_batch_size": 4}}, "norm='batch' has no option 'virtual_batch_size'"),
        ({"norm": "ghost", "norm_options": {"virtual_batchsize": 4}}, "did you mean 'virtual_batch_size'"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_named(knobs, message):
    with pytest.raises(BatchNormError, match=message):
        LayerBuilder(**knobs)
