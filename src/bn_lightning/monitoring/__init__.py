"""See what every layer puts out while a network runs."""

from bn_lightning.monitoring.alerts import Alert, AlertRules
from bn_lightning.monitoring.cadence import Cadence, GrowingInterval
from bn_lightning.monitoring.history import ActivationHistory, RunningHistory
from bn_lightning.monitoring.observe import ObservedActivations, observe_activations
from bn_lightning.monitoring.recent import RecentSamples
from bn_lightning.monitoring.running import RunningStatisticsWatch
from bn_lightning.monitoring.running_snapshot import RunningSnapshot
from bn_lightning.monitoring.snapshot import ActivationSnapshot
from bn_lightning.monitoring.statistics import ChannelStatistics, LayerStatistics
from bn_lightning.monitoring.watch import ActivationWatch

__all__ = [
    "ActivationHistory",
    "ActivationSnapshot",
    "ActivationWatch",
    "Alert",
    "AlertRules",
    "Cadence",
    "ChannelStatistics",
    "GrowingInterval",
    "LayerStatistics",
    "ObservedActivations",
    "RecentSamples",
    "RunningHistory",
    "RunningSnapshot",
    "RunningStatisticsWatch",
    "observe_activations",
]
