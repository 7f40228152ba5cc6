"""What the papers on Batch Normalization measure, on any network."""

from bn_lightning.probes.covariate_shift import CovariateShift, LayerShift, internal_covariate_shift
from bn_lightning.probes.gradient_line import (
    GradientLine,
    LossLandscape,
    effective_smoothness,
    gradient_predictiveness,
    loss_landscape,
)
from bn_lightning.probes.objective import Objective, objective_of

__all__ = [
    "CovariateShift",
    "GradientLine",
    "LayerShift",
    "LossLandscape",
    "Objective",
    "effective_smoothness",
    "gradient_predictiveness",
    "internal_covariate_shift",
    "loss_landscape",
    "objective_of",
]
