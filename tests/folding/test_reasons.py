"""What must not be folded stays, with its reason, and the outputs stay the same."""

import copy
import math
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from bn_lightning import fold_batch_norm, plan_fold


class Net(nn.Module):
    """conv, bn and what the body makes of them."""

    def __init__(self, body, prepare=lambda net: None, conv=None):
        super().__init__()
        self.conv = conv or nn.Conv2d(6, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.body = body
        prepare(self)

    def forward(self, x):
        return self.body(self, x)


def straight(net, x):
    return net.bn(net.conv(x))


def with_second(net):
    net.second = nn.Conv2d(6, 4, 3)


def with_second_norm(net):
    net.second = nn.BatchNorm2d(4)


def tie_weight(net):
    net.second = nn.Conv2d(6, 4, 3)
    net.second.weight = net.conv.weight


def share_memory(net):
    pool = torch.randn(2 * net.conv.weight.numel())
    shape = net.conv.weight.shape
    half = pool.numel() // 2
    net.conv.weight = nn.Parameter(pool[:half].view(shape))
    net.second = nn.Parameter(pool[half - 1 : -1].view(shape))  # one element in common


def tie_bias(net):
    net.second = nn.Conv2d(6, 4, 3)
    net.second.bias = net.conv.bias


def share_statistics(net):
    net.second = nn.BatchNorm2d(4)
    net.second.running_mean = net.bn.running_mean


def old_weight_norm(net):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(net.conv)


class Halved(nn.Module):
    def forward(self, x):
        return x / 2


def scripted(thing):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and all the same in many a deployed network
        return torch.jit.script(thing)


def with_scripted_child(net):
    net.scripted = scripted(nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1)).eval())


def times_sum(y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return y * w.sum()


TIMES_SUM = scripted(times_sum)


class LoudNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class BareConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.weight)


def replace_forward(module, factor):
    original = type(module).forward
    module.forward = lambda x: original(module, x if factor == 1 else factor * x)


def put(module, attribute, value, at=()):
    def change(net):
        with torch.no_grad():
            getattr(net.get_submodule(module), attribute)[at] = value

    return change


def in_place_through_a_view(net, x):
    y = net.conv(x)
    y[:, :1].mul_(2)
    return net.bn(y)


def keep(net, x):
    net.cache = net.conv(x)
    return net.bn(net.cache)


def two_outputs(net, x):
    y = net.conv(x)
    return net.bn(y), [{"features": y}]


def residual(net, x):
    y = net.conv(x)
    return net.bn(y) + y


def gated(net, x):
    y = net.conv(x)
    return net.bn(y) * (1.0 if y.mean().item() > 0 else -1.0)


def beneath(net, x):
    y = net.conv(x)
    return net.bn(y) + net.scripted(y)


def mapped(net, x):
    y = net.conv(x)
    return net.bn(y) + torch.vmap(lambda row: row.sigmoid())(y)


def untracked(net):
    net.bn = nn.BatchNorm2d(4, track_running_stats=False)


def halve(module, name):
    return lambda net: parametrize.register_parametrization(net.get_submodule(module), name, Halved())


def two_norms(net, x):
    return net.bn(net.conv(x)) + net.second(net.conv(x))


def kernels_apart(net, x):
    return net.bn(net.conv(x)) + F.conv2d(x, net.second)


def norms_apart(net, x):
    return net.bn(net.conv(x)) + net.second(x[:, :4, 2:, 2:])


def concatenated(net, x):
    return net.bn(torch.cat([net.conv(x)[:, :2], x[:, :2, 2:, 2:]], 1))


CASES = {
    "bn-in-training-mode": ("training", partial(Net, straight)),
    "no-statistics": (
        "no_stats",
        partial(Net, straight, untracked),
    ),
    "not-reached": ("not_reached", partial(Net, lambda net, x: net.conv(x))),
    "conv-feeds-two-norms": (
        "reused",
        partial(Net, two_norms, with_second_norm),
    ),
    "conv-used-elsewhere": ("reused", partial(Net, lambda net, x: net.bn(net.conv(x)) + net.conv(x.flip(0)).relu())),
    "conv-used-twice-chained": (
        "reused",
        partial(Net, lambda net, x: net.conv(net.bn(net.conv(x[:, :4]))), conv=nn.Conv2d(4, 4, 3)),
    ),
    "tied-weight-unused": ("tied", partial(Net, straight, tie_weight)),
    "tied-weight-used": ("tied", partial(Net, lambda net, x: net.bn(net.conv(x)) + net.second(x), tie_weight)),
    "overlapping-memory": (
        "tied",
        partial(Net, kernels_apart, share_memory),
    ),
    "overlapping-memory-unused": ("tied", partial(Net, straight, share_memory)),
    "tied-bias": ("tied", partial(Net, lambda net, x: net.bn(net.conv(x)) + net.second(x), tie_bias)),
    "weight-read-elsewhere": ("tied", partial(Net, lambda net, x: net.bn(net.conv(x)) * net.conv.weight.norm())),
    "bias-read-elsewhere": ("tied", partial(Net, lambda net, x: net.bn(net.conv(x)) * net.conv.bias.norm())),
    "gamma-read-elsewhere": ("tied", partial(Net, lambda net, x: net.bn(net.conv(x)) * net.bn.weight.abs().sum())),
    "shared-statistics": (
        "tied",
        partial(Net, norms_apart, share_statistics),
    ),
    "residual": ("multi_user", partial(Net, residual)),
    "read-by-python": ("multi_user", partial(Net, gated)),
    "kept-on-the-module": ("escaped", partial(Net, keep)),
    "torchscript-reader": ("opaque", partial(Net, beneath, with_scripted_child)),
    "vmap-reader": ("opaque", partial(Net, mapped)),
    "torchscript-reads-the-weight": (
        "opaque",
        partial(Net, lambda net, x: TIMES_SUM(net.bn(net.conv(x)), net.conv.weight)),
    ),
    "torchscript-reads-the-bias": (
        "opaque",
        partial(Net, lambda net, x: TIMES_SUM(net.bn(net.conv(x)), net.conv.bias)),
    ),
    "torchscript-reads-gamma": ("opaque", partial(Net, lambda net, x: TIMES_SUM(net.bn(net.conv(x)), net.bn.weight))),
    "returned": ("output", partial(Net, two_outputs)),
    "forward-hook-on-conv": (
        "hook",
        partial(Net, straight, lambda net: net.conv.register_forward_hook(lambda module, args, output: None)),
    ),
    "pre-hook-on-bn": (
        "hook",
        partial(Net, straight, lambda net: net.bn.register_forward_pre_hook(lambda module, args: None)),
    ),
    "backward-hook-on-bn": (
        "hook",
        partial(Net, straight, lambda net: net.bn.register_full_backward_hook(lambda module, grads, outputs: None)),
    ),
    "changing-hook-on-bn": (
        "hook",
        partial(Net, straight, lambda net: net.bn.register_forward_hook(lambda module, args, output: 2 * output)),
    ),
    "conv-forward-replaced": ("hook", partial(Net, straight, lambda net: replace_forward(net.conv, 1))),
    "bn-forward-replaced": ("hook", partial(Net, straight, lambda net: replace_forward(net.bn, 2))),
    "weight-norm": ("parametrized", partial(Net, straight, lambda net: parametrizations.weight_norm(net.conv))),
    "old-weight-norm": ("parametrized", partial(Net, straight, old_weight_norm)),
    "parametrized-bias": (
        "parametrized",
        partial(Net, straight, halve("conv", "bias")),
    ),
    "parametrized-gamma": (
        "parametrized",
        partial(Net, straight, halve("bn", "weight")),
    ),
    "bn-subclass": ("subclass", partial(Net, straight, lambda net: setattr(net, "bn", LoudNorm(4)))),
    "no-place-for-a-bias": ("functional", partial(Net, straight, conv=BareConv())),
    "bn-called-functionally": (
        "functional",
        partial(Net, lambda net, x: F.batch_norm(net.conv(x), net.bn.running_mean, net.bn.running_var)),
    ),
    "conv-called-without-bias": (
        "functional",
        partial(Net, lambda net, x: net.bn(F.conv2d(x, net.conv.weight)), conv=nn.Conv2d(6, 4, 3, bias=False)),
    ),
    "conv-called-without-its-bias": (
        "functional",
        partial(Net, lambda net, x: net.bn(F.conv2d(x, net.conv.weight))),
    ),
    "relu-between": ("nonlinear_between", partial(Net, lambda net, x: net.bn(net.conv(x).relu()))),
    "inplace-between": ("nonlinear_between", partial(Net, lambda net, x: net.bn(net.conv(x).mul_(-2)))),
    "view-written-between": ("nonlinear_between", partial(Net, in_place_through_a_view)),
    "concatenation": (
        "nonlinear_between",
        partial(Net, concatenated),
    ),
    "fed-by-the-input": ("nonlinear_between", partial(Net, lambda net, x: net.bn(x[:, :4].clone()))),
    "infinite-mean": ("nonfinite", partial(Net, straight, put("bn", "running_mean", math.inf, 1))),
    "nan-weight": ("nonfinite", partial(Net, straight, put("bn", "weight", math.nan, 1))),
    "negative-variance": ("nonfinite", partial(Net, straight, put("bn", "running_var", -2.0, 1))),
    "nan-in-conv": ("nonfinite", partial(Net, straight, put("conv", "weight", math.nan, (1, 0, 0, 0)))),
}


def same(found, expected):
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    else:
        same(found[0], expected[0])
        same(found[1][0]["features"], expected[1][0]["features"])


@pytest.mark.parametrize(("reason", "make"), CASES.values(), ids=CASES.keys())
def test_the_layer_stays_and_says_why(randomize, images, reason, make):
    net = make()
    broken = {name: tensor.clone() for name, tensor in net.state_dict().items() if reason == "nonfinite"}
    randomize(net).load_state_dict(broken, strict=bool(broken))
    net.bn.train(reason == "training")
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    row = next(row for row in plan_fold(net, images).rows if row.name in ("bn", "second"))
    assert (row.name, row.action, row.into, row.reason) == ("bn", "kept", None, reason)
    assert row.detail
    torch.manual_seed(3)
    with torch.no_grad():
        expected = net(images)
    net.load_state_dict(state)
    result = fold_batch_norm(net, images)
    assert next(row for row in result.report.rows if row.name == "bn").reason == reason
    with torch.no_grad():
        same(net(images), expected)


def expand_weight(net):
    net.conv.weight = nn.Parameter(torch.randn(4, 6, 1, 1).expand(4, 6, 3, 3))


def expand_bias(net):
    net.conv.bias = nn.Parameter(torch.randn(1).expand(4))


@pytest.mark.parametrize("prepare", [expand_weight, expand_bias])
def test_nothing_is_written_to_an_expanded_tensor(randomize, images, prepare):
    net = randomize(Net(straight, prepare))
    expected = net(images)
    (row,) = fold_batch_norm(net, images).report.rows
    assert (row.reason, "several of its elements lie in one place" in row.detail) == ("tied", True)
    assert torch.equal(net(images), expected)


def test_a_sparse_weight_is_refused(randomize, images):
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in beta state
        net[0].weight = nn.Parameter(net[0].weight.detach().to_sparse_csr())
    (row,) = fold_batch_norm(randomize(net), images[:, :, 0, 0]).report.rows
    assert (row.reason, "'0.weight' is sparse" in row.detail) == ("parametrized", True)


def test_an_empty_batch_tells_nothing_and_forbids_nothing(randomize, images):
    net = randomize(Net(lambda net, x: net.second(net.bn(net.conv(x)).tanh()), with_second_norm))
    expected = net(images)
    first, second = fold_batch_norm(net, [images[:0], images]).report.rows
    assert (first.action, second.action) == ("folded-backward", "kept")
    torch.testing.assert_close(net(images), expected, rtol=1e-5, atol=1e-5)
    assert fold_batch_norm(randomize(Net(straight)), images[:0]).report.rows[0].reason == "unverified"


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        pytest.param(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), (3, 4, 6), id="linear-on-a-sequence"),
        pytest.param(nn.Sequential(nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm1d(5)), (6, 5, 5), id="conv2d-unbatched"),
        pytest.param(
            nn.Sequential(nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm1d(4)), (6, 4, 5), id="conv2d-unbatched-4"
        ),
        pytest.param(nn.Sequential(nn.Conv1d(6, 4, 3, padding=1), nn.BatchNorm1d(4)), (6, 4), id="conv1d-unbatched"),
    ],
)
def test_another_axis_than_the_channels(randomize, net, shape):
    x = torch.randn(shape)
    expected = copy.deepcopy(randomize(net))(x)
    result = fold_batch_norm(net, x)
    assert result.report.rows[0].reason == "axis_mismatch"
    assert torch.equal(net(x), expected)


def test_include_and_exclude(small_net, images):
    assert [row.reason for row in plan_fold(small_net, images, include=("1",)).rows] == ["", "excluded", "excluded"]
    result = fold_batch_norm(small_net, images, exclude=["6"])
    assert [row.reason for row in result.report.rows] == ["", "nonlinear_between", "excluded"]
    assert isinstance(small_net[6], nn.BatchNorm1d)


def test_overflow_in_the_weights_dtype(randomize, images):
    net = randomize(nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))).half()
    with torch.no_grad():
        net[0].weight.mul_(1e3)
        net[1].weight.fill_(900)
        net[1].running_var.fill_(1)
    row = plan_fold(net, images.half() * 1e-6).rows[0]
    assert (row.reason, "float16" in row.detail) == ("overflow", True)


def test_the_channel_of_a_nonfinite_statistic_is_named(randomize, images):
    net = randomize(nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)))
    net[1].running_var[2] = math.inf
    assert plan_fold(net, images).rows[0].detail == "its running_var is inf at channel 2"


def test_a_layer_that_only_some_calls_reach_in_another_way_stays(randomize, images):
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x, rectified=False):
            return self.bn(self.conv(x).relu()) if rectified else self.bn(self.conv(x))

    net = randomize(Fork())
    assert plan_fold(net, images).rows[0].action == "folded-backward"
    assert plan_fold(net, [images, (images, True)]).rows[0].reason == "nonlinear_between"
