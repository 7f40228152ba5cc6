"""Momentum, too few updates and averaged weights are told apart, and nothing is said where all is well."""

import pytest
import torch
import torch.nn.functional as F
from auditing.faults.catalogue_convergence import FAULTS, averaged_network
from auditing.faults.digits_training import batch_norms, digits, fit, network
from torch import nn
from torch.optim.swa_utils import AveragedModel

from bn_lightning import apply_fixes
from bn_lightning.auditing import TrainingSettings, audit_batch_norm
from bn_lightning.layers import DebiasedBatchNorm, FrozenBatchNorm, convert_batch_norm


def of_rule(report, slug):
    return {finding.layer: finding for finding in report.findings if finding.rule == slug}


@pytest.mark.parametrize(
    ("slug", "severities"),
    [
        pytest.param("momentum-convention", {"0.1": "warning", "0.4": "warning"}, id="momentum-convention"),
        pytest.param("momentum-zero", {"0.1": "error", "0.4": "error"}, id="momentum-zero"),
        pytest.param("not-converged", {"0.1": "info", "0.4": "warning"}, id="not-converged"),
        pytest.param("averaged-weights", {"module.0.1": "info", "module.0.4": "warning"}, id="averaged-weights"),
    ],
)
def test_a_training_with_the_fault_is_found_at_its_layers(slug, severities):
    found = of_rule(FAULTS[slug](), slug)
    assert {name: finding.severity for name, finding in found.items()} == severities


def test_a_healthy_training_is_left_in_peace():
    model, batches = network(), digits()
    # Until a cosine ends: a constant rate leaves the weights moving faster than the average follows.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 160)
    fit(model, batches, epochs=8, optimizer=optimizer, after_step=schedule.step)
    for given in (batches, None):
        for mode in (True, False):
            report = audit_batch_norm(
                model.train(mode),
                given,
                example_inputs=batches[0][0],
                optimizer=optimizer,
                loss=given and F.cross_entropy,
            )
            assert report.exit_code("warning") == 0, str(report)


@pytest.mark.parametrize(
    ("momentum", "meant"),
    [
        (0.9, 0.1),
        (0.99, 0.01),
        (0.997, 0.003),
        (0.51, 0.49),
        (1.0, 0.1),
        (0.5, 0.1),
        (0.49, None),
        (0.1, None),
        (None, None),
    ],
    ids=str,
)
def test_the_other_convention_is_told_by_its_size_and_turned_round(momentum, meant):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=momentum))
    report = audit_batch_norm(model)
    found = of_rule(report, "momentum-convention")
    assert list(found) == ([] if meant is None else ["1"])
    if meant is not None:
        assert found["1"].severity == "warning"
        assert found["1"].evidence["meant"] == meant
        assert f"momentum={meant:g}" in found["1"].fix
        apply_fixes(model, report)
        assert model[1].momentum == meant
        assert not of_rule(audit_batch_norm(model), "momentum-convention")


@pytest.mark.parametrize(
    ("training", "fresh", "learning", "severity"),
    [
        pytest.param(True, False, True, "error", id="training"),
        pytest.param(False, True, True, "error", id="fresh"),
        pytest.param(False, False, True, "warning", id="evaluation"),
        pytest.param(True, False, False, "warning", id="training-but-frozen-weights"),
    ],
)
def test_momentum_zero_is_worse_where_statistics_were_never_set(training, fresh, learning, severity):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.0)).train(training)
    model[1].requires_grad_(learning)
    if not fresh:
        model[1].running_mean.fill_(0.3)
    assert of_rule(audit_batch_norm(model), "momentum-zero")["1"].severity == severity


@pytest.mark.parametrize(("momentum", "found"), [(1e-9, True), (9e-5, True), (1e-4, False), (0.001, False)], ids=str)
def test_a_momentum_that_is_all_but_zero(momentum, found):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=momentum))
    told = of_rule(audit_batch_norm(model), "momentum-zero")
    assert list(told) == (["1"] if found else [])
    if found:
        assert f"momentum={momentum:g} hardly moves" in told["1"].message


@pytest.mark.parametrize(("offset", "severity"), [(0.5, "warning"), (50.0, "error")], ids=str)
def test_the_momentum_is_told_before_the_gap_that_comes_of_it(offset, severity):
    model, batches = network(momentum=0.9), digits(batch_size=8)
    fit(model, batches, epochs=2, lr=0.2)
    for layer in batch_norms(model).values():
        layer.running_mean.add_(offset * layer.running_var.sqrt())
    findings = audit_batch_norm(model.eval(), batches).findings
    for name in batch_norms(model):
        ours = [f for f in findings if f.layer == name and f.rule in ("momentum-convention", "not-converged")]
        assert [f.rule for f in ours] == ["momentum-convention", "not-converged"]
        assert ours[0].severity == severity
        assert "momentum=0.9" in ours[1].message
        assert "faster than the moving average" not in ours[1].message


@pytest.mark.parametrize("momentum", [0.0, 0.99], ids=str)
def test_a_frozen_layers_momentum_does_not_matter(momentum):
    for freeze in ("mode", "kind", "untracked"):
        bn = nn.BatchNorm1d(4, momentum=momentum, track_running_stats=freeze != "untracked")
        if bn.running_mean is not None:
            bn.running_mean.fill_(0.3)
        model = nn.Sequential(nn.Linear(3, 4), bn)
        if freeze == "mode":
            model[1].eval()
        elif freeze == "kind":
            convert_batch_norm(model, "frozen")
            assert isinstance(model[1], FrozenBatchNorm)
        found = {finding.rule for finding in audit_batch_norm(model).findings}
        assert not found & {"momentum-zero", "momentum-convention"}, freeze


def trained(updates, momentum=0.1, variance=1.0):
    """Train a layer alone for real: its variance is at least what the initial one still weighs."""
    model = nn.Sequential(nn.BatchNorm1d(4, momentum=momentum))
    for seed in range(updates):
        model(variance**0.5 * torch.randn(32, 4, generator=torch.Generator().manual_seed(seed)))
    return model


@pytest.mark.parametrize(
    ("updates", "momentum", "severity"),
    [
        (0, 0.1, None),
        (1, 0.1, "warning"),
        (21, 0.1, "warning"),  # 0.9^21 = 0.109
        (22, 0.1, "info"),  # 0.9^22 = 0.098
        (43, 0.1, "info"),  # 0.9^43 = 0.0108
        (44, 0.1, None),  # 0.9^44 = 0.0097
        (44, 0.01, "warning"),
        (44, None, None),
    ],
    ids=str,
)
def test_without_data_the_weight_of_the_initial_statistics_decides(updates, momentum, severity):
    found = of_rule(audit_batch_norm(trained(updates, momentum)), "not-converged")
    assert {finding.severity for finding in found.values()} == ({severity} - {None})
    if severity:
        assert found["0"].evidence["initial_share"] == pytest.approx((1 - momentum) ** updates)


def test_statistics_that_cannot_be_such_an_average_are_not_accused():
    small = trained(5, variance=0.01)
    assert of_rule(audit_batch_norm(small), "not-converged")
    small[0].running_var.fill_(0.01)  # recalibrated: less than what 0.9^5 of the initial 1 would leave
    assert not of_rule(audit_batch_norm(small), "not-converged")
    debiased = nn.Sequential(DebiasedBatchNorm(4))
    debiased(torch.randn(32, 4, generator=torch.Generator().manual_seed(0)) * 3)
    assert not of_rule(audit_batch_norm(debiased), "not-converged")


def test_with_data_only_the_gap_counts():
    model = trained(2)
    x = torch.randn(512, 4, generator=torch.Generator().manual_seed(9))
    assert of_rule(audit_batch_norm(model), "not-converged")
    assert not of_rule(audit_batch_norm(model, [x]), "not-converged"), "(0, 1) is about right"


def test_averaged_weights_take_the_place_of_lag_and_are_cured():
    averaged, batches = averaged_network(), digits()
    report = audit_batch_norm(averaged, batches)
    assert not of_rule(report, "not-converged")
    apply_fixes(averaged, report)
    assert not of_rule(audit_batch_norm(averaged, batches), "averaged-weights")


def test_averaging_is_known_from_the_settings_too():
    averaged, batches = averaged_network(), digits()
    model = averaged.module
    settings = TrainingSettings(averaging=("StochasticWeightAveraging",))
    found = of_rule(audit_batch_norm(model, batches, training=settings), "averaged-weights")
    assert found["0.4"].severity == "warning"
    assert "StochasticWeightAveraging" in found["0.4"].message
    plain = audit_batch_norm(model, batches)
    assert not of_rule(plain, "averaged-weights")
    assert of_rule(plain, "not-converged")["0.4"].severity == "warning"


def test_without_data_averaging_is_worth_a_note():
    averaged = AveragedModel(network())
    for given in (
        audit_batch_norm(averaged),
        audit_batch_norm(network(), training=TrainingSettings(averaging=("EMA",))),
    ):
        found = of_rule(given, "averaged-weights")
        assert {name: finding.severity for name, finding in found.items()} == {None: "info"}
        assert found[None].evidence["layers"] == 2
    frozen = network()
    convert_batch_norm(frozen, "frozen")
    assert not of_rule(audit_batch_norm(AveragedModel(frozen)), "averaged-weights"), "frozen statistics do not move"


def test_only_layers_inside_the_averaged_model_are_concerned():
    both = nn.ModuleDict({"student": network(), "teacher": AveragedModel(network())})
    for layer in batch_norms(both).values():
        layer.running_mean.fill_(2.0)
        layer.running_var.fill_(1.5)
    report = audit_batch_norm(
        both, digits(), forward=lambda model, batch: (model["student"](batch[0]), model["teacher"](batch[0]))
    )
    assert set(of_rule(report, "averaged-weights")) == {"teacher.module.0.1", "teacher.module.0.4"}
    assert set(of_rule(report, "not-converged")) == {"student.0.1", "student.0.4"}
