"""Per-channel statistics against float64 NumPy over the whole data."""

import functools

import numpy as np
import pytest
import torch

from bn_lightning.functional.activation import Row, activation_statistics, empty_statistics, pool_statistics
from bn_lightning.functional.fused import FusedStatistics
from bn_lightning.monitoring import observe_activations
from bn_lightning.monitoring.statistics import ChannelStatistics, LayerStatistics


@pytest.fixture(params=["eager", "fused"])
def measure(request):
    """Each implementation; a fused pass that fell back would test nothing new."""
    if request.param == "eager":
        yield activation_statistics
        return
    fused = FusedStatistics()
    yield fused
    assert fused.reason == ""


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_numpy(x, channel_dim):
    """The definitions, in float64: (count, mean, std, min, max, zero fraction, nonfinite) of each channel."""
    array = np.moveaxis(x.detach().double().numpy(), channel_dim, 0)
    array = array.reshape(array.shape[0], -1)
    with np.errstate(invalid="ignore"):
        return {
            "count": np.full(len(array), array.shape[1]),
            "mean": array.mean(1),
            "std": array.std(1),
            "min": array.min(1),
            "max": array.max(1),
            "rms": np.sqrt(np.square(array).mean(1)),
            "zero_fraction": (array == 0).mean(1),
            "nonfinite": (~np.isfinite(array)).sum(1),
        }


def check(statistics, expected, rtol, std_rtol=None):
    for name, values in expected.items():
        tolerance = std_rtol if name == "std" and std_rtol else rtol
        exact = name in ("count", "zero_fraction", "nonfinite")
        found = getattr(statistics, name)
        np.testing.assert_allclose(found, values, rtol=0 if exact else tolerance, atol=1e-7 * (not exact), err_msg=name)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        pytest.param((6, 5), 1, id="(N,C)"),
        pytest.param((6, 5, 7), 1, id="(N,C,L)"),
        pytest.param((4, 5, 7, 3), 1, id="(N,C,H,W)"),
        pytest.param((6, 7, 5), -1, id="(N,L,C)"),
        pytest.param((1, 5), 1, id="one value a channel"),
        pytest.param((300, 9, 11, 13), 1, id="several chunks"),
        pytest.param((70_000, 9), -1, id="several chunks of rows"),
        pytest.param((2, 3, 400, 400), 1, id="rows beyond a chunk"),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [
        pytest.param(torch.float32, 1e-5, id="float32"),
        pytest.param(torch.float64, 1e-12, id="float64"),
        pytest.param(torch.bfloat16, 1e-5, id="bfloat16"),
        pytest.param(torch.float16, 1e-5, id="float16"),
    ],
)
def test_channels_match_numpy(shape, axis, dtype, rtol):
    x = (draw(*shape) + 0.3).relu().to(dtype)  # a third of it exactly 0
    check(ChannelStatistics.of(activation_statistics(x, channel_dim=axis)), by_numpy(x, axis), rtol)


@pytest.mark.parametrize(
    ("shape", "axis", "dtype"),
    [
        pytest.param((32, 40, 31, 3), 1, torch.float32, id="along the last axis"),
        pytest.param((2, 3, 400, 400), 1, torch.float32, id="in parts"),
        pytest.param((2, 3, 16_411), 1, torch.float32, id="prime"),
        pytest.param((200, 500, 1), 1, torch.float32, id="a group of rows"),
        pytest.param((70_000, 9), -1, torch.float32, id="groups and a rest"),
        pytest.param((300, 9, 11, 5), 1, torch.float32, id="short rows, groups and a rest"),
        pytest.param((40_003,), 1, torch.float32, id="1-d"),
        pytest.param((32, 40, 31, 3), 1, torch.bfloat16, id="bfloat16"),
        pytest.param((200, 50, 7), 1, torch.float16, id="float16"),
        pytest.param((200, 50, 7), 1, torch.float64, id="float64"),
    ],
)
def test_channels_match_numpy_fused(shape, axis, dtype):
    x = (draw(*shape) + 0.3).relu().to(dtype)
    fused = FusedStatistics()
    found = ChannelStatistics.of(fused(x, channel_dim=axis))
    check(found, by_numpy(x if x.dim() > 1 else x[:, None], axis), 1e-12 if dtype == torch.float64 else 1e-6)
    assert fused.reason == ""


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4], ids="offset={:g}".format)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every_second", "transposed", "expanded"])
def test_large_means_do_not_cancel_in_any_layout(measure, offset, layout):
    x = offset + 0.1 * draw(40, 6, 14, 14)
    views = {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "every_second": x[::2, :, ::2],
        "transposed": x.transpose(2, 3),
        "expanded": x[:1].expand(5, -1, -1, -1),
    }
    x = views[layout]
    check(ChannelStatistics.of(measure(x)), by_numpy(x, 1), rtol=1e-6, std_rtol=1e-5)


def test_a_sample_far_from_the_others_does_not_cost_precision(measure):
    x = 1e4 + 0.1 * draw(64, 3, 20, 20)
    x[0] = 0
    check(ChannelStatistics.of(measure(x)), by_numpy(x, 1), rtol=1e-6)


@pytest.mark.parametrize("axis", [1, -1], ids="axis={}".format)
@pytest.mark.parametrize("value", [1e34, -1e34, 2.0**127], ids="{:g}".format)
def test_large_finite_values_do_not_overflow(measure, value, axis):
    x = torch.full((64, 4, 32, 32), value)
    check(ChannelStatistics.of(measure(x, channel_dim=axis)), by_numpy(x, axis), rtol=1e-6)


@pytest.mark.parametrize("axis", [1, -1], ids="axis={}".format)
@pytest.mark.parametrize("scale", [1e34, 1e21, 1e-17, 1e-25, 1e-36], ids="{:g}".format)
def test_squares_that_float32_cannot_hold(measure, axis, scale):
    x = scale * draw(64, 4, 32, 32)
    statistics, expected = ChannelStatistics.of(measure(x, channel_dim=axis)), by_numpy(x, axis)
    for name in ("mean", "std", "rms", "max"):
        np.testing.assert_allclose(
            getattr(statistics, name), expected[name], rtol=1e-4, atol=1e-5 * scale, err_msg=name
        )
    assert statistics.nonfinite.sum() == 0


@pytest.mark.parametrize("at", [0, 5, 63], ids="sample={}".format)
@pytest.mark.parametrize("axis", [1, -1], ids="axis={}".format)
def test_the_rough_mean_may_be_far_off(measure, at, axis):
    x = 1e4 + 0.1 * draw(64, 5, 32, 5)
    x[at] = -3e4  # one sample in 64, wherever the rough mean is taken
    check(ChannelStatistics.of(measure(x, channel_dim=axis)), by_numpy(x, axis), rtol=1e-6)


def test_a_compiled_network_takes_the_eager_statistics_into_its_graph():
    x = draw(200, 640)
    x[0, 0] = torch.nan
    found = torch.compile(activation_statistics, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(found, activation_statistics(x), rtol=1e-5, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("sizes", [[70], [1, 69], [2, 4, 64], [0, 70, 0]], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1e4], ids="offset={:g}".format)
def test_parts_merge_to_the_whole(measure, sizes, offset):
    x = offset + 0.1 * draw(70, 3, 5) * torch.arange(1, 71)[:, None, None]
    parts = [measure(part) for part in x.split(sizes)]
    at_once = pool_statistics(torch.stack(parts, dim=1))
    one_by_one = functools.reduce(lambda a, b: pool_statistics(torch.stack([a, b], dim=1)), parts)
    for merged in (at_once, one_by_one):
        check(ChannelStatistics.of(merged), by_numpy(x, 1), rtol=1e-6)


def test_layer_pools_channels_of_different_means():
    x = draw(8, 3, 5) + torch.tensor([0.0, 100.0, -50.0])[:, None]
    x[:, 1] = 0
    row = LayerStatistics.pooled(activation_statistics(x))
    array = x.double().numpy()
    assert row.count == 120
    assert isinstance(row.count, int)
    assert (row.dead_channels, row.channels, row.nonfinite) == (1, 3, 0)
    np.testing.assert_allclose(
        [row.mean, row.std, row.min, row.max, row.rms, row.zero_fraction],
        [array.mean(), array.std(), array.min(), array.max(), np.sqrt((array**2).mean()), (array == 0).mean()],
        rtol=1e-6,
    )


@pytest.mark.parametrize("values", [[np.nan], [np.inf], [-np.inf], [np.inf, -np.inf], [np.nan, np.inf]], ids=str)
@pytest.mark.parametrize("where", [0, 200], ids="sample={}".format)
def test_nonfinite_values_are_counted_and_spoil_only_their_channel(measure, values, where):
    x = draw(300, 4, 31, 31)
    x[0, 3] = 0
    for position, value in enumerate(values):
        x[where, 2, 0, position] = value
    statistics = ChannelStatistics.of(measure(x))
    assert statistics.nonfinite.tolist() == [0, 0, len(values), 0]
    expected = by_numpy(x, 1)
    for name in ("mean", "std", "min", "max"):
        np.testing.assert_allclose(getattr(statistics, name), expected[name], rtol=1e-5, atol=1e-7, err_msg=name)
    assert statistics.zero_fraction[3] == 1 / 300
    assert LayerStatistics.pooled(measure(x)).nonfinite == len(values)


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(torch.tensor(3.0), id="0-d"),
        pytest.param(torch.tensor([3.0, 0.0, 1.0]), id="1-d"),
    ],
)
def test_fewer_than_two_axes_are_one_channel(measure, x):
    check(ChannelStatistics.of(measure(x)), by_numpy(x.reshape(-1, 1), 1), rtol=1e-7)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
def test_integers(measure, dtype):
    x = torch.randint(0, 5, (7, 3, 4), generator=torch.Generator().manual_seed(0)).to(dtype)
    check(ChannelStatistics.of(measure(x)), by_numpy(x, 1), rtol=1e-12)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0), (2, 0, 4), (0,)], ids=str)
def test_no_values_count_zero_and_claim_nothing(measure, shape):
    block = measure(torch.empty(shape))
    row = LayerStatistics.pooled(block)
    assert (row.count, row.dead_channels, row.nonfinite) == (0, 0, 0)
    assert all(np.isnan([row.mean, row.std, row.min, row.max, row.rms, row.zero_fraction]))
    assert block[Row.COUNT].sum() == 0


def test_empty_statistics_are_neutral():
    block = activation_statistics(draw(4, 3))
    nothing = empty_statistics(3, device=block.device, dtype=block.dtype)
    torch.testing.assert_close(pool_statistics(torch.stack([nothing, block, nothing], dim=1)), block)


@pytest.mark.parametrize(
    ("x", "remark"),
    [
        pytest.param(torch.tensor([[0.0, 1.0], [0.0, 2.0]]), "1 of 2 channels zero", id="dead"),
        pytest.param(torch.zeros(2, 2), "all zero", id="all dead"),
        pytest.param(torch.ones(2, 2), "constant", id="constant"),
        pytest.param(torch.tensor([[torch.nan, 1.0], [1.0, torch.inf]]), "2 nonfinite values", id="nonfinite"),
        pytest.param(torch.tensor([[0.5, 1.0], [1.0, 0.0]]), "", id="nothing to say"),
        pytest.param(torch.tensor([[-60.0, 1.0], [1.0, 0.0]]), "up to 60 % of what its dtype can hold", id="saturated"),
    ],
)
def test_remark(x, remark):
    assert LayerStatistics.pooled(activation_statistics(x), limit=100.0).remark == remark


def test_layers_side_by_side_are_pooled_as_each_alone():
    xs = [draw(4, width, seed=width) + width for width in (3, 1, 5)]
    xs.insert(1, torch.empty(0, 2))
    blocks = [activation_statistics(x) for x in xs]
    rows = LayerStatistics.of_layers(torch.cat(blocks, dim=1), [3, 2, 1, 5], ["", "why", "", ""], [np.nan] * 4)
    for row, x in zip(rows, xs, strict=True):
        values = x.double().numpy()
        assert (row.count, row.channels) == (x.numel(), x.shape[1])
        if x.numel():
            expected = [values.mean(), values.std(), values.min(), values.max()]
            np.testing.assert_allclose([row.mean, row.std, row.min, row.max], expected, rtol=1e-6)
    assert [row.reason for row in rows] == ["", "why", "", ""]
    assert np.isnan(rows[1].std)


@pytest.mark.parametrize(("dtype", "share"), [(torch.float16, 30_000 / 65_504), (torch.bfloat16, 0.0)], ids=str)
def test_saturation_is_against_the_dtype_of_the_output(dtype, share):
    net = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Flatten())
    with observe_activations(net) as activations:
        net(torch.tensor([[3.0, -30_000.0, 30_000.0]], dtype=dtype))
    found = [row["saturation"] for row in activations.to_dict().values()]
    np.testing.assert_allclose(found, [share, share], atol=1e-30, rtol=1e-2)
