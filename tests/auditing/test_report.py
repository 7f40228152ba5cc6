"""What a report holds: JSON with a fixed structure, exit codes, scalars, the picture."""

import json
import math

import pytest
from auditing.shown_reports import small

from bn_lightning.auditing import AuditReport, ChannelGap, Finding, GapRow, LossReading
from bn_lightning.auditing.losses import compare_losses


@pytest.fixture
def report():
    return small()


def test_the_structure_of_the_json_is_what_its_version_says(report):
    def structure(value):
        if isinstance(value, dict):
            return {key: structure(inner) for key, inner in value.items()}
        return [structure(value[0])] if isinstance(value, list) and value else type(value).__name__

    reading = dict.fromkeys(("mean", "low", "high"), "float")
    difference = {"name": "str", "higher": "str", "lower": "str", **reading, "evident": "bool"}
    finding = dict.fromkeys(("rule", "severity", "layer", "message", "threshold", "fix"), "str")
    assert structure(json.loads(report.to_json())) == {
        "schema_version": "int",
        "model": "str",
        "batches": "int",
        "layers": [
            {
                "name": "str",
                "gap": "float",
                "worst_channels": [{"channel": "int", "gap": "float"}],
                "count": "int",
                "reason": "NoneType",
                "predicted_loss_change": "float",
                "confirmed_loss_change": "float",
                "index": "int",
            }
        ],
        "losses": {
            "source": "str",
            "batches": "int",
            **dict.fromkeys(
                ("full_training", "batch_statistics", "recalibrated", "deployed", "evaluation_statistics"), reading
            ),
            "differences": [difference],
        },
        "findings": [{**finding, "evidence": {"gap": "float"}, "applicable": "bool"}],
        "not_looked": [{"what": "str", "reason": "str"}],
    }
    parsed = json.loads(report.to_json())
    assert parsed["schema_version"] == 2
    assert [found["applicable"] for found in parsed["findings"]] == [True, False]
    assert parsed["layers"][0]["worst_channels"] == [{"channel": 3, "gap": 2.0}]
    assert parsed["losses"]["differences"][2]["evident"]


def test_json_is_strict_about_numbers_that_are_not_finite():
    rows = (GapRow("a", math.nan, (ChannelGap(0, math.inf),), 8, None),)
    layer = json.loads(AuditReport("Net", 1, rows, ()).to_json(), parse_constant=pytest.fail)["layers"][0]
    assert layer["gap"] == "nan"
    assert layer["worst_channels"][0]["gap"] == "inf"


@pytest.mark.parametrize(
    ("severities", "codes"),
    [((), (0, 0, 0)), (("info",), (1, 0, 0)), (("warning", "info"), (1, 1, 0)), (("error",), (1, 1, 1))],
    ids=["none", "info", "warning", "error"],
)
def test_the_exit_code_is_one_from_the_severity_on(severities, codes):
    found = tuple(Finding("r", severity, None, "", {}, "", "") for severity in severities)
    report = AuditReport("Net", 1, (), found)
    assert tuple(report.exit_code(level) for level in ("info", "warning", "error")) == codes
    assert report.exit_code() == codes[-1]


def test_the_picture_has_the_layers_in_the_order_of_the_network(report):
    figure = report.figure()
    bars = {round(bar.get_x() + 0.4): bar.get_height() for bar in figure.axes[0].patches}
    assert bars == {0: pytest.approx(0.02), 1: pytest.approx(1.5)}, "and none for a layer without a gap"
    assert [text.get_text() for text in figure.texts] == ["Net: findings: 1 error, 1 info", "1  deep<b>: 1.5"]


def test_differences_are_paired_and_intervals_say_where_there_is_no_evidence(report):
    stale = report.losses.difference("stale statistics")
    assert stale.is_evident
    assert stale.mean == pytest.approx(1.0, abs=1e-9)
    assert not report.losses.difference("dropout").is_evident
    assert report.losses.deployed == LossReading(*(getattr(report.losses.deployed, k) for k in ("mean", "low", "high")))
    one = compare_losses(
        "training",
        {key: [1.0] for key in ("full_training", "batch_statistics", "recalibrated")} | {"deployed": [9.0]},
        [1],
    )
    assert not one.difference("stale statistics").is_evident, "one batch has no interval"


def test_scalars_are_gaps_and_losses(report):
    scalars = report.scalars()
    assert scalars["bn/deep<b>/gap"] == 1.5
    assert scalars["bn/loss/deployed"] == pytest.approx(2.1)
    assert len(scalars) == 7
    assert "bn/frozen/gap" not in scalars
