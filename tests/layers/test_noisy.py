"""Noisy BN: the arithmetic against NumPy with the noise given, the noise against its closed-form moments."""

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bn_lightning.errors import ConversionError
from bn_lightning.functional.noise import apply_noise, draw_noise
from bn_lightning.layers.noisy import NoisyBatchNorm

SHAPES = [(6, 3), (4, 3, 5), (4, 3, 5, 2), (2, 3, 2, 3, 2)]
NOISE = {"n_mu": 0.5, "n_sigma": 1.25, "r_mu": 0.1, "r_sigma": 0.1}
AFFINE = [True, "scale", "shift", False]


def build(affine=True, dtype=torch.float64, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    layer = NoisyBatchNorm(3, affine=affine, dtype=dtype, **options)
    for tensor in (*layer.parameters(), layer.running_mean, layer.running_var):
        torch.nn.init.uniform_(tensor, 0.5, 2.0, generator=generator)
    layer.num_batches_tracked.fill_(7)
    return layer


def batch(shape, dtype=torch.float64, seed=1):
    return 3 + 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def numpy(tensor):
    return None if tensor is None else tensor.detach().numpy().copy()


@pytest.mark.parametrize("affine", AFFINE, ids="affine={}".format)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step_matches_numpy_with_the_same_noise(shape, affine):
    noise = {"n_mu": 0.7, "n_sigma": 1.6, "r_mu": 0.2, "r_sigma": 0.3}
    layer, x = build(affine, **noise), batch(shape)
    before = numpy(layer.running_mean), numpy(layer.running_var)
    torch.manual_seed(3)
    scale, shift = draw_noise(x, **noise)
    expected = reference.noisy_batch_norm(
        x.numpy(), scale.numpy(), shift.numpy(), numpy(layer.weight), numpy(layer.bias)
    )
    torch.manual_seed(3)
    np.testing.assert_allclose(numpy(layer(x)), expected.y, rtol=1e-9)
    np.testing.assert_allclose(numpy(layer.running_mean), reference.moved(before[0], expected.mean, 0.1), rtol=1e-9)
    np.testing.assert_allclose(numpy(layer.running_var), reference.moved(before[1], expected.var, 0.1), rtol=1e-9)
    assert layer.num_batches_tracked == 8


def test_evaluation_has_no_noise():
    layer, x = build().eval(), batch((4, 3, 5))
    expected = reference.standardize(
        x.numpy(), *map(numpy, (layer.running_mean, layer.running_var, layer.weight, layer.bias)), layer.eps
    )
    np.testing.assert_allclose(numpy(layer(x)), expected, rtol=1e-9)


def test_noise_is_fresh_each_step_and_repeats_with_the_seed():
    layer, x = build(), batch((4, 3, 5))
    torch.manual_seed(0)
    first, second = layer(x), layer(x)
    torch.manual_seed(0)
    assert not torch.equal(first, second)
    assert torch.equal(first, layer(x))


def test_gradients_with_the_noise_held_fixed():
    layer, x = build(), batch((4, 3, 2)).requires_grad_()
    layer.track_running_stats = False

    def step(x, weight, bias):
        torch.manual_seed(5)
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(step, (x, layer.weight, layer.bias))


def within(samples, expected, of_std):
    """Whether a mean is within five standard errors of what it should be."""
    return abs(samples.mean().item() - expected) < 5 * of_std / samples.numel() ** 0.5


def test_noise_of_each_value_about_its_channel_has_the_papers_moments():
    options = {"n_mu": 0.7, "n_sigma": 1.6, "r_mu": 0.2, "r_sigma": 0.3}
    torch.manual_seed(0)
    scale, shift = draw_noise(torch.empty(500, 40, 20, dtype=torch.float64), **options)
    for values, std, kurtosis in ((shift, 0.2 / 3**0.5, 1.8), (scale, 0.3, 3.0)):
        centred = values - values.mean((0, 2), keepdim=True)
        relative = centred / std
        assert within(relative.square(), 1.0, (kurtosis - 1) ** 0.5)
        assert within(relative**4, kurtosis, 10.0)  # uniform 1.8, normal 3
    assert (shift - shift.mean((0, 2), keepdim=True)).abs().max() < 0.2 * 1.05


def test_noise_of_each_channel_has_the_papers_moments():
    options = {"n_mu": 0.7, "n_sigma": 1.6, "r_mu": 0.0, "r_sigma": 0.0}
    torch.manual_seed(0)
    scale, shift = draw_noise(torch.empty(2, 100_000, dtype=torch.float64), **options)
    assert torch.equal(scale[0], scale[1])
    assert torch.equal(shift[0], shift[1])
    mu, sigma = shift[0], scale[0]
    assert within(mu, 0.0, 0.7 / 3**0.5)
    assert within(mu.square(), 0.7**2 / 3, 0.49 * (1 / 5 - 1 / 9) ** 0.5)
    assert -0.7 <= mu.min() < -0.69 < 0.69 < mu.max() <= 0.7
    assert within(sigma, 1.3, 0.6 / 12**0.5)
    assert 1.0 <= sigma.min() < 1.001 < 1.599 < sigma.max() <= 1.6
    assert abs(np.corrcoef(mu.numpy(), sigma.numpy())[0, 1]) < 5 / 100_000**0.5


def test_defaults_are_the_papers_constants():
    assert NoisyBatchNorm(3).options() == NOISE


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=3).map(lambda rest: (4, 3, *rest)),
    affine=st.sampled_from(AFFINE),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    momentum=st.sampled_from([0.1, 0.9, None]),
)
def test_without_noise_it_is_plain_batch_norm(shape, affine, dtype, momentum):
    silent = {"n_mu": 0, "n_sigma": 1, "r_mu": 0, "r_sigma": 0}
    layer, x = build(affine, torch.float32, momentum=momentum, **silent), batch(shape, dtype)
    plain = torch.nn.BatchNorm1d(3, momentum=momentum)
    plain._check_input_dim = lambda x: None
    plain.weight, plain.bias = layer.weight, layer.bias
    plain.load_state_dict(layer.state_dict())
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, plain(x))
    torch.testing.assert_close(dict(layer.named_buffers()), dict(plain.named_buffers()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_noise_follows_dtype_and_memory_format(dtype):
    x = batch((2, 3, 4, 4), dtype).to(memory_format=torch.channels_last)
    for noise in draw_noise(x, **NOISE):
        assert noise.dtype == dtype
        assert noise.is_contiguous(memory_format=torch.channels_last)
    assert build(dtype=torch.float32)(x).is_contiguous(memory_format=torch.channels_last)


def test_one_activation_is_kept_for_the_noise():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = torch.ones(8, 3, requires_grad=True) * 1
        saved.clear()
        apply_noise(y, torch.ones(8, 3), torch.ones(8, 3))
    assert len(saved) == 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_the_same_values_and_gradients(dynamic):
    layer, x = build(), batch((4, 3, 5)).requires_grad_()
    torch.compiler.reset()  # sizes that other tests compiled with would make this one's dynamic
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for call in (layer, compiled):
        torch.manual_seed(0)
        y = call(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, layer.weight, layer.bias))))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "options",
    [{"n_mu": -0.1}, {"n_sigma": 0.9}, {"r_mu": float("inf")}, {"r_sigma": float("nan")}, {"r_sigma": "0.1"}],
    ids=str,
)
def test_impossible_noise_is_refused(options):
    name = next(iter(options))
    with pytest.raises(ConversionError, match=f"{name} has to be a finite number"):
        NoisyBatchNorm(3, **options)
