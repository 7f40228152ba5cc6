"""What every network of the zoo has to reach."""

import math
from collections.abc import Iterator, Sequence

from zoo.rows import FoldingRow

__all__ = ["EXACT", "missed", "share_missed"]

EXACT = 1e-9
_NATIVE = 2.0
_SHARE = 0.92


def missed(row: FoldingRow) -> Iterator[str]:
    """Say which targets a network misses."""
    if row.crash:
        yield f"crashed: {row.crash}"
    if row.problem:
        yield row.problem
    for what, error in (("reported", row.reported), ("measured", row.error)):
        if error is not None and not error <= EXACT:
            yield f"wrong: float64 error {error:.1e} ({what})"
    if row.native is not None and not row.native <= _NATIVE:
        yield f"in float32 {row.native:.2f} times as far off as the unfolded network"
    if row.crash:
        return
    if row.left:
        yield f'{row.left} layers left with standalone="affine"'
    if not row.undone:
        yield "undo did not restore every bit"
    if row.kept.get("unverified"):
        yield f"{row.kept['unverified']} calls were planned to fold and rolled back"


def share_missed(rows: Sequence[FoldingRow]) -> Iterator[str]:
    """Say so if too few calls are folded over all of these networks."""
    folded, total = sum(row.folded for row in rows), sum(row.total for row in rows)
    if not folded >= math.ceil(_SHARE * total):
        yield f"only {100 * folded / total:.2f} % of {total} calls folded over timm (target {100 * _SHARE:g} %)"
