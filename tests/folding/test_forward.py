"""Forward into what reads it, merging, and what is left as scale and shift; in float64 against an unfolded copy."""

import pytest
import torch
import torch.nn.functional as F
from folding.nets import Written, fold_in_float64, rows_of
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning import fold_batch_norm, plan_fold
from bn_lightning.layers import ChannelAffine


def images(batch=3, size=8, channels=6, seed=5):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def into(layer, body=lambda n, x: n.next(n.bn(x.relu())), norm=None):
    return lambda: Written(body, bn=norm or nn.BatchNorm2d(6), next=layer)


FORWARD = {
    "conv": into(nn.Conv2d(6, 4, 3)),
    "conv-without-bias": into(nn.Conv2d(6, 4, 3, bias=False)),
    "strided-and-dilated": into(nn.Conv2d(6, 4, 3, stride=2, dilation=2)),
    "valid": into(nn.Conv2d(6, 4, 3, padding="valid")),
    "same-of-size-1": into(nn.Conv2d(6, 4, 1, padding="same")),
    "grouped": into(nn.Conv2d(6, 4, 3, groups=2)),
    "depthwise": into(nn.Conv2d(6, 12, 3, groups=6)),
    "reflect": into(nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect")),
    "replicate": into(nn.Conv2d(6, 4, 3, padding=1, padding_mode="replicate")),
    "circular": into(nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular")),
    "transposed-of-size-1": into(nn.ConvTranspose2d(6, 4, 1)),
    "transposed-grouped-of-size-1": into(nn.ConvTranspose2d(6, 4, 1, groups=2, bias=False)),
    "flatten-then-linear": into(nn.Linear(384, 5), lambda n, x: n.next(n.bn(x.relu()).flatten(1))),
    "linear-on-channels-last": into(nn.Linear(6, 5), lambda n, x: n.next(n.bn(x.relu()).permute(0, 2, 3, 1))),
    "linear-after-pooling": into(nn.Linear(6, 5, bias=False), lambda n, x: n.next(n.bn(x.relu()).mean((2, 3)))),
    "linear": into(nn.Linear(6, 5), lambda n, x: n.next(n.bn(x.relu().mean((2, 3)))), nn.BatchNorm1d(6)),
    "conv1d": into(nn.Conv1d(6, 5, 3), lambda n, x: n.next(n.bn(x.relu().flatten(2))), nn.BatchNorm1d(6)),
    "shuffle-then-conv": into(nn.Conv2d(6, 4, 3), lambda n, x: n.next(F.channel_shuffle(n.bn(x.relu()), 3))),
    "beside-something-else": into(
        nn.Conv2d(9, 4, 3), lambda n, x: n.next(torch.cat([x[:, :3].tanh(), n.bn(x.relu())], 1))
    ),
    "average-then-conv": into(nn.Conv2d(6, 4, 3), lambda n, x: n.next(F.avg_pool2d(n.bn(x.relu()), 2))),
    "what-it-reads-is-read-elsewhere": into(
        nn.Conv2d(6, 4, 1), lambda n, x: n.next(n.bn(y := x.relu())).sum(1) * y.sum(1)
    ),
    "one-conv-for-two-calls": into(nn.Conv2d(6, 4, 3), lambda n, x: n.next(n.bn(x.relu())) * n.next(n.bn(x.sigmoid()))),
}


@pytest.mark.parametrize("make", FORWARD.values(), ids=FORWARD.keys())
def test_forward(randomize, make):
    net = randomize(make())
    held_out = [] if "Linear(in_features=384" in repr(net) else [(images(2, 10, seed=6),)]
    assert rows_of(fold_in_float64(net, images(), held_out=held_out)) == {"bn": ("folded-forward", "next")}
    assert isinstance(net.bn, nn.Identity)


def test_forward_into_every_reader(randomize):
    net = Written(
        lambda n, x: n.a(y := n.bn(x.relu())).sum(1) + n.b(y).sum(1) + n.fc(y.mean((2, 3))).sum(),
        bn=nn.BatchNorm2d(6),
        a=nn.Conv2d(6, 4, 3),
        b=nn.Conv2d(6, 2, 3, groups=2, bias=False),
        fc=nn.Linear(6, 3),
    )
    assert rows_of(fold_in_float64(randomize(net), images())) == {"bn": ("folded-forward", "a, b, fc")}


def test_forward_and_backward_into_one_convolution(randomize):
    net = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))
    result = fold_in_float64(randomize(net), images())
    assert rows_of(result) == {"1": ("folded-forward", "2"), "3": ("folded-backward", "2")}


ZERO_PADDED = {
    "conv": into(nn.Conv2d(6, 4, 3, padding=1)),
    "conv-of-size-1": into(nn.Conv2d(6, 4, 1, padding=1)),
    "same": into(nn.Conv2d(6, 4, 3, padding="same")),
    "one-sided": into(nn.Conv2d(6, 4, 3, padding=(0, 1))),
    "pad-between": into(nn.Conv2d(6, 4, 3), lambda n, x: n.next(F.pad(n.bn(x.relu()), (0, 1, 0, 1)))),
    "transposed": into(nn.ConvTranspose2d(6, 4, 3)),
    "transposed-strided": into(nn.ConvTranspose2d(6, 4, 1, stride=2)),
    "transposed-output-padding": into(nn.ConvTranspose2d(6, 4, 1, dilation=2, output_padding=1)),
}


@pytest.mark.parametrize("make", ZERO_PADDED.values(), ids=ZERO_PADDED.keys())
@pytest.mark.parametrize("shifted", [True, False], ids=["shift", "no-shift"])
def test_zeros_of_a_padding_take_no_shift(randomize, make, shifted):
    net = randomize(make())
    if not shifted:
        with torch.no_grad():
            net.bn.running_mean.zero_()
            net.bn.bias.zero_()
    expected = ("kept", "zero_padding") if shifted else ("folded-forward", "next")
    assert rows_of(fold_in_float64(net, images())) == {"bn": expected}


KEPT = {
    "an-activation-too": (
        "nonlinear_between",
        into(nn.Conv2d(6, 4, 3), lambda n, x: n.next(y := n.bn(x.relu())).sum() * y.tanh()),
    ),
    "added": ("nonlinear_between", into(nn.Conv2d(6, 4, 1), lambda n, x: n.next(n.bn(x.relu()) + x))),
    "several-channels-as-one": (
        "nonlinear_between",
        into(nn.Linear(8, 4), lambda n, x: n.next(n.bn(x.relu()))),
    ),
    "the-conv-reads-something-else-too": (
        "nonlinear_between",
        into(nn.Conv2d(6, 4, 1), lambda n, x: n.next(n.bn(x.relu())) + n.next(x)),
    ),
    "as-a-weight": ("nonlinear_between", into(nn.Conv2d(6, 4, 1), lambda n, x: F.linear(x, n.bn(x.relu())[0, 0]))),
    "hook-on-the-reader": ("nonlinear_between", into(nn.Conv2d(6, 4, 3))),
    "mean-over-channels": (
        "nonlinear_between",
        into(nn.Conv2d(6, 4, 1), lambda n, x: n.next((z := n.bn(x.relu())).mean(1, keepdim=True).expand_as(z))),
    ),
    "channels-in-another-order-the-second-time": (
        "nonlinear_between",
        into(nn.Conv2d(6, 4, 1), lambda n, x: n.next(z := n.bn(x.relu())) + n.next(z.flip(1))),
    ),
    "read-unseen": (
        "nonlinear_between",
        into(nn.Conv2d(6, 4, 1), lambda n, x: n.next(z := n.bn(x.relu())).sum() + torch.vmap(torch.sigmoid)(z)),
    ),
    "read-by-nobody": (
        "nonlinear_between",
        into(nn.Conv2d(6, 4, 1), lambda n, x: n.next(x.relu()) + 0 * len(n.bn(x.relu()))),
    ),
    "kept": (
        "nonlinear_between",
        into(nn.Conv2d(6, 4, 3), lambda n, x: n.next(setattr(n, "cache", y := n.bn(x.relu())) or y)),
    ),
}
WORDS = {
    "an-activation-too": "read by tanh",
    "added": "read by add",
    "several-channels-as-one": "reads several of its channels as one",
    "the-conv-reads-something-else-too": "'next.weight' is also applied by conv2d in 'next'",
    "as-a-weight": "read by getitem|read by linear",
    "hook-on-the-reader": "'next' carries",
    "mean-over-channels": "reads several of its channels as one",
    "channels-in-another-order-the-second-time": "is applied to more than one kind of input",
    "read-unseen": "in code that cannot be recorded",
    "read-by-nobody": "nothing reads its output",
    "kept": "is kept somewhere",
}


@pytest.mark.parametrize("case", KEPT)
def test_what_forbids_a_forward_fold(randomize, case):
    reason, make = KEPT[case]
    net = randomize(make())
    if case == "hook-on-the-reader":
        net.next.register_forward_pre_hook(lambda module, args: None)
    (row,) = plan_fold(net, images()).rows
    assert (row.action, row.reason) == ("kept", reason)
    assert any(words in row.detail for words in WORDS[case].split("|")), row.detail


MERGED = {
    "plain": lambda: (nn.BatchNorm2d(6), nn.BatchNorm2d(6, eps=0.1)),
    "without-affine": lambda: (nn.BatchNorm2d(6, affine=False), nn.BatchNorm2d(6)),
    "both-without-affine": lambda: (nn.BatchNorm2d(6, affine=False, eps=0.1), nn.BatchNorm2d(6, affine=False)),
}


@pytest.mark.parametrize("make", MERGED.values(), ids=MERGED.keys())
def test_merged_into_the_layer_before(randomize, make):
    first, second = make()
    net = Written(lambda n, x: n.second(n.first(x.relu())).sigmoid(), first=first, second=second)
    result = fold_in_float64(randomize(net), images(), held_out=[(images(2, 10, seed=6),)])
    rows = rows_of(result)
    assert (rows["first"][0], rows["second"]) == ("kept", ("merged", "first"))
    result.undo()
    assert (first.weight is None) == (not first.affine)


def test_merged_into_the_layers_behind(randomize):
    """What it makes is read by another BN and by a convolution: both take it up."""
    net = Written(
        lambda n, x: n.second(y := n.first(x.relu())).sigmoid().sum(1) + n.conv(y).sum(1),
        first=nn.BatchNorm2d(6),
        second=nn.BatchNorm2d(6, eps=0.1),
        conv=nn.Conv2d(6, 4, 1),
    )
    rows = rows_of(fold_in_float64(randomize(net), images()))
    assert (rows["first"], rows["second"][0]) == (("folded-forward", "second, conv"), "kept")


def test_a_chain_ends_in_the_convolution(randomize):
    net = nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.AvgPool2d(2), nn.BatchNorm2d(4))
    result = fold_in_float64(randomize(net), images())
    assert set(rows_of(result).values()) == {("folded-backward", "0")}


def test_a_merged_layer_is_carried_on_forward(randomize):
    net = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3))
    result = fold_in_float64(randomize(net), images())
    assert rows_of(result) == {"1": ("folded-forward", "3"), "2": ("merged", "1")}
    assert not [module for module in net.modules() if isinstance(module, _BatchNorm)]


def test_an_excluded_layer_takes_nothing_up(randomize):
    net = randomize(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.Sigmoid()))
    kept = {name: value.clone() for name, value in net[1].state_dict().items()}
    result = fold_batch_norm(net, images(), exclude=["1"])
    assert rows_of(result) == {"1": ("kept", "excluded"), "2": ("kept", "nonlinear_between")}
    assert all(torch.equal(value, kept[name]) for name, value in net[1].state_dict().items())


def test_a_layer_without_weight_and_bias_that_works_elsewhere_too_takes_nothing_up(randomize):
    """It is known by its mean."""
    net = Written(
        lambda n, x: n.second(n.first(x.relu())).sigmoid() + n.first(x.tanh()).sigmoid(),
        first=nn.BatchNorm2d(6, affine=False),
        second=nn.BatchNorm2d(6),
    )
    assert rows_of(fold_in_float64(randomize(net), images()))["second"] == ("kept", "tied")


def test_a_frozen_layer_leaves_a_frozen_scale_and_shift(randomize):
    net = randomize(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(6).requires_grad_(False), nn.Sigmoid()))
    fold_batch_norm(net, images(), standalone="affine")
    assert [parameter.requires_grad for parameter in net[1].parameters()] == [False, False]


def test_what_is_left_becomes_scale_and_shift(randomize):
    norms = (nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False))
    net = randomize(nn.Sequential(nn.ReLU(), *norms[:2], nn.Sigmoid(), norms[2], nn.Tanh()))
    result = fold_in_float64(net, images(), standalone="affine")
    rows = rows_of(result)
    assert (rows["1"][0], rows["2"], rows["4"][0]) == ("affine", ("merged", "1"), "affine")
    assert [type(layer) for layer in (net[1], net[2], net[4])] == [ChannelAffine, nn.Identity, ChannelAffine]
    assert net[1].scale.requires_grad
    assert "2 left as scale and shift" in result.report.summary
    result.undo()
    assert isinstance(net[1], nn.BatchNorm2d)


def test_no_layer_is_left_that_no_call_reaches(randomize):
    net = randomize(
        Written(
            lambda n, x: n.bn(n.conv(x)), conv=nn.Conv2d(6, 4, 3), bn=nn.BatchNorm2d(4), unreached=nn.BatchNorm2d(4)
        )
    )
    given = torch.randn(2, 4, 3, 3)
    expected = net.unreached(given)
    assert next(row for row in plan_fold(net, images()).rows if row.name == "unreached").action == "kept"
    result = fold_batch_norm(net, images(), standalone="affine")
    assert rows_of(result)["unreached"] == ("affine", "not_reached")
    torch.testing.assert_close(net.unreached(given), expected)


@pytest.mark.parametrize("standalone", ["keep", "affine"])
def test_training_and_hooked_layers_stay_whatever_is_asked(randomize, standalone):
    net = randomize(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(6), nn.Tanh(), nn.BatchNorm2d(6)))
    net[1].train()
    net[3].register_forward_hook(lambda *args: None)
    assert rows_of(fold_batch_norm(net, images(), standalone=standalone)) == {
        "1": ("kept", "training"),
        "3": ("kept", "hook"),
    }


def test_an_unknown_kind_of_standalone_is_refused(randomize):
    with pytest.raises(ValueError, match="'keep' or 'affine', got 'fold'"):
        plan_fold(randomize(nn.Sequential(nn.BatchNorm2d(6))), images(), standalone="fold")
