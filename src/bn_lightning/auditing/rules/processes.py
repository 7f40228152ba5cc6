"""Processes that do not agree."""

from collections.abc import Iterator

from bn_lightning.auditing.finding import Finding
from bn_lightning.auditing.reading import AuditReading
from bn_lightning.auditing.rules.rule import Rule

__all__ = ["RULES"]

# DDP puts process 0's statistics everywhere before each forward pass, which leaves one batch's share of difference.
_SPREAD = 0.1


def _find_divergence(rule: Rule, reading: AuditReading) -> Iterator[Finding]:
    watched = {} if reading.history is None else reading.history.layers
    for row in reading.layers:
        before = watched[row.name].spread if row.name in watched else None
        now = reading.spread.get(row.name)
        spread = max(before or 0.0, now or 0.0)
        if spread <= _SPREAD:
            continue
        yield rule.finding(
            row.name,
            f"the processes' running statistics differ{'' if (now or 0) > _SPREAD else ' at validation'}: one is "
            f"{spread:.2g} standard deviations of the output from what all of them have seen. Each evaluates with its "
            "own, or all with those of process 0, and a checkpoint holds those of process 0",
            {"spread": now, "spread_at_validation": before, "processes": reading.processes},
            "bn_lightning.merge_statistics(model) in every process before validation and saving; or SyncBatchNorm, or "
            'bn_lightning.convert_batch_norm(model, "cross_replica")',
        )


RULES = (Rule("rank-divergence", "warning", f"> {_SPREAD:g} output std", _find_divergence, ("history", "processes")),)
