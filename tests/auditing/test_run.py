"""Networks and batches of every shape, what a loss may be, and what is refused with its cure."""

import collections
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from auditing import slow_readings as slow
from torch import nn

from bn_lightning.auditing import audit_batch_norm
from bn_lightning.errors import AuditError
from bn_lightning.recalibration.run import Run, examples_in

Pair = collections.namedtuple("Pair", ["x", "y"])


def same_readings(one, other):
    for name, reading in other.losses.readings().items():
        assert one.losses.readings()[name].mean == pytest.approx(reading.mean, rel=1e-12), name
    predicted = {row.name: row.predicted_loss_change for row in one.layers}
    assert predicted == {row.name: pytest.approx(row.predicted_loss_change) for row in other.layers}


class SeveralInputs(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, factor, *, offset):
        return self.net(x * factor + offset)


class DictInput(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, batch):
        logits = self.net(batch["image"])
        return {"logits": logits, "loss": F.cross_entropy(logits, batch["label"])}


@pytest.fixture(scope="module")
def plain():
    return audit_batch_norm(slow.net(dropout=0.0), slow.labelled(), loss=F.cross_entropy)


def test_several_inputs(plain):
    batches = [(x / 2 - 1, 2.0, y) for x, y in slow.labelled()]
    model = SeveralInputs(slow.net(dropout=0.0))
    one = audit_batch_norm(
        model, batches, step=lambda model, batch: F.cross_entropy(model(batch[0], batch[1], offset=2.0), batch[2])
    )
    assert [row.name for row in one.layers] == [f"net.{row.name}" for row in plain.layers]
    assert one.losses.deployed.mean == pytest.approx(plain.losses.deployed.mean)
    other = audit_batch_norm(
        model,
        [(x, y) for x, _, y in batches],
        loss=F.cross_entropy,
        forward=lambda model, batch: model(batch[0], 2.0, offset=2.0),
    )
    same_readings(one, other)


def test_batches_that_are_dicts_and_lose_their_labels(plain):
    """As ``batch.pop("label")`` in a step takes them, which the next pass wants back."""
    batches = [{"image": x, "label": y, "name": "a", "nested": [Pair(x, y)]} for x, y in slow.labelled()]

    def step(model, batch):
        label = batch.pop("label")
        assert isinstance(batch["nested"][0], Pair)
        batch["nested"].clear()
        return model({**batch, "label": label})

    model = DictInput(slow.net(dropout=0.0))
    report = audit_batch_norm(model, batches, step=step)
    assert report.losses.deployed.mean == pytest.approx(plain.losses.deployed.mean)
    assert all("label" in batch and len(batch["nested"]) == 1 for batch in batches)
    told = {each.what: each.reason for each in report.not_looked}
    assert "example_inputs= was not given" in told["recorded forward pass"]


def test_a_step_that_writes_into_its_batch_has_the_same_samples_in_every_pass(plain):
    batches = [(x + 1, y) for x, y in slow.labelled()]
    before = [x.clone() for x, _ in batches]

    def step(model, batch):
        batch[0].sub_(1)
        return F.cross_entropy(model(batch[0]), batch[1])

    report = audit_batch_norm(slow.net(dropout=0.0), batches, step=step)
    assert report.losses.deployed.mean == pytest.approx(plain.losses.deployed.mean)
    assert report.losses.recalibrated.mean == pytest.approx(plain.losses.recalibrated.mean)
    assert all(torch.equal(x, kept) for (x, _), kept in zip(batches, before, strict=True))


def test_a_lightning_module_through_its_training_step(plain):
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = slow.net(dropout=0.0)
            self.seen = []

        def training_step(self, batch, batch_idx):
            self.seen.append(batch_idx)
            return {"loss": F.cross_entropy(self.net(batch[0]), batch[1])}

    module = Module().train()
    report = audit_batch_norm(module, slow.labelled(), step=lambda module, batch: module.training_step(batch, 0))
    for name, reading in plain.losses.readings().items():
        assert report.losses.readings()[name].mean == pytest.approx(reading.mean)
    assert module.seen == []

    class Needy(Module):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, self.trainer.global_step)

    with pytest.raises(RuntimeError, match="not attached to a `Trainer`"):
        audit_batch_norm(Needy(), slow.labelled(), step=lambda module, batch: module.training_step(batch, 0))


def test_targets_in_containers_and_losses_of_shape_one(plain):
    batches = [(x, {"label": (y, "name")}) for x, y in slow.labelled()]
    report = audit_batch_norm(
        slow.net(dropout=0.0), batches, loss=lambda output, target: F.cross_entropy(output, target["label"][0])[None]
    )
    same_readings(report, plain)


@pytest.mark.parametrize(
    "kind", [float, np.float32, lambda loss: {"loss": float(loss)}], ids=["float", "numpy", "dict"]
)
def test_numbers_are_read(kind, plain):
    report = audit_batch_norm(
        slow.net(dropout=0.0),
        slow.labelled(),
        step=lambda model, batch: kind(F.cross_entropy(model(batch[0]), batch[1]).detach()),
    )
    assert report.losses.deployed.mean == pytest.approx(plain.losses.deployed.mean, rel=1e-6)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        pytest.param(torch.ones(8), r"tensor of shape \(8,\) and dtype torch.float32.*\.mean\(\)", id="vector"),
        pytest.param(torch.ones((), dtype=torch.complex64), "dtype torch.complex64", id="complex"),
        pytest.param("0.3", "got a str", id="text"),
        pytest.param(True, "got a bool", id="flag"),
        pytest.param((torch.ones(()), 1), "got a tuple", id="tuple"),
        pytest.param({"cost": torch.ones(())}, r"a dict of \['cost'\]", id="dict-without-loss"),
    ],
)
@pytest.mark.parametrize("way", ["loss", "step"])
def test_what_is_no_scalar_is_refused(value, message, way):
    with pytest.raises(AuditError, match=f"expected {way}= to return a scalar.*{message}"):
        audit_batch_norm(slow.net(), slow.labelled(), **{way: lambda one, other: value})


def test_no_loss_from_loss_is_refused():
    with pytest.raises(AuditError, match="got a NoneType"):
        audit_batch_norm(slow.net(), slow.labelled(), loss=lambda output, target: None)


def generator_that_is_used_up():
    batches = (batch for batch in slow.labelled())
    list(batches)
    return batches


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        pytest.param(slow.labelled, {"loss": len, "step": len}, "both step= and loss=", id="two-losses"),
        pytest.param(slow.labelled, {"forward": len, "step": len}, "both step= and forward=", id="two-ways"),
        pytest.param(list, {"loss": F.cross_entropy}, "train_batches gave no data: an empty loader", id="empty"),
        pytest.param(generator_that_is_used_up, {}, "already used up", id="exhausted"),
        pytest.param(slow.labelled, {"val_batches": iter(())}, "val_batches gave no data", id="no-evaluation-data"),
        pytest.param(slow.labelled, {"max_batches": 0}, "train_batches: max_batches must be", id="max-batches"),
        pytest.param(lambda: torch.ones(3, 3), {}, r"Wrap a single batch in a list", id="one-batch"),
        pytest.param(
            lambda: [x for x, _ in slow.labelled()], {"loss": F.cross_entropy}, "got a batch that is a Tensor", id="x"
        ),
        pytest.param(lambda: [{"x": 1}], {"loss": F.cross_entropy}, "forward=", id="dict"),
    ],
)
def test_refusals(make, options, message):
    with pytest.raises(AuditError, match=message):
        audit_batch_norm(slow.net(), make(), **options)


def test_no_batch_norm_and_all_of_them_frozen():
    with pytest.raises(AuditError, match="Linear has no BatchNorm layer"):
        audit_batch_norm(nn.Linear(3, 3), slow.labelled(), loss=F.cross_entropy)
    model = slow.net().train()
    model.bn1.eval()
    model.bn2.eval()
    with pytest.raises(AuditError, match=r"is frozen.*Call model.eval\(\) first"):
        audit_batch_norm(model, slow.labelled(), loss=F.cross_entropy)
    assert audit_batch_norm(model.eval(), slow.labelled(), loss=F.cross_entropy).losses is not None


def test_what_a_step_raises_is_its_users():
    def step(model, batch):
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        audit_batch_norm(slow.net(), slow.labelled(), step=step)


def test_a_network_without_any_running_statistics_has_findings():
    model = slow.net(dropout=0.0)
    model.bn1 = nn.BatchNorm2d(4, track_running_stats=False).double()
    model.bn2 = nn.BatchNorm2d(5, track_running_stats=False).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = audit_batch_norm(model, slow.labelled(), loss=F.cross_entropy)
    assert {(found.rule, found.layer) for found in report.findings} >= {
        ("no-statistics", "bn1"),
        ("no-statistics", "bn2"),
    }
    assert report.losses.difference("stale statistics").mean == 0.0
    assert [row.predicted_loss_change for row in report.layers] == [None, None]


def test_a_compiled_network_runs_as_it_is_written(plain):
    model = torch.compile(slow.net(dropout=0.0), backend="eager")
    same_readings(audit_batch_norm(model, slow.labelled(), loss=F.cross_entropy), plain)
    inside = SeveralInputs(torch.compile(slow.net(dropout=0.0), backend="eager"))
    report = audit_batch_norm(
        inside,
        slow.labelled(),
        loss=F.cross_entropy,
        forward=lambda model, batch: model(batch[0], 1.0, offset=0.0),
    )
    assert report.losses.deployed.mean == pytest.approx(plain.losses.deployed.mean)
    assert all(row.predicted_loss_change is not None for row in report.layers)


def test_batches_and_targets_are_moved_to_the_network():
    network, seen = nn.Linear(2, 1, device="meta"), []

    def step(model, batch):
        seen.extend([batch["pair"].x, batch["pair"].y[0]["z"]])
        return model(batch["pair"].x).mean()

    assert Run(step=step)(network, {"pair": Pair(torch.ones(3, 2), ({"z": torch.ones(1)}, "name"))}).is_meta
    target = [{"z": torch.ones(3, 1)}]
    assert Run(loss=lambda output, target: (seen.append(target[0]["z"]), output.mean())[1])(
        network, (torch.ones(3, 2), target)
    ).is_meta
    assert [tensor.device.type for tensor in seen] == ["meta"] * 3
    assert target[0]["z"].device.type == "cpu", "the owner's is as it was"


def test_names_of_layers_are_no_patterns():
    """A ``ModuleDict`` may hold keys in brackets, which as patterns would match others, or nothing."""
    model = nn.Sequential(nn.ModuleDict({"bn[0]": nn.BatchNorm1d(3), "bn0": nn.BatchNorm1d(3)}))
    batches = [torch.randn(8, 3, generator=torch.Generator().manual_seed(0))]
    report = audit_batch_norm(model, batches, forward=lambda model, x: model[0]["bn0"](model[0]["bn[0]"](x)))
    assert {row.name: row.count for row in report.layers} == {"0.bn[0]": 8, "0.bn0": 8}


def test_examples_are_counted_by_the_first_tensor():
    assert examples_in([{"id": ["a", "b"]}, torch.zeros(5, 2)]) == 5
    assert examples_in(torch.zeros(())) == 1
    assert examples_in({"text": "abc"}) == 1
