"""What the papers on Batch Normalization measure, on any network."""

from bn_lightning.probes.branch_variance import BlockVariance, BranchVariance, branch_variance, effective_depth
from bn_lightning.probes.channel_moments import DepthMoments, LayerMoments, channel_moments_by_depth
from bn_lightning.probes.covariate_shift import CovariateShift, LayerShift, internal_covariate_shift
from bn_lightning.probes.gradient_coherence import GradientCoherence, LayerCoherence, gradient_coherence
from bn_lightning.probes.gradient_line import (
    GradientLine,
    LossLandscape,
    effective_smoothness,
    gradient_predictiveness,
    loss_landscape,
)
from bn_lightning.probes.gradient_norms import GradientNorms, LayerNorms, gradient_norms_by_depth
from bn_lightning.probes.gradient_tails import GradientTails, LayerTail, gradient_tails
from bn_lightning.probes.objective import Objective, objective_of
from bn_lightning.probes.percentile_history import PercentileHistory
from bn_lightning.probes.percentiles import ActivationPercentiles, LayerPercentiles, activation_percentiles
from bn_lightning.probes.population_gap import LayerGap, PopulationGap, population_gap
from bn_lightning.probes.relative_loss import RelativeLoss, divergence_step, relative_loss
from bn_lightning.probes.stable_learning_rate import StableLearningRate, TrialRun, max_stable_learning_rate

__all__ = [
    "ActivationPercentiles",
    "BlockVariance",
    "BranchVariance",
    "CovariateShift",
    "DepthMoments",
    "GradientCoherence",
    "GradientLine",
    "GradientNorms",
    "GradientTails",
    "LayerCoherence",
    "LayerGap",
    "LayerMoments",
    "LayerNorms",
    "LayerPercentiles",
    "LayerShift",
    "LayerTail",
    "LossLandscape",
    "Objective",
    "PercentileHistory",
    "PopulationGap",
    "RelativeLoss",
    "StableLearningRate",
    "TrialRun",
    "activation_percentiles",
    "branch_variance",
    "channel_moments_by_depth",
    "divergence_step",
    "effective_depth",
    "effective_smoothness",
    "gradient_coherence",
    "gradient_norms_by_depth",
    "gradient_predictiveness",
    "gradient_tails",
    "internal_covariate_shift",
    "loss_landscape",
    "max_stable_learning_rate",
    "objective_of",
    "population_gap",
    "relative_loss",
]
