"""Fold every BatchNorm network of timm and torchvision, resumable and in a bounded time.

The rows go to ``runs/zoo/*.jsonl``, networks that have one are skipped; the tables to ``table.md`` and ``table.json``
beside them. Exit status 1 if a target is missed.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from zoo.architectures import Architecture, matching, survey
from zoo.rows import FoldingRow, Journal, PeerRow
from zoo.table import lines_of, tables, write_tables
from zoo.targets import missed, share_missed
from zoo.workers import MEASURES, measured


def main() -> int:
    options = _options()
    options.output.mkdir(parents=True, exist_ok=True)
    chosen = matching(options.only)
    architectures = survey(chosen, options.output / "architectures.json", workers=options.workers, say=_say)
    if not architectures:
        _say(f"no model with BatchNorm matches {', '.join(options.only)}")
        return 2
    journals = {kind: Journal(options.output / f"{kind}.jsonl", row) for kind, row in MEASURES.items()}
    left = 0 if options.table else _run(options, journals[options.peers or "folding"], architectures)
    folding, inductor = (journals[kind].rows() for kind in ("folding", "inductor"))
    rows = [folding[each.name] for each in architectures if each.name in folding]
    failures = [f"{row.name}: {what}" for row in rows for what in missed(row)]
    of_timm = [each.name for each in architectures if each.source == "timm"]
    if options.only == ["*"] and all(name in folding for name in of_timm):
        failures += share_missed([folding[name] for name in of_timm])
    totals, families = lines_of(architectures, folding, inductor)
    write_tables(options.output, totals, families, failures)
    _say("\n" + "\n\n".join(map(str, tables(totals))))
    _say(f"\n{len(failures)} targets missed" + "".join(f"\n  {each}" for each in failures))
    if left:
        _say(f"{left} of {len(architectures)} networks are left; run again to go on.")
    return int(bool(failures))


def _run(options: argparse.Namespace, journal: Journal, architectures: Sequence[Architecture]) -> int:
    """Measure what has no row yet; return how many are left when the time is over."""
    names = [each.name for each in architectures]
    if options.fresh:
        journal.forget(names)
    if options.retry:
        journal.forget(name for name, row in journal.rows().items() if name in names and _failed(row))
    done = journal.rows()
    todo = [each for each in architectures if each.name not in done]
    _say(f"{len(architectures)} networks, {len(todo)} to measure, at most {options.minutes:g} minutes")
    end = time.monotonic() + 60 * options.minutes
    rows = measured(
        options.peers or "folding",
        todo,
        workers=options.workers,
        timeout=options.timeout,
        go_on=lambda: time.monotonic() < end,
    )
    number = 0
    for number, row in enumerate(rows, 1):
        journal.add(row)
        _say(f"{number:4d}/{len(todo)} {_told(row)}")
    return len(todo) - number


def _failed(row: FoldingRow | PeerRow) -> bool:
    return any(missed(row)) if isinstance(row, FoldingRow) else bool(row.crash)


def _told(row: FoldingRow | PeerRow) -> str:
    if row.crash:
        return f"{row.name}: {row.crash}"
    if isinstance(row, PeerRow):
        assert row.left is not None
        gone = row.calls - row.left
        return f"{row.name}: {gone} of {row.calls} gone, error {row.error:.1e}, {row.seconds:.1f} s {row.note}"
    failures = "".join(f" — {each}" for each in missed(row))
    return (
        f"{row.name}: folded {row.folded} of {row.total}, error {row.error:.1e}, native × {row.native:.2f}, "
        f"{row.seconds:.1f} s of {row.whole:.1f} s{failures}"
    )


def _say(line: str) -> None:
    print(line, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m zoo", description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", metavar="PATTERN", help="names to take, such as timm:resnet*")
    parser.add_argument("--peers", choices=["inductor"], help="measure this instead (torch.fx is always beside)")
    parser.add_argument("--minutes", type=float, default=90, help="start no network after that (%(default)s)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds a network may take (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="measure again what has been measured")
    parser.add_argument("--retry", action="store_true", help="measure again what failed")
    parser.add_argument("--table", action="store_true", help="only print and write the tables")
    parser.add_argument("--output", type=Path, default=Path("runs/zoo"), help="folder (%(default)s)")
    options = parser.parse_args()
    options.only = options.only or ["*"]
    return options


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted; run again to go on")
