"""Convert a timm network to Ghost BatchNorm and train it on real digits. Needs timm; takes half a minute."""

import lightning.pytorch as pl
import timm
from torch import nn

import bn_lightning as bnl
from bn_lightning.modules import DigitsDataModule, ImageClassifier

if __name__ == "__main__":
    pl.seed_everything(0)
    network = timm.create_model("resnet10t", in_chans=1, num_classes=10)

    # In place: the same parameters, the same state_dict keys. The stem keeps torch's BatchNorm.
    report = bnl.convert_batch_norm(network, "ghost", include=("layer*",), virtual_batch_size=32)
    print(report)

    # A large batch, which each layer normalizes in groups of 32 examples. 8×8 is small for a ResNet.
    module = ImageClassifier(nn.Sequential(nn.Upsample(scale_factor=2), network), learning_rate=0.2)
    data = DigitsDataModule(batch_size=256)
    trainer = pl.Trainer(
        max_epochs=8, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False
    )
    trainer.fit(module, data)
    trainer.test(module, data)

    # Ghost BatchNorm is for training. What ships is the plain network again; a checkpoint loads into it either way.
    print(bnl.revert_batch_norm(network))
    trainer.test(module, data)
