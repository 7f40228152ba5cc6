"""How much faster one network runs than another, on a machine that drifts."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from bn_lightning.preservation import out_of_inference_mode

__all__ = ["SpeedComparison", "compare_speed"]


@dataclass(frozen=True, slots=True)
class SpeedComparison:
    """Medians over alternating runs.

    Attributes:
        before: Milliseconds a forward pass of the first network, median.
        after: Milliseconds a forward pass of the second network, median.
        speedup: Median of the ratios before / after of neighbouring runs, which drift leaves alone.
        rounds: Pairs of runs behind the medians.
    """

    before: float
    after: float
    speedup: float
    rounds: int

    def __str__(self) -> str:
        return (
            f"{self.speedup:.2f}× as fast (median over {self.rounds} neighbouring pairs of forward passes; "
            f"medians apart: {self.before:.2f} ms → {self.after:.2f} ms)"
        )

    def to_dict(self) -> dict[str, float]:
        """Return the attributes as plain values."""
        return {"before": self.before, "after": self.after, "speedup": self.speedup, "rounds": self.rounds}


def compare_speed(
    before: nn.Module, after: nn.Module, inputs: Tensor | tuple[Any, ...] | Mapping[str, Any], *, rounds: int = 50
) -> SpeedComparison:
    """Time the forward passes of two networks in turn, A B, A B and so on.

    Args:
        before: The first network, as it is: call ``.eval()`` first.
        after: The second network.
        inputs: What both forwards take: a tensor, positional arguments, or keyword arguments.
        rounds: Counted pairs, after three that are not.

    Example:
        >>> net = nn.Linear(4, 4)
        >>> compare_speed(net, net, torch.zeros(1, 4), rounds=3).rounds
        3
    """
    with out_of_inference_mode():
        pairs = [(_seconds(before, inputs), _seconds(after, inputs)) for _ in range(rounds + 3)][3:]
    return SpeedComparison(
        before=median(first for first, _ in pairs) * 1e3,
        after=median(second for _, second in pairs) * 1e3,
        speedup=median(first / second for first, second in pairs),
        rounds=rounds,
    )


def _seconds(model: nn.Module, inputs: Tensor | tuple[Any, ...] | Mapping[str, Any]) -> float:
    _wait(model)
    start = perf_counter()
    if isinstance(inputs, Mapping):
        model(**inputs)
    else:
        model(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    _wait(model)
    return perf_counter() - start


def _wait(model: nn.Module) -> None:
    device = next((parameter.device for parameter in model.parameters()), None)
    if device is not None and device.type != "cpu":
        torch.accelerator.synchronize(device)
