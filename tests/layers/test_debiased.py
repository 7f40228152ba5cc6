"""DebiasedBatchNorm against the average divided by its weight, in float64 NumPy."""

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bn_lightning.errors import ConversionError
from bn_lightning.layers import DebiasedBatchNorm


def batches(count, *shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).mul(2).add(5).to(dtype) for _ in range(count)]


def randomize_affine(layer):
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return layer


def close(actual, expected, **tolerances):
    torch.testing.assert_close(actual.detach().double(), torch.as_tensor(expected), **tolerances)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    shape=st.sampled_from([(5, 3), (4, 3, 2), (2, 3, 2, 3), (2, 3, 1, 2, 2)]),
    steps=st.integers(1, 12),
    momentum=st.floats(0.001, 1),
    affine=st.sampled_from([True, "scale", "shift", False]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_matches_the_reference_at_every_step(shape, steps, momentum, affine, dtype):
    layer = randomize_affine(DebiasedBatchNorm(3, momentum=momentum, affine=affine))
    layer = layer.double() if dtype == torch.float64 else layer
    parameters = [None if p is None else p.detach().double().numpy() for p in (layer.weight, layer.bias)]
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    means, variances = [], []
    for x in batches(steps, *shape, dtype=dtype):
        expected = reference.batch_norm(x.double().numpy(), *parameters, layer.eps)
        close(layer(x), expected.y, rtol=tolerance, atol=tolerance)
        means.append(expected.mean)
        variances.append(expected.var)
        exact = 1e-9 if dtype == torch.float64 else 1e-5  # statistics are taken in float32 whatever the input
        close(layer.running_mean, reference.debiased(means, momentum), rtol=exact, atol=exact)
        close(layer.running_var, reference.debiased(variances, momentum), rtol=exact, atol=exact)
    assert int(layer.num_batches_tracked) == steps
    statistics = reference.debiased(means, momentum), reference.debiased(variances, momentum)
    expected = reference.standardize(x.double().numpy(), *statistics, *parameters, layer.eps)
    close(layer.eval()(x), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("momentum", [1e-4, 0.01, 0.5], ids="momentum={:g}".format)
def test_constant_data_are_right_from_the_first_step_on(momentum):
    layer = DebiasedBatchNorm(2, momentum=momentum)
    x = torch.tensor([[100.0, -3.0], [104.0, -7.0]])
    for _ in range(50):
        layer(x)
        torch.testing.assert_close(layer.running_mean, torch.tensor([102.0, -5.0]), rtol=1e-6, atol=0)
        torch.testing.assert_close(layer.running_var, torch.tensor([8.0, 8.0]), rtol=1e-6, atol=0)


def test_trains_as_plain_bn_does():
    layer, plain = randomize_affine(DebiasedBatchNorm(3).double()), randomize_affine(nn.BatchNorm1d(3).double())
    x = batches(1, 4, 3, 5)[0].requires_grad_()
    upstream = torch.cos(torch.arange(x.numel(), dtype=torch.float64)).view_as(x)
    torch.testing.assert_close(layer(x), plain(x))
    for one, other in zip(
        *(torch.autograd.grad(net(x), [x, *net.parameters()], upstream) for net in (layer, plain)), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_gradcheck():
    layer = randomize_affine(DebiasedBatchNorm(2).double())
    layer.track_running_stats = False
    x = batches(1, 4, 2, 3)[0].requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))


def test_resumes_bit_for_bit():
    whole, second = DebiasedBatchNorm(3, momentum=0.05), DebiasedBatchNorm(3, momentum=0.05)
    data = batches(8, 5, 3, 2, dtype=torch.float32)
    for x in data[:3]:
        whole(x)
    second.load_state_dict(whole.state_dict())
    for x in data[3:]:
        assert torch.equal(whole(x), second(x))
    assert all(torch.equal(one, other) for one, other in zip(whole.buffers(), second.buffers(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("momentum", [0.001, 0.1, 0.9], ids="momentum={:g}".format)
def test_ends_exactly_at_momentum(momentum, dtype):
    layer = DebiasedBatchNorm(2, momentum=momentum).to(dtype)
    layer.num_batches_tracked.fill_(layer.converged_count())
    assert layer.step_momentum() == torch.tensor(momentum, dtype=dtype)
    layer.num_batches_tracked.fill_(1)
    torch.testing.assert_close(layer.step_momentum(), torch.ones((), dtype=dtype))


@pytest.mark.parametrize("how", ["file", "conversion"])
def test_converged_statistics_without_a_count_do_not_jump(how):
    source = nn.BatchNorm1d(2)
    source.running_mean.copy_(torch.tensor([3.0, -2.0]))
    source.running_var.copy_(torch.tensor([0.5, 4.0]))
    layer = DebiasedBatchNorm(2)
    if how == "file":
        layer.load_state_dict(source.state_dict())
    else:
        source.__class__ = DebiasedBatchNorm
        layer = source
        layer.configure()
        assert "converged" in layer.adopt_statistics()
    assert int(layer.num_batches_tracked) == layer.converged_count() == 356
    layer(torch.tensor([[13.0, -2.0], [13.0, -2.0]]))
    torch.testing.assert_close(layer.running_mean, torch.tensor([4.0, -2.0]))  # a tenth of the way
    torch.testing.assert_close(layer.running_var, torch.tensor([0.45, 3.6]))


def test_a_fresh_file_stays_at_the_beginning():
    layer = DebiasedBatchNorm(2)
    layer.load_state_dict(nn.BatchNorm1d(2).state_dict())
    assert int(layer.num_batches_tracked) == 0
    layer(torch.tensor([[13.0, -2.0], [15.0, -2.0]]))
    torch.testing.assert_close(layer.running_mean, torch.tensor([14.0, -2.0]))


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_momentum_at_its_ends_needs_no_debiasing(momentum):
    layer, plain = DebiasedBatchNorm(2, momentum=momentum), nn.BatchNorm1d(2, momentum=momentum)
    for x in batches(3, 4, 2, dtype=torch.float32):
        layer(x)
        plain(x)
    for one, other in zip(layer.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other)
    layer.num_batches_tracked.zero_()
    assert layer.adopt_statistics() is None


def test_a_cumulative_average_is_refused():
    with pytest.raises(ConversionError, match=r"DebiasedBatchNorm\(2\).*got None: a cumulative average has no bias"):
        DebiasedBatchNorm(2, momentum=None)


@pytest.mark.parametrize("momentum", [-0.1, 1.5])
def test_refuses_a_momentum_out_of_range(momentum):
    with pytest.raises(ConversionError, match="from 0 to 1"):
        DebiasedBatchNorm(2, momentum=momentum)


def test_update_bn_of_torch_averages_all_batches_alike():
    """SWA's update_bn sets momentum to None for as long as it measures."""
    layer, plain = DebiasedBatchNorm(2), nn.BatchNorm1d(2)
    data = batches(4, 5, 2, dtype=torch.float32)
    for network in (layer, plain):
        torch.optim.swa_utils.update_bn(data, network)
    for one, other in zip(layer.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_paused_moves_nothing():
    layer = DebiasedBatchNorm(2)
    layer.track_running_stats = False
    before = [buffer.clone() for buffer in layer.buffers()]
    layer(batches(1, 4, 2, dtype=torch.float32)[0])
    assert all(torch.equal(one, other) for one, other in zip(before, layer.buffers(), strict=True))


def test_an_empty_batch_weighs_nothing():
    layer = DebiasedBatchNorm(2)
    layer(torch.empty(0, 2))
    layer(torch.tensor([[13.0, -2.0], [15.0, -2.0]]))
    torch.testing.assert_close(layer.running_mean, torch.tensor([14.0, -2.0]))


def test_works_without_running_statistics():
    layer = DebiasedBatchNorm(2, track_running_stats=False)
    x = batches(1, 4, 2, dtype=torch.float32)[0]
    torch.testing.assert_close(layer(x), layer.eval()(x))
    assert layer.adopt_statistics() is None


def test_half_precision_buffers_are_moved_too():
    layer = DebiasedBatchNorm(2).to(torch.bfloat16)
    x = batches(1, 64, 2, dtype=torch.bfloat16)[0]
    for _ in range(3):
        layer(x)
    close(layer.running_mean, x.double().mean(0), rtol=2e-2, atol=0)


def test_compiles_once_for_all_steps():
    eager, layer = DebiasedBatchNorm(2), DebiasedBatchNorm(2)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for x in batches(4, 5, 2, dtype=torch.float32):
        torch.testing.assert_close(compiled(x), eager(x))
    for one, other in zip(eager.buffers(), layer.buffers(), strict=True):
        torch.testing.assert_close(one, other)
    assert len(graphs) == 1


def test_half_precision_buffers_get_a_momentum_rounded_once():
    layer = DebiasedBatchNorm(2, momentum=0.01).to(torch.bfloat16)
    for count in range(1, 400, 7):
        layer.num_batches_tracked.fill_(count)
        expected = torch.tensor(0.01 / (1 - 0.99**count), dtype=torch.float64)
        close(layer.step_momentum(), expected, rtol=1.01 * 2**-8, atol=0)
