import itertools

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bn_lightning.errors import BatchNormError, ConversionError
from bn_lightning.layers import GhostBatchNorm


def randomized(layer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (layer.running_mean, layer.weight, layer.bias):
            if tensor is not None:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
        if layer.running_var is not None:
            layer.running_var.copy_(torch.rand(layer.num_features, generator=generator) + 0.5)
    return layer


def numpy(tensor):
    return None if tensor is None else tensor.detach().double().numpy().copy()


def groups_of(examples, size, values, interleaved):
    """Which examples meet: whole groups first, interleaved in contiguous input, and the rest."""
    size = min(size, examples)
    whole = examples // size * size
    if (examples - whole) * values == 1:
        whole -= size
    count = whole // size
    if interleaved:
        groups = [list(range(group, whole, count)) for group in range(count)]
    else:
        groups = [list(range(group * size, (group + 1) * size)) for group in range(count)]
    return groups + ([list(range(whole, examples))] if whole < examples else [])


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    examples=st.integers(2, 19),
    size=st.integers(2, 8),
    spatial=st.sampled_from([(), (1,), (3,), (2, 2), (1, 2, 2)]),
    affine=st.sampled_from([True, "scale", "shift", False]),
    channels_last=st.booleans(),
)
def test_output_buffers_and_evaluation(examples, size, spatial, affine, channels_last):
    layer = randomized(GhostBatchNorm(3, virtual_batch_size=size, affine=affine, dtype=torch.float64))
    running = numpy(layer.running_mean), numpy(layer.running_var)
    x = torch.randn(examples, 3, *spatial, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 + 1
    if channels_last and len(spatial) == 2:
        x = x.to(memory_format=torch.channels_last)
    groups = groups_of(examples, size, int(np.prod(spatial)), x.is_contiguous())
    assert sorted(itertools.chain(*groups)) == list(range(examples))
    expected = reference.ghost_batch_norm(numpy(x), groups, numpy(layer.weight), numpy(layer.bias))
    y = layer(x)
    np.testing.assert_allclose(numpy(y), expected.y, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(numpy(layer.running_mean), reference.moved(running[0], expected.mean, 0.1))
    np.testing.assert_allclose(numpy(layer.running_var), reference.moved(running[1], expected.var, 0.1))
    assert layer.num_batches_tracked == 1
    layer.eval()
    settled = numpy(layer.running_mean), numpy(layer.running_var), numpy(layer.weight), numpy(layer.bias)
    np.testing.assert_allclose(numpy(layer(x)), reference.standardize(numpy(x), *settled, 1e-5))


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("examples", [8, 11, 3], ids=["whole", "ragged", "smaller"])
def test_gradients(examples, channels_last):
    layer = randomized(GhostBatchNorm(2, virtual_batch_size=4, dtype=torch.float64))
    x = torch.randn(examples, 2, 2, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = x.to(memory_format=torch.channels_last) if channels_last else x

    def run(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), layer.weight, layer.bias))


def test_a_batch_that_is_no_larger_than_a_group_is_plain_batch_norm():
    ghost, plain = randomized(GhostBatchNorm(3, virtual_batch_size=16)), randomized(nn.BatchNorm1d(3))
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(ghost(x), plain(x))
    torch.testing.assert_close(ghost.state_dict(), plain.state_dict(), rtol=1e-6, atol=1e-7)


def test_a_single_left_over_value_joins_the_group_before():
    layer = GhostBatchNorm(1, virtual_batch_size=2)
    y = layer(torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0]]))
    assert y[-1] > 1  # alone it would be 0
    torch.testing.assert_close(y[2:].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_evaluation_does_not_group():
    layer = randomized(GhostBatchNorm(3, virtual_batch_size=2, track_running_stats=False).eval())
    x = torch.randn(8, 3, 4, generator=torch.Generator().manual_seed(1))
    expected = nn.functional.batch_norm(x, None, None, layer.weight, layer.bias, True)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("size", [0, -1, 2.5, "8"], ids=repr)
def test_a_group_size_has_to_be_a_positive_integer(size):
    with pytest.raises(ConversionError, match=r"virtual_batch_size counts the examples of a group"):
        GhostBatchNorm(3, virtual_batch_size=size)


def test_groups_of_one_value_are_refused_before_anything_moves():
    layer = randomized(GhostBatchNorm(3, virtual_batch_size=1))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(
        BatchNormError, match=r"one value per channel in a batch of shape \(8, 3\)\. Use at least 2 for"
    ):
        layer(torch.randn(8, 3))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert layer(torch.randn(8, 3, 4)).shape == (8, 3, 4)  # four values are enough


def test_cumulative_average():
    layer = GhostBatchNorm(2, virtual_batch_size=4, momentum=None, dtype=torch.float64)
    batches = torch.randn(3, 8, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for batch in batches:
        layer(batch)
    means = [reference.ghost_batch_norm(numpy(b), groups_of(8, 4, 1, True)).mean for b in batches]
    np.testing.assert_allclose(numpy(layer.running_mean), np.mean(means, axis=0))
