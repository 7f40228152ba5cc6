"""Batch statistics out of running ones, against float64 NumPy over the data itself."""

import numpy as np
import pytest
import torch
from torch import nn

from bn_lightning.functional.recovered import recover_batch_statistics, update_weight


def step(bn, batches):
    """Run training batches; return the running statistics before and after, and the number of updates."""
    before = torch.stack([bn.running_mean, bn.running_var]).double()
    count = int(bn.num_batches_tracked)
    for x in batches:
        bn(x)
    after = torch.stack([bn.running_mean, bn.running_var]).double()
    return before, after, torch.tensor(int(bn.num_batches_tracked) - count), bn.num_batches_tracked


def expected(batches, momentum, total):
    """The weighted average of the batches' own statistics, in float64."""
    own = []
    for x in batches:
        values = np.moveaxis(x.double().numpy(), 1, 0).reshape(x.shape[1], -1)
        own.append(np.stack([values.mean(1), values.var(1, ddof=1)]))
    k = len(batches)
    weights = [1.0] * k if momentum is None else [(1 - momentum) ** (k - 1 - index) for index in range(k)]
    return np.average(own, axis=0, weights=weights)


@pytest.mark.parametrize("momentum", [0.1, 0.9, 0.01, 0.001, 1.0, None])
@pytest.mark.parametrize("updates", [1, 3])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1e4, 0.1), (-3.0, 1e-3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recovered_within_its_resolution(momentum, updates, mean, std, dtype):
    generator = torch.Generator().manual_seed(3)
    bn = nn.BatchNorm2d(16, momentum=momentum, dtype=dtype)

    def batch():
        return (mean + std * torch.randn(8, 16, 5, 5, generator=generator, dtype=torch.float64)).to(dtype)

    for _ in range(5):
        bn(batch())
    batches = [batch() for _ in range(updates)]
    before, after, k, total = step(bn, batches)
    weight = update_weight(torch.tensor(np.nan if momentum is None else momentum, dtype=torch.float64), k, total)
    value, resolution = recover_batch_statistics(before, after, weight, k, eps=torch.finfo(dtype).eps)
    error = np.abs(value.numpy() - expected(batches, momentum, int(total)))
    # What the kernel itself gets wrong is no matter of the recovery; a mean rounded is a variance about another mean.
    eps = torch.finfo(dtype).eps
    own = np.array([[64 * eps * (abs(mean) + std)], [64 * eps * std**2 + (2 * eps * mean) ** 2]])
    assert (error <= resolution.numpy() + own).all()
    assert (resolution.numpy() <= 10 * updates * eps * np.array([[abs(mean) + std], [1.0]]) / weight.numpy()).all()


def test_a_large_mean_has_a_resolution_worth_telling():
    """Off by 5e-2 standard deviations at mean 1e4 and std 0.1."""
    bn = nn.BatchNorm1d(64)
    generator = torch.Generator().manual_seed(0)
    batches = [1e4 + 0.1 * torch.randn(512, 64, generator=generator) for _ in range(4)]
    for x in batches[:3]:
        bn(x)
    before, after, k, total = step(bn, batches[3:])
    weight = update_weight(torch.tensor(0.1, dtype=torch.float64), k, total)
    eps = torch.finfo(torch.float32).eps
    value, resolution = recover_batch_statistics(before, after, weight, k, eps=eps)
    error = np.abs(value[0].numpy() - expected(batches[3:], 0.1, 4)[0])
    assert error.max() > 1e-3
    assert (error <= resolution[0].numpy() + 4 * eps * 1e4).all()
    assert resolution[0].max() < 20 * error.max()


def test_no_update_gives_nothing():
    value, resolution = recover_batch_statistics(
        torch.ones(2), torch.ones(2), torch.tensor([0.0, 0.1]), torch.tensor([0, 1]), eps=1e-7
    )
    assert value.isnan().tolist() == resolution.isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("momentum", "updates", "total", "weight"),
    [(0.1, 0, 5, 0.0), (1.0, 0, 5, 0.0), (1.0, 2, 5, 1.0), (0.0, 3, 5, 0.0), (float("nan"), 0, 0, 0.0)],
)
def test_weights_at_the_ends(momentum, updates, total, weight):
    found = update_weight(torch.tensor(momentum), torch.tensor(updates), torch.tensor(total))
    assert found == weight
