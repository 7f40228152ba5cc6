"""Masked Batch Normalization: the statistics of valid positions, for padded sequences and images."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bn_lightning.errors import BatchNormError
from bn_lightning.functional.masked import masked_statistics
from bn_lightning.functional.normalize import normalize
from bn_lightning.internals import assert_async
from bn_lightning.layers.base import BatchNormVariant
from bn_lightning.selection import unwrap

__all__ = ["MaskedBatchNorm", "valid_positions"]


class MaskedBatchNorm(BatchNormVariant):
    """Normalize every position by the statistics of the valid ones; without a mask plain BatchNorm.

    The mask comes as the second argument of the call or from `valid_positions`; the argument wins. It counts wherever
    batch statistics do: in training, and in evaluation if there are no running statistics. Otherwise evaluation is
    plain BatchNorm. Invalid positions are normalized too, as Flax and Keras do it, and receive gradients. They have to
    be finite, else they spoil the statistics: fill with zeros what may be NaN.

    A mask with fewer than two valid positions is refused: by a `BatchNormError` in general, by a ``RuntimeError`` from
    compiled code, and on CUDA, where looking at the mask would make the host wait, by a device-side assertion, after
    which the process cannot use the device any more.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: See `BatchNormVariant`.

    Shape:
        Input: (N, C, *). Mask: (N, *) or (N, 1, *), bool, ``True`` for valid. Output: as the input.

    Raises:
        BatchNormError: If the mask has another shape, dtype or device, or too few valid positions.

    Example:
        >>> layer = MaskedBatchNorm(1)
        >>> lengths = torch.tensor([1, 3])
        >>> layer(torch.tensor([[[1.0, 9.0, 9.0]], [[1.0, 3.0, 3.0]]]), torch.arange(3) < lengths[:, None]).detach()
        tensor([[[-1.0000,  7.0000,  7.0000]],
                [[-1.0000,  1.0000,  1.0000]]])

    See Also:
        The ``mask`` of Flax's and Keras's ``BatchNormalization``; pytorch#70529 asks for one.
    """

    #: What `valid_positions` says at present.
    mask: Tensor | None = None

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize (N, C, *) by the positions valid in this mask, or else in that of `valid_positions`."""
        mask = self.mask if mask is None else mask
        if mask is None:
            return super().forward(input)
        self._check_input_dim(input)
        mask = self._checked_mask(input, mask)
        if not self.training and self.running_mean is not None:
            return self.evaluate(input)
        if not input.numel():
            return self.plain_step(input)
        mean, var, count = masked_statistics(input, mask)
        self._check_count(count)
        self.update_running_statistics(mean, var * (count / (count - 1)))
        return normalize(input, mean, var, self.weight, self.bias, self.eps)

    def unlike_population(self) -> str | None:
        """Say that the padding does not count."""
        return "its running statistics are those of valid positions, which cannot be told from padding here"

    def normalize_batch(self, x: Tensor) -> Tensor:
        """Normalize as plain BatchNorm."""
        return self.plain_step(x)

    def _checked_mask(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return the mask as (N, 1, *)."""
        _check_kind(mask)
        expected = (x.shape[0], *x.shape[2:])
        if mask.shape == expected:
            mask = mask.unsqueeze(1)
        elif mask.shape != (x.shape[0], 1, *x.shape[2:]):
            raise BatchNormError(
                f"{self.label} got a mask of shape {tuple(mask.shape)} for an input of shape "
                f"{tuple(x.shape)}; it has to be {expected}, one value a position for all channels. Where the network "
                "changes the resolution, give its inner part a mask of its own: valid_positions(part, mask) nests."
            )
        if mask.device != x.device:
            raise BatchNormError(
                f"{self.label} got a mask on {mask.device} for an input on {x.device}. Move the mask there."
            )
        return mask

    def _check_count(self, count: Tensor) -> None:
        """Refuse a mask that leaves no variance."""
        needs = f"{self.label} needs two valid positions at least to take statistics of"
        cure = "Skip the batch, drop examples without valid positions, or use evaluation mode."
        if count.is_cuda or torch.compiler.is_compiling():
            assert_async(count > 1, f"{needs}, the mask marks fewer. {cure}")
        elif count <= 1:
            raise BatchNormError(f"{needs}, the mask marks {int(count)}. {cure}")


@contextmanager
def valid_positions(model: nn.Module, mask: Tensor | None) -> Iterator[None]:
    """Give every `MaskedBatchNorm` of a model this mask for as long as the context lasts.

    The layers may be anywhere, also in an ``nn.Sequential``, behind ``torch.compile`` and in DDP. Contexts nest, the
    inner one wins for the layers of its model: so parts that run at a lower resolution get the mask that fits them.
    With activation checkpointing the backward pass belongs inside too, as it runs the layers again.

    Args:
        model: The network, or a part of it.
        mask: (N, *) or (N, 1, *), bool, ``True`` for valid; ``None`` for all positions.

    Raises:
        BatchNormError: If the model has no such layer, or the mask is not a bool tensor.

    Example:
        >>> net = nn.Sequential(nn.Conv1d(2, 3, 1), MaskedBatchNorm(3))
        >>> with valid_positions(net, torch.tensor([[True, True, False]])):
        ...     net(torch.randn(1, 2, 3)).shape
        torch.Size([1, 3, 3])
    """
    layers = [module for module in unwrap(model).modules() if isinstance(module, MaskedBatchNorm)]
    if not layers:
        raise BatchNormError(
            f"{type(unwrap(model)).__name__} has no MaskedBatchNorm to give the mask to. "
            'Convert its layers first: convert_batch_norm(model, "masked").'
        )
    if mask is not None:
        _check_kind(mask)
    before = [layer.mask for layer in layers]
    try:
        for layer in layers:
            layer.mask = mask
        yield
    finally:
        for layer, previous in zip(layers, before, strict=True):
            layer.mask = previous


def _check_kind(mask: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = f"{mask.dtype} tensor" if isinstance(mask, Tensor) else type(mask).__name__
        raise BatchNormError(
            f"the mask has to be a bool tensor, True for the positions that count, got a {kind}; "
            "of lengths it is torch.arange(L) < lengths[:, None], of zeros and ones mask.bool()."
        )
