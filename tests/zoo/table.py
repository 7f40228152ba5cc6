"""Sum the rows up: one line a family and a total, beside what the other folders reach on the same networks."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from zoo.architectures import VERSIONS, Architecture
from zoo.rows import FoldingRow, PeerRow
from zoo.targets import EXACT

from bn_lightning.reports.table import Cell, Table, format_cell

__all__ = ["Line", "PeerLine", "lines_of", "tables", "write_tables"]

_OURS = (
    "networks",
    "BN calls",
    "folded",
    "without BN",
    "affine",
    "kept by reason",
    "float64 error",
    "native error ×",
    "seconds",
    "crashed",
    "wrong",
)
_PEER = ("networks", "BN calls", "gone", "without BN", "float64 error", "crashed", "wrong")


@dataclass(frozen=True, slots=True)
class PeerLine:
    """What another folder makes of a group of networks; in a network on which it crashes no call is gone."""

    networks: int
    calls: int
    gone: int
    without_bn: int
    error: float | None
    crashed: int
    wrong: int

    def cells(self) -> list[Cell]:
        share = _percent(self.gone, self.calls)
        return [self.networks, self.calls, share, self.without_bn, self.error, self.crashed, self.wrong]


@dataclass(frozen=True, slots=True)
class Line:
    """A group of networks: what `FoldingRow` says of each, added up or the worst of it."""

    name: str
    networks: int
    calls: int
    folded: int
    without_bn: int
    affine: int
    kept: dict[str, int]
    error: float | None
    native: float | None
    seconds: float
    crashed: int
    wrong: int
    fx: PeerLine
    inductor: PeerLine

    def cells(self) -> list[Cell]:
        reasons = ", ".join(f"{reason} {number}" for reason, number in sorted(self.kept.items(), key=lambda x: -x[1]))
        return [
            self.name,
            self.networks,
            self.calls,
            _percent(self.folded, self.calls),
            self.without_bn,
            self.affine,
            reasons or None,
            self.error,
            self.native,
            self.seconds,
            self.crashed,
            self.wrong,
        ]


def lines_of(
    architectures: Sequence[Architecture], folding: Mapping[str, FoldingRow], inductor: Mapping[str, PeerRow]
) -> tuple[list[Line], list[Line]]:
    """Group the networks that were measured by where they come from, and by family."""
    seen = [each for each in architectures if each.name in folding or each.name in inductor]
    sources = list(dict.fromkeys(each.source for each in seen))
    groups = {source: [each for each in seen if each.source == source] for source in sources}
    if len(sources) > 1:
        groups["all"] = seen
    families: dict[str, list[Architecture]] = {}
    for each in sorted(seen, key=lambda each: (each.source, each.family)):
        families.setdefault(f"{each.source}: {each.family}", []).append(each)

    def line(name: str, group: list[Architecture]) -> Line:
        return _line(name, *([rows[each.name] for each in group if each.name in rows] for rows in (folding, inductor)))

    return [line(*each) for each in groups.items()], [line(*each) for each in families.items()]


def tables(lines: Sequence[Line]) -> list[Table]:
    """One table for this library and one for each of the others."""
    versions = ", ".join(f"{name} {version}" for name, version in VERSIONS.items())
    peers = [
        ("torch.fx.experimental.optimization.fuse", [(line.name, line.fx) for line in lines], ()),
        (
            "torch Inductor, freezing",
            [(line.name, line.inductor) for line in lines],
            ("frozen in float64; a call counts as left if any arithmetic on activations is left of its batch norm",),
        ),
    ]
    return [
        Table(
            f"bn_lightning ({versions})",
            ("", *_OURS),
            [line.cells() for line in lines],
            notes=("float64 error and native error × are the worst of a network; seconds are the median of a fold",),
        ),
        *(
            Table(title, ("", *_PEER), [[name, *line.cells()] for name, line in named if line.networks], notes)
            for title, named, notes in peers
            if any(line.networks for _, line in named)
        ),
    ]


def write_tables(folder: Path, totals: Sequence[Line], families: Sequence[Line], failures: Sequence[str]) -> None:
    """Write ``table.md`` and ``table.json``."""
    parts = [_markdown(table) for table in tables(totals)]
    parts.append("**Targets missed**\n\n" + ("\n".join(f"- {each}" for each in failures) or "none"))
    parts += [_markdown(table) for table in tables(families)]
    (folder / "table.md").write_text("\n\n".join(parts) + "\n")
    content = {
        "versions": VERSIONS,
        "totals": [asdict(line) for line in totals],
        "families": [asdict(line) for line in families],
        "failures": list(failures),
    }
    (folder / "table.json").write_text(json.dumps(content, indent=1) + "\n")


def _line(name: str, rows: Sequence[FoldingRow], inductor: Sequence[PeerRow]) -> Line:
    kept: Counter[str] = Counter()
    for row in rows:
        kept.update(row.kept)
    whole = [row for row in rows if not row.crash]
    return Line(
        name=name,
        networks=len(rows),
        calls=sum(row.total for row in rows),
        folded=sum(row.folded for row in rows),
        without_bn=sum(row.folded == row.total for row in whole),
        affine=sum(row.affine for row in rows),
        kept=dict(kept),
        error=_worst(error for row in rows for error in (row.reported, row.error)),
        native=_worst(row.native for row in rows),
        seconds=sorted(row.seconds for row in whole)[len(whole) // 2] if whole else 0.0,
        crashed=len(rows) - len(whole),
        wrong=sum(bool(row.problem) or _is_wrong(row.reported) or _is_wrong(row.error) for row in rows),
        fx=_peer_line([row.fx for row in rows if row.fx]),
        inductor=_peer_line(inductor),
    )


def _peer_line(rows: Sequence[PeerRow]) -> PeerLine:
    whole = [row for row in rows if row.left is not None]
    return PeerLine(
        networks=len(rows),
        calls=sum(row.calls for row in rows),
        gone=sum(row.calls - (row.left or 0) for row in whole),
        without_bn=sum(row.left == 0 for row in whole),
        error=_worst(row.error for row in whole),
        crashed=len(rows) - len(whole),
        wrong=sum(_is_wrong(row.error) for row in whole),
    )


def _worst(errors: Iterable[float | None]) -> float | None:
    return max((error for error in errors if error is not None), default=None)


def _is_wrong(error: float | None) -> bool:
    return error is not None and not error <= EXACT


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def _markdown(table: Table) -> str:
    head = f"| {' | '.join(table.columns)} |\n|---|{'---:|' * (len(table.columns) - 1)}"
    rows = (f"| {' | '.join(map(format_cell, row))} |" for row in table.rows)
    notes = "".join(f"\n\n{note}" for note in table.notes)
    return f"**{table.title}**\n\n{head}\n" + "\n".join(rows) + notes
