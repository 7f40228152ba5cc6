"""Which networks the zoos have, which of them have BatchNorm, and what of it folds."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from bn_lightning.errors import BatchNormError, first_line
from bn_lightning.folding.plan import plan_fold
from bn_lightning.reports.progress import progress
from bn_lightning.reports.table import Cell, Table
from bn_lightning.reports.tabled import Tabled
from bn_lightning.selection import named_batch_norms
from bn_lightning.zoo.blank import build_blank
from bn_lightning.zoo.build import build_by_name
from bn_lightning.zoo.hugging_face import vision_types
from bn_lightning.zoo.input_size import default_input_size
from bn_lightning.zoo.package import zoo_package

__all__ = ["ZooListing", "ZooRow", "describe_zoo_model", "list_zoo_models"]

_DETAILS = ("names", "layers", "folds")


@dataclass(frozen=True, slots=True)
class ZooRow:
    """One architecture of a zoo; what has not been looked at is ``None``.

    Attributes:
        name: For `load_zoo_model`.
        parameters: How many numbers its parameters hold.
        batch_norms: How many BatchNorm layers it has.
        folded: How many of them `plan_fold` folds.
        kept: How many stay, by the reason in `bn_lightning.folding.REASONS`.
        problem: Why something could not be found out, else empty.
    """

    name: str
    parameters: int | None = None
    batch_norms: int | None = None
    folded: int | None = None
    kept: dict[str, int] = field(default_factory=dict)
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that go into JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class ZooListing(Tabled):
    """Architectures by name.

    Attributes:
        rows: One an architecture.
        missing: Why a zoo that was asked for is not among them, one line each.
    """

    rows: tuple[ZooRow, ...]
    missing: tuple[str, ...] = ()

    def table(self) -> Table:
        """One row an architecture, with a column for all that has been looked at."""
        columns: dict[str, Callable[[ZooRow], Cell]] = {"network": lambda row: row.name}
        if any(row.batch_norms is not None or row.problem for row in self.rows):
            columns["parameters, M"] = lambda row: None if row.parameters is None else row.parameters / 1e6
            columns["BatchNorm layers"] = lambda row: row.batch_norms
        if any(row.folded is not None for row in self.rows):
            columns["folded"] = lambda row: row.folded
            columns["kept"] = lambda row: ", ".join(f"{count} {reason}" for reason, count in row.kept.items()) or None
        if any(row.problem for row in self.rows):
            columns["not found out"] = lambda row: row.problem or None
        number = len(self.rows)
        title = f"{number} network{'' if number == 1 else 's'}"
        seen = [row for row in self.rows if row.batch_norms is not None]
        if seen:
            title += f", {sum(bool(row.batch_norms) for row in seen)} with BatchNorm"
        return Table(title, [*columns], [[cell(row) for cell in columns.values()] for row in self.rows], self.missing)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that go into JSON."""
        return {"rows": [row.to_dict() for row in self.rows], "missing": list(self.missing)}


def list_zoo_models(patterns: str | Iterable[str] = ("*",), *, detail: str = "names") -> ZooListing:
    """List the architectures of timm, torchvision and transformers.

    Args:
        patterns: ``fnmatch`` patterns, of which a name has to match one: with the zoo (``timm:resnet*``), which then
            is the only one imported, or without (``resnet*``).
        detail: How much to find out of each. ``"names"`` builds nothing. ``"layers"`` builds each without data, about
            a tenth of a second each. ``"folds"`` builds those with BatchNorm and records a forward pass of one example
            of their own input size, seconds each and as much memory as the network takes.

    Returns:
        One row an architecture, in the zoos' own order. What could not be built or run says so in its row.

    Raises:
        BatchNormError: If a pattern matches nothing, or ``detail`` is another word.

    Example:
        >>> print(list_zoo_models("timm:test_resnet", detail="layers"))
        1 network, 1 with BatchNorm
          network            parameters, M   BatchNorm layers
         ─────────────────────────────────────────────────────
          timm:test_resnet            0.47                 15
    """
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    if detail not in _DETAILS:
        raise BatchNormError(f"detail= is one of {', '.join(map(repr, _DETAILS))}; got {detail!r}.")
    names: list[str] = []
    missing: list[str] = []
    for zoo, listed in _ZOOS.items():
        wanted = [pattern for pattern in patterns if ":" not in pattern or fnmatchcase(zoo, pattern.partition(":")[0])]
        if not wanted:
            continue
        try:
            found = [f"{zoo}:{name}" for name in listed()]
        except BatchNormError as error:
            missing.append(str(error))
            continue
        names += [name for name in found if any(_matches(name, pattern) for pattern in wanted)]
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            raise BatchNormError(
                f"pattern {pattern!r} matches no network of timm, torchvision or transformers"
                + (f" ({'; '.join(missing)})." if missing else "; 'timm:resnet*' is one that does.")
            )
    if detail == "names":
        return ZooListing(tuple(map(ZooRow, names)), tuple(missing))
    rows: list[ZooRow] = []
    with progress("looking at networks", len(names)) as advance:
        for name in names:
            rows.append(describe_zoo_model(name, folds=detail == "folds"))
            advance()
    return ZooListing(tuple(rows), tuple(missing))


def describe_zoo_model(name: str, *, folds: bool = True) -> ZooRow:
    """Find out how many BatchNorm layers a network has and, unless ``folds=False``, what becomes of them in a fold.

    Args:
        name: As for `load_zoo_model`.
        folds: Build it with random weights and record a forward pass of one example of its own input size, if it has
            BatchNorm layers. The global random state is left as it was.

    Returns:
        The row; what kept anything from being found out is its ``problem``.

    Example:
        >>> describe_zoo_model("timm:test_resnet").folded
        15
    """
    try:
        blank = build_blank(name)
    except BatchNormError as error:
        return ZooRow(name, problem=str(error))
    parameters = sum(parameter.numel() for parameter in blank.parameters() if not is_lazy(parameter))
    norms = len(named_batch_norms(blank))
    if not (folds and norms):
        return ZooRow(name, parameters, norms)
    size = default_input_size(blank)
    if size is None:
        return ZooRow(name, parameters, norms, problem="it does not say what inputs it takes")
    del blank
    try:
        rows = plan_fold(_built(name), torch.randn(1, *size, generator=torch.Generator().manual_seed(0))).rows
    except BatchNormError as error:
        return ZooRow(name, parameters, norms, problem=str(error))
    except Exception as error:  # one of a thousand networks should not end the list
        return ZooRow(name, parameters, norms, problem=first_line(error))
    kept = Counter(row.reason for row in rows if row.action == "kept")
    return ZooRow(name, parameters, norms, len(rows) - sum(kept.values()), dict(kept))


def _built(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build_by_name(name).eval()


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name if ":" in pattern else name.partition(":")[2], pattern)


def _of_timm() -> Iterator[str]:
    yield from zoo_package("timm", "timm:*").list_models()


def _of_torchvision() -> Iterator[str]:
    yield from zoo_package("torchvision", "torchvision:*").models.list_models()


def _of_transformers() -> Iterator[str]:
    yield from vision_types(zoo_package("transformers", "hf:*"))


_ZOOS: dict[str, Callable[[], Iterator[str]]] = {
    "timm": _of_timm,
    "torchvision": _of_torchvision,
    "hf": _of_transformers,
}
