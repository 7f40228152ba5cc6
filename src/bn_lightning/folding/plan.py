"""Find what can be folded, by one recorded forward pass; nothing is changed."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from bn_lightning.errors import FoldError
from bn_lightning.folding.decide import Kept, Scene, decide
from bn_lightning.folding.report import FoldPair, FoldPlan, FoldRow
from bn_lightning.preservation import out_of_inference_mode
from bn_lightning.selection import describe, named_batch_norms, require_batch_norms, unwrap
from bn_lightning.tracing.record import ForwardRecord
from bn_lightning.tracing.recorder import record_forward

__all__ = ["plan_fold", "require_foldable"]


def plan_fold(
    model: nn.Module, example_inputs: Any, include: Iterable[str] = (), exclude: Iterable[str] = ()
) -> FoldPlan:
    """Tell for every BatchNorm layer whether it can be folded, into what, and if not, why.

    A layer is folded backward when every call of it, over all example calls, normalizes the output of one
    convolution or linear layer, and nothing else reads that output or uses that weight.

    Args:
        model: The network, in evaluation mode. Given back bit for bit.
        example_inputs: A tensor, a tuple of positional arguments, a dict of keyword arguments, or a list of those
            (several calls). Control flow they do not reach is not seen: pass one call a branch.
        include: Name patterns of the BatchNorm layers to fold; empty means all.
        exclude: Name patterns of layers to keep.

    Returns:
        The plan. ``print`` shows one row a layer.

    Raises:
        FoldError: If the model has no BatchNorm layer or is in training mode, or cannot take the inputs.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8)).eval()
        >>> for row in plan_fold(net, torch.zeros(1, 3, 6, 6)).rows:
        ...     print(row.name, row.action, row.into, row.reason, row.detail)
        1 folded-backward 0
        3 kept None nonlinear_between fed by relu in '2'

    Reference:
        Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
        Inference, arXiv:1712.05877, §3.2, eq. 14.
    """
    network = unwrap(model)
    require_foldable(network)
    include, exclude = _kept(include), _kept(exclude)
    picked = named_batch_norms(network, include, exclude)
    with out_of_inference_mode():
        scene = Scene(network, record_forward(network, example_inputs, error=FoldError))
        rows: list[FoldRow] = []
        pairs: list[FoldPair] = []
        for name, bn in named_batch_norms(network).items():
            excluded = Kept("excluded", "left out by include= or exclude=")
            verdict = decide(scene, name, bn) if name in picked else excluded
            if isinstance(verdict, Kept):
                rows.append(FoldRow(name, "kept", None, verdict.reason, verdict.detail))
            else:
                rows.append(FoldRow(name, "folded-backward", verdict.producer))
                pairs.append(verdict)
    rows.extend(_without_a_layer(scene.record, {row.name for row in rows}))
    return FoldPlan(tuple(rows), tuple(pairs))


def require_foldable(network: nn.Module) -> None:
    """Refuse what no fold can be asked of.

    Raises:
        FoldError: If there is no BatchNorm layer, the network is in training mode, or it holds no data.
    """
    if not named_batch_norms(network) and any(isinstance(module, nn.Identity) for module in network.modules()):
        raise FoldError(
            f"{type(network).__name__} has no BatchNorm layer, but holds torch.nn.Identity (already folded?). "
            "Pass a network that has BatchNorm layers; result.undo() of the first fold brings them back."
        )
    norms = require_batch_norms(network, error=FoldError)
    training = {name: bn for name, bn in norms.items() if bn.training}
    if network.training and training:
        raise FoldError(
            f"{type(network).__name__} is in training mode, where BatchNorm normalizes by the batch and cannot be "
            f"folded ({describe(training)}). Call .eval() on it first."
        )
    for name, tensor in network.named_parameters():
        if tensor.is_meta:
            raise FoldError(f"{name!r} is on the meta device, without values to fold. Load the weights first.")


def _without_a_layer(record: ForwardRecord, known: set[str]) -> Iterator[FoldRow]:
    """Give batch norms that belong to no BatchNorm layer their rows."""
    for operation in record.of_kind("batch_norm"):
        assert operation.layer is not None
        owners = operation.layer.owners("running_mean")
        name = owners[0] if owners else f"{operation.module or '(root)'}: batch_norm"
        if operation.module not in known and name not in known:
            known.add(name)
            detail = (
                f"{name or 'the root module'!r} owns the statistics but is no torch BatchNorm layer"
                if owners
                else f"{operation} uses statistics that no module owns"
            )
            yield FoldRow(name, "kept", None, "functional", detail)
    for tensor, kernels in record.unseen_tensors.items():
        name, _, key = tensor.rpartition(".")
        if key == "running_mean" and name not in known:
            known.add(name)
            detail = f"its statistics are read by {kernels[0]} in code that cannot be recorded"
            yield FoldRow(name, "kept", None, "opaque", detail)


def _kept(patterns: Iterable[str]) -> Iterable[str]:
    # Read twice below; a bare string goes on as it is, to be refused by name.
    return patterns if isinstance(patterns, str) else tuple(patterns)
