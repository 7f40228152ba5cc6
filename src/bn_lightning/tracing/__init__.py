"""One recorded forward pass: who made each value and who reads it."""

from bn_lightning.tracing.calls import ExampleCall, example_calls
from bn_lightning.tracing.channels import channel_origins
from bn_lightning.tracing.record import DropoutUse, ForwardRecord, LayerUse, ModuleCall, Operation, Value
from bn_lightning.tracing.recorder import Watch, record_forward, record_run

__all__ = [
    "DropoutUse",
    "ExampleCall",
    "ForwardRecord",
    "LayerUse",
    "ModuleCall",
    "Operation",
    "Value",
    "Watch",
    "channel_origins",
    "example_calls",
    "record_forward",
    "record_run",
]
