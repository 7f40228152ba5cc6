"""Which statistic is drawn how."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bn_lightning.errors import BatchNormError
from bn_lightning.reports.heatmap import heat_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bn_lightning.monitoring.history import ActivationHistory
    from bn_lightning.monitoring.snapshot import ActivationSnapshot

__all__ = ["channel_map", "history_map"]

_STYLES: dict[str, dict[str, Any]] = {
    "mean": {"label": "mean, activation units"},
    "std": {"label": "standard deviation, activation units", "log": True},
    "min": {"label": "smallest value, activation units"},
    "max": {"label": "largest value, activation units"},
    "rms": {"label": "root mean square, activation units", "log": True},
    "zero_fraction": {"label": "share of values that are exactly 0", "limits": (0.0, 1.0)},
}
_PERCENTILES = 101


def history_map(history: "ActivationHistory", stat: str) -> "Figure":
    """Draw a statistic as layer × step.

    Raises:
        BatchNormError: If there is no such statistic, or nothing was sampled.
    """
    style = _style(stat)
    if not history.steps:
        raise BatchNormError("nothing was sampled yet: train for at least one sampled optimizer step first.")
    values = _shown(history.values(stat), history.values("nonfinite"))
    return heat_map(
        values.numpy(),
        history.layers,
        history.steps,
        title=f"activations: {stat}",
        xlabel="optimizer step (one column a sample)",
        **style,
    )


def channel_map(snapshot: "ActivationSnapshot", stat: str) -> "Figure":
    """Draw a statistic as layer × channel, each layer's channels sorted from smallest to largest.

    Raises:
        BatchNormError: If there is no such statistic, or no layer.
    """
    style = _style(stat)
    position = torch.linspace(0, 1, _PERCENTILES, dtype=torch.float64)
    rows = torch.full((len(snapshot.blocks), _PERCENTILES), torch.nan, dtype=torch.float64)
    for row, name in zip(rows, snapshot.blocks, strict=True):
        channels = snapshot.channels(name)
        values, _ = _shown(getattr(channels, stat), channels.nonfinite).sort()
        if values.numel():
            row.copy_(values[(position * (values.numel() - 1)).round().long()])
    return heat_map(
        rows.numpy(),
        list(snapshot.blocks),
        [f"{100 * fraction:.0f} %" for fraction in position.tolist()],
        title=f"activations: {stat} of each channel",
        xlabel="channels of the layer, from smallest to largest",
        **style,
    )


def _style(stat: str) -> dict[str, Any]:
    if stat not in _STYLES:
        raise BatchNormError(f"there is no heat map of {stat!r}: choose one of {', '.join(_STYLES)}.")
    return _STYLES[stat]


def _shown(values: Tensor, nonfinite: Tensor) -> Tensor:
    """Mark as infinite what a NaN or infinity has spoiled: NaN stands for a layer that was not called."""
    return torch.where((nonfinite > 0) & ~values.isfinite(), torch.inf, values)
