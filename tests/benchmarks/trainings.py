"""Small trainings on real digits, healthy ones and ones with one fault each, watched as the callbacks watch."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bn_lightning.modules import DigitsDataModule
from bn_lightning.monitoring import ActivationWatch, Alert, AlertRules, Cadence, RunningStatisticsWatch
from bn_lightning.selection import named_batch_norms


@dataclass(frozen=True)
class Training:
    """How one network is trained.

    Attributes:
        name: What is special about it.
        network: Builds it.
        optimizer: Builds the optimizer of its parameters.
        batch_size: Images a micro-batch.
        steps: Optimizer steps.
        accuracy: What it has to reach on its training images to count as healthy.
        warmup: Steps over which the learning rate grows from 0.
        decay: Whether it then falls along a cosine.
        loss: Of the network's output and the labels.
        accumulate: Micro-batches a step.
        dtype: Of autocast; with float16 a gradient scaler is used.
        loss_scale: What that begins with.
        before_step: Called with (network, step) before each step: where faults are put in.
        images: Changes a batch of images, given the step.
        expected: The rules that have to speak, at least one of them; none for a healthy training.
    """

    name: str
    network: Callable[[], nn.Module]
    optimizer: Callable[..., torch.optim.Optimizer]
    batch_size: int = 64
    steps: int = 601
    accuracy: float = 0.98
    warmup: int = 0
    decay: bool = False
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy
    accumulate: int = 1
    dtype: torch.dtype | None = None
    loss_scale: float = 2.0**16
    before_step: Callable[[nn.Module, int], None] = lambda network, step: None
    images: Callable[[Tensor, int], Tensor] = lambda images, step: images
    expected: tuple[str, ...] = field(default=())

    def rate(self, step: int) -> float:
        """Return the factor of the learning rate."""
        if step < self.warmup:
            return step / self.warmup
        return 0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.decay else 1.0


@dataclass
class Outcome:
    """What became of a training: its accuracy on the training images, how many samples were seen, what was told."""

    accuracy: float
    samples: int
    alerts: list[Alert]


def digits() -> tuple[Tensor, Tensor]:
    """Return the training images and labels."""
    data = DigitsDataModule()
    data.setup("fit")
    return data.train_data.tensors


def run(training: Training, rules: AlertRules, data: tuple[Tensor, Tensor], seed: int = 0) -> Outcome:
    """Train, and show each sample to the rules."""
    torch.manual_seed(seed)
    model = training.network()
    optimizer = training.optimizer(model.parameters())
    rates = [group["lr"] for group in optimizer.param_groups]
    scaler = torch.amp.GradScaler("cpu", training.loss_scale, enabled=training.dtype == torch.float16)
    watch = ActivationWatch(gradients=True)
    watch.install(model)
    running = RunningStatisticsWatch(named_batch_norms(model))
    cadence, batches = Cadence(), endless(data, training.batch_size)
    alerts: list[Alert] = []
    samples = 0
    for step in range(training.steps):
        training.before_step(model, step)
        watch.sampling = due = cadence.is_due(step)
        running.begin()
        optimizer.zero_grad()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * training.rate(step)
        for _ in range(training.accumulate):
            images, labels = next(batches)
            with torch.autocast("cpu", training.dtype, enabled=training.dtype is not None):
                logits = model(training.images(images, step))
            loss = training.loss(logits.float(), labels) / training.accumulate
            scaler.scale(loss).backward()
        scale = torch.tensor(scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        running.end(step)
        if due:
            samples += 1
            sample = watch.start_flush(step=step, gradient_scale=scale)()
            alerts += rules.of_activations(sample)
            alerts += rules.of_gradients(sample.gradients)
            alerts += rules.of_running(running.read())
    model.eval()
    with torch.no_grad():
        accuracy = (model(training.images(data[0], training.steps)).argmax(1) == data[1]).float().mean().item()
    return Outcome(accuracy, samples, alerts)


def endless(data: tuple[Tensor, Tensor], batch_size: int):
    """Go through shuffled batches for ever; the last of an epoch is smaller, unless it is one image."""
    while True:
        for part in torch.randperm(len(data[1])).split(batch_size):
            if len(part) > 1:
                yield data[0][part], data[1][part]
