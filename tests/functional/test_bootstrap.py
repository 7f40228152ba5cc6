"""Intervals for a mean of few values cover it as often as they say."""

import math
import warnings

import numpy as np
import pytest
import torch

from bn_lightning.functional.bootstrap import mean_interval


def drawn(kind, count, source):
    if kind == "normal":
        return torch.randn(count, generator=source, dtype=torch.float64)
    # Skewed as losses are, mean 1.
    return torch.empty(count, dtype=torch.float64).exponential_(generator=source)


@pytest.mark.parametrize("kind", ["normal", "skewed"])
@pytest.mark.parametrize("count", [2, 3, 5, 8, 32], ids="n={}".format)
def test_coverage_of_the_known_mean(kind, count):
    source = torch.Generator().manual_seed(0)
    truth = 0.0 if kind == "normal" else 1.0
    covered = 0
    for trial in range(250):
        _, low, high = mean_interval(drawn(kind, count, source), torch.ones(count), seed=trial)
        covered += low <= truth <= high
    assert covered / 250 >= 0.90, "nominal 95 %"
    assert covered < 250, "it says something"


def test_coverage_with_unequal_weights():
    source = torch.Generator().manual_seed(1)
    covered = 0
    for trial in range(250):
        sizes = torch.randint(8, 33, (8,), generator=source).double()
        # Means of batches: the larger, the less they scatter.
        values = torch.randn(8, generator=source, dtype=torch.float64) / sizes.sqrt()
        _, low, high = mean_interval(values, sizes, seed=trial)
        covered += low <= 0 <= high
    assert covered / 250 >= 0.90


def test_mean_is_weighed():
    values, weights = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([4.0, 1.0, 3.0])
    mean, low, high = mean_interval(values, weights)
    assert mean == pytest.approx(np.average([1, 2, 4], weights=[4, 1, 3]))
    assert low < mean < high


def test_three_values_have_an_interval_of_their_own_size():
    """One draw in nine is of one value alone, and its standard error nothing but rounding."""
    for values in torch.randn(20, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64):
        mean, low, high = mean_interval(values, torch.ones(3))
        error = float(values.std(correction=1)) / math.sqrt(3)
        assert 4 < (mean - low) / error < 100  # Student's t is 4.3
        assert 4 < (high - mean) / error < 100


def test_many_values_have_the_normal_interval():
    values = torch.randn(2000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mean, low, high = mean_interval(values, torch.ones(2000))
    half = 1.96 * float(values.std(correction=1)) / math.sqrt(2000)
    assert (mean - low, high - mean) == (pytest.approx(half, rel=0.08), pytest.approx(half, rel=0.08))


def test_one_value_has_no_interval_and_equal_ones_no_width():
    assert mean_interval(torch.tensor([3.0]), torch.ones(1)) == (3.0, -math.inf, math.inf)
    assert mean_interval(torch.zeros(5), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])) == (0.0, 0.0, 0.0)
    assert mean_interval(torch.full((3,), 0.1), torch.tensor([1.0, 2.0, 3.0]))[1:] == (
        pytest.approx(0.1), pytest.approx(0.1)
    )  # fmt: skip


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_what_is_not_finite_has_no_interval_that_excludes_anything(bad):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mean, low, high = mean_interval(torch.tensor([1.0, bad, 2.0]), torch.ones(3))
    assert not math.isfinite(mean)
    assert not low > 0
    assert not high < 0


def test_same_seed_same_interval_and_the_random_state_stays():
    values = torch.randn(20, generator=torch.Generator().manual_seed(3)).exp()
    before = torch.get_rng_state()
    assert mean_interval(values, torch.ones(20)) == mean_interval(values, torch.ones(20))
    assert mean_interval(values, torch.ones(20)) != mean_interval(values, torch.ones(20), seed=1)
    assert torch.equal(torch.get_rng_state(), before)
