"""Recalibration and audit of layers whose running statistics are others than mean and variance of their input."""

import pytest
import torch
from torch import nn

import bn_lightning as bnl
from bn_lightning.errors import AuditError, RecalibrationError
from bn_lightning.layers import (
    BatchRenorm,
    DomainBatchNorm,
    FrozenBatchNorm,
    GhostBatchNorm,
    LpBatchNorm,
    MaskedBatchNorm,
)

UNLIKE = {
    "lp": (LpBatchNorm(2), "square of an Lp norm"),
    "masked": (MaskedBatchNorm(2), "valid positions"),
    "frozen": (FrozenBatchNorm(2), "frozen"),
}


def batches():
    return [torch.randn(16, 2, generator=torch.Generator().manual_seed(seed)) * 3 + 1 for seed in range(3)]


def state(layer):
    return {key: value.clone() for key, value in layer.state_dict().items()}


@pytest.mark.parametrize(("layer", "reason"), UNLIKE.values(), ids=UNLIKE)
def test_they_are_left_as_they_are_with_the_reason(layer, reason):
    model = nn.Sequential(layer, nn.BatchNorm1d(2))
    before = state(layer)
    result = bnl.recalibrate_batch_norm(model, batches())
    assert reason in result.rows[0].reason
    assert (result.rows[0].gap is None) == (reason != "frozen")
    assert result.rows[1].reason is None
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    audited = next(row for row in bnl.audit_batch_norm(model, batches()).layers if row.name == "0")
    assert reason in audited.reason


def test_frozen_layers_alone_are_refused_until_evaluation_mode_says_that_they_are_meant():
    model = nn.Sequential(FrozenBatchNorm(2))
    with pytest.raises(RecalibrationError, match=r"a FrozenBatchNorm, inside .* Call model\.eval\(\) first"):
        bnl.recalibrate_batch_norm(model, batches())
    assert bnl.recalibrate_batch_norm(model.eval(), batches()).rows[0].reason is None
    torch.testing.assert_close(model[0].running_mean, torch.cat(batches()).mean(0))


def test_a_domain_is_recalibrated_only_where_everybody_sees_it():
    model = nn.Sequential(DomainBatchNorm(2))
    before = state(model)
    with bnl.use_domain(model, 1):
        result = bnl.recalibrate_batch_norm(model, batches())
    assert "domain 1 is in use" in result.rows[0].reason
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert bnl.recalibrate_batch_norm(model, batches()).rows[0].reason is None


@pytest.mark.parametrize(
    "layer", [GhostBatchNorm(2, virtual_batch_size=4), LpBatchNorm(2, p=2, centered=True)], ids=repr
)
def test_the_others_are_recalibrated(layer):
    assert bnl.recalibrate_batch_norm(nn.Sequential(layer), batches()).rows[0].reason is None
    data = torch.cat(batches()).double()
    torch.testing.assert_close(layer.running_mean.double(), data.mean(0))
    torch.testing.assert_close(layer.running_var.double(), data.var(0))


def test_an_audit_that_can_compare_nothing_is_refused():
    with pytest.raises(
        AuditError, match=r"no selected .* can be compared .*Of '0' \(LpBatchNorm\): its running_var is"
    ):
        bnl.audit_batch_norm(nn.Sequential(LpBatchNorm(2)), batches())


def test_stale_running_statistics_of_a_batch_renorm_are_not_measured_along():
    torch.manual_seed(0)
    model = nn.Sequential(BatchRenorm(2, r_warmup=None, d_warmup=None, d_max=10.0), nn.ReLU(), nn.BatchNorm1d(2))
    model[0].running_mean.fill_(5)
    bnl.recalibrate_batch_norm(model, batches())
    with torch.no_grad():
        given = torch.cat([torch.relu(nn.functional.batch_norm(x, None, None, training=True)) for x in batches()])
    torch.testing.assert_close(model[2].running_mean, given.mean(0))
