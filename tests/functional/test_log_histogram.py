"""Logarithmic histograms against NumPy's own idea of exponents and bins."""

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from bn_lightning.functional.log_histogram import _bin_numbers, _counted_in_lanes, log2_histogram, raw_histogram

TINY = 2.0**-126
HOSTILE = [0.0, -0.0, 1e-45, -1e-45, TINY, np.nextafter(np.float32(TINY), np.float32(0)), 2.0**127, -(2.0**127)]
HOSTILE += [1.0, -1.0, 2.0, 0.5, np.nextafter(np.float32(2), np.float32(0)), -1.5, 3.4028235e38, np.inf, -np.inf]
HOSTILE += [np.nan, -np.nan, 65504.0, 6e-8]


def by_numpy(x):
    """512 counts by frexp, which knows nothing of bit patterns."""
    values = x.detach().float().flatten().double().numpy()
    counts = np.zeros(512, dtype=np.int64)
    _fraction, exponent = np.frexp(values)  # value = _fraction * 2**exponent, 0.5 <= |_fraction| < 1
    small, finite = np.abs(values) < TINY, np.isfinite(values)
    bins = np.where(small, 0, np.where(finite, exponent - 1 + 127, 255))
    np.add.at(counts, bins + 256 * np.signbit(np.where(np.isnan(values), 1.0, values)), 1)
    # The sign of a NaN says nothing.
    return counts, np.isnan(values).sum()


def check(x):
    found, (expected, nans) = log2_histogram(x), by_numpy(x)
    assert (found.dtype, found.shape, found.device) == (torch.int64, (512,), x.device)
    if nans:
        assert found[[255, 511]].sum() == expected[[255, 511]].sum()
        found[[255, 511]], expected[[255, 511]] = 0, 0
    np.testing.assert_array_equal(found.numpy(), expected)


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, shape[-1])


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(torch.tensor(HOSTILE, dtype=torch.float32), id="hostile"),
        pytest.param(normal(50, 30), id="61 decades"),
        pytest.param(normal(50, 30).to(torch.bfloat16), id="bfloat16"),
        pytest.param(torch.tensor(HOSTILE).to(torch.float16), id="float16"),
        pytest.param(torch.tensor(HOSTILE, dtype=torch.float64), id="float64"),
        pytest.param(torch.tensor([1e300, -1e300, 1e-300], dtype=torch.float64), id="beyond float32"),
        pytest.param(torch.arange(-300, 300), id="int64"),
        pytest.param(torch.arange(256, dtype=torch.uint8), id="uint8"),
        pytest.param(torch.tensor([True, False, True]), id="bool"),
        pytest.param(torch.empty(0, 3), id="empty"),
        pytest.param(torch.tensor(-2.0), id="0-d"),
        pytest.param(normal(20, 6, 8, 10)[::2, :, ::3], id="every second"),
        pytest.param(normal(20, 6, 8, 10).transpose(1, 3), id="transposed"),
        pytest.param(normal(20, 6, 8, 10).to(memory_format=torch.channels_last), id="channels_last"),
        pytest.param(normal(1, 30).expand(7, -1), id="expanded"),
        pytest.param(normal(3000, 130), id="several chunks"),
    ],
)
def test_bins_match_numpy(x):
    check(x)
    bins = _bin_numbers(x.reshape(-1))
    assert torch.equal(_counted_in_lanes(bins), log2_histogram(x)), "as on a GPU"


def test_histograms_merge_by_adding():
    x = normal(100, 7)
    assert torch.equal(sum(log2_histogram(part) for part in x.split([1, 0, 60, 39])), log2_histogram(x))


def test_no_host_sync():
    # A tensor without data has nothing to wait for.
    assert log2_histogram(torch.empty(1000, device="meta")).shape == (512,)


def test_legal_among_deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    try:
        check(normal(10, 30))
        _counted_in_lanes(torch.zeros(10, dtype=torch.int32))
    finally:
        torch.use_deterministic_algorithms(False)


def test_buckets_match_numpy():
    x = normal(2000, 30)
    x[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    histogram = raw_histogram(log2_histogram(x))
    values = x[x.isfinite()].double().numpy()
    edges = np.array([histogram.min, *histogram.bucket_limits])
    assert (np.diff(edges) > 0).all()
    # NumPy's bins hold their lower ends, ours the ends that are nearer 0: mirror the negative ones.
    positive, negative = values[values >= 0], -values[values < 0]
    expected = np.histogram(positive, edges)[0] + np.histogram(negative, -edges[::-1])[0][::-1]
    np.testing.assert_array_equal(histogram.bucket_counts, expected)
    assert histogram.bucket_counts[0]
    assert histogram.bucket_counts[-1]
    assert (histogram.num, histogram.nonfinite) == (len(values), 3)
    assert histogram.min <= values.min() < histogram.bucket_limits[0]
    assert histogram.max == histogram.bucket_limits[-1] >= values.max()


def test_estimated_sums_are_those_of_values_in_the_middle():
    histogram = raw_histogram(log2_histogram(torch.tensor([3.0, 3.0, -1.5, 0.0])))
    assert (histogram.sum, histogram.sum_squares) == (4.5, 20.25)
    assert (histogram.min, histogram.max, histogram.num) == (-2.0, 4.0, 4)


@pytest.mark.parametrize("x", [torch.empty(0), torch.tensor([torch.nan, torch.inf])], ids=["empty", "nonfinite"])
def test_nothing_finite_leaves_one_empty_bucket(x):
    histogram = raw_histogram(log2_histogram(x))
    assert (histogram.num, histogram.bucket_limits, histogram.bucket_counts) == (0, (0.0,), (0,))
    assert histogram.nonfinite == len(x)


def test_zeros_of_both_signs_are_one_bucket():
    histogram = raw_histogram(log2_histogram(torch.tensor([0.0, -0.0, 1e-45, -1e-45])))
    assert (histogram.bucket_limits, histogram.bucket_counts) == ((TINY,), (4,))


def test_tensorboard_reads_what_was_counted(tmp_path):
    histogram = raw_histogram(log2_histogram(torch.tensor([-3.0, -1.0, 0.25, 0.3, 5.0])))
    with SummaryWriter(tmp_path) as writer:
        writer.add_histogram_raw("layer", **histogram.arguments(), global_step=7)
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0})
    events.Reload()
    (event,) = events.Histograms("layer")
    read = event.histogram_value
    assert event.step == 7
    assert (read.min, read.max, read.num) == (-4.0, 8.0, 5)
    occupied = [(limit, count) for limit, count in zip(read.bucket_limit, read.bucket, strict=True) if count]
    assert occupied == [(-2.0, 1), (-1.0, 1), (0.5, 2), (8.0, 1)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_device_without_waiting_for_it():
    x = torch.cat([torch.tensor(HOSTILE), normal(500, 30).flatten()])
    there = x.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = log2_histogram(there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.cpu(), log2_histogram(x))
