"""Which channel of which maker each channel carries, found by tags and checked by disturbing one channel at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bn_lightning import record_forward
from bn_lightning.tracing import channel_origins
from bn_lightning.tracing.channels import Cone


class Net(nn.Module):
    """Two convolutions of six channels, whose outputs a body puts together."""

    def __init__(self, body):
        super().__init__()
        self.a, self.b, self.drop = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3), nn.Dropout()
        self.body = body

    def forward(self, x):
        return self.body(self, self.a(x), self.b(x))


def disturbed(net, x, layer, channel):
    """The output with one channel of one convolution moved, at every position by another amount."""
    moved = torch.randn(6, 6, generator=torch.Generator().manual_seed(channel))

    def move(module, args, output):
        output = output.clone()
        output[:, channel] += 1.0 + moved.abs()
        return output

    handle = getattr(net, layer).register_forward_hook(move)
    try:
        with torch.no_grad():
            return net(x)
    finally:
        handle.remove()


BODIES = {
    "plain": lambda n, a, b: a.clone(),
    "flatten": lambda n, a, b: a.flatten(2),
    "view": lambda n, a, b: a.view(2, 6, -1),
    "reshape-to-more": lambda n, a, b: a.reshape(2, 12, -1),
    "transpose": lambda n, a, b: a.transpose(2, 3),
    "permute": lambda n, a, b: a.permute(3, 1, 0, 2),
    "chunk": lambda n, a, b: a.chunk(3, 1)[1],
    "split": lambda n, a, b: torch.split(a, [1, 2, 3], 1)[2],
    "unbind": lambda n, a, b: torch.stack(a.unbind(1)[::-1], 1),
    "slice": lambda n, a, b: a[:, 1:5:2],
    "cat": lambda n, a, b: torch.cat([b, a], 1),
    "cat-of-slices": lambda n, a, b: torch.cat([b[:, 3:], a[:, :2], b[:, :1]], 1),
    "shuffle": lambda n, a, b: F.channel_shuffle(torch.cat([a, b], 1), 4),
    "pixel-unshuffle": lambda n, a, b: F.pixel_unshuffle(a, 2),
    "average": lambda n, a, b: F.avg_pool2d(a, 2),
    "adaptive": lambda n, a, b: F.adaptive_avg_pool2d(a, 3),
    "mean": lambda n, a, b: a.mean((2, 3)),
    "max": lambda n, a, b: F.max_pool2d(a, 2),
    "bilinear": lambda n, a, b: F.interpolate(a, scale_factor=2, mode="bilinear"),
    "reflect": lambda n, a, b: F.pad(a, (1, 2, 1, 0), mode="reflect"),
    "dropout": lambda n, a, b: n.drop(a).flip(2),
    "sum": lambda n, a, b: a + b.flip(1),
    "sum-of-sums": lambda n, a, b: (a + b) + a.flip(1),
    "repeat": lambda n, a, b: a.repeat(1, 2, 1, 1),
    "roll": lambda n, a, b: a.roll(2, 1),
    "expand": lambda n, a, b: a.mean((2, 3), keepdim=True).expand(-1, -1, 2, 2),
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_origins_are_the_channels_that_make_a_difference(body):
    torch.manual_seed(0)
    net, x = Net(body).eval(), torch.randn(2, 3, 8, 8)
    record = record_forward(net, x)
    maker = {operation.module: operation.index for operation in record.of_kind("conv")}
    (output,) = [value.index for value in record.values if value.output]
    found = channel_origins(record, output)
    with torch.no_grad():
        expected = net(x)
    seen = [set() for _ in range(expected.shape[1])]
    for layer in "ab":
        for channel in range(6):
            changes = (disturbed(net, x, layer, channel) != expected).transpose(0, 1).flatten(1).any(1)
            for index in changes.nonzero().flatten().tolist():
                seen[index].add((maker[layer], channel))
    assert [set(origin or ()) for origin in found] == seen


MIXED = {
    "zero-pad": (lambda n, a, b: F.pad(a, (1, 1)), [True] * 6),
    "padded-average": (lambda n, a, b: F.avg_pool2d(a, 3, padding=1), [True] * 6),
    "mean-over-channels": (lambda n, a, b: a.mean(1, keepdim=True), [True]),
    "mixing-reshape": (lambda n, a, b: a.transpose(1, 2).reshape(2, 6, -1), [True] * 6),
    "half-zeros": (lambda n, a, b: torch.cat([a, torch.zeros_like(b)], 1), [False] * 6 + [True] * 6),
}


@pytest.mark.parametrize(("body", "unknown"), MIXED.values(), ids=MIXED.keys())
def test_what_is_no_channels_own_is_none(body, unknown):
    record = record_forward(Net(body).eval(), torch.randn(2, 3, 8, 8))
    (output,) = [value.index for value in record.values if value.output]
    found = channel_origins(record, output)
    assert [origin is None or record.operations[min(origin)[0]].function == "zeros_like" for origin in found] == unknown


def test_a_linear_layer_has_its_channels_on_the_last_axis():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 5)

        def forward(self, x):
            return self.fc(x).transpose(1, 2)

    record = record_forward(Rows().eval(), torch.randn(2, 5, 4))
    (output,) = [value.index for value in record.values if value.output]
    assert channel_origins(record, output) == [frozenset({(0, channel)}) for channel in range(5)]
    assert channel_origins(record, output, axis=2) == [None] * 5


def test_tags_take_no_memory_and_hold_no_activation():
    from bn_lightning.tracing.channels import tagged

    (tags,) = tagged((64, 512, 1000, 1000), 1, 7)
    assert tags.untyped_storage().nbytes() == 512 * 8
    assert tags[3, 5, 10, 20] == 12


def test_a_cone_goes_down_to_every_reader():
    net = Net(lambda n, a, b: torch.cat([a.flatten(2), b.flatten(2)], 1).relu() + a.sum())
    record = record_forward(net.eval(), torch.randn(2, 3, 8, 8))
    cone = Cone(record)
    cone.descend(record.of_kind("conv")[0].outputs[0])
    assert sorted(operation.function for operation, _ in cone.readers) == ["relu", "sum"]
    assert sorted(operation.function for operation in cone.operations.values()) == ["cat", "flatten"]


def test_whole_numbers_carry_no_channel():
    """Neither a cast to them nor the places of maxima."""
    net = Net(lambda n, a, b: (a.to(torch.int64), F.max_pool2d(b, 2, return_indices=True)[1]))
    record = record_forward(net.eval(), torch.randn(2, 3, 8, 8))
    for value in record.values:
        if value.output:
            origins = channel_origins(record, value.index)
            assert {index for origin in origins for index, _ in origin} == {value.producer}
