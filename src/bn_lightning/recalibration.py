"""Population statistics: measure them as Algorithm 2 does, and write them into the running statistics."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning.errors import BatchNormError, RecalibrationError, first_line
from bn_lightning.functional import ChannelMoments, batch_moments, channel_gap, layer_gap
from bn_lightning.layers.base import unlike_population
from bn_lightning.layers.frozen import FrozenBatchNorm
from bn_lightning.preservation import eagerly, out_of_inference_mode, preserved
from bn_lightning.reports.table import Table
from bn_lightning.selection import describe, failing_layer, named_batch_norms, require_batch_norms, unwrap

__all__ = [
    "LayerPopulation",
    "RecalibratedLayer",
    "RecalibrationResult",
    "population_statistics",
    "recalibrate_batch_norm",
]

Forward = Callable[[nn.Module, Any], object]


@dataclass(frozen=True, slots=True)
class LayerPopulation:
    """What one BN layer's input was over all batches.

    Attributes:
        moments: Pooled over every value the layer was given, in float64; ``count`` 0 if it never ran.
        calls: How often the layer ran, several times a batch if it is shared.
        batches: How many batches the model was given.
        frozen: Whether the model is in training mode and the layer trains on its running statistics, being a
            `FrozenBatchNorm` or in evaluation mode. It then normalized by them here too.
        unlike: Why the layer's running statistics are not to be compared with these, if so: a variant's may be others
            than mean and variance of all it is given.
    """

    moments: ChannelMoments
    calls: int
    batches: int
    frozen: bool
    unlike: str | None


@dataclass(frozen=True, slots=True)
class RecalibratedLayer:
    """One row of a `RecalibrationResult`.

    Attributes:
        name: The layer.
        count: Values per channel behind the population statistics.
        gap: How far evaluation's output was off before, in its standard deviations; ``None`` where unknown.
        reason: Why the layer was left as it was, or ``None`` if it was recalibrated.
    """

    name: str
    count: int
    gap: float | None
    reason: str | None

    def to_dict(self) -> dict[str, str | int | float | None]:
        """Return the fields."""
        return {"name": self.name, "count": self.count, "gap": self.gap, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class RecalibrationResult:
    """What `recalibrate_batch_norm` did, and the way back.

    Attributes:
        rows: One per selected layer, in registration order.
        batches: How many batches were measured.
    """

    rows: tuple[RecalibratedLayer, ...]
    batches: int
    _before: tuple[tuple[_BatchNorm, Tensor, Tensor], ...] = field(repr=False, compare=False)

    def undo(self) -> None:
        """Put the former running statistics back, bit for bit, whatever they became since."""
        for layer, mean, var in self._before:
            _write(layer, mean, var)

    def to_dict(self) -> dict[str, object]:
        """Return plain values."""
        return {"batches": self.batches, "layers": [row.to_dict() for row in self.rows]}

    def __str__(self) -> str:
        return str(self._table())

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()

    def _table(self) -> Table:
        done = sum(row.reason is None for row in self.rows)
        return Table(
            f"recalibrated {done} of {len(self.rows)} BatchNorm layers on {_batches(self.batches)}",
            ("layer", "gap before (output std)", "values per channel", "left as it was because"),
            [(row.name or "(root)", row.gap, row.count, row.reason) for row in self.rows],
        )


def population_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    max_batches: int = 200,
    forward: Forward | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
) -> dict[str, LayerPopulation]:
    """Measure every selected BN layer's input over the data, under the present weights.

    The selected layers normalize by batch statistics, so that each layer sees what it sees in training, whatever the
    running statistics before it say; everything else (dropout, layers not selected) is in evaluation mode. A layer that
    is in evaluation mode inside a model in training mode counts as frozen and stays so: it is measured, but it
    normalizes by its running statistics. The model is given back bit for bit, also after an error.

    Args:
        model: The network; DDP and ``torch.compile`` wrappers are looked through.
        batches: Tensors, or tuples or lists whose first element is the input, moved to the model's device; anything
            else with ``forward``. Unequal and empty batches are welcome: values weigh equally, not batches.
        max_batches: Take at most so many batches; a generator may be given.
        forward: A function ``(model, batch) -> output`` for other batches; it moves them itself.
        include: Name patterns (``fnmatch``) of the BN layers to measure; empty means all.
        exclude: Name patterns of the BN layers to leave out.

    Returns:
        Layer name to what was measured. A layer that never ran is there with ``moments.count`` 0.

    Raises:
        RecalibrationError: If the model has no BN layer or all of them are frozen, if there is no data, if a layer that
            normalizes by batch statistics is given one value per channel, or if a batch is of unknown structure.
        BatchNormError: If a pattern matches no BN layer.

    Example:
        >>> population_statistics(nn.BatchNorm1d(1), [torch.tensor([[1.0], [3.0]])])[""].moments.mean
        tensor([2.], dtype=torch.float64)

    Reference:
        Ioffe & Szegedy, arXiv:1502.03167, Alg. 2; Wu & Johnson, arXiv:2105.07576, §3.
    """
    model = unwrap(model)
    layers = require_batch_norms(model, include, exclude, error=RecalibrationError)
    batches = _checked(batches, max_batches)
    frozen = {
        name
        for name, layer in layers.items()
        if model.training and (isinstance(layer, FrozenBatchNorm) or not layer.training)
    }
    if len(frozen) == len(layers):
        raise RecalibrationError(
            f"every selected BatchNorm layer of {type(model).__name__} ({describe(layers)}) is frozen: in evaluation "
            "mode, or a FrozenBatchNorm, inside a model in training mode. Call model.eval() first to measure them all "
            "the same."
        )
    seen: dict[str, tuple[ChannelMoments, int]] = {}
    taken = 0

    def observe(name: str, x: Tensor) -> None:
        new = batch_moments(x)
        moments, calls = seen.get(name, (new, 0))
        seen[name] = (moments.merge(new) if calls else new, calls + 1)

    with preserved(model), out_of_inference_mode(), eagerly(), ExitStack() as hooks:
        for module in model.modules():
            module.training = False  # not .eval(): an overridden .train() may rebuild the module
        for name in layers.keys() - frozen:
            layers[name].training = True
            # Written statistics would outdate the graph of a forward pass that still waits for its backward.
            layers[name].track_running_stats = False
        for name, layer in named_batch_norms(model).items():
            hooks.enter_context(_input_hook(name, layer, observe if name in layers else None))
        for batch in islice(batches, max_batches):
            taken += 1
            if forward is None:
                _forward_first(model, batch)
            else:
                forward(model, _cloned_from_inference(batch))
    if not taken:
        raise RecalibrationError(
            "batches gave no data: an empty loader, or a generator that was already used up? Pass a fresh one."
        )
    nothing = (batch_moments(torch.empty(0, 0)), 0)
    return {
        name: LayerPopulation(*seen.get(name, nothing), taken, name in frozen, unlike_population(layer))
        for name, layer in layers.items()
    }


def recalibrate_batch_norm(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    max_batches: int = 200,
    forward: Forward | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
) -> RecalibrationResult:
    """Replace running statistics by population statistics, in place ("precise BN").

    ``running_mean`` becomes the mean over all values, ``running_var`` their variance with correction=1, which is both
    Algorithm 2's and torch's own convention. ``num_batches_tracked`` goes on counting training batches, untouched.
    Arguments, and which layers count as frozen, are as in `population_statistics`; a layer that is frozen or never
    ran is left as it was and is a row with that reason. Either all layers are written or none.

    Raises:
        RecalibrationError: As `population_statistics`, and if a selected layer has no running statistics to write to,
            or if population statistics are not finite in the buffers' dtype.
        BatchNormError: If a pattern matches no BN layer.

    Example:
        >>> bn = nn.BatchNorm1d(1)
        >>> result = recalibrate_batch_norm(bn, [torch.tensor([[1.0], [3.0]]), torch.tensor([[8.0]] * 3)])
        >>> bn.running_mean, bn.running_var
        (tensor([5.6000]), tensor([11.3000]))
        >>> result.undo()
        >>> bn.running_mean
        tensor([0.])

    Reference:
        Ioffe & Szegedy, arXiv:1502.03167, Alg. 2; Wu & Johnson, arXiv:2105.07576, §3.
    """
    layers = require_batch_norms(unwrap(model), include, exclude, error=RecalibrationError)
    for name, layer in layers.items():
        if layer.running_mean is None or layer.running_var is None:
            raise RecalibrationError(
                f"{name!r} ({type(layer).__name__}) has no running statistics to recalibrate "
                f"(track_running_stats={layer.track_running_stats}): it normalizes by the batch in evaluation too. "
                f"Leave it out with exclude=({name!r},), or build it with track_running_stats=True."
            )
    measured = population_statistics(
        model, batches, max_batches=max_batches, forward=forward, include=include, exclude=exclude
    )
    rows, planned, before = [], [], []
    for name, population in measured.items():
        layer, moments = layers[name], population.moments
        assert layer.running_mean is not None
        assert layer.running_var is not None
        reason, gap = _reason_to_leave(population), None
        if moments.count > 1 and population.unlike is None:
            mean, var = moments.mean, moments.var(correction=1)
            channels = channel_gap(layer.running_mean.to(mean), layer.running_var.to(mean), mean, var, layer.eps)
            gap = float(layer_gap(channels, None if layer.weight is None else layer.weight.detach()))
            if reason is None:
                planned.append((layer, _finite(name, mean, layer.running_mean), _finite(name, var, layer.running_var)))
                before.append((layer, layer.running_mean.clone(), layer.running_var.clone()))
        rows.append(RecalibratedLayer(name, moments.count, gap, reason))
    result = RecalibrationResult(tuple(rows), next(iter(measured.values())).batches, tuple(before))
    try:
        for layer, mean, var in planned:
            _write(layer, mean, var)
    except BaseException:
        result.undo()
        raise
    return result


def _reason_to_leave(population: LayerPopulation) -> str | None:
    if population.moments.count == 0:
        return f"never reached in {_batches(population.batches)}"
    if population.frozen:
        return "frozen: it trains on its running statistics; call model.eval() first to include it"
    return population.unlike


def _finite(name: str, value: Tensor, buffer: Tensor) -> Tensor:
    """Cast to the buffer's dtype, refusing what would not be finite there."""
    cast = value.to(buffer.dtype)
    bad = (~torch.isfinite(cast)).nonzero().flatten().tolist()
    if bad:
        raise RecalibrationError(
            f"population statistics of {name!r} are not finite in {len(bad)} of {cast.numel()} channels "
            f"(channel {bad[0]}: {float(value[bad[0]])} as {buffer.dtype}). Nothing was written. Look for the first "
            f"layer with non-finite activations (bn_lightning.observe_activations), or leave it out with exclude=."
        )
    return cast


@torch.inference_mode(False)
@torch.no_grad()
def _write(layer: _BatchNorm, mean: Tensor, var: Tensor) -> None:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(var)


def _checked(batches: Iterable[Any], max_batches: int) -> Iterable[Any]:
    if isinstance(max_batches, bool) or not isinstance(max_batches, int) or max_batches < 1:
        raise RecalibrationError(f"max_batches must be a positive whole number, got {max_batches!r}.")
    if isinstance(batches, Tensor | dict | str) or not isinstance(batches, Iterable):
        raise RecalibrationError(
            f"batches must be an iterable of batches (a DataLoader, a list, a generator), got a "
            f"{type(batches).__name__}. Wrap a single batch in a list: [batch]."
        )
    return batches


@contextmanager
def _input_hook(name: str, layer: _BatchNorm, observe: Callable[[str, Tensor], None] | None) -> Iterator[None]:
    """Watch a layer's input, and refuse one value per channel before torch does without a name."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, Tensor) or x.dim() < 2:
            return  # the layer's own error says it best
        by_batch = module.training or layer.running_mean is None
        if by_batch and x.numel() == x.shape[1]:
            raise RecalibrationError(
                f"{name!r} ({type(layer).__name__}) was given an input of shape {tuple(x.shape)}: one value per "
                "channel has no variance to normalize by. Use larger batches (drop_last=True drops a short last one)."
            )
        if observe is not None:
            observe(name, x)

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _forward_first(model: nn.Module, batch: Any) -> None:
    x = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(x, Tensor):
        listed = isinstance(batch, tuple | list) and batch
        inside = f" whose first element is a {type(batch[0]).__name__}" if listed else ""
        raise RecalibrationError(
            f"expected a batch that is a tensor or an (input, target, …) tuple, got a {type(batch).__name__}{inside}. "
            "Say how to run the model on it: forward=lambda model, batch: model(...)."
        )
    first = next(chain(model.parameters(), model.buffers()), x)
    try:
        model(_cloned_from_inference(x).to(first.device))
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, BatchNormError | torch.OutOfMemoryError):
            raise
        layer = failing_layer(model, error)
        raise RecalibrationError(
            f"{type(model).__name__} cannot be run on an input of shape {tuple(x.shape)} and dtype {x.dtype}"
            + (f"; it fails in layer {layer!r}" if layer else "")
            + f" with {first_line(error)}. Give batches whose first element fits its forward, or say how to run it: "
            "forward=lambda model, batch: model(...)."
        ) from error


def _cloned_from_inference(batch: Any) -> Any:
    """Replace inference tensors, which may not be used outside inference mode, in the usual containers."""
    if isinstance(batch, Tensor):
        return batch.clone() if batch.is_inference() else batch
    if type(batch) in (tuple, list):
        return type(batch)(map(_cloned_from_inference, batch))
    if type(batch) is dict:
        return {key: _cloned_from_inference(value) for key, value in batch.items()}
    return batch


def _batches(count: int) -> str:
    return f"{count} {'batch' if count == 1 else 'batches'}"
