"""SkipInit: one learned factor at the end of a residual branch, in place of its normalization."""

import torch
from torch import Tensor, nn

__all__ = ["SkipInit"]


class SkipInit(nn.Module):
    """Multiply a residual branch by one learned factor: ``alpha * x``.

    With it at the end of each branch, starting at 0 or at most 1/√d for d branches, a deep residual network is near the
    identity at the start, which is what BN does for it, and trains without normalization.

    Args:
        initial: Of ``alpha``.
        device: Of ``alpha``.
        dtype: Of ``alpha``; the output has the input's.

    Shape:
        Any; the output has the input's.

    Example:
        >>> branch = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), SkipInit())
        >>> x = torch.randn(2, 3)
        >>> torch.equal(x + branch(x), x)
        True

    Reference:
        De & Smith, arXiv:2002.10444, §4.
    """

    def __init__(
        self, initial: float = 0.0, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.initial = initial
        # One axis: FSDP shards no 0-dimensional parameter.
        self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the factor to its initial value."""
        nn.init.constant_(self.alpha, self.initial)

    def forward(self, input: Tensor) -> Tensor:
        """Scale the branch."""
        return self.alpha.squeeze() * input  # 0-dimensional, lest a wider factor widen the output

    def extra_repr(self) -> str:
        """Show the initial value."""
        return f"initial={self.initial}"
