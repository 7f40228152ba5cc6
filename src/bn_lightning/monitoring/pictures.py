"""Which statistic is drawn how."""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from bn_lightning.errors import BatchNormError
from bn_lightning.reports.heatmap import heat_map
from bn_lightning.reports.profile import Profile, profile_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bn_lightning.monitoring.columns import History
    from bn_lightning.monitoring.snapshot import ActivationSnapshot

__all__ = ["channel_map", "depth_profile", "history_map"]

# What the values are, and how they are drawn.
_STYLES: dict[str, tuple[str, dict[str, Any]]] = {
    "mean": ("mean of {}, {}", {"scale": "diverging"}),
    "std": ("standard deviation of {}, {}", {"scale": "log"}),
    "min": ("smallest value of {}, {}", {"scale": "diverging"}),
    "max": ("largest value of {}, {}", {"scale": "diverging"}),
    "rms": ("root mean square of {}, {}", {"scale": "log"}),
    "zero_fraction": ("share of exact zeros in {}", {"limits": (0.0, 1.0)}),
    "dead_fraction": ("share of dead channels, 0 throughout a sample, in {}", {"limits": (0.0, 1.0)}),
    "drift": ("how far running means are behind the batches' means, in running σ", {"scale": "log"}),
    "noise": ("how much batch means vary from step to step, in running σ", {"scale": "log"}),
    "dead": ("share of channels that a ReLU behind BatchNorm would leave at zero", {"limits": (0.0, 1.0)}),
}
_OF_CHANNELS = ("mean", "std", "min", "max", "rms", "zero_fraction")
# What they are of, and their unit.
_SUBJECTS = {
    "activations": ("{}'s output", "activation units"),
    "gradients": ("the gradient at {}'s output", "loss per activation unit"),
}
_PERCENTILES = 101


def history_map(history: "History", stat: str) -> "Figure":
    """Draw a statistic as layer × step.

    Raises:
        BatchNormError: If there is no such statistic, nothing was sampled, or there is no layer.
    """
    title, style = _style(stat, history.maps)
    if not history.steps:
        raise BatchNormError("nothing was sampled yet: train for at least one sampled optimizer step first.")
    if not history.layers:
        raise BatchNormError("there is nothing to draw: the network has no layer to watch.")
    breaks = _changes(history.steps)
    merged = max(history.samples)
    xlabel = f"optimizer step, one column {'a sample' if merged == 1 else f'for {merged} samples'}"
    return heat_map(
        history.values(stat).masked_fill(history.spoiled(stat), torch.inf).numpy(),
        history.layers,
        history.steps,
        title=title.format(*_subject(history.kind, "each layer")),
        xlabel=xlabel + ("; at the line their distance changes" if breaks else ""),
        breaks=breaks,
        **style,
    )


def channel_map(snapshot: "ActivationSnapshot", stat: str) -> "Figure":
    """Draw a statistic as layer × channel, each layer's channels sorted from smallest to largest.

    Raises:
        BatchNormError: If there is no such statistic, or nothing was measured.
    """
    title, style = _style(stat, _OF_CHANNELS)
    if not any(block.numel() for block in snapshot.blocks.values()):
        raise BatchNormError(f"there is nothing to draw: none of the {len(snapshot.blocks)} watched layers has values.")
    position = torch.linspace(0, 1, _PERCENTILES, dtype=torch.float64, device="cpu")
    rows = torch.full((len(snapshot.blocks), _PERCENTILES), torch.nan, dtype=torch.float64, device="cpu")
    for row, name in zip(rows, snapshot.blocks, strict=True):
        channels = snapshot.channels(name)
        values = getattr(channels, stat)
        # NaN stands for a channel without values.
        values, _ = values.masked_fill((channels.nonfinite > 0) & ~values.isfinite(), torch.inf).sort()
        if values.numel():
            row.copy_(values[(position * (values.numel() - 1)).round().long()])
    return heat_map(
        rows.numpy(),
        list(snapshot.blocks),
        [f"{100 * fraction:.0f} %" for fraction in position.tolist()],
        title=title.format(*_subject(snapshot.kind, "each channel")),
        xlabel="channels of the layer, from smallest to largest",
        **style,
    )


def depth_profile(snapshot: "ActivationSnapshot", earlier: "ActivationSnapshot | None" = None) -> "Figure":
    """Draw mean ± std, std and zeros of the layers that have values, in order of execution from left to right.

    Args:
        snapshot: What is drawn.
        earlier: Another sample of the same network, drawn faintly.

    Raises:
        BatchNormError: If no layer has values.
    """
    rows = {name: row for name, row in snapshot.rows.items() if row.count}
    if not rows:
        raise BatchNormError(f"there is nothing to draw: none of the {len(snapshot.rows)} watched layers has values.")
    subject, unit = _subject(snapshot.kind, "each layer")
    at = "" if snapshot.step is None else f" at optimizer step {snapshot.step}"
    before = None
    if earlier is not None:
        before = ("earlier" if earlier.step is None else f"step {earlier.step}", _profile(rows, earlier))
    return profile_figure(
        list(rows),
        _profile(rows, snapshot),
        title=f"{subject}{at}, in order of execution",
        unit=unit,
        nonfinite=[row.nonfinite > 0 for row in rows.values()],
        earlier=before,
    )


def _profile(names: Iterable[str], snapshot: "ActivationSnapshot") -> Profile:
    rows = [snapshot.rows.get(name) for name in names]
    return Profile(
        *(
            [math.nan if row is None else getattr(row, stat) for row in rows]
            for stat in ("mean", "std", "zero_fraction")
        )
    )


def _subject(kind: str, of: str) -> tuple[str, str]:
    subject, unit = _SUBJECTS[kind]
    return subject.format(of), unit


def _style(stat: str, known: Sequence[str]) -> tuple[str, dict[str, Any]]:
    if stat not in known:
        raise BatchNormError(f"there is no heat map of {stat!r}: choose one of {', '.join(known)}.")
    return _STYLES[stat]


def _changes(steps: list[int]) -> list[int]:
    """Find the samples from which on the distance to the next is another; the step in between is not a second change.

    Example:
        >>> _changes([0, 1, 2, 50, 100, 150]), _changes([0, 50, 100])
        ([3], [])
    """
    gaps = [after - before for before, after in pairwise(steps)]
    changes: list[int] = []
    for index, (before, after) in enumerate(pairwise(gaps)):
        if before != after and (not changes or changes[-1] != index + 1):
            changes.append(index + 2)
    return changes
