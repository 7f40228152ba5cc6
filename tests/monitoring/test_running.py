"""What BatchNorm layers computed anyway, against float64 NumPy over the data they were given."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from bn_lightning.errors import BatchNormError
from bn_lightning.layers import DebiasedBatchNorm, GhostBatchNorm
from bn_lightning.monitoring.running import RunningStatisticsWatch

EPS32 = torch.finfo(torch.float32).eps


def data(steps, micro=1, channels=6, seed=0, mean=2.0, std=3.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    sizes = [4 + (index % 3) for index in range(steps * micro)]
    batches = [
        (mean + std * torch.randn(size, channels, 3, 3, generator=generator, dtype=torch.float64)).to(dtype)
        for size in sizes
    ]
    return [batches[step * micro : (step + 1) * micro] for step in range(steps)]


def train(net, watch, steps, first=0):
    for number, batches in enumerate(steps, first):
        watch.begin()
        for x in batches:
            net(x)
        watch.end(number)


def of_numpy(steps, momentum):
    """For each step the mean and variance that the running statistics were moved towards, (steps, 2, C)."""
    found = []
    for batches in steps:
        own = []
        for x in batches:
            values = np.moveaxis(x.double().numpy(), 1, 0).reshape(x.shape[1], -1)
            own.append(np.stack([values.mean(1), values.var(1, ddof=1)]))
        weights = [1.0 if momentum is None else (1 - momentum) ** (len(own) - 1 - index) for index in range(len(own))]
        found.append(np.average(own, axis=0, weights=weights))
    return np.stack(found)


@pytest.mark.parametrize("momentum", [0.1, 0.01, 1.0, None])
@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_channels_are_those_of_the_data(momentum, micro, dtype):
    bn = nn.BatchNorm2d(6, momentum=momentum, dtype=dtype)
    watch = RunningStatisticsWatch({"bn": bn})
    steps = data(7, micro, dtype=dtype)
    train(bn, watch, steps)
    expected = of_numpy(steps, momentum)
    found = watch.read().channels("bn")
    tolerance = {"rtol": 0, "atol": 1e-3 if dtype == torch.float32 and momentum == 0.01 else 1e-4}
    np.testing.assert_allclose(found.batch_mean.numpy(), expected[:, 0].mean(0), **tolerance)
    np.testing.assert_allclose(found.batch_mean_std.numpy(), expected[:, 0].std(0, ddof=1), **tolerance)
    np.testing.assert_allclose(found.batch_var.numpy(), expected[:, 1].mean(0), rtol=0, atol=10 * tolerance["atol"])
    assert found.steps.tolist() == [7] * 6
    assert torch.equal(found.running_mean, bn.running_mean.double())
    assert torch.equal(found.running_var, bn.running_var.double())
    assert (np.abs(found.batch_mean.numpy() - expected[:, 0].mean(0)) <= found.mean_resolution.numpy() + 1e-6).all()


def test_a_row_sums_its_channels_up():
    bn = nn.BatchNorm2d(6)
    with torch.no_grad():
        bn.weight.copy_(torch.tensor([1.0, -2.0, 0.0, 0.5, 1.0, 1.0]))
        bn.bias.copy_(torch.tensor([0.0, -7.0, 0.0, -1.0, -3.0, -3.2]))
    watch = RunningStatisticsWatch({"bn": bn})
    steps = data(9)
    train(bn, watch, steps)
    expected = of_numpy(steps, 0.1)
    (row,) = watch.read().rows
    sigma = np.sqrt(bn.running_var.double().numpy() + bn.eps)
    drift = (expected[:, 0].mean(0) - bn.running_mean.double().numpy()) / sigma
    noise = expected[:, 0].std(0, ddof=1) / sigma
    ratio = (expected[:, 1].mean(0) + bn.eps) / (bn.running_var.double().numpy() + bn.eps)
    assert row.drift == pytest.approx(np.sqrt((drift**2).mean()), rel=1e-4)
    assert row.noise == pytest.approx(np.sqrt((noise**2).mean()), rel=1e-4)
    assert row.spread == pytest.approx(np.exp(np.log(ratio).mean() / 2), rel=1e-4)
    assert row.weight_rms == pytest.approx(math.sqrt((1 + 4 + 0.25 + 1 + 1) / 6))
    assert row.bias_rms == pytest.approx(math.sqrt((49 + 1 + 9 + 3.2**2) / 6))
    # −7/2 and −3.2 lie below the 0.1 % quantile of a Gaussian, −3.09; a scale of 0 leaves the bias, 0.
    assert row.dead_share == pytest.approx(3 / 6)
    assert (row.updates, row.nonfinite, row.spoiled_steps, row.first_spoiled, row.remark) == (1.0, 0, 0, None, "")


def test_a_reading_begins_anew_but_remembers_the_last_steps():
    net = nn.Sequential(nn.BatchNorm2d(6), nn.BatchNorm2d(6))
    watch = RunningStatisticsWatch({"0": net[0], "1": net[1]})
    steps = data(27, 2)
    train(net, watch, steps[:3])
    first = watch.read()
    assert (first.step, [each.step for each in first.recent["1"]]) == (2, [0, 1, 2])
    train(net, watch, steps[3:], first=3)
    second = watch.read()
    assert second.channels("0").steps.tolist() == [24] * 6
    recent = [(each.step, each.updates, each.nonfinite) for each in second.recent["0"]]
    assert recent == [(step, 2, 0) for step in range(7, 27)]
    expected = of_numpy(steps[3:], 0.1)
    np.testing.assert_allclose(second.channels("0").batch_mean.numpy(), expected[:, 0].mean(0), atol=1e-4)
    assert second.rows[0].remark == "2 updates a step"
    assert watch.read().rows[0].drift is None


def test_shift_of_a_recent_step():
    bn = nn.BatchNorm2d(6)
    watch = RunningStatisticsWatch({"bn": bn})
    (batches,) = data(1)
    train(bn, watch, [batches])
    expected = of_numpy([batches], 0.1)[0]
    (step,) = watch.read().recent["bn"]
    assert step.shift == pytest.approx(np.sqrt((expected[0] ** 2).mean()), rel=1e-4)  # from mean 0 and variance 1


def test_layers_that_did_not_move_are_unknown():
    moving, frozen = nn.BatchNorm2d(6), nn.BatchNorm2d(6).eval()
    watch = RunningStatisticsWatch({"moving": moving, "frozen": frozen})
    train(nn.Sequential(moving, frozen), watch, data(3))
    snapshot = watch.read()
    rows = {row.layer: row for row in snapshot.rows}
    assert rows["frozen"].updates == 0
    frozen = snapshot.channels("frozen")
    assert all(each.isnan().all() for each in (frozen.batch_mean, frozen.batch_mean_std, frozen.batch_var))
    assert (rows["frozen"].drift, rows["frozen"].noise, rows["frozen"].spread) == (None, None, None)
    assert rows["moving"].drift is not None


def test_what_rounding_hides_is_unknown():
    """At mean 1e4 and std 0.1 a batch mean has a resolution of about a tenth of the std."""
    bn = nn.BatchNorm2d(6)
    watch = RunningStatisticsWatch({"bn": bn})
    batches = data(400, mean=1e4, std=0.1)
    train(bn, watch, batches[:390])
    watch.read()
    train(bn, watch, batches[390:])
    (row,) = watch.read().rows
    assert row.resolution > 0.05
    assert row.drift is None
    wide = nn.BatchNorm2d(6).double()
    watch = RunningStatisticsWatch({"bn": wide})
    train(wide, watch, [[x.double() for x in step] for step in batches])
    assert watch.read().rows[0].drift is not None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.BatchNorm2d(6, track_running_stats=False), "no running statistics"),
        (lambda: DebiasedBatchNorm(6), "a rule of its own"),
        (lambda: nn.GroupNorm(2, 6), "no BatchNorm layer"),
    ],
)
def test_layers_that_cannot_be_watched_say_why(make, words):
    net = nn.Sequential(make(), nn.BatchNorm2d(6))
    watch = RunningStatisticsWatch({"0": net[0], "1": net[1]})
    train(net, watch, data(2))
    snapshot = watch.read()
    assert [row.layer for row in snapshot.rows] == ["0", "1"]
    assert words in snapshot.rows[0].reason
    assert snapshot.rows[1].drift is not None
    with pytest.raises(BatchNormError, match=words):
        snapshot.channels("0")
    with pytest.raises(BatchNormError, match="no BatchNorm layer 'x'"):
        snapshot.channels("x")


def test_no_layer_that_can_be_watched():
    watch = RunningStatisticsWatch({"0": nn.BatchNorm2d(6, track_running_stats=False)})
    watch.begin()
    watch.end(0)
    assert watch.read().rows[0].reason


def test_variants_that_follow_torchs_rule():
    net = GhostBatchNorm(6, virtual_batch_size=2)
    watch = RunningStatisticsWatch({"bn": net})
    before = net.running_mean.clone()
    train(net, watch, data(1))
    found = watch.read().channels("bn").batch_mean
    torch.testing.assert_close(found.float(), (net.running_mean - 0.9 * before) / 0.1, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("restore", [True, False])
def test_nonfinite_statistics(restore):
    net = nn.Sequential(nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False))
    watch = RunningStatisticsWatch({"0": net[0], "1": net[1]}, restore=restore)
    steps = data(5)
    train(net, watch, steps[:2])
    good = [buffer.clone() for buffer in (net[0].running_mean, net[0].running_var)]
    steps[2][0][0, 3] = math.inf
    train(net, watch, steps[2:3], first=2)
    if restore:
        assert all(torch.equal(a, b) for a, b in zip(good, (net[0].running_mean, net[0].running_var), strict=True))
    train(net, watch, steps[3:], first=3)
    row = watch.read().rows[0]
    assert (row.first_spoiled, row.restored) == (2, int(restore))
    assert row.spoiled_steps == (1 if restore else 3)
    assert (row.nonfinite > 0) != restore
    assert "first nonfinite after step 2" in row.remark
    assert row.drift is not None if restore else row.drift is None
    assert watch.read().rows[0].first_spoiled == 2, "of the whole fit"


def test_restoring_leaves_finite_statistics_alone():
    nets = [nn.BatchNorm2d(6) for _ in range(2)]
    train(nets[0], RunningStatisticsWatch({"bn": nets[0]}, restore=True), data(4))
    train(nets[1], RunningStatisticsWatch({"bn": nets[1]}), data(4))
    assert all(
        torch.equal(a, b) for a, b in zip(nets[0].state_dict().values(), nets[1].state_dict().values(), strict=True)
    )


def test_buffers_that_are_bound_anew_and_momenta_that_change_are_followed():
    bn = nn.BatchNorm2d(6)
    watch = RunningStatisticsWatch({"bn": bn})
    steps = data(4)
    train(bn, watch, steps[:2])
    bn.running_mean = bn.running_mean.clone() + 5
    bn.momentum = 0.5
    watch.read()
    train(bn, watch, steps[2:], first=2)
    found = watch.read().channels("bn").batch_mean.numpy()
    np.testing.assert_allclose(found, of_numpy(steps[2:], 0.5)[:, 0].mean(0), atol=1e-4)


def test_the_resolution_is_that_of_the_worst_step():
    bn = nn.BatchNorm2d(6)
    watch = RunningStatisticsWatch({"bn": bn})
    large, small = data(1, mean=1e6)[0], data(1, mean=0.0)[0]
    bn.momentum = 1.0
    train(bn, watch, [large, small, small])
    assert (watch.read().channels("bn").mean_resolution > 0.05).all()


def test_the_table_reads_well():
    net = nn.Sequential(nn.BatchNorm2d(6), nn.BatchNorm2d(6).eval())
    watch = RunningStatisticsWatch({"0": net[0], "1": net[1]})
    train(net, watch, data(3))
    snapshot = watch.read()
    text = str(snapshot)
    assert text.startswith("running statistics of 2 BatchNorm layers at optimizer step 2")
    assert "in running σ" in text
    assert set(snapshot.to_dict()["0"]) >= {"drift", "noise", "spread", "dead_share"}


def test_a_watch_costs_no_memory_to_speak_of():
    """2 MiB for 100 layers."""
    layers = {str(index): nn.BatchNorm2d(128) for index in range(100)}
    watch = RunningStatisticsWatch(layers)
    held = {id(value): value for value in vars(watch).values() if isinstance(value, torch.Tensor)}
    assert sum(tensor.untyped_storage().nbytes() for tensor in held.values()) <= 2 * 2**20
