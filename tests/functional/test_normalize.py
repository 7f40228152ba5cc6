import pytest
import reference
import torch
from torch import nn

from bn_lightning.functional.normalize import (
    batch_norm_with_statistics,
    batch_normalize,
    channel_statistics,
    normalize,
)

SHAPES = [(6, 3), (4, 3, 5), (4, 3, 2, 3), (3, 3, 2, 1, 2)]
AFFINE = ["both", "scale", "shift", "neither"]
EPS = 1e-3


def tensors(shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=dtype) * 2 + 1
    mean, weight, bias = torch.randn(3, shape[1], generator=generator, dtype=dtype).unbind()
    var = torch.rand(shape[1], generator=generator, dtype=dtype) + 0.5
    return [t.clone().requires_grad_() for t in (x, mean, var, weight, bias)]


def chosen(affine, weight, bias):
    return weight if affine in ("both", "scale") else None, bias if affine in ("both", "shift") else None


def inputs_of(*tensors):
    return tuple(t for t in tensors if t is not None)


@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_reach_everything_that_is_given(shape, affine):
    x, mean, var, weight, bias = tensors(shape)
    weight, bias = chosen(affine, weight, bias)

    def run(x, mean, var, *affine):
        rest = list(affine)
        w, b = (rest.pop(0) if p is not None else None for p in (weight, bias))
        return normalize(x, mean, var, w, b, EPS)

    assert torch.autograd.gradcheck(run, inputs_of(x, mean, var, weight, bias))


@pytest.mark.parametrize("wanted", range(5), ids=["x", "mean", "var", "weight", "bias"])
def test_each_gradient_alone_is_the_one_among_all(wanted):
    def gradient(alone):
        given = tensors((4, 3, 5))
        for index, tensor in enumerate(given):
            tensor.requires_grad_(not alone or index == wanted)
        normalize(*given, EPS).square().sum().backward()
        return given[wanted].grad

    torch.testing.assert_close(gradient(alone=True), gradient(alone=False))


@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_normalizing_by_own_statistics_is_batch_norm(shape, affine):
    x, _, _, weight, bias = tensors(shape)
    weight, bias = chosen(affine, weight, bias)
    y = batch_normalize(x, *channel_statistics(x), weight, bias, EPS)
    expected = reference.batch_norm(*(None if t is None else t.detach().numpy() for t in (x, weight, bias)), EPS)
    torch.testing.assert_close(y.detach().numpy(), expected.y)
    given = inputs_of(x, weight, bias)
    g = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = torch.autograd.grad(y, given, g)
    theirs = torch.autograd.grad(nn.functional.batch_norm(x, None, None, weight, bias, True, 0.0, EPS), given, g)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_and_their_gradients(shape):
    x, *_ = tensors(shape)
    mean, var = channel_statistics(x)
    values = reference.values(x.detach().numpy())
    torch.testing.assert_close(mean.detach().numpy(), values.mean(1))
    torch.testing.assert_close(var.detach().numpy(), values.var(1))
    assert torch.autograd.gradcheck(channel_statistics, (x,))


def test_second_derivatives_go_through_batch_normalize():
    x, _, _, weight, bias = tensors((5, 2, 3))
    assert torch.autograd.gradgradcheck(
        lambda x, weight, bias: batch_normalize(x, *channel_statistics(x), weight, bias, EPS), (x, weight, bias)
    )


def test_what_the_statistics_depend_on_gets_no_gradient_through_batch_normalize():
    x, _, _, weight, _ = tensors((4, 3, 5))
    mean, var = channel_statistics(x)
    y = batch_normalize(x, mean, var, weight, None, EPS)
    assert torch.autograd.grad(y.sum(), (mean, var), allow_unused=True) == (None, None)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stock_batch_norm_and_its_statistics(shape):
    x, _, _, weight, bias = tensors(shape)
    y, mean, var = batch_norm_with_statistics(x, weight, bias, EPS)
    expected = reference.batch_norm(*(t.detach().numpy() for t in (x, weight, bias)), EPS)
    for ours, theirs in zip((y, mean, var), expected, strict=True):
        torch.testing.assert_close(ours.detach().numpy(), theirs)


@pytest.mark.parametrize("parameter", [None, "float32", "same"], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_measured_in_float32(dtype, parameter):
    parameter = {None: None, "float32": torch.float32, "same": dtype}[parameter]
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(64, 3, 9, generator=generator) + 5).to(dtype)
    weight = None if parameter is None else torch.rand(3, generator=generator).to(parameter)
    mean, var = channel_statistics(x)
    values = reference.values(x.double().numpy())
    assert mean.dtype == var.dtype == torch.float32
    torch.testing.assert_close(mean.double().numpy(), values.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double().numpy(), values.var(1), rtol=1e-5, atol=0)
    y = batch_normalize(x.requires_grad_(), mean, var, weight, None, EPS)
    y.float().square().sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    stated = batch_norm_with_statistics(x, weight, None, EPS)[1]
    assert stated.dtype == (torch.float32 if parameter is None else parameter)


@pytest.mark.parametrize("function", [normalize, batch_normalize], ids=lambda f: f.__name__)
def test_memory_format_is_kept(function):
    x, mean, var, weight, bias = tensors((4, 3, 5, 5), torch.float32)
    x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    y = function(x, mean, var, weight, bias, EPS)
    y.square().sum().backward()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def saved_elements(run):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        run()
    return sum(sizes)


def test_nothing_of_the_size_of_x_is_kept_but_x_and_not_even_that_when_frozen():
    x, mean, var, weight, bias = tensors((4, 3, 5, 5))
    small = 10 * 3
    kept = saved_elements(lambda: batch_normalize(x, mean, var, weight, bias, EPS))
    assert x.numel() <= kept < x.numel() + small
    frozen = [t.detach() for t in (mean, var, weight, bias)]
    assert saved_elements(lambda: normalize(x, *frozen, EPS)) < small


@pytest.mark.parametrize("function", [normalize, batch_normalize], ids=lambda f: f.__name__)
def test_an_empty_batch_goes_forward_and_back(function):
    x, mean, var, weight, bias = tensors((4, 3, 5))
    x = x.detach()[:0].requires_grad_()
    function(x, mean, var, weight, bias, EPS).sum().backward()
    assert x.grad.shape == (0, 3, 5)
    assert torch.equal(weight.grad, torch.zeros(3, dtype=torch.float64))
