"""What the tensors of a model become as layers are folded, in float64 from the first fold to the last."""

import torch
from torch import Tensor, nn

from bn_lightning.folding.norms import Norm, join
from bn_lightning.folding.reasons import Kept
from bn_lightning.folding.steps import FoldStep, FoldTarget
from bn_lightning.functional.affine import (
    absorb_into_conv_weights,
    absorb_into_linear_weights,
    eval_affine,
    fold_conv_weights,
    fold_linear_weights,
)
from bn_lightning.layers.base import BatchNormVariant
from bn_lightning.tracing.layers import TENSOR_ROLES

__all__ = ["Numbers", "exact", "owned_tensor", "reference_tensor"]

# With eps = 1e-5 a channel that never varied has a scale of 316 times its weight.
_EXPLODING = 1e3


def exact(tensor: Tensor) -> Tensor:
    """Return a float64 tensor, on the CPU where the device has no float64 (MPS)."""
    detached = tensor.detach()
    return (detached.cpu() if detached.device.type == "mps" else detached).double()


def owned_tensor(model: nn.Module, name: str) -> Tensor | None:
    """Look up a parameter or buffer by its qualified name; ``None`` if there is none."""
    owner, _, key = name.rpartition(".")
    tensor: Tensor | None = getattr(model.get_submodule(owner), key, None)
    return tensor


def reference_tensor(model: nn.Module, target: FoldTarget) -> Tensor:
    """Return the tensor whose dtype and device a target has: its weight, or the mean of a BatchNorm without one."""
    weight = owned_tensor(model, target.weight)
    if weight is None:
        assert target.norm is not None
        weight = owned_tensor(model, target.norm.roles["running_mean"])
    assert weight is not None
    return weight


class Numbers:
    """The float64 values of what folds change, beside a model that stays as it is.

    Several folds into one weight are composed here and cast once, when they are written.

    Attributes:
        changed: Qualified name to value, of what differs from the model's own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.changed: dict[str, Tensor] = {}

    def tensor(self, name: str) -> Tensor | None:
        """Return the present value of a parameter or buffer."""
        if name in self.changed:
            return self.changed[name]
        own = owned_tensor(self.model, name)
        return None if own is None else exact(own)

    def affine(self, norm: Norm) -> tuple[Tensor, Tensor]:
        """Rewrite a layer as ``scale * x + shift``.

        Shape:
            Both (C,), float64.
        """
        mean, var, weight, bias = self._statistics(norm)
        return eval_affine(mean, var, norm.eps, weight, bias)

    def problem(self, norm: Norm) -> Kept | None:
        """Say which channel of a layer is not finite or explodes, if one does."""
        named = dict(zip(("running_mean", "running_var", "weight", "bias"), self._statistics(norm), strict=True))
        for role in TENSOR_ROLES:
            tensor = named[role]
            if tensor is not None and not tensor.isfinite().all():
                channel = int((~tensor.isfinite()).nonzero()[0])
                return Kept("nonfinite", f"its {role} is {tensor[channel].item()} at channel {channel}")
        spread = self._statistics(norm)[1] + norm.eps
        if not (spread > 0).all():
            channel = int(spread.argmin())
            return Kept("nonfinite", f"running_var + eps is {spread[channel].item():.3g} at channel {channel}")
        scale, _ = self.affine(norm)
        channel = int(scale.abs().argmax())
        if abs(scale[channel].item()) > _EXPLODING:
            return Kept(
                "exploding",
                f"the scale of channel {channel} is {scale[channel].item():.3g} (running_var + eps is "
                f"{spread[channel].item():.3g}), more than {_EXPLODING:.0e}",
            )
        return None

    def apply(self, step: FoldStep) -> Kept | None:
        """Fold one layer into its targets, or say why its numbers do not allow it and change nothing."""
        scale, shift = self.affine(step.norm)
        kept = self.problem(step.norm) if step.targets else None
        kept = kept or _conditions(step, scale, shift)
        if kept:
            return kept
        before = dict(self.changed)
        for target in step.targets:
            weight, bias = self._absorbed(target, scale, shift, forward=step.forward)
            self.changed[target.weight], self.changed[target.bias] = weight, bias
            kept = kept or self._out_of_range(target)
        if kept:
            self.changed = before
        return kept

    def _statistics(self, norm: Norm) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        if norm.roles:
            mean, var, weight, bias = (
                self.tensor(join(norm.name, role)) for role in ("running_mean", "running_var", "weight", "bias")
            )
            used = [norm.roles.get(role) is not None or join(norm.name, role) in self.changed for role in TENSOR_ROLES]
            weight, bias = (weight if used[0] else None), (bias if used[1] else None)
        else:
            module = self.model.get_submodule(norm.name)
            assert isinstance(module, BatchNormVariant)
            fixed = module.fixed_tensors()
            assert fixed is not None
            mean, var, weight, bias = (None if tensor is None else exact(tensor) for tensor in fixed)
        assert mean is not None
        assert var is not None
        return mean, var, weight, bias

    def _absorbed(self, target: FoldTarget, scale: Tensor, shift: Tensor, *, forward: bool) -> tuple[Tensor, Tensor]:
        weight, bias = self.tensor(target.weight), self.tensor(target.bias)
        device = scale.device if weight is None else weight.device
        channels = torch.tensor(target.channels, device=device)
        taken, shifted = channels >= 0, torch.tensor(target.shifted, device=device)
        scales = torch.where(taken, scale.to(device)[channels.clamp(min=0)], 1.0)
        shifts = torch.where(taken & shifted, shift.to(device)[channels.clamp(min=0)], 0.0)
        if target.norm is not None:
            return self._merged(target.norm, scales, shifts, forward=forward)
        assert weight is not None
        transposed = target.kind == "conv_transpose"
        if target.kind == "linear":
            return (absorb_into_linear_weights if forward else fold_linear_weights)(weight, bias, scales, shifts)
        convolution = absorb_into_conv_weights if forward else fold_conv_weights
        return convolution(weight, bias, scales, shifts, groups=target.groups, transposed=transposed)

    def _merged(self, norm: Norm, scale: Tensor, shift: Tensor, *, forward: bool) -> tuple[Tensor, Tensor]:
        """Give a layer the weight and bias with which it does another's work too, before or behind its own."""
        mean, var, weight, bias = self._statistics(norm)
        weight = torch.ones_like(mean) if weight is None else weight
        bias = torch.zeros_like(mean) if bias is None else bias
        if not forward:
            return weight * scale, bias * scale + shift
        # s₂(s₁x + t₁) + t₂ = w′(x − μ)/σ + b′ with w′ = s₁w and b′ = b + (w/σ)(t₁ + μ(s₁ − 1))
        return weight * scale, bias + weight * torch.rsqrt(var + norm.eps) * (shift + mean * (scale - 1))

    def _out_of_range(self, target: FoldTarget) -> Kept | None:
        dtype = reference_tensor(self.model, target).dtype
        for name in target.tensors:
            value = self.changed[name]
            limit = torch.finfo(dtype).max
            if not value.numel() or all(abs(float(end)) <= limit for end in value.aminmax()):
                continue  # nan is both ends, and not within any limit
            before = owned_tensor(self.model, name)
            if before is not None and not before.isfinite().all():
                where = (~before.detach().isfinite()).nonzero()[0].tolist()
                return Kept("nonfinite", f"{name!r} is {before[tuple(where)].item()} at {where}")
            where = (~(value.abs() <= limit)).nonzero()[0].tolist()
            short = str(dtype).removeprefix("torch.")
            return Kept("overflow", f"folded, {name!r} leaves the range of {short} at {where}")
        return None


def _conditions(step: FoldStep, scale: Tensor, shift: Tensor) -> Kept | None:
    for channel in step.positive:
        if scale[channel] < 0:
            return Kept("negative_scale", f"a maximum is taken on the way, and channel {channel} has a negative scale")
    for channel in step.unshifted:
        if shift[channel] != 0:
            return Kept(
                "zero_padding", f"a zero padding stands on the way, and channel {channel} has a shift, which zeros lack"
            )
    return None
