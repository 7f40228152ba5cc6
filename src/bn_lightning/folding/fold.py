"""Fold a network in place, verify it, and give the way back."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from bn_lightning.errors import FoldError, first_line
from bn_lightning.folding.agreement import measure_agreement
from bn_lightning.folding.guard import FoldGuard
from bn_lightning.folding.plan import plan_fold, require_foldable
from bn_lightning.folding.report import FoldReport
from bn_lightning.folding.settle import fold_and_verify
from bn_lightning.folding.surgery import Surgery
from bn_lightning.preservation import out_of_inference_mode, preserved, without_autocast
from bn_lightning.selection import unwrap
from bn_lightning.tracing.calls import ExampleCall, example_calls

__all__ = ["FoldResult", "fold_batch_norm"]


@dataclass(frozen=True, slots=True)
class FoldResult:
    """A folded network and the way back.

    Attributes:
        model: The network in its own classes, wrappers taken off.
        report: One row a BatchNorm layer and the errors measured.
    """

    model: nn.Module
    report: FoldReport
    _surgery: Surgery = field(repr=False)

    def undo(self) -> None:
        """Restore the network bit for bit: the same Parameters, modules and order. Again is harmless.

        Where the network was moved, cast or put in another mode meanwhile, the BatchNorm layers follow it. What folded
        weights have learned meanwhile is lost.

        Raises:
            FoldError: If another fold of the same network came later and is not undone, or a folded weight was
                parametrized or pruned since.
        """
        self._surgery.require_undoable()
        self._surgery.undo()

    @contextmanager
    def unfolded(self) -> Iterator[nn.Module]:
        """Lend the network out unfolded, for a checkpoint say, and fold it again afterwards.

        Raises:
            FoldError: If folded weights were changed since (by training, say), which would be lost; or if another fold
                of the same network came later.
        """
        self._surgery.require_undoable()
        self._surgery.require_unchanged()
        with self._lent():
            yield self.model

    @contextmanager
    def _lent(self) -> Iterator[None]:
        steps = self._surgery.steps
        self._surgery.undo()
        try:
            yield
        finally:
            self._surgery.fold(steps)

    def load_unfolded(self, state_dict: Mapping[str, Any], *, strict: bool = True) -> None:
        """Load an unfolded checkpoint into the folded network: unfold, load, and fold the same layers again.

        `undo` afterwards leads to the network with what was loaded. The outputs are not verified again: the folds are
        the ones that were, with other numbers.

        Args:
            state_dict: With the keys of the network as it was before it was folded.
            strict: As in ``Module.load_state_dict``.

        Raises:
            FoldError: If the keys or shapes do not fit, or the new numbers do not allow a fold (statistics that are not
                finite, a negative scale under max pooling, …). The network is then folded, with what it held before.
        """
        self._surgery.require_undoable()
        self._surgery.require_in_place()
        steps = self._surgery.steps
        self._surgery.undo()
        before = [(tensor, tensor.detach().clone()) for tensor in (*self.model.parameters(), *self.model.buffers())]
        try:
            self.model.load_state_dict(state_dict, strict=strict)
            self._surgery.fold(steps)
        except BaseException as exception:
            self._surgery.undo()
            with out_of_inference_mode():
                for tensor, value in before:
                    tensor.copy_(value)
            self._surgery.fold(steps)
            if isinstance(exception, RuntimeError) and not isinstance(exception, FoldError):
                raise FoldError(
                    f"the state_dict does not fit {type(self.model).__name__} as it was before it was folded: "
                    f"{exception}"
                ) from exception
            raise

    def guarded(self) -> FoldGuard:
        """Watch the folded layers with hooks, until ``close()``, for uses that the example inputs did not show."""
        return FoldGuard(self._surgery)

    def __str__(self) -> str:
        return str(self.report)

    def _repr_html_(self) -> str:
        return self.report._repr_html_()


def fold_batch_norm(
    model: nn.Module,
    example_inputs: Any,
    *,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    inplace: bool = True,
    standalone: str = "keep",
    batches: Iterable[Any] | None = None,
    max_batches: int = 32,
) -> FoldResult:
    """Fold evaluation-mode BatchNorm into the weights before or behind it, and verify the outputs.

    With ``s = weight / sqrt(running_var + eps)`` and ``t = bias - running_mean * s`` the weight of the layer before
    becomes ``s * weight`` and its bias ``s * bias + t``; a layer behind takes ``s`` into its input channels and
    ``weight @ t`` into its bias. All folds are computed in float64 and cast once. The BatchNorm layer becomes
    ``torch.nn.Identity``, or, where drop and activation belong to it (timm), a ``torch.nn.Sequential`` of those. The
    folded network is compared with the unfolded one on the example inputs, in float64 (relative error at most 1e-9) and
    in its own dtype; a fold that differs is rolled back and says so in its row. An exception or interrupt leaves the
    model as it was.

    Only what the example calls reach was verified: a branch they do not take, or code that calls a folded layer on
    its own, gets the normalized output. The folded network is plain torch, without hooks, and runs and loads
    without this library; ``result.guarded()`` watches it for such uses.

    Args:
        model: The network, in evaluation mode. Wrappers (``torch.compile``, DDP) are looked through.
        example_inputs: A tensor, a tuple of positional arguments, a dict of keyword arguments, or a list of those
            (several calls). Real data proves more than zeros.
        include: Name patterns of the BatchNorm layers to fold; empty means all.
        exclude: Name patterns of layers to keep.
        inplace: Fold ``model`` itself; otherwise a deep copy, and ``model`` stays as it is.
        standalone: What becomes of a layer that cannot be folded: ``"keep"``, or ``"affine"`` for a `ChannelAffine`,
            which makes the folded network depend on this library.
        batches: Your own data, tensors or tuples that begin with one, for `FoldReport.agreement`.
        max_batches: How many of them to take.

    Returns:
        The folded ``model``, its ``report`` and ``undo()``.

    Raises:
        FoldError: If the model has no BatchNorm layer or is in training mode, or cannot take the inputs.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> result = fold_batch_norm(net, torch.randn(2, 3, 6, 6))
        >>> net
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
          (2): ReLU()
        )
        >>> result.report.error <= 1e-9
        True
        >>> result.undo()
        >>> type(net[1]).__name__
        'BatchNorm2d'

    Reference:
        Jacob et al., arXiv:1712.05877, §3.2, eq. 14.

    See Also:
        ``torch.nn.utils.fuse_conv_bn_eval``, ``torch.fx.experimental.optimization.fuse``.
    """
    network = unwrap(model)
    require_foldable(network)
    calls = example_calls(example_inputs, error=FoldError)
    if not inplace:
        network = _copied(network)
    surgery = Surgery(network)
    try:
        with preserved(network), out_of_inference_mode(), without_autocast(network):
            plan = plan_fold(network, example_inputs, include, exclude, standalone=standalone)
            report = fold_and_verify(surgery, plan, calls)
            result = FoldResult(network, report, surgery)
            if batches is not None:
                result = replace(result, report=_with_agreement(result, batches, max_batches))
            steps = surgery.steps
            surgery.undo()
        # Outside, where buffers stay as they are written: a frozen layer's weight may be one.
        surgery.fold(steps)
    except BaseException:
        surgery.undo()
        raise
    return result


def _with_agreement(result: FoldResult, batches: Iterable[Any], max_batches: int) -> FoldReport:
    def run(inputs: Any) -> tuple[Any, Any]:
        call = ExampleCall((inputs,))
        folded = call.copied().run(result.model, error=FoldError)
        with result._lent():
            return call.copied().run(result.model, error=FoldError), folded

    return replace(result.report, agreement=measure_agreement(run, batches, max_batches=max_batches))


def _copied(network: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(network)
    except Exception as exception:
        raise FoldError(
            f"{type(network).__name__} cannot be copied ({first_line(exception)}). "
            "Fold it in place (inplace=True) and take it back with result.undo()."
        ) from exception
