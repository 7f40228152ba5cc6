"""How much each residual branch adds to what it is added to."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bn_lightning.errors import BatchNormError
from bn_lightning.functional.activation import Row, activation_statistics
from bn_lightning.layers.base import BatchNormVariant
from bn_lightning.probes.additions import Undecided, residual_additions
from bn_lightning.probes.objective import Step, forward_of
from bn_lightning.reports.curves import Curve, along_layers, draw_curves, empty_figure
from bn_lightning.reports.table import Table
from bn_lightning.reports.tabled import Tabled
from bn_lightning.tracing import record_run
from bn_lightning.tracing.layers import function_name
from bn_lightning.tracing.nested import iter_tensors
from bn_lightning.tracing.passing import passing_kind

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BlockVariance", "BranchVariance", "branch_variance", "effective_depth"]


@dataclass(frozen=True, slots=True)
class BlockVariance:
    """What meets at one residual addition; variances over all values, correction=0, in activation units².

    Attributes:
        name: The module that adds; with a number from the second addition in the same module on.
        skip: Variance of x, or of its projection.
        branch: Variance of f(x).
    """

    name: str
    skip: float
    branch: float

    @property
    def share(self) -> float:
        """The branch's part of both, 1/(l + 1) at block l of a normalized network; NaN where both are 0."""
        total = self.skip + self.branch
        return self.branch / total if total else math.nan


@dataclass(frozen=True, slots=True)
class BranchVariance(Tabled):
    """One row a residual addition, in order of execution.

    Attributes:
        blocks: The additions.
        undecided: Additions of two sides that are alike, which were not measured.
    """

    blocks: tuple[BlockVariance, ...]
    undecided: tuple[Undecided, ...] = ()

    @property
    def effective_depth(self) -> float:
        """How many branches a path passes, see `effective_depth`."""
        return effective_depth(row.share for row in self.blocks)

    def scalars(self) -> dict[str, float]:
        """Return what one logs of it."""
        return {
            "effective_depth": self.effective_depth,
            **{f"{row.name}/skip_variance": row.skip for row in self.blocks},
            **{f"{row.name}/branch_variance": row.branch for row in self.blocks},
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "effective_depth": self.effective_depth}

    def figure(self) -> "Figure":
        """Draw both variances and the branch's share along the additions."""
        figure = empty_figure("skip and branch at each residual addition", height=6.4)
        places = range(1, len(self.blocks) + 1)
        upper, lower = figure.subplots(2, 1, sharex=True)
        skip = Curve("skip", places, [row.skip for row in self.blocks])
        draw_curves(upper, [skip, Curve("branch", places, [row.branch for row in self.blocks])], yscale="log")
        law = Curve("1/(l + 1), branches of variance 1", places, [1 / (place + 1) for place in places])
        draw_curves(lower, [Curve("branch / (skip + branch)", places, [row.share for row in self.blocks]), law])
        upper.set_ylabel("variance, activation units²")
        lower.set(ylabel="share of the branch", ylim=(0, 1))
        along_layers(lower)
        lower.set_xlabel("residual addition l, in order of execution")
        return figure

    def table(self) -> Table:
        """Put it into a table."""
        notes = [f"effective depth {self.effective_depth:.3g} of {len(self.blocks)} branches"]
        notes += [f"an addition in {each.module!r} was not measured: {each.reason}" for each in self.undecided]
        return Table(
            "variance at each residual addition",
            ("addition in", "skip", "branch", "branch / (skip + branch)"),
            [(row.name, row.skip, row.branch, row.share) for row in self.blocks],
            notes,
        )


def branch_variance(model: nn.Module, batch: Any, *, step: Step | None = None) -> BranchVariance:
    """Measure the variance of skip and branch at each residual addition of one forward pass.

    The additions are found while the network runs, whoever wrote it: two values of one shape that come from the same
    value, added by ``+``, ``+=``, ``add`` or ``torch.add``. The side that passes fewer convolutions and linear layers
    is the skip. Variances are over examples, channels and places together. It takes one forward pass. Where blocks lie
    inside of one another or side by side, each of their additions is a row, and counts for the effective depth.

    At initialization the variance of the skip grows as l, and the branch is 1/(l + 1) of what leaves block l, if each
    branch is normalized; without normalization both are as large as one another, and the variance doubles.

    Args:
        model: The network; it comes back bit for bit. In evaluation mode it is run in training mode all the same.
        batch: A tensor, or a tuple or list whose first element is the input.
        step: A function ``(model, batch)`` that runs the network on any other batch.

    Raises:
        BatchNormError: If the network cannot be run, or adds nothing of the kind.

    Example:
        >>> class Block(nn.BatchNorm1d):
        ...     def forward(self, x):
        ...         return x + super().forward(x)
        >>> x = torch.tensor([[1.0], [-1.0]])
        >>> [round(row.share, 2) for row in branch_variance(nn.Sequential(*(Block(1) for _ in range(2))), x).blocks]
        [0.5, 0.2]

    Reference:
        De & Smith, Batch normalization biases residual blocks towards the identity function in deep networks,
        arXiv:2002.10444, §2 and §3.
    """
    with forward_of(model, batch, step) as objective, torch.no_grad():
        found: dict[int, list[Tensor]] = {}

        def watch(index: int, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if passing_kind(function) == "sum":
                found[index] = _variances(function, args, kwargs)

        record = record_run(objective.network, objective.forward, watch=watch)
        variants = [n for n, each in objective.network.named_modules() if isinstance(each, BatchNormVariant)]
        additions, undecided = residual_additions(record, variants)
        if not additions:
            raise BatchNormError(
                f"{type(objective.network).__name__} has no residual addition: expected x + f(x), two values of one "
                f"shape that come from the same value, found {len(found)} other additions in its forward pass."
            )
        inputs = [
            dict(zip(record.operations[each.operation].inputs, found[each.operation], strict=True))
            for each in additions
        ]
        pairs = [(values[each.skip], values[each.branch]) for each, values in zip(additions, inputs, strict=True)]
        # One transfer, whatever the number of blocks.
        variances = torch.stack([side.to(pairs[0][0].device) for pair in pairs for side in pair]).view(-1, 2).tolist()
    names = _numbered(each.module for each in additions)
    return BranchVariance(
        tuple(BlockVariance(name, skip, branch) for name, (skip, branch) in zip(names, variances, strict=True)),
        undecided,
    )


def effective_depth(shares: Iterable[float]) -> float:
    """Return how many branches a path through the network passes on average, weighed by the variance it carries.

    Of what leaves block l, a share p_l has come through its branch and 1 − p_l past it, so it is Σp_l. It is d/2 where
    all d blocks add equal sides, and 1/2 + 1/3 + … + 1/(d + 1), about ln d, where each branch is normalized.

    Args:
        shares: branch / (skip + branch) at each addition.

    Example:
        >>> effective_depth([0.5] * 100), round(effective_depth(1 / (l + 1) for l in range(1, 101)), 2)
        (50.0, 4.2)

    Reference:
        De & Smith, arXiv:2002.10444, §3, on the depth of a typical path.
    """
    return math.fsum(shares)


def _variances(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Measure each different tensor that is added, as it is added."""
    tensors = {id(each): each for each in iter_tensors((args, dict(kwargs)))}
    blocks = [activation_statistics(each.reshape(-1))[:, 0] for each in tensors.values()]
    factors = [1.0, float(kwargs.get("alpha", 1))] if function_name(function).startswith("add") else []
    return [
        block[Row.M2] / block[Row.COUNT] * factor**2
        for block, factor in zip(blocks, [*factors, *[1.0] * len(blocks)], strict=False)
    ]


def _numbered(names: Iterable[str]) -> list[str]:
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        shown = name or "(root)"
        found.append(shown if seen[name] == 1 else f"{shown} #{seen[name]}")
    return found
