"""Positions of sequences that hold no data: the same vector again and again, up to an end."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.auditing.observer import Observer, each_input

__all__ = ["LayerPadding", "PaddingObserver"]

# A convolution's own zeros beyond the end change a few positions before it: this share of the length is overlooked.
_MARGIN = 8


@dataclass(frozen=True, slots=True)
class LayerPadding:
    """How much of a layer's input repeats itself up to an end of the sequence.

    Attributes:
        share: Of all positions, those in such runs, beyond what the run shortest of all examples takes: a margin that
            every example has is no padding. Of rows (N·L, C) all that equal the row most often repeated.
        shortest: The shortest such run, in positions.
        longest: The longest.
        persistence: Of rows (N·L, C), how often the repeated row is followed by itself; 1 for (N, C, L).
    """

    share: float
    shortest: int
    longest: int
    persistence: float = 1.0


class PaddingObserver(Observer):
    """Looks at inputs of three axes (N, C, L) and of two (N·L, C); pictures and volumes are left alone."""

    def __init__(self) -> None:
        self._whole: dict[str, list[tuple[int, Tensor]]] = {}
        self._pending: dict[str, list[tuple[int, Tensor]]] = {}

    def watching(self, network: nn.Module, layers: Mapping[str, _BatchNorm], name: str) -> AbstractContextManager[None]:
        """Watch one pass."""
        return each_input(layers, self._see)

    def begin_batch(self) -> None:
        """Forget a batch that failed."""
        self._pending = {}

    def end_batch(self) -> None:
        """Keep the batch."""
        for name, seen in self._pending.items():
            self._whole.setdefault(name, []).extend(seen)
        self._pending = {}

    def padding(self) -> dict[str, LayerPadding]:
        """Tell what was seen, in the order in which layers first ran; layers without any repetition are left out."""
        found = {}
        for name, seen in self._whole.items():
            summary = _of_rows(seen) if seen[0][0] == 0 else _of_sequences(seen)
            if summary is not None:
                found[name] = summary
        return found

    def _see(self, name: str, layer: _BatchNorm, x: Tensor) -> None:
        if x.dim() == 3 and x.shape[2] > 2 and x.numel():
            self._pending.setdefault(name, []).append((x.shape[2], _runs_to_an_end(x)))
        elif x.dim() == 2 and x.shape[0] > 2 and x.shape[1] > 1:
            self._pending.setdefault(name, []).append((0, _repeated_rows(x)))


def _runs_to_an_end(x: Tensor) -> Tensor:
    """Count the positions of each example's longest run of equal vectors if it reaches an end, else 0: (N,)."""
    length = x.shape[2]
    differs = (x[..., 1:] != x[..., :-1]).any(1)
    at = torch.arange(1, length, device=x.device)
    last = torch.where(differs, at, 0).cummax(1).values  # where the run that holds a position begins
    runs = at + 1 - last
    longest, end = runs.max(1)
    end = end + 1
    begin = end + 1 - longest
    reaches = (end >= length - 1 - length // _MARGIN) | (begin <= length // _MARGIN)
    # An example that is constant throughout is no data cut short.
    return torch.where(reaches & (longest > 1) & (longest < length), longest, 0)


def _of_sequences(seen: list[tuple[int, Tensor]]) -> LayerPadding | None:
    runs = torch.cat([runs for _, runs in seen])
    shortest, longest = int(runs.min()), int(runs.max())
    if longest == 0:
        return None
    positions = sum(length * len(runs) for length, runs in seen)
    return LayerPadding(float((runs - shortest).sum()) / positions, shortest, longest)


def _repeated_rows(rows: Tensor) -> Tensor:
    """Take the row of the longest run; count rows, those equal to it, pairs of them, shortest and longest run."""
    differs = (rows[1:] != rows[:-1]).any(1)
    at = torch.arange(1, len(rows), device=rows.device)
    runs = at + 1 - torch.where(differs, at, 0).cummax(0).values
    equal = (rows == rows[runs.argmax() + 1]).all(1)
    ends = torch.cat([equal[:-1] & ~equal[1:], equal[-1:]])
    # Each run's length: its end less the end of the last row that is not of it.
    position = torch.arange(1, len(rows) + 1, device=rows.device)
    lengths = position - torch.where(equal, 0, position).cummax(0).values
    shortest = torch.where(ends, lengths, len(rows) + 1).min()
    longest = torch.where(ends, lengths, 0).max()
    total = torch.full_like(shortest, len(rows))
    return torch.stack([total, equal.sum(), (equal[1:] & equal[:-1]).sum(), shortest, longest])


def _of_rows(seen: list[tuple[int, Tensor]]) -> LayerPadding | None:
    total, equal, pairs = torch.stack([counts for _, counts in seen])[:, :3].sum(0).tolist()
    shortest = min(int(counts[3]) for _, counts in seen)
    longest = max(int(counts[4]) for _, counts in seen)
    if pairs == 0:
        return None
    return LayerPadding(equal / total, shortest, longest, pairs / equal)
