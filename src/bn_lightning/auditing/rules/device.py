"""Layers whose device, dtype and memory format compute something else."""

from collections.abc import Iterator

from bn_lightning.auditing.finding import Finding
from bn_lightning.auditing.observers.samples import FLOOR, ROUNDINGS
from bn_lightning.auditing.reading import AuditReading
from bn_lightning.auditing.rules.rule import Rule

__all__ = ["RULES"]


def _find_mismatch(rule: Rule, reading: AuditReading) -> Iterator[Finding]:
    for name, error in reading.seen.device.items():
        if isinstance(error, str) or max(error.forward, error.backward) <= error.tolerance:
            continue
        what = "output" if error.forward > error.tolerance else "gradient"
        yield rule.finding(
            name,
            f"on {error.place} its {what} differs from that of float64 on a CPU by "
            f"{error.forward if what == 'output' else error.backward:.2g} of its scale",
            {
                "forward": error.forward,
                "backward": error.backward,
                "tolerance": error.tolerance,
                "place": error.place,
            },
            "run it in float32 and contiguous memory; if it is a class of your own, look at its forward; else report "
            "it to the device's vendor",
        )


RULES = (
    Rule(
        "device-mismatch",
        "error",
        f"error relative to the scale > {FLOOR:g} and > {ROUNDINGS} times the dtype's rounding, the offset counted",
        _find_mismatch,
        ("data",),
    ),
)
