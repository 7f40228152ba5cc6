"""What holds for the example inputs' size has to hold for others."""

import copy

import pytest
import torch
import torch.nn.functional as F
from folding.nets import Written, rows_of
from torch import nn

from bn_lightning import fold_batch_norm, plan_fold
from bn_lightning.tracing.calls import ExampleCall
from bn_lightning.tracing.sizes import other_sizes


def images(batch=1, size=8, seed=5):
    return torch.randn(batch, 6, size, size, generator=torch.Generator().manual_seed(seed))


def conv_and(body, norm=None, **more):
    return lambda: Written(body, conv=nn.Conv2d(6, 4, 3), bn=norm or nn.BatchNorm2d(4), **more)


def with_next(body, **options):
    return lambda: Written(body, bn=nn.BatchNorm2d(6), next=nn.Conv2d(6, 4, 3, **options))


def same_pad(x):
    """As much as makes the size a multiple of four: none for 8, one for 7."""
    return F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))


def even_sizes_only(n, x):
    if x.shape[3] % 2:
        raise ValueError("odd")
    y = n.conv(x)
    return n.bn(y if x.shape[3] % 4 == 0 else y.relu())


def windows_of_four(n, x):
    y = n.conv(x)
    y = y.unflatten(3, (-1, 4)).flatten(3)
    return n.bn(F.pad(y, (0, 4)) if y.shape[3] % 8 else y).tanh()


def of_at_most_ten_pixels(n, x):
    if x.shape[3] > 10 or len(x) > 1:
        raise ValueError("too large")
    return n.bn(same_pad(n.conv(x))).tanh()


def crop_of_nothing(n, x):
    z = n.bn(x.relu())
    return n.next(z).mean((2, 3)) + z[:, :, 16:].tanh().sum((2, 3))[:, :4]


def part_of_nothing(n, x):
    part, rest = n.conv(x).split([min(8, len(x)), max(len(x) - 8, 0)])
    return torch.cat([n.bn(part), rest.tanh()])


SIZES = {
    "a-crop-that-is-empty-here": (with_next(crop_of_nothing), (2, 8), (2, 20)),
    "a-part-that-is-empty-here": (conv_and(part_of_nothing), (2, 8), (12, 8)),
    # name: network, size of the example, another one
    "pads-nothing-at-this-size": (conv_and(lambda n, x: n.bn(same_pad(n.conv(x))).tanh()), (1, 10), (1, 9)),
    "pads-nothing-at-the-largest-size": (conv_and(of_at_most_ten_pixels), (1, 10), (1, 9)),
    "forward-over-a-pad-of-nothing": (
        with_next(lambda n, x: n.next(same_pad(n.bn(x.relu())))),
        (1, 8),
        (1, 9),
    ),
    "padding-that-is-never-reached": (
        with_next(lambda n, x: n.next(F.pad(n.bn(x.relu()), (-1, 0, -1, 0))), stride=2, padding=(0, 1)),
        (1, 9),
        (1, 10),
    ),
    "sums-over-a-batch-of-one": (
        conv_and(lambda n, x: n.bn(n.conv(x).sum(0, keepdim=True)).tanh()),
        (1, 8),
        (3, 8),
    ),
    "another-way-for-a-batch": (
        conv_and(lambda n, x: n.bn(n.conv(x) if len(x) == 1 else n.conv(x).relu())),
        (1, 8),
        (2, 8),
    ),
    "another-way-for-a-single-one": (
        conv_and(lambda n, x: n.bn(n.conv(x) if len(x) > 1 else n.conv(x).relu())),
        (4, 8),
        (1, 8),
    ),
    "another-way-for-a-smaller-size": (
        conv_and(lambda n, x: n.bn(n.conv(x) if x.shape[3] > 7 else n.conv(x).relu())),
        (1, 8),
        (1, 7),
    ),
    "even-sizes-only": (conv_and(even_sizes_only), (1, 8), (1, 10)),
    "windows": (conv_and(windows_of_four), (1, 18), (1, 22)),
    "another-way-for-a-size": (
        conv_and(lambda n, x: n.bn(n.conv(x) if x.shape[3] % 2 == 0 else n.conv(x).relu())),
        (1, 8),
        (1, 9),
    ),
    "rows-of-one-image": (
        conv_and(lambda n, x: n.bn(n.conv(x).reshape(1, 4, -1)).tanh(), nn.BatchNorm1d(4)),
        (1, 8),
        (2, 8),
    ),
}


@pytest.mark.parametrize(("make", "given", "other"), SIZES.values(), ids=SIZES.keys())
def test_the_folded_network_is_right_at_another_size(randomize, make, given, other):
    net = randomize(make())
    unfolded = copy.deepcopy(net)
    result = fold_batch_norm(net, images(*given))
    for size in (given, other):
        torch.testing.assert_close(net(images(*size)), unfolded(images(*size)))
    assert rows_of(result)["bn"][0] == "kept"


def test_a_network_of_one_size_is_folded_as_it_is(randomize):
    net = nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))
    assert rows_of(fold_batch_norm(randomize(net), images())) == {"1": ("folded-backward", "0")}


def test_a_network_of_one_size_and_batch_is_folded_as_it_is(randomize):
    net = conv_and(lambda n, x: n.bn(n.conv(x)).view(1, 4, 36))
    assert rows_of(fold_batch_norm(randomize(net()), images())) == {"bn": ("folded-backward", "conv")}


def test_inputs_without_a_common_batch_are_taken_as_they_are(randomize):
    net = randomize(conv_and(lambda n, x, y: n.bn(n.conv(x)) * y.mean())())
    assert rows_of(fold_batch_norm(net, (images(2), torch.ones(3)))) == {"bn": ("folded-backward", "conv")}


def test_what_a_network_keeps_between_calls_is_not_of_another_size(randomize):
    """A recurrent state, a cache of one image size."""

    def recurrent(n, x):
        y = n.bn(n.conv(x))
        n.state = y.tanh() if n.state is None else y.tanh() + n.state
        n.calls += 1
        return n.state

    net = randomize(conv_and(recurrent)())
    net.state, net.calls = None, 0
    net.state = net(images(2)).detach()
    plan_fold(net, images(2))
    assert (len(net.state), net.calls) == (2, 1)
    result = fold_batch_norm(net, images(2))
    assert rows_of(result) == {"bn": ("folded-backward", "conv")}
    assert (len(net.state), net.calls) == (2, 1)


def test_a_network_that_builds_itself_is_not_built_by_another_size(randomize):
    def building(n, x):
        y = n.bn(n.conv(x))
        if "scale" not in n._parameters:
            n.scale = nn.Parameter(torch.ones(y.shape[1:]))
        n.cache.setdefault("place", torch.arange(y.shape[3]))
        return y * n.scale + n.cache["place"]

    net = randomize(conv_and(building)())
    net.cache = {}
    for function in (plan_fold, fold_batch_norm):
        result = function(net, images())
        assert (net.cache, list(net._parameters)) == ({}, [])
    assert rows_of(result) == {"bn": ("folded-backward", "conv")}
    net(images())


def test_a_network_that_goes_on_from_the_call_before_is_planned_from_its_own_calls(randomize):
    def recurrent(n, x):
        y = n.bn(n.conv(x)).tanh()
        n.state = y if n.state is None else y + n.state
        return n.state

    net = randomize(conv_and(recurrent)())
    net.state = None
    assert rows_of(fold_batch_norm(net, images(2))) == {"bn": ("folded-backward", "conv")}
    assert net.state is None


def test_other_sizes_are_no_blind_spot(randomize):
    def fork(n, x):
        y = n.bn(n.conv(x))
        return y.tanh() if len(x) == 1 else setattr(n, "cache", y.relu()) or y

    net = randomize(conv_and(fork)())
    assert plan_fold(net, images()).blind_spots == ()
    assert len(plan_fold(net, [images(), images(2)]).blind_spots) == 2


@pytest.mark.parametrize(
    ("given", "larger", "smaller"),
    [
        (
            (torch.ones(1, 3, 4, 4),),
            [
                "(float32[2, 3, 5, 5])",
                "(float32[2, 3, 6, 6])",
                "(float32[2, 3, 8, 8])",
                "(float32[2, 3, 36, 36])",
                "(float32[2, 3, 4, 4])",
            ],
            ["(float32[1, 3, 3, 3])"],
        ),
        (
            (torch.ones(2, 3, 4, 4, 4),),
            [f"(float32[3, 3, {n}, {n}, {n}])" for n in (5, 6, 8, 36, 4)],
            ["(float32[1, 3, 3, 3, 3])", "(float32[1, 3, 4, 4, 4])"],
        ),
        ((torch.ones(2, 3),), ["(float32[3, 3])"], ["(float32[1, 3])"]),
        (
            (torch.ones(5, 3, 4), torch.ones(5, 7, dtype=torch.int64)),
            [f"(float32[2, 3, {4 + n}], int64[2, {7 + n}])" for n in (1, 2, 4, 32, 0)],
            ["(float32[1, 3, 3], int64[1, 6])", "(float32[1, 3, 4], int64[1, 7])"],
        ),
        ((torch.ones(1, 3, device="meta"),), ["(float32[2, 3])"], []),
        ((torch.ones(2, 3, 4, device="meta"),), ["(float32[3, 3, 4])"], ["(float32[1, 3, 3])", "(float32[1, 3, 4])"]),
    ],
    ids=["image", "volumes", "features", "sequence-and-labels", "single", "on-another-device"],
)
def test_variants_of_a_call(given, larger, smaller):
    found = [[str(call) for call in variants] for variants in other_sizes(ExampleCall(given))]
    assert found == [larger, smaller]


@pytest.mark.parametrize(
    "given",
    [
        (torch.ones(2, 3), torch.ones(3)),
        (torch.tensor(1.0),),
        (3,),
        (torch.ones(0, 3),),
        (torch.eye(3).to_sparse(),),
        (torch.nested.as_nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged),),
    ],
    ids=["no-common-batch", "scalar", "no-tensor", "empty", "sparse", "nested"],
)
def test_no_variants_of_a_call(given):
    assert other_sizes(ExampleCall(given)) == []
