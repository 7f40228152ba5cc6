"""Statistics that are missing, not finite, never loaded, too coarse or smaller than eps are told apart."""

import math

import pytest
import torch
from auditing.faults.catalogue_statistics import FAULTS, loaded_without_statistics
from auditing.faults.digits_training import batch_norms, digits, fit, network
from torch import nn

from bn_lightning import apply_fixes
from bn_lightning.auditing import TrainingSettings, audit_batch_norm
from bn_lightning.layers import convert_batch_norm


def of_rule(report, slug):
    return {finding.layer: finding for finding in report.findings if finding.rule == slug}


@pytest.mark.parametrize(
    ("slug", "severities"),
    [
        pytest.param("nonfinite-statistics", {"0.1": "error", "0.4": "error"}, id="nonfinite-statistics"),
        pytest.param("fresh-statistics", {"0.1": "error", "0.4": "error"}, id="fresh-statistics"),
        pytest.param("no-statistics", {"0.1": "warning", "0.4": "warning"}, id="no-statistics"),
        pytest.param("low-precision-statistics", {"0.1": "warning", "0.4": "warning"}, id="low-precision-statistics"),
        pytest.param("tiny-variance", {"0": "warning"}, id="tiny-variance"),
    ],
)
def test_a_training_with_the_fault_is_found_at_its_layers(slug, severities):
    found = of_rule(FAULTS[slug](), slug)
    assert {name: finding.severity for name, finding in found.items()} == severities


def test_without_data_statistics_that_were_not_loaded_are_a_note_and_sure_if_they_were_counted():
    model = loaded_without_statistics()
    for mode in (True, False):
        found = of_rule(audit_batch_norm(model.train(mode)), "fresh-statistics")
        # RepVGG, for one, begins with random γ and β: nothing tells such a network from one with lost statistics.
        assert {name: finding.severity for name, finding in found.items()} == {"0.1": "info", "0.4": "info"}
        assert "strict=False" in found["0.1"].message
    for layer in batch_norms(model).values():
        layer.num_batches_tracked.fill_(300)
    for mode, severity in ((False, "error"), (True, "warning")):  # in training mode they will be learned yet
        found = of_rule(audit_batch_norm(model.train(mode)), "fresh-statistics")
        assert {name: finding.severity for name, finding in found.items()} == {"0.1": severity, "0.4": severity}
        assert "num_batches_tracked is 300" in found["0.1"].message
    convert_batch_norm(model, "frozen")
    assert not of_rule(audit_batch_norm(model), "fresh-statistics"), "frozen at (0, 1), statistics are folded into γ, β"


@pytest.mark.parametrize("gamma", ["ones", "zeros", "normal"])
def test_a_network_that_was_never_trained_is_not_accused_without_data(gamma):
    model = network()
    for layer in batch_norms(model).values():
        getattr(nn.init, f"{gamma}_")(layer.weight)
    for mode in (True, False):
        assert not of_rule(audit_batch_norm(model.train(mode)), "fresh-statistics")


def test_fresh_statistics_are_cured():
    model, batches = loaded_without_statistics(), digits()
    apply_fixes(model, audit_batch_norm(model, batches))
    assert audit_batch_norm(model, batches).exit_code("warning") == 0


def test_a_network_without_any_statistics_is_reported_and_is_no_error():
    model = network(track_running_stats=False)
    found = of_rule(audit_batch_norm(model, digits()), "no-statistics")
    assert set(found) == {"0.1", "0.4"}
    assert set(of_rule(audit_batch_norm(model), "no-statistics")) == {"0.1", "0.4"}


@pytest.mark.parametrize(
    ("dtype", "momentum", "stall"),
    [
        # Half of the spacing of numbers, eps/2 of the mean at most, over the momentum: 2^-8 and 2^-11 over it.
        (torch.bfloat16, 0.01, 2**-8 / 0.01),
        (torch.bfloat16, 0.1, 2**-8 / 0.1),
        (torch.float16, 0.1, 2**-11 / 0.1),
        (torch.bfloat16, None, None),
        (torch.float32, 0.01, "none"),
        (torch.float64, 0.01, "none"),
    ],
    ids=str,
)
def test_narrow_buffers_are_told_with_how_far_they_stall(dtype, momentum, stall):
    model = nn.Sequential(nn.BatchNorm1d(4, momentum=momentum)).to(dtype)
    found = of_rule(audit_batch_norm(model), "low-precision-statistics")
    assert list(found) == ([] if stall == "none" else ["0"])
    if stall != "none":
        assert found["0"].evidence["stall"] == (None if stall is None else pytest.approx(stall))
        assert ("65504" in found["0"].message) == (dtype == torch.float16)


@pytest.mark.parametrize("momentum", [0.1, 0.01], ids=str)
def test_a_bfloat16_mean_stalls_no_farther_away_than_said(momentum):
    said = 2**-8 / momentum
    worst = 0.0
    for goal in torch.linspace(1.0, 2.0, 65).tolist():
        mean = torch.tensor(1.0, dtype=torch.bfloat16)
        for _ in range(2000):
            mean = (1 - momentum) * mean.float() + momentum * goal
            mean = mean.bfloat16()  # as the kernel rounds: once a step
        worst = max(worst, abs(goal - float(mean)) / abs(float(mean)))
    assert 0.4 * said < worst <= 1.01 * said


def test_narrow_buffers_matter_where_training_goes_on():
    model = network().bfloat16().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def severity(**given):
        return of_rule(audit_batch_norm(model, **given), "low-precision-statistics")["0.1"].severity

    assert severity() == "info"
    assert severity(optimizer=optimizer) == "warning"
    assert severity(training=TrainingSettings(precision="bf16-true")) == "warning"
    model.train()
    assert severity() == "warning"


@pytest.mark.parametrize(
    ("variances", "severity", "tiny"),
    [
        pytest.param([1.01e-4] * 8, None, 0, id="ten-eps"),
        pytest.param([1.0] * 7 + [9e-5], "info", 1, id="one-below-ten-eps"),
        pytest.param([9e-5] * 8, "info", 8, id="all-below-ten-eps"),
        pytest.param([9e-6] * 4 + [1.0] * 4, "info", 4, id="half-below-eps"),
        pytest.param([9e-6] * 5 + [1.0] * 3, "warning", 5, id="most-below-eps"),
        pytest.param([0.0] * 5 + [1.0] * 3, None, 0, id="constant-channels"),
        pytest.param([math.nan] * 5 + [1.0] * 3, None, 0, id="not-finite"),
    ],
)
def test_variance_is_tiny_against_eps(variances, severity, tiny):
    model = nn.Sequential(nn.BatchNorm1d(8, eps=1e-5))
    model[0].running_var.copy_(torch.tensor(variances))
    found = of_rule(audit_batch_norm(model), "tiny-variance")
    assert {finding.severity for finding in found.values()} == {severity} - {None}
    if severity:
        assert found["0"].evidence["channels"] == tiny
        assert found["0"].evidence["share"] == tiny / 8


def test_with_data_the_variance_is_the_datas():
    model = nn.Sequential(nn.BatchNorm1d(3))
    x = 1e-4 * torch.randn(256, 3, generator=torch.Generator().manual_seed(0))
    for running in (1.0, 2.0):  # as created, and as if updated a few times
        model[0].running_var.fill_(running)
        found = of_rule(audit_batch_norm(model, [x]), "tiny-variance")["0"]
        assert found.severity == "warning"
        assert found.evidence["median_variance"] == pytest.approx(float(x.var(0).median()), rel=1e-4)


def test_the_same_training_with_ordinary_inputs_has_no_tiny_variance():
    model, batches = network(), digits()
    fit(model, batches)
    assert not of_rule(audit_batch_norm(model, batches), "tiny-variance")


@pytest.mark.parametrize("buffer", ["running_mean", "running_var"])
@pytest.mark.parametrize("matters", [True, False], ids="matters={}".format)
def test_one_buffer_that_was_not_loaded(buffer, matters):
    model = nn.Sequential(nn.BatchNorm1d(4)).eval()
    x = torch.randn(256, 4, generator=torch.Generator().manual_seed(0)) * (3 if matters else 1) + 2 * matters
    model[0].running_mean.copy_(x.mean(0))
    model[0].running_var.copy_(x.var(0))
    getattr(model[0], buffer).fill_(float(buffer == "running_var"))
    report = audit_batch_norm(model, x.split(64))
    found = [f for f in report.findings if f.rule in ("fresh-statistics", "not-converged")]
    assert [f.rule for f in found] == (["fresh-statistics"] if matters else [])
    if matters:
        assert f"its {buffer} is as at creation" in found[0].message
        apply_fixes(model, report)
        assert getattr(model[0], buffer) == pytest.approx(x.mean(0) if buffer == "running_mean" else x.var(0), rel=1e-3)
