"""One layer's fold, as data: what it goes into and which channel goes where."""

from dataclasses import dataclass

from bn_lightning.folding.norms import Norm

__all__ = ["FoldStep", "FoldTarget"]


@dataclass(frozen=True, slots=True)
class FoldTarget:
    """A layer that takes up scale and shift.

    Attributes:
        layer: Qualified name of the module that owns the weight.
        weight: Qualified name of the weight.
        bias: Qualified name of the bias, which is made if it is ``None`` now.
        kind: ``conv, conv_transpose, linear`` or ``batch_norm``.
        groups: Of a convolution, else 1.
        channels: For each channel of its output (folded forward: of its input) the channel of the BatchNorm layer whose
            scale it takes; −1 for one that stays as it is.
        shifted: Whether the channel takes the shift too; in a sum one of the summands does.
        norm: Of a ``batch_norm``, what it normalizes by.
    """

    layer: str
    weight: str
    bias: str
    kind: str
    groups: int = 1
    channels: tuple[int, ...] = ()
    shifted: tuple[bool, ...] = ()
    norm: Norm | None = None

    @property
    def tensors(self) -> tuple[str, str]:
        """The names of what is written."""
        return self.weight, self.bias


@dataclass(frozen=True, slots=True)
class FoldStep:
    """What happens to one BatchNorm layer.

    Attributes:
        norm: The layer.
        action: ``folded-backward``, ``folded-forward``, ``merged`` or ``affine``.
        targets: What takes it up; none for ``affine``.
        forward: Whether the targets read what the layer makes, rather than make what it reads.
        behind: Layers that have to be folded for this one to reach its targets.
        positive: Channels whose scale must not be negative, since a maximum is taken on the way.
        unshifted: Channels whose shift has to be zero, since zeros of a padding stand among their values.
        roundabout: Why the value may reach the layer otherwise than straight from what its one target, when called,
            returns; ``None`` if it does not.
        order: The order in which the layer and its targets are called, for each example call.
    """

    norm: Norm
    action: str
    targets: tuple[FoldTarget, ...] = ()
    forward: bool = False
    behind: tuple[str, ...] = ()
    positive: tuple[int, ...] = ()
    unshifted: tuple[int, ...] = ()
    roundabout: str | None = None
    order: tuple[tuple[str, ...], ...] = ()

    @property
    def name(self) -> str:
        """Qualified name of the layer."""
        return self.norm.name

    @property
    def into(self) -> str | None:
        """The names of what takes it up."""
        return ", ".join(target.layer or "(root)" for target in self.targets) or None
