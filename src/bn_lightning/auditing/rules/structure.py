"""What stands around a layer: the optimizer's weight decay, a bias that it takes away, a dropout before it."""

from collections.abc import Iterator

from bn_lightning.auditing.finding import Finding
from bn_lightning.auditing.reading import AuditReading
from bn_lightning.auditing.rules.layers import affine_parameters, is_frozen
from bn_lightning.auditing.rules.rule import Rule
from bn_lightning.selection import describe
from bn_lightning.tracing import DropoutUse, ForwardRecord, Operation

__all__ = ["RULES"]

# Variance with dropout over variance without: 1.1 is an error of 5 % in the standard deviation.
_VARIANCE_RATIO = 1.1
_WITH_BIAS = ("conv", "conv_transpose", "linear")


def _find_decayed(rule: Rule, reading: AuditReading) -> Iterator[Finding]:
    decay: dict[int, float] = {
        id(parameter): float(group["weight_decay"])
        for optimizer in reading.optimizers
        for group in optimizer.param_groups
        if group.get("weight_decay")
        for parameter in group["params"]
        if parameter.requires_grad
    }
    layers = {
        row.name: row.layer
        for row in reading.layers
        if any(id(parameter) in decay for parameter in affine_parameters(row.layer))
    }
    if not layers:
        return
    decayed = [each for layer in layers.values() for each in affine_parameters(layer) if id(each) in decay]
    yield rule.finding(
        None,
        f"weight decay shrinks γ or β of {len(layers)} BatchNorm layers ({describe(layers)}), which changes what they "
        "compute; whether that helps differs from network to network",
        {
            "layers": len(layers),
            "parameters": sum(each.numel() for each in decayed),
            "weight_decay": max(decay[id(each)] for each in decayed),
        },
        "give norm parameters and biases a group of their own: bn_lightning.modules.decay_groups(model, weight_decay)",
    )


def _find_bias(rule: Rule, reading: AuditReading) -> Iterator[Finding]:
    record = reading.record
    if record is None:
        return
    norms = {row.name for row in reading.layers if not is_frozen(reading, row.layer)}
    uses: dict[str, list[Operation]] = {}
    for operation in record.operations:
        if operation.kind in _WITH_BIAS and operation.layer is not None:
            for name in (operation.layer.tensors.get("bias") or ())[:1]:
                uses.setdefault(name, []).append(operation)
    redundant = [
        name
        for name, operations in uses.items()
        if all(_is_normalized(record, operation, norms) for operation in operations)
        and len(record.tensor_readers(name)) == len(operations)
    ]
    if not redundant:
        return
    count = sum(reading.model.get_parameter(name).numel() for name in redundant)
    shown = ", ".join(redundant[:3]) + (f" and {len(redundant) - 3} more" if len(redundant) > 3 else "")
    yield rule.finding(
        None,
        f"{len(redundant)} biases, {count} parameters, stand right before a BatchNorm, which subtracts them with the "
        f"mean: {shown}",
        {"biases": len(redundant), "parameters": count},
        "build these layers with bias=False; β does their work",
    )


def _is_normalized(record: ForwardRecord, operation: Operation, norms: set[str]) -> bool:
    """Tell whether all that becomes of an operation's output is to be normalized channel by channel."""
    if len(operation.outputs) != 1:
        return False
    value = record.values[operation.outputs[0]]
    if value.output or value.escaped or value.unseen or (operation.kind == "linear" and len(value.shape) != 2):
        return False
    readers = record.readers(value.index)
    return bool(readers) and all(_norm_of(reader, norms) is not None for reader in readers)


def _find_dropout(rule: Rule, reading: AuditReading) -> Iterator[Finding]:
    record = reading.record
    if record is None:
        return
    norms = {row.name for row in reading.layers if not is_frozen(reading, row.layer)}
    before: dict[str, DropoutUse] = {}
    for dropout in record.dropouts:
        if dropout.p <= 0:
            continue
        reached = _first_norms(record, dropout, norms)
        for place, name in enumerate(reached):
            if place == 0 or _departs(reading.seen.dropout.get(name)):
                before.setdefault(name, dropout)
    for name, dropout in before.items():
        ratio = reading.seen.dropout.get(name)
        where = repr(dropout.module) if dropout.module else "the root module"
        measured = (
            ""
            if ratio is None
            else f"; on the training data the variance of its input is {ratio:.3g} times what it is without dropout"
        )
        yield rule.finding(
            name,
            f"{dropout.function} (p={dropout.p:g}) in {where} stands before it: its "
            f"variance in training, which the running statistics learn, is not that in evaluation{measured}",
            {"dropout": dropout.module, "p": dropout.p, "variance_ratio": ratio},
            f"move the dropout of {where} behind the last BatchNorm, or set p=0",
            severity="warning" if _departs(ratio) else "info",
        )


def _departs(ratio: float | None) -> bool:
    return ratio is not None and not 1 / _VARIANCE_RATIO < ratio < _VARIANCE_RATIO


def _first_norms(record: ForwardRecord, dropout: DropoutUse, norms: set[str]) -> list[str]:
    """Name the BN layers that a dropout's output reaches without going through another one, in execution order."""
    reached: dict[str, None] = {}
    values = {dropout.output}
    # In evaluation mode the output is the very input, whose earlier readers do not count.
    for operation in record.operations[dropout.end :]:
        if operation.call != dropout.call or values.isdisjoint(operation.inputs):
            continue
        name = _norm_of(operation, norms)
        if name is not None:
            reached[name] = None
        elif operation.kind != "batch_norm":
            values.update(operation.outputs)
    return list(reached)


def _norm_of(operation: Operation, norms: set[str]) -> str | None:
    """Name the BN layer that an operation belongs to: one in its forward, or a call with its tensors."""
    if operation.module in norms:
        return operation.module
    if operation.kind == "batch_norm" and operation.layer is not None:
        owners = (*operation.layer.owners("running_mean"), *operation.layer.owners("weight"))
        return next((name for name in owners if name in norms), None)
    return None


RULES = (
    Rule("decayed-affine", "info", "γ or β in a parameter group with weight_decay > 0", _find_decayed, ("optimizer",)),
    Rule("redundant-bias", "info", "a bias whose output only a BatchNorm reads", _find_bias, ("record",)),
    Rule(
        "dropout-before-norm",
        "warning",
        "a dropout with p > 0 on a path to the layer (info); variance with dropout ≥ "
        f"{_VARIANCE_RATIO:g} or ≤ 1/{_VARIANCE_RATIO:g} of that without (warning)",
        _find_dropout,
        ("record",),
    ),
)
