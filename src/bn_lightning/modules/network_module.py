"""What the modules here have in common: the network, its loss, its optimizer, and the way out."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import skip_init
from torchmetrics import MeanMetric, Metric, MetricCollection
from typing_extensions import override

from bn_lightning.errors import BatchNormError
from bn_lightning.folding.fold import FoldResult, fold_batch_norm
from bn_lightning.folding.ship import ShippedFile, require_format, ship_network
from bn_lightning.layers.convert import convert_batch_norm
from bn_lightning.modules.network_source import open_source, require_plain
from bn_lightning.modules.optimization import build_optimizer, build_schedule
from bn_lightning.modules.outputs import LogitsOnly, logits_of, weighted_logits
from bn_lightning.modules.parameter_groups import decay_groups
from bn_lightning.preservation import preserved
from bn_lightning.selection import unwrap
from bn_lightning.tracing.nested import map_tensors
from bn_lightning.zoo import default_input_size, is_zoo_name

__all__ = ["NetworkModule"]


class NetworkModule(pl.LightningModule):
    """Train a network whose output has one logit a class, (N, num_classes, *), on labels (N, *).

    A subclass says in `metrics` what is measured in evaluation. The arguments are told in `ImageClassifier`.
    """

    def __init__(
        self,
        model: str | dict[str, Any] | nn.Module | None = "residual",
        num_classes: int = 10,
        norm: str | None = None,
        norm_options: dict[str, Any] | None = None,
        optimizer: str = "sgd",
        optimizer_options: dict[str, Any] | None = None,
        learning_rate: float = 0.1,
        weight_decay: float = 5e-4,
        schedule: str = "one_cycle",
        schedule_options: dict[str, Any] | None = None,
        network_options: dict[str, Any] | None = None,
        pretrained: bool = False,
        checkpoint: str | None = None,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        if model is None:
            kind = type(self).__name__
            raise BatchNormError(
                "this module was trained with a network object, which a checkpoint does not hold; "
                f"pass it: {kind}.load_from_checkpoint(path, model=network)"
            )
        hyperparameters = {
            "model": None if isinstance(model, nn.Module) else model,
            "num_classes": num_classes,
            "norm": norm,
            "norm_options": norm_options,
            "optimizer": optimizer,
            "optimizer_options": optimizer_options,
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "schedule": schedule,
            "schedule_options": schedule_options,
            "network_options": network_options,
            "pretrained": pretrained,
            "checkpoint": checkpoint,
            "ignore_index": ignore_index,
        }
        for name, value in hyperparameters.items():
            require_plain(name, value)
        self.save_hyperparameters(hyperparameters)
        # A wrong name or option should not wait until the data is there.
        self._optimization(skip_init(nn.Linear, 1, 1), steps=lambda: 2, epochs=1)
        self.model = open_source(
            model, num_classes, network_options=network_options, pretrained=pretrained, checkpoint=checkpoint
        )
        if norm is not None:
            _convert(self.model, norm, norm_options or {})
        elif norm_options:
            raise BatchNormError(f"norm_options={norm_options} are for a norm=, such as 'ghost', and there is none.")
        if isinstance(model, str) and is_zoo_name(model):  # others may take another size than their class says
            self.example_input_array = _example_inputs(self.model)
        # As groups, two metrics that agree on the first batch would be taken for one from then on.
        measured = MetricCollection({**self.metrics(num_classes, ignore_index)}, compute_groups=False)
        self.val_metrics, self.test_metrics = measured.clone(prefix="val/"), measured.clone(prefix="test/")
        # NaN stays NaN. ("disable" does that too, but takes every weight for 1, torchmetrics 1.9.)
        self.val_loss, self.test_loss = (MeanMetric(nan_strategy=math.nan) for _ in range(2))

    @property
    @override
    def example_input_array(self) -> Any:
        """An example of what ``forward`` takes, where it is known, on the module's device and in its precision.

        Lightning's model summary runs on it, and under ``precision="bf16-true"`` fails if it is float32.
        """
        like = torch.empty((), device=self.device, dtype=self.dtype)  # type: ignore[arg-type]
        return map_tensors(super().example_input_array, lambda x: x.to(like if x.is_floating_point() else like.device))

    @example_input_array.setter
    def example_input_array(self, example: Any) -> None:
        pl.LightningModule.example_input_array.__set__(self, example)  # type: ignore[attr-defined]

    def metrics(self, num_classes: int, ignore_index: int) -> dict[str, Metric]:
        """Return what is measured of logits and labels in validation and test, by the name it is logged under."""
        raise NotImplementedError

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Return the main logits, (N, num_classes, *)."""
        return logits_of(self.model(images))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats of the labels that are not ``ignore_index``; 0 if there are none."""
        ignored = self.hparams["ignore_index"]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))  # the sum over an image overflows float16
        total = cross_entropy(wide, labels, ignore_index=ignored, reduction="sum")
        return total / (labels != ignored).sum().clamp(min=1)

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of the batch, those of auxiliary logits added with their weights."""
        images, labels = batch
        output = weighted_logits(self.model(images))
        for logits, _ in output:
            self._require_shapes(logits, labels)
        loss = torch.stack([weight * self.loss(logits, labels) for logits, weight in output]).sum()
        self.log("train/loss", loss, batch_size=len(labels))
        return loss

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss and the metrics."""
        self._evaluate("val", self.val_loss, self.val_metrics, batch)

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss and the metrics."""
        self._evaluate("test", self.test_loss, self.test_metrics, batch)

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the likeliest class, (N, *)."""
        images = batch[0] if isinstance(batch, tuple | list) else batch
        return self(images).argmax(1)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer and the schedule that the hyperparameters name."""
        return self._optimization(
            self.model, steps=lambda: self.trainer.estimated_stepping_batches, epochs=self.trainer.max_epochs
        )

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the checkpoint rebuild its network without fetching weights that it brings itself."""
        saved = checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = {
            **saved,
            "pretrained": saved["pretrained"] and _depends_on_weights(saved["model"], self.model),
            "checkpoint": None,
        }

    def folded(self, example_inputs: Any = None, **options: Any) -> FoldResult:
        """Fold a copy of the network; this module stays as it is.

        Args:
            example_inputs: As for `fold_batch_norm`; ``example_input_array`` if left out.
            **options: As for `fold_batch_norm`, but ``inplace``.

        Returns:
            ``.model``, the network in its own class and evaluation mode, without Lightning; ``.report``.

        Raises:
            FoldError: As `fold_batch_norm`.
            BatchNormError: If there are no example inputs.
        """
        with preserved(self.model):
            self.model.eval()
            return fold_batch_norm(self.model, self._examples(example_inputs), inplace=False, **options)

    def ship(self, path: str | Path, images: Tensor | None = None) -> ShippedFile:
        """Write the folded network into one file; what it returns are the main logits, unless it is written as it is.

        Args:
            path: Its ending says the format: ``.pt2`` a program of ``torch.export``, ``.onnx``, or ``.pt`` the network
                as it is; see `ship_network`.
            images: Example inputs, (N, C, H, W); ``example_input_array`` if left out.

        Raises:
            FoldError: As `fold_batch_norm`.
            BatchNormError: As `ship_network`, or if there are no example inputs.
        """
        require_format(path)
        network = self.folded(images).model
        written_whole = Path(path).suffix.lower() in (".pt", ".pth")
        return ship_network(network if written_whole else LogitsOnly(network).eval(), self._examples(images), path)

    def _evaluate(
        self, stage: str, mean_loss: MeanMetric, metrics: MetricCollection, batch: tuple[Tensor, Tensor]
    ) -> None:
        images, labels = batch
        logits = self(images)
        self._require_shapes(logits, labels)
        # Of unequal batches, and batches with unequally many labels to ignore, this is still the mean over all labels.
        mean_loss.update(self.loss(logits, labels), (labels != self.hparams["ignore_index"]).sum())
        metrics.update(logits, labels)
        self.log(f"{stage}/loss", mean_loss, prog_bar=True, batch_size=len(labels))
        self.log_dict(metrics, prog_bar=True, batch_size=len(labels))

    def _require_shapes(self, logits: Tensor, labels: Tensor) -> None:
        expected = (len(labels), self.hparams["num_classes"], *labels.shape[1:])
        if tuple(logits.shape) != expected:
            raise BatchNormError(
                f"{type(self.model).__name__} gave logits of shape {list(logits.shape)} for labels of "
                f"{list(labels.shape)}; expected {list(expected)}, the second being num_classes."
            )

    def _examples(self, given: Any) -> Any:
        if given is not None:
            return given
        if self.example_input_array is None:
            raise BatchNormError(
                f"{type(self.model).__name__} does not say the size of its inputs: give the images of one batch."
            )
        return self.example_input_array

    def _optimization(
        self, network: nn.Module, *, steps: Callable[[], float], epochs: int | None
    ) -> OptimizerLRScheduler:
        named = self.hparams
        groups = decay_groups(network, named["weight_decay"])
        optimizer = build_optimizer(named["optimizer"], groups, named["learning_rate"], named["optimizer_options"])
        schedule = build_schedule(named["schedule"], optimizer, named["schedule_options"], steps=steps, epochs=epochs)
        return {"optimizer": optimizer, "lr_scheduler": schedule} if schedule else {"optimizer": optimizer}


def _convert(network: nn.Module, norm: str, options: Mapping[str, Any]) -> None:
    report = convert_batch_norm(network, norm, **options)
    kept = [row for row in report.rows if row.reason.startswith("kept")]
    if kept:
        rank_zero_warn(
            f"norm={norm!r} left {len(kept)} of {len(report.rows)} BatchNorm layers as they are: "
            f"{', '.join(row.name for row in kept)}. The first is {kept[0].reason}."
        )


def _example_inputs(network: nn.Module) -> Tensor | None:
    size = default_input_size(network)
    # Not zeros: the comparison of a folded network on them would show little.
    return None if size is None else torch.randn(2, *size, generator=torch.Generator().manual_seed(0))


def _depends_on_weights(source: Any, network: nn.Module) -> bool:
    """Tell whether torchvision builds a network otherwise with its weights: auxiliary parts, inputs transformed."""
    of_torchvision = isinstance(source, str) and source.startswith("torchvision:")
    return of_torchvision and any(hasattr(unwrap(network), name) for name in ("aux_logits", "aux_classifier"))
