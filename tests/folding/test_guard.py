"""While guarded, a use of a folded pair that was not recorded is refused; every recorded one goes on as before."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bn_lightning import fold_batch_norm
from bn_lightning.errors import FoldError


class Net(nn.Module):
    """conv, bn, and a body that a test may change after the fold."""

    def __init__(self, body=lambda net, x: net.bn(net.conv(x)), conv=None):
        super().__init__()
        self.conv, self.bn, self.drop = conv or nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5, inplace=True)
        self.other, self.body = nn.Conv2d(6, 4, 3), body

    def forward(self, x):
        return self.body(self, x)


@pytest.fixture
def guarded(randomize, images):
    """Fold and guard a net, give it and its guard."""
    opened = []

    def guard(net, x=images):
        result = fold_batch_norm(randomize(net), x)
        assert "bn" in [row.name for row in result.report.rows if row.action != "kept"]
        opened.append((result, result.guarded()))
        return opened[-1][1]

    yield guard
    for result, opened_guard in opened:
        opened_guard.close()
        result.undo()


def read_in_between(net, x):
    y = net.conv(x)
    return net.bn(y) + y


def change_in_between(net, x):
    y = net.conv(x)
    y.mul_(2)
    return net.bn(y)


def view_in_between(net, x):
    y = net.conv(x)
    y[:, 0] = 0
    return net.bn(y)


def drop_in_place(net, x):
    return net.bn(F.dropout(net.conv(x), training=True, inplace=True))


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecated, and all the same in many a deployed network
    SCRIPTED = torch.jit.script(nn.ReLU(inplace=True))


def write_into(net, x):
    y = net.conv(x)
    torch.add(y.shape[0], torch.ones(1), out=y)
    return net.bn(y)


@pytest.mark.parametrize("inference", [True, False], ids=["inference", "grad"])
@pytest.mark.parametrize(
    ("body", "words"),
    [
        pytest.param(lambda net, x: F.relu(net.conv(x)).mean(), "'conv' is read by relu", id="read"),
        pytest.param(lambda net, x: torch.cat([x[:, :4, 2:, 2:], net.conv(x)]), "is read by cat", id="nested"),
        pytest.param(lambda net, x: net.conv(x).cpu().data, "is read by data", id="property"),
        pytest.param(lambda net, x: net.conv(x).detach().numpy(), "is read by detach", id="detach"),
        pytest.param(lambda net, x: np.asarray(net.conv(x)), "is read by array", id="numpy"),
        pytest.param(lambda net, x: pickle.dumps(net.conv(x)), "is read by reduce_ex", id="pickle"),
        pytest.param(lambda net, x: -net.conv(x), "is read by neg", id="minus"),
        pytest.param(read_in_between, r"is read by _?add", id="residual"),
        pytest.param(change_in_between, "is read by mul_", id="in-place"),
        pytest.param(lambda net, x: net.bn(F.relu(net.conv(x), inplace=True)), "is read by relu", id="relu-in-place"),
        pytest.param(view_in_between, "is read by setitem", id="set-item"),
        pytest.param(write_into, "is read by add", id="out"),
        pytest.param(drop_in_place, "is read by dropout", id="dropout-in-training"),
        pytest.param(lambda net, x: net.bn(torch.ops.aten.relu_(net.conv(x))), r"is read by .*relu_", id="operator"),
        pytest.param(lambda net, x: net.bn(SCRIPTED(net.conv(x))), "is read by forward", id="torchscript"),
        pytest.param(
            lambda net, x: net.bn(net.other(x)), "'bn' is given something else than .* 'conv'", id="other-fed"
        ),
        pytest.param(lambda net, x: net.bn(net.bn(net.conv(x))), "'bn' is given something else", id="again-fed"),
    ],
)
def test_an_unrecorded_use_is_refused(guarded, images, inference, body, words):
    net = Net()
    guarded(net)
    net.body = body
    with torch.inference_mode(inference), pytest.raises(FoldError, match=words) as caught:
        net(images)
    caught.match(r"exclude=\['bn'\]")


def test_a_value_that_goes_nowhere_is_found_by_the_check(guarded, images):
    net = Net()
    guard = guarded(net)
    net.conv(images)
    net(images)
    with pytest.raises(FoldError, match="'conv' never reached 'bn'"):
        guard.check()
    guard.check()


def siamese(net, x):
    first, second = net.conv(x), net.conv(x.flip(0))
    return net.bn(second) - net.bn(first)


@pytest.mark.parametrize("inference", [True, False], ids=["inference", "grad"])
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(lambda net, x: net.bn(net.conv(x)), id="plain"),
        pytest.param(lambda net, x: net.bn(input=net.conv(x)), id="keyword"),
        pytest.param(lambda net, x: net.bn(net.drop(net.conv(x)).contiguous().float()), id="same-object"),
        pytest.param(lambda net, x: (y := net.conv(x)) is not None and y.dim() == 4 and net.bn(y), id="metadata"),
        pytest.param(siamese, id="siamese"),
    ],
)
def test_a_recorded_use_goes_on_bit_for_bit(guarded, images, inference, body):
    net = Net(body)
    guard = guarded(net)
    watched, x = [], images.clone().requires_grad_(not inference)
    with torch.inference_mode(inference):
        watched.append(net(x))
        guard.check()
        guard.close()
        watched.append(net(x))
    assert torch.equal(*watched)
    assert [type(output) for output in watched] == [torch.Tensor] * 2
    if not inference:
        gradients = [torch.autograd.grad(output.square().sum(), x)[0] for output in watched]
        assert torch.equal(*gradients)


def test_hooks_outlive_lending_and_go_on_close(randomize, images):
    net = Net()
    result = fold_batch_norm(randomize(net), images)
    guard = result.guarded()
    with result.unfolded():
        read_in_between(net.eval(), images)
    with pytest.raises(FoldError, match="is read by"):
        read_in_between(net, images)
    assert type(net(images)) is torch.Tensor, "it passes through the layer that was put back"
    guard.close()
    guard.close()
    read_in_between(net, images)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


class OwnsItsNorm(nn.Conv2d):
    """A convolution that normalizes inside its own forward, as detectors have it."""

    def __init__(self):
        super().__init__(6, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(super().forward(x))


class Pair(nn.Conv2d):
    def forward(self, x):
        return super().forward(x), x


def test_what_cannot_be_watched_is_named_and_runs(randomize, images):
    inner = nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))
    for net, name, why in [
        (Net(lambda net, x: net.bn(net.conv(x)[0]), conv=Pair(6, 4, 3)), "bn", "'conv' returns a tuple"),
        (nn.Sequential(torch.compile(inner, backend="eager")), "0._orig_mod.1", "torch.compile runs it"),
    ]:
        with torch.no_grad():
            expected = randomize(net)(images)
            result = fold_batch_norm(net, images)
            guard = result.guarded()
            torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-5)
            guard.check()
        assert guard.unwatched == {name: why}
        guard.close()


def folded_forward(net, x):
    return net.conv(net.bn(x[:, :4].relu())).sum()


def concatenated(net, x):
    return net.bn(torch.cat([net.conv(x), net.other(x)], 1)).relu()


def pooled(net, x):
    return net.bn(F.avg_pool2d(net.conv(x), 2)).relu()


ROUNDABOUT = {
    "forward": (folded_forward, nn.Conv2d(4, 4, 3), 4, "it is folded forward"),
    "several": (concatenated, None, 8, "it is folded into several layers"),
    "through": (pooled, None, 4, "it is folded through avg_pool2d"),
}


@pytest.mark.parametrize("case", ROUNDABOUT)
def test_other_folds_are_watched_by_the_order_of_their_calls(guarded, images, case):
    body, conv, width, why = ROUNDABOUT[case]
    net = Net(body, conv)
    net.bn = nn.BatchNorm2d(width)
    guard = guarded(net)
    assert guard.by_order == {"bn": why}
    assert guard.unwatched == {}
    for calls in (0, 1, 3):  # as often as you like
        for _ in range(calls):
            net(images)
        guard.check()
    net(images)
    net.conv(images[:, : net.conv.in_channels])
    with pytest.raises(FoldError, match=r"were called in this order, but 'bn' is folded into .*exclude=\['bn'\]"):
        guard.check()
    guard.check()
    guard.close()
    net.conv(images[:, : net.conv.in_channels])
    guard.check()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize("nested", [False, True], ids=["root", "child"])
def test_a_layer_that_normalizes_inside_its_own_forward(randomize, images, nested):
    net = nn.Sequential(OwnsItsNorm()) if nested else OwnsItsNorm()
    result = fold_batch_norm(randomize(net), images)
    guard = result.guarded()
    (why,) = guard.by_order.values()
    assert why == ("'0' does more than that layer" if nested else "the root module does more than that layer")
    net(images)
    guard.check()
    guard.close()


def test_a_convolution_compiled_alone_gives_no_false_alarm(randomize, images):
    net = randomize(nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)))
    net[0].compile(backend="eager")
    with torch.no_grad():
        expected = net(images)
        guard = fold_batch_norm(net, images).guarded()
        torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-5)
        guard.check()
    assert guard.unwatched == {"1": "torch.compile runs it"}


CASTS = {
    "float": lambda y: y.float(),
    "to": lambda y: y.to(torch.float32),
    "type": lambda y: y.type(torch.float32),
    "twice": lambda y: y.float().contiguous(),
    "contiguous": lambda y: y.contiguous(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
@pytest.mark.parametrize("inference", [True, False], ids=["inference", "no-grad"])
def test_a_cast_that_did_nothing_when_it_was_recorded(randomize, images, cast, inference):
    """Under autocast it does something, and in channels_last: the same values go on."""

    class Casting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(cast(self.conv(x)))

    net = randomize(Casting())
    unfolded = copy.deepcopy(net)
    guard = fold_batch_norm(net, images).guarded()
    given = images.to(memory_format=torch.channels_last)
    with torch.inference_mode(inference), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = net(given)
        guard.check()
        assert type(found) is torch.Tensor
        torch.testing.assert_close(found.float(), unfolded(given).float(), rtol=0.05, atol=0.05)
        with pytest.raises(FoldError, match="is read by"):
            cast(net.conv(given)).mean()
    guard.close()


def test_a_cast_to_integers_is_no_cast(randomize, images):
    net = randomize(nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)))
    fold_batch_norm(net, images).guarded()
    with pytest.raises(FoldError, match="is read by to"):
        net[0](images).to(torch.int64)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_a_copy_of_a_watched_network_is_not_watched(randomize, images, copied):
    net = randomize(
        nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    )
    guard = fold_batch_norm(net, images).guarded()
    other = copied(net)
    assert torch.equal(other(images), net(images))
    other[0](images).mean()
    guard.check()
    with pytest.raises(FoldError, match="is read by mean"):
        net[0](images).mean()
