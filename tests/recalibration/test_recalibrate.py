"""Recalibration against pooled float64 statistics, recomputed here with NumPy from every layer's own inputs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recalibration.networks import data, double, fingerprint, net, spoiled
from torch import nn

from bn_lightning.errors import RecalibrationError
from bn_lightning.functional import channel_gap
from bn_lightning.recalibration import population_statistics, recalibrate_batch_norm


def reference(model, batches):
    """Every BN's input by name, normalized by the batch in float64 NumPy on the way."""
    inputs = {"first": [], "middle": [], "shared": [], "last": []}

    def norm(name, x):
        layer = getattr(model, name)
        inputs[name].append(x)
        axes, column = (0, *range(2, x.ndim)), (1, -1) + (1,) * (x.ndim - 2)
        x = (x - x.mean(axes).reshape(column)) / np.sqrt(x.var(axes).reshape(column) + layer.eps)
        if layer.weight is None:
            return x
        return x * double(layer.weight).reshape(column) + double(layer.bias).reshape(column)

    def conv(layer, x):
        windows = np.lib.stride_tricks.sliding_window_view(x, layer.kernel_size, axis=(2, 3))
        return np.einsum("nchwij,ocij->nohw", windows, double(layer.weight)) + double(layer.bias).reshape(1, -1, 1, 1)

    for batch in batches:
        if not len(batch):
            continue
        x = np.maximum(norm("middle", conv(model.conv, norm("first", double(batch)))), 0)
        x = norm("shared", conv(model.mix, np.maximum(norm("shared", x), 0)))
        norm("last", x.mean((2, 3)) @ double(model.linear.weight).T + double(model.linear.bias))
    pooled = {}
    for name, arrays in inputs.items():
        values = np.concatenate([np.moveaxis(a, 1, 0).reshape(a.shape[1], -1) for a in arrays], axis=1)
        pooled[name] = (values.shape[1], values.mean(1), values.var(1, ddof=1))
    return pooled


UNEQUAL = [32] * 7 + [8]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize(
    "sizes", [pytest.param(UNEQUAL, id="7x32+8"), pytest.param([16, 0, 2, 5], id="empty-and-small")]
)
def test_every_layer_matches_pooled_float64_statistics(sizes, layout):
    model, batches = net(), [batch.contiguous(memory_format=layout) for batch in data(sizes)]
    expected = reference(model, batches)
    result = recalibrate_batch_norm(model, batches)
    for row in result.rows:
        count, mean, var = expected[row.name]
        layer = getattr(model, row.name)
        assert row.count == count
        assert np.abs((double(layer.running_mean) - mean) / np.sqrt(var)).max() < 1e-5
        assert np.abs(double(layer.running_var) / var - 1).max() < 1e-5
        assert layer.num_batches_tracked == 7


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_first_layer_is_within_buffer_rounding_at_a_large_mean(layout):
    model = net()
    batches = [batch.contiguous(memory_format=layout) for batch in data(UNEQUAL, mean=1e4, std=0.1)]
    recalibrate_batch_norm(model, batches, include=("first",), forward=lambda model, x: model.first(x))
    _, mean, var = reference(model, batches)["first"]
    ulp = np.spacing(np.float32(1e4))
    assert np.abs(double(model.first.running_mean) - mean).max() <= ulp
    # a batch mean is rounded to the buffers' float32 too, which adds up to ulp² to the variance of 1e-2
    assert np.abs(double(model.first.running_var) - var).max() <= ulp**2 + 1e-5 * var.max()


def test_batches_weigh_by_their_values():
    model = spoiled(nn.Sequential(nn.BatchNorm1d(1)))
    recalibrate_batch_norm(model, [torch.tensor([[0.0]] * 9), torch.tensor([[10.0], [14.0], [18.0]])])
    values = np.array([0.0] * 9 + [10.0, 14.0, 18.0])
    assert float(model[0].running_mean) == pytest.approx(values.mean())
    assert float(model[0].running_var) == pytest.approx(values.var(ddof=1))


def test_dropout_and_excluded_layers_stay_in_evaluation_mode():
    model, x = net().train(), data([16])[0]
    measured = population_statistics(model, [x], exclude=("first",))
    again = population_statistics(model, [x], exclude=("first",))
    torch.testing.assert_close(again["last"].moments.mean, measured["last"].moments.mean, rtol=0, atol=0)
    assert list(measured) == ["middle", "shared", "last"]
    assert measured["shared"].calls == 2
    # the excluded layer normalizes by its running statistics, which the next layer's input shows
    with torch.no_grad():
        given = model.conv(F.batch_norm(x, model.first.running_mean, model.first.running_var, model.first.weight,
                                        model.first.bias, False, 0.0, model.first.eps))  # fmt: skip
    torch.testing.assert_close(measured["middle"].moments.mean, given.double().mean((0, 2, 3)), rtol=1e-5, atol=1e-6)


def test_frozen_layer_is_measured_but_left_and_stays_on_its_running_statistics():
    model, batches = net().train(), data(UNEQUAL)
    model.middle.eval()
    before = {key: value.clone() for key, value in model.middle.state_dict().items()}
    result = recalibrate_batch_norm(model, batches)
    row = next(row for row in result.rows if row.name == "middle")
    assert "frozen" in row.reason
    assert row.count == 32 * 16 * 7 + 8 * 16
    assert all(torch.equal(value, before[key]) for key, value in model.middle.state_dict().items())
    assert not model.middle.training
    assert model.last.training
    assert not torch.allclose(model.first.running_mean, net().first.running_mean)
    with torch.no_grad():
        given = torch.cat([F.relu(F.batch_norm(model.conv(F.batch_norm(
            batch, None, None, model.first.weight, model.first.bias, True)), before["running_mean"],
            before["running_var"], before["weight"], before["bias"])) for batch in batches])  # fmt: skip
        shared = model.shared
        again = torch.cat([model.mix(F.relu(F.batch_norm(part, None, None, shared.weight, shared.bias, True)))
                           for part in given.split(UNEQUAL)])  # fmt: skip
    pooled = torch.cat([given, again]).double().mean((0, 2, 3))
    torch.testing.assert_close(model.shared.running_mean.double(), pooled, rtol=1e-4, atol=1e-5)


def test_all_frozen_is_an_error_with_the_cure():
    model = net().train()
    for name in ("first", "middle", "shared", "last"):
        getattr(model, name).eval()
    with pytest.raises(RecalibrationError, match=r"frozen.*model\.eval\(\)"):
        population_statistics(model, data([8]))
    assert set(population_statistics(model.eval(), data([8]))) == {"first", "middle", "shared", "last"}


def test_writes_in_place_reports_the_gap_and_undoes_bit_for_bit():
    model, batches = net(), data(UNEQUAL)
    before, running = fingerprint(model), (model.first.running_mean.clone(), model.first.running_var.clone())
    result = recalibrate_batch_norm(model, batches)
    assert id(model.first.running_mean) == before[1][6][0][1], "buffers are copied in place, never rebound"
    row = result.rows[0]
    _, mean, var = reference(model, batches)["first"]
    channels = channel_gap(running[0].double(), running[1].double(), torch.tensor(mean), torch.tensor(var), 1e-5)
    weight = model.first.weight.detach().double()
    assert row.gap == pytest.approx(float(((weight * channels) ** 2).sum().sqrt() / weight.square().sum().sqrt()))
    again = recalibrate_batch_norm(model, batches)
    assert max(row.gap for row in again.rows) < 1e-5
    assert str(again).splitlines()[0] == "recalibrated 4 of 4 BatchNorm layers on 8 batches"
    again.undo()
    result.undo()
    assert fingerprint(model) == before


def test_undo_after_moving_the_model_writes_to_the_buffers_of_today():
    model = net()
    before = model.first.running_mean.clone()
    result = recalibrate_batch_norm(model, data([16]))
    model.first.running_mean = torch.zeros(3)
    result.undo()
    assert torch.equal(model.first.running_mean, before)


class Interrupting:
    """Raise at the n-th module call, counted over all modules."""

    def __init__(self, model, at):
        self.at, self.calls = at, 0
        self.handles = [module.register_forward_pre_hook(self.tick) for module in model.modules()]

    def tick(self, module, args):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("function", [population_statistics, recalibrate_batch_norm])
def test_an_interrupt_at_any_call_leaves_everything_as_it_was(function):
    model = net().train()
    model.conv.eval()
    model(data([4])[0]).sum().backward()
    model.mix.weight.requires_grad_(False)
    before = fingerprint(model)
    with Interrupting(model, at=0) as counted:
        function(model, data([6, 4])) if function is population_statistics else function(model, data([6, 4])).undo()
    assert counted.calls == 20
    assert fingerprint(model) == before
    for at in range(1, counted.calls + 1):
        with Interrupting(model, at), pytest.raises(KeyboardInterrupt):
            function(model, data([6, 4]))
        assert fingerprint(model) == before


def test_takes_at_most_max_batches_from_a_generator():
    source = iter(data([4] * 9))
    assert population_statistics(net(), source, max_batches=3)["first"].batches == 3
    assert len(list(source)) == 6


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, 0), lambda x: [x, 0, 1]], ids=["tensor", "tuple", "list"])
def test_input_comes_first_in_a_batch(wrap):
    assert population_statistics(net(), [wrap(x) for x in data([8, 4])])["first"].moments.count == 12 * 36


def test_inference_tensors_and_inference_mode():
    model = net()
    with torch.inference_mode():
        batches = [(x.clone(), 0) for x in data([8, 8])]
        result = recalibrate_batch_norm(model, [*batches, *batches], forward=lambda model, batch: model(batch[0]))
        recalibrate_batch_norm(model, batches)
        result.undo()
    model.train()(data([8])[0]).sum().backward()  # trainable still, with buffers that carry a version
    assert model.conv.weight.grad is not None


def test_inference_tensors_may_be_changed_in_place_by_the_model():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm2d(3))
    with torch.inference_mode():
        batches = [x.clone() for x in data([8, 8])]
    assert population_statistics(model, batches)["1"].moments.count == 16 * 36
    run = {"forward": lambda model, batch: model(batch["x"][0])}
    assert population_statistics(model, [{"x": [x]} for x in batches], **run)["1"].moments.count == 16 * 36


def test_shared_and_reached_layers_only():
    model = nn.Sequential(spoiled(nn.BatchNorm2d(3)))
    model.spare = spoiled(nn.BatchNorm2d(3))
    before = {key: value.clone() for key, value in model.spare.state_dict().items()}
    result = recalibrate_batch_norm(model, data([8]), forward=lambda model, x: model[0](x))
    assert [(row.name, row.reason) for row in result.rows] == [("0", None), ("spare", "never reached in 1 batch")]
    assert all(torch.equal(value, before[key]) for key, value in model.spare.state_dict().items())
    expected = {"name": "spare", "count": 0, "gap": None, "reason": "never reached in 1 batch"}
    expected["standard_error"] = None
    assert result.to_dict()["layers"][1] == expected
    assert "never reached" in str(result)
    assert "never reached" in result._repr_html_()


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")], ids=["dp", "compile"])
def test_wrappers_are_looked_through(wrap):
    model, batches = net(), data([16])
    expected = reference(model, batches)
    recalibrate_batch_norm(wrap(model), batches)
    np.testing.assert_allclose(double(model.last.running_mean), expected["last"][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("in_place", [True, False], ids=["module.compile()", "torch.compile(module)"])
def test_a_compiled_part_that_already_ran_is_measured(in_place):
    part = nn.Sequential(nn.Conv2d(3, 4, 3), spoiled(nn.BatchNorm2d(4)))
    # compiled in just the modes of the measurement: nothing but the hook is new, and compiled code ignores that
    part[1].track_running_stats = False
    if in_place:
        part.compile(backend="eager")
    model = nn.Sequential(part if in_place else torch.compile(part, backend="eager"))
    with torch.no_grad():
        model.train()(data([16])[0])
    for _ in range(2):
        (measured,) = population_statistics(model, data([16])).values()
        assert measured.moments.count == 16 * 16


def test_input_passed_by_keyword_is_measured():
    model = nn.Sequential(nn.BatchNorm2d(3))
    measured = population_statistics(model, data([4]), forward=lambda model, x: model[0](input=x))
    assert measured["0"].moments.count == 4 * 36


def test_low_precision_input_is_accumulated_wide():
    model, batches = nn.Sequential(nn.BatchNorm2d(3)), [x.bfloat16() for x in data([32] * 4)]
    recalibrate_batch_norm(model, batches)
    values = torch.cat(batches).double()
    torch.testing.assert_close(model[0].running_mean.double(), values.mean((0, 2, 3)), rtol=0, atol=1e-6)
