"""Two processes with unequal data audit as one process does that has all of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from auditing import slow_readings as slow
from torch import distributed, nn

from bn_lightning.auditing import audit_batch_norm
from bn_lightning.errors import AuditError
from bn_lightning.layers import convert_batch_norm

WORLD = 2
TRAIN, VAL = ([6, 4, 9], [7]), ([5], [8, 3])


def build():
    """Layers that exchange statistics in training, which processes with unequal numbers of batches cannot."""
    model = slow.net(dropout=0.0)
    convert_batch_norm(model, "cross_replica", include=("bn1",))
    model.bn2 = nn.SyncBatchNorm.convert_sync_batchnorm(model.bn2)
    return model.train()


def data(rank, sizes=TRAIN):
    return slow.labelled(sizes[rank], seed=10 + rank + 5 * (sizes is VAL))


def told(report):
    losses = None if report.losses is None else report.losses.to_dict()
    return report.batches, losses, [row.to_dict() for row in report.layers]


def refused(*arguments, **options):
    with pytest.raises((AuditError, OSError)) as caught:
        audit_batch_norm(build(), *arguments, **options)
    return type(caught.value).__name__, str(caught.value)


def process(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    calls, original = [], distributed.all_gather_object
    distributed.all_gather_object = lambda *arguments, **options: calls.append(1) or original(*arguments, **options)
    loss, train, val = {"loss": F.cross_entropy}, data(rank), data(rank, VAL)
    model = build()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = {
        "training": told(audit_batch_norm(model, train, **loss)),
        "evaluation": told(audit_batch_norm(model, train, val_batches=val, **loss)),
        "no loss": told(audit_batch_norm(model, train)),
        "none here": told(audit_batch_norm(model, [] if rank else train, val_batches=val if rank else [], **loss)),
    }
    found["unchanged"] = all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    found["processes know of each other"] = len(calls) > 0

    def broken(output, target):
        if rank == 1 and torch.is_grad_enabled():
            raise OSError("the disk is gone")
        return F.cross_entropy(output, target)

    def vector(output, target):
        return F.cross_entropy(output, target, reduction="none" if rank else "mean")

    def batches():
        yield from train
        if rank:
            raise OSError("no such file")

    found["refused"] = {
        "loss": refused(train, loss=broken),
        "vector": refused(train, loss=vector),
        "loader": refused(batches(), **loss),
        "val": refused(train, val_batches=val if rank else None, **loss),
        "reads": refused(train, **(loss if rank else {})),
        "nothing": refused([], **loss),
    }
    # A layer whose statistics are not finite in one process only: both confirm the same layers.
    lopsided = build()
    if rank:
        lopsided.bn2.running_var[0] = torch.nan
    found["lopsided"] = [
        (row.name, row.predicted_loss_change is None, row.confirmed_loss_change is None)
        for row in sorted(audit_batch_norm(lopsided, train, **loss).layers, key=lambda row: row.name)
    ]
    # A batch of one in one process only, whose report is not the one that is printed.
    alone = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    batches = [torch.randn(1 if rank and index == 2 else 6, 4) for index in range(3)]
    found["alone"] = [
        (f.rule, f.layer, f.message.split(":")[0])
        for f in audit_batch_norm(alone, batches).findings
        if f.rule == "single-value-batch"
    ]
    # Each of these processes has data of its own scale: with dropout and without have to be those of the same data.
    dropped = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    x = 10.0**rank * torch.randn(512, 4, generator=torch.Generator().manual_seed(rank))
    report = audit_batch_norm(dropped, [(x, x)], loss=F.mse_loss)
    found["dropout"] = [f.evidence["variance_ratio"] for f in report.findings if f.rule == "dropout-before-norm"]
    torch.save(found, os.path.join(folder, f"{rank}.pt"))
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    everyone = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        for each in everyone:
            output, _ = each.communicate(timeout=120)
            assert each.returncode == 0, output
    finally:
        for each in everyone:
            each.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def single(**options):
    return told(audit_batch_norm(build(), data(0) + data(1), **options))


def near(one, other):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            near(value, other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            near(*pair)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-9, abs=1e-12)
    else:
        assert one == other


def test_dropout_is_measured_over_the_data_of_all(found):
    """Zeros for half of the values and twice the rest have twice the variance."""
    (own,), (other,) = (each["dropout"] for each in found)
    assert own == other == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("what", ["training", "evaluation", "no loss", "none here"])
def test_readings_and_predictions_are_those_of_all_data(found, what):
    expected = {
        "training": lambda: single(loss=F.cross_entropy),
        "evaluation": lambda: single(loss=F.cross_entropy, val_batches=data(0, VAL) + data(1, VAL)),
        "no loss": lambda: single(),
        "none here": lambda: told(audit_batch_norm(build(), data(0), val_batches=data(1, VAL), loss=F.cross_entropy)),
    }[what]()
    for mine in found:
        near(mine[what], expected)
    assert found[0][what] == found[1][what], "to the last bit"


def test_models_are_as_before(found):
    assert [each["unchanged"] for each in found] == [True, True]
    assert [each["processes know of each other"] for each in found] == [True, True]


def test_what_fails_in_one_process_is_told_in_all(found):
    kinds = {name: [each["refused"][name][0] for each in found] for name in found[0]["refused"]}
    messages = {name: [each["refused"][name][1] for each in found] for name in found[0]["refused"]}
    assert kinds["loss"] == ["AuditError", "OSError"]
    assert messages["loss"] == ["process 1 cannot audit: OSError: the disk is gone", "the disk is gone"]
    assert kinds["loader"] == ["AuditError", "OSError"]
    assert "process 1" in messages["loader"][0]
    for name, text in (
        ("vector", "a scalar, the mean loss of the batch, got a tensor of shape (7,)"),
        ("val", "val_batches was given in some processes and not in others"),
        ("reads", "a loss was given in some processes and not in others"),
        ("nothing", "train_batches gave no data"),
    ):
        assert kinds[name] == ["AuditError"] * 2
        assert all(text in message for message in messages[name]), messages[name]


def test_a_prediction_that_one_process_cannot_make_is_made_in_none(found):
    assert found[0]["lopsided"] == found[1]["lopsided"]
    assert ("bn2", True, True) in found[0]["lopsided"]


def test_what_one_process_found_stands_in_all_reports(found):
    assert found[0]["alone"] == found[1]["alone"] == [("single-value-batch", "1", "in process 1 of 2")]


if __name__ == "__main__":
    process(int(sys.argv[1]), sys.argv[2])
