"""Backward through whatever passes channels on, in float64 against an unfolded copy."""

import pytest
import torch
import torch.nn.functional as F
from folding.nets import Written, fold_in_float64, rows_of
from torch import nn

from bn_lightning import plan_fold


def images(batch=3, size=8, channels=6, seed=5):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def one(body, norm=None, **more):
    """conv (6 → 4 channels) and bn."""
    return lambda: Written(body, conv=nn.Conv2d(6, 4, 3), bn=norm or nn.BatchNorm2d(4), **more)


def two(body, width=8):
    """Two convolutions of 4 channels and a bn."""
    return lambda: Written(body, a=nn.Conv2d(6, 4, 3), b=nn.Conv2d(6, 4, 3, bias=False), bn=nn.BatchNorm2d(width))


PASSING = {
    "identity": one(lambda n, x: n.bn(n.drop(n.conv(x))), drop=nn.Sequential(nn.Identity(), nn.Dropout(0.5))),
    "contiguous-clone": one(lambda n, x: n.bn(n.conv(x).transpose(2, 3).contiguous().clone())),
    "flatten": one(lambda n, x: n.bn(n.conv(x).flatten(2)), nn.BatchNorm1d(4)),
    "view": one(lambda n, x: n.bn((y := n.conv(x)).view(y.size(0), 4, -1)), nn.BatchNorm1d(4)),
    "flatten-to-features": one(lambda n, x: n.bn(n.conv(x).mean((2, 3))), nn.BatchNorm1d(4)),
    "permute-to-rows": one(lambda n, x: n.bn(n.conv(x).permute(0, 2, 3, 1).reshape(-1, 4)), nn.BatchNorm1d(4)),
    "squeeze": one(lambda n, x: n.bn(n.conv(x).unsqueeze(4).squeeze(-1))),
    "roll-and-flip": one(lambda n, x: n.bn(n.conv(x).roll(1, 2).flip(3)[:, :, 1:])),
    "reversed-channels": one(lambda n, x: n.bn(n.conv(x).flip(1))),
    "channel-shuffle": one(lambda n, x: n.bn(F.channel_shuffle(n.conv(x), 2))),
    "shuffle-by-hand": one(
        lambda n, x: n.bn((y := n.conv(x)).view(len(y), 2, 2, *y.shape[2:]).transpose(1, 2).reshape(y.shape))
    ),
    "pixel-shuffle": one(lambda n, x: n.bn(F.pixel_shuffle(n.conv(x), 2)), nn.BatchNorm2d(1)),
    "half-of-the-channels": one(lambda n, x: n.bn(n.conv(x)[:, 1:3]), nn.BatchNorm2d(2)),
    "chunk-other-half-elsewhere": one(
        lambda n, x: n.bn((c := n.conv(x).chunk(2, 1))[0]) * c[1].sigmoid(), nn.BatchNorm2d(2)
    ),
    "average-pool": one(lambda n, x: n.bn(F.avg_pool2d(n.conv(x), 2))),
    "average-pool-padded-uncounted": one(
        lambda n, x: n.bn(F.avg_pool2d(n.conv(x), 3, padding=1, count_include_pad=False))
    ),
    "adaptive-average": one(lambda n, x: n.bn(F.adaptive_avg_pool2d(n.conv(x), 2))),
    "bilinear": one(lambda n, x: n.bn(F.interpolate(n.conv(x), scale_factor=2, mode="bilinear"))),
    "nearest": one(lambda n, x: n.bn(F.interpolate(n.conv(x), scale_factor=2))),
    "reflect-pad": one(lambda n, x: n.bn(F.pad(n.conv(x), (1, 1, 1, 1), mode="reflect"))),
    "circular-pad": one(lambda n, x: n.bn(F.pad(n.conv(x), (1, 1, 1, 1), mode="circular"))),
    "crop-by-negative-pad": one(lambda n, x: n.bn(F.pad(n.conv(x), (-1, -1, -1, -1)))),
}


@pytest.mark.parametrize("make", PASSING.values(), ids=PASSING.keys())
def test_through_what_passes_channels_on(randomize, make):
    net = randomize(make())
    result = fold_in_float64(net, images(), held_out=[(images(2, 10, seed=6),)])
    assert rows_of(result) == {"bn": ("folded-backward", "conv")}
    assert isinstance(net.bn, nn.Identity)


SEVERAL = {
    "concatenation": two(lambda n, x: n.bn(torch.cat([n.a(x), n.b(x)], 1))),
    "concatenation-and-shuffle": two(lambda n, x: n.bn(F.channel_shuffle(torch.cat([n.b(x), n.a(x)], 1), 4))),
    "batches-one-behind-the-other": two(lambda n, x: n.bn(torch.cat([n.a(x), n.b(x)], 0)), width=4),
    "stack": two(lambda n, x: n.bn(torch.stack([n.a(x), n.b(x)], 1).flatten(1, 2))),
    "sum": two(lambda n, x: n.bn(n.a(x) + n.b(x)), width=4),
    "sum-in-place": two(lambda n, x: n.bn(n.a(x).add_(n.b(x))), width=4),
    "pythons-sum": two(lambda n, x: n.bn(sum([n.a(x), n.b(x)])), width=4),
    "sum-with-broadcasting": two(lambda n, x: n.bn(n.a(x).mean((2, 3), keepdim=True) + n.b(x)), width=4),
    "sum-then-pool": two(lambda n, x: n.bn(F.avg_pool2d(n.a(x) + n.b(x), 2)), width=4),
    "sum-beside-a-summand": two(lambda n, x: n.bn(torch.cat([n.a(x) + n.b(x), n.a(x.flip(0))])), width=4),
    "one-norm-of-two": two(lambda n, x: n.bn(n.a(x)) - n.bn(n.b(x)), width=4),
}


@pytest.mark.parametrize("make", SEVERAL.values(), ids=SEVERAL.keys())
def test_into_several(randomize, make):
    net = randomize(make())
    result = fold_in_float64(net, images(), held_out=[(images(2, 10, seed=6),)])
    (action, into) = rows_of(result)["bn"]
    assert action == "folded-backward"
    assert set(into.split(", ")) == {"a", "b"}


def test_two_norms_of_one_convolution(randomize):
    """Each half of the channels has a BN of its own."""
    net = Written(
        lambda n, x: n.first((y := n.conv(x).split([1, 3], 1))[0]) * n.second(y[1]).sum(1, keepdim=True),
        conv=nn.Conv2d(6, 4, 3, bias=False),
        first=nn.BatchNorm2d(1),
        second=nn.BatchNorm2d(3),
    )
    result = fold_in_float64(randomize(net), images())
    assert rows_of(result) == {"first": ("folded-backward", "conv"), "second": ("folded-backward", "conv")}


LINEAR = {
    "levit": lambda n, x: n.bn((y := n.fc(x)).flatten(0, 1)).reshape_as(y),
    "transposed": lambda n, x: n.bn(n.fc(x).transpose(1, 2)),
    "transposed-as-attribute": lambda n, x: n.bn(n.fc(x).mT),
}


@pytest.mark.parametrize("body", LINEAR.values(), ids=LINEAR.keys())
@pytest.mark.parametrize("width", [5, 7], ids=["as-wide-as-long", "wider"])
def test_a_linear_layer_on_a_sequence(randomize, body, width):
    net = randomize(Written(body, fc=nn.Linear(6, width), bn=nn.BatchNorm1d(width)))
    result = fold_in_float64(net, torch.randn(3, 5, 6), held_out=[(torch.randn(2, 4, 6),)])
    assert rows_of(result) == {"bn": ("folded-backward", "fc")}


@pytest.mark.parametrize("positive", [True, False], ids=["positive", "mixed"])
def test_max_pooling_wants_positive_scales(randomize, positive):
    net = randomize(
        Written(lambda n, x: n.bn(F.max_pool2d(n.conv(x), 2)), conv=nn.Conv2d(6, 4, 3), bn=nn.BatchNorm2d(4))
    )
    with torch.no_grad():
        net.bn.weight.copy_(torch.tensor([1.0, 2.0, 0.0, 0.5 if positive else -0.5]))
    result = fold_in_float64(net, images())
    (row,) = result.report.rows
    if positive:
        assert row.action == "folded-backward"
    else:
        assert (row.action, row.reason) == ("kept", "negative_scale")
        assert "channel 3 has a negative scale" in row.detail


def through_another_view(n, x):
    y = n.a(x)
    z = y.flatten(2)
    z += n.b(x).flatten(2)
    return n.bn(z.unflatten(2, y.shape[2:])).relu() + y


KEPT = {
    "zero-pad": ("zero_padding", one(lambda n, x: n.bn(F.pad(n.conv(x), (1, 1, 1, 1))).relu())),
    "average-pool-counting-zeros": (
        "axis_mismatch",
        one(lambda n, x: n.bn(F.avg_pool2d(n.conv(x), 3, padding=1)).relu()),
    ),
    "constant-pad": ("axis_mismatch", one(lambda n, x: n.bn(F.pad(n.conv(x), (1, 1), value=0.5)).relu())),
    "mixing-reshape": (
        "axis_mismatch",
        one(lambda n, x: n.bn(n.conv(x).permute(0, 2, 1, 3).reshape(len(x), 4, -1)).relu(), nn.BatchNorm1d(4)),
    ),
    "as-long-as-wide": ("axis_mismatch", one(lambda n, x: n.bn(n.conv(x).transpose(1, 2)).relu(), nn.BatchNorm2d(6))),
    "mean-over-channels": (
        "axis_mismatch",
        one(lambda n, x: n.bn(n.conv(x).mean(1, keepdim=True)).relu(), nn.BatchNorm2d(1)),
    ),
    "largest-over-channels": (
        "axis_mismatch",
        one(lambda n, x: n.bn(n.conv(x).amax(1, keepdim=True)).relu(), nn.BatchNorm2d(1)),
    ),
    "repeated-channels": (
        "axis_mismatch",
        one(lambda n, x: n.bn(n.conv(x).repeat(1, 2, 1, 1)).relu(), nn.BatchNorm2d(8)),
    ),
    "added-to-itself": ("reused", one(lambda n, x: n.bn((y := n.conv(x)) + y.flip(2)).relu())),
    "subtracted": ("nonlinear_between", two(lambda n, x: n.bn(n.a(x) - n.b(x)).relu(), width=4)),
    "added-with-a-factor": ("nonlinear_between", two(lambda n, x: n.bn(torch.add(n.a(x), n.b(x), alpha=2)).relu(), 4)),
    "a-number-added": ("nonlinear_between", one(lambda n, x: n.bn(n.conv(x) + 1).relu())),
    "times-a-number": ("nonlinear_between", one(lambda n, x: n.bn(n.conv(x) * 2).relu())),
    "residual": ("nonlinear_between", one(lambda n, x: n.bn(n.conv(x) + x[:, :4, 1:-1, 1:-1]).relu())),
    "one-branch-read-elsewhere": (
        "multi_user",
        two(lambda n, x: n.bn(torch.cat([n.a(x), y := n.b(x)], 1)).relu().sum(1) * y.sum(1)),
    ),
    "overlapping-slices": (
        "multi_user",
        one(lambda n, x: n.bn((y := n.conv(x))[:, :2]).relu() + y[:, 1:3], nn.BatchNorm2d(2)),
    ),
    "view-of-it-kept": (
        "escaped",
        one(lambda n, x: n.bn(setattr(n, "cache", y := n.conv(x).flip(2)) or y).relu()),
    ),
    "one-branch-returned": ("output", two(lambda n, x: (n.bn(torch.cat([n.a(x), y := n.b(x)], 1)).relu(), y))),
    "active-dropout": ("nonlinear_between", one(lambda n, x: n.bn(F.dropout(n.conv(x), 0.5, True)).relu())),
    "largest-with-indices": (
        "nonlinear_between",
        one(lambda n, x: n.bn(F.max_pool2d(n.conv(x), 2, return_indices=True)[0]).relu()),
    ),
    "read-through-another-view": ("opaque", two(through_another_view, width=4)),
    "cast-to-integers": ("nonlinear_between", one(lambda n, x: n.bn(n.conv(x).to(torch.int64).float()).relu())),
    "index-tensor": ("nonlinear_between", one(lambda n, x: n.bn(n.conv(x)[:, torch.tensor([1, 0, 3, 2])]).relu())),
    "hook-on-a-flatten-between": (
        "hook",
        one(lambda n, x: n.bn(n.flat(n.conv(x))).relu(), nn.BatchNorm1d(4), flat=nn.Flatten(2)),
    ),
    "a-parameter-added": (
        "nonlinear_between",
        one(lambda n, x: n.bn(n.conv(x) + n.row.weight).relu(), row=nn.Linear(6, 1, bias=False)),
    ),
    "a-parameter-concatenated": (
        "nonlinear_between",
        one(
            lambda n, x: n.bn(torch.cat([n.conv(x), n.row.weight.expand(len(x), 1, 6, 6)], 1)).relu(),
            nn.BatchNorm2d(5),
            row=nn.Linear(6, 1, bias=False),
        ),
    ),
    "channels-in-another-order-the-second-time": (
        "axis_mismatch",
        one(lambda n, x: n.bn(n.conv(x)).relu() + n.bn(n.conv(x).flip(1)).relu()),
    ),
    "applied-the-other-way-round-too": (
        "reused",
        lambda: Written(
            lambda n, x: n.bn(n.conv(x)).sum() + n.bn(F.conv_transpose2d(x, n.conv.weight, n.conv.bias)).relu(),
            conv=nn.Conv2d(6, 6, 3),
            bn=nn.BatchNorm2d(6),
        ),
    ),
    "their-mean-is-read-elsewhere": (
        "multi_user",
        one(
            lambda n, x: (
                n.bn(torch.cat([v := (y := n.conv(x)).mean(1, keepdim=True), y[:, :2]], 1)[:, 1:]).relu() + v.tanh()
            ),
            nn.BatchNorm2d(2),
        ),
    ),
    "normalizes-its-own-output": ("reused", one(lambda n, x: n.bn(n.bn(n.conv(x))).relu())),
}


@pytest.mark.parametrize(("reason", "make"), KEPT.values(), ids=KEPT.keys())
def test_what_does_not_let_it_through(randomize, reason, make):
    net = randomize(make())
    if hasattr(net, "flat"):
        net.flat.register_forward_hook(lambda *args: None)
    (row,) = plan_fold(net, images()).rows
    assert (row.action, row.reason) == ("kept", reason), row.detail


def test_the_shift_goes_to_a_summand_that_is_there_everywhere(randomize):
    net = Written(
        lambda n, x: n.bn(F.pad(n.a(x), (1, 1, 1, 1)) + n.b(x)).tanh(),
        a=nn.Conv2d(6, 4, 3),
        b=nn.Conv2d(6, 4, 3, padding=1),
        bn=nn.BatchNorm2d(4),
    )
    result = fold_in_float64(randomize(net), images(), held_out=[(images(2, 10, seed=6),)])
    assert rows_of(result) == {"bn": ("folded-backward", "a, b")}


def test_the_shift_goes_to_a_summand_that_is_never_padded(randomize):
    def pads_nothing_here(n, x):
        if len(x) != 3 or x.shape[3] > 8:
            raise ValueError("too large")
        return n.bn(F.pad(n.a(x), (0, -x.shape[3] % 4)) + n.b(F.pad(x, (0, -x.shape[3] % 4)))).tanh()

    net = Written(pads_nothing_here, a=nn.Conv2d(6, 4, 1), b=nn.Conv2d(6, 4, 1, bias=False), bn=nn.BatchNorm2d(4))
    result = fold_in_float64(randomize(net), images(), held_out=[(images(3, 7, seed=6),)])
    assert rows_of(result) == {"bn": ("folded-backward", "a, b")}


def test_a_zero_shift_passes_a_zero_padding(randomize):
    net = randomize(PASSING["identity"]())
    net.body = lambda n, x: n.bn(F.pad(n.conv(x), (1, 1, 1, 1)))
    with torch.no_grad():
        net.bn.running_mean.zero_()
        net.bn.bias.zero_()
    assert rows_of(fold_in_float64(net, images())) == {"bn": ("folded-backward", "conv")}


def test_hooks_that_see_nothing_that_changes_do_no_harm(randomize):
    net = randomize(nn.Sequential(nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)), nn.ReLU()))
    seen = []
    net[0].register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    result = fold_in_float64(net, images())
    assert rows_of(result) == {"0.1": ("folded-backward", "0.0")}
