"""The order of the worst layers, against orders written down by hand."""

import math

import pytest
import torch

from bn_lightning.functional.activation import activation_statistics
from bn_lightning.monitoring import ActivationSnapshot, RunningSnapshot
from bn_lightning.monitoring.running_snapshot import RunningRow
from bn_lightning.monitoring.worst import worst_batch_norms, worst_layers


def spread(rms, dead=0, channels=4):
    """An output of this rms whose first channels are dead."""
    x = torch.tensor([[1.0], [-1.0]]).repeat(1, channels)
    x[:, :dead] = 0
    return x * (rms / x.square().mean().sqrt())


BAD = torch.tensor([[torch.inf, 1.0]])
OUTPUTS = {
    "healthy1": spread(1.0),
    "nan2": BAD,
    "constant": torch.full((4, 2), 7.0),
    "small": spread(1 / 64),
    "half dead": spread(1.0, dead=2),
    "near overflow": spread(50_000.0),
    "near the limit": spread(60_000.0),
    "large": spread(16.0),
    "quarter dead": spread(1.0, dead=1),
    "nan1": BAD,
    "healthy2": spread(1.01),
    "all dead": torch.zeros(4, 2),
    "healthy3": spread(1.0),
}
ORDER = ["nan2", "nan1", "all dead", "half dead", "quarter dead", "near the limit", "near overflow", "constant"]
ORDER += ["small", "large"]


def sample(**options):
    return ActivationSnapshot(
        {**{name: activation_statistics(x) for name, x in OUTPUTS.items()}, "never": activation_statistics(BAD[:0])},
        {"never": "not called"},
        absent=frozenset(["never"]),
        limits=dict.fromkeys(OUTPUTS, torch.finfo(torch.float16).max),
        **options,
    )


def test_the_worst_come_first():
    table = worst_layers(sample(step=7))
    assert [row[0] for row in table.rows] == ORDER
    assert table.title == "activations: the 10 worst of 13 layers at optimizer step 7"
    assert list(table.notes)[1:] == ["3 layers are not shown", "1 layer has no values"]


@pytest.mark.parametrize("most", [1, 3, 13, 50])
def test_as_many_as_asked_for(most):
    table = worst_layers(sample(), most)
    assert [row[0] for row in table.rows][:10] == ORDER[:most]
    assert len(table.rows) == min(most, 13)
    assert any("not shown" in note for note in table.notes) == (most < 13)


def test_what_is_wrong_is_in_the_row():
    rows = {
        row[0]: dict(zip(worst_layers(sample(), 13).columns, row, strict=True))
        for row in worst_layers(sample(), 13).rows
    }
    # Sorted, the middle one of 12 finite positive sizes: 1/64, 1, 1, 1, 1, 1.01, 7, 16, 50000, 60000 → (1 + 1.01) / 2.
    assert rows["small"]["rms / median"] == pytest.approx((1 / 64) / 1.005, rel=1e-3)
    assert rows["large"]["rms / median"] == pytest.approx(16 / 1.005, rel=1e-3)
    assert rows["half dead"]["dead %"] == 50
    assert rows["near the limit"]["of dtype %"] == pytest.approx(100 * 60_000 / 65_504, rel=1e-3)
    assert rows["healthy1"]["of dtype %"] == 0
    assert rows["nan1"]["rms / median"] is None
    assert rows["constant"]["remark"] == "constant"
    assert rows["healthy1"]["remark"] == ""


def test_an_unknown_dtype_is_no_saturation():
    table = worst_layers(
        ActivationSnapshot({"a": activation_statistics(spread(1e30)), "b": activation_statistics(spread(1.0))}, {})
    )
    assert {row[4] for row in table.rows} == {None}


def test_without_values_there_are_no_rows():
    table = worst_layers(ActivationSnapshot({"never": activation_statistics(BAD[:0])}, {"never": "not called"}))
    assert list(table.rows) == []
    assert list(table.notes)[1:] == ["1 layer has no values"]


def row(name, drift=None, noise=None, dead=None, **options):
    return RunningRow(name, 4, updates=1.0, drift=drift, noise=noise, dead_share=dead, **options)


ROWS = (
    row("quiet", 0.1, 0.3, 0.0),
    row("dead", 0.1, 0.2, 0.9),
    row("drifting", 0.5, 0.0, 0.0),
    RunningRow("unwatchable", 4, reason="it has no running statistics"),
    row("spoiled late", nonfinite=2, first_spoiled=30),
    row("alive", 0.1, 0.2, 0.1),
    row("restored early", 0.9, 0.9, 0.9, first_spoiled=3, restored=1),
    row("spoiled before", nonfinite=1),
    row("unknown", None, 0.7, 1.0),
)


def test_the_worst_running_statistics_come_first():
    table = worst_batch_norms(RunningSnapshot(ROWS, 40, {}, {}), 7)
    order = ["spoiled before", "restored early", "spoiled late", "drifting", "quiet", "dead", "alive"]
    assert [row[0] for row in table.rows] == order
    assert table.title == "running statistics: the 7 worst of 8 layers at optimizer step 40"
    assert list(table.notes) == ["1 layer is not shown", "1 layer has no values"]
    assert table.rows[5][1:4] == (0.1, 0.2, 90.0)
    assert "nonfinite" in str(table.rows[2][-1])


def test_nothing_is_made_of_unknown_numbers():
    (only,) = worst_batch_norms(RunningSnapshot((row("bn"),), None, {}, {})).rows
    assert only == ("bn", None, None, None, "")
    assert not any(isinstance(cell, float) and math.isnan(cell) for cell in only)
