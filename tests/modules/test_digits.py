import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from bn_lightning.errors import BatchNormError
from bn_lightning.modules import DigitsDataModule


def ready(**options):
    data = DigitsDataModule(**options)
    data.setup("fit")
    return data


def test_every_digit_is_in_exactly_one_part():
    data = ready()
    parts = [part.tensors[0] for part in (data.train_data, data.val_data, data.test_data)]
    assert [len(part) for part in parts] == [1257, 180, 360]
    images = torch.cat(parts).flatten(1).double().numpy()
    raw = load_digits().data
    # Undo the standardization by what 0 and 16 became, and compare as multisets of images.
    low, high = images.min(), images.max()
    restored = np.rint((images - low) / (high - low) * 16)
    assert sorted(map(tuple, restored)) == sorted(map(tuple, raw))


def test_training_pixels_are_standardized():
    pixels = ready().train_data.tensors[0]
    assert abs(pixels.mean()) < 1e-5
    assert pixels.std() == pytest.approx(1, abs=1e-5)


def test_the_split_is_fixed_by_its_seed():
    one, same, other = ready(), ready(), ready(split_seed=1)
    assert torch.equal(one.test_data.tensors[1], same.test_data.tensors[1])
    assert not torch.equal(one.test_data.tensors[1], other.test_data.tensors[1])


def test_training_is_shuffled_and_evaluation_is_not():
    data = ready(batch_size=50)
    torch.manual_seed(0)
    first, second = (torch.cat([labels for _, labels in data.train_dataloader()]) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(torch.cat([labels for _, labels in data.test_dataloader()]), data.test_data.tensors[1])


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(BatchNormError, match=r"pip install 'bn-lightning\[demo\]'"):
        DigitsDataModule().setup("fit")
