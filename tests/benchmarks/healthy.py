"""Healthy networks for audit_rules.py: zoo networks with consistent statistics, and trainings on real digits."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import MixedPrecision
from runs import HEALTHY, residual, sgd
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trainings import Training, digits

from bn_lightning import audit_batch_norm, convert_batch_norm, recalibrate_batch_norm
from bn_lightning.auditing import AuditReport
from bn_lightning.callbacks import BatchNormAudit
from bn_lightning.modules import DigitsDataModule
from bn_lightning.selection import named_batch_norms
from bn_lightning.zoo import load_zoo_model

# One or two of a family, as small as the family has them.
ZOO = (
    "timm:resnet18",
    "timm:resnet26d",
    "timm:resnetv2_50",
    "timm:wide_resnet50_2",
    "timm:resnext50_32x4d",
    "timm:seresnet18",
    "timm:skresnet18",
    "timm:ecaresnet26t",
    "timm:densenet121",
    "timm:dla34",
    "timm:hrnet_w18_small",
    "timm:vgg11_bn",
    "timm:darknet53",
    "timm:cspresnet50",
    "timm:efficientnet_b0",
    "timm:tf_efficientnet_b0",
    "timm:mobilenetv2_100",
    "timm:mobilenetv3_small_100",
    "timm:mnasnet_small",
    "timm:ghostnet_100",
    "timm:regnetx_002",
    "timm:regnety_002",
    "timm:repvgg_a0",
    "timm:levit_128s",
    "timm:inception_v3",
    "timm:xception41",
    "torchvision:resnet18",
    "torchvision:mobilenet_v2",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:googlenet",
    "torchvision:mnasnet0_5",
    "torchvision:vgg11_bn",
)


# Its statistics go on moving: harmless, and true that the audit names it.
HALF_FROZEN = "residual, first stages frozen"


def frozen_with_statistics() -> nn.Module:
    """Freeze the first half of a network as a person should: weights, and the statistics these weights have."""
    network = residual()
    recalibrate_batch_norm(network, digits()[0].split(64))
    convert_batch_norm(network, "frozen", include=("stem.*", "stages.0.*"), trainable=False)
    network.stem.requires_grad_(False)
    network.stages[0].requires_grad_(False)
    return network


WHOLLY_FROZEN = Training("residual, first stages frozen with their statistics", frozen_with_statistics, sgd)


class ByHand(pl.LightningModule):
    """A perceptron on the digits that takes its own optimizer steps."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def learn(self, loss: Tensor, place: int = 0) -> None:
        optimizers = self.optimizers()
        optimizer = optimizers[place] if isinstance(optimizers, list) else optimizers
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Siamese(ByHand):
    """Two views of each picture through one encoder, both with gradient."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        images, labels = batch
        first, second = (self(images + 0.1 * torch.randn_like(images)) for _ in range(2))
        loss = nn.functional.cross_entropy(first, labels) + nn.functional.mse_loss(first, second)
        if self.automatic_optimization:
            return loss
        self.learn(loss)
        return None


class Taught(ByHand):
    """A teacher that averages the student and runs without gradient, in training mode, as BYOL's."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = True
        self.teacher = copy.deepcopy(self.network).requires_grad_(False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        with torch.no_grad():
            target = self.teacher(images + 0.1 * torch.randn_like(images))
        logits = self(images)
        return nn.functional.cross_entropy(logits, labels) + nn.functional.mse_loss(logits, target)

    def on_train_batch_end(self, outputs: object, batch: list[Tensor], batch_idx: int) -> None:
        for teacher, student in zip(self.teacher.parameters(), self.network.parameters(), strict=True):
            teacher.data.lerp_(student.data, 0.1)


class Adversarial(ByHand):
    """A GAN whose generator runs twice a batch, for the critic and for itself; the critic has no BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64))
        self.critic = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.network(torch.randn(len(images), 8))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, _ = batch
        true, false = self.critic(images), self.critic(self(images).detach())
        self.learn(nn.functional.softplus(-true).mean() + nn.functional.softplus(false).mean(), 1)
        self.learn(nn.functional.softplus(-self.critic(self(images))).mean())

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), lr=1e-4) for part in (self.network, self.critic)]


def automatic_siamese() -> Siamese:
    module = Siamese()
    module.automatic_optimization = True
    return module


# Several forward passes a batch that are all meant.
SEVERAL_PASSES: dict[str, tuple[Callable[[], ByHand], list[str] | None]] = {
    "siamese, by hand": (Siamese, None),
    "siamese, without a loss reading": (automatic_siamese, ["static", "passive"]),
    "GAN, by hand": (Adversarial, None),
    "teacher that averages": (Taught, None),
}


def audit_module(build: Callable[[], ByHand], stages: list[str] | None) -> AuditReport | None:
    """Train under the Trainer with the audit, in the stages that are asked for."""
    torch.manual_seed(0)
    audit, data = BatchNormAudit(stages=stages), DigitsDataModule()
    pl.Trainer(
        accelerator="cpu",
        max_epochs=12,
        callbacks=[audit],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(build(), data)
    return audit.report


@dataclass(frozen=True)
class Subject:
    """A healthy network and the way to its report; ``None`` if it turned out not to be healthy."""

    name: str
    audit: Callable[[], AuditReport | None]


def subjects(seeds: int = 1) -> Iterator[Subject]:
    """List every healthy subject, the trainings from so many random beginnings."""
    for name in ZOO:
        yield Subject(name, lambda name=name: audit_zoo(name))
    for training in (*HEALTHY, WHOLLY_FROZEN):
        if training.name == HALF_FROZEN or not named_batch_norms(training.network()):
            continue
        for seed in range(seeds):
            name = f"{training.name}, seed {seed}" if seed else training.name
            yield Subject(name, lambda training=training, seed=seed: audit_training(training, seed))
    for name, (build, stages) in SEVERAL_PASSES.items():
        yield Subject(name, lambda build=build, stages=stages: audit_module(build, stages))


def pictures(size: int, number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Make colour pictures of digits, each with a tint and noise of its own, about mean 0 and standard deviation 1."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = digits()
    picked = torch.randperm(len(labels), generator=generator)[:number]
    grey = nn.functional.interpolate(images[picked], size=(size, size), mode="bilinear")
    tint = 0.5 + torch.rand(number, 3, 1, 1, generator=generator)
    return grey * tint + 0.3 * torch.randn(number, 3, size, size, generator=generator), labels[picked]


def loss_of(output: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Cross-entropy; GoogLeNet's other outputs in training mode weigh 0.3, as in its paper."""
    first, *others = (output,) if isinstance(output, Tensor) else output
    aside = sum((nn.functional.cross_entropy(each, labels) for each in others), torch.zeros(()))
    return nn.functional.cross_entropy(first, labels) + 0.3 * aside


def audit_zoo(name: str) -> AuditReport:
    """Audit a network with random weights whose running statistics are those of its data."""
    torch.manual_seed(0)
    network = load_zoo_model(name)
    size = {"timm:levit_128s": 224, "timm:inception_v3": 139}.get(name, 96)
    images, labels = pictures(size, 160, 1)
    train, val = (
        list(zip(part[0].split(16), part[1].split(16), strict=True))
        for part in ((images[:128], labels[:128]), (images[128:], labels[128:]))
    )
    recalibrate_batch_norm(network.eval(), train)
    for layer in named_batch_norms(network).values():
        layer.num_batches_tracked.fill_(10_000)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    return audit_batch_norm(network, train, val_batches=val, loss=loss_of, optimizer=optimizer)


class Adapted(pl.LightningModule):
    """A `Training` under the Trainer."""

    def __init__(self, training: Training) -> None:
        super().__init__()
        self.training_plan = training
        self.network = training.network()

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = self.training_plan.loss(self.network(images).float(), labels)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.network(batch[0])

    def configure_optimizers(self):
        optimizer = self.training_plan.optimizer(self.network.parameters())
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, self.training_plan.rate), "interval": "step"}
        ]


def audit_training(training: Training, seed: int) -> AuditReport | None:
    """Train under the Trainer with the audit, all three stages."""
    torch.manual_seed(seed)
    module, audit, data = Adapted(training), BatchNormAudit(), DigitsDataModule()
    data.setup("fit")
    loaders = [
        DataLoader(part, batch_size=training.batch_size, shuffle=shuffle, drop_last=shuffle)
        for part, shuffle in ((data.train_data, True), (data.val_data, False))
    ]
    # Said by its name, float16 on a CPU becomes bfloat16.
    precision = {
        None: {},
        torch.bfloat16: {"precision": "bf16-mixed"},
        torch.float16: {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", training.loss_scale))},
    }[training.dtype]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=training.steps,
        accumulate_grad_batches=training.accumulate,
        callbacks=[audit],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **precision,
    )
    trainer.fit(module, *loaders)
    images, labels = digits()
    module.eval()
    with torch.no_grad():
        accuracy = (module.network(images).argmax(1) == labels).float().mean().item()
    if audit.report is None:
        raise RuntimeError(f"no report of {training.name!r}")
    return audit.report if accuracy >= training.accuracy else None
