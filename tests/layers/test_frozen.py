import pytest
import reference
import torch
from torch import nn

from bn_lightning import convert_batch_norm
from bn_lightning.errors import BatchNormError, ConversionError
from bn_lightning.layers import FrozenBatchNorm


def randomized(layer):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (layer.running_mean, layer.weight, layer.bias):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        layer.running_var.copy_(torch.rand(layer.num_features, generator=generator) + 0.5)
    return layer


def x_of(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype) * 2 + 1


@pytest.mark.parametrize("shape", [(4, 3), (1, 3), (4, 3, 5), (2, 3, 4, 4), (2, 3, 2, 2, 2)], ids=str)
def test_training_is_evaluation(shape):
    layer, x = randomized(FrozenBatchNorm(3)).train(), x_of(*shape)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    y = layer(x)
    tensors = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    expected = reference.standardize(x.double().numpy(), *(t.detach().double().numpy() for t in tensors), 1e-5)
    torch.testing.assert_close(y.detach().double().numpy(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(y, layer.eval()(x))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "not"])
def test_gradients(trainable):
    layer = randomized(FrozenBatchNorm(3, trainable=trainable, dtype=torch.float64)).train()
    x = x_of(4, 3, 2, dtype=torch.float64).requires_grad_()
    plain = randomized(nn.BatchNorm1d(3, dtype=torch.float64)).eval()
    g = x_of(4, 3, 2, dtype=torch.float64)
    layer(x).backward(g)
    ours, x.grad = x.grad, None
    plain(x).backward(g)
    torch.testing.assert_close(ours, x.grad)
    for one, other in ((layer.weight, plain.weight), (layer.bias, plain.bias)):
        if trainable:
            torch.testing.assert_close(one.grad, other.grad)
        else:
            assert one.grad is None
            assert not one.requires_grad


def test_without_training_it_keeps_no_activation():
    sizes = []
    x = x_of(8, 3, 16, 16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        randomized(FrozenBatchNorm(3, trainable=False))(x)
    assert sum(sizes) < 100


def test_without_running_statistics_it_says_so():
    with pytest.raises(ConversionError, match=r"FrozenBatchNorm\(3\) has no running statistics to freeze"):
        FrozenBatchNorm(3, track_running_stats=False)


def test_finetuning_callbacks_that_clear_track_running_stats_change_nothing():
    layer, x = randomized(FrozenBatchNorm(3)).train(), x_of(4, 3)
    expected = layer(x)
    layer.track_running_stats = False  # what Lightning's BaseFinetuning.freeze does to a BN
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("shape", [(4, 5), (4,), (4, 4, 3)], ids=str)
def test_a_wrong_shape_is_named(shape):
    with pytest.raises(BatchNormError, match=r"FrozenBatchNorm\(3\) takes \(N, 3, \*\), got shape"):
        FrozenBatchNorm(3)(x_of(*shape))


def test_an_unknown_option_is_refused_with_those_there_are():
    with pytest.raises(
        ConversionError, match=r"no option 'trainabel' \(did you mean 'trainable'\?\); it takes trainable"
    ):
        FrozenBatchNorm(3, trainabel=False)


def test_an_unknown_affine_is_refused():
    with pytest.raises(ConversionError, match="affine has to be True, False, 'scale' or 'shift', got 'weight'"):
        FrozenBatchNorm(3, affine="weight")


def test_update_bn_does_not_move_it():
    layer = randomized(FrozenBatchNorm(3))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    torch.optim.swa_utils.update_bn([x_of(8, 3)], layer)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_buffers_that_are_assigned_are_refused_with_a_warning_and_loaded_ones_are_not():
    layer = randomized(FrozenBatchNorm(3))
    mean = layer.running_mean.clone()
    with pytest.warns(UserWarning, match=r"FrozenBatchNorm\(3\) is frozen and keeps its running_mean"):
        layer.running_mean = torch.zeros(3)  # as Lightning's StochasticWeightAveraging does
    assert torch.equal(layer.running_mean, mean)
    for assign in (False, True):
        layer.load_state_dict({**layer.state_dict(), "running_mean": mean + 1}, assign=assign)
        assert torch.equal(layer.running_mean, mean + 1)
    assert layer.double().running_mean.dtype == torch.float64


def test_training_of_scale_and_shift_can_be_taken_and_given_back():
    layer = nn.BatchNorm1d(3)
    convert_batch_norm(layer, "frozen", trainable=False)
    assert not layer.weight.requires_grad
    convert_batch_norm(layer, "frozen", trainable=True)
    assert layer.weight.requires_grad
    convert_batch_norm(layer, "frozen", trainable=False)
    (row,) = convert_batch_norm(layer, "ghost").rows
    assert "scale and shift are not trainable" in row.reason
    with pytest.raises(ConversionError, match="trainable is True or False, got 'no'"):
        FrozenBatchNorm(3, trainable="no")
