"""What was measured of one network, as a line of JSON; a file of those lines is what a run resumes from."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from zoo.architectures import VERSIONS

__all__ = ["FoldingRow", "Journal", "PeerRow"]


@dataclass(frozen=True, slots=True)
class PeerRow:
    """What another folder made of a network.

    Attributes:
        name: The network's.
        calls: Calls of a BatchNorm layer in one forward pass.
        left: How many of them are still computed. ``None`` after a crash.
        error: Relative error of the output in float64, against the network as it was. ``None`` after a crash.
        seconds: What it took, reference included.
        crash: The exception, empty if there was none.
        note: What else there is to know.
    """

    name: str
    calls: int = 0
    left: int | None = None
    error: float | None = None
    seconds: float = 0.0
    crash: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class FoldingRow:
    """What this library made of a network.

    Attributes:
        name: The network's.
        size: Height of the images, the smallest it takes.
        layers: Number of BatchNorm layers.
        unreached: How many of them no forward pass calls.
        calls: Calls of a BatchNorm layer in one forward pass, by what became of the layer.
        kept: The same of those that were not folded, by reason.
        affine: Calls that a ``ChannelAffine`` computes with ``standalone="affine"``.
        left: Layers that are left with ``standalone="affine"``.
        reported: The float64 error that the library reports. ``None`` after a crash.
        error: Measured here in float64, with ``standalone="affine"``; also on images that were no example input.
        native: Error in float32 by that of the unfolded network, geometric means over eight images.
        undone: Whether ``undo`` restored every tensor and bit.
        seconds: To fold, verification included.
        whole: All seconds that the network took.
        fx: What ``torch.fx.experimental.optimization.fuse`` made of it.
        problem: What else is wrong with it, empty if nothing.
        crash: The exception, empty if there was none.
    """

    name: str
    size: int = 0
    layers: int = 0
    unreached: int = 0
    calls: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    affine: int = 0
    left: int = 0
    reported: float | None = None
    error: float | None = None
    native: float | None = None
    undone: bool = False
    seconds: float = 0.0
    whole: float = 0.0
    fx: PeerRow | None = None
    problem: str = ""
    crash: str = ""

    @property
    def total(self) -> int:
        """All calls."""
        return sum(self.calls.values())

    @property
    def folded(self) -> int:
        """Calls that are gone."""
        return sum(number for action, number in self.calls.items() if action not in ("kept", "affine"))


class Journal:
    """The rows of one kind in a file; the last one of a network counts, and only those of this torch and timm."""

    def __init__(self, path: Path, kind: type[FoldingRow] | type[PeerRow]) -> None:
        self.path, self.kind = path, kind

    def rows(self) -> dict[str, FoldingRow | PeerRow]:
        """Read all rows, keyed by the network's name."""
        found = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                fields = json.loads(line)
            except json.JSONDecodeError:  # the run was killed while it wrote
                continue
            if fields.pop("versions") == VERSIONS:
                if fields.get("fx"):
                    fields["fx"] = PeerRow(**fields["fx"])
                found[fields["name"]] = self.kind(**fields)
        return found

    def add(self, row: FoldingRow | PeerRow) -> None:
        """Append a row."""
        with self.path.open("a") as file:
            file.write(json.dumps({"versions": VERSIONS, **asdict(row)}) + "\n")

    def forget(self, names: Iterable[str]) -> None:
        """Take the rows of some networks out."""
        names = set(names)
        kept = [row for name, row in self.rows().items() if name not in names]
        self.path.write_text("")
        for row in kept:
            self.add(row)
