"""What the papers on Batch Normalization measure, on any network."""

from bn_lightning.probes.covariate_shift import CovariateShift, LayerShift, internal_covariate_shift
from bn_lightning.probes.gradient_coherence import GradientCoherence, LayerCoherence, gradient_coherence
from bn_lightning.probes.gradient_line import (
    GradientLine,
    LossLandscape,
    effective_smoothness,
    gradient_predictiveness,
    loss_landscape,
)
from bn_lightning.probes.gradient_tails import GradientTails, LayerTail, gradient_tails
from bn_lightning.probes.objective import Objective, objective_of
from bn_lightning.probes.relative_loss import RelativeLoss, divergence_step, relative_loss

__all__ = [
    "CovariateShift",
    "GradientCoherence",
    "GradientLine",
    "GradientTails",
    "LayerCoherence",
    "LayerShift",
    "LayerTail",
    "LossLandscape",
    "Objective",
    "RelativeLoss",
    "divergence_step",
    "effective_smoothness",
    "gradient_coherence",
    "gradient_predictiveness",
    "gradient_tails",
    "internal_covariate_shift",
    "loss_landscape",
    "objective_of",
    "relative_loss",
]
