"""Fixes are what the report says, all or none, and go back bit for bit."""

import json
import math

import pytest
import torch
from auditing.faults.digits_training import batch_norms, digits, fit, network
from batch_normed import everything
from torch import nn

import bn_lightning as bnl
from bn_lightning.auditing import AuditReport, Finding, FixResult, Repair, fixes
from bn_lightning.auditing.weights import changed_weight, weight_checksums
from bn_lightning.errors import AuditError


@pytest.fixture
def broken():
    """Everything that can be repaired is wrong, in one trained network."""
    model = network(bias=True)
    fit(model, digits(), epochs=8, lr=0.02)
    with torch.no_grad():
        model[0][1].running_mean[2] += 3
        model[0][1].running_var[3] = math.nan
        model[0][4].running_var *= 9
    model.eval()[0][1].train()
    model[0][1].momentum, model[0][4].momentum = 0.99, 0.0
    return model


def by_place(result):
    return {(row.layer, row.action): (row.before, row.after) for row in result.rows}


def test_a_following_audit_is_clean(broken):
    batches = digits()
    report = bnl.audit_batch_norm(broken, batches)
    assert report.exit_code("error") == 1
    result = bnl.apply_fixes(broken, report)
    assert isinstance(result, FixResult)
    again = bnl.audit_batch_norm(broken, batches)
    assert again.exit_code("warning") == 0, str(again)
    rows = by_place(result)
    assert rows["0.1", "training"] == (True, False)
    assert rows["0.1", "momentum"] == (0.99, 0.01)
    assert rows["0.4", "momentum"] == (0.0, 0.1)
    assert math.isnan(rows["0.1", "recalibrate"][0])
    assert rows["0.1", "recalibrate"][1] < 1e-6
    assert rows["0.4", "recalibrate"][0] == pytest.approx(next(r.gap for r in report.layers if r.name == "0.4"))


def test_what_is_written_is_the_populations_as_recalibration_has_it(broken):
    batches = digits()
    report = bnl.audit_batch_norm(broken, batches)
    bnl.apply_fixes(broken, report)
    written = [(bn.running_mean.clone(), bn.running_var.clone()) for bn in batch_norms(broken).values()]
    bnl.recalibrate_batch_norm(broken, batches)
    for (mean, var), bn in zip(written, batch_norms(broken).values(), strict=True):
        torch.testing.assert_close(mean, bn.running_mean, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(var, bn.running_var, rtol=1e-6, atol=1e-7)


def test_undo_is_bit_for_bit_and_touches_nothing_else(broken):
    report = bnl.audit_batch_norm(broken, digits())
    before = everything(broken)
    result = bnl.apply_fixes(broken, report)
    changed = everything(broken)
    assert changed != before
    # Parameters, buffers' identities and the counts of batches are not touched.
    assert changed[2] == before[2]
    assert [entry[:2] for entry in changed[3]] == [entry[:2] for entry in before[3]]
    counts = [[entry for entry in state[3] if "tracked" in entry[0]] for state in (before, changed)]
    assert counts[0] == counts[1]
    broken(digits()[0][0])  # in between it may be used
    broken.train()
    broken(digits()[0][0])
    broken.eval()
    for bn in batch_norms(broken).values():
        bn.num_batches_tracked.fill_(160)
    result.undo()
    assert everything(broken) == before
    result.undo()
    assert everything(broken) == before


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("stop", [0, 1], ids=["first", "second"])
def test_an_exception_in_the_middle_of_a_change_leaves_all_as_it_was(broken, monkeypatch, kind, stop):
    report, write, calls = bnl.audit_batch_norm(broken, digits()), fixes.write_statistics, []

    def interrupted(layer, mean, var):
        calls.append(layer)
        if len(calls) == stop + 1:
            layer.running_mean.copy_(mean)  # and not the variance
            raise kind("cut")
        write(layer, mean, var)

    before = everything(broken)
    monkeypatch.setattr(fixes, "write_statistics", interrupted)
    with pytest.raises(kind, match="cut"):
        bnl.apply_fixes(broken, report)
    assert everything(broken) == before
    assert len(bnl.apply_fixes(broken, report).rows) == 5


def test_a_layer_that_refuses_a_setting_leaves_the_others_as_they_were():
    class Fixed(nn.BatchNorm1d):
        def __setattr__(self, name, value):
            if name == "momentum" and "momentum" in self.__dict__:
                raise AttributeError("momentum is fixed")
            super().__setattr__(name, value)

    model = nn.Sequential(nn.BatchNorm1d(3, momentum=0.9), Fixed(3, momentum=0.9))
    report = bnl.audit_batch_norm(model)
    with pytest.raises(AttributeError, match="fixed"):
        bnl.apply_fixes(model, report)
    assert model[0].momentum == 0.9


def test_a_report_of_another_network_is_refused_before_anything_changes(broken):
    report = bnl.audit_batch_norm(broken, digits())
    others = {
        "a layer '0.1', and Sequential has no BatchNorm layer of that name": nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4)
        ),
        "had 16 channels and has 12": nn.Sequential(
            nn.Sequential(*(nn.Identity(), nn.BatchNorm2d(8)), *(nn.Identity(), nn.Identity(), nn.BatchNorm2d(12)))
        ),
    }
    for message, other in others.items():
        before = everything(other)
        with pytest.raises(AuditError, match=message):
            bnl.apply_fixes(other, report)
        assert everything(other) == before


@pytest.mark.parametrize("change", ["a step", "one value", "another dtype", "a new parameter", "one gone"])
def test_statistics_of_weights_that_have_changed_are_refused(broken, change):
    report = bnl.audit_batch_norm(broken, digits())
    if change == "a step":
        modes = {module: module.training for module in broken.modules()}
        fit(broken, digits()[:1], epochs=1, lr=1e-3)
        for module, mode in modes.items():
            module.training = mode
        name = "0.0.weight"
    elif change == "one value":
        weight = broken[0][3].weight.data
        weight[5, 3, 1, 1] = torch.nextafter(weight[5, 3, 1, 1], torch.tensor(9.0))
        name = "0.3.weight"
    elif change == "another dtype":
        broken[3].half()
        name = "3.weight"
    elif change == "a new parameter":
        broken.append(nn.Linear(10, 1))
        name = "4.weight"
    else:
        broken[0][0].bias = None
        name = "0.0.bias"
    before = everything(broken)
    with pytest.raises(AuditError, match=f"weights of Sequential have changed since the audit \\('{name}'"):
        bnl.apply_fixes(broken, report)
    assert everything(broken) == before


def test_the_same_values_elsewhere_and_changes_of_nothing_but_settings_are_fine(broken):
    report = bnl.audit_batch_norm(broken, digits())
    loaded = network(bias=True).to(memory_format=torch.channels_last)
    loaded.load_state_dict(broken.state_dict())
    loaded[0][1].momentum, loaded[0][4].momentum = 0.99, 0.0
    loaded.eval().requires_grad_(False)[0][1].train()
    assert len(bnl.apply_fixes(loaded, report).rows) == 5
    only_momentum = bnl.audit_batch_norm(broken)
    broken[3].weight.data.add_(1)
    assert {row.action for row in bnl.apply_fixes(broken, only_momentum).rows} == {"momentum", "training"}


def test_checksums_are_of_values_whatever_their_kind():
    model = nn.ParameterDict(
        {
            "none": nn.Parameter(torch.zeros(0)),
            "scalar": nn.Parameter(torch.tensor(2.0)),
            "complex": nn.Parameter(torch.ones(2, dtype=torch.complex64)),
            "brain": nn.Parameter(torch.ones(2, dtype=torch.bfloat16)),
            "whole": nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False),
            "lazy": nn.UninitializedParameter(),
        }
    )
    before = weight_checksums(model)
    assert set(before) == set(model) - {"lazy"}
    assert changed_weight(model, before) is None
    model["complex"].data[0] += 1j
    assert changed_weight(model, before) == "complex"


def test_what_is_not_done_is_named_with_the_reason(broken):
    result = bnl.apply_fixes(broken, bnl.audit_batch_norm(broken, digits()))
    left = {each.rule: each for each in result.left}
    assert "bias=False" in left["redundant-bias"].reason
    printed = str(result)
    assert printed.startswith("5 fixes applied to 2 layers")
    told = [" ".join(line.split()) for line in printed.splitlines()]
    assert "0.1 training training mode evaluation mode" in told
    assert "0.1 momentum 0.99 0.01" in told
    assert any(line.startswith("0.1 recalibrate gap nan output std gap") for line in told)
    assert "left: redundant-bias: for you to decide: " in printed
    assert "0.4" in result._repr_html_()
    values = json.loads(json.dumps(result.to_dict(), allow_nan=True))
    assert {"rule": "redundant-bias", "layer": None, "reason": left["redundant-bias"].reason} in values["left"]
    assert len(values["applied"]) == 5
    assert {"layer": "0.1", "action": "momentum", "before": 0.99, "after": 0.01} in values["applied"]


def test_recalibration_that_was_only_advised_is_left_without_data():
    model = nn.Sequential(nn.BatchNorm1d(4))
    for seed in range(3):
        model(torch.randn(16, 4, generator=torch.Generator().manual_seed(seed)))
    report = bnl.audit_batch_norm(model)
    assert [finding.rule for finding in report.findings] == ["not-converged"]
    result = bnl.apply_fixes(model, report)
    assert result.rows == ()
    assert "no population statistics of it were measured (no training batches were given)" in result.left[0].reason
    assert str(result).startswith("no fix applied")


def test_population_statistics_that_the_buffers_cannot_hold_are_left():
    model = nn.Sequential(nn.BatchNorm1d(2, affine=False))
    report = bnl.audit_batch_norm(model, [1e3 * torch.randn(64, 2, generator=torch.Generator().manual_seed(0))])
    model.half()
    result = bnl.apply_fixes(model, report)
    assert result.rows == ()
    assert [each.reason for each in result.left if each.rule == "fresh-statistics"] == [
        "its population statistics are not finite as torch.float16"
    ]
    assert torch.equal(model[0].running_var, torch.ones(2, dtype=torch.float16))


def test_one_layer_found_by_several_rules_is_fixed_once_and_what_is_right_already_is_no_change():
    model = nn.Sequential(nn.BatchNorm1d(2, momentum=0.25))

    def found(layer, value):
        return Finding("some-rule", "warning", layer, "", {}, "", "", Repair("momentum", value))

    report = AuditReport("Sequential", 0, bnl.audit_batch_norm(model).layers, (found("0", 0.1), found(None, 0.1)))
    assert by_place(bnl.apply_fixes(model, report)) == {("0", "momentum"): (0.25, 0.1)}
    assert bnl.apply_fixes(model, report).rows == ()


def test_wrappers_are_looked_through(broken):
    report = bnl.audit_batch_norm(broken, digits())
    bnl.apply_fixes(nn.DataParallel(broken), report)
    assert broken[0][4].momentum == 0.1
