"""Logits out of what torchvision, transformers and plain networks return, and the weights of auxiliary ones."""

from collections import OrderedDict
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torchvision.models.googlenet import GoogLeNetOutputs
from torchvision.models.inception import InceptionOutputs

from bn_lightning.errors import BatchNormError
from bn_lightning.modules.outputs import logits_of, weighted_logits

A, B, C = (torch.full((2, 3), float(value)) for value in (1, 2, 3))


@dataclass
class Record:
    loss: Tensor | None
    logits: Tensor


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        pytest.param(A, [(A, 1.0)], id="tensor"),
        pytest.param(GoogLeNetOutputs(A, B, C), [(A, 1.0), (C, 0.3), (B, 0.3)], id="googlenet"),
        pytest.param(GoogLeNetOutputs(A, None, None), [(A, 1.0)], id="googlenet without auxiliaries"),
        pytest.param(InceptionOutputs(A, B), [(A, 1.0), (B, 0.4)], id="inception"),
        pytest.param(OrderedDict(out=A, aux=B), [(A, 1.0), (B, 0.5)], id="deeplab"),
        pytest.param({"aux": B, "out": A}, [(A, 1.0), (B, 0.5)], id="order of keys"),
        pytest.param({"loss": C, "logits": A}, [(A, 1.0)], id="mapping with logits"),
        pytest.param(Record(None, A), [(A, 1.0)], id="record with logits"),
        pytest.param(SimpleNamespace(logits=A, hidden_states=(B,)), [(A, 1.0)], id="object with logits"),
    ],
)
def test_every_kind_of_output(output, expected):
    found = weighted_logits(output)
    assert [(id(logits), weight) for logits, weight in found] == [(id(logits), weight) for logits, weight in expected]
    assert logits_of(output) is A


@pytest.mark.parametrize(
    ("output", "message"),
    [
        pytest.param((A, B), "returned a tuple; expected logits", id="tuple"),
        pytest.param({"features": A}, "returned a dict with 'features'; expected logits", id="dict"),
        pytest.param({"out": {"a": A}}, "returned a dict with 'out'; expected logits", id="nested"),
        pytest.param(None, "returned a NoneType", id="nothing"),
    ],
)
def test_what_has_no_logits_is_named(output, message):
    with pytest.raises(BatchNormError, match=message):
        logits_of(output)
