"""GroupNorm in BatchNorm's place: what stays, what goes, what is refused."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bn_lightning as bnl
from bn_lightning.errors import BatchNormError, ConversionError
from bn_lightning.layers import GhostBatchNorm

SHAPES = {nn.BatchNorm1d: (3, 6, 5), nn.BatchNorm2d: (3, 6, 4, 3), nn.BatchNorm3d: (2, 6, 2, 3, 2)}


def layer(kind=nn.BatchNorm2d, features=6, **settings):
    made = kind(features, eps=1e-2, **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in made.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return made


def x_of(shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 1


@pytest.mark.parametrize("kind", SHAPES, ids=lambda kind: kind.__name__)
def test_one_group_is_layer_norm_and_c_groups_are_instance_norm(kind):
    x, shape = x_of(SHAPES[kind]), SHAPES[kind]
    one, all_ = layer(kind), layer(kind)
    weight, bias = one.weight, one.bias
    bnl.convert_batch_norm(one, "group", num_groups=1)
    bnl.convert_batch_norm(all_, "group", num_groups=6)
    per_channel = (1, -1, *[1] * (len(shape) - 2))
    plain = F.layer_norm(x, shape[1:], eps=1e-2)
    torch.testing.assert_close(one(x), plain * weight.view(per_channel) + bias.view(per_channel))
    torch.testing.assert_close(all_(x), F.instance_norm(x, weight=weight, bias=bias, eps=1e-2))
    torch.testing.assert_close(all_.eval()(x), all_.train()(x))


def test_the_parameters_stay_and_the_statistics_go():
    made = layer()
    kept = (made.weight, made.bias)
    keys = list(made.state_dict())
    buffers = {key: id(value) for key, value in made.named_buffers()}
    report = bnl.convert_batch_norm(made, nn.GroupNorm, num_groups=3)
    assert type(made) is nn.GroupNorm
    assert (made.weight, made.bias) == kept
    assert list(made.state_dict()) == ["weight", "bias"]
    assert (made.num_groups, made.num_channels, made.eps, made.affine) == (3, 6, 1e-2, True)
    assert "GroupNorm(3, 6, eps=0.01, affine=True" in repr(made)
    assert report.rows[0].reason == "converted: its running statistics are gone, and the network needs training"
    nn.GroupNorm(3, 6).load_state_dict(made.state_dict())
    made.reset_parameters()
    report.undo()
    assert type(made) is nn.BatchNorm2d
    assert list(made.state_dict()) == keys
    assert {key: id(value) for key, value in made.named_buffers()} == buffers
    assert not hasattr(made, "num_groups")
    assert float(made.running_mean.detach()[0]) != 0


def test_undo_follows_the_model_to_another_dtype():
    made = layer()
    report = bnl.convert_batch_norm(made, "group", num_groups=3)
    made.double()
    report.undo()
    assert {tensor.dtype for tensor in made.state_dict().values()} == {torch.float64, torch.int64}
    assert made(x_of((3, 6, 4, 4)).double()).dtype == torch.float64


def test_there_is_no_other_way_back():
    made = layer()
    bnl.convert_batch_norm(made, "group", num_groups=3)
    for report in (bnl.convert_batch_norm(made, "ghost"), bnl.revert_batch_norm(made)):
        assert "only undo()" in report.rows[0].reason
        assert report.rows[0].reason.startswith("kept: ")
    assert "it is a GroupNorm of 3 groups" in bnl.convert_batch_norm(made, "group", num_groups=2).rows[0].reason


def test_channels_that_do_not_divide_and_a_shift_alone_are_kept():
    model = nn.Sequential(layer(features=6), layer(features=8), GhostBatchNorm(8, affine="shift"))
    report = bnl.convert_batch_norm(model, "group", num_groups=4)
    assert [row.reason for row in report.rows] == [
        "kept: 6 channels do not divide into 4 groups; num_groups=2 would fit",
        "converted: its running statistics are gone, and the network needs training",
        "kept: torch's group norm cannot go backward through a shift without a scale",
    ]


@pytest.mark.parametrize("affine", ["scale", False])
def test_from_a_variant_without_shift(affine):
    made = GhostBatchNorm(6, affine=affine, virtual_batch_size=2)
    bnl.convert_batch_norm(made, "group", num_groups=2)
    assert type(made) is nn.GroupNorm
    assert "virtual_batch_size" not in made.__dict__
    x = x_of((3, 6, 4)).requires_grad_()
    torch.testing.assert_close(made(x), F.group_norm(x, 2, made.weight, None))
    made(x).square().sum().backward()
    assert made.bias is None


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (4, 6, 1, 1), (1, 6, 1, 1, 1)], ids=str)
def test_groups_of_one_value_are_refused(shape):
    made = layer(nn.BatchNorm1d)
    report = bnl.convert_batch_norm(made, "group", num_groups=6)
    assert report.rows[0].reason.endswith("it is instance norm, and refuses (N, C) inputs")
    for same in (
        made,
        copy.deepcopy(made),
        pickle.loads(pickle.dumps(made)),
        bnl.batch_norm_layer("group", num_groups=6)(6),
    ):
        with pytest.raises(BatchNormError, match=r"groups of one value in an input of shape \(.*Use fewer groups"):
            same(x_of(shape))
        assert same(x_of((2, 6, 3))).shape == (2, 6, 3)
        assert same(x_of((0, 6, 3))).shape == (0, 6, 3)
    report.undo()
    assert not made._forward_pre_hooks
    assert layer(nn.BatchNorm1d)(x_of((4, 6))).shape == (4, 6)


def test_larger_groups_take_flat_inputs():
    made = layer(nn.BatchNorm1d)
    bnl.convert_batch_norm(made, "group", num_groups=3)
    assert made(x_of((4, 6))).isfinite().all()


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "all"], ids=repr)
def test_num_groups_is_checked(value):
    with pytest.raises(ConversionError, match="num_groups counts the groups of channels"):
        bnl.convert_batch_norm(layer(), "group", num_groups=value)


def test_the_constructor_refuses_channels_that_do_not_divide():
    build = bnl.batch_norm_layer("group", num_groups=4)
    with pytest.raises(ConversionError, match="6 channels do not divide into 4 groups"):
        build(6)
    assert build(8, affine=False).weight is None
    assert build(8, bias=False).bias is None


@given(
    groups=st.integers(1, 4),
    size=st.integers(1, 3),
    batch=st.integers(1, 4),
    space=st.lists(st.integers(1, 4), max_size=3),
    affine=st.sampled_from([True, "scale", False]),
)
@settings(deadline=None, max_examples=30, derandomize=True)
def test_any_groups_of_any_shape_equal_torchs(groups, size, batch, space, affine):
    features = groups * size
    made = GhostBatchNorm(features, affine=affine)
    bnl.convert_batch_norm(made, "group", num_groups=groups)
    x = x_of((batch, features, *space))
    if x.numel() == batch * groups:
        if size == 1:
            with pytest.raises(BatchNormError, match="groups of one value"):
                made(x)
        return
    grouped = x.double().reshape(batch, groups, -1)
    mean, var = grouped.mean(-1, keepdim=True), grouped.var(-1, correction=0, keepdim=True)
    expected = ((grouped - mean) / (var + 1e-5).sqrt()).reshape(x.shape)
    torch.testing.assert_close(made(x).double(), expected, rtol=1e-3, atol=1e-4)
