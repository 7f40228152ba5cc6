"""The batches that the audit under a Trainer runs on, from loaders of its own."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch import Tensor

from bn_lightning.auditing.exchange import from_everyone
from bn_lightning.callbacks.batches import as_collected, input_of, of_the_loader
from bn_lightning.callbacks.dataloaders import rebuilt_train_loader, rebuilt_val_loader
from bn_lightning.callbacks.training_data import as_the_network_gets_it, count_batches
from bn_lightning.errors import AuditError, BatchNormError
from bn_lightning.internals import WeakTensorDictionary
from bn_lightning.preservation import preserved_rng

__all__ = ["AuditData"]


class AuditData:
    """Batches as ``training_step`` gets them, on the strategy's device and in the Trainer's precision.

    With several processes, what cannot be done in one is an error, or the same reason, in all.

    Args:
        trainer: That of the fit.
        max_batches: Of either kind, in this process.

    Attributes:
        training: Training batches.
        validation: Validation batches that ``training_step`` can take in place of them; ``None`` if there are none.
        no_validation: Why not, or ``None``.

    Raises:
        BatchNormError: If the training loader cannot be rebuilt, or has no data.
    """

    def __init__(self, trainer: Any, max_batches: int) -> None:
        self._trainer = trainer
        self._places = WeakTensorDictionary()
        self.training: list[Any] = []
        self.validation: list[Any] | None = None
        with preserved_rng(trainer.strategy.root_device):  # datasets draw from it
            drawn = from_everyone(lambda: self._draw(max_batches))
        if not any(number for number, _ in drawn):
            raise AuditError("the training DataLoader gave no data")
        self.no_validation = next((reason for _, reason in drawn if reason is not None), None)
        if self.no_validation is not None:
            self.validation = None

    def index_of(self, batch: Any) -> int:
        """Return a batch's place in its loader."""
        first = next(_tensors(batch), None)
        return 0 if first is None else int(self._places.get(first, 0))

    def forward(self, module: Any, batch: Any) -> object:
        """Run the module on a batch's first element, where no loss is read.

        Raises:
            AuditError: If that is no tensor.
        """
        x = input_of(of_the_loader(self._trainer.train_dataloader, batch))
        if x is None:
            raise AuditError(
                f"expected training batches that are a tensor or an (input, target, …) tuple, got a "
                f"{type(batch).__name__}: how the network is run on it cannot be guessed. Say so: "
                "BatchNormAudit(step=lambda module, batch: …), which returns the loss of a batch."
            )
        return module(x)

    def _draw(self, max_batches: int) -> tuple[int, str | None]:
        number = count_batches(self._trainer, max_batches)
        self.training = list(islice(self._moved(rebuilt_train_loader(self._trainer)), number))
        try:
            loader = rebuilt_val_loader(self._trainer)
        except BatchNormError as error:
            return len(self.training), str(error)
        limit = sum(self._trainer.num_val_batches)
        if loader is None or not limit:
            return len(self.training), "the Trainer validates on no data"
        self.validation = list(islice(self._moved(loader), int(min(max_batches, limit))))
        if not self.validation or not self.training:  # an empty share; the other processes' may not be
            return len(self.training), None
        trained, validated = structure(self.training[0]), structure(self.validation[0])
        if trained == validated:
            return len(self.training), None
        return len(self.training), (
            f"validation batches are {validated} where training batches are {trained}: training_step is not for them"
        )

    def _moved(self, loader: Any) -> Iterator[Any]:
        for index, batch in enumerate(loader):
            moved = as_the_network_gets_it(self._trainer, as_collected(self._trainer.train_dataloader, batch))
            first = next(_tensors(moved), None)
            if first is not None:
                self._places[first] = index
            yield moved


def structure(batch: Any) -> str:
    """Describe how a batch is built: its containers, keys and kinds.

    Example:
        >>> import torch
        >>> structure({"x": torch.zeros(2), "y": [torch.zeros(2), 3]})
        '{x: Tensor, y: (Tensor, int)}'
    """
    if isinstance(batch, tuple | list):
        return "(" + ", ".join(map(structure, batch)) + ")"
    if isinstance(batch, dict):
        return "{" + ", ".join(f"{key}: {structure(value)}" for key, value in batch.items()) + "}"
    return type(batch).__name__


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, dict | tuple | list):
        for part in batch.values() if isinstance(batch, dict) else batch:
            yield from _tensors(part)
