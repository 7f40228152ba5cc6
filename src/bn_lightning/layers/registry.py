"""The variants by the names users type."""

from bn_lightning.errors import ConversionError, nearest
from bn_lightning.layers.adaptive import AdaptiveBatchNorm
from bn_lightning.layers.base import BatchNormVariant
from bn_lightning.layers.cross_replica import CrossReplicaBatchNorm
from bn_lightning.layers.debiased import DebiasedBatchNorm
from bn_lightning.layers.domain import DomainBatchNorm
from bn_lightning.layers.frozen import FrozenBatchNorm
from bn_lightning.layers.ghost import GhostBatchNorm
from bn_lightning.layers.lp import LpBatchNorm
from bn_lightning.layers.masked import MaskedBatchNorm
from bn_lightning.layers.noisy import NoisyBatchNorm
from bn_lightning.layers.renorm import BatchRenorm

__all__ = ["GROUP", "VARIANTS", "find_variant"]

#: The name of the conversion that leaves the family, to ``torch.nn.GroupNorm``.
GROUP = "group"

VARIANTS: dict[str, type[BatchNormVariant]] = {
    "frozen": FrozenBatchNorm,
    "ghost": GhostBatchNorm,
    "lp": LpBatchNorm,
    "masked": MaskedBatchNorm,
    "renorm": BatchRenorm,
    "cross_replica": CrossReplicaBatchNorm,
    "debiased": DebiasedBatchNorm,
    "domain": DomainBatchNorm,
    "adaptive": AdaptiveBatchNorm,
    "noisy": NoisyBatchNorm,
}


def find_variant(name: str) -> type[BatchNormVariant]:
    """Return the variant of this name.

    Raises:
        ConversionError: If there is none; the message has the nearest name and all of them.

    Example:
        >>> find_variant("ghost").__name__
        'GhostBatchNorm'
    """
    if name not in VARIANTS:
        known = [*VARIANTS, GROUP]
        classes = {kind.__name__: key for key, kind in VARIANTS.items()}
        hint = f" (did you mean {classes[name]!r}?)" if name in classes else nearest(name, known)
        raise ConversionError(f"there is no variant {name!r}{hint}; there are {', '.join(known)}.")
    return VARIANTS[name]
