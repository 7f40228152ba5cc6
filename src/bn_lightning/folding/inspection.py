"""Where each BatchNorm layer stands, what feeds it, what reads it, whether it folds, and its state."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from bn_lightning.errors import FoldError
from bn_lightning.folding.norms import named_norms
from bn_lightning.folding.plan import plan_fold
from bn_lightning.folding.report import FoldRow
from bn_lightning.preservation import out_of_inference_mode, preserved
from bn_lightning.reports.table import Cell, Table
from bn_lightning.reports.tabled import Tabled
from bn_lightning.selection import unwrap
from bn_lightning.tracing.record import ForwardRecord, ModuleCall, Operation
from bn_lightning.tracing.recorder import record_forward

__all__ = ["BatchNormInspection", "InspectedBatchNorm", "inspect_batch_norm"]

_TORCH_EPS, _TORCH_MOMENTUM = 1e-5, 0.1
_MOST_READERS = 3


@dataclass(frozen=True, slots=True)
class InspectedBatchNorm:
    """One BatchNorm layer.

    Attributes:
        name: Qualified name.
        kind: Its class.
        channels: How many it has; ``None`` if it does not say.
        place: 1 for the layer that runs first, and so on; ``None`` if the inputs do not reach it.
        calls: How often one forward pass calls it.
        fed_by: What makes its input, at each call: ``function in 'module'``, or ``an input``.
        read_by: What reads its output, at each call; ``the output`` if the model returns it.
        folds: What folding would do (`FoldRow`).
        training: Its mode.
        affine: Whether it has γ or β.
        trainable: Whether γ or β is trained.
        updates: ``num_batches_tracked``; ``None`` if it does not count.
        momentum: Weight of the new batch in the running statistics; ``None`` if it averages all batches, or has none.
        eps: Added to the variance; ``None`` if it does not say.
        remarks: What is not as most layers are, in words.
    """

    name: str
    kind: str
    channels: int | None
    place: int | None
    calls: int
    fed_by: tuple[str, ...]
    read_by: tuple[str, ...]
    folds: FoldRow
    training: bool
    affine: bool
    trainable: bool
    updates: int | None
    momentum: float | None
    eps: float | None
    remarks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BatchNormInspection(Tabled):
    """What `inspect_batch_norm` found.

    Attributes:
        model: Class of the network.
        rows: One a layer, in order of execution; those that the inputs do not reach last.
        functional: One for each functional batch norm, which belongs to no layer.
        blind_spots: What the recorded forward pass could not see, in words.
    """

    model: str
    rows: tuple[InspectedBatchNorm, ...]
    functional: tuple[FoldRow, ...]
    blind_spots: tuple[str, ...]

    @property
    def summary(self) -> str:
        """One line: how many layers, and how many of them fold."""
        layers = f"{len(self.rows)} BatchNorm layer{'s' if len(self.rows) > 1 else ''}"
        alone = f"; {len(self.functional)} more by function alone" if self.functional else ""
        return f"{layers}, of which {sum(_folds(row.folds) for row in self.rows)} can be folded{alone}"

    def table(self) -> Table:
        """One row a layer; what is true of all of them stands below."""
        states = [_state(row) for row in self.rows]
        common = [each for each in states[0] if all(each in state for state in states)] if len(states) > 1 else []
        return Table(
            f"{self.model}: {self.summary}",
            ("layer", "channels", "fed by", "read by", "folds", "state"),
            [_cells(row, [each for each in _state(row) if each not in common]) for row in self.rows],
            notes=[
                *([f"all of them: {', '.join(common)}"] if common else []),
                *(f"{row.name}: {row.detail}" for row in self.functional),
                *_why(self.rows),
                *self.blind_spots,
            ],
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that go into JSON."""
        return {**asdict(self), "summary": self.summary}


def inspect_batch_norm(
    model: nn.Module, example_inputs: Any, include: Iterable[str] = (), exclude: Iterable[str] = ()
) -> BatchNormInspection:
    """Tell of each BatchNorm layer where it stands, what feeds it, what reads it, whether it folds, and its state.

    The network is run once in evaluation mode to see who makes and reads what, and a few times more by `plan_fold`.

    Args:
        model: The network. Given back bit for bit, modes included.
        example_inputs: As for `plan_fold`.
        include: Name patterns of the layers to show; empty means all.
        exclude: Name patterns of layers to leave out.

    Raises:
        FoldError: If the model has no BatchNorm layer, or cannot take the inputs.
        BatchNormError: If a pattern matches no BN layer.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> (row,) = inspect_batch_norm(net, torch.zeros(1, 3, 6, 6)).rows
        >>> row.fed_by, row.read_by, row.folds.into, row.remarks
        (("conv2d in '0'",), ("relu in '2'",), '0', ('fresh statistics', 'training mode'))
    """
    network = unwrap(model)
    layers = named_norms(network, include, exclude)
    if not layers:
        raise FoldError(f"{type(network).__name__} has no BatchNorm layer.")
    modes = {name: layer.training for name, layer in layers.items()}
    with preserved(network), out_of_inference_mode():
        network.eval()
        plan = plan_fold(network, example_inputs)
        record = record_forward(network, example_inputs)
    fates = {row.name: row for row in plan.rows}
    calls = {name: [call for call in record.module_calls if call.module == name] for name in layers}
    order = sorted((name for name in layers if calls[name]), key=lambda name: calls[name][0].first)
    places = {name: place for place, name in enumerate(order, 1)}
    rows = [
        _inspected(name, layers[name], modes[name], places.get(name), calls[name], record, fates[name])
        for name in (*order, *(name for name in layers if not calls[name]))
    ]
    everything = named_norms(network)
    functional = tuple(row for row in plan.rows if row.name not in everything)
    return BatchNormInspection(type(network).__name__, tuple(rows), functional, plan.blind_spots)


def _inspected(
    name: str,
    layer: nn.Module,
    training: bool,
    place: int | None,
    calls: list[ModuleCall],
    record: ForwardRecord,
    fate: FoldRow,
) -> InspectedBatchNorm:
    affine = [value for value in (getattr(layer, "weight", None), getattr(layer, "bias", None)) if value is not None]
    mean = getattr(layer, "running_mean", None)
    updates = getattr(layer, "num_batches_tracked", None)
    eps, momentum = getattr(layer, "eps", None), getattr(layer, "momentum", None)
    channels = getattr(layer, "num_features", None if mean is None else mean.numel())
    return InspectedBatchNorm(
        name,
        type(layer).__name__,
        channels,
        place,
        sum(call.call == 0 for call in calls),
        tuple(dict.fromkeys(source for call in calls for source in _fed_by(call, record))),
        tuple(dict.fromkeys(reader for call in calls for reader in _read_by(call, record))),
        fate,
        training,
        bool(affine),
        any(getattr(value, "requires_grad", False) for value in affine),
        None if updates is None else int(updates),
        None if mean is None else momentum,
        eps,
        tuple(_remarks(layer, training, affine, place, len(calls))),
    )


def _fed_by(call: ModuleCall, record: ForwardRecord) -> Iterator[str]:
    for value in call.inputs[:1]:
        made_by = record.producer(value)
        yield "an input" if made_by is None else str(made_by)


def _read_by(call: ModuleCall, record: ForwardRecord) -> Iterator[str]:
    for value in call.outputs[:1]:
        yield from (str(reader) for reader in record.readers(value) if not _within(call, reader))
        if record.values[value].output:
            yield "the output"


def _within(call: ModuleCall, operation: Operation) -> bool:
    return call.first <= operation.index < call.end


def _remarks(layer: nn.Module, training: bool, affine: list[Any], place: int | None, calls: int) -> Iterator[str]:
    """Say what is not as in most networks that are to be used."""
    if place is None:
        yield "not reached by these inputs"
    if calls > 1:
        yield f"called {calls} times"
    mean, var = getattr(layer, "running_mean", None), getattr(layer, "running_var", None)
    if mean is None or var is None:
        yield "no running statistics"
    elif mean.is_meta:
        yield "on the meta device"
    else:
        broken = int((~(mean.isfinite() & var.isfinite() & (var >= 0))).sum())
        if broken:
            yield f"statistics of {broken} channel{'s' if broken > 1 else ''} not finite, or of negative variance"
        elif not mean.any() and bool((var == 1).all()):
            yield "fresh statistics"
        if mean.dtype in (torch.float16, torch.bfloat16):
            yield f"statistics in {mean.dtype}".replace("torch.", "")
    if training:
        yield "training mode"
    if not affine:
        yield "no γ, β"
    elif not any(getattr(value, "requires_grad", False) for value in affine):
        yield "γ, β not trained"
    eps, momentum = getattr(layer, "eps", None), getattr(layer, "momentum", _TORCH_MOMENTUM)
    if eps is not None and not math.isclose(eps, _TORCH_EPS):
        yield f"eps {eps:g}"
    if mean is not None and momentum is None:
        yield "averages all batches"
    elif mean is not None and momentum != _TORCH_MOMENTUM:
        yield f"momentum {momentum:g}"


def _state(row: InspectedBatchNorm) -> list[str]:
    return [*([f"{row.updates} updates"] if row.updates is not None else []), *row.remarks]


def _cells(row: InspectedBatchNorm, state: list[str]) -> list[Cell]:
    return [
        row.name or "(root)",
        row.channels,
        _first(row.fed_by) or None,
        _first(row.read_by) or None,
        f"→ {row.folds.into or row.folds.action}" if _folds(row.folds) else f"no: {row.folds.reason}",
        ", ".join(state) or None,
    ]


def _why(rows: tuple[InspectedBatchNorm, ...]) -> Iterator[str]:
    """Tell once for each reason why a layer does not fold, by the first layer that has it."""
    told: dict[str, FoldRow] = {}
    for row in rows:
        if not _folds(row.folds):
            told.setdefault(row.folds.reason, row.folds)
    for reason, fold in told.items():
        yield f"{reason}, in {fold.name!r}: {fold.detail}"


def _folds(row: FoldRow) -> bool:
    return row.action not in ("kept", "affine")


def _first(names: tuple[str, ...]) -> str:
    more = len(names) - _MOST_READERS
    return ", ".join(names[:_MOST_READERS]) + (f" and {more} more" if more > 0 else "")
