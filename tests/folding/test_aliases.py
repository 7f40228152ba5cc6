"""A BatchNorm layer gives its output memory of its own; without it, what others write in place must miss nobody."""

import copy

import pytest
import torch
from folding.nets import Written, fold_in_float64, rows_of
from torch import nn

from bn_lightning import fold_batch_norm


def images(batch=3, size=8, channels=6, seed=5):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def before_bn(body, norm=None):
    """conv (6 → 4 channels), and a bn that takes it."""
    return lambda: Written(body, conv=nn.Conv2d(6, 4, 3), bn=norm or nn.BatchNorm2d(4))


def behind_bn(body):
    """A bn, and a convolution that takes it."""
    return lambda: Written(body, bn=nn.BatchNorm2d(6), next=nn.Conv2d(6, 4, 1))


def input_written_before_the_reader(n, x):
    z = n.bn(y := x.relu())
    y.add_(1)
    return n.next(z)


def input_written_through_a_view(n, x):
    z = n.bn(y := x.relu())
    y.flatten(1).mul_(2)
    return n.next(z)


def input_written_behind_the_reader(n, x):
    w = n.next(n.bn(y := x.relu()))
    y.add_(1)
    return w.sum() + y.sum()


def two_in_a_row(n, x):
    z = n.second(n.bn(y := x.relu()))
    y.add_(1)
    return n.next(z)


KEPT = {
    "the-input-is-written-before-the-reader": (behind_bn(input_written_before_the_reader), "add_ would overwrite"),
    "the-input-is-written-through-a-view": (behind_bn(input_written_through_a_view), "mul_ would overwrite"),
    "expanded": (
        before_bn(lambda n, x: n.bn(n.conv(x).mean((2, 3), keepdim=True).expand(-1, -1, 3, 3)).mul_(2)),
        "mul_ would write to the output of expand",
    ),
    "largest": (
        before_bn(lambda n, x: n.bn(n.conv(x).amax((2, 3))).mul_(2), nn.BatchNorm1d(4)),
        "mul_ would write to the output of amax",
    ),
}


@pytest.mark.parametrize(("make", "words"), KEPT.values(), ids=KEPT.keys())
def test_what_is_written_in_place(randomize, make, words):
    net = randomize(make())
    with torch.no_grad():
        net.bn.weight.abs_()  # a maximum lets it pass
    unfolded = copy.deepcopy(net)
    (row,) = fold_batch_norm(net, images()).report.rows
    assert row.action == "kept"
    assert words in row.detail
    torch.testing.assert_close(net(images(seed=6)), unfolded(images(seed=6)))


def test_of_two_in_a_row_the_first_stays(randomize):
    """The second's output may lie in the first's, but not in what is written to."""
    net = Written(two_in_a_row, bn=nn.BatchNorm2d(6), second=nn.BatchNorm2d(6), next=nn.Conv2d(6, 4, 1))
    rows = rows_of(fold_in_float64(randomize(net), images()))
    assert (rows["bn"][0], rows["second"]) == ("kept", ("merged", "bn"))


FOLDED = {
    "the-input-is-written-behind-the-reader": behind_bn(input_written_behind_the_reader),
    "the-output-is-written": before_bn(lambda n, x: n.bn(n.conv(x)).relu_()),
    "the-output-is-read-and-then-written": before_bn(lambda n, x: (z := n.bn(n.conv(x))).tanh() + z.mul_(3)),
}


@pytest.mark.parametrize("make", FOLDED.values(), ids=FOLDED.keys())
def test_what_does_no_harm(randomize, make):
    (row,) = fold_in_float64(randomize(make()), images()).report.rows
    assert row.action.startswith("folded"), row


@pytest.mark.parametrize("split", ["chunk", "split", "tensor_split", "unbind"])
@pytest.mark.parametrize("in_place", [True, False], ids=["in-place", "apart"])
def test_autograd_refuses_to_write_to_one_of_several_views(randomize, split, in_place):
    views = {
        "chunk": lambda y: y.chunk(2, 1)[0],
        "split": lambda y: y.split(2, 1)[0],
        "tensor_split": lambda y: y.tensor_split(2, 1)[0],
        "unbind": lambda y: y.unflatten(1, (2, 2)).unbind(1)[0],
    }
    end = torch.relu_ if in_place else torch.relu
    net = randomize(before_bn(lambda n, x: end(n.bn(views[split](n.conv(x)))), nn.BatchNorm2d(2))())
    result = fold_in_float64(net, images())
    assert rows_of(result) == {"bn": ("kept", "overwritten") if in_place else ("folded-backward", "conv")}
    net(images().double()).sum().backward()  # which the network could do before


@pytest.mark.parametrize("needs_layout", [True, False], ids=["view", "reshape"])
def test_views_need_the_layout_that_the_layer_gives(randomize, needs_layout):
    end = torch.Tensor.view if needs_layout else torch.Tensor.reshape
    net = randomize(before_bn(lambda n, x: end(n.bn(n.conv(x).transpose(2, 3)), (len(x), -1)).tanh())())
    result = fold_in_float64(net, images())
    assert rows_of(result) == {"bn": ("kept", "layout") if needs_layout else ("folded-backward", "conv")}
