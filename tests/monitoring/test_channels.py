"""Which axis holds a layer's channels, and that a layer that cannot know takes it from the layer before."""

import numpy as np
import pytest
import torch
from torch import nn

import bn_lightning as bnl
from bn_lightning.monitoring.channels import ChannelAxes, find_tensor, own_axis


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Call(nn.Module):
    """Puts out what a function makes of its input."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def biased(layer):
    """Every parameter random and no two channels alike, the last channel always below zero."""
    for index, parameter in enumerate(layer.parameters()):
        parameter.data.copy_(draw(*parameter.shape, seed=index))
    layer.bias.data.copy_(torch.arange(len(layer.bias)))
    layer.bias.data[-1] = -100
    return layer


@pytest.mark.parametrize(
    ("layers", "shape", "axis"),
    [
        pytest.param([biased(nn.Linear(4, 6))], (16, 5, 4), -1, id="linear (N,L,C)"),
        pytest.param([biased(nn.LayerNorm(6))], (16, 5, 6), -1, id="layer norm"),
        pytest.param([biased(nn.Linear(4, 6)), nn.Identity(), nn.Dropout(0)], (16, 5, 4), -1, id="through Identity"),
        pytest.param([biased(nn.Linear(4, 6)), nn.Softshrink(0.1)], (16, 5, 4), -1, id="two activations"),
        pytest.param([biased(nn.Linear(4, 6)), nn.ReLU(inplace=True)], (16, 5, 4), -1, id="in place"),
        pytest.param([biased(nn.Linear(4, 6))], (3, 2, 5, 4), -1, id="linear (N,H,W,C)"),
        pytest.param([biased(nn.Conv1d(4, 6, 2))], (16, 4, 9), 1, id="convolution (N,C,L)"),
        pytest.param([biased(nn.Conv1d(4, 6, 2)), nn.MaxPool1d(2)], (16, 4, 9), 1, id="pooling (N,C,L)"),
        pytest.param([biased(nn.Conv2d(4, 6, 2))], (4, 5, 7), 0, id="convolution without a batch"),
        pytest.param([biased(nn.Conv2d(4, 6, 2)), nn.AvgPool2d(2)], (4, 5, 7), 0, id="pooling without a batch"),
        pytest.param([biased(nn.Conv2d(4, 6, 2)), nn.Upsample(scale_factor=2)], (2, 4, 5, 7), 1, id="upsampling"),
    ],
)
@pytest.mark.parametrize("lengths", [[0], [0, 1, 2]], ids=["one length", "three lengths"])
def test_an_activation_has_the_channels_of_its_input(layers, shape, axis, lengths):
    net = nn.Sequential(*layers, nn.ReLU())
    if shape[1:] == (5, 4) and lengths != [0]:
        batches = [draw(16, 5 + longer, 4, seed=longer) for longer in lengths]
    else:
        batches = [draw(*shape, seed=index) for index in lengths]
    with bnl.observe_activations(net) as activations:
        outputs = [net(batch) for batch in batches]
    name = str(len(layers))
    channels, row = activations.channels(name), activations.to_dict()[name]
    values = np.concatenate(
        [np.moveaxis(output.detach().double().numpy(), axis, 0).reshape(6, -1) for output in outputs], axis=1
    )
    np.testing.assert_allclose(channels.mean, values.mean(1), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(channels.std, values.std(1), rtol=1e-5, atol=1e-7)
    assert row["channels"] == 6
    assert row["dead_channels"] == int((values == 0).all(1).sum()) > 0
    assert row["reason"] == ""


@pytest.mark.parametrize(
    "before",
    [
        pytest.param([], id="the network's input"),
        pytest.param([Call(lambda x: x.mT)], id="a layer that reorders the input"),
        pytest.param([nn.Linear(4, 6), Call(lambda x: x.mT.clone())], id="a layer that reorders known channels"),
        pytest.param(
            [nn.Unflatten(1, (5, 1)), nn.Conv2d(5, 6, 1), Call(lambda x: x.flatten(2).mT)], id="patches of a picture"
        ),
        pytest.param([nn.Conv1d(5, 3, 1), Call(lambda x: x[..., None].flatten(2).clone().mT)], id="another order"),
    ],
)
def test_three_axes_of_unknown_origin_are_one_channel_and_say_so(before):
    net, x = nn.Sequential(*before, nn.ReLU()), draw(16, 5, 4)
    with bnl.observe_activations(net) as activations:
        output = net(x).detach().double().numpy()
    row = activations.to_dict()[str(len(before))]
    assert (row["channels"], row["count"]) == (1, output.size)
    np.testing.assert_allclose([row["mean"], row["std"]], [output.mean(), output.std()], rtol=1e-6)
    assert "measured as one channel" in row["reason"]
    assert "measured as one channel" in str(activations.table()).splitlines()[-3]


@pytest.mark.parametrize(
    ("layer", "shape", "reorder", "axis"),
    [
        pytest.param(nn.Linear(4, 6), (16, 5, 4), lambda x: x.mT, 1, id="(N,L,C) to (N,C,L)"),
        pytest.param(nn.Conv2d(4, 6, 1), (2, 4, 3, 5), lambda x: x.permute(0, 2, 3, 1), 3, id="(N,C,H,W) to (N,H,W,C)"),
    ],
)
def test_a_view_with_other_axes_keeps_its_channels(layer, shape, reorder, axis):
    net, x = nn.Sequential(layer, Call(reorder), nn.ReLU()), draw(*shape)
    with bnl.observe_activations(net) as activations:
        output = net(x).detach().double().numpy()
    others = tuple(index for index in range(output.ndim) if index != axis)
    np.testing.assert_allclose(activations.channels("2").mean, output.mean(others), rtol=1e-5)
    assert activations.to_dict()["1"]["reason"] == activations.to_dict()["2"]["reason"] == ""


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5, 5), (4, 3, 2, 5, 5)], ids=str)
def test_other_shapes_of_unknown_origin_have_their_channels_second(shape):
    with bnl.observe_activations(nn.ReLU()) as activations:
        pass
    net = nn.Sequential(nn.ReLU())
    with bnl.observe_activations(net) as activations:
        net(draw(*shape))
    assert (activations.to_dict()["0"]["channels"], activations.to_dict()["0"]["reason"]) == (3, "")


def test_an_activation_used_twice_follows_each_input():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear, self.act = nn.Conv1d(4, 6, 1), nn.Linear(5, 2), nn.Tanh()

        def forward(self, x):
            return self.act(self.linear(self.act(self.conv(x))))

    net, x = Net(), draw(3, 4, 5)
    with bnl.observe_activations(net) as activations:
        net(x)
    first = net.conv(x).tanh()
    expected = [first.mean((0, 2)), net.linear(first).tanh().mean((0, 1))]
    torch.testing.assert_close(activations.channels("act").mean, torch.cat(expected).detach().double())


def test_a_tensor_at_a_dead_ones_address_inherits_nothing():
    axes, relu, linear = ChannelAxes(), nn.ReLU(), nn.Linear(4, 6)
    made = linear(draw(2, 5, 4))
    axes.of(linear, (), made)
    stranger = draw(2, 5, 6)
    axes._known[id(stranger)] = axes._known.pop(id(made))  # as if its id had been given away anew
    assert axes.of(relu, (stranger,), stranger.relu()) is None


def test_nothing_is_kept_beyond_the_sample():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    with bnl.observe_activations(net) as activations:
        net(draw(2, 4))
        assert activations._watch._axes._known
        activations._watch.flush()
        assert not activations._watch._axes._known
        net(draw(2, 4))
    assert not activations._watch._axes._known


@pytest.mark.parametrize(
    ("layer", "shape", "axis"),
    [
        pytest.param(nn.Linear(2, 3), (4, 7, 3), -1, id="linear"),
        pytest.param(nn.Embedding(5, 3), (4, 7, 3), -1, id="embedding"),
        pytest.param(nn.GRU(2, 3), (4, 7, 3), -1, id="recurrent"),
        pytest.param(nn.LayerNorm(3), (4, 7, 3), -1, id="layer norm"),
        pytest.param(nn.RMSNorm(3), (4, 7, 3), -1, id="RMS norm"),
        pytest.param(nn.LayerNorm(3), (4, 3, 7, 7), 1, id="layer norm over axis 1"),
        pytest.param(nn.LayerNorm((3, 7, 7)), (4, 3, 7, 7), None, id="layer norm over three axes"),
        pytest.param(nn.BatchNorm1d(3), (4, 3, 7), 1, id="batch norm"),
        pytest.param(nn.SyncBatchNorm(3), (4, 3, 7), 1, id="sync batch norm"),
        pytest.param(nn.GroupNorm(1, 3), (4, 3, 7), 1, id="group norm"),
        pytest.param(nn.InstanceNorm2d(3), (3, 7, 7), -3, id="instance norm without a batch"),
        pytest.param(nn.Conv3d(2, 3, 1), (3, 7, 7, 7), -4, id="3-d convolution without a batch"),
        pytest.param(nn.ConvTranspose1d(2, 3, 1), (4, 3, 7), -2, id="transposed convolution"),
        pytest.param(nn.AdaptiveAvgPool2d(1), (4, 3, 1, 1), -3, id="adaptive pooling"),
        pytest.param(nn.ReLU(), (4, 3, 7), None, id="activation"),
    ],
)
def test_what_a_kind_of_layer_tells_by_itself(layer, shape, axis):
    assert own_axis(layer, torch.zeros(shape)) == axis


def test_the_first_floating_tensor_is_what_was_given():
    x = draw(2)
    assert find_tensor(({"ids": torch.tensor(1)}, [x, draw(3)])) is x
    assert find_tensor(("text", None)) is None
