import functools

import numpy as np
import pytest
import torch

from bn_lightning.functional import ChannelMoments, batch_moments


def noise(*shape, offset=0.0, scale=1.0, seed=0):
    return offset + scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "sizes", [pytest.param([70], id="one"), pytest.param([2, 4, 64], id="unequal"), pytest.param([1] * 70, id="single")]
)
@pytest.mark.parametrize("tail", [(), (5,), (4, 3)], ids=["NC", "NCL", "NCHW"])
@pytest.mark.parametrize("offset", [0.0, 1e4], ids="offset={:g}".format)
def test_merge_matches_numpy_on_the_whole_data(sizes, tail, offset):
    x = noise(70, 3, *tail, offset=offset, scale=0.1)
    merged = functools.reduce(ChannelMoments.merge, map(batch_moments, x.split(sizes)))
    whole = np.moveaxis(x.double().numpy(), 1, 0).reshape(3, -1)
    assert merged.count == whole.shape[1]
    np.testing.assert_allclose(merged.mean.numpy(), whole.mean(1), rtol=0, atol=1e-7)
    np.testing.assert_allclose(merged.var(correction=0).numpy(), whole.var(1), rtol=1e-5)
    np.testing.assert_allclose(merged.var(correction=1).numpy(), whole.var(1, ddof=1), rtol=1e-5)


@pytest.mark.parametrize("offset", [1.0, 1e4], ids="offset={:g}".format)
@pytest.mark.parametrize("layout", ["NC", "CN", "NC11", "contiguous", "channels_last", "strided"])
def test_many_values_in_every_layout(layout, offset):
    x = (
        noise(100_000, 2, offset=offset, scale=0.1)
        if layout in ("NC", "CN", "NC11")
        else noise(64, 2, 40, 40, offset=offset, scale=0.1)
    )
    if layout == "CN":
        x = x.t().contiguous().t()
    elif layout == "NC11":
        x = x[..., None, None]
    elif layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "strided":
        x = x.transpose(2, 3)[..., ::2]
    moments = batch_moments(x)
    whole = np.moveaxis(x.double().numpy(), 1, 0).reshape(2, -1)
    np.testing.assert_allclose(moments.mean.numpy(), whole.mean(1), rtol=0, atol=2e-8)
    np.testing.assert_allclose(moments.var(correction=0).numpy(), whole.var(1), rtol=1e-6)


def test_an_empty_batch_changes_nothing():
    some, none = batch_moments(noise(4, 2, 3)), batch_moments(torch.empty(0, 2, 3))
    for merged in (some.merge(none), none.merge(some)):
        assert merged.count == some.count
        torch.testing.assert_close(merged.mean, some.mean, rtol=0, atol=0)
        torch.testing.assert_close(merged.m2, some.m2, rtol=0, atol=0)
    assert none.merge(none).count == 0
    infinite = ChannelMoments(2, torch.tensor([torch.inf]), torch.tensor([3.0]))
    empty = ChannelMoments(0, torch.zeros(1), torch.zeros(1))
    for merged in (infinite.merge(empty), empty.merge(infinite)):
        assert (merged.mean.item(), merged.m2.item()) == (torch.inf, 3.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_dtypes_are_widened_before_adding(dtype):
    x = (noise(500, 2, 40, offset=3.0) * 2).to(dtype)
    moments = batch_moments(x)
    whole = np.moveaxis(x.double().numpy(), 1, 0).reshape(2, -1)
    np.testing.assert_allclose(moments.mean.numpy(), whole.mean(1), rtol=1e-6)
    np.testing.assert_allclose(moments.var(correction=0).numpy(), whole.var(1), rtol=1e-5)


def test_moments_are_detached_and_the_var_of_too_few_values_is_nan():
    x = torch.randn(1, 3, requires_grad=True)
    moments = batch_moments(x)
    assert not moments.mean.requires_grad
    assert moments.var(correction=1).isnan().all()
    assert (moments.var(correction=0) == 0).all()


def test_a_vector_is_refused_with_its_shape():
    with pytest.raises(ValueError, match=r"\(N, C, \*\) tensor, got shape \(3,\)"):
        batch_moments(torch.zeros(3))
