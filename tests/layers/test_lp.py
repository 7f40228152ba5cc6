import copy
import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bn_lightning.errors import BatchNormError, ConversionError
from bn_lightning.functional.lp import lp_statistics
from bn_lightning.layers import LpBatchNorm

KINDS = pytest.mark.parametrize(
    ("p", "centered"),
    [(p, centered) for p in (1, 2, math.inf) for centered in (False, True)],
    ids=lambda v: {True: "centered", False: "uncentered"}[v] if isinstance(v, bool) else f"p={v:g}",
)


def randomized(layer):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (layer.running_mean, layer.weight, layer.bias):
            if tensor is not None:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
        if layer.running_var is not None:
            layer.running_var.copy_(torch.rand(layer.num_features, generator=generator) + 0.5)
    return layer


def numpy(tensor):
    return None if tensor is None else tensor.detach().double().numpy().copy()


def random(shape, dtype=torch.float64, seed=1):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1).to(dtype)


def written_out(x, p, centered, weight, bias, eps=1e-5):
    """The definition in tensor operations, for autograd to differentiate."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    mean = x.mean(axes, keepdim=True)
    magnitudes = (x - mean if centered else x).abs()
    last = p == math.inf
    s = magnitudes.amax(axes, keepdim=True) if last else (magnitudes**p).mean(axes, keepdim=True) ** (1 / p)
    return (x - mean) / (s**2 + eps).sqrt() * weight.view(mean.shape) + bias.view(mean.shape)


def gradients(f, x, weight, bias):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, weight, bias)]
    return torch.autograd.grad(f(*leaves), leaves, random(x.shape, seed=4))


@KINDS
@settings(deadline=None, max_examples=15, derandomize=True)
@given(
    examples=st.integers(2, 9),
    spatial=st.sampled_from([(), (5,), (3, 4), (2, 3, 2)]),
    affine=st.sampled_from([True, "scale", "shift", False]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_output_buffers_and_evaluation(p, centered, examples, spatial, affine, dtype):
    options = {"affine": affine, "dtype": torch.promote_types(dtype, torch.float32)}
    layer = randomized(LpBatchNorm(3, p=p, centered=centered, **options))
    x = random((examples, 3, *spatial), dtype)
    expected = reference.lp_batch_norm(numpy(x), p, centered, numpy(layer.weight), numpy(layer.bias))
    moved = [
        reference.moved(numpy(buffer), batch, 0.1)
        for buffer, batch in ((layer.running_mean, expected.mean), (layer.running_var, expected.var))
    ]
    y = layer(x)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    assert y.dtype == dtype
    np.testing.assert_allclose(numpy(y), expected.y, rtol=tolerance, atol=tolerance)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5  # the buffers are wide
    np.testing.assert_allclose(numpy(layer.running_mean), moved[0], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(numpy(layer.running_var), moved[1], rtol=tolerance, atol=tolerance)
    assert layer.num_batches_tracked == 1
    layer.eval()
    if dtype == torch.float64:
        stats = (numpy(t) for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias))
        np.testing.assert_allclose(numpy(layer(x)), reference.standardize(numpy(x), *stats, 1e-5), rtol=1e-9)


@KINDS
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("spatial", [(), (5,), (3, 2), (8, 9)], ids=str)
def test_gradients(p, centered, spatial, channels_last):
    layer = randomized(LpBatchNorm(2, p=p, centered=centered, dtype=torch.float64))
    x = random((5, 2, *spatial))
    if channels_last and len(spatial) == 2:
        x = x.to(memory_format=torch.channels_last)

    def run(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    leaves = [tensor.detach().requires_grad_() for tensor in (x, layer.weight, layer.bias)]
    assert torch.autograd.gradcheck(run, leaves)
    for ours, theirs in zip(
        gradients(run, x, layer.weight, layer.bias),
        gradients(lambda x, *affine: written_out(x, p, centered, *affine), x, layer.weight, layer.bias),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param([3.0, 1.0, 3.0, -2.0], id="the top twice"),
        pytest.param([3.0, -3.0, 1.0, -3.0], id="top and bottom"),
        pytest.param([2.0, -1.0, -1.0, 0.0], id="the bottom, were it not for the top"),
        pytest.param([-4.0, -4.0, -4.0, -4.0], id="constant"),
        pytest.param([4.0, 4.0, 4.0, 4.0], id="constant and positive"),
        pytest.param([0.0, 0.0, 0.0, 0.0], id="nothing but zeros"),
    ],
)
@pytest.mark.parametrize(
    ("p", "centered"), [(1, False), (1, True), (2, False), (math.inf, False), (math.inf, True)], ids=str
)
def test_ties_share_the_gradient_and_zeros_have_none(values, p, centered):
    x = torch.tensor(values, dtype=torch.float64)[:, None].requires_grad_()
    for ours in (0, 1):
        mean = x.mean(0)
        magnitudes = (x - mean if centered else x).abs()
        s = magnitudes.amax(0) if p == math.inf else magnitudes.mean(0)
        theirs = (mean, magnitudes.square().mean(0) if p == 2 else s.square())[ours]
        (expected,) = torch.autograd.grad(theirs.sum(), x)
        (grad,) = torch.autograd.grad(lp_statistics(x, p, centered=centered)[ours].sum(), x)
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("centered", [False, True], ids=["uncentered", "centered"])
@pytest.mark.parametrize("p", [1, math.inf], ids="p={}".format)
def test_second_derivatives_of_the_statistics(p, centered):
    x = random((4, 3, 5)).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: lp_statistics(x, p, centered=centered), (x,))


def test_centered_p2_is_batch_norm():
    layer, plain = randomized(LpBatchNorm(3, p=2, centered=True)), randomized(nn.BatchNorm1d(3))
    x = random((6, 3, 7), torch.float32)
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=0)
    torch.testing.assert_close(layer.state_dict(), plain.state_dict(), rtol=0, atol=0)
    mean, square = lp_statistics(x, 2, centered=True)
    torch.testing.assert_close(mean, x.mean((0, 2)))
    torch.testing.assert_close(square, x.var((0, 2), correction=0))


@KINDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_measured_in_float32(p, centered, dtype):
    x = torch.full((64, 1, 64), 300.0, dtype=dtype)  # squares and sums overflow in float16
    x[:, :, ::2] = -300.0
    mean, square = lp_statistics(x.requires_grad_(), p, centered=centered)
    assert mean.dtype == square.dtype == torch.float32
    assert mean.item() == 0
    np.testing.assert_allclose(square.item(), numpy(x).max() ** 2, rtol=1e-6)
    (grad,) = torch.autograd.grad(square, x)
    assert grad.dtype == dtype
    # Of the squares' sum that is even in all values; what is left is rounding.
    np.testing.assert_allclose(numpy(grad), 2 * numpy(x) / x.numel(), rtol=1e-2)


@KINDS
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_at_a_large_mean(p, centered, memory_format):
    x = torch.randn(64, 3, 24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.1 + 1e4
    x = x.float().to(memory_format=memory_format)
    if p == 2 and centered:
        x = x.contiguous()  # torch's own kernel adds in float32 along the channels
    mean, square = lp_statistics(x, p, centered=centered)
    expected = reference.lp_batch_norm(numpy(x), p, centered)
    np.testing.assert_allclose(numpy(mean), expected.mean, rtol=3e-7)  # 1e4 comes in steps of 1e-7
    # Such a step is a hundredth of the standard deviation.
    np.testing.assert_allclose(numpy(square), expected.var, rtol=1e-2 if centered else 1e-6)


@pytest.mark.parametrize(
    ("given", "kept"),
    [(1, 1), (2, 2), (1.0, 1), (2.0, 2), (math.inf, math.inf), ("inf", math.inf)],
    ids=repr,
)
def test_p_as_python_yaml_and_a_command_line_say_it(given, kept):
    layer = LpBatchNorm(3, p=given)
    assert layer.options() == {"p": kept, "centered": False}
    assert LpBatchNorm(3, **layer.options()).options() == layer.options()
    assert f"p={float(kept)}, centered=False" in repr(layer)


@pytest.mark.parametrize("p", [0, 3, -1, math.nan, "2", "max", None, [1]], ids=repr)
def test_other_norms_are_refused(p):
    with pytest.raises(ConversionError, match="p has to be 1, 2 or infinity"):
        LpBatchNorm(3, p=p)


@KINDS
def test_without_running_statistics_evaluation_takes_the_batchs_in_the_same_norm(p, centered):
    layer = LpBatchNorm(3, p=p, centered=centered, track_running_stats=False)
    x = random((4, 3, 5), torch.float32)
    torch.testing.assert_close(layer(x), layer.eval()(x), rtol=0, atol=0)
    with pytest.raises(BatchNormError, match="more than one value"):
        layer(x[:1, :, 0])


@KINDS
def test_an_empty_batch_moves_nothing(p, centered):
    layer = randomized(LpBatchNorm(3, p=p, centered=centered))
    before = layer.running_mean.clone(), layer.running_var.clone()
    assert layer(torch.zeros(0, 3, 4)).shape == (0, 3, 4)
    assert torch.equal(layer.running_mean, before[0])
    assert torch.equal(layer.running_var, before[1])


@KINDS
def test_paused_statistics_stay(p, centered):
    layer = randomized(LpBatchNorm(3, p=p, centered=centered))
    layer.track_running_stats = False
    before = copy.deepcopy(layer.state_dict())
    layer(random((4, 3, 5), torch.float32))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # dynamo's own doing
@KINDS
def test_compiles_into_one_graph(p, centered):
    torch._dynamo.reset()
    layer = randomized(LpBatchNorm(3, p=p, centered=centered, dtype=torch.float64))
    twin, x = copy.deepcopy(layer), random((4, 3, 5))
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    affine = (layer.weight, layer.bias)
    for ours, theirs in zip(
        gradients(lambda x, *_: compiled(x) + 0 * sum(a.sum() for a in _), x, *affine),
        gradients(lambda x, *_: layer(x) + 0 * sum(a.sum() for a in _), x, *affine),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(twin.state_dict(), layer.state_dict())


@KINDS
def test_only_the_input_is_kept_for_the_backward_pass(p, centered):
    layer, x = randomized(LpBatchNorm(3, p=p, centered=centered)), random((8, 3, 50), torch.float32).requires_grad_()
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert [tensor.data_ptr() for tensor in kept.values() if tensor.numel() > 6] == [x.data_ptr()]
