"""Tell what goes wrong in a training, from samples of it."""

from bn_lightning.monitoring.alerts.alert import Alert
from bn_lightning.monitoring.alerts.rules import AlertRules

__all__ = ["Alert", "AlertRules"]
