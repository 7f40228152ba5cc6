"""The audit itself: measure, compare, judge."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from bn_lightning.auditing.active import Measured, measure, usable_statistics
from bn_lightning.auditing.exchange import findings_of_everyone, from_everyone, together
from bn_lightning.auditing.finding import SEVERITIES, Finding
from bn_lightning.auditing.history import TrainingHistory
from bn_lightning.auditing.observers import Observers
from bn_lightning.auditing.reading import AuditReading, read_layer
from bn_lightning.auditing.report import AuditReport
from bn_lightning.auditing.rows import NotLooked, gap_row
from bn_lightning.auditing.rules import RULES
from bn_lightning.auditing.rules.rule import SOURCES, Rule
from bn_lightning.auditing.training import TrainingSettings, batch_sizes
from bn_lightning.auditing.weights import weight_checksums
from bn_lightning.errors import AuditError, BatchNormError, RecalibrationError
from bn_lightning.layers.merge import statistics_spread
from bn_lightning.layers.processes import count_processes
from bn_lightning.preservation import out_of_inference_mode, preserved, written_back
from bn_lightning.recalibration.batches import checked_batches
from bn_lightning.recalibration.run import Run
from bn_lightning.selection import describe, require_batch_norms, unwrap
from bn_lightning.tracing import ForwardRecord, record_forward

__all__ = ["audit_batch_norm"]

Step = Callable[[nn.Module, Any], Any]


def audit_batch_norm(
    model: nn.Module,
    train_batches: Iterable[Any] | None = None,
    *,
    val_batches: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], Any] | None = None,
    step: Step | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
    example_inputs: Any = None,
    optimizer: Optimizer | Sequence[Optimizer] = (),
    training: TrainingSettings | None = None,
    history: TrainingHistory | None = None,
    left_out: Mapping[str, str] = MappingProxyType({}),
    max_batches: int = 32,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
) -> AuditReport:
    """Tell why evaluation is worse than training, which BN layers do it, and what to do about it.

    Three stages, each made if there is what it needs. *Static* looks at the model, at one recorded forward pass, the
    optimizer and the training's settings. *Passive* reads what a `TrainingWatch` saw of the buffers while training.
    *Active* runs batches through: every selected layer's running statistics are compared with the statistics of its
    input over the training batches under the present weights (`functional.channel_gap` is the formula). With a loss the
    same samples are read in five ways, whose differences are each one cause (`LossReadings`), and one backward pass
    predicts for every layer by how much the deployed loss would change if it alone were recalibrated; the three largest
    are confirmed. Then every rule looks; ``report.not_looked`` names those that could not.

    The model, its gradients, its optimizer and the random state are given back bit for bit, also after an error or an
    interrupt. With a loss it costs four forward passes over the batches, one of them with its backward pass; two more
    where there are evaluation batches; one for each confirmed layer; and two examples once. Each batch of each pass
    begins with the same random numbers.

    With several processes every one has to call this with its own share of the data, of any size: populations and loss
    readings are those of all together, and what goes wrong in one raises in all. An interrupt does not: the others
    wait until their process group gives up. What is seen of single batches is each process's own.

    Args:
        model: The network, in any mode; DDP and ``torch.compile`` wrappers are looked through, and compiled modules run
            as they are written.
        train_batches: Tensors, or tuples or lists whose first element is the input; anything else with ``forward`` or
            ``step``. They are moved to the model's device. Without them there is no active stage.
        val_batches: Evaluation batches of the same form; the losses are then read on them, and *batch dependence* is
            that of evaluation batches of their sizes.
        loss: A function ``(output, target) -> scalar``, the mean over the batch, for batches that are pairs.
        step: A function ``(model, batch) -> scalar`` for anything else, such as a LightningModule's
            ``lambda module, batch: module.training_step(batch, 0)``. It may return a dict with ``"loss"``, or ``None``
            to leave a batch out.
        forward: A function ``(model, batch) -> output`` for other batches, in place of ``step`` or beside ``loss``.
        example_inputs: For the recorded pass: a tensor, a tuple of positional arguments, a dict of keyword arguments,
            or a list of those. By default two examples of the first training batch that is a tensor or begins with one.
        optimizer: The optimizer or optimizers that train the model.
        training: How the training is set up.
        history: What was seen while training.
        left_out: What the caller leaves out and why, such as ``{"passive stage": "…"}``; the report says so.
        max_batches: Keep at most so many batches of either kind; a generator may be given.
        include: Name patterns (``fnmatch``) of the BN layers to audit; empty means all.
        exclude: Name patterns of the BN layers to leave out.

    Returns:
        The report: ``print`` it, or ``.to_json()``, ``.exit_code()``.

    Raises:
        AuditError: If the model has no BN layer; with batches, if none of its BN layers is not frozen, if there is no
            data, if a batch is of unknown structure, or if the loss is no scalar; if ``step`` is given beside ``loss``
            or ``forward``.
        BatchNormError: If a pattern matches no BN layer.

    Example:
        Fine in training and useless in evaluation, since the running mean is not that of the data:

        >>> import torch
        >>> model = nn.Sequential(nn.BatchNorm1d(2, affine=False))
        >>> _ = model[0].running_mean.fill_(3.0), model[0].running_var.fill_(1.01)
        >>> x = torch.randn(8, 64, 2, generator=torch.Generator().manual_seed(0))
        >>> report = audit_batch_norm(model, [(each, each) for each in x], loss=nn.functional.mse_loss)
        >>> stale = report.losses.difference("stale statistics")
        >>> stale.higher, stale.lower, round(stale.mean), stale.is_evident
        ('deployed', 'recalibrated', 9, True)
        >>> [(finding.rule, finding.severity, finding.layer) for finding in report.findings]
        [('not-converged', 'error', '0')]
        >>> print(report.findings[0].fix)
        bn_lightning.recalibrate_batch_norm(model, train_batches)

    Reference:
        Wu & Johnson, arXiv:2105.07576.
    """
    run = Run(loss, step, forward, AuditError)
    network = unwrap(model)
    layers = require_batch_norms(network, include, exclude, error=AuditError)
    try:
        spread = statistics_spread(layers)
    except BatchNormError as error:
        raise AuditError(str(error)) from error
    # Drawing batches too takes from the random state, and so does a rule's look; a step may write to parameters.
    with (
        preserved(network),
        nullcontext() if step is None else written_back(network) as put_back,
        out_of_inference_mode(),
    ):
        if step is not None and put_back is not None:
            run = Run(step=_after(put_back, step), error=AuditError)
        kept = together(lambda: _kept("train_batches", train_batches, max_batches))
        kept_val = together(lambda: _kept("val_batches", val_batches, max_batches))
        _require_alike({"train_batches": kept, "val_batches": kept_val}, run)
        record, reason = together(lambda: _recorded(network, example_inputs, kept))
        measured, observers = Measured({}), Observers()
        if kept is not None:
            try:
                measured = measure(network, layers, kept, kept_val, run=run, observers=observers.all)
            except RecalibrationError as error:
                raise AuditError(str(error)) from error
        reading = AuditReading(
            network,
            tuple(read_layer(name, layer, measured.population.get(name)) for name, layer in layers.items()),
            record=record,
            optimizers=(optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer),
            training=training,
            history=history,
            losses=measured.losses,
            evaluation=measured.evaluation,
            seen=observers.read(layers, measured.population, measured.evaluation),
            single_values=measured.single_values,
            last_batch=batch_sizes(train_batches)[1] if training is None else training.last_batch,
            processes=count_processes(),
            spread=spread,
        )
        _require_comparable(reading)
        rows = sorted(
            (gap_row(layer, measured.changes.get(layer.name), place) for place, layer in enumerate(reading.layers)),
            key=lambda row: row.rank,
        )
        findings = _judged(reading, [row.name for row in rows])
    missed = {} if reason is None else {"recorded forward pass": reason}
    if kept is None:
        missed["active stage"] = "no training batches were given"
    missed |= {**measured.problems, **left_out}
    missed |= _unwatched(layers, history)
    missed |= {f"device-mismatch in {at!r}": why for at, why in reading.seen.device.items() if isinstance(why, str)}
    missed |= {
        rule.slug: "it needs " + " or ".join(SOURCES[source] for source in rule.needs)
        for rule in RULES
        if not _can_look(rule, reading)
    }
    return AuditReport(
        type(network).__name__,
        max((each.batches for each in measured.population.values()), default=0),
        tuple(rows),
        tuple(findings),
        measured.losses,
        tuple(NotLooked(what, why) for what, why in missed.items()),
        population := usable_statistics(layers, measured.population),
        weight_checksums(network) if population else {},
    )


def _unwatched(layers: Mapping[str, nn.Module], history: TrainingHistory | None) -> dict[str, str]:
    """Tell of what layers it is not known how often their statistics moved while training, and why."""
    seen = {} if history is None else {name: each.reason for name, each in history.layers.items() if name in layers}
    by_reason: dict[str, dict[str, nn.Module]] = {}
    for name, reason in seen.items():
        if reason is not None:
            by_reason.setdefault(reason, {})[name] = layers[name]
    return {f"updates while training of {describe(theirs)}": reason for reason, theirs in by_reason.items()}


def _judged(reading: AuditReading, worst_first: Sequence[str]) -> list[Finding]:
    """Let every rule look that can: findings by severity, then as their layers are ordered, the model's first."""
    place = {name: index for index, name in enumerate(worst_first)}
    findings: list[Finding] = []
    for rule in RULES:
        if _can_look(rule, reading):
            findings += rule.find(rule, reading)
    return sorted(
        findings_of_everyone(findings),
        key=lambda found: (
            -SEVERITIES.index(found.severity),
            -1 if found.layer is None else place.get(found.layer, -1),
        ),
    )


def _can_look(rule: Rule, reading: AuditReading) -> bool:
    return any(reading.has(source) for source in rule.needs)


def _after(put_back: Callable[[], None], step: Step) -> Step:
    """Let every step find the same network, whatever the one before has written to it."""

    def run(network: nn.Module, batch: Any) -> Any:
        put_back()
        return step(network, batch)

    return run


def _kept(name: str, batches: Iterable[Any] | None, max_batches: int) -> list[Any] | None:
    if batches is None:
        return None
    try:
        return list(islice(checked_batches(batches, max_batches), max_batches))
    except RecalibrationError as error:
        raise AuditError(f"{name}: {error}") from error


def _require_alike(kept: Mapping[str, Sequence[Any] | None], run: Run) -> None:
    """Refuse no data, and processes that would not make the same passes: one would wait for ever in an exchange."""
    own = {name: None if batches is None else len(batches) for name, batches in kept.items()}
    everyone = from_everyone(lambda: (own, run.reads_losses))
    for name, number in own.items():
        if len({part[name] is None for part, _ in everyone}) > 1:
            raise AuditError(f"{name} was given in some processes and not in others. Give it in all, if need be empty.")
        if number is not None and not any(part[name] for part, _ in everyone):
            raise AuditError(
                f"{name} gave no data: an empty loader, or a generator that was already used up? Pass a fresh one."
            )
    if len({reads for _, reads in everyone}) > 1:
        raise AuditError("a loss was given in some processes and not in others. Give loss= or step= in all.")


def _recorded(
    network: nn.Module, example_inputs: Any, batches: Sequence[Any] | None
) -> tuple[ForwardRecord | None, str | None]:
    """Record one forward pass in evaluation mode, or say why there is none."""
    if example_inputs is None:
        if not batches:
            return None, "neither example_inputs= nor training batches were given"
        first = batches[0]
        x = first[0] if isinstance(first, tuple | list) and first else first
        if not isinstance(x, Tensor):
            return (
                None,
                f"example_inputs= was not given, and cannot be guessed from a batch that is a {type(first).__name__}",
            )
        parameter = next(network.parameters(), x)
        example_inputs = x[:2].to(parameter.device)
    modes = {module: module.training for module in network.modules()}
    try:
        for module in modes:
            module.training = False
        return record_forward(network, example_inputs, error=AuditError), None
    except AuditError as error:
        return None, str(error)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _require_comparable(reading: AuditReading) -> None:
    """Refuse data with which nothing can be compared, where every layer is a variant with other statistics."""
    unlike = [layer for layer in reading.layers if layer.population is not None and layer.population.unlike]
    if not unlike or len(unlike) < len(reading.layers):
        return
    first = unlike[0]
    assert first.population is not None
    raise AuditError(
        f"no selected BatchNorm layer of {type(reading.model).__name__} can be compared with the training data "
        f"({describe({layer.name: layer.layer for layer in unlike})}). Of {first.name or '(root)'!r} "
        f"({type(first.layer).__name__}): {first.population.unlike}."
    )
