import pytest
import torch
from torch.nn.functional import batch_norm

from bn_lightning.functional import channel_gap, layer_gap


def test_gap_is_the_measured_output_error():
    """Against BN itself, run twice on data that have the population's moments exactly."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 5, dtype=torch.float64, generator=generator)
    pop_mean, pop_var = x.mean(0), x.var(0, correction=0)
    run_mean = pop_mean + torch.tensor([0.0, 0.3, -2.0, 0.0, 1.0])
    run_var = pop_var * torch.tensor([1.0, 1.0, 1.0, 4.0, 0.1])
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0], dtype=torch.float64)
    error = batch_norm(x, run_mean, run_var, weight) - batch_norm(x, pop_mean, pop_var, weight)
    channels = channel_gap(run_mean, run_var, pop_mean, pop_var, 1e-5)
    torch.testing.assert_close(channels[:4], error[:, :4].square().mean(0).sqrt() / weight[:4].abs())
    expected = error.square().mean(0).mean().sqrt() / weight.square().mean().sqrt()
    torch.testing.assert_close(layer_gap(channels, weight), expected)


def test_a_constant_channel_with_a_wrong_variance_is_no_error():
    zero, one = torch.zeros(1), torch.ones(1)
    assert channel_gap(zero, one, zero, zero, 1e-5).item() == 0
    assert channel_gap(one, one, zero, zero, 1e-5).item() == pytest.approx(1, rel=1e-4)


def test_layer_gap_without_weight_and_with_zero_weight():
    channels = torch.tensor([3.0, 4.0])
    assert layer_gap(channels, None).item() == pytest.approx(12.5**0.5)
    assert layer_gap(channels, torch.zeros(2)).item() == 0
    assert layer_gap(torch.tensor([float("nan"), 1.0]), torch.ones(2)).isnan()
