"""Reports to show: a small one with everything in it, and the widest and longest there is."""

from bn_lightning.auditing import AuditReport, ChannelGap, Finding, GapRow, NotLooked, Repair
from bn_lightning.auditing.losses import compare_losses

__all__ = ["FOUND", "LONG", "ROWS", "losses", "many_layers", "small"]

LONG = "backbone.encoder.stages.3.blocks.11.very_long_attribute_name_of_a_block.mlp.norm2"
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


def losses(source="evaluation", **changed):
    read = {
        "full_training": [1.0, 1.2, 0.8],
        "batch_statistics": [1.0, 1.2, 0.8],
        "recalibrated": [1.1, 1.25, 0.95],
        "deployed": [2.1, 2.3, 1.9],
        "evaluation_statistics": [1.1, 1.25, 0.95],
        **changed,
    }
    return compare_losses(source, read, [10] * len(read["deployed"]))


def small():
    """Build a report with a bit of everything."""
    return AuditReport("Net", 3, ROWS, FOUND, losses(), (NotLooked("padding", "it needs data"),))


def many_layers(number):
    """Build the worst case for the width: long names, three worst channels, losses, many layers."""
    worst = tuple(ChannelGap(1000 + place, 1234.5) for place in range(3))
    rows = [
        GapRow(f"{LONG}.{index:03}", 2.5 - index * 0.02, worst, 640, None, -1.2e-5, -1.1e-5, index=number - index)
        for index in range(number)
    ]
    levels = ["error" if row.gap >= 1 else "warning" if row.gap >= 0.25 else "info" for row in rows]
    message = "evaluation's output is far from what the training data's statistics give, " * 3
    found = [
        Finding(
            "not-converged",
            level,
            row.name,
            message,
            {"gap": row.gap, "updates": 3},
            "gap ≥ 1",
            "recalibrate_batch_norm(model, train_batches)",
            Repair("recalibrate"),
        )
        for row, level in zip(rows, levels, strict=True)
    ]
    missed = [NotLooked(f"rule-{index}", "it needs an optimizer") for index in range(30)]
    return AuditReport("Net", 3, tuple(rows), tuple(found), losses(), tuple(missed))
