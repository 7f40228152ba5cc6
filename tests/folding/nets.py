"""Small networks written as functions of themselves and their input, for one test each."""

import copy

import torch
from torch import nn

from bn_lightning import fold_batch_norm


class Written(nn.Module):
    """Named children, and a body that says how they are called.

    Args:
        body: Takes the network and its input.
        **children: The layers.
    """

    def __init__(self, body, **children):
        super().__init__()
        self.body = body
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, *inputs):
        return self.body(self, *inputs)


def rows_of(result):
    """What became of each BatchNorm layer."""
    return {row.name: (row.action, row.into or row.reason) for row in result.report.rows}


def fold_in_float64(net, *inputs, held_out=(), **options):
    """Fold a network in float64 and compare it there with an unfolded copy, also on inputs it was not folded with."""
    net = net.double().eval()
    inputs = [value.double() for value in inputs]
    unfolded = copy.deepcopy(net)
    result = fold_batch_norm(net, tuple(inputs), **options)
    for given in (inputs, *([value.double() for value in other] for other in held_out)):
        with torch.no_grad():
            found, expected = net(*given), unfolded(*given)
        assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert "unverified" not in [row.reason for row in result.report.rows]
    return result
