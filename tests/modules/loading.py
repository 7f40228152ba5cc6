"""How a checkpoint is loaded without running what it holds: an argument that Lightning has from 2.6 on."""

import inspect

import lightning.pytorch as pl

_KNOWN = inspect.signature(pl.LightningModule.load_from_checkpoint).parameters
SAFELY = {"weights_only": True} if "weights_only" in _KNOWN else {}
