"""A layer that computes something else on its device is told, and every right kind of layer is left in peace."""

import copy

import pytest
import torch
import torch.nn.functional as F
from auditing.faults.catalogue_device import FAULTS, flattened
from auditing.faults.digits_training import digits, fit
from torch import nn

from bn_lightning.auditing import audit_batch_norm
from bn_lightning.auditing.observers.samples import SampleObserver, compare_with_float64
from bn_lightning.layers import batch_norm_layer


def of_rule(report, slug="device-mismatch"):
    return {finding.layer: finding for finding in report.findings if finding.rule == slug}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randomized(layer):
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            if name.endswith("tracked"):
                tensor.fill_(7)
            else:
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=seeded(3)))
    return layer


def test_a_training_with_the_fault_is_found_at_its_layer():
    found = of_rule(FAULTS["device-mismatch"]())
    assert {name: finding.severity for name, finding in found.items()} == {"0.4": "error"}
    assert found["0.4"].evidence["place"] == "cpu, float32, channels_last"
    assert found["0.4"].evidence["tolerance"] == pytest.approx(1e-4)
    assert "0.0001" in found["0.4"].threshold


def test_the_same_layer_in_contiguous_memory_is_right():
    model = flattened()
    fit(model, digits())
    assert not of_rule(audit_batch_norm(model.eval(), digits(), loss=F.cross_entropy))


class WrongGradient(nn.BatchNorm2d):
    """Is right forward and twice as large backward."""

    def forward(self, x):
        y = super().forward(x)
        return y if y.dtype == torch.float64 else 2 * y - y.detach()


class Half(nn.BatchNorm2d):
    """Computes float32 in bfloat16."""

    def forward(self, x):
        return super().forward(x.bfloat16().float() if x.dtype == torch.float32 else x)


class NaN(nn.BatchNorm2d):
    """Loses the last channel."""

    def forward(self, x):
        y = super().forward(x)
        return y if y.dtype == torch.float64 else torch.cat([y[:, :-1], y[:, -1:] * torch.nan], 1)


@pytest.mark.parametrize("kind", [WrongGradient, Half, NaN], ids=lambda kind: kind.__name__)
def test_other_ways_of_being_wrong(kind):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), randomized(kind(8)))
    report = audit_batch_norm(model, torch.randn(64, 3, 8, 8, generator=seeded()).split(16))
    assert list(of_rule(report)) == ["1"]


VARIANTS = {
    "plain": {},
    "adaptive": {},
    "cross_replica": {},
    "debiased": {},
    "domain": {"num_domains": 2},
    "frozen": {},
    "ghost": {"virtual_batch_size": 4},
    "lp": {"p": 1},
    "masked": {},
    "noisy": {},
    "renorm": {},
}


class OwnActivation(nn.BatchNorm2d):
    def forward(self, x):
        return F.relu(super().forward(x))


class OwnDropout(nn.BatchNorm2d):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


def build(kind):
    if kind in ("own-activation", "own-dropout"):
        return randomized({"own-activation": OwnActivation, "own-dropout": OwnDropout}[kind](16))
    if kind == "timm":
        return randomized(pytest.importorskip("timm").layers.BatchNormAct2d(16))
    if kind == "plain":
        return randomized(nn.BatchNorm2d(16))
    return randomized(batch_norm_layer(kind, **VARIANTS[kind])(16))


@pytest.mark.parametrize("kind", [*VARIANTS, "timm", "own-activation", "own-dropout"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offset", [0.0, 50.0], ids="offset={:g}".format)
def test_a_right_layer_is_within_its_tolerance(kind, memory_format, dtype, offset):
    x = offset + torch.randn(16, 16, 6, 6, generator=seeded(1))
    # In channels_last any kernel sums in another order.
    x = x.to(dtype).contiguous(memory_format=memory_format)
    error = compare_with_float64(build(kind), x)
    assert max(error.forward, error.backward) <= error.tolerance / 2
    assert error.tolerance == pytest.approx(max(1e-4, 16 * torch.finfo(dtype).eps * (1 + offset)), rel=0.2)


@pytest.mark.parametrize("kind", ["timm", "own-activation"])
@pytest.mark.parametrize("channel", range(8), ids="channel={}".format)
def test_values_on_the_kink_of_an_activation_are_no_difference(kind, channel):
    """Rounding decides on which side they fall, and their gradient is 0 or 1."""
    layer, x = build(kind), torch.randn(16, 16, 6, 6, generator=seeded(1))
    with torch.no_grad():
        layer.bias.zero_()
        # In training about the mean of all others, which leaves the mean where it is, but for rounding.
        values = x[:, channel].flatten()
        mean = values[21:].double().mean()
        layer.running_mean[channel] = mean
        values[:21] = mean + torch.arange(-10, 11) * 2e-9
        x[:, channel] = values.view(16, 6, 6)
    error = compare_with_float64(layer, x)
    assert max(error.forward, error.backward) <= error.tolerance


@pytest.mark.parametrize("shape", [(16, 16), (16, 16, 9), (4, 16, 3, 4, 5)], ids=str)
def test_inputs_of_any_number_of_axes(shape):
    layer = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 5: nn.BatchNorm3d}[len(shape)](16, affine=False)
    error = compare_with_float64(layer, torch.randn(shape, generator=seeded()))
    assert max(error.forward, error.backward) < 1e-6


def test_the_layer_itself_is_never_called_and_random_states_stay():
    layer = randomized(nn.BatchNorm2d(4))
    layer.register_forward_hook(lambda *args: pytest.fail("called"))
    torch.manual_seed(5)
    before, state = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    compare_with_float64(layer, torch.randn(4, 4, 3, 3, generator=seeded()))
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.training
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


def test_a_layer_that_cannot_be_compared_is_told_with_the_reason():
    class Stubborn(nn.BatchNorm2d):
        def forward(self, x):
            if x.dtype == torch.float64:
                raise TypeError("float32 only")
            return super().forward(x)

    report = audit_batch_norm(nn.Sequential(Stubborn(3)), [torch.randn(16, 3, 4, 4, generator=seeded())])
    assert not of_rule(report)
    assert [row.reason for row in report.not_looked if row.what == "device-mismatch in '0'"] == [
        "TypeError: float32 only"
    ]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_samples_are_small_and_lie_in_memory_as_the_input_does(memory_format):
    layer, observer = nn.BatchNorm2d(64), SampleObserver()
    x = torch.randn(32, 64, 24, 20, generator=seeded()).contiguous(memory_format=memory_format)
    with observer.watching(layer, {"": layer}, "population"):
        layer(x)
    (sample,) = observer._samples.values()
    assert sample.numel() <= 2**15
    assert sample.shape[:2] == (16, 64)
    assert sample.is_contiguous(memory_format=memory_format)
    assert torch.equal(sample, x[:16, :, : sample.shape[2], : sample.shape[3]])
