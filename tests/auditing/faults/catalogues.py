"""Every fault of every catalogue in this folder; several may share a slug, each is one of its own."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from bn_lightning.auditing import AuditReport
from bn_lightning.auditing.rules import RULES

__all__ = ["Fault", "every_fault"]


@dataclass(frozen=True)
class Fault:
    """One bug put into one training.

    Attributes:
        slug: Of the rule that has to find it.
        catalogue: Last part of the name of the module it stands in.
        audit: Trains with it, and audits.
    """

    slug: str
    catalogue: str
    audit: Callable[[], AuditReport]


def every_fault() -> list[Fault]:
    """List the faults in the order of the rules.

    Raises:
        LookupError: If a rule has no fault, or a fault no rule.
    """
    faults = [
        Fault(slug, path.stem.removeprefix("catalogue_"), audit)
        for path in sorted(Path(__file__).parent.glob("catalogue_*.py"))
        for slug, audit in import_module(f"auditing.faults.{path.stem}").FAULTS.items()
    ]
    order = [rule.slug for rule in RULES]
    if found := {fault.slug for fault in faults}.symmetric_difference(order):
        raise LookupError(f"of rules and faults only one is there: {', '.join(sorted(found))}")
    return sorted(faults, key=lambda fault: order.index(fault.slug))
