"""What a report says: in a terminal, as JSON with a fixed structure, and as a page that escapes every name."""

import json

import pytest

from bn_lightning.auditing import AuditReport, ChannelGap, Finding, GapRow, LossReading, NotLooked, Repair
from bn_lightning.auditing.losses import compare_losses

ROWS = (
    GapRow("deep<b>", 1.5, (ChannelGap(3, 2.0),), 640, None, -0.2, -0.15, index=1),
    GapRow("first", 0.02, (), 640, None, 0.0, index=0),
    GapRow("frozen", None, (), 640, "frozen", index=2),
)
FOUND = (
    Finding(
        "not-converged", "error", "deep<b>", "it lags", {"gap": 1.5}, "gap ≥ 1", "recalibrate()", Repair("recalibrate")
    ),
    Finding("decayed-affine", "info", None, "decay", {"layers": 3}, "any", "no decay"),
)


@pytest.fixture
def report():
    losses = compare_losses(
        "evaluation",
        {
            "full_training": [1.0, 1.2, 0.8],
            "batch_statistics": [1.0, 1.2, 0.8],
            "recalibrated": [1.1, 1.25, 0.95],
            "deployed": [2.1, 2.3, 1.9],
            "evaluation_statistics": [1.1, 1.25, 0.95],
        },
        [10, 10, 10],
    )
    return AuditReport("Net", 3, ROWS, FOUND, losses, (NotLooked("padding", "it needs data"),))


def test_the_terminal_tells_verdict_losses_fixes_and_gaps(report):
    told = str(report)
    assert "findings: 1 error, 1 info" in told
    assert "Stale statistics costs 1:" in told
    assert "Dropout: no evidence" in told
    assert "ERROR not-converged in 'deep<b>': it lags" in told
    assert "fix: recalibrate()" in told
    assert "apply_fixes(model, report)" in told
    assert "not looked at: padding (it needs data)" in told
    assert "-0.15" in told


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
    assert json.loads(report.to_json())["schema_version"] == 2


def test_the_page_stands_alone_and_escapes_names(report, tmp_path):
    report.save_html(tmp_path / "folder" / "page.html")
    page = (tmp_path / "folder" / "page.html").read_text()
    assert "deep&lt;b&gt;" in page
    assert "deep<b>" not in page
    assert "<script" not in page
    assert "http" not in page
    assert page.count("data:image/png;base64,") == 1


def test_the_picture_has_the_layers_in_the_order_of_the_network(report):
    names = [label.get_text() for label in report.figure().axes[0].get_xticklabels()]
    assert names == ["first", "deep<b>", "frozen"]


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
