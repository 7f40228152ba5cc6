"""How many faults the audit finds, each by its own rule, and how often it accuses what is healthy.

    python tests/benchmarks/audit_rules.py [--faults] [--healthy] [--only NAME] [--seeds 1]

A fault is a small training with one bug (tests/auditing/faults/): it is found if a finding has its slug and is above
info, except of rules that never say more than info. A healthy subject is a zoo network with the statistics of its data
or a training on the digits: whatever it is told above info is a false alarm. Exits with 1 if a fault is missed, a
healthy subject accused, or any of them cannot be audited.
"""

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from healthy import Subject, subjects

from bn_lightning.auditing import AuditReport
from bn_lightning.auditing.finding import SEVERITIES, Finding
from bn_lightning.auditing.rules import RULES
from bn_lightning.reports.table import Table

sys.path.append(str(Path(__file__).parents[1]))

from auditing.faults.catalogues import Fault, every_fault


def ran(name: str, audit: Callable[[], AuditReport | None]) -> tuple[AuditReport | None, str]:
    """Audit, with a line of progress; return the report, or why there is none."""
    print(f"{name} … ", end="", file=sys.stderr, flush=True)
    start = time.perf_counter()
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            report = audit()
        problem = "" if report is not None else "did not reach its accuracy"
    except Exception as error:
        report, problem = None, f"failed: {type(error).__name__}: {error}".splitlines()[0]
    told = problem or ", ".join(by_rule(above_info(report))) or "nothing above info"
    print(f"{told} ({time.perf_counter() - start:.0f} s)", file=sys.stderr, flush=True)
    return report, problem


def above_info(report: AuditReport) -> list[Finding]:
    return [found for found in report.findings if found.severity != "info"]


def by_rule(findings: list[Finding]) -> dict[str, list[Finding]]:
    """Gather the findings of each rule, worst first."""
    gathered: dict[str, list[Finding]] = {}
    for found in sorted(findings, key=lambda found: SEVERITIES.index(found.severity), reverse=True):
        gathered.setdefault(found.rule, []).append(found)
    return gathered


def described(findings: list[Finding]) -> str:
    """Name each rule, how bad it says it is and where."""
    return "; ".join(
        f"{slug} ({worst.severity}) at {place(worst, others)}" for slug, (worst, *others) in by_rule(findings).items()
    )


def place(worst: Finding, others: list[Finding]) -> str:
    return (worst.layer or "(model)") + (f" and {len(others)} more" if others else "")


def recall(faults: list[Fault]) -> tuple[Table, list[str]]:
    """Audit each fault; return the table and the faults that were missed."""
    worst_of = {rule.slug: rule.severity for rule in RULES}
    rows, missed = [], []
    for fault in faults:
        name = f"{fault.slug}, {fault.catalogue}"
        report, problem = ran(name, fault.audit)
        told = by_rule([] if report is None else list(report.findings))
        own = told.pop(fault.slug, [])
        found = bool(own) and (own[0].severity != "info" or worst_of[fault.slug] == "info")
        if not found:
            missed.append(name)
        where = (own[0].severity, place(own[0], own[1:])) if own else (None, None)
        beside = ", ".join(f"{slug} ({findings[0].severity})" for slug, findings in told.items())
        rows.append((fault.slug, fault.catalogue, "yes" if found else problem or "NO", *where, beside or None))
    columns = ("fault, and the rule for it", "catalogue", "found", "severity", "layer", "told beside it")
    notes = [f"missed: {'; '.join(missed) or 'none'}"]
    return Table("small trainings on real digits with one bug each", columns, rows, notes), missed


def false_alarms(healthy: list[Subject]) -> tuple[Table, list[str], list[str]]:
    """Audit each subject; return the table, those that are accused, and those that could not be audited."""
    rows, accused, unknown = [], [], []
    for subject in healthy:
        report, problem = ran(subject.name, subject.audit)
        if report is None:
            unknown.append(subject.name)
            rows.append((subject.name, None, problem, None))
            continue
        above = above_info(report)
        if above:
            accused.append(subject.name)
        notes = [found for found in report.findings if found.severity == "info"]
        rows.append((subject.name, len(report.layers), described(above) or None, ", ".join(by_rule(notes)) or None))
    columns = ("healthy", "BatchNorm layers", "told above info", "info")
    notes = [f"accused: {'; '.join(accused) or 'none'}", f"could not be audited: {'; '.join(unknown) or 'none'}"]
    return Table("healthy networks and trainings", columns, rows, notes), accused, unknown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", action="store_true", help="only the faults")
    parser.add_argument("--healthy", action="store_true", help="only the healthy subjects")
    parser.add_argument("--only", default="", help="those whose names hold this")
    parser.add_argument("--seeds", type=int, default=1, help="of the healthy trainings")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # what the Trainer says of itself
    both = options.faults == options.healthy
    faults = every_fault() if both or options.faults else []
    faults = [each for each in faults if options.only in each.slug]
    healthy = list(subjects(options.seeds)) if both or options.healthy else []
    healthy = [each for each in healthy if options.only in each.name]
    if not faults and not healthy:
        parser.error(f"nothing has {options.only!r} in its name")
    closing, wrong = [], []
    if faults:
        table, missed = recall(faults)
        print(table, end="\n\n")
        rules = {each.slug for each in faults}
        closing.append(f"faults found: {len(faults) - len(missed)} of {len(faults)}, of {len(rules)} rules")
        wrong += missed
    if healthy:
        table, accused, unknown = false_alarms(healthy)
        print(table, end="\n\n")
        audited = len(healthy) - len(unknown)
        closing.append(f"healthy subjects with a finding above info: {len(accused)} of {audited}")
        wrong += accused + unknown
    print("; ".join(closing))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
