"""Find what can be folded, by one recorded forward pass; nothing is changed."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from bn_lightning.errors import FoldError
from bn_lightning.folding.aliases import Aliases
from bn_lightning.folding.backward import fold_backward
from bn_lightning.folding.forward import fold_forward
from bn_lightning.folding.norms import Norm, named_norms, require_norms
from bn_lightning.folding.numbers import Numbers
from bn_lightning.folding.reasons import Kept
from bn_lightning.folding.report import FoldPlan, FoldRow
from bn_lightning.folding.scene import Scene
from bn_lightning.folding.spread import channel_spread
from bn_lightning.folding.steps import FoldStep
from bn_lightning.preservation import out_of_inference_mode, preserved, without_autocast
from bn_lightning.selection import describe, unwrap
from bn_lightning.tracing.calls import ExampleCall, example_calls
from bn_lightning.tracing.record import ForwardRecord
from bn_lightning.tracing.recorder import record_forward
from bn_lightning.tracing.sizes import other_sizes

__all__ = ["plan_fold", "require_foldable", "require_standalone"]

_STANDALONE = ("keep", "affine")
_Direction = Callable[[Scene, Norm, set[str]], FoldStep | Kept]


def plan_fold(
    model: nn.Module,
    example_inputs: Any,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    *,
    standalone: str = "keep",
) -> FoldPlan:
    """Tell for every BatchNorm layer whether it can be folded, into what, and if not, why.

    A layer is folded **backward** into the convolutions and linear layers that make all it normalizes, also through
    reshaping, splitting, concatenation, channel shuffling, average pooling and sums; **merged** into a BatchNorm layer
    before it; or else folded **forward** into the convolutions and linear layers that are all that reads its output.
    Each time nothing else may see a value that would change, or use a weight that would.

    Args:
        model: The network, in evaluation mode. Given back bit for bit.
        example_inputs: A tensor, a tuple of positional arguments, a dict of keyword arguments, or a list of those
            (several calls). Control flow they do not reach is not seen: pass one call a branch. The first is also
            run with two or three examples, with one, and with some pixels more and less, where the network takes it.
        include: Name patterns of the BatchNorm layers to fold; empty means all.
        exclude: Name patterns of layers to keep as they are.
        standalone: What becomes of a layer that cannot be folded: ``"keep"``, or ``"affine"`` for a `ChannelAffine`.

    Returns:
        The plan. ``print`` shows one row a layer.

    Raises:
        FoldError: If the model has no BatchNorm layer or is in training mode, or cannot take the inputs.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8)).eval()
        >>> for row in plan_fold(net, torch.zeros(1, 3, 6, 6)).rows:
        ...     print(row.name, row.action, row.into or row.detail)
        1 folded-backward 0
        3 kept fed by relu in '2'; the model returns the output of batch_norm in '3'

    Reference:
        Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
        Inference, arXiv:1712.05877, §3.2, eq. 14.
    """
    network = unwrap(model)
    require_foldable(network)
    require_standalone(standalone)
    picked = named_norms(network, _kept(include), _kept(exclude))
    with out_of_inference_mode(), without_autocast(network):
        calls = example_calls(example_inputs, error=FoldError)
        record = _record(network, calls)
        decisions = _Decisions(Scene(network, record), set(picked), standalone)
        rows = [decisions.row(name) for name in named_norms(network)]
        rows += _without_a_layer(record, {row.name for row in rows})
    return FoldPlan(tuple(rows), tuple(decisions.steps), record.of_calls(len(calls)).blind_spots)


def require_foldable(network: nn.Module) -> None:
    """Refuse what no fold can be asked of.

    Raises:
        FoldError: If there is no BatchNorm layer, the network is in training mode, holds no data, or was made in
            inference mode.
    """
    norms = require_norms(network)
    training = {name: norm for name, norm in norms.items() if norm.training}
    if network.training and training:
        raise FoldError(
            f"{type(network).__name__} is in training mode, where BatchNorm normalizes by the batch and cannot be "
            f"folded ({describe(training)}). Call .eval() on it first."
        )
    for name, tensor in network.named_parameters():
        if tensor.is_meta:
            raise FoldError(f"{name!r} is on the meta device, without values to fold. Load the weights first.")
        if not is_lazy(tensor) and tensor.is_inference():
            raise FoldError(
                f"{name!r} was made in inference mode, and can be neither written to nor trained outside of it. Fold "
                "copy.deepcopy(model), made outside."
            )


def require_standalone(standalone: str) -> None:
    """Refuse an unknown fate for layers that cannot be folded.

    Raises:
        FoldError: If so.
    """
    if standalone not in _STANDALONE:
        raise FoldError(f"standalone= is 'keep' or 'affine', got {standalone!r}.")


class _Decisions:
    """Decide on one layer after the other, each in view of those that are folded already."""

    def __init__(self, scene: Scene, picked: set[str], standalone: str) -> None:
        self.scene = scene
        self.steps: list[FoldStep] = []
        self.numbers = Numbers(scene.model)
        self.aliases = Aliases(scene.record)
        self._picked, self._standalone = picked, standalone
        self._why: dict[str, Kept] = dict(scene.kept)
        self._fixed = dict.fromkeys(scene.kept)
        for name, norm in scene.norms.items():
            problem = self.numbers.problem(norm)
            if name not in picked:
                self._why[name] = Kept("excluded", "left out by include= or exclude=")
            elif problem is not None:
                self._why[name] = problem
            if name not in picked or (problem is not None and problem.reason == "nonfinite"):
                self._fixed[name] = None
        for name in scene.kept.keys() - picked:
            self._why[name] = Kept("excluded", "left out by include= or exclude=")
        reached = [norm for norm in scene.norms.values() if norm.name not in self._why and norm.calls]
        reached.sort(key=lambda norm: min(norm.operations))
        for norm in reached:
            self._decide(norm, fold_backward)
        for norm in reached:
            if norm.name not in scene.gone:
                self._decide(norm, fold_forward)
        for norm in scene.norms.values():
            if norm.name not in scene.gone:
                self._stand_alone(norm)
        self._by_name = {step.name: step for step in self.steps}

    def _decide(self, norm: Norm, direction: _Direction) -> None:
        """Fold a layer one way, or note why not beside what was noted before."""
        mergeable = self.scene.norms.keys() - self.scene.gone - self._fixed.keys() - {norm.name}
        step = direction(self.scene, norm, mergeable)
        kept = step if isinstance(step, Kept) else self.aliases.conflict(norm) or self.numbers.apply(step)
        if kept is None and isinstance(step, FoldStep):
            self.aliases.leave_out(norm)
            self.steps.append(replace(step, order=self._order(step)))
            self.scene.gone.add(norm.name)
            self._why.pop(norm.name, None)
        elif kept is not None:
            self._why[norm.name] = _both(self._why.get(norm.name), kept)

    def _order(self, step: FoldStep) -> tuple[tuple[str, ...], ...]:
        """Tell in which order a layer and its targets are called."""
        names = {step.name, *step.behind, *(target.layer for target in step.targets)}
        orders: dict[int, list[str]] = {}
        for call in self.scene.record.module_calls:
            if call.module in names:
                orders.setdefault(call.call, []).append(call.module)
        return tuple({tuple(order): None for order in orders.values()})

    def _stand_alone(self, norm: Norm) -> None:
        if not norm.calls:
            self._why.setdefault(norm.name, Kept("not_reached", "no example call reaches it"))
        if self._standalone == "affine" and norm.name and norm.name not in self._fixed:  # nothing holds the root itself
            self.steps.append(FoldStep(norm, "affine"))

    def row(self, name: str) -> FoldRow:
        """Say what becomes of a layer."""
        step, why = self._by_name.get(name), self._why.get(name)
        reason, detail = (why.reason, why.detail) if why else ("", "")
        if step is None:
            return FoldRow(name, "kept", None, reason, detail)
        row = FoldRow(name, step.action, step.into, reason, detail)
        spreads = [
            channel_spread(self.scene.model, self.numbers, target, forward=step.forward)
            for target in step.targets
            if target.norm is None
        ]
        if not spreads:
            return row
        before, after = max(spreads, key=lambda spread: spread[1])
        return replace(row, spread_before=before, spread_after=after)


def _both(backward: Kept | None, forward: Kept) -> Kept:
    """Give both directions' reasons; the code is the first one's, unless only padding stood in the second's way."""
    if backward is None:
        return forward
    code = forward.reason if forward.reason == "zero_padding" else backward.reason
    return Kept(code, f"{backward.detail}; {forward.detail}")


def _record(network: nn.Module, calls: list[ExampleCall]) -> ForwardRecord:
    """Record the user's calls, and the first of them in other sizes, as far as the network takes them."""
    others = [next((call for call in variants if _runs(network, call)), None) for variants in other_sizes(calls[0])]
    try:
        return record_forward(network, [*calls, *filter(None, others)], error=FoldError)
    except FoldError:  # it keeps something of the call before, of that call's size
        return record_forward(network, calls, error=FoldError)


def _runs(network: nn.Module, call: ExampleCall) -> bool:
    try:
        with preserved(network):
            call.copied().run(network, error=FoldError)
    except FoldError:
        return False
    return True


def _without_a_layer(record: ForwardRecord, known: set[str]) -> Iterator[FoldRow]:
    """Give batch norms that belong to no BatchNorm layer their rows."""
    for operation in record.of_kind("batch_norm"):
        assert operation.layer is not None
        owners = operation.layer.owners("running_mean")
        name = owners[0] if owners else f"{operation.module or '(root)'}: batch_norm"
        # A weight that is standardized is no BatchNorm of the network's.
        if operation.module not in known and name not in known and not _is_weight(record, operation.layer.input):
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


def _is_weight(record: ForwardRecord, value: int | None) -> bool:
    """Whether a value is made of the model's own tensors and nothing else."""
    waiting, seen = [] if value is None else [value], set[int]()
    while waiting:
        index = waiting.pop()
        maker = record.producer(index)
        if maker is None:
            return False
        seen.add(index)
        waiting += set(maker.inputs) - seen
    return True


def _kept(patterns: Iterable[str]) -> Iterable[str]:
    # A bare string goes on as it is, to be refused by name.
    return patterns if isinstance(patterns, str) else tuple(patterns)
