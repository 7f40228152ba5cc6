"""What batches a layer is normalized over: their sizes, and how far their means lie apart."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.auditing.observer import Observer, each_call, each_input
from bn_lightning.functional import ChannelMoments, accumulation_dtype, batch_moments

__all__ = ["CallObserver", "LayerCalls"]


@dataclass(frozen=True, slots=True)
class LayerCalls:
    """The batches one layer was given. Of a layer that runs several times a batch, the first of these calls.

    Attributes:
        examples: Size of the first axis, batch by batch.
        values: Values per channel, batch by batch.
        by_example: Whether the first axis counts the network's examples; it does not where time or patches are in it.
        means: Each batch's mean of each channel, (batches, C), float64 on the CPU.
        within: Variance of the examples' means about their batch's mean, (C,), pooled over batches; NaN where no batch
            has two examples.
        within_squares: The same of the examples' mean squares about their batch's mean.
        per_batch: How often the layer runs, a batch.
        each: What the layer is given at the first call of a batch, at the second, and so on; empty for a layer that
            runs once.
    """

    examples: tuple[int, ...]
    values: tuple[int, ...]
    by_example: bool
    means: Tensor
    within: Tensor
    within_squares: Tensor
    per_batch: int = 1
    each: tuple[ChannelMoments, ...] = ()

    @property
    def typical_examples(self) -> float:
        """The median, which a short last batch does not move."""
        return float(median(self.examples))

    @property
    def typical_values(self) -> float:
        """The median, per channel."""
        return float(median(self.values))

    @property
    def mean(self) -> Tensor:
        """Mean over all examples, (C,)."""
        sizes = torch.tensor(self.examples, dtype=torch.float64)
        return (self.means * sizes[:, None]).sum(0) / sizes.sum()

    @property
    def between(self) -> Tensor:
        """Variance of the batches' means, (C,), times the examples a batch: `within` if examples are drawn at random.

        NaN for fewer than two batches.
        """
        sizes = torch.tensor(self.examples, dtype=torch.float64)
        squares = (self.means - self.mean).square() * sizes[:, None]
        return squares.sum(0) / max(len(self.examples) - 1, 0)

    @property
    def variance_of_mean(self) -> Tensor:
        """Squared standard error of `mean`, (C,), if examples are drawn at random."""
        return self.within / sum(self.examples)

    @property
    def variance_of_variance(self) -> Tensor:
        """Squared standard error of the variance over all, (C,), if examples are drawn at random: heavy tails count."""
        return self.within_squares / sum(self.examples)


@dataclass(frozen=True, slots=True)
class _Call:
    examples: int
    values: int
    by_example: bool
    mean: Tensor
    squares: Tensor
    fourths: Tensor
    moments: ChannelMoments | None


class CallObserver(Observer):
    """Reads every input once, for its examples' means; where a layer may run several times a batch its moments too.

    Means are added in float32 at least: 1e-6 of a channel's own mean is as fine as they tell batches apart. Beside the
    mean of each example its variance is read, for how sure a variance over all is.
    """

    passes: ClassVar[tuple[str, ...]] = ("population", "evaluation_population")

    def __init__(self) -> None:
        self._batches: dict[str, dict[str, list[list[_Call]]]] = {}
        self._pending: dict[str, list[_Call]] = {}
        self._shared: set[str] = set()
        self._examples: int | None = None
        self._pass = ""

    @contextmanager
    def watching(self, network: nn.Module, layers: Mapping[str, _BatchNorm], name: str) -> Iterator[None]:
        """Watch one pass."""
        self._pass = name
        self._batches[name] = {}
        self.begin_batch()
        with each_call(dict(network.named_modules()), self._see_first), each_input(layers, self._see):
            yield

    def begin_batch(self) -> None:
        """Forget a batch that failed."""
        self._pending, self._examples = {}, None

    def end_batch(self) -> None:
        """Keep the batch."""
        for name, calls in self._pending.items():
            self._batches[self._pass].setdefault(name, []).append(calls)
        self.begin_batch()

    def calls(self, name: str = "population") -> dict[str, LayerCalls]:
        """Tell what was seen in a pass, in the order in which layers first ran."""
        return {layer: _summary(batches) for layer, batches in self._batches.get(name, {}).items()}

    def _see_first(self, name: str, module: nn.Module, x: Tensor) -> None:
        if self._examples is None and x.dim():
            self._examples = x.shape[0]

    def _see(self, name: str, layer: _BatchNorm, x: Tensor) -> None:
        if not x.numel():
            return
        calls = self._pending.setdefault(name, [])
        if calls:
            self._shared.add(name)
        # In a layer's first batch it is not known yet whether another call comes.
        first = name not in self._batches[self._pass]
        moments = batch_moments(x) if first or name in self._shared else None
        if x.dim() == 2:
            each, inside = x.to(accumulation_dtype(x.device)), x.new_zeros(())
        else:  # each example's channels as channels of one example: one read gives mean and variance
            apart = batch_moments(x.reshape(1, -1, *x.shape[2:]))
            each, inside = apart.mean.view(x.shape[:2]), apart.var(correction=0).view(x.shape[:2])
        mean = each.mean(0)
        square = (each - mean).square()
        spread = square + inside
        fourths = (spread - spread.mean(0)).square_().sum(0)
        values = x.numel() // x.shape[1]
        calls.append(_Call(x.shape[0], values, x.shape[0] == self._examples, mean, square.sum(0), fourths, moments))


def _summary(batches: list[list[_Call]]) -> LayerCalls:
    first = [calls[0] for calls in batches]
    freedom = sum(call.examples - 1 for call in first)
    per_batch = round(median(map(len, batches)))
    each: list[ChannelMoments] = []
    for place in range(per_batch if per_batch > 1 else 0):
        merged: ChannelMoments | None = None
        for calls in batches:
            moments = calls[place].moments if place < len(calls) else None
            if moments is not None:
                merged = moments if merged is None else merged.merge(moments)
        if merged is not None:
            each.append(ChannelMoments(merged.count, merged.mean.cpu().double(), merged.m2.cpu().double()))
    return LayerCalls(
        tuple(call.examples for call in first),
        tuple(call.values for call in first),
        all(call.by_example for call in first),
        torch.stack([call.mean for call in first]).cpu().double(),
        _over(freedom, [call.squares for call in first]),
        _over(freedom, [call.fourths for call in first]),
        per_batch,
        tuple(each) if len(each) == per_batch else (),
    )


def _over(freedom: int, parts: list[Tensor]) -> Tensor:
    """Divide a sum by its degrees of freedom: NaN where there are none."""
    total = torch.stack(parts).sum(0)
    return (total / freedom if freedom else total * torch.nan).cpu().double()
