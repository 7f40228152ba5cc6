"""When recalibration stops drawing batches, against repeated sampling and a plain formula."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from torch.utils.data.distributed import DistributedSampler

import bn_lightning as bnl
from bn_lightning.errors import RecalibrationError
from bn_lightning.functional import ChannelMoments, batch_moments
from bn_lightning.recalibration import population_statistics
from bn_lightning.recalibration.spread import Spread


def correlated(number, size=16, seed=0, mean=3.0):
    """Batches whose values share half of their variance, as pixels of an image do."""
    g = torch.Generator().manual_seed(seed)
    return [
        mean + torch.randn(1, 4, 1, generator=g) + torch.randn(size, 4, 6, generator=g) for _ in range(number)
    ]  # fmt: skip


class Counted:
    """A generator that knows how many batches it gave."""

    def __init__(self, batches):
        self.batches, self.given = batches, 0

    def __iter__(self):
        for batch in self.batches:
            self.given += 1
            yield batch


def spread_of(batches):
    spread = Spread()
    for batch in batches:
        spread.add(batch_moments(batch))
    return spread


@pytest.mark.parametrize("mean", [0.0, 1e3], ids="mean={:g}".format)
def test_the_standard_error_is_the_spread_of_repeated_measurements(mean):
    repeats = [correlated(40, seed=seed, mean=mean) for seed in range(150)]
    pooled = [torch.cat(batches).double() for batches in repeats]
    of_mean = np.std([x.mean((0, 2)).numpy() for x in pooled], axis=0)
    of_sigma = np.std([x.var((0, 2)).sqrt().numpy() for x in pooled], axis=0)
    sigma = np.sqrt(2)
    expected = max(np.sqrt(np.mean(of_mean**2)) / sigma, np.sqrt(np.mean(of_sigma**2)) / sigma)
    estimates = [float(spread_of(batches).standard_error(0.0)) for batches in repeats]
    assert np.mean(estimates) == pytest.approx(expected, rel=0.1)
    assert np.mean(estimates) > 5 / np.sqrt(40 * 16 * 6), "σ/√n knows nothing of correlation"


@pytest.mark.parametrize("scales", [pytest.param(False, id="means-differ"), pytest.param(True, id="scales-differ")])
def test_batches_weigh_by_their_values(scales):
    batches = [part for batch in correlated(20) for part in batch.split([13, 2, 1])]
    if scales:
        batches = [(1 + index % 7) * (x - x.mean((0, 2), True)) for index, x in enumerate(batches)]
    n = np.array([batch.numel() / 4 for batch in batches])
    means = np.array([batch.double().mean((0, 2)).numpy() for batch in batches])
    values = torch.cat(batches).double()
    mean, var = values.mean((0, 2)).numpy(), values.var((0, 2), correction=0).numpy()
    squares = np.array([((batch.double().numpy() - mean[:, None]) ** 2).mean((0, 2)) for batch in batches])
    factor = len(n) / (len(n) - 1) / n.sum() ** 2
    of_mean = ((n[:, None] * (means - mean)) ** 2).sum(0) * factor / var
    of_var = ((n[:, None] * (squares - var)) ** 2).sum(0) * factor / (2 * var) ** 2
    expected = np.sqrt(max(of_mean.mean(), of_var.mean()))
    assert (of_var.mean() > of_mean.mean()) == scales
    assert float(spread_of(batches).standard_error(0.0)) == pytest.approx(expected, rel=1e-6)


def test_parts_merge_to_the_whole_whatever_their_shift():
    batches = [*correlated(5, mean=0.0), *correlated(9, seed=1, mean=50.0)]
    whole, one, two = spread_of(batches), spread_of(batches[:5]), spread_of(batches[5:])
    merged = Spread()
    for part in (Spread(), one, two):
        merged.merge(part)
    assert merged.batches == 14
    torch.testing.assert_close(merged.standard_error(1e-5), whole.standard_error(1e-5), rtol=1e-9, atol=0)


def test_a_constant_channel_asks_for_nothing_and_a_single_batch_says_nothing():
    assert float(spread_of([torch.full((4, 2), 3.0)] * 5).standard_error(1e-5)) == 0
    assert torch.isnan(spread_of([torch.ones(4, 2)]).standard_error(1e-5))
    with_moments = Spread()
    with_moments.add(ChannelMoments(2, torch.zeros(1).double(), torch.ones(1).double()))
    assert with_moments.batches == 1


def layer():
    bn = nn.BatchNorm1d(4)
    with torch.no_grad():
        bn.running_mean.fill_(9)
        bn.weight.uniform_(0.5, 2, generator=torch.Generator().manual_seed(0))
    return nn.Sequential(bn)


def test_it_stops_where_the_tolerance_is_reached_and_says_so():
    batches = Counted(correlated(200))
    model = layer()
    result = bnl.recalibrate_batch_norm(model, batches, tolerance=0.12)
    assert result.stopped_early
    assert batches.given == result.batches
    assert 20 <= result.batches < 60
    measured = [float(spread_of(batches.batches[:n]).standard_error(1e-5)) for n in range(20, result.batches + 1, 5)]
    assert [error < 0.12 for error in measured] == [*[False] * (len(measured) - 1), True]
    assert result.standard_error == pytest.approx(measured[-1])
    values = torch.cat(batches.batches[: result.batches]).double()
    torch.testing.assert_close(model[0].running_mean.double(), values.mean((0, 2)), rtol=1e-6, atol=0)
    assert f"standard error of a mean or standard deviation is {result.standard_error:.2g} σ, estimated" in str(result)
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["stopped_early"] is True
    assert plain["standard_error"] == plain["layers"][0]["standard_error"] == result.standard_error


def by_class():
    """1,200 examples, class after class: 12 batches of each."""
    classes = torch.arange(5).repeat_interleave(240)
    return classes[:, None, None] + 0.1 * torch.randn(1200, 4, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("make", "stops"),
    [
        pytest.param(lambda x: x.split(20), False, id="list"),
        pytest.param(lambda x: iter(x.split(20)), False, id="generator"),
        pytest.param(lambda x: DataLoader(x, 20), False, id="in-order"),
        pytest.param(lambda x: DataLoader(x, batch_sampler=Own(RandomSampler(x), 20, False)), False, id="own-batches"),
        pytest.param(lambda x: DataLoader(x, 20, shuffle=True), True, id="shuffled"),
        pytest.param(lambda x: DataLoader(x, 20, sampler=DistributedSampler(x, 1, 0)), True, id="distributed"),
        pytest.param(
            lambda x: DataLoader(x, 20, sampler=DistributedSampler(x, 1, 0, shuffle=False)), False, id="not-shuffled"
        ),
    ],
)
def test_by_default_it_stops_where_the_loader_shuffles(make, stops):
    """Of class after class the first batches say nothing of the rest, however well they agree."""
    torch.manual_seed(0)
    x, model = by_class() if not stops else correlated(200, size=20, mean=0.0), layer()
    if stops:
        x = torch.cat([each - each.mean((0, 2), keepdim=True) for each in x])
    result = bnl.recalibrate_batch_norm(model, make(x))
    assert result.stopped_early == stops
    if not stops:
        torch.testing.assert_close(model[0].running_mean, x.mean((0, 2)), rtol=1e-4, atol=1e-4)


class Own(BatchSampler):
    """Puts batches together in a way of its own."""


@pytest.mark.parametrize(
    ("number", "tolerance"),
    [pytest.param(19, 100.0, id="too-few"), pytest.param(40, None, id="none"), pytest.param(40, 0, id="zero"),
     pytest.param(40, 0.01, id="not-reached"), pytest.param(20, 100.0, id="nothing-left")],
)  # fmt: skip
def test_it_takes_all(number, tolerance):
    result = bnl.recalibrate_batch_norm(layer(), correlated(number), tolerance=tolerance)
    assert (result.batches, result.stopped_early) == (number, False)
    assert "Stopped early" not in str(result)
    with_more = bnl.recalibrate_batch_norm(layer(), correlated(300), tolerance=None)
    assert with_more.batches == 200


def test_measuring_alone_takes_all():
    assert population_statistics(layer(), correlated(60))["0"].batches == 60


def test_a_variance_that_is_not_known_yet_keeps_it_going():
    g = torch.Generator().manual_seed(0)
    signs = torch.tensor([1.0, -1.0]).repeat(8)[:, None, None]
    # Means are 0 to rounding, and the scale is another in every batch.
    batches = [signs * (0.1 + 3 * torch.rand(1, generator=g)).expand(16, 4, 6) for _ in range(60)]
    assert not bnl.recalibrate_batch_norm(layer(), batches, tolerance=0.03).stopped_early


def test_a_layer_that_few_batches_reach_keeps_it_going_and_a_frozen_one_does_not():
    class Rare(nn.Module):
        def __init__(self):
            super().__init__()
            self.often, self.rarely, self.frozen = layer()[0], layer()[0], layer()[0]

        def forward(self, x):
            if float(x[0, 0, 0]) > 4:
                self.rarely(x)
            return self.often(x)

    model = Rare()
    batches = correlated(60)
    reached = sum(float(x[0, 0, 0]) > 4 for x in batches[:20])
    assert 0 < reached < 20
    assert bnl.recalibrate_batch_norm(model, batches, tolerance=10, exclude=["rarely"]).batches == 20
    assert bnl.recalibrate_batch_norm(model, batches, tolerance=10).batches > 20
    model.train().rarely.eval()
    assert bnl.recalibrate_batch_norm(model, batches, tolerance=10).batches == 20


@pytest.mark.parametrize("tolerance", [-1.0, float("nan"), "1%", True], ids=repr)
def test_a_tolerance_that_is_none_is_refused(tolerance):
    with pytest.raises(RecalibrationError, match="tolerance is a standard error in σ"):
        bnl.recalibrate_batch_norm(layer(), correlated(2), tolerance=tolerance)
