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
    "expanded-as-another": (
        before_bn(lambda n, x: n.bn(n.conv(x).mean((2, 3), keepdim=True).expand_as(x[:, :4])).mul_(2)),
        "mul_ would write to the output of expand_as",
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


BY_LAYOUT = {
    "view": lambda y: y.view(len(y), -1),
    "view_as": lambda y: y.view_as(torch.empty(len(y), 144)),
    "as_strided": lambda y: y.as_strided((len(y), 144), (144, 1)),
}


@pytest.mark.parametrize("end", BY_LAYOUT.values(), ids=BY_LAYOUT.keys())
def test_views_need_the_layout_that_the_layer_gives(randomize, end):
    net = randomize(before_bn(lambda n, x: end(n.bn(n.conv(x).transpose(2, 3))).tanh())())
    assert rows_of(fold_in_float64(net, images())) == {"bn": ("kept", "layout")}


def test_reshape_takes_any_layout(randomize):
    net = randomize(before_bn(lambda n, x: n.bn(n.conv(x).transpose(2, 3)).reshape(len(x), -1).tanh())())
    assert rows_of(fold_in_float64(net, images())) == {"bn": ("folded-backward", "conv")}


class View(nn.Module):
    def forward(self, x):
        return x.view(len(x), -1)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4), nn.ReLU(True), View()),
        lambda: nn.Sequential(nn.Conv2d(6, 4, 8), nn.BatchNorm2d(4), View()),
        lambda: nn.Sequential(nn.Conv2d(6, 1, 3), nn.BatchNorm2d(1), View()),
        lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(6), View(), nn.Linear(6, 2)),
    ],
    ids=["conv-of-size-1", "conv-of-full-size", "one-channel", "forward"],
)
def test_strides_of_axes_of_size_1_do_not_matter(randomize, make, batch):
    net = randomize(make()).to(memory_format=torch.channels_last)
    given = images(batch).to(memory_format=torch.channels_last)
    (row,) = fold_batch_norm(net, given).report.rows
    assert row.action.startswith("folded"), row


def test_the_layout_of_another_input_may_not_be_the_examples(randomize):
    net = randomize(nn.Sequential(nn.BatchNorm2d(6), View(), nn.Linear(384, 2)))
    (row,) = fold_batch_norm(net, images()).report.rows
    assert (row.action, "view in '1' needs the memory layout" in row.detail) == ("kept", True)
    net(images().transpose(2, 3))


def residual_of_a_part(n, x):
    a = x.relu()[:, :4]
    z = n.bn(a.contiguous())
    a += n.next(z)
    return n.last(z) + a


@pytest.mark.parametrize("batch", [4, 1])
def test_contiguous_copies_at_some_batch_sizes_only(randomize, batch):
    net = randomize(Written(residual_of_a_part, bn=nn.BatchNorm2d(4), next=nn.Conv2d(4, 4, 1), last=nn.Conv2d(4, 4, 1)))
    unfolded = copy.deepcopy(net)
    (row,) = fold_batch_norm(net, images(batch)).report.rows
    assert (row.action, "add_ would overwrite" in row.detail or "iadd would overwrite" in row.detail) == ("kept", True)
    for other in (4, 1):
        torch.testing.assert_close(net(images(other)), unfolded(images(other)))


def test_contiguous_of_a_part_of_several(randomize):
    def body(n, x):
        a, b = n.conv(x).chunk(2, 1)
        return torch.cat([n.bn(a.contiguous()).relu_(), b], 1)

    net = randomize(before_bn(body, nn.BatchNorm2d(2))())
    assert rows_of(fold_batch_norm(net, images(4))) == {"bn": ("kept", "overwritten")}
    net(images(1)).sum().backward()


def test_contiguous_copies_in_some_layouts_only(randomize):
    def body(n, x):
        y = x.relu()
        z = n.bn(y.contiguous())
        y += n.next(z)
        return n.last(z) + y

    net = randomize(Written(body, bn=nn.BatchNorm2d(6), next=nn.Conv2d(6, 6, 1), last=nn.Conv2d(6, 6, 1)))
    unfolded = copy.deepcopy(net)
    (row,) = fold_batch_norm(net, images().to(memory_format=torch.channels_last)).report.rows
    assert row.action == "kept"
    torch.testing.assert_close(net(images()), unfolded(images()))
