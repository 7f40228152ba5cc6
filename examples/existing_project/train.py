"""The project's own training script."""

import lightning.pytorch as pl
from data import Stripes
from model import Classifier

pl.seed_everything(0)
trainer = pl.Trainer(
    max_epochs=3,
    accelerator="cpu",
    log_every_n_steps=5,
)
trainer.fit(Classifier(), Stripes())
trainer.validate(datamodule=Stripes())
