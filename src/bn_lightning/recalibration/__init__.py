"""Population statistics: measure them as Algorithm 2 does, and write them into the running statistics."""

from bn_lightning.recalibration.population import LayerPopulation, population_statistics
from bn_lightning.recalibration.recalibrate import recalibrate_batch_norm
from bn_lightning.recalibration.result import RecalibratedLayer, RecalibrationResult

__all__ = [
    "LayerPopulation",
    "RecalibratedLayer",
    "RecalibrationResult",
    "population_statistics",
    "recalibrate_batch_norm",
]
