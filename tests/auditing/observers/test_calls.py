"""What a layer's batches were, against float64 NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from bn_lightning.auditing import AuditReading, audit_batch_norm
from bn_lightning.auditing.observer import observed_batch
from bn_lightning.auditing.observers.calls import CallObserver
from bn_lightning.auditing.observers.padding import PaddingObserver
from bn_lightning.auditing.rules import RULES, Rule
from bn_lightning.errors import AuditError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def watch(model, batches, observer=None, layers=None):
    """Run a pass, in which an exception of a batch is passed over."""
    observer = observer or CallObserver()
    with observer.watching(model, layers or {"": model}, "population"):
        for x in batches:
            try:
                with observed_batch([observer]):
                    model(x)
            except RuntimeError:
                pass
    return observer


@pytest.mark.parametrize("sides", [(), (7,), (3, 4), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("offset", [0.0, 100.0], ids="offset={:g}".format)
def test_means_and_their_spread(sides, dtype, offset):
    layer = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[len(sides)](5).double()
    sizes = (8, 8, 3)
    batches = [(offset + torch.randn(n, 5, *sides, generator=seeded(n + i))).to(dtype) for i, n in enumerate(sizes)]
    observer = CallObserver()
    with observer.watching(layer, {"": layer}, "population"):
        for x in batches:
            with observed_batch([observer]):
                layer.forward = lambda x: x  # a hook needs no layer that takes the dtype
                layer(x)
    calls = observer.calls()[""]
    examples = [x.double().numpy().reshape(*x.shape[:2], -1).mean(2) for x in batches]
    values = int(np.prod(sides))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5 * (1 + offset)
    assert calls.examples == sizes
    assert calls.values == tuple(n * values for n in sizes)
    assert (calls.typical_examples, calls.typical_values) == (8, 8 * values)
    assert calls.by_example
    assert (calls.per_batch, calls.each) == (1, ())
    np.testing.assert_allclose(calls.means, [each.mean(0) for each in examples], atol=tolerance)
    every = np.concatenate(examples)
    np.testing.assert_allclose(calls.mean, every.mean(0), atol=tolerance)
    within = sum(each.var(0, ddof=0) * len(each) for each in examples) / (len(every) - 3)
    np.testing.assert_allclose(calls.within, within, atol=tolerance)
    spreads = [
        ((x.double().numpy() - each.mean(0).reshape(5, *[1] * len(sides))) ** 2).reshape(*x.shape[:2], -1).mean(2)
        for x, each in zip(batches, examples, strict=True)
    ]
    fourths = sum(each.var(0, ddof=0) * len(each) for each in spreads) / (len(every) - 3)
    np.testing.assert_allclose(calls.within_squares, fourths, atol=10 * tolerance)
    np.testing.assert_allclose(calls.variance_of_variance, fourths / len(every), atol=10 * tolerance)
    between = sum(len(each) * (each.mean(0) - every.mean(0)) ** 2 for each in examples) / 2
    np.testing.assert_allclose(calls.between, between, atol=10 * tolerance)
    np.testing.assert_allclose(calls.variance_of_mean, within / len(every), atol=tolerance)


def test_examples_drawn_at_random_have_a_ratio_of_one():
    layer = nn.BatchNorm2d(64)
    x = torch.randn(512, 64, 3, 3, generator=seeded()) + torch.randn(512, 64, 1, 1, generator=seeded(1))
    calls = watch(layer, x.split(16)).calls()[""]
    assert float((calls.between / calls.within).mean()) == pytest.approx(1, abs=0.1)


class Twice(nn.Module):
    """Calls one layer twice, folds time into the first axis for another, and fails on command."""

    def __init__(self):
        super().__init__()
        self.shared, self.frames = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x):
        y = self.shared(x.mean(1))
        y = self.shared(y + 5)
        if x.isnan().any():
            raise RuntimeError("on command")
        return self.frames(x.flatten(0, 1)), y


def test_each_call_of_a_shared_layer_and_batches_that_failed():
    model, x = Twice(), torch.randn(6, 8, 4, 3, generator=seeded())
    poisoned = x.clone()
    poisoned[2] = torch.nan
    observer = watch(model, poisoned, layers={"shared": model.shared, "frames": model.frames})
    calls = observer.calls()
    assert list(calls) == ["shared", "frames"]
    assert calls["shared"].examples == (8,) * 5
    assert (calls["shared"].per_batch, len(calls["shared"].each)) == (2, 2)
    kept = torch.cat([x[:2], x[3:]]).mean(2).flatten(0, 1).double()
    torch.testing.assert_close(calls["shared"].each[0].mean, kept.mean(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(calls["shared"].each[1].mean, torch.full((3,), 5.0).double(), atol=1e-6, rtol=0)
    assert calls["shared"].by_example
    assert not calls["frames"].by_example
    assert calls["frames"].examples == (32,) * 5


def test_hooks_are_gone_after_a_pass_also_after_an_error():
    model = Twice()
    with pytest.raises(AuditError, match="on command"):
        audit_batch_norm(model, [torch.full((4, 4, 3), torch.nan)])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_padding_of_a_failed_batch_does_not_count():
    class Fails(nn.BatchNorm1d):
        def forward(self, x):
            if x.shape[0] == 3:
                raise RuntimeError("on command")
            return super().forward(x)

    layer, observer = Fails(2), PaddingObserver()
    padded = torch.randn(4, 2, 10, generator=seeded())
    padded[1, :, 4:] = 0
    watch(layer, [torch.zeros(3, 2, 10), padded], observer)
    assert observer.padding()[""].share == pytest.approx(6 / 40)
    assert observer.padding()[""].longest == 6


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.slug)
def test_every_rule_finds_nothing_where_nothing_was_seen(rule: Rule):
    assert list(rule.find(rule, AuditReading(nn.Identity(), ()))) == []
