"""The same statistics in all processes: what each one measured, in one exchange."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.errors import BatchNormError, RecalibrationError, first_line
from bn_lightning.functional import ChannelMoments, accumulation_dtype
from bn_lightning.functional.cross_replica import gathered
from bn_lightning.layers.processes import require_agreement
from bn_lightning.recalibration.measuring import LocalPass, Tally
from bn_lightning.recalibration.spread import Spread

if TYPE_CHECKING:  # not every build of torch has it
    from torch.distributed import ProcessGroup

__all__ = ["merge_passes"]


def merge_passes(
    model: nn.Module,
    layers: Mapping[str, _BatchNorm],
    frozen: set[str],
    own: LocalPass,
    problem: Exception | None,
    group: "ProcessGroup | None",
) -> LocalPass:
    """Pool what every process measured, by Chan's formula and in the order of ranks, so that all get the same bits.

    Raises:
        RecalibrationError: In all processes, if one had a problem, which is named, or has other layers.
    """
    layout = [
        (f"{name} (frozen)".strip() if name in frozen else name, layer.num_features) for name, layer in layers.items()
    ]
    problem = problem or _narrow(layers, own)
    told = None if problem is None else str(problem) if isinstance(problem, BatchNormError) else first_line(problem)
    try:
        require_agreement(told, layout, group, task="measure population statistics", error=RecalibrationError)
    except RecalibrationError as error:
        raise error from problem
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    wide = accumulation_dtype(device)
    head = torch.tensor([own.batches, own.stopped_early], dtype=wide, device=device)
    rows = [_row(own.tallies[name], layer.num_features, head) for name, layer in layers.items()]
    # On the host from here on: many small operations, the same in every process.
    table = gathered(torch.cat([head, *rows]), group).cpu()
    widths = [len(head), *(len(row) for row in rows)]
    heads, *columns = table.split(widths, dim=1)
    tallies = {
        name: _pooled(values, layer.num_features, device)
        for (name, layer), values in zip(layers.items(), columns, strict=True)
    }
    return LocalPass(tallies, int(heads[:, 0].sum()), bool(heads[:, 1].any()), own.left_out)


def _narrow(layers: Mapping[str, _BatchNorm], own: LocalPass) -> RecalibrationError | None:
    for name, layer in layers.items():
        tally = own.tallies[name] if own.tallies else Tally()
        if tally.moments.count and len(tally.moments.mean) != layer.num_features:
            return RecalibrationError(
                f"{name!r} ({type(layer).__name__}) has num_features={layer.num_features} and was given "
                f"{len(tally.moments.mean)} channels."
            )
    return None


def _row(tally: Tally, channels: int, like: Tensor) -> Tensor:
    """Write a layer's numbers in a row: count, calls, batches; mean, m2, shift, sums and products of each channel."""
    counts = like.new_tensor([tally.moments.count, tally.calls, tally.spread.batches])
    if not tally.moments.count:
        return torch.cat([counts, like.new_zeros(15 * channels)])
    spread = tally.spread
    parts = (tally.moments.mean, tally.moments.m2, spread.shift, spread.sums, spread.products)
    return torch.cat([counts, *(part.to(like).reshape(-1) for part in parts)])


def _pooled(values: Tensor, channels: int, device: torch.device) -> Tally:
    total = Tally()
    for row in values:
        count, calls, batches = map(int, row[:3])
        mean, m2, shift, rest = row[3:].split([channels, channels, channels, 12 * channels])
        total.calls += calls
        if not count:
            continue
        total.moments = total.moments.merge(ChannelMoments(count, mean, m2))
        theirs = Spread()
        theirs.batches, theirs.shift = batches, shift
        theirs.sums, theirs.products = rest.view(12, channels).split([3, 9])
        theirs.products = theirs.products.view(3, 3, channels)
        total.spread.merge(theirs)
    moments = total.moments
    total.moments = ChannelMoments(moments.count, moments.mean.to(device), moments.m2.to(device))
    return total
