"""The gradients that flow back into the layers' outputs, against torch.autograd.grad on the outputs themselves."""

import numpy as np
import pytest
import torch
from torch import nn

from bn_lightning.functional.activation import activation_statistics
from bn_lightning.monitoring import ActivationWatch


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(inplace=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=inplace), nn.Flatten(), nn.Linear(64, 3), nn.Tanh()
    )


def watched(net, **options):
    watch = ActivationWatch(gradients=True, **options)
    watch.install(net)
    watch.sampling = True
    return watch


def by_autograd(batches):
    """Each layer's gradients over the batches, from a network without hooks or in-place operations."""
    found = {}
    for x in batches:
        net, outputs = network(inplace=False), []
        for layer in net:
            x = layer(x)
            outputs.append(x)
        for index, gradient in enumerate(torch.autograd.grad(x.square().sum(), outputs)):
            found.setdefault(str(index), []).append(gradient.double().numpy())
    return {name: np.concatenate(gradients) for name, gradients in found.items()}


def test_gradients_are_those_of_autograd():
    net, batches = network(), [draw(size, 2, 6, 6, seed=size) for size in (3, 5)]
    watch = watched(net)
    for x in batches:
        net(x).square().sum().backward()
    gradients = watch.flush().gradients
    for name, values in by_autograd(batches).items():
        row, channels = gradients.rows[name], gradients.channels(name)
        assert (row.count, row.channels) == (values.size, values.shape[1])
        found = [row.mean, row.std, row.min, row.max, row.zero_fraction]
        expected = [values.mean(), values.std(), values.min(), values.max(), (values == 0).mean()]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7, err_msg=name)
        axes = tuple(axis for axis in range(values.ndim) if axis != 1)
        np.testing.assert_allclose(channels.std, values.std(axes), rtol=1e-4, err_msg=name)
    assert "gradients of 6 layers" in str(gradients)


def test_a_scaled_loss_is_unscaled():
    found = []
    for scale in (1.0, 65536.0):
        net = network()
        watch = watched(net)
        (net(draw(3, 2, 6, 6)).square().sum() * scale).backward()
        found.append(watch.start_flush(gradient_scale=torch.tensor([scale]))())
    one, scaled = ([snapshot.gradients.to_dict(), snapshot.to_dict()] for snapshot in found)
    assert scaled[1] == one[1], "activations are not scaled"
    for name, row in one[0].items():
        for field in ("mean", "std", "min", "max", "rms"):
            assert scaled[0][name][field] == pytest.approx(row[field], rel=1e-6), (name, field)


def test_what_gets_no_gradient_says_so():
    net = network()
    net[0].requires_grad_(False)
    watch = watched(net)
    net(draw(3, 2, 6, 6))[:, 0].sum().backward()
    rows = watch.flush().gradients.rows
    assert rows["0"].reason == "no gradient came back"
    assert (rows["1"].count, rows["1"].reason) == (192, "")
    assert rows["5"].zero_fraction == pytest.approx(2 / 3)


def test_between_samples_and_after_the_end_nothing_is_measured():
    net = network()
    watch = watched(net)
    loss = net(draw(3, 2, 6, 6)).sum()
    watch.sampling = False
    loss.backward()
    assert all(row.count == 0 for row in watch.flush().gradients.rows.values())
    watch.sampling = True
    loss = net(draw(3, 2, 6, 6)).sum()
    watch.remove()
    loss.backward()
    assert all(row.count == 0 for row in watch.flush().gradients.rows.values())


def test_gradients_are_bitwise_unchanged():
    def gradients(options):
        net, watch = network(), ActivationWatch(**options)
        watch.install(net)
        watch.sampling = True
        net(draw(3, 2, 6, 6)).square().sum().backward()
        return [parameter.grad for parameter in net.parameters()]

    assert all(map(torch.equal, gradients({"gradients": True}), gradients({"gradients": False})))


def test_without_asking_there_are_none():
    watch = ActivationWatch()
    watch.install(network())
    assert watch.flush().gradients is None


def test_what_cannot_be_measured_of_a_gradient_has_its_reason():
    def fails(x, *, channel_dim=1):
        if x.grad_fn is None:  # outputs have one
            raise TypeError("never seen")
        return activation_statistics(x, channel_dim=channel_dim)

    net = nn.Sequential(nn.Linear(3, 2))
    watch = watched(net, statistics=fails)
    net(draw(4, 3)).sum().backward()
    snapshot = watch.flush()
    assert snapshot.rows["0"].count == 8
    assert snapshot.gradients.rows["0"].reason == "it could not be measured: TypeError: never seen"
