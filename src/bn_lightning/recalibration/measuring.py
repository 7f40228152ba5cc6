"""One process's pass over its batches: every layer's moments, taken while the model runs."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import reduce
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from bn_lightning.errors import SingleValueError
from bn_lightning.functional import ChannelMoments, batch_moments
from bn_lightning.layers.renorm_schedule import RenormSchedule
from bn_lightning.preservation import eagerly, out_of_inference_mode, preserved
from bn_lightning.recalibration.batches import Forward, run_on
from bn_lightning.recalibration.spread import Spread
from bn_lightning.reports.progress import progress
from bn_lightning.selection import named_batch_norms

__all__ = ["EarlyStop", "LocalPass", "Tally", "measure_locally"]

# From so many batches on a standard error estimated from them is itself known to a sixth, 1/√(2(B − 1)), or better.
_FEWEST, _EVERY = 20, 5


@dataclass(slots=True)
class Tally:
    """What one layer was given so far."""

    moments: ChannelMoments = field(default_factory=lambda: batch_moments(torch.empty(0, 0)))
    calls: int = 0
    spread: Spread = field(default_factory=Spread)

    def add(self, calls: list[ChannelMoments]) -> None:
        """Count in all that a batch gave it, several calls or one."""
        batch = reduce(ChannelMoments.merge, calls)
        self.calls += len(calls)
        if batch.count:
            self.moments = self.moments.merge(batch)
            self.spread.add(batch)


@dataclass(slots=True)
class LocalPass:
    """What a pass over this process's batches gave.

    Attributes:
        tallies: One per layer, those never reached included.
        batches: How many were measured.
        stopped_early: Whether more were to be had.
        left_out: Why the last batch that was left out had to be.
    """

    tallies: dict[str, Tally]
    batches: int = 0
    stopped_early: bool = False
    left_out: SingleValueError | None = None


@dataclass(frozen=True, slots=True)
class EarlyStop:
    """When to stop drawing batches: once every judged layer's `Spread.standard_error` is below the tolerance.

    Attributes:
        tolerance: In σ; 0 never stops.
        eps: That of each layer to judge by.
    """

    tolerance: float
    eps: Mapping[str, float]

    def is_reached(self, done: LocalPass) -> bool:
        """Tell, at every fifth batch from the twentieth on, by one number that leaves the device."""
        if not self.tolerance or done.batches < _FEWEST or done.batches % _EVERY:
            return False
        spreads = {name: done.tallies[name].spread for name in self.eps if done.tallies[name].calls}
        # A layer that few batches reached is not known well, whatever they say.
        if not spreads or min(spread.batches for spread in spreads.values()) < _FEWEST:
            return False
        errors = [spread.standard_error(self.eps[name]) for name, spread in spreads.items()]
        return bool(torch.stack([error.to(errors[0].device) for error in errors]).max() < self.tolerance)


def measure_locally(
    model: nn.Module,
    layers: Mapping[str, _BatchNorm],
    frozen: Iterable[str],
    batches: Iterable[Any],
    max_batches: int,
    forward: Forward | None,
    stop: EarlyStop,
    on_single_value: Callable[[SingleValueError], None] | None,
    show_progress: bool,
) -> LocalPass:
    """Run the model on the batches, all but ``frozen`` among the layers normalizing by each batch's statistics."""
    done = LocalPass({name: Tally() for name in layers})
    by_batch = layers.keys() - set(frozen)
    total = _count(batches, max_batches)
    staged: dict[str, list[ChannelMoments]] = {}
    with (
        preserved(model),
        out_of_inference_mode(),
        eagerly(),
        ExitStack() as hooks,
        progress("measuring batches", total, show=show_progress) as advance,
    ):
        for module in model.modules():
            module.training = False  # not .eval(): an overridden .train() may rebuild the module
        for name, layer in named_batch_norms(model).items():
            observe = staged.setdefault(name, []).append if name in layers else None
            hooks.enter_context(_watched(name, layer, name in by_batch, observe))
        for batch in islice(batches, max_batches):
            for calls in staged.values():
                calls.clear()
            try:
                run_on(model, batch, forward)
            except SingleValueError as error:
                if on_single_value is None:
                    raise
                done.left_out = error
                on_single_value(error)
                continue
            done.batches += 1
            # Only now: a batch counts in all layers or in none.
            for name, calls in staged.items():
                if calls:
                    done.tallies[name].add(calls)
            advance()
            if done.batches < total and stop.is_reached(done):
                done.stopped_early = True
                break
    return done


def _count(batches: Iterable[Any], max_batches: int) -> int:
    try:
        return min(len(batches), max_batches)  # type: ignore[arg-type]
    except TypeError:  # a generator, or a loader over one
        return max_batches


@contextmanager
def _watched(
    name: str, layer: _BatchNorm, by_batch: bool, observe: Callable[[ChannelMoments], None] | None
) -> Iterator[None]:
    """Measure a layer's input, have it normalized by its own statistics, and refuse one value per channel by name."""
    given = by_batch and _takes_given_statistics(layer)
    if by_batch and not given:
        layer.training = True
        # Written statistics would outdate the graph of a forward pass that still waits for its backward.
        layer.track_running_stats = False
    needs_variance = by_batch or layer.running_mean is None
    dtype = _statistics_dtype(layer)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, Tensor) or x.dim() < 2:
            return  # the layer's own error says it best
        if needs_variance and x.numel() == x.shape[1]:
            raise SingleValueError(
                f"{name!r} ({type(layer).__name__}) was given an input of shape {tuple(x.shape)}: one value per "
                "channel has no variance to normalize by. Use larger batches (drop_last=True drops a short last one).",
                name,
                tuple(x.shape),
            )
        if observe is None:
            return
        moments = batch_moments(x)
        observe(moments)
        if given and moments.count:
            # Not into the buffers, which are put back as the objects they are.
            layer.running_mean = moments.mean.to(dtype or x.dtype)
            layer.running_var = moments.var(correction=0).to(dtype or x.dtype)

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _takes_given_statistics(layer: _BatchNorm) -> bool:
    """Tell whether evaluation with a batch's statistics in place of the running ones is what training does to it.

    It then costs no second pass over the batch, and no collective: processes may have different numbers of batches.
    Batch Renormalization is among them, whose correction towards stale running statistics would be measured too.
    """
    if isinstance(layer, SyncBatchNorm | RenormSchedule):
        return True
    dtype = _statistics_dtype(layer)
    plain = type(layer).forward is _BatchNorm.forward and "forward" not in vars(layer)
    return plain and dtype not in (torch.float16, torch.bfloat16)


def _statistics_dtype(layer: _BatchNorm) -> torch.dtype | None:
    """Return what the layer's kernel wants its statistics in; ``None`` for the input's own dtype."""
    tensors = (layer.running_mean, layer.weight, layer.bias)
    return next((tensor.dtype for tensor in tensors if tensor is not None), None)
