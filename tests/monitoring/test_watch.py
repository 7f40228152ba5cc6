"""Taps: what they measure, what they leave alone, and that they never wait for the device."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bn_lightning as bnl
from bn_lightning.monitoring import ActivationWatch


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 5)
    )
    net[1].running_mean.copy_(draw(4))
    net[1].running_var.copy_(draw(4).exp())
    net[1].weight.data.copy_(draw(4, seed=1))
    net[1].bias.data.copy_(draw(4, seed=2))
    return net


def test_every_layer_of_several_calls_matches_numpy():
    net, batches = network(), [draw(n, 3, 8, 8, seed=n) for n in (4, 1, 7)]
    with bnl.observe_activations(net) as activations:
        for batch in batches:
            net(batch)
    outputs, reference = {}, network().train()
    for batch in batches:  # layer by layer, without hooks; in-place ReLU must not have changed what BN put out
        x = batch
        for name, layer in reference.named_children():
            x = layer(x)
            outputs.setdefault(name, []).append(x.detach().double().numpy().copy())
    assert list(activations.to_dict()) == ["0", "1", "2", "3", "5"]
    for name in ("0", "1", "2", "3"):  # what follows dropout is random
        values = np.concatenate(outputs[name])
        row, channels = activations.to_dict()[name], activations.channels(name)
        assert (row["count"], row["zero_fraction"]) == (values.size, (values == 0).mean())
        expected = [values.mean(), values.std(), values.min(), values.max(), np.sqrt(np.square(values).mean())]
        np.testing.assert_allclose(
            [row[k] for k in ("mean", "std", "min", "max", "rms")], expected, rtol=1e-5, atol=1e-7
        )
        axes = tuple(axis for axis in range(values.ndim) if axis != 1)
        np.testing.assert_allclose(channels.std, values.std(axes), rtol=1e-5)
        np.testing.assert_allclose(channels.mean, values.mean(axes), rtol=1e-5, atol=1e-7)


def test_a_flush_begins_a_new_sample_and_a_read_does_not():
    net, watch = nn.Sequential(nn.ReLU()), ActivationWatch()
    watch.install(net)
    watch.sampling = True
    counts = []
    for x, look in ((draw(2, 3), watch.read), (draw(4, 3), watch.flush), (draw(5, 3), watch.flush)):
        net(x)
        counts.append(look().to_dict()["0"]["count"])
    assert counts == [6, 18, 15]
    assert watch.flush().to_dict()["0"]["reason"] == "not called"


def test_nothing_is_measured_between_samples():
    net, watch = nn.Sequential(nn.ReLU()), ActivationWatch()
    watch.install(net)
    x = draw(2, 3)
    with Operations() as operations:
        net(x)
    assert operations.names == ["aten::relu"]
    assert watch.flush().to_dict()["0"]["count"] == 0


class Operations(TorchDispatchMode):
    """Records the operations that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def test_hooks_never_read_a_value_on_the_host(monkeypatch):
    # A meta tensor has no values: every way to read one, or to copy it to the host, raises.
    monkeypatch.setattr("bn_lightning.monitoring.watch.unmeasurable", lambda tensor: "")
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).to("meta")
    watch = ActivationWatch()
    watch.install(net)
    watch.sampling = True
    with Operations() as operations:
        for batch in (2, 2, 3):
            net(torch.empty(batch, 3, 8, 8, device="meta"))
    assert len(operations.names) > 200
    assert not {"aten::_local_scalar_dense", "aten::item", "aten::nonzero"} & set(operations.names)
    assert watch._buffer.used.shape == (7, 4 + 4 + 4 + 144 + 5)
    with pytest.raises(NotImplementedError, match="meta"):
        watch.flush()  # the proof that a read would have raised


def test_a_flush_is_one_copy_whatever_the_number_of_layers(monkeypatch):
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(30)))
    watch, copies = ActivationWatch(), []
    watch.install(net)
    watch.sampling = True
    # On a CPU, and only there, a hook may look at one number by __float__: see the test before this one.
    for name in ("cpu", "item", "tolist", "numpy", "__bool__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} in a hook"))
    net(draw(2, 3))
    monkeypatch.undo()
    to_host = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(tuple(self.shape)) or to_host(self))
    watch.flush()
    assert copies == [(7, 90)]


@pytest.mark.parametrize(
    "buffer_type",
    [pytest.param(torch.bfloat16, id="bfloat16"), pytest.param(torch.float16, id="float16")],
)
def test_autocast_does_not_reach_the_statistics(buffer_type):
    net, x = nn.Sequential(nn.Linear(64, 8)), draw(100, 64)
    with bnl.observe_activations(net) as activations, torch.autocast("cpu", dtype=buffer_type):
        output = net(x)
    assert output.dtype == buffer_type
    np.testing.assert_allclose(activations.channels("0").std, output.detach().double().numpy().std(0), rtol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_samples_may_mix_gradient_modes(mode):
    net = nn.Sequential(nn.Linear(3, 2))
    with bnl.observe_activations(net) as activations:
        with mode():
            net(draw(2, 3))
        net(draw(2, 3)).sum().backward()
        with mode():
            net(draw(2, 3))
            inside = activations.to_dict()["0"]["count"]
    assert (inside, activations.to_dict()["0"]["count"]) == (12, 12)


def test_shared_modules_merge_and_keep_channel_counts_apart():
    relu = nn.ReLU()
    net = nn.Sequential(nn.Linear(3, 2), relu, nn.Linear(2, 4), relu)
    x = draw(6, 3)
    with bnl.observe_activations(net) as activations:
        net(x)
    one = net[1](net[0](x))
    two = net[3](net[2](one))
    expected = np.concatenate([one.detach().double().numpy().ravel(), two.detach().double().numpy().ravel()])
    row = activations.to_dict()["1"]
    assert (row["count"], row["channels"]) == (36, 6)
    np.testing.assert_allclose([row["mean"], row["std"]], [expected.mean(), expected.std()], rtol=1e-6)


def test_the_buffer_grows_without_losing_what_it_holds():
    net = nn.Sequential(*(nn.Sequential(nn.Linear(3, width), nn.Linear(width, 3)) for width in (1500, 3000, 9000)))
    x = draw(4, 3)
    with bnl.observe_activations(net) as activations:
        net(x)
        net(x)
    for index, pair in enumerate(net):
        for child, layer in enumerate(pair):
            x = layer(x)
            channels = activations.channels(f"{index}.{child}")
            np.testing.assert_allclose(channels.mean, x.detach().double().mean(0), rtol=1e-4, atol=1e-6)
            assert channels.count.unique().tolist() == [8]


def test_ever_new_channel_counts_do_not_grow_the_buffer_for_ever():
    net = nn.Sequential(nn.ReLU())
    with bnl.observe_activations(net) as activations:
        for length in range(1, 200):
            net(torch.ones(2, length, 3, 1))
    row = activations.to_dict()["0"]
    assert row["count"] == 6 * sum(range(1, 200))
    assert row["channels"] <= 8 * 9
    assert "after 8 different channel counts" in row["reason"]


def test_a_copy_of_a_watched_network_is_not_watched():
    net = nn.Sequential(nn.ReLU())
    with bnl.observe_activations(net) as activations:
        other, x = copy.deepcopy(net), draw(2, 3)
        with Operations() as operations:
            other(x)
    assert operations.names == ["aten::relu"]
    assert activations.to_dict()["0"]["count"] == 0
