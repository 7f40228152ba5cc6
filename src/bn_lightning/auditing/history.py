"""What was seen of BatchNorm layers while training, through their buffers alone."""

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["LayerHistory", "TrainingHistory"]


@dataclass(frozen=True, slots=True)
class LayerHistory:
    """One layer's part of a `TrainingHistory`; ``None`` is unknown.

    Attributes:
        forward_updates: How often its running statistics were moved a training batch, outside of backward passes.
        backward_updates: The same during the backward pass, where activation checkpointing runs layers again.
        between_updates: How often they were moved between training batches, outside of validation, in all.
        validation_updates: How often they were moved during validation, in all.
        training_share: Share of the training batches that began with the layer in training mode.
        validated_in_training_mode: Whether a validation batch began with the layer in training mode.
        spread: How far one process's statistics were from those of all, in standard deviations of the layer's output,
            at the worst look.
        averaged: Whether γ changed though it needs no gradient, as that of a teacher that averages its student's.
        reason: Why its updates are unknown, or ``None``.
    """

    forward_updates: float | None = None
    backward_updates: float | None = None
    between_updates: int = 0
    validation_updates: int = 0
    training_share: float | None = None
    validated_in_training_mode: bool = False
    spread: float | None = None
    averaged: bool = False
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class TrainingHistory:
    """What a `TrainingWatch` saw.

    Attributes:
        batches: Training batches that were watched, in one process.
        layers: By layer name.
    """

    batches: int
    layers: Mapping[str, LayerHistory]
