"""A second loader over the training set, so that the Trainer's own is never iterated."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from bn_lightning.errors import BatchNormError
from bn_lightning.preservation import preserved_rng

__all__ = ["rebuilt_loader", "rebuilt_train_loader", "rebuilt_val_loader", "train_loaders"]

_SEED = 0
_INSTEAD = (
    "Call the function yourself instead, with batches of your own: bn_lightning.audit_batch_norm(model, batches), or "
    "recalibrate_batch_norm."
)


def rebuilt_train_loader(trainer: Any) -> DataLoader[Any]:
    """Build a second loader over the data the Trainer trains on (see `rebuilt_loader`).

    Raises:
        BatchNormError: If the Trainer has no training loader yet or several of them, or one that cannot be rebuilt.
    """
    loaders = train_loaders(trainer)
    if len(loaders) != 1:
        what = ", ".join(type(loader).__name__ for loader in loaders) or "none"
        raise BatchNormError(
            f"expected exactly one training DataLoader, found {len(loaders)} ({what}): which of them the network's "
            f"input comes from cannot be guessed. {_INSTEAD}"
        )
    return rebuilt_loader(loaders[0])


def train_loaders(trainer: Any) -> list[Any]:
    """List the loaders the Trainer trains on, whatever they are collected in; they are not to be drawn from."""
    return list(_leaves(trainer.train_dataloader))


def rebuilt_val_loader(trainer: Any) -> DataLoader[Any] | None:
    """Build a second loader over the data the Trainer validates on; ``None`` if it validates on none.

    Raises:
        BatchNormError: If there are several, or it cannot be rebuilt.
    """
    loaders = list(_leaves(trainer.val_dataloaders))
    if len(loaders) > 1:
        raise BatchNormError(f"there are {len(loaders)} validation DataLoaders, and which one to use cannot be guessed")
    return rebuilt_loader(loaders[0]) if loaders else None


def rebuilt_loader(loader: Any) -> DataLoader[Any]:
    """Build a second loader over the same dataset that shares no state with the first.

    Batch size, collation, workers and kind of sampler are the same. Samplers and workers draw from generators of their
    own with a fixed seed, so that the first loader's order is not touched; workers do not persist. The dataset is the
    same object: one that changes itself when it is read is the user's own matter.

    Raises:
        BatchNormError: If it is no ``DataLoader``, iterates in its own way, or its data or sampler cannot be gone
            through a second time.

    Example:
        >>> loader = DataLoader(range(5), batch_size=2, shuffle=True, drop_last=True)
        >>> len(rebuilt_loader(loader)), next(iter(rebuilt_loader(loader))).shape
        (2, torch.Size([2]))
    """
    if not isinstance(loader, DataLoader):
        raise BatchNormError(
            f"the training data is a {type(loader).__name__}, not a DataLoader: it may give its data only once. "
            f"{_INSTEAD}"
        )
    if isinstance(loader.dataset, IterableDataset):
        raise BatchNormError(
            f"the training data {type(loader.dataset).__name__} is an IterableDataset: going through it a second time "
            f"could take data away from the training. {_INSTEAD}"
        )
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise BatchNormError(
            f"the training loader {type(loader).__name__} iterates in its own way, which a second loader could not "
            f"repeat. {_INSTEAD}"
        )
    options: dict[str, Any] = {}
    if loader.num_workers:
        options["prefetch_factor"] = loader.prefetch_factor
        options["multiprocessing_context"] = loader.multiprocessing_context
    with preserved_rng():
        options.update(_order(loader))
        return DataLoader(
            loader.dataset,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            generator=_generator(),
            persistent_workers=False,
            **options,
        )


def _order(loader: DataLoader[Any]) -> dict[str, Any]:
    batches = loader.batch_sampler
    if batches is None:  # the dataset gives whole batches
        return {"sampler": _second(loader.sampler, loader), "batch_size": None}
    if type(batches) is not BatchSampler:
        return {"batch_sampler": _second(batches, loader)}
    sampler = _second(batches.sampler, loader)
    if loader.batch_size is None:  # given as batch_sampler=
        return {"batch_sampler": BatchSampler(sampler, batches.batch_size, batches.drop_last)}
    return {"sampler": sampler, "batch_size": loader.batch_size, "drop_last": loader.drop_last}


def _second(sampler: Any, loader: DataLoader[Any]) -> Sampler[Any] | Iterable[Any]:
    """Make a sampler of the same kind with a generator of its own."""
    # A subclass may do anything in its __iter__: only torch's own are known well enough to be made anew.
    if type(sampler) is SequentialSampler:
        return SequentialSampler(sampler.data_source)
    if type(sampler) is RandomSampler:
        count = sampler.num_samples
        return RandomSampler(sampler.data_source, sampler.replacement, count, generator=_generator())
    if type(sampler) is SubsetRandomSampler:
        return SubsetRandomSampler(sampler.indices, generator=_generator())
    if type(sampler) is WeightedRandomSampler:
        weights: Any = sampler.weights
        return WeightedRandomSampler(weights, sampler.num_samples, sampler.replacement, generator=_generator())
    if type(sampler) is DistributedSampler:
        second: DistributedSampler[Any] = DistributedSampler(
            sampler.dataset,
            num_replicas=sampler.num_replicas,
            rank=sampler.rank,
            shuffle=sampler.shuffle,
            seed=sampler.seed,
            drop_last=sampler.drop_last,
        )
        second.set_epoch(sampler.epoch)
        return second
    try:
        return copy.deepcopy(sampler, {id(loader.dataset): loader.dataset})
    except Exception as error:
        raise BatchNormError(
            f"the training loader's {type(sampler).__name__} cannot be copied ({type(error).__name__}: {error}), and "
            f"drawing from it would change the training's order. {_INSTEAD}"
        ) from error


def _leaves(loaders: Any) -> Iterator[Any]:
    """Find the loaders in what a Trainer may be given: one, or dicts, lists and tuples of them."""
    if isinstance(loaders, Mapping):
        for inner in loaders.values():
            yield from _leaves(inner)
    elif isinstance(loaders, list | tuple):
        for inner in loaders:
            yield from _leaves(inner)
    elif loaders is not None:
        yield loaders


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(_SEED)
