"""ChannelAffine: scale and shift of each channel, and standing in for a BN in evaluation."""

import pytest
import torch
from torch import nn

from bn_lightning.errors import BatchNormError
from bn_lightning.functional import eval_affine
from bn_lightning.layers.channel_affine import ChannelAffine

KINDS = [(True, True), (True, False), (False, True), (False, False)]
SHAPES = [(6, 3), (4, 3, 5), (4, 3, 5, 2), (2, 3, 2, 3, 2)]


def build(scale=True, shift=True, dtype=torch.float64):
    layer, generator = ChannelAffine(3, scale, shift, dtype=dtype), torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=generator)
    return layer


def batch(shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("scale", "shift"), KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_channel_has_its_own(shape, scale, shift):
    layer, x = build(scale, shift), batch(shape)
    y = layer(x)
    for c in range(3):
        expected = x[:, c] * (layer.scale[c] if scale else 1) + (layer.shift[c] if shift else 0)
        torch.testing.assert_close(y[:, c], expected)
    assert sorted(layer.state_dict()) == [name for name, there in (("scale", scale), ("shift", shift)) if there]
    assert (layer.scale is None, layer.shift is None) == (not scale, not shift)


def test_gradients():
    layer, x = build(), batch((4, 3, 2)).requires_grad_()

    def call(x, scale, shift):
        return torch.func.functional_call(layer, {"scale": scale, "shift": shift}, (x,))

    assert torch.autograd.gradcheck(call, (x, layer.scale, layer.shift))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_stands_in_for_a_batch_norm(dtype):
    bn, x = nn.BatchNorm2d(3).eval(), batch((4, 3, 5, 2), dtype).to(memory_format=torch.channels_last)
    for tensor in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
        nn.init.uniform_(tensor, 0.5, 2.0, generator=torch.Generator().manual_seed(0))
    layer = ChannelAffine(3)
    scale, shift = eval_affine(bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
    layer.load_state_dict({"scale": scale.detach(), "shift": shift.detach()})
    y = layer(x)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, bn(x))


def test_starts_as_the_identity_and_resets_to_it():
    layer, x = build(dtype=torch.float32), batch((4, 3), torch.float32)
    assert not torch.equal(layer(x), x)
    layer.reset_parameters()
    assert torch.equal(layer(x), x)
    assert repr(layer) == "ChannelAffine(3, scale=True, shift=True)"


@pytest.mark.parametrize("shape", [(3,), (4, 2), (4, 5, 3)], ids=str)
def test_another_shape_is_refused(shape):
    with pytest.raises(BatchNormError, match=r"ChannelAffine\(3\) takes \(N, 3, \*\), got shape \("):
        build()(torch.ones(shape))


def test_exports_and_compiles_whole():
    layer, x = build(dtype=torch.float32), batch((4, 3, 5, 2), torch.float32)
    dynamic = {0: torch.export.Dim("n"), 2: torch.export.Dim("h")}
    exported = torch.export.export(layer, (x,), dynamic_shapes=(dynamic,)).module()
    other = batch((6, 3, 7, 2), torch.float32)
    torch.testing.assert_close(exported(other), layer(other))
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
