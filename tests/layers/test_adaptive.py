"""Adaptive BN: the mixture of source and batch statistics against NumPy, its gradients, and TENT's use of it."""

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bn_lightning.errors import BatchNormError, ConversionError
from bn_lightning.layers.adaptive import AdaptiveBatchNorm

SHAPES = [(6, 3), (4, 3, 5), (4, 3, 5, 2), (2, 3, 2, 3, 2)]
ALPHAS = [0.0, 0.3, 0.8, 1.0]
AFFINE = [True, "scale", "shift", False]


def build(alpha=1.0, affine=True, dtype=torch.float64, **settings):
    generator = torch.Generator().manual_seed(0)
    layer = AdaptiveBatchNorm(3, affine=affine, dtype=dtype, alpha=alpha, **settings)
    for tensor in (*layer.parameters(), layer.running_mean, layer.running_var):
        if tensor is not None:
            nn.init.uniform_(tensor, 0.5, 2.0, generator=generator)
    return layer


def batch(shape, dtype=torch.float64):
    return 3 + 2 * torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def numpy(tensor):
    return None if tensor is None else tensor.detach().double().numpy().copy()


def expected(layer, x):
    source = numpy(layer.running_mean), numpy(layer.running_var)
    return reference.adaptive_batch_norm(
        numpy(x), *source, layer.alpha, numpy(layer.weight), numpy(layer.bias), layer.eps
    )


@pytest.mark.parametrize("affine", AFFINE, ids="affine={}".format)
@pytest.mark.parametrize("alpha", ALPHAS, ids="alpha={}".format)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_evaluation_matches_numpy_and_moves_nothing(shape, alpha, affine):
    layer, x = build(alpha, affine).eval(), batch(shape)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    np.testing.assert_allclose(numpy(layer(x)), expected(layer, x), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(dict(layer.named_buffers()), before, rtol=0, atol=0)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    rest=st.lists(st.integers(1, 4), max_size=3),
    examples=st.integers(1, 6),
    affine=st.sampled_from(AFFINE),
    alpha=st.floats(0.0, 0.99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape_and_weight_matches_numpy_in_half_precision_too(rest, examples, affine, alpha, dtype):
    layer, x = build(alpha, affine, torch.float32).eval(), batch((examples, 3, *rest), dtype)
    y = layer(x)
    assert y.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    np.testing.assert_allclose(numpy(y), expected(layer, x), rtol=tolerance, atol=tolerance)


def test_no_weight_on_the_batch_is_bitwise_plain_evaluation():
    layer, x = build(0.0, dtype=torch.float32).eval(), batch((4, 3, 5), torch.float32)
    plain = nn.BatchNorm1d(3).eval()
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("momentum", [0.3, None], ids="momentum={}".format)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training_is_plain_batch_norm(shape, momentum):
    layer, x = build(0.4, momentum=momentum), batch(shape)
    step = reference.batch_norm(numpy(x), numpy(layer.weight), numpy(layer.bias))
    weight = 1 if momentum is None else momentum  # of the first batch
    moved = [
        reference.moved(numpy(running), of_batch, weight)
        for running, of_batch in ((layer.running_mean, step.mean), (layer.running_var, step.var))
    ]
    np.testing.assert_allclose(numpy(layer(x)), step.y, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(numpy(layer.running_mean), moved[0], rtol=1e-9)
    np.testing.assert_allclose(numpy(layer.running_var), moved[1], rtol=1e-9)
    assert layer.num_batches_tracked == 1


def test_training_is_bitwise_torchs():
    layer, x = build(dtype=torch.float32), batch((4, 3, 5), torch.float32)
    plain = nn.BatchNorm1d(3)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), plain(x))
    for name, buffer in plain.named_buffers():
        assert torch.equal(getattr(layer, name), buffer)


@pytest.mark.parametrize("momentum", [0.1, None], ids="momentum={}".format)
def test_an_empty_batch_moves_nothing(momentum):
    layer = build(momentum=momentum)
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    assert layer(batch((0, 3, 4))).shape == (0, 3, 4)
    assert torch.equal(layer.running_mean, mean)
    assert torch.equal(layer.running_var, var)


@pytest.mark.parametrize("alpha", ALPHAS, ids="alpha={}".format)
def test_gradients_flow_through_the_batch(alpha):
    layer = build(alpha).eval()
    x = batch((4, 3, 2)).requires_grad_()

    def evaluate(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(evaluate, (x, layer.weight, layer.bias))


@pytest.mark.parametrize("alpha", [0.3, 1.0], ids="alpha={}".format)
def test_tent_trains_scale_and_shift_in_evaluation_mode(alpha):
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), build(alpha, dtype=torch.float32), nn.Linear(3, 5)).eval()
    nn.init.normal_(net[2].weight, generator=generator)
    x = 2 + torch.randn(32, 4, generator=generator)

    def entropy():
        logits = net(x)
        return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()

    optimizer = torch.optim.SGD(net[1].parameters(), 0.5)
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    first = entropy()
    for _ in range(10):
        optimizer.zero_grad()
        entropy().backward()
        optimizer.step()
    assert entropy() < 0.9 * first
    torch.testing.assert_close(dict(net.named_buffers()), buffers, rtol=0, atol=0)


@pytest.mark.parametrize("alpha", ALPHAS, ids="alpha={}".format)
def test_without_running_statistics_the_batch_counts(alpha):
    layer, x = build(alpha, track_running_stats=False).eval(), batch((4, 3, 5))
    step = reference.batch_norm(numpy(x), numpy(layer.weight), numpy(layer.bias))
    np.testing.assert_allclose(numpy(layer(x)), step.y, rtol=1e-9, atol=1e-12)


def test_a_single_value_is_refused_where_it_alone_counts():
    x = torch.ones(1, 3, 1, dtype=torch.float64)
    with pytest.raises(BatchNormError, match=r"alpha=1\.0 .* more than one value per channel, got shape \(1, 3, 1\)"):
        build(1.0).eval()(x)
    with pytest.raises(BatchNormError, match="more than one value per channel"):
        build(0.5, track_running_stats=False).eval()(x)
    layer = build(0.5).eval()
    np.testing.assert_allclose(numpy(layer(x)), expected(layer, x), rtol=1e-9)


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # dynamo's own doing
@pytest.mark.parametrize("alpha", ALPHAS, ids="alpha={}".format)
def test_evaluation_compiles_to_the_same_values_and_gradients(alpha):
    layer, x = build(alpha).eval(), batch((4, 3, 5)).requires_grad_()
    results = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        y = call(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, layer.weight, layer.bias))))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("alpha", [0.3, 1.0], ids="alpha={}".format)
def test_bf16_buffers_and_channels_last(alpha):
    layer = build(alpha, dtype=torch.float32).to(torch.bfloat16).eval()
    x = batch((4, 3, 5, 2), torch.bfloat16).to(memory_format=torch.channels_last)
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(numpy(y), expected(layer, x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("alpha", [0.3, 1.0], ids="alpha={}".format)
def test_the_input_is_all_that_is_kept(alpha):
    layer, x = build(alpha, dtype=torch.float32).eval(), batch((40, 3, 5), torch.float32).requires_grad_()
    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add((t.data_ptr(), t.numel())) or t, lambda t: t):
        layer(x)
    assert {pointer for pointer, size in kept if size >= x.numel()} == {x.data_ptr()}


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), None, "0.5"], ids=repr)
def test_a_weight_outside_its_range_is_refused(alpha):
    with pytest.raises(ConversionError, match=r"alpha is the batch's weight.*in \[0, 1\]"):
        AdaptiveBatchNorm(3, alpha=alpha)
