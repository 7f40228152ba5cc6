"""What each rule of the alerts looks at, against NumPy where it measures."""

import numpy as np
import pytest
import torch
from monitoring.alert_samples import HALF, block, norms, reading, relu, sample
from torch import nn

from bn_lightning.functional.activation import activation_statistics
from bn_lightning.monitoring import ActivationWatch, AlertRules, RunningSnapshot, RunningStatisticsWatch
from bn_lightning.monitoring.running_snapshot import RunningRow

# dead


def test_other_channels_each_time_are_not_dead():
    rules = AlertRules(["dead"])
    halves = [relu(0.6), relu(0.6)]
    halves[1].blocks["fc"].copy_(halves[1].blocks["fc"].flip(1))
    assert not any(rules.of_activations(halves[index % 2]) for index in range(12))


@pytest.mark.parametrize(("count", "expected"), [(30, 9), (100, 2), (99, 3), (1000, 2)], ids=str)
def test_few_values_do_not_show_a_channel_dead(count, expected):
    rules = AlertRules(["dead"])
    bad = sample(fc=block(channels=10, dead=9, smallest=0.0, count=count))
    assert [number for number in range(20) if rules.of_activations(bad)] == [expected]


def test_only_layers_that_put_out_nothing_negative_can_be_dead():
    rules = AlertRules(["dead"])
    assert not any(rules.of_activations(sample(fc=block(dead=9))) for _ in range(9))
    assert any(rules.of_activations(sample(fc=block(dead=10))) for _ in range(9)), "all zero"


def test_another_channel_count_begins_anew():
    rules = AlertRules(["dead"])
    wide, narrow = (sample(fc=block(channels=width, dead=width, smallest=0.0)) for width in (8, 4))
    assert [bool(rules.of_activations(each)) for each in (wide, wide, narrow, narrow, narrow)] == [False] * 4 + [True]


def test_what_is_dead_agrees_with_numpy():
    generator = torch.Generator().manual_seed(0)
    outputs = [torch.randn(128, 40, generator=generator).sub(torch.linspace(0, 8, 40)).relu() for _ in range(3)]
    dead = (torch.cat(outputs).numpy() == 0).all(0).sum()
    rules = AlertRules(["dead"])
    (alert,) = [a for x in outputs for a in rules.of_activations(sample(act=activation_statistics(x)))]
    assert f"{dead} of its 40 channels were exactly 0 in the last 3 samples, 384 values" in alert.message


# scale-jump


def jumps(stds, steps=None):
    """Return the steps at which a jump was told."""
    rules, steps = AlertRules(["scale-jump"]), steps or range(len(stds))
    return [
        step
        for step, std in zip(steps, stds, strict=True)
        if rules.of_activations(sample(step=step, fc=block(std=std)))
    ]


@pytest.mark.parametrize("base", [1.0, 1e-4, 1e6], ids="base {:g}".format)
@pytest.mark.parametrize("sign", [1, -1], ids=["up", "down"])
def test_a_jump_is_told_after_three_samples(base, sign):
    # Just below and above a factor of 4: the variance is made of squares, which round.
    before = [base] * 8
    assert jumps([*before, *[base * 3.99**sign] * 9]) == []
    assert jumps([*before, *[base * 4.01**sign] * 9]) == [10]
    two = [base * 4.01**sign] * 2
    assert jumps([*before, *two, *before]) == []
    assert jumps([*before, *two, *before[:3], *two, *before]) == [], "not in a row"


def test_the_new_scale_is_the_expected_one():
    assert jumps([1.0] * 8 + [8.0] * 12 + [64.0] * 9) == [10, 22]
    assert jumps([1.0] * 8 + [8.0] * 8 + [64.0] * 3) == [10, 18], "three samples of it are known when it is told"


def test_a_jump_needs_something_to_compare_with():
    assert jumps([1.0] * 2 + [8.0] * 9) == [], "most of the five samples it takes have the new scale"
    assert jumps([1.0] * 5 + [8.0] * 9) == [7]


def test_noise_and_growth_are_no_jump():
    noise = torch.randn(200, generator=torch.Generator().manual_seed(0)).double()
    assert jumps((2 ** (2 * noise)).tolist()) == []
    assert jumps([1.5**index for index in range(40)]) == []
    # What sticks out of the noise: σ = 0.2 doublings, so 8 of them are 1.6.
    quiet = (2 ** (0.2 * noise[:20])).tolist()
    assert jumps([*quiet, *[2**2.6] * 3]) == [22]


def test_samples_at_another_distance_are_not_compared():
    steps = [*range(20), *range(50, 801, 50)]
    grown = [1.0] * 20 + [9.0] * 16
    assert jumps(grown, steps) == [], "50 steps later"
    late = [1.0] * 27 + [9.0] * 9
    assert jumps(late, steps) == [500]


def test_a_layer_that_becomes_constant_has_jumped():
    rules = AlertRules(["scale-jump"])
    alerts = [a for std in [1.0] * 8 + [0.0] * 4 for a in rules.of_activations(sample(fc=block(std=std, largest=1.0)))]
    assert len(alerts) == 1
    assert "its standard deviation is 0," in alerts[0].message


def test_nonfinite_layers_are_no_jump():
    rules = AlertRules(["scale-jump"])
    bad = [block()] * 8 + [block(nonfinite=1)] * 8
    assert not any(rules.of_activations(sample(fc=each)) for each in bad)


# gradients


def deep(act, width=16, depth=9):
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), act())]
    return nn.Sequential(*layers, nn.Linear(width, 3))


def true_norms(net, x):
    """Return the gradient's norm at each output, in float64, by another way than hooks."""
    net, outputs = net.double(), []
    for layer in net:
        outputs.append(layer(outputs[-1] if outputs else x.double()))
    loss = nn.functional.cross_entropy(outputs[-1], torch.zeros(len(x), dtype=torch.int64))
    return np.array([np.linalg.norm(each.numpy()) for each in torch.autograd.grad(loss, outputs)])


@pytest.mark.parametrize("act", [nn.Sigmoid, nn.ReLU, nn.Tanh], ids=lambda act: act.__name__)
@pytest.mark.parametrize("gain", [0.3, 1.0, 6.0], ids="gain {:g}".format)
def test_gradients_are_judged_by_their_norms(act, gain):
    torch.manual_seed(0)
    net, x = deep(act), torch.randn(12, 16)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(gain)
    watch = ActivationWatch(gradients=True)
    watch.install(net)
    watch.sampling = True
    nn.functional.cross_entropy(net(x), torch.zeros(12, dtype=torch.int64)).backward()
    watch.remove()
    rules, snapshot = AlertRules(), watch.flush().gradients
    alerts = {alert.rule: alert for _ in range(3) for alert in rules.of_gradients(snapshot)}
    norm = true_norms(net, x)
    vanished = np.maximum.accumulate(norm) < np.median(norm[norm > 0]) * 10**-2.5
    exploded = norm > 10**2.5 * norm[-(len(norm) // 4) :].max()
    assert ("vanishing-gradient" in alerts) == vanished.any()
    assert ("exploding-gradient" in alerts) == exploded.any()
    if vanished.any():
        assert alerts["vanishing-gradient"].layer == "0"
        assert f"and {vanished.sum() - 1} other layer" in alerts["vanishing-gradient"].message
    if exploded.any():
        assert alerts["exploding-gradient"].layer == str(norm.argmax())


def test_the_networks_of_that_test_are_of_each_kind():
    kinds = set()
    for act, gain in ((nn.Sigmoid, 1.0), (nn.ReLU, 6.0), (nn.Tanh, 1.0)):
        torch.manual_seed(0)
        net = deep(act)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(gain)
        norm = true_norms(net, torch.randn(12, 16))
        kinds.add(int(np.log10(norm[0] / norm[-1])))
    assert min(kinds) <= -3
    assert max(kinds) >= 3


@pytest.mark.parametrize("scale", [1e-8, 1.0, 65536.0], ids="loss × {:g}".format)
def test_the_scale_of_the_loss_does_not_matter(scale):
    rules = AlertRules()
    assert not any(rules.of_gradients(norms(*(scale * n for n in (0.1, 1, 2, 0.5)))) for _ in range(9))


def test_a_branch_that_is_gone_round_has_not_vanished():
    """The second layer starts at zero, as behind a γ of 0; the first gets its gradient over the skip connection."""
    rules = AlertRules()
    assert not any(rules.of_gradients(norms(1.0, 0.0, 0.0, 1.0, 1.0)) for _ in range(9))


def test_more_values_share_the_same_gradient():
    """As in front of a pooling: the norm over all values is the same, each value's part is not."""
    rules = AlertRules()
    many, few = block(count=4_000_000, channels=1, std=1e-3), block(count=4, channels=1, std=1.0)
    assert not any(rules.of_gradients(sample(a=many, b=few, c=few)) for _ in range(9))
    assert not any(rules.of_gradients(sample(a=few, b=few, c=few, d=many)) for _ in range(9))


def test_nothing_arrives_where_nothing_flows():
    rules = AlertRules(["vanishing-gradient"])
    (alert,) = [a for _ in range(3) for a in rules.of_gradients(norms(0.0, 0.0, 0.0, 1.0, 2.0))]
    assert alert.layer == "0"
    assert "and 2 other layers" in alert.message
    assert "nothing of the network's median" in alert.message


@pytest.mark.parametrize("values", [(0.0, 0.0, 0.0), (0.0, 0.0, 1e-3), (1.0,), ()], ids=str)
def test_a_loss_that_is_zero_is_no_fault(values):
    rules = AlertRules()
    assert not any(rules.of_gradients(norms(*values)) for _ in range(9))


def test_a_gradient_scaler_may_find_its_scale():
    bad = sample(limits={"a": HALF, "b": 3.4e38}, a=block(nonfinite=4), b=block())
    rules = AlertRules(["nonfinite-gradient"])
    assert not any(rules.of_gradients(bad) for _ in range(9))
    (alert,) = [a for _ in range(9) for a in rules.of_gradients(bad)]
    assert "for 10 samples in a row" in alert.message


def test_nonfinite_gradients_are_named_in_the_order_of_the_backward_pass():
    bad = sample(a=block(nonfinite=1), b=block(nonfinite=1), c=block())
    (alert,) = AlertRules(["nonfinite-gradient"]).of_gradients(bad)
    assert alert.layer == "b"
    assert "1 of the 4000 gradients" in alert.message


# running statistics


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"drift": None}, id="not known"),
        pytest.param({"steps": 9}, id="few steps"),
        pytest.param({"batches": None}, id="batches not known"),
        pytest.param({"batches": 43}, id="not converged yet"),
        pytest.param({"batches": 458, "momentum": 0.01}, id="not converged yet, 0.01"),
        pytest.param({"batches": 499, "momentum": 0.001}, id="early"),
        # 2·√(0.1/1.9 + 1/50) = 0.539
        pytest.param({"drift": 1.0, "noise": 1.86}, id="noise"),
        pytest.param({"drift": 1.0, "noise": None, "resolution": 1.86}, id="noise below its resolution"),
    ],
)
def test_a_natural_drift_is_none(fields):
    rules = AlertRules(["drift"])
    assert not any(rules.of_running(reading(**{"drift": 0.9, **fields})) for _ in range(9))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        pytest.param({"batches": 44}, "weights or the data change", id="converged"),
        pytest.param({"batches": 459, "momentum": 0.01}, "weights or the data change", id="converged, 0.01"),
        pytest.param({"batches": 500, "momentum": 0.001}, "initial values still weigh 61%", id="never converges"),
        pytest.param({"momentum": None}, "weights or the data change", id="average of all"),
        pytest.param({"drift": 1.0, "noise": 1.85}, "1 σ from the mean of its last 50 steps", id="beyond the noise"),
    ],
)
def test_a_drift_is_told_with_its_reason(fields, words):
    rules = AlertRules(["drift"])
    (alert,) = [a for _ in range(9) for a in rules.of_running(reading(**{"drift": 0.9, **fields}))]
    assert words in alert.message


@pytest.mark.parametrize("momentum", [0.1, 0.001, None])
def test_drift_is_told_of_a_real_layer_that_is_behind(momentum):
    bn, told_at = nn.BatchNorm1d(4, momentum=momentum), []
    watch, rules, generator = RunningStatisticsWatch({"bn": bn}), AlertRules(), torch.Generator().manual_seed(0)
    for step in range(900):
        watch.begin()
        bn(5.0 + torch.randn(32, 4, generator=generator))
        watch.end(step)
        if step < 20 or step % 50 == 0:
            told_at += [(alert.rule, alert.step) for alert in rules.of_running(watch.read())]
    assert told_at == ([("drift", 600)] if momentum == 0.001 else [])


def test_rows_say_how_many_batches_and_which_momentum():
    bn = nn.BatchNorm1d(4, momentum=0.2)
    bn.num_batches_tracked.fill_(100)
    watch = RunningStatisticsWatch({"bn": bn, "other": nn.LayerNorm(4)})
    for step in range(3):
        watch.begin()
        for _ in range(2):
            bn(torch.randn(8, 4))
        watch.end(step)
    row, other = watch.read().rows
    assert (row.steps, row.batches, row.momentum, row.updates) == (3, 106, 0.2, 2.0)
    assert (other.steps, other.batches, other.momentum) == (0, None, None)
    assert watch.read().rows[0].steps == 0


def test_statistics_that_were_put_back_are_told_too():
    rules = AlertRules(["nonfinite-statistics"])
    (alert,) = rules.of_running(reading(nonfinite=0, spoiled_steps=1, first_spoiled=7, restored=1))
    assert "first after optimizer step 7, and were put back" in alert.message


def test_the_layer_spoiled_first_is_named():
    rows = (RunningRow("a", 4, nonfinite=1, first_spoiled=9), RunningRow("b", 4, nonfinite=1, first_spoiled=8))
    (alert,) = AlertRules().of_running(RunningSnapshot(rows, 10, {}, {}))
    assert alert.layer == "b"


class Mask(nn.Module):
    def forward(self, x):
        return torch.zeros(x.shape, dtype=torch.bool)


class ByMask(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.mask, self.norm, self.act = Mask(), norm, nn.ReLU()

    def forward(self, x):
        return self.act(self.norm(x.masked_fill(self.mask(x), 0.0)))


@pytest.mark.parametrize(("bias", "expected"), [(0.0, []), (-9.0, ["act"])], ids=["alive", "dead"])
def test_a_mask_and_a_scale_of_zero_are_not_dead(bias, expected):
    zero = nn.BatchNorm1d(64)
    net, watch, rules = ByMask(nn.BatchNorm1d(64)), ActivationWatch(), AlertRules(["dead", "scale-jump"])
    nn.init.constant_(net.norm.bias, bias)
    both = nn.ModuleDict({"net": net, "zero": zero})
    nn.init.zeros_(zero.weight)
    watch.install(both)
    watch.sampling = True
    told = []
    for step in range(14):
        if step == 8:  # as when a warm-up that begins at 0 goes on
            nn.init.constant_(zero.weight, 1e-3)
        x = torch.randn(200, 64, generator=torch.Generator().manual_seed(step))
        net(x), zero(x)
        told += rules.of_activations(watch.start_flush(step=step)())
    assert [alert.layer.removeprefix("net.") for alert in told] == expected
