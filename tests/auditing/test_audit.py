"""The audit sees what is wrong, says what to do about it, and leaves no trace."""

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bn_lightning.auditing import RULES, SEVERITIES, audit_batch_norm
from bn_lightning.errors import AuditError, BatchNormError
from bn_lightning.recalibration import recalibrate_batch_norm


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def data(sizes=(32, 32, 8), seed=2):
    g = seeded(seed)
    return [1 + 2 * torch.randn(n, 3, 6, 6, generator=g) for n in sizes]


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(1)),
        *(nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Dropout()),
    )
    with torch.no_grad():
        for bn in (model[1], model[5]):
            bn.weight.uniform_(0.5, 1.5)
            bn.bias.normal_()
            bn.num_batches_tracked.fill_(500)
    return model


@pytest.fixture
def healthy():
    model = network()
    recalibrate_batch_norm(model, data())
    return model


def rules(report):
    return [(finding.rule, finding.severity, finding.layer) for finding in report.findings]


def test_a_healthy_network_has_no_findings(healthy):
    report = audit_batch_norm(healthy, data())
    assert report.findings == ()
    assert {row.name: row.count for row in report.layers} == {"1": 72 * 16, "5": 72 * 4}
    assert max(row.gap for row in report.layers) < 1e-5
    assert report.exit_code("info") == 0
    assert "no findings: the running statistics of 2 layers describe the training data" in str(report)
    nothing = audit_batch_norm(healthy, data(), forward=lambda model, x: None)
    assert "no findings, but no layer could be compared" in str(nothing)


@pytest.mark.parametrize(
    ("shift", "severity"),
    [pytest.param(s, e, id=f"{s:g}") for s, e in [(0.09, None), (0.13, "info"), (0.33, "warning"), (1.5, "error")]],
)
def test_gap_is_the_output_error_evaluation_makes(healthy, shift, severity):
    bn, batches = healthy[5], data()
    with torch.no_grad():
        bn.running_mean += shift * torch.sqrt(bn.running_var + bn.eps)
        bn.running_mean[2] -= 1.5 * shift * torch.sqrt(bn.running_var[2] + bn.eps)
    report = audit_batch_norm(healthy, batches)
    worst = report.layers[0]
    # Independently: the layer's outputs with its running statistics, against those with the data's own.
    hidden = torch.cat([layer_input(healthy, x) for x in batches]).double()
    axes = (0, 2, 3)
    z = (hidden - hidden.mean(axes, keepdim=True)) / torch.sqrt(hidden.var(axes, correction=1, keepdim=True) + bn.eps)
    with torch.no_grad():
        right = z * bn.weight.double().view(1, -1, 1, 1) + bn.bias.double().view(1, -1, 1, 1)
        given = F.batch_norm(hidden.float(), bn.running_mean, bn.running_var, bn.weight, bn.bias).double()
        expected = ((given - right).square().mean() / bn.weight.double().square().mean()).sqrt()
    assert worst.name == "5"
    assert worst.gap == pytest.approx(float(expected), rel=1e-3)
    found = [("not-converged", severity, "5")] if severity else []
    assert rules(report) == found
    assert report.exit_code() == int(severity == "error")
    assert report.exit_code("warning") == int(severity in ("warning", "error"))
    assert report.exit_code("info") == int(severity is not None)
    if severity:
        finding = report.findings[0]
        assert finding.evidence["gap"] == worst.gap
        assert finding.evidence["num_batches_tracked"] == 500
        assert finding.evidence["initial_share"] == pytest.approx(0.9**500)
        assert "recalibrate_batch_norm(model, train_batches)" in finding.fix


def layer_input(model, x):
    """The last BN's input, with the first BN on batch statistics and no dropout, without the library."""
    with torch.no_grad():
        x = model[0](x)
        return model[4](F.relu(F.batch_norm(x, None, None, model[1].weight, model[1].bias, training=True)))


def test_worst_channels_count_by_their_share_in_the_output(healthy):
    bn = healthy[1]
    with torch.no_grad():
        sigma = torch.sqrt(bn.running_var + bn.eps)
        bn.weight.copy_(torch.tensor([1.0, 1.0, 0.0, 1.0, -3.0, 1.0]))
        bn.running_mean += torch.tensor([0.0, 2.0, 9.0, 0.0, 1.0, 0.5]) * sigma
    row = audit_batch_norm(healthy, data()).layers[0]
    assert [worst.channel for worst in row.worst_channels] == [4, 1, 5]
    # In standard deviations of the layer's output, |γ|·gap over the root mean square of γ.
    rms = np.sqrt((1 + 1 + 0 + 1 + 9 + 1) / 6)
    np.testing.assert_allclose([worst.gap for worst in row.worst_channels], np.array([3, 2, 0.5]) / rms, rtol=1e-3)
    assert row.gap == pytest.approx(np.sqrt((3**2 + 2**2 + 0.5**2) / 6) / rms, rel=1e-3)


def test_too_few_updates_are_named_as_the_cause(healthy):
    healthy[1].momentum = 0.01
    healthy[1].num_batches_tracked.fill_(30)
    healthy[1].running_mean.add_(3)
    finding = audit_batch_norm(healthy, data()).findings[0]
    assert "after 30 updates with momentum=0.01 the initial (0, 1) still weighs 74%" in finding.message
    assert finding.evidence["initial_share"] == pytest.approx(0.99**30)
    healthy[1].momentum = None
    assert audit_batch_norm(healthy, data()).findings[0].evidence["initial_share"] is None


def test_fresh_statistics_are_their_own_finding():
    model = network()
    model[5].num_batches_tracked.zero_()
    found = audit_batch_norm(model, data()).findings
    assert {(finding.rule, finding.severity, finding.layer) for finding in found} == {
        ("fresh-statistics", "error", "1"),
        ("fresh-statistics", "error", "5"),
    }
    messages = {finding.layer: finding.message for finding in found}
    assert "num_batches_tracked is 500" in messages["1"]
    assert "never updated" in messages["5"]


def test_fresh_statistics_that_are_right_are_no_finding():
    x = torch.randn(4096, 3, generator=seeded())
    assert audit_batch_norm(nn.Sequential(nn.BatchNorm1d(3)), [x]).findings == ()


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_nonfinite_buffers(healthy, bad):
    healthy[1].running_var[4] = bad
    report = audit_batch_norm(healthy, data())
    assert [rule for rule in rules(report) if rule[0] == "nonfinite-statistics"] == [
        ("nonfinite-statistics", "error", "1")
    ]
    finding = next(finding for finding in report.findings if finding.rule == "nonfinite-statistics")
    assert finding.evidence["running_channels"] == 1
    assert "(channel 4)" in finding.message
    assert max(row.gap for row in report.layers if row.name == "5") < 1e-5, "later layers are not blamed"
    if math.isnan(bad):
        assert report.layers[0].name == "1"
        assert math.isnan(report.layers[0].gap)
        assert report.layers[0].worst_channels[0].channel == 4


def test_nonfinite_input_is_not_blamed_on_the_buffers(healthy):
    with torch.no_grad():
        healthy[4].weight[1, 0, 0, 0] = math.nan
    report = audit_batch_norm(healthy, data())
    assert [(rule, layer) for rule, _, layer in rules(report)] == [("nonfinite-statistics", "5")]
    assert "input holds nan or inf" in report.findings[0].message


def test_layers_without_statistics_or_data_are_rows_with_a_reason(healthy):
    healthy[5] = nn.BatchNorm2d(4, track_running_stats=False)
    healthy.spare = nn.BatchNorm2d(4)
    report = audit_batch_norm(healthy, data(), forward=lambda model, x: model[:6](x))
    reasons = {row.name: (row.gap, row.reason) for row in report.layers}
    assert reasons["spare"] == (None, "never reached by the data")
    assert reasons["5"] == (None, "no running statistics (track_running_stats=False)")
    assert report.layers[0].name == "1"
    assert rules(report)[0] == ("no-statistics", "warning", "5")
    assert report.exit_code("warning") == 1
    assert "track_running_stats=True" in report.findings[0].fix


def test_frozen_layer_has_a_gap_but_no_finding(healthy):
    healthy.train()[1].eval()
    healthy[1].running_mean.add_(5)
    report = audit_batch_norm(healthy, data())
    row = next(row for row in report.layers if row.name == "1")
    assert row.gap > 1
    assert "frozen" in row.reason
    of_it = [found for found in rules(report) if found[2] == "1"]
    assert of_it == [("wrong-mode", "info", "1")], "its γ and β are trained, and it may be meant"


def test_a_pending_backward_survives_the_audit(healthy):
    twin, x = copy.deepcopy(healthy), data((16,))[0]
    for model in (twin.eval(), healthy.eval()):
        output = model(x).square().sum()
        if model is healthy:
            audit_batch_norm(model, data())
        output.backward()
    for one, other in zip(healthy.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize(
    ("make", "batches", "message"),
    [
        pytest.param(lambda: nn.Linear(3, 3), [torch.ones(4, 3)], "Linear has no BatchNorm layer", id="no-bn"),
        pytest.param(network, [], "gave no data", id="no-data"),
        pytest.param(
            lambda: nn.BatchNorm1d(3), [torch.ones(1, 3)], r"\(1, 3\): one value per channel.*drop_last", id="one"
        ),
        pytest.param(lambda: frozen(network()), data(), "is frozen", id="frozen"),
        pytest.param(network, [{"x": 1}], "forward=", id="structure"),
    ],
)
def test_refusals(make, batches, message):
    with pytest.raises(AuditError, match=message):
        audit_batch_norm(make(), batches)


def frozen(model):
    model.train()
    model[1].eval()
    model[5].eval()
    return model


def test_a_pattern_that_matches_nothing_is_refused(healthy):
    with pytest.raises(BatchNormError, match="matches none"):
        audit_batch_norm(healthy, data(), include=("layer9",))


def test_include_and_exclude(healthy):
    assert [row.name for row in audit_batch_norm(healthy, data(), include=("5",)).layers] == ["5"]
    assert [row.name for row in audit_batch_norm(healthy, data(), exclude=("5",)).layers] == ["1"]


def test_json_is_strict_and_versioned(healthy):
    healthy[1].running_var[0] = math.inf
    healthy[5].running_mean[1] = math.nan
    report = audit_batch_norm(healthy, data())

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    parsed = json.loads(report.to_json(), parse_constant=refuse)
    assert parsed["schema_version"] == 2
    assert parsed["batches"] == 3
    assert parsed["layers"][0]["gap"] == "nan"
    assert parsed["findings"][0]["evidence"]["running_mean"] == "nan"
    assert set(parsed["findings"][0]) == {
        *("rule", "severity", "layer", "message", "evidence", "threshold", "fix", "applicable")
    }
    assert {row["name"] for row in parsed["layers"]} == {"1", "5"}
    assert math.isnan(report.to_dict()["layers"][0]["gap"])


def test_the_printed_report_is_worst_first_and_ends_in_a_fix(healthy):
    healthy[1].running_mean.add_(0.5)
    healthy[5].running_mean.add_(20)
    lines = str(audit_batch_norm(healthy, data())).splitlines()
    assert lines[0] == "BatchNorm audit of Sequential: 2 layers, 3 training batches"
    assert "  fix:       bn_lightning.recalibrate_batch_norm(model, train_batches)" in lines
    table = lines.index("gaps along the layers, worst first")
    assert [line.split()[0] for line in lines[table + 3 : table + 5]] == ["5", "1"]


def test_html_escapes_names(healthy):
    model = nn.Module()
    model.add_module("<b>", nn.BatchNorm1d(2))
    report = audit_batch_norm(
        model, [torch.randn(8, 2, generator=seeded()) + 9], forward=lambda m, x: m._modules["<b>"](x)
    )
    page = report._repr_html_()
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
    assert "fresh-statistics" in page


def test_fail_on_is_checked(healthy):
    with pytest.raises(AuditError, match=r"'info', 'warning', 'error', got 'fatal'"):
        audit_batch_norm(healthy, data()).exit_code("fatal")


def test_registry_is_sound():
    slugs = [rule.slug for rule in RULES]
    assert len(set(slugs)) == len(slugs)
    assert set(slugs) >= {
        *("averaged-weights", "decayed-affine", "dropout-before-norm", "fresh-statistics", "low-precision-statistics"),
        *("frozen-weights-moving-statistics", "momentum-convention", "momentum-zero", "no-statistics", "wrong-mode"),
        *("nonfinite-statistics", "not-converged", "redundant-bias", "tiny-variance", "untracked-freeze"),
    }
    assert all(rule.severity in SEVERITIES and rule.threshold for rule in RULES)
