"""After BYOL: two views, two forward passes, and a teacher that is an average. It does not know bn_lightning."""

import copy

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn.functional import cosine_similarity
from torch.utils.data import DataLoader, TensorDataset


class SelfSupervised(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.student = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8)
        )
        self.predictor = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, x):
        return self.student(x)

    def training_step(self, batch, batch_idx):
        (x,) = batch
        first, second = x + 0.3 * torch.randn_like(x), x.flip(3) + 0.3 * torch.randn_like(x)
        with torch.no_grad():
            targets = self.teacher(first), self.teacher(second)
        loss = -sum(
            cosine_similarity(self.predictor(self.student(view)), target).mean()
            for view, target in zip((second, first), targets, strict=True)
        )
        self.log("train_loss", loss)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            for teacher, student in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                teacher.lerp_(student, 0.01)

    def configure_optimizers(self):
        trained = [*self.student.parameters(), *self.predictor.parameters()]
        return torch.optim.SGD(trained, lr=0.05, momentum=0.9)


def loader():
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(48, 1, 8, 8, generator=generator)), 12, shuffle=True)
