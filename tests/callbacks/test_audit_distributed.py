"""The audit under Lightning's DDP: both processes report on all data, and what one cannot do stops neither."""

import os
import pickle
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bn_lightning.auditing import audit_batch_norm

SIZES = (3, 7)
STEPS = 6

pytestmark = pytest.mark.slow


def batches(rank):
    generator = torch.Generator().manual_seed(100 + rank)
    size = SIZES[rank]
    return [
        (rank + torch.randn(size, 4, generator=generator), torch.randint(0, 3, (size,), generator=generator))
        for _ in range(STEPS)
    ]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3), nn.BatchNorm1d(3))


def process(rank, folder):
    warnings.simplefilter("ignore")
    import lightning.pytorch as pl
    from torch import distributed
    from torch.utils.data import DataLoader, Dataset

    from bn_lightning.callbacks import BatchNormAudit
    from bn_lightning.errors import AuditError

    class Batches(Dataset):
        fails = False

        def __len__(self):
            return STEPS

        def __getitem__(self, index):
            if self.fails:
                raise OSError("the disk is gone")
            return batches(rank)[index]

    class Module(pl.LightningModule):
        fails = False

        def __init__(self):
            super().__init__()
            self.network = network()

        def forward(self, x):
            return self.network(x)

        def training_step(self, batch, batch_idx):
            if self.fails and rank == 1:
                raise KeyError("of the loop")
            self.log("loss", 0.0)
            return F.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self(batch[0])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-2)

    def fit(callback, validation=False, fault=None):
        class Break(pl.Callback):
            def on_train_end(self, trainer, pl_module):
                data.fails = fault == "data" and rank == 1
                pl_module.fails = fault == "step"

        data, module = Batches(), Module()
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=2,
            strategy="ddp",
            use_distributed_sampler=False,
            max_epochs=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[*([] if callback is None else [callback]), Break()],
        )
        found = {"raised": None}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                trainer.fit(
                    module,
                    DataLoader(data, batch_size=None),
                    DataLoader(Batches(), batch_size=None) if validation else None,
                )
            except AuditError as error:
                found["raised"] = str(error)
        found["told"] = [str(entry.message) for entry in caught if "BatchNorm audit" in str(entry.message)]
        found["state"] = {key: value.clone() for key, value in module.network.state_dict().items()}
        found["report"] = None if callback is None else callback.report
        return found

    torch.set_num_threads(1)
    found = {
        "plain": fit(None, validation=True),
        "validated": fit(BatchNormAudit(when="validation"), validation=True),
        "trained": fit(BatchNormAudit()),
        "data": fit(BatchNormAudit(), fault="data"),
        "step": fit(BatchNormAudit(), fault="step"),
        "failing": fit(BatchNormAudit(fail_on="info")),
    }
    Path(folder, str(rank)).write_bytes(pickle.dumps(found))
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    both = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env={
                **os.environ,
                "PYTHONPATH": path,
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [running.communicate(timeout=180)[0] for running in both]
    assert [running.returncode for running in both] == [0, 0], "\n".join(outputs)
    assert "BatchNorm audit of" in outputs[0]
    assert "BatchNorm audit of" not in outputs[1]
    return [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(2)]


def reasons(report):
    return {row.what: row.reason for row in report.not_looked}


def test_training_is_bitwise_the_training_without(found):
    for own in found:
        assert all(torch.equal(value, own["plain"]["state"][key]) for key, value in own["validated"]["state"].items())


def test_both_processes_report_on_all_data(found):
    one, two = (own["trained"]["report"] for own in found)
    assert one.losses == two.losses
    for own in found:
        report = own["trained"]["report"]
        assert report.batches == 2 * STEPS
        model = network()
        model.load_state_dict(own["trained"]["state"])  # each has running statistics of its own
        alone = audit_batch_norm(
            model,
            batches(0) + batches(1),
            step=lambda module, batch: F.cross_entropy(module(batch[0]), batch[1]),
        )
        gaps = {row.name: row.gap for row in alone.layers}
        assert {row.name.removeprefix("network."): row.gap for row in report.layers} == pytest.approx(gaps, rel=1e-5)
        assert {row.count for row in report.layers} == {sum(SIZES) * STEPS}
        for reading in ("full_training", "batch_statistics", "recalibrated"):
            found_mean, mean = (getattr(each.losses, reading).mean for each in (report, alone))
            assert found_mean == pytest.approx(mean, rel=1e-5)


def test_the_validation_data_of_both_are_read(found):
    one, two = (own["validated"]["report"] for own in found)
    assert one.losses == two.losses
    assert (one.losses.source, one.losses.batches) == ("evaluation", 2 * STEPS)


def test_data_that_fail_in_one_process_are_left_out_in_both(found):
    one, two = (own["data"]["report"] for own in found)
    assert reasons(one)["active stage"] == "process 1 cannot audit: OSError: the disk is gone"
    assert "the disk is gone" in reasons(two)["active stage"]
    assert {one.batches, two.batches} == {0}
    assert all(len(own["data"]["told"]) == 1 for own in found)


def test_a_step_that_fails_in_one_process_is_left_out_in_both(found):
    one, two = (own["step"]["report"] for own in found)
    assert "of the loop" in reasons(one)["loss readings"]
    assert "of the loop" in reasons(two)["loss readings"]
    assert one.losses is two.losses is None
    assert {row.count for report in (one, two) for row in report.layers} == {sum(SIZES) * STEPS}


def test_findings_raise_in_both(found):
    assert all("of severity 'info' or worse" in own["failing"]["raised"] for own in found)
    assert all(own["plain"]["raised"] is None for own in found)


if __name__ == "__main__":
    process(int(sys.argv[1]), sys.argv[2])
