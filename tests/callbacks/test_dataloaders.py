"""The second loader gives the same data in the same way, and the first never notices."""

import random
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from bn_lightning.callbacks.dataloaders import rebuilt_loader, rebuilt_train_loader
from bn_lightning.errors import BatchNormError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Uncopyable(Dataset):
    def __len__(self):
        return 23

    def __getitem__(self, index):
        return index

    def __deepcopy__(self, memo):
        raise AssertionError("a dataset may be huge and is never copied")


class ByParity(Sampler):
    """A batch sampler of the user's own, with a generator inside and a hold on the dataset."""

    def __init__(self, dataset, generator):
        self.dataset, self.generator = dataset, generator

    def __len__(self):
        return 2

    def __iter__(self):
        order = torch.randperm(len(self.dataset), generator=self.generator).tolist()
        yield [index for index in order if index % 2]
        yield [index for index in order if not index % 2]


class Stride(RandomSampler):
    def __iter__(self):
        return (index for index in list(super().__iter__())[::2])


def collate(items):
    return torch.tensor(items) * 10


DATA = Uncopyable()
WEIGHTS = torch.arange(1.0, 24.0)
LOADERS = {
    "sequential": lambda: DataLoader(DATA, batch_size=5),
    "shuffle": lambda: DataLoader(DATA, batch_size=5, shuffle=True, drop_last=True),
    "own-generator": lambda: DataLoader(DATA, batch_size=5, shuffle=True, generator=seeded(3)),
    "replacement": lambda: DataLoader(DATA, batch_size=5, sampler=RandomSampler(DATA, True, 37, seeded(4))),
    "subset": lambda: DataLoader(DATA, batch_size=2, sampler=SubsetRandomSampler([1, 5, 7], seeded(5))),
    "weighted": lambda: DataLoader(DATA, batch_size=4, sampler=WeightedRandomSampler(WEIGHTS, 12, generator=seeded(6))),
    "distributed": lambda: DataLoader(DATA, batch_size=4, sampler=DistributedSampler(DATA, 3, 1, seed=9)),
    "sampler-subclass": lambda: DataLoader(DATA, batch_size=4, sampler=Stride(DATA, generator=seeded(7))),
    "list-as-sampler": lambda: DataLoader(DATA, batch_size=4, sampler=[3, 1, 2]),
    "batch-sampler": lambda: DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 6, True)),
    "own-batch-sampler": lambda: DataLoader(DATA, batch_sampler=ByParity(DATA, seeded(8))),
    "no-batching": lambda: DataLoader(DATA, batch_size=None, shuffle=True),
    "collate": lambda: DataLoader(DATA, batch_size=5, collate_fn=collate, shuffle=True),
}


def lists(loader):
    return [torch.as_tensor(batch).reshape(-1).tolist() for batch in loader]


def flat(loader):
    return [index for batch in lists(loader) for index in batch]


def random_states():
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


@pytest.mark.parametrize("name", LOADERS)
def test_the_first_loader_goes_on_as_if_nothing_had_been(name):
    alone, watched = LOADERS[name](), LOADERS[name]()
    torch.manual_seed(1)
    expected = [lists(alone), lists(alone)]
    torch.manual_seed(1)
    found = [lists(watched)]
    second = rebuilt_loader(watched)
    before = random_states()
    again = rebuilt_loader(watched)
    assert random_states() == before
    once = lists(second) if name != "sampler-subclass" else None
    torch.set_rng_state(torch.tensor(before[0], dtype=torch.uint8))
    found.append(lists(watched))
    assert found == expected
    assert second.dataset is DATA
    assert (second.batch_size, second.drop_last) == (watched.batch_size, watched.drop_last)
    assert second.collate_fn is watched.collate_fn
    if once is not None:
        assert [len(batch) for batch in once] == [len(batch) for batch in expected[0]]
        assert lists(again) == once, "a fixed seed"


@pytest.mark.parametrize("name", [name for name in LOADERS if name not in ("replacement", "weighted")])
def test_one_epoch_holds_the_same_examples(name):
    torch.manual_seed(2)
    loader = LOADERS[name]()
    first, second = flat(loader), flat(rebuilt_loader(loader))
    if loader.drop_last or name in ("sampler-subclass", "batch-sampler"):
        assert len(first) == len(second)
    else:
        assert sorted(first) == sorted(second)


def test_known_samplers_are_made_anew_from_their_settings():
    rebuilt = rebuilt_loader(LOADERS["distributed"]()).batch_sampler.sampler
    assert (rebuilt.num_replicas, rebuilt.rank, rebuilt.seed, rebuilt.shuffle) == (3, 1, 9, True)
    rebuilt = rebuilt_loader(LOADERS["weighted"]()).batch_sampler.sampler
    assert rebuilt.num_samples == 12
    assert torch.equal(rebuilt.weights, WEIGHTS.double())
    assert type(rebuilt_loader(LOADERS["sequential"]()).batch_sampler.sampler) is SequentialSampler
    loader = LOADERS["distributed"]()
    loader.sampler.set_epoch(4)
    assert lists(rebuilt_loader(loader)) == lists(loader)


def test_weighted_sampling_keeps_its_weights():
    weights = torch.zeros(23)
    weights[[4, 9]] = 1.0
    loader = DataLoader(DATA, batch_size=50, sampler=WeightedRandomSampler(weights, 50))
    assert set(flat(rebuilt_loader(loader))) == {4, 9}


def test_workers_are_kept_but_do_not_persist():
    loader = DataLoader(DATA, 5, num_workers=2, persistent_workers=True, worker_init_fn=print, prefetch_factor=3)
    second = rebuilt_loader(loader)
    assert (second.num_workers, second.persistent_workers, second.prefetch_factor) == (2, False, 3)
    assert second.worker_init_fn is print
    assert second.generator is not None


class Drawing(Sampler):
    def __iter__(self):
        return iter([1])

    def __deepcopy__(self, memo):
        torch.rand(1)
        return Drawing()


def test_making_a_loader_draws_nothing():
    before = random_states()
    rebuilt_loader(DataLoader(DATA, sampler=Drawing()))
    assert random_states() == before


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(8))


class OwnWay(DataLoader):
    def __iter__(self):
        return iter([1, 2])


class Locked(Sampler):
    def __init__(self):
        self.lock = threading.Lock()

    def __iter__(self):
        return iter([1])


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        pytest.param(lambda: DataLoader(Stream()), "Stream is an IterableDataset.*audit_batch_norm", id="iterable"),
        pytest.param(lambda: OwnWay(DATA), "OwnWay iterates in its own way", id="own-iter"),
        pytest.param(lambda: iter([1]), "is a list_iterator, not a DataLoader", id="iterator"),
        pytest.param(lambda: DataLoader(DATA, sampler=Locked()), "Locked cannot be copied", id="uncopyable"),
    ],
)
def test_refusals_say_why_and_what_instead(loader, message):
    with pytest.raises(BatchNormError, match=message):
        rebuilt_loader(loader())


@pytest.mark.parametrize(
    "wrap",
    [lambda x: x, lambda x: [x], lambda x: {"a": x}, lambda x: {"a": (x,)}],
    ids=["bare", "list", "dict", "nested"],
)
def test_takes_the_only_loader(wrap):
    loader = LOADERS["sequential"]()
    assert len(rebuilt_train_loader(SimpleNamespace(train_dataloader=wrap(loader)))) == len(loader)


@pytest.mark.parametrize(
    ("loaders", "found"),
    [pytest.param(None, r"found 0 \(none\)", id="none"), pytest.param([1, 2], r"found 2 \(int, int\)", id="two")],
)
def test_refuses_to_guess_among_loaders(loaders, found):
    with pytest.raises(BatchNormError, match=found):
        rebuilt_train_loader(SimpleNamespace(train_dataloader=loaders))
