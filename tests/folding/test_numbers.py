"""Numbers that folding must not spoil, and what it says about them."""

import math

import numpy as np
import pytest
import torch
from folding.nets import Written
from torch import nn

from bn_lightning import fold_batch_norm, plan_fold
from bn_lightning.errors import FoldError
from bn_lightning.folding.numbers import Numbers
from bn_lightning.folding.spread import weight_spread


def pair(randomize):
    return randomize(nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)))


@pytest.mark.parametrize("standalone", ["keep", "affine"])
@pytest.mark.parametrize(
    ("role", "value", "reason", "words"),
    [
        pytest.param("running_mean", math.inf, "nonfinite", "its running_mean is inf at channel 2", id="mean"),
        pytest.param("running_var", math.inf, "nonfinite", "its running_var is inf at channel 2", id="variance"),
        pytest.param("bias", math.nan, "nonfinite", "its bias is nan at channel 2", id="bias"),
        pytest.param("running_var", -1.0, "nonfinite", r"running_var + eps is -1 at channel 2", id="negative"),
        pytest.param("weight", 5e3, "exploding", "the scale of channel 2 is", id="exploding"),
    ],
)
def test_the_channel_is_named(randomize, images, role, value, reason, words, standalone):
    net = pair(randomize)
    with torch.no_grad():
        net[1].running_var[2] = 1.0
        getattr(net[1], role)[2] = value
    (row,) = plan_fold(net, images, standalone=standalone).rows
    stays_as_affine = standalone == "affine" and reason == "exploding"
    assert (row.action, row.reason) == ("affine" if stays_as_affine else "kept", reason)
    assert words in row.detail


def test_a_channel_without_variance_is_no_trouble(randomize, images):
    net = pair(randomize)
    with torch.no_grad():
        net[1].running_var[1] = 0.0
        net[1].weight[0] = 0.0
        expected = net(images)
    result = fold_batch_norm(net, images)
    assert result.report.rows[0].action == "folded-backward"
    torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-3)
    assert not net[0].weight[0].any()


def test_the_spread_is_that_of_the_written_weights(randomize, images):
    net = pair(randomize)
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([0.01, 1.0, 1.0, 0.0]))
        net[1].running_var.fill_(1.0)
    before = np.abs(net[0].weight.detach().numpy()).max((1, 2, 3))
    (row,) = fold_batch_norm(net, images).report.rows
    after = np.abs(net[0].weight.detach().numpy()).max((1, 2, 3))
    assert row.spread_before == pytest.approx(before.max() / before.min())
    assert row.spread_after == pytest.approx(after[:3].max() / after[:3].min(), rel=1e-4)
    assert row.suffers_in_int8
    assert row.spread_after > 90


def test_int8_suffers_where_the_flag_says_so(randomize, images):
    """Quantized with one scale for the tensor, the flagged weight loses its smallest channel, the other does not."""
    errors = []
    for smallest in (0.001, 0.5):
        net = pair(randomize)
        with torch.no_grad():
            net[1].weight.copy_(torch.tensor([smallest, 1.0, 1.0, 1.0]))
            net[1].running_var.fill_(1.0)
        row = fold_batch_norm(net, images).report.rows[0]
        weight = net[0].weight.detach()
        scale = weight.abs().max() / 127
        rounded = (weight / scale).round() * scale
        errors.append((row.suffers_in_int8, float((rounded - weight)[0].norm() / weight[0].norm())))
    (flagged, lost), (fine, little) = errors
    assert (flagged, fine) == (True, False)
    assert lost > 0.9 > 0.05 > little


@pytest.mark.parametrize(
    ("shape", "options", "channels"),
    [
        pytest.param((4, 3, 2), {"kind": "conv"}, lambda w: w.reshape(4, -1), id="conv"),
        pytest.param((4, 3, 2), {"kind": "conv", "groups": 2, "forward": True}, None, id="conv-forward"),
        pytest.param((4, 3, 2), {"kind": "conv_transpose", "groups": 2}, None, id="transposed"),
        pytest.param(
            (4, 3, 2),
            {"kind": "conv_transpose", "groups": 2, "forward": True},
            lambda w: w.reshape(4, -1),
            id="transposed-forward",
        ),
        pytest.param((4, 3), {"kind": "linear"}, lambda w: w, id="linear"),
        pytest.param((4, 3), {"kind": "linear", "forward": True}, lambda w: w.T, id="linear-forward"),
    ],
)
def test_weight_spread(shape, options, channels):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = np.abs(weight.numpy())
    if channels is None:  # the inputs of a grouped convolution, the outputs of a grouped transposed one
        sizes = [values[2 * g : 2 * g + 2, column].max() for g in range(2) for column in range(3)]
    else:
        sizes = channels(values).max(1)
    assert weight_spread(weight, **options) == pytest.approx(max(sizes) / min(sizes))


def test_agreement_on_the_users_own_data(randomize):
    net = randomize(nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(100, 3)))
    batches = [(torch.randn(size, 6, 7, 7), torch.zeros(size)) for size in (5, 2)]
    with torch.no_grad():
        before = [net(inputs) for inputs, _ in batches]
    taken = iter([*batches, None])
    agreement = fold_batch_norm(net, batches[0][0], batches=taken, max_batches=2).report.agreement
    assert next(taken) is None, "no more than max_batches are taken"
    with torch.no_grad():
        after = [net(inputs) for inputs, _ in batches]
    assert agreement.examples == 7
    assert agreement.top1 == 1.0
    assert agreement.largest_difference == max((a - b).abs().max() for a, b in zip(before, after, strict=True)) > 0
    assert agreement.largest_output == max(each.abs().max() for each in before)


def test_agreement_sees_a_difference(randomize):
    from bn_lightning.folding.agreement import measure_agreement

    ours = torch.tensor([[1.0, 2.0], [3.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    theirs = torch.tensor([[1.0, 2.0], [0.5, 1.0], [0.0, 1.0], [1.0, 0.0]])
    agreement = measure_agreement(lambda inputs: (ours, theirs), [torch.zeros(4)])
    assert (agreement.top1, agreement.largest_difference, agreement.largest_output) == (0.75, 2.5, 3.0)
    assert str(agreement) == "on your 4 examples: top-1 agreement 75.00%, largest difference 2.5e+00 (outputs up to 3)"


def test_dense_predictions_agree_position_by_position():
    from bn_lightning.folding.agreement import measure_agreement

    ours = torch.zeros(1, 2, 2, 2)
    theirs = ours.clone()
    theirs[0, 1, 0, 0] = 1.0
    assert measure_agreement(lambda inputs: (ours, theirs), [torch.zeros(1)]).top1 == 0.75


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        pytest.param([], "no batch", id="none"),
        pytest.param([{"image": torch.zeros(1)}], "got a dict", id="dict"),
    ],
)
def test_batches_that_do_not_fit_are_refused_and_the_model_comes_back(randomize, images, fingerprint, batches, words):
    net = pair(randomize)
    before = fingerprint(net)
    with pytest.raises(FoldError, match=words):
        fold_batch_norm(net, images, batches=batches)
    assert fingerprint(net) == before


def test_a_refused_fold_changes_no_number(randomize, images):
    """The second of two convolutions overflows after the first has been scaled."""
    net = Written(
        lambda n, x: n.bn(torch.cat([n.a(x), n.b(x)], 1)).relu(),
        a=nn.Conv2d(6, 4, 3),
        b=nn.Conv2d(6, 4, 3),
        bn=nn.BatchNorm2d(8),
    )
    net = randomize(net).half()
    (step,) = plan_fold(net, images.half()).steps
    with torch.no_grad():
        net.b.weight.fill_(6e4)
        net.bn.weight.fill_(100)
    numbers = Numbers(net)
    kept = numbers.apply(step)
    assert (kept.reason, numbers.changed) == ("overflow", {})
    assert "'b.weight' leaves the range of float16" in kept.detail
