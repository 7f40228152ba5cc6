"""See, understand, fix, swap and fold Batch Normalization; with Lightning or without."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bn_lightning.auditing import apply_fixes, audit_batch_norm
    from bn_lightning.folding import fold_batch_norm, inspect_batch_norm, plan_fold
    from bn_lightning.layers import (
        AdaptiveBatchNorm,
        BatchNormVariant,
        BatchRenorm,
        ChannelAffine,
        CrossReplicaBatchNorm,
        DebiasedBatchNorm,
        DomainBatchNorm,
        FrozenBatchNorm,
        GhostBatchNorm,
        LpBatchNorm,
        MaskedBatchNorm,
        NoisyBatchNorm,
        SkipInit,
        adjust_momentum,
        batch_norm_layer,
        convert_batch_norm,
        merge_statistics,
        paused_statistics,
        revert_batch_norm,
        select_domain,
        use_domain,
        valid_positions,
    )
    from bn_lightning.monitoring import observe_activations
    from bn_lightning.recalibration import recalibrate_batch_norm
    from bn_lightning.tracing import record_forward

__version__ = "0.1.0"

# Resolved at first use (PEP 562): `import bn_lightning` costs no more than `import torch`.
_HOMES = {
    "AdaptiveBatchNorm": "layers",
    "BatchNormVariant": "layers",
    "BatchRenorm": "layers",
    "ChannelAffine": "layers",
    "CrossReplicaBatchNorm": "layers",
    "DebiasedBatchNorm": "layers",
    "DomainBatchNorm": "layers",
    "FrozenBatchNorm": "layers",
    "GhostBatchNorm": "layers",
    "LpBatchNorm": "layers",
    "MaskedBatchNorm": "layers",
    "NoisyBatchNorm": "layers",
    "SkipInit": "layers",
    "adjust_momentum": "layers",
    "apply_fixes": "auditing",
    "audit_batch_norm": "auditing",
    "batch_norm_layer": "layers",
    "convert_batch_norm": "layers",
    "fold_batch_norm": "folding",
    "inspect_batch_norm": "folding",
    "merge_statistics": "layers",
    "observe_activations": "monitoring",
    "paused_statistics": "layers",
    "plan_fold": "folding",
    "recalibrate_batch_norm": "recalibration",
    "record_forward": "tracing",
    "revert_batch_norm": "layers",
    "select_domain": "layers",
    "use_domain": "layers",
    "valid_positions": "layers",
}

__all__ = [
    "AdaptiveBatchNorm",
    "BatchNormVariant",
    "BatchRenorm",
    "ChannelAffine",
    "CrossReplicaBatchNorm",
    "DebiasedBatchNorm",
    "DomainBatchNorm",
    "FrozenBatchNorm",
    "GhostBatchNorm",
    "LpBatchNorm",
    "MaskedBatchNorm",
    "NoisyBatchNorm",
    "SkipInit",
    "adjust_momentum",
    "apply_fixes",
    "audit_batch_norm",
    "batch_norm_layer",
    "convert_batch_norm",
    "fold_batch_norm",
    "inspect_batch_norm",
    "merge_statistics",
    "observe_activations",
    "paused_statistics",
    "plan_fold",
    "recalibrate_batch_norm",
    "record_forward",
    "revert_batch_norm",
    "select_domain",
    "use_domain",
    "valid_positions",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        value = getattr(import_module(f"bn_lightning.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'bn_lightning' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
