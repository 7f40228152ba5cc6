import pytest
import torch
from torch import nn

from bn_lightning.functional import eval_affine, fold_conv_weights, fold_linear_weights


def random_bn(cls, channels, *, affine=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    bn = cls(channels, affine=affine, dtype=torch.float64).eval()
    bn.running_mean.copy_(torch.randn(channels, generator=generator))
    bn.running_var.copy_(torch.rand(channels, generator=generator) + 0.1)
    if affine:
        nn.init.uniform_(bn.weight, -2, 2, generator=generator)
        nn.init.uniform_(bn.bias, -2, 2, generator=generator)
    return bn


def affine_of(bn):
    return eval_affine(bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)


CONVS = [
    pytest.param(nn.Conv1d, nn.BatchNorm1d, (6, 8, 3), {}, id="conv1d"),
    pytest.param(nn.Conv2d, nn.BatchNorm2d, (6, 8, 3), {"padding": 1}, id="padded"),
    pytest.param(nn.Conv2d, nn.BatchNorm2d, (6, 9, 3), {"groups": 3, "stride": 2}, id="grouped"),
    pytest.param(nn.Conv2d, nn.BatchNorm2d, (6, 12, 3), {"groups": 6}, id="depthwise"),
    pytest.param(nn.Conv3d, nn.BatchNorm3d, (6, 8, 2), {}, id="conv3d"),
    pytest.param(nn.ConvTranspose1d, nn.BatchNorm1d, (6, 8, 3), {}, id="deconv1d"),
    pytest.param(nn.ConvTranspose2d, nn.BatchNorm2d, (6, 6, 3), {"stride": 2}, id="deconv-square"),
    pytest.param(nn.ConvTranspose2d, nn.BatchNorm2d, (6, 9, 3), {"groups": 3}, id="deconv-grouped"),
    pytest.param(nn.ConvTranspose2d, nn.BatchNorm2d, (6, 6, 2), {"groups": 6}, id="deconv-depthwise"),
    pytest.param(nn.ConvTranspose3d, nn.BatchNorm3d, (6, 4, 2), {"groups": 2}, id="deconv3d"),
]


@pytest.mark.parametrize(("conv_cls", "bn_cls", "sizes", "options"), CONVS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_conv_folds_to_what_conv_and_bn_compute(conv_cls, bn_cls, sizes, options, bias, affine):
    torch.manual_seed(1)
    conv = conv_cls(*sizes, bias=bias, dtype=torch.float64, **options)
    bn = random_bn(bn_cls, sizes[1], affine=affine)
    x = torch.randn(2, sizes[0], *[7] * (conv.weight.dim() - 2), dtype=torch.float64)
    expected = bn(conv(x))
    weight, new_bias = fold_conv_weights(
        conv.weight, conv.bias, *affine_of(bn), groups=conv.groups, transposed=conv.transposed
    )
    conv.weight = nn.Parameter(weight)
    conv.bias = nn.Parameter(new_bias)
    torch.testing.assert_close(conv(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_linear_folds_to_what_linear_and_bn_compute(bias):
    torch.manual_seed(1)
    linear, bn = nn.Linear(5, 5, bias=bias, dtype=torch.float64), random_bn(nn.BatchNorm1d, 5)
    x = torch.randn(4, 5, dtype=torch.float64)
    expected = bn(linear(x))
    weight, new_bias = fold_linear_weights(linear.weight, linear.bias, *affine_of(bn))
    torch.testing.assert_close(nn.functional.linear(x, weight, new_bias), expected, rtol=1e-12, atol=1e-12)


def test_scale_or_shift_alone():
    bn = random_bn(nn.BatchNorm1d, 4)
    x = torch.randn(3, 4, dtype=torch.float64)
    for weight, bias in ((bn.weight, None), (None, bn.bias)):
        scale, shift = eval_affine(bn.running_mean, bn.running_var, bn.eps, weight, bias)
        expected = nn.functional.batch_norm(x, bn.running_mean, bn.running_var, weight, bias, eps=bn.eps)
        torch.testing.assert_close(scale * x + shift, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_arithmetic_is_wide_and_cast_once(dtype):
    conv = nn.Conv2d(4, 4, 3).to(dtype=dtype, memory_format=torch.channels_last)
    scale, shift = affine_of(random_bn(nn.BatchNorm2d, 4))
    weight, bias = fold_conv_weights(conv.weight, conv.bias, scale, shift)
    assert weight.dtype == bias.dtype == dtype
    assert torch.equal(weight, (conv.weight.double() * scale.view(-1, 1, 1, 1)).to(dtype))
    assert torch.equal(bias, (conv.bias.double() * scale + shift).to(dtype))
    assert weight.stride() == conv.weight.stride()
